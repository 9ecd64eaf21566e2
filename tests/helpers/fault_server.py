"""Runs of train.py that are killed again and again; started by test_faults.py as a process of its own.

    python -m tests.helpers.fault_server CONFIG FOLDER SEEDS

One process imports torch and forks for each start, because importing takes longer than the run. It writes FOLDER/whole, the
uninterrupted run; FOLDER/<seed>, the same run, killed with SIGKILL a few times and continued; FOLDER/kills.json, where.
"""

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch

import engine.checkpoint.files
import train
import trainer.epochs
from engine.checkpoint.files import CheckpointFolder, load_state
from engine.loop import Loop

PHASES = ("training", "evaluation", "checkpoint")
KILLS = 3  # of each run, at most
DEADLINE_S = 120  # of each start


class Whereabouts:
    """What a child tells its parent: how often it entered each phase, and the seconds it spent there."""

    ENTRY = struct.Struct("qd")

    def __init__(self):
        self.memory = mmap.mmap(-1, self.ENTRY.size * len(PHASES))

    def clear(self):
        self.memory[:] = bytes(len(self.memory))

    def __getitem__(self, phase):
        return self.ENTRY.unpack_from(self.memory, self.ENTRY.size * PHASES.index(phase))

    def add(self, phase, entries, seconds):
        known = self[phase]
        self.ENTRY.pack_into(self.memory, self.ENTRY.size * PHASES.index(phase), known[0] + entries, known[1] + seconds)

    @contextmanager
    def inside(self, phase):
        since = time.monotonic()
        self.add(phase, 1, 0.0)
        try:
            yield
        finally:
            self.add(phase, 0, time.monotonic() - since)

    def wrap(self, phase, function):
        def wrapped(*args, **kwargs):
            with self.inside(phase):
                return function(*args, **kwargs)

        return wrapped


def start(argv, folder, where):
    """Fork a child that trains; return its number. Its exit status is train.main's, 99 for damage a kill left behind."""
    where.clear()
    child = os.fork()
    if child:
        return child
    status = 98
    try:
        signal.alarm(DEADLINE_S)
        folder.mkdir(exist_ok=True)
        with (folder / "said.txt").open("a") as said, redirect_stdout(said), redirect_stderr(said):
            try:
                if latest := CheckpointFolder(folder / "small/checkpoints", 1).latest():
                    load_state(latest)  # whole, whenever the kill came
            except ValueError:
                traceback.print_exc()
                os._exit(99)
            engine.checkpoint.files.write_atomically = where.wrap(
                "checkpoint", engine.checkpoint.files.write_atomically
            )
            trainer.epochs.evaluate_raw_and_ema = where.wrap("evaluation", trainer.epochs.evaluate_raw_and_ema)
            Loop._train_update = where.wrap("training", Loop._train_update)
            try:
                status = train.main([*argv, "--output", str(folder)])
            except SystemExit as error:
                status = error.code
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


def finish(child):
    """Wait for a child that nobody kills."""
    _, code = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(code)


def kill_inside(child, where, phase, entry, delay):
    """Kill a child `delay` seconds after it enters a phase for the nth time; return its exit status, -9 if that came to be."""
    while where[phase][0] < entry:
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return finish(child)


def main(config, folder, seeds):
    torch.set_num_threads(1)
    where, argv, kills = Whereabouts(), ["--cfg", config], {}
    assert finish(start(argv, folder / "whole", where)) == 0, (folder / "whole/said.txt").read_text()
    usual = {phase: where[phase] for phase in PHASES}
    for seed in range(seeds):
        rng, kills[seed] = random.Random(seed), []
        for _ in range(KILLS):
            phase = rng.choice(PHASES)
            entries, seconds = usual[phase]
            entry, delay = rng.randint(1, max(1, entries // 2)), rng.uniform(0, 1.5 * seconds / entries)
            child = start(argv, folder / str(seed), where)
            status = kill_inside(child, where, phase, entry, delay)
            if status != -signal.SIGKILL:
                break
            kills[seed].append(phase)
        else:
            status = finish(start(argv, folder / str(seed), where))
        assert status == 0, f"seed {seed}, {kills[seed]}: {status}\n{(folder / str(seed) / 'said.txt').read_text()}"
    (folder / "kills.json").write_text(json.dumps(kills))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
