"""Hostile archives, indexes, MAT-files and lists end in a ValueError with the file, or are built again; nothing waits or overflows."""

import os
import tarfile
import time

import pytest

from data.stores.archive_members import list_archive
from data.stores.class_labels import class_names
from data.stores.folder import ClassIndexError, read_class_index
from data.stores.matlab import read_mat, synset_ids
from data.stores.real_labels import read_real_labels
from data.stores.split import open_split
from tests.helpers.archives import WNIDS, as_shards, as_tar, imagenet_like, write_tar
from tests.helpers.damaged_images import JPEG
from tests.helpers.data_doors import run_index
from tests.helpers.hostile_stores import (
    CLASS_LISTS,
    LABELS,
    MATS,
    NO_FILES,
    TARS,
    ZIPS,
    flat_val,
    index_changes,
)

pytestmark = pytest.mark.usefixtures("own_cache")
SECONDS = 10  # of processor time
READ = {
    "junk in pax",
    "long records in pax",
    "pipe",
    "zeros",
    "version of the future",
    "long comment",
}  # nothing is wrong


@pytest.fixture(autouse=True)
def bounded_time():
    """Fail a test that takes long."""
    before = time.process_time()
    yield
    assert time.process_time() - before < SECONDS


def quiet(text):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return imagenet_like(tmp_path_factory.mktemp("folder"))


def assert_plain(text, limit=1500):
    """Assert that a message is one short line without control characters."""
    assert text.isprintable(), text
    assert len(text) < limit, text


@pytest.mark.parametrize(("suffix", "name"), [(".tar", n) for n in TARS] + [(".zip", n) for n in ZIPS])
def test_hostile_archive_is_refused_by_name_or_listed_within_its_bounds(suffix, name, tmp_path, capsys):
    data = (TARS if suffix == ".tar" else ZIPS)[name]
    assert len(data) <= 100_000
    path = tmp_path / f"train{suffix}"
    path.write_bytes(data)
    if name in READ:
        contents = list_archive(path)
        assert all(one.offset >= 0 and one.size >= 0 and one.offset + one.size <= len(data) for one in contents.members)
    else:
        with pytest.raises(ValueError, match=r".") as caught:
            list_archive(path)
        assert str(caught.value).startswith(str(path))
        assert_plain(str(caught.value))
    status, printed = run_index(tmp_path, capsys)
    assert status in (0, 1, 2)
    assert "Traceback" not in printed
    assert "\x1b[2J" not in printed


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["train.tar", "train.zip"])
def test_what_is_no_archive_is_refused_without_waiting(kind, name, tmp_path, capsys):
    NO_FILES[kind](tmp_path / name)
    status, printed = run_index(tmp_path, capsys)
    assert status == 2
    assert "Traceback" not in printed
    assert str(tmp_path) in printed


def test_hole_after_the_end_of_a_tar_is_skipped(tmp_path):
    path = write_tar(tmp_path / "train.tar", [("cat/a.jpg", JPEG)])
    os.truncate(path, 1 << 41)
    assert len(list_archive(path).members) == 1
    with path.open("r+b") as file:
        file.seek((1 << 40) + 512)
        file.write(b"x")
    with pytest.raises(ValueError, match="goes on after its end mark"):
        list_archive(path)


def test_large_header_of_a_sparse_tar_is_not_allocated(tmp_path):
    path = tmp_path / "train.tar"
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 38
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 1 << 41)
    with pytest.raises(ValueError, match=r"train\.tar cannot be read \(a header or directory of"):
        list_archive(path)


def test_any_index_that_is_damaged_is_built_again(folder, tmp_path):
    root = as_shards(folder, tmp_path, names=True)
    whole = open_split(root, "train", progress=quiet)
    file = whole.index_file
    data = file.read_bytes()
    for name, changed in index_changes(data).items():
        assert len(changed) <= 100_000, name
        file.write_bytes(changed)
        logged = []
        again = open_split(root, "train", progress=logged.append)
        assert logged[0].endswith("again: the old one cannot be used"), name
        assert file.read_bytes() == data, name
        assert [again.index.path(i) for i in range(3)] == [whole.index.path(i) for i in range(3)]
    assert not (root / "evil").exists()


