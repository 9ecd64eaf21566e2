"""Division of a global batch: gradient accumulation from micro-batch and world size, and the scaled learning rate."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """Division of every update's samples; micro-batch j of an update holds the same samples at any world size."""

    global_batch: int
    micro_batch: int
    rank: int
    world: int
    updates_per_epoch: int
    epochs: int

    @property
    def accumulation(self) -> int:
        """Return the number of micro-batches that a process runs for each update."""
        return accumulation_steps(self.global_batch, self.micro_batch, self.world)

    @property
    def updates(self) -> int:
        """Return the number of updates of the whole run."""
        return self.epochs * self.updates_per_epoch

    def micro_batches(self) -> range:
        """Return the indices j of the micro-batches of an update that this process runs."""
        return range(self.rank, self.accumulation * self.world, self.world)


def accumulation_steps(global_batch: int, micro_batch: int, world: int) -> int:
    """Return the number of micro-batches that a process runs per update.

    Raises ValueError if the batches do not divide; it lists the micro-batches and numbers of processes that fit.
    """
    if global_batch % (micro_batch * world) == 0:
        return global_batch // (micro_batch * world)
    micro = divisors(global_batch // world) if global_batch % world == 0 else []
    worlds = divisors(global_batch // micro_batch) if global_batch % micro_batch == 0 else []
    raise ValueError(
        f"TRAIN.GLOBAL_BATCH={global_batch} cannot be divided into micro-batches of TRAIN.MICRO_BATCH={micro_batch} on {world} "
        f"processes; with {world} processes these micro-batches fit: {_few(micro)}; with this micro-batch these numbers of "
        f"processes: {_few(worlds)}"
    )


def scaled_lr(lr: float, global_batch: int, scale_batch: int) -> float:
    """Return the learning rate scaled linearly by global_batch / scale_batch; unchanged for scale_batch 0."""
    return lr * global_batch / scale_batch if scale_batch else lr


def divisors(number: int) -> list[int]:
    """List the divisors of a positive number in ascending order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _few(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:24])) if numbers else "none"
    return shown + (f", ... {numbers[-1]}" if len(numbers) > 24 else "")
