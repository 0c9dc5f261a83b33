"""The doctor's page, also of machines that are not this one."""

import re

import pytest
import torch

from clipgen_lib.clip_embed import find_weights
from clipgen_lib.config import load_preset
from clipgen_lib.doctor import Machine, need, report
from clipgen_lib.runtime.kernels import has_bf16

LAPTOP = Machine(cores=2, ram=8, disk=20)
GPU = Machine(cores=16, ram=128, disk=500, gpus=(("A100", 80.0),))
TWO_GPUS = GPU._replace(gpus=(("4090", 24.0), ("A100", 80.0)))


@pytest.mark.parametrize(
    "machine, fitting, said",
    [
        (LAPTOP, "smoke laptop reference", "2 cores, 8 GB of memory, 20 GB of disk free"),
        (LAPTOP, "smoke laptop reference", "torch sees no GPU"),
        (GPU, "smoke laptop reference gpu64 coco imagenet", "cuda:0 A100, 80 GB"),
        (TWO_GPUS, "smoke laptop reference gpu64", "cuda:1 A100, 80 GB"),
    ],
)
def test_presets_fit_what_memory_and_time_allow(machine, fitting, said):
    page, problem = report(machine)
    assert re.findall(r"^(\w+) +yes ", page, re.M) == fitting.split() and said in page and problem == ""
    assert f"cpu {'with' if has_bf16(torch.device('cpu')) else 'without'} bfloat16" in page
    assert f"torch {torch.__version__.split('+')[0]}" in page


def test_a_laptop_preset_that_does_not_fit_is_a_problem():
    assert report(LAPTOP._replace(ram=1.0))[1].startswith("the laptop preset does not fit")


def test_need_grows_with_the_batch_and_counts_operations():
    whole = need(load_preset("gpu64"))
    double = need(load_preset("gpu64", vqgan_train={"batch_size": 256}))
    assert whole.parameters == double.parameters == 116_048_523
    assert double.gigabytes - whole.gigabytes > 1
    accumulated = need(load_preset("gpu64", vqgan_train={"batch_size": 256, "accumulate": 2}))
    assert accumulated.gigabytes == pytest.approx(whole.gigabytes)
    presets = (load_preset("laptop", transformer_train={"steps": n}, vqgan_train={"steps": 0}) for n in (1, 2))
    once, twice = map(need, presets)
    assert twice.operations == 2 * once.operations > 0


def test_missing_weights_are_named_with_their_place(clipgen, tmp_path, monkeypatch):
    for name in ("TORCH_HOME", "CLIPGEN_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    done = clipgen("doctor", results=tmp_path / "results")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"the laptop preset lacks data/shapes_clip: restore {tmp_path / 'data' / 'shapes_clip'}" in done.stderr
    assert re.match(r"machine +[1-9]\d* cores, [1-9]\d* GB of memory, \d+ GB of disk free at ", done.stdout)
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