@pytest.mark.parametrize("kind", sorted(set(NO_FILES) - {"folder"}))
def test_index_that_is_no_file_is_replaced(kind, folder, tmp_path):
    root = as_tar(folder, tmp_path)
    file = open_split(root, "train", progress=quiet).index_file
    file.unlink()
    NO_FILES[kind](file)
    assert len(open_split(root, "train", progress=quiet).index) == 48
    assert file.is_file()
    assert not file.is_symlink()


@pytest.mark.parametrize("kind", NO_FILES)
def test_lock_that_is_no_file_is_refused(kind, folder, tmp_path):
    root = as_tar(folder, tmp_path)
    NO_FILES[kind](root / "retoken-index-train.npz.lock")
    with pytest.raises(ValueError, match=r"npz\.lock (is a|has )"):
        open_split(root, "train", progress=quiet)


@pytest.mark.parametrize("name", LABELS)
def test_hostile_label_file_is_refused_by_name(name, tmp_path, capsys):
    own, data = LABELS[name]
    assert len(data) <= 100_000
    (flat_val(tmp_path) / own).write_bytes(data)
    with pytest.raises(ValueError, match=own.replace(".", r"\.")) as caught:
        open_split(tmp_path, "val", progress=quiet)
    assert_plain(str(caught.value))
    status, printed = run_index(tmp_path, capsys)
    assert status == 2
    assert "Traceback" not in printed


@pytest.mark.parametrize("kind", sorted(set(NO_FILES) - {"folder"}))
@pytest.mark.parametrize("name", ["val.txt", "ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_validation_ground_truth.txt"])
def test_label_file_that_is_no_file_is_refused(kind, name, tmp_path):
    NO_FILES[kind](flat_val(tmp_path) / name)
    with pytest.raises(ValueError, match=f"{name.replace('.', '[.]')} cannot be read"):
        open_split(tmp_path, "val", progress=quiet)


@pytest.mark.parametrize("name", MATS)
def test_hostile_mat_file_is_refused(name):
    assert len(MATS[name]) <= 100_000
    with pytest.raises(ValueError, match=r".") as caught:
        synset_ids(MATS[name])
    assert_plain(str(caught.value))
    try:
        read_mat(MATS[name])
    except ValueError as error:
        assert_plain(str(error))


@pytest.mark.parametrize("name", CLASS_LISTS)
def test_hostile_class_list_is_refused_by_name(name, tmp_path):
    path = tmp_path / "classes.json"
    path.write_bytes(CLASS_LISTS[name])
    assert path.stat().st_size <= 100_000
    with pytest.raises(ClassIndexError, match=r"classes\.json") as caught:
        read_class_index(path)
    assert_plain(str(caught.value))
    with pytest.raises(ValueError, match=r"classes\.json"):
        class_names([], str(path), 1000)
    with pytest.raises(ValueError, match="--real-labels") as caught:
        read_real_labels(str(path), ["ILSVRC2012_val_00000001.JPEG"], WNIDS)
    assert_plain(str(caught.value))


def test_many_classes_are_refused_in_little_time(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(map(str, range(1_000_001))))
    with pytest.raises(ClassIndexError, match="1000001 classes are more than 1000000"):
        read_class_index(path)
    path.write_text("\n" * 30_000_000)
    with pytest.raises(ClassIndexError, match="has more than 10000000 lines"):
        read_class_index(path)
    os.truncate(path, 1 << 40)
    with pytest.raises(ClassIndexError, match="are more than the"):
        read_class_index(path)


@pytest.mark.parametrize(
    "label",
    [b"9" * 5000, b"-1", b"1000000", b'{"label": 1e999}', b"[" * 50000, b'{"label": {}}', b"\xd9\xa1\xd9\xa2" * 50],
)
@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_hostile_label_of_a_shard_is_refused_by_name(label, suffix, tmp_path):
    write_tar(tmp_path / "x-train-000000.tar", [("a.jpg", JPEG), (f"a.{suffix}", label)])
    if suffix == "cls" and not label.decode().isdigit():  # text that names a class
        assert open_split(tmp_path, "train", progress=quiet).classes()
        return
    with pytest.raises(ValueError, match=rf"a\.{suffix}") as caught:
        open_split(tmp_path, "train", progress=quiet)
    assert_plain(str(caught.value))
