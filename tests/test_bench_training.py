from dataclasses import replace

import pytest
import torch

from clipgen_lib import bench_training, timing
from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.config import ClipConfig, TransformerConfig, load_preset
from clipgen_lib.scale import WORK, Clock, fitted, synthetic_store, timed

CPU = torch.device("cpu")
LIMITS = {"matmul_float32": 2e12, "matmul_bfloat16": 3e12, "copy": 1e12}
TINY = TransformerConfig(layers=2, width=32, heads=2, condition_tokens=1)


@pytest.fixture
def small():
    preset, _, _ = fitted(load_preset("smoke"), "cpu")
    return replace(
        preset, transformer=TINY, clip=ClipConfig(),
        vqgan_train=replace(preset.vqgan_train, batch_size=4), transformer_train=replace(preset.transformer_train, batch_size=4),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(bench_training, "WARM_UP", 1)
    monkeypatch.setattr(bench_training, "STEPS", 2)


def values(found, peer):
    return [line["value"]["median"] for line in found["table"] if line["peer"] == peer]


def test_ways_take_turns_and_a_round_is_a_median():
    order, seconds = [], {"a": iter([9, 1, 5, 9, 2, 4]), "b": iter([9, 3, 3, 9, 7, 8])}

    def work(name):
        def ticks(clock):
            while True:
                order.append(name)
                clock.times.append((clock.times[-1] if clock.times else 0) + next(seconds[name]))
                if len(clock.times) == 3:
                    return

        return ticks

    found = bench_training.by_rounds({name: work(name) for name in "ab"}, CPU, 2, "")
    assert order == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3
    assert found == {"a": [3, 3], "b": [3, 7.5]}


def test_stage_two_beside_its_peers(small, monkeypatch):
    """Shares and rates follow from the seconds of a step; Hugging Face, absent, has no row."""
    monkeypatch.setattr(bench_training, "peers", lambda: {"transformers": timing.ABSENT})
    monkeypatch.setattr(bench_training, "CLIP_DIM", ClipEmbedder.load().dim)
    found = bench_training.transformer(CPU, LIMITS, 2, small, small)
    details, tokens = found["details"], small.vqgan.side**2
    step = details["seconds"]["ours"]["median"]
    assert details["tokens"] == 4 * tokens and not values(found, "Hugging Face GPT-2")
    assert values(found, "tokens a second")[0] == pytest.approx(4 * tokens / step, rel=0.5)
    assert values(found, "of the matmul peak")[0] == pytest.approx(details["operations"] / step / 3e12, rel=0.5)
    assert 0 < values(found, "of a step is loading data")[0] < 1 and sum(details["profile"].values()) <= 1.001
    assert values(found, "the step with VQGAN and CLIP in the loop, float32")[0] > 0
    assert "6% of a batch of 4" in found["table"][-1]["what"] and found["table"][-1]["value"]["median"] > 0


def test_stage_one_beside_its_bare_passes(small, monkeypatch):
    monkeypatch.setattr(bench_training, "load_preset", lambda name: small)
    found = bench_training.vqgan(CPU, LIMITS, 1, ("smoke",))
    seconds = {way: values["median"] for way, values in found["details"]["smoke"]["seconds"].items()}
    assert values(found, "time of the bare passes") == [pytest.approx(seconds["ours"] / seconds["bare"])]
    assert values(found, "as in float32") == [pytest.approx(seconds["float32"] / seconds["ours"])]
    assert values(found, "pictures a second") == [pytest.approx(4 / seconds["ours"])]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_peer_trains(small, precision, monkeypatch):
    """Its loss falls on the one batch that it sees: it is a training and not a loop around nothing."""
    losses, update = [], bench_training._update
    monkeypatch.setattr(bench_training, "_update", lambda loss, *rest: (losses.append(loss.item()), update(loss, *rest)))
    timed(bench_training.encoding_steps(small, ClipEmbedder.load(), CPU, precision), Clock("cpu", 1, 12, 60.0))
    assert losses[-1] < losses[0] - 0.05


def test_the_training_of_hugging_face_has_our_size(small, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    losses, update = [], bench_training._update
    monkeypatch.setattr(bench_training, "_update", lambda loss, *rest: (losses.append(loss.item()), update(loss, *rest)))
    assert len(timed(bench_training.huggingface_steps(small, CPU), Clock("cpu", 1, 12, 60.0))) == 12 and losses[-1] < losses[0]


def test_our_step_is_the_training_itself(small, tmp_path, monkeypatch):
    """What is timed takes optimiser steps of the real loop."""
    clip, steps = ClipEmbedder.load(), []
    synthetic_store(tmp_path / "store", 64, small.vqgan.side**2, clip.dim, codes=small.vqgan.codebook_size)
    from clipgen_lib import train

    real = train.apply
    monkeypatch.setattr(train, "apply", lambda *args: (steps.append(1), real(*args)))
    assert len(timed(WORK["transformer"](small, "cpu", clip, tmp_path, 4), Clock("cpu", 1, 3, 60.0))) == 3 and len(steps) == 4
