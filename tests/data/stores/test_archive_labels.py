"""Label files inside archives, and class numbers of shards that do not begin at 0 or have gaps."""

import json
import tarfile
import zipfile

import pytest

from tests.helpers.archives import add, write_tar
from tests.helpers.data_doors import PICTURE, evaluate, refused_everywhere, run_index, train, write

pytestmark = pytest.mark.usefixtures("own_cache")
CLASSES = ("cat", "dog", "cat", "dog", "dog")
TRAIN = [f"train/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(3)]
LABELS = {
    "val_annotations.txt": "".join(f"{i}.jpg\t{name}\t0\t1\t2\t3\n" for i, name in enumerate(CLASSES, 1)),
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(f"{i},{c} 1 2 3 4\n" for i, c in enumerate(CLASSES, 1)),
    "val_map.txt": "".join(f"{i}.jpg {('cat', 'dog').index(name)}\n" for i, name in enumerate(CLASSES, 1)),
    "imagenet_2012_validation_synset_labels.txt": "".join(f"{name}\n" for name in CLASSES),
}


def pack(path, files):
    """Write (name, bytes) into a tar or a stored zip, by its suffix."""
    if path.suffix == ".tar":
        return write_tar(path, files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files:
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
@pytest.mark.parametrize("label_file", LABELS)
@pytest.mark.parametrize(
    "layout", ["val/images/, labels in val/", "val/, labels in it", "labels at the top", "below a folder"]
)
def test_labels_inside_a_single_archive_are_read(tmp_path, capsys, suffix, label_file, layout):
    top = "tiny/" * (layout == "below a folder")
    images = "val/images/" if "images" in layout or top else "val/"
    place = "" if "top" in layout else "val/"
    files = [(top + path, PICTURE) for path in TRAIN]
    files += [(f"{top}{images}{i}.jpg", PICTURE) for i in range(1, 6)]
    archive = pack(tmp_path / f"all{suffix}", [*files, (f"{top}{place}{label_file}", LABELS[label_file].encode())])
    data = train(archive)
    assert data.classes == ["cat", "dog"]
    assert data.val._loader.dataset.source.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.notes == []
    assert evaluate(archive).fingerprint["val"] == 5
    assert run_index(archive, capsys)[0] == 0


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_labels_inside_val_are_read_before_those_beside_it(tmp_path, suffix):
    root = write(tmp_path, *TRAIN)
    labels = LABELS["val_annotations.txt"].encode()
    images = [(f"{i}.jpg", PICTURE) for i in range(1, 6)]
    pack(root / f"val{suffix}", [*images, ("val_annotations.txt", labels)])
    (root / "val_map.txt").write_text("of other images")
    assert train(root).val._loader.dataset.source.labels.tolist() == [0, 0, 1, 1, 1]
    given = root / "given.txt"  # replaces them
    given.write_text("".join(f"{i}.jpg cat\n" for i in range(1, 6)))
    assert train(root, "DATA.VAL_LABELS", str(given)).val._loader.dataset.source.labels.tolist() == [0] * 5
    assert train(root).val._loader.dataset.source.labels.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"val_map.txt": "1.jpg 0\n"}, "all.tar:val/val_map.txt has no class for 4 of 5 images"),
        ({"val_map.txt": "1.jpg\n", "val.txt": ""}, "all.tar:val holds several files with the classes"),
        ({"val_annotations.txt": "a b c\n"}, "all.tar:val/val_annotations.txt is not understood"),
    ],
)
def test_wrong_labels_inside_an_archive_are_named_with_it(tmp_path, capsys, files, message):
    images = [(path, PICTURE) for path in (*TRAIN, *(f"val/{i}.jpg" for i in range(1, 6)))]
    archive = pack(tmp_path / "all.tar", images + [(f"val/{name}", text.encode()) for name, text in files.items()])
    with pytest.raises(ValueError, match=r".") as error:
        train(archive)
    assert message in str(error.value)
    assert "/tmp" not in str(error.value).replace(str(tmp_path), "")


def write_shards(root, numbers, form):
    """Write train and val shards with an image of each class number."""
    for split in ("train", "val"):
        with tarfile.open(root / f"x-{split}-000000.tar", "w") as tar:
            for i, number in enumerate(numbers):
                label = json.dumps({"label": number}) if form == "json" else str(number)
                add(tar, f"{i:06d}.jpg", PICTURE)
                add(tar, f"{i:06d}.{form}", label.encode())


@pytest.mark.parametrize("form", ["cls", "json"])
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([1, 2, 3], "class numbers begin at 1, but labels begin at 0"),
        ([5, 6], "class numbers begin at 5, but labels begin at 0"),
        ([0, 1, 3], "has no image of 1 of the class numbers 0 .. 3: 2; "),
        ([10, 20], "has no image of 19 of the class numbers 0 .. 20: 0, 1, 2, 3, 4 and 14 more; "),
    ],
)
def test_class_numbers_from_1_or_with_gaps_are_refused(tmp_path, capsys, form, numbers, message):
    write_shards(tmp_path, numbers, form)
    with pytest.raises(ValueError, match=r".") as error:
        train(tmp_path)
    assert message in str(error.value)
    assert "DATA.CLASS_INDEX" not in str(error.value) or "set DATA.CLASS_INDEX" in str(error.value)
    status, printed = run_index(tmp_path, capsys)
    assert status == 1
    assert message in printed


def test_validation_numbers_from_1_say_so(tmp_path):
    write_shards(tmp_path, [0, 1, 2], "cls")
    (tmp_path / "x-val-000000.tar").unlink()
    (tmp_path / "away").mkdir()
    write_shards(tmp_path / "away", [1, 2, 3], "cls")
    (tmp_path / "away/x-val-000000.tar").rename(tmp_path / "x-val-000000.tar")
    with pytest.raises(ValueError, match="they begin at 1: write them again from 0"):
        train(tmp_path)


def test_no_label_file_anywhere_is_refused(tmp_path, capsys):
    archive = pack(tmp_path / "all.tar", [(path, PICTURE) for path in (*TRAIN, "val/1.jpg", "val/2.jpg")])
    assert "no file tells their classes" in refused_everywhere(archive, capsys)
