"""Compare the torch and the DALI loader on a data set: order, labels, pixels, and the accuracy of a checkpoint.

    python -m tools.loader_parity --cfg configs/groupmixformer/tiny_224.yaml --data-path DIR
    python -m tools.loader_parity --cfg CONFIG --data-path DIR --checkpoint output/NAME/best_raw.safetensors

Pixels are compared on the evaluation images and on training batches, with and without RandAugment: operations such as
equalize and solarize amplify a difference of one level, so the crops without it show how the loaders themselves differ.
DATA.DALI_DEVICE (--opts) selects DALI's device. Exit status 0: order, labels and random erasing are the same, and the
evaluation images and plain crops differ by less than a mean of LIMIT levels. 1: they differ. 2: an error in the command.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads take the loader's cores

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

import config
from config import command_line
from data.build import EvalData, build_data, build_eval_data
from data.loaders.batch import Batch
from data.stores.layout import has_split
from engine.batch_plan import accumulation_steps
from engine.build import prepare_model
from engine.distributed.processes import Processes, init_processes
from engine.evaluate import evaluate
from engine.precision import Precision
from models.build import announce_custom_model, build_model
from models.weights import fit, load_weights
from tools.tables import terminal_table
from tools.terminal import Screen

LIMIT = 0.2  # levels; photographs at 224 differ by a mean of 0.17 to 0.18 by the rounding of the two resamplings
LOADERS = ("torch", "dali")
HEADER = ("", "images", "indices, labels, boxes", "mean difference", "largest", "above 1 level")


@dataclass
class Differences:
    """Differences between the pixels of pairs of batches, in levels (0 .. 255)."""

    name: str
    images: int = 0
    values: int = 0
    total: int = 0
    largest: int = 0
    above: int = 0  # values that differ by more than one level
    same: bool = True  # indices, labels and boxes of random erasing

    def add(self, one: Batch, other: Batch) -> None:
        """Compare a batch of each loader."""
        self.images += len(one)
        self.same &= len(one) == len(other) and all(
            torch.equal(a.cpu(), b.cpu())
            for a, b in ((one.indices, other.indices), (one.labels, other.labels), (_boxes(one), _boxes(other)))
        )
        if one.images.shape == other.images.shape:
            difference = (one.images.cpu().int() - other.images.cpu().int()).abs()
            self.values += difference.numel()
            self.total += int(difference.sum())
            self.largest = max(self.largest, int(difference.max()))
            self.above += int((difference > 1).sum())

    @property
    def mean(self) -> float:
        """Mean absolute difference."""
        return self.total / max(1, self.values)

    def cells(self) -> list[str]:
        """Return the cells of the table's row."""
        share = f"{100 * self.above / max(1, self.values):.3f} %"
        same = "the same" if self.same else "DIFFER"
        return [self.name, str(self.images), same, f"{self.mean:.3f}", str(self.largest), share]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line.Parser("Compare the torch and the DALI loader on a data set.")
    parser.add_argument("--cfg", metavar="FILE", required=True, help="YAML config")
    parser.add_argument("--data-path", metavar="PATH", help="as in train.py [DATA.PATH]")
    parser.add_argument(
        "--opts", metavar="KEY VALUE", nargs="*", action="extend", default=[], help="config keys to change"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights to evaluate with both loaders")
    parser.add_argument(
        "--weights", choices=("raw", "ema"), default="raw", help="weights to take from a file with both (raw)"
    )
    parser.add_argument(
        "--batches", type=int, default=8, help="training micro-batches and evaluation batches to compare (default 8)"
    )
    args = parser.parse_args(argv)
    console = Screen()
    try:
        cfg = load(args, "torch")
        announce_custom_model(cfg, console.print)
        processes = init_processes(cfg.DEVICE)
        found = list(compare(args, processes))
        console.print(terminal_table(HEADER, [differences.cells() for differences in found]))
        if args.checkpoint:
            for line in accuracies(args, processes):
                console.print(line)
    except ValueError as error:
        parser.fail(error)
    augmented = [differences for differences in found if "RandAugment" in differences.name]
    plain = [differences for differences in found if differences not in augmented]
    return int(not all(d.same for d in found) or any(d.mean >= LIMIT for d in plain))


def load(args: Any, loader: str) -> CfgNode:
    """Return the config with a loader; DATA.DALI_DEVICE is dropped for the torch loader."""
    flags = {"--data-path": ("DATA.PATH", args.data_path)} if args.data_path else {}
    if len(args.opts) % 2:
        config.load(args.cfg, args.opts, flags)  # raises: a value is missing
    dropped = ("DATA.LOADER", "DATA.DALI_DEVICE") if loader == "torch" else ("DATA.LOADER",)
    pairs = zip(args.opts[::2], args.opts[1::2], strict=True)
    kept = [text for key, value in pairs if key not in dropped for text in (key, value)]
    auto = ["DATA.DALI_DEVICE", "auto"] if loader == "torch" else []  # the YAML's value is for DALI
    return config.load(args.cfg, [*kept, "DATA.LOADER", loader, *auto], flags)


def compare(args: Any, processes: Processes) -> Iterator[Differences]:
    """Yield the differences in evaluation and, if there are training images, in training."""
    cfgs = [load(args, loader) for loader in LOADERS]
    first, second = (build_eval_data(cfg, processes.rank, processes.world, processes.device).val for cfg in cfgs)
    yield _compare_batches("evaluation", first, second, args.batches)
    if not has_split(cfgs[0].DATA.PATH, "train"):
        return
    for name, policy in (("training, crop and flip", ""), ("training, RandAugment", cfgs[0].AUG.RAND_AUGMENT)):
        if name.endswith("flip") or policy:
            one, other = (_train_batches(_with_policy(cfg, policy), processes) for cfg in cfgs)
            yield _compare_batches(name, one, other, args.batches)


def _train_batches(cfg: CfgNode, processes: Processes) -> Iterable[Batch]:
    """Return the batches of epoch 0. Raises ValueError if an update's batch does not divide among the processes."""
    accumulation_steps(cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH, processes.world)
    return build_data(cfg, processes.rank, processes.world, processes.device).train.epoch(0)


def _with_policy(cfg: CfgNode, policy: str) -> CfgNode:
    """Return the config with a RandAugment policy."""
    changed = cfg.clone()
    changed.defrost()
    changed.AUG.RAND_AUGMENT = policy
    changed.freeze()
    return changed


def _compare_batches(name: str, one: Iterable[Batch], other: Iterable[Batch], batches: int) -> Differences:
    """Return the differences between the first batches of two loaders."""
    found = Differences(name)
    for pair in islice(zip(one, other, strict=True), batches):
        found.add(*pair)
    return found


def _boxes(batch: Batch) -> torch.Tensor:
    """Return the boxes of random erasing; empty without it."""
    return torch.zeros(0) if batch.erase is None else batch.erase


def accuracies(args: Any, processes: Processes) -> Iterator[str]:
    """Yield lines with the accuracy of the checkpoint on all validation images, with each loader."""
    weights, _ = load_weights(Path(args.checkpoint), args.weights)
    top1 = []
    for loader in LOADERS:
        cfg = load(args, loader)
        data: EvalData = build_eval_data(cfg, processes.rank, processes.world, processes.device)
        model = build_model(cfg, len(data.classes))
        model.load_state_dict(fit(model, weights, args.checkpoint))
        precision = Precision(cfg.TRAIN.AMP, processes.device)
        model = prepare_model(model, processes)
        result = evaluate(
            model,
            data.val,
            prepare=data.stage.evaluate,
            precision=precision,
            processes=processes,
            num_images=data.val.num_images,
        )
        yield f"{loader:6} {result}  {result.images} images"
        top1.append(result.top1)
    yield f"difference: top-1 {top1[1] - top1[0]:+.3f} with dali"


if __name__ == "__main__":
    sys.exit(main())
