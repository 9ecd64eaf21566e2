"""Every way into a data set: training, evaluation and tools.index, with pictures made quickly."""

import io
from pathlib import Path

import pytest
from PIL import Image

import config
from data.build import Data, EvalData, build_data, build_eval_data
from tools import index

SMALL = "DATA.IMG_SIZE 24 DATA.EVAL_RESIZE 28 TRAIN.GLOBAL_BATCH 4 TRAIN.MICRO_BATCH 2 EVAL.BATCH 5 DATA.WORKERS 0"


def picture(kind: str = "JPEG", **options) -> bytes:
    """Return the bytes of a small image file."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 44), (200, 50, 90)).save(buffer, kind, **options)
    return buffer.getvalue()


PICTURE = picture()


def write(root: Path, *paths: str, data: bytes = PICTURE) -> Path:
    """Write a file at each path; return the root."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def two_classes(root: Path, train: str = "train", val: str = "val") -> Path:
    """Write three images of each of two classes in `train`, and one in `val`."""
    for name in ("cat", "dog"):
        write(root, *(f"{train}/{name}/{i}.jpg" for i in range(3)), f"{val}/{name}/9.jpg")
    return root


def cfg_of(root: Path, *opts: str) -> object:
    return config.load(opts=[*SMALL.split(), "DATA.PATH", str(root), *opts])


def train(root: Path, *opts: str) -> Data:
    return build_data(cfg_of(root, *opts), 0, 1, "cpu", lambda text: None)


def evaluate(root: Path, *opts: str, folder=None) -> EvalData:
    return build_eval_data(cfg_of(root, *opts), 0, 1, "cpu", lambda text: None, folder)


def run_index(root: Path, capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str]:
    """Return the exit status of tools.index, and all it printed, each line without outer and double spaces."""
    try:
        status = index.main([str(root), "--workers", "1", *argv])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    return status, "\n".join(" ".join(line.split()) for line in (out + err).splitlines())


def refused_everywhere(root: Path, capsys: pytest.CaptureFixture) -> str:
    """Assert that training, evaluation and tools.index refuse a data set with the same line; return it."""
    with pytest.raises(ValueError, match=r".") as training:
        train(root)
    with pytest.raises(ValueError, match=r".") as evaluation:
        evaluate(root)
    status, printed = run_index(root, capsys)
    text = str(training.value)
    assert text == str(evaluation.value)
    assert "\n" not in text
    assert status == 2
    assert " ".join(text.split()) in printed
    return text
