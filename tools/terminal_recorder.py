"""Recording of a program's output on a pseudo-terminal, and drawing of its screen at any moment.

Only the control codes that rich writes are interpreted: colours, carriage return, line feed, cursor up, erase line.
"""

import errno
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.ansi import AnsiDecoder
from rich.console import Console

from common.text import shorten

PIECE = re.compile(r"(\x1b\[\?[0-9;]*[hl])|\x1b\[(\d*)([AK])|(\r)|(\n)|((?:\x1b\[[0-9;]*m|[^\x1b\r\n])+)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
FONT = re.compile(r"@font-face \{[^}]*\}\s*")  # rich's SVGs load a font from a server


class RecordedScreen:
    """Lines on a terminal's screen, with their colours."""

    def __init__(self) -> None:
        self.lines, self.row = [""], 0

    def feed(self, output: str) -> None:
        """Process a part of the output; it must not end within a control code."""
        for _, number, move, _, feed, text in (match.groups(default="") for match in PIECE.finditer(output)):
            if text:
                self.lines[self.row] += text
            elif feed:
                self.row += 1
                self.lines += [""] * (self.row == len(self.lines))
            elif move == "A":
                self.row = max(self.row - int(number or 1), 0)
            elif move == "K":
                self.lines[self.row] = ""

    @property
    def plain(self) -> list[str]:
        """Lines without colours, up to the last one with text."""
        return [COLOUR.sub("", line).rstrip() for line in self._shown]

    @property
    def _shown(self) -> list[str]:
        last = max((i for i, line in enumerate(self.lines) if COLOUR.sub("", line).strip()), default=-1)
        return self.lines[: last + 1]

    def svg(self, columns: int, rows: int, title: str) -> str:
        """Return an SVG of a terminal window with the last `rows` lines, long ones wrapped."""
        console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
        lines = [line for text in AnsiDecoder().decode("\n".join(self._shown)) for line in text.wrap(console, columns)]
        for line in lines[-rows:]:
            console.print(line)
        console.file.close()
        return FONT.sub("", console.export_svg(title=title))


def record(argv: Sequence[str], out: Path, columns: int, rows: int, env: Mapping[str, str]) -> int:
    """Run a program on a pseudo-terminal of this size; write its output to `out` and return its exit status."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    unset = {"COLUMNS", "LINES", "NO_COLOR"}
    environment = {key: value for key, value in env.items() if key not in unset} | {"TERM": "xterm-256color"}
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    with out.open("wb") as file:
        while True:
            try:
                piece = os.read(ours, 1 << 16)
            except OSError as error:
                if error.errno != errno.EIO:  # Linux's error when the other end is closed
                    raise
                piece = b""
            if not piece:
                break
            file.write(piece)
    os.close(ours)
    return process.wait()


def screen_when(output: str, end: str, wanted: Callable[[str], bool]) -> RecordedScreen:
    """Return the first screen after a write of `end` for whose text `wanted` is true; the last screen if there is none.

    Raises ValueError if `end` was never written.
    """
    screen, found = RecordedScreen(), False
    parts = output.split(end)
    for part in parts[:-1]:
        screen.feed(part + end)
        found = True
        if wanted("\n".join(screen.plain)):
            return screen
    if not found:
        raise ValueError(f"the output never shows {shorten(end)}")
    return screen
