"""Stage 2, transformer training: the loss of CLIP-GEN (arXiv 2203.00386, section 3.3), one step of it, and the loop.

In: a token store. Out: p(tokens | embedding). No caption is seen: previews of text prompts come in as a callable.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import training
from .clip_embed import ClipEmbedder
from .config import Preset, TransformerTrainConfig
from .data.batches import batch_rows
from .runtime import distributed
from .runtime.checkpoints import module_hash
from .runtime.kernels import compile_in_place, nll_from_hidden
from .runtime.runs import Run
from .store import TokenStore
from .transformer import ImageTransformer
from .vqgan import VQGAN


class Frozen(NamedTuple):
    """What a transformer training uses and does not change."""

    vqgan: VQGAN
    clip: ClipEmbedder


class Batch(NamedTuple):
    """Rows of a token store, made ready for a step. Axes: B rows, L tokens, D CLIP dimension."""

    tokens: torch.Tensor  # (B, L) int64
    embeds: torch.Tensor  # (B, D) of unit norm, those of the images
    condition: torch.Tensor  # (B, D), what the transformer reads: embeddings with noise, some of them zero
    loss_weights: torch.Tensor  # (B,) on the CPU, in the embedding loss: 0 for most rows, mean 1 over a whole batch

    def part(self, rows: np.ndarray, device: torch.device) -> Self:
        """Some of the rows, on a device."""
        *inputs, loss_weights = (x[rows] for x in self)
        return Batch(*(x.to(device) for x in inputs), loss_weights)


def noise_embeds(embeds: torch.Tensor, lowest_cos: float, uniform: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Turn unit vectors (B, D) by random angles: each cosine with its origin uniform in [lowest_cos, 1].

    The noise is made orthogonal first, so the cosine is met exactly, whatever D (LAFITE, arXiv 2111.13792, adds it
    without; its strongest setting corresponds to 0.32 at D = 512). `uniform` is (B, 1) in [0, 1), `noise` (B, D), normal.
    """
    if lowest_cos >= 1:
        return embeds
    cosine = lowest_cos + (1 - lowest_cos) * uniform
    noise = F.normalize(noise - (noise * embeds).sum(-1, keepdim=True) * embeds, dim=-1)
    return cosine * embeds + (1 - cosine**2).sqrt() * noise


def embedding_loss(
    logits: torch.Tensor, embeds: torch.Tensor, frozen: Frozen, path: str = "straight-through", form: str = "cosine"
) -> torch.Tensor:
    """CLIP embedding reconstruction (section 3.3): how far the embedding of the predicted image is from the given one, (b,).

    One token of every position is looked up with a straight-through gradient to its softmax, decoded, and embedded by
    CLIP with CLIP's own preprocessing. Gradients reach the logits; VQGAN and CLIP are frozen.

    Args:
        logits: (b, L, K), each position given the true tokens before it. embeds: (b, D) of unit norm.
        path: `straight-through` looks up the likeliest token, `gumbel` one sampled with Gumbel noise (arXiv 1611.01144,
            temperature 1).
        form: `cosine` is 1 - s of the cosine s; `log` is -log((1 + s) / 2), steeper where the two disagree.
    """
    if path == "gumbel":
        one_hot = F.gumbel_softmax(logits.float(), tau=1.0, hard=True)
    else:
        soft = logits.softmax(-1)
        one_hot = torch.zeros_like(soft).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0) + soft - soft.detach()
    codes = one_hot @ frozen.vqgan.quantizer.codes().to(one_hot.dtype)  # (b, L, C)
    side = frozen.vqgan.config.side
    images = frozen.vqgan.decode_codes(codes.transpose(1, 2).unflatten(2, (side, side)))
    similarity = (frozen.clip.images(images) * embeds).sum(-1)
    return 1 - similarity if form == "cosine" else -((1 + similarity) / 2).clamp_min(1e-6).log()


class NLLAndLogits(nn.Module):
    """A transformer as training calls it: one forward pass, which DDP needs, to NLL and logits of some rows."""

    def __init__(self, transformer: ImageTransformer):
        super().__init__()
        self.transformer = transformer

    def forward(
        self, condition: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, D), (B, L) int64 and (b,) int64 -> mean NLL of the tokens in nats, and logits (b, L, K) float."""
        hidden = self.transformer.hidden(condition, tokens)
        return nll_from_hidden(hidden, self.transformer.head, tokens), self.transformer.head(hidden[rows]).float()


def transformer_step(
    model: nn.Module, frozen: Frozen, batch: Batch, config: TransformerTrainConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss on a batch: NLL of the tokens + embedding_weight * CLIP embedding reconstruction (section 3.3).

    `model` is a `NLLAndLogits`. Returns the loss, and its two terms, the NLL in nats per token.
    """
    device, rows = batch.tokens.device, torch.nonzero(batch.loss_weights)[:, 0]
    weights, rows = batch.loss_weights[rows].to(device), rows.to(device)
    with training.autocast(config, device):
        nll, logits = model(batch.condition, batch.tokens, rows)
        if config.embedding_weight == 0:
            return nll, {"loss": nll, "nll": nll}
        distance = nll.new_zeros(())
        if len(rows):
            path, form = config.embedding_path, config.embedding_form
            distances = embedding_loss(logits, batch.embeds[rows], frozen, path, form)
            distance = (weights * distances).sum() / len(batch.tokens)
    loss = nll + config.embedding_weight * distance
    return loss, {"loss": loss, "nll": nll, "embedding_loss": distance}


