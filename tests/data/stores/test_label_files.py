"""Classes of the official validation images from every common label file; ambiguous files are refused."""

import base64
import io
import shutil
import struct
import tarfile

import numpy as np
import pytest

from data.stores.label_files import GROUND_TRUTH, find_label_file, read_labels
from data.stores.matlab import read_mat, synset_ids
from data.stores.split import open_split
from tests.helpers.archives import write_tar

IMAGES = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (3, 1, 5, 2, 4)]
WNIDS = {1: "n02119789", 2: "n02100735", 3: "n01440764", 5: "n02077923"}  # by ILSVRC2012_ID, not in sorted order
IDS = [5, 3, 1, 1, 2]  # of images 1 .. 5
WANTED = {f"ILSVRC2012_val_{i:08d}.JPEG": WNIDS[number] for i, number in enumerate(IDS, 1)}
SORTED = sorted(WNIDS.values())
# Written by scipy.io.savemat: synsets as in the development kit's meta.mat, 4 leaves and 1 that has children, and a matrix.
META = base64.b64decode(
    "TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IEZyaSBOb3YgMjAgMjI6MTk6MjYgMjAyNgAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAAXAEAAHic42NgYJjAxcDABqQ5gJiJAQJYoXwQzQjF7EBcXJlX"
    "nFpSDBRnYRCEincAsadPcFiQs5GBoVG8pwvIgHA/CA0H5flFKcXIAuk5+cUoAnmlufHJGZk5KUWpeWABFA7MjLzUkviM1Mz0jBKolpKixMy8+Mzc"
    "xPTUYgY+oKAFA8I/bGj+YUTCIMAJFYeAD/Yg/Q5I+lmw6OdE0i8A5ecZGBkaWppbWELFiTGHH80cED87s0QhLb9CRyGsNKcAi3+wmcOKZg4bOHAP"
    "bwOFLki/AZJ+TgLhwQRloetDD0cYQA5HbPpIsY/seAuY4oBuLzcB/SxAm5kYiIsnXPFtYGBubIrkb0LmjMY3deOb/HzO4UB+vBuamBiYm5kg+Z+Q"
    "OaPxPrD5nIWBknwOAYZI/iZkzmCNb2YG4vQxo+hjZmBkYh6i+VyEgnxuZGBubmlkDBUfyvEOc/9QyucAzSxyuw8AAAA7AAAAeJzjY2BgyABiNiDm"
    "AGI+BghghfKZgJgZiBmhYqkVJUWJQJoHiA0YEIAZSjNCaRYozYRkHggAANceAxo="
)


def lines(*texts):
    return "".join(f"{text}\n" for text in texts).encode()


