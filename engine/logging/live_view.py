"""Live view of a run on a terminal: progress bars, numbers and sparklines below the scrolling log lines.

Nothing here waits for the device: the numbers are those of logging steps. The cursor stays visible, so that a killed process
leaves no hidden cursor behind.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.panel import Panel
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from common.text import readable
from engine.logging.live_widgets import (
    BAD,
    CURVE,
    DIM,
    GOOD,
    VALUE,
    bar,
    count,
    cropped,
    duration,
    end_time,
    flow,
    labelled,
    shorten,
    sparkline,
    time_left,
)
from engine.loop import StepMetrics
from engine.memory import peak

T = TypeVar("T")
MAX_WIDTH = 120  # columns; wider lines are harder to read
LOW = 18  # rows; on a lower terminal the view omits numbers that the log lines show as well
REFRESH = 2  # times per second; drawing takes some milliseconds of a core


@dataclass
class Top1History:
    """Top-1 accuracies of the raw or the EMA weights over the run."""

    top1: list[float] = field(default_factory=list)
    best: float = -math.inf
    best_epoch: int = 0  # from 1

    def add(self, top1: float, epoch: int) -> None:
        """Add the result of an evaluation after `epoch` (from 1)."""
        self.top1.append(top1)
        if top1 > self.best:
            self.best, self.best_epoch = top1, epoch


@dataclass
class TimeEstimator:
    """Estimate of the remaining time, from the durations of updates and of the pauses between epochs."""

    now: Callable[[], float]
    per_update: float = math.nan  # seconds; a moving average over logging steps
    pauses: list[float] = field(default_factory=list)  # seconds of evaluation and saving after an epoch
    since: float = math.nan  # time of the last logging step, or of the start of the epoch
    updates: int = 0  # counted since then
    epoch_ended: float = math.nan  # time of the end of the last epoch; NaN while an epoch is under way

    def begin_epoch(self) -> None:
        """Start timing the updates of an epoch; ends a pause."""
        if not math.isnan(self.epoch_ended):
            self.pauses.append(self.now() - self.epoch_ended)
        self.since, self.updates, self.epoch_ended = self.now(), 0, math.nan

    def note_step(self) -> None:
        """Time the updates up to a logging step, whose own update is not counted in `updates` yet."""
        took = (self.now() - self.since) / (self.updates + 1)
        self.per_update = took if math.isnan(self.per_update) else 0.7 * self.per_update + 0.3 * took
        self.since, self.updates = self.now(), -1

    def end_epoch(self) -> None:
        """Start timing the pause after an epoch."""
        self.epoch_ended = self.now()

    def remaining(self, updates: int, pauses: int = 0) -> float:
        """Return the seconds that so many updates and pauses will take, including the current one; NaN if not known yet."""
        pause = sum(self.pauses) / len(self.pauses) if self.pauses else 0.0
        elapsed = 0.0 if math.isnan(self.epoch_ended) else min(self.now() - self.epoch_ended, pause)
        return updates * self.per_update + pauses * pause - elapsed


class LiveView:
    """Live view of a run. Updated by the training process; a thread redraws it a few times per second."""

    def __init__(self, console: Console, name: str, now: Callable[[], float] = time.monotonic):
        self.console, self.name, self.now = console, readable(name), now
        self.timing = TimeEstimator(now)
        self.step: StepMetrics | None = None
        self.losses: list[float] = []
        self.results: dict[str, Top1History] = {}
        self.epoch = self.epochs = self.done = self.updates = 0  # epochs are of the run, updates of the epoch
        self.evaluating: tuple[str, int, int, float] | None = None  # label, batches done, their total, start time
        self.memory = ""
        self.started = now()
        self._live: Screen | None = None

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Restore the curves of earlier starts from rows of metrics.jsonl."""
        for row in rows:
            if row["kind"] == "train":
                self.losses.append(math.nan if row["loss"] is None else row["loss"])
            elif row["kind"] == "eval":
                self.note_result(row["weights"], row["top1"], row["epoch"])

    def start(self) -> None:
        """Show the view."""
        if self._live is None:
            self._live = Screen(self, self.console)
            self._live.start()

    def stop(self) -> None:
        """Remove the view from the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin_epoch(self, epoch: int, epochs: int, done: int, updates: int) -> None:
        """Show the progress of an epoch (from 0) of which `done` updates are done."""
        self.epoch, self.epochs, self.done, self.updates = epoch, epochs, done, updates
        self.evaluating = None
        self.timing.begin_epoch()
        self.start()

    def advance(self) -> None:
        """Count an update."""
        self.done += 1
        self.timing.updates += 1

    def end_epoch(self) -> None:
        """Start the pause after the updates of an epoch."""
        self.timing.end_epoch()

    def note_step(self, step: StepMetrics) -> None:
        """Show the metrics of a logging step, whose update has not been counted by `advance` yet."""
        self.timing.note_step()
        self.step, self.memory = step, peak()
        self.losses.append(step.loss)

    def note_result(self, which: str, top1: float, epoch: int) -> None:
        """Show the result of an evaluation of the raw or EMA weights after `epoch` (from 0)."""
        self.results.setdefault(which, Top1History()).add(top1, epoch + 1)
        self.evaluating = None

    def track(self, batches: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Yield the batches of an evaluation and advance its progress bar."""
        began = self.now()
        self.evaluating = label, 0, total, began
        self.start()
        for done, batch in enumerate(batches):
            self.evaluating = label, done, total, began
            yield batch
        self.evaluating = label, total, total, began

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, MAX_WIDTH)
        inner = width - 4
        parts: list[RenderableType] = [self._bars(inner)]
        low = console.height < LOW
        if self.losses:
            parts += [""] * (not low) + [self._curves(inner, low)]
        if self.step:
            parts += [""] * (not low) + [flow(self._numbers(self.step), inner)]
        remaining = self._remaining_in_run()
        until = f", until {end_time(remaining)}" if math.isfinite(remaining) else ""
        panel = Panel(
            Group(*parts),
            title=Text(shorten(self.name, inner - 4), VALUE),
            subtitle=Text(f"running for {duration(self.now() - self.started)}{until}"),
            box=box.ROUNDED,
            title_align="left",
            subtitle_align="right",
            border_style=DIM,
            width=width,
        )
        # Overrides soft wrap, with which the console would print long lines as they are.
        yield from cropped(console, panel, options.update(width=width, no_wrap=False, overflow="ellipsis"))

    def _bars(self, width: int) -> Table:
        total, done_in_run = self.epochs * self.updates, self.epoch * self.updates + self.done
        grid = Table.grid(padding=(0, 1), expand=True)
        for justify, ratio in (("left", None), ("left", 1), ("left", None), ("right", None)):
            grid.add_column(justify=justify, ratio=ratio, no_wrap=True)  # type: ignore[arg-type]
        if total:  # not known yet in a run that continues with an evaluation
            epoch = count("epoch", min(self.epoch + 1, self.epochs), self.epochs)
            grid.add_row(Text("run", DIM), bar(done_in_run, total), epoch, time_left(self._remaining_in_run()))
        if self.evaluating:
            label, done, batches, began = self.evaluating
            each = (self.now() - began) / done if done else math.nan
            which = label.removeprefix("evaluate ").replace("ema", "EMA")
            cells = (
                Text("eval", DIM),
                bar(done, batches),
                count(f"{which} batch", done, batches),
                time_left(each * (batches - done)),
            )
        else:
            updates = count("update", self.done, self.updates)
            cells = (
                Text("epoch", DIM),
                bar(self.done, self.updates),
                updates,
                time_left(self.timing.remaining(self.updates - self.done)),
            )
        grid.add_row(*cells)
        return grid

    def _remaining_in_run(self) -> float:
        updates = (self.epochs - self.epoch) * self.updates - self.done
        return self.timing.remaining(updates, self.epochs - self.epoch)

    def _curves(self, width: int, low: bool) -> Table:
        grid = Table.grid(padding=(0, 1), expand=True)
        for _ in range(3):
            grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, ratio=1)
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        last = f"{finite[-1]:.4f}" if finite else "not finite"
        curve_width = max(width - 34, 8)
        mean = Text.assemble(("epoch ", DIM), f"{self.step.epoch_loss:.4f}") if self.step else Text()
        grid.add_row(Text("loss", DIM), Text(last, VALUE), mean, Text(sparkline(finite, curve_width), CURVE))
        if low:
            return grid
        for which in ("raw", "ema"):
            if found := self.results.get(which):
                newest = Text(f"{found.top1[-1]:.3f}", f"{VALUE} {GOOD}" if found.top1[-1] >= found.best else VALUE)
                best = Text.assemble(("best ", DIM), f"{found.best:.3f}", (f" @{found.best_epoch}", DIM))
                name = "EMA" if which == "ema" else "raw"
                grid.add_row(Text(f"top-1 {name}", DIM), newest, best, Text(sparkline(found.top1, curve_width), GOOD))
        return grid

    def _numbers(self, step: StepMetrics) -> list[Text]:
        numbers = [
            labelled("lr", f"{step.lr:.3e}"),
            labelled("norm", f"{step.grad_norm:.2f}"),
            labelled("images/s", f"{step.images_per_s:,.0f}"),
            labelled("waiting for data", f"{100 * step.data_share:.0f}%", BAD if step.data_share > 0.1 else VALUE),
            labelled("memory", self.memory),
        ]
        if step.skipped_in_run:
            numbers.append(labelled("skipped", str(step.skipped_in_run), BAD))
        return numbers


