"""Files and folders that are passed over are counted with a reason; images are known by their first bytes."""

import os
import tarfile
import zipfile

import pytest

from tests.helpers.archives import add, write_tar
from tests.helpers.data_doors import PICTURE, evaluate, picture, run_index, train, two_classes, write
from tools.classifier import find_images

pytestmark = pytest.mark.usefixtures("own_cache")
SYSTEM = ["@eaDir/1.jpg/SYNOPHOTO_THUMB_S.jpg", "__MACOSX/cat/._1.jpg", "$RECYCLE.BIN/1.jpg", "#recycle/1.jpg"]
SYSTEM += ["System Volume Information/1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", "lost+found/1.jpg", "._1.jpg"]
SYSTEM += [".DS_Store", "Thumbs.db", "desktop.ini", ".Trash-1000/1.jpg", ".@__thumb/1.jpg"]
IMAGES = {  # each format by its first bytes alone, under names that do not tell it
    "1.jfif": picture(),
    "2": picture(),
    "3.JPE": picture(),
    "4.image": picture("PNG"),
    "5.x": picture("GIF"),
    "6.x": picture("BMP"),
    "7.x": picture("WEBP"),
    "8.x": picture("TIFF"),
    "8": picture("TIFF", big_tiff=True),
    "9.pnm": picture("PPM"),
    "n01440764.0123": picture(),
}
OTHERS = {"a": b"", "b": b"BM is a text", "c.txt": PICTURE, "d.xml": b"<x/>", "e": b"P5 is a text", "f": b"\0" * 99}
LOST = {
    "a.heic": (b"\0\0\0\x18ftypheic" + bytes(20), "image in a format that is not read"),
    "a.avif": (b"\0\0\0\x1cftypavif" + bytes(20), "image in a format that is not read"),
    "a.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n", "image in a format that is not read"),
    "a.nef": (picture("TIFF"), "image in a format that is not read"),
    **{
        name: (data, "image in a format that is not read")
        for name, data in {
            "a.ico": b"\0\0\1\0\1\0" + bytes(20),
            "a.dds": b"DDS |" + bytes(20),
            "a.eps": b"%!PS-Adobe-3.0 EPSF-3.0",
            "a.pcx": b"\x0a\x05\x01\x08" + bytes(20),
            "a.svg": b"<svg xmlns='x'/>",
            "a.qoi": b"qoif" + bytes(20),
            "a.pfm": b"Pf\n1 1\n-1.0\n" + bytes(4),
            "a.hdr": b"#?RADIANCE\n",
            "a.fits": b"SIMPLE  =                    T",
            "a.jp2": b"\0\0\0\x0cjP  \r\n\x87\n",
            "a.tga": bytes(20),
            "a.DCM": bytes(20),
        }.items()
    },
    "a.jpg.part": (PICTURE, "backup or unfinished download"),
    "a.jpg~": (PICTURE, "backup or unfinished download"),
}


@pytest.mark.parametrize("place", ["", "cat/"])
@pytest.mark.parametrize("path", SYSTEM)
def test_system_files_and_folders_are_passed_over_and_counted(tmp_path, capsys, path, place):
    root = write(two_classes(tmp_path), f"train/{place}{path}", f"val/{place}{path}")
    data, name = train(root), path.split("/")[0]
    assert data.classes == ["cat", "dog"]
    assert (data.fingerprint["train"], data.fingerprint["val"]) == (6, 2)
    over = f"passed over 1 system file or folder ({name})"
    assert data.notes == [f"{root}/train: {over}", f"{root}/val: {over}"]
    assert evaluate(root).notes == [f"{root}/val: {over}"]
    status, printed = run_index(root, capsys)
    assert (status, printed.count(over)) == (0, 2)


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_known_by_their_first_bytes(tmp_path, capsys, name):
    root = write(two_classes(tmp_path), f"train/cat/{name}", f"val/dog/{name}", data=IMAGES[name])
    data = train(root)
    assert (data.fingerprint["train"], data.fingerprint["val"], data.notes) == (7, 3, [])
    assert sum(len(batch.labels) for batch in data.val) == 3
    assert "decoded all images, 0 unreadable" in run_index(root, capsys, "--full")[1]


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_are_no_images_are_counted(tmp_path, capsys, name):
    root = write(two_classes(tmp_path), f"train/cat/{name}", data=OTHERS[name])
    over = f"passed over 1 file that is no image (cat/{name})"
    assert train(root).notes == [f"{root}/train: {over}"]
    status, printed = run_index(root, capsys)
    assert status == 0
    assert over in printed


