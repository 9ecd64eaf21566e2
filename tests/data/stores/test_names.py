"""Names of classes that look alike or are not UTF-8, and class indices in other encodings."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.build import ValFolder
from data.stores.folder import read_class_index
from data.stores.names import check_classes, decode, encode, lookalikes, shown
from tests.helpers.archives import write_tar
from tests.helpers.data_doors import PICTURE, evaluate, run_index, train, two_classes, write

pytestmark = pytest.mark.usefixtures("own_cache")
NFC, NFD = "caf\xe9", "cafe\u0301"
PAIRS = [
    (NFC, NFD),
    (NFD, NFC),
    ("owl", "owl "),
    ("owl", "\ufeffowl"),
    ("owl", "owl\u200b"),
    ("owl", "Owl"),
    ("owl ", "owl"),
]
LATIN = decode(b"caf\xe9")


@pytest.mark.parametrize(("known", "unknown"), PAIRS)
def test_class_that_looks_like_another_is_escaped_with_the_near_match(tmp_path, capsys, known, unknown):
    root = write(two_classes(tmp_path), f"train/{known}/1.jpg", f"val/{unknown}/1.jpg")
    with pytest.raises(ValueError, match="not among the 3 classes") as caught:
        train(root)
    assert f"classes: {unknown!a} (there is {known!a}); give what is one class one name" in str(caught.value)
    assert run_index(root, capsys)[0] == 2
    with pytest.raises(ValueError, match="does not know") as caught:
        evaluate(root, folder=ValFolder(str(root / "val"), ["cat", "dog", known], 3))
    assert f"{unknown!a} (nearest: " in str(caught.value)
    index = write(tmp_path, "classes.txt", data=f"cat\ndog\n{unknown}\n".encode()) / "classes.txt"
    if read_class_index(index)[2] != known:
        with pytest.raises(ValueError, match="there is") as caught:
            train(root, "DATA.CLASS_INDEX", str(index))
        assert ascii(known) in str(caught.value)


@pytest.mark.parametrize(("one", "other"), [pair for pair in PAIRS if pair[1] != "Owl"])
def test_two_classes_that_look_alike_are_noted(tmp_path, capsys, one, other):
    root = write(two_classes(tmp_path), f"train/{one}/1.jpg", f"train/{other}/1.jpg")
    first, second = sorted([one, other])
    note = f"{root}/train has classes with names that look alike: {first!a} and {second!a}; are they one class?"
    assert train(root).notes[0] == note
    status, printed = run_index(root, capsys)
    assert status == 1
    assert f"problem {note}" in printed


@pytest.mark.parametrize("store", ["folder", "tar"])
def test_name_that_is_not_utf8_keeps_its_bytes(tmp_path, capsys, store):
    folder = two_classes(tmp_path / "folder")
    for split in ("train", "val"):
        write(folder, f"{split}/{os.fsdecode(b'caf' + bytes([0xE9]))}/{os.fsdecode(bytes([0xFF]))}.jpg")
    root = folder
    if store == "tar":
        for split in ("train", "val"):
            files = [(p.relative_to(folder / split), p.read_bytes()) for p in sorted((folder / split).rglob("*.jpg"))]
            write_tar(tmp_path / f"{split}.tar", [(str(path), data) for path, data in files])
        root = tmp_path
        (tmp_path / "folder").rename(tmp_path / "away")
    data = train(root)
    assert data.classes == [LATIN, "cat", "dog"]
    assert [encode(name) for name in data.classes] == [b"caf\xe9", b"cat", b"dog"]
    assert data.fingerprint["classes_sha256"] == hashlib.sha256(b"caf\xe9\ncat\ndog").hexdigest()[:16]
    assert sum(len(batch.labels) for batch in data.val) == 3
    assert evaluate(root).classes == data.classes
    status, printed = run_index(root, capsys)
    assert status == 0
    assert "\\xe9" in printed


def test_class_index_of_names_that_are_not_utf8_is_read(tmp_path):
    root = write(two_classes(tmp_path), f"train/{os.fsdecode(encode(LATIN))}/1.jpg")
    index = write(tmp_path, "classes.txt", data=b"dog\ncaf\xe9\ncat\n") / "classes.txt"
    assert train(root, "DATA.CLASS_INDEX", str(index)).classes == ["dog", LATIN, "cat"]


@pytest.mark.parametrize("text", ["dog\ncat\n猫\n", '["dog", "cat", "猫"]', '{"dog": 0, "cat": 1, "猫": 2}'])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_class_index_is_read_in_every_unicode_encoding(tmp_path, encoding, text):
    file = tmp_path / "classes"
    file.write_text(text, encoding=encoding)
    assert read_class_index(file) == ["dog", "cat", "猫"]


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ("dog\ncat\n".encode("utf-16-le"), "bytes that are zero, as UTF-16 does; save it as UTF-8"),
        ("dog\ncat\n".encode("utf-16-be"), "bytes that are zero, as UTF-16 does; save it as UTF-8"),
        ("dog\n".encode("utf-16")[:-1], "begins as utf-16 but is not"),
        (b"\xef\xbb\xbfcaf\xe9\n", "begins as utf-8-sig but is not"),
        (PICTURE, "bytes that are zero"),
    ],
)
def test_class_index_that_is_no_text_is_named(tmp_path, data, part):
    file = tmp_path / "classes"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"DATA\.CLASS_INDEX=") as caught:
        read_class_index(file)
    assert part in str(caught.value)


def test_classes_and_fingerprint_are_the_same_in_the_c_locale(tmp_path):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    root = write(two_classes(tmp_path), "train/猫/猫.jpg", "val/猫/1.jpg", "train/Ärger/1.jpg")
    write(tmp_path, "classes.json", data='["dog", "猫", "cat", "Ärger"]'.encode())
    code = (
        "import sys, tests.helpers.data_doors as doors; from pathlib import Path; root = Path(sys.argv[1])\n"
        "for opts in ((), ('DATA.CLASS_INDEX', str(root / 'classes.json'))):\n"
        "    print(sorted(doors.train(root, *opts).fingerprint.items()), ascii(doors.train(root, *opts).classes))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        env={**{k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}, **locale},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for line, opts in zip(found, [(), ("DATA.CLASS_INDEX", str(root / "classes.json"))], strict=True):
        data = train(root, *opts)
        assert line == f"{sorted(data.fingerprint.items())} {data.classes!a}"


def test_names_in_messages_are_escaped_only_if_a_terminal_hides_a_part():
    assert [shown(name) for name in ("cat", "猫", "two words", NFC)] == ["cat", "猫", "two words", NFC]
    assert shown("cat ") == "'cat '"
    assert shown(LATIN) == "'caf\\udce9'"
    assert shown("\ufeffcat") == "'\\ufeffcat'"
    assert shown("") == "''"
    assert lookalikes(["a", "b", "a ", "c", "b\u200b"]) == [["a", "a "], ["b", "b\u200b"]]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("c\u0430t", "cat"),  # a Cyrillic a
        ("two\xa0words", "two words"),
        ("\uff43\uff41\uff54", "cat"),  # full width
        ("pit\u2010bull", "pit-bull"),
        ("o\ufb03ce", "office"),  # a ligature
        ("D\u043eG", "dog"),
    ],
)
def test_names_that_differ_in_foreign_characters_are_named_with_the_near_one(name, other):
    with pytest.raises(ValueError, match=r".") as caught:
        check_classes("val", "class folders", [name], [other, "zebra"], False)
    assert f"{name!a} (there is {other!a})" in str(caught.value)
    assert str(caught.value).isascii()


@pytest.mark.parametrize("name", ["dot", "n01443538", "\u732b", "caf\xe9s"])
def test_other_names_have_no_near_one(name):
    with pytest.raises(ValueError, match=r".") as caught:
        check_classes("val", "class folders", [name], ["dog", "n01443537", "caf\xe9"], False)
    assert "there is" not in str(caught.value)
