import resource
from dataclasses import replace

import pytest
import torch
from conftest import Killed

from clipgen_lib.config import FitConfig, TransformerConfig, TransformerTrainConfig, VQGANConfig
from clipgen_lib.runtime.checkpoints import load_checkpoint, save_checkpoint
from clipgen_lib.runtime.runs import ClipgenError, open_run
from clipgen_lib.training import (
    Log,
    TrainingState,
    build_optimizer,
    fit,
    learning_rate,
    local_rows,
    moving_average,
    optimizer_step,
    step_seed,
)
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN

SMALL = VQGANConfig(image_size=16, patch=2, channels=8, channel_mult=(1, 1), z_channels=8, codebook_size=16)


def names_in(module, optimizer, chosen):
    listed = {id(p) for group in optimizer.param_groups if chosen(group) for p in group["params"]}
    return {name for name, p in module.named_parameters() if id(p) in listed}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_trained_parameter_once_and_decay_where_it_belongs(kind):
    for module in (VQGAN(SMALL), ImageTransformer(TransformerConfig(2, 8, 2), 16, 4, 8)):
        optimizer = build_optimizer(module, kind, 1e-3, 0.9, 0.1)
        listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in module.parameters() if p.requires_grad)
        for name in (spared := names_in(module, optimizer, lambda group: group["weight_decay"] == 0)):
            assert module.get_parameter(name).ndim < 2 or "codebook" in name or "positions" in name
        assert {name for name, p in module.named_parameters() if p.ndim < 2} <= spared


def test_muon_steps_are_orthogonal_in_hidden_layers_only():
    torch.manual_seed(0)
    transformer = ImageTransformer(TransformerConfig(1, 8, 2), 16, 4, 8)
    optimizer = build_optimizer(transformer, "muon", 0.1, 0.9, 0.0)
    before = {n: p.detach().clone() for n, p in transformer.named_parameters()}
    for parameter in transformer.parameters():
        parameter.grad = torch.randn_like(parameter)
        if parameter.ndim == 2:  # a gradient far from orthogonal: each column a third of the one before
            parameter.grad *= 3.0 ** -torch.arange(parameter.shape[1])
    gradients = {n: p.grad.clone() for n, p in transformer.named_parameters()}
    optimizer.step()
    hidden = names_in(transformer, optimizer, lambda group: group["parts"])
    assert hidden == {f"blocks.0.{n}.weight" for n in ("qkv", "proj", "fc1", "fc2")}

    def spread(matrix):
        values = torch.linalg.svdvals(matrix)
        return (values[0] / values[4]).item()  # the largest to the fifth; further ones are lost in bfloat16

    for name in hidden:
        parameter = transformer.get_parameter(name)
        step = parameter.detach() - before[name]
        assert spread(step) < 0.2 * spread(gradients[name]), name
        # the scale of the arXiv 2502.16982 form is 0.2 lr, AdamW's first step on every entry is lr
        assert 0.01 < step.pow(2).mean().sqrt().item() < 0.04
    outer = (transformer.head.weight.detach() - before["head.weight"]).abs()
    assert outer.min() > 0.09 and outer.max() < 0.11


def test_muon_treats_fused_queries_keys_and_values_as_three_matrices_and_equal_shapes_at_once():
    rng = torch.Generator().manual_seed(0)
    fused = torch.nn.ModuleDict({"qkv": torch.nn.Linear(8, 24), "other": torch.nn.Linear(8, 24)})
    apart = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in "qkv"})
    whole = torch.nn.Linear(8, 24)
    with torch.no_grad():
        for part, layer in zip(fused.qkv.weight.chunk(3), apart.values(), strict=True):
            layer.weight.copy_(part)
        whole.weight.copy_(fused.other.weight)
    optimizers = [build_optimizer(module, "muon", 0.1, 0.9, 0.01) for module in (fused, apart, whole)]
    for _ in range(3):  # momentum too
        fused.qkv.weight.grad, fused.other.weight.grad = torch.randn(2, 24, 8, generator=rng)
        whole.weight.grad = fused.other.weight.grad.clone()
        for part, layer in zip(fused.qkv.weight.grad.chunk(3), apart.values(), strict=True):
            layer.weight.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    together = torch.cat([layer.weight for layer in apart.values()])
    assert torch.allclose(fused.qkv.weight, together, atol=1e-5)
    assert torch.allclose(fused.other.weight, whole.weight, atol=1e-5)
    assert not torch.allclose(fused.qkv.weight, fused.other.weight)


