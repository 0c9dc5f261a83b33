"""What a preset costs before it is begun: operations, memory, disk and hours, counted from the networks themselves.

In: a preset. Out: plain numbers. Networks and pictures here have shapes but no content: nothing is computed, timed or read, so
a preset of any size is counted in seconds on any machine, for a GPU that is not there.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .config import ClipConfig, Preset, TransformerConfig, VQGANConfig
from .data import CACHE_BYTES
from .losses import PatchDiscriminator, adversarial_loss, discriminator_loss
from .train_clip import MODEL
from .transformer import ImageTransformer
from .vqgan import VQGAN

STATE_BYTES = 5 * 4  # of a parameter: weight, gradient, two moments and the EMA, in float32
MARGIN = 1.1  # what an allocator loses between tensors, and gradients on their way
CUDA_GIGABYTES = 1.0  # context of the driver and workspaces of its libraries
PYTHON_GIGABYTES = 1.5  # a process with torch and the other packages loaded
WORKER_GIGABYTES = 0.5  # each process that decodes pictures
UTILISATION = 0.4  # of a GPU's peak in bfloat16, that a training is taken to reach


# ---------------------------------------------------------------------------------------------- operations and hours


@cache
def count(preset: Preset) -> dict[str, float]:
    """Operations of one picture in each stage, a multiplication with its addition as two.

    Returns:
        `vqgan`: a training step with discriminator, LPIPS where the preset has it, and the two short backward passes of the
        adaptive weight left out. `extract`: VQGAN encoder and CLIP image encoder. `transformer`: a training step without the
        embedding loss. `sample`: drawing and decoding a picture, with the preset's guidance, each token once.
    """
    config, train = preset.vqgan, preset.vqgan_train
    critic = (train.discriminator_channels, train.discriminator_layers)
    with _imagined("cpu"):
        loss = _vqgan_loss(config, critic, train.perceptual == "lpips", 1, "cpu")[0]
        transformer, likelihood = _likelihood(preset.transformer, config, _clip_dim(preset), 1)
        vqgan, image = VQGAN(config), torch.empty(1, 3, config.image_size, config.image_size)
        encoder = _image_encoder(preset.clip)
        size = encoder.image_size if isinstance(encoder.image_size, tuple) else (encoder.image_size,) * 2
        tokens = torch.zeros(1, config.side, config.side, dtype=torch.long)
        with torch.no_grad():
            encoded = _operations(lambda: (vqgan.encode(image), encoder(torch.empty(1, 3, *size))))
            drawn = _operations(likelihood) * (1 if preset.sample.guidance == 1 else 2)  # cached steps add up to one pass
            decoded = _operations(lambda: vqgan.decode(tokens))
        return {
            "vqgan": _operations(lambda: loss().backward()),
            "extract": encoded,
            "transformer": _operations(lambda: likelihood().backward()),
            "sample": drawn + decoded,
        }


def project(preset: Preset, n_images: int, peak: float, gpus: int = 1, share: float = UTILISATION) -> dict:
    """Hours, memory and disk of a preset on a data set.

    Args:
        n_images: pictures of the train split.
        peak: operations a second of one GPU in bfloat16, by its data sheet. share: of it that is taken to be reached.

    Returns:
        `operations` of one picture and `hours` of wall time on that many GPUs, by stage (`extract` goes once over pictures
        and mirrored pictures, `sample` over the captions of the preset's evaluation), `gpu_hours` in all, `gigabytes` of
        each GPU's memory (`need`), `store_gigabytes` and `checkpoint_gigabytes` of disk.
    """
    operations, rows = count(preset), n_images * (2 if preset.transformer_train.flip else 1)
    pictures = {
        "vqgan": preset.vqgan_train.steps * preset.vqgan_train.batch_size,
        "extract": rows,
        "transformer": preset.transformer_train.steps * preset.transformer_train.batch_size,
        "sample": preset.evaluate.n,
    }
    hours = {stage: operations[stage] * n / (peak * share * gpus) / 3600 for stage, n in pictures.items()}
    row = 2 * preset.vqgan.side**2 + 2 * _clip_dim(preset)
    asked = need(preset, gpus)
    return {
        "preset": preset.name, "images": n_images, "peak": peak, "share": share, "gpus": gpus, "operations": operations,
        "hours": hours, "gpu_hours": gpus * sum(hours.values()), "gigabytes": asked.device,
        "store_gigabytes": row * rows / 1e9, "checkpoint_gigabytes": asked.disk,
    }  # fmt: skip


def lines_of(projected: list[dict]) -> str:
    """Projections of one preset on several numbers of GPUs, as lines a person can read."""
    first = projected[0]
    lines = [
        f"{first['preset']}, {first['images']:,} pictures, {first['share']:.0%} of {first['peak'] / 1e12:.0f} TFLOP/s in bfloat16 (assumed, not measured)",
        f"{'GPUs':6}{'VQGAN':>9}{'tokens':>9}{'transformer':>13}{'drawing':>9}{'in all':>9}{'GPU hours':>11}{'GB on each':>12}",
    ]
    for p in projected:
        h = p["hours"]
        lines.append(f"{p['gpus']:<6}{h['vqgan']:>7.2f} h{h['extract']:>7.2f} h{h['transformer']:>11.2f} h{h['sample']:>7.2f} h{sum(h.values()):>7.2f} h{p['gpu_hours']:>11.0f}{p['gigabytes']:>12.0f}")  # fmt: skip
    lines.append(
        f"disk: {first['store_gigabytes']:.1f} GB of token store, {first['checkpoint_gigabytes']:.0f} GB of checkpoints, beside the pictures"
    )
    return "\n".join(lines)


def _operations(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Need:
    """What the larger of a preset's two trainings takes, in GB of 10^9 bytes.

    An estimate. Counted: state (parameters x 20 bytes), tensors kept for the backward pass at the preset's batch, frozen CLIP
    and VGG. Assumed: a tenth more for what lies between, 1 GB of CUDA, 1.5 GB of Python, 0.5 GB a worker. Not counted: what
    CLIP itself keeps on the way, `torch.compile`, evaluation.
    """

    device: float  # on each GPU, or in memory where there is none
    ram: float
    disk: float  # checkpoints and weights; pictures and token store come on top
    pictures: int  # a pass and process, of stage 1


def need(preset: Preset, gpus: int = 1) -> Need:
    """What a preset takes on a number of GPUs that share its batch; 0 is the CPU."""
    stage1, stage2, config = preset.vqgan_train, preset.transformer_train, preset.vqgan
    device, processes = ("cuda" if gpus else "cpu"), max(gpus, 1)
    pictures, rows = (-(-train.batch_size // (train.accumulate * processes)) for train in (stage1, stage2))
    critic = (stage1.discriminator_channels, stage1.discriminator_layers)
    vqgan, vgg, kept1 = _count_vqgan(config, critic, stage1.perceptual == "lpips", pictures, device)
    transformer, kept2 = _count_transformer(preset.transformer, config, _clip_dim(preset), rows, device)
    decoded = stage2.embedding_share * rows if stage2.embedding_weight else 0  # through the decoder: at most a whole VQGAN
    clip = 4 * (151_000_000 if preset.clip.pretrained else 6_000_000)  # ViT-B/32, or the embedded one
    larger = max(STATE_BYTES * vqgan + kept1, STATE_BYTES * transformer + kept2 + decoded * kept1 / pictures)
    on_device = MARGIN * (larger + vgg + clip) / 1e9 + (CUDA_GIGABYTES if gpus else 0)
    held = min(preset.shapes.n_train * 3 * config.image_size**2, CACHE_BYTES) / 1e9  # decoded, where no workers decode
    ram = processes * (PYTHON_GIGABYTES + (WORKER_GIGABYTES * stage1.workers if stage1.workers else held))
    ram += 0 if gpus else on_device
    disk = STATE_BYTES * (vqgan + transformer) / 1e9  # weights, and a checkpoint of weights, two moments and the EMA
    return Need(on_device if gpus else ram, ram, disk, pictures)


def _clip_dim(preset: Preset) -> int:
    return 512 if preset.clip.pretrained else 256  # of ViT-B/32, and of the embedded one


@cache
def _count_vqgan(
    config: VQGANConfig, critic: tuple[int, int], is_lpips: bool, pictures: int, device: str
) -> tuple[int, int, int]:  # fmt: skip
    """Parameters that are trained, bytes of the frozen VGG, and bytes that one pass keeps for the backward pass."""
    with _imagined(device):
        loss, trained, frozen = _vqgan_loss(config, critic, is_lpips, pictures, device, with_critic=False)
        return trained, 4 * frozen, _kept(loss)


def _vqgan_loss(
    config: VQGANConfig, critic: tuple[int, int], is_lpips: bool, pictures: int, device: str, with_critic: bool = True
) -> tuple[Callable[[], torch.Tensor], int, int]:  # fmt: skip
    """The loss of stage 1, with that of the discriminator (whose pass comes after the generator's is freed), parameters that
    are trained, and parameters of the frozen VGG."""
    vqgan, discriminator = VQGAN(config), PatchDiscriminator(*critic)
    lpips = _lpips(device) if is_lpips else None
    real = torch.empty(pictures, 3, config.image_size, config.image_size)

    def loss() -> torch.Tensor:
        fake, quantized = vqgan(real)
        found = F.l1_loss(fake, real) + F.mse_loss(fake, real) + quantized.codebook_loss + quantized.commitment_loss
        found = found + adversarial_loss(discriminator(fake)) + (lpips(fake, real).mean() if lpips else 0)
        if with_critic:
            found = found + discriminator_loss(discriminator(real), discriminator(fake.detach()))
        return found

    return loss, _size(vqgan) + _size(discriminator), _size(lpips) if lpips else 0


@cache
def _count_transformer(
    config: TransformerConfig, vqgan: VQGANConfig, clip_dim: int, rows: int, device: str
) -> tuple[int, int]:  # fmt: skip
    """Parameters, and bytes that one pass keeps for the backward pass."""
    with _imagined(device):
        transformer, loss = _likelihood(config, vqgan, clip_dim, rows)
        return _size(transformer), _kept(loss)


def _likelihood(
    config: TransformerConfig, vqgan: VQGANConfig, clip_dim: int, rows: int
) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """A transformer, and its loss of stage 2 on some rows."""
    transformer = ImageTransformer(config, vqgan.codebook_size, vqgan.side**2, clip_dim)
    tokens = torch.zeros(rows, vqgan.side**2, dtype=torch.long)

    def loss() -> torch.Tensor:
        return F.cross_entropy(transformer(torch.empty(rows, clip_dim), tokens).flatten(0, 1), tokens.flatten())

    return transformer, loss


@contextlib.contextmanager
def _imagined(device: str) -> Iterator[None]:
    """Tensors with a shape and a device but no content, under that device's bfloat16 autocast, whether it is here or not."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def _kept(loss: Callable[[], torch.Tensor]) -> int:
    """Bytes of the distinct tensors, parameters left out, that autograd keeps for the backward pass."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # held, so that no other tensor gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(storage.nbytes() for storage in kept.values())


def _lpips(device: str) -> nn.Module:
    import lpips

    module = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).requires_grad_(False)
    for part in module.modules():  # it makes its constants on the CPU; imagined tensors cannot be moved by `.to`
        for name, constant in list(part.named_buffers(recurse=False)):
            setattr(part, name, constant.to(device))
    return module


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _image_encoder(clip: ClipConfig) -> nn.Module:
    """The image encoder of a preset's CLIP, without its weights."""
    import open_clip
    from open_clip.model import CLIP

    return CLIP(**(MODEL if clip.pretrained is None else open_clip.get_model_config(clip.name))).visual
