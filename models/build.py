"""The model that a config asks for: one of Retoken's families or any other model of timm."""

import difflib
from typing import Any

import timm
from timm.models import get_pretrained_cfg_value, model_entrypoint
from torch import nn

import models  # noqa: F401  registers the families


def build_model(cfg: Any, num_classes: int) -> nn.Module:
    """Build cfg.MODEL.NAME with its drop rates, for cfg.DATA.IMG_SIZE where the model asks for a size."""
    name = cfg.MODEL.NAME
    check_name(name)
    arguments: dict[str, Any] = {}
    if takes_img_size(name):
        size = cfg.DATA.IMG_SIZE
        arguments["img_size"] = size if isinstance(size, int) else tuple(size)
    # timm's models do not all have these; what is off is not asked for.
    if cfg.MODEL.DROP_RATE:
        arguments["drop_rate"] = cfg.MODEL.DROP_RATE
    if cfg.MODEL.DROP_PATH_RATE:
        arguments["drop_path_rate"] = cfg.MODEL.DROP_PATH_RATE
    try:
        return timm.create_model(name, num_classes=num_classes, **arguments)
    except TypeError as error:
        raise ValueError(f"MODEL.NAME={name!r} does not take {arguments}: set to 0 what it names ({error})") from error


def check_name(name: str, key: str = "MODEL.NAME") -> None:
    """Refuse a name that is neither ours nor timm's, naming the nearest ones and the key that it came from."""
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
    ours = ", ".join(retoken_models())
    raise ValueError(
        f"{key}={name!r} is unknown: did you mean {', '.join(near) or 'none that is near'}? "
        f"Retoken's are {ours}; timm.list_models() lists the others"
    )


def retoken_models() -> list[str]:
    """List the names that this package registers."""
    return [name for name in timm.list_models() if is_retoken(name)]


def is_retoken(name: str) -> bool:
    return bool(model_entrypoint(name).__module__.startswith("models."))


def takes_img_size(name: str) -> bool:
    """Say whether a model is built for an image size: ours, and those of timm whose default config fixes it."""
    return is_retoken(name) or bool(get_pretrained_cfg_value(name, "fixed_input_size"))
