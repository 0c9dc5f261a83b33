"""The two trainings, each a flat loop over steps on one Accelerator.

Stage 1: pictures in, a VQGAN out. Stage 2: a token store in, a transformer out. Batches, rates, noise and dropout are
functions of seed and step, and the rest of the state is in the checkpoint, so that a resumed run is the uninterrupted
one. Neither stage sees a caption: previews of text prompts come in as embeddings.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .clip_embed import ClipEmbedder
from .config import FitConfig, OptimConfig, TransformerConfig, TransformerTrainConfig, VQGANConfig, VQGANTrainConfig
from .data import ImageSet, training_batches
from .images import to_float
from .losses import (
    PatchDiscriminator,
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
    perceptual_loss,
    ramp,
)
from .optim import build_optimizer, set_rate
from .runs import ClipgenError, Run, differences, load_checkpoint, module_hash, progress, save_checkpoint, save_weights
from .schedule import batch_rows, learning_rate
from .store import TokenStore
from .transformer import ImageTransformer, centre
from .vqgan import VQGAN, codebook_statistics

# ---------------------------------------------------------------------------------------------- stage 1


def train_vqgan(
    run: Run, images: ImageSet, model_config: VQGANConfig, config: VQGANTrainConfig, clip: ClipEmbedder | None = None,
    seed: int = 0, device: str = "cpu", show_progress: bool = True,
) -> VQGAN:  # fmt: skip
    """Train a VQGAN on pictures, or go on from the run's checkpoint, and write `<run>/vqgan/`.

    Generator: L1 and L2 + perceptual + ramp * adaptive weight * adversarial + codebook + beta * commitment (VQGAN,
    arXiv 2012.09841). The discriminator learns from step 0; only its say in the generator's loss is ramped.

    Returns:
        The EMA of the weights, in eval mode.

    Raises:
        ClipgenError: a loss that is not finite, or a checkpoint of another configuration.
    """
    torch.manual_seed(seed)
    accelerator = _accelerator(config, device)
    vqgan = VQGAN(model_config)
    discriminator = PatchDiscriminator(config.discriminator_channels, config.discriminator_layers)
    optimizers = {
        "generator_optimizer": build_optimizer(vqgan, config.optimizer, config.lr, config.beta2, config.weight_decay),
        "discriminator_optimizer": build_optimizer(
            discriminator, "adamw", config.discriminator_lr, config.beta2, config.weight_decay
        ),
    }
    ema = AveragedModel(vqgan, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    perceptual = perceptual_loss(config.perceptual, clip)
    state = TrainingState(run, "vqgan", {"model": vqgan, "discriminator": discriminator, "ema": ema, **optimizers},
                   {"model": asdict(model_config), "train": _lasting(config), "seed": seed, "data": images.hash})  # fmt: skip
    start = state.resume()
    generator, critic, *prepared = accelerator.prepare(vqgan, discriminator, *optimizers.values())
    ema.to(accelerator.device)
    forward = _compiled(generator, accelerator.device) if config.compile else generator
    batches = training_batches(images, config.batch_size, seed, start, config.steps, config.flip, config.random_crop,
                               config.workers, accelerator.process_index, accelerator.num_processes)  # fmt: skip
    log = _Log(run, "vqgan", accelerator, model_config.codebook_size)

    with progress(config.steps, "training VQGAN", show_progress and accelerator.is_main_process, start) as bar:
        for step in range(start, config.steps):
            say = config.adversarial_weight * ramp(step, config.steps, *config.adversarial_ramp)
            _set_rates(prepared, (config.lr, config.discriminator_lr), step, config)
            for real in to_float(next(batches)).to(accelerator.device).chunk(config.accumulate):
                discriminator.requires_grad_(False)
                with accelerator.autocast():
                    fake, quantized = forward(real)
                    l1, l2, feature_distance = F.l1_loss(fake, real), F.mse_loss(fake, real), perceptual(real, fake)
                    reconstruction = config.l1_weight * l1 + config.l2_weight * l2 + config.perceptual_weight * feature_distance
                    scalars = {"l1": l1, "l2": l2, "perceptual": feature_distance}
                    loss = reconstruction + quantized.codebook_loss + config.beta * quantized.commitment_loss
                    if say > 0:
                        adversarial = adversarial_loss(discriminator(fake))
                        weight = adaptive_weight(reconstruction, adversarial, vqgan.last_layer, config.adaptive_max)
                        loss = loss + say * weight * adversarial
                        scalars |= {"adversarial": adversarial, "adaptive_weight": weight}
                accelerator.backward(loss / config.accumulate)
                discriminator.requires_grad_(True)
                with accelerator.autocast():
                    both = critic(torch.cat([real, fake.detach()]))
                    critic_loss = discriminator_loss(*both.chunk(2))
                accelerator.backward(critic_loss / config.accumulate)
            scalars |= {"loss": loss, "discriminator": critic_loss, "codebook_loss": quantized.codebook_loss,
                        "commitment_loss": quantized.commitment_loss,
                        "real_logit": both[: len(real)].mean(), "fake_logit": both[len(real) :].mean()}  # fmt: skip
            scalars |= {f"{name}_gradient": accelerator.clip_grad_norm_(module.parameters(), config.clip_norm)
                        for name, module in (("generator", generator), ("discriminator", critic))}  # fmt: skip
            _apply(prepared)
            vqgan.quantizer.update_codebook(quantized.vectors, quantized.tokens)
            ema.update_parameters(vqgan)
            log.add(scalars, quantized.tokens)
            bar.update()
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                bar.set_postfix(log.write(step + 1, lr=prepared[0].param_groups[0]["lr"]))
            if ((step + 1) % config.save_every == 0 or step + 1 == config.steps) and accelerator.is_main_process:
                state.save(step + 1)
    return _finish(run, "vqgan", ema.module, accelerator, images.skipped)


# ---------------------------------------------------------------------------------------------- stage 2


def train_transformer(
    run: Run, store: TokenStore, held_out: TokenStore, model_config: TransformerConfig, config: TransformerTrainConfig,
    vqgan: VQGAN, clip: ClipEmbedder, seed: int = 0, device: str = "cpu", show_progress: bool = True,
    text_mean: torch.Tensor | None = None, preview: Callable[[ImageTransformer, int], None] | None = None,
) -> ImageTransformer:  # fmt: skip
    """Train p(tokens | embedding) from a store, or go on from the run's checkpoint, and write `<run>/transformer/`.

    Loss: token likelihood + weight * CLIP embedding reconstruction (CLIP-GEN, arXiv 2203.00386, section 3.3), the
    second on a share of the batch.

    Args:
        held_out: a store of pictures not trained on; its likelihood is logged at every checkpoint.
        vqgan, clip: frozen, for the embedding reconstruction loss.
        text_mean: mean (D,) of the embeddings of some texts, which `config.centre` needs and nothing else looks at.
        preview: called with the EMA model and the step at every checkpoint.

    Returns:
        The EMA of the weights, in eval mode.
    """
    torch.manual_seed(seed)
    accelerator = _accelerator(config, device)
    transformer = ImageTransformer(model_config, store.meta["K"], store.meta["L"], store.meta["D"])
    if config.centre:
        if text_mean is None:
            raise ClipgenError("centre takes the mean off text embeddings too: give train_transformer the mean of some")
        transformer.image_mean.copy_(store.mean_embed())
        transformer.text_mean.copy_(text_mean)
    image_mean = transformer.image_mean.clone()
    optimizer = build_optimizer(transformer, config.optimizer, config.lr, config.beta2, config.weight_decay)
    ema = AveragedModel(transformer, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    state = TrainingState(run, "transformer", {"model": transformer, "ema": ema, "optimizer": optimizer},
                   {"model": asdict(model_config), "train": _lasting(config), "seed": seed, "data": store.meta["data_hash"],
                    "vqgan": store.meta["vqgan_hash"], "clip": store.meta["clip_hash"]})  # fmt: skip
    start = state.resume()
    model, optimizer = accelerator.prepare(transformer, optimizer)
    ema.to(accelerator.device)
    frozen = vqgan.to(accelerator.device).requires_grad_(False), clip.to(accelerator.device)
    forward = _compiled(model, accelerator.device) if config.compile else model
    log = _Log(run, "transformer", accelerator)
    with progress(config.steps, "training transformer", show_progress and accelerator.is_main_process, start) as bar:
        for step in range(start, config.steps):
            _set_rates([optimizer], (config.lr,), step, config)
            rows = batch_rows(len(store), config.batch_size, seed, step)
            rows = rows[accelerator.process_index :: accelerator.num_processes]
            draw = torch.Generator().manual_seed(hash((seed, step, accelerator.process_index)) % 2**63)
            for part in np.array_split(rows, config.accumulate):
                tokens, embeds = store.tokens(part).to(accelerator.device), store.embeds(part)
                condition = noise_embeds(centre(embeds, image_mean), config.noise_cos, draw)
                condition = drop_condition(condition, config.condition_dropout, draw)
                with accelerator.autocast():
                    logits = forward(condition.to(accelerator.device), tokens)
                nll = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
                loss, scalars = nll, {"nll": nll}
                if config.embedding_weight > 0:
                    share = max(1, round(config.embedding_share * len(part)))
                    with accelerator.autocast():
                        distance = embedding_loss(logits[:share], embeds[:share].to(accelerator.device), *frozen,
                                                  config.embedding_path, config.embedding_form)  # fmt: skip
                    loss = loss + config.embedding_weight * distance
                    scalars["embedding_loss"] = distance
                accelerator.backward(loss / config.accumulate)
            scalars |= {"loss": loss, "gradient": accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)}
            _apply([optimizer])
            ema.update_parameters(transformer)
            log.add(scalars)
            bar.update()
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                bar.set_postfix(log.write(step + 1, lr=optimizer.param_groups[0]["lr"]))
            if ((step + 1) % config.save_every == 0 or step + 1 == config.steps) and accelerator.is_main_process:
                state.save(step + 1)
                ema.module.eval()
                run.log("transformer_held_out", step + 1, **held_out_losses(ema.module, held_out, *frozen))
                if preview is not None:
                    preview(ema.module, step + 1)
    made_with = {"trained_with": {"vqgan": module_hash(vqgan), "clip": clip.weights_hash}}
    return _finish(run, "transformer", ema.module, accelerator, {}, **made_with)


def noise_embeds(embeds: torch.Tensor, lowest_cos: float, draw: torch.Generator) -> torch.Tensor:
    """Turn unit vectors (B, D) by random angles: each cosine with its origin uniform in [lowest_cos, 1].

    The noise is made orthogonal first, so the cosine is met exactly, whatever D (LAFITE, arXiv 2111.13792, adds it
    without; its strongest setting corresponds to 0.32 at D = 512).
    """
    if lowest_cos >= 1:
        return embeds
    cosine = lowest_cos + (1 - lowest_cos) * torch.rand(len(embeds), 1, generator=draw)
    noise = torch.randn(embeds.shape, generator=draw)
    noise = F.normalize(noise - (noise * embeds).sum(-1, keepdim=True) * embeds, dim=-1)
    return cosine * embeds + (1 - cosine**2).sqrt() * noise


def drop_condition(embeds: torch.Tensor, share: float, draw: torch.Generator) -> torch.Tensor:
    """Zero a random share of rows: the unconditional case that guidance needs (arXiv 2207.12598)."""
    return embeds * (torch.rand(len(embeds), 1, generator=draw) >= share)


def embedding_loss(
    logits: torch.Tensor, embeds: torch.Tensor, vqgan: VQGAN, clip: ClipEmbedder, path: str = "straight-through",
    form: str = "cosine",
) -> torch.Tensor:  # fmt: skip
    """CLIP embedding reconstruction: how far the embedding of the predicted decoding is from the picture's own.

    One token of every position is looked up with a straight-through gradient to its softmax, decoded, and embedded by
    CLIP with CLIP's own preprocessing. Gradients reach the logits; VQGAN and CLIP are frozen.

    Args:
        logits: (b, L, K). embeds: (b, D) of unit norm.
        path: `straight-through` looks up the likeliest token, `gumbel` one sampled with Gumbel noise (arXiv 1611.01144,
            temperature 1).
        form: `cosine` is 1 - s of the cosine s; `log` is -log((1 + s) / 2), steeper where the two disagree.
    """
    if path == "gumbel":
        chosen = F.gumbel_softmax(logits.float(), tau=1.0, hard=True)
    else:
        soft = logits.softmax(-1)
        chosen = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(soft.dtype) + soft - soft.detach()
    codes = chosen @ vqgan.quantizer.codes().to(chosen.dtype)  # (b, L, C)
    side = vqgan.config.side
    images = vqgan.decode_codes(codes.transpose(1, 2).unflatten(2, (side, side)))
    similarity = (clip.images(images) * embeds).sum(-1)
    return (1 - similarity if form == "cosine" else -((1 + similarity) / 2).clamp_min(1e-6).log()).mean()


@torch.inference_mode()
def held_out_losses(
    transformer: ImageTransformer, store: TokenStore, vqgan: VQGAN, clip: ClipEmbedder, rows: int = 1_000
) -> dict[str, float]:
    """Token likelihood (nats per token) and embedding loss on at most `rows` rows of a store, without noise."""
    nll, distance, count = 0.0, 0.0, min(rows, len(store))
    for first in range(0, count, 100):
        part = slice(first, min(first + 100, count))
        tokens, embeds = store.tokens(part).to(clip.device), store.embeds(part).to(clip.device)
        logits = transformer(centre(embeds, transformer.image_mean), tokens)
        nll += F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item() * len(tokens)
        if transformer.config.conditioning != "words":
            distance += embedding_loss(logits, embeds, vqgan, clip).item() * len(tokens)
    return {"nll": nll / count} | ({"embedding_loss": distance / count} if distance else {})


# ---------------------------------------------------------------------------------------------- what both share


def _accelerator(config: OptimConfig, device: str) -> Accelerator:
    """An Accelerator on the asked device; its precision may differ from that of an earlier one in this process."""
    on_cpu = device == "cpu"
    if config.precision == "fp16" and on_cpu:
        raise ClipgenError("precision fp16 needs a GPU: choose bf16 or no in the preset")
    AcceleratorState._reset_state()  # a second training in one notebook would otherwise be refused another precision
    return Accelerator(mixed_precision=config.precision, cpu=on_cpu)


def _compiled(module: nn.Module, device: torch.device) -> nn.Module:
    """`torch.compile`, tried on a sum first: it needs a C++ compiler, which not every machine has."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # a missing compiler, header or backend each raises its own
        warnings.warn(f"torch.compile does not work on this machine ({type(error).__name__}): training runs without it, somewhat slower; a C++ compiler and Python's headers would mend it", stacklevel=3)  # fmt: skip
        return module
    return torch.compile(module)


