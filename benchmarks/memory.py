"""Find the largest micro-batch that trains in a given memory, with and without gradient checkpointing.

    python benchmarks/memory.py --models stvit_small,stvit_large --gib 80 --precision bf16

On a GPU by trial: training steps under that limit, doubling, then halving the interval. Without one it is an estimate, marked as
such in the result: the bytes that autograd keeps, computed on fake tensors as `train.py --dry-run` does, with weights, gradients,
AdamW and EMA. The estimate excludes the workspace of kernels and the allocator's fragmentation; on the CPU it keeps LayerNorm's
input in float32. Results go to benchmarks/results/.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks import record
from benchmarks.baselines import ModelStep, Ours, parse_choices, parse_models
from benchmarks.record import Row
from benchmarks.step import PRECISIONS
from common.byte_size import format_bytes
from config.command_line import Parser
from engine.memory import activations, estimate
from engine.precision import Precision
from tools.device import choose_device

COLUMNS: record.Columns = {
    "model": lambda row: row["model"],
    "precision": lambda row: row["precision"],
    "checkpointing": lambda row: "all blocks" if row["checkpointing"] else "none",
    "largest micro-batch": lambda row: str(row["batch"]) if row["batch"] else "none fits",
    "memory at it": lambda row: format_bytes(row["bytes"]) if row["batch"] else "",
    "an image more": lambda row: format_bytes(row["bytes_an_image"]) if row.get("bytes_an_image") else "",
}


def estimate_largest_batch(model: Ours, size: int, precision: str, limit: int) -> list[Row]:
    """Estimate the largest micro-batch on fake tensors, by linear extrapolation from two batch sizes."""
    net = model.build(size, torch.device("cpu"))
    autocast = Precision("off" if precision == "fp32" else precision, torch.device("cpu")).autocast
    fixed = estimate(net, lambda m: torch.optim.AdamW(m.parameters()), True, (2, 3, size, size), autocast)
    rows = []
    for checkpointing in (False, True):
        net.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
        two, four = (activations(net, (n, 3, size, size), autocast) for n in (2, 4))
        slope = (four - two) / 2
        base = fixed.total - fixed.activations + two - 2 * slope
        batch = max(0, int((limit - base) // slope))
        rows.append({"checkpointing": checkpointing, "batch": batch, "bytes": round(base + batch * slope)})
        rows[-1]["bytes_an_image"] = round(slope)
    return rows


def peak_of_training(net: nn.Module, batch: int, size: int, precision: str, device: torch.device) -> int:
    """Train two steps; return the peak of memory in bytes, 0 if it ran out."""
    try:
        torch.cuda.reset_peak_memory_stats(device)
        step = ModelStep(net, net, batch, size, precision).set_mode("train")
        step()
        step()
        return torch.cuda.max_memory_reserved(device)
    except torch.OutOfMemoryError:
        return 0
    finally:
        net.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()


def largest_fitting(peak: Callable[[int], int], limit: int, most: int) -> tuple[int, int]:
    """Return the largest batch, to 3 %, whose `peak` bytes are not 0 (out of memory), and that peak; (0, 0) if none fits.

    Memory is nearly linear in the batch: the next trial is where the line through the last two that fitted reaches the limit.
    """
    good = bytes_ = 0
    slope, too_large, batch = 0.0, most + 1, min(16, most)
    while good < batch < too_large:
        found = peak(batch)
        if found:
            slope = (found - bytes_) / (batch - good) if good else 0.0
            good, bytes_ = batch, found
        else:
            too_large = batch
        step = max(1, good // 32)
        if good + step >= too_large:
            break
        batch = max(good + int((limit - bytes_) / slope), good + step) if slope > 0 else 2 * good
        if batch >= too_large:
            batch = too_large - step if slope > 0 else (good + too_large) // 2
        batch = batch or too_large // 2
    return good, bytes_


def search_largest_batch(
    model: Ours, size: int, precision: str, *, limit: int, device: torch.device, most: int
) -> list[Row]:
    """Find the largest micro-batch on a GPU by trial."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info(device)[1]), device)
    net, rows = model.build(size, device), []
    averaged = [p.detach().clone() for p in net.parameters()]  # as EMA holds
    for checkpointing in (False, True):
        net.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
        batch, peak = largest_fitting(lambda n: peak_of_training(net, n, size, precision, device), limit, most)
        rows.append({"checkpointing": checkpointing, "batch": batch, "bytes": peak})
    del averaged
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser("Find the largest micro-batch that trains in a given memory.")
    parser.add_argument("--models", required=True, metavar="A,B", help="names of our models, separated by commas")
    parser.add_argument("--gib", type=float, required=True, metavar="GIB", help="memory of a GPU")
    parser.add_argument("--precision", default="bf16", help="fp32, bf16, fp16, separated by commas (default bf16)")
    parser.add_argument("--size", type=int, default=224, help="side of the images (default 224)")
    parser.add_argument("--most", type=int, default=4096, help="largest micro-batch to try on a GPU (default 4096)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device (auto)")
    parser.add_argument("--out", type=Path, help="result file without suffix (default benchmarks/results/...)")
    parser.add_argument("--append", action="store_true", help="add to the result file instead of replacing it")
    args, console = parser.parse_args(argv), record.console()
    try:
        device, limit = choose_device(args.device), round(args.gib * 2**30)
        if limit <= 0 or args.size < 1 or args.most < 1:
            raise ValueError(f"--gib {args.gib:g}, --size {args.size}, --most {args.most}: all must be positive")
        if device.type == "cuda" and limit > torch.cuda.mem_get_info(device)[1]:
            raise ValueError(f"--gib {args.gib:g}: this GPU has {format_bytes(torch.cuda.mem_get_info(device)[1])}")
        metadata = record.metadata("benchmarks/memory.py", argv)
        by_trial = "by trial on this GPU, to 3%; memory is the peak reserved"
        metadata["how"] = by_trial if device.type == "cuda" else "estimated on fake tensors, nothing was allocated"
        metadata["memory given"] = f"{args.gib:g} GiB, images of {args.size} x {args.size}, AdamW and EMA"
        result = record.ResultFile(args.out or record.default_out("memory"), "Memory", COLUMNS, args.append)
        models, rows = parse_models(args.models), []
        for model in models:
            for precision in parse_choices("--precision", args.precision, PRECISIONS):
                shared = {"model": model.name, "precision": precision, "size": args.size}
                found = (
                    search_largest_batch(model, args.size, precision, limit=limit, device=device, most=args.most)
                    if device.type == "cuda"
                    else estimate_largest_batch(model, args.size, precision, limit)
                )
                rows += [{**shared, **row} for row in found]
                page = result.write(metadata, rows)
    except ValueError as error:
        parser.fail(error)
    console.print(record.table(COLUMNS, rows))
    console.print(f"{metadata['how']}; written to {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
