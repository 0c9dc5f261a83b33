"""Figures hold the data they are given; how they look is seen in the notebooks."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

matplotlib.use("agg")

from clipgen_lib import plots

IMAGES = torch.rand(6, 3, 16, 16) * 2 - 1


@pytest.fixture(autouse=True)
def closed():
    yield
    plots.plt.close("all")


def test_curves_draw_what_was_logged_and_nothing_else():
    metrics = [{"step": 1, "nll": 3.0, "lr": None}, {"step": 2, "nll": 2.0, "lr": None}]
    figure = plots.curves(metrics, {"NLL": ("nll",), "rate": ("lr",), "none": ("other",)}, "run, step 2")
    assert [axis.get_title() for axis in figure.axes] == ["NLL"] and figure.get_suptitle() == "run, step 2"
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 3], [2, 2]]
    assert isinstance(plots.curves([], {"NLL": ("nll",)}, "nothing yet"), Figure)


def test_token_numbers_contrast_with_their_patches():
    tokens = torch.arange(16).view(4, 4)
    texts = plots.token_grid(IMAGES[0], tokens, "tokens").axes[1].texts
    assert [int(text.get_text()) for text in texts] == list(range(16))
    assert {text.get_color() for text in texts} == {"black", "white"}
    shown = plots.plt.gcf().axes[1].images[0].get_array()
    luminance = np.asarray(shown)[..., :3] @ (0.299, 0.587, 0.114)
    for text, light in zip(texts, luminance.flatten(), strict=True):
        assert (text.get_color() == "black") == (light > 0.5)


def test_frequencies_are_shares():
    figure = plots.frequencies(torch.tensor([[0, 0, 0, 2]]), 4, "codes")
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.75, 0.25, 0, 0]


def test_a_table_is_drawn_row_by_row():
    table = [
        {"name": "plain", "text": "none", "caps": {"mean": 0.5, "std": 0.1}},
        {"name": "text-conditioned", "text": "paired", "caps": {"mean": 0.7, "std": 0.0}},
        {"name": "retrieval", "text": "none"},
    ]
    axis = plots.ablation(table, "caps", "CapS").axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["text-conditioned", "plain"]
    curves = {"plain": {"1": {"fid_0": {"mean": 10.0}, "caps": {"mean": 0.5}}}}
    line = plots.tradeoff(curves, "fid_0", "caps", "trade-off").axes[0].lines[0]
    assert line.get_xydata().tolist() == [[10.0, 0.5]]


def test_every_other_figure_is_a_figure(tmp_path):
    for step in (10, 20):
        Image.new("RGB", (40, 10)).save(tmp_path / f"{step:06d}.png")
    evaluation = {"fid": {"0": 2.0}, "rfid": {"0": 1.0}, "floor": {"0": 0.5}, "protocol": "clip", "n": 9}
    caps = {"caps": 0.5, "caps_floor": 0.1, "caps_ceiling": 0.9}
    embeds = torch.nn.functional.normalize(torch.randn(3, 20, 8), dim=-1)
    figures = [
        plots.image(np.zeros((8, 8, 3), np.uint8), "one"),
        plots.reconstructions(IMAGES[:3], IMAGES[3:], "run"),
        plots.neighbours([IMAGES[:3], IMAGES[3:]], "run"),
        plots.previews(tmp_path, "previews"),
        plots.contact_sheet(IMAGES, ["a long prompt " * 9] * 6, "samples", columns=4),
        plots.rows({"a": IMAGES[:3], "b": IMAGES[3:]}, "rows", ["1", "2", "3"]),
        plots.distances(evaluation, "without captions"),
        plots.distances(evaluation | caps, "with captions"),
        plots.oracle({"text": {"one": {"n": 4, "colour": 0.5}}}, "oracle"),
        plots.gap(*embeds, "gap"),
        plots.fid_over_n({"run": {"10": 5.0, "20": 4.0}}, "bias"),
        plots.corruptions(
            {"none": {"fid": 0.0, "inf": 1.0}, "noise": {"fid": 9.0, "inf": float("inf")}}, "corruptions"
        ),
    ]
    assert all(isinstance(figure, Figure) for figure in figures)
