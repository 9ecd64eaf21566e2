"""Files of weights that a stranger might give, made by hand: each must be refused in a sentence, or read without harm.

    python -m tests.helpers.hostile_weights FOLDER      writes them all, for other programs

The good ones fit `hostile_net`, a model of two layers that this module registers with timm.
"""

import gzip
import io
import json
import struct
import sys
import zipfile
from pathlib import Path

import torch
from timm.models import register_model
from torch import nn

from tests.helpers.hostile_metadata import CROP, FACTS, HARMLESS_FACTS, HEADERS, METADATA
from tests.helpers.pickle_opcodes import (
    archive,
    call,
    get,
    legacy,
    name,
    pickled,
    put,
    raw,
    safetensors,
    short_bytes,
    storage,
    tensor,
)

SHAPES = {"0.weight": (4, 3, 8, 8), "0.bias": (4,), "4.weight": (3, 4), "4.bias": (3,)}
COUNT = 787  # values of all of them
ROOM = 803  # values of their storage
VALUES = torch.linspace(-0.1, 0.1, ROOM).numpy().tobytes()
NAMESPACE = name("argparse", "Namespace") + b")\x81" + raw({"a": 1}) + b"b"
ORDERED = name("collections", "OrderedDict")
DTYPE, SCALAR = name("numpy", "dtype"), name("numpy.core.multiarray", "scalar")


@register_model
def hostile_net(pretrained=False, num_classes=1000, img_size=32, **kwargs):
    layers = nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    model = nn.Sequential(*layers)
    normal = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.9}
    model.default_cfg = model.pretrained_cfg = {"classifier": "4", "input_size": (3, 32, 32), **normal}
    return model


def weights(**changed):
    """Return the opcodes of the good weights, some of them changed, as views of one storage."""
    made, offset = {}, 0
    for key, shape in SHAPES.items():
        made[key] = tensor(shape, offset=offset)
        offset += torch.Size(shape).numel()
    return {**made, **{key.replace("_", "."): value for key, value in changed.items()}}


def torch_file(args=None, facts=METADATA, model=None, **options):
    """Return a torch file of the good weights, with `args` beside them."""
    content = {"model": weights() if model is None else model, "facts": facts, "args": args}
    return archive(pickled(content), **{"storages": {"0": VALUES}, **options})


def one(opcodes, **options):
    """Return a torch file of the good weights, the first of them changed."""
    return torch_file(model=weights(**{"0_bias": opcodes}), **options)


def old_file(model=None, stated=ROOM, **options):
    """Return a file before torch 1.6 of the good weights."""
    where = {"0": (stated, VALUES)}
    old = {key: tensor(shape, where=storage(view=None)) for key, shape in SHAPES.items()}
    return legacy(pickled({"model": old if model is None else model}), **{"storages": where, **options})


def dtype(kind, state=None):
    return call(DTYPE, kind, False, True) + (raw(state) + b"b" if state else b"")


def doubled(levels, start="ha"):
    """Return opcodes of a tuple that names itself twice on each level: 2**levels values in a few bytes."""
    return raw(start) + b"".join(put(10 + n) + get(10 + n) + b"\x86" for n in range(levels))


def loop():
    return b"]" + put(5) + get(5) + b"a"


def deep(levels, opening=b"]", closing=b"a"):
    return opening * levels + closing * (levels - 1)


def again(function, argument, times):
    """Return opcodes that call a function many times with one argument, which lies in the memo."""
    return b"](" + raw(argument) + put(7) + (function + get(7) + b"\x85R") * times + b"e"


