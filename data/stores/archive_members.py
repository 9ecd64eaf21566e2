"""Members of a tar or an uncompressed zip: path, offset and length of every file, so that it can be read in place.

Both are read with stdlib's parsers from windows of a file, filled with `os.pread`; a tar inside a tar is a window, too.
"""

import errno
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.stores.bounded_files import open_file
from data.stores.image_files import SUFFIXES
from data.stores.names import decode, remedy_of, shown

TAR, ZIP = ".tar", ".zip"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
CHUNK = 1 << 20  # bytes read at a time in search of data after the end mark of a tar
MAX_HEADER = 1 << 24  # bytes of a header of a tar, names and PAX records included
MAX_DIRECTORY = 1 << 31  # bytes of the directory of a zip: those of 15 million images
UTF8_FLAG = 0x800  # of a zip member: its name is UTF-8
UNIX = 3  # system that a zip member was written on
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, lengths of its name and extra field


class ArchiveError(ValueError):
    """An archive that cannot be used, with the reason and the remedy."""


class Member(NamedTuple):
    """A file in an archive: its path, and offset and length of its bytes in the archive."""

    path: str
    offset: int
    size: int


@dataclass
class Contents:
    """Files of an archive, links that are passed over, and defects that do not prevent its use."""

    members: list[Member]
    problems: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


