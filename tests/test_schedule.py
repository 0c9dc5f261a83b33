import time
import tracemalloc

import numpy as np
import pytest

from clipgen_lib.data.batches import batch_rows

BLOCKS = np.concatenate([[0], np.cumsum([7, 1, 30, 0, 12, 5] * 20)])  # 120 blocks of uneven size, 1100 rows


def epoch_of(n, seed=0, epoch=0, **blocks):
    """A whole epoch as one batch."""
    return batch_rows(n, n, seed, epoch, **blocks)


def excess(counts):
    """How far chi-square of counts that should be even lies above its mean, in its standard deviations."""
    even, freedom = counts.mean(), counts.size - 1
    return (((counts - even) ** 2 / even).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 64, 97, 100, 101, 1023, 1024, 1025, 9973, 65536])
def test_every_row_exactly_once_an_epoch(n):
    for seed in (0, 1, 2**31):
        for epoch in (0, 1, 10**6):
            assert np.array_equal(np.sort(epoch_of(n, seed, epoch)), np.arange(n))


def test_batches_of_any_size_are_cut_from_the_same_epochs():
    whole = np.concatenate([epoch_of(23, 5, epoch) for epoch in range(3)])
    for size in (1, 4, 69):
        cut = np.concatenate([batch_rows(23, size, 5, step) for step in range(69 // size)])
        assert np.array_equal(cut, whole[: len(cut)])
    rows = np.concatenate([epoch_of(1100, 5, epoch, blocks=BLOCKS) for epoch in range(2)])
    cut = np.concatenate([batch_rows(1100, 32, 5, step, BLOCKS) for step in range(68)])
    assert np.array_equal(cut, rows[: len(cut)])


def test_seeds_and_epochs_differ():
    orders = [tuple(epoch_of(50, seed, epoch)) for seed in range(5) for epoch in range(5)]
    orders += [tuple(epoch_of(1100, seed, epoch, blocks=BLOCKS)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("n", [3, 5, 7, 16, 20, 37, 64])
def test_a_row_is_anywhere_and_its_neighbour_too(n):
    """Chi-square over 2000 epochs of which row stands where, and of the distance between neighbours."""
    places, distances = np.zeros((n, n)), np.zeros(n)
    for epoch in range(2000):
        rows = epoch_of(n, 7, epoch)
        places[np.arange(n), rows] += 1
        distances += np.bincount(np.diff(rows) % n, minlength=n)
    assert distances[0] == 0 and excess(places) < 5 and excess(distances[1:]) < 5


def test_a_long_epoch_has_no_trend():
    rows = epoch_of(100_003, 3)
    assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.02
    assert abs(np.corrcoef(rows[1:], rows[:-1])[0, 1]) < 0.02
    assert excess(np.histogram(rows[:20_000], 50)[0]) < 5


def test_ten_million_rows_cost_what_a_batch_costs():
    batch_rows(10**7, 256, 0, 0)
    tracemalloc.start()
    batch_rows(10**7, 256, 0, 39_062)  # the last of the first epoch and the first of the second
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    times = []
    for step in range(20):
        began = time.perf_counter()
        batch_rows(10**7, 256, 0, step)
        times.append(time.perf_counter() - began)
    assert min(times) < 2e-3  # about 0.2 ms; a shuffle of all rows takes 500


def test_blocks_keep_batches_together():
    for epoch in range(3):
        rows = epoch_of(1100, 2, epoch, blocks=BLOCKS)
        assert np.array_equal(np.sort(rows), np.arange(1100))
    block = np.searchsorted(BLOCKS, rows, "right") - 1
    for start in range(0, 1100, 32):  # a batch touches the blocks of one window, or of two where it lies across
        assert len(set(block[start : start + 32])) <= 32
    order = list(dict.fromkeys(block))
    spans = [np.ptp(np.flatnonzero(block == b)) for b in order]
    assert max(spans) < 16 * 30 < 1100 and order != sorted(order)
    assert len(set(np.abs(np.diff(order[:16])))) > 3, "blocks are in another order, not merely turned"


def test_few_blocks_are_shuffled_as_a_whole():
    assert np.array_equal(epoch_of(40, blocks=np.array([0, 10, 40])), epoch_of(40))
    assert np.array_equal(epoch_of(1100, blocks=BLOCKS, window=120), epoch_of(1100))
    rows = epoch_of(40, blocks=np.array([0, 10, 40]), window=1)
    assert set(rows[:10]) == set(range(10)) or set(rows[30:]) == set(range(10))
