"""Training loop of a small model with BatchNorm, its batches, and copies of its state."""

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import config
from engine.batch_norm import RunningStatistics
from engine.batch_plan import BatchPlan
from engine.build import build_loop, build_state
from engine.distributed.processes import Processes
from engine.precision import Precision

ALONE = Processes(0, 1, 0, torch.device("cpu"), "test")


def small_loop(accumulation, optimizer="adamw", amp="off", device="cpu", model=None, **loop_fields):
    """Return state, loop and statistics of a small model with BatchNorm; `loop_fields` replace fields of the loop."""
    torch.manual_seed(0)
    opts = [
        "TRAIN.GLOBAL_BATCH",
        "8",
        "TRAIN.MICRO_BATCH",
        str(8 // accumulation),
        "TRAIN.AMP",
        amp,
        "EMA.DECAY",
        "0.9",
    ]
    name, _, backend = optimizer.partition(" ")
    opts += ["OPTIM.NAME", name, "OPTIM.BACKEND", backend or "auto", "SCHEDULE.NAME", "constant"]
    cfg = config.load((), opts)
    plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model = (plain if model is None else model).to(device).train()
    precision = Precision(amp, torch.device(device))
    processes = replace(ALONE, device=torch.device(device))
    state = build_state(cfg, model, BatchPlan(8, 8 // accumulation, 0, 1, 50, 1), precision)
    state.move_counts(torch.device(device))
    loop = build_loop(cfg, model, lambda batch, update, micro, epoch: batch, precision, processes)
    for name, value in loop_fields.items():
        setattr(loop, name, value)
    return state, loop, RunningStatistics(model, accumulation, processes)


def batches(micro, device="cpu"):
    """Yield random (features (micro, 6), one-hot targets (micro, 3)) without end."""
    generator = torch.Generator().manual_seed(1)
    while True:
        y = torch.randint(0, 3, (micro,), generator=generator)
        yield torch.randn(micro, 6, generator=generator).to(device), F.one_hot(y, 3).float().to(device)


def everything(state):
    """Return copies of weights, averaged weights and optimiser state."""
    return copy.deepcopy(
        [state.model.state_dict(), state.ema.module.state_dict(), state.optimizer.state_dict()["state"]]
    )
