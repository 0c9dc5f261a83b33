"""The trainings in several processes of this machine, which gloo connects: what one process would have come to."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

from clipgen_lib import train_transformer as train
from clipgen_lib import training as loop
from clipgen_lib.runtime import distributed as processes
from clipgen_lib.runtime.runs import ClipgenError, open_run
from clipgen_lib.store import extract


@pytest.fixture
def stages(images, preset, vqgan, clip, tmp_path):
    """Both trainings as functions of a run's name; float32, everything that is random or reduced between processes switched on."""
    few = {"steps": 6, "batch_size": 8, "log_every": 1, "save_every": 2, "precision": "no"}
    codes = replace(preset.vqgan, l2_norm=False, codebook_update="ema", restart_after=2)
    first = replace(
        preset.vqgan_train, **few, flip=True, random_crop=True, adversarial_ramp=(0.0, 0.1), adversarial_weight=1.0
    )
    second = replace(preset.transformer_train, **few, embedding_share=0.25, noise_cos=0.5, accumulate=2)
    store = extract(images, vqgan, clip, tmp_path / "store")

    def stage_one(name):
        train.train_vqgan(open_run(name, tmp_path), images, images, codes, first, clip, seed=1)

    def stage_two(name, optimizer="muon"):
        config = replace(second, optimizer=optimizer)
        train.train_transformer(open_run(name, tmp_path), store, store, preset.transformer, config, vqgan, clip, seed=1)

    return {"vqgan": stage_one, "transformer": stage_two}


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
def test_two_processes_have_the_losses_of_one(stages, stage, tmp_path):
    stages[stage]("one")
    processes.launch(stages[stage], "two", processes=2)
    one, two = (open_run(name, tmp_path).metrics(stage) for name in ("one", "two"))
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {
            "stage"
        }:  # a vector halfway between two codes may fall to either, after sums in another order
            close = 0.1 if key in ("perplexity", "codebook_usage") else 5e-3
            assert a[key] == pytest.approx(b[key], rel=1e-5 if a["step"] < 3 else close, abs=1e-4), (a["step"], key)
    assert open_run("two", tmp_path).metrics(f"{stage}_held_out")[-1]["step"] == 6


def test_a_killed_process_ends_all_and_another_number_of_them_goes_on(stages, tmp_path, monkeypatch):
    stages["transformer"]("whole")
    real, count = loop.Log.valid, []

    def valid(self, *norms):
        count.append(1)
        if len(count) == 4 and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *norms)

    with (
        monkeypatch.context() as patch,
        pytest.raises(ClipgenError, match="one of 2 processes failed: .*(SIGKILL|has ended)"),
    ):
        patch.setattr(loop.Log, "valid", valid)
        processes.launch(stages["transformer"], "parts", processes=2)
    folder = tmp_path / "parts" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["transformer-00000002.safetensors"]
    stages["transformer"]("parts")
    whole, parts = (open_run(name, tmp_path).metrics("transformer") for name in ("whole", "parts"))
    assert [line["step"] for line in parts] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=1e-3)


class Killed(Exception):
    """Stands for a signal that ends a process."""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharded_and_whole_trainings_go_on_from_each_other(stages, tmp_path, monkeypatch, optimizer):
    """One process to step 2, FSDP over two to step 4, one again to the end: the losses of one process alone.

    Accelerate takes FSDP for GPUs only, but its second version runs on gloo too: here it is told that this is FSDP.
    """
    stages["transformer"]("one", optimizer=optimizer)
    real_accelerator, real_valid, count = loop.accelerator_on, loop.Log.valid, []

    def fully_sharded(config, device):
        accelerator = real_accelerator(config, device)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
        )
        return accelerator

    def two_steps(self, *norms):
        count.append(1)
        if len(count) == 3:
            raise Killed
        return real_valid(self, *norms)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Log, "valid", two_steps)
        with pytest.raises(Killed):
            stages["transformer"]("parts", optimizer=optimizer)
        count.clear()
        patch.setattr(train, "accelerator_on", fully_sharded)
        with pytest.raises(ClipgenError, match="one of 2 processes failed: .*Killed"):
            processes.launch(stages["transformer"], "parts", optimizer, processes=2)
    assert (tmp_path / "parts" / "checkpoints" / "transformer-00000004.safetensors").exists()
    stages["transformer"]("parts", optimizer=optimizer)
    one, parts = (open_run(name, tmp_path).metrics("transformer") for name in ("one", "parts"))
    assert [line["step"] for line in parts] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "gradient"):
        assert [line[key] for line in parts] == pytest.approx([line[key] for line in one], rel=1e-3), key


def test_a_batch_that_does_not_divide_is_one_sentence(images, preset, clip, tmp_path):
    config = replace(preset.vqgan_train, batch_size=9, accumulate=2)
    with pytest.raises(ClipgenError, match="batch_size 9 does not divide by 1 processes times accumulate 2"):
        train.train_vqgan(open_run("r", tmp_path), images, images, preset.vqgan, config, clip)


def test_numbers_of_processes_that_cannot_be_are_one_sentence():
    with pytest.raises(ClipgenError, match="0 processes cannot be started"):
        processes.launch(print, processes=0)


@pytest.mark.slow
def test_notebooks_share_the_work_by_one_parameter(tmp_path):
    """01 to 03 in kernels of their own, each of which forks two processes."""
    command = [sys.executable, "-m", "clipgen_lib", "run", "--preset", "smoke", "--run", "two", "-p", "PROCESSES=2"]
    for name in ("01", "02", "03"):
        command += ["--notebook", name]
    subprocess.run(command, env={**os.environ, "CLIPGEN_RESULTS": str(tmp_path)}, check=True, timeout=600)
    summary = open_run("two", tmp_path).summary()
    assert {"vqgan", "transformer"} <= summary.keys() and (tmp_path / "two" / "figures" / "previews.png").exists()
