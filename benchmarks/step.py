"""Measure the step of our models and of baselines: images/s and memory, in training and inference, all taking turns.

    python benchmarks/step.py --models sgformer_small,stvit_small
    python benchmarks/step.py --models stvit_small --compile --baseline timm.models.vision_transformer:deit_small_patch16_224
    python benchmarks/step.py --models sgformer_small,stvit_small --baseline published=authors:{model}

A training step is forward, cross-entropy, backward and AdamW. --baseline names a baseline, a callable that returns a model; `{model}`
stands for the name of our model. Modules are also searched in oracle/, which git ignores. Ratios are to the first baseline, round
by round, or to our eager model without one. The floor is the roofline of our model (roofline.py); every share is of it. Memory: on a
GPU the peak; on the CPU the bytes that a forward pass keeps for the backward pass. Results go to benchmarks/results/.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import gc
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from benchmarks import record, roofline
from benchmarks.baselines import Baseline, ModelStep, Ours, parse_baseline, parse_choices, parse_models
from benchmarks.record import Row
from benchmarks.timing import CLOCKS, Spread, in_turn, ratios
from common.byte_size import format_bytes
from common.text import shorten
from config.command_line import Parser
from engine.compilation import compile_arguments
from engine.malloc import keep_freed_memory, release_freed_memory
from models.kernels.switch import use_kernels, wins
from tools.device import choose_device

MODES, PRECISIONS = ("train", "infer"), ("fp32", "bf16", "fp16")
WARM_CALLS = 2


def rate(row: Row) -> str:
    """Return a row's images/s as text, or the reason why it failed."""
    return row.get("failed") or f"{row['images_per_s']:.1f}"


def spread_of(key: str, digits: int) -> Callable[[Row], str]:
    """Return a function from a row to its lowest and highest value of `key`, as text."""
    return lambda row: f"{row[key][1]:.{digits}f} .. {row[key][2]:.{digits}f}" if key in row else ""


COLUMNS: record.Columns = {
    "model": lambda row: row["model"],
    "step": lambda row: f"{row['mode']} {row['precision']}",
    "contender": lambda row: row["contender"],
    "images/s": rate,
    "lowest .. highest": spread_of("rates", 1),
    "ratio": lambda row: f"{row['ratio'][0]:.2f}" if "ratio" in row else "",
    "its lowest .. highest": spread_of("ratio", 2),
    "memory": lambda row: format_bytes(row["memory"]) if row.get("memory") else "",
    "floor, images/s": lambda row: f"{row['floor']:.0f} ({row['floor_added']:.0f})" if "floor" in row else "",
    "share": lambda row: f"{row['images_per_s'] / row['floor']:.0%}" if {"images_per_s", "floor"} <= {*row} else "",
}
SHOWN = ("model", "step", "contender", "images/s", "ratio", "memory", "share")  # on a terminal


