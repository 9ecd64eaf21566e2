"""Kinds of files by their first bytes, so that a file that holds no weights is refused by its real name.

Downloads that went wrong (a web page, a Git LFS pointer, half a file), archives, and the weights of other programs.
"""

import codecs
import re
import struct
import zipfile
from pathlib import Path
from typing import IO

PICKLED_BY_TORCH = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # the number that older torch files begin with
HEAD = 4096  # bytes that are read to tell the kind
MAX_HEADER = 16 << 20  # bytes of a safetensors header; 10,000 tensors take 1 MB
MAX_DIRECTORY = 8 << 20  # bytes of an archive's directory; 10,000 tensors take 1 MB
SHOWN = 4  # names listed in an error
TORCH, SAFETENSORS = "a torch file", "a safetensors file"
AGAIN = "download it again"
UNPACK = "unpack it first"
OTHER_PROGRAM = "convert it with its own program to safetensors"
NO_WEIGHTS = "name the file with the weights"

# First bytes, what the file is, the remedy.
MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself", "run git lfs pull"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself", "run git annex get"),
    (b"\x1f\x8b", "gzip", UNPACK),
    (b"BZh", "bzip2", UNPACK),
    (b"\xfd7zXZ\x00", "xz", UNPACK),
    (b"\x28\xb5\x2f\xfd", "zstd", UNPACK),
    (b"\x04\x22\x4d\x18", "lz4", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", UNPACK),
    (b"\x93NUMPY", "a NumPy array (.npy)", "save tensors by name, with safetensors or torch.save"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes", OTHER_PROGRAM),
    (b"GGUF", "a GGUF file", OTHER_PROGRAM),
    (b"PAR1", "a parquet table", NO_WEIGHTS),
    (b"SQLite format 3\x00", "an SQLite database", NO_WEIGHTS),
    (b"%PDF", "a PDF document", NO_WEIGHTS),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", NO_WEIGHTS),
    (b"\xff\xd8\xff", "a JPEG image", NO_WEIGHTS),
    (b"GIF8", "a GIF image", NO_WEIGHTS),
    (b"RIFF", "a RIFF file, such as a WebP image", NO_WEIGHTS),
    (b"\x7fELF", "a program or library (ELF)", NO_WEIGHTS),
    (b"MZ\x90\x00", "a Windows program", NO_WEIGHTS),
)
# Name of an entry in a zip archive, what the archive is, the remedy.
ZIP_ENTRIES: tuple[tuple[str, str, str], ...] = (
    (r"(.*/)?constants\.pkl", "a TorchScript program", "save the model's state_dict() instead"),
    (
        r"(.*/)?(archive_format|serialized_exported_program\.json)",
        "a torch.export program",
        "give the checkpoint it is of",
    ),
    (r"(.*/)?data\.pkl", TORCH, ""),
    (r".*\.npy", "a NumPy archive (.npz)", "save its arrays as tensors, with safetensors or torch.save"),
    (r"model\.weights\.h5", "a Keras model", OTHER_PROGRAM),
    (r"\[Content_Types\]\.xml", "an Office document", NO_WEIGHTS),
    (r".*\.(pth|pt|ckpt|bin|safetensors)", "a zip archive of other files", UNPACK),
)


class BoundedReads:
    """File whose single reads are bounded: zipfile reads a whole directory at once."""

    def __init__(self, file: IO[bytes]):
        self.tell, self.seek, self._read = file.tell, file.seek, file.read

    def read(self, count: int = -1) -> bytes:
        """Return bytes. Raises ValueError for too many."""
        data = self._read(count if 0 <= count <= MAX_DIRECTORY else MAX_DIRECTORY + 1)
        if len(data) > MAX_DIRECTORY:
            raise ValueError(f"the directory of its archive has more than {MAX_DIRECTORY:,} bytes")
        return data

    def seekable(self) -> bool:
        """Return True."""
        return True


def find_weights(given: Path) -> Path:
    """Return the path of a file of weights, with ~ expanded.

    Raises ValueError with the remedy for an address, a folder, a missing file and one without content.
    """
    if not given.exists() and re.match(r"[A-Za-z][\w+.-]+:", str(given)):
        address = re.sub(r"^(\w+):/(?=[^/])", r"\1://", str(given))  # Path has merged the slashes
        raise ValueError(
            f"checkpoint {address} is an address, not a file; download it first, then give the file's path"
        )
    try:
        path = given.expanduser()
    except RuntimeError as error:
        raise ValueError(f"checkpoint {given} does not exist: there is no such user; give the whole path") from error
    if path.is_dir():
        raise ValueError(f"checkpoint {path} is a folder, name a file{_nearby(path / '*')}")
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist{_nearby(path)}")
    if not path.is_file():
        raise ValueError(f"checkpoint {path} is no regular file; name a file{_nearby(path)}")
    return path


def is_safetensors(path: Path) -> bool:
    """Return True for a safetensors file, False for one that torch may read.

    Raises ValueError naming the kind of any other file, of a truncated one, and of one that is named as the other kind.
    """
    try:
        kind, remedy = kind_of(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); is the file yours, and the disk there?") from error
    named = path.suffix.lower() == ".safetensors"
    if kind == TORCH and named:
        raise ValueError(f"{path} is a torch file named .safetensors; rename it to .pth")
    if kind == SAFETENSORS and path.suffix and not named:
        raise ValueError(f"{path} is a safetensors file named {path.suffix}; rename it to .safetensors")
    if kind not in (TORCH, SAFETENSORS, ""):
        raise ValueError(f"{path} holds no weights: it is {kind}; {remedy}")
    if not kind and named:
        raise ValueError(
            f"{path} is damaged or not a safetensors file: it begins with no header; use another checkpoint"
        )
    return kind == SAFETENSORS


def kind_of(path: Path) -> tuple[str, str]:
    """Return the kind of a file, TORCH, SAFETENSORS or another with the remedy; "" for an unknown one. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    size = path.stat().st_size
    if not head:
        return "empty", f"the disk was full or a download stopped: {AGAIN}"
    if not head.strip(b"\0"):
        return "damaged: it begins with zeros only, as after a crash or on a full disk", AGAIN
    if found := _safetensors_kind(head, size):  # first: its length may begin as others do
        return found
    for magic, kind, remedy in MAGIC:
        if head.startswith(magic):
            return kind, remedy
    if head.startswith(b"PK"):
        return _zip_kind(path)
    if head[0] == 0x80 and len(head) > 1 and head[1] <= 5:  # a pickle
        if PICKLED_BY_TORCH in head[:40]:
            return TORCH, ""  # the format before torch 1.6
        return "a pickle of other Python objects, not of torch.save", "save a dictionary of tensors with torch.save"
    if head[257:262] == b"ustar":
        return "a tar archive", UNPACK
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model", OTHER_PROGRAM
    return _text_kind(head) or _onnx_kind(head)


def _zip_kind(path: Path) -> tuple[str, str]:
    """Return the kind of a file that begins as a zip archive does; torch files are zip archives."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(BoundedReads(file)) as archive:
            names = archive.namelist()
    except OSError:
        raise
    except Exception:  # zipfile raises many kinds of errors for damaged archives
        return "damaged: the end of its zip archive is missing, as after a download or copy that stopped", AGAIN
    for pattern, kind, remedy in ZIP_ENTRIES:
        if any(re.fullmatch(pattern, name) for name in names):
            return kind, remedy
    shown = ", ".join(ascii(name)[1:-1] for name in names[:SHOWN]) or "nothing"
    return f"a zip archive, not one of torch (it holds {shown})", NO_WEIGHTS


def _safetensors_kind(head: bytes, size: int) -> tuple[str, str] | None:
    """Return SAFETENSORS for its length and header, None for anything else."""
    if len(head) < 9 or head[8:9] != b"{":
        return None
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER:
        known = head[9:].lstrip()[:1] == b'"' and length < size
        return ("damaged: a safetensors file whose header is too large", "use another checkpoint") if known else None
    if 8 + length > size:
        return "damaged: a safetensors file cut off in its header, as after a download or copy that stopped", AGAIN
    return SAFETENSORS, ""


def _text_kind(head: bytes) -> tuple[str, str] | None:
    """Return the kind of a text, None for a file that is none."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if re.match(rb"<(!doctype html|html|head|body|!--|script)", start):
        return "an HTML page, not the file itself", f"{AGAIN}, from the address of the file and not of its page"
    if start.startswith((b"<?xml", b"<error")):
        return "an XML text, such as a server's error message", f"{AGAIN}: the server may have refused it"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "a text in UTF-16", NO_WEIGHTS
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # the head may end within a character
    except UnicodeDecodeError:
        return None
    if any(ord(character) < 32 and character not in "\t\n\r\f\v\x1b" for character in text):
        return None
    if start.startswith((b"{", b"[")):
        return "a JSON text", NO_WEIGHTS
    return f"a text that begins with {text.strip()[:40]!a}", NO_WEIGHTS


def _onnx_kind(head: bytes) -> tuple[str, str]:
    """Return the kind of an ONNX model: a protobuf message of the version and another field of ModelProto."""
    fields = (0x12, 0x1A, 0x22, 0x2A, 0x32, 0x3A, 0x42)
    if len(head) > 3 and head[0] == 0x08 and 1 <= head[1] <= 30 and head[2] in fields:
        return "an ONNX model", "give the checkpoint that it was exported from"
    return "", ""


def _nearby(path: Path) -> str:
    folder = next((p for p in path.parents if p.is_dir()), Path())
    # Not recursive: the tree may be huge.
    patterns = ("*.safetensors", "*.pth", "update-*.pt", "checkpoints/update-*.pt")
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))[:SHOWN]
    names = ", ".join(str(p.relative_to(folder)) for p in found)
    return f"; {folder} holds {names}" if found else f"; {folder} holds no checkpoint"
