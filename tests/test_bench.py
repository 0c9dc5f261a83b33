import json
from dataclasses import replace

import pytest
import torch

from clipgen_lib import bench, bench_sampling, timing
from clipgen_lib.config import SampleConfig, TransformerConfig
from clipgen_lib.sample import generate

CPU = torch.device("cpu")
SMALL = TransformerConfig(layers=2, width=32, heads=2, condition_tokens=1)


def test_rounds_alternate_and_the_warm_up_does_not_count():
    order, now = [], [0.0]

    def action(name, seconds):
        def act():
            order.append(name)
            now[0] += seconds[min(order.count(name), len(seconds)) - 1]

        return act

    actions = {"a": action("a", [100, 1, 2, 3]), "b": action("b", [100, 4, 6, 12])}
    seconds = timing.in_turns(actions, rounds=3, clock=lambda: now[0])
    assert order == ["a", "b"] * 4
    assert seconds == {"a": [1, 2, 3], "b": [4, 6, 12]}
    assert timing.spread(seconds["b"]) == {"median": 6, "least": 4, "most": 12}
    assert timing.ratio(seconds["a"], seconds["b"]) == {"median": 4, "least": 3, "most": 4}


def test_a_device_is_waited_for_around_every_timed_call():
    order = []
    timing.in_turns({"a": lambda: order.append("a")}, 2, wait=lambda: order.append("wait"))
    assert order == ["wait", "a", "wait"] * 3


def test_limits_are_rates():
    found = timing.limits(CPU, rounds=1)
    assert set(found) == {"matmul_float32", "matmul_bfloat16", "copy"} and min(found.values()) > 1e8


def test_the_peer_without_a_cache_draws_the_same_tokens():
    torch.manual_seed(0)
    model = bench_sampling.ImageTransformer(SMALL, 64, 12, 8).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    settings = SampleConfig(guidance=1.0, top_k=20, top_p=0.9)
    wanted = generate(model, bench_sampling.directions(model, 3), [0, 1, 2], settings)
    with torch.inference_mode():
        assert torch.equal(bench_sampling.uncached(model, 3, settings), wanted)
    assert torch.equal(bench_sampling.drawing(model, 3, settings)(), wanted)
    drawn = bench_sampling.uncached(model, 3, settings, stride=4)
    assert drawn[:, 2::4].any() and not drawn[:, 3::4].any(), "one step of four is run"


def test_weights_that_a_step_reads_are_counted_by_hand():
    model = bench_sampling.ImageTransformer(SMALL, 64, 12, 8)
    block = 2 * 64 + (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32)
    assert bench_sampling.read_bytes(model) == 4 * (2 * block + 64 + 32 * 64 + 64)
    assert bench_sampling.read_bytes(model.bfloat16()) == 2 * (2 * block + 64 + 32 * 64 + 64)


def test_sampling_is_compared_where_there_are_peers(monkeypatch):
    """A small model, Hugging Face absent: the rows that need it are not there."""
    monkeypatch.setattr(bench_sampling, "peers", lambda: {"transformers": timing.ABSENT})
    limits = {"matmul_float32": 2e9, "matmul_bfloat16": 3e9, "copy": 1e9}
    found = bench_sampling.sampling(CPU, limits, 2, batches=(1, 2), model=SMALL, codes=64, length=32)
    assert [(x["dtype"], x["batch"]) for x in found["details"]] == [(d, b) for d in ("float32", "bfloat16") for b in (1, 2)]
    model = bench_sampling.ImageTransformer(SMALL, 64, 32, 8)
    first, third = found["details"][0], found["details"][2]
    assert first["limit_seconds"] == pytest.approx(bench_sampling.read_bytes(model) * 32 / 1e9)
    assert third["limit_seconds"] == pytest.approx(first["limit_seconds"] / 2)
    assert all(0 < sum(x["profile"].values()) <= 1.001 for x in found["details"])
    assert [line["peer"].split()[0] for line in found["table"]] == ["the", "of", "of", "time", "time"] * 2
    value = found["table"][1]["value"]  # the share of the limit at batch 1
    assert value["least"] <= first["limit_seconds"] / first["seconds"]["ours"]["median"] * 1.001
    assert found["table"][1]["asked"] == 0.6 and found["table"][2]["asked"] is None


def test_sections_are_measured_written_and_printed(tmp_path, monkeypatch):
    """What a file holds of other sections stays; every goal stands beside what was reached."""
    spread = {"median": 2.0, "least": 1.5, "most": 2.25}
    table = [
        timing.row("batch 1", "a peer", spread, 1.8),
        timing.row("batch 16", "a peer", spread, 2.1),
        timing.row("loading", "of a step", {"median": 0.02, "least": 0.01, "most": 0.04}, 0.03, most=True, unit="%"),
        timing.row("start", "", spread, unit="s"),
    ]
    sections = {"new": lambda device, limits, rounds: {"table": table, "rounds": rounds}, "old": None}
    monkeypatch.setattr(bench, "SECTIONS", sections)
    monkeypatch.setattr(bench, "limits", lambda device: {"matmul_float32": 2e9, "matmul_bfloat16": 3e9, "copy": 1e9})
    (tmp_path / "cpu.json").write_text('{"old": {"kept": 1}, "gone": {}}')
    found = bench.run(("new",), tmp_path, CPU, rounds=2)
    assert found == json.loads((tmp_path / "cpu.json").read_text()) and list(found) == ["new", "old"]
    assert found["new"]["rounds"] == 2 and found["old"] == {"kept": 1}
    lines = bench.lines_of({"new": found["new"]}).splitlines()
    assert lines[0].startswith("new: ") and "matmul float32 2 GFLOP/s" in lines[0] and "copy 1.0 GB/s" in lines[0]
    assert lines[1].split() == ["batch", "1", "a", "peer", "2x", "(1.5", "to", "2.25)", "at", "least", "1.8x:", "met"]
    assert lines[2].endswith("at least 2.1x: not met") and lines[3].split()[-8:] == [
        "2%",
        "(1",
        "to",
        "4)",
        "at",
        "most",
        "3%:",
        "met",
    ]
    assert lines[4].split() == ["start", "2", "s", "(1.5", "to", "2.25)"]
    assert len({line.index("2") for line in lines[3:5]}) == 1, "columns stand under one another"


def test_the_peer_of_hugging_face_has_our_size():
    pytest.importorskip("transformers", reason="transformers is not installed")
    draw = bench_sampling.huggingface(replace(SMALL), 64, 12, 3, torch.float32, CPU)
    assert draw().shape == (3, 13), "the start and 12 tokens"
    peer, own = draw.__closure__[[c for c in draw.__code__.co_freevars].index("peer")].cell_contents, bench_sampling.ImageTransformer(SMALL, 64, 12, 8)  # fmt: skip
    ours = sum(p.numel() for p in own.blocks.parameters())
    assert sum(p.numel() for p in peer.transformer.h.parameters()) == ours
