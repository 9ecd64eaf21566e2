"""OPTIM.BACKEND: all backends give the same update, skip the same updates, and continue from each other's state."""

import copy
import sys
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import get_total_norm

import config
from engine.optim import apex
from engine.optim.backends import align_state, backend_of, skips_on_device
from engine.optim.build import build_optimizer
from engine.optim.clip_and_step import clip_and_step
from engine.state import optimizer_name
from models.kernels.apex_norm import use_apex_norms
from tests.helpers import fake_apex
from tests.helpers.small_models import images, scrambled, shrunken

BACKENDS = {
    "adamw": ("for-loop", "foreach", "fused", "apex"),
    "adam": ("for-loop", "foreach", "fused", "apex"),
    "momentum": ("for-loop", "foreach", "fused"),
    "sgd": ("for-loop", "foreach", "fused"),
}
EACH = [(name, backend) for name, backends in BACKENDS.items() for backend in backends]


@pytest.fixture(autouse=True)
def _stand_in():
    with mock.patch.dict(sys.modules, fake_apex.modules()):
        yield


def weights():
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    return nn.Sequential(convolution, nn.Linear(6, 3))


def optimizer_of(name, backend, model):
    cfg = config.load((), ["OPTIM.NAME", name, "OPTIM.BACKEND", "for-loop" if backend == "apex" else backend])
    optimizer = build_optimizer(cfg, model)
    if backend == "apex":  # the fake runs on the CPU
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in optimizer.param_groups]
        optimizer = apex.apex_optimizer(name, groups, cfg.OPTIM.LR)
    return optimizer


def step(optimizer, number, is_finite=True, limit=0.0):
    """Do one update with its own gradients and learning rate; gradients are on average of norm 15."""
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 / (1 + number)
        for weight in group["params"]:
            drawn = torch.randn(weight.shape, generator=generator)
            weight.grad = torch.empty_like(weight).copy_(drawn if is_finite else drawn * float("nan"))
    norm = get_total_norm([weight.grad for group in optimizer.param_groups for weight in group["params"]])
    clip_and_step(torch.tensor(is_finite), optimizer, norm, limit)
    optimizer.zero_grad(set_to_none=True)


def reference(name, numbers):
    model = weights()
    optimizer = optimizer_of(name, "for-loop", model)
    for number in numbers:
        step(optimizer, number)
    return model.state_dict()


@pytest.mark.parametrize("limit", [0.3, 1e6])
@pytest.mark.parametrize(("name", "backend"), [*EACH, ("lamb", "for-loop"), ("lamb", "apex")])
def test_backends_clip_as_torch_does(name, backend, limit):
    model, clipped = weights(), weights()
    optimizer, plain = optimizer_of(name, backend, model), optimizer_of(name, backend, clipped)

    def clip(*_):
        nn.utils.clip_grad_norm_(clipped.parameters(), limit)

    plain.register_step_pre_hook(clip)
    for number in range(4):
        step(optimizer, number, is_finite=number != 2, limit=limit)
        step(plain, number, is_finite=number != 2)
    # Adam is invariant to a constant scale of gradients: the sums of squares show it
    torch.testing.assert_close(optimizer.state_dict()["state"], plain.state_dict()["state"], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(model.state_dict(), clipped.state_dict(), rtol=1e-5, atol=1e-6)
    if limit > 1e3:
        torch.testing.assert_close(model.state_dict(), clipped.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "backend"), EACH)
def test_backends_give_equal_updates_and_skip_equally(name, backend):
    model = weights()
    optimizer = optimizer_of(name, backend, model)
    assert backend_of(optimizer) == backend
    assert skips_on_device(optimizer) == (backend in ("fused", "apex"))
    for number in range(6):  # the first one is skipped, too
        step(optimizer, number, is_finite=number not in (0, 3))
    torch.testing.assert_close(model.state_dict(), reference(name, (1, 2, 4, 5)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "first", "second"), [(n, a, b) for n, a in EACH for b in BACKENDS[n] if a != b])
def test_state_of_one_backend_is_equal_in_another(name, first, second):
    model = weights()
    before = optimizer_of(name, first, model)
    for number, is_finite in ((0, True), (1, False), (2, True), (3, False)):
        step(before, number, is_finite)
    after = optimizer_of(name, second, model)
    assert optimizer_name(after) == optimizer_name(before)
    continue_from(after, before)
    step(after, 4)
    step(after, 5)
    torch.testing.assert_close(model.state_dict(), reference(name, (0, 2, 4, 5)), rtol=1e-5, atol=1e-6)
    assert backend_of(after) == second


