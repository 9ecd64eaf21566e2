"""Randomness by address: what is drawn depends on where in the run it is drawn, not on what was drawn before."""

import numpy as np
import torch


def seed_process(seed: int, *address: int) -> None:
    """Seed torch's default generators (CPU and, once in use, CUDA) from (seed, address); addresses of any two lengths differ.

    Called before each micro-batch's forward pass with (update, micro-batch): drop path and dropout then neither depend on
    the number of processes nor need a stored state to resume. The device is not synchronised.
    """
    words = [
        len(address)
    ]  # SeedSequence ignores trailing zeros: every number takes two words, and their count comes first
    for number in (seed, *address):
        words += [number & 0xFFFFFFFF, number >> 32]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    number = int(state[0] >> np.uint64(1))
    torch.default_generator.manual_seed(number)  # torch.manual_seed writes down a stack trace for every device it lacks
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
