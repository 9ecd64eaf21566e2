"""Result files: tables as CSV or parquet, nested values as JSON, written atomically."""

import csv
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.atomic_files import write_atomically
from common.text import readable

TABLES = (".csv", ".parquet")


def check_target(flag: str, path: str, suffixes: Sequence[str]) -> Path:
    """Return the path of a result file, checked before the computation. Raises ValueError if it cannot be written."""
    target = Path(path).expanduser()
    if target.suffix not in suffixes:
        raise ValueError(f"{flag} {path}: its name must end in {' or '.join(suffixes)}, which sets the format")
    check_location(f"{flag} {path}", target, f"result{suffixes[0]}")
    if target.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"{flag} {path}: parquet files need pyarrow, which is not installed; run pip install pyarrow, or name it "
            f"{target.stem}.csv"
        )
    return target


def check_location(label: str, target: Path, example: str) -> None:
    """Raise ValueError, which starts with `label`, for a path of a file that is a folder or lies in a missing one."""
    if target.is_dir():
        raise ValueError(f"{label} is a folder; give a file in it, e.g. {target / example}")
    check_parent(label, target)


def check_parent(label: str, target: Path) -> None:
    """Raise ValueError, which starts with `label`, if the folder that a path lies in does not exist."""
    if not target.parent.is_dir():
        raise ValueError(f"{label}: there is no folder {target.parent}; make it, or name another one")


def write_table(path: Path, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
    """Write columns of equal length, as CSV or parquet by the file's suffix."""
    if path.suffix == ".parquet":
        import pyarrow  # optional: check_target raises if it is missing
        import pyarrow.parquet

        table = pyarrow.table({name: _text(values) for name, values in columns.items()})
        write_atomically(path, lambda file: pyarrow.parquet.write_table(table, file))
        return

    def write(file: Path) -> None:
        with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as text:
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))

    write_atomically(path, write)


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write plain values as JSON; numbers that are not finite, which JSON lacks, become null."""
    text = json.dumps(_finite(tree), indent=2, allow_nan=False) + "\n"

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def _text(values: Sequence[Any] | np.ndarray) -> Sequence[Any] | np.ndarray:
    """Return names with bytes that are not UTF-8 escaped, as parquet requires."""
    if isinstance(values, np.ndarray):
        return values
    return [readable(value) if isinstance(value, str) else value for value in values]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