def test_unknown_optimizer_is_one_sentence():
    with pytest.raises(ClipgenError, match="choose adamw or muon"):
        build_optimizer(torch.nn.Linear(2, 2), "sgd", 1.0, 0.9, 0.0)


def test_learning_rate_by_hand():
    rates = [learning_rate(step, 100, 1.0, 10, floor=0.02) for step in (0, 9, 55, 100)]
    assert rates == pytest.approx([0.1, 1.0, 0.51, 0.02])


def test_seeds_differ_and_rows_cover_the_batch():
    assert len({step_seed(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (None, 0, 1)}) == 12
    assert local_rows(TransformerTrainConfig(batch_size=8, accumulate=2)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_moving_average_by_hand():
    module = torch.nn.BatchNorm1d(2)
    ema = moving_average(module, 0.9)
    for value in (1.0, 2.0):
        torch.nn.init.constant_(module.weight, value)
        module.running_mean.fill_(value)
        ema.update_parameters(module)
    assert torch.allclose(ema.module.weight, torch.full((2,), 0.9 * 1.0 + 0.1 * 2.0))  # the first update is copied
    assert ema.module.running_mean.tolist() == [2.0, 2.0] and not ema.module.training  # buffers always are
    assert not any(p.requires_grad for p in ema.parameters())


@pytest.fixture
def state(tmp_path):
    """The state of a training of one layer, in a folder of its own, saved after the given steps."""

    def make(name="r", seed=0, steps=(), **changes):
        model, run = torch.nn.Linear(200, 200), replace(open_run(name, tmp_path), seed=seed)
        made = TrainingState(run, "layer", FitConfig(**changes), {"model": model}, {"data": "x"})
        for step in steps:
            made.save(step, 1.0)
        return made

    return make


def kept(state):
    return [int(path.stem[-8:]) for path in state.paths()]


def test_the_last_checkpoints_and_the_best_stay(state):
    training = state()
    for step, score in enumerate([0.9, 0.2, 0.5, 0.4, 0.3, float("nan")], 1):
        training.save(step, score)
    assert kept(training) == [2, 5, 6]
    assert [load_checkpoint(path)[1]["score"] for path in training.paths()] == [0.2, 0.3, None]
    training.save(5)  # a stop right after a checkpoint leaves its score alone
    assert load_checkpoint(training.paths()[1])[1]["score"] == 0.3


def test_a_training_resumes_its_own_state_only(state):
    first, again = state(steps=[7]), state(log_every=1)  # how it is logged may change
    assert again.resume() == 7 and state("other").resume() == 0
    assert torch.equal(again.parts["model"].weight, first.parts["model"].weight)
    with pytest.raises(ClipgenError, match="belongs to another training .differs in seed, train.lr"):
        state(seed=1, lr=0.5).resume()
    content, meta = load_checkpoint(first.paths()[-1])  # as it was written by an earlier version
    del meta["training"]["version"]
    save_checkpoint(first.paths()[-1], content, meta)
    with pytest.raises(ClipgenError, match="belongs to another training .differs in version"):
        state().resume()


def test_damaged_checkpoints_are_set_aside_for_the_one_before(state):
    """One cut, one with another bit: the one before is resumed, and they take no place of one saved after it."""
    training = state(steps=[2, 4, 6])
    before, changed, cut = training.paths()
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    cut.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="resumes from step 2") as told:
        assert training.resume() == 2
    assert all(path.name in str(warning.message) for path, warning in zip((cut, changed), told, strict=True))
    training.save(3)
    assert kept(training) == [2, 3] and len(list(training.folder.glob("*.damaged"))) == 2
    for path in training.paths():
        path.write_bytes(b"")
    with pytest.raises(ClipgenError, match="is damaged"):
        training.resume()


def test_a_checkpoint_that_cannot_be_read_now_is_not_set_aside(state):
    """A link to itself stands for a disk that fails: the state before is not taken for it."""
    training = state(steps=[2, 4])
    last = training.paths()[-1].rename(training.folder / "aside")
    (link := training.folder / "layer-00000004.safetensors").symlink_to(link)
    with pytest.raises(ClipgenError, match="layer-00000004.safetensors cannot be read"):
        training.resume()
    last.rename(link)
    assert training.resume() == 4


def test_a_full_disk_keeps_the_checkpoint_before(state):
    """A limit on the size of files stands for the end of the disk: writing fails in the same place and way."""
    training, limits = state(steps=[3]), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ClipgenError, match="no room for .*layer-00000006"):
            training.save(6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in training.folder.iterdir()] == ["layer-00000003.safetensors"]


