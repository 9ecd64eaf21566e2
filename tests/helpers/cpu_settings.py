"""Numerical tests under the settings that let one x86 CPU compute as others do: python -m tests.helpers.cpu_settings

    ATEN_CPU_CAPABILITY    vector instructions of PyTorch's own kernels
    ONEDNN_MAX_CPU_ISA     instructions of oneDNN: without AMX, without bfloat16, without AVX-512
    MKL_CBWR               branch of MKL: AVX2; COMPATIBLE, which MKL also takes on other makers' CPUs

each with one and with two threads. `--short` runs the two combinations that are farthest from a current Intel CPU on few
files. Prints a table, then the names of the failed tests; the exit status is 1 if there are any.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
SETTINGS = (
    {},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ATEN_CPU_CAPABILITY": "avx512"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    {"MKL_CBWR": "COMPATIBLE"},
    {"MKL_CBWR": "AVX2"},
)
OLDEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
WITHOUT_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_CBWR": "COMPATIBLE"}
RUNS = tuple((setting, threads) for setting in SETTINGS for threads in (1, 2))
SHORT_RUNS = ((OLDEST, 2), (WITHOUT_AMX, 1))
FILES = (
    "tests/data/augment",
    "tests/engine/optim",
    "tests/engine/test_batch_norm.py",
    "tests/engine/test_distillation_runs.py",
    "tests/engine/test_loop.py",
    "tests/engine/test_loss.py",
    "tests/engine/test_predictions.py",
    "tests/models",
    "tests/trainer/test_resume.py",
)
SHORT_FILES = (
    "tests/data/augment/test_transforms.py",
    "tests/engine/optim/test_clip_and_step.py",
    "tests/models/inference/test_prepare.py",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--short", action="store_true", help="two combinations and few files, for continuous integration"
    )
    parser.add_argument("files", nargs="*", help="tests to run instead of the numerical ones")
    args = parser.parse_args(argv)
    files = args.files or (SHORT_FILES if args.short else FILES)
    print(f"{'setting':86} {'threads':>7} {'passed':>6} {'failed':>6} {'seconds':>7}", flush=True)
    failures = []
    for setting, threads in SHORT_RUNS if args.short else RUNS:
        name = " ".join(f"{key}={value}" for key, value in setting.items()) or "none"
        if not is_supported(setting.get("ATEN_CPU_CAPABILITY", "default")):
            print(f"{name:86} {threads:7}   not supported by this CPU", flush=True)
            continue
        begin = time.monotonic()
        passed, failed, names = run_tests(setting, threads, files)
        print(f"{name:86} {threads:7} {passed:6} {failed:6} {time.monotonic() - begin:7.0f}", flush=True)
        failures += [f"{name}, threads {threads}: {test}" for test in names]
    print(*failures, sep="\n")
    return bool(failures)


def is_supported(capability: str) -> bool:
    """Return True if this CPU has the instructions that PyTorch's kernels would use; they are not checked again."""
    order = ("DEFAULT", "AVX2", "AVX512")
    own = torch.backends.cpu.get_cpu_capability()
    return capability == "default" or (own in order and order.index(capability.upper()) <= order.index(own))


def run_tests(setting: dict[str, str], threads: int, files: list[str] | tuple[str, ...]) -> tuple[int, int, list[str]]:
    """Run pytest on `files`; return the numbers of passed and of failed tests, and what failed."""
    env = os.environ | setting | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "200"}
    argv = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--durations=0",
        "--durations-min=60",
        "-p",
        "no:cacheprovider",
        *files,
    )
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    names = [line.partition(" ")[2] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    last = done.stdout.rstrip().rpartition("\n")[2]
    passed, failed, errors = (
        int(found[1]) if (found := re.search(rf"(\d+) {outcome}", last)) else 0
        for outcome in ("passed", "failed", "error")
    )
    if done.returncode and not names:  # a crash, or no tests
        names = [f"pytest ended with status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"]
    return passed, failed + errors, names


if __name__ == "__main__":
    sys.exit(main())
