"""The doctor's page, also of machines that are not this one."""

import os
import subprocess
import sys

import pytest
import torch

from clipgen_lib.clip_embed import find_weights
from clipgen_lib.config import PRESETS, load_preset
from clipgen_lib.doctor import Machine, need, report, this_machine
from clipgen_lib.runtime.kernels import has_bf16

LAPTOP = Machine(cores=2, ram=8, disk=20)
GPU = Machine(cores=16, ram=128, disk=500, gpus=(("A100", 80.0),))


@pytest.fixture(scope="module")
def pages():
    return {machine: report(machine) for machine in (LAPTOP, GPU)}


def fitting(page):
    return [name for name in PRESETS if f"\n{name:12}yes" in page]


def test_without_a_gpu_the_small_presets_fit(pages):
    page, problem = pages[LAPTOP]
    assert fitting(page) == ["smoke", "laptop", "reference"] and problem == ""
    assert "2 cores, 8 GB of memory, 20 GB of disk free" in page and "torch sees no GPU" in page
    assert f"cpu {'with' if has_bf16(torch.device('cpu')) else 'without'} bfloat16" in page
    assert f"torch {torch.__version__.split('+')[0]}" in page


def test_a_gpu_fits_what_its_memory_holds(pages):
    page, problem = pages[GPU]
    assert fitting(page) == list(PRESETS) and "cuda:0 A100, 80 GB" in page
    page, problem = report(GPU._replace(gpus=(("4090", 24.0), ("A100", 80.0))))
    assert fitting(page) == ["smoke", "laptop", "reference", "gpu64"]
    page, problem = report(LAPTOP._replace(ram=1.0))
    assert problem.startswith("the laptop preset does not fit")


def test_this_machine_runs_the_laptop_preset():
    here = this_machine()
    assert here.cores >= 1 and here.ram > 1 and here.disk > 0


def test_need_grows_with_the_batch_and_counts_operations():
    whole = need(load_preset("gpu64"))
    double = need(load_preset("gpu64", vqgan_train={"batch_size": 256}))
    assert whole.parameters == double.parameters == 116_048_523
    assert double.gigabytes - whole.gigabytes > 1
    accumulated = need(load_preset("gpu64", vqgan_train={"batch_size": 256, "accumulate": 2}))
    assert accumulated.gigabytes == pytest.approx(whole.gigabytes)
    once, twice = (
        need(load_preset("laptop", transformer_train={"steps": n}, vqgan_train={"steps": 0})) for n in (1, 2)
    )
    assert twice.operations == 2 * once.operations > 0


def test_missing_weights_are_named_with_their_place(tmp_path):
    environment = {**os.environ, "TORCH_HOME": str(tmp_path), "CLIPGEN_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "clipgen_lib", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"the laptop preset lacks data/shapes_clip: restore {tmp_path / 'data' / 'shapes_clip'}" in done.stderr
    lines = done.stdout.splitlines()
    vgg = next(line for line in lines if line.startswith("vgg16-397923af.pth"))
    assert "missing" in vgg and str(tmp_path / "hub" / "checkpoints") in vgg
    assert next(line for line in lines if line.startswith("coco ")).endswith("vgg16-397923af.pth")


def test_a_clip_is_found_where_open_clip_looks(tmp_path):
    assert find_weights().name == "open_clip_model.safetensors"
    assert find_weights("data/shapes_clip") == find_weights()
    (tmp_path / "w.pt").write_bytes(b"x")
    assert find_weights("ViT-B-32", str(tmp_path / "w.pt")) == tmp_path / "w.pt"
    assert find_weights("ViT-B-32", "no-such-tag") is None