def test_log_lines_are_means_of_what_is_finite(tmp_path):
    log = Log(open_run("r", tmp_path), "layer", steps=99)
    for value in (1.0, 3.0, float("nan")):
        log.add(loss=torch.tensor(value))
    log.count(torch.tensor([0, 0, 1, 1]), 8)
    log.write(3, lr=0.5)
    (line,) = log.run.metrics("layer")
    wanted = {"loss": 2.0, "lr": 0.5, "codebook_usage": 0.25, "perplexity": 2.0}
    assert {key: line[key] for key in wanted} == pytest.approx(wanted) and line["step"] == 3


def test_gradients_are_clipped_and_a_step_that_is_not_finite_is_not_taken(tmp_path):
    log, weight = Log(open_run("r", tmp_path), "layer", steps=3), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def step(number, scale):
        loss = (weight * torch.tensor([3.0, 4.0])).sum() * scale
        loss.backward()
        log.add(loss=loss)
        return optimizer_step(log, number, 0.5, gradient=optimizer)

    for number, scale in enumerate((1.0, float("nan"), float("inf"))):
        assert step(number, scale) == (number == 0) and weight.grad is None
    assert log.scalars["gradient"][0].item() == pytest.approx(5.0) and log.skipped == 2
    with pytest.raises(
        ClipgenError, match="layer loss or its gradient was not finite at 3 steps in a row before step 4"
    ):
        step(3, float("nan"))
    assert torch.allclose(weight.detach(), torch.tensor([-0.3, -0.4]))


def test_fit_resumed_is_uninterrupted_and_learns(tmp_path, monkeypatch):
    def train(name, steps_before=99):
        torch.manual_seed(0)
        model, target = torch.nn.Linear(4, 4), torch.eye(4)

        def loss_of(step):
            if step == steps_before:
                raise Killed
            x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step))
            return (model(x) - x @ target).pow(2).mean(), {}

        run, config = open_run(name, tmp_path), FitConfig(steps=20, warmup=2, lr=0.05, log_every=5, save_every=4)
        fit(run, "layer", model, config, loss_of, {"data": "x"})
        return model, run.metrics("layer")

    whole, whole_lines = train("whole")
    assert whole_lines[-1]["loss"] < 0.3 * whole_lines[0]["loss"]
    with pytest.raises(Killed):
        train("parts", 10)
    parts, lines = train("parts")
    assert torch.equal(whole.weight, parts.weight) and [line["step"] for line in lines] == [5, 10, 15, 20]
    monkeypatch.setenv("CLIPGEN_TRACKER", "tensorboard")
    (tmp_path / "tracked").mkdir()
    (tmp_path / "tracked" / "tracker").touch()  # no folder can be made there
    with pytest.warns(UserWarning, match="tracker tensorboard failed .*in metrics.jsonl alone") as told:
        tracked, tracked_lines = train("tracked")
    assert torch.equal(whole.weight, tracked.weight) and tracked_lines == whole_lines and len(told) == 1
