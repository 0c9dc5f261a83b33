import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from click.testing import CliRunner
from conftest import ROOT

from clipgen_lib.cli import main
from clipgen_lib.config import SharedConfig, changed, load_preset
from clipgen_lib.runtime.runs import ClipgenError, write_atomic, write_json
from clipgen_lib.study.compare import metrics, table_text
from clipgen_lib.study.sweep import Sweep, cells_of, differing, shared
from clipgen_lib.workbench import Workbench

GRID = ["clip.name=shapes,nowhere", "sample.guidance=1,3"]
SMALL = """
    shapes.n_train=40 shapes.n_val=16 vqgan_train.steps=4 transformer_train.steps=4 vqgan_train.save_every=2
    evaluate.n=8 evaluate.n_oracle=2
"""


def command(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_cells_are_every_combination_by_name():
    cells = cells_of(["transformer.width=64,128", "vqgan.channel_mult=[1, 2],[1]", "scale=2"], 5, seeds=2)
    assert len(cells) == 8
    assert cells["transformer.width=128,vqgan.channel_mult=(1, 2),scale=2,seed=6"] == {
        "transformer": {"width": "128"},
        "vqgan": {"channel_mult": "[1, 2]"},
        "scale": "2",
        "transformer_train": {"seed": "6"},
    }
    assert list(cells_of([])) == ["seed=0"]


@pytest.mark.parametrize("grid", ["width=1", "sample.guidance=", "sample.guidance=1,,2", "sample.guidance=1,1"])
def test_what_is_no_grid_is_one_sentence(grid):
    with pytest.raises(ClipgenError, match="is not PART.FIELD=VALUE,VALUE with each value once: write for example"):
        cells_of([grid])
    for twice in (["sample.top_k=1", "sample.top_k=2"], ["transformer_train.seed=3"]):
        with pytest.raises(ClipgenError, match="has two grids"):
            cells_of(twice)


def test_a_stage_that_cells_have_in_common_is_made_by_the_first():
    smoke, cells = load_preset("smoke"), cells_of(["transformer.width=64,128", "sample.top_k=1,2"])
    grid = {name: changed(smoke, parts) for name, parts in cells.items()}
    a, b, c, d = grid
    planned = shared(grid, "s", {})
    of_a = {"vqgan": f"s/{a}", "store": f"s/{a}"}
    taken = [SharedConfig(), SharedConfig(**of_a, transformer=f"s/{a}"), SharedConfig(**of_a)]
    assert [preset.shared for preset in planned.values()] == [*taken, SharedConfig(**of_a, transformer=f"s/{c}")]
    assert all(replace(planned[name], shared=SharedConfig()) == preset for name, preset in grid.items())
    # a cell that was begun makes or takes what it did, and comes first
    assert shared({a: grid[a], d: grid[d]}, "s", {c: grid[c]})[a].shared == SharedConfig(f"s/{c}", f"s/{c}")
    assert shared(grid, "s", {name: planned[name] for name in (d, c, b, a)}) == planned
    # another loss of the tokenizer, other mirrored rows, another CLIP that the tokenizer's loss does not read
    others = {"flip": {"transformer_train": {"flip": False}}, "lr": {"vqgan_train": {"lr": 1.0}}}
    others |= {name: {"clip": {"name": name}, "vqgan_train": {"perceptual": "none"}} for name in ("x", "y")}
    found = shared({a: grid[a]} | {name: changed(smoke, parts) for name, parts in others.items()}, "s", {})
    alone = SharedConfig()
    assert [found[name].shared for name in others] == [SharedConfig(f"s/{a}"), alone, alone, SharedConfig("s/x")]
    outside = changed(smoke, {"shared": {"vqgan": "shapes"}})
    found = shared({"p": outside, "q": changed(outside, {"vqgan_train": {"lr": 1.0}})}, "s", {})
    assert [found[name].shared.vqgan for name in "pq"] == ["shapes"] * 2 and found["q"].shared.store == "s/p"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["transformer.width=64,65"], "width 65 does not divide by 2 heads"),
        (["sample.guidance=1,1.0"], "have the same settings"),
        (["sample.topk=1"], "has no field 'topk'"),
        (["sample.top_k=1", "--data", "/nowhere"], "is not a folder of images"),
        (["sample.top_k=1", "--clip", "nowhere"], "neither a folder here"),
        ([f"clip.name={'x' * 200}"], "is not a plain folder name"),
    ],
)
def test_all_is_checked_before_anything_is_written(words, sentence, results):
    done = command("sweep", "s", "--preset", "smoke", "--grid", *words)
    assert done.exit_code == 1 and sentence in done.output and not results.exists()


def begun(results, name, summary, **parts):
    """A run's config.json and summary.json without the work."""
    preset = changed(load_preset("smoke"), parts)
    write_json(results / name / "config.json", {"preset": asdict(preset), "data": "shapes", "seed": 0})
    write_json(results / name / "summary.json", summary)


