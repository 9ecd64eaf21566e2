"""Randomness by address: a random stream for each (seed, purpose, address), without any state to save or share.

A Philox counter generator is keyed by the seed and the purpose, and its counter starts at the address. So the draws for
sample 7 of epoch 3 are the same numbers in any worker, on any rank and after any interruption. The streams are frozen:
Philox's words are fixed by its definition, and NumPy guarantees RandomState's methods (unlike Generator's) for good.
"""

import functools
import hashlib

import numpy as np

# Philox counts 256-bit blocks; the lowest 64 bits run within a stream, the other three words are the address.
ADDRESS_WORDS = 3


@functools.lru_cache(maxsize=256)
def _key(seed: int, purpose: str, words: int) -> np.ndarray:
    """Hash seed, purpose and address length into Philox's 128-bit key."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{words}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def generator(seed: int, purpose: str, *address: int) -> np.random.RandomState:
    """Return the random stream of an address, about 10 us.

    `purpose` is a word such as "augment"; `address` is one to three non-negative numbers, such as epoch and position.
    """
    if len(address) > ADDRESS_WORDS or any(not 0 <= part < 2**64 for part in address):
        raise ValueError(f"address {address} of {purpose!r} must be at most {ADDRESS_WORDS} numbers in 0 .. 2**64 - 1")
    counter = np.zeros(1 + ADDRESS_WORDS, dtype=np.uint64)
    counter[1 : 1 + len(address)] = address
    return np.random.RandomState(np.random.Philox(key=_key(seed, purpose, len(address)), counter=counter))


def torch_seed(seed: int, purpose: str, *address: int) -> int:
    """Return a 63-bit seed for a torch.Generator, for randomness that is drawn on the device."""
    return int(generator(seed, purpose, *address).randint(2**63 - 1, dtype=np.int64))
