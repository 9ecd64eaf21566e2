"""What a run says: bars on a terminal, plain lines in a log, rows in metrics.jsonl, curves in TensorBoard. Main process only."""

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from engine.evaluate import Accuracy
from engine.loop import Step

T = TypeVar("T")
STALL = 0.1  # share of the time spent waiting for data from which on a hint is due


class Log:
    """The voice of the main process; on the others every method does nothing. Until `open` it speaks to the console only."""

    def __init__(self, main: bool, dali: bool = False):
        """`dali`: whether DALI decodes already, so that no hint need name it."""
        self.main, self.dali = main, dali
        self.console = Console(highlight=False, soft_wrap=True)
        self.file: IO[str] | None = None
        self.early: list[str] = []  # lines said before there was a file
        self.metrics: IO[str] | None = None
        self.events: Any = None
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.hinted: int | None = None  # the epoch of the last hint that data are late; -1 before any
        self.lost = False  # whether a line could not be written

    def open(self, folder: Path, update: int, tensorboard: bool, closed: int | None = None) -> None:
        """Begin, or continue after `update` updates, the files of a run directory.

        Rows of metrics.jsonl behind that position belong to updates that will be done again, and are dropped; so are
        evaluations after update `closed` (by default `update`).
        """
        if not self.main:
            return
        self.file = (folder / "log.txt").open("a", buffering=1)
        self.file.writelines(self.early)
        self.early.clear()
        path = folder / "metrics.jsonl"
        if path.exists():
            limits = {"eval": update if closed is None else closed}
            rows = [line for line in path.read_text().splitlines() if _is_kept(line, update, limits)]
            temporary = path.with_name(".metrics.jsonl.tmp")
            temporary.write_text("".join(f"{row}\n" for row in rows))
            temporary.replace(path)
        self.metrics = path.open("a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=update + 1)

    def open_again(self, folder: Path, update: int, tensorboard: bool, closed: int) -> None:
        """Go on after an earlier update: a run has gone back to a checkpoint."""
        self.close()
        with self._surviving(str(folder)):
            self.open(folder, update, tensorboard, closed)

    def close(self) -> None:
        """Stop the bar and close the files."""
        self.end_epoch()
        for stream in (self.file, self.metrics, self.events):
            with suppress(OSError):  # said when it was written
                if stream is not None:
                    stream.close()
        self.file = self.metrics = self.events = None

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line, and keep it in log.txt."""
        if not self.main:
            return
        stamp = time.strftime("%H:%M:%S")
        if self.console.is_terminal:
            self.console.print(text, style=style, markup=False)
        else:
            self.console.print(f"{stamp} {text}", markup=False)
        self._keep(f"{stamp} {text}")

    def warn(self, text: str) -> None:
        """Print a warning, and keep it in log.txt."""
        self.say(f"warning: {text}", style="yellow")

    def begin_epoch(self, epoch: int, epochs: int, done: int, updates: int) -> None:
        """Show an epoch's progress, `done` of `updates` being behind it already."""
        if not (self.main and self.console.is_terminal):
            return
        columns = (
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        self.progress = Progress(TextColumn("{task.description}"), *columns, console=self.console, transient=True)
        self.progress.start()
        self.task = self.progress.add_task(f"epoch {epoch + 1}/{epochs}", total=updates, completed=done, facts="")

    def advance(self) -> None:
        """Move the bar by an update."""
        if self.progress is not None and self.task is not None:
            self.progress.advance(self.task)

    def end_epoch(self) -> None:
        """Take the bar away."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def track(self, batches: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Yield the batches, moving a bar on a terminal."""
        if not (self.main and self.console.is_terminal):
            yield from batches
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield from progress.track(batches, total=total, description=label)

    def step(self, step: Step, epochs: int, updates_per_epoch: int) -> None:
        """Report a logging step."""
        if not self.main:
            return
        facts = (
            f"loss {step.loss:.4f}  lr {step.lr:.3e}  norm {step.grad_norm:.2f}  {step.images_per_s:.0f} images/s  "
            f"waiting for data {100 * step.data_share:.0f}%"
        )
        if step.skipped:
            facts += f"  skipped, not finite: {step.skipped}, {step.skipped_in_run} in the run"
        line = f"epoch {step.epoch + 1}/{epochs}  update {step.update_in_epoch}/{updates_per_epoch}  {facts}"
        if self.progress is not None and self.task is not None and step.update_in_epoch < updates_per_epoch:
            self.progress.update(self.task, facts=facts)
            self._keep(f"{time.strftime('%H:%M:%S')} {line}")
        else:
            self.say(line)
        self._row({"kind": "train", **asdict(step)}, step.update)
        self._hint(step)

    def _hint(self, step: Step) -> None:
        """Say once an epoch what helps against waiting for data; the first report, in which workers start, does not count."""
        if self.hinted is None:
            self.hinted = -1
        elif step.data_share > STALL and step.epoch != self.hinted:
            self.hinted = step.epoch
            decode = "" if self.dali else ", decode on the GPU with DATA.LOADER dali"
            self.warn(
                f"the model waits for data {100 * step.data_share:.0f}% of the time: raise DATA.WORKERS or DATA.PREFETCH{decode}, "
                "or on slow storage read from tars (docs/data.md, Sizing workers)"
            )

    def result(self, which: str, accuracy: Accuracy, epoch: int, update: int, best: bool) -> None:
        """Report an evaluation of the raw or EMA weights after `epoch` (from 0)."""
        if not self.main:
            return
        self.say(
            f"epoch {epoch + 1}  {which:<3}  {accuracy}{'  best' if best else ''}", style="green" if best else None
        )
        numbers = {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss}
        counts = {"correct1": accuracy.correct1, "correct5": accuracy.correct5, "images": accuracy.images}
        row = {"kind": "eval", "weights": which, "epoch": epoch, "update": update, **numbers, **counts, "best": best}
        self._row({**row, "seconds": accuracy.seconds}, update, f"eval_{which}", numbers)

    def _row(
        self, row: dict[str, Any], update: int, prefix: str = "train", curves: dict[str, float] | None = None
    ) -> None:
        if self.metrics is not None:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self._write(self.metrics, json.dumps(finite) + "\n")
        if self.events is not None:
            with self._surviving("tensorboard"):
                for name, value in (curves or row).items():
                    if isinstance(value, float):
                        self.events.add_scalar(f"{prefix}/{name}", value, update)

    def _keep(self, line: str) -> None:
        if self.file is not None:
            self._write(self.file, line + "\n")
        else:
            self.early.append(line + "\n")

    def _write(self, stream: IO[str], text: str) -> None:
        with self._surviving(stream.name):
            stream.write(text)

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """Let a full disk cost lines, not the run; say so once."""
        try:
            yield
        except OSError as error:
            if not self.lost:
                self.lost = True
                self.console.print(f"warning: {name} cannot be written ({error.strerror}); rows are lost", markup=False)


def _is_kept(line: str, last: int, last_of_kind: dict[str, int]) -> bool:
    """Tell whether a metrics row belongs to no later update than the last, of its kind; a line cut off by a crash does not."""
    try:
        row = json.loads(line)
        return bool(row["update"] <= last_of_kind.get(row["kind"], last))
    except (ValueError, KeyError, TypeError):
        return False
