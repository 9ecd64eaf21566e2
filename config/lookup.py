"""Access to config values by dotted name, such as TRAIN.EPOCHS, and the keys in which two configs differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from yacs.config import CfgNode

from common.text import shorten


def keys(node: CfgNode, prefix: str = "") -> list[str]:
    """List the dotted names of all values below a node."""
    names: list[str] = []
    for key, value in node.items():
        names += keys(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [prefix + key]
    return names


def get(cfg: CfgNode, key: str) -> Any:
    """Return the value under a dotted name."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def run_name(cfg: CfgNode) -> str:
    """Return the name of the run directory below OUTPUT."""
    name = cfg.NAME or f"{cfg.MODEL.NAME}_{cfg.DATA.IMG_SIZE}"
    return f"{name}-{cfg.TAG}" if cfg.TAG else name


def config_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignored: Sequence[str], prefix: str = ""
) -> list[str]:
    """List the keys in which two config trees differ, as "KEY: old -> new", but for `ignored` keys and sections."""
    found: list[str] = []
    for key in {**old, **new}:
        name = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if name in ignored or a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += config_differences(a, b, ignored, f"{name}.")
        else:
            found.append(f"{name}: {shorten(a)} -> {shorten(b)}")
    return found
