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

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "yacs", "safetensors", "nvidia-dali-cuda130")


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest in a file; empty if there is none yet. Raises ValueError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        if not isinstance(found, dict) or not isinstance(found.get("starts", []), list):
            raise ValueError("it is no manifest")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); repair it, or move it away: the run continues without it, and only the "
            "record of its earlier starts is lost"
        ) from error
    return found


def record_start(path: Path, metadata: Mapping[str, Any], start: Mapping[str, Any]) -> None:
    """Write the manifest: metadata of the run, and its list of starts with one more entry."""
    starts = read_manifest(path).get("starts", [])
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
