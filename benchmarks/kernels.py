"""Measure each Triton kernel against the PyTorch layer it replaces, eager and under torch.compile, all taking turns.

    python benchmarks/kernels.py                         # on a GPU: the maps of the models at 224, batch 128, bfloat16
    python benchmarks/kernels.py --tiles                 # also tries other tiles than the kernel's own
    TRITON_INTERPRET=1 python benchmarks/kernels.py --batch 1 --size 32 --channels 8 --rounds 1    # on a CPU: a functional check

"inference" is a forward pass without gradients, "training" a forward pass and the gradients of map, weight and bias. GB/s
counts the least bytes to move: the map read and written once, and for the gradients two maps read and one written. The share
is of the rate of copying a large tensor in the same run. Before anything is timed, the kernel is compared with the layer in
float64. The table goes to benchmarks/results/ as Markdown and JSON. A kernel whose ratio to the compiled layer is not above
1 must not become a default.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from torch import Tensor

import models  # noqa: F401  registers the families
from benchmarks import record
from config.command_line import Parser
from models.kernels.switch import use_kernels
from models.layers import GeluDepthwiseConv
from tools.device import choose_device
from tools.tables import markdown_table, terminal_table

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES = {"inference": 2, "training": 5}  # least reads and writes of the map
STRIPS, COLUMNS, CHANNELS, WARPS = (2, 4, 8), (2, 4), (32, 64, 128), (2, 4, 8)  # values that --tiles tries


class KernelCase(NamedTuple):
    """A feature map of a model that a kernel runs on, (B, H, W, C)."""

    model: str
    stage: int
    shape: tuple[int, int, int, int]
    gelu_before: bool


def find_cases(names: Sequence[str], batch: int, size: int, channels: int) -> Iterator[KernelCase]:
    """Yield the hidden map of a block of each stage of each model, cut to at most `channels` channels."""
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name, img_size=size)
        for stage, side in zip(range(4), (size // 4, size // 8, size // 16, size // 32), strict=True):
            layers = [m for m in model.stages[stage].modules() if isinstance(m, GeluDepthwiseConv)]
            if not layers:
                raise ValueError(
                    f"--models {name}: no layer of it has a Triton kernel: those of SG-Former and STViT do"
                )
            shape = (batch, side, side, min(channels, layers[0].in_channels))
            yield KernelCase(model=name, stage=stage, shape=shape, gelu_before=layers[0].gelu_before)


class KernelBench:
    """The candidates of a case with their input: eager, kernel and, if `compiled`, compiled."""

    def __init__(self, case: KernelCase, dtype: torch.dtype, device: torch.device, compiled: bool):
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.x = torch.randn(case.shape, device=device, dtype=dtype).requires_grad_()
        self.gradient = torch.randn(case.shape, device=device, dtype=dtype)
        self.plain = GeluDepthwiseConv(case.shape[3], case.gelu_before).to(device, dtype)
        self.kernel = GeluDepthwiseConv(case.shape[3], case.gelu_before).to(device, dtype)
        self.kernel.load_state_dict(self.plain.state_dict())
        use_kernels(self.kernel)
        self.layers: dict[str, Callable[[Tensor], Tensor]] = {"eager": self.plain, "kernel": self.kernel}
        if compiled:
            torch._dynamo.reset()
            self.layers["compiled"] = torch.compile(self.plain, fullgraph=True, dynamic=False)

    def call(self, candidate: str, mode: str) -> Callable[[], Any]:
        """Return a candidate's call in a mode, inference or training."""
        layer, x, parameters = self.layers[candidate], self.x, list(self.plain.parameters())
        if candidate == "kernel":
            parameters = list(self.kernel.parameters())

        def inference() -> None:
            with torch.no_grad():
                layer(x)

        def training() -> None:
            torch.autograd.grad(layer(x), (x, *parameters), self.gradient)

        return inference if mode == "inference" else training

    def difference(self) -> float:
        """Return the largest relative difference of the kernel's output and gradients from float64, on two images."""
        found = []
        for layer, dtype in ((self.kernel, self.x.dtype), (self.plain.double(), torch.float64)):
            x = self.x.detach()[:2].to(dtype).requires_grad_()
            y = layer(x)
            found.append((y, *torch.autograd.grad(y, (x, *layer.parameters()), self.gradient[:2].to(dtype))))
        self.plain.to(self.x.dtype)
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True))


