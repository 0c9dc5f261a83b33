import os
import resource
import signal
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from clipgen_lib import train_transformer as train
from clipgen_lib import training as loop
from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.data.batches import batch_rows
from clipgen_lib.data.datasets import ImageSet
from clipgen_lib.runtime.checkpoints import load_checkpoint
from clipgen_lib.runtime.runs import ClipgenError, Stopped, open_run
from clipgen_lib.store import extract
from clipgen_lib.training import learning_rate
from clipgen_lib.transformer import Head, ImageTransformer
from clipgen_lib.vqgan import VQGAN


def test_learning_rate_by_hand():
    assert learning_rate(0, 100, 1.0, 10) == pytest.approx(0.1)
    assert learning_rate(9, 100, 1.0, 10) == pytest.approx(1.0)
    assert learning_rate(55, 100, 1.0, 10, floor=0.0) == pytest.approx(0.5)
    assert learning_rate(100, 100, 1.0, 10, floor=0.02) == pytest.approx(0.02)


def test_every_row_once_an_epoch():
    rows = [int(r) for step in range(10) for r in batch_rows(20, 4, seed=1, step=step)]
    assert sorted(rows[:20]) == sorted(rows[20:]) == list(range(20)) and rows[:20] != rows[20:]


@pytest.fixture
def store(images, vqgan, clip, tmp_path):
    return extract(images, vqgan, clip, tmp_path / "store", batch_size=16)


class Killed(BaseException):
    """Stands for a kill signal: nothing of ours catches it."""


def stage_one(run, images, preset, clip, **changes):
    return train.train_vqgan(run, images, images, preset.vqgan, replace(preset.vqgan_train, **changes), clip, seed=1)


def stage_two(run, store, preset, vqgan, clip, **changes):
    return train.train_transformer(
        run, store, store, preset.transformer, replace(preset.transformer_train, **changes), vqgan, clip, seed=1
    )


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def kill_after(monkeypatch, steps):
    """Let the training take `steps` steps, then kill it."""
    real, count = loop.Log.valid, []

    def valid(self, *args):
        if len(count) == steps:
            raise Killed
        count.append(1)
        return real(self, *args)

    monkeypatch.setattr(loop.Log, "valid", valid)


def test_stage_one_resumed_is_uninterrupted(images, preset, clip, tmp_path, monkeypatch):
    whole = stage_one(open_run("whole", tmp_path), images, preset, clip)
    run = open_run("parts", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 4)
        stage_one(run, images, preset, clip)
    assert steps_kept(run) == [3]
    assert same_weights(whole, stage_one(run, images, preset, clip))
    assert [line["step"] for line in run.metrics("vqgan")] == [2, 4, 6]


def test_stage_two_resumed_is_uninterrupted(store, preset, vqgan, clip, tmp_path, monkeypatch):
    whole = stage_two(open_run("whole", tmp_path), store, preset, vqgan, clip)
    run = open_run("parts", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 5)
        stage_two(run, store, preset, vqgan, clip)
    assert same_weights(whole, stage_two(run, store, preset, vqgan, clip))
    assert [line["step"] for line in run.metrics("transformer")] == [2, 4, 6]


def test_a_signal_saves_first_and_the_rest_is_the_same(store, preset, vqgan, clip, tmp_path, monkeypatch):
    whole = stage_two(open_run("whole", tmp_path), store, preset, vqgan, clip)
    run, real, count = open_run("parts", tmp_path), loop.Log.valid, []

    def valid(self, *args):
        count.append(1)
        if len(count) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    with (
        monkeypatch.context() as patch,
        pytest.raises(Stopped, match="SIGTERM after step 4 of the transformer") as stopped,
    ):
        patch.setattr(loop.Log, "valid", valid)
        stage_two(run, store, preset, vqgan, clip)
    assert stopped.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert steps_kept(run) == [3, 4]
    assert same_weights(whole, stage_two(run, store, preset, vqgan, clip))


