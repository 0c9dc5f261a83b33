import pytest
import torch
from torch import nn

from clipgen_lib.runtime.runs import ClipgenError
from clipgen_lib.train_vqgan import (
    PatchDiscriminator,
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
    perceptual_loss,
    ramp,
)


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.75))
    assert adversarial_loss(fake).item() == pytest.approx(0.75)


@pytest.mark.parametrize("scale", [1.0, torch.tensor(1024.0)])
def test_adaptive_weight_is_the_ratio_of_gradients_and_is_clamped(scale):
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))

    def weigh(largest, times=1.0):
        images = layer * torch.tensor([1.0, 2.0])
        strong, weak = (images * torch.tensor([3.0, 2.0])).sum(), times * (images * torch.tensor([0.0, 1.0])).sum()
        return adaptive_weight(strong, weak, images, layer, largest, scale)

    weight, *slopes = weigh(100.0)
    assert weight.item() == pytest.approx(2.5, rel=1e-4) and not weight.requires_grad
    assert torch.equal(torch.stack(slopes), torch.tensor([[3.0, 2.0], [0.0, 1.0]]))
    assert weigh(1.5)[0].item() == 1.5 and weigh(10.0, times=0)[0].item() == 10.0


def test_ramp():
    assert [ramp(step, 100, 0.2, 0.4) for step in (0, 20, 30, 40, 99)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert ramp(0, 100, 0.0, 0.0) == 0 and ramp(1, 100, 0.0, 0.0) == 1


@pytest.mark.parametrize("channels, layers, side", [(16, 3, 8), (16, 2, 16)])
def test_a_logit_for_each_patch(channels, layers, side):
    logits = PatchDiscriminator(channels, layers)(torch.zeros(2, 3, 64, 64))
    assert logits.shape == (2, 1, side, side)


def test_perceptual_losses(clip):
    real, fake = torch.rand(2, 3, 64, 64) * 2 - 1, (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    distance = perceptual_loss("clip", clip)
    assert distance(real, real).item() == pytest.approx(0, abs=1e-6)
    near = distance(real, real + 0.05 * torch.randn_like(real))
    assert 0 < near < distance(real, fake)
    distance(real, fake).backward()
    assert fake.grad.abs().sum() > 0 and all(p.grad is None for p in clip.parameters())
    assert perceptual_loss("none")(real, fake).item() == 0


def test_perceptual_choices_are_explicit(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ClipgenError, match="vgg16-397923af.pth"):
        perceptual_loss("lpips")
    with pytest.raises(ClipgenError, match="needs a CLIP"):
        perceptual_loss("clip")
    with pytest.raises(ClipgenError, match="choose lpips, clip or none"):
        perceptual_loss("l2")