def continue_from(after, before):
    """Load one optimiser's state into another as TrainState does."""
    from engine.state import TrainState

    stored = copy.deepcopy(before.state_dict())
    state = TrainState(nn.Identity(), None, after, mock.Mock(), torch.amp.GradScaler("cpu", enabled=False), mock.Mock())
    state.plan.global_batch = state.plan.updates_per_epoch = 1
    fields = {"model": {}, "ema": None, "scaler": {}, "update": 1, "closed": 1, "best": {}, "global_batch": 1}
    fields |= {"updates_per_epoch": 1, "sums": torch.zeros(2, 6), "format": 2}
    state.load_state_dict(fields | {"optimizer": stored, "optimizer_name": optimizer_name(before)}, "file")


def test_lamb_of_apex_counts_steps_as_timms_does():
    model = weights()
    timms, own = optimizer_of("lamb", "for-loop", model), optimizer_of("lamb", "apex", model)
    assert backend_of(own) == "apex"
    assert not skips_on_device(own)
    step(timms, 0)
    continue_from(own, timms)
    step(own, 1)
    step(own, 2, is_finite=False)
    assert [group["step"] for group in own.param_groups] == [2, 2]
    continue_from(timms, own)
    step(timms, 3)
    assert {float(group["step"]) for group in timms.param_groups} == {3.0}


def test_state_takes_the_memory_layout_of_its_weights():
    model = weights()
    optimizer = optimizer_of("adamw", "fused", model)
    step(optimizer, 0)
    state = optimizer.state[model[0].weight]
    state["exp_avg"] = state["exp_avg"].contiguous()
    align_state(optimizer)
    step(optimizer, 1)
    torch.testing.assert_close(model.state_dict(), reference("adamw", (0, 1)), rtol=1e-5, atol=1e-6)


def test_auto_is_fused_where_torch_has_it():
    assert backend_of(optimizer_of("adamw", "auto", weights())) == "fused"
    assert backend_of(optimizer_of("lion", "auto", weights())) == "of the optimiser's choice"


@pytest.mark.parametrize(
    ("name", "backend", "parts"),
    [
        ("lamb", "fused", r"OPTIM.BACKEND=fused: lamb has none on cpu; take one of auto, foreach, for-loop"),
        ("madgrad", "foreach", r"take one of auto, for-loop"),
        ("adamw", "apex", r"OPTIM.BACKEND=apex runs on CUDA only, this run is on cpu"),
    ],
)
def test_missing_backend_is_refused(name, backend, parts):
    cfg = config.load((), ["OPTIM.NAME", name, "OPTIM.BACKEND", backend])
    with pytest.raises(ValueError, match=parts):
        build_optimizer(cfg, weights())


def test_missing_apex_is_named_with_the_command_that_builds_it():
    groups = [{"params": list(weights().parameters())}]
    with (
        mock.patch.dict(sys.modules, {"apex": None}),
        pytest.raises(ValueError, match=r"pip install .* BACKEND to auto"),
    ):
        apex.apex_optimizer("adamw", groups, 1e-3)
    with pytest.raises(ValueError, match=r"has adamw, adam, lamb, not OPTIM\.NAME=lion"):
        apex.apex_optimizer("lion", groups, 1e-3)


def test_norms_of_apex_keep_names_weights_and_results_under_autocast():
    plain = scrambled(shrunken("sgformer_small"))
    fused = copy.deepcopy(plain)
    use_apex_norms(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    norms = [module for module in fused.modules() if isinstance(module, fake_apex.FusedLayerNorm)]
    assert len(norms) == sum(isinstance(module, nn.LayerNorm) for module in plain.modules()) > 5
    x = images(2, 3, 64, 64)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = [model(x) for model in (plain, fused)]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_norms_of_apex_that_are_missing_or_change_nothing_are_refused():
    with pytest.raises(ValueError, match=r"NORM_BACKEND=apex has no effect: Sequential has no LayerNorm"):
        use_apex_norms(weights())
    with (
        mock.patch.dict(sys.modules, {"apex": None, "apex.normalization": None}),
        pytest.raises(ValueError, match=r"pip install .* NORM_BACKEND to torch"),
    ):
        use_apex_norms(nn.Sequential(nn.LayerNorm(3)))
