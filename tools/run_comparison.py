"""Comparison of runs, read from their directories: config, manifest, metrics at common updates, best results."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from config.lookup import config_differences
from engine.checkpoint.manifest import read_manifest
from engine.checkpoint.run_files import check_run_files
from engine.logging.metrics_file import read_rows
from tools.run_tree import cell, read_config

RATES = ("images_per_s", "data_share", "seconds")  # properties of the machine: not compared
ROW_KEYS = ("kind", "weights", "epoch", "update", "update_in_epoch", "best")  # identify a row or follow from the others
SINCE_ROW = ("loss", "grad_norm")  # of training rows: means since the row before
SINCE_EPOCH = ("epoch_loss",)  # mean since the start of the epoch
START_KEYS = ("processes", "device", "cuda", "cores", "system", "python", "model_file_sha256")  # and commit, packages
ABSENT = "-"
MOST_PACKAGES = 100  # compared; a manifest lists about ten
MOST_DIFFERENCES = 300  # of configs and of manifests that are listed; both have fewer values


@dataclass(frozen=True)
class Run:
    """Config, manifest and rows of metrics of a run directory."""

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    train: dict[int, dict[str, Any]]  # rows by update
    evals: dict[tuple[int, str], dict[str, Any]]  # rows by update and weights, raw or ema

    @cached_property
    def before(self) -> dict[int, int]:
        """Update of the preceding training row, by the update of each; 0 for the first."""
        return dict(map(reversed, pairwise([0, *sorted(self.train)])))  # type: ignore[arg-type]

    @property
    def last(self) -> int:
        """Number of the last update with a row."""
        return max([*self.train, *(update for update, _ in self.evals)])


@dataclass(frozen=True)
class Difference:
    """A metric that differs between two runs; None where it was not finite."""

    update: int
    where: str  # train, eval raw or eval ema
    name: str
    a: float | None
    b: float | None
    relative: float | None  # to the larger one; None where one of them is not finite

    def beyond(self, tolerance: float) -> bool:
        """Return True if the relative difference exceeds the tolerance."""
        return self.relative is None or self.relative > tolerance

    def __str__(self) -> str:
        a, b = (ABSENT if value is None else f"{value:.6g}" for value in (self.a, self.b))
        if a == b:
            a, b = repr(self.a), repr(self.b)
        return f"{'' if self.where == 'train' else f'{self.where} '}{self.name} {a} vs {b}"


@dataclass(frozen=True)
class Comparison:
    """Result of the comparison of two runs."""

    a: str
    b: str
    config: list[str]
    manifest: list[tuple[str, str, str]]
    divergence: dict[str, list[Difference]]  # train, eval: those beyond the tolerance, of the first row with any
    largest_loss: Difference | None
    best: dict[str, list[dict[str, Any] | None]]  # by weights: of a, of b
    rows: dict[str, int]  # train, eval: number of rows compared
    through: int  # the last update compared
    same: bool
    summary: str
    notes: list[str] = field(default_factory=list)


def read_run(path: Path, may_be_empty: bool = False) -> Run:
    """Read a run directory. Raises ValueError if it does not exist, is damaged, or has no rows and `may_be_empty` is false."""
    if not path.is_dir():
        raise ValueError(f"run directory {path} does not exist{_near(path)}")
    check_run_files(path)
    metrics = path / "metrics.jsonl"
    may_be_empty = may_be_empty and (path / "config.yaml").is_file()
    if not (metrics.is_file() or may_be_empty):
        raise ValueError(f"{path} holds no metrics.jsonl, it is no run directory{_near(path)}")
    train: dict[int, dict[str, Any]] = {}
    evals: dict[tuple[int, str], dict[str, Any]] = {}
    for row in read_rows(metrics):
        if row["kind"] == "train":
            train[row["update"]] = row
        elif row["kind"] == "eval":
            evals[row["update"], row["weights"]] = row
    if not (train or evals or may_be_empty):
        raise ValueError(f"{metrics} has no rows yet: the run has not reached its first logging step{_near(path)}")
    return Run(path, read_config(path / "config.yaml"), read_manifest(path / "manifest.json"), train, evals)


def compare(a: Run, b: Run, tolerance: float) -> Comparison:
    """Compare two runs as far as both go. Raises ValueError if they have no update in common."""
    updates = [u for u in sorted(a.train) if u in b.train]
    evaluations = [key for key in sorted(a.evals, key=lambda key: (key[0], key[1] != "raw")) if key in b.evals]
    if not (updates or evaluations):
        raise ValueError(
            f"{a.path} and {b.path} have rows of no common update ({_span(a)}; {_span(b)}); run both with one LOG.EVERY"
        )
    found = [d for update in updates for d in _train_differences(a, b, update)]
    found += [d for key in evaluations for d in row_differences(a.evals[key], b.evals[key], f"eval {key[1]}")]
    divergence = {kind: _first(found, kind, tolerance) for kind in ("train", "eval")}
    losses = [d for d in found if d.where == "train" and "loss" in d.name]
    same = not any(divergence.values())
    through = max([*updates, *(update for update, _ in evaluations)])
    return Comparison(
        a=str(a.path),
        b=str(b.path),
        config=[cell(line) for line in config_differences(a.config, b.config, ())[:MOST_DIFFERENCES]],
        manifest=manifest_differences(a.manifest, b.manifest),
        divergence=divergence,
        largest_loss=max(losses, key=_size, default=None),
        best={which: [best(run, which) for run in (a, b)] for which in ("raw", "ema")},
        rows={"train": len(updates), "eval": len(evaluations)},
        through=through,
        same=same,
        summary=_summary(found, divergence, tolerance, through, [*updates, *(update for update, _ in evaluations)]),
        notes=_notes(a, b, updates),
    )


def row_differences(
    a: Mapping[str, Any], b: Mapping[str, Any], where: str, skip: Sequence[str] = ()
) -> Iterator[Difference]:
    """Yield the metrics that differ between two rows of an update, the loss first."""
    names = [name for name in a if name in b and name not in (*ROW_KEYS, *RATES, *skip)]
    for name in sorted(names, key=lambda name: name != "loss"):
        x, y = a[name], b[name]
        if x == y or not all(value is None or isinstance(value, int | float) for value in (x, y)):
            continue
        relative = (
            None if x is None or y is None else min(abs(x - y) / max(abs(x), abs(y)), 2.0)
        )  # 2: of opposite signs
        yield Difference(update=int(a["update"]), where=where, name=name, a=x, b=y, relative=relative)


def manifest_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """List the differences in commit, packages, hardware, processes, data, seed and model, as (name, of a, of b)."""
    flat_a, flat_b = _flat_metadata(a), _flat_metadata(b)
    return [
        (cell(name, 60), _shortened(flat_a.get(name, ABSENT)), _shortened(flat_b.get(name, ABSENT)))
        for name in {**flat_a, **flat_b}
        if flat_a.get(name) != flat_b.get(name)
    ][:MOST_DIFFERENCES]


def best(run: Run, which: str) -> dict[str, Any] | None:
    """Return the first of the best evaluations of the raw or EMA weights: top1, epoch (from 1), update."""
    rows = [run.evals[key] for key in sorted(run.evals) if key[1] == which]
    if not rows:
        return None
    row = max(rows, key=lambda row: row["top1"])
    return {"top1": row["top1"], "epoch": row["epoch"] + 1, "update": row["update"]}


def format_number(value: float | None, digits: int = 9) -> str:
    """Return a number as text; "not finite" for None."""
    return "not finite" if value is None else f"{value:.{digits}g}"


def _train_differences(a: Run, b: Run, update: int) -> Iterator[Difference]:
    row_a, row_b = a.train[update], b.train[update]
    skip: list[str] = []
    if a.before[update] != b.before[update]:
        skip += SINCE_ROW
    if any(row_a.get(key) != row_b.get(key) for key in ("epoch", "update_in_epoch")):
        skip += SINCE_EPOCH
    return row_differences(row_a, row_b, "train", skip)


def _first(found: Sequence[Difference], kind: str, tolerance: float) -> list[Difference]:
    """Return the differences beyond the tolerance of the first row, of training or evaluation, that has any."""
    beyond = [d for d in found if d.where.startswith(kind) and d.beyond(tolerance)]
    return [d for d in beyond if (d.update, d.where) == (beyond[0].update, beyond[0].where)]


def _summary(
    found: Sequence[Difference],
    divergence: Mapping[str, Sequence[Difference]],
    tolerance: float,
    through: int,
    updates: Sequence[int],
) -> str:
    """Return the comparison's result in one line: identical, within the tolerance, or the update at which runs diverge."""
    firsts = [differences[0] for differences in divergence.values() if differences]
    if firsts:
        first = min(firsts, key=lambda d: d.update)
        before = max((u for u in updates if u < first.update), default=None)
        return f"part at update {first.update}: {first}" + (f"; the same through update {before}" if before else "")
    if found:
        largest = max(found, key=_size)
        return f"within {tolerance:g} throughout, to update {through}; the largest difference is {format_number(largest.relative, 2)}"
    return f"identical through update {through}"


