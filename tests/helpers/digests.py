"""Digests of batches, run directories and checkpoints, for comparing two versions of the code."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TIMED = ("images_per_s", "data_share", "seconds")  # of a row of metrics.jsonl


def sha(*parts: Any) -> str:
    """Return the first digits of the SHA-256 of nested values: tensors by dtype, shape and bytes, mappings by sorted keys."""
    found = hashlib.sha256()
    for part in parts:
        for piece in pieces(part):
            found.update(piece)
    return found.hexdigest()[:16]


def pieces(value: Any) -> Iterator[bytes]:
    """Yield a nested value as bytes."""
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous().numpy()
    if isinstance(value, np.ndarray):
        yield f"<{value.dtype} {value.shape}>".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield f"<{key}>".encode()
            yield from pieces(value[key])
    elif isinstance(value, list | tuple):
        yield f"<{len(value)}>".encode()
        for item in value:
            yield from pieces(item)
    else:
        yield f"<{value!r}>".encode()


def masked(text: str, folder: Path) -> str:
    """Return a printed text without what depends on time and place: paths, hours, seconds, rates."""
    text = text.replace(str(folder), "TMP").replace(str(ROOT), "ROOT")
    text = re.sub(r"(?m)^\d\d:\d\d:\d\d ", "", text)
    text = re.sub(r"\b[\d.]+ (s\b|images/s|[KMG]i?B)", r"# \1", text)
    return re.sub(r"waiting for data +\d+%", "waiting for data #", text)


def digest_batches(data: Any, epochs: Sequence[int], counted: int = 3) -> dict[str, str]:
    """Return digests of the first training batches of some epochs and of all validation batches, before and after the stage."""
    found: dict[str, str] = {}
    for epoch in epochs:
        for number, batch in zip(range(counted), data.train.epoch(epoch), strict=False):
            name = f"train/{epoch}/{number}"
            found[f"{name}/labels"], found[f"{name}/indices"] = sha(batch.labels), sha(batch.indices)
            found[f"{name}/images"], found[f"{name}/erase"] = sha(batch.images), sha(batch.erase)
            images, targets = data.stage.train(batch, number, number % 2, epoch)
            found[f"{name}/prepared"], found[f"{name}/targets"] = sha(images), sha(targets)
    for number, batch in enumerate(data.val):
        images, labels = data.stage.evaluate(batch)
        found[f"val/{number}/images"], found[f"val/{number}/labels"] = sha(batch.images), sha(labels, batch.indices)
        found[f"val/{number}/prepared"] = sha(images)
    return found | {"fingerprint": json.dumps(data.fingerprint, sort_keys=True), "classes": sha(data.classes)}


def digest_run(run: Path, folder: Path, first: int = 0) -> dict[str, Any]:
    """Return digests of a run directory, of its checkpoints from that of update `first` on."""
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    found: dict[str, Any] = {"files": [re.sub(r"tfevents\..*", "tfevents", name) for name in files]}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key not in TIMED} for row in rows]
    found |= {f"metrics/{number:02d}": json.dumps(row) for number, row in enumerate(rows)}
    found["lr"] = [row["lr"] for row in rows if row["kind"] == "train"]
    found["config"] = sha(masked((run / "config.yaml").read_text(), folder))
    manifest = json.loads((run / "manifest.json").read_text())
    found["manifest"] = sorted(manifest)
    found["manifest/facts"] = sha({key: value for key, value in manifest.items() if key != "starts"})
    found["manifest/starts"] = [[sorted(start), start["update"], start["processes"]] for start in manifest["starts"]]
    lines = masked((run / "log.txt").read_text(), folder).splitlines()
    found["log"] = sha(sorted(line for line in lines if "waits for data" not in line))
    for file in sorted((run / "checkpoints").glob("update-*.pt")):
        if file.stem < f"update-{first:08d}":
            continue
        found |= {f"{file.stem}/{key}": value for key, value in digest_checkpoint(file).items()}
    for file in sorted(run.glob("best_*.safetensors")):
        weights = load_file(file)
        with safe_open(file, "pt") as opened:
            found[f"{file.stem}/header"] = sha(opened.metadata())
        found[f"{file.stem}/weights"] = sha(weights)
        found[f"{file.stem}/shapes"] = sha({name: [tensor.shape, tensor.dtype] for name, tensor in weights.items()})
    for file in sorted((run / "pictures").rglob("*.png")):
        found[str(file.relative_to(run))] = sha(np.asarray(Image.open(file)))
    return found


def digest_checkpoint(file: Path) -> dict[str, Any]:
    """Return the keys of a checkpoint and a digest of the value of each."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    found: dict[str, Any] = {"keys": list(state), "sealed": b"retoken sha256" in file.read_bytes()[-128:]}
    found["names"] = sha([[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in state["model"].items()])
    groups = state["optimizer"]["param_groups"]
    found["lr of groups"] = sha([group["lr"] for group in groups])
    found["groups"] = sha([{key: value for key, value in group.items() if key != "lr"} for group in groups])
    return found | {key: sha(value) for key, value in state.items()}
