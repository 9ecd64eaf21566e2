"""Screenshots: recording and drawing of a terminal; the pictures in docs/images exist and are small."""

import os
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

from tests.conftest import ROOT
from tools import screenshots
from tools.terminal_recorder import RecordedScreen, record, screen_when

PROGRAM = """
import os
from rich.console import Console
from rich.live import Live
console = Console()
print(os.get_terminal_size(), console.is_terminal)
with Live("", console=console, auto_refresh=False, transient=True) as live:
    for i in range(4):
        live.update(f"[red]bar {i}[/]\\nlower {i} |", refresh=True)
        console.print(f"line {i}")
print("x" * 60)
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Output of a program with a live view on a pseudo-terminal."""
    out = tmp_path_factory.mktemp("terminal") / "out"
    assert record([sys.executable, "-c", PROGRAM], out, 50, 20, os.environ | {"COLUMNS": "7"}) == 0
    return out.read_bytes().decode()


def test_recorded_terminal_is_replayed(recorded):
    shown = RecordedScreen()
    shown.feed(recorded)
    size = "os.terminal_size(columns=50, lines=20) True"
    assert shown.plain == [size, "line 0", "line 1", "line 2", "line 3", "x" * 60]
    moment = screen_when(recorded, "|", lambda text: "bar 2" in text)
    assert moment.plain == [size, "line 0", "line 1", "bar 2", "lower 2 |"]


def test_a_moment_that_never_came_gives_the_last_one(recorded):
    assert "bar 3" in "\n".join(screen_when(recorded, "|", lambda text: False).plain)
    with pytest.raises(ValueError, match="never shows '#'"):
        screen_when(recorded, "#", lambda text: True)


def test_terminal_is_drawn_with_colours_and_without_addresses(recorded):
    drawn = screen_when(recorded, "|", lambda text: "bar 2" in text).svg(50, 3, "a title")
    ElementTree.fromstring(drawn)
    text = " ".join(re.sub(r"<[^>]+>|&#160;", " ", drawn).split())
    assert "a title" in text
    assert "bar 2" in text
    assert "line 1" in text
    assert "line 0" not in text  # three lines only
    assert "url(http" not in drawn
    assert "@font-face" not in drawn
    assert len(set(re.findall(r"\.[\w-]+-r\d+ \{ fill: (#\w+)", drawn))) > 1


def test_failing_program_returns_its_exit_status(tmp_path):
    assert record([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "out", 50, 20, os.environ) == 3


def test_pictures_of_the_documentation_are_there_and_small():
    named = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+\.(?:png|jpg|svg))\)", page.read_text()):
            path = (page.parent / link).resolve()
            assert path.is_file(), f"{page}: {link}"
            named.add(path)
    folder = ROOT / "docs" / "images"
    for path in folder.iterdir():
        assert path.stat().st_size <= screenshots.LIMIT, path
        if path.suffix in (".png", ".jpg"):
            with Image.open(path) as image:
                image.verify()
        assert path.resolve() in named, f"{path} is shown nowhere"
    wanted = {f"attention_maps_{family}.jpg" for family in screenshots.ATTENTION_MAPS.values()}
    assert {path.name for path in folder.iterdir()} >= {"live.svg", "report.png", "first_batch.png", *wanted}
