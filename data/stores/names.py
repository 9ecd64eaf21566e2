"""Names of classes and files: their bytes, their form in messages, and names that look alike.

A name is text in which bytes that are not UTF-8 are lone surrogates, whatever the locale, so that any file name can be
hashed, stored and turned back into its bytes.
"""

import codecs
import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.stores.bounded_files import read_file

NAMED = 5  # names listed in an error
SHOWN = 200  # characters of a name in an error
MAX_TEXT = 1 << 26  # bytes of a list of classes
MAX_CLASSES = 1_000_000
INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060\u00ad\u200e\u200f"))
BYTE_ORDER_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def encode(name: str) -> bytes:
    """Return the bytes of a name."""
    return name.encode("utf-8", "surrogateescape")


def decode(data: bytes) -> str:
    """Return the name of some bytes, of which those that are not UTF-8 become surrogates."""
    return data.decode("utf-8", "surrogateescape")


def from_system(name: str) -> str:
    """Return a name that the operating system gave, in the same form under every locale."""
    return decode(os.fsencode(name))


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """Read a text file in UTF-8, with a byte order mark also in UTF-16 or UTF-32; other bytes become surrogates.

    ValueError for a file that cannot be read, is no text or has more than `limit` bytes; its message begins with the path.
    """
    try:
        data = read_file(path, limit)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); {remedy_of(error)}") from error
    return decode_text(data, str(path))


def decode_text(data: bytes, name: str) -> str:
    """Decode a text as `read_text` does; `name` stands for it in errors."""
    encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS if data.startswith(mark)), "")
    if not encoding and b"\0" in data:
        raise ValueError(f"{name} is no text in UTF-8: it holds bytes that are zero, as UTF-16 does; save it as UTF-8")
    try:
        return data.decode(encoding) if encoding else decode(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} begins as {encoding} but is not ({error.reason}); save it as UTF-8") from error


def remedy_of(error: OSError) -> str:
    """Return the remedy for a file or folder that cannot be read."""
    if isinstance(error, PermissionError):
        return "give the user of this process permission to read it, and to enter the folders above it"
    if isinstance(error, FileNotFoundError):
        return "see whether it was moved or its disk unmounted"
    return "see whether the storage is still there and whole"


def parse_json(text: str) -> object:
    """Return the value of a JSON text. ValueError for another text, or one nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def class_number(text: str | int) -> int:
    """Return the number of a class. ValueError unless it lies between 0 and MAX_CLASSES - 1."""
    number = int(text) if len(str(text)) < 20 else MAX_CLASSES
    if not 0 <= number < MAX_CLASSES:
        raise ValueError(f"{shown(str(text))} is no class number: these go from 0 to {MAX_CLASSES - 1}")
    return number


def shown(name: str) -> str:
    """Return a name for a message: as it is if a terminal shows all of it, else escaped and quoted; cut if it is long."""
    if len(name) > SHOWN:
        return f"{shown(name[:SHOWN])}... ({len(name)} characters)"
    return name if name.isprintable() and name == name.strip() and name else ascii(name)


def some(names: Sequence[str]) -> str:
    """Return the first few names and the number of the others, for a message."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(shown, names[:NAMED])) + more


def look(name: str) -> str:
    """Return a form that is equal for names that look alike: of one form of each character, width and space, without
    invisible characters and outer spaces.
    """
    return unicodedata.normalize("NFKC", name.translate(INVISIBLE)).strip()


def _same_but_foreign(name: str, other: str) -> bool:
    """Return True for names that differ only where one has a character beyond ASCII, as a Cyrillic a or a typographic hyphen."""
    pairs = list(zip(look(name).casefold(), look(other).casefold(), strict=False))
    same = [a == b for a, b in pairs]
    return len(look(name)) == len(look(other)) and any(same) and all(not (a + b).isascii() for a, b in pairs if a != b)


def lookalikes(names: Iterable[str]) -> list[list[str]]:
    """Return groups of different names that look alike."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(look(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def lookalike_notes(where: str, names: Iterable[str]) -> list[str]:
    """Return a warning for classes whose names look alike, if there are any."""
    groups = lookalikes(names)
    if not groups:
        return []
    first = " and ".join(map(ascii, groups[0]))
    more = f", and {len(groups) - 1} more such groups" if len(groups) > 1 else ""
    return [f"{where} has classes with names that look alike: {first}{more}; are they one class?"]


def check_classes(
    name: str | Path, noun: str, present: Sequence[str], classes: Sequence[str], must_hold_all: bool
) -> None:
    """Raise ValueError for present classes that are not in `classes`, and, with `must_hold_all`, for missing ones."""
    unknown = sorted(set(present) - set(classes))
    if unknown:
        near = _near(unknown, classes)
        remedy = "give what is one class one name; " if "(there is" in near else ""
        raise ValueError(
            f"{name} has {len(unknown)} {noun} that are not among the {len(classes)} classes: {near}; {remedy}"
            "add their images to train/ (and their names to DATA.CLASS_INDEX if one is set), or move what is no class "
            f"elsewhere (the classes are {some(classes)})"
        )
    missing = sorted(set(classes) - set(present))
    if missing and must_hold_all:
        one = {"class folders": "folder", "classes": "image"}[noun]
        raise ValueError(
            f"{name} has no {one} for {len(missing)} of the {len(classes)} classes: {_near(missing, present)}; "
            "add their images, or take them out of DATA.CLASS_INDEX"
        )


def _near(names: Sequence[str], others: Sequence[str]) -> str:
    """Return the first few names, each with one of the others that looks the same or differs in case only."""
    alike = {look(other): other for other in others}
    folded = {look(other).casefold(): other for other in others}
    near = {name: alike.get(look(name)) or folded.get(look(name).casefold()) for name in names}
    for name in [name for name in names if near[name] is None][:NAMED]:
        near[name] = next((other for other in others if _same_but_foreign(name, other)), None)
    first = sorted(names, key=lambda name: near[name] is None)[:NAMED]
    parts = [f"{name!a} (there is {near[name]!a})" if near[name] else shown(name) for name in first]
    return ", ".join(parts) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def check_numbers(name: str | Path, found: Sequence[int], classes: Sequence[str]) -> None:
    """Raise ValueError for class numbers that are not those of `classes`."""
    if max(found) >= len(classes):
        hint = f"; they begin at {min(found)}: write them again from 0" if min(found) else ""
        raise ValueError(
            f"{name} has images of class number {max(found)}, but there are {len(classes)} classes (from 0){hint}; "
            "see whether DATA.CLASS_INDEX, or the numbers with the images, are those of another data set"
        )


def number_gaps(name: str | Path, found: Sequence[int]) -> str:
    """Return the message for class numbers, without names, that are not 0, 1, ... without a gap; "" if they are."""
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if not missing:
        return ""
    if len(missing) == min(found):
        return (
            f"{name}: its class numbers begin at {min(found)}, but labels begin at 0; write the shards again with numbers "
            "from 0"
        )
    return (
        f"{name} has no image of {len(missing)} of the class numbers 0 .. {max(found)}: {some(list(map(str, missing)))}; "
        "write the shards again with numbers without gaps, or set DATA.CLASS_INDEX to the names of all classes"
    )
