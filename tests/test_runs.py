import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from clipgen_lib.runtime import runs
from clipgen_lib.runtime.checkpoints import load_checkpoint, save_checkpoint, save_weights
from clipgen_lib.runtime.runs import ClipgenError, Run, fresh_folder, held, open_run, room_on_disk, write_atomic


def python(code, *arguments, environment=None, **options):
    """A program in a process of its own, which has the names of `runs`."""
    code = "from clipgen_lib.runtime.runs import *\nimport pathlib\n" + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, text=True, **options)


def test_checkpoints_keep_structure_and_bits(tmp_path):
    x = torch.randn(4)
    state = {"a": {3: {"x": x, "part": x[1:]}}, "b": [1, 2.5, None, "s", torch.arange(3)], "flag": True}
    save_checkpoint(tmp_path / "c", state, {"seed": 1})
    found, meta = load_checkpoint(tmp_path / "c")
    assert meta == {"seed": 1} and torch.equal(found["a"][3]["x"], x) and torch.equal(found["a"][3]["part"], x[1:])
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
    for content, sentence in ((b"{", "not valid"), (b"\xff", "not valid JSON"), (b"[]", "JSON list, not an object")):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ClipgenError, match=sentence):
            runs.read_json(tmp_path / "x.json")


def test_an_interrupted_write_leaves_the_old_version(tmp_path):
    write_atomic(tmp_path / "f", "old")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "f", 3)
    write_atomic(tmp_path / "folder" / "x", "old")
    with pytest.raises(KeyboardInterrupt), fresh_folder(tmp_path / "folder") as fresh:
        (fresh / "x").write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "f").read_text() == (tmp_path / "folder" / "x").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("umask, file, folder", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_rights_are_those_of_the_umask(umask, file, folder, tmp_path, vqgan):
    before = os.umask(umask)
    try:
        save_weights(tmp_path / "run" / "vqgan", vqgan)
        save_checkpoint(tmp_path / "run" / "c.safetensors", {"x": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path


KILLED = """
    place = pathlib.Path(sys.argv[1])
    with fresh_folder(place / "vqgan") as folder, fresh_file(place / "checkpoints" / "a.safetensors") as file:
        (folder / "x").write_text("new")
        file.write_text("new")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_writes_leave_is_swept_and_what_was_there_comes_back(tmp_path):
    run = open_run("r", tmp_path)
    write_atomic(run.path / "vqgan" / "x", "old")
    before = set(tmp_path.rglob("*"))
    python(KILLED, run.path).wait()
    assert len(list(tmp_path.rglob("*.new"))) == 2
    (run.path / "vqgan").rename(run.path / ".vqgan.old")  # as after a kill between the two renames
    assert (open_run("r", tmp_path).path / "vqgan" / "x").read_text() == "old"
    assert set(tmp_path.rglob("*")) - before == {tmp_path / ".r.lock", run.path / "checkpoints"}
    with fresh_folder(run.path / "vqgan") as folder:
        (folder / "y").write_text("new")
    assert [path.name for path in (run.path / "vqgan").iterdir()] == ["y"]


ERRORS = [
    (PermissionError(13, "Permission denied", "/x"), "Permission denied: '/x': get the right"),
    (OSError(1, "Operation not permitted", "/x"), "get the right"),
    (OSError(30, "Read-only file system", "/x"), "/x': choose another place"),
    (OSError(24, "Too many open files", "/x"), "ulimit"),
    (OSError(28, "No space left on device"), "no room for /target (2 GB are missing): free some"),
    (OSError(5, "Input/output error"), "/target: Input/output error: see that its disk is there"),
    (TimeoutError(110, "Connection timed out", "/x"), "see that its disk is there"),
    (OSError(116, "Stale file handle", "/x"), "see that its disk is there"),
    (OSError(12, "Cannot allocate memory"), "memory is used up"),
    (MemoryError(), "memory is used up (MemoryError)"),
    (torch.OutOfMemoryError("CUDA out of memory"), "memory is used up (CUDA out of memory)"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory is used up"),
]


@pytest.mark.parametrize("error, sentence", ERRORS)
def test_errors_of_the_machine_are_one_sentence_with_a_cure(error, sentence):
    for lacking in (2e9, 0):
        with pytest.raises(ClipgenError) as raised, room_on_disk("/target", lambda lacking=lacking: lacking):
            raise error
        wanted = sentence if lacking else sentence.replace(" (2 GB are missing)", "")
        assert wanted in str(raised.value) and "Errno" not in str(raised.value)


def test_an_error_of_the_code_stays_what_it_is(tmp_path):
    for kind, text in (("ValueError", "[Errno 13] x"), ("RuntimeError", "exit code: 1"), ("KeyError", "'a'")):
        assert runs.explained(kind, text) == ""
    for error in (ZeroDivisionError, BrokenPipeError):
        with pytest.raises(error), room_on_disk(tmp_path):
            raise error


def test_published_results_are_read_only(tmp_path, monkeypatch):
    run = open_run("r", tmp_path)
    run.add_to_summary(oracle=1)
    (run.path / "published").touch()
    for write in (lambda: run.add_to_summary(oracle=2), lambda: run.log("a", 1), lambda: run.file("x")):
        with pytest.raises(ClipgenError, match="r is a published result: write elsewhere"):
            write()
    with pytest.raises(ClipgenError, match="published"), held(run.path, "the run"):
        pass
    assert open_run("r", tmp_path).summary()["oracle"] == 1
    monkeypatch.setenv("CLIPGEN_PUBLISH", "1")
    assert run.add_to_summary(oracle=2)["oracle"] == 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_is_obeyed_between_two_steps(name):
    saved, number = [], signal.Signals[name]
    before = signal.signal(number, signal.SIG_DFL)
    with pytest.raises(runs.Stopped, match=f"stopped by {name} after step 3") as stopped, runs.stoppable() as stop:
        stop.raise_if_asked(lambda: saved.append(1), "after step 1")
        os.kill(os.getpid(), number)
        stop.raise_if_asked(lambda: saved.append(3), "after step 3")
    assert saved == [3] and stopped.value.exit_code == 128 + number
    assert signal.signal(number, signal.SIG_IGN) == signal.SIG_DFL
    with runs.stoppable() as stop:  # as under nohup
        if name == "SIGHUP":
            os.kill(os.getpid(), number)
    assert stop.number == 0
    signal.signal(number, before)


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


def test_names_seeds_and_differences(tmp_path):
    assert runs.differences({"a": {"b": 1, "c": (1, 2)}}, {"a": {"b": 2, "c": [1, 2]}, "d": 0}) == ["a.b", "d"]
    for name in ("", "a/b/c", "a/", "/a", "a/..", "..", ".hidden", "x" * 300, "a\nb", "a\0b", " a", None):
        with pytest.raises(ClipgenError, match="plain folder name"):
            open_run(name, tmp_path)
    for seed in (-1, 2**64, 1.5, "abc", None):
        with pytest.raises(ClipgenError, match="is not a whole number from 0 to"):
            Run(tmp_path, seed)


def test_places_move_by_the_environment(tmp_path):
    def places(**names):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("CLIPGEN_")} | names
        code = "print(json.dumps([str(ROOT), str(DATA), str(RESULTS), str(MADE_DATA)]))"
        return json.loads(python(code, environment=environment, stdout=subprocess.PIPE).communicate()[0])

    home, elsewhere, made = (str(tmp_path / name) for name in ("home", "elsewhere", "made"))
    assert places(CLIPGEN_HOME=home) == [home, f"{home}/data", f"{home}/results", f"{home}/data"]
    assert places(CLIPGEN_HOME=home, CLIPGEN_RESULTS=elsewhere, CLIPGEN_DATA=made)[2:] == [elsewhere, made]


def test_bars_are_off_where_the_environment_says_so_and_end_nothing_where_they_cannot_be_written(capsys):
    assert os.environ["CLIPGEN_PROGRESS"] == "0"
    with runs.progress(3, "label", initial=1) as bar:
        bar.update(2)
    assert bar.disable and capsys.readouterr().err == ""
    code = "with progress(9, 'x') as bar:\n    for i in range(9): time.sleep(0.11); bar.update()\nprint('done')"
    reader, writer = os.pipe()
    environment = {key: value for key, value in os.environ.items() if key != "CLIPGEN_PROGRESS"}
    os.close(reader)
    assert python(code, environment=environment, stdout=subprocess.PIPE, stderr=writer).communicate()[0] == "done\n"
    os.close(writer)


def test_a_second_process_is_told_who_holds_what_it_would_write(tmp_path):
    code = "with held(pathlib.Path(sys.argv[1]), 'the store'):\n    print('held', flush=True)\n    sys.stdin.read()"
    first = python(code, tmp_path / "store", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == "held\n"
    told = f"the store is being made in .* by process {first.pid} on .* since"
    with pytest.raises(ClipgenError, match=told), held(tmp_path / "store", "the store"):
        pass
    first.kill()  # a dead process holds nothing
    first.wait()
    with held(tmp_path / "store", "the store"):
        pass
