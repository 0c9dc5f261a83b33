"""What a preset costs before it is begun: arithmetic counted from the networks themselves, nothing timed.

In: a preset and a number of pictures. Out: floating-point operations, memory and disk. Operations are counted by torch while
one picture goes through each stage on the CPU; hours follow from a stated peak and a stated share of it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from .attention import cpu_training_kernels
from .clip_embed import ClipEmbedder
from .config import Preset
from .images import to_float
from .losses import PatchDiscriminator, adaptive_weight, adversarial_loss, discriminator_loss
from .transformer import ImageTransformer
from .vqgan import VQGAN

STATE_BYTES = 5 * 4  # weights, gradients, two moments and the EMA, in float32
UTILISATION = 0.4  # of the peak in bfloat16, that a training is taken to reach


def count(preset: Preset, seed: int = 0) -> dict[str, dict[str, float]]:
    """Operations and bytes of one picture in each stage, by running it once on the CPU.

    Returns:
        Stage -> `flops` (multiply and add count as two) of one picture, `parameters` that are trained, and `activation_bytes`
        that one picture holds between forward and backward under bfloat16. `extract` has `embed_dim`. Stages: `vqgan` (one training step with
        discriminator, adaptive weight and, where the preset has it, LPIPS on random weights, which cost what trained ones
        do), `extract` (VQGAN encoder and CLIP), `transformer` (one training step without the embedding loss), `sample`.
    """
    torch.manual_seed(seed)
    config, found = preset.vqgan, {}
    warnings.filterwarnings("ignore", message=".*(Flash attention|fused kernels).*")
    one = to_float(torch.randint(0, 256, (1, 3, config.image_size, config.image_size)))
    vqgan = VQGAN(config)
    critic = PatchDiscriminator(preset.vqgan_train.discriminator_channels, preset.vqgan_train.discriminator_layers)
    perceptual = _lpips() if preset.vqgan_train.perceptual == "lpips" else lambda real, fake: real.new_zeros(())

    def generator_loss(batch: int = 1) -> torch.Tensor:
        image = one.repeat(batch, 1, 1, 1)
        fake, quantized = vqgan(image)
        reconstruction = F.l1_loss(fake, image) + perceptual(image, fake).mean()
        adversarial = adversarial_loss(critic(fake))
        weight = adaptive_weight(reconstruction, adversarial, vqgan.last_layer, 1.0)
        critic_loss = discriminator_loss(critic(image), critic(fake.detach()))
        return reconstruction + quantized.codebook_loss + quantized.commitment_loss + weight * adversarial + critic_loss

    found["vqgan"] = _trained(generator_loss, (vqgan, critic))
    clip = _image_encoder(preset)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokens = vqgan.encode(one).flatten(1)
        embeds = clip(torch.zeros(1, 3, *_pair(clip.image_size)))
    found["extract"] = {"flops": counter.get_total_flops(), "embed_dim": embeds.shape[-1]}
    undropped = replace(preset.transformer, dropout=0.0)  # which the fused CPU kernel does not know; it costs next to nothing
    transformer = ImageTransformer(undropped, config.codebook_size, config.side**2, embeds.shape[-1]).train()

    def likelihood(batch: int = 1) -> torch.Tensor:
        logits = transformer(F.normalize(embeds.float(), dim=-1).repeat(batch, 1), tokens.repeat(batch, 1))
        return F.cross_entropy(logits.flatten(0, 1), tokens.repeat(batch, 1).flatten())

    found["transformer"] = _trained(likelihood, (transformer,))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        likelihood()
    forward = counter.get_total_flops() * (2 if preset.sample.guidance != 1 else 1)  # cached steps add up to one pass
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vqgan.decode(tokens.view(1, config.side, config.side))
    found["sample"] = {"flops": forward + counter.get_total_flops()}
    return found


def project(preset: Preset, counted: dict, n_images: int, peak: float, gpus: int = 1, share: float = UTILISATION) -> dict:
    """Hours, memory and disk of a preset on a data set.

    Args:
        counted: what `count` returned. n_images: training pictures.
        peak: operations a second of one GPU in bfloat16, by its data sheet. share: of it that is taken to be reached.

    Returns:
        `hours` of wall time by stage on that many GPUs (`extract`: once over pictures and mirrored pictures; `sample`: the
        preset's evaluation), `gpu_hours` in all, `gigabytes` of one GPU's memory by stage (weights, gradients, moments, EMA,
        and activations of its part of a batch), `store_gigabytes` of disk for the token store.
    """
    flip = 2 if preset.transformer_train.flip else 1
    pictures = {
        "vqgan": preset.vqgan_train.steps * preset.vqgan_train.batch_size,
        "extract": n_images * flip,
        "transformer": preset.transformer_train.steps * preset.transformer_train.batch_size,
        "sample": preset.evaluate.n,
    }
    hours = {stage: counted[stage]["flops"] * n / (peak * share * gpus) / 3600 for stage, n in pictures.items()}
    gigabytes = {}
    for stage, training in (("vqgan", preset.vqgan_train), ("transformer", preset.transformer_train)):
        at_once = training.batch_size / training.accumulate / gpus
        need = STATE_BYTES * counted[stage]["parameters"] + at_once * counted[stage]["activation_bytes"]
        gigabytes[stage] = need / 1e9
    row = 2 * preset.vqgan.side**2 + 2 * counted["extract"]["embed_dim"]
    return {"gpus": gpus, "hours": hours, "gpu_hours": gpus * sum(hours.values()), "gigabytes": gigabytes,
            "store_gigabytes": row * n_images * flip / 1e9}  # fmt: skip


def _trained(loss: Callable[[int], torch.Tensor], modules: tuple[nn.Module, ...]) -> dict[str, float]:
    """Operations of one forward and backward pass, parameters, and bytes that the backward pass waits for."""
    with FlopCounterMode(display=False) as counter:
        loss(1).backward()
    parameters = sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
    activations = _held(loss, 2) - _held(loss, 1)  # the difference leaves out weights cast to bfloat16, held once a batch
    return {"flops": counter.get_total_flops(), "parameters": parameters, "activation_bytes": activations}


def _held(loss: Callable[[int], torch.Tensor], batch: int) -> int:
    """Bytes of tensors saved for the backward pass of a batch, parameters left out."""
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kernels = cpu_training_kernels.set((SDPBackend.FLASH_ATTENTION, SDPBackend.MATH))  # a GPU keeps no attention matrix
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        waiting = loss(batch)  # lives until all is counted: nothing of it is freed on the way
    cpu_training_kernels.reset(kernels)
    del waiting
    return sum(held.values())


def _lpips() -> nn.Module:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).requires_grad_(False)


def _image_encoder(preset: Preset) -> nn.Module:
    """The CLIP image tower of a preset, of random weights where it is not the embedded one: it costs the same."""
    if preset.clip.pretrained is None:
        return ClipEmbedder.load(preset.clip.name).model.visual
    import open_clip

    logging.disable(logging.WARNING)  # it says that the weights are random: they are meant to be
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.create_model(preset.clip.name, pretrained=None)
    logging.disable(logging.NOTSET)
    return model.visual


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
