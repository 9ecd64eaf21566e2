"""Evaluate a checkpoint: every validation image exactly once.

python eval.py --cfg configs/groupmixformer/mobile_64.yaml --data-path DIR --checkpoint output/NAME/best_raw.safetensors
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin steal the loader's cores

import sys
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

import arguments
from data.build import build_eval_data
from engine import distributed
from engine.build import prepare_model
from engine.distributed import Processes
from engine.evaluate import evaluate
from engine.log import Log
from engine.precision import Precision
from models.build import build_model
from models.weights import fit, load_weights


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = arguments.eval_parser()
    args = parser.parse_args(argv)
    try:
        cfg = arguments.resolve(args, arguments.EVAL_FLAGS)
        processes = distributed.start(cfg.DEVICE)
    except ValueError as error:
        parser.fail(error)
    try:
        evaluate_checkpoint(cfg, Path(args.checkpoint), args.weights, processes)
    except ValueError as error:
        parser.fail(error, processes.name)
    distributed.stop()
    return 0


def evaluate_checkpoint(cfg: CfgNode, checkpoint: Path, which: str | None, processes: Processes) -> None:
    """Load the weights, which must fit exactly, evaluate and print the result."""
    log = Log(processes.main)
    weights, facts = load_weights(checkpoint, which or "raw")
    arguments.check_which(facts, which, str(checkpoint))
    say = log.say if processes.main else None
    data = build_eval_data(cfg, processes.rank, processes.world, processes.device, say)
    check_classes(cfg, weights, facts, data.classes, str(checkpoint), log)
    model = build_model(cfg, len(data.classes))
    model.load_state_dict(fit(model, weights, str(checkpoint)))
    model = prepare_model(model, processes)
    precision = Precision(cfg.TRAIN.AMP, processes.device)
    log.say(
        f"{cfg.MODEL.NAME} from {checkpoint} ({facts['weights']} weights), {processes.device.type}, amp {cfg.TRAIN.AMP}"
    )
    batches = log.track(data.val, len(data.val), "evaluate")
    result = evaluate(model, batches, data.stage.evaluate, precision, processes, data.val.num_images)
    log.say(f"{result}  {result.images} images in {result.seconds:.1f} s")


def check_classes(cfg: CfgNode, weights: dict, facts: dict, classes: list[str], source: str, log: Log) -> None:
    """Raise ValueError if the checkpoint is of another model or class count; warn if the class names differ."""
    if facts.get("model", cfg.MODEL.NAME) != cfg.MODEL.NAME:
        raise ValueError(
            f"{source} holds a {facts['model']}, MODEL.NAME is {cfg.MODEL.NAME}; use the config it was trained with"
        )
    if facts.get("num_classes", len(classes)) != len(classes):
        raise ValueError(
            f"{source} was trained for {facts['num_classes']} classes, {cfg.DATA.PATH or 'the data'} has {len(classes)}; "
            "evaluate it on the classes it knows"
        )
    if facts.get("classes", classes) != classes:
        pairs = [f"{a} there, {b} here" for a, b in zip(facts["classes"], classes, strict=True) if a != b]
        log.warn(f"class names differ from those {source} was trained on: {'; '.join(pairs[:3])}")


if __name__ == "__main__":
    sys.exit(main())
