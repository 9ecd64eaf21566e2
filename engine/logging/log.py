"""What a run says: a live view on a terminal, plain lines in a log, rows in metrics.jsonl, curves and pictures elsewhere.

Main process only.
"""

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

from engine.evaluate import Accuracy
from engine.logging.live_view import LiveView
from engine.logging.trackers import TensorBoardTracker, Tracker, WandbTracker
from engine.loop import StepMetrics

T = TypeVar("T")
PICTURES = "pictures"  # folder of a run directory
STALL = 0.1  # share of the time spent waiting for data from which on a hint is due


class Log:
    """The voice of the main process; on the others every method does nothing. Until `open` it speaks to the console only."""

    def __init__(self, main: bool, dali: bool = False):
        """`dali`: whether DALI decodes already, so that no hint need name it."""
        self.main, self.dali = main, dali
        # Where stdout is no terminal there is no view, whatever FORCE_COLOR makes rich believe.
        self.console = Console(highlight=False, force_interactive=None if sys.stdout.isatty() else False)
        self.view: LiveView | None = None  # on a terminal, once a run directory is open
        self.folder: Path | None = None
        self.file: IO[str] | None = None
        self.early: list[str] = []  # lines said before there was a file
        self.metrics: IO[str] | None = None
        self.curves: list[Tracker] = []
        self.hinted: int | None = None  # the epoch of the last hint that data are late; -1 before any
        self.lost = False  # whether a line could not be written

    def open(
        self,
        folder: Path,
        update: int,
        tensorboard: bool,
        closed: int | None = None,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin, or continue after `update` updates, the files of a run directory.

        Rows of metrics.jsonl behind that position belong to updates that will be done again, and are dropped; so are
        evaluations after update `closed` (by default `update`). `wandb` is a project of Weights & Biases, "" for none; raises
        ValueError if that does not start. `config` is shown beside the curves.
        """
        if not self.main:
            return
        self.folder = folder
        self.file = (folder / "log.txt").open("a", buffering=1)
        self.file.writelines(self.early)
        self.early.clear()
        path = folder / "metrics.jsonl"
        rows: list[str] = []
        if path.exists():
            limits = {"eval": update if closed is None else closed}
            rows = [line for line in path.read_text().splitlines() if _is_kept(line, update, limits)]
            temporary = path.with_name(".metrics.jsonl.tmp")
            temporary.write_text("".join(f"{row}\n" for row in rows))
            temporary.replace(path)
        self.metrics = path.open("a", buffering=1)
        if tensorboard:
            self.curves.append(TensorBoardTracker(folder, update))
        if wandb:
            self.curves.append(WandbTracker(folder, wandb, config or {}))
        if config:
            for curves in self.curves:
                with self._surviving(curves.name):
                    curves.text("config", json.dumps(config, indent=2), update)
        if self.console.is_interactive:
            self.view = LiveView(self.console, folder.name)
            self.view.replay(map(json.loads, rows))

    def open_again(self, folder: Path, begin: Callable[[], None]) -> None:
        """Close, and open with `begin` in the middle of a run: one that went back to a checkpoint. A failure costs lines only."""
        self.close()
        with self._surviving(str(folder)):
            begin()

    def close(self) -> None:
        """Take the view away and close the files."""
        self.end_epoch()
        if self.view:
            self.view.stop()
        for stream in (self.file, self.metrics, *self.curves):
            with suppress(OSError):  # said when it was written
                if stream is not None:
                    stream.close()
        self.file = self.metrics = self.view = None
        self.curves = []

    def info(self, text: str, style: str | None = None) -> None:
        """Print a line, and keep it in log.txt."""
        if not self.main:
            return
        stamp = time.strftime("%H:%M:%S")
        if self.console.is_interactive:
            self.console.print(text, style=style, markup=False, soft_wrap=True)
        else:
            self.console.print(f"{stamp} {text}", markup=False, soft_wrap=True)
        self._keep(f"{stamp} {text}")

    def warning(self, text: str) -> None:
        """Print a warning, and keep it in log.txt."""
        self.info(f"warning: {text}", style="yellow")

    def begin_epoch(self, epoch: int, epochs: int, done: int, updates: int) -> None:
        """Show an epoch's progress, `done` of `updates` being behind it already."""
        if self.view:
            self.view.begin_epoch(epoch, epochs, done, updates)

    def advance(self) -> None:
        """Move the bar by an update."""
        if self.view:
            self.view.advance()

    def end_epoch(self) -> None:
        """Note that the updates of the epoch are over, or that they stop."""
        if self.view:
            self.view.end_epoch()

    def track(self, batches: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Yield the batches, moving a bar on a terminal."""
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
        """Report a logging step."""
        if not self.main:
            return
        metadata = (
            f"loss {step.loss:.4f}  lr {step.lr:.3e}  norm {step.grad_norm:.2f}  {step.images_per_s:.0f} images/s  "
            f"waiting for data {100 * step.data_share:.0f}%"
        )
        if step.skipped:
            metadata += f"  skipped, not finite: {step.skipped}, {step.skipped_in_run} in the run"
        line = f"epoch {step.epoch + 1}/{epochs}  update {step.update_in_epoch}/{updates_per_epoch}  {metadata}"
        if self.view:
            self.view.note_step(step)
        if self.view and step.update_in_epoch < updates_per_epoch:
            self._keep(f"{time.strftime('%H:%M:%S')} {line}")
        else:
            self.info(line)
        self._row({"kind": "train", **asdict(step)}, step.update)
        self._hint(step)

    def _hint(self, step: StepMetrics) -> None:
        """Say once an epoch what helps against waiting for data; the first report, in which workers start, does not count."""
        if self.hinted is None:
            self.hinted = -1
        elif step.data_share > STALL and step.epoch != self.hinted:
            self.hinted = step.epoch
            decode = "" if self.dali else ", decode on the GPU with DATA.LOADER dali"
            self.warning(
                f"the model waits for data {100 * step.data_share:.0f}% of the time: raise DATA.WORKERS or DATA.PREFETCH{decode}, "
                "or on slow storage read from tars (docs/data.md, Sizing workers)"
            )

    def result(self, which: str, accuracy: Accuracy, epoch: int, update: int, best: bool) -> None:
        """Report an evaluation of the raw or EMA weights after `epoch` (from 0)."""
        if not self.main:
            return
        self.info(
            f"epoch {epoch + 1}  {which:<3}  {accuracy}{'  best' if best else ''}", style="green" if best else None
        )
        if self.view:
            self.view.note_result(which, accuracy.top1, epoch)
        numbers = {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss}
        counts = {"correct1": accuracy.correct1, "correct5": accuracy.correct5, "images": accuracy.images}
        row = {"kind": "eval", "weights": which, "epoch": epoch, "update": update, **numbers, **counts, "best": best}
        self._row({**row, "seconds": accuracy.seconds}, update, f"eval_{which}", numbers)

    def picture(self, name: str, image: Image.Image, update: int) -> None:
        """Keep a picture, by a name like epoch_010/merged: as a PNG in the run directory, and beside the curves."""
        if self.folder is None:
            return
        path = self.folder / PICTURES / f"{name}.png"
        with self._surviving(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        for curves in self.curves:
            with self._surviving(curves.name):
                curves.picture(f"pictures/{path.stem}", np.asarray(image.convert("RGB")), update)

    def _row(
        self, row: dict[str, Any], update: int, prefix: str = "train", curves: dict[str, float] | None = None
    ) -> None:
        if self.metrics is not None:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self._write(self.metrics, json.dumps(finite) + "\n")
        named = {f"{prefix}/{name}": value for name, value in (curves or row).items() if isinstance(value, float)}
        for target in self.curves:
            with self._surviving(target.name):
                target.scalars(named, update)

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
                self.console.print(
                    f"warning: {name} cannot be written ({error.strerror}); rows are lost", markup=False, soft_wrap=True
                )


def _is_kept(line: str, last: int, last_of_kind: dict[str, int]) -> bool:
    """Tell whether a metrics row belongs to no later update than the last, of its kind; a line cut off by a crash does not."""
    try:
        row = json.loads(line)
        return bool(row["update"] <= last_of_kind.get(row["kind"], last))
    except (ValueError, KeyError, TypeError):
        return False