def kit(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in {GROUND_TRUTH: lines(*IDS), "meta.mat": META, **files}.items():
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def numbers(offset=0):
    return lines(*(f"{name}\t{SORTED.index(wnid) + offset}" for name, wnid in WANTED.items()))


NAMES = {
    "ILSVRC2012_devkit_t12.tar.gz": {"": kit()},
    "ILSVRC2012_devkit_t12": {"data/" + GROUND_TRUTH: lines(*IDS), "data/meta.mat": META, "readme.txt": b"x"},
    GROUND_TRUTH: {"": lines(*IDS), "../meta.mat": META},
    "LOC_val_solution.csv": {
        "": lines(
            "ImageId,PredictionString", *(f"{n.split('.')[0]},{c} 1 2 3 4 {c} 5 6 7 8 " for n, c in WANTED.items())
        )
    },
    "val_map.txt": {"": lines(*(f"{name} {wnid}" for name, wnid in WANTED.items()))},
    "valprep.sh": {
        "": lines("#!/bin/bash", "mkdir -p n01440764", "", *(f"mv {name} {wnid}/" for name, wnid in WANTED.items()))
    },
    "imagenet_2012_validation_synset_labels.txt": {"": lines(*(WNIDS[i] for i in IDS))},
}


def write(folder, name, files):
    for inner, data in files.items():
        path = (folder / name / inner) if inner and not inner.startswith("..") else folder / (inner[3:] or name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / name


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_read_from_each_known_file(tmp_path, name):
    path = write(tmp_path, name, NAMES[name])
    assert find_label_file(tmp_path, "") == path
    assert read_labels(path, IMAGES) == WANTED


@pytest.mark.parametrize("name", ["val_map.txt", "val.txt"])
def test_numbers_from_0_are_those_of_the_sorted_classes(tmp_path, name):
    path = write(tmp_path, name, {"": numbers()})
    assert read_labels(path, IMAGES) == {name: SORTED.index(wnid) for name, wnid in WANTED.items()}


def test_official_tars_with_the_kit_are_read_as_downloaded(tmp_path):
    write(tmp_path, "ILSVRC2012_devkit_t12.tar.gz", NAMES["ILSVRC2012_devkit_t12.tar.gz"])
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", [(name, name.encode()) for name in IMAGES])
    source = open_split(tmp_path, "val", progress=lambda text: None).source(SORTED, False)
    found = {source.read(i).tobytes().decode(): SORTED[source.labels[i]] for i in range(5)}
    assert found == WANTED
    assert source.name(0) == f"{tmp_path}/ILSVRC2012_img_val.tar:ILSVRC2012_val_00000002.JPEG"


def test_index_is_built_again_when_the_label_file_changes(tmp_path):
    write_tar(tmp_path / "val.tar", [(name, b"") for name in IMAGES])
    labels = tmp_path / "mine.txt"
    logged = []
    for text in (numbers(), numbers().replace(b"\t2", b"\t1")):
        labels.write_bytes(text)
        store = open_split(tmp_path, "val", str(labels), logged.append)
        open_split(tmp_path, "val", str(labels), logged.append)
    assert len(logged) == 4
    assert logged[2].endswith("again: its files have changed")
    assert store.source(SORTED, False).labels.tolist() == [0, 1, 1, 3, 3]


def test_index_copied_with_its_archives_stays_valid(tmp_path):
    write(tmp_path / "one", "ILSVRC2012_devkit_t12.tar.gz", NAMES["ILSVRC2012_devkit_t12.tar.gz"])
    write_tar(tmp_path / "one" / "ILSVRC2012_img_val.tar", [(name, b"") for name in IMAGES])
    open_split(tmp_path / "one", "val", progress=lambda text: None)
    shutil.copytree(tmp_path / "one", tmp_path / "two")  # with the times of the files
    shutil.rmtree(tmp_path / "one")
    logged = []
    source = open_split(tmp_path / "two", "val", progress=logged.append).source(SORTED, False)
    assert logged == []
    assert source.name(0).startswith(f"{tmp_path}/two/ILSVRC2012_img_val.tar:")


def refused(path, images=IMAGES):
    with pytest.raises(ValueError, match=r".") as caught:
        read_labels(path, images)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("val.txt", lines(*IDS), "could be ILSVRC2012_IDs"),
        ("val.txt", numbers(offset=1), "numbers the classes 1 .. 4: these could be ILSVRC2012_IDs"),
        ("val.txt", lines(*(f"{name} {wnid}" for name, wnid in list(WANTED.items())[:4])), "no class for 1 of 5 images: ILSVRC2012_val_00000005"),
        ("val.txt", lines("a.jpg 1", "a.jpg 2"), "gives a.jpg two classes, 1 and 2"),
        ("val.txt", lines(*(f"{name} {wnid}" for name, wnid in WANTED.items()), "x.jpg 4"), "mixes numbers and names"),
        ("val.txt", lines("a b c"), "is not understood (['a', 'b', 'c'])"),
        ("val.txt", b"", "is empty"),
        ("val.txt", lines("n01440764"), "has 1 lines for 5 images"),
        (GROUND_TRUTH, lines(*IDS), "put meta.mat of the development kit"),
        (GROUND_TRUTH, lines(*IDS[:4]), "put meta.mat"),
        ("kit.tar.gz", b"\x1f\x8b what", "cannot be read"),
        ("kit.tar.gz", kit(**{GROUND_TRUTH: lines(*IDS[:4])}), "has 4 lines for 5 images"),
        ("kit.tar.gz", kit(**{GROUND_TRUTH: lines(4, 5, 1, 1, 77)}), "ILSVRC2012_IDs that its table lacks: [4, 77]"),
        ("kit.tar.gz", kit(**{"meta.mat": META[:300]}), "meta.mat of"),
        ("kit.tar.gz", kit(**{"meta.mat": b"what"}), "not a little-endian MAT-file"),
    ],
)  # fmt: skip
def test_ambiguous_or_damaged_label_file_is_refused(tmp_path, name, text, part):
    path = write(tmp_path, name, {"": text})
    assert part in refused(path)


