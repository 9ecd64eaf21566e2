"""Atomic writes follow no link and have names that nobody knows; other kinds of files than regular ones are refused."""

import os
import stat

import pytest

from common.atomic_files import remove_temporary, write_atomically, write_text_atomically
from common.regular_files import check_kind, read_regular, regular


def test_temporary_names_are_random_new_files(tmp_path):
    seen = []

    def write(file):
        seen.append((file.name, stat.S_ISREG(file.lstat().st_mode), file.read_bytes(), file.parent))
        file.write_text("x")

    for _ in range(3):
        write_atomically(tmp_path / "a.txt", write)
    assert len({name for name, *_ in seen}) == 3
    assert all(name.startswith(".a.txt.") and name.endswith(".tmp") for name, *_ in seen)
    assert {tuple(rest) for _, *rest in seen} == {(True, b"", tmp_path)}
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("target", ["victim", "missing"])
def test_link_at_the_target_is_replaced(target, tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "page").symlink_to(tmp_path / target)
    (tmp_path / ".page.tmp").symlink_to(tmp_path / target)
    write_text_atomically(tmp_path / "page", "new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "missing").exists()
    assert (tmp_path / "page").read_text() == "new"
    assert not (tmp_path / "page").is_symlink()


def test_name_that_is_taken_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("common.atomic_files.secrets.token_hex", lambda count: "known")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".page.known.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises((OSError, ValueError)):
        write_text_atomically(tmp_path / "page", "new")
    assert (tmp_path / "victim").read_text() == "mine"


def test_file_that_was_replaced_by_a_link_meanwhile_is_not_renamed(tmp_path):
    (tmp_path / "victim").write_text("mine")

    def write(file):
        file.unlink()
        file.symlink_to(tmp_path / "victim")

    with pytest.raises(ValueError, match="is a link and not a file"):
        write_atomically(tmp_path / "page", write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["victim"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_text_atomically(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("name", ["n" * 255, "猫" * 85])
def test_longest_name_can_be_written(name, tmp_path):
    write_text_atomically(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "x"


def test_leftover_links_are_removed_and_folders_stay(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".a.tmp").symlink_to(tmp_path / "victim")
    (tmp_path / ".b.tmp").write_text("half")
    (tmp_path / ".c.tmp").mkdir()
    remove_temporary(tmp_path, "b")
    assert not (tmp_path / ".b.tmp").exists()
    assert (tmp_path / ".a.tmp").is_symlink()
    remove_temporary(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.tmp", "victim"]


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe", "device"])
def test_other_kinds_are_refused(kind, tmp_path):
    path = tmp_path / "file"
    (tmp_path / "other").write_text("x")
    if kind == "device":
        path = type(path)("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / ("other" if kind == "link" else "new"))
    word = kind.split()[-1]
    for call in (
        lambda: read_regular(path, 10),
        lambda: regular(path, os.O_WRONLY | os.O_CREAT),
        lambda: check_kind(path),
    ):
        with pytest.raises(ValueError, match=f"file|zero is a {word} and not a file.*remove it"):
            call()
    assert not (tmp_path / "new").exists()


def test_size_is_bounded_before_reading(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(ValueError, match=r"sparse has 4,398,046,511,104 bytes, more than the 1,000"):
        read_regular(path, 1000)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none", 1000)
    assert check_kind(tmp_path / "none") is False
