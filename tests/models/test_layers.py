"""Layers shared by the families, against PyTorch's own."""

import pytest
import torch
from torch import nn

from models.layers import (
    Conv1x1,
    DepthwiseConv,
    LayerNorm,
    ResidualDepthwiseConv,
    attend_all,
    batch_norm,
    wide_softmax,
)
from tests.helpers.bounds import ulps
from tests.helpers.small_models import images


def as_nchw(x):
    return x.permute(0, 3, 1, 2)


def test_conv1x1_equals_the_convolution():
    conv, x = Conv1x1(6, 4), images(2, 5, 3, 6)
    want = nn.functional.conv2d(as_nchw(x), conv.weight, conv.bias)
    torch.testing.assert_close(as_nchw(conv(x)), want)


def test_depthwise_conv_equals_the_convolution():
    conv, x = DepthwiseConv(6, 5, stride=2, bias=False), images(2, 7, 4, 6)
    want = nn.functional.conv2d(as_nchw(x), conv.weight, stride=2, padding=2, groups=6)
    assert conv.bias is None
    torch.testing.assert_close(as_nchw(conv(x)), want)


def test_batch_norm_equals_the_norm_of_the_moved_map():
    norm, x = nn.BatchNorm2d(6), images(2, 5, 3, 6)
    torch.testing.assert_close(as_nchw(batch_norm(norm, x)), norm(as_nchw(x)))


def test_wide_softmax_computes_in_float32_and_keeps_the_type():
    x = 5 * images(4, 300)
    half = x.bfloat16()
    assert torch.equal(wide_softmax(half, 1), half.float().softmax(1).bfloat16())
    double = wide_softmax(x.double(), 1)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.sum(1), torch.ones(4, dtype=torch.float64), rtol=ulps(300, torch.float64), atol=0)


def test_residual_convolution_is_one_with_a_raised_centre():
    conv, x = ResidualDepthwiseConv(6).double(), torch.randn(2, 5, 4, 6, dtype=torch.float64)
    plain = DepthwiseConv(6, 3).double()
    plain.load_state_dict(conv.state_dict())  # no entry but weight and bias
    torch.testing.assert_close(conv(x), x + plain(x), rtol=1e-12, atol=1e-12)


def test_layer_norm_trains_in_float32_under_autocast():
    norm, x = LayerNorm(64), torch.randn(2, 56, 56, 64)
    cotangent = torch.randn_like(x)
    expected = torch.autograd.grad(norm(x), norm.weight, cotangent)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x.bfloat16())
    found = torch.autograd.grad(y, norm.weight, cotangent.to(y.dtype))[0]
    assert (found - expected).norm() < 0.01 * expected.norm()  # torch's own is off by 9 %
    with torch.no_grad():
        assert norm(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("stride", [1, 2])
def test_large_depthwise_kernel_trained_in_bf16_equals_float64(stride):
    conv, x = DepthwiseConv(6, 7, stride), images(2, 9, 8, 6).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    cotangent = images(*y.shape, seed=2).bfloat16()
    found = torch.autograd.grad(y, (conv.weight, conv.bias, x), cotangent)
    wide, double = DepthwiseConv(6, 7, stride).double(), x.detach().double().requires_grad_()
    wide.load_state_dict(conv.state_dict())
    want = torch.autograd.grad(wide(double), (wide.weight, wide.bias, double), cotangent.double())
    assert y.dtype == torch.bfloat16
    for got, exact in zip(found[:2], want[:2], strict=True):
        assert (got - exact).norm() < 1e-5 * exact.norm()  # in bfloat16 it is off by 2e-3
    assert (found[2] - want[2]).norm() < 1e-2 * want[2].norm()


def attended(q, k, v, cotangent):
    y = attend_all(q, k, v)
    return [y, *torch.autograd.grad(y, (q, k, v), cotangent)]


def test_attention_as_products_equals_pytorchs_in_float64():
    q, k, v = (images(2, 3, n, 8, seed=n, dtype=torch.float64).requires_grad_() for n in (5, 7, 7))
    cotangent = images(2, 3, 5, 8, seed=3, dtype=torch.float64)
    want = attended(q, k, v, cotangent)
    with torch.autocast("cpu", torch.bfloat16):  # casts no float64, but is what chooses the products
        found = attended(q, k, v, cotangent)
    assert type(found[0].grad_fn).__name__ != type(want[0].grad_fn).__name__  # another way was gone
    for got, exact in zip(found, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


def test_attention_trained_in_bf16_equals_float64_to_its_digits():
    q, k, v = (images(2, 3, n, 8, seed=n).bfloat16().requires_grad_() for n in (5, 7, 7))
    cotangent = images(2, 3, 5, 8, seed=3).bfloat16()
    found = attended(q, k, v, cotangent)
    exact = attended(*(t.detach().double().requires_grad_() for t in (q, k, v)), cotangent.double())
    for got, want in zip(found, exact, strict=True):
        assert (got - want).norm() < 0.02 * want.norm()
