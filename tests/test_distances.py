import math

import numpy as np
import pytest
import torch
from conftest import Identity, normal
from pytorch_fid.fid_score import calculate_frechet_distance
from scipy.optimize import linear_sum_assignment
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from clipgen_lib.data.images import to_uint8
from clipgen_lib.metrics.distances import (
    cmmd,
    frechet_distance,
    frechet_error,
    inception_score,
    kernel_distance,
    manifold_scores,
    reconstruction_scores,
    sliced_distance,
)
from clipgen_lib.runtime.runs import ClipgenError


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


def test_frechet_of_singular_and_nearly_singular_covariances():
    """Fewer rows than dimensions on one side, then on both: either order of the sets gives the same distance."""
    many, few, fewer = (np.cov(normal(n, 40, n).double().numpy().T) for n in (4_000, 20, 8))
    zero = np.zeros(40)
    for a, b in ((many, few), (few, fewer), (few + 1e-12 * np.eye(40), fewer)):
        assert frechet_distance(zero, a, zero, b) == pytest.approx(frechet_distance(zero, b, zero, a), rel=1e-5)
    assert 0 <= frechet_distance(zero, few, zero, few) <= 1e-5 * np.trace(few)
    wanted = calculate_frechet_distance(zero, many, zero, few)
    assert frechet_distance(zero, many, zero, few) == pytest.approx(wanted, rel=1e-4)  # theirs loses digits here


def test_frechet_equals_pytorch_fid():
    for seed in range(3):
        a, b = gaussian(40, seed), gaussian(40, seed + 10)
        assert frechet_distance(*a, *b) == pytest.approx(calculate_frechet_distance(*a, *b), rel=1e-6)


def test_kernel_distance_is_that_of_torchmetrics():
    real, fake = normal(60, 8), normal(50, 8, 1) + 0.3
    found = kernel_distance(real, fake)
    theirs = KernelInceptionDistance(Identity(), subsets=400, subset_size=25).set_dtype(torch.float64)
    theirs.update(real.double(), real=True)
    theirs.update(fake.double(), real=False)
    torch.manual_seed(0)
    mean, std = theirs.compute()
    assert found["subset_size"] == 25 and found["subsets"] == 100
    assert found["mean"] == pytest.approx(mean.item(), abs=4 * std.item() / 10)
    assert found["std"] == pytest.approx(std.item(), rel=0.3)
    draw = np.random.default_rng([0, 31])
    first = [x[draw.choice(len(x), 25, replace=False)].double() for x in (real, fake)]
    assert kernel_distance(real, fake, subsets=1)["mean"] == poly_mmd(*first).item()


def test_kernel_distance_is_unbiased():
    """Of two samples of the same Gaussian it is 0 on average."""
    values = [kernel_distance(normal(100, 4, 2 * i), normal(100, 4, 2 * i + 1), subsets=1)["mean"] for i in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200) and min(values) < 0


@pytest.mark.parametrize("splits", [1, 5])
def test_inception_score_is_that_of_torchmetrics(monkeypatch, splits):
    logits = 3 * normal(200, 10)
    theirs = InceptionScore(Identity(), splits=splits).set_dtype(torch.float64)
    theirs.update(logits.double())
    monkeypatch.setattr(torch, "randperm", torch.arange)  # their parts are runs of a shuffled order
    mean, std = theirs.compute()
    found = inception_score(logits, splits)
    assert found["mean"] == pytest.approx(mean.item(), rel=1e-9)
    assert splits == 1 or found["std"] == pytest.approx(std.item() * ((splits - 1) / splits) ** 0.5, rel=1e-9)


def test_kid_inception_score_precision_and_recall_are_those_of_torch_fidelity():
    prc = pytest.importorskip("torch_fidelity.metric_prc").prc_features_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kernel_mmd

    real, fake = normal(60, 8).double(), normal(50, 8, 1).double() + 0.3
    rng = np.random.default_rng([0, 31])
    subsets = [x[rng.choice(len(x), 25, replace=False)].numpy() for x in (real, fake)]
    assert kernel_distance(real, fake, subsets=1)["mean"] == pytest.approx(kernel_mmd(*subsets), rel=1e-9)
    wanted = isc_features_to_metric(3 * fake, splits=5, shuffle=False)
    found = inception_score(3 * fake, splits=5)
    assert [found["mean"], found["std"]] == pytest.approx(list(wanted.values()), rel=1e-9)
    wanted = prc(fake, real, prc_neighborhood=3, prc_batch_size=9, save_cpu_ram=False, verbose=False)
    found = manifold_scores(real, fake)
    assert 0 < found["precision"] < found["recall"] < 1
    assert [found["precision"], found["recall"]] == pytest.approx([wanted["precision"], wanted["recall"]])


