"""The doctor's page, also of machines that are not this one."""

import re

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from clipgen_lib.clip_embed import find_weights
from clipgen_lib.config import PRESETS, load_preset
from clipgen_lib.doctor import NEEDS, Machine, Need, report
from clipgen_lib.runtime.kernels import has_bf16
from clipgen_lib.train_vqgan import PatchDiscriminator
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN

LAPTOP = Machine(cores=2, ram=8, disk=20)
GPU = Machine(cores=16, ram=128, disk=500, gpus=(("A100", 80.0),))
TWO_GPUS = GPU._replace(gpus=(("4090", 24.0), ("A100", 80.0)))


@pytest.mark.parametrize(
    "machine, fitting, said",
    [
        (LAPTOP, "smoke laptop reference fashion", "2 cores, 8 GB of memory, 20 GB of disk free"),
        (LAPTOP, "smoke laptop reference fashion", "torch sees no GPU"),
        (GPU, "smoke laptop reference fashion gpu64 coco imagenet", "cuda:0 A100, 80 GB"),
        (TWO_GPUS, "smoke laptop reference fashion gpu64", "cuda:1 A100, 80 GB"),
    ],
)
def test_presets_fit_what_memory_and_time_allow(machine, fitting, said):
    page, problem = report(machine)
    assert re.findall(r"^(\w+) +yes ", page, re.M) == fitting.split() and said in page and problem == ""
    assert f"cpu {'with' if has_bf16(torch.device('cpu')) else 'without'} bfloat16" in page
    assert f"torch {torch.__version__.split('+')[0]}" in page


def test_a_laptop_preset_that_does_not_fit_is_a_problem():
    assert report(LAPTOP._replace(ram=1.0))[1].startswith("the laptop preset does not fit")


def one_pass(forward):
    """Bytes that autograd keeps for the backward pass of one image, and operations of the forward pass, on the meta device."""
    kept = {}  # tensors, held, so that no other one gets its number
    keep = lambda x: x if isinstance(x, torch.nn.Parameter) else kept.setdefault(id(x), x)
    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda x: x):
        forward()
    return sum(x.nbytes for x in kept.values()), counter.get_total_flops()


@pytest.mark.parametrize("name", PRESETS)
def test_needs_are_those_of_the_trainings(name):
    """In float32 20 bytes for each trained parameter (weights, gradients, two moments of AdamW, the EMA), what autograd keeps
    (of which autocast leaves 0.85 in the VQGAN, whose norms stay in float32, and 0.35 in the transformer), the frozen networks,
    and 1.5 GB for Python and the driver. Operations are three times those of the forward passes, times batch and steps."""
    preset = load_preset(name)
    config, stages = preset.vqgan, (preset.vqgan_train, preset.transformer_train)
    clip_dim, clip_size = (512, 151e6) if preset.clip.pretrained else (256, 6e6)  # ViT-B/32, the embedded CLIP
    with torch.device("meta"):
        vqgan = VQGAN(config)
        critic = PatchDiscriminator(stages[0].discriminator_channels, stages[0].discriminator_layers)
        transformer = ImageTransformer(preset.transformer, config.codebook_size, config.side**2, clip_dim)
        vgg = vgg16().features.requires_grad_(False) if stages[0].perceptual == "lpips" else torch.nn.Identity()
        x, embeds = torch.empty(1, 3, config.image_size, config.image_size), torch.empty(1, clip_dim)
        tokens = torch.zeros(1, config.side**2, dtype=torch.long)
        judged = lambda fake: (critic(fake), vgg(fake))
        passes = one_pass(lambda: judged(vqgan(x)[0])), one_pass(lambda: transformer(embeds, tokens).log_softmax(-1))
    size = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())
    gigabytes = [
        (20 * trained + share * kept * stage.batch_size / stage.accumulate) / 1e9
        for trained, share, (kept, _), stage in zip(
            (size(vqgan, critic), size(transformer)), (0.85, 0.35), passes, stages, strict=True
        )
    ]
    operations = sum(3 * count * s.batch_size * s.steps for (_, count), s in zip(passes, stages, strict=True))
    total = 1.5 + 4 * (clip_size + size(vgg)) / 1e9 + max(gigabytes)
    wanted = Need(size(vqgan, transformer) / 1e6, total, operations)
    assert NEEDS[name] == pytest.approx(wanted, rel=0.05)


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
