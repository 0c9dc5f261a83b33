"""The two trainings, each a flat loop over steps on one Accelerator.

Stage 1: pictures in, a VQGAN out. Stage 2: a token store in, a transformer out. Batches, rates, noise and dropout are
functions of seed and step, and the rest of the state is in the checkpoint, so that a resumed run is the uninterrupted
one. Several processes share each batch and come to the same weights as one, up to the order of sums. A step without a finite
loss and gradient changes no weight and is counted. Neither stage sees a caption: previews of text prompts come in as embeddings.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import processes
from .clip_embed import ClipEmbedder
from .config import FitConfig, OptimConfig, TransformerConfig, TransformerTrainConfig, VQGANConfig, VQGANTrainConfig
from .data import ImageSet, ordered_batches, training_batches
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
from .runs import (
    ClipgenError,
    Run,
    checkpoint_meta,
    differences,
    load_checkpoint,
    module_hash,
    progress,
    save_checkpoint,
    save_weights,
    stoppable,
)
from .schedule import batch_rows, learning_rate
from .store import TokenStore
from .transformer import ImageTransformer, centre
from .vqgan import VQGAN, code_use

KEPT = 2  # last checkpoints of a training; the one with the best score on held-out pictures stays as well
MOST_SKIPPED = 10  # steps in a row without a finite loss and gradient that end a training

# ---------------------------------------------------------------------------------------------- stage 1


def train_vqgan(
    run: Run, images: ImageSet, held_out: ImageSet, model_config: VQGANConfig, config: VQGANTrainConfig,
    clip: ClipEmbedder | None = None, seed: int = 0, device: str = "cpu", show_progress: bool = True,
) -> VQGAN:  # fmt: skip
    """Train a VQGAN on pictures, or go on from the run's last checkpoint, and write `<run>/vqgan/`.

    Generator: L1 and L2 + perceptual + ramp * adaptive weight * adversarial + codebook + beta * commitment (VQGAN,
    arXiv 2012.09841). The discriminator learns from step 0; only its say in the generator's loss is ramped.

    Args:
        held_out: pictures not trained on; the error of their reconstructions is logged at every checkpoint.

    Returns:
        The EMA of the weights, in eval mode.

    Raises:
        ClipgenError: nothing finite for `MOST_SKIPPED` steps in a row, a checkpoint of another configuration, a batch that
            does not divide, a full disk.
        Stopped: SIGTERM or SIGINT, after a checkpoint.
    """
    torch.manual_seed(seed)
    accelerator = _accelerator(config, device)
    _positions(config)
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
    parts = {"model": vqgan, "discriminator": discriminator, "ema": ema, **optimizers, **_scaler(accelerator)}
    state = TrainingState(run, "vqgan", parts,
                          {"model": asdict(model_config), "train": _lasting(config), "seed": seed, "data": images.hash})  # fmt: skip
    start = state.resume()
    generator, critic, *prepared = accelerator.prepare(vqgan, discriminator, *optimizers.values())
    ema.to(accelerator.device)
    forward = _compiled(generator, accelerator.device) if config.compile else generator
    batches = training_batches(images, config.batch_size, seed, start, config.steps, config.flip, config.random_crop,
                               config.workers, processes.rank(), processes.count())  # fmt: skip
    log = _Log(run, "vqgan", config.steps, model_config.codebook_size)

    with (
        progress(config.steps, "training VQGAN", show_progress and accelerator.is_main_process, start) as bar,
        stoppable() as stop,
    ):
        for step in range(start, config.steps):
            torch.manual_seed(_step_seed(seed, step, processes.rank()))
            say = config.adversarial_weight * ramp(step, config.steps, *config.adversarial_ramp)
            _set_rates(prepared, (config.lr, config.discriminator_lr), step, config)
            found = []
            for last, real in _with_last(to_float(next(batches)).to(accelerator.device).chunk(config.accumulate)):
                with _reduced(accelerator, last, generator, critic):
                    discriminator.requires_grad_(False)
                    with accelerator.autocast():
                        fake, quantized = forward(real)
                        l1, l2, feature_distance = F.l1_loss(fake, real), F.mse_loss(fake, real), perceptual(real, fake)
                        reconstruction = (
                            config.l1_weight * l1 + config.l2_weight * l2 + config.perceptual_weight * feature_distance
                        )
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
                log.add(loss=loss, discriminator=critic_loss, codebook_loss=quantized.codebook_loss,
                        commitment_loss=quantized.commitment_loss, real_logit=both[: len(real)].mean(),
                        fake_logit=both[len(real) :].mean(), **scalars)  # fmt: skip
                found.append((quantized.vectors, quantized.tokens))
            vectors, tokens = (torch.cat(x) for x in zip(*found, strict=True))
            norms = {f"{name}_gradient": accelerator.clip_grad_norm_(module.parameters(), config.clip_norm)
                     for name, module in (("generator", generator), ("discriminator", critic))}  # fmt: skip
            log.add(**norms)
            log.use(tokens)
            valid = log.valid(*norms.values())
            _apply(prepared, valid)
            vqgan.quantizer.update_codebook(vectors, tokens, torch.Generator().manual_seed(_step_seed(seed, step)), valid)
            ema.update_parameters(vqgan)
            bar.update()
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                bar.set_postfix(log.write(step + 1, lr=prepared[0].param_groups[0]["lr"]))
            if accelerator.is_main_process:
                if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                    scores = held_out_reconstruction(ema.module, held_out)
                    run.log("vqgan_held_out", step + 1, **scores)
                    state.save(step + 1, scores["l2"])
                stop.raise_if_asked(lambda done=step + 1: state.save(done), f"after step {step + 1} of the VQGAN's training")
    return _finish(run, "vqgan", ema.module, accelerator, images.skipped)


@torch.inference_mode()
def held_out_reconstruction(vqgan: VQGAN, images: ImageSet, most: int = 256) -> dict[str, float]:
    """L1 and L2 between a set's first pictures (B, 3, S, S) in [-1, 1] and their reconstructions, clamped, by weights in any mode."""
    training = vqgan.training
    vqgan.eval()
    l1, l2, count = 0.0, 0.0, 0
    for _, batch in ordered_batches(images, range(min(most, len(images))), 64):
        real = to_float(batch).to(vqgan.last_layer.device)
        error = vqgan.decode(vqgan.encode(real)) - real
        l1, l2, count = l1 + float(error.abs().sum()), l2 + float(error.pow(2).sum()), count + error.numel()
    vqgan.train(training)
    if count == 0:
        raise ClipgenError(f"none of the held-out pictures of {images.root} could be read: check the data")
    return {"l1": l1 / count, "l2": l2 / count}