def test_inception_score_closed_forms():
    sure, unsure = inception_score(100 * torch.eye(8).repeat(4, 1), 2), inception_score(torch.zeros(32, 8), 2)
    assert sure == {"mean": pytest.approx(8.0), "std": pytest.approx(0.0), "splits": 2}
    assert unsure["mean"] == pytest.approx(1.0)


def by_hand(real, fake, k, k_wide):
    """Precision, recall, density and coverage by their definitions, on the whole matrix of distances."""
    distances = lambda a, b: np.linalg.norm(a[:, None] - b, axis=2)
    radius = lambda rows, k: np.sort(distances(rows, rows))[:, k]  # the nearest row, k = 0, is the row itself
    inside, dense = (distances(fake, real) <= radius(real, k) for k in (k, k_wide))
    return {
        "precision": inside.any(1).mean(),
        "recall": (distances(real, fake) <= radius(fake, k)).any(1).mean(),
        "density": dense.sum() / (k_wide * len(fake)),
        "coverage": dense.any(0).mean(),
    }


@pytest.mark.parametrize("shift", [0.0, 1.0, 30.0])
def test_manifold_scores_by_hand(shift):
    real, fake = normal(23, 5).double(), 0.8 * normal(17, 5, 1).double() + shift
    found = manifold_scores(real, fake, chunk=7)
    assert found == pytest.approx(by_hand(real.numpy(), fake.numpy(), 3, 5))
    assert shift < 30.0 or set(found.values()) == {0.0}


def test_manifold_of_a_set_and_itself():
    x = normal(200, 6)
    found = manifold_scores(x, x)
    assert found["precision"] == found["recall"] == found["coverage"] == 1.0
    assert found["density"] == pytest.approx(1.0, abs=0.3)
    collapsed = manifold_scores(x, x[:10].repeat(20, 1) + 1e-3 * normal(200, 6, 1))
    assert collapsed["precision"] == 1.0 and collapsed["coverage"] < 0.5 and collapsed["recall"] < 0.2
    noisy = manifold_scores(x, torch.cat([x, 50 + normal(100, 6, 2)]))
    assert noisy["precision"] == pytest.approx(2 / 3) and noisy["recall"] == noisy["coverage"] == 1.0


def test_psnr_and_ssim_by_hand():
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    y = (x + 0.1).clamp(-1, 1)
    found = reconstruction_scores(x, y)
    error = (to_uint8(x).double() - to_uint8(y).double()).pow(2).mean((1, 2, 3))
    assert torch.allclose(found["psnr"].double(), 20 * torch.log10(255 / error.sqrt()), atol=1e-4)
    assert found["ssim"].shape == (3,) and (found["ssim"] < 1).all()
    same = reconstruction_scores(x, x)
    assert torch.isinf(same["psnr"]).all() and torch.allclose(same["ssim"], torch.ones(3))


def test_sliced_distance_and_cmmd_by_definition():
    """A shift of all rows costs its square; in one dimension it is scipy's optimal transport; CMMD is the sum over pairs."""
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 24, generator=rng), torch.randn(300, 24, generator=rng) * 2 + 1
    assert sliced_distance(a, a + 0.5) == pytest.approx(24 * 0.25, rel=0.1) and sliced_distance(a, a.flip(0)) < 1e-9
    row, column = linear_sum_assignment((a[:, :1].numpy() - b[:, 0].numpy()) ** 2)
    one_dimensional = ((a[row, 0] - b[column, 0]) ** 2).mean().item()
    assert sliced_distance(a[:, :1], b[:, :1]) == pytest.approx(one_dimensional, rel=1e-5)
    x, y = (rows / rows.norm(dim=1, keepdim=True) for rows in (a[:7], b[:5]))
    kernel = lambda u, v: math.exp(-((u - v) ** 2).sum().item() / 200)
    pairs = lambda u, v: [kernel(p, q) for i, p in enumerate(u) for j, q in enumerate(v) if u is not v or i != j]
    wanted = np.mean(pairs(x, x)) + np.mean(pairs(y, y)) - 2 * np.mean(pairs(x, y))
    assert cmmd(a[:7], b[:5]) == pytest.approx(1_000 * wanted, abs=1e-3)


def test_the_standard_error_of_the_frechet_distance_is_its_spread():
    rng = torch.Generator().manual_seed(0)
    mix, moments = torch.randn(8, 8, generator=rng), lambda x: (x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False))
    reference = moments((torch.randn(3_000, 8, generator=rng) @ mix).double())
    samples = [((torch.randn(400, 8, generator=rng) ** 3 * 0.4 + 0.1) @ mix.T).double() for _ in range(150)]
    distances = [frechet_distance(*reference, *moments(x)) for x in samples]
    errors = [frechet_error(reference, moments(x), x) for x in samples]
    assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.2)
