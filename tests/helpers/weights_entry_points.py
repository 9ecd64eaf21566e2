"""Every command that reads weights, called with one file after another in one process, under a limit of its memory.

    python -m tests.helpers.weights_entry_points COMMAND,COMMAND PICTURES FOLDER FILE [FILE ...]

FOLDER takes what the commands write. Prints a JSON line for each file and command: status, stderr, seconds and growth of the
memory in MiB. A process that ends otherwise has crashed. The first file should be a good one: it loads what a command needs.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import eval as eval_script
import tests.helpers.hostile_weights  # noqa: F401  registers hostile_net
import train as train_script
from tools import convert, export, predict, visualize

SPARE = 3 << 30  # bytes of address space beyond what the good file has needed
SECONDS = 60  # for one file
CFG = """
DEVICE: cpu
NAME: small
MODEL: {{NAME: hostile_net}}
DATA: {{PATH: {pictures}, IMG_SIZE: 32, EVAL_RESIZE: 36, WORKERS: 0}}
TRAIN: {{EPOCHS: 2, GLOBAL_BATCH: 12, MICRO_BATCH: 12, AMP: "off"}}
SCHEDULE: {{WARMUP_EPOCHS: 0}}
CHECKPOINT: {{EVERY_UPDATES: 2}}
EMA: {{DECAY: 0.9}}
EVAL: {{BATCH: 4}}
LOG: {{EVERY: 4, TENSORBOARD: false}}
"""


def train(folder, *more):
    """Call train.py."""
    argv = ["--cfg", folder / "small.yaml", "--output", folder / "output", *more]
    return train_script.main([str(word) for word in argv])


def train_in_run(folder, file):
    """Call train.py on a run directory that holds the file as its only checkpoint."""
    run = folder / "output/small/checkpoints"
    run.mkdir(parents=True)
    shutil.copy(file, run / "update-00000002.pt")
    return train(folder, "--dry-run")


def calls(folder, pictures):
    """Return each command as a function of the file."""
    picture, cfg = str(pictures / "val/red/001.jpg"), str(folder / "small.yaml")
    return {
        "predict": lambda file: predict.main([str(file), picture, "--device", "cpu"]),
        "convert": lambda file: convert.main([str(file), str(folder / "out.safetensors")]),
        "export": lambda file: export.main([str(file), "--format", "published", "--out", str(folder / "out.pth")]),
        "visualize": lambda file: visualize.main([picture, "--checkpoint", str(file), "--out", str(folder / "maps")]),
        "eval": lambda file: eval_script.main(
            ["--cfg", cfg, "--checkpoint", str(file), "--json", str(folder / "r.json")]
        ),
        "init": lambda file: train(folder, "--dry-run", "--init", file),
        "resume": lambda file: train(folder, "--dry-run", "--resume", file),
        "continue": lambda file: train(folder, "--resume", file),
        "run": lambda file: train_in_run(folder, file),
        "teacher": lambda file: train(
            folder,
            "--dry-run",
            "--opts",
            "DISTILL.TYPE",
            "soft",
            "DISTILL.TEACHER",
            "hostile_net",
            "DISTILL.TEACHER_WEIGHTS",
            file,
        ),
    }


def status_of(call, file):
    """Call a command; return its exit status, or the traceback of an error that it has not caught."""
    try:
        return call(file)
    except SystemExit as error:
        return error.code
    except BaseException:
        return traceback.format_exc()


def used_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def run(name, call, file, first):
    """Call a command on a file; return the row to print."""
    before, started, stderr = used_mib(), time.monotonic(), io.StringIO()
    signal.alarm(SECONDS * (1 + 2 * first))
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        status = status_of(call, file)
    signal.alarm(0)
    seconds, grown = round(time.monotonic() - started, 1), 0 if first else used_mib() - before
    return {
        "file": file,
        "command": name,
        "status": status,
        "stderr": stderr.getvalue(),
        "seconds": seconds,
        "mib": grown,
    }


def main(names, pictures, folder, *files):
    warnings.simplefilter("error", UserWarning)
    folder = Path(folder)
    (folder / "small.yaml").write_text(CFG.format(pictures=pictures))
    known = calls(folder, Path(pictures))
    for number, file in enumerate(files):
        for name in names.split(","):
            shutil.rmtree(folder / "output", ignore_errors=True)
            print(json.dumps(run(name, known[name], file, number == 0)), flush=True)
        if not number:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + SPARE
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(*sys.argv[1:])