def test_ids_without_their_kit_are_translated_by_map_clsloc(tmp_path):
    write(
        tmp_path,
        GROUND_TRUTH,
        {"": lines(*IDS), "../map_clsloc.txt": lines(*(f"{w} {i} kit_fox" for i, w in WNIDS.items()))},
    )
    assert read_labels(tmp_path / GROUND_TRUTH, IMAGES) == WANTED


def test_classes_by_position_need_numbered_images(tmp_path):
    path = write(tmp_path, "val.txt", {"": lines("cat", "dog")})
    assert read_labels(path, ["7/2.jpg", "1.jpg"]) == {"1.jpg": "cat", "7/2.jpg": "dog"}
    assert "the images are not numbered 1 .. 2 (a.jpg, ...)" in refused(path, ["a.jpg", "b.jpg"])
    assert "not numbered" in refused(path, ["1.jpg", "3.jpg"])


def test_kit_without_the_ground_truth_is_refused(tmp_path):
    (tmp_path / "ILSVRC2012_devkit_t12").mkdir()
    assert f"holds no {GROUND_TRUTH}" in refused(tmp_path / "ILSVRC2012_devkit_t12")


def message(root, given=""):
    with pytest.raises(ValueError, match=r".") as caught:
        open_split(root, "val", given, progress=lambda text: None)
    return str(caught.value)


def test_flat_archive_without_a_label_file_is_refused_with_the_remedy(tmp_path):
    write_tar(tmp_path / "val.tar", [(name, b"") for name in IMAGES])
    text = message(tmp_path)
    assert "no file tells their classes; put ILSVRC2012_devkit_t12.tar.gz there, or another of" in text
    assert "DATA.VAL_LABELS" in text
    assert "DATA.VAL_LABELS='nothing.txt' does not exist" in message(tmp_path, "nothing.txt")
    for name in ("val.txt", "val_map.txt"):
        (tmp_path / name).write_bytes(numbers())
    assert "several files with the classes of validation images: val_map.txt, val.txt; name one" in message(tmp_path)
    store = open_split(tmp_path, "val", str(tmp_path / "val.txt"), progress=lambda text: None)
    assert len(store.source(SORTED, False)) == 5


def test_unpacked_kit_is_preferred_to_its_archive(tmp_path):
    for name in ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12"):
        write(tmp_path, name, NAMES[name])
    assert find_label_file(tmp_path, "").name == "ILSVRC2012_devkit_t12"


def test_label_file_without_effect_is_refused(tmp_path):
    labels = write(tmp_path, "mine.txt", {"": numbers()})
    write_tar(tmp_path / "val.tar", [("cat/1.jpg", b"")])
    assert "DATA.VAL_LABELS=" in message(tmp_path, str(labels))
    assert "has no effect" in message(tmp_path, str(labels))
    (tmp_path / "val" / "cat").mkdir(parents=True)
    assert "is a folder of class folders; set it to ''" in message(tmp_path, str(labels))


def test_mat_file_gives_structs_text_and_numbers():
    found = read_mat(META)
    assert synset_ids(META) == WNIDS
    assert np.array_equal(found["extra"], [[0, 1, 2], [3, 4, 5]])
    assert found["synsets"][3]["gloss"] == "glöss"
    assert found["synsets"][3]["children"].tolist() == [[1, 2, 3]]
    assert len(found["synsets"][0]["children"]) == 0


def test_mat_file_of_matlab_stores_text_in_16_bits_and_numbers_in_few():
    """MATLAB writes characters as uint16, and whole numbers of any class in the smallest type."""

    def element(kind, data):
        if len(data) <= 4:
            return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
        return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)

    def matrix(form, shape, name, *rest):
        body = (
            element(6, struct.pack("<II", form, 0))
            + element(5, struct.pack("<2i", *shape))
            + element(1, name)
            + b"".join(rest)
        )
        return element(14, body)

    text = matrix(4, (1, 3), b"word", element(4, "fox".encode("utf-16-le")))
    number = matrix(6, (2, 1), b"n", element(2, b"\x07\x08"))
    data = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM" + text + number
    found = read_mat(data)
    assert found["word"] == "fox"
    assert found["n"].tolist() == [[7], [8]]
