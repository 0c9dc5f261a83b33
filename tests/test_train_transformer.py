import os
import signal
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Faulty, Killed, assert_compiled_is_plain, same_weights
from safetensors import safe_open

from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.data.datasets import ImageSet
from clipgen_lib.runtime.checkpoints import load_checkpoint, save_checkpoint
from clipgen_lib.runtime.runs import ClipgenError, Stopped, open_run
from clipgen_lib.store import extract
from clipgen_lib.train_transformer import (
    Frozen,
    NLLAndLogits,
    embedding_loss,
    make_batch,
    noise_embeds,
    train_transformer,
    transformer_step,
    validation_losses,
)
from clipgen_lib.train_vqgan import train_vqgan


@pytest.fixture(scope="module")
def frozen(vqgan, clip):
    return Frozen(vqgan, clip)


@pytest.fixture(scope="module")
def train_in(preset, store, frozen):
    """Train under a name in a folder; a store of one's own takes the place of the usual one, but not for validation."""

    def call(folder, name, own=None, frozen=frozen, layers=2, **changes):
        wanted = replace(preset, transformer_train=replace(preset.transformer_train, **changes))
        wanted = replace(wanted, transformer=replace(preset.transformer, layers=layers))
        run = replace(open_run(name, folder), seed=1)
        return train_transformer(run, (own or store, store), wanted, frozen)

    return call


@pytest.fixture
def train(train_in, tmp_path):
    return partial(train_in, tmp_path)


@pytest.fixture(scope="module")
def plain(train_in, tmp_path_factory):
    """What so many steps give without interruption, each number of them trained once."""
    folder = tmp_path_factory.mktemp("plain")
    return cache(lambda steps: train_in(folder, f"r{steps}", steps=steps))


# ---------------------------------------------------------------------------------------------- the batch


def test_noise_meets_its_cosine():
    rng = torch.Generator().manual_seed(0)
    embeds = F.normalize(torch.randn(4000, 64, generator=rng), dim=1)
    uniform, noise = torch.rand(4000, 1, generator=rng), torch.randn(4000, 64, generator=rng)
    noised = noise_embeds(embeds, 0.3, uniform, noise)
    cosine = (noised * embeds).sum(1)
    assert torch.allclose(noised.norm(dim=1), torch.ones(4000), atol=1e-5)
    assert cosine.min() > 0.299 and cosine.max() < 1.001 and abs(cosine.mean().item() - 0.65) < 0.01
    assert noise_embeds(embeds, 1.0, uniform, noise) is embeds


def test_condition_dropout_zeroes_whole_rows(preset):
    config = replace(preset.transformer_train, noise_cos=1.0, condition_dropout=0.1)
    embeds, rng = torch.ones(10_000, 4), torch.Generator().manual_seed(0)
    kept = make_batch(torch.zeros(10_000, 1), embeds, config, rng).condition
    assert set(kept.sum(1).tolist()) == {0.0, 4.0} and abs((kept[:, 0] == 0).float().mean().item() - 0.1) < 0.01


@pytest.fixture
def batch_of(store, preset):
    """The first 16 rows of the store as a batch, with a config in float32."""

    def make(**changes):
        config = replace(preset.transformer_train, precision="no", embedding_share=0.25, **changes)
        rows, rng = slice(0, 16), torch.Generator().manual_seed(3)
        return make_batch(store.tokens(rows), store.embeds(rows), config, rng), config

    return make


def test_a_batch_is_a_function_of_its_generator(batch_of):
    (a, config), (b, _) = batch_of(), batch_of()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert a.loss_weights.tolist() == [0, 0, 4, 0] * 4 and config.embedding_weight > 0
    plain, _ = batch_of(noise_cos=1.0, condition_dropout=0.0, embedding_weight=0.0)
    assert torch.equal(plain.condition, plain.embeds) and not plain.loss_weights.any()


# ---------------------------------------------------------------------------------------------- losses and the step


