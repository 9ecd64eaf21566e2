"""Roofline: the least time (floor) of a step on a machine, from its arithmetic and its memory traffic.

Ideal fusion is assumed: matrix products, convolutions and attention read their inputs and write their outputs once, everything
else is fused into them. The step runs on fake tensors, without computing values.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.timing import timed
from engine.precision import DTYPES

H200 = (0.85 * 4.8e12, 600e12)  # attainable bytes/s and operations/s of this GPU
ADAMW_BYTES = 28  # for each float32 weight: read it, its gradient and two moments, write it and the moments


@dataclass(frozen=True)
class Machine:
    """Peak rates of a device."""

    bandwidth: float  # bytes/s
    arithmetic: float  # operations/s, a multiply-add counting two
    source: str


@dataclass(frozen=True)
class Work:
    """Operations and memory traffic of a step."""

    operations: float
    bytes: float

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """Return the floor in seconds, and the time if traffic and arithmetic do not overlap."""
        memory, arithmetic = self.bytes / machine.bandwidth, self.operations / machine.arithmetic
        return max(memory, arithmetic), memory + arithmetic


class Counter(TorchDispatchMode):
    """Count operations and bytes of matrix products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in str(func):
            self.operations += attention_operations(args, "backward" in str(func))
        elif func is torch.ops.aten.convolution_backward.default:
            self.operations += convolution_backward_operations(args)
        elif func.overloadpacket in flop_registry:
            self.operations += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        else:
            return out
        self.bytes += sum(stored(t) for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        return out


def stored(tensor: Tensor) -> int:
    """Return the bytes that a tensor occupies; expanded dimensions count once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def attention_operations(args: Sequence[Any], backward: bool) -> int:
    """Return the operations of attention from its arguments: two products forward, five backward."""
    q, k, v = args[1:4] if backward else args[:3]
    pairs = math.prod(q.shape[:-1]) * k.shape[-2]
    widths = 3 * q.shape[-1] + 2 * v.shape[-1] if backward else q.shape[-1] + v.shape[-1]
    return int(2 * pairs * widths)


def convolution_backward_operations(args: Sequence[Any]) -> int:
    """Return the operations of a convolution's gradients from its arguments; torch's own count ignores groups."""
    grad, weight, wanted = args[0], args[2], args[-1]
    return int(2 * grad.numel() * weight[0].numel() * sum(wanted[:2]))


def work_of(model: nn.Module, images: tuple[int, int, int, int], precision: str, train: bool) -> Work:
    """Return the work of a step of a model, on the CPU, for a batch of shape `images`; training includes AdamW."""
    autocast = torch.autocast("cpu", DTYPES[precision]) if precision in DTYPES else nullcontext()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    own: dict[str, Tensor] = {
        name: fake.from_tensor(t.detach()) for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    for name, parameter in model.named_parameters():
        own[name].requires_grad_(train and parameter.requires_grad)
    model.train(train)
    with fake, Counter() as counter, torch.set_grad_enabled(train):
        with autocast:
            y = torch.func.functional_call(model, own, (torch.empty(images),))
        if train:
            y.float().sum().backward()
    weights = sum(p.numel() for p in model.parameters()) if train else 0
    return Work(counter.operations, counter.bytes + ADAMW_BYTES * weights)


def machine(
    device: torch.device, precision: str, gbyte_s: float | None, tflops: float | None, clock: str = "wall"
) -> Machine:
    """Return the device's peak rates: as given, H200's from the table, or measured by a copy and a matrix product."""
    if device.type == "cuda" and "H200" in torch.cuda.get_device_name(device) and precision in DTYPES:
        known, source = H200, "4.8 TB/s at 85%, 600 TFLOP/s"
    else:
        known = (
            1e9 * gbyte_s if gbyte_s else measure_copy(device, clock),
            1e12 * tflops if tflops else measure_product(device, DTYPES.get(precision, torch.float32), clock),
        )
        source = "measured by a copy and a matrix product"
    if gbyte_s or tflops:
        source = "as given" if gbyte_s and tflops else f"partly given, else {source}"
    bandwidth, arithmetic = 1e9 * gbyte_s if gbyte_s else known[0], 1e12 * tflops if tflops else known[1]
    return Machine(bandwidth, arithmetic, source)


def best(run: Callable[[], object], device: torch.device, clock: str, repeats: int = 8) -> float:
    """Return the seconds of the fastest of some calls."""
    run()
    return min(timed(run, 1, device, clock) for _ in range(repeats))


def measure_copy(device: torch.device, clock: str, size: int = 2**28) -> float:
    """Return bytes/s read and written by a copy of `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / best(lambda: target.copy_(source), device, clock)


def measure_product(device: torch.device, dtype: torch.dtype, clock: str) -> float:
    """Return operations/s of a matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.ones(side, side, dtype=dtype, device=device), torch.ones(side, side, dtype=dtype, device=device)
    return 2 * side**3 / best(lambda: a @ b, device, clock)
