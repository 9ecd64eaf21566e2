"""Log of the main process: live view or lines on the terminal, log.txt, metrics.jsonl, trackers."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.atomic_files import write_atomically, write_text_atomically
from common.regular_files import check_kind, regular
from common.text import allow_any_text, escape_controls, readable
from engine.evaluate import Accuracy
from engine.logging.live_view import LiveView
from engine.logging.metrics_file import Row, parse_row, read_lines
from engine.logging.trackers import TensorBoardTracker, Tracker, WandbTracker
from engine.loop import StepMetrics

T = TypeVar("T")
PICTURES = "pictures"  # folder of a run directory
MAX_DATA_SHARE = 0.1  # share of the time spent waiting for data above which a hint is logged


class Log:
    """Log of the main process: terminal, log.txt, metrics.jsonl, trackers.

    On other processes every method does nothing. Before `open` it writes to the terminal only.
    """

    def __init__(self, main: bool, dali: bool = False):
        """Create the log of a process; `dali` is True if the run decodes with DALI, which hints then do not suggest."""
        self.main, self.dali = main, dali
        allow_any_text()
        # No live view unless stdout is a terminal: with FORCE_COLOR rich would take a file for one.
        self.console = Console(highlight=False, force_interactive=None if sys.stdout.isatty() else False)
        self.view: LiveView | None = None  # on a terminal, once a run directory is open
        self.folder: Path | None = None
        self.file: IO[str] | None = None
        self.early: list[str] = []  # lines logged before log.txt was open
        self.metrics: IO[str] | None = None
        self.trackers: list[Tracker] = []
        self.hinted: int | None = None  # epoch of the last hint; -1 before the first hint, None before the first step
        self.lost = False  # True once a line could not be written

    def open(
        self,
        folder: Path,
        update: int,
        *,
        tensorboard: bool,
        closed: int | None = None,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the files of a run directory, to begin or to continue after `update` updates.

        Rows of metrics.jsonl after that position belong to updates that will be repeated, and are dropped; so are
        evaluations after update `closed` (by default `update`). `wandb` is a project of Weights & Biases, "" for none; raises
        ValueError if it does not start, or for a link or pipe in place of a file. `config` is logged to the trackers as a text.
        """
        if not self.main:
            return
        self.folder = folder
        self.file = _open_to_append(folder / "log.txt")
        self.file.writelines(self.early)
        self.early.clear()
        path = folder / "metrics.jsonl"
        rows: list[Row] = []
        if check_kind(path):
            limits = {"eval": update if closed is None else closed}
            kept = [(line, row) for line in read_lines(path) if (row := _kept_row(line, update, limits))]
            rows = [row for _, row in kept]
            write_text_atomically(path, "".join(f"{line}\n" for line, _ in kept))
        self.metrics = _open_to_append(path)
        if tensorboard:
            self.trackers.append(TensorBoardTracker(folder, update))
        if wandb:
            self.trackers.append(WandbTracker(folder, wandb, config or {}))
        if config:
            for tracker in self.trackers:
                with self._ignore_write_errors(tracker.name):
                    tracker.text("config", json.dumps(config, indent=2), update)
        if self.console.is_interactive:
            self.view = LiveView(self.console, folder.name)
            self.view.replay(rows)

    def reopen(self, folder: Path, open_files: Callable[[], None]) -> None:
        """Close the files and open them again after a rollback to a checkpoint; a failure only loses lines."""
        self.close()
        with self._ignore_write_errors(str(folder)):
            open_files()

    def close(self) -> None:
        """Remove the live view and close the files and trackers."""
        self.end_epoch()
        if self.view:
            self.view.stop()
        for stream in (self.file, self.metrics, *self.trackers):
            with suppress(OSError):  # logged when the write failed
                if stream is not None:
                    stream.close()
        self.file = self.metrics = self.view = None
        self.trackers = []

    def info(self, text: str, style: str | None = None) -> None:
        """Print a line and write it to log.txt."""
        if not self.main:
            return
        stamp, shown = time.strftime("%H:%M:%S"), readable(text)
        if self.console.is_interactive:
            self.console.print(shown, style=style, markup=False, soft_wrap=True)
        else:
            self.console.print(f"{stamp} {shown}", markup=False, soft_wrap=True)
        self._write_line(f"{stamp} {escape_controls(text)}")

    def warning(self, text: str) -> None:
        """Print a warning and write it to log.txt."""
        self.info(f"warning: {text}", style="yellow")

    def begin_epoch(self, epoch: int, epochs: int, done: int, updates: int) -> None:
        """Show the progress of an epoch of which `done` of `updates` updates are done."""
        if self.view:
            self.view.begin_epoch(epoch, epochs, done, updates)

    def advance(self) -> None:
        """Advance the progress bar by one update."""
        if self.view:
            self.view.advance()

    def end_epoch(self) -> None:
        """End the progress of an epoch, complete or not."""
        if self.view:
            self.view.end_epoch()

    def track(self, batches: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Yield the batches and advance a progress bar on a terminal."""
        if self.view:
            yield from self.view.track(batches, total, label)
            return
        if not (self.main and self.console.is_interactive):
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

    def step(self, step: StepMetrics, epochs: int, updates_per_epoch: int) -> None:
        """Log the metrics of a logging step."""
        if not self.main:
            return
        numbers = (
            f"loss {step.loss:.4f}  lr {step.lr:.3e}  norm {step.grad_norm:.2f}  {step.images_per_s:.0f} images/s  "
            f"waiting for data {100 * step.data_share:.0f}%"
        )
        if step.skipped:
            numbers += f"  skipped, not finite: {step.skipped}, {step.skipped_in_run} in the run"
        line = f"epoch {step.epoch + 1}/{epochs}  update {step.update_in_epoch}/{updates_per_epoch}  {numbers}"
        if self.view:
            self.view.note_step(step)
        if self.view and step.update_in_epoch < updates_per_epoch:
            self._write_line(f"{time.strftime('%H:%M:%S')} {line}")
        else:
            self.info(line)
        self._row({"kind": "train", **asdict(step)}, step.update)
        self._hint(step)

    def _hint(self, step: StepMetrics) -> None:
        """Warn once per epoch of waiting for data; not at the first logging step, during which workers start."""
        if self.hinted is None:
            self.hinted = -1
        elif step.data_share > MAX_DATA_SHARE and step.epoch != self.hinted:
            self.hinted = step.epoch
            decode = "" if self.dali else ", decode on the GPU with DATA.LOADER dali"
            self.warning(
                f"the model waits for data {100 * step.data_share:.0f}% of the time: raise DATA.WORKERS or DATA.PREFETCH{decode}, "
                "or on slow storage read from tars (docs/data.md, Sizing workers)"
            )

    def result(self, which: str, accuracy: Accuracy, epoch: int, update: int, best: bool) -> None:
        """Log the accuracy of the raw or EMA weights after `epoch` (from 0)."""
        if not self.main:
            return
        self.info(
            f"epoch {epoch + 1}  {which:<3}  {accuracy}{'  best' if best else ''}", style="green" if best else None
        )
        if self.view:
            self.view.note_result(which, accuracy.top1, epoch)
        scalars = {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss}
        counts = {"correct1": accuracy.correct1, "correct5": accuracy.correct5, "images": accuracy.images}
        row = {"kind": "eval", "weights": which, "epoch": epoch, "update": update, **scalars, **counts, "best": best}
        self._row({**row, "seconds": accuracy.seconds}, update, f"eval_{which}", scalars)

    def picture(self, name: str, image: Image.Image, update: int) -> None:
        """Write a picture, with a name like epoch_010/merged, as a PNG in the run directory, and to the trackers."""
        if self.folder is None:
            return
        path = self.folder / PICTURES / f"{name}.png"
        with self._ignore_write_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: image.save(file, "PNG"))
        for tracker in self.trackers:
            with self._ignore_write_errors(tracker.name):
                tracker.picture(readable(f"pictures/{path.stem}"), np.asarray(image.convert("RGB")), update)

    def _row(
        self, row: dict[str, Any], update: int, prefix: str = "train", scalars: dict[str, float] | None = None
    ) -> None:
        if self.metrics is not None:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self._write(self.metrics, json.dumps(finite) + "\n")
        named = {f"{prefix}/{name}": value for name, value in (scalars or row).items() if isinstance(value, float)}
        for tracker in self.trackers:
            with self._ignore_write_errors(tracker.name):
                tracker.scalars(named, update)

    def _write_line(self, line: str) -> None:
        if self.file is not None:
            self._write(self.file, line + "\n")
        else:
            self.early.append(line + "\n")

    def _write(self, stream: IO[str], text: str) -> None:
        with self._ignore_write_errors(stream.name):
            stream.write(text)

    @contextmanager
    def _ignore_write_errors(self, name: str) -> Iterator[None]:
        """Ignore OSErrors, as of a full disk, so that they lose lines but do not end the run; warn once."""
        try:
            yield
        except OSError as error:
            if not self.lost:
                self.lost = True
                text = readable(f"warning: {name} cannot be written ({error.strerror}); rows are lost")
                self.console.print(text, markup=False, soft_wrap=True)


def _open_to_append(path: Path) -> IO[str]:
    """Open a text file of a run directory to append lines. Raises ValueError for a link, pipe or device."""
    return open(path, "a", buffering=1, encoding="utf-8", errors="surrogateescape", opener=regular)


def _kept_row(line: str, last: int, last_of_kind: dict[str, int]) -> Row | None:
    """Return the row of metrics in a line; None for an update after the last of its kind, or if a crash has cut it off."""
    try:
        row = parse_row(line)
    except ValueError:
        return None
    return row if row["update"] <= last_of_kind.get(row["kind"], last) else None
