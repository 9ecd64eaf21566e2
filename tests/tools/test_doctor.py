"""tools.doctor: findings, remedies, exit status."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

import config
from engine.memory import Memory
from tools import doctor_machine, doctor_run
from tools.doctor import main
from tools.doctor_findings import guarded

GIB = 2**30


def found(findings, subject):
    return [finding for finding in findings if finding.subject == subject]


def examine(capsys, *argv):
    status = main([*argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_machine_is_examined_without_a_config(capsys, tmp_path):
    assert main(["--output", str(tmp_path / "runs")]) == 0
    text = capsys.readouterr().out
    for subject in (
        "python",
        "packages",
        "gpu",
        "gloo",
        "host",
        "port",
        "cores",
        "/dev/shm",
        "ulimit -n",
        "clock",
        "output",
    ):
        assert f"  {subject}: " in text
    assert "0 failures" in text
    assert "1 warning, " in text or "warnings, " in text
    assert "1 warnings" not in text
    assert "--cfg FILE" in text
    assert not list(tmp_path.iterdir())


def test_run_is_examined_and_nothing_is_written(small_cfg, pictures, tmp_path, capsys):
    status, report = examine(capsys, "--cfg", str(small_cfg), "--output", str(tmp_path / "runs"), "--processes", "2")
    assert status == 0
    texts = {finding["subject"]: finding["text"] for finding in report["findings"]}
    assert texts["batch"] == "8 = 4 images x 2 processes x 1 accumulation"
    assert texts["data"].startswith("48 training and 15 validation images of 3 classes")
    assert "images/s" in texts["reading"]
    assert texts["model"].startswith("test_efficientnet, ")
    assert "the run writes about" in texts["disk"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "subject", "message"),
    [
        (["--data-path", "{tmp}/nowhere"], "run", "nowhere"),
        (["--processes", "3"], "batch", "cannot be divided"),
        (["--init", "{tmp}/none.safetensors"], "run", "none.safetensors does not exist"),
        (["--opts", "MODEL.NUM_CLASSES", "7"], "run", "holds 3 classes"),
        (["--output", "/proc/nowhere"], "output", "cannot be written"),
        (["--output", str(Path(__file__) / "runs")], "output", "is a file"),
    ],
)
def test_what_would_stop_the_run_is_a_failure(argv, subject, message, small_cfg, tmp_path, capsys):
    argv = [text.replace("{tmp}", str(tmp_path)) for text in argv]
    if "--output" not in argv:
        argv += ["--output", str(tmp_path)]
    status, report = examine(capsys, "--cfg", str(small_cfg), *argv)
    assert status == 1
    failures = [finding for finding in report["findings"] if finding["level"] == "fail"]
    assert any(finding["subject"] == subject and message in finding["text"] for finding in failures)
    assert all(finding["remedy"] for finding in report["findings"] if finding["level"] != "ok")


def test_option_without_effect_is_a_warning(small_cfg, tmp_path, capsys):
    argv = ["--cfg", str(small_cfg), "--output", str(tmp_path), "--opts", "AUG.ERASE_PROB", "0", "AUG.ERASE_COUNT", "2"]
    status, report = examine(capsys, *argv)
    assert status == 0
    assert any("no effect: AUG.ERASE_COUNT 2" in finding["text"] for finding in report["findings"])


def test_disk_and_memory_are_compared_with_what_the_run_takes(tmp_path, monkeypatch):
    cfg = config.load(opts=["CHECKPOINT.KEEP", "3", "TRAIN.MICRO_BATCH", "128"])
    memory = Memory(weights=GIB, gradients=GIB, optimizer=2 * GIB, ema=0, activations=12 * GIB)
    for free, level in ((13, "fail"), (20, "warn"), (40, "ok")):  # (1 + 2) * 4 + 2 = 14 GiB are written
        status = SimpleNamespace(f_bavail=free, f_frsize=GIB)
        monkeypatch.setattr(doctor_run.os, "statvfs", lambda _, status=status: status)
        finding = doctor_run._disk(cfg, memory, tmp_path / "run")
        assert finding.level == level
        assert "about 14.0 GiB" in finding.text
    for pages, level in ((10, "fail"), (17, "warn"), (40, "ok")):
        monkeypatch.setattr(doctor_run.os, "sysconf", lambda name, pages=pages: GIB if "SIZE" in name else pages)
        (finding,) = doctor_run._memory(cfg, memory, torch.device("cpu"))
        assert finding.level == level
    monkeypatch.setattr(doctor_run.os, "sysconf", lambda name: GIB if "SIZE" in name else 10)
    (finding,) = doctor_run._memory(cfg, memory, torch.device("cpu"))
    assert finding.remedy.startswith("--batch-size 57 or less")  # 9/10 of (10 - 4) / 12 of 128


def test_old_and_missing_packages_are_failures_but_for_those_one_can_do_without(monkeypatch):
    wanted = [Requirement(text) for text in ("torch>=99", "nothing-like-this>=1", "nvidia-dali-none>=2", "timm>=1.0")]
    monkeypatch.setattr(doctor_machine, "requirements", lambda path: wanted)
    findings = found(doctor_machine.packages(None), "packages")
    by_level = {level: [f.text for f in findings if f.level == level] for level in ("ok", "warn", "fail")}
    assert any(text.startswith("torch ") and ">=99 is needed" in text for text in by_level["fail"])
    assert "nothing-like-this is not installed" in by_level["fail"]
    assert by_level["warn"] == ["nvidia-dali-none is not installed: DATA.LOADER dali will not work"]
    cfg = config.load(opts=["DATA.LOADER", "dali"])
    assert "nvidia-dali-none is not installed" in [f.text for f in doctor_machine.packages(cfg) if f.level == "fail"]


def test_gpu_that_torch_does_not_see_is_a_failure(monkeypatch):
    monkeypatch.setattr(doctor_machine.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_machine, "_driver", lambda: "570.1")
    (finding,) = doctor_machine.gpus(None)
    assert finding.level == "fail"
    assert "the driver 570.1 is there, but torch sees no GPU" in finding.text
    monkeypatch.setattr(doctor_machine, "_driver", lambda: "")
    assert [f.level for f in doctor_machine.gpus(None)] == ["warn"]


def test_limits_that_are_low_are_warnings(monkeypatch):
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(doctor_machine.os, "statvfs", lambda _: SimpleNamespace(f_bavail=64, f_frsize=2**20))
    monkeypatch.setattr(doctor_machine.socket, "gethostbyname", lambda name: (_ for _ in ()).throw(OSError("no")))
    findings = [*doctor_machine.limits(None), doctor_machine._host()]
    assert {f.subject for f in findings if f.level == "warn"} >= {"ulimit -n", "/dev/shm", "host"}
    assert "ulimit -n" in next(f for f in findings if f.subject == "ulimit -n").remedy


def test_file_system_without_locks_is_a_warning(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(doctor_run.fcntl, "flock", refuse)
    (finding,) = found(doctor_run.storage(tmp_path), "locks")
    assert finding.level == "warn"
    assert "Function not implemented" in finding.text


def test_type_of_a_file_system_is_that_of_its_mount(monkeypatch, tmp_path):
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: mounts)
    assert doctor_run.file_system(tmp_path) == "nfs4, networked"
    assert doctor_run.file_system(Path("/")) == "ext4"


def test_examination_that_breaks_off_is_a_finding():
    def broken():
        yield from ()
        Path("/nowhere/at/all").stat()

    (finding,) = guarded("disk", broken())
    assert finding.level == "warn"
    assert "FileNotFoundError" in finding.text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cfg", "configs/stvit/smal_64.yaml"], "small_64.yaml"),
        (["--processes", "0"], "--processes 0"),
        (["--opts", "TRAIN.EPOCH", "3"], "TRAIN.EPOCHS"),
        (["--proceses", "3"], "did you mean --processes"),
    ],
)
def test_mistake_is_an_error_with_a_hint(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
