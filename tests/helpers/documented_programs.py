"""Checks of documented commands, one function per program: run what is quick, parse the arguments of the rest.

Each function takes the command and the workspace, raises for a wrong command, and returns `run`, `checked`, `parsed`, ...
"""

import argparse
import contextlib
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

import eval as eval_script
import train as train_script
from config import command_line
from engine.batch_plan import accumulation_steps
from tests.helpers.documented import ROOT, Command
from tests.helpers.documented_workspace import Workspace, shortened

# Modules that are quick enough to run, and the arguments that make them so.
QUICK: dict[str, list[str]] = {
    "benchmarks.cluster_cost": [],
    "benchmarks.run_cost": [],
    "tools.demo": ["--train", "20", "--val", "10"],
    "tools.compare": [],
    "tools.index": ["--workers", "1"],
    "tools.inspect": ["--no-latency"],
    "tools.run_dir": [],
}
SBATCH_FLAGS = (
    "--account",
    "--cpus-per-task",
    "--dependency",
    "--gpus-per-node",
    "--ntasks-per-node",
    "--partition",
    "--time",
)


class ParsedError(Exception):
    """The program has parsed its arguments and is stopped there."""


def python(command: Command, workspace: Workspace) -> str:
    """Run a script or module, or have its parser read the arguments."""
    words = list(command.words[1:])
    if words[0] == "-c":
        compile(words[1], str(command), "exec")
        return "compiled"
    if words[0] == "-m":
        words.pop(0)
    name = words.pop(0).removesuffix(".py").replace("/", ".")
    run = command.whole and not command.needs
    if name == "train":
        return train(words, workspace, run)
    if name == "eval":
        return evaluate(words, workspace, run)
    if (workspace.path / f"{name.replace('.', '/')}.py").is_file() and name.startswith("mine."):
        with replaced_argv([name, *map(workspace.substitute, words)]):
            runpy.run_path(f"{name.replace('.', '/')}.py", run_name="__main__")
        return "run"
    if run and name in QUICK and not {"--all"} & set(words):
        status = call(name, [*map(workspace.substitute, words), *QUICK[name]])
        assert status in (0, None) or (name == "tools.compare" and status == 1), f"status {status}"
        return "run"
    parse(lambda: call(name, words), command.whole)
    return "parsed"


def call(name: str, words: list[str]) -> int | None:
    """Call a module's main."""
    module = importlib.import_module(name)
    with replaced_argv([name, *words]):
        return module.main()


@contextlib.contextmanager
def replaced_argv(argv):
    kept, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = kept


def parse(main, whole=True):
    """Call a program until it has parsed its arguments; a command mentioned in passing may lack required ones."""
    original, error = argparse.ArgumentParser.parse_known_args, argparse.ArgumentParser.error

    def parse_and_stop(self, *args, **kwargs):
        _, rest = original(self, *args, **kwargs)
        assert not rest, f"unknown arguments: {rest}"
        raise ParsedError

    def refuse(self, message):
        if not whole and "arguments are required" in message:
            raise ParsedError
        raise AssertionError(message)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ParsedError):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        patch.setattr(argparse.ArgumentParser, "error", refuse)
        main()
        raise AssertionError("it parses no arguments")
    assert argparse.ArgumentParser.error is error


def train(words: list[str], workspace: Workspace, run: bool, processes: int = 1) -> str:
    """Build the config of a train.py command, check its batch, and run a shortened version of it if `run`."""
    argv = [workspace.substitute(word) for word in words]
    args = command_line.train_parser().parse_args(argv)
    cfg = command_line.resolve(args, command_line.TRAIN_FLAGS)
    accumulation_steps(cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH, processes)
    if not run or tuple(words) in workspace.dry_runs:
        return "checked"
    if args.dry_run:
        workspace.dry_runs.add(tuple(words))
    if args.data_path:
        chosen = args.output or args.cfg.startswith("mine/")
        argv = shortened(argv, args.cfg, *([] if chosen else ["OUTPUT", workspace.new_output()]))
    assert train_script.main(argv) == 0
    return "run"


