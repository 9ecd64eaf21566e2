"""Kernels of a compiled training step, as Inductor's scheduler plans them for the described GPU; nothing is generated or run.

Fusion is exact. Caches are ideal: a kernel reads each element that it touches once and writes it once. Not counted are second
passes of looped reductions, and workspaces and weight casts of libraries.
"""

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo as dynamo
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import dependencies, graph, ir, scheduler
from torch._inductor.fx_passes import fuse_attention, joint_graph, pad_mm
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.described_gpu import DEVICE
from benchmarks.kernel_counts import Kernel, hidden_copies, kind_of, rounds_of, tensor_bytes


class _NotRunError(Exception):
    """Raised in place of the first compiled graph's run."""


def compiled_kernels(
    model: nn.Module, x: Tensor, mode: FakeTensorMode, dtype: torch.dtype | None, options: dict[str, Any]
) -> tuple[list[Kernel], int]:
    """Return the kernels of a compiled forward and backward pass under autocast to `dtype`, and the number of graph breaks.

    model and x hold fake tensors of `mode`, within `described_gpu`. options: those of torch.compile.
    """
    found: list[Kernel] = []

    def compile_to_module(lowering: Any) -> ModuleType:
        lowering.init_wrapper_code()
        lowering._update_scheduler()
        found.extend(_walk(lowering.scheduler.nodes, "backward" if lowering.is_backward else "forward"))
        module = ModuleType("planned")
        module.__dict__.update(call=_refuse, __file__="", runner=None)
        return module

    dynamo.reset()
    before = sum(counters["graph_break"].values())
    settings = {"fallback_random": True, "force_disable_caches": True, "compile_threads": 1}
    autograd = {"force_non_lazy_backward_lowering": True, "enable_autograd_cache": False}
    with (
        warnings.catch_warnings(action="ignore"),  # of caches that are off
        _described_triton(),
        inductor_config.patch(settings),
        functorch_config.patch(autograd),
        mock.patch.object(graph.GraphLowering, "compile_to_module", compile_to_module),
        mock.patch.object(pad_mm, "_should_pad", return_value=False),  # the real one measures products
        mock.patch.object(fuse_attention, "_get_sfdp_patterns", _patterns(fuse_attention._get_sfdp_patterns)),
        mock.patch.object(joint_graph.UniformValueConstantFolder, "_deduce_value", _deduce),
        contextlib.suppress(_NotRunError),
        torch.autocast(DEVICE.type, dtype, enabled=dtype is not None),
    ):
        compiled = torch.compile(model, dynamic=False, options=options)
        with mode:
            compiled(x)
    breaks = sum(counters["graph_break"].values()) - before
    dynamo.reset()
    return found, breaks


def _refuse(arguments: Any) -> Any:
    raise _NotRunError


