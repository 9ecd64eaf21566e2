"""Draw the demo data set: ten classes of JPEG pictures in train/ and val/, the same bytes on every run.

    python -m tools.demo OUT

OUT is created atomically once all pictures are drawn. A complete OUT is left unchanged; an interrupted one is drawn again.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common.rng import keyed_generator
from tools.demo_pictures import FORMS, draw
from tools.progress import with_progress
from tools.terminal import Screen, say

VERSION = 1  # of the pictures; raise it when they change
MARKER = "demo.json"
CHUNK = 20  # pictures per task of a process
SPLITS = ("train", "val")

Picture = tuple[str, int, int, str]  # split, number within the split, seed, root folder


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo", description="Draw the demo data set: ten classes of JPEG pictures."
    )
    parser.add_argument("out", type=Path, help="folder to create, with train/ and val/")
    parser.add_argument("--train", type=int, default=2000, help="training pictures (default 2000)")
    parser.add_argument("--val", type=int, default=500, help="validation pictures (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures (default 0)")
    args = parser.parse_args()
    try:
        draw_dataset(args.out, args.train, args.val, args.seed)
    except ValueError as error:
        sys.exit(f"tools.demo: {error}")
    except KeyboardInterrupt:
        sys.exit(f"tools.demo: interrupted; {args.out} was not created, run the same command again")


def draw_dataset(out: Path, train: int = 2000, val: int = 500, seed: int = 0, workers: int | None = None) -> bool:
    """Draw the data set into `out`; return False if it is there already.

    Raises ValueError if `out` holds files that this program did not write.
    """
    if min(train, val) < len(FORMS):
        raise ValueError(f"train={train} and val={val} must be at least {len(FORMS)}, one picture a class")
    described = {"version": VERSION, "train": train, "val": val, "seed": seed}
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name another folder")
    if (out / MARKER).is_file():
        if json.loads((out / MARKER).read_text(encoding="utf-8")) == described and _count(out) == train + val:
            say(f"{out}: {train} + {val} pictures of {len(FORMS)} classes are there already")
            return False
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and was not drawn by tools.demo; name another folder or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split in SPLITS:
        for name in FORMS:
            (partial / split / name).mkdir(parents=True)
    start = time.perf_counter()
    pictures = [(s, i, seed, str(partial)) for s, n in zip(SPLITS, (train, val), strict=True) for i in range(n)]
    console = Screen(soft_wrap=True)
    line = "drew {count} of {total} pictures"
    for _ in with_progress(_draw_all(pictures, workers), len(pictures), console, title="Drawing pictures", done=line):
        pass
    (partial / MARKER).write_text(json.dumps(described), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    say(f"{out}: drew {train} + {val} pictures of {len(FORMS)} classes in {time.perf_counter() - start:.0f} s")
    return True


def draw_picture(picture: Picture) -> None:
    """Draw one picture and write its file."""
    split, number, seed, folder = picture
    name = list(FORMS)[number % len(FORMS)]
    rng = keyed_generator(seed, f"demo {split}", number)
    quality = int(rng.randint(75, 93))
    draw(name, rng).save(Path(folder, split, name, f"{name}_{number:05d}.jpg"), quality=quality)


def _draw_all(pictures: list[Picture], workers: int | None) -> Iterator[None]:
    """Draw pictures in several processes (default: one a core); yield once for each."""
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        yield from map(draw_picture, pictures)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(draw_picture, pictures, chunksize=CHUNK)


def _count(folder: Path) -> int:
    return sum(1 for split in SPLITS for _ in (folder / split).glob("*/*.jpg"))


if __name__ == "__main__":
    main()
