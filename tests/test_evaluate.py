from dataclasses import replace

import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_frechet_distance

from clipgen_lib import evaluate
from clipgen_lib.config import SampleConfig
from clipgen_lib.data import open_images, ordered_batches
from clipgen_lib.evaluate import (
    BlurredStatistics,
    GaussianStatistics,
    choose_captions,
    evaluate_generator,
    evaluate_oracle,
    evaluate_vqgan,
    feature_network,
    frechet_distance,
    r_precision,
)
from clipgen_lib.images import to_float
from clipgen_lib.runs import ClipgenError
from clipgen_lib.sample import TextToImage


def gaussian(dim, seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(dim, dim))
    return rng.normal(size=dim), root @ root.T / dim


def test_frechet_closed_forms():
    mu, sigma = gaussian(12, 0)
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(mu, sigma, mu + 0.5, sigma) == pytest.approx(12 * 0.25)
    a, b = np.diag(np.arange(1.0, 13)), np.diag(np.arange(13.0, 1, -1))
    wanted = ((np.sqrt(np.diag(a)) - np.sqrt(np.diag(b))) ** 2).sum()
    assert frechet_distance(mu, a, mu, b) == pytest.approx(wanted)
    assert frechet_distance(mu, np.zeros((12, 12)), mu, a) == pytest.approx(np.trace(a))  # a singular covariance
    with pytest.raises(ClipgenError, match="one feature network"):
        frechet_distance(mu, sigma, mu[:5], sigma[:5, :5])


def test_frechet_equals_pytorch_fid():
    for seed in range(3):
        a, b = gaussian(40, seed), gaussian(40, seed + 10)
        assert frechet_distance(*a, *b) == pytest.approx(calculate_frechet_distance(*a, *b), rel=1e-6)


def test_streamed_statistics_are_those_of_numpy():
    features = torch.randn(103, 7) * 3 + 5
    statistics = GaussianStatistics()
    for part in features.split(20):
        statistics.add(part)
    mean, covariance = statistics.moments()
    assert np.allclose(mean, features.double().numpy().mean(0)) and np.allclose(covariance, np.cov(features.double().numpy().T))
    with pytest.raises(ClipgenError, match="NaN"):
        statistics.add(torch.full((1, 7), float("nan")))
    with pytest.raises(ClipgenError, match="at least 2"):
        GaussianStatistics().moments()


def test_damage_raises_the_distance(clip, world):
    """The same < soft < softer < noise; and the blur of FID-k brings sharp and soft pictures nearer."""
    images = open_images(world, "train")
    x = torch.cat([to_float(b) for _, b in ordered_batches(images, range(40), 40)])
    damaged = {"same": x, "soft": evaluate.blur(x, 1), "softer": evaluate.blur(x, 4), "noise": torch.rand_like(x) * 2 - 1}
    found = {name: BlurredStatistics(clip.features, (0, 8)) for name in damaged}
    for name, pictures in damaged.items():
        found[name].add(pictures)
    away = {name: statistics.distance(found["same"]) for name, statistics in found.items()}
    assert away["same"]["0"] == pytest.approx(0, abs=1e-3 * away["soft"]["0"])
    assert away["same"]["0"] < away["soft"]["0"] < away["softer"]["0"] < away["noise"]["0"]
    assert away["soft"]["8"] < away["soft"]["0"]


def test_networks_are_named_and_never_replaced(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ClipgenError, match="pt_inception-2015-12-05-6726825d.pth"):
        feature_network("inception", clip)
    with pytest.raises(ClipgenError, match="choose clip or inception"):
        feature_network("vgg", clip)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(feature_network("clip", clip)(x), clip.features(x))


