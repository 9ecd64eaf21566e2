"""Export a trained model: ONNX, torch.export, timm and the Hugging Face hub, the authors' downstream code.

    python -m tools.export output/NAME/best_raw.safetensors --format onnx --out model.onnx --fold
    python -m tools.export output/NAME/best_raw.safetensors --format timm --out model/

    onnx         a file for onnxruntime and others; takes any number of normalised images (B, 3, SIZE, SIZE)
    torch        a program of torch.export (.pt2) for the same images; needs torch, but not this repository
    timm         a folder for timm.create_model("local-dir:FOLDER"), and "hf-hub:..." once it is uploaded
    published    a .pth with the published names, for the authors' detection and segmentation code

The output is read back and compared with the model on random images; the difference is printed, and an output that differs
by more than the bound is deleted.
"""

import copy
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.atomic_files import write_atomically
from config.command_line import Parser
from engine.result_files import check_location, check_parent
from models.inference.fold import fold
from models.inference.prepare import is_foldable
from tools.classifier import Classifier, add_checkpoint_options, load_from_args
from tools.export_formats import imports, write_onnx, write_program, write_published, write_timm
from tools.terminal import Screen

FORMATS = {"onnx": ".onnx", "torch": ".pt2", "timm": "", "published": ".pth"}
BATCHES = (1, 3)  # images of the comparisons
BOUND = 1e-4  # largest difference, as a share of the logits' norm
TIES = 0.02  # bound of SG-Former: rounding may change the order of tokens with nearly equal significance


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = export_parser()
    args = parser.parse_args(argv)
    screen = Screen(soft_wrap=True)
    try:
        out = check_out(Path(args.out), args.format)
        check_packages(args.format)
        if args.fold and args.format not in ("onnx", "torch"):
            raise ValueError(
                f"--fold changes the weights, which --format {args.format} writes for other code; leave it out"
            )
        if args.opset is not None and args.format != "onnx":
            raise ValueError(f"--opset has no effect with --format {args.format}; leave it out")
        classifier = load_from_args(args)
        screen.print(classifier.describe())
        for note in classifier.notes:
            screen.print(f"note: {note}")
        model = fold_and_check(classifier, screen) if args.fold else classifier.model
        export(classifier, model, kind=args.format, out=out, opset=args.opset, screen=screen)
    except (ValueError, OSError) as error:
        parser.fail(error)
    except DifferenceError as error:
        parser.stop(error)
    return 0


def export_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser("Export a trained model for other programs, and check the output.")
    parser.prog = "python -m tools.export"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best_*.safetensors, update-*.pt or a published file")
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="format to write")
    parser.add_argument("--out", metavar="PATH", required=True, help="file to write; a folder for timm")
    parser.add_argument("--fold", action="store_true", help="multiply BatchNorm and other constants into the weights")
    parser.add_argument("--opset", metavar="N", type=int, help="ONNX operator set (torch's default)")
    add_checkpoint_options(parser)
    return parser


class DifferenceError(Exception):
    """An exported or folded model whose outputs differ from the model's."""


def check_out(out: Path, kind: str) -> Path:
    """Return the path to write. Raises ValueError if it does not fit the format or cannot be written."""
    suffix = FORMATS[kind]
    if suffix and out.suffix != suffix:
        raise ValueError(f"--out {out}: --format {kind} writes a {suffix} file; name it {out.with_suffix(suffix)}")
    if suffix:
        check_location(f"--out {out}", out, f"model{suffix}")
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there already; give a new or an empty folder")
    check_parent(f"--out {out}", out)
    return out


def check_packages(kind: str) -> None:
    """Raise ValueError with the remedy if a package that a format needs is missing."""
    from importlib.util import find_spec

    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "timm": ("huggingface_hub",)}.get(kind, ())
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ValueError(f"--format {kind} needs {', '.join(missing)}; run pip install {' '.join(missing)}")


