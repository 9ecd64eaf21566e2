"""Check everything that a long run depends on before it starts; each finding is ok, a warning or a failure.

    python -m tools.doctor                                                    the machine
    python -m tools.doctor --cfg configs/stvit/small_224.yaml --data-path DIR --processes 8     the machine and a run

Nothing is changed; a file of 64 MiB is written to measure the speed of OUTPUT, and removed. Exit status 0: no failure. 1: a
failure. 2: an error in the command or the config.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.text import Text
from yacs.config import CfgNode

import config
from config import command_line
from config.command_line import KEY_FLAGS, TRAIN_FLAGS, Parser
from tools import doctor_machine, doctor_run
from tools.doctor_findings import LEVELS, Finding, guarded
from tools.terminal import Screen

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
WIDTH = max(len(level) for level in LEVELS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = doctor_parser()
    args = parser.parse_args(argv)
    try:
        if args.processes is not None and args.processes < 1:
            raise ValueError(f"--processes {args.processes} must be 1 or more")
        args.cfg = args.cfg or []
        cfg = command_line.resolve(args, TRAIN_FLAGS)
    except ValueError as error:
        parser.fail(error)
    asked = bool(args.cfg or args.data_path or args.opts)
    world = args.processes or max(1, torch.cuda.device_count())
    screen = Screen(soft_wrap=True)
    findings = []
    for finding in examine(cfg, world, with_run=asked):
        findings.append(finding)
        if not args.json:
            show(screen, finding)
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], **counts}, indent=2))
    else:
        many = {level: "" if count == 1 else "s" for level, count in counts.items()}
        screen.print(
            f"{counts['ok']} ok, {counts['warn']} warning{many['warn']}, {counts['fail']} failure{many['fail']}"
        )
        if not asked:
            screen.print("no config was checked: add --cfg FILE --data-path DIR", style="dim")
    return 1 if counts["fail"] else 0


def doctor_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser("Check everything that a long run depends on; report problems and their remedies.")
    parser.prog = "python -m tools.doctor"
    parser.add_argument("--cfg", metavar="FILE", help="YAML config of the run to check")
    parser.add_argument(
        "--opts", metavar="KEY VALUE", nargs="*", action="extend", default=[], help="config keys to change"
    )
    for flag, (key, text) in KEY_FLAGS.items():
        parser.add_argument(flag, metavar=key.rsplit(".", 1)[-1], help=f"{text} [{key}]")
    parser.add_argument("--processes", metavar="N", type=int, help="world size of the run (GPUs of this machine)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def examine(cfg: CfgNode, world: int, with_run: bool) -> Iterator[Finding]:
    """Yield the findings of the machine, and those of the run if `with_run`."""
    own = cfg if with_run else None
    parts: list[tuple[str, Iterable[Finding]]] = [
        ("packages", doctor_machine.packages(own)),
        ("gpu", doctor_machine.gpus(own)),
        ("exchange", doctor_machine.communication()),
        ("limits", doctor_machine.limits(own)),
        ("output", doctor_run.storage(Path(cfg.OUTPUT))),
    ]
    if with_run:
        name = config.run_name(cfg)
        parts.append((f"run {name}", doctor_run.run(cfg, world)))
    for subject, findings in parts:
        yield from guarded(subject, findings)


def show(screen: Screen, finding: Finding) -> None:
    """Print a finding, and below it the remedy."""
    line = Text(finding.level.ljust(WIDTH), style=COLOURS[finding.level])
    screen.print(line + Text(f"  {finding.subject}: {finding.text}", style=""))
    if finding.remedy:
        screen.print(Text(f"{' ' * WIDTH}  -> {finding.remedy}"))


if __name__ == "__main__":
    sys.exit(main())
