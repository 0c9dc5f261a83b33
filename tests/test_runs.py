import pytest
import torch

from clipgen_lib.runtime.checkpoints import load_checkpoint, save_checkpoint
from clipgen_lib.runtime.runs import ClipgenError, fresh_folder, open_run, write_atomic


def test_checkpoints_keep_structure_and_bits(tmp_path):
    state = {"a": {3: {"x": torch.randn(4)}}, "b": [1, 2.5, None, "s", torch.arange(3)], "flag": True}
    save_checkpoint(tmp_path / "c", state, {"seed": 1})
    found, meta = load_checkpoint(tmp_path / "c")
    assert meta == {"seed": 1} and torch.equal(found["a"][3]["x"], state["a"][3]["x"])
    assert (
        found["b"][:4] == [1, 2.5, None, "s"] and torch.equal(found["b"][4], torch.arange(3)) and found["flag"] is True
    )


def test_damaged_checkpoints_are_one_sentence(tmp_path):
    save_checkpoint(tmp_path / "c", {"x": torch.randn(100)}, {})
    whole = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ClipgenError, match="damaged"):
        load_checkpoint(tmp_path / "c")
    with pytest.raises(ClipgenError, match="missing"):
        load_checkpoint(tmp_path / "d")


def test_an_interrupted_write_leaves_the_old_version(tmp_path):
    write_atomic(tmp_path / "f", "old")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "f", 3)
    assert (tmp_path / "f").read_text() == "old"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), fresh_folder(tmp_path / "folder") as fresh:
        (fresh / "x").write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "folder" / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_summary_merges_and_metrics_rewind(tmp_path):
    run = open_run("r", tmp_path)
    run.add_to_summary(seconds={"vqgan": 1.0}, seed=0)
    assert run.add_to_summary(seconds={"extract": 2.0})["seconds"] == {"vqgan": 1.0, "extract": 2.0}
    for step in (1, 2, 3):
        run.log("a", step, loss=step)
        run.log("b", step, loss=float("nan"))
    run.rewind("a", 2)
    assert [line["step"] for line in run.metrics("a")] == [1, 2] and len(run.metrics("b")) == 3
    assert run.metrics("b")[0]["loss"] is None
    with open(run.path / "metrics.jsonl", "a") as stream:
        stream.write('{"stage": "a", "st')  # a line cut short by a kill
    assert len(run.metrics("a")) == 2


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_run_names_are_plain(name, tmp_path):
    with pytest.raises(ClipgenError, match="plain folder name"):
        open_run(name, tmp_path)
