"""Runs of train.py that are killed repeatedly; started by test_faults.py as a separate process.

    python -m tests.helpers.fault_server CONFIG FOLDER FIRST_SEED SEEDS

One process imports torch and forks for each start, because importing takes longer than the run. It writes FOLDER/whole, the
uninterrupted run; FOLDER/<seed>, the same run, killed a few times and continued; FOLDER/kills.json, the phases of
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
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import torch

import engine.checkpoint.files
import train
import trainer.epochs
from engine.checkpoint.files import CheckpointFolder, load_state
from engine.loop import Loop

# Entered as often as the run has updates, evaluations and files of weights; then "report", while the summary of a start is built
# and logged; "end", from the last update to the end of the run; "done", while its marker is written.
PHASES = ("training", "evaluation", "checkpoint", "report", "end", "done")
LATE = ("report", "end", "done")  # entered once or twice by each start, also by those after a kill
KILLS = 5  # of each run, at most
DEADLINE_S = 120  # of each start


class PhaseRecord:
    """Shared memory of a child and its parent: number of entries into each phase, and the seconds spent in it."""

    ENTRY = struct.Struct("qd")

    def __init__(self):
        self.memory = mmap.mmap(-1, self.ENTRY.size * len(PHASES))
        self.moment = None  # phase, number of the entry and seconds after it, at which the next child is killed

    def clear(self, moment):
        self.memory[:] = bytes(len(self.memory))
        self.moment = moment

    def is_past(self, moment):
        return self[moment[0]][0] >= moment[1]

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
        if self.moment and self.moment[:2] == (phase, self[phase][0]):
            # The kernel ends the process when SIGALRM comes, as by SIGKILL, whatever its threads do at that time.
            signal.setitimer(signal.ITIMER_REAL, max(self.moment[2], 1e-6))
        try:
            yield
        finally:
            self.add(phase, 0, time.monotonic() - since)

    def wrap(self, phase, function, when=lambda *args: True):
        def wrapped(*args, **kwargs):
            with self.inside(phase) if when(*args) else nullcontext():
                return function(*args, **kwargs)

        return wrapped


def start(argv, folder, phases, moment=None):
    """Fork a child that trains, until `moment` if it is given; wait for its end and return its exit status.

    That is the status of train.main, 99 for a damaged checkpoint, or -SIGALRM.
    """
    phases.clear(moment)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
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
            record_phases(phases)
            try:
                status = train.main([*argv, "--output", str(folder)])
            except SystemExit as error:
                status = error.code
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


def record_phases(phases):
    """Wrap the functions of each phase, in a child."""
    files = engine.checkpoint.files
    files.write_atomically = phases.wrap("checkpoint", files.write_atomically)
    trainer.epochs.evaluate_raw_and_ema = phases.wrap("evaluation", trainer.epochs.evaluate_raw_and_ema)
    Loop._train_update = phases.wrap("training", Loop._train_update)
    train.log_summary = phases.wrap("report", train.log_summary)
    train.end_epoch = phases.wrap("end", train.end_epoch, lambda session: session.state.trained)
    train.finish_saving = phases.wrap("end", train.finish_saving)
    train.write_marker = phases.wrap("done", train.write_marker)


def choose_moment(rng, phase, usual, first):
    """Return the moment of a kill: phase, number of the entry into it, and the delay after it in seconds.

    The first kill of a run may come at any entry, and within the phase; a later one soon after the start, and also shortly
    after the phase.
    """
    entries, seconds = usual
    entry = 1 if phase in LATE else rng.randint(1, entries if first else max(1, entries // 3))
    return phase, entry, rng.uniform(0, (0.5 if first else 1.2) * seconds / entries)


def main(config, folder, seeds):
    torch.set_num_threads(1)
    phases, argv, kills = PhaseRecord(), ["--cfg", config], {}
    assert start(argv, folder / "whole", phases) == 0, (folder / "whole/output.txt").read_text()
    usual = {phase: phases[phase] for phase in PHASES}
    for seed in seeds:
        rng, kills[seed] = random.Random(seed), []
        for number in range(KILLS):
            # The first kills of six seeds in a row come in each phase; a run that is killed early can be killed late afterwards.
            phase = PHASES[seed % len(PHASES)] if number == 0 else rng.choice(PHASES)
            moment = choose_moment(rng, phase, usual[phase], number == 0)
            status = start(argv, folder / str(seed), phases, moment)
            if status != -signal.SIGALRM or not phases.is_past(moment):  # it ended before, or passed its deadline
                break
            kills[seed].append(phase)
        else:
            status = start(argv, folder / str(seed), phases)
        assert status == 0, f"seed {seed}, {kills[seed]}: {status}\n{(folder / str(seed) / 'output.txt').read_text()}"
    (folder / "kills.json").write_text(json.dumps(kills))


if __name__ == "__main__":
    first, count = map(int, sys.argv[3:])
    main(sys.argv[1], Path(sys.argv[2]), range(first, first + count))
