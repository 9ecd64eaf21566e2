"""python -m tools.index: counts of a split, problems, exit status."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers.archives import as_official, as_shards, as_tar, write_tar
from tests.helpers.damaged_images import UNREADABLE
from tests.helpers.data_doubles import write_folder
from tools import index as tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    write_folder(root, train={"cat": 12, "dog": 9, "owl": 10}, val={"cat": 2, "dog": 2, "owl": 2})
    for path in sorted(root.rglob("*.jpg")):
        path.rename(path.with_name(f"{path.parent.name}_{path.name}"))
    return root


def run(capsys, *argv):
    """Return the exit status, the output without indentation, and stderr."""
    status = tool.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return status, [" ".join(line.split()) for line in out.splitlines()], err


def test_good_store_is_indexed_and_reported(folder, tmp_path, capsys):
    root = as_shards(folder, tmp_path, names=True)
    status, lines, _ = run(capsys, root, "--full", "--workers", 1)
    assert status == 0
    assert f"indexing train of {root} (3 archives)" in lines
    assert f"store {root}/imagenet-train-000000.tar and 2 more (shards)" in lines
    assert f"index {root}/retoken-index-train.npz" in lines
    assert "images 31 of 3 classes" in lines
    assert "balance 10.3 a class; fewest 9 (dog), most 12 (cat)" in lines
    assert lines.count("decoded all images, 0 unreadable") == 2
    sizes = [path.stat().st_size for path in folder.glob("train/*/*")]
    assert f"from {min(sizes)} to {max(sizes)}" in next(line for line in lines if line.startswith("bytes"))
    assert lines[-1] == "no problems"
    assert (root / "retoken-index-val.npz").is_file()


def test_folder_is_verified_like_a_store(folder, tmp_path, capsys):
    status, lines, _ = run(capsys, folder, "--sample", 7, "--workers", 1)
    assert status == 0
    assert f"store {folder}/train (folder)" in lines
    assert "decoded 7 of 31 images, 0 unreadable" in lines
    assert "decoded all images, 0 unreadable" in lines  # there are 6 in val
    assert not list(folder.rglob("*.npz"))


@pytest.mark.parametrize("workers", [1, 2])
def test_problems_of_a_store_are_listed_and_give_status_1(folder, tmp_path, capsys, workers):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "train/cat/cat_003.jpg").write_bytes(b"")
    (copy / "train/dog/dog_001.jpg").write_bytes(UNREADABLE["truncated"])
    shutil.rmtree(copy / "val/owl")
    root = as_tar(copy, tmp_path / "store")
    files = [(f"{p.parent.name}/{p.name}", p.read_bytes()) for p in sorted(copy.glob("train/*/*"))]
    write_tar(root / "train.tar", [*files, *files[:2], *[(f"owl/x{i}.jpg", files[0][1]) for i in range(60)]])
    status, lines, _ = run(capsys, root, "--full", "--workers", workers)
    assert status == 1
    problems = [line for line in lines if line.startswith("problem")]
    assert "2 images have the class and name of another: cat/cat_000.jpg, cat/cat_001.jpg" in problems[0]
    assert f"{root}/train.tar:cat/cat_003.jpg is empty" in problems[1]
    unreadable = sorted(problems[2:4])
    assert f"{root}/train.tar:cat/cat_003.jpg cannot be decoded (0 bytes; the file is empty)" in unreadable[0]
    assert f"{root}/train.tar:dog/dog_001.jpg cannot be decoded (" in unreadable[1]
    assert "1 of 3 classes have no image: owl" in problems[4]
    assert len(problems) == 5
    assert "decoded all images, 2 unreadable" in lines
    assert lines[-1] == "5 problems"


def test_many_unreadable_files_are_summed_up(tmp_path, capsys):
    write_tar(tmp_path / "train.tar", [(f"{'cat' if i < 15 else 'dog'}/{i}.jpg", b"<html>") for i in range(30)])
    status, lines, _ = run(capsys, tmp_path, "--workers", 1)
    assert status == 1
    assert lines.count("problem 10 more are unreadable (10 x a web page, not an image)") == 1
    assert sum(line.startswith("problem") for line in lines) == 21


@pytest.mark.parametrize("level", [0, 255, 4095])  # of 16 bits; 12 bits end at 4095
@pytest.mark.parametrize("workers", [1, 2])
def test_split_of_nearly_black_images_is_a_problem(folder, tmp_path, capsys, level, workers):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for path in sorted(copy.glob("train/*/*"))[:20]:  # of 31
        Image.fromarray(np.full((40, 40), level, np.uint16)).save(path, "PNG")
    status, lines, _ = run(capsys, copy, "--workers", workers)
    assert status == 1
    assert any(line.startswith("level ") and "20 images are nearly black" in line for line in lines)
    assert [line for line in lines if line.startswith("problem 20 of 31 decoded images of train are nearly black")]
    assert lines[-1] == "1 problems"


def test_archive_that_cannot_be_used_gives_status_2(folder, tmp_path, capsys):
    as_official(folder, tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(capsys, tmp_path)
    assert caught.value.code == 2
    assert "tools.index: the validation images of" in (printed := capsys.readouterr().err)
    assert "put ILSVRC2012_devkit_t12.tar.gz there" in printed
    assert run(capsys, tmp_path, "--split", "train", "--workers", 1)[0] == 0


def test_label_and_class_files_reach_the_store(folder, tmp_path, capsys):
    as_official(folder, tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    names = {f"{i}.jpg": cls for i, cls in enumerate(("owl", "dog", "cat"))}
    picture = next(folder.glob("val/*/*.jpg")).read_bytes()
    write_tar(tmp_path / "store/val.tar", [(name, picture) for name in names])
    (tmp_path / "mine.txt").write_text("".join(f"{name} {cls}\n" for name, cls in names.items()))
    (tmp_path / "classes.txt").write_text("owl\ncat\ndog\nyak\n")
    argv = (tmp_path / "store", "--val-labels", tmp_path / "mine.txt", "--class-index", tmp_path / "classes.txt")
    status, lines, _ = run(capsys, *argv, "--workers", 1)
    assert status == 1
    assert "problem 1 of 4 classes have no image: yak" in lines
    assert "balance 1.0 a class; fewest 0 (yak), most 1 (owl)" in lines


def test_single_archive_with_one_split_is_reported(tmp_path, capsys, folder):
    picture = next(folder.glob("val/*/*.jpg")).read_bytes()
    archive = write_tar(tmp_path / "x.tar", [("val/cat/1.jpg", picture)])
    status, lines, _ = run(capsys, archive, "--workers", 1)
    assert status == 0
    assert "train" not in lines
    assert "images 1 of 1 classes" in lines


def test_spread_takes_each_index_once():
    assert tool.spread(10, 99).tolist() == list(range(10))
    taken = tool.spread(1_281_167, 1000)
    assert (len(taken), taken[0], taken[-1]) == (1000, 0, 1_281_166)
    assert np.diff(taken).min() > 1000


@pytest.mark.parametrize("layout", ["tar and zip", "archive beside folders"])
def test_ambiguous_split_is_an_error(folder, tmp_path, capsys, layout):
    root = as_tar(folder, tmp_path)
    if layout == "tar and zip":
        (root / "train.zip").touch()
        wanted = "holds train more than once"
    else:
        (root / "train/cat").mkdir(parents=True)
        (root / "train.tar").rename(root / "train/all.tar")
        wanted = "which are the images?"
    with pytest.raises(SystemExit) as stopped:
        tool.main([str(root), "--workers", "1"])
    assert stopped.value.code == 2
    assert wanted in capsys.readouterr().err


def test_current_folder_is_a_data_path(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    status, lines, _ = run(capsys, ".", "--sample", 2, "--workers", 1)
    assert status == 0
    assert "store train (folder)" in lines


def test_missing_split_is_reported(folder, tmp_path, capsys):
    root = as_tar(folder, tmp_path)
    (root / "train.tar").rename(root / "train.tar.gz")
    status, lines, _ = run(capsys, root, "--workers", 1)
    assert status == 0
    assert "train: DATA.PATH" in " ".join(lines)
    assert "train.tar.gz" in " ".join(lines)
