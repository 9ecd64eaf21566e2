"""Entries of weights: prefixes of wrappers, counts of tools and plain values among them; values that are not finite."""

import json
import pickle
import subprocess
import sys
import warnings
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from yacs.config import CfgNode

import models  # noqa: F401  registers the families
from models.entries import check_finite, clean, count_not_finite
from models.file_kinds import TORCH, kind_of
from models.published import to_published
from models.weights import fit, load_weights
from tools.convert import convert

ROOT = Path(__file__).parents[2]
WEIGHTS = {"stem.weight": torch.ones(2, 3), "stem.bias": torch.zeros(2), "head.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "backbone.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.backbone.",
        "net.",
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefix_of_a_wrapper_is_removed_and_said(tmp_path, prefix, suffix):
    path = tmp_path / f"w{suffix}"
    wrapped = {prefix + name: tensor for name, tensor in WEIGHTS.items()}
    save_file(wrapped, path) if suffix == ".safetensors" else torch.save({"state_dict": wrapped, "epoch": 3}, path)
    weights, metadata = load_weights(path)
    assert weights.keys() == WEIGHTS.keys()
    assert metadata["notes"] == [f"removed the prefix {prefix} of all names"]


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ({"total_ops": torch.zeros(1), "total_params": torch.zeros(1)}, "total_ops, total_params"),
        ({"stem.total_ops": torch.zeros(1), "stem.total_params": torch.zeros(1)}, "stem.total_ops"),
        ({"n_averaged": torch.tensor(7)}, "n_averaged"),
        ({"epoch": 12}, "that are no tensors: epoch"),
        ({"epoch": 12, "best": 81.2, "arch": "x", "note": None}, "left out 4 entries that are no tensors"),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_other_entries_among_the_weights_are_left_out_and_said(tmp_path, more, note, inside):
    entries = WEIGHTS | more
    torch.save({"model": entries} if inside else entries, tmp_path / "w.pth")
    weights, metadata = load_weights(tmp_path / "w.pth")
    assert weights.keys() == WEIGHTS.keys()
    assert any(note in said for said in metadata["notes"])


def test_file_as_it_should_be_has_no_notes(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.pth")
    assert "notes" not in load_weights(tmp_path / "w.pth")[1]


def test_lightning_file_with_other_modules_names_the_prefix():
    model = nn.Sequential(OrderedDict(stem=nn.Linear(3, 2), head=nn.Linear(2, 4)))
    wrapped = {f"model.{name}": tensor for name, tensor in model.state_dict().items()} | {"loss.weight": torch.ones(4)}
    with pytest.raises(ValueError, match=r"most of its names begin with model\."):
        fit(model, clean(wrapped)[0], "w.ckpt")


@pytest.mark.parametrize("name", ["model", "backbone", "net"])
def test_custom_model_of_one_module_keeps_its_names(name):
    model = nn.Sequential(OrderedDict({name: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))}))
    weights, _ = clean(model.state_dict())
    model.load_state_dict(fit(model, weights, "w.pth"))


@pytest.mark.parametrize("published", [False, True])
def test_wrapped_weights_of_a_variant_are_identified(tmp_path, published):
    model = timm.create_model("groupmixformer_mobile", num_classes=3)
    own = to_published(model, model.state_dict()) if published else model.state_dict()
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in own.items()}}, tmp_path / "last.ckpt")
    weights, metadata = load_weights(tmp_path / "last.ckpt")
    done = convert(weights, metadata, None, False, "last.ckpt")
    assert done.metadata["model"] == "groupmixformer_mobile"
    assert "notes" not in done.metadata


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_value_that_is_not_finite_is_refused_at_load(tmp_path, value, dtype, suffix):
    bad = torch.ones(2, 3, dtype=dtype)
    bad[1, 2] = value
    entries, path = {**WEIGHTS, "stem.running_var": bad}, tmp_path / f"w{suffix}"
    save_file(entries, path) if suffix == ".safetensors" else torch.save({"model": entries}, path)
    with pytest.raises(ValueError, match=r"stem\.running_var \(1 of 6 values\)") as caught:
        load_weights(path)
    assert "in 1 of 4 tensors" in str(caught.value)
    assert "use an earlier or another checkpoint" in str(caught.value)