def fold_and_check(classifier: Classifier, screen: Screen) -> nn.Module:
    """Return a folded copy of the model. Raises DifferenceError if the two differ in float64 on random images."""
    if not is_foldable(classifier.model):
        raise ValueError(f"--fold: the class of {classifier.name} does not declare `foldable = True`; leave it out")
    plain = copy.deepcopy(classifier.model).double()
    other = copy.deepcopy(plain)
    done = fold(other)
    images = random_images(BATCHES[-1], classifier.transform.crop).double()
    with torch.no_grad():
        want, got = plain(images), other(images)
    counts = ", ".join(f"{count} x {name}" for name, count in done.items())
    screen.print(f"folded {counts}: largest difference in float64 {(got - want).abs().max():.1e}")
    if difference(got, want) > 1e-9:
        raise DifferenceError(f"the folded model differs by {difference(got, want):.1e} of the logits' norm in float64")
    return other.float()


def export(
    classifier: Classifier, model: nn.Module, *, kind: str, out: Path, opset: int | None, screen: Screen
) -> None:
    """Write a model, read it back and print the difference. Raises DifferenceError, and leaves no file, above the bound."""
    bound = BOUND

    def checked(path: Path, write: Callable[[Path], Callable[[Tensor], Tensor]]) -> None:
        for line in compare(model, write(path), classifier.transform.crop, bound):
            screen.print(line)

    if kind in ("onnx", "torch"):
        screen.print("exporting: the model is traced, which may take minutes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch's exporter
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        if kind == "onnx":
            bound = TIES if classifier.name.startswith("sgformer") else BOUND
            write_atomically(out, lambda path: checked(path, lambda p: write_onnx(classifier, model, p, opset)))
        elif kind == "torch":
            write_atomically(out, lambda path: checked(path, lambda p: write_program(classifier, model, p)))
        elif kind == "published":
            write_atomically(out, lambda path: checked(path, lambda p: write_published(classifier, p)))
        else:
            try:
                checked(out, lambda path: write_timm(classifier, path))
            except DifferenceError:
                shutil.rmtree(out)
                raise
    for line in usage(classifier, kind, out):
        screen.print(line)


def compare(model: nn.Module, other: Callable[[Tensor], Tensor], size: int, bound: float) -> list[str]:
    """Compare the exported model with the original at several batch sizes; return a line for each.

    Raises DifferenceError for a difference above the bound, and for values that are not finite.
    """
    lines = []
    for batch in BATCHES:
        images = random_images(batch, size)
        with torch.no_grad():
            want, got = model(images), other(images)
        off = difference(got, want)
        lines.append(
            f"batch of {batch}: largest difference {(got - want).abs().max():.1e}, {off:.1e} of the logits' norm (bound {bound:g})"
        )
        if not off <= bound:
            raise DifferenceError(f"the exported model computes something else; {lines[-1]}")
    return lines


def difference(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference relative to the norm of `want`."""
    return float((got - want).norm() / want.norm())


def random_images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def usage(classifier: Classifier, kind: str, out: Path) -> list[str]:
    """Return the input format of an exported model, and the code that loads it, as lines."""
    size = classifier.transform.crop
    mean, std = ([round(value, 4) for value in values] for values in (classifier.mean, classifier.std))
    takes = f"takes (B, 3, {size}, {size}), float32, RGB in 0..1 less mean {mean}, divided by {std}; gives logits"
    use: dict[str, list[str]] = {
        "onnx": [f"{out}: {takes}; classes and crop are in its metadata"],
        "torch": [f"{out}: {takes}", f'    model = torch.export.load("{out}").module()'],
        "published": [f"{out}: the authors' names, for their code"],
        "timm": [
            f"{out}: config.json, model.safetensors, README.md",
            f'    {imports(classifier.name)}; timm.create_model("local-dir:{out}", pretrained=True)',
            f'    hf upload USER/NAME {out}    then: timm.create_model("hf-hub:USER/NAME", pretrained=True)',
        ],
    }
    return use[kind]


if __name__ == "__main__":
    sys.exit(main())
