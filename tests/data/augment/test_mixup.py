"""Mixup and cutmix: draws, images and targets of timm for the same random numbers."""

import numpy as np
import pytest
import timm.data.mixup as timm_mixup
import torch

from common.rng import keyed_generator
from data.augment.mixup import Mixup, MixupDraw, mix_images
from tests.helpers.data_doubles import TimmRandom

CLASSES, SIZE = 7, 24


def batch(count=6):
    rng = np.random.RandomState(0)
    return torch.from_numpy(rng.standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)), torch.arange(
        count
    ) % CLASSES


class HalfOpen(TimmRandom):
    """Stand-in for numpy.random, whose randint excludes `high`."""

    def randint(self, low, high, size=None):
        assert size is None
        return int(self.rng.randint(low, high))


@pytest.mark.parametrize(
    "options",
    [
        {"mixup": 0.8, "cutmix": 1.0},
        {"mixup": 0.8, "cutmix": 0.0},
        {"mixup": 0.0, "cutmix": 1.0},
        {"mixup": 0.2, "cutmix": 0.3, "prob": 0.5, "switch_prob": 0.8, "smoothing": 0.0},
    ],
)
def test_images_and_targets_are_timms_for_the_same_random_numbers(monkeypatch, options):
    mixing = Mixup(CLASSES, **options)
    timms = timm_mixup.Mixup(
        mixing.mixup, mixing.cutmix, None, mixing.prob, mixing.switch_prob, "batch", True, mixing.smoothing, CLASSES
    )
    kinds = set()
    for update in range(60):
        images, labels = batch()
        mix = mixing.draw(keyed_generator(0, "mix", 0, update, 0), SIZE)
        ours = mix_images(images.clone(), mix), mixing.targets(labels, mix.share)
        with monkeypatch.context() as patch:
            patch.setattr(timm_mixup.np, "random", HalfOpen(keyed_generator(0, "mix", 0, update, 0)))
            wanted = timms(images.clone(), labels)
        assert torch.equal(ours[0], wanted[0])
        assert torch.equal(ours[1], wanted[1])
        kinds.add("none" if mix.share == 1 else "mixup" if mix.box is None else "cutmix")
    assert kinds - {"none"} == {name for name in ("mixup", "cutmix") if options[name] > 0}
    assert ("none" in kinds) == ("prob" in options)


def test_share_of_cutmix_is_the_area_left():
    for update in range(200):
        mix = Mixup(CLASSES, mixup=0).draw(keyed_generator(0, "mix", 0, update, 0), SIZE)
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= SIZE
        assert 0 <= left <= right <= SIZE
        assert mix.share == 1 - (bottom - top) * (right - left) / SIZE**2


def test_targets_equal_timms():
    labels = torch.tensor([3, 0, 6, 6, 1])
    for smoothing in (0.0, 0.1):
        for share in (1.0, 0.3):
            wanted = timm_mixup.mixup_target(labels, CLASSES, share, smoothing)
            found = Mixup(CLASSES, smoothing=smoothing).targets(labels, share)
            assert found.dtype == torch.float32
            assert torch.equal(found, wanted)
            assert torch.allclose(found.sum(1), torch.ones(5))


def test_switched_off_mixing_leaves_images_and_smooths_only():
    images, labels = batch()
    for mixing in (Mixup(CLASSES, mixup=0, cutmix=0), Mixup(CLASSES, prob=0)):
        mix = mixing.draw(keyed_generator(0, "mix", 0, 0, 0), SIZE)
        assert mix == MixupDraw(1.0)
        assert torch.equal(mix_images(images.clone(), mix), images)
        assert torch.equal(mixing.targets(labels, mix.share).argmax(1), labels)


def test_draws_have_their_probabilities():
    draws = [
        Mixup(CLASSES, prob=0.8, switch_prob=0.25).draw(keyed_generator(0, "mix", 0, u, 0), 224) for u in range(3000)
    ]
    mixed = [mix for mix in draws if mix.share < 1]
    assert len(mixed) / 3000 == pytest.approx(0.8, abs=0.03)
    assert np.mean([mix.box is not None for mix in mixed]) == pytest.approx(0.25, abs=0.03)
    assert np.mean([mix.share for mix in mixed if mix.box is None]) == pytest.approx(0.5, abs=0.03)
