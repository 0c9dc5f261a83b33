"""Statistics of one set of images, from one pass over it, and the scores that compare two sets.

In: batches of images and a feature network. Out: sums in float64 that do not grow with N. What needs the features themselves
(KID, precision, recall, density, coverage, Inception Score, FID over N) looks at a sample of at most SAMPLE rows, chosen by seed.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch

from ..data.batches import ordered_batches
from ..data.datasets import ImageSet, open_folder, open_images
from ..data.folders import list_folder
from ..data.images import blur, eight_bit, to_float
from ..runtime.checkpoints import load_checkpoint, save_checkpoint
from ..runtime.distributed import tell
from ..runtime.runs import MADE_DATA, ClipgenError, held, progress, reading, shortened, stoppable, versions
from .distances import (
    cmmd,
    frechet_distance,
    frechet_error,
    inception_score,
    kernel_distance,
    manifold_scores,
    polynomial_mmd,
    sliced_distance,
)
from .features import FeatureNetwork
from .intervals import wilson

SAMPLE = 10_000  # rows of features that are kept of a set
RESAMPLES = 20  # for the interval of a distance: their standard deviation is then known to a sixth
MOST_FEATURES = 8_192  # of statistics in a file
SAVE_EVERY = 5_000  # images


class Moments(NamedTuple):
    """Mean (d,) and covariance (d, d) of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray


class GaussianStatistics:
    """Mean and covariance of features, summed in float64 over batches; memory does not grow with N."""

    def __init__(self) -> None:
        self.n, self.total, self.outer = 0, 0.0, 0.0

    @torch.inference_mode(False)  # a tensor made in inference mode could not be added to outside of it
    def update(self, features: torch.Tensor) -> None:
        """features: (B, d), finite."""
        x = features.detach().cpu().double()
        if not torch.isfinite(x).all():
            raise ClipgenError("a feature is not finite: look for NaN pixels in the images that are evaluated")
        if not self.n:
            self.outer = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        self.n, self.total = self.n + len(x), self.total + x.sum(0)
        self.outer.addmm_(x.T, x)  # in place: at 2,048 dimensions new matrices would take longer than the product

    def compute(self) -> Moments:
        """Mean and unbiased covariance; at least 2 rows are needed."""
        if self.n < 2:
            raise ClipgenError(f"statistics of {self.n} images have no covariance: give at least 2")
        mean = self.total / self.n
        covariance = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return Moments(mean.numpy(), covariance.numpy())

    def __add__(self, other: Self) -> Self:
        """The statistics of two disjoint sets taken together."""
        whole = GaussianStatistics()
        whole.n, whole.total, whole.outer = self.n + other.n, self.total + other.total, self.outer + other.outer
        return whole


class FeatureSample:
    """At most `size` rows of features, each of the N equally likely, the same whatever the batches.

    Row i has a random key from i; the rows with the smallest keys stay, in the order of their keys: the first m of them
    are a random sample too.
    """

    def __init__(self, size: int = SAMPLE):
        self.size, self.n = size, 0
        self.keys, self.rows = torch.empty(0, dtype=torch.float64), torch.empty(0)

    def update(self, features: torch.Tensor) -> None:
        """features: (B, d)."""
        keys = [np.random.default_rng([0, 29, self.n + i]).random() for i in range(len(features))]
        keys, self.n = torch.cat([self.keys, torch.tensor(keys, dtype=torch.float64)]), self.n + len(features)
        order = keys.argsort()[: self.size]
        self.keys, self.rows = keys[order], torch.cat([self.rows, features.detach().cpu().float()])[order]

    def compute(self) -> torch.Tensor:
        """The rows that were kept, (min(N, size), d) float32, in random order."""
        return self.rows


def read_statistics(path: Path, protocol: str = "") -> Moments:
    """Mean (d,) and covariance (d, d) from an npz file as pytorch-fid writes it, without running pickled code.

    It holds `mu`, `sigma` and, where its maker knew of it, `protocol`. Raises ClipgenError where that is not the one to score
    under, or the file is missing or damaged, has more than MOST_FEATURES, or holds no mean and covariance.
    """
    again = "make it again by pytorch-fid's --save-stats"
    with reading(path, "check the path", again, "holds no mean and covariance"):
        with zipfile.ZipFile(path) as archive:  # its index says how large they are unpacked
            sizes = {entry.filename.removesuffix(".npy"): entry.file_size for entry in archive.infolist()}
        if "feats" in sizes:
            raise ValueError("it holds features for clean-fid's KID; its statistics are in the file without _kid")
        if max(sizes["mu"], sizes["sigma"], sizes.get("protocol", 0)) > 8 * MOST_FEATURES**2 + 1_000:
            raise ValueError(f"more than {MOST_FEATURES} features")
        with np.load(path, allow_pickle=False) as content:
            mu, sigma = (content[key].astype(np.float64, casting="same_kind") for key in ("mu", "sigma"))
            own = str(content["protocol"]) if "protocol" in sizes else ""
        d, finite = mu.size, np.isfinite(mu).all() and np.isfinite(sigma).all()
        if not (d and finite) or mu.shape != (d,) or sigma.shape != (d, d):
            raise ValueError(f"mu {mu.shape} and sigma {sigma.shape}, not finite (d,) and (d, d)")
        rounding = 1e-6 * np.abs(sigma).max()  # of float32; of few images most eigenvalues are 0
        if np.abs(sigma - sigma.T).max() > 10 * rounding or np.linalg.eigvalsh(sigma)[0] < -d * rounding:
            raise ValueError("sigma is asymmetric or has a negative variance")
    if own and protocol and own != protocol:
        raise ClipgenError(f"{path} holds statistics of protocol {shortened(own)}: score under that, not {protocol}")
    return Moments(mu, sigma)


