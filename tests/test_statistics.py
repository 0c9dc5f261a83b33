import os
import signal
import zipfile

import numpy as np
import pytest
import torch
from conftest import Identity, StandIn, normal
from torchmetrics.image.fid import FrechetInceptionDistance

from clipgen_lib.data.datasets import open_folder
from clipgen_lib.data.images import blur, eight_bit, png
from clipgen_lib.metrics.distances import frechet_distance
from clipgen_lib.metrics.features import FeatureNetwork
from clipgen_lib.metrics.statistics import (
    FeatureSample,
    GaussianStatistics,
    fid_by_radius,
    frechet_over_n,
    read_statistics,
    saved_statistics,
    set_scores,
    set_statistics,
)
from clipgen_lib.runtime.runs import ClipgenError, Stopped


def fed(statistics, *parts):
    for part in parts:
        statistics.update(part)
    return statistics


def test_frechet_equals_torchmetrics():
    theirs, ours = FrechetInceptionDistance(Identity(), input_img_size=(8,)).set_dtype(torch.float64), []
    for real in (True, False):
        x = normal(200, 8, int(real)).double() * (2 if real else 1)
        theirs.update(x, real=real)
        ours += fed(GaussianStatistics(), x).compute()
    assert frechet_distance(*ours) == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_streamed_statistics_are_those_of_numpy():
    features = normal(103, 7) * 3 + 5
    statistics = fed(GaussianStatistics(), *features.split(20))
    first, second = (fed(GaussianStatistics(), features[i::2]) for i in (0, 1))
    for mean, covariance in (statistics.compute(), (first + second).compute()):
        assert np.allclose(mean, features.double().mean(0))
        assert np.allclose(covariance, np.cov(features.double().numpy().T))
    with pytest.raises(ClipgenError, match="NaN"):
        statistics.update(torch.full((1, 7), float("nan")))
    with pytest.raises(ClipgenError, match="at least 2"):
        GaussianStatistics().compute()


def test_fid_falls_with_n():
    """Two samples of one Gaussian: what is left is the bias of a small N."""
    reference = fed(GaussianStatistics(), normal(4_000, 16)).compute()
    curve = frechet_over_n(normal(512, 16, 1), reference)
    assert list(curve) == ["32", "64", "128", "256", "512"]
    assert list(curve.values()) == sorted(curve.values(), reverse=True) and curve["512"] < 0.2 * curve["32"]
    assert list(frechet_over_n(normal(40, 16), reference)) == ["20", "40"]


@pytest.mark.parametrize("batch", [7, 64, 500])
def test_the_sample_is_that_of_the_smallest_keys_for_all_batches(batch):
    x = torch.arange(500.0)[:, None].repeat(1, 3)
    keys = [np.random.default_rng([0, 29, i]).random() for i in range(500)]
    kept = fed(FeatureSample(size=100), *x.split(batch)).compute()
    assert kept.shape == (100, 3) and kept[:, 2].tolist() == np.argsort(keys)[:100].tolist()
    whole = fed(FeatureSample(size=1_000), *x.split(batch)).compute()
    assert sorted(whole[:, 0].tolist()) == list(range(500))


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
    unblurred, y = set_statistics([x], network(), (0,)), eight_bit(x)  # against a reference that alone is blurred
    moments = [fed(GaussianStatistics(), network()(some)).compute() for some in (y, blur(y, 2))]
    assert fid_by_radius(unblurred, whole)["2"] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-4)
    assert set(fid_by_radius(unblurred, whole)) == {"0", "2"}
    x[1, 0, 3, 3] = torch.nan
    with pytest.raises(ClipgenError, match="NaN or infinite pixels"):
        set_statistics([x], network(), (0,))


