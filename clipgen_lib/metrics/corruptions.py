"""Do the metrics order corruptions? Real images, corrupted more and more, are scored against other real images."""

from collections.abc import Callable

import torch

from ..data.batches import ordered_batches
from ..data.datasets import ImageSet
from ..data.images import blur, jpeg, to_float
from ..runtime.runs import ClipgenError
from .distances import reconstruction_scores
from .features import FeatureNetwork
from .statistics import set_scores, set_statistics

CORRUPTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "JPEG 50": lambda x: jpeg(x, 50),
    "blur": lambda x: blur(x, 2),
    "noise": lambda x: x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x),
}


def corruption_scores(images: ImageSet, network: FeatureNetwork, device: str = "cpu") -> dict[str, dict[str, float]]:
    """One half of a set's first 1,000 images, corrupted, against the other half: corruption -> metric -> value.

    Metrics are `fid`, `kid`, precision, recall, density, coverage, and `psnr` and `ssim` against the half as it was.
    """
    rows = range(min(1_000, len(images)))
    if len(rows) < 16:
        raise ClipgenError(f"{images.root} has {len(rows)} images, too few to halve and compare: use at least 16")
    whole = torch.cat([to_float(batch) for _, batch in ordered_batches(images, rows, 64)]).to(device)
    reference, scores = set_statistics(whole[::2].split(64), network, (0,)), {}
    for name, corrupt in CORRUPTIONS.items():
        parts = [corrupt(part) for part in whole[1::2].split(64)]
        distances = set_scores(set_statistics(parts, network, (0,)), reference)
        pairs = reconstruction_scores(whole[1::2], torch.cat(parts))
        manifold = {key: value for key, value in distances["manifold"].items() if key != "n"}
        scores[name] = {"fid": distances["fid"]["0"], "kid": distances["kid"]["mean"], **manifold}
        scores[name] |= {key: float(values.mean()) for key, values in pairs.items()}
    return scores
