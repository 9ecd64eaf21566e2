"""Estimate the cost of an update on 1 to 512 GPUs, and the rates required of loaders and disks; nothing is measured.

    python -m benchmarks.cluster_cost
    python -m benchmarks.cluster_cost --global-batch 1024 --node-gbyte-s 25

The defaults are STViT-Large at 224 on nodes of 8 GPUs. Every assumption is an argument; docs/clusters.md discusses the result.
An update is `accumulation` micro-batches, a third of each forward, two thirds backward. The gradients are all-reduced in buckets
as the last backward pass fills them, one after the other; the communication that outlasts this backward pass is exposed, and so
is the all-reduce of the BatchNorm statistics after it. The processes' consensus on stopping (engine/distributed/consensus.py)
overlaps with the next update.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from rich.console import Console
from rich.table import Table

from config.command_line import Parser
from engine.batch_plan import divisors

FORWARD = 1 / 3  # of a micro-batch's time
MB = 1e6


@dataclass(frozen=True)
class Assumptions:
    """Assumptions about machines, model and recipe; each field is a flag."""

    parameters_m: float = 94.97
    gmacs: float = 15.54  # an image's forward pass
    global_batch: int = 0  # 0: grows with the GPUs
    micro_batch: int = 128  # of a GPU; the largest, where the global batch is fixed
    tflops: float = 150.0  # sustained by a GPU at a large micro-batch
    half_batch: float = 8.0  # micro-batch at which a GPU reaches half of that
    gpus_per_node: int = 8
    gpu_gbyte_s: float = 200.0  # between the GPUs of a node, each way, in a ring
    node_gbyte_s: float = 50.0  # between nodes, each way, all adapters of a node together
    gpu_latency_us: float = 3.0  # of a message between GPUs of a node
    node_latency_us: float = 10.0  # and between nodes
    gradient_bytes: int = 4  # for each parameter
    statistics_k: float = 35.9  # thousand running means and variances, in float32
    host_latency_us: float = 50.0  # of a message between hosts through gloo, which carries the votes
    first_bucket_mb: float = 1.0  # DDP's first bucket, small so that communication starts early
    bucket_mb: float = 25.0
    image_kb: float = 110.0  # of a file, as stored
    images_per_core_s: float = 110.0  # decoded and augmented by a core
    state_bytes: int = 16  # of a checkpoint, for each parameter: weights, EMA, two moments of AdamW
    disk_gbyte_s: float = 1.0  # of one writer
    host_gbyte_s: float = 20.0  # from the GPU to the host's memory
    save_every: int = 500  # updates


@dataclass(frozen=True)
class Cost:
    """Cost of an update on `gpus` GPUs; times in seconds."""

    gpus: int
    nodes: int
    micro_batch: int
    accumulation: int
    compute: float
    reduce: float  # all-reduce of all buckets, one after the other, without waiting
    exposed: float  # communication that the update waits for: the end of `reduce`, and `statistics`
    statistics: float  # all-reduce of BatchNorm's statistics
    consensus: float  # maximum of a number over all processes; overlaps with the next update

    @property
    def images(self) -> int:
        """Number of images of an update."""
        return self.gpus * self.micro_batch * self.accumulation

    @property
    def seconds(self) -> float:
        """Time of the update."""
        return self.compute + self.exposed

    @property
    def images_per_s(self) -> float:
        """Images per second of all GPUs together."""
        return self.images / self.seconds


def buckets(a: Assumptions) -> list[float]:
    """Return the sizes in bytes of the gradient buckets, in the order of their all-reduce."""
    total, sizes = a.parameters_m * 1e6 * a.gradient_bytes, [a.first_bucket_mb * MB]
    if total <= sizes[0]:
        return [total]
    full, rest = divmod(total - sizes[0], a.bucket_mb * MB)
    return sizes + [a.bucket_mb * MB] * int(full) + ([rest] if rest else [])


def all_reduce_seconds(a: Assumptions, size: float, gpus: int) -> float:
    """Return the time to sum `size` bytes over all GPUs: the faster of a ring and of a tree between nodes, as NCCL chooses.

    Ring: 2 (n - 1) steps that send size / n each. Tree: rings in the nodes, up and down a binary tree between them. Both send 2 x
    size over the slowest link; the tree has fewer messages in sequence.
    """
    if gpus == 1:
        return 0.0
    inside = min(gpus, a.gpus_per_node)
    nodes = math.ceil(gpus / a.gpus_per_node)
    slowest = 1e9 * (a.gpu_gbyte_s if nodes == 1 else min(a.gpu_gbyte_s, a.node_gbyte_s))
    latency = 1e-6 * (a.gpu_latency_us if nodes == 1 else max(a.gpu_latency_us, a.node_latency_us))
    ring = 2 * (gpus - 1) * (size / gpus / slowest + latency)
    hops = 2 * (inside - 1) * a.gpu_latency_us + 2 * math.ceil(math.log2(nodes)) * a.node_latency_us
    tree = 2 * size / slowest + 1e-6 * hops
    return min(ring, tree)


def consensus_seconds(a: Assumptions, gpus: int) -> float:
    """Return the time of an all-reduce (maximum) of one number over all processes: halving and doubling."""
    return 2 * math.ceil(math.log2(gpus)) * a.host_latency_us * 1e-6


def exposed_seconds(backward: float, sizes: Sequence[float], times: Sequence[float]) -> float:
    """Return the communication time left after a backward pass that fills the buckets at an even rate."""
    filled, free, total = 0.0, 0.0, sum(sizes)
    for size, seconds in zip(sizes, times, strict=True):
        filled += size
        free = max(free, backward * filled / total) + seconds
    return max(0.0, free - backward)


def cost(a: Assumptions, gpus: int) -> Cost:
    """Estimate the cost of an update. Raises ValueError if the fixed global batch does not divide."""
    if a.global_batch and a.global_batch % gpus:
        raise ValueError(
            f"--global-batch {a.global_batch} does not divide among {gpus} GPUs; give a multiple, or fewer --gpus"
        )
    per_gpu = a.global_batch // gpus if a.global_batch else a.micro_batch
    micro = max(size for size in divisors(per_gpu) if size <= a.micro_batch)
    rate = a.tflops * 1e12 * micro / (micro + a.half_batch)
    pass_seconds = 3 * 2 * a.gmacs * 1e9 * micro / rate
    sizes = buckets(a)
    times = [all_reduce_seconds(a, size, gpus) for size in sizes]
    exposed = exposed_seconds((1 - FORWARD) * pass_seconds, sizes, times) if gpus > 1 else 0.0
    statistics = all_reduce_seconds(a, a.statistics_k * 4e3, gpus) if a.statistics_k else 0.0
    compute, consensus = per_gpu // micro * pass_seconds, consensus_seconds(a, gpus)
    exposed += statistics
    exposed += max(0.0, consensus - compute - exposed)
    return Cost(
        gpus=gpus,
        nodes=math.ceil(gpus / a.gpus_per_node),
        micro_batch=micro,
        accumulation=per_gpu // micro,
        compute=compute,
        reduce=sum(times),
        exposed=exposed,
        statistics=statistics,
        consensus=consensus,
    )


def table(a: Assumptions, counts: Sequence[int]) -> Table:
    """Return a table with a row for each number of GPUs: the update, then the rates required of a node's loaders."""
    shown = Table(title="an update, and the rates required of a node's loaders", box=None)
    for head in (
        "GPUs",
        "batch",
        "micro x acc",
        "compute ms",
        "all-reduce ms",
        "exposed ms",
        "update ms",
        "efficiency %",
    ):
        shown.add_column(head, justify="right")
    for head in ("images/s", "node images/s", "MB/s", "cores"):
        shown.add_column(head, justify="right")
    alone = cost(a, 1)
    for gpus in counts:
        c = cost(a, gpus)
        node = c.images_per_s / c.nodes
        shown.add_row(
            *(f"{gpus}", f"{c.images}", f"{c.micro_batch} x {c.accumulation}"),
            *(f"{1e3 * t:.1f}" for t in (c.compute, c.reduce, c.exposed, c.seconds)),
            f"{100 * c.images_per_s / gpus / alone.images_per_s:.0f}",
            *(f"{c.images_per_s:.0f}", f"{node:.0f}", f"{node * a.image_kb / 1e3:.0f}"),
            f"{math.ceil(node / a.images_per_core_s)}",
        )
    return shown


