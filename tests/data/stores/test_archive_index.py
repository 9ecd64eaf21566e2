"""Index of archives: built once by one of many processes, kept in a writable folder, rebuilt when it is outdated."""

import os
import threading
from pathlib import Path

import pytest

from data.stores.split import open_split
from tests.helpers.archives import (
    as_one_tar,
    as_shards,
    as_tar,
    imagenet_like,
    open_logged,
    write_tar,
)

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return imagenet_like(tmp_path_factory.mktemp("folder"))


def test_index_is_built_once_and_logged(folder, tmp_path):
    root = as_tar(folder, tmp_path)
    store, logged = open_logged(root)
    assert logged == [
        f"indexing train of {root} (1 archives)",
        f"indexed 48 images; the index is kept in {root}/retoken-index-train.npz",
    ]
    assert store.index_file == root / "retoken-index-train.npz"
    assert sorted(p.name for p in root.iterdir()) == ["retoken-index-train.npz", "train.tar", "val.tar"]
    assert open_logged(root)[1] == []


def test_index_of_a_single_archive_lies_beside_it(folder, tmp_path):
    archive = as_one_tar(folder, tmp_path)
    open_logged(archive)
    open_logged(archive, "val")
    names = ["pictures.tar", "pictures.tar.retoken-index-train.npz", "pictures.tar.retoken-index-val.npz"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.parametrize("change", ["time", "size", "another shard", "garbage", "cut off"])
def test_outdated_index_is_rebuilt_and_logged(folder, tmp_path, change):
    root = as_shards(folder, tmp_path)
    index = open_logged(root)[0].index_file
    shard = root / "imagenet-train-000001.tar"
    if change == "time":
        os.utime(shard, (1, 1))
    elif change == "size":
        times = shard.stat()
        with shard.open("ab") as file:
            file.write(bytes(10240))
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "another shard":
        write_tar(root / "imagenet-train-000003.tar", [("n01440764_9.jpg", b"x"), ("n01440764_9.cls", b"0")])
    else:
        index.write_bytes(b"PK\x03\x04 what" if change == "garbage" else index.read_bytes()[:700])
    store, logged = open_logged(root)
    again = (
        " again: its files have changed"
        if change not in ("garbage", "cut off")
        else " again: the old one cannot be used"
    )
    assert logged[0] == f"indexing train of {root} ({4 if change == 'another shard' else 3} archives){again}"
    assert len(store.index) == (49 if change == "another shard" else 48)
    assert open_logged(root)[1] == []


def test_index_of_a_read_only_folder_lies_in_the_cache(folder, tmp_path, monkeypatch):
    root = as_tar(folder, tmp_path / "store")
    real = Path.touch

    def touch(path, *args, **kwargs):
        if path.parent == root:
            raise OSError(30, "Read-only file system")
        real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", touch)  # permissions do not stop root
    store, logged = open_logged(root)
    assert store.index_file.parent == tmp_path / "cache" / "retoken"
    assert logged[-1].endswith(f"the index is kept in {store.index_file} because {root} cannot be written")
    assert open_logged(root)[1] == []
    assert sorted(p.name for p in root.iterdir()) == ["train.tar", "val.tar"]
    monkeypatch.setattr(
        Path, "touch", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    os.utime(root / "train.tar", (1, 1))
    with pytest.raises(ValueError, match=r"neither .*/store nor .*/cache/retoken can be written.*set XDG_CACHE_HOME"):
        open_logged(root)


def test_processes_that_start_together_build_one_index(folder, tmp_path):
    root = as_tar(folder, tmp_path)
    logged, stores = [], []
    threads = [
        threading.Thread(target=lambda: stores.append(open_split(root, "train", progress=logged.append)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 4
    assert sum(line.startswith("indexed") for line in logged) == 1


@pytest.mark.slow
def test_processes_of_a_run_build_one_index_and_train(small_cfg, pictures, tmp_path, run_script):
    root = as_tar(pictures, tmp_path / "store")
    argv = ("--cfg", str(small_cfg), "--data-path", str(root), "--output", str(tmp_path), "--opts", "TRAIN.EPOCHS", "1")
    done = run_script("train.py", *argv, processes=2)
    assert (done.stdout + done.stderr).count(f"indexing train of {root}") == 1
    assert (done.stdout + done.stderr).count(f"indexing val of {root}") == 1
    assert "48 training and 15 validation images, 3 classes" in done.stdout


def test_lock_of_a_process_that_died_is_taken_over(folder, tmp_path):
    root = as_tar(folder, tmp_path)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    lock = root / "retoken-index-train.npz.lock"
    lock.write_text(f"{os.uname().nodename} {pid}")
    logged = open_logged(root)[1]
    assert logged[0] == f"taking over from {os.uname().nodename} {pid}, which left {lock}"
    assert not lock.exists()


def test_lock_of_another_machine_is_waited_for_until_it_is_stale(folder, tmp_path, monkeypatch):
    root = as_tar(folder, tmp_path)
    monkeypatch.setattr("data.stores.build_once.POLL_S", 0.0)
    monkeypatch.setattr("data.stores.build_once.STALE_S", 0.05)
    (root / "retoken-index-train.npz.lock").write_text("elsewhere 1")
    logged = open_logged(root)[1]
    assert logged[0] == f"waiting for process elsewhere 1 to write {root}/retoken-index-train.npz"
    assert logged[1].startswith("taking over from elsewhere 1")


def test_error_while_building_leaves_no_lock(tmp_path):
    write_tar(tmp_path / "train.tar", [("readme.txt", b"x")])
    with pytest.raises(ValueError, match="holds no images of train"):
        open_logged(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["train.tar"]


def test_duplicates_and_a_missing_end_mark_are_noted(tmp_path):
    path = write_tar(tmp_path / "train.tar", [("a/1.jpg", b"1"), ("a/2.jpg", b"2"), ("a/1.jpg", b"3")])
    os.truncate(path, 3 * 1024)
    store, _ = open_logged(tmp_path)
    assert len(store.index) == 3
    assert store.notes == [
        f"{path} has no end mark after 3 files; is it whole?",
        f"{path} holds 1 images twice, a/1.jpg the first",
    ]


def test_processes_that_waited_read_the_index_without_the_lock(folder, tmp_path, monkeypatch):
    root = as_tar(folder, tmp_path)
    index = open_logged(root)[0].index_file
    ready = index.rename(tmp_path / "ready.npz")
    lock = index.with_name(f"{index.name}.lock")
    lock.write_text("elsewhere 1")
    slept = []

    def written_meanwhile(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            ready.rename(index)  # the lock is still held

    monkeypatch.setattr("data.stores.build_once.time.sleep", written_meanwhile)
    store, logged = open_logged(root)
    assert len(store.index) == 48
    assert logged == [f"waiting for process elsewhere 1 to write {index}"]
    assert lock.exists()
    assert len(slept) == 2