class Bench:
    """Measurements of one run of the program."""

    def __init__(self, args: Namespace, baselines: Sequence[Baseline], device: torch.device, console: Console):
        self.args, self.baselines, self.device, self.console = args, baselines, device, console
        self.machines: dict[str, roofline.Machine] = {}
        if device.type == "cpu":  # both as train.py does
            keep_freed_memory()
        else:
            torch.backends.cudnn.benchmark = True

    def candidates(self, model: Ours, mode: str, precision: str) -> dict[str, Callable[[], nn.Module]]:
        """Return functions that build the candidates, by name, ours first."""
        ours = partial(self.build_ours, model)
        found: dict[str, Callable[[], nn.Module]] = {"ours": ours}
        if mode == "infer" and model.folds:
            found["ours, folded"] = partial(model.build_folded, self.args.size, self.device, precision)
        if self.args.compile:
            found["ours, compiled"] = ours
        for baseline in self.baselines:
            found[baseline.name] = lambda baseline=baseline: baseline.build(model.name).to(self.device)  # type: ignore[misc]
            if self.args.compile == "all":
                found[f"{baseline.name}, compiled"] = found[baseline.name]
        return found

    def build_ours(self, model: Ours) -> nn.Module:
        """Build our model as train.py runs it on the device, with Triton kernels where MODEL.KERNELS auto chooses them."""
        built = model.build(self.args.size, self.device)
        if self.device.type == "cuda" and wins(built):
            use_kernels(built)
        return built

    def machine(self, precision: str) -> roofline.Machine:
        """Return the device's peak rates, measured once."""
        if precision not in self.machines:
            given = self.args.bandwidth, self.args.tflops
            self.machines[precision] = roofline.machine(self.device, precision, *given, self.args.clock)
        return self.machines[precision]

    def warm(self, name: str, build: Callable[[], nn.Module], mode: str, precision: str) -> tuple[ModelStep, int]:
        """Build a candidate and warm it up; return its step and the bytes it needs."""
        gc.collect()
        before = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        model = build()
        call: Callable[[Tensor], Tensor] = model
        if name.endswith(", compiled"):
            tuned = (
                self.device.type == "cuda" and self.args.backend == "inductor"
            )  # as train.py; baselines ask for nothing
            call = torch.compile(model, backend=self.args.backend, **compile_arguments(model, "default", tuned))
        step = ModelStep(model, call, self.args.batch, self.args.size, precision)
        for _ in range(WARM_CALLS):
            step.set_mode(mode)()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return step, torch.cuda.max_memory_allocated(self.device) - before
        return step, step.kept_bytes() if mode == "train" else 0

    def block(self, model: Ours, mode: str, precision: str, progress: Progress) -> list[Row]:
        """Measure all candidates of a model in one mode and precision; return a row for each."""
        args, candidates = self.args, self.candidates(model, mode, precision)
        task = progress.add_task(f"{model.name} {mode} {precision}", total=len(candidates) * (args.rounds + 1))
        shared = {"model": model.name, "mode": mode, "precision": precision}
        rows: dict[str, Row] = {}
        steps: dict[str, Callable[[], None]] = {}
        for name, build in candidates.items():
            rows[name] = {**shared, "contender": name, "batch": args.batch, "size": args.size}
            try:
                step, memory = self.warm(name, build, mode, precision)
            except (RuntimeError, TypeError, AttributeError) as error:  # baselines, compilers, full memory
                if name in ("ours", "ours, folded"):
                    raise
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                rows[name]["failed"] = (
                    "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"failed: {first[:80]}"
                )
                self.console.print(f"{model.name} {mode} {precision}: {name} {rows[name]['failed']}")
                continue
            finally:
                progress.advance(task)
            steps[name] = step.set_mode(mode)
            rows[name]["memory"] = memory
        seconds = in_turn(
            steps, args.rounds, args.seconds, self.device, advance=lambda: progress.advance(task), clock=args.clock
        )
        base = next((b.name for b in self.baselines if b.name in seconds), "ours")
        for name, times in seconds.items():
            found, against = Spread.from_values([args.batch / s for s in times]), ratios(seconds[base], times)
            rows[name]["images_per_s"] = found.median
            rows[name]["rates"] = (found.median, found.lowest, found.highest)
            rows[name]["ratio"] = (against.median, against.lowest, against.highest)
        progress.remove_task(task)
        return list(rows.values())

    def add_floor(self, model: Ours, rows: Sequence[Row]) -> None:
        """Add the floor to the rows of a model in one mode and precision: seconds of counting on the CPU."""
        args, mode, precision = self.args, rows[0]["mode"], rows[0]["precision"]
        images = (args.batch, 3, args.size, args.size)
        net = model.build(args.size, torch.device("cpu"))
        work = roofline.work_of(net, images, precision, mode == "train")
        floor, added = (args.batch / seconds for seconds in work.seconds(self.machine(precision)))
        for row in rows:
            row.update(floor=floor, floor_added=added)

    def about(self) -> str:
        """Return the peak rates that the floors were computed from, as text."""
        return "; ".join(
            f"{precision}: {found.bandwidth / 1e9:.0f} GB/s, {found.arithmetic / 1e12:.2f} TFLOP/s ({found.source})"
            for precision, found in self.machines.items()
        )


def measure(
    bench: Bench,
    models: Sequence[Ours],
    modes: Sequence[str],
    precisions: Sequence[str],
    write: Callable[[list[Row]], object] = lambda rows: None,
) -> list[Row]:
    """Measure every model in every mode and precision; call `write` with the rows so far before and after each floor."""
    rows: list[Row] = []
    text, bar = TextColumn("{task.description}"), BarColumn()
    with Progress(
        text,
        bar,
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=bench.console,
        disable=not bench.console.is_terminal,
    ) as progress:
        for model in models:
            for precision in precisions:
                for mode in modes:
                    measured = bench.block(model, mode, precision, progress)
                    rows += measured
                    write(rows)
                    bench.add_floor(model, measured)
                    write(rows)
                    torch.compiler.reset()
                    gc.collect()
                    release_freed_memory()
    return rows