def test_scoring_is_resumed_after_a_signal_and_not_done_twice(tmp_path):
    x = torch.rand(23, 3, 20, 20, generator=torch.Generator().manual_seed(3)) * 2 - 1
    for i, image in enumerate(x):
        (tmp_path / f"{i:02d}.png").write_bytes(png(image))
    (tmp_path / "07.png").write_text("no image")
    calls, stand_in = [], StandIn()

    def stopping(images):
        calls.append(len(images))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return stand_in(images)

    def statistics():
        inputs = FeatureNetwork("inception", stopping, "stand-in", "0"), (0, 2), 5, torch.device("cpu")
        return saved_statistics(open_folder(tmp_path), *inputs)[0]

    with pytest.raises(Stopped, match="stopped by SIGTERM in scoring"):
        statistics()
    assert calls == [5, 5, 4, 4]  # each image at two radii
    resumed = statistics()
    assert calls[4:] == [5, 5, 5, 5, 3, 3]
    whole = set_statistics(x[[i for i in range(23) if i != 7]].split(22), network(), (0, 2))
    for k in (0, 2):
        assert np.allclose(resumed.moments(k).mu, whole.moments(k).mu, atol=1e-6)
        assert np.allclose(resumed.moments(k).sigma, whole.moments(k).sigma, atol=1e-6)
    assert torch.allclose(resumed.sample.compute(), whole.sample.compute(), atol=1e-6)
    images = open_folder(tmp_path)
    again, _ = saved_statistics(images, FeatureNetwork("inception", stopping, "s", "0"), (0, 2), 5, torch.device("cpu"))
    assert len(calls) == 10 and list(images.skipped) == ["07.png"]  # nothing was scored
    assert np.array_equal(again.moments(2).sigma, resumed.moments(2).sigma)
    (tmp_path / "08.png").write_bytes(png(x[7]))  # another image of that name
    statistics()
    assert len(calls) == 20


MU, SIGMA = np.zeros(4), np.eye(4)
NO_STATISTICS = {
    "other": {"mean": MU},
    "clean_kid": {"feats": SIGMA},
    "pickle": {"mu": np.array([{}], dtype=object), "sigma": SIGMA},
    "shape": {"mu": MU, "sigma": np.eye(5)},
    "nan": {"mu": MU * np.nan, "sigma": SIGMA},
    "words": {"mu": np.array(["0", "1", "2", "3"]), "sigma": SIGMA},
    "none": {"mu": MU[:0], "sigma": SIGMA[:0, :0]},
    "asymmetric": {"mu": MU, "sigma": SIGMA + np.triu(np.full((4, 4), 0.1), 1)},
    "negative": {"mu": MU, "sigma": np.diag([1.0, 1.0, 1.0, -0.5])},
}


def test_statistics_of_pytorch_fid(tmp_path):
    np.savez_compressed(tmp_path / "good.npz", mu=MU, sigma=SIGMA)
    assert np.array_equal(read_statistics(tmp_path / "good.npz").sigma, SIGMA)
    np.savez(tmp_path / "own.npz", mu=MU, sigma=SIGMA, protocol="clean")
    for path, protocol in (("own.npz", ""), ("own.npz", "clean"), ("good.npz", "tf1")):
        assert np.array_equal(read_statistics(tmp_path / path, protocol).mu, MU)
    with pytest.raises(ClipgenError, match="statistics of protocol clean: score under that, not inception"):
        read_statistics(tmp_path / "own.npz", "inception")
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("mu")
    for name, arrays in NO_STATISTICS.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    with zipfile.ZipFile(tmp_path / "vast.npz", "w") as archive:
        archive.writestr("mu.npy", b"")
        archive.writestr("sigma.npy", b"")
        archive.getinfo("sigma.npy").file_size = 540 * 10**6  # the index, written last, says so
    for name in (*NO_STATISTICS, "short", "text", "vast", "absent"):
        with pytest.raises(ClipgenError, match=f"{name}.npz .*(make it again|check the path)"):
            read_statistics(tmp_path / f"{name}.npz")
    with pytest.raises(ClipgenError, match="features for clean-fid's KID; its statistics are in the file without _kid"):
        read_statistics(tmp_path / "clean_kid.npz")
