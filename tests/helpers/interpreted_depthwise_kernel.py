"""The depthwise kernel against PyTorch's operations, on the CPU: tests/models/kernels/test_depthwise.py runs this under TRITON_INTERPRET=1."""

import json

import pytest
import timm
import torch
from torch.nn import functional as F

from benchmarks import kernels
from models.kernels import depthwise
from models.kernels.depthwise import INTERPRETED, gelu_depthwise
from models.kernels.switch import use_kernels
from models.layers import GeluDepthwiseConv
from tests.helpers.small_models import images, scrambled

assert INTERPRETED, "run with TRITON_INTERPRET=1"
ORDERS = pytest.mark.parametrize("before", [True, False], ids=["gelu_before", "gelu_after"])


def layer(C, before, dtype=torch.float64):
    torch.manual_seed(0)
    return scrambled(GeluDepthwiseConv(C, before)).to(dtype)


def with_gradients(function, x, conv, cotangent):
    """Return the output and the gradients of x, weight and bias."""
    x = x.detach().requires_grad_()
    y = function(x, conv)
    return y, *torch.autograd.grad(y, (x, conv.weight, conv.bias), cotangent.to(y.dtype))


def kernel(x, conv):
    return gelu_depthwise(x, conv.weight, conv.bias, conv.gelu_before)


def plain(x, conv):
    assert conv.kernel is None
    return conv(x)


def assert_equal(got, want, bound):
    for name, a, b in zip(("y", "x", "weight", "bias"), got, want, strict=True):
        assert a.shape == b.shape, name
        assert (a.double() - b).norm() <= bound * b.norm(), name


@ORDERS
@pytest.mark.parametrize("shape", [(2, 3, 6, 10), (1, 1, 1, 1), (5, 1, 5, 2), (1, 2, 3, 70), (1, 5, 2, 3)], ids=str)
def test_kernel_equals_plain_in_float64(monkeypatch, shape, before):
    monkeypatch.setattr(depthwise, "MAX_ROWS", 3)  # five rows are two strips
    conv, x = layer(shape[3], before), 2 * images(*shape, dtype=torch.float64)
    cotangent = images(*shape, seed=3, dtype=torch.float64)
    assert_equal(with_gradients(kernel, x, conv, cotangent), with_gradients(plain, x, conv, cotangent), 1e-13)


@ORDERS
def test_shift_equals_a_bias_before_the_kernel(monkeypatch, before):
    monkeypatch.setattr(depthwise, "MAX_ROWS", 3)
    conv, x, found = layer(10, before), 2 * images(2, 5, 6, 10, dtype=torch.float64), []
    shift, cotangent = images(10, seed=4, dtype=torch.float64), images(2, 5, 6, 10, seed=3, dtype=torch.float64)
    for inside in (True, False):
        leaves = x.clone().requires_grad_(), shift.clone().requires_grad_(), conv.weight, conv.bias
        y = gelu_depthwise(leaves[0], *leaves[2:], before, leaves[1]) if inside else conv(leaves[0] + leaves[1])
        found.append((y, *torch.autograd.grad(y, leaves, cotangent)))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-13 * b.norm()


@ORDERS
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 5e-7), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str
)
def test_kernel_in_lower_precision_is_near_float64(dtype, bound, before):
    conv, x = layer(10, before, dtype), (2 * images(1, 3, 5, 10)).to(dtype)
    cotangent = images(1, 3, 5, 10, seed=3).to(dtype)
    got = with_gradients(kernel, x, conv, cotangent)
    assert {t.dtype for t in got} == {dtype}
    conv = conv.double()
    assert_equal(got, with_gradients(plain, x.double(), conv, cotangent.double()), bound)