def test_transformer_step_is_the_formula(batch_of, transformer, frozen):
    """NLL + weight * mean of 1 - cosine over the chosen rows; the mean over the parts of a batch is that of the whole."""
    (batch, config), model = batch_of(embedding_weight=0.3), NLLAndLogits(transformer.requires_grad_(True))
    loss, scalars = transformer_step(model, frozen, batch, config)
    logits = transformer(batch.condition, batch.tokens)
    nll = F.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten())
    rows = [2, 6, 10, 14]
    images = frozen.vqgan.decode_codes(frozen.vqgan.quantizer.lookup(logits[rows].argmax(-1).view(4, 8, 8)))
    distance = 1 - (frozen.clip.images(images) * batch.embeds[rows]).sum(1).mean()
    assert scalars["nll"].item() == pytest.approx(nll.item(), rel=1e-5)
    assert scalars["embedding_loss"].item() == pytest.approx(distance.item(), abs=1e-5)
    assert loss.item() == scalars["loss"].item() == pytest.approx((nll + 0.3 * distance).item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in transformer.parameters())
    parts = [batch.part(places, torch.device("cpu")) for places in np.arange(16).reshape(8, 2)]
    losses = torch.stack([transformer_step(model, frozen, part, config)[0] for part in parts])
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    plain, scalars = transformer_step(model, frozen, *batch_of(embedding_weight=0.0))
    assert plain.item() == pytest.approx(nll.item(), rel=1e-5) and "embedding_loss" not in scalars


def test_forms_and_paths_of_the_embedding_loss(frozen):
    torch.manual_seed(0)
    logits, embeds = torch.randn(2, 64, 32), frozen.clip.texts(["a red circle", "a blue star"])
    cosine = 1 - embedding_loss(logits, embeds, frozen)
    assert torch.allclose(embedding_loss(logits, embeds, frozen, form="log"), -((1 + cosine) / 2).log(), atol=1e-5)
    sharp = F.one_hot(logits.argmax(-1), 32) * 200.0  # so sure that sampling takes the likeliest
    sampled = embedding_loss(sharp, embeds, frozen, path="gumbel")
    assert torch.allclose(sampled, embedding_loss(sharp, embeds, frozen), atol=1e-5)
    for settings in ({}, {"path": "gumbel", "form": "log"}):  # gradients reach the logits and nothing else
        leaf = logits.clone().requires_grad_()
        embedding_loss(leaf, embeds, frozen, **settings).mean().backward()
        assert (leaf.grad.abs().sum((1, 2)) > 0).all()
        assert all(p.grad is None for module in frozen[:2] for p in module.parameters())


def test_descending_the_embedding_loss_lowers_the_clip_distance(frozen):
    """Following the gradient brings the decoded image nearer to the prompt."""
    logits = torch.zeros(2, 64, 32).normal_(std=0.1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    embeds = frozen.clip.texts(["a large red circle", "a blue star"])
    optimizer, distances = torch.optim.Adam([logits], lr=0.1), []
    for _ in range(15):
        loss = embedding_loss(logits, embeds, frozen).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distances.append(loss.item())
    assert min(distances) < distances[0] - 0.02, distances[::8]


def test_validation_losses_are_means_over_rows(store, transformer, frozen):
    found = validation_losses(transformer, store, frozen)
    tokens, embeds = store.tokens(slice(None)), store.embeds(slice(None))
    logits = transformer(embeds, tokens)
    assert found["nll"] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item(), rel=1e-5)
    assert found["embedding_loss"] == pytest.approx(embedding_loss(logits, embeds, frozen).mean().item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------- training


def dies_with_the_sixth(count):
    if count == 5:
        raise Killed


def stops_at_the_fourth(count):
    if count == 3:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "fault, error, kept", [(dies_with_the_sixth, Killed, "3"), (stops_at_the_fourth, Stopped, "34")]
)
def test_resumed_is_uninterrupted(plain, train, store, tmp_path, fault, error, kept):
    with pytest.raises(error) as ended:
        train("parts", Faulty(store, fault))
    if error is Stopped:
        assert "SIGTERM after step 4 of the transformer" in str(ended.value) and ended.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    names = {f"transformer-0000000{step}.safetensors" for step in kept}
    assert {path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()} == names
    assert same_weights(plain(6), train("parts"))
    assert [line["step"] for line in open_run("parts", tmp_path).metrics("transformer")] == [2, 4, 6]


