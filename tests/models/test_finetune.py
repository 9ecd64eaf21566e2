"""Fine-tuning: from 224 weights at 384, and to classes of one's own, for every family."""

import pytest
import timm
import torch
from safetensors.torch import load_file

import config
import models  # noqa: F401  registers the families
import train as train_script
from engine.checkpoint.files import load_state, save_weights
from models.published import to_published
from tests.conftest import ROOT

SMALLEST = {"sgformer": "small", "stvit": "small", "groupmixformer": "mobile"}
TINY = (
    *(
        "DATA.IMG_SIZE",
        "96",
        "DATA.EVAL_RESIZE",
        "96",
        "DATA.WORKERS",
        "0",
        "TRAIN.EPOCHS",
        "1",
        "TRAIN.GLOBAL_BATCH",
        "24",
    ),
    *("TRAIN.MICRO_BATCH", "12", "TRAIN.AMP", "off", "DEVICE", "cpu", "SCHEDULE.WARMUP_EPOCHS", "0", "LOG.EVERY", "1"),
    *("LOG.TENSORBOARD", "false", "EMA.DECAY", "0", "RECIPE.HEADLINE", "raw"),
)


def start_weights(family, path, classes, layout):
    """Write weights of a model for 64 pixels, ours or under the published names."""
    torch.manual_seed(0)
    model = timm.create_model(f"{family}_{SMALLEST[family]}", img_size=64, num_classes=classes)
    if layout == "published":
        torch.save({"model": to_published(model, model.state_dict())}, path)
    else:
        save_weights(path, model.state_dict(), {"model": f"{family}_{SMALLEST[family]}", "num_classes": classes})
    return model


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ours", "published"])
@pytest.mark.parametrize("family", SMALLEST)
def test_384_recipe_starts_from_smaller_weights(family, layout, pictures, tmp_path, capsys):
    source = tmp_path / ("start.pth" if layout == "published" else "start.safetensors")
    start = start_weights(family, source, 3, layout)
    recipe = f"{ROOT}/configs/{family}/{SMALLEST[family]}_384.yaml"
    argv = ["--cfg", recipe, "--data-path", str(pictures), "--output", str(tmp_path / "out"), "--init", str(source)]
    assert train_script.main([*argv, "--tag", "t", "--opts", *TINY]) == 0
    printed = capsys.readouterr().out
    assert "the classifier included" in printed
    assert ("stem.pos_embed was resized to (1, 576, 64)" in printed) == (family == "sgformer")
    assert ("inert       MODEL.DROP_PATH_RATE 0.1: TRAIN.EVAL_MODE" in printed) == (family == "stvit")
    (run,) = (tmp_path / "out").iterdir()
    end = load_state(run / "checkpoints/update-00000002.pt")["model"]
    begin = start.state_dict()
    moved = (end["head.weight"] - begin["head.weight"]).abs().max()
    assert 0 < moved < 1e-3  # a fine-tuning rate: still the weights it began with
    statistics = [name for name in begin if name.endswith("running_mean")]
    assert all(torch.equal(end[name], begin[name]) == (family == "stvit") for name in statistics)


@pytest.mark.parametrize("family", SMALLEST)
def test_custom_classes_train_from_a_thousand(family, pictures, tmp_path, capsys):
    """Three classes: fewer than the five of top-5 accuracy."""
    source = tmp_path / "start.safetensors"
    start_weights(family, source, 1000, "ours")
    recipe = f"{ROOT}/configs/{family}/{SMALLEST[family]}_64.yaml"
    argv = ["--cfg", recipe, "--data-path", str(pictures), "--output", str(tmp_path / "out"), "--init", str(source)]
    opts = [*TINY, "DATA.IMG_SIZE", "64", "DATA.EVAL_RESIZE", "64"]
    assert train_script.main([*argv, "--opts", *opts]) == 0
    printed = capsys.readouterr().out
    assert "the classifier stays freshly initialised: it has 1000 classes there, 3 here" in printed
    assert "top-5 100.000 (15/15)" in printed
    (run,) = (tmp_path / "out").iterdir()
    assert load_file(run / "best_raw.safetensors")["head.weight"].shape[0] == 3


def test_small_image_recipes_name_their_measurement():
    for family, variant in SMALLEST.items():
        path = ROOT / f"configs/{family}/{variant}_64.yaml"
        assert config.load(str(path)).DATA.IMG_SIZE == 64
        named = next(word for word in path.read_text().split() if word.startswith("benchmarks/results/"))
        assert (ROOT / named.rstrip(".")).is_file()
