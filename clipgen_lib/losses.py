"""Losses of stage 1: reconstruction, perceptual, adversarial.

In: real and reconstructed pictures (B, 3, H, W) in [-1, 1]. Out: scalars. The balance between them is the training
loop's; the formulas are those of VQGAN (arXiv 2012.09841, equations 4 to 7) with the hinge form of its code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from . import processes
from .clip_embed import ClipEmbedder
from .protocols import VGG16, weights_alone, weights_file
from .runs import ClipgenError

Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): a logit for each patch, (B, 3, H, W) -> (B, 1, h', w').

    GroupNorm instead of the original's BatchNorm: real and reconstructed pictures come in separate batches, and
    several processes then need no synchronised statistics.
    """

    def __init__(self, channels: int = 64, layers: int = 3):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers)]
        blocks: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, width in zip(widths, widths[1:], strict=False):
            blocks += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
        blocks += [nn.Conv2d(widths[-1], widths[-1], 3, padding=1), nn.GroupNorm(8, widths[-1]), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images).float()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss (arXiv 1705.02894): mean of relu(1 - real) and relu(1 + fake), halved as in VQGAN's code."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adversarial_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The generator's side of the hinge loss: minus the mean logit of its pictures."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, images: torch.Tensor, last_layer: nn.Parameter, largest: float,
    scale: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """|grad of reconstruction| / |grad of adversarial| at the decoder's last layer (arXiv 2012.09841, equation 7).

    Clamped to [0, largest]: unclamped it explodes where the discriminator saturates. Not differentiable itself. The gradients
    are those of the whole batch, whatever number of processes share it: one weight for all.

    Args:
        images: (B, 3, H, W), what both losses look at and `last_layer` has made; the two networks that judge them are gone
            through once, here, and their part of the graph is freed.
        scale: of the gradient on its way, () for fp16; what is returned is without it.

    Returns:
        The weight, and the gradients of the two losses at the images, with which a backward pass can go on.
    """
    unit = torch.ones_like(reconstruction) * scale
    slopes = [torch.autograd.grad(loss, images, unit)[0] / scale for loss in (reconstruction, adversarial)]
    of_r, of_a = (
        processes.mean(torch.autograd.grad(images, last_layer, slope, retain_graph=True)[0]).norm() for slope in slopes
    )
    return (of_r / (of_a + 1e-6)).clamp(0, largest).detach(), *slopes


def ramp(step: int, steps: int, start: float, end: float) -> float:
    """0 before the share `start` of the training, 1 after the share `end`, linear between."""
    done = step / max(steps, 1)
    return min(max((done - start) / max(end - start, 1e-9), 0.0), 1.0)


def perceptual_loss(kind: str, clip: ClipEmbedder | None = None) -> Perceptual:
    """The perceptual distance named by the preset; a choice, never a fallback.

    `lpips`: LPIPS with VGG16 (arXiv 1801.03924), whose backbone weights must be in torch's hub folder.
    `clip`: the same construction on a CLIP image encoder: mean squared distance of channel-normalised feature maps,
    averaged over its stages. `none`: zero.
    """
    if kind == "none":
        return lambda real, fake: real.new_zeros(())
    if kind == "clip":
        if clip is None:
            raise ClipgenError("perceptual loss 'clip' needs a CLIP: give one, or choose 'lpips' or 'none' in the preset")
        return lambda real, fake: _feature_distance(clip, real, fake)
    if kind == "lpips":
        weights_file(VGG16, "the perceptual loss LPIPS", "set perceptual to 'clip' in the preset")
        import lpips

        with weights_alone():
            network = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)
        return lambda real, fake: network.to(real.device)(fake, real).mean()
    raise ClipgenError(f"unknown perceptual loss {kind!r}: choose lpips, clip or none")


def _feature_distance(clip: ClipEmbedder, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        wanted = clip.feature_maps(real)
    pairs = zip(wanted, clip.feature_maps(fake), strict=True)
    return torch.stack([(F.normalize(a, dim=1) - F.normalize(b, dim=1)).pow(2).sum(1).mean() for a, b in pairs]).mean()
