"""The documentation is true: commands run or at least parse, keys exist, blocks of code work, links lead somewhere.

Every command of every page is found (documented.py) and goes to one of PROGRAMS; one that none of them knows fails the test. What
is quick runs here, on a desk that looks like the checkout, with small pictures, a small model and a finished run in place of DIR,
FILE and the like; what is slow, or marked with what it needs, is parsed by the program's own parser, its config built and
validated. `pytest tests/test_docs.py -rP` lists which was which.
"""

import argparse
import ast
import contextlib
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

import config
import eval as eval_script
import train as train_script
from config import command_line
from config.merge import keys
from engine.batch_plan import accumulation
from tests.conftest import draw_folder
from tests.helpers.documented import PAGES, ROOT, Command, anchors, commands, fragments, links, read

SMALL = ("MODEL.NAME=test_efficientnet", "DATA.IMG_SIZE=32", "DATA.EVAL_RESIZE=36")
SHORT = (
    *("TRAIN.EPOCHS=1", "TRAIN.GLOBAL_BATCH=4", "TRAIN.MICRO_BATCH=2", "TRAIN.AMP=off", "DEVICE=cpu", "DATA.WORKERS=0"),
    *("SCHEDULE.WARMUP_EPOCHS=0", "SCHEDULE.MIN_LR=0", "EVAL.BATCH=4", "LOG.TENSORBOARD=false"),
)
WORDNET_IDS = ("n01440764", "n01443537", "n01484850")  # ImageNet's first classes
# Programs that are not ours, or that change the machine: known, not run.
OTHERS = {
    ".venv/bin/pre-commit",
    "cd",
    "docker",
    "git",
    "lfs",
    "nvidia-smi",
    "pip",
    "source",
    "ss",
    "sysctl",
    "tensorboard",
}
# Modules that are quick enough to run, with what is added to make them so.
QUICK: dict[str, list[str]] = {
    "benchmarks.cluster_cost": [],
    "benchmarks.run_cost": [],
    "tools.demo": ["--train", "20", "--val", "10"],
    "tools.compare": [],
    "tools.index": ["--workers", "1"],
    "tools.inspect": ["--no-latency"],
    "tools.run_dir": [],
}
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@dataclass
class Desk:
    """A folder to work in: the checkout's files, the pages' files, data, and a finished run."""

    path: Path
    places: dict[str, str]  # what stands in the documentation, and here
    run: Path
    seen: set[tuple[str, ...]] = field(default_factory=set)  # dry runs that need not be repeated

    def here(self, word: str) -> str:
        """Return what stands here for a word of a documented command."""
        if word in self.places:
            return self.places[word]
        if re.search(r"best_(raw|ema)\.safetensors$", word) and not Path(word).exists():
            return str(self.run / Path(word).name)
        return str(max(self.run.glob("checkpoints/*"))) if "/update-" in word else word


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """See Desk."""
    path = tmp_path_factory.mktemp("desk")
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("output", "mine"):
            (path / entry.name).symlink_to(entry)
    for page in PAGES:
        for block in read(page)[0]:
            if block.title:
                (path / block.title).parent.mkdir(exist_ok=True)
                (path / block.title).write_text(block.text)
    data = rename_as_imagenet(draw_folder(path / "photographs", 4, 2))
    (path / "real.json").write_text(json.dumps([[i // 2] for i in range(6)]))
    rows = [f"{file},{file.parent.name},{file.parent.parent.name}" for file in sorted(data.rglob("*.JPEG"))]
    (path / "TABLE.csv").write_text("\n".join(["file,label,split", *rows]))
    small = ["--cfg", "configs/demo.yaml", "--data-path", str(data), "--opts", *opts(SMALL + SHORT), "NAME"]
    with contextlib.chdir(path):
        for name in ("finished", "second"):
            assert train_script.main([*small, name]) == 0
    runs = {name: f"output/{run}" for name, run in (("RUN_A", "finished"), ("RUN_B", "second"))}
    runs |= {"output/A": "output/finished", "output/B": "output/second", "output/C": "output/second"}
    sets = {f"imagenet{name}": str(data / "val") for name in ("-a", "-r", "-sketch", "v2-matched-frequency-format-val")}
    places = dict.fromkeys(("DIR", "IMAGENET", "PATH", "imagenet"), str(data)) | sets | runs
    weights = path / "output/finished/best_raw.safetensors"
    return Desk(path, places | {"CONFIG": "configs/demo.yaml", "FILE": str(weights)}, path / "output/finished")


def rename_as_imagenet(data):
    """Give classes and validation images names like ImageNet's."""
    for number, folder in enumerate(sorted((data / "train").iterdir())):
        for split in ("train", "val"):
            (data / split / folder.name).rename(data / split / WORDNET_IDS[number])
    for number, file in enumerate(sorted((data / "val").rglob("*.jpg")), 1):
        file.rename(file.parent / f"ILSVRC2012_val_{number:08d}.JPEG")
    for file in (data / "train").rglob("*.jpg"):
        file.rename(file.with_suffix(".JPEG"))
    return data


class ParsedError(Exception):
    """A program has parsed its arguments; nothing more is wanted of it."""


@page
def test_commands_work(page, desk, monkeypatch):
    monkeypatch.chdir(desk.path)
    faults = []
    for command in commands(page):
        script = command.words[0].startswith(("launch_scripts/", "benchmarks/"))
        name = Path(command.words[0]).name if script else command.words[0]
        try:
            if name in OTHERS:
                done = "another program"
            else:
                assert name in PROGRAMS, "no program that this test knows; blocks that are no commands need a language"
                done = PROGRAMS[name](command, desk)
        except (Exception, SystemExit) as error:
            faults.append(f"{command}\n    {type(error).__name__}: {error}")
        else:
            print(f"{done:<16} {command}")
    assert not faults, "\n".join(faults)


def python(command: Command, desk: Desk) -> str:
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
        return train(words, desk, run)
    if name == "eval":
        return evaluate(words, desk, run)
    if (desk.path / f"{name.replace('.', '/')}.py").is_file() and name.startswith("mine."):
        with replaced_argv([name, *map(desk.here, words)]):
            runpy.run_path(f"{name.replace('.', '/')}.py", run_name="__main__")
        return "run"
    if run and name in QUICK and not {"--all"} & set(words):
        status = call(name, [*map(desk.here, words), *QUICK[name]])
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
    """Call a program until it has parsed its arguments; what is named in passing may lack required ones."""
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


def train(words: list[str], desk: Desk, run: bool, processes: int = 1) -> str:
    args = command_line.train_parser().parse_args([desk.here(word) for word in words])
    cfg = command_line.resolve(args, command_line.TRAIN_FLAGS)
    accumulation(cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH, processes)
    if not run or tuple(words) in desk.seen:
        return "checked"
    argv = [desk.here(word) for word in words]
    if args.dry_run:
        desk.seen.add(tuple(words))
    if args.data_path:
        argv = with_opts(
            argv, args.cfg, *([] if args.output or args.cfg.startswith("mine/") else ["OUTPUT", unique(desk)])
        )
    assert train_script.main(argv) == 0
    return "run"


def evaluate(words: list[str], desk: Desk, run: bool, processes: int = 1) -> str:
    argv = [desk.here(word) for word in words]
    args = command_line.eval_parser().parse_args(argv)
    command_line.resolve(args, command_line.EVAL_FLAGS)
    command_line.check_eval(args)
    if (
        not run or args.fold
    ):  # the model that stands in here is timm's; tests/trainer/test_eval_protocols.py folds one of ours
        return "checked"
    assert eval_script.main(with_opts(argv, args.cfg)) == 0
    return "run"


def with_opts(argv: list[str], cfg: str, *more: str) -> list[str]:
    """Add the keys that make a run small before the documented ones, and those that make it short after them."""
    at = argv.index("--opts") if "--opts" in argv else len(argv)
    small = () if cfg.startswith("mine/") else SMALL
    return [*argv[:at], "--opts", *opts(small), *argv[at + 1 :], *opts(SHORT), *more]


def opts(pairs: tuple[str, ...]) -> list[str]:
    return [word for pair in pairs for word in pair.split("=")]


def unique(desk: Desk) -> str:
    return str(desk.path / f"runs/{sum(1 for _ in desk.path.glob('runs/*'))}")


def torchrun(command: Command, desk: Desk) -> str:
    """Parse torchrun's options and the script's."""
    words = ["1" if word.startswith("$SLURM") else word for word in command.words[1:]]
    if not any(word.endswith(".py") for word in words):
        words.append("train.py")
        torchrun_parser().parse_args(words)
        return "checked"
    args = torchrun_parser().parse_args(words)
    script = {"train.py": train, "eval.py": evaluate}[args.training_script]
    return script(args.training_script_args, desk, False, int(args.nproc_per_node) * int(args.nnodes.split(":")[0]))


def srun(command: Command, desk: Desk) -> str:
    """Look at what srun starts."""
    at = next((i for i, word in enumerate(command.words) if word in ("torchrun", "bash")), None)
    assert at is not None, "srun starts nothing that this test knows"
    return (
        "another program" if command.words[at] == "bash" else torchrun(Command(command.line, command.words[at:]), desk)
    )


def launch(command: Command, desk: Desk) -> str:
    """Run a launch script up to the command that it would start, and check that."""
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM_", "MASTER_", "NNODES", "NODE_RANK"))
    }
    done = subprocess.run(command.words, cwd=ROOT, env=env | {"PYTHON": "/bin/echo"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    started = done.stdout.splitlines()[-1].split()  # what echo has printed: python's arguments
    script = next(i for i, word in enumerate(started) if word.endswith(("train.py", "eval.py")))
    words = [
        *started[started.index("torch.distributed.run") + 1 : script],
        Path(started[script]).name,
        *started[script + 1 :],
    ]
    return torchrun(Command(command.line, ("torchrun", *words)), desk)


def measure(command: Command, desk: Desk) -> str:
    """Run gpu.sh with no part to measure."""
    words = [*command.words, "--parts", "none", "--out", str(desk.path / "measured")]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHON": "/bin/echo"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return "checked"


def sbatch(command: Command, desk: Desk) -> str:
    """Check sbatch's options, the script's and train.py's."""
    parser = command_line.Parser("sbatch")
    for flag in (
        "--account",
        "--cpus-per-task",
        "--dependency",
        "--gpus-per-node",
        "--ntasks-per-node",
        "--partition",
        "--time",
    ):
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
    return train(["--cfg", given.cfg, *given.rest], desk, False, int(args.nodes) * per_node)


def make(command: Command, desk: Desk) -> str:
    """Ask make what it would do."""
    done = subprocess.run([*command.words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return "checked"


def pytest_(command: Command, desk: Desk) -> str:
    """Check markers and paths."""
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
    "pytest": pytest_,
    "python": python,
    "sbatch": sbatch,
    "srun": srun,
    "torchrun": torchrun,
    **dict.fromkeys(("torchrun.sh", "elastic.sh", "eval.sh"), launch),
}


@page
def test_keys_exist(page):
    known = set(keys(config.defaults()))
    faults: list[str] = []
    for words in fragments(page):
        if len(words) == 1:
            faults += [word for word in words if word not in known]
        else:
            config.load(str(ROOT / "configs/stvit/small_224.yaml"), words)
    sections = {key.split(".")[0] for key in known if "." in key}
    for number, line in read(page)[1]:
        text = (
            line.split("|", 2)[-1] if page.name == "migrating.md" and line.startswith("|") else line
        )  # the others' keys
        for name in re.findall(r"`([A-Z]+\.[A-Z_0-9]+)", text):
            if name.split(".")[0] in sections and name not in known:
                faults.append(f"line {number}: {name}")
    assert not faults, faults


def test_flags_named_here_beside_those_of_others_exist():
    parsers = (command_line.train_parser(), command_line.eval_parser())
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    rows = [line.split("|") for _, line in read(ROOT / "docs/migrating.md")[1] if line.startswith("| `")]
    named = {flag for row in rows for flag in re.findall(r"`(--[\w-]+)", row[2])}
    assert len(rows) > 100
    assert named - known == set()


@page
def test_blocks_of_code_work(page, desk, monkeypatch):
    monkeypatch.chdir(desk.path)
    for block in read(page)[0]:
        place = f"{page}:{block.first}"
        if block.language == "python":
            code = compile(block.text, place, "exec")
            if not (block.needs or block.title):
                exec(code, {"__name__": "documented"})
        elif block.language == "yaml":
            file = Path(block.title or "page.yaml")
            file.write_text(block.text)
            config.load(str(file))
        else:
            assert block.language in ("bash", "text", "mermaid", "json"), (
                f"{place}: a block of {block.language or 'no language'}"
            )


@page
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading; there are {sorted(anchors(file))}"


@page
def test_files_that_are_named_exist(page):
    text = re.sub(r"```text.*?```", "", page.read_text(), flags=re.DOTALL)  # others' files stand there
    folders = "benchmarks|configs|data|engine|launch_scripts|models|pictures|tests|tools"
    named = re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]+\.(?:py|sh|sbatch|yaml|md))\b", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_site_is_complete_and_needs_no_network(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material not installed: pip install mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)  # and 404.html, and the files that pages link to
    for file in pages:
        assert not re.search(r'<(script|img|link)[^>]+(src|href)="https?:', file.read_text()), file


def test_quoted_messages_are_those_of_the_program():
    program = said_by_the_program()
    missing = []
    for block in read(ROOT / "docs/troubleshooting.md")[0]:
        if block.language == "text":
            pieces = [piece.strip() for line in block.lines for piece in line.split("…")]
            missing += [piece for piece in pieces if len(piece) > 3 and piece not in program]
    assert missing == []


def said_by_the_program() -> str:
    """Return all strings of the program, what is filled in left out."""
    said = []
    for path in [*ROOT.glob("*.py"), *(p for name in ("data", "engine", "models") for p in (ROOT / name).glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    return "\0".join(said)