def test_all_weights_not_finite_name_the_first():
    bad = {f"w{i}": torch.full((2,), torch.nan) for i in range(9)}
    with pytest.raises(ValueError, match=r"9 of 9 tensors: w0 \(2 of 2 values\), .*, \.\.\.;"):
        check_finite(bad, "w.pth")


def test_only_floating_point_values_are_counted():
    assert count_not_finite(torch.tensor([1, 2])) == 0
    assert count_not_finite(torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn)) == 1
    assert count_not_finite(torch.zeros(0)) == 0
    assert count_not_finite(12) == 0


@pytest.mark.parametrize("variant", ["groupmixformer_mobile", "sgformer_small"])
def test_published_file_is_read_by_timm_after_import_models_alone(tmp_path, variant):
    """The models' import registers the allow-list: nothing else is imported in a fresh interpreter."""
    model = timm.create_model(variant, num_classes=3)
    theirs = to_published(model, model.state_dict())
    config = CfgNode({"MODEL": {"TYPE": "theirs"}})
    torch.save(
        {"model": theirs, "config": config, "args": Namespace(lr=1e-3, output_dir=Path("x"))}, tmp_path / "a.pth"
    )
    code = (
        "import models, sys, timm\n"
        "timm.create_model(sys.argv[1], num_classes=3, checkpoint_path=sys.argv[2])\n"
        "assert 'models.weights' not in sys.modules"
    )
    argv = [sys.executable, "-c", code, variant, str(tmp_path / "a.pth")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_value_that_is_not_finite_is_refused_through_timm(tmp_path, value, suffix):
    own = timm.create_model("groupmixformer_mobile", num_classes=3).state_dict()
    name, path = next(key for key in own if key.endswith("running_var")), tmp_path / f"w{suffix}"
    own[name][0] = value
    save_file(own, path) if suffix == ".safetensors" else torch.save({"model": own}, path)
    with pytest.raises(ValueError, match=rf"{name} \(1 of"):
        timm.create_model("groupmixformer_mobile", num_classes=3, checkpoint_path=str(path))


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (lambda: torch.eye(4).to_sparse(), "sparse or nested"),
        (lambda: torch.eye(4).to_sparse_csr(), "sparse or nested"),
        (quantised, "quantised"),
        (lambda: torch.ones(4, dtype=torch.complex64), "complex"),
        (lambda: torch.ones(4, device="meta"), "without values"),
    ],
)
def test_tensors_of_a_kind_that_is_not_read_are_named(tmp_path, tensor, kind):
    torch.save({"model": {**WEIGHTS, "odd": tensor()}}, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=rf"w.pth .*holds tensors of a kind that is not read: .*{kind}.*; save them again"
    ):
        load_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("facts", ["a text", [1, 2], 3, {"weights": "both"}, {"weights": ["raw"]}])
def test_metadata_of_another_program_are_left_out(tmp_path, facts):
    torch.save({"model": WEIGHTS, "facts": facts}, tmp_path / "w.pth")
    save_file(WEIGHTS, tmp_path / "w.safetensors", {"retoken": json.dumps(facts)})
    for name in ("w.pth", "w.safetensors"):
        weights, metadata = load_weights(tmp_path / name)
        assert sorted(weights) == sorted(WEIGHTS)
        assert (metadata["weights"], metadata["holds"]) == ("raw", ["raw"])


def test_header_that_is_no_json_is_named(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors", {"retoken": "{not json"})
    with pytest.raises(ValueError, match=r"w.safetensors is damaged: its header is no JSON"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_told_from_older_torch_files(tmp_path, protocol):
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
    with pytest.raises(ValueError, match="a pickle of other Python objects"):
        load_weights(path)
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    if protocol == 2:  # torch.save's own; its restricted reader warns of others
        assert sorted(load_weights(path)[0]) == sorted(WEIGHTS)
    else:
        assert kind_of(path)[0] == TORCH
