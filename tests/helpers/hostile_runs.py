"""Run directories as an attacker may hand them over, none of more than 100 kB; each case changes a sound one."""

import json
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import config

FILES = ("config.yaml", "manifest.json", "log.txt", "metrics.jsonl", "bad_images.jsonl", "diverged.json", "report.html")
MARKERS = ("preempted", "done", "requeues", ".lock", "wandb_id", "best_raw.safetensors")
FOLDERS = ("checkpoints", "tensorboard", "pictures", "logs")
INSIDE = (
    "checkpoints/update-00000009.pt",
    "tensorboard/events.out.tfevents.1",
    "pictures/first_batch.png",
    "pictures/epoch_0001",
)
SECRET = "the secret of another file"
EVIL = "evil\x1b]0;owned\x07\x9b2J\u202egpj.exe\nforged: line"  # terminal title, C1 code, bidi override, line break
ALIASES = "".join(f"A{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'] * 9)}]\n" for i in range(10))
START = {"time": "2026-11-01T10:00:00+0000", "update": 0, "device": "cpu", "packages": {"torch": "2.15.0"}}
TRAIN = {
    "kind": "train",
    "epoch": 0,
    "update": 4,
    "update_in_epoch": 4,
    "loss": 1.0,
    "images_per_s": 9.0,
    "data_share": 0.1,
}
EVAL = {
    "kind": "eval",
    "weights": "raw",
    "epoch": 0,
    "update": 6,
    "top1": 50.0,
    "top5": 90.0,
    "loss": 1.0,
    "correct1": 1,
    "images": 2,
}


def sound_run(run: Path) -> Path:
    """Write a small run directory in which nothing is wrong; return it."""
    run.mkdir(parents=True)
    cfg = config.defaults()
    cfg.MODEL.NAME = "stvit_small"
    (run / "config.yaml").write_text(config.dump(cfg))
    manifest = {"model": "stvit_small", "num_classes": 10, "parameters": 9, "data": {"train": 8}, "starts": [START]}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "metrics.jsonl").write_text(f"{json.dumps(TRAIN)}\n{json.dumps(EVAL)}\n")
    (run / "log.txt").write_text("10:00:01 warning: something\n")
    return run


def replace(run: Path, name: str) -> Path:
    """Return the path of a file that the case creates, removed from the sound run, with its folder."""
    path = run / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    return path


def link(run: Path, outside: Path, name: str) -> None:
    replace(run, name).symlink_to(outside / ("folder" if name in FOLDERS or "epoch" in name else "file"))


def dangling(run: Path, outside: Path, name: str) -> None:
    replace(run, name).symlink_to(outside / "new")


def pipe(run: Path, outside: Path, name: str) -> None:
    os.mkfifo(replace(run, name))


def listening(run: Path, outside: Path, name: str) -> None:
    path, here = replace(run, name), Path.cwd()
    os.chdir(path.parent)  # the path of a socket is limited to some 100 characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def folder(run: Path, outside: Path, name: str) -> None:
    replace(run, name).mkdir()


def irregular() -> dict[str, tuple[str, Callable[[Path, Path], None]]]:
    """Return cases by title: the file that is of another kind, and a function of the run and an outside folder that makes it."""
    cases: dict[str, tuple[str, Callable[[Path, Path], None]]] = {}
    for name in (*FILES, *MARKERS, *FOLDERS, *INSIDE):
        kinds = [link, dangling]
        kinds += [] if name in (*FOLDERS, INSIDE[-1]) else [folder] if name in MARKERS else [folder, pipe, listening]
        if name in INSIDE:
            kinds.remove(folder) if folder in kinds else None
        for kind in kinds:
            cases[f"{name} {kind.__name__}"] = name, lambda run, outside, name=name, kind=kind: kind(run, outside, name)
    return cases


