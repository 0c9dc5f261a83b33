"""Pure functions of the step: the learning rate and which rows a batch holds."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.02) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to `floor * peak` (arXiv 1608.03983)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


WINDOW = 16  # blocks whose rows are shuffled together
ROUNDS = 12  # of the Feistel network: with 4 and 6, neighbours of a short range are measurably less apart than at random


def batch_rows(
    n: int, batch_size: int, seed: int, step: int, blocks: np.ndarray | None = None, window: int = WINDOW
) -> np.ndarray:
    """The rows of a training batch: shuffled epochs laid end to end, a function of seed and step alone.

    Resuming at any step therefore sees the very batches of an uninterrupted run, with no sampler state to keep. Time and
    memory are those of the batch, whatever n is.

    Args:
        blocks: (M + 1,) first row of each block of rows that lie together, then n. With it an epoch shuffles the blocks,
            then the rows of each `window` blocks among themselves, so that consecutive batches touch few blocks.

    Returns:
        (batch_size,) int64.
    """
    epochs, positions = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    first, second = np.random.SeedSequence([seed, 11]).generate_state(2, np.uint64)
    keys = _mixed(epochs.astype(np.uint64) ^ first)  # one for each epoch
    if blocks is None or len(blocks) - 1 <= window:
        return shuffled(positions, np.full(batch_size, n), keys)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        key = keys[here][:1]
        order, starts = _block_order(np.asarray(blocks, np.int64).tobytes(), int(key[0]))
        edges = np.append(starts[:-1:window], n)  # of the windows, in the order of this epoch
        at = np.searchsorted(edges, positions[here], "right") - 1
        inside = shuffled(positions[here] - edges[at], edges[at + 1] - edges[at], _mixed(at.astype(np.uint64) ^ key ^ second))
        inside += edges[at]
        place = np.searchsorted(starts, inside, "right") - 1
        rows[here] = np.asarray(blocks)[order[place]] + inside - starts[place]
    return rows


@lru_cache(maxsize=4)
def _block_order(blocks: bytes, key: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks in the order of an epoch, (M,), and the position at which each begins and the last ends, (M + 1,)."""
    edges = np.frombuffer(blocks, np.int64)
    count = len(edges) - 1
    order = shuffled(np.arange(count), np.full(count, count), np.full(count, key, np.uint64))
    return order, np.concatenate([[0], np.cumsum(np.diff(edges)[order])])


def shuffled(index: np.ndarray, n: np.ndarray, key: np.ndarray) -> np.ndarray:
    """What stands at `index` of a shuffled range(n), without the range: a keyed permutation, elementwise.

    A Feistel network over pairs (index // a, index % a) with a = ceil(sqrt(n)), whose halves are added modulo a, not
    xored; where it leaves range(n) it is applied again until it is back ("cycle walking"; both in Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, CT-RSA 2002). Since a^2 - n < 2a that is rare.

    Args:
        index, n: (B,) int64, 0 <= index < n < 2^52.
        key: (B,) uint64; another key is another permutation.
    """
    side = np.ceil(np.sqrt(n)).astype(np.uint64)
    rounds = [_mixed(key + np.uint64(i)) for i in range(ROUNDS)]
    found = np.array(index, np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        a = side[walking]
        left, right = np.divmod(found[walking], a)
        for round_key in rounds:
            left, right = right, (left + _mixed(right ^ round_key[walking])) % a
        found[walking] = left * a + right
        walking = walking[found[walking] >= n[walking]]
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Each uint64 to another that looks unrelated: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
