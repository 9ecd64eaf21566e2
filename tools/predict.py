"""Classify images: the most probable classes of a checkpoint's model, for image files and folders.

    python -m tools.predict output/NAME/best_raw.safetensors cat.jpg holiday/
    python -m tools.predict output/NAME/best_raw.safetensors holiday/ --csv holiday.csv --top 3

Images are rotated by their EXIF orientation and cropped as in the run's evaluation. Files that cannot be read are listed at
the end. Exit status 0: at least one image was classified. 1: none could be read, or the model's answers are not finite. 2: an
error in the command.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from config.command_line import Parser
from data.loaders.decode import UnreadableImageError
from engine.evaluate import NotFiniteError
from engine.malloc import keep_freed_memory
from engine.result_files import TABLES, check_target, write_table
from models.inference.prepare import is_foldable, prepare_inference
from tools.classifier import Classifier, add_checkpoint_options, find_images, load_from_args, read_image
from tools.device import choose_device
from tools.terminal import Screen, say

THREADS = 8  # for decoding
SHOWN = 20  # unreadable files that are listed


@dataclass
class RankedClasses:
    """Most probable classes of each readable image, in descending order, with their probabilities."""

    paths: list[str] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    probabilities: list[list[float]] = field(default_factory=list)
    unreadable: list[UnreadableImageError] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = predict_parser()
    args = parser.parse_args(argv)
    screen = Screen(stderr=True, soft_wrap=True)
    try:
        for flag, number in (("--top", args.top), ("--batch-size", args.batch_size)):
            if number < 1:
                raise ValueError(f"{flag} {number} must be 1 or more")
        table = check_target("--csv", args.csv, TABLES) if args.csv else None
        images = find_images(args.images)
        classifier = load_from_args(args)
        device = choose_device(args.device)
    except ValueError as error:
        parser.fail(error)
    if device.type == "cpu":
        keep_freed_memory()
    if is_foldable(classifier.model):
        prepare_inference(classifier.model.to(device))
    top = min(args.top, len(classifier.classes))
    screen.print(classifier.describe(), style="dim")
    for note in classifier.notes:
        screen.print(f"note: {note}")
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("images", total=len(images))
        try:
            predictions = predict(
                classifier,
                images,
                top,
                batch_size=args.batch_size,
                device=device,
                advance=lambda count: progress.update(task, advance=count),
            )
        except NotFiniteError as error:
            parser.stop(error)
    if table:
        write_table(table, columns(classifier, predictions, top))
        screen.print(f"{len(predictions.paths)} images: {table}")
    else:
        for line in lines(classifier, predictions):
            say(line)
    for unreadable in predictions.unreadable[:SHOWN]:
        screen.print(f"not read: {unreadable.name} {unreadable.reason}")
    if len(predictions.unreadable) > SHOWN:
        screen.print(f"not read: {len(predictions.unreadable) - SHOWN} more")
    return 0 if predictions.paths else 1


def predict_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser("Classify images with the model of a checkpoint.")
    parser.prog = "python -m tools.predict"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best_*.safetensors, update-*.pt or a published file")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, and folders to search for them")
    parser.add_argument("--top", metavar="N", type=int, default=5, help="classes to print for each image (5)")
    parser.add_argument("--csv", metavar="FILE", help="write a table, .csv or .parquet, instead of printing")
    parser.add_argument("--batch-size", metavar="N", type=int, default=32, help="images per forward pass (32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to compute on (auto)")
    add_checkpoint_options(parser)
    return parser


@torch.inference_mode()
def predict(
    classifier: Classifier,
    images: Sequence[Path],
    top: int,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] = lambda count: None,
) -> RankedClasses:
    """Classify images in batches; `advance` is called with the number of images of each batch.

    Raises NotFiniteError, naming the image, if the logits of one are nan or inf.
    """
    predictions = RankedClasses()
    model = classifier.model.to(device)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(images), batch_size):
            paths = images[start : start + batch_size]
            prepared = list(pool.map(lambda path: _prepare(classifier, path), paths))
            good = [(path, x) for path, x in zip(paths, prepared, strict=True) if isinstance(x, Tensor)]
            predictions.unreadable += [x for x in prepared if isinstance(x, UnreadableImageError)]
            if good:
                logits = model(torch.stack([x for _, x in good]).to(device)).float()
                check_logits(logits, [path for path, _ in good], classifier.source)
                probabilities = logits.softmax(1)
                best = probabilities.topk(top)
                predictions.paths += [str(path) for path, _ in good]
                predictions.labels += best.indices.tolist()
                predictions.probabilities += best.values.tolist()
            advance(len(paths))
    return predictions


def check_logits(logits: Tensor, paths: Sequence[Path], source: str) -> None:
    """Raise NotFiniteError, naming the first image, if any of its logits (B, classes) is nan or inf."""
    bad = [path for path, finite in zip(paths, logits.isfinite().all(1).tolist(), strict=True) if not finite]
    if bad:
        raise NotFiniteError(
            f"the answers for {bad[0]} are not finite ({len(bad)} of {len(paths)} images of its batch): the weights of {source} "
            "are of a run that diverged; use another checkpoint"
        )


def _prepare(classifier: Classifier, path: Path) -> Tensor | UnreadableImageError:
    """Return the model's input for an image file, or the error that prevents it."""
    try:
        return classifier.prepare(read_image(path))
    except UnreadableImageError as error:
        return error


def lines(classifier: Classifier, predictions: RankedClasses) -> Iterator[str]:
    """Yield predictions as lines of text: the image, then a line for each class."""
    rows = zip(predictions.paths, predictions.labels, predictions.probabilities, strict=True)
    for path, labels, probabilities in rows:
        yield path
        for label, probability in zip(labels, probabilities, strict=True):
            yield f"  {100 * probability:5.1f} %  {classifier.label(label)}"


def columns(classifier: Classifier, predictions: RankedClasses, top: int) -> dict[str, list[str] | list[float]]:
    """Return predictions as columns of a table: the image, then class, name and probability for each rank."""
    table: dict[str, list[str] | list[float]] = {"image": predictions.paths}
    named = classifier.readable != classifier.classes
    for rank in range(top):
        table[f"class_{rank + 1}"] = [classifier.classes[labels[rank]] for labels in predictions.labels]
        if named:
            table[f"name_{rank + 1}"] = [classifier.readable[labels[rank]] for labels in predictions.labels]
        table[f"probability_{rank + 1}"] = [round(values[rank], 6) for values in predictions.probabilities]
    return table


if __name__ == "__main__":
    sys.exit(main())