STATE_OBJECT = (3, "|", None, None, None, -1, -1, 63)
LARGE = list(range(3000))
# Beside the good weights; each is refused.
PICKLES = {
    "scalar of objects": call(SCALAR, dtype("O8"), short_bytes(b"A" * 8)),
    "scalar of a type with objects": call(SCALAR, call(DTYPE, [("a", "O")]), short_bytes(b"A" * 8)),
    "scalar of two gigabytes": call(SCALAR, dtype("V2147483600"), short_bytes(b"")),
    "scalar without bytes": call(SCALAR, dtype("f8")),
    "scalar with a text as type": call(SCALAR, "f8", short_bytes(b"A" * 8)),
    "dtype class": call(name("numpy.dtypes", "VoidDType"), 1 << 31),
    "array": call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), (1 << 40,), "b"),
    "exec": call(name("builtins", "exec"), "raise SystemExit(77)"),
    "exec of Python 2": call(name("__builtin__", "exec"), "raise SystemExit(77)"),
    "system": call(name("posix", "system"), "exit 77"),
    "getattr": call(name("builtins", "getattr"), name("torch", "hub"), "load"),
    "bytes that torch loads": call(name("torch.storage", "_load_from_bytes"), "x"),
    "sparse tensor": call(name("torch._utils", "_rebuild_sparse_tensor"), "layout", ()),
    "quantised tensor": call(name("torch._utils", "_rebuild_qtensor"), storage(), 0, (1,), (1,), (), False, None),
    "nested tensor": call(name("torch._utils", "_rebuild_nested_tensor"), storage(), 0, 0, 0),
    "meta tensor": call(name("torch._utils", "_rebuild_meta_tensor_no_storage"), "f", (1 << 60,), (1,), False),
    "wrapper subclass": call(name("torch._utils", "_rebuild_wrapper_subclass"), name("torch", "Tensor"), "f"),
    "tensor of numpy": call(name("torch._utils", "_rebuild_device_tensor_from_numpy"), "x", "f", "cpu", False),
    "new tensor of a size": call(name("torch", "Tensor"), 1 << 20, 1 << 20),
    "new storage of a size": call(name("torch.storage", "UntypedStorage"), 1 << 40),
    "call of a text": raw("exec") + raw(()) + b"R",
    "call with a list": ORDERED + raw([]) + b"R",
    "entries of a list": b"](" + raw("a") + raw("b") + b"u",
    "append to a dictionary": b"}" + raw("a") + b"a",
    "tuple that doubles as a key": b"}" + doubled(60) + b"Ns",
    "numbers with one hash": b"}(" + b"".join(raw(n * ((1 << 61) - 1)) + b"N" for n in range(1, 999)) + b"u",
    "list as a key": b"}]Ns",
    "stack that is empty": b"tttt",
    "marks": b"(" * 90_000,
    "pops": b"N0",
    "long text": b"X\xff\xff\xff\xff" + b"a" * 20,
    "long bytes": b"B\xff\xff\xff\xff" + b"a" * 20,
    "long of four gigabytes": b"\x8b\xff\xff\xff\x7f" + b"a" * 20,
    "frame": b"\x95" + b"\xff" * 8,
    "text that is no UTF-8": b"X\x02\x00\x00\x00\xff\xfe",
    "memo that is missing": get(999),
    "long name": b"c" + b"a" * 50_000 + b"\nb\n",
    "name without an end": b"c" + b"a" * 1000,
    "calls that copy": again(name("builtins", "set"), LARGE, 2000),
    "calls that copy a text": again(name("_codecs", "encode"), "x" * 20_000, 500),
    "pairs that copy": again(ORDERED, [("a", 1)] * 2000, 1500),
    "extension": b"\x82\x01",
    "persistent id in text": b"Pstorage\n",
    "storage of nothing": raw(("storage",)) + b"Q",
    "storage of a text": raw("storage") + b"Q",
    "storage of a module": raw(("module", name("os", "system"), "a", "b")) + b"Q",
    "storage of many values": storage(key="1", count=1 << 60),
    "storage of less than no values": storage(key="1", count=-5),
    "storage that is missing": storage(key="9", count=4),
    "storage beyond its record": storage(count=ROOM + 1),
    "storage outside the folder": storage(key="../../data.pkl", count=4),
    "storage of quantised values": storage("QInt8Storage"),
    "subclass of itself": call(name("torch._tensor", "_rebuild_from_type_v2"), name("os", "system"), "a", ("ls",), {}),
}
# Tensors in place of a good one; each is refused.
TENSORS = {
    "size beyond the storage": tensor((ROOM + 1,)),
    "stride beyond the storage": tensor((2,), (ROOM,)),
    "offset beyond the storage": tensor((4,), offset=ROOM - 3),
    "offset of 2**62": tensor((4,), offset=1 << 62),
    "offset below zero": tensor((4,), offset=-1),
    "stride below zero": tensor((2, 2), (-1, 1)),
    "size below zero": tensor((-4,)),
    "size that overflows": tensor((1 << 32, 1 << 32), (0, 0)),
    "stride that overflows": tensor((3, 3), (1 << 61, 1 << 61)),
    "value repeated a million million times": tensor((1 << 20, 1 << 20), (0, 0)),
    "no values but huge dimensions": tensor((0, 1 << 50, 1 << 50), (1, 1, 1)),
    "dimensions without end": tensor((1,) * 3000),
    "strides missing": tensor((2, 2), (1,)),
    "size of texts": tensor(("4",), (1,)),
    "size of truths": tensor((True,), (1,)),
    "size that is a text": tensor("4", "1"),
    "storage that is none": tensor((4,), where=raw("0")),
    "storage of another type": tensor((4,), kind="DoubleStorage"),
    "type that is none": call(
        name("torch._utils", "_rebuild_tensor_v3"), storage(), 0, (4,), (1,), False, None, "float32", None
    ),
    "not finite": tensor((4,), where=storage(key="2", count=4)),
}
EXTRA = {"0": VALUES, "1": bytes(32), "2": b"\xff" * 16}
NAMES = {"name with an escape": "a\x1b]0;x\x07", "name of many characters": "b" * 60_000, "name with a newline": "a\nb"}