def png(width: int, height: int) -> bytes:
    """Return a PNG whose header states a size; its pixels are zeros, as many as fit into some kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(min(height * (width + 1), 10**7)))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def row(**changes: object) -> str:
    return json.dumps({name: value for name, value in {**TRAIN, **changes}.items() if value != "gone"})


def evaluation(**changes: object) -> str:
    return json.dumps({name: value for name, value in {**EVAL, **changes}.items() if value != "gone"})


DEEP = "[" * 40_000
ROWS = [  # that must be refused or read, without a traceback
    *(
        "[]",
        "null",
        "3",
        '"text"',
        "{}",
        DEEP,
        '{"kind": ["train"]}',
        '{"kind": "train", "update": 1e999}',
        "\x00" * 1000,
    ),
    *(row(update=update) for update in (None, "4", 4.5, -1, True, [4], {"a": 1}, 10**30, "gone")),
    *(row(epoch=epoch) for epoch in (None, "0", -3, [0], 10**40)),
    *(row(loss=loss) for loss in ("0.5", [1], {}, True, 10**60, "gone")),
    *(row(update_in_epoch=inside) for inside in (None, "1", -5, 10**12, "gone")),
    *(row(images_per_s=rate) for rate in (None, "fast", [], -1.0, 0, 5e-324, 1e308)),
    *(row(data_share=share) for share in (None, "much", {}, 1e308, "gone")),
    *(row(skipped_in_run=count) for count in (None, "many", 3.5, 3)),
    row(epoch=3, update=4, update_in_epoch=4),
    row(epoch=10**9, update=2**60, update_in_epoch=1),
    *(evaluation(weights=weights) for weights in (None, "other", ["raw"], EVIL, "gone")),
    *(evaluation(top1=top1) for top1 in (None, "50", [50], 1e308, -1e308, "gone")),
    *(
        evaluation(**{name: value})
        for name in ("correct1", "images", "top5", "loss")
        for value in (None, "x", [1], "gone")
    ),
    *(evaluation(seconds=seconds) for seconds in (None, "long", [], 1e308)),
    row(**{EVIL: 1.0}),
    row(**{f"a{i}": i for i in range(1000)}),
    '{"kind": "train", "update": 4, "epoch": 0, "loss": 1e999}',
    f'{{"kind": "train", "update": 4, "epoch": 0, "loss": {"9" * 5000}}}',
    f'{{"kind": "train", "update": 4, "epoch": 0, "loss": 1.0, "x": "{"y" * 50_000}"}}',
    '{"kind": "train", "update": 4, "epoch": 0, "loss": 1.0, "x": "\\ud800"}',
]
MANIFESTS = [
    *(
        "[]",
        "3",
        "null",
        '"text"',
        DEEP,
        '{"a":' * 20_000,
        "{",
        "\x00",
        '{"starts": 3}',
        '{"starts": {}}',
        '{"starts": [3]}',
    ),
    *(json.dumps({"starts": [{**START, key: value}]}) for key in START for value in (None, 3.5, [], {}, EVIL, 10**30)),
    *(json.dumps({"starts": [{"commit": value, "changed_files": value}]}) for value in (None, 3, [], EVIL)),
    *(json.dumps({"starts": [{"command": value}]}) for value in (None, 3, "text", [[1], {}], [EVIL] * 1000)),
    *(
        json.dumps({key: value})
        for key in ("parameters", "num_classes", "data", "classes", "teacher")
        for value in (None, "x", [], {}, 10**400, -1)
    ),
    *(
        json.dumps({"data": {key: value}})
        for key in ("train", "val", "classes")
        for value in (None, "x", [], 1.5, -1, 2**62)
    ),
    json.dumps({"starts": [{"packages": {f"p{i}": 1}} for i in range(2000)]}),
    json.dumps({f"key {i}": i for i in range(5000)}),
    json.dumps({"seed": "9" * 50_000, EVIL: EVIL, "surrogate": "\ud800"}),
]
CONFIGS = [
    ALIASES,
    "a: &a [*a]",
    DEEP,
    "{" * 40_000,
    "- a\n- b",
    "text",
    "1: 2",
    "? [a]\n: b",
    "!!python/object/apply:os.system [touch evil]",
    "DATA: !!binary aGFsbG8=",
    "TRAIN: 2026-01-01",
    f"TRAIN: {{EPOCHS: 0x{'f' * 50_000}}}",
    "TRAIN: {EPOCHS: .inf, GLOBAL_BATCH: [1, 2]}",
    "TRAIN: {EPOCHS: many, GLOBAL_BATCH: 0}\nMODEL: {NAME: [a, b]}\nDATA: {IMG_SIZE: {a: 1}}\nSCHEDULE: 3",
    f"NAME: {json.dumps(EVIL)}\nMODEL: {{NAME: {json.dumps(EVIL)}}}",
    "TRAIN: null\nDATA: []\nMODEL: text\nRECIPE: {HEADLINE: [raw]}",
    "\n".join(f"KEY{i}: {i}" for i in range(3000)),
    "A: [" + "x, " * 10_000 + "]",
    "\x00\x01",
]
OTHERS = {
    "log.txt": [
        EVIL,
        "\x1b[2J" * 10_000,
        "10:00:01 warning: " + EVIL,
        "\n" * 50_000,
        "x" * 90_000,
        "".join(f"10:00:01 warning: {chr(97 + i % 26) * (i % 50)}\n" for i in range(2000)),
    ],
    "bad_images.jsonl": [
        "[]\n3\nnull\n",
        DEEP,
        '{"path": 3, "reason": []}',
        json.dumps({"path": EVIL, "reason": EVIL}),
        '{"path": "a"}\n' * 6000,
    ],
    "diverged.json": [
        "[]",
        "3",
        "null",
        "{",
        DEEP,
        '{"error": [], "went_back_to": {}}',
        json.dumps({"error": EVIL, "went_back_to": EVIL}),
    ],
}
PICTURES = {
    "50000 x 50000": png(50_000, 50_000),
    "9000 x 9000": png(9000, 9000),
    "1 x 2 billion": png(1, 2**31 - 1),
    "no pixels": png(0, 0),
    "no PNG": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "header only": b"\x89PNG\r\n\x1a\n",
    "text": b"text",
}


def contents() -> dict[str, tuple[str, bytes]]:
    """Return cases by title: a file of the run and its content."""
    cases = {f"row {number}": ("metrics.jsonl", f"{text}\n{json.dumps(EVAL)}\n") for number, text in enumerate(ROWS)}
    cases |= {f"manifest {number}": ("manifest.json", text) for number, text in enumerate(MANIFESTS)}
    cases |= {f"config {number}": ("config.yaml", text) for number, text in enumerate(CONFIGS)}
    cases |= {f"{name} {number}": (name, text) for name, texts in OTHERS.items() for number, text in enumerate(texts)}
    found = {title: (name, text.encode("utf-8", "surrogateescape")) for title, (name, text) in cases.items()}
    return found | {f"picture {title}": ("pictures/first_batch.png", data) for title, data in PICTURES.items()}
