"""Command lines of train.py and eval.py: strict flags, mapped to config keys."""

import argparse
import difflib
import re
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from yacs.config import CfgNode

import config
from common.text import allow_any_text, readable, shorten

ROOT = Path(__file__).resolve().parents[1]

# Flags for one config key each, named as in Swin's trainer.
KEY_FLAGS = {
    "--data-path": ("DATA.PATH", "folder with train/ and val/, or with the archives that hold them"),
    "--batch-size": ("TRAIN.MICRO_BATCH", "images per process and forward pass; the global batch stays the recipe's"),
    "--output": ("OUTPUT", "folder that run directories are made in"),
    "--tag": ("TAG", "tells runs of one config apart: the run directory is <output>/<name>-<tag>"),
    "--init": ("MODEL.INIT", "weights to start a new run from"),
    "--amp": ("TRAIN.AMP", "bf16, fp16 or off"),
    "--seed": ("TRAIN.SEED", "seed of everything random"),
}


class Parser(argparse.ArgumentParser):
    """Argument parser that allows no abbreviations and suggests the nearest flag for a mistyped one."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        """Parse all arguments; exit with a suggestion at the first that is unknown."""
        allow_any_text()
        parsed, rest = self.parse_known_args(args, namespace)
        if any(re.fullmatch(r"--local[-_]rank(=.*)?", word) for word in rest):
            self.error(
                f"--local-rank is of torch.distributed.launch, and is not needed: start with torchrun --nproc_per_node N "
                f"{self.prog} ..., which passes the rank in the environment"
            )
        if rest:
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            near = difflib.get_close_matches(rest[0].split("=")[0], flags, n=1, cutoff=0.4)
            if re.fullmatch(r"-[\d.].*", rest[0]):
                self.error(
                    f"{shorten(rest[0])} looks like a flag; write a negative number without exponent, e.g. -0.001"
                )
            hint = f"did you mean {near[0]}?" if near else "config keys are set with --opts KEY VALUE ..."
            self.error(f"unknown argument {shorten(rest[0])}; {hint} (--help lists all)")
        return parsed

    def fail(self, error: Exception, process: str = "") -> NoReturn:
        """Exit with status 2 and the message of an error in the user's input; `process` names one of several.

        The traceback is printed first if the error was raised by a library, by Python itself or in a custom model: its
        message alone would not locate it.
        """
        frames = traceback.extract_tb(error.__traceback__)
        file = Path(frames[-1].filename) if frames else ROOT
        raised = not frames or not frames[-1].line or frames[-1].line.startswith("raise")
        if not (file.is_relative_to(ROOT) and raised) or "site-packages" in file.parts:
            for line in "".join(traceback.format_exception(error)).split("\n"):
                print(readable(line), file=sys.stderr)
        self.exit(2, f"{self.prog}: {process}{error}")

    def stop(self, error: Exception, process: str = "") -> NoReturn:
        """Exit with status 1 and the message of an error that ended the work."""
        self.exit(1, f"{self.prog}: stopped: {process}{error}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit with a message of one line, in which control characters are escaped: names may hold them."""
        super().exit(status, message and f"{readable(message.rstrip())}\n")


def train_parser() -> Parser:
    """Return the parser of train.py."""
    parser = Parser("Train a model; the same command on the same run directory continues it.")
    _add_shared(parser)
    for flag, (key, text) in KEY_FLAGS.items():
        parser.add_argument(flag, metavar=key.rsplit(".", 1)[-1], help=f"{text} [{key}]")
    parser.add_argument(
        "--resume", metavar="FILE", help="checkpoint of another run to start from, optimiser and position included"
    )
    parser.add_argument(
        "--eval", action="store_true", help="evaluate the run's latest weights, or --resume's, and stop"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, print the summary of the run, write nothing, stop"
    )
    return parser


