"""Generators by RNG key: fixed numbers, independent of each other and of all earlier draws."""

import numpy as np
import pytest

from common.rng import keyed_generator, keyed_torch_seed

FROZEN_WORDS = [139799983, 3840302203, 2054011595]
FROZEN_FLOATS = [0.34401355862101923, -0.4529428811049703, 0.17490498443749472]
FROZEN_SEED = 5667366165212058129


def test_numbers_of_a_key_never_change():
    """Compare with recorded numbers. Changed ones would resume every existing run with other augmentation: keep the test."""
    rng = keyed_generator(0, "augment", 3, 7)
    assert rng.randint(0, 2**32, size=3, dtype=np.uint64).tolist() == FROZEN_WORDS
    assert [rng.random_sample(), rng.normal(), rng.beta(0.8, 0.8)] == pytest.approx(FROZEN_FLOATS, rel=1e-12)
    assert keyed_torch_seed(0, "erase", 1, 2, 3) == FROZEN_SEED


def test_same_key_gives_same_numbers_whatever_was_drawn_before():
    first = keyed_generator(1, "a", 5, 6).random_sample(10)
    keyed_generator(1, "a", 5, 7).random_sample(1000)
    np.random.seed(3)
    assert np.array_equal(keyed_generator(1, "a", 5, 6).random_sample(10), first)


@pytest.mark.parametrize(
    "other",
    [
        (2, "a", 5, 6),
        (1, "b", 5, 6),
        (1, "a", 6, 5),
        (1, "a", 5, 7),
        (1, "a", 5),
        (1, "a", 5, 6, 0),
        (1 + 2**64, "a", 5, 6),
    ],
)
def test_other_key_gives_other_numbers(other):
    assert not np.intersect1d(
        keyed_generator(1, "a", 5, 6).random_sample(1000), keyed_generator(*other).random_sample(1000)
    ).size


def test_neighbouring_keys_never_overlap_and_look_independent():
    draws = np.array([keyed_generator(0, "augment", 0, position).random_sample(8) for position in range(4000)])
    assert len(np.unique(draws)) == draws.size
    assert abs(draws.mean() - 0.5) < 0.01
    centred = draws - 0.5
    assert abs((centred[1:] * centred[:-1]).mean() * 12) < 0.03  # correlation from one position to the next
    assert abs((centred[:, 1:] * centred[:, :-1]).mean() * 12) < 0.03  # and within a key


@pytest.mark.parametrize("key", [(-1,), (2**64,), (1, 2, 3, 4)])
def test_impossible_key_is_refused(key):
    with pytest.raises(ValueError, match="must be at most 3 numbers in 0"):
        keyed_generator(0, "a", *key)


def test_torch_seed_fits_63_bits():
    seeds = [keyed_torch_seed(0, "erase", i) for i in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == 200
    assert max(seeds) > 2**62
