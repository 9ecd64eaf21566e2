"""Measure data loaders on a folder of images: images per CPU-second of the whole process tree, all taking turns.

    python benchmarks/loader.py --data DIR

DIR holds class folders of images, or train/ or val/ with them. Every candidate runs the same recipe (random resized crop,
flip, rand-m9-mstd0.5-inc1, random erasing 0.25) at the same size, in a process of its own, several rounds in turn, so that
other load on the machine affects all alike. "uint8" ends with a batch ready for a GPU, "floats" with normalised and erased
images. The table goes to benchmarks/results/ as Markdown and JSON.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: the CPU time of spinning threads would count

import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from PIL import Image

from benchmarks import record
from config.command_line import Parser
from data.augment.device_stage import DeviceStage
from data.augment.mixup import Mixup
from data.augment.rand_augment_policy import parse_policy
from data.augment.transforms import TrainTransform
from data.loaders.dali_loader import DaliTrainLoader, check_dali
from data.loaders.image_source import load
from data.loaders.sampler import Sampler
from data.loaders.torch_loader import TrainLoader
from data.stores.folder import FolderSource, class_folders, scan

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICY = "rand-m9-mstd0.5-inc1"
Candidate = Callable[[], Iterator[int]]  # yields the number of images of each batch


class Candidates:
    """Loaders that are measured; each method returns a new iterator of batch sizes over `images` images."""

    def __init__(self, source: FolderSource, images: int, batch: int, size: int, workers: int) -> None:
        epoch = len(source) // batch * batch
        self.images = epoch * max(1, round(images / epoch))  # whole epochs: no prefetched batch is unused
        self.source, self.batch, self.size, self.workers = source, batch, size, workers

    def decode(self) -> Iterator[int]:
        """Read and decode only: the limit of every loader that decodes whole images on the CPU."""
        for i in range(self.images):
            load(self.source, i % len(self.source))
            yield 1

    def timm_uint8(self) -> Iterator[int]:
        """Return batches of timm's workers, uint8, which its prefetcher normalises on the GPU."""
        return self._limited(self._timm(use_prefetcher=True).loader, lambda batch: len(batch[1]))

    def timm_floats(self) -> Iterator[int]:
        """Return batches of timm without prefetcher: its workers normalise and erase."""
        return self._limited(self._timm(use_prefetcher=False), lambda batch: len(batch[1]))

    def torch_uint8(self) -> Iterator[int]:
        """Return batches of the torch loader."""
        return self._epochs(TrainLoader(self.source, self._transform(), self._sampler(), workers=self.workers))

    def torch_floats(self) -> Iterator[int]:
        """Return batches of the torch loader and the device stage, on the CPU."""
        mixing = Mixup(1000, mixup=0, cutmix=0, smoothing=0)
        stage = DeviceStage(mixing, MEAN, STD, seed=0)
        loader = TrainLoader(self.source, self._transform(), self._sampler(), workers=self.workers)
        return self._epochs(loader, lambda batch: stage.train(batch, 0, 0, 0))

    def dali_cpu(self) -> Iterator[int]:
        """Return batches of the DALI loader on its CPU backend."""
        sampler, transform = self._sampler(), self._transform()
        return self._epochs(DaliTrainLoader(self.source, transform, sampler, workers=self.workers, backend="cpu"))

    def dali_gpu(self) -> Iterator[int]:
        """Return batches of the DALI loader on a GPU."""
        sampler, transform = self._sampler(), self._transform()
        return self._epochs(DaliTrainLoader(self.source, transform, sampler, workers=self.workers, device="cuda"))

    def _transform(self) -> TrainTransform:
        return TrainTransform(self.size, seed=0, policy=parse_policy(POLICY))

    def _sampler(self) -> Sampler:
        return Sampler(len(self.source), 0, self.batch, self.batch)

    def _timm(self, use_prefetcher: bool) -> Any:
        timm.data.auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
        dataset = timm.data.create_dataset("", root=str(self.source.root), is_training=True)
        return timm.data.create_loader(
            dataset,
            (3, self.size, self.size),
            self.batch,
            is_training=True,
            use_prefetcher=use_prefetcher,
            auto_augment=POLICY,
            interpolation="bicubic",
            re_prob=0.25,
            re_mode="pixel",
            mean=MEAN,
            std=STD,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=False,
            device=torch.device("cpu"),
        )

    def _limited(self, loader: Any, count: Callable[[Any], int]) -> Iterator[int]:
        """Yield batch sizes, epoch after epoch, up to the number of images."""
        done = 0
        while done < self.images:
            for batch in loader:
                done += count(batch)
                yield count(batch)
                if done >= self.images:
                    return

    def _epochs(self, loader: Any, then: Callable[[Any], Any] = lambda batch: batch) -> Iterator[int]:
        """Yield batch sizes of our loaders, `then` applied to each batch, up to the number of images."""
        done, epoch = 0, 0
        while done < self.images:
            for batch in loader.epoch(epoch):
                then(batch)
                done += len(batch)
                yield len(batch)
                if done >= self.images:
                    return
            epoch += 1


def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Apply timm's posterize with at least one bit; without any (an image in 650) it fails under Pillow 13."""
    return timm.data.auto_augment.posterize(image, max(1, bits), **options)


