"""Run directories that others wrote: every program that reads one ends with a page or a message, and changes nothing outside."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from engine.logging.log import Log
from tests.helpers.hostile_runs import EVIL, SECRET, contents, irregular, sound_run
from tools import compare, doctor, report

ROOT = Path(__file__).parents[2]
IRREGULAR, CONTENTS = irregular(), contents()
SECONDS = 60  # far more than a sound run takes on a slow machine
PAGE_BYTES = 4_000_000


@pytest.fixture
def outside(tmp_path):
    """A folder with a file and a folder that no run directory may change."""
    folder = tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_text(SECRET)
    for number in range(9):
        (folder / f"folder/update-{number:08d}.pt").write_text(SECRET)
    return folder


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def ended(main, *argv):
    """Return the exit status of a program."""
    try:
        return main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


def programs(run, tmp_path, small_cfg):
    """Return the programs that read a run directory, as functions without arguments."""
    trainer = ["--cfg", small_cfg, "--output", run.parent, "--opts", "NAME", run.name]
    return {
        "report": lambda: ended(report.main, run),
        "reports": lambda: ended(report.main, run, tmp_path / "sound", "--out", tmp_path / "page.html"),
        "compare": lambda: ended(compare.main, run, tmp_path / "sound"),
        "compare json": lambda: ended(compare.main, tmp_path / "sound", run, "--json"),
        "train": lambda: ended(train.main, *trainer),
        "dry run": lambda: ended(train.main, "--dry-run", *trainer),
    }


def test_cases_are_small():
    assert len(IRREGULAR) > 50
    assert len(CONTENTS) > 100
    assert max(len(data) for _, data in CONTENTS.values()) <= 100_000


def test_sound_run_is_read(tmp_path, small_cfg, capsys):
    run = sound_run(tmp_path / "run")
    sound_run(tmp_path / "sound")
    found = programs(run, tmp_path, small_cfg)
    assert [found[name]() for name in ("report", "reports", "compare", "compare json", "dry run")] == [0] * 5, (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("title", IRREGULAR)
def test_other_kinds_of_files_are_refused_by_name(title, tmp_path, outside, small_cfg, capsys):
    name, make = IRREGULAR[title]
    run = sound_run(tmp_path / "run")
    sound_run(tmp_path / "sound")
    make(run, outside)
    before = files_in(outside)
    for program, start in programs(run, tmp_path, small_cfg).items():
        assert start() == 2, program
        shown = capsys.readouterr()
        assert f"{run / name} is a" in shown.err, program
        assert "remove it" in shown.err
        assert "Traceback" not in shown.err
    assert files_in(outside) == before
    if name != "report.html":
        assert not (run / "report.html").exists()


def test_doctor_refuses_other_kinds_of_files(tmp_path, outside, small_cfg, capsys):
    run = sound_run(tmp_path / "run")
    (run / "checkpoints").symlink_to(outside / "folder")
    assert ended(doctor.main, "--cfg", small_cfg, "--output", tmp_path, "--opts", "NAME", "run") == 1
    assert f"{run / 'checkpoints'} is a link and not a folder" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("title", CONTENTS)
def test_any_content_ends_with_a_page_or_a_message(title, tmp_path, outside, small_cfg, capsys):
    name, data = CONTENTS[title]
    run = sound_run(tmp_path / "run")
    sound_run(tmp_path / "sound")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_bytes(data)
    started = time.monotonic()
    for program, start in programs(run, tmp_path, small_cfg).items():
        if program == "train" or (program == "dry run" and name != "manifest.json"):  # which reads no other content
            continue
        status = start()
        shown = capsys.readouterr()
        assert status in (0, 1, 2), program
        assert "Traceback" not in shown.err
        assert len(shown.out) + len(shown.err) < 200_000
        assert not set(shown.out + shown.err) & set("\x1b\x07\x9b\u202e"), program
        assert "\nforged" not in shown.out + shown.err
        if status == 2:
            assert name.split("/")[0] in shown.err, shown.err
    for page in (run / "report.html", tmp_path / "page.html"):
        text = page.read_text() if page.exists() else ""
        assert len(text) < PAGE_BYTES
        assert not set(text) & set("\x1b\x07\x9b\u202e")
    assert time.monotonic() - started < SECONDS
    with contextlib.suppress(ValueError):  # a log that is continued drops rows that are none
        log = Log(True)
        log.open(run, 5, tensorboard=False)
        log.close()


HEAVY = [title for title in CONTENTS if title.startswith(("picture", "config 0", "config 2", "row 5"))]
PROGRAM = """
import resource, sys
from tools import report
for run in sys.argv[1:]:
    try:
        report.main([run])
    except SystemExit:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_is_bounded(tmp_path):
    runs = []
    for number, title in enumerate(["none", *HEAVY]):
        run = sound_run(tmp_path / str(number))
        if title in CONTENTS:
            name, data = CONTENTS[title]
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_bytes(data)
        runs.append(str(run))
    used = []
    for chosen in (runs[:1], runs):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *chosen], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        used.append(int(done.stdout.split()[-1]))
    assert used[1] - used[0] < 400, used  # MiB


def test_files_beside_the_target_are_not_followed(tmp_path, outside):
    run = sound_run(tmp_path / "run")
    for name in ("report.html", "metrics.jsonl", "config.yaml"):
        (run / f".{name}.tmp").symlink_to(outside / "file")
    assert ended(report.main, run) == 0
    log = Log(True)
    log.open(run, 9, tensorboard=False)
    log.picture("epoch_0001/a", __import__("PIL.Image").Image.new("RGB", (4, 4)), 1)
    log.close()
    assert (outside / "file").read_text() == SECRET


def test_run_directory_itself_may_be_a_link(tmp_path, small_cfg):
    sound_run(tmp_path / "scratch" / "run")
    sound_run(tmp_path / "sound")
    (tmp_path / "output").symlink_to(tmp_path / "scratch")
    (tmp_path / "linked").symlink_to(tmp_path / "scratch" / "run")
    assert ended(report.main, tmp_path / "output" / "run") == 0
    assert ended(report.main, tmp_path / "linked") == 0
    assert ended(compare.main, tmp_path / "linked", tmp_path / "sound") == 0
    assert ended(train.main, "--dry-run", "--cfg", small_cfg, "--output", tmp_path, "--opts", "NAME", "linked") == 0


def test_names_of_runs_are_escaped(tmp_path, capsys):
    runs = [sound_run(tmp_path / name) for name in (EVIL, "[red]run[/]", "=1+1")]
    assert ended(report.main, *runs) == 0
    assert ended(compare.main, *runs) == 0
    assert ended(compare.main, *runs, "--markdown") == 0
    assert ended(compare.main, runs[0], tmp_path / f"{EVIL} missing") == 2
    shown = capsys.readouterr()
    assert not set(shown.out + shown.err) & set("\x1b\x07\x9b\u202e")
    assert "\nforged" not in shown.out + shown.err
    assert "evil\\x1b]0;owned\\x07\\x9b2J\\u202egpj.exe\\nforged: line" in shown.out
    page = (tmp_path / "report.html").read_text()
    assert not set(page) & set("\x1b\x07\x9b\u202e")
    assert "[red]run[/]" in page
