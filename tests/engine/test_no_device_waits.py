"""An update never waits for the device: the host reads nothing from it, and copies to it are non-blocking.

Without a GPU this is tested on meta tensors, which raise when their values are read, and by watching the operators that read
values. CUDA's own synchronisation check is used in a test that needs a GPU.
"""

import sys
from dataclasses import replace
from unittest import mock

import pytest
import timm
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import config
from data.augment.device_stage import DeviceStage
from data.augment.mixup import Mixup
from data.loaders.batch import Batch
from engine.batch_norm import RunningStatistics
from engine.batch_plan import BatchPlan
from engine.build import build_loop, build_state, prepare_model
from engine.distributed.processes import Processes
from engine.optim.apex import apex_optimizer
from engine.precision import Precision
from models.build import checkpoint_blocks
from tests.helpers import fake_apex
from tests.helpers.small_models import SMALLEST, shrunken

CPU, META = torch.device("cpu"), torch.device("meta")
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal")
MODELS = (*SMALLEST, "test_efficientnet", "test_vit")


class Watch(TorchDispatchMode):
    """Recorder of reads from tensors other than `counters`, and of copies between devices."""

    def __init__(self, counters=()):
        super().__init__()
        self.counters = {counter.data_ptr() for counter in counters}
        self.read, self.passed = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if name in READS and not (tensors and tensors[0].data_ptr() in self.counters):
            self.read.append(name)
        out = function(*args, **(kwargs or {}))
        kinds = {t.device.type for t in (*tensors, *tree_iter(out)) if isinstance(t, Tensor)}
        if len(kinds) > 1:
            self.passed.append((name, bool((kwargs or {}).get("non_blocking"))))
        return out


