"""What doctor says of machines that are not this one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clipgen_lib import clip_embed, cost, doctor
from clipgen_lib.config import PRESETS, load_preset
from clipgen_lib.cost import need
from clipgen_lib.doctor import Machine, lacks, missing_packages, report, this_machine, verdicts, weights_here

LAPTOP = Machine(cores=2, ram=8, disk=20)
CLUSTER = Machine(cores=16, ram=128, disk=500, gpus=(("A100", 80.0),))


@pytest.fixture(scope="module")
def everything():
    return [replace(file, path=Path("here")) for file in weights_here()]


def fitting(machine, files):
    return [v.preset for v in verdicts(machine, files) if v.fits]


def test_without_a_gpu_the_small_presets_fit(everything):
    assert fitting(LAPTOP, everything) == ["smoke", "laptop", "reference"]
    reasons = {v.preset: v.reason for v in verdicts(LAPTOP, everything)}
    assert reasons["coco"].startswith("needs a GPU of 58 GB") and "years on 2 cores" in reasons["coco"]
    assert reasons["laptop"] == "takes 1.9 of 8 GB of memory; stage 2 lasts about 11 minutes on 2 cores"
    assert fitting(replace(LAPTOP, cores=1), everything)[:2] == ["smoke", "laptop"]


def test_a_gpu_fits_what_its_memory_holds(everything):
    assert fitting(CLUSTER, everything) == list(PRESETS)
    assert fitting(replace(CLUSTER, gpus=(("4090", 24.0),)), everything) == ["smoke", "laptop", "reference", "gpu64"]
    two = verdicts(replace(CLUSTER, gpus=(("4090", 24.0), ("4090", 40.0))), everything)
    assert next(v for v in two if v.preset == "coco").reason == "needs 31 GB on each GPU, there are 24 GB"
    assert fitting(replace(CLUSTER, disk=10.0), everything) == ["smoke", "laptop", "reference", "gpu64"]


def test_missing_files_are_named_with_their_cure(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(clip_embed, "DATA", tmp_path)
    monkeypatch.setattr(doctor, "DATA", tmp_path)
    files = weights_here()
    absent = {file.name for file in files if file.path is None}
    assert {
        "data/shapes_clip",
        "vgg16-397923af.pth",
        "alexnet-owt-7be5be79.pth",
        "inception_v3_google-0cc3c7bd.pth",
    } <= absent
    coco = next(v for v in verdicts(CLUSTER, files) if v.preset == "coco")
    assert coco.fits and "vgg16-397923af.pth" in coco.missing and "first needs" in coco.reason
    page = report(CLUSTER, files, [])
    assert str(tmp_path / "hub" / "checkpoints") in page and "restore data/shapes_clip" in page
    assert (
        lacks(LAPTOP, files, [])
        == "the laptop preset lacks data/shapes_clip: restore data/shapes_clip from the repository"
    )
    assert "largest that can begin now" not in page  # every preset lacks its CLIP


def test_lacks_is_one_sentence(everything):
    assert lacks(LAPTOP, everything, []) == ""
    assert lacks(LAPTOP, everything, ["tqdm>=4.66"]).startswith("packages are missing or too old (tqdm>=4.66)")
    assert lacks(replace(LAPTOP, disk=0.01), everything, []) == (
        "the laptop preset does not fit: needs 0.12 GB of disk for checkpoints, 0.01 GB are free"
    )
    assert "needs 1.9 GB of memory" in lacks(replace(LAPTOP, ram=1.0), everything, [])


def test_the_page_names_the_machine_and_every_preset(everything):
    page = report(replace(CLUSTER, others=("mps",)), everything, ["tqdm>=4.66"])
    assert "16 cores, 128 GB of memory, 500 GB of disk free" in page and "cpu; mps; cuda:0 A100, 80 GB" in page
    assert "missing    tqdm>=4.66" in page and f"torch {torch.__version__.split('+')[0]}" in page
    assert all(f"\n{name:12}yes" in page for name in PRESETS)
    assert page.endswith("largest that can begin now: clipgen run --preset imagenet")
    assert "torch sees no GPU" in report(LAPTOP, everything, [])


def test_this_machine_runs_the_laptop_preset():
    here = this_machine()
    assert here.cores >= 1 and here.ram > 1 and here.disk > 0
    assert missing_packages() == []


def test_need_follows_its_arithmetic():
    laptop = load_preset("laptop")
    trained = 610_752 + 20_000  # VQGAN and, roughly, its critic; the transformer is counted below
    bytes_each = 4 + 3 * 16  # weights, and the checkpoints that stay: two and the best; one more while it is written
    assert need(laptop).disk == pytest.approx((bytes_each * (trained + 1_329_536) + 16 * 1_329_536) / 1e9, rel=0.05)
    one, half = need(load_preset("coco")), need(load_preset("coco"), 2)
    assert one.pictures == 32 and half.pictures == 16
    kept = one.device - half.device  # of 16 images, under bfloat16 autocast of CUDA with float32 norms
    assert kept == pytest.approx(1.1 * 16 * 1.547, rel=0.02)
    accumulated = replace(laptop, vqgan_train=replace(laptop.vqgan_train, accumulate=2, batch_size=32))
    assert need(accumulated).device == pytest.approx(need(laptop).device)


def test_kept_counts_each_tensor_once():
    x, weight = torch.randn(10, 4), torch.nn.Parameter(torch.randn(4, 4))

    def loss():
        y = (
            x @ weight
        ).exp()  # keeps x for the product and its own result for the exponential; the weight is a parameter
        return (y * y).sum()  # y again

    assert cost._kept(loss) == 2 * 10 * 4 * 4
    assert not torch.is_autocast_enabled("cpu")
    with cost._imagined("cuda"):
        assert torch.empty(3, 3).device.type == "cuda"
    assert torch.empty(1).device.type == "cpu" and not torch.is_autocast_enabled("cuda")


def test_a_clip_is_found_where_open_clip_looks(monkeypatch, tmp_path):
    assert clip_embed.find_weights().name == "open_clip_model.safetensors"
    assert clip_embed.find_weights("data/shapes_clip") == clip_embed.find_weights()
    (tmp_path / "w.pt").write_bytes(b"x")
    assert clip_embed.find_weights("ViT-B-32", str(tmp_path / "w.pt")) == tmp_path / "w.pt"
    assert clip_embed.find_weights("ViT-B-32", "no-such-tag") is None
    asked = []

    def cached(repository, file):
        asked.append((repository, file))
        return str(tmp_path / "w.pt") if file.endswith("model.bin") else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert clip_embed.find_weights("ViT-B-32-quickgelu", "openai") == tmp_path / "w.pt"
    assert asked[0] == ("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")
