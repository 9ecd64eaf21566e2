"""Classifiers for images: a model loaded from weights, with its evaluation crop and the names of its classes."""

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

from common.text import shorten
from config.command_line import Parser, check_which
from data.augment.transforms import EVAL_MODES, INTERPOLATIONS, EvalTransform
from data.loaders.decode import UnreadableImageError, decode
from data.loaders.file_limits import MAX_BYTES, check_file, check_tags
from data.stores.bounded_files import read_array
from data.stores.class_labels import class_names, readable_names
from data.stores.folder import ClassIndexError
from data.stores.folder_tree import list_images
from data.stores.image_files import HEAD, SUFFIXES, format_of
from models.build import check_name, is_retoken, retoken_models, takes_img_size
from models.custom_model import import_models
from models.identify import identify
from models.weights import classifier_names, fit, load_weights, row_count
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
    """A model in evaluation mode, with the preprocessing of its images and the names of its classes."""

    name: str
    model: nn.Module
    transform: EvalTransform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str]  # in label order, as in the file
    readable: list[str]  # English names of WordNet ids, the classes otherwise
    metadata: dict[str, Any]
    source: str  # path of the weights, or "random weights"
    notes: tuple[str, ...] = ()  # assumptions made where the file states nothing

    def prepare(self, image: Tensor) -> Tensor:
        """Return the normalised evaluation crop, float32 (3, S, S), of an image, uint8 (3, H, W)."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (self.transform(image).float() / 255 - mean) / std

    def describe(self) -> str:
        """Return the model, its weights, the number of classes and the crop in one line."""
        return f"{self.name} from {self.source}, {len(self.classes)} classes, {self.transform.describe()}"

    def label(self, index: int) -> str:
        """Return the readable name of a class, with its name in the file if the two differ."""
        name, readable = self.classes[index], self.readable[index]
        return readable if name == readable else f"{readable} ({name})"


def add_checkpoint_options(parser: Parser) -> None:
    """Add the options that `load_from_args` reads."""
    parser.add_argument("--model", metavar="NAME", default="", help="model of a file that does not name it")
    parser.add_argument("--module", metavar="FILE", default="", help="file or module that registers a custom model")
    parser.add_argument("--weights", choices=("raw", "ema"), help="weights to take from a file with both (raw)")
    parser.add_argument("--size", metavar="PIXELS", type=int, help="side of the input images (the checkpoint's)")
    parser.add_argument("--crop-pct", metavar="SHARE", type=float, help="crop size / resized size (the checkpoint's)")
    parser.add_argument(
        "--class-index", metavar="FILE", default="", help="file with the names of the classes, in label order"
    )


def load_from_args(args: Namespace) -> Classifier:
    """Load the classifier that `checkpoint` and the options above name. Raises ValueError as `load_classifier` does."""
    return load_classifier(
        Path(args.checkpoint) if args.checkpoint else None,
        model=args.model,
        weights=args.weights,
        size=args.size,
        crop_pct=args.crop_pct,
        class_index=args.class_index,
        module=args.module,
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
    """Load weights of any layout that models/weights.py lists; without a path, `model` gets random weights.

    `module` is imported first (models/custom_model.py). The evaluation crop is that of the file, else timm's default for the
    model. Raises ValueError with the remedy for a file that cannot be read or does not fit, and for a list of class names of
    another length.
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
        said: list[str] = []
    else:
        tensors, metadata = load_weights(path, weights or "raw")
        said = metadata.pop("notes", [])
        check_which(metadata, weights, str(path))
        source = str(path)
        model = _find_model(model, metadata, tensors, source)
        tensors, metadata = _fit_names(model, tensors, metadata, source)
    transform, notes = _find_transform(model, metadata, size, crop_pct, source)
    net = _build(model, metadata, transform.crop, tensors, source)
    names = _class_names(metadata, class_index)
    default = _default_cfg(model)
    return Classifier(
        name=model,
        model=net.eval(),
        transform=transform,
        mean=tuple(metadata.get("mean", default.mean)),
        std=tuple(metadata.get("std", default.std)),
        classes=names,
        readable=readable_names(names),
        metadata=metadata,
        source=source,
        notes=(*said, *notes),
    )


def find_images(paths: Sequence[str]) -> list[Path]:
    """List image files: those given, and those below the given folders, sorted.

    Raises ValueError for a path that does not exist, and if there is no image at all.
    """
    found: list[Path] = []
    for path in (Path(text).expanduser() for text in paths):
        if path.is_dir():
            found += sorted(path / image for image in list_images(path, "")[0])
        elif path.exists():
            found.append(path)
        else:
            folder = path.parent if path.parent.is_dir() else Path()
            near = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1)
            raise ValueError(f"{path} does not exist{f'; did you mean {folder / near[0]}?' if near else ''}")
    if not found:
        raise ValueError(
            f"there is no image in {', '.join(paths)}; images end in {' '.join(SUFFIXES)}, or begin as such files do"
        )
    return found


def read_image(path: Path) -> Tensor:
    """Decode an image file to uint8 (3, H, W), rotated by its EXIF orientation. Raises UnreadableImageError.

    Training and evaluation ignore the orientation, as torchvision and timm do; photographs of telephones need it.
    """
    try:
        data = read_array(path, MAX_BYTES)
    except OSError as error:
        raise UnreadableImageError(str(path), f"cannot be read ({error.strerror})", "check the file") from error
    image = decode(data, str(path))  # before Pillow opens the file
    turns, mirrored = UPRIGHT.get(_orientation(data), (0, False))
    image = image.rot90(turns, (1, 2))
    return (image.flip(2) if mirrored else image).contiguous()


