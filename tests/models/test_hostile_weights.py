"""Hostile files of weights: each is refused by load_weights in a sentence with its name, or read without harm."""

import gzip
import resource
import time

import pytest
import torch

from models.weights import load_weights
from tests.helpers import fuzz
from tests.helpers.hostile_weights import COUNT, SHAPES, VALUES, harmless_files, hostile_files, odd_files
from tests.helpers.pickle_opcodes import archive, pickled, raw

HOSTILE, HARMLESS = hostile_files(), harmless_files()
MIB = 200


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@pytest.fixture
def bounded():
    """Check that a test takes little memory and time."""
    before, started = peak(), time.monotonic()
    yield
    assert peak() - before < MIB
    assert time.monotonic() - started < 30


def test_hostile_files_are_small():
    assert max(len(content) for content in (HOSTILE | HARMLESS | odd_files()).values()) <= 100_000


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused(tmp_path, name, bounded):
    path = tmp_path / name.replace("/", "_")
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=r"(?s).") as caught:
        load_weights(path)
    message = str(caught.value)
    assert path.name in message
    assert "memory" not in message
    assert len(message) < 800 + len(str(path))
    assert message.removeprefix(str(path)).isprintable()


@pytest.mark.parametrize("name", HARMLESS)
def test_file_whose_odd_parts_are_ignored_is_read(tmp_path, name, bounded):
    path = tmp_path / name
    path.write_bytes(HARMLESS[name])
    weights, metadata = load_weights(path)
    assert {key: tuple(weights[key].shape) for key in SHAPES} == SHAPES
    if "old" not in name:
        values = torch.cat([weights[key].flatten() for key in SHAPES])
        assert torch.equal(values, torch.frombuffer(bytearray(VALUES), dtype=torch.float32)[:COUNT])
    assert metadata["holds"] == ["raw"]
    if name.startswith("bytes as truths"):
        assert weights["5.mask"].view(torch.uint8).max() <= 1


LARGE = {
    "FF.pth": lambda: b"\xff" * 20_000_000,
    "FF.safetensors": lambda: b"\xff" * 20_000_000,
    "zeros.pth": lambda: gzip.compress(bytes(200_000_000)),
    "pickle.pth": lambda: archive(pickled({"a": raw("x") * 3_000_000 + b"0"}), {}),
    "directory.pth": lambda: archive(pickled({}), {f"{n:0500}": b"" for n in range(20_000)}),
    "header.safetensors": lambda: (20_000_000).to_bytes(8, "little") + b'{"' + b"[" * 20_000_000,
}


@pytest.mark.parametrize("name", LARGE)
def test_large_file_is_refused_before_the_work(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(LARGE[name]())
    before, started = peak(), time.monotonic()
    with pytest.raises(ValueError, match=name):
        load_weights(path)
    assert peak() - before < MIB
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("target", ["weights", "checkpoints", "configs"])
def test_mutated_files_are_read_or_refused(tmp_path, target):
    count, findings = fuzz.fuzz(fuzz.targets()[target], 4, 0, tmp_path)
    assert findings == []
    assert count > 20


def test_fuzz_reports_other_errors_than_value_errors(tmp_path):
    def read(path):
        if path.read_bytes() != b"seed":
            raise KeyError("a")

    target = fuzz.Target(lambda: [fuzz.Seed(b"seed")], read)
    _, findings = fuzz.fuzz(target, 60, 0, tmp_path)
    assert len(findings) == 20
    assert "KeyError" in findings[0]
