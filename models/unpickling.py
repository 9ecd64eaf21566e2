"""Restricted reader of the pickles in torch files: containers, plain values and tensors, all built by functions of this module.

A pickle names classes and calls them with arguments of its own. Here each name leads to a stand-in written in Python; no class
or function of NumPy, torch or another library is ever called with a file's arguments, or changed by a file's state.
"""

import collections
import io
import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

MAX_BYTES = 8 << 20  # of a pickle; 10,000 tensors take 1.5 MB
MAX_COPIED = 1 << 20  # length of the arguments of all calls
SHOWN = 8  # names listed in an error
MAX_KEY = 1 << 60  # integers of more have equal hashes, of which a dictionary slows down
SCALARS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "i2": "<h", "i1": "<b", "u1": "<B", "b1": "<?"}
ODD_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "sparse or nested",
    "torch._utils._rebuild_nested_tensor": "sparse or nested",
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_meta_tensor_no_storage": "without values",
}
# Opcodes of protocol 2 that torch.save writes; all others are refused.
OPCODES = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.NEWOBJ),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINPERSID),
    *(pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2),
    *(pickle.TUPLE3, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT),
)


class RefusedError(ValueError):
    """Raised for a pickle that names classes or functions that no weights need."""


class Foreign:
    """Substitute for a class of a published file that is not needed (arguments, configs, paths).

    Its instances are OrderedDicts, which the pickle may fill; their state is ignored.
    """

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Return an empty OrderedDict; the arguments are ignored."""
        return collections.OrderedDict()


class Dtype:
    """Substitute for numpy.dtype: the name of a type; its state is ignored."""

    def __init__(self, name: Any = "", *_: Any):
        self.name = name if isinstance(name, str) and len(name) < 4 else ""

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""


def scalar(dtype: Any, data: Any = b"") -> float | int | bool:
    """Return the value of a NumPy scalar (little-endian bytes). Raises ValueError for a type that is no number."""
    data = data.encode("latin-1") if isinstance(data, str) else data  # of Python 2
    form = SCALARS.get(dtype.name.lstrip("<|=")) if isinstance(dtype, Dtype) else None
    if form is None or not isinstance(data, bytes) or len(data) != struct.calcsize(form):
        raise ValueError("a NumPy scalar is no number")
    (value,) = struct.unpack(form, data)
    return value


FOREIGN = (
    *("argparse.Namespace", "yacs.config.CfgNode", "collections.defaultdict", "builtins.dict"),
    *("pathlib.PosixPath", "pathlib._local.PosixPath", "pathlib.WindowsPath", "pathlib._local.WindowsPath"),
)
SCALAR = tuple(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core"))
# For torch.load(weights_only=True) in other libraries, such as `timm.create_model(checkpoint_path=...)`.
torch.serialization.add_safe_globals(
    [*((Foreign, name) for name in FOREIGN), *((scalar, name) for name in SCALAR), (Dtype, "numpy.dtype")]
)


class Value:
    """Name in a pickle: `call` is the function or class behind it, None for a constant."""

    def __init__(self, call: Callable[..., Any] | None, constant: Any = None):
        self.call, self.constant = call, constant


def _ordered(pairs: Any = (), *_: Any) -> Any:
    """Return an OrderedDict of a list of pairs, as Python 2 has pickled it."""
    made: Any = collections.OrderedDict()
    for key, value in pairs:
        _put(made, key, value)
    return made


def _bytes(text: Any, *_: Any) -> bytes:
    """Return the bytes that protocol 2 stores as characters."""
    return text.encode("latin-1") if isinstance(text, str) else b""


NAMES = {
    **{name: Value(Foreign) for name in (*FOREIGN, "collections.Counter", "torch.device", "builtins.bytearray")},
    **{name: Value(scalar) for name in SCALAR},
    "numpy.dtype": Value(Dtype),
    "collections.OrderedDict": Value(_ordered),
    "_codecs.encode": Value(_bytes),
    "builtins.set": Value(lambda items=(), *_: list(items)),
    "builtins.complex": Value(lambda real=0.0, imag=0.0, *_: complex(float(real), float(imag))),
    "torch.Size": Value(lambda items=(), *_: tuple(items)),
}


_PythonUnpickler: Any = pickle._Unpickler  # whose opcodes, stack and marks are not declared


class _Unpickler(_PythonUnpickler):
    """Python's own unpickler, with fewer opcodes; calls and states reach stand-ins only."""

    dispatch: ClassVar[dict[int, Any]] = {}

    def __init__(self, file: io.BytesIO, names: dict[str, Value], storage: Callable[[Any], Any]):
        super().__init__(file, encoding="latin-1")
        self.names, self.storage = names, storage
        self.refused: list[str] = []  # names that no weights need
        self.copied = 0  # length of all arguments

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name; an unknown one is noted, and its calls return an empty OrderedDict."""
        full = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)
        if full in self.names:
            return self.names[full]
        shown = ascii(full[:80])[1:-1]
        if shown not in self.refused and len(self.refused) < SHOWN:
            self.refused.append(shown)
        return Value(Foreign)

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage of a persistent id."""
        return self.storage(pid)

    def _call(self) -> None:
        args = self.stack.pop()
        made = self.stack[-1]
        if not isinstance(made, Value) or made.call is None or not isinstance(args, tuple):
            raise ValueError("a call of something that is no class or function")
        # Arguments may be copied, and a pickle may name the same ones again and again.
        self.copied += sum(len(arg) for arg in args if isinstance(arg, str | bytes | list | tuple | dict))
        if self.copied > MAX_COPIED:
            raise ValueError("its calls have too many arguments")
        self.stack[-1] = made.call(*args)

    def _state(self) -> None:
        self.stack.pop()  # attributes, which no stand-in has

    def _item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], key, value)

    def _items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(self.stack[-1], key, value)

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("an append to something that is no list")
        self.stack[-1].extend(items)