def good_safetensors(metadata=METADATA):
    header, offset = {}, 0
    for key, shape in SHAPES.items():
        end = offset + 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return safetensors({"__metadata__": {"retoken": json.dumps(metadata)}, **header}, VALUES[:offset])


def split_safetensors(content):
    """Return the header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def _with(changed):
    return {**METADATA, **changed} if isinstance(changed, dict) else changed


def shared_bytes():
    """Return an archive in which eight storages are the same bytes."""
    keys = list("12345678")
    model = {key: tensor((4,), where=storage(key=key, count=ROOM)) for key in keys}
    buffer = io.BytesIO(archive(pickled({"model": model}), {"0": VALUES, **dict.fromkeys(keys, b"")}))
    with zipfile.ZipFile(buffer, "a") as file:
        first = file.getinfo("archive/data/0")
        for key in keys:
            entry = file.getinfo(f"archive/data/{key}")
            entry.header_offset, entry.file_size, entry.compress_size = (
                first.header_offset,
                first.file_size,
                first.file_size,
            )
        file.comment = b"changed"
    return buffer.getvalue()


def archives():
    """Return archives that are no honest ones."""
    good, bomb = torch_file(), bytes(40_000_000)
    directory = good.rindex(b"PK\x01\x02")
    end = good.rindex(b"PK\x05\x06")
    return {
        "compressed storage": one(
            tensor((4,), where=storage(key="1", count=10_000_000)),
            storages={"0": VALUES, "1": bomb},
            compressed=("data/1",),
        ),
        "compressed pickle": archive(pickled({"a": "x" * 5_000_000}), {}, compressed=("data.pkl",)),
        "directory cut": good[:directory] + good[end:],
        "directory elsewhere": good[:-6] + b"\xff\xff\xff\x7f\x00\x00",
        "directory of its own size": good[: end + 12] + b"\xff\xff\xff\x7f" + good[end + 16 :],
        "entry elsewhere": good[: directory + 42] + b"\x00\xff\xff\x7f" + good[directory + 46 :],
        "entry of another size": good[: directory + 20] + b"\xff\xff\xff\x7f" * 2 + good[directory + 28 :],
        "entry encrypted": good[: directory + 8] + b"\x01\x00" + good[directory + 10 :],
        "stored several times": shared_bytes(),
        "big-endian": torch_file().replace(b"little", b"bigbig"),
        "two pickles": torch_file(extra=(("data.pkl", pickled(call(name("posix", "system"), "exit 77"))),)),
    }


def old_files():
    """Return files of the format before torch 1.6."""
    return {
        "old, many values": old_file({"a": tensor((4,), where=storage(count=1 << 40, view=None))}),
        "old, view": old_file({"a": tensor((4,), where=storage(view=("1", 0, 4)))}),
        "old, other count": old_file(stated=1),
        "old, count below zero": old_file(stated=-1),
        "old, cut": old_file()[:-100],
        "old, no keys": old_file(keys=[]),
        "old, keys of lists": old_file(keys=[[], 1]),
        "old, keys no list": old_file(keys="0"),
        "old, key twice": old_file(keys=["0", "0"]),
        "old, big-endian": old_file(about={"little_endian": False}),
        "old, system": legacy(pickled({"model": call(name("posix", "system"), "exit 77")}), {}),
        "old, system first": legacy(pickled({}), {}, about=call(name("posix", "system"), "exit 77")),
        "old, number": pickled(0x1950A86A20F9469CFC6C) * 4,
    }


def hostile_files():
    """Return the content of every file that must be refused, by its name."""
    found = {f"{key}.pth": torch_file(args=value) for key, value in PICKLES.items()}
    found |= {f"tensor, {key}.pth": one(value, storages=EXTRA) for key, value in TENSORS.items()}
    found |= {f"{key}.pth": torch_file(facts=_with(value)) for key, value in FACTS.items() if key != "lists in lists"}
    found |= {f"{key}.safetensors": good_safetensors(_with(value)) for key, value in FACTS.items()}
    found |= {f"{key}.pth": torch_file(model={**weights(), value: tensor((1,))}) for key, value in NAMES.items()}
    found |= {f"{key}.safetensors": value for key, value in HEADERS.items()}
    found |= {f"{key}.pth": value for key, value in (archives() | old_files()).items()}
    found |= {
        f"metadata, {key}.pth": torch_file(facts={"more": value})
        for key, value in {
            "doubled": doubled(60),
            "list in itself": loop(),
            "deep lists": deep(30_000),
            "deep tuples": raw("a") + b"\x85" * 80_000,
            "tensor": tensor((4,)),
            "class": name("torch", "Tensor"),
        }.items()
    }
    found |= {f"protocol {n}.pth": archive(pickled({"model": weights()}, n), {"0": VALUES}) for n in (6, 99)}
    found["zeros in gz.pth"] = gzip.compress(bytes(30_000_000))
    found["FF.pth"] = found["FF.safetensors"] = b"\xff" * 100_000
    return found


def odd_files():
    """Return the content of files that load_weights may read, but that fit no model or state a crop that there is not."""
    crops = {"eps": {"interpolation": "eps"}, "crop beyond the size": {"resize": 20}}
    found = {f"{key}.safetensors": good_safetensors(_with({"evaluation": {**CROP, **v}})) for key, v in crops.items()}
    found |= {
        f"model {n}.safetensors": good_safetensors(_with({"model": m})) for n, m in enumerate(("../x", "vit", "a b"))
    }
    found["1024 classes.pth"] = torch_file(
        facts=_with({"num_classes": 1024, "classes": []}),
        model={**weights(), "5.weight": tensor((1024,), where=storage("ByteStorage", "1", 1024))},
        storages={"0": VALUES, "1": bytes(1024)},
    )
    for key, opcodes in {
        "parameter of a text": call(name("torch._utils", "_rebuild_parameter"), "a", True, None),
        "no dimension": tensor((), ()),
        "of complex values": tensor((3,), kind="ComplexFloatStorage", count=4, key="1"),
        "of truths": tensor((3,), kind="BoolStorage", count=32, key="1"),
        "without values": tensor((0, 3)),
    }.items():
        found[f"bias, {key}.pth"] = torch_file(model=weights(**{"4_bias": opcodes}), storages=EXTRA)
        found[f"weight, {key}.pth"] = torch_file(model=weights(**{"4_weight": opcodes}), storages=EXTRA)
    return found


def harmless_files():
    """Return the content of files that are read: what is odd in them is ignored."""
    found = {
        "good.pth": torch_file(),
        "good.safetensors": good_safetensors(),
        "good old.pth": old_file(),
        "dtype with a state.pth": torch_file(args=dtype("f8", STATE_OBJECT)),
        "scalar of a dtype with a state.pth": torch_file(
            args=call(SCALAR, dtype("f8", STATE_OBJECT), short_bytes(b"A" * 8))
        ),
        "scalar.pth": torch_file(args=call(SCALAR, dtype("f4"), short_bytes(bytes(4)))),
        "bytearray of a size.pth": torch_file(args=call(name("builtins", "bytearray"), 1 << 40)),
        "codec.pth": torch_file(args=call(name("_codecs", "encode"), "x" * 9, "zip")),
        "namespace.pth": torch_file(args=NAMESPACE),
        "state of a dictionary.pth": torch_file(args=call(ORDERED) + raw({"items": 1, "__class__": 5}) + b"b"),
        "doubled.pth": torch_file(args=doubled(60)),
        "list in itself.pth": torch_file(args=loop()),
        "deep lists.pth": torch_file(args=deep(30_000)),
        "memo far away.pth": torch_file(args=raw("a") + put((1 << 32) - 1)),
        "bytes as truths.pth": torch_file(
            model={**weights(), "5.mask": tensor((4,), kind="BoolStorage", count=4 * ROOM)}
        ),
    }
    return found | {f"{k}.safetensors": good_safetensors(_with(v)) for k, v in HARMLESS_FACTS.items()}


if __name__ == "__main__":
    for file, content in (hostile_files() | odd_files() | harmless_files()).items():
        Path(sys.argv[1], file.replace("/", "_")).write_bytes(content)
