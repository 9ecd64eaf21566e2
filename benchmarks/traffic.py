"""Count kernels and bytes of a training step on a GPU, eager and compiled, on a machine without one.

    python benchmarks/traffic.py --models sgformer_small,groupmixformer_tiny,stvit_small --baseline 'published=authors:{model}'

A step is the forward and the backward pass of a batch under autocast, counted on fake tensors (benchmarks/described_gpu.py). The
models are memory-bound, so that bytes are a forecast of time; they are no measurement.
"""

import ast
import gc
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a program: find the packages

import torch
from torch import nn

from benchmarks import record
from benchmarks.baselines import Baseline, Ours, parse_baseline, parse_choices, parse_models
from benchmarks.compiled_kernels import compiled_kernels
from benchmarks.described_gpu import described_gpu, to_fake
from benchmarks.kernel_counts import EagerKernels, Kernel, totals
from config.command_line import Parser
from engine.precision import DTYPES
from models.kernels.switch import use_kernels
from models.layers import GeluDepthwiseConv

WAYS = ("eager", "compiled")


def eager_kernels(model: nn.Module, shape: Sequence[int], dtype: torch.dtype | None) -> EagerKernels:
    """Return the recorder of an eager forward and backward pass of a model (it becomes fake) for images of this shape."""
    with described_gpu() as mode:
        to_fake(model, mode)
        recorder = EagerKernels()
        with mode, recorder:
            x = _images(shape)
            recorder.kernels.clear()
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                y = model(x)
            recorder.phase = "backward"
            y.float().sum().backward()
    return recorder


def planned_kernels(
    model: nn.Module, shape: Sequence[int], dtype: torch.dtype | None, options: dict[str, Any]
) -> tuple[list[Kernel], int]:
    """Return the kernels of a compiled step of a model (it becomes fake), and the number of graph breaks."""
    with described_gpu() as mode:
        to_fake(model, mode)
        with mode:
            x = _images(shape)
        return compiled_kernels(model, x, mode, dtype, options)


def _images(shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(*shape, device="cuda").to(memory_format=torch.channels_last)


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Parse Inductor's options, NAME=VALUE with a Python literal. Raises ValueError."""
    options = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"--option {text}: write NAME=VALUE with a Python value, e.g. NAME=True") from error
        if name not in torch._inductor.list_options():
            raise ValueError(f"--option {text}: torch.compile has no option {name} (torch._inductor.list_options())")
    return options


def summarize(kernels: Sequence[Kernel], **about: Any) -> dict[str, Any]:
    """Return a row: counts and bytes of a step, in all and by kind."""
    return {
        **about,
        "kernels": len(kernels),
        "fused": sum(kernel.kind.startswith("fused") for kernel in kernels),
        "bytes": sum(kernel.moved for kernel in kernels),
        "forward": sum(kernel.moved for kernel in kernels if kernel.phase == "forward"),
        "hidden": sum(kernel.hidden for kernel in kernels),
        "kinds": {kind: {"kernels": count, "bytes": moved} for kind, count, moved in totals(kernels)},
    }


def _gigabytes(moved: float) -> str:
    return f"{moved / 1e9:.1f}"


def _kinds(row: dict[str, Any]) -> str:
    parts = [(kind, group) for kind, group in row["kinds"].items() if group["bytes"] >= 5e7]
    return ", ".join(f"{kind} {_gigabytes(group['bytes'])} ({group['kernels']})" for kind, group in parts)


COLUMNS: record.Columns = {
    "model": lambda row: row["model"],
    "code": lambda row: row["code"],
    "step": lambda row: row["way"],
    "kernels": lambda row: f"{row['kernels']}" + (f" ({row['fused']} fused)" if row["fused"] else ""),
    "GB": lambda row: _gigabytes(row["bytes"]),
    "forward": lambda row: _gigabytes(row["forward"]),
    "hidden copies": lambda row: _gigabytes(row["hidden"]),
    "GB by kind (kernels)": _kinds,
}


def largest(kernels: Sequence[Kernel], count: int) -> list[str]:
    """Return a line for each of the kernels that move most, equal ones together."""
    groups: dict[tuple[str, str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.phase, kernel.name, kernel.shapes), []).append(kernel)
    ordered = sorted(groups.items(), key=lambda item: -sum(k.moved for k in item[1]))
    return [
        f"{sum(k.read for k in group) / 1e9:6.2f} r {sum(k.write for k in group) / 1e9:6.2f} w {len(group):3d} × {phase} "
        f"{name[:150]} | {shapes[:200]}"
        for (phase, name, shapes), group in ordered[:count]
    ]


