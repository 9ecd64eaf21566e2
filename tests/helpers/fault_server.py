"""Runs of train.py that are killed repeatedly; started by test_faults.py as a separate process.

    python -m tests.helpers.fault_server CONFIG FOLDER SEEDS

One process imports torch and forks for each start, because importing takes longer than the run. It writes FOLDER/whole, the
uninterrupted run; FOLDER/<seed>, the same run, killed with SIGKILL a few times and continued; FOLDER/kills.json, the phases of
the kills by seed.
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


class PhaseRecord:
    """Shared memory of a child and its parent: number of entries into each phase, and the seconds spent in it."""

    ENTRY = struct.Struct("qd")

    def __init__(self):
        self.memory = mmap.mmap(-1, self.ENTRY.size * len(PHASES))

    def clear(self):
        self.memory[:] = bytes(len(self.memory))

    def __getitem__(self, phase):
        return self.ENTRY.unpack_from(self.memory, self.ENTRY.size * PHASES.index(phase))

    def add(self, phase, entries, seconds):
        before = self[phase]
        self.ENTRY.pack_into(
            self.memory, self.ENTRY.size * PHASES.index(phase), before[0] + entries, before[1] + seconds
        )

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


def start(argv, folder, phases):
    """Fork a child that trains; return its pid. Its exit status is that of train.main, or 99 for a damaged checkpoint."""
    phases.clear()
    child = os.fork()
    if child:
        return child
    status = 98
    try:
        signal.alarm(DEADLINE_S)
        folder.mkdir(exist_ok=True)
        with (folder / "output.txt").open("a") as output, redirect_stdout(output), redirect_stderr(output):
            try:
                if latest := CheckpointFolder(folder / "small/checkpoints", 1).latest():
                    load_state(latest)  # must be intact whenever the kill came
            except ValueError:
                traceback.print_exc()
                os._exit(99)
            engine.checkpoint.files.write_atomically = phases.wrap(
                "checkpoint", engine.checkpoint.files.write_atomically
            )
            trainer.epochs.evaluate_raw_and_ema = phases.wrap("evaluation", trainer.epochs.evaluate_raw_and_ema)
            Loop._train_update = phases.wrap("training", Loop._train_update)
            try:
                status = train.main([*argv, "--output", str(folder)])
            except SystemExit as error:
                status = error.code
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


def finish(child):
    """Wait for a child to end; return its exit status."""
    _, code = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(code)


def kill_inside(child, phases, phase, entry, delay):
    """Kill a child `delay` seconds after its nth entry into a phase; return its exit status, -9 if it did not end before."""
    while phases[phase][0] < entry:
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return finish(child)


def main(config, folder, seeds):
    torch.set_num_threads(1)
    phases, argv, kills = PhaseRecord(), ["--cfg", config], {}
    assert finish(start(argv, folder / "whole", phases)) == 0, (folder / "whole/output.txt").read_text()
    usual = {phase: phases[phase] for phase in PHASES}
    for seed in range(seeds):
        rng, kills[seed] = random.Random(seed), []
        for _ in range(KILLS):
            phase = rng.choice(PHASES)
            entries, seconds = usual[phase]
            entry, delay = rng.randint(1, max(1, entries // 2)), rng.uniform(0, 1.5 * seconds / entries)
            child = start(argv, folder / str(seed), phases)
            status = kill_inside(child, phases, phase, entry, delay)
            if status != -signal.SIGKILL:
                break
            kills[seed].append(phase)
        else:
            status = finish(start(argv, folder / str(seed), phases))
        assert status == 0, f"seed {seed}, {kills[seed]}: {status}\n{(folder / str(seed) / 'output.txt').read_text()}"
    (folder / "kills.json").write_text(json.dumps(kills))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
