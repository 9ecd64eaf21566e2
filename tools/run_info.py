"""Information about a run, read from its directory: status, progress, results, warnings, files."""

import contextlib
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from common.byte_size import format_bytes
from common.regular_files import read_regular
from engine.checkpoint.run_directory import RunDirectory
from engine.checkpoint.run_files import LOG_BYTES, parse_json, read_json_file
from tools.published_results import published_top1
from tools.run_comparison import Run, best, read_run
from tools.run_tree import cell

LOG_LINES = 200
MOST_BAD_IMAGES = 1000  # listed
MOST_WARNINGS = 200  # kinds that are listed
MOST_FILES = 200  # checkpoints and pictures that are listed
LINE = 2000  # characters of a line of log.txt
ALWAYS = ("update", "epoch", "loss")  # columns that the curves need, also where no row has them
OF_EVALS = (*ALWAYS, "top1", "top5")
WARNING = re.compile(r"(\d\d:\d\d:\d\d) warning: (.*)")
NUMBER = re.compile(r"\d+(\.\d+)?")
HEADLINES = {"raw": "raw", "ema": "EMA"}


@dataclass(frozen=True)
class RunInfo:
    """Information derived from a run directory, in any status and with or without rows of metrics yet."""

    run: Run

    @classmethod
    def read(cls, path: Path) -> "RunInfo":
        """Read a run directory. Raises ValueError for any other folder."""
        return cls(read_run(path, may_be_empty=True))

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def status(self) -> str:
        """Return complete, running (a process holds the lock), interrupted (by a signal) or stopped."""
        if (self.path / "done").exists():
            return "complete"
        if RunDirectory(self.path, keep=1).is_locked():
            return "running"
        return "interrupted" if (self.path / "preempted").exists() else "stopped"

    @property
    def config(self) -> dict[str, Any]:
        return self.run.config

    @property
    def data(self) -> dict[str, Any]:
        """Numbers of the data set, from the manifest: train, val, classes."""
        return self.run.manifest.get("data") or {}

    def key(self, name: str, default: Any = None) -> Any:
        """Return a value of the config by its dotted name."""
        found: Any = self.config
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return default if found is None else found

    def number(self, name: str) -> int:
        """Return a whole number of the config by its dotted name; 0 without one."""
        found = self.key(name)
        return found if type(found) is int and found > 0 else 0

    @property
    def starts(self) -> list[dict[str, Any]]:
        return list(self.run.manifest.get("starts") or [])

    @property
    def last(self) -> int:
        """Number of the last update with a row of metrics; 0 before any."""
        return self.run.last if self.run.train or self.run.evals else 0

    @cached_property
    def updates_per_epoch(self) -> int | None:
        """Number of updates in an epoch, from the rows or the data's size; None if unknown."""
        images, batch = self.data.get("train"), self.number("TRAIN.GLOBAL_BATCH")
        whole = [
            (row["update"] - row["update_in_epoch"], row["epoch"])
            for row in self.run.train.values()
            if row.get("update_in_epoch")
        ]
        whole += [(row["update"], row["epoch"] + 1) for row in self.run.evals.values()]
        for updates, epochs in whole:
            if epochs:
                return max(updates // epochs, 0) or None
        return (images // batch or None) if images and images > 0 and batch else None

    @property
    def epochs(self) -> int:
        """Number of epochs in the whole run, with cooldown."""
        return self.number("TRAIN.EPOCHS") + self.number("SCHEDULE.COOLDOWN_EPOCHS")

    def epochs_text(self) -> str:
        """Return the epochs done of all epochs, such as "2.5 / 5"."""
        epoch = self.last / self.updates_per_epoch if self.updates_per_epoch else 0.0
        return f"{epoch:.{0 if epoch == int(epoch) else 1}f} / {self.epochs}"

    @property
    def published(self) -> float | None:
        """Published top-1 of this model at this image size; None unless the run is on ImageNet-1k."""
        if (self.data.get("classes"), self.data.get("train")) != (1000, 1_281_167) or self.data.get("synthetic"):
            return None
        return published_top1(str(self.key("MODEL.NAME", "")), self.number("DATA.IMG_SIZE"))

    def results(self) -> list[tuple[str, dict[str, Any]]]:
        """List the best evaluations of the raw and the EMA weights, the recipe's headline first."""
        headline = self.key("RECIPE.HEADLINE", "raw")
        order = sorted(HEADLINES, key=lambda which: which != headline)
        return [(which, found) for which in order if (found := best(self.run, which))]

    def rate(self) -> float | None:
        """Return the median images/s of the training rows; None without rows."""
        rates = [rate for row in self.run.train.values() if (rate := row.get("images_per_s")) and rate > 0]
        return statistics.median(rates) if rates else None

    def left(self, updates: int) -> float | None:
        """Return the seconds left of a run of `updates` at the median rate, without evaluations; None if unknown."""
        rate, batch = self.rate(), self.number("TRAIN.GLOBAL_BATCH")
        return (updates - self.last) * batch / rate if rate and batch and updates > self.last else None

    @property
    def written(self) -> float | None:
        """Time of the last write to metrics.jsonl, in seconds since 1970; None without the file."""
        metrics = self.path / "metrics.jsonl"
        return metrics.stat().st_mtime if metrics.is_file() else None

    def first_start(self) -> datetime | None:
        """Return the time of the run's first start."""
        return _time(self.starts[0].get("time") or "") if self.starts else None

    def columns(self) -> dict[str, Any]:
        """Return every number of metrics.jsonl by column: train, and evals by weights."""
        return {
            "train": _columns([self.run.train[update] for update in sorted(self.run.train)], ALWAYS),
            "evals": {
                which: _columns([row for (_, w), row in sorted(self.run.evals.items()) if w == which], OF_EVALS)
                for which in sorted({which for _, which in self.run.evals}, reverse=True)
            },
        }

    @cached_property
    def log(self) -> list[str]:
        """Lines of log.txt, long ones cut."""
        return [cell(line, LINE) for line in self._lines("log.txt")]

    def _lines(self, name: str) -> list[str]:
        """Return the lines of a text file of the run, none without the file."""
        try:
            text = read_regular(self.path / name, LOG_BYTES).decode("utf-8", "surrogateescape")
        except FileNotFoundError:
            return []
        return text.removesuffix("\n").split("\n") if text else []

    def warnings(self) -> list[tuple[str, int, str]]:
        """List the log's warnings, grouped where only numbers differ: time of the last, count, text of the last."""
        counts: Counter[str] = Counter()
        last: dict[str, tuple[str, str]] = {}
        for line in self.log:
            if found := WARNING.fullmatch(line):
                kind = NUMBER.sub("#", found[2])
                counts[kind] += 1
                last[kind] = found[1], found[2]
        return [(last[kind][0], count, last[kind][1]) for kind, count in counts.most_common(MOST_WARNINGS)]

    def bad_images(self) -> list[tuple[str, str]]:
        """List the training images that could not be read, with the reason; of many the first."""
        found = []
        for line in self._lines("bad_images.jsonl")[:MOST_BAD_IMAGES]:
            with contextlib.suppress(ValueError):  # a crash may cut off the last line
                row = parse_json(line)
                if isinstance(row, dict):
                    found.append((cell(row.get("path", "")), cell(row.get("reason", ""))))
        return found

    def diverged(self) -> str:
        """Return a summary of diverged.json; "" without the file."""
        path = self.path / "diverged.json"
        try:
            record = read_json_file(path, LOG_BYTES)
        except ValueError as error:
            return str(error)
        if not isinstance(record, dict):
            return f"{path} is damaged" if path.exists() else ""
        back = record.get("went_back_to")
        return f"{cell(record.get('error'))}; {f'went back to {cell(back)}' if back else 'could not go back'}. More in {path}."

    def files(self) -> list[tuple[str, str]]:
        """List weights and checkpoints with their sizes."""
        paths = [*sorted(self.path.glob("best_*.safetensors")), *sorted(self.path.glob("checkpoints/*.pt"))][
            -MOST_FILES:
        ]
        return [(str(path.relative_to(self.path)), format_bytes(path.stat().st_size)) for path in paths]

    def config_text(self) -> str:
        """Return the config as YAML; "" without one."""
        return yaml.safe_dump(self.config, sort_keys=False) if self.config else ""

    def pictures(self) -> dict[str, list[Path]]:
        """Return the run's pictures by their folder: "" first, then epoch_0010 and so on."""
        folder = self.path / "pictures"
        found: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*.png"))[:MOST_FILES]:
            found.setdefault(str(path.parent.relative_to(folder)).replace(".", ""), []).append(path)
        return dict(sorted(found.items()))


def format_age(moment: float) -> str:
    """Return the time since a moment (seconds since 1970) as text."""
    return f"{format_rounded_duration(max(time.time() - moment, 0))} ago"


def format_rounded_duration(seconds: float) -> str:
    """Return a duration as text: a rounded number with its unit, seconds to days. live_widgets.duration is exact, as a clock."""
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} seconds"


def _columns(rows: list[dict[str, Any]], always: tuple[str, ...]) -> dict[str, list[Any]]:
    """Return the values of rows by column, those of `always` too; None where a row lacks it."""
    found = dict.fromkeys([*always, *(name for row in rows for name in row)])
    names = [name for name in found if name not in ("kind", "weights")]
    return {name: [row.get(name) for row in rows] for name in names}


def _time(text: str) -> datetime | None:
    with contextlib.suppress(ValueError):
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z")
    return None
