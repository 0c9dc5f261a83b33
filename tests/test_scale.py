import sys
import time

import numpy as np
import pytest
import torch

from clipgen_lib import scale
from clipgen_lib.config import load_preset
from clipgen_lib.cost import count
from clipgen_lib.losses import PatchDiscriminator
from clipgen_lib.runs import ClipgenError
from clipgen_lib.scale import (
    Clock,
    fitted,
    lines_of,
    projected_seconds,
    repeated,
    store_lines,
    store_speed,
    synthetic_store,
    throughput,
    timed,
)
from clipgen_lib.store import TokenStore
from clipgen_lib.timing import matmul_peak


def test_a_clock_takes_the_time_of_work_and_not_of_warming_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    steps = []

    def slow_at_first():
        steps.append(1)
        now[0] += 100 if len(steps) <= 2 else len(steps)

    told = []
    assert timed(repeated(slow_at_first), Clock("cpu", 2, 4, 1e9, lambda: told.append(1))) == [3, 4, 5, 6] and len(told) == 6

    def second():
        now[0] += 1.0

    assert timed(repeated(second), Clock("cpu", 1, 50, 7.5)) == 8 * [1]  # until it has taken so many seconds
    assert timed(repeated(second), Clock("cpu", 1, 50, 0.1)) == 2 * [1]  # but never one alone


def test_matrix_products_are_timed(monkeypatch):
    """The same rate as a loop of our own finds, as far as a shared machine can tell."""
    peak = matmul_peak(torch.device("cpu"), 3)
    a = torch.randn(512, 512)
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    assert (
        peak.keys() == {"float32", "bfloat16"} and 0.2 < peak["float32"] / (20 * 2 * 512**3 / (time.perf_counter() - start)) < 5
    )


@pytest.fixture(scope="module")
def measured():
    """Smoke, with passes of the critic counted."""
    passes = []
    with pytest.MonkeyPatch.context() as patched:
        forward = PatchDiscriminator.forward
        patched.setattr(PatchDiscriminator, "forward", lambda self, x: passes.append(len(x)) or forward(self, x))
        return throughput(load_preset("smoke"), repeats=2, seconds=1.0, show_progress=False), passes


def test_every_stage_takes_the_preset_s_own_steps(measured):
    found, passes = measured
    assert {stage: v["pictures"] for stage, v in found["stages"].items()} == {
        "vqgan": 16,
        "extract": 64,
        "transformer": 32,
        "sample": 128,
    }
    assert passes[-5:] == [
        32,
        16,
        32,
        16,
        32,
    ]  # the critic's own batch at every step; from the second on the generator's say in it
    operations = count(load_preset("smoke"))
    for stage, values in found["stages"].items():
        rate = values["pictures_per_second"]
        assert 0 < rate["least"] <= rate["median"] <= rate["most"] and values["repeats"] == 2
        assert values["operations"] == operations[stage] and values["pictures"] == values["preset_pictures"]
        assert values["operations_per_second"] == pytest.approx(
            values["operations"] * values["pictures"] / values["seconds"]["median"]
        )
        assert values["share"]["float32"] == pytest.approx(values["operations_per_second"] / found["peak"]["float32"])
    assert found["notes"] == [] and found["jpeg"]["pictures_per_second"]["median"] > 10
    assert 100e3 < found["jpeg"]["bytes"] < 220e3  # as photos of COCO's
    lines = lines_of([found])
    assert lines.startswith("smoke on ") and all(f"\n{stage} " in lines for stage in found["stages"])


def test_a_run_is_projected_from_pictures_a_second():
    rates = {"vqgan": 100.0, "extract": 410.0, "transformer": 200.0, "sample": 50.0}
    measured = {"stages": {stage: {"pictures_per_second": {"median": rate}} for stage, rate in rates.items()}}
    expected = {"vqgan": 3_500 * 16 / 100, "extract": 41_000 / 410, "transformer": 8_000 * 32 / 200, "per_image": 0.02}
    assert projected_seconds(load_preset("laptop"), measured) == expected


def test_large_presets_are_measured_on_fewer_pictures(monkeypatch):
    gpu64 = load_preset("gpu64")
    monkeypatch.setattr(scale, "_free_gigabytes", lambda device: 16.0)
    small, pictures, notes = fitted(gpu64, "cpu")
    assert pictures["vqgan"] == pictures["transformer"] == small.vqgan_train.batch_size == 3
    assert small.transformer_train.accumulate == 1 and not small.vqgan_train.compile
    assert small.vqgan == gpu64.vqgan and small.transformer == gpu64.transformer
    assert "vqgan: 3 pictures in a pass, the preset has 128" in notes and "random weights in CLIP and VGG16" in notes
    assert count(small)["transformer"] > count(gpu64)["transformer"]  # one row of three bears the embedding loss, not of eight
    monkeypatch.setattr(scale, "_free_gigabytes", lambda device: 1.0)
    with pytest.raises(ClipgenError, match="with one picture at a time, and 1 GB are free: measure a smaller preset"):
        fitted(gpu64, "cpu")


def test_a_gpu_takes_whole_batches_where_they_fit(monkeypatch):
    gpu64 = load_preset("gpu64")
    monkeypatch.setattr(scale, "_free_gigabytes", lambda device: 24.0)
    small, pictures, notes = fitted(gpu64, "cuda")
    assert (small.transformer_train.batch_size, small.transformer_train.accumulate, pictures["transformer"]) == (256, 4, 256)
    assert pictures["vqgan"] == 128 and small.vqgan_train.compile and notes == ["random weights in CLIP and VGG16"]
    monkeypatch.setattr(scale, "_free_gigabytes", lambda device: 16.0)
    small, pictures, notes = fitted(gpu64, "cuda")
    assert pictures == {"vqgan": 64, "extract": 128, "transformer": 32, "sample": 128} and len(notes) == 5


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
    found = store_speed(
        tmp_path / "new", 5_000, batch_size=32, batches=20, repeats=3, smaller=(), training_steps=2, show_progress=False
    )
    assert found["shards"] == 3 and found["bytes"] > 5_000 * (2 * 64 + 2 * 256 + 4)
    for name in ("store", "peer"):
        assert found[name]["cold"] > 0 and 0 < found[name]["warm"]["least"] <= found[name]["warm"]["median"] <= found[name]["warm"]["most"]  # fmt: skip
    assert found["memory"]["5000"]["own"] > 50e6 and not list(tmp_path.iterdir())
    assert found["training_memory"]["5000"]["own"] > found["memory"]["5000"]["own"]
    assert "own memory of a process training 2 steps: " in store_lines(found)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ClipgenError, match="mine exists: give a new folder"):
        store_speed(tmp_path / "mine", 5_000)
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("says, reason", [("echo 'no room' >&2", "no room"), ("true", "it ended with status 3")])
def test_a_process_that_fails_says_why(tmp_path, monkeypatch, says, reason):
    (tmp_path / "python").write_text(f"#!/bin/sh\n{says}\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ClipgenError, match=f"process whose memory is measured has failed: {reason}"):
        scale.in_a_process("print_memory", tmp_path, 4, 1)
