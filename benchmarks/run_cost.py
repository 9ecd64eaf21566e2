"""Estimate the time and cost of whole runs, from a floor of their time on one GPU; nothing is measured.

    python -m benchmarks.run_cost
    python -m benchmarks.run_cost --cfg configs/stvit/small_224.yaml --images-per-s 2100 --price 2.5

A floor is the time of the memory traffic plus that of the arithmetic for an image, at the rates of one H200 (85 % of 4.8 TB/s; 600
TFLOP/s in bfloat16), each step with an ideal kernel. No run reaches it; --share is the part that one reaches, and --images-per-s
replaces both with the rate in a run's log. Scaling over GPUs is taken as linear (benchmarks/cluster_cost.py estimates its limits).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from yacs.config import CfgNode

import config
from config.command_line import ROOT, Parser
from tools.tables import markdown_table

TRAINING, VALIDATION = 1_281_167, 50_000  # images of ImageNet-1k
GPUS = (1, 8, 16)
HEAD = ("config", "images, M", "floor, images/s", "GPU-hours at the floor", "GPU-hours")


@dataclass(frozen=True)
class Floor:
    """Upper bounds of images/s of a GPU at 224, in training and inference, and GMACs of an image at 224 and 384."""

    training: float
    inference: float
    gmacs: tuple[float, float]

    def at(self, size: int) -> tuple[float, float]:
        """Return (training, inference) images/s at 224, or at 384 scaled by the operations."""
        factor = self.gmacs[0] / self.gmacs[1] if size == 384 else 1.0
        return self.training * factor, self.inference * factor


FLOORS = {
    "sgformer_small": Floor(7500, 23100, (4.78, 15.27)),
    "sgformer_medium": Floor(5000, 15600, (7.43, 23.75)),
    "sgformer_base": Floor(2800, 8700, (15.54, 48.56)),
    "groupmixformer_mobile": Floor(14800, 49000, (1.33, 3.92)),
    "groupmixformer_tiny": Floor(6700, 22100, (3.69, 10.83)),
    "groupmixformer_small": Floor(6500, 21300, (5.13, 15.08)),
    "groupmixformer_base": Floor(1900, 6100, (17.43, 51.22)),
    "groupmixformer_large": Floor(1050, 3400, (38.07, 111.87)),
    "stvit_small": Floor(8100, 25400, (4.34, 14.08)),
    "stvit_base": Floor(4100, 12700, (9.82, 31.35)),
    "stvit_large": Floor(2900, 9000, (15.54, 49.58)),
}


@dataclass(frozen=True)
class RunCost:
    """Cost of a run."""

    training: int  # images
    evaluation: int  # images
    floor: float  # training images/s of a GPU
    hours: float  # GPU-hours at the floor


def cost(cfg: CfgNode) -> RunCost:
    """Estimate a config's run on ImageNet. Raises ValueError for a model or size without a floor."""
    name, size = cfg.MODEL.NAME, cfg.DATA.IMG_SIZE
    if name not in FLOORS or size not in (224, 384):
        raise ValueError(
            f"MODEL.NAME={name} at DATA.IMG_SIZE={size}: there are floors at 224 and 384 for {', '.join(FLOORS)}"
        )
    epochs = cfg.TRAIN.EPOCHS + cfg.SCHEDULE.COOLDOWN_EPOCHS
    training = epochs * (TRAINING // cfg.TRAIN.GLOBAL_BATCH) * cfg.TRAIN.GLOBAL_BATCH
    evaluation = epochs // cfg.EVAL.EVERY * VALIDATION * (2 if cfg.EMA.DECAY else 1)
    train_rate, eval_rate = FLOORS[name].at(size)
    hours = (training / train_rate + evaluation / eval_rate) / 3600
    return RunCost(training=training, evaluation=evaluation, floor=train_rate, hours=hours)


def recipes() -> list[Path]:
    """List the ImageNet recipes, by family, size and name of the model."""
    paths = [*ROOT.glob("configs/[!_]*/*_224.yaml"), *ROOT.glob("configs/[!_]*/*_384.yaml")]
    order = list(FLOORS)
    return sorted(paths, key=lambda path: (path.stem[-3:], order.index(config.load(str(path)).MODEL.NAME)))


def row(path: Path, share: float, images_per_s: float, price: float, gpus: Sequence[int]) -> list[str]:
    """Return a run's cells: those of HEAD, a duration for each number of GPUs, the price."""
    c = cost(config.load(str(path)))
    hours = c.hours * c.floor / images_per_s if images_per_s else c.hours / share
    name = f"{path.parent.name}/{path.stem}"
    return [
        *(name, f"{c.training / 1e6:.0f}", f"{c.floor:,.0f}", f"{c.hours:,.0f}", f"{hours:,.0f}"),
        *(format_hours(hours / count) for count in gpus),
        f"{hours * price:,.0f}",
    ]


def format_hours(hours: float) -> str:
    """Return hours as text, in days from two days on."""
    return f"{hours / 24:.1f} d" if hours >= 48 else f"{hours:.1f} h"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser("Estimate the time and cost of runs on ImageNet, from floors of their time.")
    parser.add_argument("--cfg", nargs="+", type=Path, metavar="FILE", help="configs (default: all ImageNet recipes)")
    parser.add_argument("--share", type=float, default=0.4, help="part of the floor that a run reaches (0.4)")
    parser.add_argument(
        "--images-per-s", type=float, default=0.0, metavar="N", help="training rate of one GPU, instead of --share"
    )
    parser.add_argument("--price", type=float, default=3.0, help="of a GPU-hour, in any currency (3)")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS), metavar="N", help="numbers of GPUs")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    args = parser.parse_args(argv)
    try:
        if not 0 < args.share <= 1:
            raise ValueError(
                f"--share {args.share:g} must lie above 0 and not above 1; no run is faster than the floor"
            )
        if min(args.gpus) < 1 or args.images_per_s < 0 or args.price < 0:
            raise ValueError("--gpus, --images-per-s and --price must be positive")
        head = [*HEAD, *(f"on {n}" for n in args.gpus), f"at {args.price:g} an hour"]
        rows = [row(path, args.share, args.images_per_s, args.price, args.gpus) for path in args.cfg or recipes()]
    except ValueError as error:
        parser.fail(error)
    if args.markdown:
        print("\n".join(markdown_table(head, rows)))
        return 0
    how = f"{args.images_per_s:g} images/s a GPU" if args.images_per_s else f"{100 * args.share:g} % of the floor"
    shown = Table(title=f"runs on ImageNet, estimated, not measured: {how}", box=None)
    for i, name in enumerate(head):
        shown.add_column(name, justify="right" if i else "left", no_wrap=True)
    for cells in rows:
        shown.add_row(*cells)
    Console(highlight=False, soft_wrap=True, width=160).print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
