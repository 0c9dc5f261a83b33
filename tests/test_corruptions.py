import zipfile

import numpy as np
import pytest

from clipgen_lib import plots
from clipgen_lib.evaluate import open_folder
from clipgen_lib.metrics.corruptions import corruption_scores
from clipgen_lib.metrics.features import feature_network


def test_photos_are_ordered_by_corruption(shared, clip, tmp_path):
    """Real against real < JPEG < blur < noise, for every metric that knows this order.

    Precision and density do not: an image made softer may well stay inside, or lie deeper in, the real manifold.
    """
    archive = shared / "tiny-imagenet-20.zip"
    if not archive.is_file():
        pytest.skip("tiny-imagenet-20.zip is not on this machine")
    with zipfile.ZipFile(archive) as content:
        names = [n for n in content.namelist() if "/val/" in f"/{n}" and n.lower().endswith((".jpeg", ".jpg", ".png"))]
        content.extractall(tmp_path, names)
    found = corruption_scores(open_folder(tmp_path), feature_network("clip", clip))
    for metric, sign in (("fid", 1), ("kid", 1), ("recall", -1), ("coverage", -1), ("psnr", -1), ("ssim", -1)):
        values = [sign * scores[metric] for scores in found.values()]
        assert values == sorted(values) and values[0] < values[-1], (metric, values)
    for metric in ("precision", "density"):
        assert found["noise"][metric] < 0.5 * found["none"][metric]
    assert all(np.isfinite(v) for scores in found.values() for key, v in scores.items() if key != "psnr")
    assert plots.corruptions(found, "photos").axes


def test_few_photos_are_ordered_by_distance(shared, clip):
    found = corruption_scores(open_folder(shared / "coco-mini", 64), feature_network("clip", clip))
    for metric in ("fid", "kid"):
        values = [scores[metric] for scores in found.values()]
        assert values == sorted(values)
