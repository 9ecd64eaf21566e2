"""Mutating fuzz loop over the readers of files that somebody else may have written.

    python -m tests.helpers.fuzz weights --seconds 300 --seed 1

A reader takes the path of a file and may raise the errors of its kind, nothing else; it must end in time and take little memory.
The input of a finding is printed and kept. A crash of the process leaves its input as FOLDER/input. To fuzz another format, add
its seeds and its reader to `targets`.
"""

import argparse
import faulthandler
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LONGEST = 3000  # characters of an error
MIB, SECONDS = 400, 20.0  # growth of memory and time that one file may take
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
OPCODES = [bytes([code]) for code in b"()tRbQus]}.\x81\x85\x86"]
TOKENS = (
    *(
        *OPCODES,
        b"j\x05\x00\x00\x00",
        b"[",
        b"{",
        b'"',
        b",",
        b":",
        b"null",
        b"-1",
        b"1e999",
        b"99999999999999999999",
        b"[]",
        b"{}",
    ),
    *(
        b"\\ud800",
        b"PK",
        b"&a ",
        b"*a",
        b"!!python/name:os.system ",
        b"\n  ",
        b"\xff\xda",
        b"\xff\xc0",
        b"\x00\x00",
        b"../",
    ),
)


@dataclass(frozen=True)
class Seed:
    """Bytes to mutate, and a function from them to the content of a file."""

    data: bytes
    wrap: Callable[[bytes], bytes] = bytes


@dataclass(frozen=True)
class Target:
    """Seeds of a format, made when they are needed, and the reader of a file."""

    seeds: Callable[[], list[Seed]]
    read: Callable[[Path], object]
    names_file: bool = True  # its errors name the file
    errors: tuple[type[Exception], ...] = (ValueError,)


def mutate(rng: random.Random, seeds: list[Seed]) -> bytes:
    """Return the content of a file: a seed with one to eight changes."""
    seed = rng.choice(seeds)
    data = bytearray(seed.data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        number = rng.choice(NUMBERS).to_bytes(8, rng.choice(("little", "big")))
        other = rng.choice(seeds).data
        start = rng.randrange(max(len(other), 1))
        piece = rng.choice((number[:length], rng.choice(TOKENS), other[start : start + length], rng.randbytes(length)))
        kind = rng.randrange(6)
        if kind == 0:
            del data[at : at + length]
        elif kind == 1:
            data[at:at] = piece * rng.choice((1, 1, 2, 1000))
        elif kind == 2 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 3 and rng.random() < 0.1:
            del data[at:]
        else:
            data[at : at + len(piece)] = piece
    return seed.wrap(bytes(data))


def check(target: Target, path: Path) -> str:
    """Read a file; return a description of what went wrong, "" if nothing did."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        target.read(path)
    except target.errors as error:
        if target.names_file and path.name not in str(error):
            return f"an error that does not name the file: {error}"
        if len(str(error)) > LONGEST:
            return f"an error of {len(str(error))} characters: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    if grown > MIB:
        return f"{grown} MiB"
    return f"{time.monotonic() - started:.0f} s" if time.monotonic() - started > SECONDS else ""


def fuzz(target: Target, seconds: float, seed: int, folder: Path) -> tuple[int, list[str]]:
    """Read mutated files until the time is over; return their number and the findings."""
    rng, seeds, count, findings = random.Random(seed), target.seeds(), 0, []
    path = folder / "input"
    unchanged = [one.wrap(one.data) for one in seeds]
    end = time.monotonic() + seconds
    while (unchanged or time.monotonic() < end) and len(findings) < 20:
        content = unchanged.pop() if unchanged else mutate(rng, seeds)
        path.write_bytes(content)
        count += 1
        if wrong := check(target, path):
            kept = folder / f"finding-{len(findings)}"
            kept.write_bytes(content)
            findings.append(f"{kept}: {wrong[:400]}")
    return count, findings


def _weights() -> list[Seed]:
    from tests.helpers import hostile_weights as files
    from tests.helpers.pickle_opcodes import archive, pickled, safetensors

    content = {"model": files.weights(), "ema": None, "facts": files.METADATA, "args": files.NAMESPACE}
    header, data = files.split_safetensors(files.good_safetensors())
    return [
        Seed(files.torch_file()),
        Seed(files.old_file()),
        Seed(files.good_safetensors()),
        *[Seed(pickled(content), lambda pickle: archive(pickle, {"0": files.VALUES}))] * 4,
        *[Seed(header, lambda text: safetensors(text, data))] * 2,
    ]


def _read_weights(path: Path) -> object:
    from models.weights import load_weights

    return load_weights(path)


def _states() -> list[Seed]:
    from tests.helpers import hostile_weights as files
    from tests.helpers.pickle_opcodes import archive, pickled

    state = {
        **{
            "format": 1,
            "model": files.weights(),
            "ema": None,
            "scaler": {},
            "update": 3,
            "best": {},
            "facts": files.METADATA,
        },
        "optimizer": {"state": {0: {"step": 1.0}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "sums": files.tensor((2, 4)),
    }
    return [Seed(pickled(state), lambda pickle: archive(pickle, {"0": files.VALUES}))]


def _read_state(path: Path) -> object:
    from engine.checkpoint.files import load_state
    from models.torch_files import parse_torch

    return load_state(path, read=parse_torch)


def _configs() -> list[Seed]:
    files = [*sorted(Path("configs").glob("*.yaml")), *sorted(Path("configs").glob("*/*_64.yaml"))]
    return [Seed(file.read_bytes()) for file in files] + [
        Seed(b"A: &a [1, 2]\nB: {c: *a, d: [*a, *a]}\nBASE: [x.yaml]\n")
    ]


def _read_config(path: Path) -> object:
    import config

    return config.load([str(path)])


def targets() -> dict[str, Target]:
    """Return the readers by name."""
    from tests.helpers.fuzz_data import data_targets

    return {
        "weights": Target(_weights, _read_weights),
        "checkpoints": Target(_states, _read_state),
        "configs": Target(_configs, _read_config, names_file=False),
        **data_targets(),
    }


def main() -> int:
    """Run the command line; return 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="NAME", help=f"readers ({', '.join(known := targets())})")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder for inputs and findings (a temporary one)")
    args = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("error")
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"more than {SECONDS:.0f} s")))
    folder, failed = args.folder or Path(tempfile.mkdtemp(prefix="fuzz-")), False
    for name in args.targets or known:
        if name not in known:
            parser.error(f"{name} is none of {', '.join(known)}")
        (folder / name).mkdir(parents=True, exist_ok=True)
        count, findings = fuzz(known[name], args.seconds, args.seed, folder / name)
        print(f"{name}: {count} files, {len(findings)} findings", *findings, sep="\n", flush=True)
        failed = failed or bool(findings)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
