"""What a preset costs before it is begun: operations, memory, disk and hours, counted from the networks themselves.

In: a preset. Out: plain numbers. Networks and images here have shapes but no content: nothing is computed, timed or read, so
a preset of any size is counted in seconds on any machine, for a GPU that is not there.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from .config import ClipConfig, OptimConfig, Preset, TransformerConfig, VQGANConfig
from .data.datasets import CACHE_BYTES
from .runtime.runs import read_json
from .study.train_clip import MODEL
from .train_vqgan import PatchDiscriminator, adversarial_loss, discriminator_loss
from .training import KEPT, spread
from .transformer import ImageTransformer
from .vqgan import VQGAN

STATE_BYTES = 5 * 4  # of a parameter: weight, gradient, two moments and the EMA, in float32
CHECKPOINT_BYTES = 4 * 4  # of a parameter: weight, two moments and the EMA
MARGIN = 1.1  # what an allocator loses between tensors, and gradients on their way
CUDA_GIGABYTES = 1.0  # context of the driver and workspaces of its libraries
PYTHON_GIGABYTES = 1.5  # a process with torch and the other packages loaded
WORKER_GIGABYTES = 0.5  # each process that decodes images
UTILISATION = 0.4  # of a GPU's peak in bfloat16, that a training is taken to reach where none has been measured
NODE = 8  # GPUs that NVLink joins
NVLINK = 450e9  # bytes a second of a GPU to the others of its node: half of the H100's 900 GB/s, which count both ways
NETWORK = 50e9  # bytes a second of a GPU to other nodes: a card of 400 Gb/s for each


@dataclass(frozen=True)
class DataSet:
    """Images of a train split and bytes of their files, as published."""

    title: str
    images: int
    bytes: float
    source: str


COCO = DataSet("MS-COCO 2017", 118_287, 18e9, "cocodataset.org, 2017 Train images")
IMAGENET = DataSet("ImageNet-1k", 1_281_167, 138e9, "image-net.org, ILSVRC2012 training images of tasks 1 and 2")


def data_set_of(preset: str) -> DataSet:
    """The data that a preset of paper scale is meant for."""
    return IMAGENET if preset == "imagenet" else COCO


@cache
def count(preset: Preset) -> dict[str, float]:
    """Operations of one image in each stage, a multiplication with its addition as two.

    Returns:
        `vqgan`: a training step with discriminator, LPIPS where the preset has it, and the two short backward passes of the
        adaptive weight left out. `extract`: VQGAN encoder and CLIP image encoder. `transformer`: a training step with the
        embedding loss on its share of the batch. `sample`: drawing and decoding an image, with the preset's guidance, each
        token once.
    """
    config, train, stage2 = preset.vqgan, preset.vqgan_train, preset.transformer_train
    marked = spread(stage2.batch_size, stage2.embedding_share).mean() if stage2.embedding_weight else 0.0
    critic = (train.discriminator_channels, train.discriminator_layers)
    with _imagined("cpu"):
        loss = _vqgan_loss(config, critic, train.perceptual == "lpips", 1, "cpu")[0]
        transformer, likelihood = _likelihood(preset.transformer, config, _clip_dim(preset), 1)
        vqgan, image = VQGAN(config), torch.empty(1, 3, config.image_size, config.image_size)
        encoder = _image_encoder(preset.clip)
        tokens = torch.zeros(1, config.side, config.side, dtype=torch.long)
        codes = torch.empty(1, config.code_dim, config.side, config.side, requires_grad=True)
        for frozen in (vqgan, encoder):
            frozen.requires_grad_(False)

        def embedded() -> torch.Tensor:
            return encoder(_resized(vqgan.decode_codes(codes), encoder)).float().sum()

        with torch.no_grad():
            encoded = _operations(lambda: (vqgan.encode(image), encoder(_resized(image, encoder))))
            drawn = _operations(likelihood) * (
                1 if preset.sample.guidance == 1 else 2
            )  # cached steps add up to one pass
            decoded = _operations(lambda: vqgan.decode(tokens))
        return {
            "vqgan": _operations(lambda: loss().backward()),
            "extract": encoded,
            "transformer": _operations(lambda: likelihood().backward())
            + (marked * _operations(lambda: embedded().backward()) if marked else 0),
            "sample": drawn + decoded,
        }


def project(
    preset: Preset,
    n_images: int,
    peak: float,
    gpus: int = 1,
    share: float | dict[str, float] = UTILISATION,
    decoded: float = 0.0,
) -> dict:
    """Hours, memory and disk of a preset on a data set.

    A training step is the work of a GPU on its part of the batch, and then an all-reduce of the gradients by a ring, 2 (g-1)/g
    times their 4 bytes a parameter for each of g GPUs, that nothing overlaps: an upper bound of what DDP takes. The share of the
    peak is taken to hold for whatever part of the batch a GPU has, and reading to keep up (`cores`).

    Args:
        n_images: images of the train split.
        peak: operations a second of one GPU in bfloat16, by its data sheet.
        share: of the peak that is reached, or one for each stage (`measured_share`).
        decoded: JPEG images a second that one core decodes (`measured_decoding`); 0 where nobody has measured.

    Returns:
        `operations` of one image and `hours` of wall time on that many GPUs, by stage (`extract` goes once over images
        and mirrored images, `sample` over the captions of the preset's evaluation), of these `communication`; `efficiency`
        against the same work without communication and uneven parts; `gpu_hours` in all; `batch` on each GPU; `gigabytes` of
        each GPU's memory and `ram_gigabytes` of a node's (`need`); `picture_gigabytes` (published, for the whole split),
        `store_gigabytes` and `checkpoint_gigabytes` of disk; `pictures_per_second` that a GPU takes in, and `cores` that decode
        these; `notes`, what has to be changed in the preset for that many GPUs.
    """
    operations, rows, asked = count(preset), n_images * (2 if preset.transformer_train.flip else 1), need(preset, gpus)
    speed = {stage: peak * (share if isinstance(share, float) else share[stage]) for stage in operations}
    trainings = {
        "vqgan": (preset.vqgan_train, asked.vqgan),
        "transformer": (preset.transformer_train, asked.transformer),
    }
    pictures = {stage: train.steps * train.batch_size for stage, (train, _) in trainings.items()}
    pictures |= {"extract": rows, "sample": preset.evaluate.n}
    perfect = {stage: operations[stage] * pictures[stage] / (speed[stage] * gpus) / 3600 for stage in operations}
    batch = {stage: -(-train.batch_size // gpus) for stage, (train, _) in trainings.items()}
    told = {stage: train.steps * _all_reduce(size, gpus) / 3600 for stage, (train, size) in trainings.items()}
    worked = {
        stage: train.steps * batch[stage] * operations[stage] / speed[stage] / 3600
        for stage, (train, _) in trainings.items()
    }
    hours = perfect | {stage: worked[stage] + told[stage] for stage in trainings}
    rates = {
        "vqgan": pictures["vqgan"] / hours["vqgan"] / 3600 / gpus,
        "extract": speed["extract"] / operations["extract"],
    }
    published = data_set_of(preset.name)
    row = 2 * preset.vqgan.side**2 + 2 * _clip_dim(preset)
    return {
        "preset": preset.name,
        "images": n_images,
        "peak": peak,
        "share": share,
        "gpus": gpus,
        "decoded": decoded,
        "operations": operations,
        "hours": hours,
        "communication": told,
        "efficiency": {stage: perfect[stage] / hours[stage] for stage in trainings}
        | {"all": sum(perfect.values()) / sum(hours.values())},
        "gpu_hours": gpus * sum(hours.values()),
        "batch": batch,
        "gigabytes": asked.device,
        "ram_gigabytes": asked.ram * min(gpus, NODE) / gpus,
        "picture_gigabytes": published.bytes / 1e9 if n_images == published.images else None,
        "store_gigabytes": row * rows / 1e9,
        "checkpoint_gigabytes": asked.disk,
        "pictures_per_second": rates,
        "cores": {stage: rate / decoded for stage, rate in rates.items()} if decoded else None,
        "notes": [note for stage, (train, _) in trainings.items() for note in _notes(stage, train, gpus)],
    }


def _all_reduce(parameters: int, gpus: int) -> float:
    """Seconds in which a ring of GPUs comes to the sum of their float32 gradients; the slowest link sets the pace."""
    return 2 * (gpus - 1) / gpus * 4 * parameters / (NVLINK if gpus <= NODE else NETWORK)


def _notes(stage: str, train: OptimConfig, gpus: int) -> list[str]:
    """What a training refuses to share among that many GPUs, and what to set."""
    each = -(-train.batch_size // gpus)
    found = []
    if train.batch_size % gpus:
        found.append(
            f"{gpus} GPUs: batch_size {train.batch_size} of {stage}_train does not divide, taken as {each * gpus}, {each} on each"
        )
    if each % train.accumulate:
        most = max(n for n in range(1, train.accumulate + 1) if each % n == 0)
        found.append(
            f"{gpus} GPUs: set accumulate of {stage}_train to {most}, not {train.accumulate}: each GPU has {each} of its batch"
        )
    return found


def measured_share(measured: Path, preset: str, peak: float) -> dict[str, float] | None:
    """Of each stage what it reached of a peak where `clipgen scale` has measured the preset on a GPU, else None."""
    stages = read_json(measured).get(preset, {}).get("stages", {}) if measured.is_file() else {}
    return {stage: found["operations_per_second"] / peak for stage, found in stages.items()} or None


def measured_decoding(folder: Path, size: int) -> float:
    """JPEG images a second that one core brought to `size` pixels, by what `clipgen scale` wrote into that folder, on the
    machine with the GPU where there is one; 0 where nobody has measured it."""
    for path in (folder / "gpu.json", folder / "cpu.json"):
        for found in read_json(path).values() if path.is_file() else ():
            if found["jpeg"]["size"] == size:
                return found["jpeg"]["pictures_per_second"]["median"]
    return 0.0


def lines_of(projected: list[dict]) -> str:
    """Projections of one preset on several numbers of GPUs, as lines a person can read."""
    first = projected[0]
    share, peak = first["share"], f"{first['peak'] / 1e12:.0f} TFLOP/s in bfloat16"
    reached = (
        f"{share:.0%} of {peak} (assumed, not measured)"
        if isinstance(share, float)
        else f"of {peak} "
        + ", ".join(f"{part:.0%} in {stage}" for stage, part in share.items())
        + " (measured on one GPU)"
    )
    lines = [
        f"{first['preset']}, {first['images']:,} images, {reached}",
        f"{'GPUs':5}{'VQGAN':>9}{'tokens':>9}{'transformer':>13}{'drawing':>9}{'in all':>10}{'GPU hours':>11}{'efficiency':>12}{'batches':>11}{'GB on each':>12}",
    ]
    for p in projected:
        h, b = p["hours"], p["batch"]
        batches = f"{b['vqgan']} | {b['transformer']}"
        lines.append(
            f"{p['gpus']:<5}{h['vqgan']:>7.2f} h{h['extract']:>7.2f} h{h['transformer']:>11.2f} h{h['sample']:>7.2f} h{sum(h.values()):>8.2f} h{p['gpu_hours']:>11.0f}{p['efficiency']['all']:>12.0%}{batches:>11}{p['gigabytes']:>12.0f}"
        )
    pictures = (
        "images beside it"
        if first["picture_gigabytes"] is None
        else f"{first['picture_gigabytes']:.0f} GB of images ({data_set_of(first['preset']).source})"
    )
    rates, cores = first["pictures_per_second"], first["cores"]
    lines += [
        f"disk: {first['store_gigabytes']:.1f} GB of token store, {first['checkpoint_gigabytes']:.0f} GB of checkpoints, {pictures}",
        "memory of a node beside its GPUs: "
        + ", ".join(f"{p['ram_gigabytes']:.0f} GB of {min(p['gpus'], NODE)}" for p in projected),
        f"assumed: gradients are all-reduced after each step and waited for, {NVLINK / 1e9:.0f} GB/s a GPU in a node of {NODE}, {NETWORK / 1e9:.0f} GB/s beyond",
        f"a GPU takes in {rates['vqgan']:.0f} images/s in VQGAN, {rates['extract']:,.0f} images/s in tokens"
        + (
            f": {cores['vqgan']:.0f} and {cores['extract']:.0f} cores at {first['decoded']:.0f} JPEGs/s a core (measured)"
            if cores
            else ""
        ),
    ]
    return "\n".join(lines + [note for p in projected for note in p["notes"]])


def _operations(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Need:
    """What the larger of a preset's two trainings takes, in GB of 10^9 bytes.

    An estimate. Counted: state (parameters x 20 bytes), tensors kept for the backward pass at the preset's batch, frozen CLIP
    and VGG. Assumed: a tenth more for what lies between, 1 GB of CUDA, 1.5 GB of Python, 0.5 GB a worker. Not counted: what
    CLIP itself keeps on the way, `torch.compile`, evaluation.
    """

    device: float  # on each GPU, or in memory where there is none
    ram: float  # of all processes together
    disk: float  # checkpoints and weights; images and token store come on top
    pictures: int  # a pass and process, of stage 1
    vqgan: int  # parameters that stage 1 trains, the discriminator's among them
    transformer: int


def need(preset: Preset, gpus: int = 1) -> Need:
    """What a preset takes on a number of GPUs that share its batch; 0 is the CPU."""
    stage1, stage2, config = preset.vqgan_train, preset.transformer_train, preset.vqgan
    device, processes = ("cuda" if gpus else "cpu"), max(gpus, 1)
    pictures, rows = (-(-train.batch_size // (train.accumulate * processes)) for train in (stage1, stage2))
    vqgan, vgg, kept1 = _vqgan_count(preset, pictures, device)
    transformer, kept2 = _transformer_count(preset, rows, device)
    decoded = (
        stage2.embedding_share * rows if stage2.embedding_weight else 0
    )  # through the decoder: at most a whole VQGAN
    larger = max(STATE_BYTES * vqgan + kept1, STATE_BYTES * transformer + kept2 + decoded * kept1 / pictures)
    on_device = MARGIN * (larger + vgg + _clip_bytes(preset)) / 1e9 + (CUDA_GIGABYTES if gpus else 0)
    held = min(preset.shapes.n_train * 3 * config.image_size**2, CACHE_BYTES) / 1e9  # decoded, where no workers decode
    ram = processes * (PYTHON_GIGABYTES + (WORKER_GIGABYTES * stage1.workers if stage1.workers else held))
    ram += 0 if gpus else on_device
    # weights; of each stage the last checkpoints and the best one; and of one stage another that is being written beside these
    disk = (4 + CHECKPOINT_BYTES * (KEPT + 1)) * (vqgan + transformer) + CHECKPOINT_BYTES * max(vqgan, transformer)
    return Need(on_device if gpus else ram, ram, disk / 1e9, pictures, vqgan, transformer)


def stage_gigabytes(
    preset: Preset, stage: str, pictures: int, device: str = "cuda", decoded: int | None = None
) -> float:
    """GB of the tensors of a stage with so many images in a pass: an estimate, without Python and the driver's context.

    That of the transformer counts what its embedding loss keeps, for which `need` takes a share of what stage 1 does.

    Args:
        stage: `vqgan` or `transformer`, a training step; `extract` or `sample`, without gradients and in float32.
        device: `cuda` or `cpu`: autocast keeps other tensors in float32 on either.
        decoded: rows of a pass that the embedding loss is computed on; as the preset has it where None.
    """
    frozen = _clip_bytes(preset)
    if stage == "vqgan":
        trained, vgg, kept = _vqgan_count(preset, pictures, device)
        own = STATE_BYTES * trained + vgg + kept
    elif stage == "transformer":
        train = preset.transformer_train
        if decoded is None:
            decoded = max(1, round(train.embedding_share * pictures)) if train.embedding_weight else 0
        trained, kept = _transformer_count(preset, pictures, device)
        own = STATE_BYTES * trained + kept
        if decoded:
            own += sum(_count_embedding(preset.vqgan, preset.clip, decoded, device))
    else:
        own = (
            _count_drawing(preset, pictures, device)
            if stage == "sample"
            else _count_encoding(preset.vqgan, preset.clip, pictures, device)
        )
    return MARGIN * (own + frozen) / 1e9


def _vqgan_count(preset: Preset, pictures: int, device: str) -> tuple[int, int, int]:
    train = preset.vqgan_train
    critic = (train.discriminator_channels, train.discriminator_layers)
    return _count_vqgan(preset.vqgan, critic, train.perceptual == "lpips", pictures, device)


def _transformer_count(preset: Preset, rows: int, device: str) -> tuple[int, int]:
    return _count_transformer(preset.transformer, preset.vqgan, _clip_dim(preset), rows, device)


def _clip_bytes(preset: Preset) -> int:
    return 4 * (151_000_000 if preset.clip.pretrained else 6_000_000)  # ViT-B/32, or the embedded one


def _clip_dim(preset: Preset) -> int:
    return 512 if preset.clip.pretrained else 256  # of ViT-B/32, and of the embedded one


@cache
def _count_vqgan(
    config: VQGANConfig, critic: tuple[int, int], is_lpips: bool, pictures: int, device: str
) -> tuple[int, int, int]:
    """Parameters that are trained, bytes of the frozen VGG, and bytes that one pass keeps for the backward pass."""
    with _imagined(device):
        loss, trained, frozen = _vqgan_loss(config, critic, is_lpips, pictures, device, with_critic=False)
        return trained, 4 * frozen, _kept(loss)


def _vqgan_loss(
    config: VQGANConfig, critic: tuple[int, int], is_lpips: bool, pictures: int, device: str, with_critic: bool = True
) -> tuple[Callable[[], torch.Tensor], int, int]:
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
) -> tuple[int, int]:
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
        return transformer(torch.empty(rows, clip_dim), tokens, logits_of=torch.zeros(0, dtype=torch.long))[0]

    return transformer, loss


@cache
def _count_embedding(config: VQGANConfig, clip: ClipConfig, rows: int, device: str) -> tuple[int, int]:
    """Bytes of a frozen VQGAN, and those that the embedding loss of stage 2 keeps on some rows for the backward pass."""
    with _imagined(device):
        vqgan, encoder = VQGAN(config).requires_grad_(False), _image_encoder(clip).requires_grad_(False)
        logits = torch.empty(rows, config.side**2, config.codebook_size, requires_grad=True)

        def loss() -> torch.Tensor:
            soft = logits.softmax(-1)
            chosen = F.one_hot(logits.argmax(-1), config.codebook_size).to(soft.dtype) + soft - soft.detach()
            codes = (chosen @ vqgan.quantizer.codes().to(chosen.dtype)).transpose(1, 2)
            return encoder(_resized(vqgan.decode_codes(codes.unflatten(2, (config.side, config.side))), encoder)).sum()

        return 4 * _size(vqgan), _kept(loss)


@cache
def _count_encoding(config: VQGANConfig, clip: ClipConfig, pictures: int, device: str) -> int:
    """Bytes of a VQGAN, and the most that encoding images by it and by CLIP has at a time; CLIP's own left out."""
    with _imagined(device, autocast=False), torch.no_grad():
        vqgan, encoder = VQGAN(config), _image_encoder(clip)
        images = torch.empty(pictures, 3, config.image_size, config.image_size)
        most = _most_at_once(lambda: (vqgan.encode(images), encoder(_resized(images, encoder))))
        return 4 * _size(vqgan) + images.nbytes + most


@cache
def _count_drawing(preset: Preset, pictures: int, device: str) -> int:
    """Bytes of VQGAN and transformer, and of keys and values of an image or of the maps of its decoding, which come later."""
    config, model = preset.vqgan, preset.transformer
    with _imagined(device, autocast=False), torch.no_grad():
        vqgan = VQGAN(config)
        transformer = ImageTransformer(model, config.codebook_size, config.side**2, _clip_dim(preset))
        tokens = torch.zeros(pictures, config.side, config.side, dtype=torch.long)
        maps, weights = _most_at_once(lambda: vqgan.decode(tokens)), 4 * (_size(vqgan) + _size(transformer))
    rows = pictures * (1 if preset.sample.guidance == 1 else 2)
    cached = 4 * rows * 2 * model.layers * (config.side**2 + model.condition_tokens) * model.width
    return weights + max(maps, cached)


def _resized(images: torch.Tensor, encoder: nn.Module) -> torch.Tensor:
    """Images in the size that a CLIP's image encoder takes."""
    size = encoder.image_size if isinstance(encoder.image_size, tuple) else (encoder.image_size,) * 2
    return F.interpolate(images, size)


@contextlib.contextmanager
def _imagined(device: str, autocast: bool = True) -> Iterator[None]:
    """Tensors with a shape and a device but no content, under that device's bfloat16 autocast, whether it is here or not."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, autocast)
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


class _Weighed(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for x in tree_iter(found):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in given | self.known:
                storage = x.untyped_storage()
                self.known.add(key)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return found

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _most_at_once(call: Callable[[], object]) -> int:
    """Bytes of all tensors that a call makes, where they are most."""
    with _Weighed() as weighed:
        call()
    return weighed.most


def _lpips(device: str) -> nn.Module:
    import lpips

    module = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).requires_grad_(False)
    for part in module.modules():  # it makes its constants on the CPU; imagined tensors cannot be moved by `.to`
        for name, constant in list(part.named_buffers(recurse=False)):
            setattr(part, name, constant.to(device))
    return module


def vgg_features() -> nn.Module:
    """The VGG16 of LPIPS with random weights, (B, 3, H, W) -> its five feature maps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _lpips("cpu").net


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _image_encoder(clip: ClipConfig) -> nn.Module:
    """The image encoder of a preset's CLIP, without its weights."""
    import open_clip
    from open_clip.model import CLIP

    return CLIP(**(MODEL if clip.pretrained is None else open_clip.get_model_config(clip.name))).visual
