"""tools.inspect: counts of parameters, operations and activations, and their tables."""

import json

import pytest
import torch
from rich.console import Console

from models.build import retoken_models
from tests.helpers.small_models import SMALLEST
from tools import inspect
from tools.inspect import Measures, header, main, measure, stages
from tools.tables import aligned_columns, terminal_table

PUBLISHED = {"groupmixformer_mobile": (5.7, 1.4), "sgformer_small": (22.5, 4.8), "stvit_small": (25, 4.4)}  # M, G


def test_counts_of_known_models_are_the_known_ones():
    residual = measure("resnet18", [224], latency=False)
    assert residual.parameters == 11_689_512
    assert residual.macs[224] == 1_814_073_344
    assert residual.activations == 64 * (112**2 + 4 * 56**2) + 5 * (128 * 28**2 + 256 * 14**2 + 512 * 7**2) + 1000


def test_attention_products_are_counted():
    tokens, dim, depth, classes = 197, 192, 12, 1000
    products = 2 * tokens**2 * dim
    layers = 12 * dim**2 * tokens
    want = depth * (layers + products) + (tokens - 1) * 3 * 16**2 * dim + classes * dim
    assert measure("vit_tiny_patch16_224", [224], latency=False).macs[224] == want


@pytest.mark.parametrize("name", SMALLEST)
def test_our_models_count_as_published(name):
    parameters, gmacs = PUBLISHED[name]
    found = measure(name, [224], latency=False)
    assert found.parameters / 1e6 == pytest.approx(parameters, rel=0.03)
    assert found.macs[224] / 1e9 == pytest.approx(gmacs, abs=0.07)
    assert found.latency_ms is None


def test_columns_are_aligned_and_plain(capsys, monkeypatch):
    counted = []

    def quick(name, sizes, latency, batch):
        counted.append(name)
        macs = dict.fromkeys(sizes, 1_234_000_000)
        return Measures(name, 5_700_000, macs, 16_400_000, 12.3 if latency else None, batch * 2**24 or None)

    monkeypatch.setattr(inspect, "measure", quick)
    assert main(["--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert counted == retoken_models()
    assert len(lines) == 1 + 11 + 1
    assert lines[0].split("  ")[0] == "model"
    assert "GMACs 224  GMACs 384  activations M 224  latency ms 224  training GiB 224 x 64" in lines[0]
    assert lines[1].split() == ["groupmixformer_base", "5.70", "1.23", "1.23", "16.4", "12", "1.00"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "1 per multiply-add" in lines[-1]
    assert main(["stvit_base", "--size", "32", "--no-latency", "--memory", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "params", "M", "GMACs", "32", "activations", "M", "32"]
    assert lines[1].split() == ["stvit_base", "5.70", "1.23", "16.4"]


def test_table_of_a_terminal_has_the_same_cells():
    console = Console(width=120, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(terminal_table(header([224], True), [["stvit_base", "52", "9.9", "24", "13"]], numeric=True))
    assert "stvit_base" in capture.get()
    assert "latency ms 224" in capture.get()
    assert aligned_columns([["a", "b"], ["long", "1"]], numeric=True) == ["a     b", "long  1"]


@pytest.mark.parametrize("name", ["stvit_small", "test_vit"])
def test_parts_add_up_to_the_model(name):
    parts, whole = stages(name, 64), measure(name, [64], latency=False)
    if name == "stvit_small":
        assert [part.name for part in parts if part.name.startswith("stages")] == [f"stages.{i}" for i in range(4)]
        assert sum(part.parameters for part in parts) == whole.parameters
    assert sum(part.macs for part in parts) == whole.macs[64]
    assert sum(part.activations for part in parts) == whole.activations
    assert parts[-1].name == "head"
    assert parts[-1].output == (1000,)


def test_training_memory_is_that_of_the_report():
    found = measure("test_efficientnet", [32], latency=False, batch=8)
    weights = 4 * found.parameters
    assert found.memory > 4 * weights  # weights, gradients, two moments, and something for the backward pass
    assert measure("test_efficientnet", [32], latency=False, batch=16).memory > found.memory


def test_markdown_and_json_hold_the_same_numbers(capsys):
    argv = ["test_efficientnet", "--size", "32", "--no-latency", "--stages"]
    assert main([*argv, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | params M | GMACs 32 | activations M 32 | training GiB 32 x 64 |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert any(line.startswith("| test_efficientnet at 32 | output |") for line in lines)
    assert main([*argv, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert f"{found['parameters'] / 1e6:.2f}" == lines[2].split(" | ")[1]
    assert sum(part["parameters"] for part in found["parts"]) == found["parameters"]


def test_latency_is_measured(monkeypatch):
    monkeypatch.setattr(inspect, "RUNS", 1)
    assert 0 < measure("test_efficientnet", [32], latency=True).latency_ms < 60_000
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stvit_smal"], "did you mean stvit_small"),
        ([], "or --all"),
        (["stvit_small", "--all"], "or --all"),
        (["stvit_small", "--size", "0"], "--size 0"),
        (["stvit_small", "--memory", "-1"], "--memory -1"),
        (["--al"], "did you mean --all"),
        (["stvit_small", "--sizes", "3"], "did you mean --size"),
    ],
)
def test_mistake_is_an_error_with_a_hint(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