def test_training_is_language_free(images, preset, clip, tmp_path, monkeypatch):
    """Captions and the text encoder are taken away; every step of training still runs."""
    asked = property(lambda self: pytest.fail("a caption or the text encoder was asked for"))
    for owner, names in (
        (ImageSet, ("captions", "has_captions")),
        (ClipEmbedder, ("texts", "tokenizer")),
        (type(clip.model), ("encode_text",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, asked, raising=False)
    run = open_run("r", tmp_path)
    vqgan = train_vqgan(run, (images, images), preset, clip)
    store = extract(images, vqgan, clip, tmp_path / "fresh")
    train_transformer(run, (store, store), preset, Frozen(vqgan, clip))


KNOBS = {"condition_dropout": 0.9, "noise_cos": 0.1, "embedding_weight": 5.0, "embedding_share": 1.0, "accumulate": 2}
KNOBS |= {"embedding_path": "gumbel", "embedding_form": "log", "beta2": 0.5, "warmup": 1, "seed": 1}


@pytest.mark.parametrize("field", KNOBS)
def test_each_knob_matters(plain, train, field):
    assert not same_weights(plain(3), train("changed", steps=3, **{field: KNOBS[field]}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(train, store, tmp_path, optimizer):
    """The state after a last step that is skipped is the state before it."""
    settings = {"steps": 3, "log_every": 1, "optimizer": optimizer, "save_every": 2}
    run, skipped = open_run("r", tmp_path), train("r", Faulty(store, lambda count: count == 2), **settings)
    assert [line.get("skipped", 0) for line in run.metrics("transformer")] == [0, 0, 1]
    assert run.metrics("transformer")[2]["nll"] is None and run.summary()["skipped_steps"] == {"transformer": 1}
    digests = set()
    for step in (2, 3):  # the learning rate of both is the highest
        state, _ = load_checkpoint(run.path / "checkpoints" / f"transformer-0000000{step}.safetensors")
        save_checkpoint(tmp_path / "state", state, {})
        with safe_open(tmp_path / "state", framework="pt") as stream:
            digests.add(stream.metadata()["sha256"])
    assert len(digests) == 1
    assert all(torch.isfinite(x).all() for x in skipped.state_dict().values())


def test_what_is_never_finite_ends_the_training_and_keeps_the_last_checkpoint(train, store, tmp_path):
    with pytest.raises(ClipgenError, match="not finite at 10 steps in a row before step 13"):
        train("r", Faulty(store, lambda count: count >= 3), steps=40, log_every=1)
    for path in (tmp_path / "r" / "checkpoints").iterdir():
        assert all(torch.isfinite(x).all() for x in load_checkpoint(path)[0]["model"].values())


def test_compiled_training_is_the_plain_one(train, recwarn):
    settings = {"steps": 2, "precision": "no", "optimizer": "adamw", "embedding_weight": 0.0, "layers": 1}
    assert_compiled_is_plain(lambda compile: train(f"r{compile}", compile=compile, **settings), recwarn)


def test_a_step_function_of_ones_own(preset, store, frozen, tmp_path):
    seen = []

    def counted(model, frozen, batch, config):
        seen.append(len(batch.tokens))
        return transformer_step(model, frozen, batch, config)

    arguments = (replace(open_run("own", tmp_path), seed=1), (store, store), preset, frozen)
    train_transformer(*arguments, step_of=counted)
    assert seen == [preset.transformer_train.batch_size] * preset.transformer_train.steps
    with pytest.raises(ClipgenError, match="belongs to another training .differs in step."):
        train_transformer(*arguments)
    for wrong in (lambda *_: torch.ones(()), lambda *_: (torch.ones((), requires_grad=True), {}), lambda *_: "loss"):
        with pytest.raises(ClipgenError, match="step_of returned something else"):
            train_transformer(replace(arguments[0], path=tmp_path / "wrong"), *arguments[1:], step_of=wrong)
