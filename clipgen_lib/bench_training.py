"""Speed of the two trainings beside what one would write instead: sections of `clipgen bench`.

Every step of ours is one of `train_vqgan` or `train_transformer` as they are, data, clipping, EMA and log included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .bench_sampling import CLIP_DIM, CODES, MODEL, gpt2
from .clip_embed import ClipEmbedder
from .config import ClipConfig, Preset, TransformerTrainConfig, VQGANConfig, load_preset
from .cost import count
from .losses import PatchDiscriminator, adversarial_loss, discriminator_loss, perceptual_loss
from .runs import progress
from .scale import ENDLESS, WORK, Clock, clip_of, fitted, random_vgg, repeated, synthetic_store, timed
from .schedule import batch_rows
from .store import TokenStore
from .timing import ABSENT, in_turns, peers, profiled, ratio, row, spread
from .train import change_of
from .transformer import ImageTransformer
from .vqgan import VQGAN

Work = Callable[[Clock], object]
OURS = "ours"
LAYOUTS = {"bare": torch.contiguous_format, "channels-last": torch.channels_last}
WARM_UP, STEPS = 3, 6  # of each way in each round
BATCH = 4
STATE = (
    4 * 14
)  # bytes a weight that a step moves at least: it is read twice, its gradient written and read, AdamW and EMA take the rest
PRESET = Preset(
    transformer=MODEL, vqgan=VQGANConfig(image_size=256, codebook_size=CODES), clip=ClipConfig("ViT-B-32-quickgelu", "openai"),
    transformer_train=TransformerTrainConfig(
        steps=ENDLESS, batch_size=BATCH, embedding_weight=0.0, warmup=10, log_every=1, save_every=ENDLESS
    ),
)  # fmt: skip


def by_rounds(works: dict[str, Work], device: torch.device, rounds: int, label: str) -> dict[str, list[float]]:
    """Seconds of a step of each way in each round, a median of `STEPS`; the ways take turns."""
    found: dict[str, list[float]] = {name: [] for name in works}
    with progress(rounds * len(works), label) as bar:
        for _ in range(rounds):
            for name, work in works.items():
                found[name].append(float(np.median(timed(work, Clock(str(device), WARM_UP, STEPS, 60.0)))))
                bar.update()
    return found


# ---------------------------------------------------------------------------------------------- stage 2


def transformer(
    device: torch.device, limits: dict, rounds: int = 3, preset: Preset = PRESET, small: Preset | None = None
) -> dict:
    """A step of stage 2 beside Hugging Face's GPT-2, the step that encodes its pictures itself, and the machine's peak.

    27 million weights (a tied GPT-2; ours has 9 million more, a head of its own), 4 rows of 256 tokens, bfloat16 autocast, AdamW,
    clipped gradients; ours keeps an EMA beside. The embedding loss is measured at preset `laptop`, whose networks are there.

    Args:
        small: the preset for the embedding loss; None takes `laptop`.
    """
    train, table, rng = preset.transformer_train, [], torch.Generator().manual_seed(0)
    what = f"batch {train.batch_size}, {train.precision}"
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        tokens = preset.vqgan.side**2
        synthetic_store(Path(place) / "store", 4_096, tokens, CLIP_DIM, codes=preset.vqgan.codebook_size)
        store, clip = TokenStore.open(Path(place) / "store"), clip_of(preset.clip, str(device))
        works = {OURS: WORK["transformer"](preset, str(device), clip, Path(place), train.batch_size)}
        works["the step with VQGAN and CLIP in the loop, float32"] = encoding_steps(preset, clip, device, "no")
        works["the step with VQGAN and CLIP in the loop, bfloat16"] = encoding_steps(preset, clip, device, "bf16")
        if peers()["transformers"] != ABSENT:
            works["Hugging Face GPT-2"] = huggingface_steps(preset, device)
        seconds = by_rounds(works, device, rounds, "training the transformer")
        goals = {"Hugging Face GPT-2": 1.2, "the step with VQGAN and CLIP in the loop, float32": 5.0}
        table += [row(what, way, ratio(seconds[OURS], seconds[way]), goals.get(way)) for way in works if way != OURS]
        operations = count(preset)["transformer"] * train.batch_size
        peak = limits["matmul_bfloat16" if train.precision == "bf16" else "matmul_float32"]
        table.append(row(what, "of the matmul peak", spread([operations / s / peak for s in seconds[OURS]]), unit="%"))
        table.append(row(what, "tokens a second", spread([train.batch_size * tokens / s for s in seconds[OURS]]), unit="/s"))

        def load(step: int = 0) -> torch.Tensor:
            rows = batch_rows(len(store), train.batch_size, 0, step)
            change = change_of(train, store.meta["D"], rng)
            return store.tokens(rows), change(store.embeds(rows), np.arange(train.batch_size))

        loading = in_turns({"load": load}, 20 * rounds)["load"]
        step = float(np.median(seconds[OURS]))
        table.append(row(what, "of a step is loading data", spread([s / step for s in loading]), 0.03, most=True, unit="%"))
        profile = profiled(lambda: timed(works[OURS], Clock(str(device), 1, 2, 60.0)), device, top=12)
    size = sum(
        p.numel() for p in ImageTransformer(preset.transformer, preset.vqgan.codebook_size, tokens, CLIP_DIM).parameters()
    )
    embedding = _embedding_loss(small or load_preset("laptop"), device, rounds)
    return {"table": table + [embedding], "rounds": rounds, "details": {
        "seconds": {way: spread(values) for way, values in seconds.items()}, "operations": operations, "tokens": train.batch_size * tokens,
        "bytes": STATE * size, "profile": profile,
    }}  # fmt: skip


def _embedding_loss(preset: Preset, device: torch.device, rounds: int) -> dict:
    """How much longer a step with the embedding reconstruction loss takes, on the preset's share of the batch."""
    works: dict[str, Work] = {}
    with tempfile.TemporaryDirectory() as place:
        clip = clip_of(preset.clip, str(device))
        synthetic_store(Path(place) / "store", 4_096, preset.vqgan.side**2, clip.dim, codes=preset.vqgan.codebook_size)
        for weight in (0.0, 0.1):
            changed, _, _ = fitted(replace(preset, transformer_train=replace(preset.transformer_train, embedding_weight=weight)), str(device))  # fmt: skip
            batch = changed.transformer_train.batch_size
            works[str(weight)] = WORK["transformer"](changed, str(device), clip, Path(place), batch)
        seconds = by_rounds(works, device, rounds, "the embedding loss")
    share = f"embedding loss on {preset.transformer_train.embedding_share:.0%} of a batch of {batch}, preset {preset.name}"
    return row(share, "time of the step without", ratio(seconds["0.0"], seconds["0.1"]))


