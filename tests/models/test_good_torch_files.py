"""Torch files as people write them are read: all formats and protocols, and plain values of other libraries beside the weights."""

import argparse
import collections
import datetime
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

from models.weights import load_weights

torch.manual_seed(0)
TENSORS = {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4)}
BESIDE = {
    "args": argparse.Namespace(
        data=pathlib.Path("/data"), betas=(0.9, 0.999), seed=np.int64(4), device=torch.device("cpu")
    ),
    "numpy numbers": [
        t(3) for t in (np.float64, np.float32, np.float16, np.int8, np.uint16, np.uint32, np.uint64, np.bool_)
    ],
    "numpy text": [np.str_("crème"), np.bytes_(b"abc")],
    "numpy array": np.arange(4.0),
    "random states": (np.random.RandomState(0).get_state(), torch.get_rng_state()),
    "sets": ({1, 2}, frozenset([3])),
    "collections": (collections.Counter("abc"), collections.defaultdict(list, {"a": [1]}), collections.deque([1])),
    "times": (datetime.datetime(2024, 1, 1), datetime.timedelta(seconds=3)),
    "numbers as keys": {0.5: 1, 3: 2, None: 3, b"a": 4},
    "large numbers": (2**70, -(2**40), 1j),
    "bytes": (b"abc", b"x" * 300, "y" * 70_000),
    "optimiser": torch.optim.AdamW([nn.Parameter(torch.zeros(3))]).state_dict(),
}
LACKING = {("numpy array", 5), ("random states", 5)}  # NumPy calls another function for protocol 5, with a buffer


def check(path, content, **options):
    torch.save(content, path, **options)
    weights, _ = load_weights(path)
    assert all(torch.equal(weights[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("beside", "protocol"), [(b, p) for b in BESIDE for p in (2, 3, 4, 5) if (b, p) not in LACKING]
)
def test_values_beside_the_weights_are_read(tmp_path, beside, protocol):
    content = {"state_dict": TENSORS, "x": BESIDE[beside]}
    check(tmp_path / "new.pth", content, pickle_protocol=protocol)
    check(tmp_path / "old.pth", content, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "kind", [nn.Parameter, nn.Buffer, lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t])[1]]
)
def test_tensors_of_every_kind_are_read(tmp_path, kind):
    for protocol in (2, 4):
        check(tmp_path / "a.pth", {name: kind(t) for name, t in TENSORS.items()}, pickle_protocol=protocol)