class Uploads(TorchFunctionMode):
    """Recorder of tensors created from host numbers on another device: CUDA would wait for that copy."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and out.device != CPU:
            self.made.append(function.__name__)
        return out


def parts(model, device=CPU, order="erase_then_mix", erase="pixel", opts=(), build_on=None):
    """Return loop, state and statistics of two micro-batches an update; built on the CPU for devices without values."""
    own = ("TRAIN.GLOBAL_BATCH", "8", "TRAIN.MICRO_BATCH", "4", "EMA.DECAY", "0.9", "TRAIN.CLIP_GRAD", "1")
    cfg = config.load((), [*own, "TRAIN.AMP", "off", *opts])
    processes = Processes(0, 1, 0, device, "test")
    build_on = build_on or device
    model = prepare_model(model, replace(processes, device=build_on)).train()
    checkpoint_blocks(model, cfg.TRAIN.CHECKPOINT_BLOCKS)
    state = build_state(cfg, model, BatchPlan(8, 4, 0, 1, 50, 300), Precision(cfg.TRAIN.AMP, build_on))
    stage = DeviceStage(Mixup(10), [0.5] * 3, [0.2] * 3, 0, build_on, erase, order)
    loop = build_loop(cfg, model, stage.train, Precision(cfg.TRAIN.AMP, device), processes)
    state.move_counts(device)
    if device != build_on:
        stage.device, stage.mean, stage.std = device, stage.mean.to(device), stage.std.to(device)
        model.to(device)
        state.ema.module.to(device)
    return loop, state, RunningStatistics(model, 2, processes)


def batches(size=64):
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    labels, boxes = torch.arange(4), torch.tensor([[[3, 4, 9, 9]]] * 4)
    return iter([Batch(images, labels, labels, boxes)] * 99)


def built(name):
    if name in SMALLEST:
        return shrunken(name, drop_path_rate=0.3, drop_rate=0.1)
    return timm.create_model(name, num_classes=10, drop_path_rate=0.3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("order", "erase"), [("erase_then_mix", "pixel"), ("mix_then_erase", "rand")])
def test_update_of_tensors_without_values_reads_none(name, order, erase, monkeypatch):
    known = torch.is_autocast_enabled  # raises for meta
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": known("cuda" if kind == "meta" else kind))
    loop, state, statistics = parts(built(name), META, order, erase, build_on=CPU)
    devices = []

    def step(self):  # fused kernels have no meta form
        devices.append(self.found_inf.device)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    iterator = batches(160 if name == "test_vit" else 64)
    loop._train_update(state, iterator, statistics)
    with Watch() as watch, Uploads() as uploads:
        loop._train_update(state, iterator, statistics)
    assert devices == [META, META]
    assert watch.read == uploads.made == []
    assert watch.passed == [("_to_copy", True)] * 8  # images, labels, indices and boxes of two micro-batches


def test_meta_tensors_and_the_watch_detect_reads():
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.ones((), device=META) > 0)
    with Watch() as watch, Uploads() as uploads:
        assert torch.ones(()) > 0
        torch.tensor(3)
        torch.tensor([3], device=META).new_tensor(4)
        torch.ones(3).to(META)
        torch.ones(3).nonzero()
    assert watch.read == ["_local_scalar_dense", "nonzero"]
    assert watch.passed == [("_to_copy", False)]
    assert uploads.made == ["tensor", "new_tensor"]


@pytest.mark.parametrize("opts", [(), ("TRAIN.CHECKPOINT_BLOCKS", "-1"), ("TRAIN.AMP", "fp16"), ("TRAIN.AMP", "bf16")])
@pytest.mark.parametrize("bad", [False, True])
def test_update_with_every_option_reads_nothing(opts, bad):
    check("adamw", "auto", 0, bad, opts)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize(
    ("name", "backend", "reads"),
    [
        ("adamw", "fused", 0),
        ("adamw", "apex", 0),
        ("adam", "fused", 0),
        ("sgd", "fused", 0),
        ("adamw", "foreach", 1),
        ("adamw", "for-loop", 1),
        ("lamb", "apex", 1),
        ("lion", "auto", 1),
    ],
)
def test_update_of_each_backend_reads_is_finite_or_nothing(name, backend, reads, bad):
    check(name, backend, reads, bad)


def check(name, backend, reads, bad, opts=()):
    """Check the number of reads of an update, without the optimiser's step counters, which are on the host."""
    own = ("OPTIM.NAME", name, "OPTIM.BACKEND", "auto" if backend == "apex" else backend)
    loop, state, statistics = parts(built("test_efficientnet"), opts=(*opts, *own))
    if backend == "apex":
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in state.optimizer.param_groups]
        with mock.patch.dict(sys.modules, fake_apex.modules()):
            state.optimizer = apex_optimizer(name, groups, 1e-3)
        state.schedule.learning_rate.scheduler.optimizer = state.optimizer
    iterator, good = batches(), loop.criterion
    loop._train_update(state, iterator, statistics)
    if bad:
        loop.criterion = lambda *args: good(*args) * float("nan")
    holders = [*state.optimizer.state.values(), *state.optimizer.param_groups]
    watch = Watch([held["step"] for held in holders if isinstance(held.get("step"), Tensor)])
    with watch:
        loop._train_update(state, iterator, statistics)
    assert state.skips.tensor.tolist() == [bad, bad, 0]
    assert watch.read == ["_local_scalar_dense"] * reads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("opts", [(), ("TRAIN.CHECKPOINT_BLOCKS", "-1"), ("TRAIN.AMP", "fp16"), ("TRAIN.AMP", "bf16")])
@pytest.mark.parametrize("name", MODELS)
def test_update_on_cuda_waits_for_nothing(name, opts):
    loop, state, statistics = parts(built(name), torch.device("cuda", 0), opts=opts)
    pinned = (batch.pin_memory() for batch in batches(160 if name == "test_vit" else 64))
    for _ in range(2):
        loop._train_update(state, pinned, statistics)
    prepared = iter([next(pinned) for _ in range(2)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop._train_update(state, prepared, statistics)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.update == 3