@contextlib.contextmanager
def _described_triton() -> Iterator[None]:
    """Give Triton a driver of the described GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    sizes = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
    clocks = {"sm_clock_rate": 1980000, "mem_clock_rate": 2619000, "mem_bus_width": 5120}
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: DEVICE,
        get_device_interface=lambda: torch.cuda,
        utils=SimpleNamespace(get_device_properties=lambda device: {**sizes, **clocks}),
    )
    with mock.patch.object(triton.runtime.driver, "_active", driver, create=True):
        yield


def _patterns(search: Any) -> Any:
    """Return a search for attention patterns that does not copy numbers to the device."""

    def patterns(*args: Any, **options: Any) -> Any:
        filled = lambda value, device=None, **kwargs: torch.full((), value, device=device)  # noqa: E731
        with mock.patch.object(torch, "tensor", filled):
            return list(search(*args, **options))

    return patterns


_deduce_value = joint_graph.UniformValueConstantFolder._deduce_value


def _deduce(folder: Any, node: Any) -> Any:
    """Fold constants on the CPU: Inductor computes them."""
    kept = dict(node.kwargs)
    if kept.get("device") is None or torch.device(kept["device"]).type != DEVICE.type:
        return _deduce_value(folder, node)
    node.kwargs = {**kept, "device": torch.device("cpu")}
    try:
        return _deduce_value(folder, node)
    finally:
        node.kwargs = kept


def _walk(nodes: Iterable[Any], phase: str) -> Iterator[Kernel]:
    for node in nodes:
        if isinstance(node, scheduler.NopKernelSchedulerNode):
            continue
        if isinstance(node, scheduler.ExternKernelSchedulerNode):
            if not isinstance(node.node, ir.MultiOutput):
                yield _library_call(node, phase)
        elif isinstance(node, scheduler.GroupedSchedulerNode | scheduler.ForeachKernelSchedulerNode) and not isinstance(
            node, scheduler.FusedSchedulerNode
        ):
            yield from _walk(node.snodes, phase)
        else:
            yield _fused(node, phase)


def _library_call(node: Any, phase: str) -> Kernel:
    """Return the record of a product, a convolution or another operator that Inductor calls."""
    call = node.node
    operator = getattr(call, "op_overload", None)
    name = str(operator) if operator is not None else getattr(call, "python_kernel_name", None) or type(call).__name__
    inputs = list(_flat(call.inputs))
    if isinstance(call.layout, ir.MultiOutputLayout):
        users = V.graph.scheduler.name_to_buf[call.get_name()].users
        used = [getattr(user.node, "node", None) for user in users]
        every = [out for out in (*used, *(getattr(call, "outputs", None) or ())) if isinstance(out, ir.MultiOutput)]
        outputs = list({id(out): out for out in every}.values())
        write = sum(_view_bytes(out) for out in outputs)
    elif isinstance(call.layout, ir.NoneLayout):
        outputs, write = [], sum(_buffer_bytes(name) for name in call.get_mutation_names())
    else:
        outputs, write = [call], _view_bytes(call)
    kind = kind_of(name.replace("extern_kernels.mm", "aten.mm").replace("extern_kernels", "aten"))
    kind = "other library calls" if kind == "other pointwise" else kind
    rounds = rounds_of(name, list(_flat(call.constant_args)))
    return Kernel(
        kind=kind,
        name=name,
        phase=phase,
        read=rounds * sum(_view_bytes(i) for i in inputs),
        write=rounds * write,
        hidden=_hidden(name, inputs),
        shapes=" ".join(_shape(i) for i in inputs) + " -> " + " ".join(_shape(out) for out in outputs),
        lowered=kind not in ("products", "convolutions", "attention") or inputs[0].get_dtype() != torch.float32,
    )


def _fused(node: Any, phase: str) -> Kernel:
    """Return the record of a Triton kernel that Inductor generates."""
    own = set(node.get_buffer_names())
    members = set(node.get_nodes())
    reads, writes = defaultdict(list), defaultdict(list)
    for access in node.read_writes.reads:
        known = access.name in V.graph.name_to_buffer or access.name in V.graph.graph_inputs
        if access.name not in own and known:
            reads[access.name].append(access)
    for access in node.read_writes.writes:
        users = V.graph.scheduler.name_to_buf[access.name].users if access.name in own else ()
        if access.name not in own or any(user.node not in members for user in users):
            writes[access.name].append(access)
    moved = [
        (_footprint(d), f"{what}:{_named_shape(b)}")
        for what, ds in (("r", reads), ("w", writes))
        for b, d in ds.items()
    ]
    origins = {
        str(getattr(origin.target, "overloadpacket", origin.target)).replace("aten.", "").replace("prims.", "")
        for member in members
        if member.node is not None
        for origin in member.node.origins
        if origin.op == "call_function"
    }
    return Kernel(
        kind="fused, with sums" if any(member.is_reduction() for member in members) else "fused pointwise",
        name=",".join(sorted(origins)),
        phase=phase,
        read=sum(_footprint(d) for d in reads.values()),
        write=sum(_footprint(d) for d in writes.values()),
        shapes=" ".join(text for _, text in sorted(moved, reverse=True)[:7]),
    )


def _footprint(accesses: Sequence[Any]) -> int:
    """Return the bytes of a buffer that several accesses touch: of those at one offset the largest, at most all of it."""
    whole = _buffer_bytes(accesses[0].name)
    by_offset: dict[Any, int] = {}
    for access in accesses:
        if not isinstance(access, dependencies.MemoryDep) or access.is_indirect():
            return whole
        offset = access.index.as_coeff_Add()[0] if hasattr(access.index, "as_coeff_Add") else 0
        count = _number(access.get_numel()) * V.graph.get_dtype(access.name).itemsize
        by_offset[offset] = max(by_offset.get(offset, 0), count)
    return min(whole, sum(by_offset.values())) if whole else sum(by_offset.values())


def _hidden(name: str, inputs: Sequence[Any]) -> int:
    if "aten.convolution" not in name:
        return 0
    maps, weight = (inputs[:2], inputs[2]) if "backward" in name else (inputs[:1], inputs[1])
    return hidden_copies([(*_layout(m), m.get_dtype().itemsize) for m in maps], _layout(weight))


def _flat(tree: Any) -> Iterator[Any]:
    if isinstance(tree, list | tuple):
        for part in tree:
            yield from _flat(part)
    elif tree is not None:
        yield tree


def _number(expression: Any) -> int:
    return (
        expression if isinstance(expression, int) else int(V.graph.sizevars.optimization_hint(expression, fallback=0))
    )


def _layout(node: Any) -> tuple[list[int], list[int]]:
    return [_number(s) for s in node.get_size()], [_number(s) for s in node.get_stride()]


def _view_bytes(node: Any) -> int:
    try:
        return tensor_bytes(*_layout(node), node.get_dtype().itemsize)
    except (AttributeError, NotImplementedError):  # nodes without a shape: numbers, generators
        return 0


def _buffer(name: str) -> Any:
    return V.graph.get_buffer(name) if name in V.graph.name_to_buffer else V.graph.graph_inputs.get(name)


def _buffer_bytes(name: str) -> int:
    return _view_bytes(_buffer(name))


def _named_shape(name: str) -> str:
    return _shape(_buffer(name))


def _shape(node: Any) -> str:
    try:
        return f"{str(node.get_dtype())[6:]}{_layout(node)[0]}"
    except (AttributeError, NotImplementedError):
        return "?"
