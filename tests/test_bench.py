import json
from dataclasses import replace

import pytest
import torch

from clipgen_lib import bench
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
    seconds = bench.in_turns(actions, rounds=3, clock=lambda: now[0])
    assert order == ["a", "b"] * 4
    assert seconds == {"a": [1, 2, 3], "b": [4, 6, 12]}
    assert bench.spread(seconds["b"]) == {"median": 6, "least": 4, "most": 12}
    assert bench.ratio(seconds["a"], seconds["b"]) == {"median": 4, "least": 3, "most": 4}


def test_a_device_is_waited_for_around_every_timed_call():
    order = []
    bench.in_turns({"a": lambda: order.append("a")}, 2, wait=lambda: order.append("wait"))
    assert order == ["a", "wait", "a", "wait", "wait", "a", "wait"]


def test_limits_are_rates():
    found = bench.limits(CPU, rounds=1)
    assert set(found) == {"matmul_float32", "matmul_bfloat16", "copy"} and min(found.values()) > 1e8


def test_the_peer_without_a_cache_draws_the_same_tokens():
    torch.manual_seed(0)
    model = bench.ImageTransformer(SMALL, 64, 12, 8).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    settings = SampleConfig(guidance=1.0, top_k=20, top_p=0.9)
    wanted = generate(model, bench.directions(model, 3), [0, 1, 2], settings)
    with torch.inference_mode():
        assert torch.equal(bench.uncached(model, 3, settings), wanted)
    assert torch.equal(bench.drawing(model, 3, settings)(), wanted)
    drawn = bench.uncached(model, 3, settings, stride=4)
    assert drawn[:, 2::4].any() and not drawn[:, 3::4].any(), "one step of four is run"


def test_weights_that_a_step_reads_are_counted_by_hand():
    model = bench.ImageTransformer(SMALL, 64, 12, 8)
    block = 2 * 64 + (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32)
    assert bench.read_bytes(model) == 4 * (2 * block + 64 + 32 * 64 + 64)
    assert bench.read_bytes(model.bfloat16()) == 2 * (2 * block + 64 + 32 * 64 + 64)


def test_a_section_is_measured_written_and_printed(tmp_path, monkeypatch):
    """A small model; the peer is absent, and the file says so. What other sections hold stays."""
    monkeypatch.setattr(bench, "PEERS", ("no-such-package",))
    monkeypatch.setattr(bench, "peers", lambda: {"transformers": "absent: install the extra `bench`"})
    monkeypatch.setattr(bench, "limits", lambda device: {"matmul_float32": 2e9, "matmul_bfloat16": 3e9, "copy": 1e9})
    (tmp_path / "cpu.json").write_text('{"other": {"kept": 1}}')
    found = bench.run(("sampling",), tmp_path, CPU, batches=(1, 2), rounds=2, model=SMALL, codes=64, length=32)
    assert found == json.loads((tmp_path / "cpu.json").read_text()) and found["other"] == {"kept": 1}
    rows = found["sampling"]["rows"]
    assert [(row["dtype"], row["batch"]) for row in rows] == [(d, b) for d in ("float32", "bfloat16") for b in (1, 2)]
    model = bench.ImageTransformer(SMALL, 64, 32, 8)
    assert rows[0]["limit_seconds"] == pytest.approx(bench.read_bytes(model) * 32 / 1e9)
    assert rows[2]["limit_seconds"] == pytest.approx(rows[0]["limit_seconds"] / 2)
    for row in rows:
        assert 0 < sum(row["profile"].values()) <= 1.001
        assert set(row["ratios"]) == ({"uncached", "limit"} if row["batch"] == 1 else {"limit"})
        share = row["limit_seconds"] / row["seconds"]["ours"]["median"]
        assert row["ratios"]["limit"]["least"] <= share * 1.001 and share <= row["ratios"]["limit"]["most"] * 1.001
    page = bench.lines_of(found)
    assert "peer transformers: absent: install the extra `bench`" in page and "[0.6]" in page and "[at most 1.3]" in page


def test_the_peer_of_hugging_face_has_our_size():
    pytest.importorskip("transformers", reason="transformers is not installed")
    draw = bench.huggingface(replace(SMALL), 64, 12, 3, torch.float32, CPU)
    assert draw().shape == (3, 13), "the start and 12 tokens"
    peer, own = draw.__closure__[[c for c in draw.__code__.co_freevars].index("peer")].cell_contents, bench.ImageTransformer(SMALL, 64, 12, 8)  # fmt: skip
    ours = sum(p.numel() for p in own.blocks.parameters())
    assert sum(p.numel() for p in peer.transformer.h.parameters()) == ours