def open_reference(reference: str | Path, size: int, split: str = "", protocol: str = "") -> ImageSet | Moments:
    """What images are scored against: statistics (.npz), a data set's split ("" is val), or every image of a folder without splits.

    Raises ClipgenError where a split is named that is not there, or the statistics are not of the protocol named.
    """
    path = Path(reference)
    if path.suffix == ".npz":
        return read_statistics(path, protocol)
    is_plain = path.is_dir() and not any(path.glob("annotations/captions_*.json"))
    if is_plain and (listing := list_folder(path)).names and not listing.splits():
        if split:
            raise ClipgenError(f"{path} has no splits, so no {split!r}: leave --split out, or name its folder")
        return open_folder(path, size)
    return open_images(reference, split or "val", size)


def frechet_over_n(features: torch.Tensor, reference: Moments) -> dict[str, float]:
    """n as text -> Frechet distance of the first n rows to a reference, n = N, N/2, N/4, ...: the bias of a small N.

    Features (N, d) are in random order; of n there are at most five, none below 16, the smallest first.
    """
    distances = {}
    for n in sorted({len(features) >> i for i in range(5)}):
        if n >= 16:
            part = GaussianStatistics()
            part.update(features[:n])
            distances[str(n)] = frechet_distance(*reference, *part.compute())
    return distances


