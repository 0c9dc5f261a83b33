import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_frechet_distance
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd
from torchmetrics.multimodal.clip_score import CLIPScore

from clipgen_lib.data.batches import ordered_batches
from clipgen_lib.data.datasets import open_images
from clipgen_lib.data.images import to_float, to_uint8
from clipgen_lib.metrics.captions import caption_scores, clip_score, r_precision
from clipgen_lib.metrics.distances import (
    ClassSums,
    FeatureSample,
    GaussianStatistics,
    distance_speed,
    frechet_distance,
    frechet_over_n,
    kernel_distance,
    manifold_scores,
    reconstruction_scores,
)
from clipgen_lib.metrics.passes import CaptionFit
from clipgen_lib.runtime.runs import ClipgenError


def gaussian(dim, seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(dim, dim))
    return rng.normal(size=dim), root @ root.T / dim


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


class Identity(torch.nn.Module):
    """A stand-in network for torchmetrics: what it is given are the features already."""

    def forward(self, x):
        return x


# ---------------------------------------------------------------------------------------------- Frechet


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


def test_frechet_of_singular_and_nearly_singular_covariances():
    """Fewer rows than dimensions on one side, then on both: either order of the sets gives the same distance."""
    rng = np.random.default_rng(0)
    many, few, fewer = (np.cov(rng.normal(size=(n, 40)), rowvar=False) for n in (4_000, 20, 8))
    zero = np.zeros(40)
    for a, b in ((many, few), (few, fewer), (few + 1e-12 * np.eye(40), fewer)):
        assert frechet_distance(zero, a, zero, b) == pytest.approx(frechet_distance(zero, b, zero, a), rel=1e-5)
    assert frechet_distance(zero, few, zero, few) == pytest.approx(0, abs=1e-5 * np.trace(few))
    wanted = calculate_frechet_distance(zero, many, zero, few)
    assert frechet_distance(zero, many, zero, few) == pytest.approx(wanted, rel=1e-4)  # theirs loses digits here


def test_shifted_gaussians_from_samples():
    """Two samples of 20,000 from N(0, I) and N(1, 4 I): the distance is d * (1 + (2 - 1)^2)."""
    x, y = normal(20_000, 6), 2 * normal(20_000, 6, 1) + 1
    moments = []
    for z in (x, y):
        statistics = GaussianStatistics()
        statistics.add(z)
        moments += statistics.moments()
    assert frechet_distance(*moments) == pytest.approx(12, rel=0.02)


def test_frechet_equals_pytorch_fid():
    for seed in range(3):
        a, b = gaussian(40, seed), gaussian(40, seed + 10)
        assert frechet_distance(*a, *b) == pytest.approx(calculate_frechet_distance(*a, *b), rel=1e-6)


def test_frechet_equals_torchmetrics():
    theirs, ours = FrechetInceptionDistance(Identity(), input_img_size=(8,)).set_dtype(torch.float64), []
    for real in (True, False):
        x = normal(200, 8, int(real)).double() * (2 if real else 1)
        theirs.update(x, real=real)
        statistics = GaussianStatistics()
        statistics.add(x)
        ours += statistics.moments()
    assert frechet_distance(*ours) == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_speed_is_of_the_same_distance():
    found = distance_speed(dim=48)
    assert found["difference"] < 1e-6 and found["ratio"] > 0


def test_streamed_statistics_are_those_of_numpy():
    features = torch.randn(103, 7) * 3 + 5
    statistics, halves = GaussianStatistics(), [GaussianStatistics(), GaussianStatistics()]
    for part in features.split(20):
        statistics.add(part)
    for i, half in enumerate(halves):
        half.add(features[i::2])
    mean, covariance = statistics.moments()
    assert np.allclose(mean, features.double().numpy().mean(0)) and np.allclose(
        covariance, np.cov(features.double().numpy().T)
    )
    assert all(
        np.allclose(a, b) for a, b in zip(GaussianStatistics.union(halves).moments(), (mean, covariance), strict=True)
    )
    with pytest.raises(ClipgenError, match="NaN"):
        statistics.add(torch.full((1, 7), float("nan")))
    with pytest.raises(ClipgenError, match="at least 2"):
        GaussianStatistics().moments()


def test_fid_falls_with_n():
    """Two samples of one Gaussian: what is left is the bias of a small N."""
    reference = GaussianStatistics()
    reference.add(normal(4_000, 16))
    curve = frechet_over_n(normal(512, 16, 1), reference.moments())
    assert list(curve) == ["32", "64", "128", "256", "512"]
    assert list(curve.values()) == sorted(curve.values(), reverse=True) and curve["512"] < 0.2 * curve["32"]
    assert list(frechet_over_n(normal(40, 16), reference.moments())) == ["20", "40"]