def seconds(call: Callable[[], Any], device: torch.device, span: float) -> float:
    """Return the median time of a call over about `span` seconds; on a GPU with the second-level cache flushed."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=int(200 * span), rep=int(1000 * span), return_mode="median")) / 1e3
    times: list[float] = []
    while not times or sum(times) < span:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bandwidth(device: torch.device, span: float) -> float:
    """Return the bytes per second read and written by copying a tensor of 1 GiB (on a CPU 64 MiB)."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, span)


def measure(bench: KernelBench, rounds: int, span: float) -> list[dict[str, Any]]:
    """Return a row for inference and one for training: seconds of each candidate by round."""
    rows = []
    difference = bench.difference()
    for mode in PASSES:
        times: dict[str, list[float]] = {name: [] for name in bench.layers}
        for _ in range(rounds):
            for name in times:
                times[name].append(seconds(bench.call(name, mode), bench.device, span))
        rows.append({**bench.case._asdict(), "what": mode, "difference": difference, "seconds": times})
    return rows


def with_statistics(row: dict[str, Any], itemsize: int, peak: float) -> dict[str, Any]:
    """Return a row with medians, GB/s, share of `peak`, and the ratio of the compiled (or eager) layer to the kernel."""
    times = row["seconds"]
    against = times.get("compiled", times["eager"])
    ratios = [other / own for other, own in zip(against, times["kernel"], strict=True)]
    count = PASSES[row["what"]] * itemsize
    for size in row["shape"]:
        count *= size
    rate = count / statistics.median(times["kernel"])
    return {
        **row,
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "gigabytes_per_second": rate / 1e9,
        "share": rate / peak,
    }


def try_tiles(bench: KernelBench, span: float) -> Iterator[dict[str, Any]]:
    """Yield the milliseconds of every tile: forward tiles in inference, backward tiles in training."""
    from models.kernels import depthwise

    kept = depthwise.FORWARD, depthwise.BACKWARD
    for mode, name in (("inference", "FORWARD"), ("training", "BACKWARD")):
        for tile in (
            depthwise.Tile(s, c, n, w)
            for s in STRIPS
            for c in COLUMNS
            for n in CHANNELS
            for w in WARPS
            if 2 <= s * n / (32 * w) <= 4  # elements of a thread
        ):
            setattr(depthwise, name, tile)
            milliseconds = 1e3 * seconds(bench.call("kernel", mode), bench.device, span)
            case = {"model": bench.case.model, "stage": bench.case.stage, "what": mode}
            yield {**case, "tile": tile._asdict(), "milliseconds": milliseconds}
        depthwise.FORWARD, depthwise.BACKWARD = kept


