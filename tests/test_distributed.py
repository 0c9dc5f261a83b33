"""Several processes of this machine, connected by gloo, do what one does.

The commands at the end run in the processes of a launch: `launched(processes, ...)` starts this very file there.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, Faulty

from clipgen_lib import cli
from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.config import load_preset
from clipgen_lib.data.datasets import open_images
from clipgen_lib.runtime import distributed
from clipgen_lib.runtime.checkpoints import module_hash, save_weights
from clipgen_lib.runtime.runs import ClipgenError, open_run
from clipgen_lib.train_transformer import Frozen, train_transformer
from clipgen_lib.train_vqgan import train_vqgan
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN


@pytest.fixture
def stages(images, preset, vqgan, clip, store, tmp_path):
    """Both trainings as functions of a run's name; float32, everything that is random or reduced between processes switched on."""
    few = {"steps": 6, "batch_size": 8, "log_every": 1, "save_every": 2, "precision": "no"}
    random = {"flip": True, "random_crop": True, "adversarial_ramp": (0.0, 0.1), "adversarial_weight": 1.0}
    preset = replace(
        preset,
        vqgan=replace(preset.vqgan, l2_norm=False, codebook_update="ema", restart_after=2),
        vqgan_train=replace(preset.vqgan_train, **few, **random),
        transformer_train=replace(preset.transformer_train, **few, embedding_share=0.25, noise_cos=0.5, accumulate=2),
    )

    def run(name):
        return replace(open_run(name, tmp_path), seed=1)

    def train_stage_two(name, own=store):
        train_transformer(run(name), (own, store), preset, Frozen(vqgan, clip))

    return {
        "vqgan": lambda name: train_vqgan(run(name), (images, images), preset, clip),
        "transformer": train_stage_two,
    }


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
def test_two_processes_have_the_losses_of_one(stages, stage, tmp_path):
    stages[stage]("one")
    distributed.launch(stages[stage], "two", processes=2)
    one, two = (open_run(name, tmp_path).metrics(stage) for name in ("one", "two"))
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"stage"}:
            # sums in another order: after some steps a vector halfway between two codes may fall to either
            close = 0.1 if key in ("perplexity", "codebook_usage") else 5e-3
            assert a[key] == pytest.approx(b[key], rel=1e-5 if a["step"] < 3 else close, abs=1e-4), (a["step"], key)
    assert open_run("two", tmp_path).metrics(f"{stage}_val")[-1]["step"] == 6


def test_a_killed_process_ends_all_and_another_number_of_them_resumes(stages, store, tmp_path):
    def kill(batch):
        if batch == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    stages["transformer"]("whole")
    with pytest.raises(ClipgenError, match="one of 2 processes failed: .*(SIGKILL|has ended)"):
        distributed.launch(stages["transformer"], "parts", Faulty(store, kill), processes=2)
    folder = tmp_path / "parts" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["transformer-00000002.safetensors"]
    stages["transformer"]("parts")
    whole, parts = (open_run(name, tmp_path).metrics("transformer") for name in ("whole", "parts"))
    assert [line["step"] for line in parts] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=1e-3)


def test_launches_that_cannot_be_are_one_sentence(monkeypatch):
    with pytest.raises(ClipgenError, match="0 processes cannot be started"):
        distributed.launch(print, processes=0)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ClipgenError, match="FSDP and DeepSpeed are not supported"):
        distributed.training_device("cpu")


def test_one_process_needs_no_launch():
    x, layer = torch.arange(3.0), torch.nn.Linear(1, 1)
    assert distributed.all_reduce_sum(x) is x and distributed.all_reduce_mean(x) is x
    assert distributed.broadcast("a") == "a" and distributed.training_device("cpu") == torch.device("cpu")
    (module,) = distributed.data_parallel(layer)
    assert module is layer and list(distributed.microbatches([1, 2, 3], module)) == [1, 2, 3]


# ---------------------------------------------------------------------------------------------- commands


def make_run(results):
    """A run of preset smoke with untrained weights, whose logits are far from even."""
    preset, clip = load_preset("smoke"), ClipEmbedder.load("shapes")
    folder = open_run("run", results).path
    torch.manual_seed(0)
    vqgan = VQGAN(preset.vqgan)
    transformer = ImageTransformer(preset.transformer, preset.vqgan.codebook_size, preset.vqgan.side**2, clip.dim)
    torch.nn.init.normal_(transformer.head.weight, std=0.5)
    save_weights(folder / "vqgan", vqgan)
    trained_with = {"vqgan": module_hash(vqgan), "clip": clip.weights_hash}
    save_weights(folder / "transformer", transformer, trained_with=trained_with)


def launched(processes, data, results):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CLIPGEN_RESULTS": str(results)}
    command = [sys.executable, *map(str, [*torchrun, __file__, data, results])]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.replace(str(results), "")


def leaves(node, name=""):
    """A nested JSON value as one dict."""
    if not isinstance(node, (dict, list)):
        return {name: node}
    parts = node.items() if isinstance(node, dict) else enumerate(node)
    return {key: value for at, part in parts for key, value in leaves(part, f"{name}/{at}").items()}


def test_every_command_does_in_two_processes_what_it_does_in_one(world, tmp_path):
    data, said, files, summaries = tmp_path / "images", [], [], []
    for split, of in (("train", "val"), ("val", "train")):  # 12 images to train on and 40 to test on, with captions
        images = open_images(world, of)
        (data / split).mkdir(parents=True)
        for row, texts in enumerate(images.captions):
            path = images.encoded(row)
            shutil.copy(path, data / split)
            (data / split / path.with_suffix(".txt").name).write_text(texts[0])
        (data / split / images.encoded(5).name).write_bytes(b"broken")
    for processes in (1, 2):
        results = tmp_path / str(processes)
        make_run(results)
        said.append(launched(processes, data, results))
        paths = sorted(path for path in results.rglob("*") if path.is_file())
        files.append({path.relative_to(results).as_posix(): path.read_bytes() for path in paths})
        summaries.append(json.loads(files[-1].pop("run/summary.json")))
        assert summaries[-1].pop("seconds") and len(summaries[-1]["skipped"]) == 2
    assert said[0] == said[1]  # the first process speaks, the other is silent
    one, two = map(leaves, summaries)
    assert one.keys() == two.keys()
    for name, value in one.items():  # numpy's linear algebra has threads of its own
        assert two[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name
    assert files[0].keys() == files[1].keys() and "out.png" in files[0]
    assert [name for name, content in files[0].items() if content != files[1][name]] == []


@pytest.mark.slow
def test_notebooks_share_the_work_by_one_parameter(clipgen, tmp_path):
    """01 to 03 in kernels of their own, each of which forks two processes."""
    notebooks = [word for name in ("01", "02", "03") for word in ("--notebook", name)]
    done = clipgen("run", "--preset", "smoke", "--run", "two", "-p", "PROCESSES=2", *notebooks, results=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = open_run("two", tmp_path).summary()
    assert {"vqgan", "transformer"} <= summary.keys() and (tmp_path / "two" / "figures" / "previews.png").exists()


if __name__ == "__main__":  # in the processes of a launch
    distributed.join("cpu")
    data, results = sys.argv[1:]
    options = ["--run", "run", "--preset", "smoke", "--data", data, "--device", "cpu"]
    generate = ["generate", "a red circle", "--run", "run", "-n", "5", "--device", "cpu", "-o", f"{results}/out.png"]
    for command in (["extract", *options], ["evaluate", *options], generate):
        cli.main(command, standalone_mode=False)
