"""Rows of metrics.jsonl: the one reader of the file, for the log of a run that continues, the report and the comparison of runs."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.regular_files import read_regular
from engine.checkpoint.run_files import METRICS_BYTES, parse_json

Row = dict[str, Any]

COUNTS = (  # whole numbers of 0 or more
    *("update", "epoch", "update_in_epoch", "correct1", "correct5", "images"),
    *("skipped", "skipped_in_run", "overflows_in_run"),
)
REQUIRED = {"train": ("epoch", "loss"), "eval": ("epoch", "weights", "top1")}  # of a row, by kind, besides `update`
WEIGHTS = ("raw", "ema")
NAME = re.compile(r"[A-Za-z]\w{0,39}", re.ASCII)
MOST_NAMES = 64  # different numbers in a file
LINE = 20_000  # characters of a row
SHOWN = 80  # characters of a row in an error


def parse_row(line: str) -> Row:
    """Return a row of metrics; its kind may be another than train and eval. Raises ValueError for anything else."""
    if len(line) > LINE:
        raise ValueError(f"a row of {len(line):,} characters")
    row = parse_json(line)
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        raise ValueError("no row with a kind")
    for name, value in row.items():
        if not (NAME.fullmatch(name) and isinstance(value, int | float | str | None)):
            raise ValueError(f"{name[:40]!a} is no metric")
        if name in COUNTS and (type(value) is not int or value < 0):
            raise ValueError(f"{name} must be 0 or a positive whole number")
        if isinstance(value, str) and name not in ("kind", "weights"):
            raise ValueError(f"{name} must be a number")
    for name in ("update", *REQUIRED.get(row["kind"], ())):
        if name not in row:
            raise ValueError(f"{name} is missing")
    if row["kind"] == "eval" and (row["weights"] not in WEIGHTS or row["top1"] is None):
        raise ValueError("an evaluation needs top1 and the weights, raw or ema")
    return row


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file of metrics, none without the file. Raises ValueError if it is no regular file or too long."""
    try:
        return read_regular(path, METRICS_BYTES).decode("utf-8", "surrogateescape").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); are the disk there and the file yours?") from error


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file. Raises ValueError for a line that is none, unless a crash has cut it off: it is the last one."""
    lines = [(number, line) for number, line in enumerate(read_lines(path), 1) if line.strip()]
    names: set[str] = set()
    for number, line in lines:
        try:
            row = parse_row(line)
        except ValueError as error:
            if number == lines[-1][0]:
                return
            raise ValueError(
                f"{path}, line {number} is no row of metrics ({error}): {line[:SHOWN]!a}; repair or delete it"
            ) from error
        names |= row.keys()
        if len(names) > MOST_NAMES:
            raise ValueError(
                f"{path}, line {number} brings the number of metrics above {MOST_NAMES}: {line[:SHOWN]!a}; repair or delete it"
            )
        yield row