def _lasting(config: OptimConfig) -> dict:
    """The fields that a resumed run must share; logging, workers and compilation may change between sessions."""
    return {k: v for k, v in asdict(config).items() if k not in ("log_every", "save_every", "workers", "compile")}


def _set_rates(optimizers: list, peaks: tuple[float, ...], step: int, config: OptimConfig) -> None:
    for optimizer, peak in zip(optimizers, peaks, strict=True):
        set_rate(optimizer, learning_rate(step, config.steps, peak, config.warmup))


def _apply(optimizers: list) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _finish(run: Run, stage: str, module: nn.Module, accelerator: Accelerator, skipped: dict, **facts: object) -> nn.Module:
    """Write the weights, tell of skipped files, and hand back the model for use."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_weights(run.path / stage, module, **facts)
        parameters = sum(p.numel() for p in module.parameters())
        run.add_to_summary(parameters={stage: parameters}, **({"skipped": skipped} if skipped else {}))
    return module.eval().requires_grad_(False)


def check_finite(stage: str, step: int, loss: float) -> None:
    """A loss that is NaN or infinite ends a training with a sentence; the last checkpoint was written before and stays."""
    if not np.isfinite(loss):
        raise ClipgenError(f"the {stage} loss is not finite by step {step}: lower its learning rate and run again from the last checkpoint")  # fmt: skip


class TrainingState:
    """All that a training needs to go on, by name; saved and resumed as one file."""

    def __init__(self, run: Run, stage: str, parts: dict, meta: dict):
        self.run, self.stage, self.parts, self.meta = run, stage, parts, meta
        self.path = run.file("checkpoints", f"{stage}.safetensors")

    def save(self, step: int) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        save_checkpoint(self.path, {**state, "rng": torch.get_rng_state(), "rng_gpu": gpu, "step": step}, self.meta)

    def resume(self) -> int:
        """Load the checkpoint where there is one; returns the step to go on from."""
        step = 0
        if self.path.exists():
            state, meta = load_checkpoint(self.path)
            if differing := differences(meta, self.meta):
                raise ClipgenError(f"{self.path} belongs to another training (differs in {', '.join(differing)}): choose another run name or delete it")  # fmt: skip
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["rng"])
            if len(gpu := state.get("rng_gpu", [])) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(gpu)
            step = state["step"]
        self.run.rewind(self.stage, step)
        return step


class _Log:
    """Means of scalars since the last line, kept as tensors until then: no waiting for the GPU in between."""

    def __init__(self, run: Run, stage: str, accelerator: Accelerator, codebook_size: int = 0):
        self.run, self.stage, self.accelerator, self.codebook_size = run, stage, accelerator, codebook_size
        self.scalars: dict[str, list[torch.Tensor]] = {}
        self.tokens: list[torch.Tensor] = []

    def add(self, scalars: dict[str, torch.Tensor], tokens: torch.Tensor | None = None) -> None:
        for key, value in scalars.items():
            self.scalars.setdefault(key, []).append(value.detach().float())
        if tokens is not None:
            self.tokens.append(tokens.detach())

    def write(self, step: int, **extra: float) -> dict[str, str]:
        """Log the means and clear them; returns what the progress bar shows.

        Raises:
            ClipgenError: a loss is not finite; the last checkpoint was written before and stays.
        """
        means = {key: float(torch.stack(values).mean()) for key, values in self.scalars.items()}
        if self.tokens:
            means |= codebook_statistics(torch.cat(self.tokens), self.codebook_size)
            means["psnr"] = 10 * np.log10(4 / means["l2"])  # peak to peak is 2 in [-1, 1]
        self.scalars, self.tokens = {}, []
        if self.accelerator.is_main_process:
            self.run.log(self.stage, step, **means, **extra)
        check_finite(self.stage, step, means["loss"])
        shown = ("psnr", "perplexity", "nll", "embedding_loss", "loss")
        return {key: f"{means[key]:.3g}" for key in shown if key in means}


# ---------------------------------------------------------------------------------------------- networks beside the two stages


def fit(
    run: Run, stage: str, model: nn.Module, config: FitConfig, facts: dict, loss_of: Callable[[int], tuple[torch.Tensor, dict]],
    clip_norm: float = 0.0, after_step: Callable[[], None] = lambda: None, show_progress: bool = True,
) -> None:  # fmt: skip
    """Train CLIP or the classifier on one device with AdamW, or go on from a checkpoint of the same `facts`.

    Args:
        loss_of: step -> its loss, and scalars to log beside it; a function of seed and step, so that resuming is exact.
        clip_norm: of the gradient; 0 leaves it as it is.
    """
    optimizer = build_optimizer(model, "adamw", config.lr, 0.98, config.weight_decay)
    state = TrainingState(run, stage, {"model": model, "optimizer": optimizer}, facts)
    start = state.resume()
    with progress(config.steps, f"training {stage}", show_progress, start) as bar:
        model.train()
        for step in range(start + 1, config.steps + 1):
            rate = learning_rate(step - 1, config.steps, config.lr, config.warmup)
            set_rate(optimizer, rate)
            loss, scalars = loss_of(step - 1)
            optimizer.zero_grad()
            loss.backward()
            if clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            after_step()
            bar.update()
            if step % config.log_every == 0 or step == config.steps:
                run.log(stage, step, loss=loss.item(), lr=rate, **{key: float(value) for key, value in scalars.items()})
                bar.set_postfix(loss=f"{loss.item():.3f}")
                check_finite(stage, step, loss.item())
            if step % config.save_every == 0 or step == config.steps:
                state.save(step)
