"""Text with names of files and classes, which may hold bytes that are not UTF-8: Python keeps them as lone surrogates.

Text files are written and read in UTF-8 with errors="surrogateescape", so that the bytes survive; JSON escapes them itself.
"""

import io
import os
import sys


def readable(text: str) -> str:
    """Return a text in valid Unicode: bytes that are not UTF-8 escaped, as \\xe9, and those that are, decoded."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def for_system(text: str) -> str:
    """Return a text as file functions take it in any locale: in a C locale each byte beyond ASCII is a surrogate."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def allow_any_text() -> None:
    """Let stdout and stderr escape characters that their encoding lacks, as an ASCII terminal's, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
