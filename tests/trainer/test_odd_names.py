"""Names that are not UTF-8, and names beyond ASCII in a C locale: they end no run, and their bytes survive in its files."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import eval as eval_script
import train as train_script
from engine.checkpoint.files import read_metadata, save_weights
from engine.logging.trackers import TensorBoardTracker
from engine.result_files import write_table
from tools import index as index_tool
from tools import report as report_tool

ROOT = Path(__file__).parents[2]
BAD = [b"caf\xe9.jpg", b"\xff\xfe.jpg", "猫.jpg".encode("gbk"), "三花猫.jpg".encode(), "é ü.jpg".encode()]


@pytest.fixture(scope="module")
def odd_pictures(pictures, tmp_path_factory):
    """Copy the pictures, and add images and unreadable files with odd names."""
    root = tmp_path_factory.mktemp("odd") / "pictures"
    shutil.copytree(pictures, root)
    for name in BAD:
        Path(os.fsdecode(os.fsencode(root / "train" / "green") + b"/" + name)).write_bytes(b"<html>")
        shutil.copy(root / "val/red/001.jpg", os.fsencode(root / "val" / "red") + b"/" + name)
    for number in range(3):  # 7 updates of 8 images, so that an epoch holds every image
        shutil.copy(root / "train/red/001.jpg", root / "train" / "red" / f"more {number}.jpg")
    return root


def basename(path):
    """Return the last part of a path, as bytes."""
    return path.encode("utf-8", "surrogateescape").split(b"/")[-1]


def assert_logged(run):
    """Check that the log and the list of a run hold the bytes of the unreadable files."""
    log = (run / "log.txt").read_bytes()
    assert all(b"green/" + name + b" cannot be decoded" in log for name in BAD)
    rows = [json.loads(line) for line in (run / "bad_images.jsonl").read_text(encoding="ascii").splitlines()]
    assert {basename(row["path"]) for row in rows} == set(BAD)


def arguments(cfg, root, output, *opts):
    return ["--cfg", str(cfg), "--data-path", str(root), "--output", str(output), "--opts", *OPTIONS, *opts]


OPTIONS = ("TRAIN.EPOCHS", "1", "DATA.MAX_BAD_SHARE", "0.2")


def test_bytes_of_names_survive_in_every_file_of_a_run(odd_pictures, small_cfg, tmp_path, capsys):
    assert train_script.main(arguments(small_cfg, odd_pictures, tmp_path, "LOG.TENSORBOARD", "True")) == 0
    run = tmp_path / "small"
    assert "green/caf\\xe9.jpg cannot be decoded" in capsys.readouterr().out
    assert_logged(run)
    assert report_tool.main([str(run)]) == 0
    page = (run / "report.html").read_bytes().decode("utf-8")
    assert "green/caf\\xe9.jpg" in page
    assert "green/三花猫.jpg" in page
    capsys.readouterr()
    assert index_tool.main([str(odd_pictures), "--workers", "1"]) == 1
    text = capsys.readouterr().out
    assert all(name in text for name in ("三花猫.jpg cannot be decoded", ".jpg cannot be decoded"))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_predictions_list_odd_names(odd_pictures, small_cfg, uninterrupted, tmp_path, capsys, suffix):
    pytest.importorskip("pyarrow") if suffix == ".parquet" else None
    out = tmp_path / f"p{suffix}"
    argv = [
        "--cfg",
        str(small_cfg),
        "--checkpoint",
        str(uninterrupted / "best_raw.safetensors"),
        "--predictions",
        str(out),
    ]
    assert eval_script.main([*argv, "--data-path", str(odd_pictures)]) == 0
    if suffix == ".csv":
        with out.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            names = {basename(row["file"]) for row in csv.DictReader(file)}
        assert set(BAD) <= names
    else:
        import pyarrow.parquet

        names = {row["file"].split("/")[-1] for row in pyarrow.parquet.read_table(out).to_pylist()}
        assert {"caf\\xe9.jpg", "三花猫.jpg", "\\xff\\xfe.jpg"} <= names


@pytest.mark.parametrize("names", [["caf\udce9", "猫"], ["\udcff"], ["\udce7\udc8c\udcab"]])
def test_class_names_survive_in_headers_and_tables(names, tmp_path):
    save_weights(tmp_path / "w.safetensors", {}, {"classes": names})
    assert read_metadata(tmp_path / "w.safetensors")["classes"] == names
    write_table(tmp_path / "t.csv", {"name": names})
    assert (tmp_path / "t.csv").read_bytes() == b"name\n" + b"".join(
        name.encode("utf-8", "surrogateescape") + b"\n" for name in names
    )


@pytest.mark.parametrize("text", ["caf\udce9", "猫", "\udce7\udc8c\udcab"])
def test_tensorboard_takes_any_text_and_folder(text, tmp_path):
    folder = tmp_path / text
    folder.mkdir()
    tracker = TensorBoardTracker(folder, 0)
    tracker.text("config", text, 1)
    tracker.scalars({"train/loss": 1.0}, 1)
    tracker.close()
    assert list((folder / "tensorboard").glob("events*"))


PROGRAM = """
import sys, train
from tools import index, report
run, pictures, *argv = sys.argv[1:]
sys.exit(train.main(argv) or report.main([run]) or index.main([pictures, "--workers", "1"]) - 1)
"""
LOCALES = [
    {"PYTHONUTF8": "0", "LC_ALL": "C"},
    {"PYTHONUTF8": "1", "LC_ALL": "C", "PYTHONIOENCODING": "latin-1:strict"},
    {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"},
    {"PYTHONUTF8": "0", "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize(
    "environment",
    [pytest.param(names, marks=[pytest.mark.slow] * (number > 1)) for number, names in enumerate(LOCALES)],
    ids=lambda names: " ".join(f"{key}={value}" for key, value in names.items()),
)
def test_chinese_names_in_any_locale(environment, odd_pictures, small_cfg, tmp_path):
    output = tmp_path / "输出"
    cfg = tmp_path / "配置.yaml"
    cfg.write_text(f"BASE: {small_cfg}\nOUTPUT: {output}\nTAG: 猫\nLOG: {{TENSORBOARD: true}}\n", encoding="utf-8")
    argv = ["--cfg", str(cfg), "--data-path", str(odd_pictures), "--opts", *OPTIONS]
    run = output / "small-猫"
    env = os.environ | environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", PROGRAM, str(run), str(odd_pictures), *argv]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True)
    text = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert (done.returncode, "Traceback" in text) == (0, False), text
    assert_logged(run)
    assert "三花猫.jpg" in (run / "report.html").read_text(encoding="utf-8")