# ---------------------------------------------------------------------------------------------- stage 2


def train_transformer(
    run: Run, store: TokenStore, held_out: TokenStore, model_config: TransformerConfig, config: TransformerTrainConfig,
    vqgan: VQGAN, clip: ClipEmbedder, seed: int = 0, device: str = "cpu", show_progress: bool = True,
    text_mean: torch.Tensor | None = None, preview: Callable[[ImageTransformer, int], None] | None = None,
) -> ImageTransformer:  # fmt: skip
    """Train p(tokens | embedding) from a store, or go on from the run's last checkpoint, and write `<run>/transformer/`.

    Loss: token likelihood + weight * CLIP embedding reconstruction (CLIP-GEN, arXiv 2203.00386, section 3.3), the
    second on a share of the batch.

    Args:
        held_out: a store of pictures not trained on; its likelihood is logged at every checkpoint.
        vqgan, clip: frozen, for the embedding reconstruction loss.
        text_mean: mean (D,) of the embeddings of some texts, which `config.centre` needs and nothing else looks at.
        preview: called with the EMA model and the step at every checkpoint.

    Returns:
        The EMA of the weights, in eval mode.

    Raises:
        ClipgenError, Stopped: as of `train_vqgan`.
    """
    torch.manual_seed(seed)
    accelerator = _accelerator(config, device)
    own, marked = _positions(config), _spread(config.batch_size, config.embedding_share)
    transformer = ImageTransformer(model_config, store.meta["K"], store.meta["L"], store.meta["D"])
    if config.centre:
        if text_mean is None:
            raise ClipgenError("centre takes the mean off text embeddings too: give train_transformer the mean of some")
        transformer.image_mean.copy_(store.mean_embed())
        transformer.text_mean.copy_(text_mean)
    image_mean = transformer.image_mean.clone()
    optimizer = build_optimizer(transformer, config.optimizer, config.lr, config.beta2, config.weight_decay)
    ema = AveragedModel(transformer, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    state = TrainingState(run, "transformer", {"model": transformer, "ema": ema, "optimizer": optimizer, **_scaler(accelerator)},
                   {"model": asdict(model_config), "train": _lasting(config), "seed": seed, "data": store.meta["data_hash"],
                    "vqgan": store.meta["vqgan_hash"], "clip": store.meta["clip_hash"]})  # fmt: skip
    start = state.resume()
    model, optimizer = accelerator.prepare(transformer, optimizer)
    ema.to(accelerator.device)
    frozen = vqgan.to(accelerator.device).requires_grad_(False), clip.to(accelerator.device)
    forward = _compiled(model, accelerator.device) if config.compile else model
    log = _Log(run, "transformer", config.steps)
    label = "training transformer"
    with progress(config.steps, label, show_progress and accelerator.is_main_process, start) as bar, stoppable() as stop:
        for step in range(start, config.steps):
            torch.manual_seed(_step_seed(seed, step, processes.rank()))
            _set_rates([optimizer], (config.lr,), step, config)
            rows = batch_rows(len(store), config.batch_size, seed, step)
            change = _changes(config, store.meta["D"], torch.Generator().manual_seed(_step_seed(seed, step)))
            for last, part in _with_last(own):
                tokens, embeds = store.tokens(rows[part]).to(accelerator.device), store.embeds(rows[part])
                condition = change(centre(embeds, image_mean), part).to(accelerator.device)
                with _reduced(accelerator, last, model):
                    with accelerator.autocast():
                        logits = forward(condition, tokens)
                    nll = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
                    loss, scalars = nll, {"nll": nll}
                    if config.embedding_weight > 0:
                        scalars["embedding_loss"] = logits.new_zeros(())
                        if len(here := np.flatnonzero(marked[part])):  # its mean is over the marked rows of the whole batch
                            with accelerator.autocast():
                                distance = embedding_loss(logits[here], embeds[here].to(accelerator.device), *frozen,
                                                          config.embedding_path, config.embedding_form)  # fmt: skip
                            shares = config.accumulate * processes.count()
                            scalars["embedding_loss"] = distance * (shares * len(here) / marked.sum())
                        loss = loss + config.embedding_weight * scalars["embedding_loss"]
                    accelerator.backward(loss / config.accumulate)
                log.add(loss=loss, **scalars)
            gradient = accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
            log.add(gradient=gradient)
            _apply([optimizer], log.valid(gradient))
            ema.update_parameters(transformer)
            bar.update()
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                bar.set_postfix(log.write(step + 1, lr=optimizer.param_groups[0]["lr"]))
            if accelerator.is_main_process:
                if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                    ema.module.eval()
                    scores = held_out_losses(ema.module, held_out, *frozen)
                    run.log("transformer_held_out", step + 1, **scores)
                    state.save(step + 1, scores["nll"])
                    if preview is not None:
                        preview(ema.module, step + 1)
                stop.raise_if_asked(
                    lambda done=step + 1: state.save(done), f"after step {step + 1} of the transformer's training"
                )
    made_with = {"trained_with": {"vqgan": module_hash(vqgan), "clip": clip.weights_hash}}
    return _finish(run, "transformer", ema.module, accelerator, {}, **made_with)


def _changes(
    config: TransformerTrainConfig, dim: int, draw: torch.Generator
) -> Callable[[torch.Tensor, np.ndarray], torch.Tensor]:
    """Noise and condition dropout of one step: drawn for the whole batch, given to the rows at some of its positions."""
    n = config.batch_size
    cosine, noise, kept = (
        torch.rand(n, 1, generator=draw),
        torch.randn(n, dim, generator=draw),
        torch.rand(n, 1, generator=draw),
    )

    def change(embeds: torch.Tensor, part: np.ndarray) -> torch.Tensor:
        return drop_condition(
            noise_embeds(embeds, config.noise_cos, cosine[part], noise[part]), config.condition_dropout, kept[part]
        )

    return change


def noise_embeds(embeds: torch.Tensor, lowest_cos: float, uniform: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Turn unit vectors (B, D) by random angles: each cosine with its origin uniform in [lowest_cos, 1].

    The noise is made orthogonal first, so the cosine is met exactly, whatever D (LAFITE, arXiv 2111.13792, adds it
    without; its strongest setting corresponds to 0.32 at D = 512).

    Args:
        uniform: (B, 1) in [0, 1). noise: (B, D), normal.
    """
    if lowest_cos >= 1:
        return embeds
    cosine = lowest_cos + (1 - lowest_cos) * uniform
    noise = F.normalize(noise - (noise * embeds).sum(-1, keepdim=True) * embeds, dim=-1)
    return cosine * embeds + (1 - cosine**2).sqrt() * noise


def drop_condition(embeds: torch.Tensor, share: float, uniform: torch.Tensor) -> torch.Tensor:
    """Zero a share of the rows, those whose `uniform` (B, 1) is below it: the unconditional case that guidance needs
    (arXiv 2207.12598)."""
    return embeds * (uniform >= share)


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
    processes.join(device)
    return Accelerator(mixed_precision=config.precision, cpu=on_cpu)


def _compiled(module: nn.Module, device: torch.device) -> nn.Module:
    """`torch.compile`, tried on a sum first: it needs a C++ compiler, which not every machine has."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # a missing compiler, header or backend each raises its own
        warnings.warn(f"torch.compile does not work on this machine ({type(error).__name__}): training runs without it, somewhat slower; a C++ compiler and Python's headers would mend it", stacklevel=3)  # fmt: skip
        return module
    return torch.compile(module)


def _scaler(accelerator: Accelerator) -> dict:
    """The loss scale of fp16, which moves on its own and has to be resumed."""
    return {"scaler": accelerator.scaler} if accelerator.scaler is not None else {}


def _lasting(config: OptimConfig) -> dict:
    """The fields that a resumed run must share; logging, workers and compilation may change between sessions."""
    return {k: v for k, v in asdict(config).items() if k not in ("log_every", "save_every", "workers", "compile")}


def _step_seed(seed: int, step: int, rank: int | None = None) -> int:
    """A seed for the global generator at one step on one process, or (None) for what all processes draw alike.

    Seeded anew at every step, nothing random has a state to keep: a run that is resumed, with whatever number of processes,
    draws what it would have drawn.
    """
    words = [seed, 17, step] + ([] if rank is None else [rank])
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def _positions(config: OptimConfig) -> np.ndarray:
    """Places in the whole batch that are this process's, (accumulate, n): one row for each backward pass."""
    shares = processes.count() * config.accumulate
    if config.batch_size % shares:
        raise ClipgenError(f"batch_size {config.batch_size} does not divide by {processes.count()} processes times accumulate {config.accumulate}: change one of them")  # fmt: skip
    return np.arange(config.batch_size).reshape(processes.count(), config.accumulate, -1)[processes.rank()]


def _spread(size: int, share: float) -> np.ndarray:
    """Marks, (size,) bool, at that share of the places, at least one, evenly apart: every process has its part of them."""
    count = max(1, round(share * size))
    marked = np.zeros(size, bool)
    marked[((np.arange(count) + 0.5) * size / count).astype(int)] = True
    return marked


def _with_last(parts: Sequence) -> Iterator[tuple[bool, object]]:
    """Each part, and whether it is the last."""
    return ((i + 1 == len(parts), part) for i, part in enumerate(parts))


@contextmanager
def _reduced(accelerator: Accelerator, last: bool, *modules: nn.Module) -> Iterator[None]:
    """Gradients go between processes with the last part of a batch only."""
    with ExitStack() as stack:
        for module in () if last else modules:
            stack.enter_context(accelerator.no_sync(module))
        yield


def _set_rates(optimizers: list, peaks: tuple[float, ...], step: int, config: OptimConfig) -> None:
    for optimizer, peak in zip(optimizers, peaks, strict=True):
        set_rate(optimizer, learning_rate(step, config.steps, peak, config.warmup))


def _apply(optimizers: list, valid: torch.Tensor) -> None:
    """One step of each optimiser; where `valid`, () bool, is False, weights and moments stay as they are."""
    for optimizer in optimizers:
        bare = getattr(optimizer, "optimizer", optimizer)
        if getattr(optimizer, "scaler", None) is not None:  # looks for itself
            optimizer.step()
        elif getattr(bare, "_step_supports_amp_scaling", False):  # fused AdamW looks on the device: nobody waits
            bare.grad_scale, bare.found_inf = None, (~valid).float()
            optimizer.step()
        elif bool(valid):
            optimizer.step()
        optimizer.zero_grad()


def _finish(run: Run, stage: str, module: nn.Module, accelerator: Accelerator, skipped: dict, **facts: object) -> nn.Module:
    """Write the weights, tell of skipped files and steps, and hand back the model for use."""
    processes.wait()
    if accelerator.is_main_process:
        save_weights(run.path / stage, module, **facts)
        steps = sum(line.get("skipped", 0) for line in run.metrics(stage))
        run.add_to_summary(
            parameters={stage: sum(p.numel() for p in module.parameters())},
            **({"skipped": skipped} if skipped else {}),
            **({"skipped_steps": {stage: steps}} if steps else {}),
        )
    processes.wait()
    return module.eval().requires_grad_(False)


class TrainingState:
    """All that a training needs to go on, by name, in one file for each checkpoint: `checkpoints/<stage>-<step>.safetensors`.

    The last `KEPT` of them stay, and the one with the best score.
    """

    def __init__(self, run: Run, stage: str, parts: dict, facts: dict):
        self.run, self.stage, self.parts, self.facts = run, stage, parts, facts
        self.folder = run.file("checkpoints", stage).parent

    def save(self, step: int, score: float | None = None) -> None:
        """Write the state after `step` steps; `score`, where there is one, is better the lower."""
        for cut in self.folder.glob(f".{self.stage}-*"):  # left by a process that was killed while it wrote
            cut.unlink()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        path = self.folder / f"{self.stage}-{step:08d}.safetensors"
        if not (score is None and path in self.paths()):
            score = score if score is not None and math.isfinite(score) else None
            save_checkpoint(path, state, {"training": self.facts, "step": step, "score": score})
        kept = self.paths()[-KEPT:] + self.best()[:1]
        for path in self.paths():
            if path not in kept:
                path.unlink()

    def paths(self) -> list[Path]:
        """The checkpoints that are there, in order of their steps."""
        return sorted(self.folder.glob(f"{self.stage}-{'[0-9]' * 8}.safetensors"))

    def best(self) -> list[Path]:
        """Those that have a score, the best one first."""
        scores = {path: score for path in self.paths() if (score := checkpoint_meta(path).get("score")) is not None}
        return sorted(scores, key=scores.get)

    def resume(self) -> int:
        """Load the last checkpoint that is whole; returns the step to go on from.

        Raises:
            ClipgenError: it belongs to another training, or none of those there is whole.
        """
        step, damaged = 0, []
        for path in reversed(self.paths()):
            try:
                state, meta = load_checkpoint(path)
            except ClipgenError as error:
                damaged.append(str(error))
                continue
            if differing := differences(meta["training"], self.facts):
                raise ClipgenError(f"{path} belongs to another training (differs in {', '.join(differing)}): choose another run name or delete it")  # fmt: skip
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            step = meta["step"]
            break
        if damaged and not step:
            raise ClipgenError(damaged[0])
        if damaged and processes.is_first():
            warnings.warn(f"{damaged[0]}; the training goes on from step {step}", stacklevel=3)
        if processes.is_first():
            for stage in (self.stage, f"{self.stage}_held_out"):
                self.run.rewind(stage, step)
        return step


class _Log:
    """Means of scalars since the last line, kept as tensors until then: no waiting for the GPU in between."""

    def __init__(self, run: Run, stage: str, steps: int, codebook_size: int = 0):
        self.run, self.stage, self.codebook_size, self.most = run, stage, codebook_size, min(MOST_SKIPPED, steps)
        self.scalars: dict[str, list[torch.Tensor]] = {}
        self.losses: list[torch.Tensor] = []  # of this step
        self.counts: torch.Tensor | int = 0
        self.skipped: list[torch.Tensor] = []  # of the steps since the last line
        self.in_a_row = 0

    def add(self, **scalars: torch.Tensor) -> None:
        for key, value in scalars.items():
            self.scalars.setdefault(key, []).append(value.detach().float())
        if "loss" in scalars:
            self.losses.append(self.scalars["loss"][-1])

    def use(self, tokens: torch.Tensor) -> None:
        """Count the codes of a batch."""
        self.counts = self.counts + torch.bincount(tokens.flatten(), minlength=self.codebook_size)

    def valid(self, *norms: torch.Tensor) -> torch.Tensor:
        """Whether this step's losses and gradients are finite on every process, () bool; its answer is counted."""
        values = torch.stack([processes.mean(torch.stack(self.losses).sum()), *(norm.float() for norm in norms)])
        self.losses = []
        self.skipped.append(~values.isfinite().all())
        return ~self.skipped[-1]

    def write(self, step: int, **extra: float) -> dict[str, str]:
        """Log the means over processes and steps (what is not finite left out) and clear them; returns what the bar shows.

        Raises:
            ClipgenError: `MOST_SKIPPED` steps in a row had no finite loss or gradient.
        """
        values = {key: torch.stack(found) for key, found in self.scalars.items()}
        means = processes.mean(torch.stack([x[x.isfinite()].mean() for x in values.values()])).tolist()
        line = dict(zip(values, means, strict=True))
        if self.codebook_size:
            line |= code_use(processes.total(self.counts))
            line["psnr"] = 10 * np.log10(4 / line["l2"])  # peak to peak is 2 in [-1, 1]
        skipped, self.scalars, self.counts, self.skipped = torch.stack(self.skipped).tolist(), {}, 0, []
        if any(skipped):
            line["skipped"] = sum(skipped)
        if processes.is_first():
            self.run.log(self.stage, step, **line, **extra)
        for bad in skipped:
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if self.in_a_row == self.most:
                raise ClipgenError(f"the {self.stage} loss or its gradient was not finite at {self.most} steps in a row before step {step}: the weights are those of before and in the last checkpoint; look at the data and the precision, or begin another run with a lower learning rate")  # fmt: skip
        shown = ("psnr", "perplexity", "nll", "embedding_loss", "loss")
        return {key: f"{line[key]:.3g}" for key in shown if key in line}


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
    start, log = state.resume(), _Log(run, stage, config.steps)
    with progress(config.steps, f"training {stage}", show_progress, start) as bar, stoppable() as stop:
        model.train()
        for step in range(start + 1, config.steps + 1):
            rate = learning_rate(step - 1, config.steps, config.lr, config.warmup)
            set_rate(optimizer, rate)
            loss, scalars = loss_of(step - 1)
            loss.backward()
            gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or math.inf)
            log.add(loss=loss, gradient=gradient, **scalars)
            _apply([optimizer], log.valid(gradient))
            after_step()
            bar.update()
            if step % config.log_every == 0 or step == config.steps:
                bar.set_postfix(log.write(step, lr=rate))
            if step % config.save_every == 0 or step == config.steps:
                state.save(step)
            stop.raise_if_asked(lambda done=step: state.save(done), f"after step {step} of the {stage} training")