def make_parser(description: str) -> Parser:
    """Return a parser with the flags that step.py and throughput.py share."""
    parser = Parser(description)
    parser.add_argument(
        "--models", required=True, metavar="A,B", help="names of our or timm's models, separated by commas"
    )
    parser.add_argument("--modes", default="train,infer", help="train, infer (default both)")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16, fp16, separated by commas (default fp32)")
    parser.add_argument("--size", type=int, default=224, help="side of the images (default 224)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each candidate (default 7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn, at least one step (default 1)")
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="wall, or cpu: images per CPU-second of all threads"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device (auto)")
    parser.add_argument(
        "--bandwidth", type=float, metavar="GB/s", help="memory bandwidth for the floor (default: measured)"
    )
    parser.add_argument(
        "--tflops", type=float, metavar="TFLOP/s", help="arithmetic rate for the floor (default: measured)"
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default inductor)")
    parser.add_argument("--out", type=Path, help="result file without suffix (default benchmarks/results/...)")
    parser.add_argument("--append", action="store_true", help="add to the result file instead of replacing it")
    return parser


def check(args: Namespace) -> torch.device:
    """Check the shared flags and return the device. Raises ValueError for values out of range."""
    for flag in ("size", "rounds"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if args.backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(f"--backend {args.backend}: torch.compile has {', '.join(known)}")
    device = choose_device(args.device)
    if args.clock == "cpu" and device.type == "cuda":
        raise ValueError("--clock cpu does not measure a GPU; leave it out, or measure with --device cpu")
    return device


def metadata(program: str, argv: Sequence[str] | None, bench: Bench) -> dict[str, Any]:
    """Return the metadata of the result: machine, command, versions, rounds, clock, peak rates."""
    args, threads = bench.args, torch.get_num_threads()
    return {
        **record.metadata(program, argv),
        "n": f"{args.rounds} rounds of at least {args.seconds:g} s, candidates in turn, {threads} threads",
        "clock": "wall" if args.clock == "wall" else "CPU time of all threads: images/s are per CPU-second",
        "floor": bench.about(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = make_parser("Measure training and inference steps of models.")
    parser.add_argument("--batch", type=int, default=8, help="images of a step (default 8; give a GPU 128 or more)")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="ours",
        choices=("ours", "all"),
        help="also measure our models, or all candidates, under torch.compile",
    )
    parser.add_argument(
        "--baseline",
        "--opponent",  # its former name
        action="append",
        default=[],
        metavar="[NAME=]MODULE:FACTORY",
        help="baseline to compare with: a callable that returns a model; may be repeated",
    )
    args, console = parser.parse_args(argv), record.console()
    try:
        if args.batch < 1:
            raise ValueError(f"--batch {args.batch}: must be at least 1")
        device = check(args)
        models = parse_models(args.models)
        modes = parse_choices("--modes", args.modes, MODES)
        precisions = parse_choices("--precision", args.precision, PRECISIONS)
        baselines = [parse_baseline(text) for text in args.baseline]
        check_baselines(baselines, models)
        bench = Bench(args, baselines, device, console)
        result = record.ResultFile(args.out or record.default_out("step"), "Steps", COLUMNS, args.append)

        def write(rows: list[Row]) -> Path:
            found = metadata("benchmarks/step.py", argv, bench)
            return result.write({**found, "images": f"{args.batch} of {args.size} x {args.size}"}, rows)

        rows = measure(bench, models, modes, precisions, write)
    except ValueError as error:
        parser.fail(error)
    console.print(record.table({title: COLUMNS[title] for title in SHOWN}, rows))
    console.print(f"written to {write(rows)}")
    return 0


def check_baselines(baselines: Sequence[Baseline], models: Sequence[Ours]) -> None:
    """Look up every baseline before anything is measured. Raises ValueError for one that does not exist."""
    names = [baseline.name for baseline in baselines]
    for name in names:
        if names.count(name) > 1 or name.startswith("ours"):
            raise ValueError(
                f"--baseline: {shorten(name)} names two candidates; write NAME=MODULE:FACTORY with another NAME"
            )
    for baseline in baselines:
        for model in models:
            baseline.find(model.name)


if __name__ == "__main__":
    sys.exit(main())
