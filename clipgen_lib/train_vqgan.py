"""Losses of stage 1: reconstruction, perceptual, adversarial.

In: real and reconstructed images (B, 3, H, W) in [-1, 1]. Out: scalars. The balance between them is the training
loop's; the formulas are those of VQGAN (arXiv 2012.09841, equations 4 to 7) with the hinge form of its code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import nn

from .clip_embed import ClipEmbedder
from .config import VQGANConfig, VQGANTrainConfig
from .data.batches import dead_workers_told, ordered_batches, training_batches
from .data.datasets import ImageSet
from .data.images import to_float
from .runtime import distributed
from .runtime.checkpoints import VGG16, weights_alone, weights_file
from .runtime.kernels import apply, compiled
from .runtime.runs import ClipgenError, Run, progress, stoppable
from .training import (
    Averaged,
    Log,
    TrainingState,
    accelerator_on,
    build_optimizer,
    finish,
    is_sharded,
    lasting,
    positions,
    reduced,
    scale_of,
    scaler_of,
    set_learning_rates,
    step_seed,
    with_last,
)
from .vqgan import VQGAN

Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss (arXiv 1705.02894): mean of relu(1 - real) and relu(1 + fake), halved as in VQGAN's code."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adversarial_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The generator's side of the hinge loss: minus the mean logit of its images."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction: torch.Tensor,
    adversarial: torch.Tensor,
    images: torch.Tensor,
    last_layer: nn.Parameter,
    largest: float,
    scale: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
        distributed.all_reduce_mean(torch.autograd.grad(images, last_layer, slope, retain_graph=True)[0]).norm()
        for slope in slopes
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
            raise ClipgenError(
                "perceptual loss 'clip' needs a CLIP: give one, or choose 'lpips' or 'none' in the preset"
            )
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


def train_vqgan(
    run: Run,
    images: ImageSet,
    held_out: ImageSet,
    model_config: VQGANConfig,
    config: VQGANTrainConfig,
    clip: ClipEmbedder | None = None,
    seed: int = 0,
    device: str = "cpu",
    show_progress: bool = True,
) -> VQGAN:
    """Train a VQGAN on images, or go on from the run's last checkpoint, and write `<run>/vqgan/`.

    Generator: L1 and L2 + perceptual + ramp * adaptive weight * adversarial + codebook + beta * commitment (VQGAN,
    arXiv 2012.09841). The discriminator learns from step 0; only its say in the generator's loss is ramped.

    Args:
        held_out: images not trained on; the error of their reconstructions is logged at every checkpoint.

    Returns:
        The EMA of the weights, in eval mode.

    Raises:
        ClipgenError: nothing finite for `MOST_SKIPPED` steps in a row, a checkpoint of another configuration, a batch that
            does not divide, a full disk.
        Stopped: SIGTERM or SIGINT, after a checkpoint.
    """
    torch.manual_seed(seed)
    accelerator = accelerator_on(config, device)
    if is_sharded(accelerator):
        raise ClipgenError("FSDP is for the transformer, which can be large: launch train-vqgan without it")
    positions(config)
    vqgan = VQGAN(model_config)
    discriminator = PatchDiscriminator(config.discriminator_channels, config.discriminator_layers)
    optimizers = {
        "generator_optimizer": build_optimizer(vqgan, config.optimizer, config.lr, config.beta2, config.weight_decay),
        "discriminator_optimizer": build_optimizer(
            discriminator, "adamw", config.discriminator_lr, config.beta2, config.weight_decay
        ),
    }
    ema = Averaged(vqgan, config.ema_decay)
    perceptual = perceptual_loss(config.perceptual, clip)
    parts = {"model": vqgan, "discriminator": discriminator, "ema": ema, **optimizers, **scaler_of(accelerator)}
    state = TrainingState(
        run,
        "vqgan",
        parts,
        {"model": asdict(model_config), "train": lasting(config), "seed": seed, "data": images.hash},
    )
    start = state.resume()
    generator, critic, *prepared = accelerator.prepare(vqgan, discriminator, *optimizers.values())
    ema.module.to(accelerator.device)
    forward = compiled(generator, accelerator.device) if config.compile else generator
    batches = training_batches(images, config, seed, start)
    log = Log(run, "vqgan", config.steps, model_config.codebook_size)

    with (
        progress(config.steps, "training VQGAN", show_progress and accelerator.is_main_process, start) as bar,
        stoppable() as stop,
        dead_workers_told(images, config.workers),
    ):
        for step in range(start, config.steps):
            torch.manual_seed(step_seed(seed, step, distributed.rank()))
            say = config.adversarial_weight * ramp(step, config.steps, *config.adversarial_ramp)
            set_learning_rates(prepared, (config.lr, config.discriminator_lr), step, config)
            found = []
            for last, real in with_last(to_float(next(batches).to(accelerator.device)).chunk(config.accumulate)):
                with reduced(accelerator, last, generator, critic):
                    discriminator.requires_grad_(False)
                    with accelerator.autocast():
                        features, quantized = forward(real, whole=False)
                        fake = vqgan.decoder.last(features)  # never compiled: a compiled graph has one backward pass
                        l1, l2, feature_distance = F.l1_loss(fake, real), F.mse_loss(fake, real), perceptual(real, fake)
                        reconstruction = (
                            config.l1_weight * l1 + config.l2_weight * l2 + config.perceptual_weight * feature_distance
                        )
                        scalars = {"l1": l1, "l2": l2, "perceptual": feature_distance}
                        latent = quantized.codebook_loss + config.beta * quantized.commitment_loss
                        loss = goal = reconstruction + latent
                        if say > 0:
                            adversarial = adversarial_loss(discriminator(fake))
                            weight, *slopes = adaptive_weight(
                                reconstruction,
                                adversarial,
                                fake,
                                vqgan.last_layer,
                                config.adaptive_max,
                                scale_of(accelerator),
                            )
                            scalars |= {"adversarial": adversarial, "adaptive_weight": weight}
                            loss = loss.detach() + say * weight * adversarial.detach()
                            goal = (
                                fake * (slopes[0] + say * weight * slopes[1])
                            ).sum() + latent  # of the gradient of `loss`
                    accelerator.backward(goal / config.accumulate)
                    discriminator.requires_grad_(True)
                    with accelerator.autocast():
                        both = critic(torch.cat([real, fake.detach()]))
                        critic_loss = discriminator_loss(*both.chunk(2))
                    accelerator.backward(critic_loss / config.accumulate)
                log.add(
                    loss=loss,
                    discriminator=critic_loss,
                    codebook_loss=quantized.codebook_loss,
                    commitment_loss=quantized.commitment_loss,
                    real_logit=both[: len(real)].mean(),
                    fake_logit=both[len(real) :].mean(),
                    **scalars,
                )
                found.append((quantized.vectors, quantized.tokens))
            vectors, tokens = (torch.cat(x) for x in zip(*found, strict=True))
            norms = {
                f"{name}_gradient": accelerator.clip_grad_norm_(module.parameters(), config.clip_norm)
                for name, module in (("generator", generator), ("discriminator", critic))
            }
            log.add(**norms)
            log.use(tokens)
            valid = log.valid(*norms.values())
            apply(prepared, valid)
            vqgan.quantizer.update_codebook(
                vectors, tokens, torch.Generator().manual_seed(step_seed(seed, step)), valid
            )
            ema.update(vqgan)
            bar.update()
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                bar.set_postfix(log.write(step + 1, lr=prepared[0].param_groups[0]["lr"]))
            if accelerator.is_main_process:
                if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                    scores = validation_reconstruction(ema.module, held_out)
                    run.log("vqgan_val", step + 1, **scores)
                    state.save(step + 1, scores["l2"])
                stop.raise_if_asked(
                    lambda done=step + 1: state.save(done), f"after step {step + 1} of the VQGAN's training"
                )
    return finish(run, "vqgan", ema.module, accelerator, images.skipped)


@torch.inference_mode()
def validation_reconstruction(vqgan: VQGAN, images: ImageSet, most: int = 256) -> dict[str, float]:
    """L1 and L2 between a set's first images (B, 3, S, S) in [-1, 1] and their reconstructions, clamped, by weights in any mode."""
    training = vqgan.training
    vqgan.eval()
    l1, l2, count = 0.0, 0.0, 0
    for _, batch in ordered_batches(images, range(min(most, len(images))), 64):
        real = to_float(batch).to(vqgan.last_layer.device)
        error = vqgan.decode(vqgan.encode(real)) - real
        l1, l2, count = l1 + float(error.abs().sum()), l2 + float(error.pow(2).sum()), count + error.numel()
    vqgan.train(training)
    if count == 0:
        raise ClipgenError(f"none of the held-out images of {images.root} could be read: check the data")
    return {"l1": l1 / count, "l2": l2 / count}
