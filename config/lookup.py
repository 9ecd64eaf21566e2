"""Access to config values by dotted name, such as TRAIN.EPOCHS."""

from typing import Any

from yacs.config import CfgNode


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