def measure(args: Namespace, models: Sequence[Ours], baselines: Sequence[Baseline]) -> Iterator[dict[str, Any]]:
    """Yield a row for each model, code and way, and print the largest kernels with --largest."""
    shape, dtype = (args.batch, 3, args.size, args.size), DTYPES.get(args.precision)
    options, ways = parse_options(args.option), parse_choices("--ways", args.ways, WAYS)
    for ours in models:
        for baseline in (None, *baselines):
            if args.only_baseline and baseline is None:
                continue
            for way in ways:
                started = time.perf_counter()
                if baseline:
                    model = baseline.build(ours.name)
                else:
                    model = ours.build(args.size, torch.device("cpu"), drop_path_rate=args.drop_path)
                    if args.kernels and any(isinstance(module, GeluDepthwiseConv) for module in model.modules()):
                        use_kernels(model)
                model.train()
                about = {"model": ours.name, "code": baseline.name if baseline else "ours", "way": way}
                if way == "eager":
                    kernels, breaks = eager_kernels(model, shape, dtype).kernels, 0
                else:
                    asked = {**getattr(model, "inductor_options", {}), **options}  # as engine/compilation.py
                    kernels, breaks = planned_kernels(model, shape, dtype, asked)
                seconds = time.perf_counter() - started
                row = summarize(kernels, **about, seconds=seconds, graph_breaks=breaks)
                print(" ".join(text(row) for text in COLUMNS.values()), f"{seconds:.0f} s", flush=True)
                for line in largest(kernels, args.largest):
                    print("   ", line, flush=True)
                yield row
                del model, kernels
                gc.collect()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser("Count kernels and bytes of training steps on a GPU, without one.")
    parser.add_argument("--models", default="sgformer_small,groupmixformer_tiny,stvit_small", help="names, with commas")
    parser.add_argument("--batch", type=int, default=128, help="images of a step (default 128)")
    parser.add_argument("--size", type=int, default=224, help="side of the images (default 224)")
    parser.add_argument("--drop-path", type=float, default=0.1, help="drop path rate of our models (default 0.1)")
    parser.add_argument("--precision", default="bf16", choices=("fp32", *DTYPES), help="autocast to it (bf16)")
    parser.add_argument("--ways", default="eager,compiled", help="eager, compiled or both (default)")
    parser.add_argument(
        "--no-kernels", dest="kernels", action="store_false", help="without the Triton kernels that auto takes on CUDA"
    )
    parser.add_argument(
        "--option", action="append", default=[], help="NAME=VALUE of torch.compile's options; repeatable"
    )
    parser.add_argument("--largest", type=int, default=0, metavar="N", help="also print the N largest kernels")
    parser.add_argument(
        "--baseline",
        "--opponent",
        action="append",
        default=[],
        metavar="[NAME=]MODULE:FACTORY",
        help="a callable that returns a model to compare with; may be repeated",
    )
    parser.add_argument("--only-baseline", action="store_true", help="without our models")
    parser.add_argument(
        "--out", type=Path, help="result file without suffix (default benchmarks/results/<month>-traffic)"
    )
    parser.add_argument("--append", action="store_true", help="add to the result file instead of replacing it")
    args, console = parser.parse_args(argv), record.console()
    try:
        for flag in ("batch", "size"):
            if getattr(args, flag) < 1:
                raise ValueError(f"--{flag} {getattr(args, flag)}: must be at least 1")
        models = parse_models(args.models)
        baselines = [parse_baseline(text) for text in args.baseline]
        for baseline in baselines:
            for ours in models:
                baseline.find(ours.name)
        rows = list(measure(args, models, baselines))
    except ValueError as error:
        parser.fail(error)
    console.print(record.table(COLUMNS, rows))
    found = {
        **record.metadata("benchmarks/traffic.py", argv),
        "counted": f"batch {args.batch} at {args.size}, {args.precision}, on a described GPU; nothing was run on one",
    }
    out = args.out or record.RESULTS / f"{time.strftime('%Y-%m')}-traffic"
    page = record.write(out, "Traffic", columns=COLUMNS, found=found, rows=rows, append=args.append)
    console.print(f"written to {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
