"""Manifest of a run: commit, packages, hardware, data and classes, with one entry for each start."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.atomic_files import write_text_atomically
from engine.checkpoint.run_files import MANIFEST_BYTES, read_json_file

WITHOUT_IT = "the run continues without it, and only the record of its earlier starts is lost"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "yacs", "safetensors", "nvidia-dali-cuda130")


# Types of entries, where they are present and not null; others are shown as they are.
OF_RUN: dict[str, type] = {
    "num_classes": int,
    "parameters": int,
    "data": dict,
    "teacher": dict,
    "classes": list,
    "starts": list,
    "model": str,
}
OF_DATA: dict[str, type] = {"train": int, "val": int, "classes": int}
OF_START: dict[str, type] = {
    "time": str,
    "update": int,
    "changed_files": int,
    "packages": dict,
    "command": list,
    "commit": str,
}


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest in a file; empty if there is none yet. Raises ValueError if it is damaged."""
    try:
        found = read_json_file(path, MANIFEST_BYTES)
        if found is None and not path.exists():
            return {}
        problem = find_problem(found)
    except ValueError as error:
        raise ValueError(f"{error}: {WITHOUT_IT}") from error
    if problem:
        raise ValueError(
            f"{path} is damaged ({problem}); repair it, or move it away: the run continues without it, and only the "
            "record of its earlier starts is lost"
        )
    return dict(found)


def find_problem(manifest: Any) -> str:
    """Return a reason why a JSON value is no manifest, "" if it is one."""
    if not isinstance(manifest, dict):
        return "it is no manifest"
    parts = [("", manifest, OF_RUN)]
    if isinstance(manifest.get("data"), dict):
        parts.append(("data.", manifest["data"], OF_DATA))
    starts = manifest.get("starts")
    for number, start in enumerate(starts if isinstance(starts, list) else ()):
        if not isinstance(start, dict):
            return f"starts[{number}] is no start of a run"
        parts.append((f"starts[{number}].", start, OF_START))
    for prefix, entries, types in parts:
        for name, wanted in types.items():
            if (value := entries.get(name)) is not None and type(value) is not wanted:
                return f"{prefix}{name} must be a {wanted.__name__}, not a {type(value).__name__}"
    return ""


def record_start(path: Path, metadata: Mapping[str, Any], start: Mapping[str, Any]) -> None:
    """Write the manifest: metadata of the run, and its list of starts with one more entry."""
    starts = read_manifest(path).get("starts") or []
    write_text_atomically(path, json.dumps({**metadata, "starts": [*starts, dict(start)]}, indent=2) + "\n")


def describe_start(world: int, update: int, device: torch.device) -> dict[str, Any]:
    """Return the manifest entry of this start: time, command, commit, packages, machine."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "update": update,
        "processes": world,
        **_commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        )
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None}
    return {"commit": head.stdout.strip(), "changed_files": len(dirty.stdout.splitlines())}
