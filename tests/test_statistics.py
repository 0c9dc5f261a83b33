import zipfile

import numpy as np
import pytest
import torch
from conftest import Identity, StandIn, normal
from torchmetrics.image.fid import FrechetInceptionDistance

from clipgen_lib.metrics.distances import frechet_distance
from clipgen_lib.metrics.features import FeatureNetwork
from clipgen_lib.metrics.statistics import (
    FeatureSample,
    GaussianStatistics,
    fid_by_radius,
    frechet_over_n,
    read_statistics,
    set_scores,
    set_statistics,
)
from clipgen_lib.runtime.runs import ClipgenError


def test_shifted_gaussians_from_samples():
    """Two samples of 20,000 from N(0, I) and N(1, 4 I): the distance is d * (1 + (2 - 1)^2)."""
    x, y = normal(20_000, 6), 2 * normal(20_000, 6, 1) + 1
    moments = []
    for z in (x, y):
        statistics = GaussianStatistics()
        statistics.update(z)
        moments += statistics.compute()
    assert frechet_distance(*moments) == pytest.approx(12, rel=0.02)


def test_frechet_equals_torchmetrics():
    theirs, ours = FrechetInceptionDistance(Identity(), input_img_size=(8,)).set_dtype(torch.float64), []
    for real in (True, False):
        x = normal(200, 8, int(real)).double() * (2 if real else 1)
        theirs.update(x, real=real)
        statistics = GaussianStatistics()
        statistics.update(x)
        ours += statistics.compute()
    assert frechet_distance(*ours) == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_streamed_statistics_are_those_of_numpy():
    features = torch.randn(103, 7) * 3 + 5
    statistics, halves = GaussianStatistics(), [GaussianStatistics(), GaussianStatistics()]
    for part in features.split(20):
        statistics.update(part)
    for i, half in enumerate(halves):
        half.update(features[i::2])
    mean, covariance = statistics.compute()
    assert np.allclose(mean, features.double().numpy().mean(0)) and np.allclose(
        covariance, np.cov(features.double().numpy().T)
    )
    whole = (halves[0] + halves[1]).compute()
    assert np.allclose(whole.mu, mean) and np.allclose(whole.sigma, covariance)
    with pytest.raises(ClipgenError, match="NaN"):
        statistics.update(torch.full((1, 7), float("nan")))
    with pytest.raises(ClipgenError, match="at least 2"):
        GaussianStatistics().compute()


def test_fid_falls_with_n():
    """Two samples of one Gaussian: what is left is the bias of a small N."""
    reference = GaussianStatistics()
    reference.update(normal(4_000, 16))
    curve = frechet_over_n(normal(512, 16, 1), reference.compute())
    assert list(curve) == ["32", "64", "128", "256", "512"]
    assert list(curve.values()) == sorted(curve.values(), reverse=True) and curve["512"] < 0.2 * curve["32"]
    assert list(frechet_over_n(normal(40, 16), reference.compute())) == ["20", "40"]


def test_the_sample_is_bounded_and_the_same_for_all_batches():
    x = torch.arange(500.0)[:, None].repeat(1, 3)
    kept = []
    for batch in (7, 64, 500):
        sample = FeatureSample(size=100)
        for part in x.split(batch):
            sample.update(part)
        kept.append(sample.compute())
    assert kept[0].shape == (100, 3) and all(torch.equal(kept[0], other) for other in kept)
    rows = kept[0][:, 0].numpy()
    assert len(set(rows)) == 100 and 180 < rows.mean() < 320 and not (np.diff(rows) > 0).all()
    assert abs(rows[:50].mean() - rows[50:].mean()) < 120  # the first ones are a sample too
    whole = FeatureSample(size=1_000)
    whole.update(x)
    assert sorted(whole.compute()[:, 0].tolist()) == list(range(500))


def test_a_full_sample_is_that_of_the_smallest_keys():
    x = torch.arange(300.0)[:, None]
    keys = [np.random.default_rng([0, 29, i]).random() for i in range(300)]
    sample = FeatureSample(size=20)
    for part in x.split(7):
        sample.update(part)
    assert sample.compute()[:, 0].tolist() == np.argsort(keys)[:20].tolist()


def network(head=False):
    head = torch.randn(7, 12, generator=torch.Generator().manual_seed(1)) if head else None
    return FeatureNetwork("inception", StandIn(), "stand-in", "0", head)


def test_one_pass_over_a_set_gives_what_its_parts_give():
    x = torch.rand(23, 3, 20, 20, generator=torch.Generator().manual_seed(3)) * 2 - 1
    whole = set_statistics(x.split(3), network(head=True), (0, 2))
    assert whole.dim == 12 and whole.sample.n == 23
    first, second = (set_statistics([x[i::2]], network(), (0, 2)) for i in (0, 1))
    assert set_scores(whole, whole)["floor"] == pytest.approx(fid_by_radius(first, second), rel=1e-5)
    other = set_statistics(x.split(7), network(), (0, 2))
    for k in (0, 2):
        assert np.allclose(whole.moments(k).sigma, other.moments(k).sigma, atol=1e-9)
    scores = set_scores(whole, other)
    assert scores["fid"] == pytest.approx({"0": 0, "2": 0}, abs=1e-6) and scores["inception_score"]["mean"] > 1
    assert scores["manifold"]["n"] == 23 and scores["manifold"]["precision"] == 1.0
    assert set_scores(whole, other.moments(0))["fid"].keys() == {"0"}
    x[1, 0, 3, 3] = torch.nan
    with pytest.raises(ClipgenError, match="NaN or infinite pixels"):
        set_statistics([x], network(), (0,))


def test_statistics_of_pytorch_fid(tmp_path):
    mu, sigma = np.zeros(4), np.eye(4)
    np.savez_compressed(tmp_path / "good.npz", mu=mu, sigma=sigma)
    assert np.array_equal(read_statistics(tmp_path / "good.npz").sigma, sigma)
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("mu")
    np.savez(tmp_path / "other.npz", mean=mu)
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], dtype=object), sigma=sigma)
    np.savez(tmp_path / "shape.npz", mu=mu, sigma=np.eye(5))
    np.savez(tmp_path / "nan.npz", mu=mu * np.nan, sigma=sigma)
    np.savez(tmp_path / "words.npz", mu=np.array(["0", "1", "2", "3"]), sigma=sigma)
    np.savez(tmp_path / "none.npz", mu=mu[:0], sigma=sigma[:0, :0])
    np.savez(tmp_path / "asymmetric.npz", mu=mu, sigma=sigma + np.triu(np.full((4, 4), 0.1), 1))
    np.savez(tmp_path / "negative.npz", mu=mu, sigma=np.diag([1.0, 1.0, 1.0, -0.5]))
    with zipfile.ZipFile(tmp_path / "vast.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", b"")
        with archive.open("sigma.npy", "w", force_zip64=True) as stream:
            for _ in range(540):
                stream.write(bytes(10**6))
    refused = "short text other pickle shape nan words none asymmetric negative vast absent"
    for name in refused.split():
        with pytest.raises(ClipgenError, match=f"{name}.npz .*(make it again|check the path)"):
            read_statistics(tmp_path / f"{name}.npz")
