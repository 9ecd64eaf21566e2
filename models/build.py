"""Models and teachers from a config: variants of Retoken's families, or any other model of timm."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

import models  # noqa: F401  registers the families
from common.text import shorten
from common.timeline import parse_optional
from models.backbone import Backbone, Stage
from models.custom_model import describe_module, digest, import_models
from models.kernels.switch import use_kernels, wins
from models.registry import is_retoken, retoken_models
from models.weights import adapt, classifier_names, fit, load_weights, row_count


def build_model(cfg: Any, num_classes: int) -> nn.Module:
    """Build cfg.MODEL.NAME with its drop rates and kernels, for cfg.DATA.IMG_SIZE where the model asks for a size."""
    name = cfg.MODEL.NAME
    if cfg.MODEL.MODULE:
        import_models(cfg.MODEL.MODULE)
    check_name(name)
    if cfg.TIMELINE.IMG_SIZE and takes_img_size(name) and not is_retoken(name):
        raise ValueError(f"TIMELINE.IMG_SIZE: {name} is built for one image size; set it to '' or take another model")
    arguments: dict[str, Any] = {}
    if takes_img_size(name):
        size = cfg.DATA.IMG_SIZE
        arguments["img_size"] = size if isinstance(size, int) else tuple(size)
    # Not all of timm's models take these: they are passed only if they are set.
    if cfg.MODEL.DROP_RATE:
        arguments["drop_rate"] = cfg.MODEL.DROP_RATE
    drop_path = parse_optional(cfg.TIMELINE.DROP_PATH_RATE, "TIMELINE.DROP_PATH_RATE")
    rate = max(drop_path.values) if drop_path else cfg.MODEL.DROP_PATH_RATE
    if rate:
        arguments["drop_path_rate"] = rate
    try:
        model = timm.create_model(name, num_classes=num_classes, **arguments)
    except TypeError as error:
        raise ValueError(
            f"MODEL.NAME={shorten(name)} does not take {shorten(arguments)}: set to 0 what it names ({error})"
        ) from error
    if cfg.MODEL.KERNELS == "triton" or (cfg.MODEL.KERNELS == "auto" and cfg.DEVICE != "cpu" and wins(model)):
        _use_kernels(model, cfg.DEVICE)
    return model


def checkpoint_blocks(model: nn.Module, count: int) -> None:
    """Turn on gradient checkpointing for the first `count` blocks of a model, -1 for all.

    timm's models take all blocks or none. Raises ValueError for more blocks than the model has, and for models without it.
    """
    if not count:
        return
    key, name = f"TRAIN.CHECKPOINT_BLOCKS={count}", type(model).__name__
    if isinstance(model, Backbone):
        blocks = sum(len(stage.blocks) for stage in model.stages if isinstance(stage, Stage))
        if count > blocks:
            raise ValueError(f"{key}: {name} has {blocks} blocks; give at most that, or -1 for all")
        model.set_grad_checkpointing(True, None if count < 0 else count)
        return
    if count > 0:
        raise ValueError(f"{key}: models of timm's take all blocks or none; set it to -1 or 0")
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise ValueError(f"{key}: {name} has no gradient checkpointing; set it to 0") from error


def announce_custom_model(cfg: Any, say: Callable[[str], object]) -> None:
    """Pass the announcement of the program that cfg.MODEL.MODULE names, before it runs, to `say`; nothing without one."""
    if cfg.MODEL.MODULE:
        say(f"MODEL.MODULE: running {describe_module(cfg.MODEL.MODULE)}; --opts MODEL.MODULE '' does without")


def custom_model_metadata(cfg: Any) -> dict[str, str]:
    """Return the file of cfg.MODEL.MODULE and its SHA-256, for the manifest; an empty dict without one."""
    if not cfg.MODEL.MODULE:
        return {}
    file, _ = import_models(cfg.MODEL.MODULE)
    return {"model_file": file, "model_file_sha256": digest(file)}


def build_teacher(cfg: Any, classes: Sequence[str]) -> tuple[nn.Module, str]:
    """Build cfg.DISTILL.TEACHER with its weights; return it and a sentence that describes it.

    Its `pretrained_cfg` holds mean and std of its images, and their size if it takes no other. The state of PyTorch's random
    number generator is unchanged. Raises ValueError for a teacher that is not available or has other classes.
    """
    name, source = cfg.DISTILL.TEACHER, cfg.DISTILL.TEACHER_WEIGHTS
    check_name(name, "DISTILL.TEACHER")
    with torch.random.fork_rng(devices=[]):
        if source == "pretrained":
            return _pretrained_teacher(name, len(classes)), f"{name} with timm's pretrained weights"
        try:
            weights, metadata = load_weights(Path(source))
        except ValueError as error:
            raise ValueError(f"DISTILL.TEACHER_WEIGHTS: {error}") from error
        # Retoken's models take any size, timm's that of their weights.
        size = cfg.DATA.IMG_SIZE if is_retoken(name) else metadata.get("img_size")
        asked = {"img_size": size if isinstance(size, int) else tuple(size)} if size and takes_img_size(name) else {}
        model = timm.create_model(name, num_classes=len(classes), **asked)
    said = ", ".join((f"{name} with the {metadata['weights']} weights of {source}", *metadata.get("notes", ())))
    remedy = f"DISTILL.TEACHER is {name}" + (f", the file holds {metadata['model']}" if "model" in metadata else "")
    _check_teacher_classes(model, adapt(model, weights, source, remedy), metadata.get("classes"), classes, source)
    model.load_state_dict(fit(model, weights, source, remedy=remedy))
    side = asked.get("img_size")
    model.pretrained_cfg = _teacher_cfg(model, name, metadata, (side, side) if isinstance(side, int) else side)
    if len(metadata.get("classes", [])) == len(classes) and set(metadata["classes"]) != set(classes):
        said += ", trained on other classes of the same number"
    return model, said


def _teacher_cfg(model: nn.Module, name: str, metadata: dict[str, Any], side: tuple[int, int] | None) -> dict[str, Any]:
    """Return a teacher's pretrained_cfg with mean, std and size of its weights; a custom model may have none of its own."""
    own: dict[str, Any] = {"input_size": (3, 224, 224), **(getattr(model, "pretrained_cfg", None) or {})}
    own.update({key: tuple(metadata[key]) for key in ("mean", "std") if key in metadata})
    if side:
        own["input_size"] = (own["input_size"][0], *side)
    if missing := [key for key in ("mean", "std") if not own.get(key)]:
        raise ValueError(
            f"DISTILL.TEACHER={shorten(name)}: neither its pretrained_cfg nor the file of its weights states {' and '.join(missing)} "
            "of its images; set them in the model's pretrained_cfg, or take weights that train.py wrote"
        )
    return own