@pytest.mark.parametrize("name", LOST)
def test_images_that_are_not_read_are_a_problem_of_the_index(tmp_path, capsys, name):
    content, reason = LOST[name]
    root = write(two_classes(tmp_path), f"train/cat/{name}", data=content)
    assert train(root).notes == [f"{root}/train: passed over 1 {reason} (cat/{name})"]
    status, printed = run_index(root, capsys)
    assert status == 1
    assert f"problem images may be missing: 1 {reason} (cat/{name})" in printed


def test_images_beside_class_folders_are_a_problem_of_the_index(tmp_path, capsys):
    root = write(two_classes(tmp_path), "train/1.jpg", "train/2")
    assert train(root).notes == [f"{root}/train: passed over 2 images outside the class folders (1.jpg, 2)"]
    status, printed = run_index(root, capsys)
    assert status == 1
    assert "images may be missing: 2 images outside the class folders" in printed


def test_pipe_is_passed_over_without_waiting_for_it(tmp_path):
    root = two_classes(tmp_path)
    for name in ("pipe", "pipe.jpg"):
        os.mkfifo(root / "train/cat" / name)
    assert train(root).notes == [f"{root}/train: passed over 2 pipes, sockets or devices (cat/pipe, cat/pipe.jpg)"]


def test_many_files_are_counted_with_a_few_names(tmp_path):
    root = write(
        two_classes(tmp_path), *(f"train/{name}/{i}.xml" for name in ("cat", "dog") for i in range(9)), data=b"x"
    )
    over = "18 files that are no images (cat/0.xml, cat/1.xml, cat/2.xml, ...)"
    assert train(root).notes == [f"{root}/train: passed over {over}"]


def archive_members():
    members = [(f"{name}/{i}.jpg", PICTURE) for name in ("cat", "dog") for i in range(3)]
    members += [(f"cat/{name}", data) for name, data in IMAGES.items()]
    return [
        *members,
        ("__MACOSX/cat/._1.jpg", b"x"),
        ("cat/._1.jpg", b"x"),
        ("dog/notes", b"x"),
        ("dog/a.heic", LOST["a.heic"][0]),
    ]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_follow_the_same_rules(tmp_path, capsys, kind):
    for split in ("train", "val"):
        if kind == "tar":
            write_tar(tmp_path / f"{split}.tar", archive_members())
        else:
            with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
                for name, data in archive_members():
                    archive.writestr(name, data)
    data = train(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert data.fingerprint["train"] == 6 + len(IMAGES)
    over = "1 file that is no image (dog/notes), 1 image in a format that is not read (dog/a.heic), 2 system files or folders"
    assert data.notes[0] == f"{tmp_path}/train.{kind}: passed over {over} (._1.jpg, __MACOSX)"
    assert train(tmp_path).notes == data.notes  # from the index that is kept
    status, printed = run_index(tmp_path, capsys)
    assert status == 1
    assert f"passed over {over}" in printed


def test_shards_know_images_by_their_first_bytes(tmp_path):
    for split in ("train", "val"):
        members = [member for i in range(4) for member in ((f"{i}.jfif", PICTURE), (f"{i}.cls", b"%d" % (i % 2)))]
        write_tar(tmp_path / f"x-{split}-000000.tar", [*members, ("0.txt", b"a caption"), ("stray.json", b"{}")])
    data = train(tmp_path)
    assert data.fingerprint["train"] == 4
    assert data.notes[0].endswith("passed over 2 files that are no images (0.txt, stray.json)")


def test_link_to_a_class_in_a_tar_is_counted(tmp_path, capsys):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"):
                add(tar, name, PICTURE)
            info = tarfile.TarInfo("owl")
            info.type, info.linkname = tarfile.SYMTYPE, "/gone/owl"
            tar.addfile(info)
    assert "passed over 1 link in an archive (owl)" in train(tmp_path).notes[0]
    assert run_index(tmp_path, capsys)[0] == 1


def test_link_to_an_image_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        info = zipfile.ZipInfo("cat/1.jpg")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/gone/1.jpg")
    with pytest.raises(ValueError, match=r"holds cat/1\.jpg, which is a link"):
        train(tmp_path)


def test_folder_of_photographs_follows_the_same_rules(tmp_path):
    write(tmp_path, "1.jfif", "deep/2", "3.jpg", "@eaDir/3.jpg", ".hidden.jpg")
    write(tmp_path, "notes.txt", data=b"x")
    assert find_images([str(tmp_path)]) == [tmp_path / name for name in ("1.jfif", "3.jpg", "deep/2")]
