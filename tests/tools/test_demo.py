"""The demo pictures: the same bytes each time, drawn in one step, never over somebody's files."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from data.stores.folder import class_folders, scan
from tools.demo import draw_dataset, draw_picture
from tools.demo_pictures import FORMS


def digests(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "set"
    assert draw_dataset(out, train=30, val=10, workers=1)
    return out


def test_pictures_are_an_imagenet_like_folder(drawn):
    classes = class_folders(drawn / "train")
    assert classes == sorted(FORMS)
    assert np.bincount(scan(drawn / "train", classes, must_hold_all=True).labels).tolist() == [3] * 10
    assert np.bincount(scan(drawn / "val", classes, must_hold_all=True).labels).tolist() == [1] * 10
    sizes = [np.asarray(Image.open(path)).shape[1::-1] for path in drawn.rglob("*.jpg")]
    assert 400 < np.mean([width for width, _ in sizes]) < 540
    assert 340 < np.mean([height for _, height in sizes]) < 460
    assert len(set(sizes)) == len(sizes)
    assert min(width / height for width, height in sizes) < 1
    assert not list(drawn.parent.glob("*.partial"))


def test_all_pictures_differ(drawn):
    assert len({digest for name, digest in digests(drawn).items() if name.endswith("jpg")}) == 40


def test_drawing_again_gives_the_same_bytes_with_any_number_of_processes(drawn, tmp_path):
    assert draw_dataset(tmp_path / "set", train=30, val=10, workers=2)
    assert digests(tmp_path / "set") == digests(drawn)


def test_complete_folder_is_left_alone(drawn, capsys):
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    assert not draw_dataset(drawn, train=30, val=10, workers=1)
    assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*")} == before
    assert "are there already" in capsys.readouterr().out


def test_interrupted_drawing_is_started_again(drawn, tmp_path, monkeypatch):
    out, calls = tmp_path / "set", []

    def interrupted(picture):
        calls.append(picture)
        if len(calls) == 15:
            raise KeyboardInterrupt
        draw_picture(picture)

    with monkeypatch.context() as patch:
        patch.setattr("tools.demo.draw_picture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw_dataset(out, train=30, val=10, workers=1)
    assert not out.exists()
    (tmp_path / "set.partial" / "train" / "disc" / "left_over.jpg").write_bytes(b"")
    assert draw_dataset(out, train=30, val=10, workers=1)
    assert digests(out) == digests(drawn)


def test_damaged_or_different_folder_is_drawn_again(tmp_path):
    out = tmp_path / "set"
    draw_dataset(out, train=10, val=10, workers=1)
    wanted = digests(out)
    next(out.glob("val/star/*.jpg")).unlink()
    assert draw_dataset(out, train=10, val=10, workers=1)
    assert digests(out) == wanted
    assert draw_dataset(out, train=10, val=10, seed=1, workers=1)
    assert digests(out) != wanted


def test_somebody_elses_files_are_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty and was not drawn by tools\.demo; name another folder"):
        draw_dataset(tmp_path, train=10, val=10, workers=1)
    with pytest.raises(ValueError, match="is a file; name another folder"):
        draw_dataset(tmp_path / "thesis.txt", train=10, val=10, workers=1)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_too_few_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="val=9 must be at least 10, one picture a class"):
        draw_dataset(tmp_path / "set", train=10, val=9)
