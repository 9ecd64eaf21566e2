"""Values that are not finite, at every door: files of weights are refused, evaluations are no results and end with an error."""

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from engine.checkpoint.files import load_state, save_state
from engine.evaluate import Accuracy, evaluate
from engine.precision import Precision
from tests.helpers.small_runs import LAST, fails, rows, run_here, train
from tests.helpers.small_runs import evaluate as evaluate_file
from tools.convert import main as convert
from tools.export import main as export
from tools.predict import main as predict
from trainer import validation

NAME = "bn1.running_var"
TENSOR = "bn1.running_var (1 of"


@pytest.fixture(scope="module")
def spoiled(uninterrupted, tmp_path_factory):
    """A folder with best_raw.safetensors and a checkpoint of a run, each with one NaN in a BatchNorm variance."""
    folder = tmp_path_factory.mktemp("spoiled")
    weights = load_file(uninterrupted / "best_raw.safetensors")
    weights[NAME][0] = torch.nan
    with safe_open(uninterrupted / "best_raw.safetensors", "pt") as file:
        save_file(weights, folder / "w.safetensors", file.metadata())
    state = load_state(uninterrupted / LAST)
    state["model"][NAME][0] = torch.nan
    save_state(folder / "w.pt", {key: value for key, value in state.items() if key != "format"})
    return folder


@pytest.mark.parametrize("file", ["w.safetensors", "w.pt"])
def test_init_eval_and_tools_refuse_the_file(small_cfg, spoiled, tmp_path, pictures, capsys, file):
    path = spoiled / file
    doors = {
        "--init": lambda: train(small_cfg, tmp_path, "--init", path),
        "eval.py": lambda: evaluate_file(small_cfg, path),
        "tools.predict": lambda: predict([str(path), str(pictures / "val"), "--device", "cpu"]),
        "tools.convert": lambda: convert([str(path), str(tmp_path / "out.pth")]),
        "tools.export": lambda: export([str(path), "--format", "torch", "--out", str(tmp_path / "a.pt2")]),
        "teacher": lambda: run_here(
            small_cfg,
            tmp_path,
            "DISTILL.TYPE",
            "soft",
            "DISTILL.TEACHER",
            "test_efficientnet",
            "DISTILL.TEACHER_WEIGHTS",
            path,
        ),
    }
    for door, call in doors.items():
        assert TENSOR in fails(call, capsys), door
    assert not any(tmp_path.glob("*/checkpoints/*"))


def test_resume_refuses_the_checkpoint(small_cfg, spoiled, tmp_path, capsys):
    text = fails(lambda: train(small_cfg, tmp_path, "--resume", spoiled / "w.pt", "--eval"), capsys)
    assert TENSOR in text
    assert "continue from an earlier checkpoint" in text


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["ema", "optimizer"])
def test_resume_refuses_averages_and_moments_that_are_not_finite(
    small_cfg, uninterrupted, tmp_path, capsys, part, value
):
    state = load_state(uninterrupted / LAST)
    tensors = state["ema"] if part == "ema" else state["optimizer"]["state"][3]
    name = NAME if part == "ema" else "exp_avg_sq"
    tensors[name].view(-1)[0] = value
    save_state(tmp_path / "w.pt", {key: value for key, value in state.items() if key != "format"})
    text = fails(lambda: train(small_cfg, tmp_path, "--resume", tmp_path / "w.pt"), capsys)
    assert (TENSOR if part == "ema" else "optimiser exp_avg_sq of parameter 3 (1 of") in text


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"<html></html>", "HTML"), (b"", "empty"), (b"\x1f\x8b\x08", "gzip"), (b"PK\x03\x04ab", "damaged")],
)
def test_resume_names_a_file_that_is_no_checkpoint(small_cfg, tmp_path, capsys, content, message):
    (tmp_path / "w.pt").write_bytes(content)
    assert message in fails(lambda: train(small_cfg, tmp_path, "--resume", tmp_path / "w.pt"), capsys)
    assert "download it first" in fails(lambda: train(small_cfg, tmp_path, "--resume", "https://host/w.pt"), capsys)


