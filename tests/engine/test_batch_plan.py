"""Division of a global batch, scaled learning rate."""

import pytest

from engine.batch_plan import BatchPlan, accumulation_steps, divisors, scaled_lr


@pytest.mark.parametrize(("world", "expected"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_follows_from_the_world(world, expected):
    assert accumulation_steps(32, 8, world) == expected


def test_micro_batches_of_all_processes_are_all_micro_batches():
    for world in (1, 2, 4):
        plans = [BatchPlan(32, 8, rank, world, 10, 2) for rank in range(world)]
        assert sorted(j for plan in plans for j in plan.micro_batches()) == [0, 1, 2, 3]
        assert plans[0].updates == 20


def test_impossible_division_lists_what_fits():
    with pytest.raises(ValueError, match=r"TRAIN\.GLOBAL_BATCH=32") as caught:
        accumulation_steps(32, 8, 3)
    assert "1, 2, 4" in str(caught.value)
    assert "with 3 processes these micro-batches fit: none" in str(caught.value)
    with pytest.raises(ValueError, match=r"TRAIN\.GLOBAL_BATCH=64 .* TRAIN\.MICRO_BATCH=24") as caught:
        accumulation_steps(64, 24, 1)
    assert "with 1 processes these micro-batches fit: 1, 2, 4, 8, 16, 32, 64;" in str(caught.value)


def test_learning_rate_scales_with_the_global_batch():
    assert scaled_lr(5e-4, 1024, 512) == 1e-3
    assert scaled_lr(5e-4, 1024, 0) == 5e-4


def test_divisors_are_complete_and_ascending():
    for number in (1, 2, 36, 97, 1024):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
    assert len(divisors(10**8)) == 81
