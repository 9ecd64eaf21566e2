"""Weights from files of every layout, and how they are fitted to a model."""

import pytest
import torch
from torch import nn

from engine.checkpoint.files import save_state, save_weights
from models.weights import fit, load_warm_start, load_weights
from tests.helpers.damaged_files import damaged_file


def test_weights_and_metadata_survive_safetensors(tmp_path):
    weights = {"a": torch.randn(2, 3).to(memory_format=torch.contiguous_format), "n": torch.tensor(3)}
    save_weights(tmp_path / "w.safetensors", weights, {"model": "m", "classes": ["x", "y"]})
    read, metadata = load_weights(tmp_path / "w.safetensors")
    assert metadata["model"] == "m"
    assert metadata["classes"] == ["x", "y"]
    assert all(torch.equal(read[k], weights[k]) for k in weights)


def test_checkpoint_gives_raw_or_ema_weights(tmp_path):
    path = tmp_path / "c.pt"
    save_state(path, {"model": {"a": torch.zeros(1)}, "ema": {"a": torch.ones(1)}, "facts": {"model": "m"}})
    assert load_weights(path, "raw")[0]["a"] == 0
    assert load_weights(path, "ema")[0]["a"] == 1
    save_state(path, {"model": {"a": torch.zeros(1)}, "ema": None, "facts": {}})
    with pytest.raises(ValueError, match="no EMA weights"):
        load_weights(path, "ema")


@pytest.mark.parametrize("content", ["evil", "namespace", "garbage", "truncated", "empty"])
def test_damaged_or_foreign_file_is_refused_and_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    damaged_file(tmp_path / "c.pt", content)
    with pytest.raises(ValueError, match=r"c\.pt") as caught:
        load_weights(tmp_path / "c.pt")
    assert not (tmp_path / "evil").exists()
    assert ("exec" in str(caught.value)) == (content == "evil")


def test_missing_file_names_what_lies_there(tmp_path):
    save_weights(tmp_path / "best_raw.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"best_raw\.safetensors"):
        load_weights(tmp_path / "best.safetensors")


def test_damaged_safetensors_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        load_weights(tmp_path / "a.safetensors")


def test_fit_names_missing_unexpected_and_shapes():
    model = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="1 missing: bias") as caught:
        fit(model, {"weight": torch.zeros(3, 4), "other": torch.zeros(1)}, "file.pt")
    assert "1 unexpected: other" in str(caught.value)
    assert "weight is (3, 4) there, (3, 2) here" in str(caught.value)
    assert "file.pt" in str(caught.value)


def net(classes):
    model = nn.Sequential()
    model.body, model.head = nn.Linear(2, 2), nn.Linear(2, classes)
    model.default_cfg = {"classifier": "head"}
    return model


def test_initial_weights_keep_a_fitting_head_and_say_when_not():
    old, same, other = net(5), net(5), net(3)
    assert "all 4 tensors" in load_warm_start(same, old.state_dict(), "w")
    assert torch.equal(same.head.weight, old.head.weight)
    before = other.head.weight.clone()
    text = load_warm_start(other, old.state_dict(), "w")
    assert "5 classes there, 3 here" in text
    assert torch.equal(other.body.weight, old.body.weight)
    assert torch.equal(other.head.weight, before)


def test_initial_weights_that_lack_a_layer_are_refused():
    weights = net(5).state_dict()
    del weights["body.bias"]
    with pytest.raises(ValueError, match=r"body\.bias"):
        load_warm_start(net(3), weights, "w")