def evaluate(words: list[str], workspace: Workspace, run: bool, processes: int = 1) -> str:
    """Build the config of an eval.py command, and run a shortened version of it if `run`."""
    argv = [workspace.substitute(word) for word in words]
    args = command_line.eval_parser().parse_args(argv)
    command_line.resolve(args, command_line.EVAL_FLAGS)
    command_line.check_eval(args)
    if not run or args.fold:  # the model used here is timm's; tests/trainer/test_eval_protocols.py folds one of ours
        return "checked"
    assert eval_script.main(shortened(argv, args.cfg)) == 0
    return "run"


def torchrun(command: Command, workspace: Workspace) -> str:
    """Parse torchrun's options and the script's."""
    words = ["1" if word.startswith("$SLURM") else word for word in command.words[1:]]
    if not any(word.endswith(".py") for word in words):
        words.append("train.py")
        torchrun_parser().parse_args(words)
        return "checked"
    args = torchrun_parser().parse_args(words)
    script = {"train.py": train, "eval.py": evaluate}[args.training_script]
    processes = int(args.nproc_per_node) * int(args.nnodes.split(":")[0])
    return script(args.training_script_args, workspace, False, processes)


def srun(command: Command, workspace: Workspace) -> str:
    """Check the program that srun starts."""
    at = next((i for i, word in enumerate(command.words) if word in ("torchrun", "bash")), None)
    assert at is not None, "srun starts nothing that this test knows"
    if command.words[at] == "bash":
        return "another program"
    return torchrun(Command(command.line, command.words[at:]), workspace)


def launch(command: Command, workspace: Workspace) -> str:
    """Run a launch script up to the command that it would start, and check that command."""
    cluster = ("SLURM_", "MASTER_", "NNODES", "NODE_RANK")
    env = {key: value for key, value in os.environ.items() if not key.startswith(cluster)}
    done = subprocess.run(command.words, cwd=ROOT, env=env | {"PYTHON": "/bin/echo"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    started = done.stdout.splitlines()[-1].split()  # python's arguments, as echo printed them
    script = next(i for i, word in enumerate(started) if word.endswith(("train.py", "eval.py")))
    options = started[started.index("torch.distributed.run") + 1 : script]
    words = ("torchrun", *options, Path(started[script]).name, *started[script + 1 :])
    return torchrun(Command(command.line, words), workspace)


def measure(command: Command, workspace: Workspace) -> str:
    """Run gpu.sh with no part to measure."""
    words = [*command.words, "--parts", "none", "--out", str(workspace.path / "measured")]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHON": "/bin/echo"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return "checked"


def sbatch(command: Command, workspace: Workspace) -> str:
    """Check sbatch's options, the script's and train.py's."""
    parser = command_line.Parser("sbatch")
    for flag in SBATCH_FLAGS:
        parser.add_argument(flag)
    parser.add_argument("-N", "--nodes")
    parser.add_argument("script")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    args = parser.parse_args(command.words[1:])
    assert (ROOT / args.script).is_file()
    own = command_line.Parser(args.script)
    own.add_argument("-s")
    own.add_argument("-g")
    own.add_argument("cfg")
    own.add_argument("rest", nargs=argparse.REMAINDER)
    given = own.parse_args(args.rest)
    per_node = int(args.ntasks_per_node or args.gpus_per_node)
    assert per_node == int(args.gpus_per_node)
    return train(["--cfg", given.cfg, *given.rest], workspace, False, int(args.nodes) * per_node)


def make(command: Command, workspace: Workspace) -> str:
    """Run make with --dry-run."""
    done = subprocess.run([*command.words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return "checked"


def check_pytest(command: Command, workspace: Workspace) -> str:
    """Check markers and paths of a pytest command."""
    parser = command_line.Parser("pytest")
    for flag in ("-m", "-k", "-n"):
        parser.add_argument(flag, default="")
    parser.add_argument("-r", action="append", default=[])
    parser.add_argument("paths", nargs="*")
    args = parser.parse_args(command.words[1:])
    markers = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert all(word in (*markers, "not", "and", "or") for word in args.m.split()), args.m
    assert all((ROOT / path).exists() for path in args.paths)
    return "checked"


PROGRAMS = {
    "gpu.sh": measure,
    "make": make,
    "pytest": check_pytest,
    "python": python,
    "sbatch": sbatch,
    "srun": srun,
    "torchrun": torchrun,
    **dict.fromkeys(("torchrun.sh", "elastic.sh", "eval.sh"), launch),
}
