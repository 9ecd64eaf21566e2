"""Torch files, of torch.save since 1.6 (zip archives) and before, read by bounds that follow from the file's size.

torch.load is not used: its C++ reader of archives decompresses without limit, and tensors may be larger than their storage.
Here every byte of a tensor lies in the file, a storage is read once, and views of it may repeat it a few times only.
"""

import io
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .file_kinds import BoundedReads
from .unpickling import MAX_BYTES, RefusedError, Value, unpickle

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6
MAX_DIMS, MAX_EMPTY = 16, 1 << 31  # dimensions of a tensor; product of those of one without values, zeros left out
REPEATS, SMALL = 4, 16 << 20  # bytes of all tensors: at most REPEATS times the file's, or SMALL more
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of an archive's entry: signature, lengths of its name and extra field
DTYPES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64},
}
PLAIN_TYPES = {
    *DTYPES.values(),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
}


class Storage:
    """Bytes of a storage (uint8) and the type of its values."""

    def __init__(self, values: Tensor, dtype: torch.dtype):
        self.bytes, self.dtype = values, dtype


class Tensors:
    """Storages and tensors of one file of `size` bytes. `find(key, bytes)` returns the bytes of a storage."""

    def __init__(self, size: int, find: Callable[[str, int], Tensor]):
        self.size, self.find = size, find
        self.storages: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # values of each storage
        self.left = size  # bytes that further storages may have
        self.views_left = REPEATS * size + SMALL  # bytes that further tensors may have

    def storage(self, pid: Any) -> Storage:
        """Return the storage of a persistent id: "storage", type, key, device, number of values."""
        known = isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage" and pid[5:] in ((), (None,))
        if not known or not isinstance(pid[1], Value) or not isinstance(pid[2], str) or not is_count(pid[4]):
            raise ValueError("a storage is described in an unknown way")
        dtype, key = pid[1].constant, pid[2]
        if not isinstance(dtype, torch.dtype):
            raise ValueError("a storage is of an unknown type")
        size = pid[4] * dtype.itemsize
        if key not in self.storages:
            if size > self.left:
                raise ValueError(f"a storage states {size:,} bytes, more than the file has left")
            self.left -= size
            self.storages[key], self.counts[key] = self.find(key, size), pid[4]
        if len(self.storages[key]) != size:
            raise ValueError(f"a storage states {size:,} bytes, but {len(self.storages[key]):,} are stored")
        return Storage(self.storages[key], dtype)

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None) -> Tensor:
        """Return a view of a storage. Raises ValueError for one that reaches beyond it."""
        if not isinstance(storage, Storage) or not is_count(offset) or not (_is_shape(size) and _is_shape(stride)):
            raise ValueError("a tensor is described in an unknown way")
        dtype = storage.dtype if dtype is None else dtype
        if dtype not in PLAIN_TYPES:
            raise ValueError(f"a tensor is of the type {str(dtype)[:40]}, which is not read")
        if len(size) != len(stride):
            raise ValueError(f"a tensor has {len(size)} dimensions and {len(stride)} strides")
        count = math.prod(size)
        if not count:
            if math.prod(n for n in size if n) > MAX_EMPTY:
                raise ValueError("a tensor without values has huge dimensions")
            return torch.empty(size, dtype=dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if (last + 1) * dtype.itemsize > len(storage.bytes):
            raise ValueError(f"a tensor reaches to value {last + 1:,} of a storage with {len(storage.bytes):,} bytes")
        self.views_left -= count * dtype.itemsize
        if self.views_left < 0:
            raise ValueError("its tensors repeat the values of the file many times")
        whole = storage.bytes[: len(storage.bytes) // dtype.itemsize * dtype.itemsize]
        values = whole.ne(0) if dtype is torch.bool else whole.view(dtype)  # other bytes than 0 and 1 are no bool
        return values.as_strided(size, stride, offset)

    def names(self) -> dict[str, Value]:
        """Return the names that a pickle uses for tensors and their types."""
        plain = Value(lambda storage, offset, size, stride, *_: self.tensor(storage, offset, size, stride))
        typed = Value(lambda *args: self.tensor(args[0], args[1], args[2], args[3], _type(args[6])))
        data = Value(lambda tensor, *_: tensor)
        return {
            "torch._utils._rebuild_tensor": plain,
            "torch._utils._rebuild_tensor_v2": plain,
            "torch._utils._rebuild_tensor_v3": typed,
            "torch._utils._rebuild_parameter": data,
            "torch._utils._rebuild_parameter_with_state": data,
            "torch.nn.parameter.Parameter": data,
            "torch.nn.parameter.Buffer": data,
            "torch._tensor._rebuild_from_type_v2": Value(_rebuild_plain),
            "torch.Tensor": Value(None),
            **{f"torch.{name}Storage": Value(None, dtype) for name, dtype in DTYPES.items()},
            "torch.storage.UntypedStorage": Value(None, torch.uint8),
            "torch.UntypedStorage": Value(None, torch.uint8),
            **{str(dtype): Value(None, dtype) for dtype in PLAIN_TYPES},
        }


def read_torch(path: Path) -> Any:
    """Read a torch file, on the CPU. Raises ValueError with the file, the reason and the remedy if that fails."""
    try:
        return parse_torch(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); is the file yours, and the disk there?") from error
    except RefusedError as error:
        raise ValueError(f"{path} was not read: {error}") from error
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{path} cannot be read, it is damaged or no torch file ({first[:160]}); use another one"
        ) from error


def parse_torch(path: Path) -> Any:
    """Return the content of a torch file: containers, plain values and tensors. Raises any error for a damaged one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            return _read_archive(file, size)
        file.seek(0)
        return _read_stream(file, size)


def _read_archive(file: IO[bytes], size: int) -> Any:
    """Return the content of an archive, in which data.pkl is the pickle and data/KEY the bytes of a storage."""
    with zipfile.ZipFile(BoundedReads(file)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    pickled = next((name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1), None)
    if pickled is None:
        raise ValueError("its archive holds no data.pkl")
    folder = pickled.removesuffix("data.pkl")

    def find(name: str) -> Tensor:
        if name not in entries:
            raise ValueError(f"{name[:80]!a} is missing in its archive")
        entry = entries[name]
        if (
            entry.flag_bits & 1
            or entry.compress_type != zipfile.ZIP_STORED
            or entry.file_size != entry.compress_size
            or entry.file_size > size
        ):
            raise ValueError(f"{name[:80]!a} is compressed or encrypted in its archive, as torch writes none")
        file.seek(entry.header_offset)
        signature, *lengths = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        if signature != b"PK\x03\x04":
            raise ValueError(f"{name[:80]!a} is not where its archive states")
        file.seek(sum(lengths), io.SEEK_CUR)
        return read_exactly(file, torch.empty(entry.file_size, dtype=torch.uint8))

    if entries[pickled].file_size > MAX_BYTES:
        raise ValueError(f"its data.pkl has more than {MAX_BYTES:,} bytes")
    if folder + "byteorder" in entries and bytes(find(folder + "byteorder").tolist()) != b"little":
        raise ValueError("it was written on a big-endian machine")
    tensors = Tensors(size, lambda key, _: find(f"{folder}data/{key}"))
    return unpickle(io.BytesIO(find(pickled).numpy().tobytes()), tensors.names(), tensors.storage)


def _read_stream(file: IO[bytes], size: int) -> Any:
    """Return the content of a file before torch 1.6: pickles, then the number of values and the bytes of each storage."""
    head = io.BytesIO(file.read(MAX_BYTES))
    tensors = Tensors(size, lambda key, size: torch.empty(size, dtype=torch.uint8))
    if unpickle(head, {}, tensors.storage) != MAGIC or unpickle(head, {}, tensors.storage) != PROTOCOL:
        raise ValueError("it begins as no torch file does")
    about = unpickle(head, {}, tensors.storage)
    if not isinstance(about, dict) or about.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine")
    content = unpickle(head, tensors.names(), tensors.storage)
    keys = unpickle(head, {}, tensors.storage)
    if not isinstance(keys, list) or sorted(keys) != sorted(tensors.storages):
        raise ValueError("it does not list its storages")
    file.seek(head.tell())
    for key in keys:
        values = tensors.storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count != tensors.counts[key]:
            raise ValueError("a storage has another size than stated")
        read_exactly(file, values)
    return content


def read_exactly(file: IO[bytes], values: Tensor) -> Tensor:
    """Fill a tensor of bytes from a file. Raises EOFError if there are too few."""
    view = memoryview(values.numpy().data)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("it ends within a storage")
        view = view[count:]
    return values


def is_count(value: Any) -> bool:
    """Return True for an integer from 0 to 2**62."""
    return type(value) is int and 0 <= value < 1 << 62


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) <= MAX_DIMS and all(map(is_count, value))


def _type(value: Any) -> torch.dtype:
    if not isinstance(value, Value) or not isinstance(value.constant, torch.dtype):
        raise ValueError("a tensor is of an unknown type")
    return value.constant


def _rebuild_plain(function: Any, _: Any, args: Any, *__: Any) -> Any:
    """Rebuild a tensor with attributes, which are ignored."""
    if not isinstance(function, Value) or function.call is None or not isinstance(args, tuple):
        raise ValueError("a tensor is described in an unknown way")
    return function.call(*args)
