"""Measure the overhead of train.py over the bare step of its model: loader, mixup, clipping, EMA, schedule, log, consensus.

    python benchmarks/trainer.py --cfg configs/stvit/small_224.yaml --batch 32 --processes 1,2
    python benchmarks/trainer.py --cfg configs/stvit/small_224.yaml --batch 128 --data DIR

The whole step is train.py's own epoch, of a few updates, in a temporary run directory, without checkpoints and evaluation. The bare
step is forward, loss, backward (with the all-reduce of gradients) and the optimiser's step on one fixed batch in memory, same
precision, same optimiser. They take turns; the overhead is their ratio, round by round. Without --data images are synthetic.

Turns are affected by changes of the machine's load between them. "Within" is not: on the CPU the pieces of the bare step are timed
where they run inside the whole step, and the remaining time is divided by theirs.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import io
import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from rich.console import Console
from torch.nn import functional as F

from benchmarks import record
from benchmarks.record import Row
from benchmarks.timing import CLOCKS, Spread, timed
from config import command_line
from engine.build import prepare_model
from engine.checkpoint.async_saver import AsyncSaver
from engine.checkpoint.run_directory import RunDirectory
from engine.distributed.ddp import wrap_in_ddp
from engine.distributed.processes import Processes, init_processes, shut_down
from engine.logging.log import Log
from engine.optim.build import build_optimizer
from engine.precision import Precision
from models.build import build_model
from trainer import session
from trainer.epochs import train_epoch

COLUMNS: record.Columns = {
    "config": lambda row: row["config"],
    "processes": lambda row: str(row["processes"]),
    "micro-batch": lambda row: str(row["batch"]),
    "precision": lambda row: row["precision"],
    "bare step, ms": lambda row: f"{1e3 * row['bare'][0]:.1f}",
    "whole step, ms": lambda row: f"{1e3 * row['whole'][0]:.1f}",
    "overhead": lambda row: f"{row['overhead'][0]:.1%}",
    "lowest .. highest": lambda row: f"{row['overhead'][1]:.1%} .. {row['overhead'][2]:.1%}",
    "within": lambda row: "{:.1%} ({:.1%} .. {:.1%})".format(*row["within"]) if row["within"] else "on a CPU only",
}


def load(args: Namespace, world: int, folder: str) -> tuple[Any, Namespace]:
    """Return the config of a run of short epochs, and train.py's arguments."""
    global_batch = args.accumulation * args.batch * world
    options = [
        *("OUTPUT", folder, "TRAIN.GLOBAL_BATCH", global_batch, "TRAIN.MICRO_BATCH", args.batch),
        *("TRAIN.EPOCHS", args.rounds + 1, "LOG.EVERY", 50, "LOG.TENSORBOARD", False),
        *("SCHEDULE.WARMUP_EPOCHS", 0, "SCHEDULE.COOLDOWN_EPOCHS", 0, "OPTIM.SCALE_BATCH", 0),
        *("DEVICE", args.device, "TRAIN.AMP", args.amp),
    ]
    if args.data:
        options += ["DATA.PATH", args.data]
    else:
        options += ["DATA.LOADER", "synthetic", "DATA.SYNTHETIC_TRAIN", args.updates * global_batch, "AUG.REPEATS", 1]
    typed = command_line.train_parser().parse_args(["--cfg", args.cfg, "--opts", *map(str, options), *args.opts])
    return command_line.resolve(typed, command_line.TRAIN_FLAGS), typed


def bare_step(s: session.Session) -> Callable[[], None]:
    """Return the bare step on one batch: forward, loss, backward and the optimiser's step of the run's model."""
    cfg, processes = s.cfg, s.processes
    model = prepare_model(build_model(cfg, len(s.data.classes)), processes, cfg.MODEL.SYNC_BN)
    optimizer, net = build_optimizer(cfg, model), wrap_in_ddp(model, processes)
    precision = Precision(cfg.TRAIN.AMP, processes.device)
    net.train()
    images = torch.randn(cfg.TRAIN.MICRO_BATCH, 3, cfg.DATA.IMG_SIZE, cfg.DATA.IMG_SIZE)
    images = images.to(processes.device, memory_format=torch.channels_last)
    targets = torch.zeros(len(images), len(s.data.classes), device=processes.device)
    targets[:, 0] = 1
    accumulation = s.state.plan.accumulation

    def step() -> None:
        for micro in range(accumulation):
            with nullcontext() if processes.world == 1 or micro == accumulation - 1 else net.no_sync():  # type: ignore[operator]
                with precision.autocast():
                    loss = F.cross_entropy(net(images), targets) / accumulation
                precision.scaler.scale(loss).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


class Pieces:
    """Timer of the bare step's pieces within train.py's: forward, loss, backward, optimiser, release of the gradients."""

    def __init__(self, s: session.Session, clock: str):
        self.seconds, self._now = 0.0, CLOCKS[clock]
        loop, optimizer = s.loop, s.state.optimizer
        owners: Sequence[tuple[Any, str]] = (
            *((loop.model, "forward"), (loop, "criterion"), (torch.Tensor, "backward")),
            *((optimizer, "step"), (optimizer, "zero_grad")),
        )
        self._patches = [mock.patch.object(owner, name, self._clocked(getattr(owner, name))) for owner, name in owners]

    def _clocked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **options: Any) -> Any:
            start = self._now()
            result = call(*args, **options)
            self.seconds += self._now() - start
            return result

        return clocked

    def time_within(self, run: Callable[[], None]) -> float:
        """Return the seconds that the pieces take in a call of `run`."""
        self.seconds = 0.0
        with ExitStack() as stack:
            for patch in self._patches:
                stack.enter_context(patch)
            run()
        return self.seconds