class Screen(Live):
    """rich's Live that keeps the cursor visible, and clears lines that a terminal has folded when it became narrower."""

    def __init__(self, view: LiveView, console: Console):
        self._streams = sys.stdout, sys.stderr
        super().__init__(
            view,
            console=console,
            refresh_per_second=REFRESH,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
            vertical_overflow="crop",
        )
        self._drawn_width = 0  # columns of the terminal at the last drawing
        os.register_at_fork(after_in_child=self._restore_streams)

    def start(self, refresh: bool = True) -> None:
        """Show the view, and show the cursor again, which Live hides."""
        super().start(refresh)
        self.console.show_cursor(True)

    def refresh(self) -> None:
        """Draw the view again."""
        with self._lock:
            columns, height = self.console.width, self._live_render.last_render_height
            folds = math.ceil(min(self._drawn_width, MAX_WIDTH) / columns) - 1
            if height and folds > 0 and self.console.is_interactive:
                up = (ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)
                self.console.control(Control((ControlType.ERASE_IN_LINE, 2), *up * (folds * height)))
            self._drawn_width = columns
            super().refresh()

    def _restore_streams(self) -> None:
        """Restore stdout and stderr in a forked loader worker, which has no thread to draw the view."""
        if self.is_started:
            sys.stdout, sys.stderr = self._streams
