"""models.inference.prepare: a model prepared for inference computes the same function."""

import copy

import pytest
import torch
from torch import nn

from models.backbone import Backbone
from models.inference import prepare
from models.inference.fold import fold
from models.inference.prepare import OneDnnConv, OneDnnLinear, fuse, lower, prepare_inference
from models.layers import GeluDepthwiseConv
from models.stvit import STViT
from tests.helpers.small_models import SMALLEST, images, scrambled, shrunken

BF16 = torch.autocast("cpu", torch.bfloat16)


def trained(name, seed=2):
    """Return a model in evaluation mode whose statistics are those of some training."""
    model = scrambled(shrunken(name), seed).eval()
    for key, statistic in model.named_buffers():
        if key.endswith("running_var"):
            statistic.abs_().add_(0.5)
    return model


def difference(got, want):
    return float((got.double() - want.double()).norm().detach() / want.double().norm().detach())


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
def test_prepared_model_equals_the_plain_one_in_float32(name, size):
    model, x = trained(name), images(2, 3, *size)
    want = model.double()(x.double())
    prepared = prepare_inference(copy.deepcopy(model).float())
    assert difference(prepared(x), want) < 1e-4
    assert not any(parameter.requires_grad for parameter in prepared.parameters())


@pytest.mark.parametrize("name", SMALLEST)
def test_prepared_model_is_as_near_to_float64_as_autocast(name):
    """Both round each layer's weights and output once; one draw tells little, so the errors of several are added.

    Over 10 draws, 3 families and 2 instruction sets the logarithm of the ratio of the errors of a draw has a mean of -0.04 and
    a standard deviation of up to 0.2: of 5 draws 0.1, and 1.5 is four of them.
    """
    plain = prepared = 0.0
    for seed in range(5):
        model, x = trained(name, seed), images(4, 3, 64, 64, seed=seed)
        want = copy.deepcopy(model).double()(x.double())
        with torch.no_grad(), BF16:
            plain += difference(model(x), want) ** 2
            prepared += difference(prepare_inference(model, torch.bfloat16)(x), want) ** 2
    assert prepared**0.5 < 1.5 * plain**0.5


@pytest.mark.parametrize("name", SMALLEST)
def test_lowered_weights_change_no_bit_under_autocast(name):
    model, x = trained(name), images(2, 3, 64, 64)
    fold(model)
    with torch.no_grad(), BF16:
        want = model(x)
        lower(model, torch.bfloat16)
        assert torch.equal(model(x), want)
    assert {p.dtype for m in model.modules() if type(m) is nn.Linear for p in m.parameters(recurse=False)} >= {
        torch.bfloat16
    }


@pytest.mark.parametrize("name", SMALLEST)
def test_every_product_and_activation_is_fused(name):
    model = trained(name)
    prepare_inference(model)
    left = [key for key, module in model.named_modules() if isinstance(module, nn.Linear) and ".runs." not in key]
    assert left == []
    activations = [key for key, module in model.named_modules() if isinstance(module, nn.GELU)]
    assert activations == (["stem.act"] if name == "sgformer_small" else [])  # after a GroupNorm
    fused = [m.activation for m in model.modules() if isinstance(m, OneDnnLinear | OneDnnConv)]
    assert fused.count("gelu") == {"stvit_small": 8 + 4, "sgformer_small": 8, "groupmixformer_mobile": 8}[name]
    assert fused.count("hardswish") == (2 + 4 + 3 * 8 if name == "groupmixformer_mobile" else 0)


def test_model_is_unchanged_where_the_operations_are_missing_or_differ(monkeypatch):
    model = trained("stvit_small")
    fold(model)
    before = str(model)
    with monkeypatch.context() as patch:
        patch.setattr(prepare.OneDnnLinear, "forward", lambda self, x: x.new_zeros(*x.shape[:-1], self.out_features))
        assert fuse(model) == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert fuse(model) == 0
    assert str(model) == before
    assert fuse(model) > 0


def test_model_is_unchanged_where_the_processor_lacks_bfloat16(monkeypatch):
    """As with AVX2 only (ONEDNN_MAX_CPU_ISA=AVX2)."""
    model, x, convolve = trained("stvit_small"), images(2, 3, 64, 64), OneDnnConv.forward

    def forward(self, x):
        if self.weight.dtype == torch.bfloat16:
            raise RuntimeError("bf16 path needs the cpu support avx_ne_convert or avx512bw, avx512vl and avx512dq")
        return convolve(self, x)

    monkeypatch.setattr(OneDnnConv, "forward", forward)
    folded = copy.deepcopy(model)
    fold(folded)
    with torch.no_grad(), BF16:
        assert torch.equal(prepare_inference(copy.deepcopy(model), torch.bfloat16)(x), folded(x))
    assert any(isinstance(module, OneDnnConv) for module in prepare_inference(model).modules())


def test_no_random_number_is_drawn():
    model = trained("stvit_small")
    state = torch.get_rng_state()
    prepare_inference(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_double_and_half_precision_are_folded_only():
    model, x = trained("groupmixformer_mobile"), images(2, 3, 64, 64)
    want = copy.deepcopy(model).double()(x.double())
    double = prepare_inference(copy.deepcopy(model).double())
    assert difference(double(x.double()), want) < 1e-10
    assert not any(isinstance(module, OneDnnLinear) for module in double.modules())


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        prepare_inference(trained("stvit_small").train())


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Linear cannot be folded: its class does not declare"):
        prepare_inference(nn.Linear(2, 2).eval())


def test_class_without_a_declaration_of_its_own_is_refused():
    """A class that does not itself declare `foldable` may use weights in ways that folding does not expect."""

    class Own(Backbone):
        def __init__(self):
            nn.Module.__init__(self)

    class Changed(STViT):
        def __init__(self):
            nn.Module.__init__(self)

    for kind in (Own, Changed):
        with pytest.raises(ValueError, match=f"{kind.__name__} cannot be folded: its class does not declare"):
            prepare_inference(kind().eval())


def test_layers_that_run_a_kernel_keep_it_and_their_weights():
    model, seen = trained("stvit_small"), []

    def kernel(x, weight, bias, before, shift):
        seen.append((weight.dtype, bias.dtype))
        return x

    for module in model.modules():
        if isinstance(module, GeluDepthwiseConv):
            module.kernel, module.kernel_device = kernel, "cpu"
    prepare_inference(model, torch.bfloat16)
    assert sum(isinstance(module, GeluDepthwiseConv) for module in model.modules()) == 8
    with BF16:
        model(images(2, 3, 64, 64))
    assert seen == [(torch.float32, torch.float32)] * 8  # models/kernels/depthwise.py rounds none
