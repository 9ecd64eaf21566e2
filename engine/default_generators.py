"""Seeds of torch's default generators, by RNG keys (common/rng.py)."""

import numpy as np
import torch


def seed_default_generators(seed: int, *key: int) -> None:
    """Seed torch's default generators (CPU and, once in use, CUDA) by an RNG key; keys of different lengths differ.

    Called before each micro-batch's forward pass with (update, micro-batch), so that drop path and dropout depend neither on
    the number of processes nor on a stored state. Does not synchronise the device.
    """
    words = [len(key)]  # SeedSequence ignores trailing zeros: the length comes first, and every number takes two words
    for number in (seed, *key):
        words += [number & 0xFFFFFFFF, number >> 32]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    number = int(state[0] >> np.uint64(1))
    torch.default_generator.manual_seed(number)  # torch.manual_seed records a stack trace for every device it lacks
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
