"""Tables that a spreadsheet opens and names that a terminal shows: no formula, no control character."""

import csv

import pytest

from engine.result_files import write_table

FORMULAS = (
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "＝1",
    '=HYPERLINK("http://x","y")',
    "-rf.jpg",
)


def table(path, columns):
    write_table(path, columns)
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("text", FORMULAS)
def test_texts_that_a_spreadsheet_would_compute_get_an_apostrophe(text, tmp_path):
    header, row = table(tmp_path / "t.csv", {text: [text], "n": [-1.5]})
    assert row[0].startswith("'")
    assert row[0][1:].lstrip(" ")[0] in "=+-@＝\\"
    assert header[0] == row[0]
    assert row[1] == "-1.5"  # numbers stay numbers


@pytest.mark.parametrize("text", ["cat.jpg", "a=b", "1-2", "'quoted", "猫", "a,b", 'a"b', "", "a@b"])
def test_other_texts_are_written_as_they_are(text, tmp_path):
    assert table(tmp_path / "t.csv", {"name": [text, "x"]})[1] == ([text] if text else [""])


@pytest.mark.parametrize("text", ["a\x1bb", "a\nb", "a\rb", "a\x9bb", "a\u202eb", "a\ud800b", "a\x00b", "a\u2028b"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_control_characters_are_escaped(text, suffix, tmp_path):
    shown = text.encode("unicode_escape").decode()
    if suffix == ".csv":
        assert table(tmp_path / "t.csv", {"name": [text]})[1] == [shown]
        return
    parquet = pytest.importorskip("pyarrow.parquet")
    write_table(tmp_path / "t.parquet", {"name": [text]})
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist() == [{"name": shown}]
