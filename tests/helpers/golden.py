"""Golden numbers: reproducible weights and inputs, and the outputs and gradients of the published models for them.

`check_golden(model, name)` is the whole comparison; tests/goldens/*.json.gz + *.npz hold the numbers.
"""

import gzip
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from models.published import from_published, to_published

FOLDER = Path(__file__).parents[1] / "goldens"
RELATIVE = 1e-9


def units(name, count):
    """Return numbers in [-1, 1) that depend on the name and the position only (splitmix64)."""
    z = np.uint64(zlib.crc32(name.encode()) << 32) + np.arange(1, count + 1, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2**53 * 2 - 1


def filled(name, shape):
    """Return the value of a published entry, in float64."""
    u = torch.from_numpy(units(name, math.prod(shape))).reshape(shape)
    last = name.rsplit(".", 1)[-1]
    if last == "running_mean":
        return 0.1 * u
    if last == "running_var":
        return 1 + 0.5 * u
    if last.startswith("gamma"):
        return 0.5 + 0.2 * u
    if last == "pos_embed":
        return 0.2 * u
    if len(shape) == 1:
        return 1 + 0.2 * u if last == "weight" else 0.1 * u
    return u / math.sqrt(math.prod(shape[1:]))


def images(size, batch=2):
    """Return the golden input of a size."""
    shape = (batch, 3, size, size)
    return torch.from_numpy(1.5 * units(f"input{size}", math.prod(shape))).reshape(shape)


def load(name):
    """Return a golden file: its json with the arrays of its npz added."""
    golden = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {**golden, **{key: torch.from_numpy(arrays[key]) for key in arrays}}


def names():
    return sorted(path.name.removesuffix(".json.gz") for path in FOLDER.glob("*.json.gz"))


def fill(model, golden):
    """Load the golden weights, by their published names, into a float64 model."""
    weights = {name: filled(name, shape) for name, shape in golden["entries"]}
    model.double().load_state_dict(from_published(model, weights))
    return model


def assert_close(what, got, want, floor=0.0):
    """Compare to RELATIVE of the largest wanted value, or of `floor` if that is more."""
    got, want = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64)
    error = (got - want).abs().max().item()
    bound = RELATIVE * max(want.abs().max().item(), floor)
    assert got.shape == want.shape, what
    assert error <= bound, f"{what}: differs by {error:.3g}, allowed {bound:.3g}"


def check_golden(model, name):
    """Compare a model of 1000 classes, drop path 0, with a golden file in eval and train mode."""
    golden = load(name)
    assert sum(p.numel() for p in model.parameters()) == golden["parameters"]
    fill(model, golden)
    check_eval(model, golden)
    check_train(model, golden)


def check_eval(model, golden):
    model.eval()
    with torch.no_grad():
        x, maps = model.forward_intermediates(images(golden["input_size"]))
        logits = model.forward_head(x)
    for i, feature_map in enumerate(maps):
        check_stage(f"stage{i + 1}", feature_map, golden["stages"][f"stage{i + 1}"])
    assert_close("eval logits", logits, golden["eval_logits"])


def check_stage(what, feature_map, want):
    if len(want["shape"]) == 3:
        feature_map = feature_map.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)
    assert list(feature_map.shape) == want["shape"], what
    assert_close(f"{what} mean", feature_map.mean(), want["mean"], floor=want["std"])
    assert_close(f"{what} std", feature_map.std(), want["std"])
    assert_close(f"{what} head", feature_map.flatten()[: len(want["head"])], want["head"], floor=want["std"])


def check_train(model, golden):
    want = golden["train"]
    model.train()
    logits = model(images(golden["input_size"]))
    loss = F.cross_entropy(logits, torch.tensor(want["target"]))
    loss.backward()
    assert_close("train logits", logits.detach(), golden["train_logits"])
    assert_close("loss", loss.detach(), want["loss"])
    grads = to_published(model, {name: p.grad for name, p in model.named_parameters()})
    assert grads.keys() == want["grad_norm"].keys()
    # Gradients that are zero but for round-off (a bias before BatchNorm) are compared against the largest gradient.
    floor = 1e-5 * max(want["grad_norm"].values())
    for key, grad in grads.items():
        assert_close(f"gradient norm of {key}", grad.norm(), want["grad_norm"][key], floor)
        head = want["grad_head"][key]
        assert_close(f"gradient of {key}", grad.flatten()[: len(head)], head, floor=max(floor, want["grad_norm"][key]))
    own = model.state_dict()
    buffers = to_published(model, {name: own[name] for name, _ in model.named_buffers() if name in own})
    for key, norm in want["buffer_norm"].items():
        assert_close(key, buffers[key].norm(), norm)