def one_epoch(s: session.Session) -> Callable[[], None]:
    """Return a function that runs train.py's next epoch."""

    def epoch() -> None:
        train_epoch(s)
        s.state.closed = s.state.update

    return epoch


def run(args: Namespace) -> Row | None:
    """Measure in this process, one of those started together; return the row in the main process."""
    with tempfile.TemporaryDirectory() as folder:
        cfg, typed = load(args, int(os.environ.get("WORLD_SIZE", "1")), folder)
        processes = init_processes(cfg.DEVICE)
        log = Log(processes.main)
        log.console = Console(file=io.StringIO())
        directory = RunDirectory(Path(folder) / "run", 1)
        saver = AsyncSaver(directory, log, 1)
        s = session.build_session(cfg, typed, processes, run=directory, log=log, saver=saver, interrupted=lambda: False)
        updates = s.state.plan.updates_per_epoch
        bare, whole, pieces = bare_step(s), one_epoch(s), Pieces(s, args.clock)
        bare()
        whole()
        found: dict[str, list[float]] = {"bare": [], "whole": [], "pieces": []}
        for number in range(args.rounds):
            for name in ("bare", "whole") if number % 2 else ("whole", "bare"):
                meet(processes)
                if name == "whole":
                    found[name].append(
                        timed(lambda: pieces.time_within(whole), 1, processes.device, args.clock) / updates
                    )
                    found["pieces"].append(pieces.seconds / updates)
                else:
                    found[name].append(timed(bare, updates, processes.device, args.clock))
        log.close()
    overhead, within = (
        Spread.from_values([whole / base - 1 for whole, base in zip(found["whole"], found[name], strict=True)])
        for name in ("bare", "pieces")
    )
    row: Row = {
        "config": Path(args.cfg).parent.name + "/" + Path(args.cfg).stem,
        "processes": processes.world,
        "batch": args.batch,
        "precision": cfg.TRAIN.AMP,
        "data": "a folder" if args.data else "synthetic",
        "overhead": astuple(overhead),
        "within": astuple(within) if processes.device.type == "cpu" else None,
    }
    for name, values in found.items():
        row[name] = astuple(Spread.from_values(values))
    main = processes.main
    shut_down()
    return row if main else None


def meet(processes: Processes) -> None:
    """Wait for the other processes."""
    if processes.world > 1:
        dist.barrier(group=processes.host_group)


def launch(argv: Sequence[str], processes: int) -> Row:
    """Run this program in new processes, with torchrun if there are several; return the row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        program = [str(Path(__file__).resolve()), *argv, "--row", str(out)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run([sys.executable, *(torchrun if processes > 1 else []), *program], cwd=record.ROOT)
        if done.returncode or not out.exists():
            raise ValueError(
                f"the measurement with {processes} processes ended with status {done.returncode}, see above"
            )
        row: Row = json.loads(out.read_text(encoding="utf-8"))
        return row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = command_line.Parser("Measure the overhead of train.py over the bare step of its model.")
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML config, e.g. configs/stvit/small_224.yaml")
    parser.add_argument("--batch", type=int, default=32, help="micro-batch (default 32)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of an update (default 1)")
    parser.add_argument("--processes", default="1", metavar="1,2", help="world sizes, separated by commas (default 1)")
    parser.add_argument("--updates", type=int, default=8, help="updates of a turn, with synthetic images (default 8)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each step (default 5)")
    parser.add_argument("--data", metavar="DIR", help="train on these images; a turn is an epoch")
    parser.add_argument("--amp", default="bf16", help="bf16, fp16 or off (default bf16)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device (auto)")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="wall, or cpu: time of all threads")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="config keys to change")
    parser.add_argument("--out", type=Path, help="result file without suffix (default benchmarks/results/...)")
    parser.add_argument("--append", action="store_true", help="add to the result file instead of replacing it")
    parser.add_argument("--row", type=Path, help="internal: result of a process that this program starts")
    args = parser.parse_args(argv)
    try:
        if min(args.batch, args.accumulation, args.updates, args.rounds) < 1:
            raise ValueError("--batch, --accumulation, --updates and --rounds must be at least 1")
        if args.row:
            row = run(args)
            if row:
                args.row.write_text(json.dumps(row), encoding="utf-8")
            return 0
        try:
            counts = [int(word) for word in args.processes.split(",")]
        except ValueError:
            raise ValueError(f"--processes {args.processes}: give numbers with commas between, e.g. 1,2") from None
        load(args, 1, "output")  # raises here, before any process starts
        rows = [launch(sys.argv[1:] if argv is None else argv, count) for count in counts]
    except ValueError as error:
        parser.fail(error)
    console = record.console()
    console.print(record.table(COLUMNS, rows))
    metadata = record.metadata("benchmarks/trainer.py", argv)
    metadata["n"] = (
        f"{args.rounds} rounds, taking turns; {args.updates} updates a turn"
        if not args.data
        else f"{args.rounds} epochs"
    )
    metadata["images"] = "a folder's" if args.data else "synthetic"
    metadata["clock"] = args.clock
    out = args.out or record.default_out("trainer")
    page = record.write(out, "Trainer", columns=COLUMNS, found=metadata, rows=rows, append=args.append)
    console.print(f"written to {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
