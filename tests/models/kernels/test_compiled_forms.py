"""Forms of layers that torch.compile takes on CUDA, on the CPU in float64: equal to PyTorch's, outputs and gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import layers
from models.kernels.depthwise_convolution import depthwise_operator
from models.kernels.permuted_rows import permute_rows
from models.kernels.whole_norm import whole_norm
from models.layers import ConvMlp
from tests.helpers.small_models import SMALLEST, images, scrambled, shrunken


def both(function, *tensors):
    """Return output and gradients for a cotangent that differs from element to element."""
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*inputs)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y, *torch.autograd.grad(y, inputs, cotangent)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [3, 5, 7])
def test_depthwise_operator_equals_convolution(k, stride):
    x, weight = images(2, 7, 10, 6, dtype=torch.float64), images(6, 1, k, k, seed=2, dtype=torch.float64)
    got = both(lambda x, w: depthwise_operator(x, w, stride), x, weight)
    want = both(lambda x, w: layers.depthwise(x, w, None, stride), x, weight)
    torch.testing.assert_close(got, want)
    assert got[0].is_contiguous()
    assert got[1].is_contiguous()
    torch.library.opcheck(depthwise_operator, (x, weight, stride), test_utils=("test_schema", "test_faketensor"))


def test_gradient_of_a_depthwise_weight_has_its_strides():
    weight = images(4, 1, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    grad = both(lambda x, w: depthwise_operator(x, w, 1), images(2, 5, 5, 4, dtype=torch.float64), weight)[2]
    assert grad.stride() == weight.stride()


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (3, 1, 1, 8)])
def test_whole_norm_equals_group_norm(shape):
    x, weight, bias = 3 + images(*shape, dtype=torch.float64), images(shape[3], seed=2), images(shape[3], seed=3)

    def plain(x, weight, bias):
        return F.group_norm(x.permute(0, 3, 1, 2), 1, weight, bias, 1e-5).permute(0, 2, 3, 1)

    tensors = x, weight.double(), bias.double()
    torch.testing.assert_close(both(lambda *t: whole_norm(*t, 1e-5), *tensors), both(plain, *tensors))


def test_permuted_rows_equal_index_select():
    x = images(50, 3, dtype=torch.float64)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    got, want = both(lambda x: permute_rows(x, order), x), both(lambda x: x.index_select(0, order), x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_bias_of_the_hidden_convolution_is_equal_before_and_after_fc2(monkeypatch):
    mlp, x = scrambled(ConvMlp(6, 24)).double(), images(2, 5, 4, 6, dtype=torch.float64)

    def plain(x):
        return nn.Sequential(mlp.fc1, mlp.conv, mlp.fc2)(x)

    found = []
    for function, compiled in ((lambda x: mlp(x), True), (plain, False)):
        monkeypatch.setattr(layers, "has_operator", lambda x, on=compiled: on)
        inputs = [x.clone().requires_grad_(), *mlp.parameters()]
        y = function(inputs[0])
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        found.append((y, *torch.autograd.grad(y, inputs, cotangent)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", SMALLEST)
def test_families_are_equal_in_their_compiled_form(name, monkeypatch):
    model = scrambled(shrunken(name, depths=(1, 2, 1, 1))).double()
    x, found, asked = images(2, 3, 64, 64, dtype=torch.float64), [], []
    for compiled in (False, True):
        monkeypatch.setattr(layers, "has_operator", lambda x, on=compiled: asked.append(on) or on)
        y = model(x)
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        wanted = [p for p in model.parameters() if p.requires_grad]
        found.append((y, *torch.autograd.grad(y, wanted, cotangent, allow_unused=True)))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)
    assert True in asked