def _orientation(data: np.ndarray) -> int:
    """Return the EXIF orientation of a file's bytes, 1 if it has none."""
    with suppress(Exception), warnings.catch_warnings():  # Pillow raises many kinds of errors for damaged files
        warnings.simplefilter("ignore")
        form = format_of(data[:HEAD].tobytes())
        check_file(data, form)
        with Image.open(io.BytesIO(data.data), formats=(form,)) as image:
            block = image.info.get("exif", b"")[len(b"Exif\0\0") :]
            check_tags(memoryview(block))
            return int(image.getexif().get(ORIENTATION, 1))
    return 1


def _find_model(asked: str, metadata: dict[str, Any], tensors: dict[str, Tensor], source: str) -> str:
    """Return the name of a file's model: as asked, as the file states, or identified by its weights."""
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
            f"{source} does not state its model{near}; name it with --model ({', '.join(retoken_models())})"
        )
    return found.name


def _fit_names(
    model: str, tensors: dict[str, Tensor], metadata: dict[str, Any], source: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights under our names, and metadata with the number of classes."""
    if is_retoken(model):
        done = convert(tensors, metadata, model, published=False, source=source)
        if not done.metadata["num_classes"]:
            raise ValueError(f"{source} holds no classifier; give weights of a whole model")
        return done.tensors, done.metadata
    if "num_classes" in metadata:
        return tensors, metadata
    heads = [f"{name}.weight" for name in _head_names(model)]
    head = next(
        (tensor for name, tensor in tensors.items() if any(f".{own}".endswith(f".{name}") for own in heads)), None
    )
    if head is None:
        raise ValueError(f"{source} holds no classifier of a {model}; check --model")
    return tensors, {**metadata, "num_classes": row_count(head)}


def _class_names(metadata: dict[str, Any], class_index: str) -> list[str]:
    """Return the names of the classes: the class index file's, else the checkpoint's, else ImageNet's or numbers."""
    try:
        lists = class_names(metadata.get("classes", []), class_index, metadata["num_classes"])
    except ClassIndexError as error:
        raise ValueError(f"--class-index={error.file} {error.problem}") from error
    return list(lists.values())[-1]  # --class-index, if it is given


def _head_names(model: str) -> tuple[str, ...]:
    """Return the names of a model's classifier layers."""
    with torch.device("meta"):
        return classifier_names(timm.create_model(model))


def _find_transform(
    model: str, metadata: dict[str, Any], size: int | None, crop_pct: float | None, source: str
) -> tuple[EvalTransform, list[str]]:
    """Return the evaluation crop, and notes on assumptions made for it."""
    if size is not None and size < 1:
        raise ValueError(f"--size {size}: give a number of pixels, 1 or more")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"--crop-pct {crop_pct:g} must lie in 0 .. 1, e.g. 0.875")
    stated = metadata.get("evaluation")
    notes = []
    if stated:
        known = _stated_transform(stated, source)
    else:
        default = _default_cfg(model)
        side = metadata.get("img_size", default.input_size[-1])
        known = EvalTransform(side, math.floor(side / default.crop_pct))
        if "layout" in metadata and crop_pct is None:
            notes.append(
                f"the file does not state the evaluation crop: timm's default, {default.crop_pct:g} of the shorter side"
            )
    crop = size or known.crop
    resize = round(known.resize * crop / known.crop)
    if crop_pct is not None:
        resize = math.floor(crop / crop_pct)
    return EvalTransform(crop, resize, known.interpolation, known.mode, known.fill), notes


def _stated_transform(stated: dict[str, Any], source: str) -> EvalTransform:
    """Return the evaluation crop that a file states. Raises ValueError if there is no such crop."""
    for key, known in (("interpolation", INTERPOLATIONS), ("mode", EVAL_MODES)):
        if key in stated and stated[key] not in known:
            raise ValueError(
                f"{source} states the evaluation {key} {shorten(stated[key])}, which is none of {', '.join(known)}; is it of a newer version?"
            )
    crop, resize = stated["crop"], stated.get("resize", 0)
    if 0 < resize < crop:
        raise ValueError(
            f"{source} states an evaluation crop of {crop} pixels from images resized to {resize}; is it damaged?"
        )
    return EvalTransform(**{**stated, "fill": tuple(stated["fill"])})


def _default_cfg(model: str) -> PretrainedCfg:
    """Return timm's preprocessing defaults of a model."""
    return timm.get_pretrained_cfg(model) or PretrainedCfg()


def _build(
    model: str, metadata: dict[str, Any], size: int, tensors: dict[str, Tensor] | None, source: str
) -> nn.Module:
    """Build a model and load its weights, if there are any. Raises ValueError if they do not fit."""
    arguments: dict[str, Any] = {"img_size": size} if takes_img_size(model) else {}
    net = timm.create_model(model, num_classes=metadata["num_classes"], **arguments)
    if tensors is not None:
        net.load_state_dict(fit(net, tensors, source, remedy="check --model and --size"))
    return net