# ---------------------------------------------------------------------------------------------- samples


def test_the_sample_is_bounded_and_the_same_for_all_batches():
    x = torch.arange(500.0)[:, None].repeat(1, 3)
    kept = []
    for batch in (7, 64, 500):
        sample = FeatureSample(size=100)
        for part in x.split(batch):
            sample.add(part)
        kept.append(sample.features())
    assert kept[0].shape == (100, 3) and all(torch.equal(kept[0], other) for other in kept)
    rows = kept[0][:, 0].numpy()
    assert len(set(rows)) == 100 and 180 < rows.mean() < 320 and not (np.diff(rows) > 0).all()
    assert abs(rows[:50].mean() - rows[50:].mean()) < 120  # the first ones are a sample too
    whole = FeatureSample(size=1_000)
    whole.add(x)
    assert sorted(whole.features()[:, 0].tolist()) == list(range(500))


# ---------------------------------------------------------------------------------------------- KID, IS


def test_kernel_distance_is_that_of_torchmetrics():
    real, fake = normal(60, 8), normal(50, 8, 1) + 0.3
    found = kernel_distance(real, fake)
    theirs = KernelInceptionDistance(Identity(), subsets=400, subset_size=25).set_dtype(torch.float64)
    theirs.update(real.double(), real=True)
    theirs.update(fake.double(), real=False)
    torch.manual_seed(0)
    mean, std = theirs.compute()
    assert found["subset_size"] == 25 and found["subsets"] == 100
    assert found["mean"] == pytest.approx(mean.item(), abs=4 * std.item() / 10) and found["std"] == pytest.approx(
        std.item(), rel=0.3
    )
    draw = np.random.default_rng([0, 31])
    first = [x[draw.choice(len(x), 25, replace=False)].double() for x in (real, fake)]
    assert kernel_distance(real, fake, subsets=1)["mean"] == poly_mmd(*first).item()


def test_kernel_distance_is_unbiased():
    values = [kernel_distance(normal(100, 4, 2 * i), normal(100, 4, 2 * i + 1), subsets=1)["mean"] for i in range(200)]
    assert (
        abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200) and min(values) < 0
    )  # the same Gaussian: 0 on average


@pytest.mark.parametrize("splits", [1, 5])
def test_inception_score_is_that_of_torchmetrics(monkeypatch, splits):
    logits, ours = 3 * normal(200, 10), ClassSums(splits)
    for part in logits.split(32):
        ours.add(part)
    theirs = InceptionScore(Identity(), splits=splits).set_dtype(torch.float64)
    theirs.update(logits.double())
    order = torch.cat([torch.arange(200)[i::splits] for i in range(splits)])  # their parts are runs of a shuffled order
    monkeypatch.setattr(torch, "randperm", lambda n: order)
    mean, std = theirs.compute()
    assert ours.score()["mean"] == pytest.approx(mean.item(), rel=1e-9)
    assert splits == 1 or ours.score()["std"] == pytest.approx(std.item(), rel=1e-9)


def test_inception_score_closed_forms():
    sure, unsure = ClassSums(2), ClassSums(2)
    sure.add(100 * torch.eye(8).repeat(4, 1))
    unsure.add(torch.zeros(32, 8))
    assert sure.score() == {
        "mean": pytest.approx(4.0),
        "std": pytest.approx(0.0),
        "splits": 2,
    }  # half of 8 classes in a part
    assert unsure.score()["mean"] == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------- manifolds


def by_hand(real, fake, k, k_density):
    """Precision, recall, density and coverage in plain loops over their definitions."""

    def radius(rows, i, k):
        return sorted(float((rows[i] - rows[j]).norm()) for j in range(len(rows)) if j != i)[k - 1]

    def inside(point, rows, radii):
        return [float((point - row).norm()) <= r for row, r in zip(rows, radii, strict=True)]

    near, wide = ([radius(real, i, kk) for i in range(len(real))] for kk in (k, k_density))
    fakes = [radius(fake, j, k) for j in range(len(fake))]
    counts = [inside(y, real, wide) for y in fake]
    return {
        "precision": np.mean([any(inside(y, real, near)) for y in fake]),
        "recall": np.mean([any(inside(x, fake, fakes)) for x in real]),
        "density": sum(map(sum, counts)) / (k_density * len(fake)),
        "coverage": np.mean([any(row[i] for row in counts) for i in range(len(real))]),
    }


@pytest.mark.parametrize("shift", [0.0, 1.0, 30.0])
def test_manifold_scores_by_hand(shift):
    real, fake = normal(23, 5).double(), 0.8 * normal(17, 5, 1).double() + shift
    found = manifold_scores(real, fake, chunk=7)
    assert found == pytest.approx(by_hand(real, fake, 3, 5))
    if shift == 30.0:
        assert set(found.values()) == {0.0}


