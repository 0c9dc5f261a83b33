"""Stage 1, VQGAN training: its losses, one step of each network, and the loop.

In: images (B, 3, H, W) in [-1, 1]. Out: a VQGAN. The formulas are those of VQGAN (Esser et al., arXiv 2012.09841, equations 4
to 7) with the hinge form of its code, as CLIP-GEN (arXiv 2203.00386, section 3.1) takes them over.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import training
from .clip_embed import ClipEmbedder
from .config import Preset, VQGANTrainConfig
from .data.batches import dead_workers_told, ordered_batches, training_batches
from .data.datasets import ImageSet
from .data.images import grid, to_float
from .runtime import distributed
from .runtime.checkpoints import VGG16, weights_alone, weights_file
from .runtime.kernels import compile_in_place
from .runtime.runs import ClipgenError, Run
from .vqgan import VQGAN, Quantized

Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Splits = tuple[ImageSet, ImageSet]  # to train on, and to measure reconstructions on at every checkpoint


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): a logit for each patch, (B, 3, H, W) -> (B, 1, h', w').

    GroupNorm instead of the original's BatchNorm: real and reconstructed images come in separate batches, and
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


def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, images: torch.Tensor, layer: nn.Parameter, largest: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """|grad of reconstruction| / |grad of adversarial| at the decoder's last layer (arXiv 2012.09841, equation 7).

    Clamped to [0, largest]: unclamped it explodes where the discriminator saturates. Not differentiable itself. The gradients
    are those of the whole batch, whatever number of processes share it: one weight for all.

    Both losses are computed on `images` (B, 3, H, W), which `layer` has made; the perceptual network and the discriminator
    are gone through once, here, and their part of the graph is freed. Returns the weight, and the gradients of the two
    losses at the images, with which a backward pass can continue.
    """
    grads = [torch.autograd.grad(loss, images)[0] for loss in (reconstruction, adversarial)]
    at_layer = [torch.autograd.grad(images, layer, grad, retain_graph=True)[0] for grad in grads]
    norm_rec, norm_adv = (distributed.all_reduce_mean(grad).norm() for grad in at_layer)
    return (norm_rec / (norm_adv + 1e-6)).clamp(0, largest).detach(), *grads


def ramp(step: int, steps: int, start: float, end: float) -> float:
    """0 before the share `start` of the training, 1 after the share `end`, linear between."""
    done = step / max(steps, 1)
    return min(max((done - start) / max(end - start, 1e-9), 0.0), 1.0)


def perceptual_loss(kind: Literal["lpips", "clip", "none"], clip: ClipEmbedder | None = None) -> Perceptual:
    """The perceptual distance named by the preset; a choice, never a fallback.

    `lpips`: LPIPS with VGG16 (arXiv 1801.03924), whose backbone weights must be in torch's hub folder.
    `clip`: the same construction on a CLIP image encoder: mean squared distance of channel-normalised feature maps,
    averaged over its stages. `none`: zero.
    """
    if kind == "none":
        return lambda real, fake: real.new_zeros(())
    if kind == "clip":
        if clip is None:
            raise ClipgenError("perceptual loss 'clip' needs a CLIP: give one, or choose 'lpips' or 'none'")
        return lambda real, fake: _feature_distance(clip, real, fake)
    weights_file(VGG16, "the perceptual loss LPIPS", "set perceptual to 'clip' in the preset")
    import lpips

    with weights_alone():
        network = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)
    return lambda real, fake: network.to(real.device)(fake, real).mean()


def _feature_distance(clip: ClipEmbedder, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        wanted = clip.feature_maps(real)
    pairs = zip(wanted, clip.feature_maps(fake), strict=True)
    return torch.stack([(F.normalize(a, dim=1) - F.normalize(b, dim=1)).pow(2).sum(1).mean() for a, b in pairs]).mean()


class GeneratorStep(NamedTuple):
    loss: torch.Tensor  # to go backward from: its gradient is that of scalars["loss"], its value need not be
    scalars: dict[str, torch.Tensor]
    fake: torch.Tensor  # (B, 3, H, W) reconstructions, for the discriminator
    quantized: Quantized  # for the codebook's own update


def generator_step(
    vqgan: nn.Module,
    discriminator: nn.Module,
    perceptual: Perceptual,
    images: torch.Tensor,
    config: VQGANTrainConfig,
    adv_weight: float,
) -> GeneratorStep:
    """The generator's loss on images (B, 3, H, W) in [-1, 1], and its parts (arXiv 2012.09841).

    `adv_weight` is that of the adversarial loss, beside the adaptive weight; 0 leaves the discriminator out.
    """
    decoder = getattr(vqgan, "module", vqgan).decoder  # DDP hides the parts of a module
    with training.autocast(config, images.device):
        features, quantized = vqgan(images, until_last_layer=True)
        fake = decoder.last(features)  # apart: the adaptive weight takes the gradient at the last layer alone

        # eq. 4 and its perceptual form: reconstruction + ||sg[z] - e||^2 + beta ||z - sg[e]||^2
        l1, l2, feature_distance = F.l1_loss(fake, images), F.mse_loss(fake, images), perceptual(images, fake)
        reconstruction = config.l1_weight * l1 + config.l2_weight * l2 + config.perceptual_weight * feature_distance
        codebook = quantized.codebook_loss + config.beta * quantized.commitment_loss
        loss = surrogate_loss = reconstruction + codebook
        scalars = {"l1": l1, "l2": l2, "perceptual": feature_distance}

        if adv_weight > 0:
            adversarial = -discriminator(fake).mean()  # eq. 5, the generator's side of the hinge loss
            # eq. 7. The gradients at the images, which it needs anyway, stand for the two losses in the surrogate, so that
            # the backward pass does not go through the perceptual network and the discriminator a second time.
            last, most = decoder.conv_out.weight, config.adaptive_max
            weight, *grads = adaptive_weight(reconstruction, adversarial, fake, last, most)
            loss = loss.detach() + adv_weight * weight * adversarial.detach()  # eq. 6
            surrogate_loss = (fake * (grads[0] + adv_weight * weight * grads[1])).sum() + codebook
            scalars |= {"adversarial": adversarial, "adaptive_weight": weight}
    scalars |= {"codebook_loss": quantized.codebook_loss, "commitment_loss": quantized.commitment_loss, "loss": loss}
    return GeneratorStep(surrogate_loss, scalars, fake, quantized)


def discriminator_step(
    discriminator: nn.Module, real: torch.Tensor, fake: torch.Tensor, config: VQGANTrainConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The discriminator's loss on real and reconstructed images, (B, 3, H, W) each (eq. 5); `fake` gets no gradient.

    The hinge loss (arXiv 1705.02894), halved as in VQGAN's code.
    """
    with training.autocast(config, real.device):
        real_logits, fake_logits = discriminator(torch.cat([real, fake.detach()])).chunk(2)
        loss = 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
    return loss, {"discriminator": loss, "real_logit": real_logits.mean(), "fake_logit": fake_logits.mean()}


