"""The recipes against the numbers of the published trainers, at several world sizes and accumulations, in both modes.

The figures are those measured on the authors' code, written down in docs/recipes.md.
"""

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import config
import models  # noqa: F401  registers the families
from data.stream import IndexStream
from engine.build import build_learning_rate, build_optimizer, build_plan, build_state
from engine.distributed import Processes
from engine.precision import Precision
from engine.run import differences

ROOT = Path(__file__).parent.parent
FAMILIES = {
    "sgformer": ("small", "medium", "base"),
    "groupmixformer": ("mobile", "tiny", "small", "base", "large"),
    "stvit": ("small", "base", "large"),
}
VARIANTS = [(family, variant) for family, variants in FAMILIES.items() for variant in variants]
IMAGES = 1_281_167
DIVISIONS = [(1, 128), (8, 128), (4, 32), (16, 64)]  # processes, micro-batch


def recipe(family, variant, size=224, mode="corrected", *opts):
    return config.load(f"{ROOT}/configs/{family}/{variant}_{size}.yaml", ["RECIPE.MODE", mode, *map(str, opts)])


def trace(cfg, world, micro):
    """Return the run's plan and its learning rate as a function of the update."""
    micro = min(micro, cfg.TRAIN.GLOBAL_BATCH // world)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TRAIN.MICRO_BATCH = micro
    stream = IndexStream(IMAGES, cfg.TRAIN.SEED, cfg.TRAIN.GLOBAL_BATCH, micro, cfg.AUG.REPEATS)
    processes = Processes(rank=0, world=world, local_rank=0, device=torch.device("cpu"), launcher="none")
    plan = build_plan(cfg, processes, stream.updates_per_epoch)
    optimizer = build_optimizer(cfg, nn.Linear(2, 2))
    rate = build_learning_rate(cfg, optimizer, plan)

    def at(update):
        rate.set(update)
        (lr,) = {group["lr"] for group in optimizer.param_groups}
        return lr

    return plan, at


@pytest.mark.parametrize(("world", "micro"), DIVISIONS)
@pytest.mark.parametrize("mode", ["published", "corrected"])
def test_sgformer_learning_rate_is_the_published_one(world, micro, mode):
    plan, lr = trace(recipe("sgformer", "small", mode=mode), world, micro)
    assert plan.updates_per_epoch == 1251
    assert plan.epochs == (310 if mode == "published" else 300)
    expected = {0: 1e-6, 1: 5.095e-5, 19: 9.501e-4, 20: 9.892e-4, 299: 1.003e-5}
    if mode == "published":
        expected |= dict.fromkeys(range(300, 310), 1e-5)
    for epoch, value in expected.items():
        first, last = lr(1251 * epoch), lr(1251 * epoch + 1250)
        assert first == last == pytest.approx(value, rel=5e-4)


@pytest.mark.parametrize(("world", "micro"), DIVISIONS)
def test_stvit_learning_rate_is_the_published_one(world, micro):
    plan, lr = trace(recipe("stvit", "small", mode="published"), world, micro)
    assert (plan.updates_per_epoch, plan.epochs) == (1251, 300)
    for epoch, value in {0: 1e-6, 1: 1e-6, 2: 2.008e-4, 5: 8.002e-4, 6: 9.993e-4, 299: 1.011e-5}.items():
        first, last = lr(1251 * epoch), lr(1251 * epoch + 1250)
        assert first == last == pytest.approx(value, rel=5e-4)
    _, corrected = trace(recipe("stvit", "small"), world, micro)
    assert all(corrected(1251 * epoch) == lr(1251 * (epoch + 1)) for epoch in range(299))


@pytest.mark.parametrize(("world", "micro"), DIVISIONS)
def test_groupmixformer_learning_rate_is_the_published_one(world, micro):
    plan, lr = trace(recipe("groupmixformer", "tiny", mode="published"), world, micro)
    assert (plan.updates_per_epoch, plan.epochs) == (2502, 300)
    assert lr(0) == lr(1) == pytest.approx(5e-7)
    step = (5e-4 - 5e-7) / 50040
    assert lr(2) == pytest.approx(5e-7 + step)
    assert lr(50040) == pytest.approx(5e-4, rel=5e-5)
    assert lr(50041) == pytest.approx(4.946e-4, rel=5e-5)
    assert lr(750599) == pytest.approx(5e-6, rel=1e-5)
    _, corrected = trace(recipe("groupmixformer", "tiny"), world, micro)
    assert all(corrected(u) == lr(u + 1) for u in (0, 1, 1000, 50039, 50040, 400000))


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("mode", ["published", "corrected"])
def test_stvit_at_384_has_one_learning_rate(world, mode):
    cfg = recipe("stvit", "base", 384, mode)
    plan, lr = trace(cfg, world, 64)
    assert (plan.updates_per_epoch, plan.epochs, plan.global_batch) == (2502, 30, 512)
    assert {lr(u) for u in (0, 1, 2502, 40000, 75059)} == {5e-6}
    assert cfg.OPTIM.WEIGHT_DECAY == 1e-8
    assert cfg.TRAIN.EVAL_MODE


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_everything_but_biases_and_one_dimensional_parameters_decays(family, variant):
    with torch.device("meta"):
        model = timm.create_model(f"{family}_{variant}")
    groups = build_optimizer(recipe(family, variant), model).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert {n for n, p in named.items() if decays[id(p)] == 0.05} == {n for n, p in named.items() if p.ndim > 1}
    assert set(decays.values()) == {0.05, 0.0}
    if family == "sgformer":
        assert decays[id(named["stem.pos_embed"])] == 0.05
    if family == "stvit" and variant != "small":
        gammas = [n for n, p in named.items() if p.ndim == 4 and p.shape[0] == 1 and p.shape[2:] == (1, 1)]
        assert gammas
        assert all(decays[id(named[n])] == 0.05 for n in gammas)


DROP_PATH = {
    "sgformer": (0.1, 0.2, 0.4), "groupmixformer": (0.1, 0.1, 0.2, 0.5, 0.1), "stvit": (0.1, 0.4, 0.6),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["published", "corrected"])
@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_drop_path_and_what_surrounds_training_are_the_published_ones(family, variant, mode):
    cfg = recipe(family, variant, mode=mode)
    assert f"{family}_{variant}" == cfg.MODEL.NAME
    rate = DROP_PATH[family][FAMILIES[family].index(variant)]
    if (family, variant, mode) == ("stvit", "large", "corrected"):
        assert (cfg.MODEL.DROP_PATH_RATE, cfg.TIMELINE.DROP_PATH_RATE) == (0, "0:0.4, 260:0.6")
    else:
        assert (rate, "") == (cfg.MODEL.DROP_PATH_RATE, cfg.TIMELINE.DROP_PATH_RATE)
    expected = {
        "sgformer": (1024, 128, 0.99992, "ema", "mix_then_erase", "random", 1, 248, 0.0, 42),
        "groupmixformer": (512, 64, 0.0, "raw", "erase_then_mix", "bicubic", 1, 256, 5.0, 0),
        "stvit": (1024, 128, 0.99996, "raw", "erase_then_mix", "bicubic", 3, 256, 0.0, 0),
    }
    found = (
        *(cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH, cfg.EMA.DECAY, cfg.RECIPE.HEADLINE, cfg.AUG.ORDER),
        *(cfg.DATA.INTERPOLATION, cfg.AUG.REPEATS, cfg.DATA.EVAL_RESIZE, cfg.TRAIN.CLIP_GRAD, cfg.TRAIN.SEED),
    )
    assert found == expected[family]
    assert (cfg.AUG.RAND_AUGMENT, cfg.AUG.MIXUP, cfg.AUG.CUTMIX) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (cfg.AUG.ERASE_PROB, cfg.AUG.MIX_SWITCH_PROB, cfg.AUG.LABEL_SMOOTHING) == (0.25, 0.5, 0.1)
    assert (cfg.OPTIM.NAME, cfg.OPTIM.BETAS, cfg.OPTIM.EPS) == ("adamw", [0.9, 0.999], 1e-8)


def test_repeated_augmentation_counts_as_published():
    cfg = recipe("stvit", "large")
    stream = IndexStream(IMAGES, 0, cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH, cfg.AUG.REPEATS)
    assert stream.epoch_length == 1_281_024
    assert len(set(stream.order(0).tolist())) == 427_008


def test_ema_decay_reaches_the_average():
    cfg = recipe("sgformer", "small")
    alone = Processes(rank=0, world=1, local_rank=0, device=torch.device("cpu"), launcher="none")
    model = nn.Linear(2, 2)
    state = build_state(cfg, model, build_plan(cfg, alone, 1251), Precision("off", alone.device))
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1.0
    state.ema.update(model)
    torch.testing.assert_close(state.ema.module.weight - before, torch.full((2, 2), 1 - 0.99992), rtol=2e-3, atol=0)


def test_stvit_large_raises_drop_path_at_epoch_260():
    cfg = recipe("stvit", "large", 224, "corrected", "EMA.DECAY", 0)
    alone = Processes(rank=0, world=1, local_rank=0, device=torch.device("cpu"), launcher="none")
    with torch.device("meta"):
        model = timm.create_model("stvit_large", drop_path_rate=0.6)
    schedule = build_state(cfg, model, build_plan(cfg, alone, 1251), Precision("off", alone.device)).schedule
    blocks = sum(len(stage.blocks) for stage in model.stages)
    for epoch, rate in {0: 0.4, 259: 0.4, 260: 0.6, 299: 0.6}.items():
        schedule.begin_epoch(epoch)
        rates = sorted({m.drop_prob for m in model.modules() if isinstance(m, DropPath)})
        torch.testing.assert_close(rates, [rate * i / (blocks - 1) for i in range(blocks)])
    assert recipe("stvit", "large", mode="published").TIMELINE.DROP_PATH_RATE == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_differences_between_the_modes_are_listed_in_the_docs(family):
    text = (ROOT / "docs/recipes.md").read_text()
    section = text[text.index("## What differs between the modes") :]
    for variant in FAMILIES[family]:
        for size in (224, 384):
            if size == 384 and family != "stvit":
                with pytest.raises(ValueError, match="nobody published"):
                    recipe(family, variant, size, "published")
                continue
            published = recipe(family, variant, size, "published")
            changed = differences(recipe(family, variant, size), published, ("RECIPE.MODE",))
            assert changed
            for change in changed:
                key = change.partition(":")[0]
                assert re.search(rf"{re.escape(key)}.*", section), f"{key} of {family} is not in docs/recipes.md"


def test_mode_is_merged_before_what_the_command_line_says():
    cfg = recipe("stvit", "small", 224, "published", "SCHEDULE.DELAY", 3)
    assert (cfg.SCHEDULE.DELAY, cfg.TRAIN.AMP, cfg.RECIPE.MODE) == (3, "fp16", "published")
    assert recipe("stvit", "small").SCHEDULE.DELAY == 0


def test_published_dump_loads_back(tmp_path):
    cfg = recipe("sgformer", "small", mode="published")
    (tmp_path / "c.yaml").write_text(config.dump(cfg))
    assert config.load(str(tmp_path / "c.yaml")) == cfg


def test_unknown_key_in_a_published_section_is_an_error_in_either_mode(tmp_path):
    (tmp_path / "c.yaml").write_text("PUBLISHED:\n  SCHEDULE:\n    DELAI: 1\n")
    with pytest.raises(ValueError, match=r"SCHEDULE.DELAI in PUBLISHED of .*c.yaml; did you mean SCHEDULE.DELAY"):
        config.load(str(tmp_path / "c.yaml"))
