import os
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Killed, assert_compiled_is_plain, same_weights

from clipgen_lib.runtime.checkpoints import load_checkpoint
from clipgen_lib.runtime.runs import ClipgenError, Stopped, open_run
from clipgen_lib.store import extract
from clipgen_lib.train_transformer import (
    Frozen,
    NLLAndLogits,
    drop_condition,
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
        return train_transformer(run, own or store, store, wanted, frozen)

    return call


@pytest.fixture
def train(train_in, tmp_path):
    return partial(train_in, tmp_path)


@pytest.fixture(scope="module")
def whole(train_in, tmp_path_factory):
    """What an uninterrupted training gives."""
    return train_in(tmp_path_factory.mktemp("whole"), "whole")


@pytest.fixture(scope="module")
def short(train_in, tmp_path_factory):
    """What three steps give."""
    return train_in(tmp_path_factory.mktemp("short"), "short", steps=3)


class Faulty:
    """A store that calls `fault(n)` with the n-th batch, from 0; where that returns True the embeddings are NaN."""

    def __init__(self, store, fault):
        self.store, self.fault, self.count = store, fault, -1
        self.meta, self.mean_embed = store.meta, store.mean_embed

    def __len__(self):
        return len(self.store)

    def tokens(self, rows):
        self.count += 1
        return self.store.tokens(rows)

    def embeds(self, rows):
        return self.store.embeds(rows) * (float("nan") if self.fault(self.count) else 1.0)


def dies_after(steps):
    def fault(count):
        if count == steps:
            raise Killed

    return fault


def stops_at(step):
    return lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == step else None


def steps_kept(run):
    return sorted(int(path.stem.rpartition("-")[2]) for path in (run.path / "checkpoints").glob("*-*.safetensors"))


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


def test_condition_dropout_zeroes_whole_rows():
    uniform = torch.rand(10_000, 1, generator=torch.Generator().manual_seed(0))
    kept = drop_condition(torch.ones(10_000, 4), 0.1, uniform)
    assert set(kept.sum(1).tolist()) == {0.0, 4.0} and abs((kept[:, 0] == 0).float().mean().item() - 0.1) < 0.01


@pytest.fixture
def batch_of(store, preset):
    """The first 16 rows of the store as a batch, with a config in float32."""

    def make(**changes):
        config = replace(preset.transformer_train, precision="no", embedding_share=0.25, **changes)
        rows, rng = slice(0, 16), torch.Generator().manual_seed(3)
        return make_batch(store.tokens(rows), store.embeds(rows), torch.zeros(store.meta["D"]), config, rng), config

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


def test_forms_and_paths_of_the_embedding_loss(vqgan, clip):
    torch.manual_seed(0)
    logits, embeds = torch.randn(2, 64, 32), clip.texts(["a red circle", "a blue star"])
    cosine = 1 - embedding_loss(logits, embeds, vqgan, clip)
    assert torch.allclose(embedding_loss(logits, embeds, vqgan, clip, form="log"), -((1 + cosine) / 2).log(), atol=1e-5)
    sharp = F.one_hot(logits.argmax(-1), 32) * 200.0  # so sure that sampling takes the likeliest
    sampled = embedding_loss(sharp, embeds, vqgan, clip, path="gumbel")
    assert torch.allclose(sampled, embedding_loss(sharp, embeds, vqgan, clip), atol=1e-5)
    for settings in ({}, {"path": "gumbel", "form": "log"}):  # gradients reach the logits and nothing else
        leaf = logits.clone().requires_grad_()
        embedding_loss(leaf, embeds, vqgan, clip, **settings).mean().backward()
        assert (leaf.grad.abs().sum((1, 2)) > 0).all()
        assert all(p.grad is None for module in (vqgan, clip) for p in module.parameters())


def test_descending_the_embedding_loss_lowers_the_clip_distance(vqgan, clip):
    """Following the gradient brings the decoded image nearer to the prompt."""
    logits = torch.zeros(2, 64, 32).normal_(std=0.1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    embeds = clip.texts(["a large red circle", "a blue star"])
    optimizer, distances = torch.optim.Adam([logits], lr=0.1), []
    for _ in range(15):
        loss = embedding_loss(logits, embeds, vqgan, clip).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distances.append(loss.item())
    assert min(distances) < distances[0] - 0.02, distances[::8]


def test_validation_losses_are_means_over_rows(store, transformer, frozen):
    found = validation_losses(transformer, store, frozen, rows=5)
    tokens, embeds = store.tokens(slice(0, 5)), store.embeds(slice(0, 5))
    logits = transformer(embeds, tokens)
    assert found["nll"] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item(), rel=1e-5)
    assert found["embedding_loss"] == pytest.approx(embedding_loss(logits, embeds, *frozen[:2]).mean().item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------- training


def test_resumed_is_uninterrupted(whole, train, store, tmp_path):
    run = open_run("parts", tmp_path)
    with pytest.raises(Killed):
        train("parts", Faulty(store, dies_after(5)))
    assert steps_kept(run) == [3]
    assert same_weights(whole, train("parts"))
    assert [line["step"] for line in run.metrics("transformer")] == [2, 4, 6]


def test_a_signal_saves_first_and_the_rest_is_the_same(whole, train, store, tmp_path):
    run = open_run("parts", tmp_path)
    with pytest.raises(Stopped, match="SIGTERM after step 4 of the transformer") as stopped:
        train("parts", Faulty(store, stops_at(3)))
    assert stopped.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert steps_kept(run) == [3, 4]
    assert same_weights(whole, train("parts"))


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_checkpoint_falls_back_on_the_one_before(whole, train, store, tmp_path, damage):
    run = open_run("parts", tmp_path)
    with pytest.raises(Killed):
        train("parts", Faulty(store, dies_after(5)), save_every=2)
    last = run.path / "checkpoints" / "transformer-00000004.safetensors"
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content if damage == "changed" else content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"transformer-00000004.*resumes from step 2"):
        assert same_weights(whole, train("parts", save_every=2))
    assert 6 in steps_kept(run) and len(list(run.path.glob("checkpoints/*.damaged"))) == 1
    for path in (run.path / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ClipgenError, match="is damaged"):
        train("parts")


class WithoutWords:
    """A set of images or a CLIP whose captions and text encoder cannot be reached."""

    def __init__(self, whole):
        self._whole = whole

    def __getattr__(self, name):
        assert name not in ("captions", "has_captions", "texts", "tokenizer", "encode_text"), f"{name} was asked for"
        return getattr(self._whole, name)

    def __bool__(self):
        return True

    def __len__(self):
        return len(self._whole)

    def __getitem__(self, row):
        return self._whole[row]


def test_training_is_language_free(images, preset, clip, tmp_path):
    """Captions and the text encoder are taken away; every step of training still runs."""
    images, clip, run = WithoutWords(images), WithoutWords(clip), open_run("r", tmp_path)
    vqgan = train_vqgan(run, images, images, preset, clip)
    store = extract(images, vqgan, clip, tmp_path / "fresh")
    train_transformer(run, store, store, preset, Frozen(vqgan, clip))


@pytest.mark.parametrize(
    "field, value",
    [
        ("condition_dropout", 0.9),
        ("noise_cos", 0.1),
        ("embedding_weight", 5.0),
        ("embedding_share", 1.0),
        ("embedding_path", "gumbel"),
        ("embedding_form", "log"),
        ("beta2", 0.5),
        ("accumulate", 2),
        ("warmup", 1),
    ],
)
def test_each_knob_matters(short, train, field, value):
    assert not same_weights(short, train("changed", steps=3, **{field: value}))


def test_centring_takes_off_the_means_it_is_given(train, store, vqgan, clip):
    with pytest.raises(ClipgenError, match="mean off text embeddings"):
        train("a", steps=2, centre=True)
    text_mean = clip.texts(["a red circle", "a blue star"]).mean(0)
    centred, plain = train("b", frozen=Frozen(vqgan, clip, text_mean), steps=2, centre=True), train("c", steps=2)
    assert torch.equal(centred.text_mean, text_mean)
    assert torch.allclose(centred.image_mean, store.embeds(slice(None)).mean(0), atol=1e-6)
    assert not torch.equal(plain.condition.weight, centred.condition.weight)
    assert not plain.image_mean.any() and not plain.text_mean.any()


def same_states(a, b, but):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_states(a[key], b[key], but) for key in a if key != but)
    if isinstance(a, list):
        return len(a) == len(b) and all(same_states(x, y, but) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(train, store, tmp_path, optimizer):
    """The state after a last step that is skipped is the state before it."""
    settings = {"steps": 3, "log_every": 1, "optimizer": optimizer, "save_every": 2}
    run, skipped = open_run("r", tmp_path), train("r", Faulty(store, lambda count: count == 2), **settings)
    assert [line.get("skipped", 0) for line in run.metrics("transformer")] == [0, 0, 1]
    assert run.metrics("transformer")[2]["nll"] is None and run.summary()["skipped_steps"] == {"transformer": 1}
    paths = [run.path / "checkpoints" / f"transformer-0000000{step}.safetensors" for step in (2, 3)]
    before, after = (load_checkpoint(path)[0] for path in paths)
    assert same_states(before, after, but="lr")
    assert all(torch.isfinite(x).all() for x in skipped.state_dict().values())


def test_what_is_never_finite_ends_the_training_and_keeps_the_last_checkpoint(train, store, tmp_path):
    with pytest.raises(ClipgenError, match="not finite at 10 steps in a row before step 13"):
        train("r", Faulty(store, lambda count: count >= 3), steps=40, log_every=1)
    for path in (tmp_path / "r" / "checkpoints").iterdir():
        assert all(torch.isfinite(x).all() for x in load_checkpoint(path)[0]["model"].values())


def test_compiled_training_is_the_plain_one(train, recwarn):
    settings = {"steps": 2, "precision": "no", "optimizer": "adamw", "embedding_weight": 0.0, "layers": 1}
    assert_compiled_is_plain(lambda compile: train(f"r{compile}", compile=compile, **settings), recwarn)
