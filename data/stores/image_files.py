"""Image files, known by suffix or first bytes, and the count of the files and folders that are passed over.

A file with a suffix of SUFFIXES is taken for an image without being opened. A file with another suffix, or none, is one
if its first bytes are those of a format with such a suffix, so that `1.jfif` or `1` is read like `1.jpg`.
"""

import re
import struct
from collections.abc import Callable

from data.stores.names import shown

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
# Never opened in search of an image, since large data sets hold one for each image.
OTHER_SUFFIXES = (".txt", ".csv", ".xml", ".json", ".cls", ".npy", ".mat", ".md", ".html", ".py", ".sh", ".tar", ".zip")
HEAD = 32  # bytes that tell the format
NAMED = 3  # examples of what is passed over for a reason

IMAGE = "images"
SYSTEM = "system files or folders"
HIDDEN = "hidden files or folders"
OTHER = "files that are no images"
SPECIAL = "pipes, sockets or devices"
BESIDE = "images outside the class folders"
COPIES = "backups or unfinished downloads"
UNREAD = "images in formats that are not read"
UNOPENED = "files that cannot be opened"
LINKS = "links in an archive"
SINGULAR = {
    SYSTEM: "system file or folder",
    HIDDEN: "hidden file or folder",
    OTHER: "file that is no image",
    SPECIAL: "pipe, socket or device",
    BESIDE: "image outside the class folders",
    COPIES: "backup or unfinished download",
    UNREAD: "image in a format that is not read",
    UNOPENED: "file that cannot be opened",
    LINKS: "link in an archive",
}
DEFECTS = (BESIDE, COPIES, UNREAD, UNOPENED, LINKS)  # images may have been lost

SYSTEM_NAMES = frozenset(
    (
        *("__macosx", ".ds_store", ".appledouble", ".spotlight-v100", ".trashes", ".fseventsd", "icon\r"),  # macOS
        *(".localized", ".temporaryitems", ".documentrevisions-v100", ".volumeicon.icns", ".apdisk"),
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
        *("$recycle.bin", "recycler", "system volume information"),
        *("@eadir", "#recycle", "#snapshot", "@tmp", "@recycle", ".@__thumb", "@recently-snapshot"),  # Synology, QNAP
        *(".ipynb_checkpoints", "__pycache__"),  # Jupyter, Python
        *("lost+found", ".directory", ".thumbnails", ".snapshot"),  # Linux, KDE, NetApp
    )
)
SYSTEM_PREFIXES = ("._", ".trash-", ".nfs", ".fuse_hidden", ".smbdelete")
COPY_SUFFIXES = ("~", ".bak", ".orig", ".old", ".tmp", ".part", ".partial", ".crdownload", ".download", ".filepart")
FOREIGN_SUFFIXES = (".tga", ".icns", ".dcm", ".svgz")  # of formats whose first bytes do not tell them
RAW_SUFFIXES = (".cr2", ".nef", ".nrw", ".arw", ".dng", ".orf", ".rw2", ".pef", ".srw", ".3fr", ".iiq")  # begin as TIFF
BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # lengths
BEGINNINGS = {  # of Pillow's formats
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
PNM = re.compile(rb"P[1-6]\s+[\d#]")
UNREAD_HEADS = (
    *(b"8BPS", b"\0\0\0\x0cjP  ", b"\0\0\0\x0cJXL ", b"\xff\x0a", b"\xff\x4f\xff\x51", b"\x76\x2f\x31\x01"),
    *(
        b"II\xbc\x01",
        b"BPG\xfb",
        b"qoif",
        b"DDS ",
        b"\0\0\1\0",
        b"\0\0\2\0",
        b"\x0a\x05\x01\x08",
        b"SIMPLE  =",
        b"#?RADIANCE",
    ),
    *(b"%!PS-Adobe", b"<svg", b"PF\n", b"Pf\n"),
)


def ignored(lowered: str) -> str | None:
    """Return why a file or folder is passed over by its name alone, given in lower case; None if it is not."""
    if lowered in SYSTEM_NAMES or lowered.startswith(SYSTEM_PREFIXES):
        return SYSTEM
    return HIDDEN if lowered.startswith(".") else None


def kind_of_file(lowered: str, head: Callable[[], bytes]) -> str:
    """Return IMAGE, or why a file is passed over; `head`, which returns its first bytes, is called only for a rare suffix.

    `lowered` is its name in lower case.
    """
    if lowered.endswith(SUFFIXES):
        return IMAGE
    if lowered.endswith(OTHER_SUFFIXES):
        return OTHER
    if lowered.endswith(FOREIGN_SUFFIXES):
        return UNREAD
    try:
        first = head()
    except OSError:
        return UNOPENED
    kind = _kind_of_bytes(first)
    if kind == IMAGE and lowered.endswith(RAW_SUFFIXES):
        return UNREAD
    return COPIES if kind == IMAGE and lowered.endswith(COPY_SUFFIXES) else kind


def format_of(head: bytes) -> str:
    """Return Pillow's name of the format of a file of images, known by its first bytes; "" for any format that is not read."""
    for form, beginnings in BEGINNINGS.items():
        if head.startswith(beginnings):
            return form
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if PNM.match(head):
        return "PPM"
    if head[:2] == b"BM" and len(head) >= 18 and struct.unpack_from("<I", head, 14)[0] in BMP_HEADERS:
        return "BMP"
    return ""


def is_unread(head: bytes) -> bool:
    """Return True for the first bytes of an image in a format that is not read."""
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis", b"crx "):
        return True
    return head.startswith(UNREAD_HEADS)


def _kind_of_bytes(head: bytes) -> str:
    return IMAGE if format_of(head) else UNREAD if is_unread(head) else OTHER


class PassedOver:
    """Numbers and examples of the files and folders that are passed over, by reason."""

    def __init__(self, found: dict[str, tuple[int, list[str]]] | None = None) -> None:
        self.found = found or {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count a file or folder; of a reason's names, the first in alphabetical order are kept."""
        total, names = self.found.get(reason, (0, []))
        if name not in names and (len(names) < NAMED or name < names[-1]):
            names = sorted([*names, name])[:NAMED]
        self.found[reason] = (total + count, names)

    def merge(self, other: "PassedOver") -> None:
        """Add the counts of another."""
        for reason, (count, names) in other.found.items():
            for i, name in enumerate(names):
                self.add(reason, name, count if i == 0 else 0)

    def text(self, reasons: tuple[str, ...] = ()) -> str:
        """Return numbers and examples, those of the given reasons only if there are any; "" for nothing."""
        return ", ".join(
            f"{count} {SINGULAR[reason] if count == 1 else reason} ({', '.join(map(shown, names))}{', ...' if count > len(names) else ''})"
            for reason, (count, names) in sorted(self.found.items())
            if not reasons or reason in reasons
        )
