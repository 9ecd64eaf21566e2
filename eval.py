"""Evaluate a checkpoint: every image exactly once, by the protocol of the flags and the config's EVAL section.

python eval.py --cfg configs/groupmixformer/mobile_64.yaml --data-path DIR --checkpoint output/NAME/best_raw.safetensors

docs/evaluation.md has a command for each protocol.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin take the loader's cores

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from config import command_line
from data.build import EvalData, ValFolder, build_eval_data
from data.stores.real_labels import read_real_labels
from engine.distributed.processes import Processes, abort, exit_on_failure, init_processes, shut_down
from engine.distributed.signals import ENDED
from engine.evaluate import NotFiniteError
from engine.logging.log import Log
from engine.result_files import TABLES, check_target, write_json
from models.build import announce_custom_model
from trainer.evaluation import (
    Evaluation,
    check_model_and_classes,
    check_results,
    evaluate_weights,
    load_requested_weights,
)
from trainer.evaluation_protocol import protocol_as_json


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
        except NotFiniteError as error:
            parser.stop(error, processes.name)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun repeats it
            if processes.main:
                print("interrupted", file=sys.stderr)
            abort(ENDED)
            return ENDED
    shut_down()
    return 0


def evaluate_checkpoint(cfg: CfgNode, args: argparse.Namespace, processes: Processes) -> None:
    """Evaluate the requested weights, which must fit exactly; print a line for each and write the files."""
    log, checkpoint = Log(processes.main), Path(args.checkpoint)
    per_class = check_target("--per-class", args.per_class, TABLES) if args.per_class is not None else None
    predictions = check_target("--predictions", args.predictions, TABLES) if args.predictions is not None else None
    summary = check_target("--json", args.json, (".json",)) if args.json is not None else None
    announce_custom_model(cfg, log.info)
    loaded = load_requested_weights(checkpoint, args.weights)
    metadata = loaded[0][1]
    data = build_evaluation_data(cfg, args, metadata, processes, log)
    check_model_and_classes(cfg, metadata, data.classes, checkpoint, log)
    real = None
    if args.real_labels is not None:
        files = [data.names(index) for index in range(data.val.num_images)]
        real = read_real_labels(args.real_labels, files, data.classes)
    evaluation = Evaluation(
        cfg=cfg,
        processes=processes,
        log=log,
        data=data,
        checkpoint=checkpoint,
        real=real,
        per_class=per_class,
        predictions=predictions,
        fold=args.fold,
    )
    log_setup(evaluation)
    results: dict[str, dict[str, Any]] = {}
    for weights, own_metadata in loaded:
        which = own_metadata["weights"]
        suffix = f"_{which}" if len(loaded) > 1 else ""
        results[which] = evaluate_weights(evaluation, weights, which, suffix)
        for note in own_metadata.get("notes", ()):
            log.info(f"{checkpoint}: {note}")
    if summary and processes.main:
        write_json(summary, as_json(evaluation, results, metadata))
        log.info(f"all numbers are in {summary}")
    check_results(results, checkpoint)


def build_evaluation_data(
    cfg: CfgNode, args: argparse.Namespace, metadata: dict[str, Any], processes: Processes, log: Log
) -> EvalData:
    """Build the images of --val-path, in the classes of the checkpoint's metadata, or else those of the config."""
    folder = None
    if args.val_path is not None:
        known, count = metadata.get("classes", []), metadata.get("num_classes", 0)
        folder = ValFolder(args.val_path, known, count, args.all_logits)
    log_info = log.info if processes.main else None
    return build_eval_data(cfg, processes.rank, processes.world, processes.device, log_info, folder)


def log_setup(e: Evaluation) -> None:
    """Log model, checkpoint, device and images before the evaluation starts."""
    for note in e.data.notes:
        e.log.warning(note)
    folded = ", folded" if e.fold else ""
    e.log.info(f"{e.cfg.MODEL.NAME} from {e.checkpoint}, {e.processes.device.type}, amp {e.cfg.TRAIN.AMP}{folded}")
    e.log.info(f"{e.data.val.num_images} images of {e.data.origin}")


def as_json(e: Evaluation, results: dict[str, dict[str, Any]], metadata: dict[str, Any]) -> dict[str, Any]:
    """Return results, protocol, data and the checkpoint's metadata as plain values for JSON."""
    return {
        "checkpoint": str(e.checkpoint),
        "model": e.cfg.MODEL.NAME,
        "results": results,
        "protocol": protocol_as_json(e.cfg, e.data, e.processes, e.fold),
        "data": {"origin": e.data.origin, **e.data.fingerprint},
        "facts": {key: value for key, value in metadata.items() if key != "weights"},
    }


if __name__ == "__main__":
    sys.exit(main())
