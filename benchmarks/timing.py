"""Timing of candidates in turn, in one process, so that other load on the machine affects all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of several measurements."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of measurements."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 1) -> str:
        """Return "lowest .. highest"."""
        return f"{self.lowest:.{digits}f} .. {self.highest:.{digits}f}"


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: of all threads, for a shared machine


def timed(run: Callable[[], object], calls: int, device: torch.device, clock: str = "wall") -> float:
    """Return the mean seconds of a call, over `calls` calls."""
    synchronise(device)
    start = CLOCKS[clock]()
    for _ in range(calls):
        run()
    synchronise(device)
    return (CLOCKS[clock]() - start) / calls


def in_turn(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
    clock: str | Mapping[str, str] = "wall",
) -> dict[str, list[float]]:
    """Return the seconds of a call of each candidate, by round; a turn is as many calls as fill `seconds`.

    Every second round is in reverse order. Candidates are warm: called before. `advance` is called after each turn.
    `clock` may differ by candidate.
    """
    calls = {name: max(1, round(seconds / timed(run, 1, device))) for name, run in candidates.items()}
    clocks = {name: clock if isinstance(clock, str) else clock[name] for name in candidates}
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name in list(candidates)[:: -1 if number % 2 else 1]:
            found[name].append(timed(candidates[name], calls[name], device, clocks[name]))
            advance()
    return found


def ratios(base: Sequence[float], values: Sequence[float]) -> Spread:
    """Return the spread of the speed-ups of `values` over `base`, round by round."""
    return Spread.from_values([theirs / ours for theirs, ours in zip(base, values, strict=True)])