def test_r_precision_from_perfect_to_chance():
    texts = [str(i) for i in range(300)]
    embeds = torch.nn.functional.normalize(torch.randn(300, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    assert r_precision(embeds, embeds, texts) == 1.0
    assert r_precision(embeds.roll(1, 0), embeds, texts) < 0.05
    assert r_precision(embeds, embeds, ["same"] * 150 + texts[150:]) == 1.0  # equal captions are no mistakes


def test_captions_are_chosen_by_seed(world):
    images = open_images(world, "val")
    few, again, other = choose_captions(images, 12, 0), choose_captions(images, 12, 0), choose_captions(images, 12, 1)
    assert few == again != other and sorted(row for row, _ in few) == list(range(12))
    everything = choose_captions(images, 1000, 0)
    assert len(everything) == 60 and all(text in images.captions[row] for row, text in everything)


@pytest.fixture
def generator(vqgan, transformer, clip):
    return TextToImage.from_parts(vqgan, transformer, clip, {"name": "shapes", "pretrained": None}, SampleConfig(guidance=2.0))


def test_the_whole_evaluation(generator, world, clip, preset):
    images = open_images(world, "val")
    config = replace(preset.evaluate, n=24, blur=(0, 1), batch_size=8)
    numbers, shown = evaluate_generator(generator, images, clip, config)
    assert numbers["n"] == 24 and numbers["n_reference"] == 12 and set(numbers["fid"]) == {"0", "1"}
    assert numbers["fid"]["0"] > numbers["floor"]["0"] > 0 and numbers["rfid"]["0"] > 0
    assert (
        numbers["caps_ceiling"] > numbers["caps_floor"] and numbers["r_precision_real"] > 0.3
    )  # two captions of one picture compete
    assert "also the conditioning CLIP" in numbers["judge"] and "12" in str(numbers["n_reference"])
    assert (
        len(numbers["warnings"]) == 3
        and "24 pictures for 256" in numbers["warnings"][0]
        and numbers["reference"] == "world/val"
    )
    assert len(shown["prompts"]) == len(shown["images"]) == 24
    guided, _ = evaluate_generator(generator, images, clip, config, guidance=5.0)
    assert guided["caps"] != numbers["caps"]


class Perfect(torch.nn.Module):
    """Draws exactly what it is asked for: the scenes of the prompts, in their order."""

    def __init__(self, clip, vqgan):
        super().__init__()
        self.vqgan = vqgan
        self.clip, self.device, self.calls = clip, torch.device("cpu"), 0

    def draw_each(self, prompts, seeds, **settings):
        from clipgen_lib import shapes
        from clipgen_lib.images import from_arrays

        kind = ("one", "two", "held_out", "one")[self.calls]
        self.calls += 1
        return from_arrays(np.stack([shapes.render(p.scene) for p in shapes.prompts(kind, len(seeds), 0)]))


def test_the_oracle_gives_a_perfect_generator_full_marks(clip, vqgan):
    scores = evaluate_oracle(Perfect(clip, vqgan), n=20)
    blind = scores["reconstruction"]["one"]  # an untrained tokenizer keeps nothing of the scenes
    assert blind["both"] < 0.3 and scores["reconstruction"]["two"]["both"] == 0.0
    assert scores["text"]["one"]["both"] == scores["text"]["two"]["relation"] == scores["image"]["one"]["shape"] == 1.0
    assert set(scores["text"]) == {"one", "two", "held_out"}


def test_the_oracle_is_not_fooled_by_an_untrained_one(generator):
    assert evaluate_oracle(generator, n=24)["text"]["one"]["both"] < 0.3


def test_psnr_by_hand(vqgan, world):
    images = open_images(world, "val")
    scores = evaluate_vqgan(vqgan, images)
    assert scores["n"] == 12 and 0 < scores["codebook_usage"] <= 1
    x = torch.cat([to_float(b) for _, b in ordered_batches(images, range(12), 12)])
    a, b = ((t.clamp(-1, 1) + 1) * 127.5 for t in (x, vqgan.decode(vqgan.encode(x))))
    wanted = (20 * torch.log10(255 / (a - b.round()).pow(2).mean((1, 2, 3)).sqrt())).mean()
    assert scores["psnr"] == pytest.approx(wanted.item(), abs=1e-3)
