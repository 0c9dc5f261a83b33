from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Killed, assert_compiled_is_plain, same_weights
from PIL import Image
from torch import nn

from clipgen_lib.data.datasets import ImageSet
from clipgen_lib.data.images import to_float
from clipgen_lib.runtime.kernels import has_bf16
from clipgen_lib.runtime.runs import ClipgenError, open_run
from clipgen_lib.train_vqgan import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_step,
    generator_step,
    perceptual_loss,
    ramp,
    train_vqgan,
)
from clipgen_lib.vqgan import VQGAN


@pytest.fixture(scope="module")
def train(images, preset, clip):
    """Train under a name in a folder, on `images` where no others are given."""

    def call(folder, name, images=images, **changes):
        wanted = replace(preset, vqgan_train=replace(preset.vqgan_train, **changes))
        return train_vqgan(replace(open_run(name, folder), seed=1), (images, images), wanted, clip)

    return call


# ---------------------------------------------------------------------------------------------- losses


def test_adaptive_weight_is_the_ratio_of_gradients_and_is_clamped():
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))

    def weigh(largest, times=1.0):
        images = layer * torch.tensor([1.0, 2.0])
        strong, weak = (images * torch.tensor([3.0, 2.0])).sum(), times * (images * torch.tensor([0.0, 1.0])).sum()
        return adaptive_weight(strong, weak, images, layer, largest)

    weight, *grads = weigh(100.0)
    assert weight.item() == pytest.approx(2.5, rel=1e-4) and not weight.requires_grad
    assert torch.equal(torch.stack(grads), torch.tensor([[3.0, 2.0], [0.0, 1.0]]))
    assert weigh(1.5)[0].item() == 1.5 and weigh(10.0, times=0)[0].item() == 10.0