def eval_parser() -> Parser:
    """Return the parser of eval.py."""
    parser = Parser("Evaluate a checkpoint on the val/ images, each exactly once.")
    _add_shared(parser)
    for flag in ("--data-path", "--amp"):
        key, text = KEY_FLAGS[flag]
        parser.add_argument(flag, metavar=key.rsplit(".", 1)[-1], help=f"{text} [{key}]")
    parser.add_argument("--batch-size", metavar="BATCH", help="images per process and forward pass [EVAL.BATCH]")
    parser.add_argument(
        "--checkpoint", metavar="FILE", required=True, help="best_*.safetensors or checkpoints/update-*.pt"
    )
    parser.add_argument(
        "--weights", choices=("raw", "ema", "both"), help="which weights of a checkpoint that holds both (default: raw)"
    )
    parser.add_argument(
        "--fold",
        action="store_true",
        help="multiply BatchNorm and other constants into the weights: faster, rounds otherwise",
    )
    parser.add_argument(
        "--val-path",
        metavar="DIR",
        help="folder with a folder per class to evaluate on, instead of DATA.PATH/val: ImageNet-V2, -A, -R, -Sketch, ...; "
        "if it holds some of the classes only, answers are restricted to them",
    )
    parser.add_argument(
        "--all-logits", action="store_true", help="do not restrict the answers to the classes of --val-path"
    )
    parser.add_argument("--real-labels", metavar="FILE", help="real.json: also count ReaL accuracy on ImageNet's val")
    parser.add_argument("--per-class", metavar="FILE", help="write each class's accuracy to this .csv or .parquet file")
    parser.add_argument(
        "--predictions", metavar="FILE", help="write each image's label and best answers to this .csv or .parquet file"
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers, the protocol and the checkpoint's metadata")
    return parser


def _add_shared(parser: Parser) -> None:
    parser.add_argument(
        "--cfg", metavar="FILE", required=True, help="YAML config, e.g. configs/groupmixformer/mobile_64.yaml"
    )
    parser.add_argument(
        "--opts",
        metavar="KEY VALUE",
        nargs="*",
        action="extend",
        default=[],
        help="config keys to change, see config/schema.py",
    )


def check_eval(args: argparse.Namespace) -> None:
    """Raise ValueError for flags of eval.py that contradict each other or have no effect."""
    if args.val_path is not None and args.data_path is not None:
        raise ValueError(
            f"--val-path {args.val_path} and --data-path {args.data_path} both name the images; give one of them"
        )
    if args.all_logits and args.val_path is None:
        raise ValueError("--all-logits has no effect without --val-path; leave it out, or give the folder")
    files = [(flag, path) for flag in OUTPUT_FLAGS if (path := getattr(args, flag[2:].replace("-", "_"))) is not None]
    for i, (flag, path) in enumerate(files):
        for other, same in files[:i]:
            if path == same:
                raise ValueError(f"{other} and {flag} name the same file {path}; give each its own")


def check_which(metadata: dict[str, Any], requested: str | None, source: str) -> None:
    """Raise ValueError if a file holds other weights, raw or EMA, than the requested ones."""
    if requested and metadata.get("weights", requested) != requested:
        raise ValueError(
            f"{source} holds {metadata['weights']} weights, {requested} were asked for; name another file or ask for those"
        )


def resolve(args: argparse.Namespace, flags: dict[str, str]) -> CfgNode:
    """Return the frozen config of a parsed command line; `flags` maps flags to config keys.

    Raises ValueError where a flag and --opts both set a key.
    """
    given = {flag: (key, getattr(args, flag[2:].replace("-", "_"))) for flag, key in flags.items()}
    return config.load(args.cfg, args.opts, {flag: pair for flag, pair in given.items() if pair[1] is not None})


TRAIN_FLAGS = {flag: key for flag, (key, _) in KEY_FLAGS.items()}
OUTPUT_FLAGS = ("--per-class", "--predictions", "--json")
EVAL_FLAGS = {"--data-path": "DATA.PATH", "--amp": "TRAIN.AMP", "--batch-size": "EVAL.BATCH"}
