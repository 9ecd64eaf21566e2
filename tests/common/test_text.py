"""Text with names of any bytes: its readable form, files that keep the bytes, streams that escape, encodings named everywhere."""

import ast
import io
import sys
from pathlib import Path

import pytest

from common.atomic_files import write_text_atomically
from common.text import allow_any_text, escape_controls, readable, readable_lines

ROOT = Path(__file__).parents[2]
NAMES = {  # bytes, and the readable form
    b"caf\xe9.jpg": "caf\\xe9.jpg",
    b"\xff\xfe": "\\xff\\xfe",
    "猫/三花.jpg".encode("gbk"): "è/\\xc8\\xfd\\xbb\\xa8.jpg",
    "猫.jpg".encode(): "猫.jpg",
    b"cat.jpg": "cat.jpg",
    "é".encode() + b"\xe9": "é\\xe9",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # file systems' encodings: ASCII in a C locale
def test_readable_form_is_valid_and_independent_of_the_locale(name, encoding):
    assert readable(name.decode(encoding, "surrogateescape")) == NAMES[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bytes_survive_in_a_file(name, encoding, tmp_path):
    write_text_atomically(tmp_path / "file", name.decode(encoding, "surrogateescape"))
    assert (tmp_path / "file").read_bytes() == name


CONTROLS = {  # and their escaped forms
    **{chr(code): f"\\x{code:02x}" for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160))},
    **{"\t": "\\t", "\n": "\\n", "\r": "\\r"},
    **{chr(code): f"\\u{code:04x}" for code in (0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))},
    **{character: f"\\u{ord(character):04x}" for character in "\ud800\udbff\udc00\udc7f\udd00\udfff"},
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_control_characters_are_escaped(encoding):
    for character, escaped in CONTROLS.items():
        text = f"a{character}猫"
        if not "\ud800" <= character <= "\udfff":
            text = text.encode().decode(encoding, "surrogateescape")  # as a file's name in a C locale
        assert readable(text) == f"a{escaped}猫"
        assert escape_controls(text) == f"a{escaped}猫"


def test_bytes_stay_where_controls_are_escaped():
    assert escape_controls("a\udc9b\x9b\x1b") == "a\udc9b\\x9b\\x1b"
    assert readable("a\udc9b\x9b\x1b") == "a\\x9b\\x9b\\x1b"
    assert readable_lines("a\x1b\nb\r\n") == "a\\x1b\nb\\r\n"
    assert readable("👩‍👩‍👧 é שלום") == "👩‍👩‍👧 é שלום"


def test_everything_that_is_printed_is_escaped():
    """Hold the ways to a terminal: `print` of constants, of `readable` text, of JSON; consoles of the log and of Screen."""
    found = []
    for path in [*ROOT.glob("*.py"), *(p for name in PROGRAM for p in (ROOT / name).rglob("*.py"))]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("print", "Console", "sys.stderr.write"):
                safe = call.args and all(is_escaped(argument) for argument in call.args)
                if not safe and (path.name, ast.unparse(call.func)) not in EXCEPTIONS:
                    found.append(f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:80]}")
    assert found == []


PROGRAM = ("common", "config", "data", "engine", "models", "tools", "trainer")
EXCEPTIONS = {
    ("log.py", "Console"),  # Log.info prints `readable` text
    ("screenshots.py", "Console"),  # of the project's own runs
    ("terminal_recorder.py", "Console"),
    ("screenshots.py", "print"),
    ("run_dir.py", "print"),  # exact, for scripts; refuses control characters
}


def is_escaped(argument):
    """Return True for a constant, JSON, or text that `readable` returns."""
    called = ast.unparse(argument.func) if isinstance(argument, ast.Call) else ""
    return isinstance(argument, ast.Constant) or called in ("json.dumps", "readable")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "gbk"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("text", ["a\udce9", "猫", "…×é", "plain"])
def test_streams_escape_what_they_cannot_print(encoding, stream, text, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, stream, io.TextIOWrapper(raw, encoding=encoding))
    allow_any_text()
    print(text, file=getattr(sys, stream), flush=True)
    assert raw.getvalue() == text.encode(encoding, "backslashreplace") + b"\n"


def test_replaced_streams_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    allow_any_text()
    monkeypatch.setattr(sys, "stdout", None)  # as of a process without a terminal
    allow_any_text()


def test_every_text_file_is_opened_with_an_encoding():
    missing = []
    for path in [*ROOT.glob("*.py"), *(p for p in ROOT.glob("*/**/*.py") if p.relative_to(ROOT).parts[0] in PACKAGES)]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        missing += [f"{path.relative_to(ROOT)}:{call.lineno}" for call in calls if opens_text(call)]
    assert missing == []


PACKAGES = ("benchmarks", "common", "config", "data", "docs", "engine", "models", "tools", "trainer")
LIBRARIES = ("Image", "os", "tarfile", "zipfile", "log", "s")  # whose `open` is another, or s.log


def opens_text(call):
    """Return True for a call that opens a text file or a program's text output without naming an encoding."""
    if any(word.arg == "encoding" for word in call.keywords):
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return isinstance(
            call.func, ast.Attribute
        )  # of a Path; the function of data/stores/names.py finds the encoding
    if any(word.arg in ("text", "universal_newlines") for word in call.keywords) and name in (
        "run",
        "Popen",
        "check_output",
    ):
        return True
    if name != "open" or (
        isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value).split(".")[0] in LIBRARIES
    ):
        return False
    modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    modes += [word.value.value for word in call.keywords if word.arg == "mode"]
    return not any("b" in str(mode) for mode in modes) and ast.unparse(call.func) != "self.log.open"