class Window:
    """File-like view of a piece of an open file, read with os.pread, at most `most` bytes at a time."""

    def __init__(self, fd: int, start: int, size: int, most: int) -> None:
        self.fd, self.start, self.size, self.most, self.at = fd, start, size, most, 0

    def read(self, count: int = -1) -> bytes:
        """Read up to `count` bytes from the current position; all that are left for -1. ValueError for more than `most`."""
        left = max(0, self.size - self.at)
        count = left if count < 0 else min(count, left)
        if count > self.most:
            raise ValueError(f"a header or directory of {count:,} bytes, more than {self.most:,}")
        data = os.pread(self.fd, count, self.start + self.at)
        self.at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position; return it."""
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def skip_hole(self) -> None:
        """Move to the next data of a sparse file, and to its end if there are none."""
        try:
            self.at = os.lseek(self.fd, self.start + self.at, os.SEEK_DATA) - self.start
        except OSError as error:
            if error.errno == errno.ENXIO:
                self.at = self.size

    def tell(self) -> int:
        """Return the position."""
        return self.at

    def seekable(self) -> bool:
        """Return True."""
        return True


def list_archive(path: Path, start: int = 0, size: int | None = None, inner: str = "") -> Contents:
    """List the files of an archive, or of the tar `inner` at byte `start` of it. ValueError if it cannot be used."""
    name = f"{path}:{shown(inner)}" if inner else str(path)
    try:
        fd = open_file(path)
    except OSError as error:
        raise ValueError(f"{name} cannot be opened ({error.strerror}); {remedy_of(error)}") from error
    try:
        whole = os.fstat(fd).st_size - start
        zipped = path.name.lower().endswith(ZIP) and not inner
        window = Window(fd, start, whole if size is None else min(size, whole), MAX_DIRECTORY if zipped else MAX_HEADER)
        contents = _zip_contents(window, name) if zipped else _tar_contents(window, name)
        _check_places(contents.members, window)
        return replace(contents, members=_with_slashes(contents.members))
    except ArchiveError:
        raise
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror or error}); {remedy_of(error)}") from error
    except Exception as error:  # tarfile and zipfile raise many kinds of errors for damaged files
        raise ValueError(
            f"{name} cannot be read ({shown(str(error) or type(error).__name__)}); it is damaged, or no {path.suffix[1:]} file: "
            "copy it again and compare checksums"
        ) from error
    finally:
        os.close(fd)


def _check_places(members: Sequence[Member], window: Window) -> None:
    """Raise ValueError for a file that does not lie in the archive, and for one that overlaps another."""
    end = window.start + window.size
    outside = next((m for m in members if m.offset < window.start or m.size < 0 or m.offset + m.size > end), None)
    if outside:
        raise ValueError(f"{shown(outside.path)} would have {outside.size} bytes from byte {outside.offset} on")
    offsets, sizes = (np.array([member[i] for member in members], dtype=np.int64) for i in (1, 2))
    order = np.lexsort((sizes, offsets))
    over = np.flatnonzero(offsets[order][:-1] + sizes[order][:-1] > offsets[order][1:])
    if len(over):
        path, other = (members[int(order[over[0] + i])].path for i in (0, 1))
        raise ValueError(f"{shown(path)} and {shown(other)} overlap")


def _with_slashes(members: list[Member]) -> list[Member]:
    """Return the members with / between folders, also where some programs for Windows have written a backslash."""
    if any("/" in member.path for member in members):
        return members
    return [member._replace(path=member.path.replace("\\", "/")) for member in members]


def _tar_contents(window: Window, name: str) -> Contents:
    members: list[Member] = []
    links: list[str] = []
    if window.read(2) == b"\x1f\x8b":
        raise ArchiveError(f"{name} is compressed; unpack it with gunzip, images are read from a tar in place")
    window.seek(0)
    with tarfile.open(fileobj=window, mode="r:", errorlevel=0, encoding="utf-8") as tar:  # type: ignore[call-overload]
        before = -1
        while (info := tar.next()) is not None:
            tar.members = []  # TarFile would keep every member in memory
            if tar.offset <= before or info.size < 0:
                raise ValueError(f"{shown(info.name)} would have {info.size} bytes")
            before = tar.offset
            unusable = info.issparse() or info.islnk() or info.issym()
            if unusable and info.name.lower().endswith(SUFFIXES):
                kind = "sparse" if info.issparse() else "a link"
                raise ArchiveError(
                    f"{name} holds {shown(info.name)}, which is {kind}; write the tar again with --hard-dereference --dereference"
                )
            if unusable:
                links.append(info.name)
            if info.isfile() and not unusable:
                members.append(Member(info.name, window.start + info.offset_data, info.size))
        end = tar.offset
    window.seek(end)
    block = window.read(tarfile.BLOCKSIZE)
    if block and block.strip(b"\0"):
        raise ArchiveError(
            f"{name} is damaged at byte {end}: no file begins there; copy it again and compare checksums"
        )
    if (more := _after_zeros(window)) is not None:
        raise ArchiveError(
            f"{name} goes on after its end mark, at byte {more}: two tars joined? Join them with tar -A, not with cat"
        )
    if members and members[-1].offset + members[-1].size > window.start + window.size:
        raise ArchiveError(
            f"{name} ends within {shown(members[-1].path)}; it was cut off: copy it again and compare checksums"
        )
    cut = (
        [] if len(block) == tarfile.BLOCKSIZE else [f"{name} has no end mark after {len(members)} files; is it whole?"]
    )
    return Contents(members, cut, links)


def _after_zeros(window: Window) -> int | None:
    """Return the position of the first nonzero block at or after the current position; None if there is none."""
    while True:
        window.skip_hole()
        if not (chunk := window.read(CHUNK)):
            return None
        if rest := chunk.lstrip(b"\0"):
            at = window.tell() - len(rest)
            return at - at % tarfile.BLOCKSIZE


def _zip_contents(window: Window, name: str) -> Contents:
    with zipfile.ZipFile(window) as archive:
        infos = [info for info in archive.infolist() if not info.filename.endswith(("/", "\\"))]
    links = [info.filename for info in infos if stat.S_ISLNK(info.external_attr >> 16)]
    if image := next((link for link in links if link.lower().endswith(SUFFIXES)), None):
        raise ArchiveError(f"{name} holds {shown(image)}, which is a link; write the zip again without -y")
    infos = [info for info in infos if not stat.S_ISLNK(info.external_attr >> 16)]
    packed = [info for info in infos if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1]
    if packed:
        kind = "encrypted" if packed[0].flag_bits & 1 else "compressed"
        raise ArchiveError(
            f"{name} holds {len(packed)} {kind} files of {len(infos)}, {shown(packed[0].filename)} the first; images are read from "
            "a zip in place: write it again without compression, zip -0 -r"
        )
    return Contents(list(_zip_members(window, infos)), links=links)


def _zip_members(window: Window, infos: Sequence[zipfile.ZipInfo]) -> Iterator[Member]:
    for info in infos:
        if info.header_offset < 0 or info.compress_size != info.file_size:
            raise zipfile.BadZipFile(f"{shown(info.filename)} has {info.compress_size} bytes, or {info.file_size}")
        window.seek(info.header_offset)
        header = window.read(LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise zipfile.BadZipFile(f"no file begins at byte {info.header_offset}")
        _, name_length, extra_length = LOCAL_HEADER.unpack(header)
        yield Member(
            _zip_name(info), info.header_offset + LOCAL_HEADER.size + name_length + extra_length, info.file_size
        )


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return the path of a zip member; names that are not marked as UTF-8, which zipfile takes for cp437, may be so or be bytes."""
    if info.flag_bits & UTF8_FLAG:
        return info.filename
    data = info.filename.encode("cp437")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return decode(data) if info.create_system == UNIX else info.filename
