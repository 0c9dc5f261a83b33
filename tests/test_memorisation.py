import numpy as np
import pytest
import torch
from conftest import StandIn, normal
from PIL import Image

from clipgen_lib.data.datasets import open_folder
from clipgen_lib.data.images import to_arrays
from clipgen_lib.evaluate import EvaluateConfig, Evaluators, nearest_images
from clipgen_lib.metrics.features import FeatureNetwork
from clipgen_lib.metrics.memorisation import memorisation, nearest


def test_nearest_is_that_of_all_pairs():
    rows, others = normal(7, 5), normal(11, 5, 1)
    distance, owner = nearest(rows, others, chunk=3)
    pairs = ((rows[:, None] - others) ** 2).sum(2).sqrt()
    assert torch.allclose(distance, pairs.min(1).values) and torch.equal(owner, pairs.argmin(1))


def test_shares_are_of_the_nearest_real_image():
    """On a line: training images at 0 and 10, real ones 1 and 2 away, generated ones 0.5, 1.5 and 3 away."""
    sets = ([0.5, 11.5, 3.0], [1.0, 12.0], [0.0, 10.0])
    described = [{key: torch.tensor(x)[:, None] for key in ("features", "pixels")} for x in sets]
    scores = memorisation(*described, pairs=2)
    assert scores["median"] == scores["median_real"] + 0.5 == 1.5 and scores["n_train"] == 2
    assert scores["share_nearer_than_real"] == pytest.approx(1 / 3)
    assert scores["pixels"]["pairs"] == [[0, 0, 0.5], [1, 1, 1.5]]


def test_a_planted_copy_is_found(clip, tmp_path):
    """A training image among generated ones, saved again: the closest pair by features and by pixels."""
    images = {
        name: normal(20, 3 * 32 * 32, seed).view(20, 3, 32, 32) / 3
        for seed, name in enumerate(("train", "real", "made"))
    }
    images["made"][4] = images["train"][13]
    for name, batch in images.items():
        (tmp_path / name).mkdir()
        for row, array in enumerate(to_arrays(batch)):
            Image.fromarray(array).save(tmp_path / name / f"{row:02d}.png")
    sets = [open_folder(tmp_path / name) for name in ("made", "train", "real")]
    judges = Evaluators(clip, networks=lambda *_: FeatureNetwork("inception", StandIn(), "stand-in", "0"))
    scores, shown = nearest_images(*sets, EvaluateConfig(), judges)
    assert scores["pairs"][0] == scores["pixels"]["pairs"][0] == ["04.png", "13.png", 0.0]
    assert 1 / 20 <= scores["share_nearer_than_real"] < 0.5 and scores["n"] == scores["n_train"] == 20
    assert shown.shape == (20, 3, 32, 32) and np.array_equal(*to_arrays(shown[:2]))
