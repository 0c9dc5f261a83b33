"""The two trainings, each a flat loop over steps on one Accelerator.

Stage 1: images in, a VQGAN out. Stage 2: a token store in, a transformer out. Batches, rates, noise and dropout are
functions of seed and step, and the rest of the state is in the checkpoint, so that a resumed run is the uninterrupted
one. Several processes share each batch and come to the same weights as one, up to the order of sums. A step without a finite
loss and gradient changes no weight and is counted. Neither stage sees a caption: previews of text prompts come in as embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F

from .clip_embed import ClipEmbedder
from .config import TransformerConfig, TransformerTrainConfig
from .data.batches import batch_rows
from .runtime import distributed
from .runtime.checkpoints import module_hash
from .runtime.kernels import apply, compiled
from .runtime.runs import ClipgenError, Run, progress, stoppable
from .store import TokenStore
from .training import (
    Averaged,
    Log,
    TrainingState,
    accelerator_on,
    build_optimizer,
    finish,
    is_sharded,
    lasting,
    load_whole,
    positions,
    reduced,
    scaler_of,
    set_learning_rates,
    spread,
    step_seed,
    whole,
    with_last,
)
from .transformer import ImageTransformer, centre
from .vqgan import VQGAN


def train_transformer(
    run: Run,
    store: TokenStore,
    held_out: TokenStore,
    model_config: TransformerConfig,
    config: TransformerTrainConfig,
    vqgan: VQGAN,
    clip: ClipEmbedder,
    seed: int = 0,
    device: str = "cpu",
    show_progress: bool = True,
    text_mean: torch.Tensor | None = None,
    preview: Callable[[ImageTransformer, int], None] | None = None,
) -> ImageTransformer:
    """Train p(tokens | embedding) from a store, or go on from the run's last checkpoint, and write `<run>/transformer/`.

    Loss: token likelihood + weight * CLIP embedding reconstruction (CLIP-GEN, arXiv 2203.00386, section 3.3), the
    second on a share of the batch.

    Args:
        held_out: a store of images not trained on; its likelihood is logged at every checkpoint.
        vqgan, clip: frozen, for the embedding reconstruction loss.
        text_mean: mean (D,) of the embeddings of some texts, which `config.centre` needs and nothing else looks at.
        preview: called with the EMA model and the step at every checkpoint.

    Returns:
        The EMA of the weights, in eval mode.

    Raises:
        ClipgenError, Stopped: as of `train_vqgan`.
    """
    torch.manual_seed(seed)
    accelerator = accelerator_on(config, device)
    sharded = is_sharded(accelerator)
    own, marked = positions(config), spread(config.batch_size, config.embedding_share)
    transformer = ImageTransformer(model_config, store.meta["K"], store.meta["L"], store.meta["D"])
    if config.centre:
        if text_mean is None:
            raise ClipgenError("centre takes the mean off text embeddings too: give train_transformer the mean of some")
        transformer.image_mean.copy_(store.mean_embed())
        transformer.text_mean.copy_(text_mean)
    image_mean = transformer.image_mean.clone()
    optimizer = build_optimizer(transformer, config.optimizer, config.lr, config.beta2, config.weight_decay)
    ema = Averaged(transformer, config.ema_decay)
    state = TrainingState(
        run,
        "transformer",
        {"model": transformer, "ema": ema, "optimizer": optimizer, **scaler_of(accelerator)},
        {
            "model": asdict(model_config),
            "train": lasting(config),
            "seed": seed,
            "data": store.meta["data_hash"],
            "vqgan": store.meta["vqgan_hash"],
            "clip": store.meta["clip_hash"],
        },
    )
    start = state.resume()
    held = optimizer.state_dict()
    model, optimizer = accelerator.prepare(transformer, optimizer)
    ema.module.to(accelerator.device)
    if sharded:  # weights were cut as they lay there, the rest is cut now
        load_whole(optimizer.optimizer, held)
        ema.follow(transformer)
        state.parts["optimizer"] = optimizer.optimizer
    frozen = vqgan.to(accelerator.device).requires_grad_(False), clip.to(accelerator.device)
    forward = compiled(model, accelerator.device) if config.compile else model
    log = Log(run, "transformer", config.steps)
    label = "training transformer"
    with (
        progress(config.steps, label, show_progress and accelerator.is_main_process, start) as bar,
        stoppable() as stop,
    ):
        for step in range(start, config.steps):
            torch.manual_seed(step_seed(seed, step, distributed.rank()))
            set_learning_rates([optimizer], (config.lr,), step, config)
            rows = batch_rows(len(store), config.batch_size, seed, step)
            change = change_of(config, store.meta["D"], torch.Generator().manual_seed(step_seed(seed, step)))
            for last, part in with_last(own):
                tokens, embeds = store.tokens(rows[part]).to(accelerator.device), store.embeds(rows[part])
                condition = change(centre(embeds, image_mean) if config.centre else embeds, part).to(accelerator.device)
                here = np.flatnonzero(marked[part]) if config.embedding_weight > 0 else np.empty(0, int)
                with reduced(accelerator, last, model):
                    with accelerator.autocast():
                        nll, logits = forward(
                            condition, tokens, logits_of=torch.from_numpy(here).to(accelerator.device)
                        )
                    loss, scalars = nll, {"nll": nll}
                    if config.embedding_weight > 0:
                        scalars["embedding_loss"] = nll.new_zeros(())
                        if len(here):  # its mean is over the marked rows of the whole batch
                            with accelerator.autocast():
                                distance = embedding_loss(
                                    logits,
                                    embeds[here].to(accelerator.device),
                                    *frozen,
                                    config.embedding_path,
                                    config.embedding_form,
                                )
                            shares = config.accumulate * distributed.world_size()
                            scalars["embedding_loss"] = distance * (shares * len(here) / marked.sum())
                        loss = loss + config.embedding_weight * scalars["embedding_loss"]
                    accelerator.backward(loss / config.accumulate)
                log.add(loss=loss, **scalars)
            gradient = whole(accelerator.clip_grad_norm_(model.parameters(), config.clip_norm))
            log.add(gradient=gradient)
            apply([optimizer], log.valid(gradient))
            ema.update(transformer)
            bar.update()
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                bar.set_postfix(log.write(step + 1, lr=optimizer.param_groups[0]["lr"]))
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                averaged, score = ema.whole().eval(), None
                if accelerator.is_main_process:
                    scores = validation_losses(averaged, held_out, *frozen)
                    run.log("transformer_val", step + 1, **scores)
                    score = scores["nll"]
                state.save(step + 1, score)
                if preview is not None and accelerator.is_main_process:
                    preview(averaged, step + 1)
            if sharded:  # all have to stop together, since each holds a part
                stop.number = distributed.broadcast(stop.number)
            if sharded or accelerator.is_main_process:
                stop.raise_if_asked(
                    lambda done=step + 1: state.save(done), f"after step {step + 1} of the transformer's training"
                )
    made_with = {"trained_with": {"vqgan": module_hash(vqgan), "clip": clip.weights_hash}}
    return finish(run, "transformer", ema.whole(), accelerator, {}, **made_with)


def change_of(
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
    logits: torch.Tensor,
    embeds: torch.Tensor,
    vqgan: VQGAN,
    clip: ClipEmbedder,
    path: str = "straight-through",
    form: str = "cosine",
) -> torch.Tensor:
    """CLIP embedding reconstruction: how far the embedding of the predicted decoding is from the image's own.

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
        chosen = torch.zeros_like(soft).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0) + soft - soft.detach()
    codes = chosen @ vqgan.quantizer.codes().to(chosen.dtype)  # (b, L, C)
    side = vqgan.config.side
    images = vqgan.decode_codes(codes.transpose(1, 2).unflatten(2, (side, side)))
    similarity = (clip.images(images) * embeds).sum(-1)
    return (1 - similarity if form == "cosine" else -((1 + similarity) / 2).clamp_min(1e-6).log()).mean()


@torch.inference_mode()
def validation_losses(
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
