"""Rows of the tables in the report's page: starts, metadata, evaluations, config keys, runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import config
from tools.run_comparison import ABSENT, describe_commit, manifest_differences
from tools.run_info import HEADLINES, RunInfo
from tools.run_tree import CELL, cell, flatten

LISTED = 12  # entries of a list
MOST_ROWS = 500  # of a table about the config or the manifest


START_HEADER = ["started", "at update", "processes", "device", "torch", "commit", "command"]


def start_row(start: Mapping[str, Any]) -> list[str]:
    """Return the cells of a start of the run, as START_HEADER names them."""
    return [
        (start.get("time") or ABSENT).replace("T", " ")[:19],
        f"{start.get('update') or 0:,}",
        cell(start.get("processes", ABSENT)),
        cell(start.get("device", ABSENT)),
        cell((start.get("packages") or {}).get("torch", ABSENT)),
        describe_commit(start),
        cell(" ".join(map(str, (start.get("command") or [])[:CELL]))),
    ]


def metadata(run: RunInfo) -> list[tuple[str, str]]:
    """Return the manifest's metadata of the run and of its last start, as names and values."""
    found: dict[str, Any] = {}
    for name, value in run.run.manifest.items():
        if isinstance(value, Mapping):
            found |= {f"{name}: {key}": entry for key, entry in value.items()}
        elif name != "starts":
            found[name] = value
    for name, value in (run.starts[-1] if run.starts else {}).items():
        if name == "packages":
            found[name] = ", ".join(f"{package} {version}" for package, version in (value or {}).items())
        elif name not in ("config", "command", "time", "update"):
            found[name] = value
    rows = list(found.items())[:MOST_ROWS]
    return [(cell(name.replace("_", " ")), _counted(name, _as_text(value))) for name, value in rows]


def evaluation_row(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of an evaluation: epoch, update, weights, top-1, counts, top-5, loss, seconds."""
    counts = f"{row['correct1']:,} of {row['images']:,}" if "correct1" in row and "images" in row else ABSENT
    loss = "not finite" if row.get("loss") is None else f"{row['loss']:.4f}"
    top5 = ABSENT if row.get("top5") is None else f"{row['top5']:.3f}"
    top1 = f"{row['top1']:.3f}{' best' if row.get('best') else ''}"
    seconds = ABSENT if row.get("seconds") is None else f"{row['seconds']:.1f}"
    return [str(row["epoch"] + 1), f"{row['update']:,}", HEADLINES[row["weights"]], top1, counts, top5, loss, seconds]


def changed_keys(run: RunInfo) -> list[tuple[str, str, str]]:
    """List the config keys that differ from their defaults: key, value, default; a key without a default has "-"."""
    defaults = config.defaults()
    known = set(config.keys(defaults))
    found = []
    for name, value in flatten(run.config).items():
        default = config.get(defaults, name) if name in known else ABSENT
        if value != default and not (name == "PUBLISHED" or name.startswith("PUBLISHED.")):
            found.append((cell(name), _value(value), _value(default)))
    return found[:MOST_ROWS]


def side_by_side(runs: Sequence[RunInfo]) -> list[tuple[str, list[str]]]:
    """Return the rows of the table that compares runs: a name, and a value for each run."""
    rows: list[tuple[str, list[str]]] = [
        ("status", [run.status for run in runs]),
        ("model", [cell(run.key("MODEL.NAME", ABSENT)) for run in runs]),
        ("epochs", [run.epochs_text() for run in runs]),
    ]
    for which, label in HEADLINES.items():
        found = [next((best for name, best in run.results() if name == which), None) for run in runs]
        if any(found):
            best = [f"{one['top1']:.3f} (epoch {one['epoch']})" if one else ABSENT for one in found]
            rows.append((f"best top-1, {label} weights", best))
    if any(run.published for run in runs):
        rows.append(("published top-1", [str(run.published or ABSENT) for run in runs]))
    rates = [run.rate() for run in runs]
    rows.append(("images per second, median", [f"{rate:,.0f}" if rate else ABSENT for rate in rates]))
    for other in range(1, len(runs)):
        for name, first, value in manifest_differences(runs[0].run.manifest, runs[other].run.manifest):
            row = next((values for known, values in rows if known == name), None)
            if row is None:
                row = [_counted(name, first)] * len(runs)
                rows.append((name, row))
            row[other] = _counted(name, value)
    return rows


def differing_keys(runs: Sequence[RunInfo]) -> list[list[str]]:
    """List the config keys in which runs differ: the key, then each run's value."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [[cell(key), *(_value(one.get(key, ABSENT)) for one in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1][:MOST_ROWS]


def _value(value: Any) -> str:
    return repr(value) if value == "" else cell(value)


def _counted(name: str, text: str) -> str:
    """Return a text with thousands separators if it is a large count; seeds have none."""
    return f"{int(text):,}" if text.isdecimal() and 3 < len(text) < 20 and name != "seed" else text


def _as_text(value: Any) -> str:
    """Return a value as text, a list cut after LISTED entries."""
    if not isinstance(value, list):
        return ABSENT if value is None else cell(value)
    return cell(", ".join(map(str, value[:LISTED]))) + (f", ... ({len(value):,})" if len(value) > LISTED else "")