def test_manifold_of_a_set_and_itself():
    x = normal(200, 6)
    found = manifold_scores(x, x)
    assert found["precision"] == found["recall"] == found["coverage"] == 1.0 and found["density"] == pytest.approx(
        1.0, abs=0.3
    )
    collapsed = manifold_scores(x, x[:10].repeat(20, 1) + 1e-3 * normal(200, 6, 1))
    assert collapsed["precision"] == 1.0 and collapsed["coverage"] < 0.5 and collapsed["recall"] < 0.2


# ---------------------------------------------------------------------------------------------- pairs


def test_psnr_and_ssim_by_hand():
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    y = (x + 0.1).clamp(-1, 1)
    found = reconstruction_scores(x, y)
    error = (to_uint8(x).double() - to_uint8(y).double()).pow(2).mean((1, 2, 3))
    assert torch.allclose(found["psnr"].double(), 20 * torch.log10(255 / error.sqrt()), atol=1e-4)
    assert found["ssim"].shape == (3,) and (found["ssim"] < 1).all()
    same = reconstruction_scores(x, x)
    assert torch.isinf(same["psnr"]).all() and torch.allclose(same["ssim"], torch.ones(3))


def test_captions_of_one_picture_are_not_each_others_rivals():
    """Five captions to an image, a perfect encoder: every image finds one of its own."""
    pictures = torch.nn.functional.normalize(torch.randn(20, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    embeds, owners = pictures.repeat(5, 1), list(range(20)) * 5
    texts = [f"caption {i}" for i in range(100)]
    assert r_precision(embeds, embeds, texts) < 0.5  # the same embedding is never above itself
    assert r_precision(embeds, embeds, texts, owners=owners) == 1.0
    scores = caption_scores(embeds, embeds, texts, owners=owners)
    assert scores["r_precision"] == 1.0 and scores["shuffled"] < 0.5


def test_r_precision_from_perfect_to_chance():
    texts = [str(i) for i in range(300)]
    embeds = torch.nn.functional.normalize(normal(300, 32), dim=1)
    assert r_precision(embeds, embeds, texts) == 1.0
    assert r_precision(embeds.roll(1, 0), embeds, texts) < 0.05
    assert r_precision(embeds, embeds, ["same"] * 150 + texts[150:]) == 1.0  # equal captions are no mistakes
    found = caption_scores(embeds, embeds, texts)
    assert found["caps"] == pytest.approx(1) and abs(found["shuffled"]) < 0.1


def test_clip_score_is_that_of_torchmetrics(clip, world):
    """The same CLIP behind the interface that torchmetrics knows."""

    class Model(torch.nn.Module):
        config = None

        def get_image_features(self, pixels):
            return clip.images(to_float(pixels))

        def get_text_features(self, ids, mask):
            return clip.texts(self.asked)

    model = Model()

    def processor(images=None, text=None, return_tensors="pt", padding=True):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        model.asked = text
        return {"input_ids": torch.zeros(1), "attention_mask": torch.ones(1)}

    images = open_images(world, "val")
    (_, batch), texts = next(ordered_batches(images, range(12), 12)), [c[0] for c in images.captions]
    theirs = CLIPScore(lambda: (model, processor))
    theirs.update(batch, texts)
    fit = CaptionFit(clip, dict(enumerate(texts)))
    rows = list(range(12))
    fit.add(rows, fit.find(rows, to_float(batch)))
    assert clip_score(fit.caps) == pytest.approx(theirs.compute().item(), rel=1e-6) and fit.caps > 0.5
    assert clip_score(-0.2) == 0.0


def test_sums_may_begin_in_inference_mode_and_go_on_outside():
    whole, parted, x = GaussianStatistics(), GaussianStatistics(), torch.randn(30, 5)
    whole.add(x[:20])
    whole.add(x[20:])
    with torch.inference_mode():
        parted.add(x[:20] * 1)
        again = GaussianStatistics()
        again.restore(parted.state())
    again.add(x[20:])
    assert all(np.array_equal(a, b) for a, b in zip(again.moments(), whole.moments(), strict=True))
    assert parted.n == 20 and torch.equal(parted.outer, x[:20].double().T @ x[:20].double()), (
        "what was restored from is as it was"
    )


def test_a_full_sample_is_that_of_the_smallest_keys():
    x = torch.arange(300.0)[:, None]
    keys = [np.random.default_rng([0, 29, i]).random() for i in range(300)]
    sample = FeatureSample(size=20)
    for part in x.split(7):
        sample.add(part)
        state = sample.state()
        sample.restore(state)
    assert sample.features()[:, 0].tolist() == np.argsort(keys)[:20].tolist()