class Constant(nn.Module):
    """A model that answers images of a brightness above 1 with given logits."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x):
        bright = x.flatten(1).amax(1) > 1
        return torch.where(bright[:, None], self.logits, torch.tensor([5.0, 0.0, 0.0]))


class Alone:
    """One process."""

    device = torch.device("cpu")

    def sum(self, tensor):
        return tensor


@pytest.mark.parametrize(
    "logits", [(torch.nan,) * 3, (torch.inf, 0.0, 0.0), (0.0, -torch.inf, 0.0), (0.0, 0.0, torch.nan)]
)
@pytest.mark.parametrize("answers", [None, (0, 1)])
def test_evaluation_with_logits_not_finite_is_not_finite_and_counts_them_as_wrong(logits, answers):
    images = torch.stack([torch.zeros(3, 2, 2), torch.full((3, 2, 2), 2.0)])
    batches = [(images, torch.tensor([0, 0]))]
    model, precision = Constant(*logits), Precision("off", torch.device("cpu"))
    result = evaluate(model, batches, lambda b: b, precision, Alone(), 2, answers=answers)
    assert not result.finite
    assert (result.correct1, result.images) == (1, 2)
    assert evaluate(Constant(5.0, 0.0, 0.0), batches, lambda b: b, precision, Alone(), 2, answers=answers).finite


def spoil(monkeypatch, spoils):
    """Make evaluations not finite: `spoils` gets their number, from 1 (raw and EMA weights in turn)."""
    seen = []

    def evaluate_and_spoil(*args, **kwargs):
        seen.append(1)
        result = evaluate(*args, **kwargs)
        if not spoils(len(seen)):
            return result
        return Accuracy(result.images, result.images, result.images, float("nan"), result.seconds)

    monkeypatch.setattr(validation, "evaluate", evaluate_and_spoil)


def test_run_whose_last_evaluation_is_not_finite_ends_with_an_error_each_time(small_cfg, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, lambda number: number % 2 == 1)  # the raw weights, which are the headline
    text = fails(lambda: run_here(small_cfg, tmp_path), capsys, status=1)
    assert "the evaluation of the raw weights is not finite (loss nan)" in text
    run = tmp_path / "small"
    assert not (run / "done").exists()
    assert not (run / "best_raw.safetensors").exists()
    assert (run / "best_ema.safetensors").exists()
    found = [row for row in rows(run) if row["kind"] == "eval" and row["weights"] == "raw"]
    assert len(found) == 3
    assert not any(row["best"] for row in found)
    assert "is not finite" in (run / "log.txt").read_text()
    text = fails(lambda: run_here(small_cfg, tmp_path), capsys, status=1)  # the same command evaluates again
    assert "is not finite" in text
    monkeypatch.undo()
    assert run_here(small_cfg, tmp_path) == 0
    assert (run / "best_raw.safetensors").exists()


def test_evaluation_in_between_that_is_not_finite_is_a_warning(small_cfg, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, lambda number: number <= 2)
    assert run_here(small_cfg, tmp_path) == 0
    found = [row for row in rows(tmp_path / "small") if row["kind"] == "eval"]
    assert [row["best"] for row in found[:2]] == [False, False]
    assert load_state(tmp_path / "small" / LAST)["best"]["raw"]["epoch"] > 1


def test_eval_and_predict_of_finite_weights_that_overflow_end_with_an_error(small_cfg, tmp_path, pictures, capsys):
    weights = timm.create_model("test_efficientnet", num_classes=3).state_dict()
    for weight in weights.values():
        if weight.ndim == 4:
            weight.mul_(1e15)  # finite; the activations are not
    path = tmp_path / "w.pth"
    torch.save(weights, path)
    numbers = tmp_path / "a.json"
    text = fails(lambda: evaluate_file(small_cfg, path, "--json", numbers), capsys, status=1)
    assert "the evaluation of the raw weights of" in text
    assert json.loads(numbers.read_text())["results"]["raw"]["loss"] is None
    argv = [str(path), str(pictures / "val"), "--model", "test_efficientnet", "--device", "cpu"]
    assert "are not finite" in fails(lambda: predict(argv), capsys, status=1)