def train_vqgan(
    run: Run, splits: Splits, preset: Preset, clip: ClipEmbedder | None = None, step_of: Callable = generator_step
) -> VQGAN:
    """Train a VQGAN, or resume from the run's last checkpoint, and write `<run>/vqgan/`; returns the EMA, in eval mode.

    The discriminator learns from step 0; only its weight in the generator's loss is ramped. `clip` is for the perceptual loss
    "clip". `step_of` computes the generator's loss: a function of your own takes and returns what `generator_step` does.

    Raises ClipgenError: nothing finite for `MOST_SKIPPED` steps in a row, a checkpoint of another configuration, a full disk;
    Stopped: SIGTERM or SIGINT, after a checkpoint.
    """
    config, device, (images, val_images) = preset.vqgan_train, distributed.training_device(run.device), splits
    training.local_rows(config)  # refuses a batch that does not divide
    run = replace(run, seed=run.seed + config.seed)
    torch.manual_seed(run.seed)
    vqgan = VQGAN(preset.vqgan).to(device)
    discriminator = PatchDiscriminator(config.discriminator_channels, config.discriminator_layers).to(device)
    betas_and_decay = (config.beta2, config.weight_decay)
    gen_optimizer = training.build_optimizer(vqgan, config.optimizer, config.lr, *betas_and_decay)
    disc_optimizer = training.build_optimizer(discriminator, "adamw", config.discriminator_lr, *betas_and_decay)
    ema, perceptual = training.moving_average(vqgan, config.ema_decay), perceptual_loss(config.perceptual, clip)
    parts = {"model": vqgan, "discriminator": discriminator, "ema": ema}
    parts |= {"generator_optimizer": gen_optimizer, "discriminator_optimizer": disc_optimizer}
    facts = {"model": asdict(preset.vqgan), "data": images.hash} | training.named_step(step_of, generator_step)
    state = training.TrainingState(run, "vqgan", config, parts, facts)
    start, log = state.resume(), training.Log(run, "vqgan", config.steps)
    if config.compile:
        compile_in_place(vqgan, device)
    ddp_vqgan, ddp_discriminator = distributed.data_parallel(vqgan, discriminator)
    batches = training_batches(images, config, run.seed, start)

    def validate(step: int) -> float:
        scores, shown = validation_reconstruction(ema.module, val_images)
        log.line("vqgan_val", step, scores, reconstructions=shown)
        return scores["l2"]

    with closing(training.loop(state, log, start, validate)) as steps, dead_workers_told(images, config.workers):
        for step in steps:
            adv_weight = config.adversarial_weight * ramp(step, config.steps, *config.adversarial_ramp)
            try:
                batch, quantized = to_float(next(batches).to(device)), []
            except ClipgenError:  # an image cannot be read now: the steps before are kept
                state.save(step)
                raise
            for real in distributed.microbatches(batch.chunk(config.accumulate), ddp_vqgan, ddp_discriminator):
                # without DDP: here the discriminator's parameters get no gradient
                made = training.checked_step(step_of(ddp_vqgan, discriminator, perceptual, real, config, adv_weight))
                (made.loss / config.accumulate).backward()
                disc_loss, scalars = discriminator_step(ddp_discriminator, real, made.fake, config)
                (disc_loss / config.accumulate).backward()
                log.add(**made.scalars, **scalars)
                quantized.append(made.quantized)
            vectors, tokens = torch.cat([q.vectors for q in quantized]), torch.cat([q.tokens for q in quantized])
            log.count(tokens, preset.vqgan.codebook_size)
            optimizers = {"generator_gradient": gen_optimizer, "discriminator_gradient": disc_optimizer}
            if training.optimizer_step(log, step, config.max_grad_norm, **optimizers):
                rng = torch.Generator().manual_seed(training.step_seed(run.seed, step))
                vqgan.quantizer.update_codebook(vectors, tokens, rng)
                ema.update_parameters(vqgan)
    return training.finish(run, "vqgan", ema.module, images.skipped)


@torch.inference_mode()
def validation_reconstruction(vqgan: VQGAN, images: ImageSet) -> tuple[dict[str, float], np.ndarray]:
    """L1 and L2 between a set's first 256 images (B, 3, S, S) in [-1, 1] and their reconstructions, and 8 of both, (H, W, 3) uint8."""
    l1, l2, count, shown = 0.0, 0.0, 0, None
    for _, batch in ordered_batches(images, range(min(256, len(images))), 64):
        real = to_float(batch).to(next(vqgan.parameters()).device)
        fake = vqgan.decode(vqgan.encode(real))
        shown, error = grid(torch.cat([real[:8], fake[:8]]), len(real[:8])) if shown is None else shown, fake - real
        l1, l2, count = l1 + float(error.abs().sum()), l2 + float(error.pow(2).sum()), count + error.numel()
    return {"l1": l1 / count, "l2": l2 / count}, shown
