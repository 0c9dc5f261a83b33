import numpy as np
import pytest

from clipgen_lib.metrics.intervals import bootstrap, wilson


@pytest.mark.parametrize("statistic, truth", [(np.mean, 0.0), (lambda rows: rows.std(0).sum(), 2.0)])
def test_nineteen_of_twenty_intervals_hold_the_truth(statistic, truth):
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(150, 100, 2))
    found = [bootstrap(sample, statistic, n=100, seed=i) for i, sample in enumerate(samples)]
    assert 0.89 < np.mean([low < truth < high for low, high in found]) < 0.98
    assert bootstrap(np.arange(9.0)) == bootstrap(np.arange(9.0)) != bootstrap(np.arange(9.0), seed=1)


def test_wilson_is_its_formula():
    """Of 84 in 100: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96."""
    assert wilson(84, 100) == pytest.approx((0.755797, 0.899047), abs=1e-6)
    assert wilson(0, 8)[0] == 0 and wilson(0, 8)[1] == pytest.approx(1 - wilson(8, 8)[0]) == pytest.approx(
        0.3244, abs=1e-4
    )
