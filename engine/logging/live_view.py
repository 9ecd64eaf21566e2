"""The live view of a run on a terminal: bars, numbers and small curves that stay at its lower edge while log lines scroll above.

Nothing here waits for the device: the numbers are those of logging steps. The cursor stays visible, so that even a process
that is killed leaves the terminal as it was.
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

from engine.logging.live_widgets import (
    BAD,
    CURVE,
    DIM,
    GOOD,
    VALUE,
    bar,
    counted,
    duration,
    end_of,
    fact,
    fitted,
    flow,
    shorten,
    sparkline,
    time_left,
)
from engine.loop import StepMetrics
from engine.memory import peak

T = TypeVar("T")
WIDEST = 120  # columns; wider lines are harder to read
LOW = 18  # rows of a terminal below which the view leaves out what can be read in the lines above it
REFRESH = 2  # times a second; drawing takes some milliseconds of a core


@dataclass
class Results:
    """Top-1 of the raw or the EMA weights over the run."""

    top1: list[float] = field(default_factory=list)
    best: float = -math.inf
    epoch: int = 0  # of the best, from 1

    def add(self, top1: float, epoch: int) -> None:
        """Note an evaluation after `epoch` (from 1)."""
        self.top1.append(top1)
        if top1 > self.best:
            self.best, self.epoch = top1, epoch


@dataclass
class Pace:
    """How long updates, and the pauses between epochs, take."""

    now: Callable[[], float]
    update: float = math.nan  # seconds; a moving average over reports
    pauses: list[float] = field(default_factory=list)  # seconds of evaluation and saving after an epoch
    since: float = math.nan  # when the last report was, or the epoch began
    done: int = 0  # updates since
    paused: float = math.nan  # when the last epoch ended

    def begin(self) -> None:
        """Note that an epoch's updates begin."""
        if not math.isnan(self.paused):
            self.pauses.append(self.now() - self.paused)
        self.since, self.done, self.paused = self.now(), 0, math.nan

    def report(self) -> None:
        """Note a report, made by an update that is not counted yet."""
        took = (self.now() - self.since) / (self.done + 1)
        self.update = took if math.isnan(self.update) else 0.7 * self.update + 0.3 * took
        self.since, self.done = self.now(), -1

    def end(self) -> None:
        """Note that an epoch's updates are done."""
        self.paused = self.now()

    def left(self, updates: int, pauses: int = 0) -> float:
        """Return the seconds that so many updates and pauses will take, the current one among them; NaN if not known yet."""
        pause = sum(self.pauses) / len(self.pauses) if self.pauses else 0.0
        running = 0.0 if math.isnan(self.paused) else min(self.now() - self.paused, pause)
        return updates * self.update + pauses * pause - running


