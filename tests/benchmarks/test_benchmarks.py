"""The benchmarks: they run, count exactly and report errors. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import kernels, memory, record, roofline, step, throughput, timing, trainer
from benchmarks.baselines import ModelStep, Ours, parse_baseline
from tests.helpers.small_models import shrunken

ROOT = Path(__file__).parents[2]
TINY = ["--models", "groupmixformer_mobile", "--size", "32", "--rounds", "1", "--seconds", "0", "--device", "cpu"]
FLOOR = ["--bandwidth", "10", "--tflops", "0.1"]


@pytest.fixture(autouse=True)
def small_variants(monkeypatch):
    """Measure cut-down models."""
    monkeypatch.setattr(Ours, "build", lambda self, size, device: shrunken(self.name, num_classes=1000, img_size=size))


class Baselines:
    @staticmethod
    def convolution():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))

    groupmixformer_mobile = convolution
    broken = list

    @staticmethod
    def raises():
        return nn.Linear(3, 5)


@pytest.fixture
def baselines(monkeypatch):
    monkeypatch.setitem(sys.modules, "somebodys", Baselines)


def test_step_writes_its_measurements(tmp_path, capsys, baselines):
    out = tmp_path / "found"
    flags = [*TINY, *FLOOR, "--batch", "2", "--out", str(out)]
    assert step.main([*flags, "--baseline", "theirs=somebodys:{model}", "--opponent", "bad=somebodys:raises"]) == 0
    assert step.main([*flags, "--modes", "infer", "--compile", "--backend", "eager", "--append"]) == 0
    first, second = json.loads(out.with_suffix(".json").read_text())["runs"]
    rows = {(row["mode"], row["contender"]): row for row in first["rows"]}
    trained, asked = ("ours", "theirs", "bad"), ("ours", "ours, folded", "theirs", "bad")
    assert list(rows) == [("train", name) for name in trained] + [("infer", name) for name in asked]
    assert rows["infer", "ours, folded"]["images_per_s"] > 0
    for mode in ("train", "infer"):
        ours, theirs, bad = (rows[mode, name] for name in ("ours", "theirs", "bad"))
        assert theirs["ratio"] == [1, 1, 1]
        assert ours["ratio"][0] == pytest.approx(ours["images_per_s"] / theirs["images_per_s"])
        assert "failed" in bad
        assert "images_per_s" not in bad
        assert ours["floor"] > ours["floor_added"] > 0
    assert rows["train", "ours"]["memory"] > rows["train", "theirs"]["memory"] > 0
    assert [row["contender"] for row in second["rows"]] == ["ours", "ours, folded", "ours, compiled"]
    assert first["facts"]["floor"].startswith("fp32: 10 GB/s, 0.10 TFLOP/s (as given)")
    page = out.with_suffix(".md").read_text()
    assert page.count("| groupmixformer_mobile | infer fp32 | ours |") == 2
    assert "--append" not in page
    assert "written to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "stvit_smal"], "stvit_small"),
        (["--modes", "trian"], "did you mean train"),
        (["--precision", "bf61"], "did you mean bf16"),
        (["--baseline", "somebodys:convolutio"], "did you mean convolution"),
        (["--baseline", "nobodys:convolution"], "No module named 'nobodys'"),
        (["--baseline", "somebodys"], "[NAME=]MODULE:FACTORY"),
        (["--baseline", "ours=somebodys:convolution"], "names two candidates"),
        (["--baseline", "somebodys:broken"], "gave list, not a model"),
        (["--backend", "inducter"], "torch.compile has"),
        (["--batch", "0"], "at least 1"),
    ],
)
def test_step_refuses_wrong_flags_with_the_remedy(capsys, baselines, flags, message):
    with pytest.raises(SystemExit) as stop:
        step.main([*TINY, *FLOOR, *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_baseline_is_parsed_with_and_without_name(baselines):
    assert parse_baseline("theirs=somebodys:{model}").name == "theirs"
    assert parse_baseline("somebodys:convolution").name == "convolution"
    assert isinstance(parse_baseline("somebodys:{model}").build("groupmixformer_mobile"), nn.Module)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.linear = nn.Linear(8, 5, bias=False)

    def forward(self, x):
        x = self.depthwise(self.conv(x))
        tokens = x.flatten(2).transpose(1, 2)[:, None].contiguous()  # as fused attention wants it
        y = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0]
        return self.linear(nn.functional.gelu(y))


def test_floor_counts_operations_and_bytes():
    net, pixels = Layers(), 2 * 4 * 4
    products = pixels * (27 * 8 + 9 * 8 + 8 * 5), 2 * 16 * 16 * 8 * 2
    weights = 216 + 72 + 40
    # each of image, two maps (written, read), q k v and output of attention, classes; attention's sums of exponents aside
    touched = pixels * (3 + 8 + 8 + 8 + 3 * 8 + 8 + 8 + 5)
    infer = roofline.work_of(net, (2, 3, 4, 4), "fp32", train=False)
    assert infer.operations == 2 * sum(products)
    assert 0 <= infer.bytes - 4 * (touched + weights) <= 4 * pixels
    train = roofline.work_of(net, (2, 3, 4, 4), "fp32", train=True)
    first = pixels * 27 * 8  # the images' gradient is not wanted
    assert train.operations == 2 * (3 * products[0] - first + 3.5 * products[1])
    half = roofline.work_of(net, (2, 3, 4, 4), "bf16", train=False)
    assert half.bytes < 0.6 * infer.bytes
    assert net.linear.weight.grad is None
    assert roofline.Work(6, 8).seconds(roofline.Machine(4, 2, "")) == (3, 5)


def test_kept_bytes_are_what_autograd_keeps():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 1000), nn.Softplus())
    kept = ModelStep(linear, linear, 2, 4, "fp32").kept_bytes()
    logits = 2 * 1000 * 4
    assert (
        2 * logits <= kept <= 3 * logits + 100
    )  # Softplus's input, log_softmax's output, labels; no weights, no images


def test_turns_alternate_and_ratios_are_by_round():
    called = []
    candidates = {name: lambda name=name: called.append(name) for name in "ab"}
    found = timing.in_turn(candidates, 2, 0, torch.device("cpu"))
    assert "".join(called) == "ab" + "ab" + "ba"
    assert [len(values) for values in found.values()] == [2, 2]
    assert timing.ratios([2.0, 3.0, 8.0], [1.0, 3.0, 2.0]) == timing.Spread(2.0, 1.0, 4.0)


def test_throughput_takes_each_batch_size(tmp_path, capsys):
    out = tmp_path / "found"
    assert throughput.main([*TINY, *FLOOR, "--modes", "train", "--batches", "2,3", "--out", str(out)]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["runs"][0]["rows"]
    assert [row["batch"] for row in rows] == [2, 3]
    assert "ratio" not in out.with_suffix(".md").read_text()  # to nothing
    assert throughput.main([*TINY, *FLOOR, "--modes", "infer", "--batches", "1", "--out", str(out)]) == 0
    text = out.with_suffix(".md").read_text()
    assert "| ratio | its lowest .. highest |" in text
    assert "| ours, folded |" in text
    compiled = ["--modes", "infer", "--batches", "1", "--compile", "--backend", "eager", "--out", str(out)]
    assert throughput.main([*TINY, *FLOOR, *compiled]) == 0
    text = out.with_suffix(".md").read_text()
    assert "| ratio | its lowest .. highest |" in text
    assert "| ours, compiled |" in text
    with pytest.raises(SystemExit):
        throughput.main([*TINY, "--batches", "1,x"])
    assert "numbers with commas" in capsys.readouterr().err


def test_memory_estimate_is_exact_for_the_batch_it_names(tmp_path):
    out, model = tmp_path / "found", Ours.named("stvit_small")
    assert (
        memory.main(["--models", "stvit_small", "--gib", "1", "--size", "32", "--out", str(out), "--device", "cpu"])
        == 0
    )
    plain, saving = json.loads(out.with_suffix(".json").read_text())["runs"][0]["rows"]
    assert saving["batch"] > 1.5 * plain["batch"] > 0
    net, batch = model.build(32, torch.device("cpu")), plain["batch"]
    autocast = memory.Precision("bf16", torch.device("cpu")).autocast
    whole = memory.estimate(net, lambda m: torch.optim.AdamW(m.parameters()), True, (batch, 3, 32, 32), autocast)
    assert plain["bytes"] == pytest.approx(whole.total, rel=0.01)
    assert plain["bytes"] <= 2**30 < plain["bytes"] + plain["bytes_an_image"]


def test_gpu_script_in_small_measures_and_survives_a_part_that_fails(tmp_path):
    command = ["bash", "benchmarks/gpu.sh", "--small", "--out", str(tmp_path), "--parts", "machine,step,memory"]
    done = subprocess.run(
        [*command, "--models", "mistyped"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 1
    printed = (tmp_path / "parts.txt").read_text().splitlines()
    assert [line.split(" (")[0] for line in printed if "dali" not in line] == [
        "machine: done",
        "step: failed with status 2",
        "memory: done",
    ]
    summary = (tmp_path / "summary.md").read_text()
    assert "'mistyped' is unknown" in summary
    assert "| groupmixformer_mobile | bf16 | all blocks |" in summary


def test_gpu_script_begins_nothing_after_its_time(tmp_path):
    command = ["bash", "benchmarks/gpu.sh", "--small", "--seconds", "4", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )
    assert done.returncode == 1
    printed = (tmp_path / "parts.txt").read_text().splitlines()
    parts = [line.split(":")[0] for line in printed if ": not begun" in line]
    assert parts[:8] == ["machine", "tests", "step", "trainer", "compile", "memory", "kernels", "fp16"]
    assert "machine: not begun" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("fixed", "per_image", "limit", "most"),
    [(1000, 10, 5000, 4096), (1000, 3000, 80000, 4096), (10, 1, 10**6, 512), (100, 1000, 500, 64), (1, 90, 220, 64)],
)
def test_largest_batch_is_found_in_few_trials(fixed, per_image, limit, most):
    tried = []

    def peak(batch):
        tried.append(batch)
        used = fixed + per_image * batch + 37 * batch % 11
        return used if used <= limit else 0

    found, used = memory.largest_fitting(peak, limit, most)
    trials = len(tried)
    largest = max([batch for batch in range(1, most + 1) if peak(batch)], default=0)
    assert 0.96 * largest - 1 <= found <= largest
    assert used == (peak(found) if found else 0)
    assert trials <= 8


def test_rows_are_on_disk_before_the_floor_is_counted(tmp_path, monkeypatch):
    def count(self, model, rows):
        (run,) = json.loads((tmp_path / "found.json").read_text())["runs"]
        assert run["rows"][0]["images_per_s"] > 0
        raise KeyboardInterrupt

    monkeypatch.setattr(step.Bench, "add_floor", count)
    with pytest.raises(KeyboardInterrupt):
        step.main([*TINY, *FLOOR, "--batch", "2", "--modes", "infer", "--out", str(tmp_path / "found")])
    assert "| groupmixformer_mobile | infer fp32 | ours |" in (tmp_path / "found.md").read_text()


def test_gpu_script_names_the_package_that_is_missing(tmp_path):
    python = tmp_path / "python"  # as one without yacs
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    command, env = ["bash", "benchmarks/gpu.sh", "--out", str(tmp_path / "out")], {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert "No module named" in done.stderr
    assert f"{python} -m pip install timm yacs rich safetensors pytest" in done.stderr


def test_a_call_is_timed_once_at_least():
    calls = []
    assert kernels.seconds(lambda: calls.append(1), torch.device("cpu"), 0) >= 0
    assert calls == [1]


def test_trainer_overhead_is_measured(tmp_path):
    out = tmp_path / "found"
    flags = ["--batch", "2", "--updates", "1", "--rounds", "1", "--device", "cpu", "--amp", "off", "--out", str(out)]
    subprocess.run(
        [sys.executable, "benchmarks/trainer.py", "--cfg", "configs/groupmixformer/mobile_64.yaml", *flags],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (row,) = json.loads(out.with_suffix(".json").read_text())["runs"][0]["rows"]
    assert row["overhead"][0] == pytest.approx(row["whole"][0] / row["bare"][0] - 1)
    assert row["within"][0] == pytest.approx(row["whole"][0] / row["pieces"][0] - 1)
    assert 0 < row["pieces"][0] < row["whole"][0]
    with pytest.raises(SystemExit):
        trainer.main(["--cfg", "configs/demo.yaml", "--processes", "1,x"])


def test_record_names_the_machine_and_the_command():
    metadata = record.metadata("benchmarks/x.py", ["--models", "a b", "--append"])
    assert metadata["command"] == "python benchmarks/x.py --models 'a b'"
    assert f"torch {torch.__version__}" in metadata["versions"]
    assert "cores of" in metadata["hardware"]
