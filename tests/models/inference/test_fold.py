"""models.inference.fold: a folded model computes the same function."""

import copy

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from models.inference.fold import fold
from models.layers import ResidualDepthwiseConv
from tests.helpers.small_models import SMALLEST, images, scrambled, shrunken

DONE = {
    "groupmixformer_mobile": {"BatchNorm": 2 + 4 + 8 * 4 + 1, "depthwise kernel": 8 * 3},
    "sgformer_small": {"softmax scale": 8, "depthwise kernel": 8},
    "stvit_small": {"BatchNorm": 8 + 3 + 1, "softmax scale": 8, "depthwise kernel": 8},
    "stvit_base": {"BatchNorm": 5 + 3 + 1, "softmax scale": 5, "depthwise kernel": 5, "layer scale": 4},
}


@pytest.mark.parametrize("name", DONE)
def test_folded_model_is_the_same_function(name):
    model = scrambled(shrunken(name)).double().eval()
    for key, statistic in model.named_buffers():
        if key.endswith("running_var"):
            statistic.abs_().add_(0.5)
    folded = copy.deepcopy(model)
    assert fold(folded) == DONE[name]
    assert fold(folded) == {}
    for size in ((64, 64), (50, 70)):
        x = images(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", SMALLEST)
def test_folded_model_keeps_only_what_cannot_be_folded(name):
    model = shrunken(name).eval()
    fold(model)
    norms = [key for key, module in model.named_modules() if isinstance(module, _BatchNorm)]
    assert norms == (["stem.norm1", "stem.norm2", "stem.norm3", "stem.norm4"] if name == "stvit_small" else [])
    assert not any(isinstance(module, ResidualDepthwiseConv) for module in model.modules())


def test_model_without_a_classifier_keeps_the_norm_before_it():
    model = scrambled(shrunken("groupmixformer_mobile", num_classes=0)).eval()
    want = model(images(1, 3, 64, 64))
    assert fold(model)["BatchNorm"] == DONE["groupmixformer_mobile"]["BatchNorm"] - 1
    torch.testing.assert_close(model(images(1, 3, 64, 64)), want, rtol=1e-3, atol=1e-4)


def test_folding_under_autocast_rounds_nothing():
    model = scrambled(shrunken("groupmixformer_mobile")).eval()
    folded = copy.deepcopy(model)
    fold(folded)
    with torch.autocast("cpu", torch.bfloat16):
        fold(model)
    torch.testing.assert_close(model.state_dict(), folded.state_dict(), rtol=0, atol=0)


def test_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        fold(shrunken("groupmixformer_mobile").train())
