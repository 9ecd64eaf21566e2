"""Members of a tar or an uncompressed zip: path, offset and length of every file, so that it can be read in place.

Both are read with stdlib's parsers from windows of a file, filled with `os.pread`; a tar inside a tar is a window, too.
"""

import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from data.stores.image_files import SUFFIXES
from data.stores.names import decode, remedy_of

TAR, ZIP = ".tar", ".zip"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
CHUNK = 1 << 20  # bytes read at a time in search of data after the end mark of a tar
UTF8_FLAG = 0x800  # of a zip member: its name is UTF-8
UNIX = 3  # system that a zip member was written on
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, lengths of its name and extra field


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
    """File-like view of a piece of an open file, read with os.pread."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self.fd, self.start, self.size, self.at = fd, start, size, 0

    def read(self, count: int = -1) -> bytes:
        """Read up to `count` bytes from the current position; all that are left for -1."""
        left = max(0, self.size - self.at)
        count = left if count < 0 else min(count, left)
        data = os.pread(self.fd, count, self.start + self.at)
        self.at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position; return it."""
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        """Return the position."""
        return self.at

    def seekable(self) -> bool:
        """Return True."""
        return True


def list_archive(path: Path, start: int = 0, size: int | None = None, inner: str = "") -> Contents:
    """List the files of an archive, or of the tar `inner` at byte `start` of it. ValueError if it cannot be used."""
    name = f"{path}:{inner}" if inner else str(path)
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{name} cannot be opened ({error.strerror}); {remedy_of(error)}") from error
    try:
        window = Window(fd, start, os.fstat(fd).st_size - start if size is None else size)
        zipped = path.name.lower().endswith(ZIP) and not inner
        contents = _zip_contents(window, name) if zipped else _tar_contents(window, name)
        return replace(contents, members=_with_slashes(contents.members))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OverflowError) as error:
        raise ValueError(
            f"{name} cannot be read ({error}); it is damaged, or no {path.suffix[1:]} file: copy it again and compare checksums"
        ) from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror}); {remedy_of(error)}") from error
    finally:
        os.close(fd)


def _with_slashes(members: list[Member]) -> list[Member]:
    """Return the members with / between folders, also where some programs for Windows have written a backslash."""
    if any("/" in member.path for member in members):
        return members
    return [member._replace(path=member.path.replace("\\", "/")) for member in members]


def _tar_contents(window: Window, name: str) -> Contents:
    members: list[Member] = []
    links: list[str] = []
    if window.read(2) == b"\x1f\x8b":
        raise ValueError(f"{name} is compressed; unpack it with gunzip, images are read from a tar in place")
    window.seek(0)
    with tarfile.open(fileobj=window, mode="r:", errorlevel=0, encoding="utf-8") as tar:  # type: ignore[call-overload]
        while (info := tar.next()) is not None:
            tar.members = []  # TarFile would keep every member in memory
            unusable = info.issparse() or info.islnk() or info.issym()
            if unusable and info.name.lower().endswith(SUFFIXES):
                kind = "sparse" if info.issparse() else "a link"
                raise ValueError(
                    f"{name} holds {info.name}, which is {kind}; write the tar again with --hard-dereference --dereference"
                )
            if unusable:
                links.append(info.name)
            if info.isfile() and not unusable:
                members.append(Member(info.name, window.start + info.offset_data, info.size))
        end = tar.offset
    window.seek(end)
    block = window.read(tarfile.BLOCKSIZE)
    if block and block.strip(b"\0"):
        raise ValueError(f"{name} is damaged at byte {end}: no file begins there; copy it again and compare checksums")
    if (more := _after_zeros(window)) is not None:
        raise ValueError(
            f"{name} goes on after its end mark, at byte {more}: two tars joined? Join them with tar -A, not with cat"
        )
    if members and members[-1].offset + members[-1].size > window.start + window.size:
        raise ValueError(f"{name} ends within {members[-1].path}; it was cut off: copy it again and compare checksums")
    cut = (
        [] if len(block) == tarfile.BLOCKSIZE else [f"{name} has no end mark after {len(members)} files; is it whole?"]
    )
    return Contents(members, cut, links)


def _after_zeros(window: Window) -> int | None:
    """Return the position of the first nonzero block at or after the current position; None if there is none."""
    while chunk := window.read(CHUNK):
        if rest := chunk.lstrip(b"\0"):
            at = window.tell() - len(rest)
            return at - at % tarfile.BLOCKSIZE
    return None


def _zip_contents(window: Window, name: str) -> Contents:
    with zipfile.ZipFile(window) as archive:
        infos = [info for info in archive.infolist() if not info.filename.endswith(("/", "\\"))]
    links = [info.filename for info in infos if stat.S_ISLNK(info.external_attr >> 16)]
    if image := next((link for link in links if link.lower().endswith(SUFFIXES)), None):
        raise ValueError(f"{name} holds {image}, which is a link; write the zip again without -y")
    infos = [info for info in infos if not stat.S_ISLNK(info.external_attr >> 16)]
    packed = [info for info in infos if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1]
    if packed:
        kind = "encrypted" if packed[0].flag_bits & 1 else "compressed"
        raise ValueError(
            f"{name} holds {len(packed)} {kind} files of {len(infos)}, {packed[0].filename} the first; images are read from "
            "a zip in place: write it again without compression, zip -0 -r"
        )
    return Contents(list(_zip_members(window, infos)), links=links)


def _zip_members(window: Window, infos: Sequence[zipfile.ZipInfo]) -> Iterator[Member]:
    for info in infos:
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
