"""Result files: tables as CSV or parquet, nested values as JSON, written atomically.

Control characters in texts are escaped, as \\x1b. A spreadsheet takes a cell of a CSV file that begins with =, + or - for a
formula, and @ for a function: such texts get an apostrophe in front, numbers do not.
"""

import csv
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.atomic_files import write_atomically, write_text_atomically
from common.text import escape_controls, readable

TABLES = (".csv", ".parquet")
FORMULAS = tuple("=+-@\t\r\n")  # first characters of a cell; also in the full width of East Asian text
FULL_WIDTH = str.maketrans("＝＋－＠", "=+-@")


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
            writer.writerow(map(csv_cell, columns))
            writer.writerows([csv_cell(cell) for cell in row] for row in zip(*columns.values(), strict=True))

    write_atomically(path, write)


def csv_cell(value: Any) -> Any:
    """Return a value for a cell of a CSV file: texts without control characters, and not to be taken for a formula."""
    if not isinstance(value, str):
        return value
    escaped = escape_controls(value)
    return f"'{escaped}" if value.lstrip(" ").translate(FULL_WIDTH).startswith(FORMULAS) else escaped


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write plain values as JSON; numbers that are not finite, which JSON lacks, become null."""
    write_text_atomically(path, json.dumps(_finite(tree), indent=2, allow_nan=False) + "\n")


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
