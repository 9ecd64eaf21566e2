"""Measure variants of the models: parameters, multiply-accumulates, activations, latency, memory.

    python -m tools.inspect --all
    python -m tools.inspect stvit_base sgformer_small --size 224 384 512 --no-latency --memory 0
    python -m tools.inspect stvit_base --stages

GMACs count each multiplication with its addition once, for one image, in matrix products (those of attention too) and
convolutions; norms, softmax, activation functions and sums are not counted. Activations are the output values of these
operations, in millions. Latency is the median time of a forward pass of one image in float32 on the CPU. Training memory is
the memory of a process for a micro-batch (--memory) under bfloat16 with AdamW: weights, gradients, moments, activations,
without workspace.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from rich.progress import track
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop

from config.command_line import Parser
from engine.memory import estimate
from models.build import check_name, is_retoken, retoken_models, takes_img_size
from models.custom_model import import_models
from tools.tables import aligned_columns, markdown_table, terminal_table
from tools.terminal import Screen, say

PARTS = ("output", "params M", "GMACs", "activations M")
BATCH = 64  # images of the training step whose memory is estimated
RUNS = 7  # timed forward passes, after one warm-up pass
flop_registry.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop)  # torch 2.11 lacks it


@dataclass(frozen=True)
class Measures:
    """Measurements of a variant: macs by image size, the others at the first size."""

    name: str
    parameters: int
    macs: dict[int, int]
    activations: int
    latency_ms: float | None
    memory: int | None = None  # bytes


@dataclass(frozen=True)
class Part:
    """Measurements of a stem, stage, neck or head, for one image."""

    name: str
    output: tuple[int, ...]  # shape, without the batch
    parameters: int
    macs: int
    activations: int


class ActivationCounter(TorchDispatchMode):
    """Sum of the output sizes of matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            first = out[0] if isinstance(out, tuple) else out
            self.values += first.numel()
        return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = inspect_parser()
    args = parser.parse_args(argv)
    try:
        if bool(args.names) == args.all:
            raise ValueError("give the names of models, or --all")
        if min(args.size) < 1:
            raise ValueError(f"--size {min(args.size)}: give sizes of 1 pixel or more")
        if args.module:
            import_models(args.module, "--module")
        names = retoken_models() if args.all else args.names
        if args.memory < 0:
            raise ValueError(f"--memory {args.memory}: give a number of images, or 0 to leave it out")
        for name in names:
            check_name(name, "NAME")
    except ValueError as error:
        parser.fail(error)
    screen, progress = Screen(), Screen(stderr=True)
    todo: Iterable[str] = names
    if progress.is_terminal and len(names) > 1:
        todo = track(names, "measuring", console=progress, transient=True)
    found = []
    for name in todo:
        parts = stages(name, args.size[0]) if args.stages else []
        found.append((measure(name, tuple(args.size), args.latency, args.memory), parts))
    if args.json:
        print(
            json.dumps(
                [asdict(measures) | {"parts": [asdict(p) for p in parts]} for measures, parts in found], indent=2
            )
        )
        return 0
    titles, rows = header(args.size, args.latency, args.memory), [row(measures) for measures, _ in found]
    print_table(screen, titles, rows, args.markdown)
    print_legend(screen, legend(args.latency, args.memory))
    for measures, parts in found if args.stages else ():
        titles = [f"{measures.name} at {args.size[0]}", *PARTS]
        print_table(screen, titles, [part_row(part) for part in parts], args.markdown)
    return 0


