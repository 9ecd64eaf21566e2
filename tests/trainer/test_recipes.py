"""The recipes against the numbers of the published trainers, at several world sizes and accumulations, in both modes.

The figures are those measured on the authors' code, written down in docs/recipes.md.
"""

from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.layers import DropPath
from torch import nn

import config
import models  # noqa: F401  registers the families
from config.lookup import config_differences
from data.augment.build import build_eval_transform
from data.loaders.sampler import Sampler
from engine.build import build_plan, build_state
from engine.distributed.processes import Processes
from engine.optim.build import build_learning_rate, build_optimizer
from engine.precision import Precision
from models.build import build_model

ROOT = Path(__file__).parents[2]
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
    sampler = Sampler(IMAGES, cfg.TRAIN.SEED, cfg.TRAIN.GLOBAL_BATCH, micro, cfg.AUG.REPEATS)
    processes = Processes(rank=0, world=world, local_rank=0, device=torch.device("cpu"), launcher="none")
    plan = build_plan(cfg, processes, sampler.updates_per_epoch)
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


# Every key that decides what a recipe computes. COMMON is all of them; the others say what differs.
COMMON = {
    "MODEL.DROP_RATE": 0.0, "MODEL.INIT": "", "MODEL.INIT_WEIGHTS": "", "MODEL.NUM_CLASSES": 0, "MODEL.SYNC_BN": False,
    "DATA.EVAL_INTERPOLATION": "bicubic", "DATA.INTERPOLATION": "bicubic", "DATA.BLOCK_SHUFFLE": 0,
    "DATA.MEAN": [0.485, 0.456, 0.406], "DATA.STD": [0.229, 0.224, 0.225],
    "AUG.SCALE": [0.08, 1.0], "AUG.RATIO": [3 / 4, 4 / 3], "AUG.HFLIP": 0.5, "AUG.RAND_AUGMENT": "rand-m9-mstd0.5-inc1",
    "AUG.ERASE_PROB": 0.25, "AUG.ERASE_MODE": "pixel", "AUG.ERASE_COUNT": 1, "AUG.ERASE_AREA": [0.02, 1 / 3],
    "AUG.MIXUP": 0.8, "AUG.CUTMIX": 1.0, "AUG.MIX_PROB": 1.0, "AUG.MIX_SWITCH_PROB": 0.5, "AUG.ORDER": "erase_then_mix",
    "AUG.LABEL_SMOOTHING": 0.1, "AUG.REPEATS": 1,
    "TRAIN.EPOCHS": 300, "TRAIN.SEED": 0, "TRAIN.EVAL_MODE": False, "TRAIN.CLIP_GRAD": 0.0, "TRAIN.AMP": "bf16",
    "OPTIM.NAME": "adamw", "OPTIM.BETAS": [0.9, 0.999], "OPTIM.EPS": 1e-8, "OPTIM.WEIGHT_DECAY": 0.05,
    "OPTIM.LAYER_DECAY": 1.0, "OPTIM.SCALE_BATCH": 512,
    "SCHEDULE.NAME": "cosine", "SCHEDULE.UNIT": "epoch", "SCHEDULE.DELAY": 0, "SCHEDULE.COOLDOWN_EPOCHS": 0,
    "SCHEDULE.SCALED": False,
    "TIMELINE.DROP_PATH_RATE": "", "TIMELINE.EMA_DECAY": "", "TIMELINE.MAGNITUDE": "", "TIMELINE.MIX_PROB": "",
    "TIMELINE.IMG_SIZE": "", "DISTILL.TYPE": "none", "EVAL.MODE": "center", "EVAL.CROP_PCT": 0.0, "EVAL.FLIP": False,
}  # fmt: skip
FAMILY = {
    "sgformer": {
        "RECIPE.HEADLINE": "ema", "DATA.EVAL_RESIZE": 248, "DATA.INTERPOLATION": "random", "AUG.ORDER": "mix_then_erase",
        "TRAIN.GLOBAL_BATCH": 1024, "TRAIN.MICRO_BATCH": 128, "TRAIN.SEED": 42, "OPTIM.LR": 1e-3, "OPTIM.SCALE_BATCH": 0,
        "SCHEDULE.WARMUP_EPOCHS": 20, "SCHEDULE.WARMUP_LR": 1e-6, "SCHEDULE.MIN_LR": 1e-5, "EMA.DECAY": 0.99992,
    },
    "groupmixformer": {
        "RECIPE.HEADLINE": "raw", "DATA.EVAL_RESIZE": 256, "TRAIN.GLOBAL_BATCH": 512, "TRAIN.MICRO_BATCH": 64,
        "TRAIN.CLIP_GRAD": 5.0, "OPTIM.LR": 5e-4, "SCHEDULE.UNIT": "update", "SCHEDULE.WARMUP_EPOCHS": 20,
        "SCHEDULE.WARMUP_LR": 5e-7, "SCHEDULE.MIN_LR": 5e-6, "SCHEDULE.SCALED": True, "EMA.DECAY": 0.0,
    },
    "stvit": {
        "RECIPE.HEADLINE": "raw", "DATA.EVAL_RESIZE": 256, "AUG.REPEATS": 3, "TRAIN.GLOBAL_BATCH": 1024,
        "TRAIN.MICRO_BATCH": 128, "OPTIM.LR": 5e-4, "SCHEDULE.WARMUP_EPOCHS": 5, "SCHEDULE.WARMUP_LR": 1e-6,
        "SCHEDULE.MIN_LR": 1e-5, "EMA.DECAY": 0.99996,
    },
}  # fmt: skip
PUBLISHED = {
    "sgformer": {"TRAIN.AMP": "fp16", "SCHEDULE.COOLDOWN_EPOCHS": 10},
    "groupmixformer": {"TRAIN.AMP": "fp16", "SCHEDULE.DELAY": 1, "MODEL.SYNC_BN": True},
    "stvit": {"TRAIN.AMP": "fp16", "SCHEDULE.DELAY": 1},
}
OURS_384 = {
    "TRAIN.EPOCHS": 30, "TRAIN.GLOBAL_BATCH": 512, "TRAIN.MICRO_BATCH": 64, "OPTIM.LR": 2e-5, "OPTIM.SCALE_BATCH": 512,
    "OPTIM.WEIGHT_DECAY": 1e-8, "SCHEDULE.UNIT": "update", "SCHEDULE.WARMUP_EPOCHS": 5, "SCHEDULE.WARMUP_LR": 2e-8,
    "SCHEDULE.MIN_LR": 2e-7, "SCHEDULE.SCALED": True,
}  # fmt: skip
AT_384 = {
    "sgformer": {**OURS_384, "DATA.EVAL_RESIZE": 426},
    "groupmixformer": {**OURS_384, "DATA.EVAL_RESIZE": 438},
    "stvit": {
        "DATA.EVAL_RESIZE": 384, "TRAIN.EPOCHS": 30, "TRAIN.GLOBAL_BATCH": 512, "TRAIN.MICRO_BATCH": 64,
        "TRAIN.EVAL_MODE": True, "OPTIM.LR": 5e-6, "OPTIM.WEIGHT_DECAY": 1e-8, "SCHEDULE.NAME": "constant",
        "SCHEDULE.WARMUP_EPOCHS": 0,
    },
}  # fmt: skip
DROP_PATH = {
    "sgformer": (0.1, 0.2, 0.4), "groupmixformer": (0.1, 0.1, 0.2, 0.5, 0.1), "stvit": (0.1, 0.4, 0.6),
}  # fmt: skip
# Keys that no recipe sets: paths, speed, options that recipes do not use.
FREE = {
    "MODEL.MODULE", "MODEL.KERNELS", "MODEL.NORM_BACKEND", "OPTIM.BACKEND", "TRAIN.COMPILE", "TRAIN.CHECKPOINT_BLOCKS", "DATA.PATH", "DATA.LOADER", "DATA.DALI_DEVICE", "DATA.CLASS_INDEX", "DATA.VAL_LABELS", "DATA.WORKERS", "DATA.PREFETCH",
    "DATA.MAX_BAD_SHARE", "TRAIN.MAX_SKIPPED", "DATA.SYNTHETIC_TRAIN", "DATA.SYNTHETIC_VAL", "DATA.SYNTHETIC_CLASSES", "TRAIN.BENCHMARK",
    "OPTIM.MOMENTUM", "SCHEDULE.DECAY_EPOCHS", "SCHEDULE.MILESTONES", "SCHEDULE.DECAY_RATE", "SCHEDULE.POWER",
    "DISTILL.TEACHER", "DISTILL.TEACHER_WEIGHTS", "DISTILL.ALPHA", "DISTILL.TAU", "EVAL.BATCH", "EVAL.EVERY",
}  # fmt: skip
SECTIONS = ("RECIPE", "MODEL", "DATA", "AUG", "TRAIN", "OPTIM", "SCHEDULE", "TIMELINE", "DISTILL", "EMA", "EVAL")


