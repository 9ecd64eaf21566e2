"""Timelines: values by epoch reach the images, the targets, drop path rates and the EMA decay; schedules that are refused."""

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import config
import train as train_script
from data.build import build_data
from engine.batch_plan import BatchPlan
from engine.build import build_state
from engine.checkpoint.files import load_state
from engine.drop_path import drop_path_setter
from engine.precision import Precision
from tests.helpers.small_runs import assert_same_state

ALL = (
    *(
        "TIMELINE.DROP_PATH_RATE",
        "0:0.1, 1:0.4",
        "TIMELINE.EMA_DECAY",
        "0:0.5 -> 2:0.9",
        "TIMELINE.MAGNITUDE",
        "0:0 -> 2:9",
    ),
    *("TIMELINE.MIX_PROB", "0:1, 2:0", "TIMELINE.IMG_SIZE", "0:32, 1:48, 2:64"),
)


def test_image_size_and_mixing_follow_the_epoch(small_cfg):
    cfg = config.load(str(small_cfg), [*ALL, "AUG.LABEL_SMOOTHING", "0"])
    data = build_data(cfg, 0, 1, "cpu")
    for epoch, size in enumerate((32, 48, 64)):
        for micro, batch in enumerate(data.train.epoch(epoch)):
            images, targets = data.stage.train(batch, micro // 2, micro % 2, epoch)
            assert images.shape == (4, 3, size, size)
            if epoch == 2:  # mixing is off: one-hot
                assert set(targets.flatten().tolist()) == {0.0, 1.0}
    first = next(iter(data.train.epoch(0)))
    assert 0 < float(data.stage.train(first, 0, 0, 0)[1].max()) < 1
    assert next(iter(data.val)).images.shape[-1] == 32


def test_image_size_follows_the_epoch_in_synthetic_data():
    opts = (
        "DATA.LOADER",
        "synthetic",
        "TRAIN.GLOBAL_BATCH",
        "4",
        "TRAIN.MICRO_BATCH",
        "4",
        "TIMELINE.IMG_SIZE",
        "0:32, 1:64",
    )
    data = build_data(config.load((), list(opts)), 0, 1, "cpu")
    assert [next(iter(data.train.epoch(epoch))).images.shape[-1] for epoch in (0, 1, 0)] == [32, 64, 32]


def test_magnitude_follows_the_epoch(small_cfg):
    data = build_data(config.load(str(small_cfg), list(ALL)), 0, 1, "cpu")
    transform = data.train._loader.dataset.transform
    assert [transform.policy_in(epoch).magnitude for epoch in (0, 1, 2)] == [0, 4.5, 9]
    assert transform.policy_in(0).std == 0.5


def state_of(model, *opts):
    cfg = config.load((), ["TRAIN.AMP", "off", *opts])
    return build_state(cfg, model, BatchPlan(8, 4, 0, 1, 10, 3), Precision("off", torch.device("cpu")))


def test_ema_decay_follows_the_epoch():
    state = state_of(nn.Linear(2, 2), "EMA.DECAY", "0.9", "TIMELINE.EMA_DECAY", "0:0.5 -> 2:0.9")
    for epoch, decay in enumerate((0.5, 0.7, 0.9)):
        state.schedule.begin_epoch(epoch)
        assert state.ema.get_decay() == pytest.approx(decay)


@pytest.mark.parametrize("name", ["groupmixformer_mobile", "convnext_atto"])
def test_drop_path_follows_the_epoch_in_our_models_and_timms(name):
    model = timm.create_model(name, drop_path_rate=0.4)
    built = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    schedule = state_of(model, "TIMELINE.DROP_PATH_RATE", "0:0.1, 1:0.4").schedule
    schedule.begin_epoch(0)
    quarter = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert quarter == pytest.approx([p / 4 for p in built])
    schedule.begin_epoch(1)
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)] == pytest.approx(built)


def test_drop_path_of_a_model_without_is_refused():
    with pytest.raises(ValueError, match=r"TIMELINE\.DROP_PATH_RATE has no effect: Linear"):
        drop_path_setter(nn.Linear(2, 2), 0.1)


def test_run_with_all_timelines_resumes_bitwise(small_cfg, tmp_path):
    argv = ["--cfg", str(small_cfg), "--opts", *ALL]
    assert train_script.main([*argv, "--output", str(tmp_path / "a")]) == 0
    assert train_script.main([*argv, "--output", str(tmp_path / "b")]) == 0
    (tmp_path / "b/small/checkpoints/update-00000018.pt").unlink()
    assert train_script.main([*argv, "--output", str(tmp_path / "b")]) == 0
    last = "small/checkpoints/update-00000018.pt"
    assert_same_state(tmp_path / "a" / last, tmp_path / "b" / last)


def test_training_in_evaluation_mode_freezes_statistics_and_drop_path(small_cfg, tmp_path):
    start = timm.create_model("test_efficientnet", num_classes=3)
    torch.save(start.state_dict(), tmp_path / "start.pt")
    argv = ["--cfg", str(small_cfg), "--init", str(tmp_path / "start.pt"), "--opts", "TRAIN.EVAL_MODE", "true"]
    assert train_script.main([*argv, "--output", str(tmp_path / "a")]) == 0
    end = load_state(tmp_path / "a/small/checkpoints/update-00000018.pt")["model"]
    for name, before in start.state_dict().items():
        if "running" in name or "tracked" in name:
            assert torch.equal(end[name], before), name
        elif name == "classifier.weight":
            assert not torch.equal(end[name], before)
    other = [*argv, "MODEL.DROP_PATH_RATE", "0.9", "--output", str(tmp_path / "b")]
    assert train_script.main(other) == 0
    again = load_state(tmp_path / "b/small/checkpoints/update-00000018.pt")["model"]
    torch.testing.assert_close(end, again, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("opts", "parts"),
    [
        (("TIMELINE.DROP_PATH_RATE", "0:1.5"), ("TIMELINE.DROP_PATH_RATE", "1.5", "0.999")),
        (("TIMELINE.EMA_DECAY", "0:0.9"), ("TIMELINE.EMA_DECAY", "EMA.DECAY is off")),
        (("TIMELINE.MAGNITUDE", "0:9", "AUG.RAND_AUGMENT", ""), ("TIMELINE.MAGNITUDE", "AUG.RAND_AUGMENT is off")),
        (("TIMELINE.IMG_SIZE", "0:100.5"), ("TIMELINE.IMG_SIZE", "whole numbers")),
        (("SCHEDULE.NAME", "multistep"), ("SCHEDULE.MILESTONES", "[150, 225]")),
        (("SCHEDULE.NAME", "cosin"), ("SCHEDULE.NAME", "did you mean cosine")),
        (("SCHEDULE.NAME", "multistep", "SCHEDULE.MILESTONES", "[9, 3]"), ("must rise", "[9.0, 3.0]")),
        (("RECIPE.HEADLINE", "ema"), ("RECIPE.HEADLINE=ema", "EMA.DECAY")),
        (("OPTIM.NAME", "sdg"), ("OPTIM.NAME", "did you mean sgd")),
    ],
)
def test_impossible_schedules_name_key_and_remedy(opts, parts):
    with pytest.raises(ValueError, match=r".") as caught:
        config.load((), list(opts))
    for part in parts:
        assert part in str(caught.value)