def test_ramp():
    assert [ramp(step, 100, 0.2, 0.4) for step in (0, 20, 30, 40, 99)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert ramp(0, 100, 0.0, 0.0) == 0 and ramp(1, 100, 0.0, 0.0) == 1


@pytest.mark.parametrize("layers, side", [(3, 8), (2, 16)])
def test_a_logit_for_each_patch(layers, side):
    assert PatchDiscriminator(16, layers)(torch.zeros(2, 3, 64, 64)).shape == (2, 1, side, side)


def test_perceptual_losses(clip, monkeypatch, tmp_path):
    real, fake = torch.rand(2, 3, 64, 64) * 2 - 1, (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    distance = perceptual_loss("clip", clip)
    assert distance(real, real).item() == pytest.approx(0, abs=1e-6)
    near = distance(real, real + 0.05 * torch.randn_like(real))
    assert 0 < near < distance(real, fake)
    distance(real, fake).backward()
    assert fake.grad.abs().sum() > 0 and all(p.grad is None for p in clip.parameters())
    assert perceptual_loss("none")(real, fake).item() == 0
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for kind, missing in (("lpips", "vgg16-397923af.pth"), ("clip", "needs a CLIP")):
        with pytest.raises(ClipgenError, match=missing):
            perceptual_loss(kind)


# ---------------------------------------------------------------------------------------------- steps


@pytest.fixture
def parts(preset, clip, images):
    """Both networks, the perceptual loss, four images and a config in float32 with every term switched on."""
    torch.manual_seed(0)
    config = replace(preset.vqgan_train, precision="no", perceptual="clip", l2_weight=0.5, perceptual_weight=0.3)
    batch = to_float(torch.stack([images[row] for row in range(4)]))
    return VQGAN(preset.vqgan), PatchDiscriminator(16, 2), perceptual_loss("clip", clip), batch, config


@pytest.mark.parametrize("adv_weight", [0.0, 0.7])
def test_generator_step_is_the_formula_and_its_gradient(parts, adv_weight):
    """Value and gradient of the loss as the paper writes it, every network gone through plainly."""
    vqgan, discriminator, perceptual, real, config = parts
    step = generator_step(vqgan, discriminator, perceptual, real, config, adv_weight)
    found = torch.autograd.grad(step.loss, list(vqgan.parameters()))

    fake, quantized = vqgan(real)
    reconstruction = config.l1_weight * F.l1_loss(fake, real) + 0.5 * F.mse_loss(fake, real)
    reconstruction = reconstruction + 0.3 * perceptual(real, fake)
    adversarial, last = -discriminator(fake).mean(), vqgan.decoder.conv_out.weight
    norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (reconstruction, adversarial)]
    weight = (norms[0] / (norms[1] + 1e-6)).clamp(0, config.adaptive_max)
    loss = reconstruction + quantized.codebook_loss + config.beta * quantized.commitment_loss
    loss = loss + adv_weight * weight * adversarial
    wanted = torch.autograd.grad(loss, list(vqgan.parameters()))

    assert step.scalars["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert ("adversarial" in step.scalars) == (adv_weight > 0)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7
    assert torch.allclose(step.fake, fake) and torch.equal(step.quantized.tokens, quantized.tokens)


def test_each_step_moves_its_own_network_only(parts):
    vqgan, discriminator, perceptual, real, config = parts
    step = generator_step(vqgan, discriminator, perceptual, real, config, 1.0)
    step.loss.backward()
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.grad is not None for p in vqgan.parameters())
    vqgan.zero_grad()
    loss, scalars = discriminator_step(discriminator, real, step.fake, config)
    loss.backward()
    assert all(p.grad is None for p in vqgan.parameters())
    assert all(p.grad is not None for p in discriminator.parameters())
    logits = discriminator(real), discriminator(step.fake)
    hinge = ((1 - logits[0]).clamp(min=0).mean() + (1 + logits[1]).clamp(min=0).mean()) / 2
    assert loss.item() == pytest.approx(hinge.item(), rel=1e-5)
    assert scalars["real_logit"].item() == pytest.approx(logits[0].mean().item(), rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------------------------------------- training


def test_resumed_is_uninterrupted(train, clip, tmp_path, monkeypatch):
    whole, run, calls, feature_maps = train(tmp_path, "whole"), open_run("parts", tmp_path), count(), clip.feature_maps

    def dies_at_the_fifth_step(images):
        if next(calls) == 8:  # there are two of each step
            raise Killed
        return feature_maps(images)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(clip, "feature_maps", dies_at_the_fifth_step)
        train(tmp_path, "parts")
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["vqgan-00000003.safetensors"]
    assert same_weights(whole, train(tmp_path, "parts"))
    assert [line["step"] for line in run.metrics("vqgan")] == [2, 4, 6]
    with pytest.raises(ClipgenError, match="batch_size 9 does not divide by 1 processes times accumulate 2"):
        train(tmp_path, "parts", batch_size=9, accumulate=2)


def test_training_learns_and_logs_its_health(train, tmp_path):
    train(tmp_path, "r", steps=24, lr=2e-3, adversarial_ramp=(0.6, 0.8))
    run = open_run("r", tmp_path)
    lines = run.metrics("vqgan")
    assert lines[-1]["l1"] < 0.7 * lines[0]["l1"]
    assert lines[0]["psnr"] == pytest.approx(10 * np.log10(4 / lines[0]["l2"]))
    wanted = "perceptual codebook_loss commitment_loss psnr perplexity codebook_usage discriminator lr"
    assert {*wanted.split(), "generator_gradient", "discriminator_gradient"} <= lines[0].keys()
    assert "adversarial" not in lines[0] and "adaptive_weight" in lines[-1]
    assert {"l1", "l2"} <= run.metrics("vqgan_val")[-1].keys()


@pytest.fixture(scope="module")
def short(train, tmp_path_factory):
    """Trains three steps on photos into a folder, with changes; and what it gives without any."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("photos")
    for i in range(8):  # not square, so that crops differ
        Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((96, 64)).save(folder / f"{i}.png")
    images = ImageSet("photos", "train", folder, sorted(p.name for p in folder.glob("*.png")), 64)
    steps = {"steps": 3, "adversarial_ramp": (0.0, 0.1), "adversarial_weight": 1.0, "save_every": 9}
    call = lambda folder, **changes: train(folder, "r", images, **steps | changes)
    return call, call(folder)


KNOBS = {"perceptual_weight": 5.0, "l1_weight": 3.0, "l2_weight": 9.0, "beta": 3.0, "accumulate": 2, "flip": True}
KNOBS |= {"random_crop": True, "max_grad_norm": 1e-3, "weight_decay": 5.0, "ema_decay": 0.0, "precision": "no"}
KNOBS |= {"discriminator_lr": 0.1, "optimizer": "adamw", "adaptive_max": 0.0, "adversarial_weight": 9.0, "seed": 1}


@pytest.mark.parametrize("field", KNOBS)
def test_each_knob_matters(short, tmp_path, field):
    if field == "precision" and not has_bf16(torch.device("cpu")):
        pytest.skip("this CPU does not compute in bfloat16")
    train, plain = short
    assert not same_weights(plain, train(tmp_path, **{field: KNOBS[field]}))


def test_compiled_training_is_the_plain_one(train, tmp_path, recwarn):
    settings = {"steps": 2, "precision": "no", "optimizer": "adamw"}
    settings["adversarial_ramp"] = (0.0, 0.0)  # with the discriminator's part, for which the last layer is called apart
    start = lambda compile: train(tmp_path, f"r{compile}", compile=compile, **settings)
    assert_compiled_is_plain(start, recwarn)
