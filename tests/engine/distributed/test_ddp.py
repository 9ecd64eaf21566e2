"""DDP with two processes: one gradient exchange per update, bucket sizes, compression, and equality with one process."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import config
from engine.batch_norm import RunningStatistics
from engine.batch_plan import BatchPlan
from engine.build import build_loop, build_plan, build_state, prepare_model, wrap_model
from engine.distributed.ddp import COMPRESSION_HOOKS
from engine.distributed.processes import Processes
from engine.precision import Precision
from models.build import checkpoint_blocks
from tests.conftest import ROOT
from tests.helpers.small_models import shrunken

CPU = torch.device("cpu")
UPDATES = 3
STATIC = ("DIST.STATIC_GRAPH", "true")
VARIANTS = {  # images per update, options
    "plain": (8, ()),
    "checkpointed": (8, ("TRAIN.CHECKPOINT_BLOCKS", "-1", "DIST.BUCKET_MB", "1")),
    "static": (4, (*STATIC, "DIST.BUCKET_MB", "1")),
    "static checkpointed": (4, (*STATIC, "TRAIN.CHECKPOINT_BLOCKS", "2")),
}


def train(variant, processes, prepare=lambda wrapped: None):
    """Train a small model for three updates of micro-batches of 2 images; return its weights, EMA and sums."""
    images, own = VARIANTS[variant]
    opts = ("TRAIN.GLOBAL_BATCH", str(images), "TRAIN.MICRO_BATCH", "2", "TRAIN.AMP", "off", "EMA.DECAY", "0.5")
    sgd = ("OPTIM.NAME", "momentum", "OPTIM.LR", "0.1", "SCHEDULE.NAME", "constant", "SCHEDULE.WARMUP_EPOCHS", "0")
    cfg = config.load((), [*opts, *sgd, *own])
    model = prepare_model(shrunken("groupmixformer_mobile", depths=(1, 1, 1, 1), drop_path_rate=0.3), processes)
    checkpoint_blocks(model, cfg.TRAIN.CHECKPOINT_BLOCKS)
    plan, precision = BatchPlan(images, 2, processes.rank, processes.world, 50, 300), Precision("off", CPU)
    state = build_state(cfg, model, plan, precision)
    wrapped = wrap_model(cfg, model, plan, processes)
    prepare(wrapped)
    loop = build_loop(cfg, wrapped, lambda batch, update, micro, epoch: data(update, micro), precision, processes)
    loop.model.train()
    statistics = RunningStatistics(model, plan.accumulation, processes)
    for _ in range(UPDATES):
        loop._train_update(state, iter(range(99)), statistics)
    return {"model": model.state_dict(), "ema": state.ema.module.state_dict(), "sums": state.sums.mean(processes)}


def data(update, micro):
    generator = torch.Generator().manual_seed(100 * update + micro)
    labels = torch.randint(0, 10, (2,), generator=generator)
    return torch.randn(2, 3, 64, 64, generator=generator), nn.functional.one_hot(labels, 10).float()


def gradients(wrap):
    """Return this process's gradients of a linear layer wrapped by `wrap`."""
    torch.manual_seed(0)
    layer = nn.Linear(7, 5)
    rank = int(os.environ.get("RANK", 0))
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(rank))
    wrapped = wrap(layer)  # a variable, so that the wrapper is not freed before backward
    wrapped(x).square().mean().backward()
    return [p.grad.clone() for p in layer.parameters()]


def main(out):
    """Train every variant and collect gradients; run by each of the two processes."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from engine.distributed.processes import init_processes, shut_down

    processes = init_processes("cpu")
    found, exchanges = {}, []

    def counting(state, bucket):
        exchanges.append(bucket.is_last())
        return allreduce_hook(state, bucket)

    for variant in VARIANTS:
        found[variant] = train(variant, processes)
    train("plain", processes, lambda wrapped: wrapped.register_comm_hook(None, counting))
    found["exchanges"] = sum(exchanges)
    found["own"] = gradients(lambda layer: layer)
    for form in COMPRESSION_HOOKS:
        cfg = config.load((), ["DIST.COMPRESS", form])
        plan = build_plan(cfg, processes, 10)
        found[form] = gradients(lambda layer, cfg=cfg, plan=plan: wrap_model(cfg, layer, plan, processes))
    torch.save(found, f"{out}/{processes.rank}.pt")
    shut_down()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Results of two processes, by rank."""
    out = tmp_path_factory.mktemp("two")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.engine.distributed.test_ddp import main; main({str(out)!r})"
    (out / "main.py").write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, str(out / "main.py")], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def one():
    """Results of one process, by images per update; the other options do not change them."""
    alone = Processes(0, 1, 0, CPU, "test")
    return {8: train("plain", alone), 4: train("static", alone)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_are_equal_to_one(one, two, variant):
    for rank in (0, 1):
        torch.testing.assert_close(two[rank][variant], one[VARIANTS[variant][0]], rtol=1e-3, atol=2e-5)


def test_static_graph_with_accumulation_is_refused():
    cfg = config.load((), ["TRAIN.GLOBAL_BATCH", "8", "TRAIN.MICRO_BATCH", "2", *STATIC])
    with pytest.raises(ValueError, match=r"STATIC_GRAPH.*accumulation 2.*MICRO_BATCH to 4"):
        wrap_model(cfg, nn.Linear(1, 1), BatchPlan(8, 2, 0, 2, 10, 1), Processes(0, 2, 0, CPU, "test"))


def test_gradients_are_exchanged_once_an_update(two):
    assert [found["exchanges"] for found in two] == [UPDATES, UPDATES]


@pytest.mark.parametrize(("form", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_compressed_gradients_are_equal_to_the_mean_of_rounded_ones(two, form, dtype):
    halves = [[g.to(dtype).div_(2) for g in found["own"]] for found in two]
    want = [(a + b).float() for a, b in zip(*halves, strict=True)]
    for found in two:
        torch.testing.assert_close(found[form], want, rtol=0, atol=0)
    assert not torch.equal(want[0], (two[0]["own"][0] + two[1]["own"][0]) / 2)


def test_checkpointed_blocks_leave_everything_bitwise_equal(one):
    alone = Processes(0, 1, 0, CPU, "test")
    torch.testing.assert_close(train("checkpointed", alone), one[8], rtol=0, atol=0)
