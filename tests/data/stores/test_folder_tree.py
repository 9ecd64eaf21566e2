"""Broken links, circles of links and folders that cannot be listed: one line with the path, at the scan."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from data.build import ValFolder
from data.stores.names import read_text
from tests.helpers.archives import write_tar
from tests.helpers.data_doors import PICTURE, evaluate, refused_everywhere, run_index, train, two_classes, write

pytestmark = pytest.mark.usefixtures("own_cache")


def link(root, path, target):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).symlink_to(target)


def refused(root, capsys):
    """Return the error of training, after a check that tools.index raises the same one."""
    with pytest.raises(ValueError, match=r".") as caught:
        train(root)
    status, printed = run_index(root, capsys)
    assert status == 2
    assert " ".join(str(caught.value).split()) in printed
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("owl", "/gone/owl"),  # a class whose disk has vanished
        ("owl", "owl"),
        ("cat/x.jpg", "/gone/x.jpg"),
        ("cat/x", "../../gone/x"),
        ("dog/deep/x.jpg", "/gone/x.jpg"),
        ("dog/deep", "/gone/deep"),
        ("x.jpg", "/gone/x.jpg"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_broken_link_is_refused_at_the_scan(tmp_path, capsys, split, path, target):
    root = two_classes(tmp_path)
    link(root, f"{split}/{path}", target)
    text = refused(root, capsys)
    assert f"{root}/{split} holds 1 link that leads nowhere: {root}/{split}/{path} -> {target}" in text
    if split == "val":
        with pytest.raises(ValueError, match=r"leads nowhere"):
            evaluate(root)
        with pytest.raises(ValueError, match=r"leads nowhere"):
            evaluate(root, folder=ValFolder(str(root / "val"), ["cat", "dog", "owl"], 3))


def test_broken_links_are_counted_with_a_few_names(tmp_path, capsys):
    root = two_classes(tmp_path)
    for i in range(9):
        link(root, f"val/{'cat' if i % 2 else 'dog'}/x{i}.jpg", "/gone")
    text = refused(root, capsys)
    assert f"holds 9 links that lead nowhere: {root}/val/cat/x1.jpg -> /gone, " in text
    assert "and 6 more" in text


@pytest.mark.parametrize("path", ["train", "val", "train.tar"])
def test_split_that_is_a_broken_link_is_refused(tmp_path, capsys, path):
    root = two_classes(tmp_path, **{path: f"elsewhere-{path}"} if path in ("train", "val") else {"train": "elsewhere"})
    link(root, path, f"/gone/{path}")
    assert f"{root}/{path}" in refused(root, capsys)
    link(tmp_path, "away", "/gone/data")
    assert f"{tmp_path}/away is a link to /gone/data" in refused_everywhere(tmp_path / "away", capsys)


@pytest.mark.parametrize(
    "links",
    [
        {"train/cat/loop": "."},
        {"train/cat/loop": ".."},
        {"train/cat/deep/loop": "../.."},
        {"train/cat/d": "../dog", "train/dog/c": "../cat"},
        {"train/up": "../.."},
        {"train/self": "."},
    ],
)
def test_circle_of_links_is_refused(tmp_path, capsys, links):
    root = two_classes(tmp_path)
    for path, target in links.items():
        link(root, path, target)
    text = refused(root, capsys)
    assert "a folder that holds it: a circle; remove the link" in text
    assert any(path.split("/")[-1] in text for path in links)


def test_links_to_folders_and_images_elsewhere_are_followed(tmp_path):
    root = two_classes(tmp_path / "root", val="val")
    two_classes(tmp_path / "disk")
    link(root, "train/owl", tmp_path / "disk/train/cat")
    link(root, "train/dog/more", tmp_path / "disk/train/dog")
    link(root, "train/cat/x.jpg", tmp_path / "disk/val/cat/9.jpg")
    data = train(root)
    assert (data.classes, data.fingerprint["train"]) == (["cat", "dog", "owl"], 3 + 1 + 3 + 3 + 3)


CODES = [errno.EACCES, errno.ENOENT, errno.ESTALE, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("path", ["train", "train/cat", "val/dog", "val/dog/deep"])
def test_folder_that_cannot_be_listed_is_named_in_one_line(tmp_path, capsys, monkeypatch, path, code):
    root = write(two_classes(tmp_path), "val/dog/deep/1.jpg")
    scandir = os.scandir

    def refuse(folder="."):
        if Path(folder) == root / path:
            raise OSError(code, os.strerror(code), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    text = refused(root, capsys)
    assert text.startswith(f"{root}/{path} cannot be read ({os.strerror(code)}); ")
    assert "\n" not in text
    if not path.startswith("train/"):
        with pytest.raises(ValueError, match=r"cannot be read"):
            evaluate(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("path", ["", "train", "train/cat", "val", "val/dog"])
def test_folder_without_permission_is_named_in_one_line(capsys, path):
    with tempfile.TemporaryDirectory() as folder:  # whose parents others may enter
        root = two_classes(Path(folder))
        root.chmod(0o755)
        (root / path).chmod(0)
        os.seteuid(65534)
        try:
            text = refused(root, capsys)
        finally:
            os.seteuid(0)
    assert f"{root / path}" in text
    assert "Permission denied" in text


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_archive_that_cannot_be_opened_is_named_in_one_line(tmp_path, capsys, monkeypatch, code):
    write_tar(tmp_path / "train.tar", [("cat/1.jpg", PICTURE), ("dog/1.jpg", PICTURE)])
    write_tar(tmp_path / "val.tar", [("cat/1.jpg", PICTURE)])
    opened = os.open

    def refuse(path, *args, **options):
        if str(path).endswith("train.tar"):
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert refused_everywhere(tmp_path, capsys).startswith(f"{tmp_path}/train.tar cannot be opened")


def test_text_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path} cannot be read \(Is a directory\); see whether"):
        read_text(tmp_path)
