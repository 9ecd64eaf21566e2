"""tools.index, tools.predict and tools.visualize over hostile pictures: each is listed, the others are used, nothing waits."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers.damaged_images import JPEG
from tests.helpers.data_doors import run_index
from tests.helpers.hostile_images import HOSTILE, segment, tags
from tests.helpers.hostile_stores import NO_FILES
from tests.tools.test_predict import checkpoint as checkpoint  # a fixture
from tools import predict, visualize
from tools.classifier import _orientation


@pytest.fixture
def hostile(tmp_path):
    """Write a folder of the hostile pictures and one that can be read, as a data set of two classes."""
    for i, data in enumerate(HOSTILE.values()):
        folder = tmp_path / "data/train" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.jpg").write_bytes(data)
    (tmp_path / "data/train/cat/whole.jpg").write_bytes(JPEG)
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [1, 2])
def test_index_lists_every_hostile_picture(hostile, capsys, workers):
    status, printed = run_index(hostile, capsys, "--full", "--workers", str(workers), "--split", "train")
    assert status == 1
    assert f"decoded all images, {len(HOSTILE)} unreadable" in printed
    assert "Traceback" not in printed
    assert "\x1b[2J" not in printed


def test_predict_lists_hostile_pictures_and_classifies_the_others(checkpoint, hostile, capsys, monkeypatch):
    monkeypatch.setattr("tools.predict.SHOWN", len(HOSTILE))
    assert predict.main([str(checkpoint), str(hostile), "--device", "cpu", "--top", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].endswith("whole.jpg")
    assert err.count("not read: ") == len(HOSTILE)
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", NO_FILES)
def test_predict_refuses_what_is_no_file(kind, checkpoint, tmp_path, capsys):
    NO_FILES[kind](tmp_path / "x.jpg")
    (tmp_path / "y.jpg").write_bytes(JPEG)
    argv = [str(checkpoint), str(tmp_path / "x.jpg"), str(tmp_path / "y.jpg"), "--device", "cpu"]
    assert predict.main(argv) == 0
    assert ("x.jpg cannot be read" in capsys.readouterr().err) == (kind != "folder")


def visualized(tmp_path, capsys, *images):
    pytest.importorskip("matplotlib")
    argv = [*map(str, images), "--model", "sgformer_small", "--size", "64", "--out", str(tmp_path / "out" / "figures")]
    status = visualize.main(argv)
    return status, capsys.readouterr()


def test_visualize_lists_hostile_pictures_and_draws_the_others(hostile, tmp_path, capsys):
    odd = tmp_path / "$x^$_{.png"  # no formula
    Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save(odd)
    narrow = tmp_path / "narrow.png"  # within the limits of a picture, not of a figure
    Image.fromarray(np.zeros((900, 1, 3), dtype=np.uint8)).save(narrow)
    outside = tmp_path / "...jpg"  # its stem is ..
    shutil.copy(hostile / "train/cat/whole.jpg", outside)
    status, printed = visualized(tmp_path, capsys, hostile, odd, narrow, outside)
    assert status == 0
    assert printed.err.count("not read: ") == len(HOSTILE) + 1
    assert "narrow.png cannot be drawn on (1 x 900 pixels)" in printed.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figures"]
    made = {path.name for path in (tmp_path / "out" / "figures").iterdir() if path.is_dir()}
    assert {"whole", "$x^$_{", "image"} <= made


def test_tags_of_exif_are_checked_before_pillow_reads_them():
    turned = segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")

    def orientation(data):
        return _orientation(np.frombuffer(bytearray(data), dtype=np.uint8))

    assert orientation(JPEG[:2] + turned + JPEG[2:]) == 6
    bomb = segment(0xE1, b"Exif\0\0" + tags(1500, 40000, 40000))
    assert orientation(JPEG[:2] + bomb + JPEG[2:]) == 1