@pytest.mark.parametrize("mode", ["published", "corrected"])
@pytest.mark.parametrize("size", [224, 384])
@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_every_number_of_a_recipe_is_the_one_written_down(family, variant, size, mode):
    expected = COMMON | FAMILY[family] | (AT_384[family] if size == 384 else {})
    if mode == "published":
        if size == 384 and family != "stvit":
            pytest.skip("nothing was published; test_differences_between_the_modes holds that")
        expected |= PUBLISHED[family]
    rate = DROP_PATH[family][FAMILIES[family].index(variant)]
    expected |= {
        "MODEL.NAME": f"{family}_{variant}",
        "DATA.IMG_SIZE": size,
        "MODEL.DROP_PATH_RATE": rate,
        "RECIPE.MODE": mode,
    }
    if (family, variant, size, mode) == ("stvit", "large", 224, "corrected"):
        expected |= {"MODEL.DROP_PATH_RATE": 0.0, "TIMELINE.DROP_PATH_RATE": "0:0.4, 260:0.6"}
    cfg = recipe(family, variant, size, mode)
    found = {key: config.get(cfg, key) for key in config.keys(cfg) if key.split(".")[0] in SECTIONS and key not in FREE}
    assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_crops_are_the_published_ones(family):
    sizes = {
        "sgformer": ((248, 224), (426, 384)), "groupmixformer": ((256, 224), (438, 384)), "stvit": ((256, 224), (384, 384)),
    }  # fmt: skip
    for size, (resize, crop) in zip((224, 384), sizes[family], strict=True):
        transform = build_eval_transform(recipe(family, FAMILIES[family][0], size))
        assert (transform.crop, transform.interpolation, transform.mode) == (crop, "bicubic", "center")
        (height, width), (top, left, *_) = transform.geometry(500, 375)
        assert (height, width) == (int(resize * 500 / 375), resize)
        assert (top, left) == (round((height - crop) / 2), (resize - crop) // 2)


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_drop_path_rises_linearly_over_all_blocks(family, variant):
    cfg = recipe(family, variant, 224, "published")
    with torch.device("meta"):
        model = build_model(cfg, 1000)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [{m.drop_prob for m in block.modules() if isinstance(m, DropPath)} for block in blocks]
    expected = [cfg.MODEL.DROP_PATH_RATE * i / (len(blocks) - 1) for i in range(len(blocks))]
    assert all(len(found) == 1 for found in rates)
    assert [found.pop() for found in rates] == pytest.approx(expected)


def test_repeated_augmentation_counts_as_published():
    cfg = recipe("stvit", "large")
    sampler = Sampler(IMAGES, 0, cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH, cfg.AUG.REPEATS)
    assert sampler.epoch_length == 1_281_024
    assert len(set(sampler.order(0).tolist())) == 427_008


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


def table_of_differences():
    """Return {(family or variant, key): (corrected, published)} of the table in docs/recipes.md."""
    text = (ROOT / "docs/recipes.md").read_text()
    section = text[text.index("## What differs between the modes") :].split("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in section.splitlines() if line.startswith("| ")
    ]
    return {(row[0], row[1].strip("`")): (row[2], row[3]) for row in cells[1:]}


def test_differences_between_the_modes_are_those_in_the_docs():
    names = {"sgformer": "SG-Former", "groupmixformer": "GroupMixFormer", "stvit": "STViT"}
    documented, found = table_of_differences(), {}
    for family, variant in VARIANTS:
        for size in (224, 384):
            if size == 384 and family != "stvit":
                with pytest.raises(ValueError, match="nobody published"):
                    recipe(family, variant, size, "published")
                continue
            changes = config_differences(
                recipe(family, variant, size), recipe(family, variant, size, "published"), ("RECIPE.MODE",)
            )
            for change in changes:
                key, _, values = change.partition(": ")
                old, new = (yaml.safe_load(value) for value in values.split(" -> "))
                who = "all" if key == "TRAIN.AMP" else "STViT-L" if "DROP_PATH" in key else names[family]
                found[who, key] = (str(old).lower(), str(new).lower() or "constant")
    assert {key: tuple(v.lower() for v in values) for key, values in documented.items()} == found


def test_mode_is_merged_before_the_options_of_the_command_line():
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


def test_mode_given_twice_is_the_last_one():
    cfg = recipe("stvit", "small", 224, "corrected", "RECIPE.MODE", "published")
    assert (cfg.RECIPE.MODE, cfg.SCHEDULE.DELAY) == ("published", 1)
    cfg = recipe("stvit", "small", 224, "published", "RECIPE.MODE", "corrected")
    assert (cfg.RECIPE.MODE, cfg.SCHEDULE.DELAY) == ("corrected", 0)


@pytest.mark.parametrize(("mode", "other"), [("published", "corrected"), ("corrected", "published")])
def test_resolved_config_keeps_its_mode(tmp_path, mode, other):
    cfg = recipe("stvit", "small", mode=mode)
    (tmp_path / "c.yaml").write_text(config.dump(cfg))
    assert config.load(str(tmp_path / "c.yaml")) == cfg
    assert config.load(str(tmp_path / "c.yaml"), ["RECIPE.MODE", mode]) == cfg
    with pytest.raises(ValueError, match=f"resolved config of a run in mode {mode}"):
        config.load(str(tmp_path / "c.yaml"), ["RECIPE.MODE", other])


def test_derived_file_wins_over_what_its_base_published(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"BASE: {ROOT}/configs/stvit/large_224.yaml\nRECIPE: {{MODE: published}}\nMODEL: {{DROP_PATH_RATE: 0.3}}\n"
    )
    cfg = config.load(str(tmp_path / "mine.yaml"))
    assert (cfg.MODEL.DROP_PATH_RATE, cfg.SCHEDULE.DELAY, cfg.TIMELINE.DROP_PATH_RATE) == (0.3, 1, "")