def print_table(screen: Screen, titles: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> None:
    """Print rows as Markdown, as a table on a terminal, as aligned columns elsewhere."""
    if markdown:
        say(*markdown_table(titles, rows, numeric=True))
    elif screen.is_terminal:
        screen.print(terminal_table(titles, rows, numeric=True))
    else:
        say(*aligned_columns([titles, *rows], numeric=True))


def print_legend(screen: Screen, text: str) -> None:
    """Print the legend, dimmed on a terminal."""
    if screen.is_terminal:
        screen.print(text, style="dim")
    else:
        say(text)


def inspect_parser() -> Parser:
    """Return the parser of this tool."""
    parser = Parser("Measure variants of the models: parameters, GMACs, activations, CPU latency.")
    parser.prog = "python -m tools.inspect"
    parser.add_argument("names", metavar="NAME", nargs="*", help="models of Retoken or timm")
    parser.add_argument("--all", action="store_true", help="all of Retoken's")
    parser.add_argument("--module", metavar="FILE", help="file or module that registers custom models")
    parser.add_argument("--size", metavar="PIXELS", type=int, nargs="+", default=[224, 384], help="sides of the image")
    parser.add_argument("--stages", action="store_true", help="also a table of each model's stem, stages and head")
    parser.add_argument(
        "--memory", metavar="N", type=int, default=BATCH, help=f"images of a training step; 0: skip ({BATCH})"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print Markdown tables")
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--no-latency", dest="latency", action="store_false", help="skip the latency, which runs the models"
    )
    return parser


def measure(name: str, sizes: Sequence[int], latency: bool, batch: int = 0) -> Measures:
    """Count a model's operations at each size, on fake tensors; time it and estimate its memory at the first.

    `latency` False skips the timing, `batch` 0 the memory of training on micro-batches of that size.
    """
    macs: dict[int, int] = {}
    activations = []
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # as on the CPU, without computing values
    first = empty(name, sizes[0], fake)
    for size in sizes:
        model = first if is_retoken(name) else empty(name, size, fake)  # ours work at any size
        with fake, torch.no_grad(), ActivationCounter() as counter, FlopCounterMode(display=False) as flops:
            model(torch.empty(1, 3, size, size))
        macs[size] = flops.get_total_flops() // 2
        activations.append(counter.values)
    parameters = sum(p.numel() for p in first.parameters())
    time_ms = time_forward(name, sizes[0]) if latency else None
    memory = training_memory(name, sizes[0], batch) if batch else None
    return Measures(
        name=name,
        parameters=parameters,
        macs=macs,
        activations=activations[0],
        latency_ms=time_ms,
        memory=memory,
    )


def training_memory(name: str, size: int, batch: int) -> int:
    """Estimate the memory of a process, in bytes, for training on micro-batches of `batch` images."""

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    shape = (batch, 3, size, size)
    return estimate(
        build(name, size).train(), lambda m: torch.optim.AdamW(m.parameters()), False, shape, autocast
    ).total


def stages(name: str, size: int) -> list[Part]:
    """Measure each part of a model in the order of execution; parts are the model's children, with each stage its own."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = empty(name, size, fake)
    found: list[Part] = []
    hooks = []
    with fake, torch.no_grad(), ActivationCounter() as counter, FlopCounterMode(display=False) as flops:
        for part, module in children(model):
            before: list[int] = []

            def begin(module: nn.Module, inputs: Any, before: list[int] = before) -> None:
                before[:] = [flops.get_total_flops(), counter.values]

            def end(module: nn.Module, inputs: Any, output: Any, part: str = part, before: list[int] = before) -> None:
                shape = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else ()
                parameters = sum(p.numel() for p in module.parameters())
                macs, activations = (flops.get_total_flops() - before[0]) // 2, counter.values - before[1]
                if parameters or macs:
                    found.append(
                        Part(name=part, output=shape, parameters=parameters, macs=macs, activations=activations)
                    )

            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        model(torch.empty(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return found


def children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of a model by name; those of lists and sequences instead of the lists themselves."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from ((f"{name}.{number}", part) for number, part in child.named_children())
        else:
            yield name, child


def empty(name: str, size: int, fake: FakeTensorMode) -> nn.Module:
    """Build a model of fake tensors, on the meta device first: its initialisation reads values, which fake tensors lack."""
    with torch.device("meta"):
        model = build(name, size)
    with fake:
        return model.to_empty(device="cpu")


def build(name: str, size: int) -> nn.Module:
    """Build a model for images of a size, in eval mode."""
    arguments = {"img_size": size} if takes_img_size(name) else {}
    return timm.create_model(name, **arguments).eval()


@torch.inference_mode()
def time_forward(name: str, size: int) -> float:
    """Return the median time in ms of a forward pass of one image, in float32 on the CPU."""
    model, image = build(name, size), torch.zeros(1, 3, size, size)
    times = []
    for _ in range(1 + RUNS):
        start = time.perf_counter()
        model(image)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def header(sizes: Sequence[int], latency: bool, batch: int = 0) -> list[str]:
    """Return the titles of the columns."""
    macs = [f"GMACs {size}" for size in sizes]
    more = [f"latency ms {sizes[0]}"] if latency else []
    more += [f"training GiB {sizes[0]} x {batch}"] if batch else []
    return ["model", "params M", *macs, f"activations M {sizes[0]}", *more]


def row(measures: Measures) -> list[str]:
    """Return a variant's measurements as cells."""
    macs = [f"{count / 1e9:.2f}" for count in measures.macs.values()]
    latency = [] if measures.latency_ms is None else [f"{measures.latency_ms:.0f}"]
    memory = [] if measures.memory is None else [f"{measures.memory / 2**30:.2f}"]
    counts = [f"{measures.parameters / 1e6:.2f}", *macs, f"{measures.activations / 1e6:.1f}"]
    return [measures.name, *counts, *latency, *memory]


def part_row(part: Part) -> list[str]:
    """Return a part's measurements as cells."""
    shape = " x ".join(map(str, part.output))
    return [part.name, shape, f"{part.parameters / 1e6:.3f}", f"{part.macs / 1e9:.3f}", f"{part.activations / 1e6:.2f}"]


def legend(latency: bool, batch: int = 0) -> str:
    """Return an explanation of the columns, with the conditions of the latency and memory measurements."""
    text = (
        "GMACs: 1 per multiply-add, in matrix products (attention's too) and convolutions; activations: their outputs"
    )
    threads = f"; latency: 1 image, float32, median of {RUNS} on {torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    memory = f"; training: estimated for {batch} images, bfloat16, AdamW, without workspace"
    return text + (threads if latency else "") + (memory if batch else "")


if __name__ == "__main__":
    sys.exit(main())
