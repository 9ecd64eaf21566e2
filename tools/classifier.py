"""A file of weights made ready to answer: the model, how images become its input, what its classes are called."""

import difflib
import io
import math
import warnings
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import PretrainedCfg
from torch import Tensor, nn

from config.command_line import Parser, check_which
from data.augment.transforms import EvalTransform
from data.loaders.decode import UnreadableImageError, decode
from data.stores.class_labels import class_names, readable_names
from data.stores.folder import SUFFIXES, ClassIndexError
from models.build import check_name, is_retoken, retoken_models, takes_img_size
from models.custom_model import import_models
from models.identify import identify
from models.weights import classifier_names, fit, load_weights
from tools.convert import convert

RANDOM_CLASSES = 1000
ORIENTATION = 0x0112  # of EXIF
UPRIGHT = {
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}  # quarter turns, mirrored


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode and all that is needed to ask it."""

    name: str
    model: nn.Module
    transform: EvalTransform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str]  # as the file names them
    readable: list[str]  # as a person does
    metadata: dict[str, Any]
    source: str
    notes: tuple[str, ...] = ()  # what was assumed

    def prepare(self, image: Tensor) -> Tensor:
        """Return the normalised evaluation crop, float32 (3, S, S), of an image, uint8 (3, H, W)."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (self.transform(image).float() / 255 - mean) / std

    def describe(self) -> str:
        """Return what answers, in a line."""
        return f"{self.name} from {self.source}, {len(self.classes)} classes, {self.transform.describe()}"

    def label(self, index: int) -> str:
        """Return what a class is called, with its own name where that is another."""
        name, readable = self.classes[index], self.readable[index]
        return readable if name == readable else f"{readable} ({name})"


def add_checkpoint_options(parser: Parser) -> None:
    """Add the options that `load_asked` reads."""
    parser.add_argument("--model", metavar="NAME", default="", help="what the file holds, if it does not say")
    parser.add_argument(
        "--module", metavar="FILE", default="", help="file or module that registers a model of your own"
    )
    parser.add_argument("--weights", choices=("raw", "ema"), help="which weights of a file that holds both (raw)")
    parser.add_argument("--size", metavar="PIXELS", type=int, help="side of the model's input (the checkpoint's)")
    parser.add_argument("--crop-pct", metavar="SHARE", type=float, help="crop as a share of the resized image (same)")
    parser.add_argument("--class-index", metavar="FILE", default="", help="names of the classes, in label order")


def load_asked(args: Namespace) -> Classifier:
    """Load what a command line asks for with `checkpoint` and the options above. Raises ValueError as `load_classifier` does."""
    return load_classifier(
        Path(args.checkpoint) if args.checkpoint else None,
        args.model,
        args.weights,
        args.size,
        args.crop_pct,
        args.class_index,
        args.module,
    )


def load_classifier(
    path: Path | None,
    model: str = "",
    weights: str | None = None,
    size: int | None = None,
    crop_pct: float | None = None,
    class_index: str = "",
    module: str = "",
) -> Classifier:
    """Load a file of any layout that models/weights.py lists; without one, `model` gets random weights.

    `module` is imported first (models/custom_model.py). The evaluation crop is the one that the file states, else timm's default for
    the model. Raises ValueError with the remedy for a file that cannot be read or does not fit, and for classes of another number.
    """
    if module:
        import_models(module, "--module")
    if model:
        check_name(model, "--model")
    if path is None:
        if not model:
            raise ValueError("give a checkpoint, or --model NAME for random weights")
        source, tensors = "random weights", None
        metadata: dict[str, Any] = {"num_classes": RANDOM_CLASSES}
    else:
        tensors, metadata = load_weights(path, weights or "raw")
        check_which(metadata, weights, str(path))
        source = str(path)
        model = _which_model(model, metadata, tensors, source)
        tensors, metadata = _fitted(model, tensors, metadata, source)
    transform, notes = _transform(model, metadata, size, crop_pct)
    net = _build(model, metadata, transform.crop, tensors, source)
    names = _class_names(metadata, class_index)
    own = _default(model)
    return Classifier(
        model,
        net.eval(),
        transform,
        tuple(metadata.get("mean", own.mean)),
        tuple(metadata.get("std", own.std)),
        names,
        readable_names(names),
        metadata,
        source,
        tuple(notes),
    )


def find_images(paths: Sequence[str]) -> list[Path]:
    """List image files: those named, and those in the folders named and below, sorted.

    Raises ValueError for a path that does not exist, and if there is no image at all.
    """
    found: list[Path] = []
    for path in (Path(text).expanduser() for text in paths):
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif path.exists():
            found.append(path)
        else:
            folder = path.parent if path.parent.is_dir() else Path()
            near = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1)
            raise ValueError(f"{path} does not exist{f'; did you mean {folder / near[0]}?' if near else ''}")
    if not found:
        raise ValueError(
            f"there is no image in {', '.join(paths)}; these suffixes are looked for: {' '.join(SUFFIXES)}"
        )
    return found


