"""Files of a run directory that may come from others: which kinds may lie where, and JSON of bounded size, depth and numbers.

The path of a run directory may be a link, and so may the folders above it. Nothing that the programs read or write below it may
be one: whoever packed the directory would choose the files that are read into a report, emptied, pruned or overwritten.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from common.regular_files import check_kind, read_regular

FILES = (
    *("config.yaml", "manifest.json", "log.txt", "metrics.jsonl", "bad_images.jsonl", "diverged.json", "wandb_id"),
    *("preempted", "done", "requeues", ".lock", "report.html", "best_raw.safetensors", "best_ema.safetensors"),
)
TREES = ("checkpoints", "tensorboard", "pictures")  # folders without any link in them
FOLDERS = (*TREES, "logs", "wandb")  # the last holds links of wandb's own
MANIFEST_BYTES = LOG_BYTES = 64 * 2**20
METRICS_BYTES = 256 * 2**20
MARKER_BYTES = 4096
DEPTH = 12  # of nested values in JSON
DIGITS = 19  # of a number: fewer than 2**64 has
DAMAGED = "repair it, or move it away"


def check_run_files(path: Path) -> None:
    """Raise ValueError, naming it, for a link, pipe, device or other kind of file where a run directory has its own."""
    for name in FILES:
        check_kind(path / name)
    for name in FOLDERS:
        check_kind(path / name, stat.S_IFDIR)
    for name in TREES:
        for folder, folders, files in os.walk(path / name):
            for entry in files:
                check_kind(Path(folder, entry))
            for entry in folders:
                check_kind(Path(folder, entry), stat.S_IFDIR)


def read_json_file(path: Path, limit: int) -> Any:
    """Return the JSON value in a file, None without the file. Raises ValueError with the remedy if it is damaged."""
    try:
        text = read_regular(path, limit).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); are the disk there and the file yours?") from error
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {DAMAGED}") from error


def parse_json(text: str) -> Any:
    """Parse JSON; numbers that are not finite become None. Raises ValueError for deep nesting and for numbers of many digits."""
    try:
        value = json.loads(text, parse_constant=lambda _: None, parse_float=_finite, parse_int=_bounded)
    except RecursionError:
        raise ValueError(f"its values are nested more than {DEPTH} levels deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    check_depth(value)
    return value


def check_depth(value: Any, levels: int = DEPTH) -> None:
    """Raise ValueError for lists and dicts nested more than `levels` deep."""
    if isinstance(value, dict | list):
        if not levels:
            raise ValueError(f"its values are nested more than {DEPTH} levels deep")
        for entry in value.values() if isinstance(value, dict) else value:
            check_depth(entry, levels - 1)


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _bounded(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"it holds a number of {len(text)} digits")
    return int(text)
