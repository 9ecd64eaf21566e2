"""tools.convert: files as the authors wrote them, to our names and back, bit by bit; and all that reads such files."""

import shutil
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from yacs.config import CfgNode

import eval as evaluation
import train as training
from engine.checkpoint.files import save_state
from models.identify import identify, on_meta
from models.published import constants, is_published, to_published
from models.weights import load_weights
from tests.helpers.damaged_files import Evil
from tests.helpers.small_models import NAMES
from tools.convert import convert, main

FAMILIES = {"sgformer_small": "timm", "groupmixformer_mobile": "swin", "stvit_small": "deit"}
DEPTHS = (3, 5, 9, 3)  # of stvit_small


def random_bits(model, seed):
    """Values for a model's entries in which every bit counts: floats of any finite value, counters."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values[name] = torch.randn(tensor.shape, generator=generator).mul_(0.02)
        else:
            values[name] = torch.tensor(100 + len(values))
    return {name: v.abs() + 0.5 if name.endswith("running_var") else v for name, v in values.items()}


def published_entries(name, seed, num_classes=3):
    """An OrderedDict as the authors' `model.state_dict()` gives it."""
    model = on_meta(name, num_classes=num_classes)
    theirs = to_published(model, random_bits(model, seed))
    if name == "stvit_small":
        for i, depth in enumerate(DEPTHS):
            for kind in ("unfold", "fold"):
                for j in range(depth):
                    theirs[f"layers.{i}.blocks.{j}.attn.{kind}.weights"] = torch.eye(9).reshape(9, 1, 3, 3)
    return OrderedDict((key, tensor.clone()) for key, tensor in theirs.items())