def small_exchange_lines(a: Assumptions, gpus: int) -> list[str]:
    """Return the cost of an update's small collectives, BatchNorm statistics and consensus, as lines of text."""
    c = cost(a, gpus)
    return [
        f"BatchNorm statistics: {a.statistics_k * 4:.0f} KB an update, {1e3 * c.statistics:.2f} ms on {gpus} GPUs, part of what is exposed",
        f"consensus on stopping: 8 bytes an update, {1e3 * c.consensus:.2f} ms on {gpus} GPUs, overlaps with the next update",
    ]


def checkpoint_lines(a: Assumptions, counts: Sequence[int]) -> list[str]:
    """Return a checkpoint's size and writing time, and its part of the time between two, as lines of text."""
    size = a.parameters_m * 1e6 * a.state_bytes
    written, copied = size / a.disk_gbyte_s / 1e9, size / a.host_gbyte_s / 1e9
    lines = [
        f"gradients: {a.parameters_m * a.gradient_bytes:.0f} MB an update and GPU, in {len(buckets(a))} buckets",
        f"checkpoint: {size / 1e9:.2f} GB, {copied:.2f} s to copy to the host, {written:.1f} s to write; one every "
        f"{a.save_every} updates:",
    ]
    for gpus in counts:
        between = a.save_every * cost(a, gpus).seconds
        lines.append(
            f"  {gpus:>4} GPUs: every {between:.0f} s; training waits {100 * copied / between:.2f} % if written in the background, "
            f"{100 * (copied + written) / between:.2f} % if not; {size / 1e6 / between:.0f} MB/s on average"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser("Estimate the cost of an update on 1 to 512 GPUs from assumptions, each of them a flag.")
    for field in fields(Assumptions):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(
            flag, type=type(field.default), default=field.default, metavar="X", help=f"default {field.default}"
        )
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[2**i for i in range(10)], metavar="N", help="numbers of GPUs"
    )
    args = parser.parse_args(argv)
    try:
        a = parse_assumptions(args)
        shown = table(a, args.gpus)
        lines = checkpoint_lines(a, args.gpus[:1] + args.gpus[-1:]) + small_exchange_lines(a, args.gpus[-1])
    except ValueError as error:
        parser.fail(error)
    console = Console(highlight=False, soft_wrap=True, width=160)
    console.print(shown)
    for line in lines:
        console.print(line)
    return 0


def parse_assumptions(args: argparse.Namespace) -> Assumptions:
    """Return the assumptions of the command line. Raises ValueError for a number out of range."""
    values = {field.name: getattr(args, field.name) for field in fields(Assumptions)}
    may_be_zero = ("global_batch", "half_batch", "gpu_latency_us", "node_latency_us", "host_latency_us", "statistics_k")
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)) or (value == 0 and name not in may_be_zero):
            raise ValueError(f"--{name.replace('_', '-')} {value}: give a positive number")
    if min(args.gpus) < 1:
        raise ValueError(f"--gpus {min(args.gpus)}: give 1 or more")
    return Assumptions(**values)


if __name__ == "__main__":
    sys.exit(main())
