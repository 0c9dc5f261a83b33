"""Pure functions of the step: the learning rate and which rows a batch holds."""

from __future__ import annotations

import math

import numpy as np


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.02) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to `floor * peak` (arXiv 1608.03983)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def batch_rows(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of a training batch: shuffled epochs laid end to end, a function of seed and step alone.

    Resuming at any step therefore sees the very batches of an uninterrupted run, with no sampler state to keep.
    """
    first = step * batch_size
    epochs = {}
    rows = np.empty(batch_size, np.int64)
    for slot, position in enumerate(range(first, first + batch_size)):
        epoch = position // n
        if epoch not in epochs:
            epochs[epoch] = np.random.default_rng([seed, 11, epoch]).permutation(n)
        rows[slot] = epochs[epoch][position % n]
    return rows
