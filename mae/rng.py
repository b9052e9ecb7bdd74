"""Counter-based random numbers: each is a function of (seed, epoch, index), whichever process computes it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), elementwise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys(seed: int, epoch: int, index: np.ndarray, stream: int = 0) -> np.ndarray:
    """A 64-bit key for each index (n,); `stream` parts the uses of one sample (crop, masking, repeats)."""
    key = np.array([seed], np.uint64)
    for word in (np.array([epoch], np.uint64), np.array([stream], np.uint64), index.astype(np.uint64)):
        key = _mix(_mix(key + GOLDEN) ^ word)
    return key


def uniform(key: np.ndarray, count: int) -> np.ndarray:
    """(n, count) float64 in [0, 1), the first numbers of the splitmix64 sequence of each key."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return (_mix(key[:, None] + steps) >> np.uint64(11)) * 2.0**-53


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """python's, numpy's and torch's host generators seeded by `key` inside, and as they were afterwards."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.default_generator.manual_seed(key % 2**63)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
