"""The summary at the start of a run, --dry-run, and the estimate of memory."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import models  # noqa: F401  registers the families
import train as train_script
from common.byte_size import format_bytes
from engine.memory import Alive, activations, estimate, optimizer_share

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("[!_]*/*_[23]*4.yaml"))


def dry_run(path, output, *opts):
    out = io.StringIO()
    with redirect_stdout(out):
        assert train_script.main(["--cfg", str(path), "--output", str(output), "--dry-run", "--opts", *opts]) == 0
    return out.getvalue()


def test_there_are_two_recipes_for_each_variant():
    assert len(RECIPES) == 22


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_dry_run_summarizes_every_recipe_and_writes_nothing(path, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.summary.estimate", lambda *_: estimate(nn.Linear(1, 1), lambda m: torch.optim.SGD(m.parameters()),
                        False, (1, 1, 1, 1), torch.no_grad))  # fmt: skip
    text = dry_run(path, tmp_path)
    assert not list(tmp_path.iterdir())
    small = "groupmixformer" in path.parts or path.stem.endswith("384")
    assert f"{512 if small else 1024} = " in text
    assert "fits 1, 2, 4, 8 processes" in text
    assert "1,281,167 training and 50,000 validation images" in text
    assert f"{30 if path.stem.endswith('384') else 300} epochs of {2502 if small else 1251:,} updates" in text
    if path.parent.name == "stvit" and path.stem.endswith("384"):
        assert "inert       MODEL.DROP_PATH_RATE" in text
    else:
        assert "inert" not in text


def test_dry_run_shows_what_the_published_mode_changes(tmp_path):
    text = dry_run(
        ROOT / "configs/sgformer/small_224.yaml", tmp_path, "RECIPE.MODE", "published", "TRAIN.MICRO_BATCH", "2"
    )
    assert "300 + 10 cooldown epochs of 1,251 updates = 387,810 updates" in text
    assert "0: 1e-06  1: 5.095e-05" in text
    assert "19: 0.0009501  20: 0.0009892" in text
    assert "309: 1e-05" in text
    assert "the result is the averaged (EMA) weights'" in text
    assert "memory      about " in text


def test_run_logs_the_same_summary(small_cfg, tmp_path, capsys):
    assert train_script.main(["--cfg", str(small_cfg), "--output", str(tmp_path), "--opts", "TRAIN.EPOCHS", "1"]) == 0
    out = capsys.readouterr().out
    assert "8 = 4 images x 1 processes x 2 accumulation; fits 1, 2 processes" in out
    assert "weight decay 0.05: 18 tensors" in out
    assert "drop path 0.2" in out


def test_clipping_of_the_optimiser_itself_is_shown(tmp_path):
    text = dry_run(
        ROOT / "configs/groupmixformer/mobile_64.yaml", tmp_path, "OPTIM.NAME", "lamb", "TRAIN.CLIP_GRAD", "0"
    )
    assert "lamb, learning rate 0.001; no gradient clipping, lamb's own max_grad_norm 1" in text
    assert "betas (0.9, 0.999), eps 1e-06" in text


def test_dry_run_with_layer_decay_counts_layers(tmp_path, recwarn):
    text = dry_run(ROOT / "configs/stvit/small_64.yaml", tmp_path, "OPTIM.LAYER_DECAY", "0.75")
    assert "layer decay 0.75: 22 layers" in text
    assert not recwarn


def test_dry_run_takes_the_number_of_classes_without_data(tmp_path):
    assert "10 classes" in dry_run(ROOT / "configs/groupmixformer/mobile_64.yaml", tmp_path, "MODEL.NUM_CLASSES", "10")


def test_dry_run_and_eval_exclude_each_other(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_script.main(["--cfg", f"{ROOT}/configs/demo.yaml", "--output", str(tmp_path), "--dry-run", "--eval"])
    assert "--dry-run and --eval exclude each other" in capsys.readouterr().err


def test_activations_equal_those_of_a_real_forward_pass():
    model = timm.create_model("groupmixformer_mobile", drop_path_rate=0.1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counted = activations(model, (2, 3, 64, 64), torch.enable_grad)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    kept, own = {}, {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    real = sum(size for pointer, size in kept.items() if pointer not in own | {images.untyped_storage().data_ptr()})
    assert counted == pytest.approx(real, rel=0.02)
    del output


@pytest.mark.parametrize("name", ["groupmixformer_mobile", "test_vit"])
def test_activations_under_checkpointing_are_the_peak_of_both_passes(name):
    small = {} if name == "test_vit" else {"depths": (2, 1, 1, 1)}
    model = timm.create_model(name, drop_path_rate=0.1, **small).train()
    shape = (4, 3, 160, 160) if name == "test_vit" else (8, 3, 64, 64)
    without = activations(model, shape, torch.enable_grad)
    model.set_grad_checkpointing(True)
    counted = activations(model, shape, torch.enable_grad)
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), x)}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients are counted by themselves
    with Alive(own) as alive:
        model(x).sum().backward()
    assert counted == pytest.approx(alive.most, rel=0.05)
    assert counted < 0.8 * without


def test_summary_shows_backend_compilation_and_checkpointing(tmp_path):
    opts = ("OPTIM.BACKEND", "foreach", "TRAIN.COMPILE", "max-autotune")
    path = ROOT / "configs/groupmixformer/mobile_64.yaml"
    some = dry_run(path, tmp_path, *opts, "TRAIN.CHECKPOINT_BLOCKS", "3")
    assert "backend foreach; the host reads whether an update is finite, on CUDA a wait each" in some
    assert "gradient checkpointing: the first 3 blocks run again" in some
    assert "torch.compile max-autotune, once for each size of batch and image" in some
    text = dry_run(path, tmp_path)
    assert "backend fused" in text
    assert "a wait each" not in text
    assert "checkpointing" not in text


@pytest.mark.parametrize(("name", "share"), [("adamw", 2), ("lion", 1), ("sgd", 1)])
def test_optimiser_state_per_parameter_is_measured(name, share):
    make = lambda layer: timm.optim.create_optimizer_v2(layer.parameters(), name, lr=0.1, momentum=0.9)  # noqa: E731
    if name != "sgd":
        make = lambda layer: timm.optim.create_optimizer_v2(layer.parameters(), name, lr=0.1)  # noqa: E731
    assert optimizer_share(make) == pytest.approx(share, rel=0.01)


def test_bytes_are_formatted_with_units():
    assert (format_bytes(3 * 2**30), format_bytes(5 * 2**20)) == ("3.0 GiB", "5 MiB")
