"""Records of measurements: metadata (machine, command, commit, versions), and result files in JSON and Markdown."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tools.tables import markdown_table, terminal_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]  # title: function from a row to the cell's text


def processor() -> str:
    """Return the CPU's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    return (names[0] if names else platform.processor()) + (" with AMX" if "amx_bf16" in flags else "")


def hardware() -> str:
    """Return a description of the machine: cores available to this process, processor, GPU."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{len(os.sched_getaffinity(0))} cores of {processor()}{gpu}"


def commit() -> str:
    """Return the current commit, marked if files differ from it; "" outside a repository."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return done.stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no", "--", "*.py") else ""
    return git("rev-parse", "--short", "HEAD") + changed


def command(program: str, argv: Sequence[str] | None) -> str:
    """Return the command line, quoted for a shell, without --append."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--append"]
    return shlex.join(["python", program, *words])


def metadata(program: str, argv: Sequence[str] | None, packages: Sequence[str] = ("timm",)) -> dict[str, str]:
    """Return date, hardware, command, commit and versions."""
    versions = [f"torch {torch.__version__}", *(f"{name} {importlib.metadata.version(name)}" for name in packages)]
    return {
        "date": time.strftime("%Y-%m"),
        "hardware": hardware(),
        "command": command(program, argv),
        "commit": commit(),
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
    }


def console() -> Console:
    """Return a console, 140 columns wide unless it is a terminal."""
    return Console() if Console().is_terminal else Console(width=140)


def table(columns: Columns, rows: Sequence[Row]) -> Table:
    """Return the rows as a table for a terminal."""
    return terminal_table(list(columns), cells_of(columns, rows))


def cells_of(columns: Columns, rows: Sequence[Row]) -> list[list[str]]:
    """Return the cells of each row as text."""
    return [[text(row) for text in columns.values()] for row in rows]


class ResultFile:
    """Files `out`.json and .md of a program's result, written anew after each measurement: an interrupted run keeps its rows.

    With `append` the runs that the files hold already stay before this one.
    """

    def __init__(self, out: Path, title: str, columns: Columns, append: bool = False) -> None:
        self.file, self.page, self.title, self.columns = (
            out.with_suffix(".json"),
            out.with_suffix(".md"),
            title,
            columns,
        )
        keep = append and self.file.exists()
        self.earlier: list[dict[str, Any]] = json.loads(self.file.read_text(encoding="utf-8"))["runs"] if keep else []

    def write(self, found: Mapping[str, Any], rows: Sequence[Row]) -> Path:
        """Write metadata and all rows of this run so far; return the Markdown file."""
        runs = [*self.earlier, {"facts": dict(found), "rows": list(rows)}]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"runs": runs}, indent=2) + "\n", encoding="utf-8")
        lines = [f"# {self.title}, {found['date']}, {found['hardware']}"]
        for run in runs:
            lines += ["", f"    {run['facts']['command']}", ""]
            others = [(key, value) for key, value in run["facts"].items() if key not in ("date", "hardware", "command")]
            lines += [f"{key}: {value}.  " for key, value in others]
            lines += ["", *markdown_table(list(self.columns), cells_of(self.columns, run["rows"]))]
        self.page.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return self.page


def write(
    out: Path, title: str, *, columns: Columns, found: Mapping[str, Any], rows: Sequence[Row], append: bool = False
) -> Path:
    """Write metadata and rows to `out`.json and .md, with `append` after the existing ones; return the Markdown file."""
    return ResultFile(out, title, columns, append).write(found, rows)


def default_out(name: str) -> Path:
    """Return the default path of a program's result: benchmarks/results/<year-month>-<name>-<device>."""
    device = "gpu" if torch.cuda.is_available() else "cpu"
    return RESULTS / f"{time.strftime('%Y-%m')}-{name}-{device}"
