"""A GPU that is only described: fake CUDA tensors, torch.compile up to generated source, and backward passes, on any machine.

Tensors have shapes, strides, types and a device, but no values; every question about the device is answered for an H100
(compute capability 9.0). Nothing is launched. Everything that is patched is restored at the end.
"""

import contextlib
import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import functional as F

DEVICE = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="described H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=0,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
)
STREAM = SimpleNamespace(
    cuda_stream=0, device=DEVICE, stream_id=0, device_index=0, device_type=1, is_capturing=lambda: False
)
ANSWERS: dict[str, Any] = {  # of functions in torch.cuda
    "_exchange_device": 0,
    "_get_device_index": 0,
    "_lazy_init": None,
    "_maybe_exchange_device": 0,
    "current_device": 0,
    "current_stream": STREAM,
    "device_count": 1,
    "get_arch_list": ["sm_90"],
    "get_device_capability": (9, 0),
    "get_device_name": PROPERTIES.name,
    "get_device_properties": PROPERTIES,
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    "init": None,
    "is_available": True,
    "is_bf16_supported": True,
    "is_current_stream_capturing": False,
    "is_initialized": True,
    "manual_seed": None,
    "manual_seed_all": None,
    "mem_get_info": (80 << 30, 80 << 30),
    "memory_allocated": 0,
    "set_device": None,
    "set_rng_state": None,
    "synchronize": None,
}
INTERFACE: dict[str, Any] = {  # of Dynamo's interface to CUDA
    "current_device": 0,
    "device_count": 1,
    "exchange_device": 0,
    "get_compute_capability": 90,
    "get_device_properties": PROPERTIES,
    "get_raw_stream": 0,
    "is_available": True,
    "is_bf16_supported": True,
    "is_triton_capable": True,
    "maybe_exchange_device": 0,
    "raise_if_triton_unavailable": None,
    "set_device": None,
    "synchronize": None,
}
ACCELERATOR: dict[str, Any] = {  # torch.accelerator; asked for its availability, autocast would look at the machine
    "_get_device_index": 0,
    "current_accelerator": torch.device("cuda"),
    "current_device_idx": 0,
    "current_device_index": 0,
    "current_stream": STREAM,
    "device_count": 1,
    "is_available": False,
    "synchronize": None,
}


@contextlib.contextmanager
def described_gpu() -> Iterator[FakeTensorMode]:
    """Answer for the described GPU; yield the mode that makes tensors on it."""
    torch._C._ensureCUDADeviceGuardSet()  # CUDA's streams and guards do nothing
    import torch._dynamo.device_interface as interface
    import torch.cuda.amp.common as amp
    from torch.utils._triton import has_triton

    answers = _static(get_device_properties=PROPERTIES, set_device=None, current_device=0)
    worker = type("Worker", (interface.CudaInterface.Worker,), answers)
    with contextlib.ExitStack() as stack:
        has_triton.cache_clear()  # an answer given outside would be kept, and one given here afterwards
        stack.callback(has_triton.cache_clear)

        def patch(owner: Any, **values: Any) -> None:
            for name, value in values.items():
                if hasattr(owner, name):
                    stack.enter_context(mock.patch.object(owner, name, value))

        patch(torch.cuda, **_functions(ANSWERS))
        patch(torch.accelerator, **_functions(ACCELERATOR))
        patch(interface.CudaInterface, Worker=worker, **_static(**INTERFACE))
        patch(torch._C, **_functions({"_cuda_getDevice": 0, "_cuda_getCurrentRawStream": 0}))
        patch(torch._C, **_functions({"_accelerator_getDeviceIndex": 0}))
        patch(torch._C, _conv_determine_backend_memory_format=_convolution_format)
        patch(torch._subclasses.fake_tensor, init_gpu_context=lambda device: None)  # in torch 2.11 it asks the driver
        patch(torch, Generator=_Generator)
        patch(amp, amp_definitely_not_available=lambda: False)
        patch(torch.amp.grad_scaler, amp_definitely_not_available=lambda: False)
        patch(F, scaled_dot_product_attention=_flash_attention)
        patch(torch.autograd, grad=gradients)
        patch(Tensor, backward=_backward)
        yield FakeTensorMode(allow_non_fake_inputs=True)