def resampled(distance: Callable, rows: torch.Tensor | np.ndarray, estimate: float, n: int = RESAMPLES) -> list[float]:
    """95% interval of a distance of rows (N, d): the estimate +- 1.96 standard deviations over `n` resamples with replacement.

    Doubled rows raise every distance, so that its percentiles would lie too high; its spread they keep.
    """
    rng = np.random.default_rng([0, 47])
    spread = np.std([distance(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(n)], ddof=1)
    return [float(estimate - 1.96 * spread), float(estimate + 1.96 * spread)]


class SetStatistics(NamedTuple):
    """What all distances need of one set of images under one protocol, from one pass over it."""

    halves: dict[int, tuple[GaussianStatistics, GaussianStatistics]]  # blur radius -> sums of every other image
    sample: FeatureSample  # features of unblurred images
    network: FeatureNetwork

    @property
    def dim(self) -> int:
        return len(next(iter(self.halves.values()))[0].total)

    def moments(self, k: int) -> Moments:
        first, second = self.halves[k]
        return (first + second).compute()

    @classmethod
    def empty(cls, network: FeatureNetwork, radii: Iterable[int]) -> Self:
        """Of no image yet."""
        return cls({k: (GaussianStatistics(), GaussianStatistics()) for k in radii}, FeatureSample(), network)

    @torch.inference_mode()
    def update(self, images: torch.Tensor) -> None:
        """Take images (B, 3, H, W) in [-1, 1], rounded to 8 bits first, at every blur radius at once."""
        images = eight_bit(images)
        for k, (first, second) in self.halves.items():
            features, n = self.network(blur(images, k)).cpu(), first.n + second.n
            first.update(features[n % 2 :: 2])
            second.update(features[(n + 1) % 2 :: 2])
            if k == 0:
                self.sample.update(features)


def set_statistics(batches: Iterable[torch.Tensor], network: FeatureNetwork, radii: Iterable[int]) -> SetStatistics:
    """Statistics of all images of the batches, as `SetStatistics.update` takes them."""
    found = SetStatistics.empty(network, radii)
    for images in batches:
        found.update(images)
    return found


def saved_statistics(
    images: ImageSet, network: FeatureNetwork, radii: Iterable[int], batch_size: int, device: torch.device
) -> tuple[SetStatistics, Path]:
    """Statistics of a set of files, and where they are saved: taken from there, or resumed, where the same were asked for before.

    The same are those of the same files (names, sizes, times), network, radii, batch size and versions of packages. Raises
    Stopped after a signal.
    """
    times = [] if images.table else [os.stat(images.root / name).st_mtime_ns for name in images.names]
    facts = [images.hash, times, network.protocol, network.weights_hash, list(radii), batch_size, versions()]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path, found = MADE_DATA / "cache" / "statistics" / f"{digest}.safetensors", SetStatistics.empty(network, radii)
    parts, saved = [*(part for pair in found.halves.values() for part in pair), found.sample], 0
    with suppress(ClipgenError, OSError), held(path.parent, "statistics", wait=True):
        pass  # sweeps what killed processes have left; where nothing can be written, nothing is kept
    if path.exists():
        state, meta = load_checkpoint(path)
        saved, images.skipped = meta["rows"], images.skipped | meta["skipped"]
        for part, values in zip(parts, state["parts"], strict=True):
            vars(part).update(values)

    def save(rows: int) -> None:
        try:
            with held(path.parent, "statistics", wait=True):
                save_checkpoint(path, {"parts": list(map(vars, parts))}, {"rows": rows, "skipped": images.skipped})
        except (ClipgenError, OSError) as error:  # what was scored is worth more than its copy
            tell(f"statistics of {images.name} are not kept ({error})")

    chosen, workers = range(saved, len(images)), 0 if device.type == "cpu" else 4
    with stoppable() as stop, progress(len(images), f"scoring {images.name}", initial=saved) as bar:
        for rows, batch in ordered_batches(images, chosen, batch_size, workers):
            found.update(to_float(batch).to(device))
            bar.update(len(rows))
            if (done := rows[-1] + 1) - saved >= SAVE_EVERY:
                save(saved := done)
            stop.raise_if_asked(lambda done=done: save(done), f"in scoring {images.name}")
    if chosen:
        save(len(images))
    return found, path


def fid_by_radius(scored: SetStatistics, reference: SetStatistics | Moments) -> dict[str, float]:
    """FID-k for every blur radius k of the reference, by the scored set at that radius, or unblurred where it has no other.

    Of statistics of a file k is 0 alone.
    """
    known = {0: reference} if isinstance(reference, Moments) else {k: reference.moments(k) for k in reference.halves}
    radii = {k: k if k in scored.halves else 0 for k in known}
    return {str(k): frechet_distance(*scored.moments(r), *known[k]) for k, r in radii.items() if r in scored.halves}


def set_scores(scored: SetStatistics, reference: SetStatistics | Moments) -> dict:
    """All that compares one set of images with another under one protocol.

    These are `fid` (k -> FID-k), `fid_over_n`, `inception_score` where the network has a head; of a reference of images
    `floor` (FID-k of its halves), `kid`, and of the same number `n` of images of either set `mind`, `cmmd` under protocol `clip`,
    and `manifold` (precision, recall, density, coverage, which falls where the sets differ in size). 95% intervals over the scored
    images: `fid_interval` by `frechet_error`, those of `kid`, `mind` and `cmmd` by `resampled`, of precision and recall by Wilson.
    """
    scores: dict = {"fid": fid_by_radius(scored, reference), "floor": {}}
    is_set = isinstance(reference, SetStatistics)
    for k, (first, second) in reference.halves.items() if is_set else ():
        scores["floor"][str(k)] = frechet_distance(*first.compute(), *second.compute())
    if scored.sample.n:
        known, rows = reference.moments(0) if is_set else reference, scored.sample.compute()
        scores["fid_over_n"] = frechet_over_n(rows, known)
        margin = 1.96 * frechet_error(known, scored.moments(0), rows) * (len(rows) / scored.sample.n) ** 0.5
        scores["fid_interval"] = [scores["fid"]["0"] - margin, scores["fid"]["0"] + margin]
    if is_set and min(scored.sample.n, reference.sample.n) > 5:  # the fifth neighbour
        real, fake = reference.sample.compute(), scored.sample.compute()
        n = min(len(real), len(fake))
        real, fake = real[:n], fake[:n]  # their order is random
        scores["kid"] = kernel_distance(reference.sample.compute(), scored.sample.compute())
        scores["manifold"] = {**manifold_scores(real, fake), "n": n}
        for key in ("precision", "recall"):
            scores["manifold"][f"{key}_interval"] = list(wilson(round(n * scores["manifold"][key]), n))
        distances = {"mind": sliced_distance} | ({"cmmd": cmmd} if scored.network.protocol == "clip" else {})
        scores |= {name: distance(real, fake) for name, distance in distances.items()}
        for name, distance in {**distances, "kid": polynomial_mmd}.items():
            value = scores["kid"]["mean"] if name == "kid" else scores[name]
            scores[f"{name}_interval"] = resampled(partial(distance, real), fake, value)
    if scored.sample.n and scored.network.head is not None:
        scores["inception_score"] = inception_score(scored.network.logits(scored.sample.compute()))
    return scores
