import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from clipgen_lib.runtime.checkpoints import load_checkpoint, save_checkpoint
from clipgen_lib.runtime.runs import (
    ClipgenError,
    Stopped,
    differences,
    fresh_folder,
    held,
    open_run,
    progress,
    read_json,
    room_on_disk,
    stoppable,
    write_atomic,
)


def test_checkpoints_keep_structure_and_bits(tmp_path):
    state = {"a": {3: {"x": torch.randn(4)}}, "b": [1, 2.5, None, "s", torch.arange(3)], "flag": True}
    save_checkpoint(tmp_path / "c", state, {"seed": 1})
    found, meta = load_checkpoint(tmp_path / "c")
    assert meta == {"seed": 1} and torch.equal(found["a"][3]["x"], state["a"][3]["x"])
    assert found["b"][:4] == [1, 2.5, None, "s"] and found["flag"] is True
    assert torch.equal(found["b"][4], torch.arange(3))


def test_damaged_files_are_one_sentence(tmp_path):
    save_checkpoint(tmp_path / "c", {"x": torch.randn(100)}, {})
    whole = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ClipgenError, match="damaged"):
        load_checkpoint(tmp_path / "c")
    with pytest.raises(ClipgenError, match="missing"):
        load_checkpoint(tmp_path / "d")
    for content, sentence in (
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "JSON list, not an object"),
    ):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ClipgenError, match=sentence):
            read_json(tmp_path / "x.json")


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


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(ClipgenError, match=r"no room for .* \(2 GB are missing\)"), room_on_disk(tmp_path, lambda: 2e9):
        raise OSError(28, "No space left on device")
    with pytest.raises(PermissionError), room_on_disk(tmp_path):
        raise PermissionError(13, "Permission denied")


def test_a_signal_is_obeyed_between_two_steps():
    saved = []
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 3") as stopped, stoppable() as stop:
        stop.raise_if_asked(lambda: saved.append(1), "after step 1")
        os.kill(os.getpid(), signal.SIGTERM)
        stop.raise_if_asked(lambda: saved.append(3), "after step 3")
    assert saved == [3] and stopped.value.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_summary_merges_and_metrics_rewind(tmp_path):
    run = open_run("r", tmp_path)
    run.add_to_summary(seconds={"vqgan": 1.0}, seed=0)
    assert run.add_to_summary(seconds={"extract": 2.0})["seconds"] == {"vqgan": 1.0, "extract": 2.0}
    assert run.metrics("a") == []
    for step in (1, 2, 3):
        run.log("a", step, loss=step)
        run.log("b", step, loss=float("nan"))
    run.rewind("a", 2)
    assert [line["step"] for line in run.metrics("a")] == [1, 2] and len(run.metrics("b")) == 3
    assert run.metrics("b")[0]["loss"] is None
    with open(run.path / "metrics.jsonl", "a") as stream:
        stream.write('{"stage": "a", "st')  # a line cut short by a kill
    assert len(run.metrics("a")) == 2


def test_differences_name_the_fields():
    assert differences({"a": {"b": 1, "c": (1, 2)}}, {"a": {"b": 2, "c": [1, 2]}, "d": 0}) == ["a.b", "d"]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_run_names_are_plain(name, tmp_path):
    with pytest.raises(ClipgenError, match="plain folder name"):
        open_run(name, tmp_path)


def test_places_move_by_the_environment(tmp_path):
    code = (
        "import json; from clipgen_lib.runtime.runs import *; print(json.dumps([str(ROOT), str(DATA), str(RESULTS)]))"
    )
    environment = {**os.environ, "CLIPGEN_HOME": str(tmp_path)}
    environment.pop("CLIPGEN_RESULTS", None)
    found = json.loads(subprocess.check_output([sys.executable, "-c", code], env=environment))
    assert found == [str(tmp_path), str(tmp_path / "data"), str(tmp_path / "results")]
    environment["CLIPGEN_RESULTS"] = str(tmp_path / "elsewhere")
    assert json.loads(subprocess.check_output([sys.executable, "-c", code], env=environment))[2].endswith("elsewhere")


def test_bars_are_off_where_the_environment_says_so(capsys):
    assert os.environ["CLIPGEN_PROGRESS"] == "0"
    with progress(3, "label", initial=1) as bar:
        bar.update(2)
    assert bar.disable and capsys.readouterr().err == ""


def test_a_second_process_is_told_who_holds_what_it_would_write(tmp_path):
    source = """
        import sys, pathlib
        from clipgen_lib.runtime.runs import held
        with held(pathlib.Path(sys.argv[1]), "the store"):
            print("held", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(source), tmp_path / "store"]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    with (
        pytest.raises(ClipgenError, match=f"the store is being made in .* by process {first.pid} on .* since"),
        held(tmp_path / "store", "the store"),
    ):
        pass
    first.kill()  # a dead process holds nothing
    first.wait()
    with held(tmp_path / "store", "the store"):
        pass
