"""RandAugment's policy: timm's operations and arguments, timm's pixels from the same random numbers, strict policy strings."""

import numpy as np
import pytest
import timm.data.auto_augment as timm_aa
from PIL import Image

from benchmarks.pillow_rand_augment import apply
from common.rng import keyed_generator
from data.augment.rand_augment_policy import INCREASING_OPS, PUBLISHED_OPS, Op, Policy, argument, draw_ops, parse_policy
from tests.helpers.data_doubles import TimmRandom, picture

FILL = (124, 116, 104)
PICTURE = picture(np.random.RandomState(1), 57, 43)


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))


def timm_random(monkeypatch, rng):
    stand_in = TimmRandom(rng)
    monkeypatch.setattr(timm_aa, "random", stand_in)
    monkeypatch.setattr(timm_aa.np, "random", stand_in)


def test_tables_are_timms():
    assert list(INCREASING_OPS) == timm_aa._RAND_INCREASING_TRANSFORMS
    assert list(PUBLISHED_OPS) == timm_aa._RAND_TRANSFORMS


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("level", [0.0, 0.3, 2.4, 5.0, 9.0, 9.7, 10.0])
@pytest.mark.parametrize("name", sorted({*INCREASING_OPS, *PUBLISHED_OPS}))
def test_operation_equals_timms(monkeypatch, name, level, resample, negate):
    pillow = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[resample]
    hparams = {"img_mean": FILL, "interpolation": pillow}
    monkeypatch.setattr(timm_aa.random, "random", lambda: 0.9 if negate else 0.1)
    ours = apply(PICTURE, [Op(name, argument(name, level, negate), resample)], FILL)
    if name.startswith("Posterize") and argument(name, level) == 0:
        wanted = Image.new("RGB", PICTURE.size)  # as in Pillow before 13
    else:
        wanted = timm_aa.AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)(PICTURE)
    assert same(ours, wanted)


def test_full_strength_posterize_paints_black():
    assert argument("PosterizeIncreasing", 10.0) == 0
    black = apply(PICTURE, [Op("PosterizeIncreasing", 0, "bicubic")], FILL)
    assert np.asarray(black).max() == 0
    assert black.size == PICTURE.size
    assert np.asarray(apply(PICTURE, [Op("PosterizeIncreasing", -2, "bicubic")], FILL)).max() == 0


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8", "rand", "rand-m6-mstd101-inc1", "rand-m12-mstd1-mmax20-n1-p1"]
)
def test_pictures_are_timms_for_the_same_random_numbers(monkeypatch, policy, interpolation):
    hparams = {"img_mean": FILL}
    if interpolation != "random":
        hparams["interpolation"] = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    timms = timm_aa.rand_augment_transform(policy, hparams)
    compared = changed = 0
    for position in range(60):
        ops = draw_ops(parse_policy(policy), keyed_generator(0, "augment", 0, position), interpolation)
        if any(op.name.startswith("Posterize") and op.argument <= 0 for op in ops):
            continue  # timm raises
        ours = apply(PICTURE, ops, FILL)
        with monkeypatch.context() as patch:
            timm_random(patch, keyed_generator(0, "augment", 0, position))
            wanted = timms(PICTURE)
        assert same(ours, wanted), ops
        compared += 1
        changed += not same(ours, PICTURE)
    assert compared > 50
    assert changed > 20


def test_draws_have_the_published_frequencies():
    policy = parse_policy("rand-m9-mstd0.5-inc1")
    draws = [
        op for position in range(4000) for op in draw_ops(policy, keyed_generator(3, "augment", 0, position), "bicubic")
    ]
    assert len(draws) / 8000 == pytest.approx(0.5, abs=0.02)  # two operations, each with probability 1/2
    counts = {name: sum(op.name == name for op in draws) for name in INCREASING_OPS}
    assert max(abs(count / len(draws) - 1 / 15) for count in counts.values()) < 0.015
    degrees = np.array([op.argument for op in draws if op.name == "Rotate"])
    assert abs(degrees).max() <= 30
    assert abs(degrees).mean() == pytest.approx(27, abs=0.4)
    assert abs(np.sign(degrees).mean()) < 0.2
    assert any(op.name == "PosterizeIncreasing" and op.argument == 0 for op in draws)


def test_policy_string_is_parsed():
    assert parse_policy("rand-m9-mstd0.5-inc1") == Policy(magnitude=9, std=0.5, increasing=True)
    assert parse_policy("rand") == Policy(magnitude=10, layers=2, prob=0.5, std=0.0, level_max=10.0, increasing=False)
    assert parse_policy("rand-p0.25-n3-mmax20-inc0") == Policy(prob=0.25, layers=3, level_max=20.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("augmix-m3", "must start with 'rand'"),
        ("rand-m9-x3", r"'x3' is not one of its parts; give each once: m \(magnitude\)"),
        ("rand-m9-mst0.5", "'mst0.5' is not one of its parts"),
        ("rand-m9-mstd", "'mstd' is not one of its parts"),
        ("rand-tweights", "'tweights' is not one of its parts"),
        ("rand-m9-m8", "'m8' appears twice"),
        ("rand-m9.5", "'m9.5' must hold a whole number"),
        ("rand-inc2", "inc is 0 or 1"),
        ("rand-p1.5", r"p lies in 0 \.\. 1"),
        ("rand-m9-", "'' is not one of its parts"),
    ],
)
def test_unknown_policy_part_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_policy(text)
    assert f"AUG.RAND_AUGMENT={text!r}" in str(error.value)