def steps_kept(run):
    return sorted(int(path.stem.rpartition("-")[2]) for path in (run.path / "checkpoints").glob("*-*.safetensors"))


def test_the_last_checkpoints_and_the_best_stay(store, preset, vqgan, clip, tmp_path, monkeypatch):
    scores = iter([0.9, 0.2, 0.5, 0.4, 0.3, float("nan")])
    monkeypatch.setattr(train, "validation_losses", lambda *_: {"nll": next(scores)})
    run = open_run("r", tmp_path)
    stage_two(run, store, preset, vqgan, clip, save_every=1)
    assert steps_kept(run) == [2, 5, 6]
    assert [load_checkpoint(path)[1]["score"] for path in sorted((run.path / "checkpoints").iterdir())] == [
        0.2,
        0.3,
        None,
    ]


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
def test_the_best_weights_can_take_the_place_of_the_last(
    stage, images, store, preset, vqgan, clip, tmp_path, monkeypatch
):
    scores = {
        "vqgan": iter([{"l1": 0, "l2": x} for x in (3.0, 1.0, 2.0)]),
        "transformer": iter([{"nll": x} for x in (3.0, 1.0, 2.0)]),
    }
    monkeypatch.setattr(train, "validation_losses", lambda *_: next(scores["transformer"]))
    monkeypatch.setattr(train, "validation_reconstruction", lambda *_: next(scores["vqgan"]))
    run, kind = open_run("r", tmp_path), {"vqgan": VQGAN, "transformer": ImageTransformer}[stage]
    (
        stage_one(run, images, preset, clip, save_every=2)
        if stage == "vqgan"
        else stage_two(run, store, preset, vqgan, clip, save_every=2)
    )
    last, config = kind.load(run.path / stage), (run.path / stage / "config.json").read_text()
    assert train.take_best(run, stage) == {"step": 4, "score": 1.0}
    state, _ = load_checkpoint(run.path / "checkpoints" / f"{stage}-00000004.safetensors")
    taken = kind.load(run.path / stage)
    assert all(torch.equal(x, taken.state_dict()[key]) for key, x in state["ema"]["module"].items())
    assert not same_weights(last, taken) and (run.path / stage / "config.json").read_text() == config
    for path in (run.path / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(ClipgenError, match="holds no checkpoint"):
        train.take_best(run, stage)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_checkpoint_falls_back_on_the_one_before(store, preset, vqgan, clip, tmp_path, monkeypatch, damage):
    whole = stage_two(open_run("whole", tmp_path), store, preset, vqgan, clip)
    run = open_run("parts", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 5)
        stage_two(run, store, preset, vqgan, clip, save_every=2)
    last = run.path / "checkpoints" / "transformer-00000004.safetensors"
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content if damage == "changed" else content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"transformer-00000004.*goes on from step 2"):
        assert same_weights(whole, stage_two(run, store, preset, vqgan, clip, save_every=2))
    assert 6 in steps_kept(run)
    for path in (run.path / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ClipgenError, match="damaged or not one of ours"):
        stage_two(run, store, preset, vqgan, clip)


def test_damaged_checkpoints_take_no_place_of_what_a_signal_saves(store, preset, vqgan, clip, tmp_path, monkeypatch):
    """The last two cut: the third from the end is resumed, and a stop one step later is not pruned in favour of those."""
    monkeypatch.setattr(train, "validation_losses", lambda *_: {"nll": 1.0})  # the first of equal scores is the best
    run, real, count = open_run("r", tmp_path), loop.Log.valid, []
    stage_two(run, store, preset, vqgan, clip, save_every=2)
    assert steps_kept(run) == [2, 4, 6]
    for step in (4, 6):
        (run.path / "checkpoints" / f"transformer-{step:08d}.safetensors").write_bytes(b"cut")

    def valid(self, *args):
        count.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(self, *args)

    monkeypatch.setattr(loop.Log, "valid", valid)
    with pytest.warns(UserWarning, match="goes on from step 2"), pytest.raises(Stopped, match="after step 3"):
        stage_two(run, store, preset, vqgan, clip, save_every=2)
    assert steps_kept(run) == [2, 3]
    assert len(list(run.path.glob("checkpoints/*.damaged"))) == 2


