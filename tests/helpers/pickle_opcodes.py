"""Pickles, torch files and safetensors files put together by hand, so that they may state what no writer would write."""

import io
import json
import struct
import warnings
import zipfile

SYS_INFO = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def text(value):
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def short_bytes(data):
    return b"U" + bytes([len(data)]) + data


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def raw(value):
    """Return the opcodes of plain values; bytes are opcodes already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return text(value)
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, tuple):
        return b"(" + b"".join(map(raw, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(raw, value)) + b"e"
    return b"}(" + b"".join(raw(key) + raw(inner) for key, inner in value.items()) + b"u"


def call(function, *args):
    return function + raw(args) + b"R"


def put(index):
    return b"r" + struct.pack("<I", index)


def get(index):
    return b"j" + struct.pack("<I", index)


def storage(kind="FloatStorage", key="0", count=803, **more):
    parts = ("storage", name("torch", kind), key, "cpu", count, *more.values())
    return raw(parts) + b"Q"


def tensor(size, stride=None, offset=0, where=None, function="_rebuild_tensor_v2", **kinds):
    if stride is None:
        stride = tuple(reversed([step for step, _ in _steps(size)]))
    args = (where or storage(**kinds), offset, size, stride, False, call(name("collections", "OrderedDict")))
    return call(name("torch._utils", function), *args)


def _steps(size):
    step = 1
    for n in reversed(size):
        yield step, n
        step *= n


def pickled(value, protocol=2):
    return b"\x80" + bytes([protocol]) + raw(value) + b"."


def archive(pickle, storages, compressed=(), method=zipfile.ZIP_DEFLATED, extra=()):
    """Return a torch file: `storages` by key; the names in `compressed` are deflated; `extra` names with content are added."""
    buffer = io.BytesIO()
    entries = [("data.pkl", pickle), ("byteorder", b"little"), ("version", b"3\n")]
    with zipfile.ZipFile(buffer, "w") as file, warnings.catch_warnings(action="ignore"):  # two entries of one name
        for entry, content in (*entries, *((f"data/{key}", data) for key, data in storages.items()), *extra):
            how = method if entry in compressed else zipfile.ZIP_STORED
            file.writestr(f"archive/{entry}", content, how)
    return buffer.getvalue()


def legacy(pickle, storages, keys=None, about=SYS_INFO):
    """Return a torch file of the format before 1.6: `storages` are (stated number of values, bytes) by key."""
    keys = list(storages) if keys is None else keys
    pickles = [pickled(0x1950A86A20F9469CFC6C), pickled(1001), pickled(about), pickle, pickled(keys)]
    return b"".join(pickles) + b"".join(struct.pack("<q", count) + data for count, data in storages.values())


def safetensors(header, data=b"", length=None):
    """Return a safetensors file: `header` a dictionary, or the bytes of one; `length` as stated, by default the true one."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data
