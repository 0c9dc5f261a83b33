"""Memorisation: is a generated image nearer to a training image than real images that were never trained on?

In: generated, training and validation images. Out: distances to the nearest training image, in a feature network and in pixels.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ..data.images import eight_bit
from .features import FeatureNetwork
from .intervals import wilson

SIDE = 16  # of the thumbnails whose pixels are compared


@torch.inference_mode()
def descriptions(batches: Iterable[torch.Tensor], network: FeatureNetwork) -> dict[str, torch.Tensor]:
    """What images (B, 3, H, W) in [-1, 1] are compared by: `features` (N, d) of unit norm, and `pixels` of a thumbnail (N, 768)."""
    found = [(network(x), F.interpolate(x, (SIDE, SIDE), mode="area").flatten(1)) for x in map(eight_bit, batches)]
    features, pixels = (torch.cat(parts).cpu().float() for parts in zip(*found, strict=True))
    return {"features": F.normalize(features, dim=1), "pixels": pixels / SIDE}


def nearest(rows: torch.Tensor, others: torch.Tensor, chunk: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean distance of each row (N, d) to the nearest of the others (M, d), and which that is: (N,) and (N,).

    A matrix product, which rounds, finds the eight nearest; of these the distances are exact, so that a copy has 0.
    """
    lengths, found = others.pow(2).sum(1), []
    for part in rows.split(chunk):
        near = (lengths - 2 * part @ others.T).topk(min(8, len(others)), dim=1, largest=False).indices
        distance, best = (part[:, None] - others[near]).norm(dim=-1).min(1)
        found.append((distance, near.gather(1, best[:, None])[:, 0]))
    distances, owners = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(owners)


def memorisation(generated: dict, real: dict, train: dict, pairs: int = 10) -> dict:
    """How near generated images come to training images, beside real images that were not trained on; each of `descriptions`.

    Returns, by features and under `pixels` by thumbnails: `median` of the distances to the nearest training image, `median_real` of the
    real images, `share_nearer_than_real`, of generated images nearer to a training image than any real one is, with its 95%
    interval; and `pairs`, (row of the generated image, row of its nearest training image, distance) of the closest.
    """
    scores = {}
    for kind in ("features", "pixels"):
        distance, owner = nearest(generated[kind], train[kind])
        of_real, _ = nearest(real[kind], train[kind])
        nearer = int((distance < of_real.min()).sum())
        first = distance.argsort()[:pairs].tolist()
        scores[kind] = {
            "median": distance.median().item(),
            "median_real": of_real.median().item(),
            "share_nearer_than_real": nearer / len(distance),
            "share_nearer_than_real_interval": list(wilson(nearer, len(distance))),
            "pairs": [[row, owner[row].item(), distance[row].item()] for row in first],
        }
    return {
        **scores["features"],
        "pixels": scores["pixels"],
        "n": len(generated["pixels"]),
        "n_train": len(train["pixels"]),
    }