def test_runs_side_by_side(results):
    for width, caps in ((64, 0.3), (128, 0.2)):
        summary = {"evaluation": {"caps": caps}, "data": {"n_eval": 4}}
        begun(results, f"s/width={width}", summary, transformer={"width": width})
    write_json(results / "s" / "sweep.json", {})
    begun(results, "alone", {"evaluation": {"caps": 0.25}}, transformer={"width": 128}, sample={"align": "shift"})
    write_atomic(results / "broken" / "config.json", "{")
    write_json(results / "broken" / "summary.json", {"transformer": {"nll": 2.5}})
    write_atomic(results / "s" / "half" / "summary.json", '{"evaluation')
    table = Workbench.runs()
    assert list(table.index) == ["alone", "broken", "s/half", "s/width=128", "s/width=64"]
    assert table.loc["broken"].dropna().to_dict() == {"transformer.nll": 2.5} and table.loc["s/half"].isna().all()
    assert list(Workbench.runs("s")["transformer.width"].dropna()) == [128, 64]

    def shown(*words):
        lines = command("runs", *words).output.splitlines()
        return lines[0].split(), [line.split()[0] for line in lines[1:]]

    assert shown("--sort", "evaluation.caps")[1] == ["s/width=128", "alone", "s/width=64", "broken", "s/half"]
    columns, names = shown("s", "--where", "data.n_eval=4")
    assert columns[0] == "transformer.width" and names == ["s/width=128", "s/width=64"]
    assert shown("--where", "transformer.width=128", "--where", "sample.align=shift")[1] == ["alone"]
    for words, sentence in (
        (["--sort", "caps"], "no run has a field 'caps': the nearest are evaluation.caps"),
        (["--where", "transformer.widht=1"], "the nearest are transformer.width"),
        (["--where", "seed"], "is not FIELD=VALUE"),
        (["t"], "there is no sweep 't' in"),
    ):
        done = command("runs", *words)
        assert done.exit_code == 1 and sentence in done.output
    for name, sentence in (("s", "is a sweep: name one of its runs"), ("alone/a", "is a run, not a sweep")):
        done = command("run", "--preset", "smoke", "--run", name)
        assert done.exit_code == 1 and sentence in done.output


SIZES = ["transformer.layers", "transformer.width", "transformer.heads"]
SIZES += [f"transformer_train.{name}" for name in ("steps", "batch_size", "lr")]
WIDTHS = ["transformer.width", "transformer_train.seed", "sample.guidance"]


@pytest.mark.parametrize("name, cells, fields, n", [("smoke-sweep", 8, WIDTHS, 64), ("sizes", 3, SIZES, 1000)])
def test_a_committed_sweep_is_that_of_its_cells(monkeypatch, name, cells, fields, n):
    monkeypatch.setattr("clipgen_lib.runtime.runs.RESULTS", ROOT / "results")
    rows = json.loads((ROOT / "results" / name / "table.json").read_text())
    found = Sweep(name, "smoke", {}, {}, "shapes", "cpu").table()
    assert sorted(found, key=lambda row: row["name"]) == sorted(rows, key=lambda row: row["name"])
    table = Workbench.runs(name)
    assert len(table) == cells == sum(len(row["seeds"]) for row in rows) and (table["evaluation.n"] == n).all()
    assert differing(table) == fields
    columns = ["oracle_error", "colour", "shape", "two_both", "caps", "fid_0", "nll"]
    assert name == "smoke-sweep" or table_text(rows, columns) in (ROOT / "results" / "README.md").read_text()


def test_a_sweep_is_killed_and_resumed_and_names_what_fails(clipgen, tmp_path):
    words = ["sweep", "s", "--preset", "smoke", *(word for text in GRID for word in ("--grid", text))]
    words += [word for change in SMALL.split() for word in ("--set", change)]
    folder = tmp_path / "s"
    a, b, c, d = (folder / name for name in cells_of(GRID))
    environment = {**os.environ, "CLIPGEN_RESULTS": str(tmp_path)}
    started = [sys.executable, "-m", "clipgen_lib", *words]
    process = subprocess.Popen(started, cwd=ROOT, env=environment, start_new_session=True)
    while not (a / "vqgan").is_dir() and process.poll() is None:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (b / "config.json").exists()
    done = clipgen(*words, "--jobs", 2, results=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"2 of 4 cells failed: {c.name}: 01_train_vqgan: " in done.stderr
    assert f"{d.name}: it needs the vqgan of s/{c.name}" in done.stderr
    rows = json.loads((folder / "table.json").read_text())
    summaries = [json.loads((cell / "summary.json").read_text()) for cell in (a, b)]
    for row, cell, summary in zip(rows, (a, b), summaries, strict=True):
        assert f"{row['name']},seed=0" == cell.name and row["seeds"] == [0] and row["name"] in done.stdout
        assert (row["caps"]["mean"], row["caps"]["std"]) == (metrics(summary)["caps"], 0.0)
    assert summaries[0]["transformer"]["nll"] == summaries[1]["transformer"]["nll"]
    weights = [(cell / "transformer" / "model.safetensors").read_bytes() for cell in (a, b)]
    assert weights[0] == weights[1] and not (b / "checkpoints").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
    done = clipgen(*words, "--set", "transformer.layers=1", results=tmp_path)
    assert done.returncode == 1 and "begun with another preset.transformer.layers" in done.stderr
    fewer = [word.replace("shapes,nowhere", "shapes") for word in words]
    done = clipgen(*fewer, results=tmp_path)
    assert done.returncode == 0 and json.loads((folder / "table.json").read_text()) == rows, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