def test_kernel_gelu_in_float32_is_as_near_float64_as_pytorch():
    x = torch.linspace(-8, 8, 256).view(1, 1, 1, 256).requires_grad_()
    y = gelu_depthwise(x, torch.zeros(256, 1, 3, 3), torch.zeros(256), True)
    (slope,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    want = F.gelu(wide)
    (slope_want,) = torch.autograd.grad(want.sum(), wide)
    assert (y - want).abs().max() <= (F.gelu(x) - want).abs().max()
    assert (slope - slope_want).abs().max() <= 2 * torch.finfo(torch.float32).eps


@ORDERS
def test_kernel_takes_any_strides(before):
    conv = layer(6, before)
    large = images(2, 7, 8, 12, dtype=torch.float64)
    for x in (large[1:, 2:5, ::2, 3:9], images(1, 6, 3, 4, dtype=torch.float64).permute(0, 2, 3, 1)):
        cotangent = images(1, 3, 4, 1, dtype=torch.float64).expand(x.shape)
        assert not x.is_contiguous()
        assert_equal(with_gradients(kernel, x, conv, cotangent), with_gradients(plain, x, conv, cotangent), 1e-13)


@ORDERS
@pytest.mark.parametrize("shape", [(0, 5, 4, 6), (2, 0, 4, 6)], ids=str)
def test_kernel_of_nothing_gives_nothing_and_zero_gradients(shape, before):
    y, x, weight, bias = with_gradients(kernel, torch.zeros(shape), layer(6, before, torch.float32), torch.zeros(shape))
    assert y.shape == x.shape == shape
    assert not weight.any()
    assert not bias.any()


@ORDERS
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_under_autocast_has_the_types_of_plain(given, before):
    conv, x = layer(6, before, torch.float32), images(1, 2, 3, 6).to(given)
    cotangent = images(1, 2, 3, 6, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = with_gradients(kernel, x, conv, cotangent), with_gradients(plain, x, conv, cotangent)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert got[0].dtype == torch.bfloat16
    assert_equal(got, [t.double() for t in want], 0.02)


def test_kernel_refuses_two_types_without_autocast():
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16 and weight torch\.float32"):
        kernel(images(1, 2, 3, 6).bfloat16(), layer(6, True, torch.float32))


def test_kernel_refuses_shapes_that_do_not_fit():
    conv = layer(6, True, torch.float32)
    for x in (images(1, 2, 3, 7), images(2, 3, 6)):
        with pytest.raises(
            ValueError, match=r"x, weight and bias must have shapes .* not \(.*\), \(6, 1, 3, 3\), \(6,\)"
        ):
            kernel(x, conv)


@ORDERS
def test_kernel_refuses_a_second_derivative(before):
    conv, x = layer(6, before), images(1, 2, 3, 6, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(kernel(x, conv).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of torch itself
@pytest.mark.parametrize("shifted", [False, True])
@ORDERS
def test_kernel_is_a_sound_operator(before, shifted):
    conv, x = layer(4, before, torch.float32), images(1, 1, 2, 4).requires_grad_()
    shift = images(4, seed=4).requires_grad_() if shifted else None
    results = torch.library.opcheck(torch.ops.retoken.gelu_depthwise, (x, conv.weight, conv.bias, shift, before))
    assert set(results.values()) == {"SUCCESS"}


@ORDERS
def test_kernel_compiles_into_one_graph(before):
    torch._dynamo.reset()
    conv, x = layer(4, before, torch.float32), images(1, 1, 2, 4)
    use_kernels(conv)
    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            pair = [with_gradients(lambda x, f: f(x), x, f, x) for f in (conv, compiled)]
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("name", ["sgformer_small", "stvit_small"])
def test_model_with_kernels_equals_without(name):
    arguments = {"dims": (8, 12, 16, 20), "num_heads": (2, 2, 2, 2), "depths": (1, 1, 1, 1), "num_classes": 3}
    model = scrambled(timm.create_model(name, img_size=32, **arguments)).double().train()
    x, outputs, entries = images(2, 3, 32, 32, dtype=torch.float64), [], set(model.state_dict())
    for switch in (lambda model: None, use_kernels):
        switch(model)
        model.zero_grad()
        logits = model(x)
        F.cross_entropy(logits, torch.tensor([1, 2])).backward()
        outputs.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert set(model.state_dict()) == entries
    largest = max(grad.norm() for grad in outputs[0][1:])
    for want, got in zip(*outputs, strict=True):
        assert (got - want).norm() <= 1e-11 * max(want.norm(), 0.01 * largest)


def test_kernel_benchmark_writes_its_table(monkeypatch, tmp_path):
    for name, value in (("STRIPS", 2), ("COLUMNS", 2), ("CHANNELS", 32), ("WARPS", 1)):
        monkeypatch.setattr(kernels, name, (value,))
    every = kernels.find_cases
    monkeypatch.setattr(kernels, "find_cases", lambda *shape: list(every(*shape))[-1:])
    tiles = depthwise.FORWARD, depthwise.BACKWARD
    small = "--models stvit_small --batch 1 --size 32 --channels 3 --rounds 2 --span 1e-6 --no-compile --tiles"
    assert kernels.main([*small.split(), "--out", str(tmp_path / "kernels")]) == 0
    assert tiles == (depthwise.FORWARD, depthwise.BACKWARD)
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert [(row["what"], row["shape"]) for row in result["rows"]] == [
        ("inference", [1, 1, 1, 3]),
        ("training", [1, 1, 1, 3]),
    ]
    assert all(row["difference"] < 0.02 and len(row["seconds"]["kernel"]) == 2 for row in result["rows"])
    assert [row["tile"]["channels"] for row in result["tiles"]] == [32, 32]
    text = (tmp_path / "kernels.md").read_text()
    assert "interpreter: no measure of the kernel" in text
    assert "| stvit_small | 3 | 1×1×1×3 | before | inference |" in text