def read_image(path: Path) -> Tensor:
    """Decode an image file to uint8 (3, H, W), upright as its camera noted; UnreadableImageError says what is wrong with it.

    Training and evaluation leave pictures as they lie in the file, as torchvision and timm do; a telephone lays every
    photograph on its side and notes that.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UnreadableImageError(str(path), f"cannot be read ({error.strerror})", "check the file") from error
    turns, mirrored = UPRIGHT.get(_orientation(data), (0, False))
    image = decode(data, str(path)).rot90(turns, (1, 2))
    return (image.flip(2) if mirrored else image).contiguous()


def _orientation(data: np.ndarray) -> int:
    """Return the EXIF orientation of a file's bytes, 1 if it has none."""
    with suppress(Exception), warnings.catch_warnings():  # Pillow's readers meet damage with many kinds of errors
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data.tobytes())) as image:
            return int(image.getexif().get(ORIENTATION, 1))
    return 1


def _which_model(asked: str, metadata: dict[str, Any], tensors: dict[str, Tensor], source: str) -> str:
    """Return the name of the model that a file holds."""
    known = metadata.get("model", "")
    if asked and known and asked != known:
        raise ValueError(f"--model is {asked}, but {source} holds a {known}; leave --model out")
    if known and not timm.is_model(known):
        raise ValueError(
            f"{source} holds a {known}, which neither Retoken nor timm knows; name the file that registers it with --module FILE"
        )
    if asked or known:
        return asked or known
    found = identify(tensors)
    if found is None or found.share < 1:
        near = f"; {found}" if found else ""
        raise ValueError(
            f"{source} does not say which model it holds{near}; name it with --model ({', '.join(retoken_models())})"
        )
    return found.name


def _fitted(
    model: str, tensors: dict[str, Tensor], metadata: dict[str, Any], source: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights under our names, and facts with the number of classes."""
    if is_retoken(model):
        done = convert(tensors, metadata, model, published=False, source=source)
        if not done.metadata["num_classes"]:
            raise ValueError(f"{source} holds no classifier; only whole models can answer")
        return done.tensors, done.metadata
    if "num_classes" in metadata:
        return tensors, metadata
    head = next((tensors[f"{name}.weight"] for name in _heads(model) if f"{name}.weight" in tensors), None)
    if head is None:
        raise ValueError(f"{source} holds no classifier of a {model}; check --model")
    return tensors, {**metadata, "num_classes": head.shape[0]}


def _class_names(metadata: dict[str, Any], class_index: str) -> list[str]:
    try:
        lists = class_names(metadata.get("classes", []), class_index, metadata["num_classes"])
    except ClassIndexError as error:
        raise ValueError(f"--class-index={error.file} {error.problem}") from error
    return list(lists.values())[-1]  # --class-index, if it is given


def _heads(model: str) -> tuple[str, ...]:
    with torch.device("meta"):
        return classifier_names(timm.create_model(model))


def _transform(
    model: str, metadata: dict[str, Any], size: int | None, crop_pct: float | None
) -> tuple[EvalTransform, list[str]]:
    """Return the evaluation crop, and what was assumed of it."""
    if size is not None and size < 1:
        raise ValueError(f"--size {size}: give a number of pixels, 1 or more")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"--crop-pct {crop_pct:g} must lie in 0 .. 1, e.g. 0.875")
    stated = metadata.get("evaluation")
    notes = []
    if stated:
        known = EvalTransform(**{**stated, "fill": tuple(stated["fill"])})
    else:
        own = _default(model)
        side = metadata.get("img_size", own.input_size[-1])
        known = EvalTransform(side, math.floor(side / own.crop_pct))
        if "layout" in metadata and crop_pct is None:
            notes.append(
                f"the file does not say how images are cropped: timm's default, {own.crop_pct:g} of the shorter side"
            )
    crop = size or known.crop
    resize = round(known.resize * crop / known.crop)
    if crop_pct is not None:
        resize = math.floor(crop / crop_pct)
    return EvalTransform(crop, resize, known.interpolation, known.mode, known.fill), notes


def _default(model: str) -> PretrainedCfg:
    """Return what timm knows of a model's images, or assumes where the model says nothing."""
    return timm.get_pretrained_cfg(model) or PretrainedCfg()


def _build(
    model: str, metadata: dict[str, Any], size: int, tensors: dict[str, Tensor] | None, source: str
) -> nn.Module:
    arguments: dict[str, Any] = {"img_size": size} if takes_img_size(model) else {}
    net = timm.create_model(model, num_classes=metadata["num_classes"], **arguments)
    if tensors is not None:
        net.load_state_dict(fit(net, tensors, source, remedy="check --model and --size"))
    return net