def _notes(a: Run, b: Run, updates: Sequence[int]) -> list[str]:
    notes = []
    if a.last != b.last:
        notes.append(f"{a.path} goes to update {a.last}, {b.path} to {b.last}: compared as far as both go")
    common = sum(a.before[u] == b.before[u] for u in updates)
    if common < max(sum(u <= min(a.last, b.last) for u in run.train) for run in (a, b)):
        notes.append(
            f"rows at other intervals: {len(updates)} updates in common, loss and grad_norm compared at {common} of them"
        )
    notes += [
        f"{run.path} holds no {name}" for run in (a, b) for name in ("config", "manifest") if not getattr(run, name)
    ]
    return notes


def _flat_metadata(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest as one level of names; values that changed from start to start are joined in order."""
    metadata: dict[str, Any] = {}
    starts = manifest.get("starts") or []
    packages = sorted({name for start in starts for name in start.get("packages") or {}})[:MOST_PACKAGES]
    columns = {
        "commit": [describe_commit(start) for start in starts],
        **{name: [start.get(name) for start in starts] for name in START_KEYS},
        **{name: [(start.get("packages") or {}).get(name) for start in starts] for name in packages},
    }
    for name, values in columns.items():
        metadata[name] = " then ".join(dict.fromkeys(str(value) for value in values if value is not None)) or ABSENT
    for name, value in manifest.items():
        if isinstance(value, Mapping):
            metadata |= {f"{name}.{key}": entry for key, entry in value.items()}
        elif name != "starts":
            metadata[name] = value
    return metadata


def describe_commit(start: Mapping[str, Any]) -> str:
    """Return the commit of a start of a run, and the number of files that differed from it."""
    commit, changed = (start.get("commit") or "unknown")[:10], start.get("changed_files")
    return f"{commit} + {changed} changed files" if changed else commit


def _shortened(value: Any) -> str:
    """Return a value as text of at most 60 characters, a list with its length first."""
    return cell(f"{len(value)}: {', '.join(map(str, value[:60]))}" if isinstance(value, list) else value, 60)


def _size(difference: Difference) -> float:
    return math.inf if difference.relative is None else difference.relative


def _span(run: Run) -> str:
    """Return the first and the last updates that a run has rows of, as text."""
    updates = sorted({*run.train, *(update for update, _ in run.evals)})
    return ", ".join(map(str, updates[:3])) + (f", ... {updates[-1]}" if len(updates) > 3 else "")


def _near(path: Path) -> str:
    """Return a hint that names the run directories near a path that is none."""
    folder = next((p for p in path.resolve().parents if p.is_dir()), Path())
    runs = [p.parent for p in sorted({*folder.glob("*/metrics.jsonl"), *folder.glob("*/*/metrics.jsonl")})]
    runs = [run for run in runs if run.resolve() != path.resolve()]
    names = difflib.get_close_matches(path.name, [run.name for run in runs], n=3, cutoff=0.0)
    shown = [next(run for run in runs if run.name == name) for name in dict.fromkeys(names)]
    return f"; runs near it: {', '.join(map(str, shown))}" if shown else f"; {folder} holds no run"
