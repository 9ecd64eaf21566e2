"""Kernels of a training step and the bytes they move: a record of each, and the count of eager ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.described_gpu import is_channels_last

Sizes = Sequence[int]


@dataclass(frozen=True)
class Kernel:
    """One kernel, or one call of a library: bytes read and written, and those of copies that ATen makes before cuDNN."""

    kind: str
    name: str
    phase: str  # forward, backward
    read: int
    write: int
    hidden: int = 0
    shapes: str = ""
    lowered: bool = True  # False for a product of float32 tensors

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.write


# Kinds of operations by parts of their names; the first that fits counts.
KINDS = {
    "our kernels": ("retoken",),
    "convolutions": ("convolution",),
    "attention": ("scaled_dot_product", "attention_forward", "attention_backward"),
    "products": ("addmm", "baddbmm", "bmm", "aten.mm", "addbmm", "addmv", "aten.mv"),
    "norms": ("layer_norm", "batch_norm", "group_norm"),
    "activations": ("gelu", "hardswish", "silu", "softmax"),
    "sorting, gathering": ("sort", "gather", "index", "scatter", "embedding"),
    "optimiser": ("_foreach", "_fused"),
    "casts, copies": ("_to_copy", "copy_", "clone", "aten.cat", "constant_pad"),
    "sums": ("aten.sum", "aten.mean", "aten.amax", "norm"),
}
FREE = {  # operators that launch no kernel
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided",
    "sym_size", "sym_stride", "sym_numel", "view", "_unsafe_view", "_reshape_alias", "set_", "resize_",
    "record_stream", "is_pinned", "_pin_memory", "unbind", "split", "split_with_sizes", "chunk",
}  # fmt: skip
OVERWRITES = {"copy_", "zero_", "fill_", "normal_", "uniform_", "bernoulli_", "random_"}


def kind_of(name: str) -> str:
    """Return the kind of an operator, by its name."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other pointwise")


def rounds_of(name: str, constants: Sequence[Any]) -> int:
    """Return how often an operator of ours moves its operands: with GELU after the convolution, its gradient takes two kernels."""
    gelu_after = any(constant is False for constant in constants)
    return 2 if "gelu_depthwise_backward" in name and gelu_after else 1


def tensor_bytes(shape: Sizes, stride: Sizes, itemsize: int) -> int:
    """Return the bytes that a tensor's elements occupy; expanded dimensions count once."""
    for size, step in zip(shape, stride, strict=True):
        itemsize *= size if step else 1
    return itemsize


def hidden_copies(maps: Sequence[tuple[Sizes, Sizes, int]], weight: tuple[Sizes, Sizes]) -> int:
    """Return the bytes of copies before cuDNN: of maps (shape, stride, item size) that are not dense in its memory format.

    The last map is the convolution's input, which with the weight determines the format.
    """
    shape, stride, _ = maps[-1]
    last = is_channels_last(shape, stride) or is_channels_last(*weight)
    order = (1, *range(len(shape) - 1, 1, -1), 0) if last else tuple(range(len(shape) - 1, -1, -1))
    moved = 0
    for shape, stride, itemsize in maps:
        dense = 1
        for d in order:
            if shape[d] > 1 and stride[d] != dense:
                moved += 2 * tensor_bytes(shape, stride, itemsize)
                break
            dense *= shape[d]
    return moved


class EagerKernels(TorchDispatchMode):
    """Recorder of the kernels that eager operators launch: an operator is one kernel, which reads its inputs once.

    Operators that are composed of others below the dispatcher (softmax with a cast, for example) count as one too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.kernels: list[Kernel] = []
        self.devices: set[str] = set()
        self.transfers: list[str] = []
        self.reads: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"):
            self.reads.append(name)
        out = function(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        kinds = {t.device.type for t in (*inputs, *outputs)}
        if len(kinds) > 1 and any(t.dim() for t in (*inputs, *outputs) if t.device.type == "cpu"):
            self.transfers.append(name)
        launches = bool(outputs) or function._schema.is_mutable  # neither: a question about the tensor
        if launches and "cuda" in kinds and name not in FREE and not function.is_view:
            full = str(function.overloadpacket)
            self.kernels += [self._kernel(full, name, inputs, outputs)] * rounds_of(full, args)
        return out

    def _kernel(self, full: str, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> Kernel:
        read = inputs[1:] if name in OVERWRITES else inputs
        kind, hidden = kind_of(full), 0
        if kind == "convolutions":
            maps, weight = (inputs[:2], inputs[2]) if "backward" in name else (inputs[:1], inputs[1])
            hidden = hidden_copies([(t.shape, t.stride(), t.itemsize) for t in maps], (weight.shape, weight.stride()))
        return Kernel(
            kind=kind,
            name=full,
            phase=self.phase,
            read=sum(_bytes(t) for t in read),
            write=sum(_bytes(t) for t in outputs) or (sum(_bytes(t) for t in inputs) if name.startswith("_f") else 0),
            hidden=hidden,
            shapes=" ".join(f"{str(t.dtype)[6:]}{list(t.shape)}" for t in (*inputs[:3], *outputs[:1])),
            lowered=kind not in ("products", "convolutions", "attention") or inputs[0].dtype != torch.float32,
        )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return tensor_bytes(tensor.shape, tensor.stride(), tensor.itemsize)


def totals(kernels: Sequence[Kernel]) -> Iterator[tuple[str, int, int]]:
    """Yield kind, number of kernels and bytes, the most bytes first."""
    kinds = {kernel.kind for kernel in kernels}
    groups = [(kind, [kernel for kernel in kernels if kernel.kind == kind]) for kind in kinds]
    for kind, group in sorted(groups, key=lambda pair: -sum(k.moved for k in pair[1])):
        yield kind, len(group), sum(k.moved for k in group)
