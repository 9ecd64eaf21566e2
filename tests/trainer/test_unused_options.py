"""Options that are set and have no effect."""

import pytest
import timm

import config
from trainer.unused_options import unused_options


def unused(*opts):
    cfg = config.load((), list(opts))
    return list(unused_options(cfg, timm.create_model("test_efficientnet"), 1))


def test_no_option_is_unused_by_default():
    assert unused() == []


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (("MODEL.SYNC_BN", "true"), "MODEL.SYNC_BN: there is one process"),
        (("TRAIN.EVAL_MODE", "true", "MODEL.DROP_PATH_RATE", "0.1"), "MODEL.DROP_PATH_RATE 0.1: TRAIN.EVAL_MODE keeps"),
        (("OPTIM.NAME", "sgd", "OPTIM.EPS", "1e-6"), "OPTIM.EPS 1e-06: OPTIM.NAME sgd has none"),
        (("DIST.COMPRESS", "bf16"), "DIST.COMPRESS bf16: there is one process"),
        (("OPTIM.MOMENTUM", "0.8"), "OPTIM.MOMENTUM 0.8: OPTIM.NAME adamw has none"),
        (("SCHEDULE.NAME", "step", "SCHEDULE.MIN_LR", "0.0001"), "SCHEDULE.MIN_LR 0.0001: SCHEDULE.NAME step"),
        (("AUG.MIX_PROB", "0", "AUG.MIXUP", "0.5"), "AUG.MIXUP 0.5: AUG.MIX_PROB is 0"),
        (
            ("AUG.CUTMIX", "0", "AUG.MIX_SWITCH_PROB", "0.7"),
            "AUG.MIX_SWITCH_PROB 0.7: only one of mixup and cutmix is on",
        ),
        (
            ("TIMELINE.DROP_PATH_RATE", "0:0, 300:0.4"),
            "TIMELINE.DROP_PATH_RATE 0:0, 300:0.4: the run ends before epoch 300",
        ),
        (
            ("AUG.MIXUP", "0", "AUG.CUTMIX", "0", "TIMELINE.MIX_PROB", "0:1, 9:0"),
            "TIMELINE.MIX_PROB 0:1, 9:0: AUG.MIXUP and",
        ),
        (("MODEL.INIT_WEIGHTS", "ema"), "MODEL.INIT_WEIGHTS ema: MODEL.INIT is not set"),
        (("DISTILL.ALPHA", "0.3"), "DISTILL.ALPHA 0.3: DISTILL.TYPE is none"),
        (("EVAL.CROP_PCT", "0.9", "DATA.EVAL_RESIZE", "230"), "DATA.EVAL_RESIZE 230: EVAL.CROP_PCT sets the size"),
        (("AUG.ERASE_PROB", "0", "AUG.ERASE_MODE", "rand"), "AUG.ERASE_MODE rand: AUG.ERASE_PROB is 0"),
        (
            ("AUG.MIX_PROB", "0.5", "TIMELINE.MIX_PROB", "0:1, 5:0"),
            "AUG.MIX_PROB 0.5: TIMELINE.MIX_PROB takes its place",
        ),
    ],
)
def test_unused_options_are_named_with_the_reason(opts, expected):
    assert any(text.startswith(expected) for text in unused(*opts)), unused(*opts)
