"""Metrics: pure functions on statistics that are streamed over batches.

In: features (B, d) of a network, logits, embeddings or pairs of images. Out: numbers. Nothing here knows a file, a model
or a protocol. Sums are float64 and do not grow with N; what needs the features themselves (KID, precision, recall, density,
coverage, FID over N) looks at a sample of at most SAMPLE rows that is chosen by seed, and says how many it looked at.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.kid import poly_mmd

from ..data.images import to_uint8
from ..runtime.runs import ClipgenError

SAMPLE = 10_000  # rows of features that are kept of a set
Moments = tuple[np.ndarray, np.ndarray]  # mean (d,) and covariance (d, d), float64


class GaussianStatistics:
    """Mean and covariance of features, summed in float64 over batches; memory does not grow with N."""

    def __init__(self) -> None:
        self.n, self.total, self.outer = 0, 0.0, 0.0

    @torch.inference_mode(
        False
    )  # what is added to in place must be a tensor of the plain kind, wherever it is called from
    def add(self, features: torch.Tensor) -> None:
        """features: (B, d), finite."""
        x = features.detach().cpu().double()
        if not torch.isfinite(x).all():
            raise ClipgenError("a feature is not finite: look for NaN pixels in the images that are evaluated")
        if not self.n:
            self.outer = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        self.n, self.total = self.n + len(x), self.total + x.sum(0)
        self.outer.addmm_(x.T, x)  # in place: at 2,048 dimensions new matrices would take longer than the product

    def moments(self) -> Moments:
        """Mean (d,) and unbiased covariance (d, d), float64."""
        if self.n < 2:
            raise ClipgenError(f"statistics of {self.n} images have no covariance: give at least 2")
        mean = self.total / self.n
        covariance = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return mean.numpy(), covariance.numpy()

    @classmethod
    def union(cls, parts: Iterable[GaussianStatistics]) -> GaussianStatistics:
        """The statistics of disjoint sets taken together."""
        whole = cls()
        for part in parts:
            whole.n, whole.total, whole.outer = whole.n + part.n, whole.total + part.total, whole.outer + part.outer
        return whole

    def state(self) -> dict:
        return {"n": self.n, "total": self.total, "outer": self.outer}

    @torch.inference_mode(False)
    def restore(self, state: dict) -> None:
        self.n, self.total = state["n"], state["total"]
        self.outer = state["outer"].clone() if self.n else 0.0


class FeatureSample:
    """At most `size` rows of features, each of the N alike likely, the same whatever the batches.

    Row i draws a key from (seed, i); the rows of the smallest keys stay. Their order is that of the keys, so that the
    first m of them are a random sample too.
    """

    def __init__(self, size: int = SAMPLE, seed: int = 0):
        self.size, self.seed, self.n = size, seed, 0
        self.keys: list[float] = []
        self.rows: list[torch.Tensor] = []
        self._worst: int | None = None  # where the largest key is, once all places are taken

    def add(self, features: torch.Tensor) -> None:
        """features: (B, d)."""
        for row in features.detach().cpu().float():
            key, self.n = float(np.random.default_rng([self.seed, 29, self.n]).random()), self.n + 1
            if len(self.keys) < self.size:
                self.keys.append(key)
                self.rows.append(row.clone())
                continue
            if self._worst is None:
                self._worst = int(np.argmax(self.keys))
            if key < self.keys[self._worst]:
                self.keys[self._worst], self.rows[self._worst], self._worst = key, row.clone(), None

    def features(self) -> torch.Tensor:
        """The rows that were kept, (min(N, size), d) float32, in an order that says nothing of how they came."""
        return torch.stack([self.rows[i] for i in np.argsort(self.keys)])

    def state(self) -> dict:
        return {"n": self.n, "keys": self.keys, "rows": torch.stack(self.rows) if self.rows else torch.empty(0, 0)}

    def restore(self, state: dict) -> None:
        self.n, self.keys, self.rows, self._worst = state["n"], list(state["keys"]), list(state["rows"]), None


class ClassSums:
    """What the Inception Score (arXiv 1606.03498, equation 1) needs of logits, in `splits` parts; row i is of part i mod splits."""

    def __init__(self, splits: int = 10):
        self.n = 0
        self.counts = torch.zeros(splits, dtype=torch.float64)
        self.negentropy = torch.zeros(splits, dtype=torch.float64)  # sum over rows of sum_c p log p
        self.probability: torch.Tensor | None = None  # (splits, classes), sum over rows of p

    def add(self, logits: torch.Tensor) -> None:
        """logits: (B, classes)."""
        log_p = logits.detach().cpu().double().log_softmax(1)
        part = (torch.arange(len(log_p)) + self.n) % len(self.counts)
        if self.probability is None:
            self.probability = torch.zeros(len(self.counts), log_p.shape[1], dtype=torch.float64)
        self.counts.index_add_(0, part, torch.ones(len(part), dtype=torch.float64))
        self.negentropy.index_add_(0, part, (log_p.exp() * log_p).sum(1))
        self.probability.index_add_(0, part, log_p.exp())
        self.n += len(log_p)

    def score(self) -> dict[str, float]:
        """exp of the mean KL divergence of p(class | image) from p(class): mean and spread over the parts."""
        there = self.counts > 0
        mean = self.probability[there] / self.counts[there, None]
        divergence = self.negentropy[there] / self.counts[there] - torch.xlogy(mean, mean).sum(1)
        scores = divergence.exp().numpy()
        return {
            "mean": float(scores.mean()),
            "std": float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
            "splits": len(scores),
        }

    def state(self) -> dict:
        return {"n": self.n, "counts": self.counts, "negentropy": self.negentropy, "probability": self.probability}

    def restore(self, state: dict) -> None:
        self.n, self.counts, self.negentropy, self.probability = (
            state[k] for k in ("n", "counts", "negentropy", "probability")
        )


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians (arXiv 1706.08500, equation 6), in float64.

    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). With sigma1 = F F^T the trace of the root is the sum of
    the square roots of the eigenvalues of the symmetric F^T sigma2 F: no complex numbers, also where a covariance is
    singular, and several times faster than a matrix root (`distance_speed`).

    Args:
        mu1, mu2: (d,). sigma1, sigma2: (d, d), symmetric.

    Raises:
        ClipgenError: the dimensions differ.
    """
    mu1, mu2 = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    sigma1, sigma2 = np.asarray(sigma1, np.float64), np.asarray(sigma2, np.float64)
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ClipgenError(f"statistics of {len(mu1)} and {len(mu2)} dimensions: use one feature network for both sets")
    factor = _factor(sigma1)
    cross = np.sqrt(np.linalg.eigvalsh(factor.T @ sigma2 @ factor).clip(min=0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def _factor(sigma: np.ndarray) -> np.ndarray:
    """A matrix F with F F^T = sigma: Cholesky's, which is cheap, or of the eigenvectors where sigma is singular."""
    try:
        return np.linalg.cholesky(sigma)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(values.clip(min=0))


def frechet_over_n(features: torch.Tensor, reference: Moments, points: int = 5, fewest: int = 16) -> dict[str, float]:
    """Frechet distance of the first n rows to a reference, for n = N, N/2, N/4, ...: how much of an FID is too small an N.

    Args:
        features: (N, d) in random order, as `FeatureSample` gives them.

    Returns:
        n as text -> distance, from the smallest n; at most `points` of them, none below `fewest`.
    """
    counts = sorted({len(features) >> i for i in range(points)})
    found = {}
    for n in (n for n in counts if n >= fewest):
        part = GaussianStatistics()
        part.add(features[:n])
        found[str(n)] = frechet_distance(*reference, *part.moments())
    return found


def kernel_distance(
    real: torch.Tensor, fake: torch.Tensor, subsets: int = 100, largest: int = 1_000, seed: int = 0
) -> dict:
    """KID (arXiv 1801.01401): the unbiased squared MMD under a cubic kernel, by torchmetrics, with its spread over subsets.

    A subset is half of the smaller set where that is fewer than `largest` rows: subsets that are the whole set have no
    spread. The unbiased estimate may be below 0.

    Args:
        real, fake: (N, d) and (M, d), at least 4 rows each.
    """
    size = min(largest, len(real) // 2, len(fake) // 2)
    draw = np.random.default_rng([seed, 31])
    values = [
        float(poly_mmd(*(x[draw.choice(len(x), size, replace=False)].double() for x in (real, fake))))
        for _ in range(subsets)
    ]
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "subsets": subsets, "subset_size": size}


def manifold_scores(real: torch.Tensor, fake: torch.Tensor, k: int = 3, k_density: int = 5, chunk: int = 1_000) -> dict:
    """Precision and recall (arXiv 1904.06991) and density and coverage (arXiv 2002.09797), each set's manifold being balls.

    A ball reaches from a row to its k-th nearest neighbour within its own set: the third for precision (share of fake
    rows in a real ball) and recall (share of real rows in a fake ball), the fifth for density (real balls that a fake row
    lies in, divided by k) and coverage (share of real balls with a fake row in them). Distances are Euclidean, float64.

    Args:
        real, fake: (N, d) and (M, d), more than k_density rows each.
    """
    centre = real.double().mean(0)  # distances by inner products lose digits far from the origin
    a, b = real.double() - centre, fake.double() - centre
    radii, wide = _neighbour_distances(a, (k, k_density), chunk)
    (fake_radii,) = _neighbour_distances(b, (k,), chunk)
    inside = dense = 0.0
    reached = torch.zeros(len(a), dtype=torch.bool)
    covered = torch.zeros(len(a), dtype=torch.bool)
    for part, part_radii in zip(b.split(chunk), fake_radii.split(chunk), strict=True):
        distance = torch.cdist(part, a, compute_mode="use_mm_for_euclid_dist")  # (m, N)
        inside += (distance <= radii).any(1).sum().item()
        dense += (distance <= wide).sum().item()
        reached |= (distance <= part_radii[:, None]).any(0)
        covered |= (distance <= wide).any(0)
    return {
        "precision": inside / len(b),
        "recall": reached.double().mean().item(),
        "density": dense / (k_density * len(b)),
        "coverage": covered.double().mean().item(),
    }


def _neighbour_distances(rows: torch.Tensor, ks: tuple[int, ...], chunk: int) -> list[torch.Tensor]:
    """Distance (N,) of each row to its k-th nearest other row, for each k."""
    found = []
    for first, part in zip(range(0, len(rows), chunk), rows.split(chunk), strict=True):
        distance = torch.cdist(part, rows, compute_mode="use_mm_for_euclid_dist")
        own = torch.arange(len(part))
        distance[own, first + own] = torch.inf
        found.append(distance.topk(max(ks), largest=False).values)
    nearest = torch.cat(found)
    return [nearest[:, k - 1] for k in ks]


def few_pictures(counts: dict[str, int], dim: int) -> list[str]:
    """A sentence for each set whose covariance of `dim` dimensions is estimated from fewer than that many images."""
    return [
        f"{what} has {n} images for {dim} feature dimensions: its distances are biased upwards and compare with themselves only"
        for what, n in counts.items()
        if n < dim
    ]


def reconstruction_scores(pictures: torch.Tensor, decoded: torch.Tensor) -> dict[str, torch.Tensor]:
    """PSNR (dB) and SSIM of each pair by torchmetrics, both rounded to 8 bits first, as files are.

    Args:
        images, decoded: (B, 3, H, W) in [-1, 1], at least 11 pixels a side (SSIM's window).

    Returns:
        `psnr` and `ssim`, (B,) each; PSNR is infinite where nothing differs.
    """
    a, b = to_uint8(decoded).float(), to_uint8(pictures).float()
    return {
        "psnr": peak_signal_noise_ratio(a, b, data_range=(0.0, 255.0), reduction="none", dim=(1, 2, 3)),
        "ssim": structural_similarity_index_measure(a, b, data_range=255.0, reduction="none"),
    }


def spread_moments(dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean (dim,) and covariance (dim, dim) of two sets of 2 x dim random rows, whose eigenvalues spread as those of features do."""
    draw, scale = np.random.default_rng(seed), np.linspace(0.1, 2, dim)
    sets = [draw.normal(size=(2 * dim, dim)) * scale for _ in range(2)]
    return tuple(part for x in sets for part in (x.mean(0), np.cov(x, rowvar=False)))


def distance_speed(dim: int = 2_048, seed: int = 0) -> dict[str, float]:
    """Seconds of our Frechet distance and of pytorch-fid's on the same two covariances of 2 x dim rows, and their ratio.

    Returns:
        `ours`, `pytorch_fid` (seconds), `ratio`, and the relative `difference` of the two results.
    """
    from pytorch_fid.fid_score import calculate_frechet_distance

    moments = spread_moments(dim, seed)
    start = time.perf_counter()
    ours = frechet_distance(*moments)
    between = time.perf_counter()
    theirs = calculate_frechet_distance(*moments)
    seconds = {"ours": between - start, "pytorch_fid": time.perf_counter() - between}
    return {**seconds, "ratio": seconds["pytorch_fid"] / seconds["ours"], "difference": float(abs(ours / theirs - 1))}
