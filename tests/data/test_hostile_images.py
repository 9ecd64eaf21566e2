"""Hostile image files: each is one unreadable image, in bounded time and memory; odd ones that are whole are read."""

import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data.augment.transforms import EvalTransform, TrainTransform
from data.loaders.bad_images import BadImages
from data.loaders.decode import UnreadableImageError, decode
from data.loaders.file_limits import MAX_BYTES
from data.loaders.image_source import load
from data.loaders.jpeg_header import frame_header, lengthen_scans
from data.loaders.sampler import Sampler
from data.loaders.torch_loader import EvalLoader, TrainLoader
from data.stores.folder import scan
from tests.helpers.damaged_images import JPEG, READABLE, encoded
from tests.helpers.data_doubles import picture, write_folder
from tests.helpers.hostile_images import HOSTILE, WHOLE, scans, stated_size
from tests.helpers.hostile_stores import NO_FILES

SECONDS, EXTRA_BYTES = 10, 1 << 30  # of processor time for an image, and of memory for all


def as_array(data):
    return np.frombuffer(bytearray(data), dtype=np.uint8)


def test_files_are_small():
    assert max(map(len, [*HOSTILE.values(), *WHOLE.values()])) <= 100_000


def decode_hostile() -> None:
    """Decode all hostile files within a limit of memory, and print a JSON object of seconds and reasons."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found = {}
    for name, data in HOSTILE.items():
        before = resource.getrusage(resource.RUSAGE_SELF)
        try:
            reason = f"read as {tuple(decode(as_array(data), name).shape)}"
        except UnreadableImageError as error:
            reason = error.reason
        after = resource.getrusage(resource.RUSAGE_SELF)
        found[name] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, reason
    print(json.dumps(found))


@pytest.fixture(scope="module")
def results():
    code = "from tests.data.test_hostile_images import decode_hostile; decode_hostile()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_an_unreadable_image_in_bounded_time_and_memory(results, name):
    seconds, reason = results[name]
    assert reason.startswith("cannot be decoded ("), reason
    assert "MemoryError" not in reason
    assert len(reason) < 500
    assert seconds < SECONDS


@pytest.mark.parametrize("name", [name for name in HOSTILE if " with data of " in name or " with a frame of " in name])
def test_missing_pixels_are_named(results, name):
    assert "it states " in results[name][1] or "truncated" in results[name][1]


@pytest.mark.parametrize("name", WHOLE)
def test_odd_file_that_is_whole_is_read(name):
    image = decode(as_array(WHOLE[name]), name)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("restart", [0, 2])
def test_size_larger_than_the_data_is_noticed_for_any_coding(progressive, mode, subsampling, restart):
    image = picture(np.random.RandomState(1), 72, 56).convert(mode)
    data = encoded(
        image, "JPEG", progressive=progressive, subsampling=subsampling, restart_marker_blocks=restart, quality=80
    )
    decode(as_array(data), "x")
    marker = data.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 5
    for width, height in ((72, 104), (120, 56), (152, 120)):
        larger = data[:marker] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[marker + 4 :]
        with pytest.raises(UnreadableImageError, match=r"truncated|broken data stream"):
            decode(as_array(larger), "x")


@pytest.mark.parametrize("kind", ["progressive", "cmyk", "grayscale", "exif rotated", "huge"])
def test_longer_scans_leave_a_whole_image_as_it_is(kind):
    data = as_array(READABLE[kind])
    longer = lengthen_scans(data)
    assert len(longer) > len(data)
    assert torch.equal(decode(longer, "x"), decode(data, "x"))


@pytest.mark.parametrize(
    "stray", [b"", b"\0", b"\xff\0", b"\0\xff\xff", b"\xff\xd0", b"\xff\xe4\0\0", b"\xff\0\xff\0\0"]
)
def test_stated_size_is_the_decoders_whatever_lies_before_it(stray):
    at = JPEG.index(b"\xff\xc0")
    data = as_array(JPEG[:at] + stray + JPEG[at:])
    assert frame_header(data)[:2] == (47, 61)
    assert torch.ops.image.decode_jpeg(torch.from_numpy(data), 3, False).shape == (3, 47, 61)


def test_scans_are_counted():
    assert frame_header(as_array(scans(57, 64))).scans == 57
    assert frame_header(as_array(JPEG)).scans == 1
    assert frame_header(as_array(READABLE["progressive"])).scans == 10


class Failing:
    """Image source whose reading fails with an error."""

    def __init__(self, error):
        self.error, self.labels = error, np.zeros(4, dtype=np.int64)

    def __len__(self):
        return 4

    def name(self, index):
        return f"{index}.jpg"

    def read(self, index):
        if index == 2:
            raise self.error
        return as_array(JPEG)


ERRORS = [OSError("gone"), MemoryError(), ZeroDivisionError("x"), RecursionError("y"), KeyError("z"), ValueError("v")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_while_reading_is_of_its_image(error):
    loader = TrainLoader(Failing(error), TrainTransform(24, 1), Sampler(4, 1, 4, 4))
    (batch,) = loader.epoch(0)
    assert [(bad.path, bad.replaced_by) for bad in batch.bad] == [("2.jpg", "3.jpg")]
    with pytest.raises(UnreadableImageError, match=r"^2\.jpg: cannot be read \("):
        list(EvalLoader(Failing(error), EvalTransform(24), 4))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_while_decoding_is_of_its_image(error, monkeypatch):
    def fail(data):
        raise error

    monkeypatch.setattr("data.loaders.decode.check_jpeg", fail)
    with pytest.raises(UnreadableImageError, match=r"^x: cannot be decoded \("):
        decode(as_array(JPEG), "x")


@pytest.mark.parametrize("loader_kind", ["torch", "dali"])
def test_training_replaces_hostile_files_and_counts_them(loader_kind, tmp_path):
    count = len(HOSTILE)
    root = write_folder(tmp_path, train={"cat": 2 * count}) / "train"
    for i, data in enumerate(HOSTILE.values()):
        (root / f"cat/{2 * i:03d}.jpg").write_bytes(data)
    source, sampler = scan(root, ["cat"], must_hold_all=True), Sampler(2 * count, 1, 2, 2)
    if loader_kind == "dali":
        pytest.importorskip("nvidia.dali")
        from data.loaders.dali_loader import DaliTrainLoader

        batches = DaliTrainLoader(source, TrainTransform(24, 1), sampler, backend="cpu").epoch(0)
    else:
        batches = TrainLoader(source, TrainTransform(24, 1), sampler).epoch(0)
    bad = BadImages(2 * count, 0.5)
    assert sum(len(batch) for batch in bad.watch(batches)) == 2 * count
    found = bad.add([bad.take_new()], tmp_path)
    missed = set(range(0, 2 * count, 2)) - {one.index for one in found}
    names = [list(HOSTILE)[index // 2] for index in missed]
    assert not [name for name in names if loader_kind == "torch" or "of 5000 x 5000" in name or "bomb" in name], names
    assert len((tmp_path / "bad_images.jsonl").read_text().splitlines()) == len(found)


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_without_waiting(kind, tmp_path):
    root = write_folder(tmp_path, train={"cat": 3}) / "train"
    source = scan(root, ["cat"], must_hold_all=True)
    (root / "cat/001.jpg").unlink()
    NO_FILES[kind](root / "cat/001.jpg")  # after it was listed
    errors = []

    def read():
        with pytest.raises(UnreadableImageError, match=r"001\.jpg: cannot be read \("):
            load(source, 1)
        errors.append("refused")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert errors == ["refused"]


def test_limit_of_bytes_is_that_of_the_pixels():
    with pytest.raises(UnreadableImageError, match="are more than the"):
        decode(np.concatenate([as_array(JPEG), np.zeros(MAX_BYTES, dtype=np.uint8)]), "x")


def test_narrow_image_within_the_limit_is_resized():
    assert EvalTransform(24, 28)(decode(as_array(encoded(picture(np.random.RandomState(0), 1, 900), "PNG")), "x")).shape
    with pytest.raises(UnreadableImageError, match="narrower than 1 : 1000"):
        decode(as_array(stated_size(JPEG, 3, 3001)), "x")
