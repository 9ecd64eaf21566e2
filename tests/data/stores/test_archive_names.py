"""Archives of other systems: folders written with backslashes, names of zip members that are not marked as UTF-8."""

import zipfile

import pytest

from data.stores.names import encode
from tests.helpers.archives import write_tar
from tests.helpers.data_doors import PICTURE, evaluate, run_index, train, write

pytestmark = pytest.mark.usefixtures("own_cache")
SPLITS = {"train": 3, "val": 1}
UNIX, WINDOWS = 3, 0


def members(classes=("cat", "dog"), split=""):
    """Return the paths of three training images and a validation image of each class, by split."""
    return {s: [f"{split and s + '/'}{name}/{i}.jpg" for name in classes for i in range(n)] for s, n in SPLITS.items()}


def write_zip(path, paths, system=UNIX):
    """Write a zip whose members bear exactly these names: a placeholder of the same length is replaced where they are bytes."""
    names = [name if isinstance(name, bytes) else name.encode() for name in paths]
    placeholders = [f"{i:0{len(name)}d}" for i, name in enumerate(names)]
    with zipfile.ZipFile(path, "w") as archive:
        for placeholder in placeholders:
            info = zipfile.ZipInfo(placeholder)
            info.create_system = system
            archive.writestr(info, PICTURE)
    data = path.read_bytes()
    for placeholder, name in zip(placeholders, names, strict=True):
        assert data.count(placeholder.encode()) == 2
        data = data.replace(placeholder.encode(), name)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["zip", "tar", "one zip", "one tar"])
def test_backslashes_are_folders(tmp_path, capsys, kind):
    root = write(tmp_path / "plain", *(f"{s}/{path}" for s, paths in members().items() for path in paths))
    wanted, one = train(root), kind.startswith("one")
    back = {s: [path.replace("/", "\\") for path in paths] for s, paths in members(split="x" * one).items()}
    if one:
        back = {"all": [path for paths in back.values() for path in paths]}
    for name, paths in back.items():
        if kind.endswith("zip"):
            write_zip(tmp_path / f"{name}.zip", paths)
        else:
            write_tar(tmp_path / f"{name}.tar", [(path, PICTURE) for path in paths])
    place = tmp_path / f"all.{kind[-3:]}" if one else tmp_path
    found = train(place)
    assert (found.classes, found.fingerprint) == (wanted.classes, wanted.fingerprint)
    assert evaluate(place).fingerprint["val"] == 2
    assert run_index(place, capsys)[0] == 0


def test_backslash_beside_folders_is_part_of_a_name(tmp_path):
    paths = {s: [*own, "cat/a\\b.jpg"] for s, own in members().items()}
    for name, own in paths.items():
        write_tar(tmp_path / f"{name}.tar", [(path, PICTURE) for path in own])
    assert train(tmp_path).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("name", "system", "wanted"),
    [
        ("café".encode(), UNIX, "café".encode()),  # UTF-8 without the mark, of older programs
        ("café".encode(), WINDOWS, "café".encode()),
        (b"caf\xe9", UNIX, b"caf\xe9"),  # Latin-1: bytes survive
        (b"\x83L\x83c", UNIX, b"\x83L\x83c"),  # Shift-JIS
        (b"caf\x82", WINDOWS, "café".encode()),  # cp437, as the format says
    ],
)
def test_names_of_zip_members_keep_their_bytes(tmp_path, name, system, wanted):
    for split, count in SPLITS.items():
        paths = [own + b"/%06d.jpg" % i for own in (name, b"dog") for i in range(count)]
        write_zip(tmp_path / f"{split}.zip", paths, system)
    data = train(tmp_path)
    assert sorted(encode(one) for one in data.classes) == sorted([wanted, b"dog"])
    assert data.fingerprint["val"] == 2