HEADER = (
    *("model", "stage", "map", "GELU", "", "eager ms", "compiled ms", "kernel ms", "ratio to compiled"),
    *("lowest .. highest", "GB/s", "share", "difference"),
)


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as cells, as HEADER names them."""
    compiled = row["milliseconds"].get("compiled")
    return [
        row["model"],
        str(row["stage"]),
        "×".join(map(str, row["shape"])),
        "before" if row["gelu_before"] else "after",
        row["what"],
        f"{row['milliseconds']['eager']:.3f}",
        f"{compiled:.3f}" if compiled else "not run",
        f"{row['milliseconds']['kernel']:.3f}",
        f"{row['ratio']:.2f}" if compiled else f"{row['ratio']:.2f} (eager)",
        f"{row['ratio_lowest']:.2f} .. {row['ratio_highest']:.2f}",
        f"{row['gigabytes_per_second']:.1f}",
        f"{100 * row['share']:.0f} %",
        f"{row['difference']:.1e}",
    ]


def best_tiles(tried: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each map with the three fastest tiles."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in tried:
        groups.setdefault((row["model"], row["stage"], row["what"]), []).append(row)
    lines = []
    for (model, stage, mode), rows in groups.items():
        fastest = sorted(rows, key=lambda row: row["milliseconds"])[:3]
        tiles = ", ".join(f"{tuple(row['tile'].values())} {row['milliseconds']:.3f} ms" for row in fastest)
        lines.append(f"{model} stage {stage} {mode}: {tiles}")
    return lines


def write(rows: Sequence[dict[str, Any]], tried: Sequence[dict[str, Any]], metadata: dict[str, Any], out: Path) -> None:
    """Write the result as JSON and Markdown."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(
        json.dumps({"facts": metadata, "rows": rows, "tiles": tried}, indent=2) + "\n", encoding="utf-8"
    )
    lines = [f"# Kernels, {metadata['date']}, {metadata['hardware']}", "", f"    {metadata['command']}", ""]
    lines += [f"{key}: {value}. " for key, value in metadata.items() if key not in ("date", "hardware", "command")]
    lines += ["", *markdown_table(HEADER, [cells(row) for row in rows])]
    if tried:
        lines += ["", "Fastest tiles (strips, columns, channels, warps):", ""]
        lines += [f"- {line}" for line in best_tiles(tried)]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def gather_metadata(argv: Sequence[str] | None, rounds: int, peak: float) -> dict[str, Any]:
    """Return the metadata of the result: machine, command, versions, peak, tiles, rounds."""
    from models.kernels.depthwise import BACKWARD, FORWARD, INTERPRETED

    metadata = record.metadata("benchmarks/kernels.py", argv, ("triton",))
    return {
        **metadata,
        "hardware": metadata["hardware"] + (", Triton's interpreter: no measure of the kernel" if INTERPRETED else ""),
        "copying reaches": f"{peak / 1e9:.0f} GB/s",
        "tiles (strips, columns, channels, warps)": f"forward {tuple(FORWARD)}, backward {tuple(BACKWARD)}",
        "n": f"{rounds} rounds, candidates in turn, each the median over its time",
    }


def parse(argv: Sequence[str] | None) -> Any:
    """Parse the command line."""
    parser = Parser("Measure the Triton kernels against the PyTorch layers they replace.")
    parser.add_argument("--models", default="stvit_small,sgformer_small", help="model names, separated by commas")
    parser.add_argument("--batch", type=int, default=128, help="images of a batch (default 128)")
    parser.add_argument("--size", type=int, default=224, help="side of the images (default 224)")
    parser.add_argument("--channels", type=int, default=2**30, help="most channels of a map (default all)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of maps and weights (bf16)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--span", type=float, default=0.1, help="seconds for each candidate and round (default 0.1)")
    parser.add_argument("--no-compile", action="store_true", help="without the compiled layer")
    parser.add_argument("--tiles", action="store_true", help="also measure other tiles")
    parser.add_argument(
        "--out", type=Path, help="result file without suffix (default benchmarks/results/<date>-kernels-<device>)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = parse(argv)
    console = record.console()
    device = choose_device("auto")
    try:
        use_kernels(GeluDepthwiseConv(1, True))
        from models.kernels.depthwise import DEVICE

        if device.type != DEVICE:
            raise ValueError("there is no CUDA device; on a CPU set TRITON_INTERPRET=1 for a functional check")
        cases = list(find_cases(args.models.split(","), args.batch, args.size, args.channels))
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    peak = bandwidth(device, args.span)
    rows, tried = [], []
    for case in cases:
        bench = KernelBench(case, DTYPES[args.dtype], device, not args.no_compile)
        rows += [with_statistics(row, bench.x.itemsize, peak) for row in measure(bench, args.rounds, args.span)]
        if args.tiles:
            tried += list(try_tiles(bench, args.span))
    console.print(terminal_table(HEADER, [cells(row) for row in rows]))
    for line in best_tiles(tried):
        console.print(line)
    metadata = gather_metadata(argv, args.rounds, peak)
    out = args.out or record.default_out("kernels")
    write(rows, tried, metadata, out)
    console.print(f"written to {out.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