def encoding_steps(preset: Preset, clip: ClipEmbedder, device: torch.device, precision: str) -> Work:
    """The step that runs the frozen VQGAN and CLIP on its pictures every time, as HFAiLab/clip-gen trains; without an EMA."""
    train, config = preset.transformer_train, preset.vqgan
    vqgan = VQGAN(config).to(device).eval().requires_grad_(False)
    model = ImageTransformer(preset.transformer, config.codebook_size, config.side**2, clip.dim).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.lr, fused=True)
    images = torch.rand(train.batch_size, 3, config.image_size, config.image_size, device=device) * 2 - 1

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
            tokens, embeds = vqgan.encode(images).flatten(1), clip.images(images)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(embeds, tokens)
        _update(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), model, optimizer)

    return repeated(step)


def huggingface_steps(preset: Preset, device: torch.device) -> Work:
    """Hugging Face's GPT-2 of the same size, trained as its Trainer does: bfloat16 autocast, fused AdamW, clipped gradients."""
    codes, length = preset.vqgan.codebook_size, preset.vqgan.side**2
    model = gpt2(preset.transformer, codes, length).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, codes, (preset.transformer_train.batch_size, length), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        _update(loss, model, optimizer)

    return repeated(step)


def _update(loss: torch.Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------- stage 1


def vqgan(device: torch.device, limits: dict, rounds: int = 3, names: tuple[str, ...] = ("gpu64", "laptop")) -> dict:
    """A step of stage 1 beside the bare forward and backward passes of the same networks, and what would make it faster or not.

    The discriminator has its full say. VGG16 of LPIPS has random weights.
    """
    table, details = [], {}
    for name in names:
        preset, pictures, notes = fitted(load_preset(name), str(device))
        train, clip, what = preset.vqgan_train, clip_of(preset.clip, str(device)), f"{name}, batch {pictures['vqgan']}"
        n = pictures["vqgan"]
        with tempfile.TemporaryDirectory() as place:
            works = {way: WORK["vqgan"](replace(preset, vqgan_train=replace(train, **changes)), str(device), clip, Path(place), n)
                     for way, changes in {OURS: {}, "float32": {"precision": "no"}}.items()}  # fmt: skip
            works |= {way: bare_steps(preset, n, clip, device, layout) for way, layout in LAYOUTS.items()}
            seconds = by_rounds(works, device, rounds, f"training the VQGAN, {name}")
            profile = profiled(partial(timed, works[OURS], Clock(str(device), 1, 2, 60.0)), device, top=12)
        over = ratio(seconds["bare"], seconds[OURS])
        table.append(row(what, "time of the bare passes", over, 1.1, most=True))
        table.append(row(what, "as in float32", ratio(seconds[OURS], seconds["float32"])))
        table.append(row(what, "channels-last, bare", ratio(seconds["channels-last"], seconds["bare"])))
        operations = count(preset)["vqgan"] * n
        table.append(row(what, "of the matmul peak", spread([operations / s / limits["matmul_bfloat16"] for s in seconds[OURS]]), unit="%"))  # fmt: skip
        table.append(row(what, "pictures a second", spread([n / s for s in seconds[OURS]]), unit="/s"))
        size = sum(p.numel() for p in VQGAN(preset.vqgan).parameters())
        details[name] = {"bytes": STATE * size, "seconds": {way: spread(values) for way, values in seconds.items()}, "operations": operations,
                         "pictures": n, "notes": notes, "profile": profile}  # fmt: skip
    return {"table": table, "rounds": rounds, "details": details}


def bare_steps(preset: Preset, pictures: int, clip: ClipEmbedder, device: torch.device, layout: torch.memory_format) -> Work:
    """Forward and backward passes of the networks of stage 1 on pictures that are there, once each: no optimiser, no adaptive weight."""
    train, size = preset.vqgan_train, preset.vqgan.image_size
    model = VQGAN(preset.vqgan).to(device, memory_format=layout)
    critic = PatchDiscriminator(train.discriminator_channels, train.discriminator_layers).to(device, memory_format=layout)
    images = (torch.rand(pictures, 3, size, size, device=device) * 2 - 1).contiguous(memory_format=layout)
    kind, clip = ("clip", random_vgg(str(device))) if train.perceptual == "lpips" else (train.perceptual, clip)
    perceptual = perceptual_loss(kind, clip)

    def step() -> None:
        critic.requires_grad_(False)
        with torch.autocast(device.type, torch.bfloat16):
            fake, quantized = model(images)
            loss = (
                F.l1_loss(fake, images) + F.mse_loss(fake, images) + perceptual(images, fake) + adversarial_loss(critic(fake))
            )
        (loss + quantized.codebook_loss + quantized.commitment_loss).backward()
        critic.requires_grad_(True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = discriminator_loss(*critic(torch.cat([images, fake.detach()])).chunk(2))
        loss.backward()
        for module in (model, critic):
            module.zero_grad()

    return repeated(step)