class LiveView:
    """What the terminal shows of a run. Called from the training process; a thread draws it a few times a second."""

    def __init__(self, console: Console, name: str, now: Callable[[], float] = time.monotonic):
        self.console, self.name, self.now = console, name, now
        self.pace = Pace(now)
        self.step: StepMetrics | None = None
        self.losses: list[float] = []
        self.results: dict[str, Results] = {}
        self.epoch = self.epochs = self.done = self.updates = 0  # of the run, and of the epoch
        self.evaluating: tuple[str, int, int, float] | None = None  # label, batches done and in all, when it began
        self.memory = ""
        self.started = now()
        self._live: Screen | None = None

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take the curves of what was done before from rows of metrics.jsonl."""
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
        """Take the view away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin_epoch(self, epoch: int, epochs: int, done: int, updates: int) -> None:
        """Show an epoch (from 0), `done` of its updates being behind it."""
        self.epoch, self.epochs, self.done, self.updates = epoch, epochs, done, updates
        self.evaluating = None
        self.pace.begin()
        self.start()

    def advance(self) -> None:
        """Count an update."""
        self.done += 1
        self.pace.done += 1

    def end_epoch(self) -> None:
        """Note that the epoch's updates are over."""
        self.pace.end()

    def note_step(self, step: StepMetrics) -> None:
        """Show the numbers of a logging step, whose update has not been counted by `advance` yet."""
        self.pace.report()
        self.step, self.memory = step, peak()
        self.losses.append(step.loss)

    def note_result(self, which: str, top1: float, epoch: int) -> None:
        """Show an evaluation of the raw or EMA weights after `epoch` (from 0)."""
        self.results.setdefault(which, Results()).add(top1, epoch + 1)
        self.evaluating = None

    def track(self, batches: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Yield the batches of an evaluation, moving its bar."""
        began = self.now()
        self.evaluating = label, 0, total, began
        self.start()
        for done, batch in enumerate(batches):
            self.evaluating = label, done, total, began
            yield batch
        self.evaluating = label, total, total, began

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, WIDEST)
        inner = width - 4
        parts: list[RenderableType] = [self._bars(inner)]
        low = console.height < LOW
        if self.losses:
            parts += [""] * (not low) + [self._curves(inner, low)]
        if self.step:
            parts += [""] * (not low) + [flow(self._facts(self.step), inner)]
        left = self._left_in_run()
        until = f", until {end_of(left)}" if math.isfinite(left) else ""
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
        # A console that prints long lines as they are (soft wrap) is told to fit this.
        yield from fitted(console, panel, options.update(width=width, no_wrap=False, overflow="ellipsis"))

    def _bars(self, width: int) -> Table:
        total, behind = self.epochs * self.updates, self.epoch * self.updates + self.done
        grid = Table.grid(padding=(0, 1), expand=True)
        for justify, ratio in (("left", None), ("left", 1), ("left", None), ("right", None)):
            grid.add_column(justify=justify, ratio=ratio, no_wrap=True)  # type: ignore[arg-type]
        if total:  # not known yet where a run continues with an evaluation
            epoch = counted("epoch", min(self.epoch + 1, self.epochs), self.epochs)
            grid.add_row(Text("run", DIM), bar(behind, total), epoch, time_left(self._left_in_run()))
        if self.evaluating:
            label, done, of, began = self.evaluating
            each = (self.now() - began) / done if done else math.nan
            which = label.removeprefix("evaluate ").replace("ema", "EMA")
            cells = Text("eval", DIM), bar(done, of), counted(f"{which} batch", done, of), time_left(each * (of - done))
        else:
            count = counted("update", self.done, self.updates)
            cells = (
                Text("epoch", DIM),
                bar(self.done, self.updates),
                count,
                time_left(self.pace.left(self.updates - self.done)),
            )
        grid.add_row(*cells)
        return grid

    def _left_in_run(self) -> float:
        updates = (self.epochs - self.epoch) * self.updates - self.done
        return self.pace.left(updates, self.epochs - self.epoch)

    def _curves(self, width: int, low: bool) -> Table:
        grid = Table.grid(padding=(0, 1), expand=True)
        for _ in range(3):
            grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, ratio=1)
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        last = f"{finite[-1]:.4f}" if finite else "not finite"
        room = max(width - 34, 8)
        mean = Text.assemble(("epoch ", DIM), f"{self.step.epoch_loss:.4f}") if self.step else Text()
        grid.add_row(Text("loss", DIM), Text(last, VALUE), mean, Text(sparkline(finite, room), CURVE))
        if low:
            return grid
        for which in ("raw", "ema"):
            if found := self.results.get(which):
                newest = Text(f"{found.top1[-1]:.3f}", f"{VALUE} {GOOD}" if found.top1[-1] >= found.best else VALUE)
                best = Text.assemble(("best ", DIM), f"{found.best:.3f}", (f" @{found.epoch}", DIM))
                name = "EMA" if which == "ema" else "raw"
                grid.add_row(Text(f"top-1 {name}", DIM), newest, best, Text(sparkline(found.top1, room), GOOD))
        return grid

    def _facts(self, step: StepMetrics) -> list[Text]:
        metadata = [
            fact("lr", f"{step.lr:.3e}"),
            fact("norm", f"{step.grad_norm:.2f}"),
            fact("images/s", f"{step.images_per_s:,.0f}"),
            fact("waiting for data", f"{100 * step.data_share:.0f}%", BAD if step.data_share > 0.1 else VALUE),
            fact("memory", self.memory),
        ]
        if step.skipped_in_run:
            metadata.append(fact("skipped", str(step.skipped_in_run), BAD))
        return metadata


class Screen(Live):
    """rich's Live that keeps the cursor, and clears up after a terminal that became narrower and folded its lines."""

    def __init__(self, view: LiveView, console: Console):
        self._own = sys.stdout, sys.stderr
        super().__init__(
            view,
            console=console,
            refresh_per_second=REFRESH,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
            vertical_overflow="crop",
        )
        self._drawn = 0  # columns of the terminal when it was drawn last
        os.register_at_fork(after_in_child=self._leave_child)

    def start(self, refresh: bool = True) -> None:
        """Show the view, and the cursor that Live hides."""
        super().start(refresh)
        self.console.show_cursor(True)

    def refresh(self) -> None:
        """Draw the view again."""
        with self._lock:
            columns, height = self.console.width, self._live_render.last_render_height
            folds = math.ceil(min(self._drawn, WIDEST) / columns) - 1
            if height and folds > 0 and self.console.is_interactive:
                up = (ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)
                self.console.control(Control((ControlType.ERASE_IN_LINE, 2), *up * (folds * height)))
            self._drawn = columns
            super().refresh()

    def _leave_child(self) -> None:
        """Let a loader's worker write to the terminal itself: it has no part in the view, nor its locks."""
        if self.is_started:
            sys.stdout, sys.stderr = self._own
