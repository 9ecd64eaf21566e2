"""Counter-based random number generators (RNG): each RNG key gives its own numbers, without state to store or share.

A key is a seed, a purpose and one to three numbers, the position in the run: (epoch, position) for the augmentation of a
sample, (update, micro-batch) for mixup and drop path. A Philox generator is keyed by seed and purpose, and its counter starts
at the numbers, so sample 7 of epoch 3 draws the same in any worker, on any rank and after any interruption. The numbers never
change: Philox's output is fixed by its definition, and NumPy guarantees the methods of RandomState (unlike Generator's)
permanently.
"""

import functools
import hashlib

import numpy as np

# Philox counts 256-bit blocks; the lowest 64 bits run within one generator, the other three words are the key's numbers.
KEY_WORDS = 3


@functools.lru_cache(maxsize=256)
def _philox_key(seed: int, purpose: str, words: int) -> np.ndarray:
    """Hash seed, purpose and the length of an RNG key into Philox's 128-bit key."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{words}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def keyed_generator(seed: int, purpose: str, *key: int) -> np.random.RandomState:
    """Return the generator of an RNG key, in about 10 us.

    `purpose` is a word such as "augment"; `key` is one to three non-negative numbers, such as epoch and position. Raises
    ValueError for more than three numbers, or numbers outside 0 .. 2**64 - 1.
    """
    if len(key) > KEY_WORDS or any(not 0 <= part < 2**64 for part in key):
        raise ValueError(f"RNG key {key} of {purpose!r} must be at most {KEY_WORDS} numbers in 0 .. 2**64 - 1")
    counter = np.zeros(1 + KEY_WORDS, dtype=np.uint64)
    counter[1 : 1 + len(key)] = key
    return np.random.RandomState(np.random.Philox(key=_philox_key(seed, purpose, len(key)), counter=counter))


def keyed_torch_seed(seed: int, purpose: str, *key: int) -> int:
    """Return a 63-bit seed of an RNG key for a torch.Generator, for random numbers drawn on the device."""
    return int(keyed_generator(seed, purpose, *key).randint(2**63 - 1, dtype=np.int64))
