"""From a config to a model."""

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import register_model
from torch import nn

from config import load
from models.build import build_model, build_teacher, checkpoint_blocks
from tests.helpers.teachers import store


def config(name, drop_path_rate=0.0, size=64, *opts):
    numbers = ["MODEL.DROP_PATH_RATE", str(drop_path_rate), "DATA.IMG_SIZE", str(size), "DATA.EVAL_RESIZE", str(size)]
    cfg = load((), ["MODEL.NAME", name, *numbers, *opts])
    cfg.defrost()
    return cfg


def test_config_values_reach_the_model():
    cfg = config("groupmixformer_mobile", drop_path_rate=0.3)
    cfg.MODEL.DROP_RATE = 0.1
    model = build_model(cfg, num_classes=7)
    assert model.num_classes == 7
    assert model.head_drop.p == 0.1
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.3)


def test_timm_model_gets_the_image_size_only_if_it_takes_one():
    assert build_model(config("resnet18", size=96), 5).num_classes == 5
    assert build_model(config("vit_tiny_patch16_224", size=96), 5).patch_embed.img_size == (96, 96)


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"MODEL\.NAME='groupmixformer_tiy' is unknown: did you mean groupmixformer_tiny"
    ):
        build_model(config("groupmixformer_tiy"), 10)


def test_setting_a_model_does_not_take_is_refused():
    with pytest.raises(ValueError, match=r"vgg11.*drop_path_rate"):
        build_model(config("vgg11", drop_path_rate=0.1), 10)


def test_model_is_built_with_the_largest_drop_path_of_its_timeline():
    model = build_model(config("groupmixformer_mobile", 0.0, 64, "TIMELINE.DROP_PATH_RATE", "0:0.1, 5:0.3"), 10)
    assert max(m.drop_prob for m in model.modules() if isinstance(m, DropPath)) == pytest.approx(0.3)


def test_image_sizes_that_change_are_refused_for_a_model_of_one_size():
    with pytest.raises(ValueError, match=r"TIMELINE\.IMG_SIZE.*vit_tiny_patch16_224"):
        build_model(config("vit_tiny_patch16_224", 0.0, 64, "TIMELINE.IMG_SIZE", "0:32, 5:64"), 10)


def test_blocks_are_checkpointed_by_count():
    model = timm.create_model("groupmixformer_mobile", num_classes=3, depths=(2, 1, 3, 1))
    for count, want in ((4, [1, 1, 1, 1, 0, 0, 0]), (-1, [1] * 7), (0, [1] * 7)):  # 0 leaves it as it is
        checkpoint_blocks(model, count)
        assert [block.grad_checkpointing for stage in model.stages for block in stage.blocks] == want
    model.set_grad_checkpointing(False)
    assert not any(block.grad_checkpointing for stage in model.stages for block in stage.blocks)
    with pytest.raises(ValueError, match=r"CHECKPOINT_BLOCKS=8: GroupMixFormer has 7 blocks"):
        checkpoint_blocks(model, 8)


def test_models_of_timm_checkpoint_all_blocks_or_none():
    model = timm.create_model("test_vit", num_classes=3)
    checkpoint_blocks(model, -1)
    assert model.grad_checkpointing
    with pytest.raises(ValueError, match=r"CHECKPOINT_BLOCKS=2: models of timm's take all blocks or none"):
        checkpoint_blocks(model, 2)
    with pytest.raises(ValueError, match=r"CHECKPOINT_BLOCKS=-1: .* has no gradient checkpointing"):
        checkpoint_blocks(torch.nn.Linear(1, 1), -1)


@register_model
def bare_teacher(pretrained=False, num_classes=3, **kwargs):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))


@pytest.mark.parametrize("stated", [(), ("mean",), ("mean", "std")])
def test_teacher_without_a_pretrained_cfg_takes_what_its_weights_state(tmp_path, stated):
    metadata = {"model": "bare_teacher", "weights": "raw", **{key: [0.5, 0.4, 0.3] for key in stated}}
    store(tmp_path / "t.safetensors", "bare_teacher", metadata)
    opts = ["DISTILL.TYPE", "soft", "DISTILL.TEACHER", "bare_teacher", "DISTILL.TEACHER_WEIGHTS"]
    cfg = load((), [*opts, str(tmp_path / "t.safetensors")])
    if len(stated) < 2:
        with pytest.raises(ValueError, match=r"DISTILL\.TEACHER='bare_teacher'.* states .*std of its images; set them"):
            build_teacher(cfg, ["a", "b", "c"])
    else:
        model, _ = build_teacher(cfg, ["a", "b", "c"])
        assert model.pretrained_cfg["std"] == (0.5, 0.4, 0.3)
        assert model.pretrained_cfg["input_size"] == (3, 224, 224)
