"""Evaluate a checkpoint: every image exactly once, by the protocol that the flags and the config's EVAL section state.

python eval.py --cfg configs/groupmixformer/mobile_64.yaml --data-path DIR --checkpoint output/NAME/best_raw.safetensors

docs/evaluation.md has a command for each protocol.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin steal the loader's cores

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from config import command_line
from data.build import EvalData, ValFolder, build_eval_data
from data.stores.real_labels import RealLabels, read_real_labels
from engine.build import prepare_model
from engine.distributed.processes import Processes, abort, exit_on_failure, init_processes, shut_down
from engine.distributed.signals import ENDED
from engine.evaluate import Accuracy, evaluate
from engine.logging.log import Log
from engine.precision import DTYPES, Precision
from engine.predictions import Collector, Predictions
from engine.result_files import TABLES, check_target, write_json, write_table
from models.build import build_model, is_retoken
from models.inference.prepare import prepare_inference
from models.weights import fit, load_weights

KINDS = ("raw", "ema")


@dataclass
class Evaluation:
    """What the evaluations of one checkpoint share."""

    cfg: CfgNode
    processes: Processes
    log: Log
    data: EvalData
    checkpoint: Path
    real: RealLabels | None
    per_class: Path | None
    predictions: Path | None
    fold: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line.eval_parser()
    args = parser.parse_args(argv)
    try:
        cfg = command_line.resolve(args, command_line.EVAL_FLAGS)
        command_line.check_eval(args)
        processes = init_processes(cfg.DEVICE, cfg.DIST.START_TIMEOUT, cfg.DIST.TIMEOUT)
    except ValueError as error:
        parser.fail(error)
    with exit_on_failure():
        try:
            evaluate_checkpoint(cfg, args, processes)
        except ValueError as error:
            parser.fail(error, processes.name)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun repeats it
            if processes.main:
                print("interrupted", file=sys.stderr)
            abort(ENDED)
            return ENDED
    shut_down()
    return 0


def evaluate_checkpoint(cfg: CfgNode, args: argparse.Namespace, processes: Processes) -> None:
    """Evaluate the weights that were asked for, which must fit exactly; print a line each and write the files."""
    log, checkpoint = Log(processes.main), Path(args.checkpoint)
    per_class = check_target("--per-class", args.per_class, TABLES) if args.per_class is not None else None
    predictions = check_target("--predictions", args.predictions, TABLES) if args.predictions is not None else None
    summary = check_target("--json", args.json, (".json",)) if args.json is not None else None
    if args.fold and not is_retoken(cfg.MODEL.NAME):
        raise ValueError(
            f"--fold knows SG-Former, GroupMixFormer and STViT, not MODEL.NAME={cfg.MODEL.NAME}; leave it out"
        )
    loaded = load_all(checkpoint, args.weights)
    metadata = loaded[0][1]
    folder = None
    if args.val_path is not None:
        known, count = metadata.get("classes", []), metadata.get("num_classes", 0)
        folder = ValFolder(args.val_path, known, count, args.all_logits)
    say = log.info if processes.main else None
    data = build_eval_data(cfg, processes.rank, processes.world, processes.device, say, folder)
    check_classes(cfg, metadata, data.classes, str(checkpoint), log)
    real = None
    if args.real_labels is not None:
        files = [data.names(index) for index in range(data.val.num_images)]
        real = read_real_labels(args.real_labels, files, data.classes)
    evaluation = Evaluation(cfg, processes, log, data, checkpoint, real, per_class, predictions, args.fold)
    announce(evaluation)
    results = {
        metadata["weights"]: run(evaluation, weights, metadata["weights"], len(loaded)) for weights, metadata in loaded
    }
    if summary and processes.main:
        write_json(summary, report(evaluation, results, metadata))
        log.info(f"all numbers are in {summary}")


def load_all(checkpoint: Path, which: str | None) -> list[tuple[dict, dict]]:
    """Return (weights, facts) of the weights asked for, raw, ema or both; ValueError if the file does not hold them."""
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


def check_classes(cfg: CfgNode, metadata: dict, classes: list[str], source: str, log: Log) -> None:
    """Raise ValueError if the checkpoint is of another model or class count; warn if the class names differ."""
    if metadata.get("model", cfg.MODEL.NAME) != cfg.MODEL.NAME:
        raise ValueError(
            f"{source} holds a {metadata['model']}, MODEL.NAME is {cfg.MODEL.NAME}; use the config it was trained with"
        )
    if metadata.get("num_classes", len(classes)) != len(classes):
        raise ValueError(
            f"{source} was trained for {metadata['num_classes']} classes, {cfg.DATA.PATH or 'the data'} has {len(classes)}; "
            "evaluate it on the classes it knows, or give a folder of some of them as --val-path"
        )
    if metadata.get("classes", classes) != classes:
        pairs = [f"{a} there, {b} here" for a, b in zip(metadata["classes"], classes, strict=True) if a != b]
        log.warning(f"class names differ from those {source} was trained on: {'; '.join(pairs[:3])}")


def announce(evaluation: Evaluation) -> None:
    """Say what is about to be evaluated."""
    cfg, data, say = evaluation.cfg, evaluation.data, evaluation.log.info
    for note in data.notes:
        evaluation.log.warning(note)
    folded = ", folded" if evaluation.fold else ""
    say(
        f"{cfg.MODEL.NAME} from {evaluation.checkpoint}, {evaluation.processes.device.type}, amp {cfg.TRAIN.AMP}{folded}"
    )
    say(f"{data.val.num_images} images of {data.origin}")


def protocol(evaluation: Evaluation) -> str:
    """Return in a few words how images become answers."""
    data, cfg = evaluation.data, evaluation.cfg
    crop = data.transform.describe() if data.transform else f"{cfg.DATA.IMG_SIZE} px, synthetic"
    flip = "mean of image and mirror image" if cfg.EVAL.FLIP else "no flip"
    some = data.answers is not None
    answers = f"answers restricted to {len(data.answers or ())}" if some else "answers among all"
    return f"{crop}, {flip}, {answers}{' of' if some else ''} {len(data.classes)} classes"


def run(evaluation: Evaluation, weights: dict, which: str, of: int) -> dict[str, Any]:
    """Evaluate one of `of` sets of weights; print its line, write its files, return its numbers."""
    cfg, data, processes, log = evaluation.cfg, evaluation.data, evaluation.processes, evaluation.log
    model = build_model(cfg, len(data.classes))
    remedy = "check MODEL.NAME and the classes (MODEL.NUM_CLASSES, DATA.CLASS_INDEX)"
    model.load_state_dict(fit(model, weights, str(evaluation.checkpoint), remedy=remedy))
    model = prepare_model(model, processes)
    if evaluation.fold:
        prepare_inference(model.eval(), DTYPES.get(cfg.TRAIN.AMP))
    wanted = evaluation.real or evaluation.per_class or evaluation.predictions
    count = len(data.classes) if data.answers is None else len(data.answers)
    collector = Collector(data.val.num_images, count, processes) if wanted else None
    result = evaluate(
        model,
        log.track(data.val, len(data.val), f"evaluate {which}"),
        data.stage.evaluate,
        Precision(cfg.TRAIN.AMP, processes.device),
        processes,
        data.val.num_images,
        cfg.EVAL.FLIP,
        data.answers,
        collector.observe if collector else None,
    )
    predictions = collector.gather() if collector else None
    real = evaluation.real.count(predictions.ranked) if evaluation.real and predictions else None
    log.info(
        f"{which:<3}  {result}{f'  {real}' if real else ''}  {result.images} images in {result.seconds:.1f} s  "
        f"[{which} weights, {protocol(evaluation)}]"
    )
    if predictions and processes.main:
        write_tables(evaluation, predictions, f"_{which}" if of > 1 else "")
    return numbers(result) | ({"real": asdict(real) | {"top1": real.top1, "top5": real.top5}} if real else {})


def write_tables(evaluation: Evaluation, predictions: Predictions, suffix: str) -> None:
    """Write the tables that were asked for, their names extended by `suffix`."""
    tables = (
        (evaluation.per_class, "accuracy of each class", lambda: predictions.per_class(evaluation.data.classes)),
        (evaluation.predictions, "answers for each image", lambda: predictions.per_image(evaluation.data.names)),
    )
    for path, what, make in tables:
        if path:
            target = path.with_stem(path.stem + suffix)
            write_table(target, make())
            evaluation.log.info(f"{what}: {target}")


def numbers(result: Accuracy) -> dict[str, Any]:
    """Return a result as plain values."""
    rates = {"top1": result.top1, "top5": result.top5, "images_per_s": result.images / result.seconds}
    return asdict(result) | rates


def report(evaluation: Evaluation, results: dict[str, Any], metadata: dict) -> dict[str, Any]:
    """Return all that is known of the evaluation, as plain values for JSON."""
    cfg, data, processes = evaluation.cfg, evaluation.data, evaluation.processes
    transform = asdict(data.transform) if data.transform else {"crop": cfg.DATA.IMG_SIZE}
    return {
        "checkpoint": str(evaluation.checkpoint),
        "model": cfg.MODEL.NAME,
        "results": results,
        "protocol": {
            "description": protocol(evaluation),
            **transform,
            "flip": cfg.EVAL.FLIP,
            "classes": len(data.classes),
            "answers": data.answers if data.answers is None else [data.classes[label] for label in data.answers],
            "amp": cfg.TRAIN.AMP,
            "folded": evaluation.fold,
            "device": processes.device.type,
            "processes": processes.world,
        },
        "data": {"origin": data.origin, **data.fingerprint},
        "facts": {key: value for key, value in metadata.items() if key != "weights"},
    }


if __name__ == "__main__":
    sys.exit(main())
