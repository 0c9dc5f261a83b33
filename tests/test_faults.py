import json
import signal
from pathlib import Path

import pytest

from clipgen_lib import faults
from clipgen_lib.faults import Harness, bars, lines_of, lost, run_faults

RESULTS = Path(__file__).parents[1] / "results"


def test_what_a_fault_cost_is_read_from_the_bars(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_text(
        "training VQGAN\tfrom\t20\ntraining VQGAN\tat\t21\ntraining VQGAN\tat\t33\ndrawing for captions\tfrom\t0\ndrawing for captions\tat\t9\nsampling\tat"
    )
    after.write_text("training VQGAN\tfrom\t30\ntraining VQGAN\tat\t40\ndrawing for captions\tfrom\t0\n")
    assert bars(before) == {"training VQGAN": (20, 33), "drawing for captions": (0, 9)}
    assert lost("train-vqgan", bars(before), bars(after)) == 3  # previews on the way are no work of a training
    assert lost("evaluate", bars(before), bars(after)) == 9
    assert bars(tmp_path / "none") == {}


def test_a_killed_training_survives_and_another_result_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(faults.TRAINED, "train-vqgan", 60)
    harness = Harness(tmp_path, seed=1)
    harness.make_whole(("train-vqgan",))
    row = harness.kills("train-vqgan", signal.SIGKILL, 1)
    assert (row.injected, row.survived, row.corrupted) == (1, 1, 0) and row.lost_steps <= 20
    weights, before = harness.whole.run / "vqgan" / "model.safetensors", harness.whole.outputs("train-vqgan")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert harness.whole.outputs("train-vqgan") != before


@pytest.mark.slow
def test_every_fault_is_survived(tmp_path):
    table = run_faults(5, seed=2, folder=tmp_path / "faults")
    assert all(row["survived"] == row["injected"] and row["corrupted"] == 0 for row in table), lines_of(table)


def test_the_committed_table_is_whole_and_in_the_report():
    table = json.loads((RESULTS / "faults" / "table.json").read_text())
    assert sum(row["injected"] for row in table if row["fault"] == "SIGKILL") >= 20
    assert {row["step"] for row in table} == set(faults.STEPS)
    assert all(row["survived"] == row["injected"] and row["corrupted"] == 0 for row in table)
    assert lines_of(table) in (RESULTS / "README.md").read_text()
