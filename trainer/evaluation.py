"""Evaluation of a checkpoint's raw or EMA weights, as eval.py runs it: loading, accuracy, tables. Within a run: validation.py."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from yacs.config import CfgNode

from config import command_line
from data.build import EvalData
from data.stores.real_labels import RealLabels
from engine.build import prepare_model
from engine.distributed.processes import Processes
from engine.evaluate import Accuracy, NotFiniteError, RealAccuracy, evaluate
from engine.logging.log import Log
from engine.precision import DTYPES, Precision
from engine.predictions import Collector, Predictions
from engine.result_files import write_table
from models.build import build_model
from models.inference.prepare import is_foldable, prepare_inference
from models.weights import fit, load_weights
from trainer.evaluation_protocol import describe_protocol

KINDS = ("raw", "ema")
Weights = dict[str, Any]
Metadata = dict[str, Any]


@dataclass
class Evaluation:
    """Settings and data that the evaluations of one checkpoint share."""

    cfg: CfgNode
    processes: Processes
    log: Log
    data: EvalData
    checkpoint: Path
    real: RealLabels | None = None  # labels of ReaL accuracy
    per_class: Path | None = None  # table of each class's accuracy
    predictions: Path | None = None  # table of each image's predictions
    fold: bool = False  # fold BatchNorm and other constants into the weights


def load_requested_weights(checkpoint: Path, which: str | None) -> list[tuple[Weights, Metadata]]:
    """Return (weights, metadata) of the requested weights: raw, ema or both; None takes those the file holds, raw if both.

    Raises ValueError if the file does not hold them.
    """
    if which != "both":
        weights, metadata = load_weights(checkpoint, which or "raw")
        command_line.check_which(metadata, which, str(checkpoint))
        return [(weights, metadata)]
    first = load_weights(checkpoint, "raw")
    if tuple(first[1]["holds"]) != KINDS:
        raise ValueError(
            f"--weights both: {checkpoint} holds {' and '.join(first[1]['holds'])} weights only; ask for those, or name a "
            "file that holds both, as checkpoints/update-*.pt of a run with EMA.DECAY does"
        )
    return [first, load_weights(checkpoint, "ema")]


def check_model_and_classes(cfg: CfgNode, metadata: Metadata, classes: list[str], checkpoint: Path, log: Log) -> None:
    """Raise ValueError if the checkpoint is of another model or class count; warn if the class names differ."""
    if metadata.get("model", cfg.MODEL.NAME) != cfg.MODEL.NAME:
        raise ValueError(
            f"{checkpoint} holds a {metadata['model']}, MODEL.NAME is {cfg.MODEL.NAME}; use the config it was trained with"
        )
    if metadata.get("num_classes", len(classes)) != len(classes):
        raise ValueError(
            f"{checkpoint} was trained for {metadata['num_classes']} classes, {cfg.DATA.PATH or 'the data'} has {len(classes)}; "
            "evaluate it on the classes it knows, or give a folder of some of them as --val-path"
        )
    if metadata.get("classes", classes) != classes:
        pairs = [f"{a} there, {b} here" for a, b in zip(metadata["classes"], classes, strict=True) if a != b]
        log.warning(f"class names differ from those {checkpoint} was trained on: {'; '.join(pairs[:3])}")


def evaluate_weights(e: Evaluation, weights: Weights, which: str, suffix: str) -> dict[str, Any]:
    """Evaluate one set of weights; log its accuracy, write its tables, return its numbers for JSON.

    `suffix` extends the names of the tables.
    """
    model = build_evaluated_model(e, weights)
    use_collector = e.real or e.per_class or e.predictions
    num_answers = len(e.data.classes) if e.data.answers is None else len(e.data.answers)
    collector = Collector(e.data.val.num_images, num_answers, e.processes) if use_collector else None
    result = evaluate(
        model,
        e.log.track(e.data.val, len(e.data.val), f"evaluate {which}"),
        e.data.stage.evaluate,
        Precision(e.cfg.TRAIN.AMP, e.processes.device),
        e.processes,
        e.data.val.num_images,
        e.cfg.EVAL.FLIP,
        e.data.answers,
        collector.observe if collector else None,
    )
    predictions = collector.gather() if collector else None
    real = RealAccuracy(*e.real.count(predictions.ranked)) if e.real and predictions else None
    e.log.info(
        f"{which:<3}  {result}{f'  {real}' if real else ''}  {result.images} images in {result.seconds:.1f} s  "
        f"[{which} weights, {describe_protocol(e.cfg, e.data)}]"
    )
    if predictions and e.processes.main:
        write_tables(e, predictions, suffix)
    return numbers_of(result) | ({"real": asdict(real) | {"top1": real.top1, "top5": real.top5}} if real else {})


def build_evaluated_model(e: Evaluation, weights: Weights) -> nn.Module:
    """Build the model with the weights, which must fit exactly, on this process's device; folded if asked for."""
    model = build_model(e.cfg, len(e.data.classes))
    remedy = "check MODEL.NAME and the classes (MODEL.NUM_CLASSES, DATA.CLASS_INDEX)"
    model.load_state_dict(fit(model, weights, str(e.checkpoint), remedy=remedy))
    model = prepare_model(model, e.processes)
    if e.fold:
        if not is_foldable(model):
            raise ValueError(
                f"--fold: the class of MODEL.NAME={e.cfg.MODEL.NAME} does not declare `foldable`; leave it out"
            )
        prepare_inference(model.eval(), DTYPES.get(e.cfg.TRAIN.AMP))
    return model


def write_tables(e: Evaluation, predictions: Predictions, suffix: str) -> None:
    """Write the requested tables, with `suffix` appended to the stems of their names."""
    tables = (
        (e.per_class, "accuracy of each class", lambda: predictions.per_class(e.data.classes)),
        (e.predictions, "answers for each image", lambda: predictions.per_image(e.data.names)),
    )
    for path, title, make_table in tables:
        if path:
            target = path.with_stem(path.stem + suffix)
            write_table(target, make_table())
            e.log.info(f"{title}: {target}")


def check_results(results: dict[str, dict[str, Any]], checkpoint: Path) -> None:
    """Raise NotFiniteError if any result is not finite."""
    bad = [which for which, result in results.items() if not math.isfinite(result["loss"])]
    if bad:
        raise NotFiniteError(
            f"the evaluation of the {' and '.join(bad)} weights of {checkpoint} is not finite: logits of the model are nan or inf, "
            "so its accuracy says nothing; use another checkpoint, or --amp off if fp16 overflows"
        )


def numbers_of(result: Accuracy) -> dict[str, Any]:
    """Return a result with its rates as plain values."""
    rates = {"top1": result.top1, "top5": result.top5, "images_per_s": result.images / result.seconds}
    return asdict(result) | rates