def to_fake(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replace a model's parameters and buffers by fake ones on the described GPU, of the same strides."""
    for module in model.modules():
        both: list[dict[str, Any]] = [cast(dict[str, Any], module._parameters), cast(dict[str, Any], module._buffers)]
        for tensors in both:
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = fake_like(tensor.detach(), mode)
                    tensors[name] = nn.Parameter(fake, tensor.requires_grad) if tensor.requires_grad else fake
    return model


def fake_like(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Return a fake tensor on the described GPU of the same shape, strides and type."""
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)


def is_channels_last(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Return True for strides that ATen takes for channels_last memory (c10's is_channels_last_strides_2d)."""
    if len(shape) != 4 or stride[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if shape[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * max(shape[d], 1)
    return True


def gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor | None] | None = None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """Compute what torch.autograd.grad does, whose threads do not start for a device that is not there."""
    outputs, inputs = _several(outputs), _several(inputs)
    seeds = [None] * len(outputs) if grad_outputs is None else _several(grad_outputs)
    places: dict[tuple[Node, int], list[int]] = defaultdict(list)
    for i, tensor in enumerate(inputs):
        edge = get_gradient_edge(tensor)
        places[edge.node, edge.output_nr].append(i)
    found: list[Tensor | None] = [None] * len(inputs)

    def arrived(node: Node, number: int, gradient: Tensor) -> None:
        for i in places.get((node, number), ()):
            found[i] = _fitted(gradient, inputs[i])

    wanted = {node for node, _ in places}
    _walk(
        outputs, [torch.ones_like(o) if s is None else s for o, s in zip(outputs, seeds, strict=True)], wanted, arrived
    )
    return tuple(found)


class _Generator(torch.Generator):
    """Generator that lies on the CPU, whatever the device asked for: nothing is drawn from it."""

    def __new__(cls, device: Any = None) -> Any:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


def _backward(tensor: Tensor, gradient: Tensor | None = None, **options: Any) -> None:
    """Compute what Tensor.backward does: add to the gradients of all leaves."""

    def arrived(node: Node, number: int, gradient: Tensor) -> None:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            value = _fitted(gradient, leaf)
            leaf.grad = value if leaf.grad is None else leaf.grad.add_(value)

    _walk([tensor], [torch.ones_like(tensor) if gradient is None else gradient], None, arrived)


def _walk(
    outputs: Sequence[Tensor],
    seeds: Sequence[Tensor],
    wanted: set[Node] | None,
    arrived: Callable[[Node, int, Tensor], None],
) -> None:
    """Walk the graph in the engine's order; call `arrived` with each gradient that is complete. wanted: None for all leaves."""
    buffers: dict[Node, dict[int, Tensor]] = defaultdict(dict)
    for output, seed in zip(outputs, seeds, strict=True):
        edge = get_gradient_edge(output)
        _add(buffers[edge.node], edge.output_nr, seed)
    roots = list(buffers)
    waiting = _dependencies(roots)
    needed = None if wanted is None else _needed(roots, wanted)
    count = itertools.count()
    ready = [(_order(node), next(count), node) for node in roots if not waiting[node]]
    heapq.heapify(ready)
    with torch.no_grad():
        while ready:
            node = heapq.heappop(ready)[2]
            incoming = buffers.pop(node, {})
            for number, value in incoming.items():
                arrived(node, number, value)
            if _is_leaf(node):
                continue
            outgoing: Sequence[Tensor | None] = (None,) * len(node.next_functions)
            if incoming and (needed is None or needed[node]):
                outgoing = _call(node, incoming)
            for (after, number), gradient in zip(node.next_functions, outgoing, strict=False):
                if after is None:
                    continue
                if gradient is not None:
                    _add(buffers[after], number, gradient)
                waiting[after] -= 1
                if not waiting[after]:
                    heapq.heappush(ready, (_order(after), next(count), after))


def _add(buffer: dict[int, Tensor], number: int, gradient: Tensor) -> None:
    buffer[number] = buffer[number] + gradient if number in buffer else gradient


def _call(node: Any, incoming: dict[int, Tensor]) -> Sequence[Tensor | None]:
    """Run a node on the gradients of its outputs, None where there is none, cast as the engine's check does."""
    arguments: list[Tensor | None] = []
    for i, about in enumerate(node._input_metadata):
        gradient = incoming.get(i)
        if gradient is not None and tuple(gradient.shape) != tuple(about.shape):
            gradient = gradient.sum_to_size(about.shape)
        arguments.append(gradient if gradient is None or gradient.dtype == about.dtype else gradient.to(about.dtype))
    outgoing = node(*arguments) if callable(node) else node.apply(*arguments)
    return outgoing if isinstance(outgoing, tuple) else (outgoing,)


def _dependencies(roots: Sequence[Node]) -> Counter[Node]:
    """Return for each node how many edges lead to it."""
    edges: Counter[Node] = Counter()
    seen, stack = set(roots), list(roots)
    while stack:
        for after, _ in stack.pop().next_functions:
            if after is not None:
                edges[after] += 1
                if after not in seen:
                    seen.add(after)
                    stack.append(after)
    return edges


def _needed(roots: Sequence[Node], wanted: set[Node]) -> dict[Node, bool]:
    """Return for each node True if a wanted one can be reached from it: the engine runs only those."""
    needed: dict[Node, bool] = {}
    stack, open_nodes = list(roots), set()
    while stack:
        node = stack[-1]
        after = [n for n, _ in node.next_functions if n is not None]
        if node in open_nodes or node in needed:
            stack.pop()
            needed[node] = any(n in wanted or needed.get(n, False) for n in after)
            continue
        open_nodes.add(node)
        stack += [n for n in after if n not in needed and n not in open_nodes]
    return needed


def _order(node: Any) -> int:
    return -(1 << 62) if _is_leaf(node) else -node._sequence_nr()


def _is_leaf(node: Any) -> bool:
    return type(node).__name__ == "AccumulateGrad"


def _fitted(gradient: Tensor, leaf: Tensor) -> Tensor:
    if gradient.shape != leaf.shape:
        gradient = gradient.sum_to_size(leaf.shape)
    return gradient.to(leaf.dtype)


def _several(tensors: Any) -> list[Any]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _functions(values: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """Return functions of any arguments that return these values."""
    return {name: lambda *args, _value=value, **options: _value for name, value in values.items()}


def _static(**values: Any) -> dict[str, Any]:
    return {name: staticmethod(function) for name, function in _functions(values).items()}


def _convolution_format(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """Return the memory format of a convolution's output in cuDNN: that of input or weight (ATen/native/ConvUtils.h)."""
    last = any(is_channels_last(t.shape, t.stride()) for t in (x, weight))
    return torch.channels_last if last else torch.contiguous_format


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, *mask: Any, scale: float | None = None, **options: Any) -> Tensor:
    """Compute attention by the operator that CUDA dispatches to: flash attention in 16 bits, else the memory-efficient one."""
    if q.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[0]