def as_written(layout, raw, ema):
    """Return a checkpoint in the layout of one of the three published trainers."""
    moments = {"step": torch.tensor(5.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    optimizer = {"state": defaultdict(dict, {0: moments}), "param_groups": [{"lr": 1e-3, "params": [0]}]}
    args = Namespace(model="theirs", lr=1e-3, output_dir=Path("ckpt"), device=torch.device("cpu"), mean=(0.5, 0.5))
    common = {"optimizer": optimizer, "epoch": 299, "lr_scheduler": {"t": 3, "base_values": [1e-3]}}
    scaler = {"scale": 65536.0, "_growth_tracker": 0}
    if layout == "timm":
        theirs = {
            "state_dict": raw,
            "state_dict_ema": ema,
            "arch": "sgformer",
            "args": args,
            "metric": np.float64(83.2),
        }
        return {**common, **theirs, "version": 2, "amp_scaler": scaler}
    if layout == "swin":
        config = CfgNode({"MODEL": {"TYPE": "groupmixformer", "DROP": None}, "TRAIN": {"LR": 1e-3, "STEPS": [1, 2]}})
        config.freeze()
        return {**common, "model": raw, "max_accuracy": np.float32(79.6), "config": config, "amp": OrderedDict()}
    return {**common, "model": raw, "model_ema": ema, "scaler": scaler, "args": args, "max_accuracy": 83.6}


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, tmp_path_factory):
    """A published file of each family and layout: path, model, raw and EMA entries (GroupMixFormer has no EMA)."""
    name = request.param
    path = tmp_path_factory.mktemp("published") / f"{name}.pth"
    raw = published_entries(name, 0)
    ema = None if FAMILIES[name] == "swin" else published_entries(name, 1)
    torch.save(as_written(FAMILIES[name], raw, ema), path)
    return path, name, {"raw": raw, "ema": ema} if ema else {"raw": raw}


def assert_bit_equal(got, want):
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype, key
        assert got[key].shape == tensor.shape, key
        assert torch.equal(got[key], tensor), key


def entries_of(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    assert len(content) == 1
    return content["state_dict" if "sgformer" in path.name else "model"]


@pytest.mark.parametrize(("first", "last"), [(".safetensors", ".pth"), (".pth", ".safetensors")])
def test_round_trip_is_bit_equal(published, tmp_path, capsys, first, last):
    source, name, weights = published
    for which, theirs in weights.items():
        ours, back = tmp_path / f"ours-{which}{first}", tmp_path / f"{name}-{which}{last}"
        assert main([str(source), str(ours), "--model", name, "--weights", which]) == 0
        printed = capsys.readouterr().out
        assert f"{FAMILIES[name]} layout" in printed
        assert ("EMA weights (" if which == "ema" else "raw weights") in printed
        assert ("it also holds" in printed) == (len(weights) == 2)
        assert f"{name} ({type(on_meta(name)).__name__}) under the published names, 3 classes" in printed
        assert main([str(ours), str(back), "--model", name, "--weights", which, "--to", "published"]) == 0
        assert f"{name} ({type(on_meta(name)).__name__}) under our names, 3 classes" in capsys.readouterr().out
        assert_bit_equal(entries_of(back), theirs)
        read, metadata = load_weights(ours, which)
        assert not is_published(on_meta(name), read)
        assert (metadata["model"], metadata["num_classes"], metadata["weights"]) == (name, 3, which)
        assert metadata["parameters"] == sum(p.numel() for p in on_meta(name, num_classes=3).parameters())


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_identified_and_converted_bit_by_bit(name):
    bits = torch.Generator().manual_seed(0)
    model = on_meta(name, num_classes=1)
    ours = {
        key: torch.randint(-(2**15), 2**15, t.shape, generator=bits, dtype=torch.int16).view(torch.bfloat16)
        for key, t in model.state_dict().items()
        if t.is_floating_point()
    }
    theirs = to_published(model, ours)
    theirs |= constants(model, theirs)
    assert (identify(ours).name, identify(ours).share) == (name, 1)
    there = convert(theirs, {}, None, published=False, source="file")
    assert there.metadata["model"] == name
    assert there.was_published
    back = convert(there.tensors, {}, name, published=True, source="file")
    assert not back.was_published
    assert ours.keys() == there.tensors.keys()
    assert theirs.keys() == back.tensors.keys()
    for key, tensor in theirs.items():
        assert torch.equal(back.tensors[key].view(torch.int16), tensor.view(torch.int16)), key


def test_weights_of_another_size_and_input_keep_it():
    weights = {
        key: torch.zeros(t.shape) for key, t in on_meta("sgformer_small", img_size=96, in_chans=1).state_dict().items()
    }
    done = convert(weights, {}, None, published=True, source="file")
    assert done.tensors["pos_embed"].shape == (1, 24 * 24, 64)
    assert done.tensors["patch_embed1.conv.0.c.weight"].shape[1] == 1
    weights["stem.pos_embed"] = torch.zeros(1, 24 * 32, 64)
    done = convert(weights, {"img_size": [96, 128]}, None, published=True, source="file")
    assert done.tensors["pos_embed"].shape == (1, 24 * 32, 64)
    with pytest.raises(ValueError, match="768 positions"):
        convert(weights, {}, "sgformer_small", published=True, source="file")


def test_weights_without_head_are_converted_without():
    model = on_meta("stvit_small", num_classes=0)
    done = convert({k: torch.zeros(t.shape) for k, t in model.state_dict().items()}, {}, None, True, "file")
    assert done.metadata["num_classes"] == 0
    assert "head.weight" not in done.tensors


def test_distributed_prefix_and_missing_counters_are_nothing_new(tmp_path):
    theirs = published_entries("groupmixformer_mobile", 0)
    few = {key: t for key, t in theirs.items() if not key.endswith("num_batches_tracked")}
    torch.save({"model": {f"module.{key}": t for key, t in few.items()}}, tmp_path / "in.pth")
    assert main([str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), "--to", "published"]) == 0
    assert_bit_equal(torch.load(tmp_path / "out.pth")["model"], few)


def test_files_of_old_torch_are_read(tmp_path, capsys):
    raw = published_entries("groupmixformer_mobile", 0)
    torch.save(as_written("swin", raw, None), tmp_path / "in.pth", _use_new_zipfile_serialization=False)
    assert main([str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]) == 0
    assert "groupmixformer_mobile" in capsys.readouterr().out


def refused(argv, capsys):
    """Return the error message of the tool, which exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_wrong_model_is_refused_with_what_it_is(published, tmp_path, capsys):
    source, name, _ = published
    for other in ("stvit_base", "sgformer_base", "groupmixformer_base"):
        printed = refused([source, tmp_path / "out.pth", "--model", other], capsys)
        assert str(source) in printed
        assert f"this is a {name}: give --model {name}" in printed
        assert ("of another shape: " if other.partition("_")[0] == name.partition("_")[0] else "missing: ") in printed
        assert list(tmp_path.iterdir()) == []


def test_incomplete_file_is_refused_with_the_missing_name(tmp_path, capsys):
    theirs = published_entries("groupmixformer_mobile", 0)
    del theirs["norm4.bias"]
    theirs["norm5.bias"] = torch.zeros(1)
    torch.save({"model": theirs}, tmp_path / "in.pth")
    printed = refused([tmp_path / "in.pth", tmp_path / "out.pth"], capsys)
    assert "1 missing: neck.bias" in printed
    assert "the nearest variant is groupmixformer_mobile, of which it holds 99." in printed


def test_deeper_variant_of_the_same_widths_is_refused(capsys):
    theirs = to_published(on_meta("sgformer_medium"), on_meta("sgformer_medium").state_dict())
    with pytest.raises(ValueError, match=r"unexpected: block2\.4\..*this is a sgformer_medium"):
        convert(theirs, {}, "sgformer_small", published=False, source="file")
    with pytest.raises(ValueError, match="missing: stages"):
        convert(on_meta("sgformer_small").state_dict(), {}, "sgformer_medium", published=False, source="file")


def test_weights_of_another_kind_are_refused(tmp_path, capsys):
    torch.save({"model": {"a.weight": torch.zeros(1)}}, tmp_path / "in.pth")
    assert "resembles no variant (a.weight" in refused([tmp_path / "in.pth", tmp_path / "out.pth"], capsys)
    printed = refused([tmp_path / "in.pth", tmp_path / "out.pth", "--model", "stvit_small"], capsys)
    assert "it resembles no variant" in printed
    printed = refused([tmp_path / "in.pth", tmp_path / "out.pth", "--model", "stvit_smal"], capsys)
    assert "--model='stvit_smal' is unknown: did you mean stvit_small" in printed
    printed = refused([tmp_path / "in.pth", tmp_path / "out.pth", "--model", "resnet50"], capsys)
    assert "one naming only" in printed


def test_weights_that_a_file_does_not_hold_are_refused(tmp_path, capsys):
    theirs = published_entries("groupmixformer_mobile", 0)
    torch.save(as_written("swin", theirs, None), tmp_path / "in.pth")
    save_state(tmp_path / "ema.pth", {"model": theirs, "ema": None, "facts": {"weights": "ema"}})
    assert "no EMA weights" in refused([tmp_path / "in.pth", tmp_path / "out.pth", "--weights", "ema"], capsys)
    assert "EMA weights only" in refused([tmp_path / "ema.pth", tmp_path / "out.pth", "--weights", "raw"], capsys)


def test_source_is_never_overwritten(tmp_path, monkeypatch, capsys):
    torch.save({"model": published_entries("groupmixformer_mobile", 0)}, tmp_path / "in.pth")
    before = (tmp_path / "in.pth").read_bytes()
    (tmp_path / "link.pth").symlink_to(tmp_path / "in.pth")
    (tmp_path / "hard.pth").hardlink_to(tmp_path / "in.pth")
    monkeypatch.chdir(tmp_path)
    for target in (tmp_path / "in.pth", "in.pth", "./link.pth", "hard.pth"):
        assert "is the file to be read" in refused([tmp_path / "in.pth", target], capsys)
    assert (tmp_path / "in.pth").read_bytes() == before


def test_target_that_cannot_be_is_refused(tmp_path, capsys):
    (tmp_path / "folder.pth").mkdir()
    assert "end it in .safetensors" in refused(["in.pth", "out.bin"], capsys)
    assert "there is no folder" in refused(["in.pth", tmp_path / "no" / "out.pth"], capsys)
    assert "is a folder" in refused(["in.pth", tmp_path / "folder.pth"], capsys)
    assert "in.pth does not exist" in refused([tmp_path / "in.pth", tmp_path / "out.pth"], capsys)
    assert "did you mean --weights" in refused(["in.pth", "out.pth", "--weight", "ema"], capsys)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    torch.save({"model": published_entries("groupmixformer_mobile", 0)}, tmp_path / "in.pth")
    (tmp_path / "out.pth").write_text("old")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in refused([tmp_path / "in.pth", tmp_path / "out.pth", "--to", "published"], capsys)
    assert (tmp_path / "out.pth").read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"in.pth", "out.pth"}


@pytest.mark.parametrize("layout", ["timm", "swin", "deit"])
def test_file_that_would_run_code_does_not(tmp_path, monkeypatch, capsys, layout):
    monkeypatch.chdir(tmp_path)
    content = as_written(layout, {"a": torch.zeros(1)}, {"a": torch.zeros(1)})
    content["config" if layout == "swin" else "args"] = Evil()
    torch.save(content, tmp_path / "in.pth")
    printed = refused(["in.pth", "out.pth"], capsys)
    assert "in.pth was not read: it would run or build" in printed
    assert "exec" in printed
    assert {p.name for p in tmp_path.iterdir()} == {"in.pth"}
    with pytest.raises(Exception, match="exec"):
        timm.create_model("groupmixformer_mobile", checkpoint_path="in.pth")
    assert {p.name for p in tmp_path.iterdir()} == {"in.pth"}


def test_timm_reads_published_files(published):
    source, name, weights = published
    model = timm.create_model(name, num_classes=3, checkpoint_path=str(source)).state_dict()
    want = weights.get("ema", weights["raw"])  # timm takes the EMA weights where there are some
    assert_bit_equal(to_published(on_meta(name, num_classes=3), model), without_kernels(want))


def without_kernels(entries):
    return {key: tensor for key, tensor in entries.items() if not key.endswith("fold.weights")}


def test_eval_reads_published_files(published, small_cfg, capsys):
    source, name, weights = published
    for which in weights:
        argv = ["--cfg", str(small_cfg), "--checkpoint", str(source), "--weights", which, "--opts", "MODEL.NAME", name]
        assert evaluation.main(argv) == 0
        printed = capsys.readouterr().out
        assert f"{name} from {source}, " in printed
        assert f"[{which} weights, " in printed
        assert "15 images" in printed


def test_train_starts_from_published_files(published, small_cfg, tmp_path, capsys):
    source, name, weights = published
    which = "ema" if "ema" in weights else "raw"
    opts = ["MODEL.NAME", name, "MODEL.INIT_WEIGHTS", which, "MODEL.DROP_PATH_RATE", "0"]
    argv = ["--cfg", str(small_cfg), "--output", str(tmp_path), "--init", str(source), "--eval", "--opts", *opts]
    assert training.main(argv) == 0
    assert "started from all" in capsys.readouterr().out
    shutil.rmtree(tmp_path)


def test_train_keeps_a_fresh_head_for_other_classes(small_cfg, tmp_path, capsys):
    name = "groupmixformer_mobile"
    torch.save(as_written("swin", published_entries(name, 0, num_classes=1), None), tmp_path / "in.pth")
    opts = ["MODEL.NAME", name, "MODEL.DROP_PATH_RATE", "0"]
    argv = ["--cfg", str(small_cfg), "--output", str(tmp_path), "--init", str(tmp_path / "in.pth")]
    assert training.main([*argv, "--opts", "TRAIN.EPOCHS", "1", *opts]) == 0
    assert "1 classes there, 3 here" in capsys.readouterr().out
