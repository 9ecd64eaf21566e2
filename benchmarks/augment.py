"""Measure RandAugment for a batch: timm's on Pillow images, ours on the CPU, and grouped by operation on a GPU.

    python benchmarks/augment.py --data DIR [--seconds 5]

A batch of 128 crops at 224 from the images in DIR, rand-m9-mstd0.5-inc1, the same operations for all; candidates take turns.
Times are CPU time of this process, or of the device for a GPU. --single also measures each operation alone on one image.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.loader import find_source
from benchmarks.pillow_rand_augment import apply
from benchmarks.timing import in_turn, timed
from common.rng import keyed_generator
from config.command_line import Parser
from data.augment.device_stage import DeviceStage
from data.augment.mixup import Mixup
from data.augment.rand_augment import RandAugment, augment
from data.augment.rand_augment_policy import INCREASING_OPS, Op, argument, draw_ops, parse_policy
from data.augment.transforms import EvalTransform
from data.loaders.batch import Batch
from data.loaders.image_source import load
from tools.device import choose_device

FILL = (124, 116, 104)
POLICY = "rand-m9-mstd0.5-inc1"


def apply_timm(image: Tensor, ops: Sequence[Op]) -> Tensor:
    """Apply timm's operations to a Pillow image, from tensor to tensor, uint8 (3, H, W)."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return torch.from_numpy(np.array(apply(picture, ops, FILL))).permute(2, 0, 1)


def measure(candidates: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of each candidate's calls, made in turn for about `seconds`, at least 3 of each."""
    device = choose_device("auto")
    clocks = {name: "wall" if device.type == "cuda" and "GPU" in name else "cpu" for name in candidates}
    for run in candidates.values():  # warm-up
        run()
    a_round = sum(timed(run, 1, device) for run in candidates.values())
    found = in_turn(candidates, max(3, math.ceil(seconds / a_round)), 0.0, device, clock=clocks)
    return {name: [1e3 * value for value in values] for name, values in found.items()}


def batch_candidates(images: Tensor) -> dict[str, Callable[[], object]]:
    """Return the candidates for a whole batch."""
    policy = parse_policy(POLICY)
    ops = [draw_ops(policy, keyed_generator(0, "augment", 0, row), "bicubic") for row in range(len(images))]
    cpu = RandAugment(FILL)
    candidates: dict[str, Callable[[], object]] = {
        "timm, Pillow, an image at a time": lambda: [apply_timm(*pair) for pair in zip(images, ops, strict=True)],
        "ours on the CPU (an image at a time)": lambda: cpu(images, ops),
    }
    if torch.cuda.is_available():
        gpu, moved = RandAugment(FILL, "cuda"), images.cuda()
        stage = DeviceStage(Mixup(1000), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0, "cuda")
        batch = stage_batch(moved)
        candidates["ours on the GPU (by groups)"] = lambda: gpu(moved, ops)
        candidates["normalise, erase and mix on the GPU"] = lambda: stage.train(batch, 0, 0, 0)
    else:
        candidates["ours by groups, on the CPU"] = lambda: cpu.grouped(images, ops)
    return candidates


def stage_batch(images: Tensor) -> Batch:
    """Return a batch with a box of random erasing on each image."""
    count = len(images)
    boxes = torch.tensor([20, 30, 90, 80]).expand(count, 1, 4)
    return Batch(images, torch.arange(count), torch.arange(count), boxes)


def show(console: Console, title: str, found: dict[str, list[float]], images: int) -> None:
    """Print a table of medians and spreads."""
    table = Table("", "ms", "lowest .. highest", "ms an image", "ratio", title=title)
    base = statistics.median(next(iter(found.values())))
    for name, values in found.items():
        middle = statistics.median(values)
        spread = f"{min(values):.2f} .. {max(values):.2f}"
        table.add_row(name, f"{middle:.2f}", spread, f"{middle / images:.3f}", f"{base / middle:.2f}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser("Measure RandAugment: timm's, ours on the CPU, ours on a GPU.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of class folders of images")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="length, for the batch and for each operation of --single (10)"
    )
    parser.add_argument("--batch", type=int, default=128, help="images of a batch (128)")
    parser.add_argument("--size", type=int, default=224, help="side of the crops (224)")
    parser.add_argument("--single", action="store_true", help="also measure each operation on one image")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        console, source = Console(), find_source(args.data)
    except ValueError as error:
        parser.fail(error)
    crop = EvalTransform(args.size)
    images = torch.stack([crop(load(source, i % len(source))) for i in range(args.batch)])
    found = measure(batch_candidates(images), args.seconds)
    show(console, f"RandAugment, {args.batch} images at {args.size}, {POLICY}", found, args.batch)
    for name in INCREASING_OPS if args.single else ():
        op = [Op(name, argument(name, 9.3), "bicubic")]
        candidates = {"timm": partial(apply_timm, images[0], op), "ours": partial(augment, images[0], op, FILL)}
        show(console, name, measure(candidates, args.seconds), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
