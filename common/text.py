"""Text with names of files and classes: any bytes, and characters that steer a terminal or forge a line.

Python keeps bytes that are not UTF-8 as lone surrogates. Text files are written and read in UTF-8 with
errors="surrogateescape", so that the bytes survive; JSON escapes them itself.
"""

import io
import os
import re
import reprlib
import sys

LONGEST = 300  # characters of a value in an error message
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = LONGEST
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxtuple, _BRIEF.maxdict, _BRIEF.maxset = 3, 8, 8, 8, 8
# Python refuses to print numbers of thousands of digits.
_BRIEF.repr_int = lambda x, level: repr(x) if x.bit_length() <= 512 else f"a number of {x.bit_length()} bits"  # type: ignore[method-assign]

# Control characters (C0, DEL, C1), separators of lines, controls of the writing direction, and surrogates that are no bytes.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udc7f\udd00-\udfff]")


def escape_controls(text: str) -> str:
    """Return a text as one line: control characters escaped, as \\x1b; bytes that are not UTF-8 stay."""
    return _CONTROLS.sub(
        _escape, _CONTROLS.sub(_escape, text).encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    )


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def readable(text: str) -> str:
    """Return a text as one line of valid Unicode: control characters and bytes that are not UTF-8 escaped, as \\xe9."""
    return escape_controls(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def readable_lines(text: str) -> str:
    """Return a text of several lines, each `readable`."""
    return "\n".join(map(readable, text.split("\n")))


def for_system(text: str) -> str:
    """Return a text as file functions take it in any locale: in a C locale each byte beyond ASCII is a surrogate."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def allow_any_text() -> None:
    """Let stdout and stderr escape characters that their encoding lacks, as an ASCII terminal's, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def cut(text: str, length: int = LONGEST) -> str:
    """Return a text for an error message: of a longer one its beginning and its end."""
    return text if len(text) <= length else f"{text[: length * 2 // 3]} ... {text[-(length // 3) :]}"


def shorten(value: object) -> str:
    """Return the `repr` of a value for an error message, cut where it is long; its time does not grow with the value."""
    return cut(_BRIEF.repr(value), LONGEST + 10)