def cpu_seconds() -> float:
    """Return the user and system time of this process and its ended children."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(candidate: Candidate, result: Any) -> None:
    """Send (images, CPU-seconds, seconds) of a candidate through a pipe, with the start and end of its workers."""
    try:
        torch.set_num_threads(1)
        cpu, wall = cpu_seconds(), time.perf_counter()
        batches = candidate()
        images = sum(batches)
        del batches
        gc.collect()  # ends the workers, whose time counts once they have ended
        result.send((images, cpu_seconds() - cpu, time.perf_counter() - wall))
    except Exception as error:  # a process cannot raise into another
        result.send(error)


def measure_in_process(candidate: Candidate) -> tuple[int, float, float]:
    """Return (images, CPU-seconds, seconds) of a candidate, measured in a process of its own.

    The process is spawned: one forked after CUDA has started cannot use the GPU.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(candidate, theirs))
    process.start()
    found = ours.recv()
    process.join()
    if isinstance(found, Exception):
        raise found
    return found


def find_source(folder: Path) -> FolderSource:
    """Return the images below DIR/train, DIR/val or DIR itself."""
    folder = next((folder / split for split in ("train", "val") if (folder / split).is_dir()), folder)
    return scan(folder, class_folders(folder), must_hold_all=True)


def rows_of(rates: dict[str, list[float]], walls: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return a row for each candidate: median, spread, and the ratio to timm's rate in the same round."""
    against = {"torch_floats": "timm_floats", "timm_floats": "timm_floats"}
    rows = []
    for name, values in rates.items():
        base = rates[against.get(name, "timm_uint8")]
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        rows.append(
            {
                "name": name,
                "images_per_cpu_second": statistics.median(values),
                "lowest": min(values),
                "highest": max(values),
                "ratio": statistics.median(ratios),
                "ratio_lowest": min(ratios),
                "ratio_highest": max(ratios),
                "images_per_second": statistics.median(walls[name]),
            }
        )
    return rows


NAMES = {
    "decode": "read and decode only (limit)",
    "timm_uint8": "timm create_loader, uint8",
    "timm_floats": "timm create_loader, floats",
    "torch_uint8": "DATA.LOADER torch, uint8",
    "torch_floats": "DATA.LOADER torch, floats",
    "dali_cpu": "DATA.LOADER dali, CPU, uint8",
    "dali_gpu": "DATA.LOADER dali, GPU, uint8",
}
COLUMNS: record.Columns = {
    "": lambda row: NAMES[row["name"]],
    "images per CPU-second": lambda row: f"{row['images_per_cpu_second']:.0f}",
    "lowest .. highest": lambda row: f"{row['lowest']:.0f} .. {row['highest']:.0f}",
    "ratio to timm, same output": lambda row: f"{row['ratio']:.2f}",
    "its lowest .. highest": lambda row: f"{row['ratio_lowest']:.2f} .. {row['ratio_highest']:.2f}",
    "images/s": lambda row: f"{row['images_per_second']:.0f}",
}


def gather_metadata(args: Any, argv: Sequence[str] | None, source: FolderSource, images: int) -> dict[str, Any]:
    """Return the metadata of the result: machine, command, versions, images, rounds."""
    typed = list(sys.argv[1:] if argv is None else argv)
    shown = ["DIR" if word == str(args.data) else word for word in typed]
    mean = sum(len(source.read(i)) for i in range(len(source))) / len(source) / 1e3
    return {
        **record.metadata("benchmarks/loader.py", shown, ("torchvision", "timm", "Pillow")),
        "pictures": f"{len(source)} files, mean {mean:.0f} kB",
        "n": f"{args.rounds} rounds of {images} images, candidates in turn",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser("Measure loaders in images per CPU-second.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of class folders of images")
    parser.add_argument(
        "--images",
        type=int,
        default=768,
        help="images for each candidate and round, rounded to whole epochs (default 768)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--batch", type=int, default=128, help="images of a batch (default 128)")
    parser.add_argument("--size", type=int, default=224, help="side of the crops (default 224)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes, or threads of DALI (default 2)")
    parser.add_argument(
        "--only", nargs="*", choices=list(NAMES), help="candidates, in addition to timm's (default all)"
    )
    parser.add_argument(
        "--out", type=Path, help="result file without suffix (default benchmarks/results/<date>-loader)"
    )
    args = parser.parse_args(argv)
    try:
        source = find_source(args.data)
    except ValueError as error:
        parser.fail(error)
    candidates = Candidates(source, args.images, min(args.batch, len(source)), args.size, args.workers)
    names = [name for name in NAMES if not args.only or name in args.only or name.startswith("timm")]
    console = record.console()
    try:
        check_dali("auto", torch.device("cpu"))
    except ValueError as error:
        names = [name for name in names if not name.startswith("dali")]
        console.print(f"without DALI: {error}")
    if not torch.cuda.is_available():
        names = [name for name in names if name != "dali_gpu"]
    rates: dict[str, list[float]] = {name: [] for name in names}
    walls: dict[str, list[float]] = {name: [] for name in names}
    for number in range(args.rounds + 1):  # round 0 warms the file cache
        for name in names:
            images, cpu, wall = measure_in_process(getattr(candidates, name))
            if number:
                rates[name].append(images / cpu)
                walls[name].append(images / wall)
    rows = rows_of(rates, walls)
    console.print(record.table(COLUMNS, rows))
    metadata = gather_metadata(args, argv, source, candidates.images)
    out = args.out or record.RESULTS / f"{metadata['date']}-loader"
    page = record.write(out, "Loaders", columns=COLUMNS, found=metadata, rows=rows)
    console.print(f"written to {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