def check_name(name: str, key: str = "MODEL.NAME") -> None:
    """Raise ValueError for a name that is neither Retoken's nor timm's, with the nearest names and the key that it came from."""
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
    ours = ", ".join(retoken_models())
    raise ValueError(
        f"{key}={shorten(name)} is unknown: did you mean {', '.join(near) or 'none that is near'}? "
        f"Retoken's are {ours}; timm.list_models() lists the others"
    )


def takes_img_size(name: str) -> bool:
    """Return True for models built for an image size: Retoken's, and those of timm whose default config fixes it."""
    return is_retoken(name) or bool(_default(name, "fixed_input_size"))


def _default(name: str, key: str) -> Any:
    """Return an entry of a model's default_cfgs, None where it is missing."""
    return getattr(get_pretrained_cfg(name), key, None)


def _use_kernels(model: nn.Module, device: str) -> None:
    if device == "cpu" or not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.KERNELS=triton runs on CUDA devices; DEVICE={device} is the CPU here: set MODEL.KERNELS to off"
        )
    try:
        use_kernels(model)
    except ValueError as error:
        raise ValueError(f"MODEL.KERNELS=triton: {error}; set it to off") from error


def _pretrained_teacher(name: str, num_classes: int) -> nn.Module:
    known = _default(name, "num_classes")
    if known != num_classes:
        raise ValueError(_other_classes(f"DISTILL.TEACHER={shorten(name)} pretrained", known, num_classes))
    try:
        return timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"DISTILL.TEACHER_WEIGHTS=pretrained: {name} has none that timm could fetch ({reason[:160]}); name a file instead"
        ) from error


def _check_teacher_classes(
    model: nn.Module, weights: dict[str, Tensor], theirs: Sequence[str] | None, classes: Sequence[str], source: str
) -> None:
    """Raise ValueError if the classifier is for another number of classes, or for the same ones in another order."""
    for head in classifier_names(model):
        weight = weights.get(f"{head}.weight")
        if weight is not None and row_count(weight) != len(classes):
            raise ValueError(_other_classes(f"DISTILL.TEACHER_WEIGHTS={source}", row_count(weight), len(classes)))
    if theirs and list(theirs) != list(classes) and set(theirs) == set(classes):
        raise ValueError(
            f"DISTILL.TEACHER_WEIGHTS={source} has the classes in another order ({theirs[0]} first, here {classes[0]}); give "
            "the file with its order as DATA.CLASS_INDEX"
        )


def _other_classes(who: str, theirs: int | None, ours: int) -> str:
    return (
        f"{who} knows {theirs} classes, the data has {ours} (MODEL.NUM_CLASSES); name a teacher for these classes, e.g. a "
        "file that train.py wrote on this data"
    )
