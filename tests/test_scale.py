import time

import numpy as np
import pytest

from clipgen_lib.runs import ClipgenError
from clipgen_lib.scale import store_speed, synthetic_store
from clipgen_lib.store import TokenStore


def test_a_store_of_128_shards_opens_at_once_and_is_whole(tmp_path):
    told = []
    synthetic_store(tmp_path / "store", 262_144, 4, 8, told.append)
    start = time.perf_counter()
    store = TokenStore.open(tmp_path / "store")
    assert time.perf_counter() - start < 1 and store.meta["shards"] == told == 128 * [2_048]
    rows = np.random.default_rng(0).integers(0, len(store), 1_000)
    everything = np.concatenate([np.fromfile(path, np.uint16) for path in sorted(store.folder.glob("*/tokens.u16"))])
    assert (store.tokens(rows).numpy() == everything.reshape(-1, 4)[rows]).all() and len(np.unique(everything)) == 1_024
    assert (store.arrays["rows"][rows] == rows).all()
    assert abs(np.linalg.norm(store.arrays["embeds"][:1_000].astype(np.float64), axis=1).mean() - 1) < 0.1


def test_speed_is_measured_and_nothing_is_left(tmp_path):
    found = store_speed(tmp_path / "new", 5_000, 4, 8, batch_size=32, batches=20, repeats=3, smaller=(), show_progress=False)
    assert found["shards"] == 3 and found["bytes"] > 5_000 * (2 * 4 + 2 * 8 + 4)
    for name in ("store", "peer"):
        assert found[name]["cold"] > 0 and 0 < found[name]["warm"]["least"] <= found[name]["warm"]["median"] <= found[name]["warm"]["most"]  # fmt: skip
    assert found["memory"]["5000"]["own"] > 50e6 and not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(ClipgenError, match="mine exists: give a new folder"):
        store_speed(tmp_path / "mine", 5_000)
    assert (tmp_path / "mine").is_dir()
