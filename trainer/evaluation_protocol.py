"""Protocol of an evaluation: crop, flip and permitted answers, as text and as plain values for JSON."""

from dataclasses import asdict
from typing import Any

from yacs.config import CfgNode

from data.build import EvalData
from engine.distributed.processes import Processes


def describe_protocol(cfg: CfgNode, data: EvalData) -> str:
    """Return the protocol as text."""
    crop = data.transform.describe() if data.transform else f"{cfg.DATA.IMG_SIZE} px, synthetic"
    flip = "mean of image and mirror image" if cfg.EVAL.FLIP else "no flip"
    restricted = data.answers is not None
    answers = f"answers restricted to {len(data.answers or ())}" if restricted else "answers among all"
    return f"{crop}, {flip}, {answers}{' of' if restricted else ''} {len(data.classes)} classes"


def protocol_as_json(cfg: CfgNode, data: EvalData, processes: Processes, folded: bool) -> dict[str, Any]:
    """Return the protocol, precision and hardware as plain values."""
    transform = asdict(data.transform) if data.transform else {"crop": cfg.DATA.IMG_SIZE}
    return {
        "description": describe_protocol(cfg, data),
        **transform,
        "flip": cfg.EVAL.FLIP,
        "classes": len(data.classes),
        "answers": data.answers if data.answers is None else [data.classes[label] for label in data.answers],
        "amp": cfg.TRAIN.AMP,
        "folded": folded,
        "device": processes.device.type,
        "processes": processes.world,
    }