def make_batch(
    tokens: torch.Tensor, embeds: torch.Tensor, config: TransformerTrainConfig, rng: torch.Generator
) -> Batch:
    """A whole batch from tokens (B, L) and embeddings (B, D) of a store: noise, condition dropout, rows for the embedding loss.

    Those rows lie evenly apart, so that every process has its part of them.
    """
    size, dim = embeds.shape
    cosine, noise = torch.rand(size, 1, generator=rng), torch.randn(size, dim, generator=rng)
    condition = noise_embeds(embeds, config.noise_cos, cosine, noise)
    # zero rows are the unconditional case that guidance needs (arXiv 2207.12598)
    condition = condition * (torch.rand(size, 1, generator=rng) >= config.condition_dropout)
    weights = torch.zeros(size)
    if config.embedding_weight > 0:
        count = max(1, round(config.embedding_share * size))
        weights[((torch.arange(count) + 0.5) * size / count).long()] = size / count
    return Batch(tokens, embeds, condition, weights)


def train_transformer(
    run: Run,
    stores: tuple[TokenStore, TokenStore],
    preset: Preset,
    frozen: Frozen,
    preview: Callable[[ImageTransformer, int], np.ndarray | None] = lambda transformer, step: None,
    step_of: Callable = transformer_step,
) -> ImageTransformer:
    """Train p(tokens | embedding), or resume, and write `<run>/transformer/`; returns the EMA. Raises what `train_vqgan` does.

    Args:
        stores: to train on, and of images not trained on, whose NLL is logged at every checkpoint.
        preview: called with the EMA model and the step at every checkpoint; returns what a tracker gets, (H, W, 3) uint8.
        step_of: computes the loss; a function of your own takes and returns what `transformer_step` does.
    """
    config, device, (store, val_store) = preset.transformer_train, distributed.training_device(run.device), stores
    meta, mine = store.meta, training.local_rows(config)
    run = replace(run, seed=run.seed + config.seed)
    torch.manual_seed(run.seed)
    transformer = ImageTransformer(preset.transformer, meta["K"], meta["L"], meta["D"])
    transformer.to(device)
    frozen.vqgan.to(device).requires_grad_(False)
    frozen.clip.to(device)
    optimizer = training.build_optimizer(transformer, config.optimizer, config.lr, config.beta2, config.weight_decay)
    ema = training.moving_average(transformer, config.ema_decay)
    facts = {"model": asdict(preset.transformer)} | {key: meta[key] for key in ("data_hash", "vqgan_hash", "clip_hash")}
    facts |= training.named_step(step_of, transformer_step)
    parts = {"model": transformer, "ema": ema, "optimizer": optimizer}
    state = training.TrainingState(run, "transformer", config, parts, facts)
    start, log = state.resume(), training.Log(run, "transformer", config.steps)
    nll_and_logits = NLLAndLogits(transformer)
    if config.compile:
        compile_in_place(nll_and_logits, device)
    (model,) = distributed.data_parallel(nll_and_logits)

    def validate(step: int) -> float:
        scores = validation_losses(ema.module, val_store, frozen)
        log.line("transformer_val", step, scores, previews=preview(ema.module, step))
        return scores["nll"]

    with closing(training.loop(state, log, start, validate)) as steps:
        for step in steps:
            rows = batch_rows(len(store), config.batch_size, run.seed, step)
            rng = torch.Generator().manual_seed(training.step_seed(run.seed, step))
            batch = make_batch(store.tokens(rows), store.embeds(rows), config, rng)
            for places in distributed.microbatches(list(mine), model):
                loss, scalars = training.checked_step(step_of(model, frozen, batch.part(places, device), config))
                (loss / config.accumulate).backward()
                log.add(**scalars)
            if training.optimizer_step(log, step, config.max_grad_norm, gradient=optimizer):
                ema.update_parameters(transformer)
    trained_with = {"vqgan": module_hash(frozen.vqgan), "clip": frozen.clip.weights_hash}
    return training.finish(run, "transformer", ema.module, {}, trained_with=trained_with)


@torch.inference_mode()
def validation_losses(transformer: ImageTransformer, store: TokenStore, frozen: Frozen) -> dict[str, float]:
    """NLL (nats per token) and embedding loss on the first 1,000 rows of a store, without noise."""
    device, count = frozen.clip.device, min(1_000, len(store))
    nll, distance = 0.0, 0.0
    for first in range(0, count, 100):
        part = slice(first, min(first + 100, count))
        tokens, embeds = store.tokens(part).to(device), store.embeds(part).to(device)
        logits = transformer(embeds, tokens)
        nll += F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item() * len(tokens)
        if transformer.config.conditioning != "words":
            distance += embedding_loss(logits, embeds, frozen).sum().item()
    return {"nll": nll / count} | ({"embedding_loss": distance / count} if distance else {})