class _Opcodes(dict[int, Any]):
    def __missing__(self, code: int) -> Any:
        raise ValueError(f"byte {code:#04x} is no operation of the pickles that torch writes")


_Unpickler.dispatch = _Opcodes(
    {
        **{code[0]: _PythonUnpickler.dispatch[code[0]] for code in OPCODES},
        pickle.REDUCE[0]: _Unpickler._call,
        pickle.NEWOBJ[0]: _Unpickler._call,
        pickle.BUILD[0]: _Unpickler._state,
        pickle.SETITEM[0]: _Unpickler._item,
        pickle.SETITEMS[0]: _Unpickler._items,
        pickle.APPEND[0]: _Unpickler._append,
        pickle.APPENDS[0]: _Unpickler._appends,
    }
)


def _put(target: Any, key: Any, value: Any) -> None:
    # The hash of a nested tuple could take for ever, so that texts and numbers are the only keys.
    known = isinstance(key, str | bytes | type(None)) or (isinstance(key, int) and abs(key) < MAX_KEY)
    if type(target) not in (dict, collections.OrderedDict) or not known:
        raise ValueError("an entry of something that is no dictionary, or under a key that is no name")
    target[key] = value


def unpickle(file: io.BytesIO, names: Mapping[str, Value], storage: Callable[[Any], Any]) -> Any:
    """Read the pickle at a file's position. `names` are understood besides NAMES, `storage` maps a persistent id to a storage.

    Raises ValueError for a pickle that would run code or build what no weights need, others for a damaged one.
    """
    unpickler = _Unpickler(file, {**NAMES, **names}, storage)
    try:
        made = unpickler.load()
    except Exception as error:
        if not unpickler.refused:
            raise
        made = error
    odd = sorted({ODD_TENSORS[name] for name in unpickler.refused if name in ODD_TENSORS})
    if odd and all(name.startswith("torch.") for name in unpickler.refused):
        raise RefusedError(
            f"it holds tensors of a kind that is not read: {', '.join(odd)}; save them again as plain tensors of real numbers"
        )
    if unpickler.refused:
        raise RefusedError(f"it would run or build {', '.join(unpickler.refused)}, which no weights need")
    return made
