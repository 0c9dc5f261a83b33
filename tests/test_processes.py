"""Two processes on the CPU do what one does, by torchrun and gloo, as on a machine without its own launcher.

The jobs at the end run in the processes of a launch: `launched(__file__, "job", ...)` starts this very file there.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_passes import SAME, StandIn, same_state, statistics

from clipgen_lib import cli, evaluate, workbench
from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.config import load_preset
from clipgen_lib.data.datasets import open_images
from clipgen_lib.metrics import passes
from clipgen_lib.metrics.passes import measure
from clipgen_lib.runtime import distributed as processes
from clipgen_lib.runtime import runs
from clipgen_lib.runtime.checkpoints import load_checkpoint, module_hash, save_weights
from clipgen_lib.runtime.runs import open_run
from clipgen_lib.store import extract
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN

ROOT = Path(__file__).parents[1]


def launched(*arguments, processes=2, timeout=300, **environment):
    """A script, or `-m` and a module, with its arguments, in that many processes of one launch."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CLIPGEN_PROGRESS": "0",
        **environment,
    }
    return subprocess.run(
        [sys.executable, *map(str, [*torchrun, *arguments])],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def one_thread():
    """The launches have one each: more may sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pictures(world, tmp_path):
    """A folder of 12 images to train on and 40 to test on, in two batches, with captions; one of each cannot be read."""
    root = tmp_path / "images"
    for split, of in (("train", "val"), ("val", "train")):
        (root / split).mkdir(parents=True)
        images = open_images(world, of)
        for path, texts in zip(images.paths, images.captions, strict=True):
            shutil.copy(path, root / split)
            (root / split / path.with_suffix(".txt").name).write_text(texts[0])
        (root / split / images.paths[5].name).write_bytes(b"broken")
    return root


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def a_vqgan():
    torch.manual_seed(0)
    return VQGAN(load_preset("smoke").vqgan).eval().requires_grad_(False)


def a_run(results, data):
    """A run of preset smoke with untrained weights, whose logits are far from even."""
    wb = workbench.Workbench(open_run("run", results), load_preset("smoke"), str(data))
    vqgan, preset = a_vqgan(), wb.preset
    save_weights(wb.run.path / "vqgan", vqgan)
    torch.manual_seed(1)
    transformer = ImageTransformer(preset.transformer, preset.vqgan.codebook_size, preset.vqgan.side**2, wb.clip.dim)
    torch.nn.init.normal_(transformer.head.weight, std=0.5)
    trained_with = {"vqgan": module_hash(vqgan), "clip": wb.clip.weights_hash}
    save_weights(wb.run.path / "transformer", transformer, trained_with=trained_with)


def commands(data, picture):
    """What is asked of the command line."""
    options = ["--run", "run", "--preset", "smoke", "--data", str(data), "--device", "cpu"]
    yield ["extract", *options]
    yield ["evaluate", *options]
    yield [
        "generate",
        "a red circle",
        "--run",
        "run",
        "-n",
        "5",
        "--device",
        "cpu",
        "--candidates",
        "2",
        "-o",
        str(picture),
    ]
    yield [
        "evaluate",
        "--images",
        f"{data}/train",
        "--reference",
        f"{data}/val",
        "--protocol",
        "clip",
        "--device",
        "cpu",
        "-o",
        str(Path(picture).with_suffix(".json")),
    ]


def test_every_command_does_in_two_processes_what_it_does_in_one(pictures, tmp_path, monkeypatch, one_thread):
    for name in ("one", "two"):
        a_run(tmp_path / name, pictures)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(passes, "SAVE_SECONDS", 0)
        a_pass(pictures, tmp_path / "two", StandIn(fails_at=9))  # the launch goes on after four batches of seven
    done = launched(__file__, "commands", pictures, tmp_path / "two", CLIPGEN_RESULTS=str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    for module in (runs, workbench):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "one")
    monkeypatch.setattr(evaluate, "measure", measured_anew(tmp_path / "one"))
    a_store(pictures, tmp_path / "one" / "shards")
    a_pass(pictures, tmp_path / "one", StandIn())
    said = ""
    for command in commands(pictures, tmp_path / "one" / "out.png"):
        result = CliRunner().invoke(cli.main, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        said += result.stdout
    assert (
        done.stdout.replace(f"{tmp_path}/two", f"{tmp_path}/one") == said
    )  # the first process speaks, the other is silent
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    summaries = [json.loads(files.pop("run/summary.json")) for files in (one, two)]
    assert all(summary.pop("seconds") for summary in summaries)
    assert len(summaries[0]["skipped"]) == 2
    found = [
        {"summary": summary, "folder": json.loads(files.pop("out.json"))}
        for summary, files in zip(summaries, (one, two), strict=True)
    ]
    by_one, by_two = map(leaves, found)
    assert by_one.keys() == by_two.keys()
    for name, value in by_one.items():  # numpy's linear algebra has threads of its own
        assert by_two[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name] and not name.startswith("kept/")] == []
    for path in (tmp_path / "one" / "kept").iterdir():  # the order of entries in their headers differs by chance
        assert same_state(load_checkpoint(path), load_checkpoint(tmp_path / "two" / "kept" / path.name)), path.name
    assert {"out.png", "run/captions.txt", "run/store/train/00000/tokens.u16", "shards/00009/embeds.f16"} < one.keys()


def leaves(node, name=""):
    """A nested JSON value as one dict."""
    if not isinstance(node, (dict, list)):
        return {name: node}
    parts = node.items() if isinstance(node, dict) else enumerate(node)
    return {key: value for at, part in parts for key, value in leaves(part, f"{name}/{at}").items()}


def a_store(data, folder):
    """Of 40 images and their mirror images in 10 shards."""
    return extract(open_images(data, "val"), a_vqgan(), ClipEmbedder.load("shapes"), folder, True, 4, shard_rows=8)


def a_pass(data, folder, module):
    """Statistics of 40 images in 7 batches, two calls of the network each."""
    measure(open_images(data, "val"), {"pass": statistics(module)}, SAME, 6, "", False, Path(folder) / "kept")


def test_a_launch_of_which_one_is_killed_ends_and_any_number_goes_on(pictures, tmp_path, monkeypatch, one_thread):
    whole = a_store(pictures, tmp_path / "whole")
    done = launched(__file__, "killed", pictures, tmp_path / "store")
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert not (tmp_path / "store").exists()
    encode, calls = VQGAN.encode, []
    monkeypatch.setattr(VQGAN, "encode", lambda *x: (calls.append(1), encode(*x))[1])
    again = a_store(pictures, tmp_path / "store")
    assert 0 < len(calls) <= 20 - 4  # at least the two shards that the killed one had finished were kept
    assert contents(again.folder) == contents(whole.folder) and len(again) == 78


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launch_that_is_told_to_end_saves_and_goes_on(pictures, tmp_path, number, one_thread):
    whole = a_store(pictures, tmp_path / "whole")
    done = launched(__file__, "signalled", pictures, tmp_path / "store", int(number))
    assert (
        done.returncode != 0
        and f"stopped by {number.name} in the extraction of val: what was done is kept" in done.stderr
    )
    partial = tmp_path / "store.partial"
    assert any(
        0 < json.loads(path.read_text())["read"] < 8 for path in partial.glob("*/shard.json")
    )  # saved within a shard
    done = launched(__file__, "signalled", pictures, tmp_path / "store", 0)
    assert done.returncode == 0 and contents(tmp_path / "store") == contents(whole.folder)


def measured_anew(folder):
    """`passes.measure`, but with nothing known from before."""
    return lambda *arguments: measure(*arguments[:6], folder / "kept")


# ---------------------------------------------------------------------------------------------- what a launch runs


def job_commands(data, folder):
    processes.join("cpu")
    a_store(data, Path(folder) / "shards")
    a_pass(data, folder, module := StandIn())
    assert module.calls == (4, 2)[processes.rank()]
    evaluate.measure = measured_anew(Path(folder))
    for command in commands(data, Path(folder) / "out.png"):
        cli.main(command, standalone_mode=False)


def job_killed(data, folder):
    """The second process is killed in its third shard."""
    processes.join("cpu")
    encode, calls = VQGAN.encode, []

    def dies(*arguments):
        calls.append(1)
        if processes.rank() == 1 and len(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(*arguments)

    VQGAN.encode = dies
    a_store(data, Path(folder))


def job_signalled(data, folder, number):
    """The launcher gets a signal when the first process is in its third shard; every process is slow from there on."""
    processes.join("cpu")
    encode, calls = VQGAN.encode, []

    def signals(*arguments):
        calls.append(1)
        if len(calls) == 5 and int(number):
            if processes.is_main():
                os.kill(os.getppid(), int(number))
            time.sleep(2)  # until it has come back to this process
        return encode(*arguments)

    VQGAN.encode = signals
    a_store(data, Path(folder))


if __name__ == "__main__":
    globals()[f"job_{sys.argv[1]}"](*sys.argv[2:])
