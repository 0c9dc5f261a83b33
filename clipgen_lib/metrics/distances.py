"""Distances and scores of images: pure functions of statistics, of features, or of pairs of images.

In: means and covariances, features (N, d), images. Out: numbers. Nothing here knows a model or a protocol.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.kid import poly_mmd

from ..data.images import to_uint8
from ..runtime.runs import ClipgenError


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians (arXiv 1706.08500, equation 6), in float64.

    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). With sigma1 = F F^T the trace of the root is the sum of
    the square roots of the eigenvalues of the symmetric F^T sigma2 F: no complex numbers, also where a covariance is
    singular, and several times faster than a matrix root.

    Means are (d,), covariances (d, d) and symmetric; ClipgenError where the dimensions differ. A distance that rounding has
    brought below 0 is 0.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ClipgenError(f"statistics of {len(mu1)} and {len(mu2)} dimensions: use one feature network for both sets")
    try:
        factor = np.linalg.cholesky(sigma1)
    except np.linalg.LinAlgError:  # sigma1 is singular
        values, vectors = np.linalg.eigh(sigma1)
        factor = vectors * np.sqrt(values.clip(min=0))
    cross = np.sqrt(np.linalg.eigvalsh(factor.T @ sigma2 @ factor).clip(min=0)).sum()
    spread = np.trace(sigma1) + np.trace(sigma2)
    distance = float(((mu1 - mu2) ** 2).sum() + spread - 2 * cross)
    return 0.0 if -1e-6 * spread < distance < 0 else distance


def frechet_error(reference: tuple, scored: tuple, rows: torch.Tensor) -> float:
    """Standard error of the Frechet distance of `scored`, (mu, sigma), from `reference`, of which `rows` (N, d) are the features.

    By the delta method: the spread over the rows of the distance's derivative, |mu1 - mu2|^2 giving 2 (mu2 - mu1), the rest I - T
    with the transport T = F (F^T sigma2 F)^(-1/2) F^T of the scored Gaussian onto the reference, sigma1 = F F^T. Resampling would
    need as many distances, and doubled rows raise each of them.
    """
    (mu1, sigma1), (mu2, sigma2) = reference, scored
    values, vectors = np.linalg.eigh(sigma1)
    factor = vectors * np.sqrt(values.clip(min=0))
    values, vectors = np.linalg.eigh(factor.T @ sigma2 @ factor)
    root = np.divide(1, np.sqrt(values.clip(min=0)), out=np.zeros_like(values), where=values > 1e-9 * values.max())
    half = factor @ (vectors * np.sqrt(root))
    x = rows.double().numpy() - mu2
    influence = 2 * x @ (mu2 - mu1) + (x**2).sum(1) - ((x @ half) ** 2).sum(1)
    return float(influence.std() / len(x) ** 0.5)


def kernel_distance(real: torch.Tensor, fake: torch.Tensor, subsets: int = 100) -> dict:
    """KID (arXiv 1801.01401): the unbiased squared MMD under a cubic kernel, by torchmetrics, with its spread over subsets.

    A subset of the features, (N, d) and (M, d) of at least 4 rows, is half of the smaller set where that is fewer than
    1,000 rows: subsets that are the whole set have no spread. The unbiased estimate may be below 0.
    """
    size, rng = min(1_000, len(real) // 2, len(fake) // 2), np.random.default_rng([0, 31])
    subset = lambda x: x[rng.choice(len(x), size, replace=False)]
    values = [polynomial_mmd(subset(real), subset(fake)) for _ in range(subsets)]
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "subsets": subsets, "subset_size": size}


def polynomial_mmd(real: torch.Tensor, fake: torch.Tensor) -> float:
    """The distance of `kernel_distance` on whole sets of features, (N, d) each."""
    return float(poly_mmd(real.double(), fake.double()))


def sliced_distance(real: torch.Tensor, fake: torch.Tensor, directions: int = 1_000) -> float:
    """MIND (arXiv 2605.06797): the sliced squared Wasserstein-2 distance of two sets of features of one size, (N, d) each, times d.

    The rows are projected on random directions, seeded; on each the optimal transport pairs the projections in order. Times d a
    shift of all rows counts as it does in the Frechet distance.
    """
    d = real.shape[1]
    basis = torch.randn(d, directions, generator=torch.Generator().manual_seed(43), dtype=torch.float64)
    a, b = ((x.double() @ (basis / basis.norm(dim=0))).sort(0).values for x in (real, fake))
    return d * float(((a - b) ** 2).mean())


def cmmd(real: torch.Tensor, fake: torch.Tensor) -> float:
    """CMMD (arXiv 2401.09603) of CLIP's image features, (N, d) and (M, d), which are normalised first.

    1,000 times the squared MMD under the kernel exp(-|x - y|^2 / (2 * 10^2)); the unbiased estimate (Gretton et al. 2012, equation
    3), which may be below 0, where the authors' code keeps each row's kernel with itself and so is biased upwards.
    """
    x, y = (F.normalize(rows.double(), dim=1) for rows in (real, fake))
    kernel = lambda a, b: ((a @ b.T - 1) / 100).exp()  # |a - b|^2 is 2 - 2 a b
    within = lambda a: (kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))
    return 1_000 * float(within(x) + within(y) - 2 * kernel(x, y).mean())


def inception_score(logits: torch.Tensor, splits: int = 10) -> dict[str, float]:
    """Inception Score (arXiv 1606.03498, equation 1): exp of the mean KL divergence of p(class | image) from p(class).

    Logits (N, classes) in random order are cut into `splits` parts; `mean` and `std` are over these, `std` with N in its
    denominator as in torch-fidelity (torchmetrics has N - 1).
    """
    scores = []
    for log_p in logits.double().log_softmax(1).chunk(splits):
        mean = log_p.exp().mean(0)
        divergence = (log_p.exp() * log_p).sum(1).mean() - torch.xlogy(mean, mean).sum()
        scores.append(divergence.exp().item())
    return {"mean": float(np.mean(scores)), "std": float(np.std(scores)), "splits": len(scores)}


def manifold_scores(real: torch.Tensor, fake: torch.Tensor, chunk: int = 1_000) -> dict:
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797); each set's manifold is made of balls.

    A ball reaches from a row to its k-th nearest neighbour within its own set: the third for precision (share of fake
    rows in a real ball) and recall (share of real rows in a fake ball), the fifth for density (real balls that a fake row
    lies in, divided by five) and coverage (share of real balls with a fake row in them). Distances are Euclidean, float64.
    Features are (N, d) and (M, d), more than five rows each.
    """
    centre = real.double().mean(0)  # distances by inner products lose digits far from the origin
    a, b = real.double() - centre, fake.double() - centre
    radii, wide = _neighbour_distances(a, chunk)
    fake_radii, _ = _neighbour_distances(b, chunk)
    inside = dense = 0.0
    reached, covered = (torch.zeros(len(a), dtype=torch.bool) for _ in range(2))
    for part, part_radii in zip(b.split(chunk), fake_radii.split(chunk), strict=True):
        distance = torch.cdist(part, a, compute_mode="use_mm_for_euclid_dist")  # (m, N)
        inside += (distance <= radii).any(1).sum().item()
        dense += (distance <= wide).sum().item()
        reached |= (distance <= part_radii[:, None]).any(0)
        covered |= (distance <= wide).any(0)
    return {
        "precision": inside / len(b),
        "recall": reached.double().mean().item(),
        "density": dense / (5 * len(b)),
        "coverage": covered.double().mean().item(),
    }


def _neighbour_distances(rows: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances (N,) of each row to its third and to its fifth nearest other row; nearest of all is the row itself."""
    distances = (torch.cdist(part, rows, compute_mode="use_mm_for_euclid_dist") for part in rows.split(chunk))
    nearest = torch.cat([distance.topk(6, largest=False).values for distance in distances])
    return nearest[:, 3], nearest[:, 5]


def reconstruction_scores(images: torch.Tensor, decoded: torch.Tensor) -> dict[str, torch.Tensor]:
    """`psnr` (dB) and `ssim` of each pair, (B,), by torchmetrics, both images rounded to 8 bits first, as files are.

    Images are (B, 3, H, W) in [-1, 1], at least 11 pixels a side (SSIM's window); PSNR of equal ones is infinite.
    """
    a, b = to_uint8(decoded).float(), to_uint8(images).float()
    return {
        "psnr": peak_signal_noise_ratio(a, b, data_range=(0.0, 255.0), reduction="none", dim=(1, 2, 3)),
        "ssim": structural_similarity_index_measure(a, b, data_range=255.0, reduction="none"),
    }
