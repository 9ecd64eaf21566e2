"""Randomness by address: what is drawn depends on where in the run it is drawn, not on what was drawn before."""

import numpy as np
import torch


def seed_process(seed: int, *address: int) -> None:
    """Seed torch's default generators (CPU and CUDA) from (seed, address).

    Called before each micro-batch's forward pass with (update, micro-batch): drop path and dropout then neither depend on
    the number of processes nor need a stored state to resume. The device is not synchronised.
    """
    words = np.random.SeedSequence([seed, *address]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
