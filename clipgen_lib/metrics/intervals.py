"""95% intervals of what is measured on a sample of images or prompts.

In: the values of a sample, or the count of hits in it. Out: (low, high). They tell how far another sample of the same size
from the same generator could lie, not what another training would give.
"""

from collections.abc import Callable

import numpy as np
from scipy.stats import binomtest


def bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], float] = np.mean, n: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap (Efron and Tibshirani 1993, chapter 13) of a statistic of values, (N,) or (N, d).

    Rows are resampled with replacement, whole, `n` times; a function of its arguments alone. A distance between
    distributions is biased upwards in every resample, which has fewer different rows: its interval lies too high.
    """
    values, rng = np.asarray(values), np.random.default_rng(seed)
    found = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(n)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share: of `hits` among `n` >= 1 trials; not empty at 0 and at 1."""
    low, high = binomtest(int(hits), int(n)).proportion_ci(method="wilson")
    return float(low), float(high)


def interval(values: list[float]) -> tuple[float, float]:
    """Of the mean of values in [0, 1]: Wilson's where each is 0 or 1, else the bootstrap's."""
    return wilson(sum(values), len(values)) if set(values) <= {0, 1} else bootstrap(values)
