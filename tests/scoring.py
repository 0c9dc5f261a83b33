"""`python tests/scoring.py ours|pytorch-fid A B`: the Frechet distance of two folders under EfficientNet-Lite2, and the peak memory.

Ours gives all other distances with intervals beside it; pytorch-fid's own functions give this one.
"""

import json
import resource
import sys
from pathlib import Path

import torch

from clipgen_lib import ClipEmbedder
from clipgen_lib.config import EvaluateConfig
from clipgen_lib.evaluate import Evaluators, open_folder, score_images
from clipgen_lib.metrics.features import efficientnet_lite, prepare


def ours(a: Path, b: Path) -> float:
    config = EvaluateConfig(protocol="lite", also=(), blur=(0,), batch_size=50)
    return score_images(open_folder(a), open_folder(b), config, Evaluators(ClipEmbedder.load()))["fid"]["0"]


def pytorch_fid(a: Path, b: Path) -> float:
    from pytorch_fid.fid_score import calculate_activation_statistics, calculate_frechet_distance

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network, _ = efficientnet_lite(2)
            self.network.reset_classifier(0)

        def forward(self, x):
            return [self.network(prepare("lite", 2 * x - 1))[:, :, None, None]]

    files = [sorted(folder.iterdir()) for folder in (a, b)]
    moments = [calculate_activation_statistics(some, Pooled(), 50, 1280, "cpu", 0) for some in files]
    return float(calculate_frechet_distance(*moments[0], *moments[1]))


if __name__ == "__main__":
    way, *folders = sys.argv[1:]
    fid = {"ours": ours, "pytorch-fid": pytorch_fid}[way](*map(Path, folders))
    print(json.dumps({"fid": fid, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