def test_a_full_disk_keeps_the_checkpoint_before(store, preset, vqgan, clip, tmp_path, monkeypatch):
    """A limit on the size of files stands for the end of the disk: writing fails in the same place and way."""
    whole = stage_two(open_run("whole", tmp_path), store, preset, vqgan, clip)
    run, real = open_run("parts", tmp_path), loop.TrainingState.save

    def save(self, step, *args):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if step == 6 else limits[0], limits[1]))
        try:
            real(self, step, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with (
        monkeypatch.context() as patch,
        pytest.raises(ClipgenError, match="no room for .*transformer-00000006.*goes on"),
    ):
        patch.setattr(loop.TrainingState, "save", save)
        stage_two(run, store, preset, vqgan, clip)
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["transformer-00000003.safetensors"]
    assert same_weights(whole, stage_two(run, store, preset, vqgan, clip))


def test_another_configuration_is_refused(images, preset, clip, tmp_path):
    run = open_run("r", tmp_path)
    stage_one(run, images, preset, clip)
    with pytest.raises(ClipgenError, match=r"differs in train\.lr"):
        stage_one(run, images, preset, clip, lr=0.5)
    stage_one(run, images, preset, clip, log_every=1)  # how it is logged may change


def test_training_is_language_free(images, preset, clip, vqgan, store, tmp_path, monkeypatch):
    """Captions and the text encoder are taken away; every step of training still runs."""

    def forbidden(*args, **kwargs):
        raise AssertionError("a caption was asked for")

    monkeypatch.setattr(ImageSet, "captions", property(forbidden))
    monkeypatch.setattr(ClipEmbedder, "texts", forbidden)
    monkeypatch.setattr(clip.model, "encode_text", forbidden)
    trained = stage_one(open_run("a", tmp_path), images, preset, clip)
    fresh = extract(images, trained, clip, tmp_path / "fresh")
    stage_two(open_run("b", tmp_path), fresh, preset, trained, clip)


def test_stage_one_learns_and_logs_its_health(images, preset, clip, tmp_path):
    run = open_run("r", tmp_path)
    stage_one(run, images, preset, clip, steps=40, batch_size=8, lr=2e-3, adversarial_ramp=(0.3, 0.6))
    lines = run.metrics("vqgan")
    assert lines[-1]["l1"] < 0.7 * lines[0]["l1"]
    wanted = {
        "perceptual",
        "codebook_loss",
        "commitment_loss",
        "psnr",
        "perplexity",
        "codebook_usage",
        "generator_gradient",
        "discriminator_gradient",
        "discriminator",
        "lr",
    }
    assert wanted <= lines[0].keys() and "adversarial" not in lines[0] and "adaptive_weight" in lines[-1]


@pytest.mark.parametrize(
    "field, value",
    [
        ("perceptual_weight", 5.0),
        ("l1_weight", 3.0),
        ("l2_weight", 9.0),
        ("beta", 3.0),
        ("accumulate", 2),
        ("flip", True),
        ("random_crop", True),
        ("clip_norm", 1e-3),
        ("weight_decay", 5.0),
        ("ema_decay", 0.0),
        ("precision", "no"),
        ("discriminator_lr", 0.1),
        ("optimizer", "adamw"),
        ("adaptive_max", 0.0),
        ("adversarial_weight", 9.0),
    ],
)
def test_each_knob_of_stage_one_matters(preset, clip, tmp_path, field, value):
    rng = np.random.default_rng(0)
    for i in range(8):  # not square, so that crops differ
        path = tmp_path / "photos" / "train" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((96, 64)).save(path)
    images = ImageSet("photos", "train", tmp_path, sorted((tmp_path / "photos").rglob("*.png")), 64)
    steps = {"steps": 3, "adversarial_ramp": (0.0, 0.1), "adversarial_weight": 1.0, "save_every": 9}
    plain = stage_one(open_run("plain", tmp_path), images, preset, clip, **steps)
    assert not same_weights(
        plain, stage_one(open_run("changed", tmp_path), images, preset, clip, **{**steps, field: value})
    )


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
def test_each_knob_of_stage_two_matters(store, preset, vqgan, clip, tmp_path, field, value):
    plain = stage_two(open_run("plain", tmp_path), store, preset, vqgan, clip, steps=3)
    assert not same_weights(
        plain, stage_two(open_run("changed", tmp_path), store, preset, vqgan, clip, steps=3, **{field: value})
    )


def test_noise_meets_its_cosine():
    draw = torch.Generator().manual_seed(0)
    embeds = torch.nn.functional.normalize(torch.randn(4000, 64, generator=draw), dim=1)
    uniform, noise = torch.rand(4000, 1, generator=draw), torch.randn(4000, 64, generator=draw)
    noised = train.noise_embeds(embeds, 0.3, uniform, noise)
    cosine = (noised * embeds).sum(1)
    assert torch.allclose(noised.norm(dim=1), torch.ones(4000), atol=1e-5)
    assert cosine.min() > 0.299 and cosine.max() < 1.001 and abs(cosine.mean().item() - 0.65) < 0.01
    assert train.noise_embeds(embeds, 1.0, uniform, noise) is embeds


def test_condition_dropout_zeroes_whole_rows():
    kept = train.drop_condition(
        torch.ones(10_000, 4), 0.1, torch.rand(10_000, 1, generator=torch.Generator().manual_seed(0))
    )
    assert set(kept.sum(1).tolist()) == {0.0, 4.0} and abs((kept[:, 0] == 0).float().mean().item() - 0.1) < 0.01


def test_embedding_loss_reaches_the_logits_only(vqgan, clip):
    logits = torch.randn(2, 64, 32, requires_grad=True)
    embeds = clip.texts(["a red circle", "a blue star"])
    train.embedding_loss(logits, embeds, vqgan, clip).backward()
    assert (logits.grad.abs().sum((1, 2)) > 0).all()
    assert all(p.grad is None for p in [*vqgan.parameters(), *clip.parameters()])


def test_embedding_loss_is_the_measured_distance(vqgan, clip):
    """Its value is that of decoding the likeliest tokens and embedding the image, done by hand."""
    logits, embeds = torch.randn(3, 64, 32), clip.texts(["a red circle", "a blue star", "a cross"])
    pictures = vqgan.decode_codes(vqgan.quantizer.lookup(logits.argmax(-1).view(3, 8, 8)))
    wanted = 1 - (clip.images(pictures) * embeds).sum(1).mean()
    assert train.embedding_loss(logits, embeds, vqgan, clip).item() == pytest.approx(wanted.item(), abs=1e-5)


def test_forms_and_paths_of_the_embedding_loss(vqgan, clip):
    torch.manual_seed(0)
    logits, embeds = torch.randn(2, 64, 32), clip.texts(["a red circle", "a blue star"])
    cosine = 1 - train.embedding_loss(logits[:1], embeds[:1], vqgan, clip)
    assert train.embedding_loss(logits[:1], embeds[:1], vqgan, clip, form="log").item() == pytest.approx(
        -np.log((1 + cosine.item()) / 2), abs=1e-5
    )
    sharp = torch.nn.functional.one_hot(logits.argmax(-1), 32) * 200.0  # so sure that sampling takes the likeliest
    assert train.embedding_loss(sharp, embeds, vqgan, clip, path="gumbel").item() == pytest.approx(
        train.embedding_loss(sharp, embeds, vqgan, clip).item(), abs=1e-5
    )
    leaf = logits.clone().requires_grad_()
    train.embedding_loss(leaf, embeds, vqgan, clip, path="gumbel", form="log").backward()
    assert leaf.grad.abs().sum() > 0
    assert all(p.grad is None for module in (vqgan, clip) for p in module.parameters())


def test_centring_takes_off_the_means_it_is_given(store, preset, vqgan, clip, tmp_path):
    config = replace(preset.transformer_train, steps=2, centre=True)
    arguments = (store, store, preset.transformer, config, vqgan, clip, 1)
    with pytest.raises(ClipgenError, match="mean off text embeddings"):
        train.train_transformer(open_run("a", tmp_path), *arguments)
    text_mean = clip.texts(["a red circle", "a blue star"]).mean(0)
    centred = train.train_transformer(open_run("b", tmp_path), *arguments, text_mean=text_mean)
    assert torch.equal(centred.text_mean, text_mean)
    assert torch.allclose(centred.image_mean, store.embeds(slice(None)).mean(0), atol=1e-6)
    plain = stage_two(open_run("c", tmp_path), store, preset, vqgan, clip, steps=2)
    assert not torch.equal(plain.condition.weight, centred.condition.weight)
    assert not plain.image_mean.any() and not plain.text_mean.any()


def test_descending_the_embedding_loss_lowers_the_clip_distance(vqgan, clip):
    """Following the gradient brings the decoded image nearer to the prompt, and another prompt's no less far."""
    logits = torch.zeros(2, 64, 32).normal_(std=0.1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    embeds = clip.texts(["a large red circle", "a blue star"])
    optimizer, distances = torch.optim.Adam([logits], lr=0.1), []
    for _ in range(40):
        loss = train.embedding_loss(logits, embeds, vqgan, clip)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distances.append(loss.item())
    assert min(distances) < distances[0] - 0.02, distances[::8]


class Waits(TorchDispatchMode):
    """Notes the operations for which a GPU would have to be waited for, those that bring a value or a size to Python."""

    kinds = ("_local_scalar_dense", "is_nonzero", "nonzero", "bincount", "_unique", "masked_select", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put_") else ()
        masked = any(x is not None and x.dtype == torch.bool for x in indices)
        self.found += [name] if masked or name.startswith(self.kinds) else []
        return function(*args, **(kwargs or {}))


def test_what_waits_is_noted():
    with Waits() as waits:
        x = torch.arange(3.0)
        x.sum().item(), bool(x.any()), x[x > 0], torch.bincount(x.long()), x.unique(), x[torch.tensor([1])]
    assert len(waits.found) == 5, waits.found


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
def test_no_step_waits_for_the_gpu(stage, images, store, preset, vqgan, clip, tmp_path, monkeypatch):
    """All that a step computes stays where it is until a line is logged, embedding loss and adaptive weight included."""
    monkeypatch.setattr(loop.Log, "write", lambda *_, **__: {})
    monkeypatch.setattr(train, "validation_losses", lambda *_: {"nll": 1.0})
    monkeypatch.setattr(train, "validation_reconstruction", lambda *_: {"l2": 1.0})
    monkeypatch.setattr(loop.TrainingState, "save", lambda *_: None)
    steps, real = [], loop.Averaged.update

    def update(self, module):
        steps.append(list(waits.found))
        real(self, module)

    monkeypatch.setattr(loop.Averaged, "update", update)
    with Waits() as waits:
        if stage == "vqgan":
            stage_one(
                open_run("r", tmp_path), images, preset, clip, steps=4, optimizer="adamw", adversarial_ramp=(0.0, 0.0)
            )
        else:
            stage_two(open_run("r", tmp_path), store, preset, vqgan, clip, steps=4, optimizer="adamw")
    assert len(steps) == 4 and steps[-1] == steps[0], f"{steps[-1][len(steps[0]) :]} after the first step"


def turn_bad(monkeypatch, bad):
    """Make the likelihood NaN at those steps, counted from 0."""
    real, calls = Head.forward, []

    def forward(self, x, targets=None):
        found = real(self, x, targets)
        if targets is None:
            return found
        calls.append(1)
        return found * (float("nan") if len(calls) - 1 in bad else 1.0)

    monkeypatch.setattr(Head, "forward", forward)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    store, preset, vqgan, clip, tmp_path, monkeypatch, optimizer
):
    """Without momentum, decay and EMA a training whose last step is skipped is the one that never took it."""
    settings = {"save_every": 9, "log_every": 1, "optimizer": optimizer, "ema_decay": 0.0, "noise_cos": 1.0}
    turn_bad(monkeypatch, {2})
    run = open_run(optimizer, tmp_path)
    skipped = stage_two(run, store, preset, vqgan, clip, steps=3, **settings)
    assert [line.get("skipped", 0) for line in run.metrics("transformer")] == [0, 0, 1]
    assert run.metrics("transformer")[2]["nll"] is None and run.summary()["skipped_steps"] == {"transformer": 1}
    state, _ = load_checkpoint(run.path / "checkpoints" / "transformer-00000003.safetensors")
    turn_bad(monkeypatch, set())
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        other = open_run(f"{optimizer}-two", tmp_path)
        stage_two(other, store, preset, vqgan, clip, steps=3, **{**settings, "save_every": 2})
    before, _ = load_checkpoint(other.path / "checkpoints" / "transformer-00000002.safetensors")
    for kind in ("model", "optimizer"):
        assert same_states(state[kind], before[kind], but="lr")
    assert all(torch.isfinite(x).all() for x in skipped.state_dict().values())


def same_states(a, b, but):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_states(a[key], b[key], but) for key in a if key != but)
    if isinstance(a, list):
        return len(a) == len(b) and all(same_states(x, y, but) for x, y in zip(a, b, strict=True))
    return a == b


def test_what_is_never_finite_ends_the_training_and_keeps_the_last_checkpoint(
    store, preset, vqgan, clip, tmp_path, monkeypatch
):
    run = open_run("r", tmp_path)
    turn_bad(monkeypatch, range(3, 99))  # three steps and a checkpoint, and then
    with pytest.raises(ClipgenError, match="not finite at 10 steps in a row before step 13"):
        stage_two(run, store, preset, vqgan, clip, steps=40, save_every=3, log_every=1)
    for path in (run.path / "checkpoints").iterdir():
        assert all(torch.isfinite(x).all() for x in load_checkpoint(path)[0]["model"].values())


def test_half_precision_without_a_gpu_is_one_sentence(images, preset, clip, tmp_path):
    with pytest.raises(ClipgenError, match="fp16 needs a GPU"):
        stage_one(open_run("r", tmp_path), images, preset, clip, precision="fp16")


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
def test_compiled_training_is_the_plain_one(stage, images, store, preset, vqgan, clip, tmp_path):
    settings, found = {"steps": 3, "precision": "no", "optimizer": "adamw"}, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for compiled in (False, True):
            run = open_run(f"{stage}-{compiled}", tmp_path)
            if stage == "vqgan":  # with the discriminator's say, for which the last layer is asked apart
                found.append(
                    stage_one(run, images, preset, clip, compile=compiled, adversarial_ramp=(0.0, 0.0), **settings)
                )
            else:
                found.append(
                    stage_two(run, store, preset, vqgan, clip, compile=compiled, embedding_weight=0.0, **settings)
                )
    if any("does not work on this machine" in str(w.message) for w in caught):
        pytest.skip("torch.compile does not work on this machine")
    for a, b in zip(*(module.state_dict().values() for module in found), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_machine_that_cannot_compile_says_so_and_trains(store, preset, vqgan, clip, tmp_path, monkeypatch):
    def no_compiler(function):
        def fail(*args):
            raise RuntimeError("no compiler")

        return fail

    plain = stage_two(open_run("plain", tmp_path), store, preset, vqgan, clip, steps=2)
    monkeypatch.setattr(loop.torch, "compile", no_compiler)
    with pytest.warns(UserWarning, match="torch.compile does not work on this machine"):
        other = stage_two(open_run("other", tmp_path), store, preset, vqgan, clip, steps=2, compile=True)
    assert same_weights(plain, other)
