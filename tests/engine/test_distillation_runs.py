"""Runs of train.py with distillation: resumed, with alpha 0, of every family, on two processes."""

import json

import pytest
import timm
import torch

import models  # noqa: F401  registers the families
import train as train_script
from data.augment.device_stage import DeviceStage
from engine.checkpoint.files import load_state
from engine.logging.log import Log
from engine.loss import Teacher
from tests.helpers.bounds import CONDITIONED, assert_same_but_for_order
from tests.helpers.small_models import SMALLEST
from tests.helpers.teachers import store


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A config of 2 epochs of 2 updates on synthetic images, and a teacher's file beside it."""
    folder = tmp_path_factory.mktemp("distill")
    store(folder / "teacher.pt")
    (folder / "small.yaml").write_text("""
NAME: small
DEVICE: cpu
MODEL: {NAME: test_efficientnet, DROP_PATH_RATE: 0.2}
DATA: {LOADER: synthetic, IMG_SIZE: 32, SYNTHETIC_TRAIN: 16, SYNTHETIC_VAL: 4, SYNTHETIC_CLASSES: 3}
TRAIN: {EPOCHS: 2, GLOBAL_BATCH: 8, MICRO_BATCH: 4, AMP: "off"}
SCHEDULE: {WARMUP_EPOCHS: 0}
EMA: {DECAY: 0.9}
LOG: {EVERY: 1, TENSORBOARD: false}
""")
    return folder


def distil(kind, folder, *more):
    teacher = ("DISTILL.TEACHER", "test_efficientnet", "DISTILL.TEACHER_WEIGHTS", folder / "teacher.pt")
    return ("--opts", "DISTILL.TYPE", kind, *teacher, *more)


def train(folder, output, *more):
    return train_script.main(["--cfg", str(folder / "small.yaml"), "--output", str(output), *map(str, more)])


def last(output):
    return load_state(max((output / "small/checkpoints").iterdir()))


def losses(output):
    rows = [json.loads(line) for line in (output / "small/metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    """An uninterrupted run with soft distillation."""
    output = tmp_path_factory.mktemp("uninterrupted")
    assert train(small, output, *distil("soft", small, "CHECKPOINT.EVERY_UPDATES", 1)) == 0
    return output


def test_checkpoint_and_averages_hold_the_student_only(uninterrupted):
    state = last(uninterrupted)
    names = set(timm.create_model("test_efficientnet", num_classes=3).state_dict())
    assert set(state["model"]) == set(state["ema"]) == names
    assert len(state["facts"]["teacher"]["digest"]) == 16


@pytest.fixture(scope="module")
def plain(small, tmp_path_factory):
    """The same run without distillation."""
    output = tmp_path_factory.mktemp("plain")
    assert train(small, output) == 0
    return output


def test_alpha_zero_is_bitwise_no_distillation(small, uninterrupted, plain, tmp_path, capsys):
    assert train(small, tmp_path, *distil("soft", small, "DISTILL.ALPHA", 0)) == 0
    assert "DISTILL.ALPHA=0" in capsys.readouterr().out
    for part in ("model", "ema"):
        torch.testing.assert_close(last(plain)[part], last(tmp_path)[part], rtol=0, atol=0)
    assert losses(plain) == losses(tmp_path) != losses(uninterrupted)


def test_first_loss_is_that_of_the_student_without_a_teacher_and_of_its_distance(small, uninterrupted, plain, tmp_path):
    assert train(small, tmp_path, *distil("soft", small, "DISTILL.ALPHA", 1, "TRAIN.EPOCHS", 1)) == 0
    assert losses(uninterrupted)[0] == pytest.approx((losses(tmp_path)[0] + losses(plain)[0]) / 2, rel=1e-5)


def test_interrupted_distillation_resumes_bitwise(small, uninterrupted, tmp_path, monkeypatch, capsys):
    def interrupt(self):
        self.updates = getattr(self, "updates", 0) + 1
        if self.updates == 2:
            raise KeyboardInterrupt

    argv = distil("soft", small, "CHECKPOINT.EVERY_UPDATES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "advance", interrupt)
        assert train(small, tmp_path, *argv) == 130
    assert last(tmp_path)["update"] == 1
    moved = tmp_path / "moved.pt"
    moved.write_bytes((small / "teacher.pt").read_bytes())
    store(tmp_path / "other.pt", seed=1)
    with pytest.raises(SystemExit):
        train(small, tmp_path, *argv, "DISTILL.TEACHER_WEIGHTS", tmp_path / "other.pt")
    assert "has changed since" in capsys.readouterr().err
    assert train(small, tmp_path, *argv, "DISTILL.TEACHER_WEIGHTS", moved) == 0
    for part in ("model", "ema"):
        torch.testing.assert_close(last(uninterrupted)[part], last(tmp_path)[part], rtol=0, atol=0)
    assert losses(uninterrupted) == losses(tmp_path)


def test_evaluation_needs_no_teacher(small, uninterrupted, capsys):
    argv = distil("soft", small, "CHECKPOINT.EVERY_UPDATES", 1, "DISTILL.TEACHER_WEIGHTS", "gone.pt")
    assert train(small, uninterrupted, "--eval", *argv) == 0
    assert "top-1" in capsys.readouterr().out


@pytest.mark.parametrize("name", SMALLEST)
def test_every_family_learns_from_a_teacher(small, tmp_path, monkeypatch, name, capsys):
    shapes = []
    forward = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda self, x: shapes.append(tuple(x.shape)) or forward(self, x))
    once = ("TRAIN.EPOCHS", 1, "DATA.SYNTHETIC_TRAIN", 4, "TRAIN.GLOBAL_BATCH", 4, "TRAIN.MICRO_BATCH", 4)
    assert train(small, tmp_path, *distil("soft", small, "MODEL.NAME", name, *once, "EMA.DECAY", 0)) == 0
    assert "distilling (soft)" in capsys.readouterr().out
    assert shapes == [(4, 3, 32, 32)]
    assert last(tmp_path)["update"] == 1
    assert all(tensor.isfinite().all() for tensor in last(tmp_path)["model"].values())


def test_teacher_sees_the_mixed_and_erased_images(small, tmp_path, monkeypatch):
    seen, prepared = [], []
    forward, prepare = Teacher.forward, DeviceStage.train

    def record(self, *arguments):
        images, targets = prepare(self, *arguments)
        prepared.append(images.clone())
        assert ((targets > 0.1).sum(1) == 2).any()
        return images, targets

    monkeypatch.setattr(DeviceStage, "train", record)
    monkeypatch.setattr(Teacher, "forward", lambda self, x: seen.append(x.clone()) or forward(self, x))
    assert train(small, tmp_path, *distil("hard", small, "TRAIN.EPOCHS", 1)) == 0
    assert len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen, prepared, strict=True))


@pytest.mark.slow
def test_two_processes_distil_to_the_weights_of_one(small, tmp_path, run_script):
    argv = ("train.py", "--cfg", str(small / "small.yaml"), *map(str, distil("hard", small, *CONDITIONED)))
    for name, processes in (("one", 0), ("two", 2)):
        run_script(*argv, "--output", str(tmp_path / name), processes=processes)
    one, two = (last(tmp_path / name)["model"] for name in ("one", "two"))
    assert_same_but_for_order(one, two, lr_sum=2.5e-3, norm=127)  # not clipped
