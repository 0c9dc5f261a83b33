"""Figures hold the data they are given; how they look is seen in the notebooks."""

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure
from PIL import Image

matplotlib.use("agg")

from clipgen_lib import plots
from clipgen_lib.data.images import to_arrays

IMAGES = torch.rand(6, 3, 16, 16) * 2 - 1


@pytest.fixture(autouse=True)
def closed():
    yield
    plots.plt.close("all")


def shown(figure):
    """The pixels of a figure, (H, W, 4)."""
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())


def test_curves_draw_what_was_logged_and_nothing_else():
    metrics = [{"step": 1, "nll": 3.0, "lr": None}, {"step": 2, "nll": 2.0, "lr": None}]
    figure = plots.curves(metrics, {"NLL": ("nll",), "rate": ("lr",), "none": ("other",)}, "run, step 2")
    assert [axis.get_title() for axis in figure.axes] == ["NLL"] and figure.get_suptitle() == "run, step 2"
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 3], [2, 2]]
    assert isinstance(plots.curves([], {"NLL": ("nll",)}, "nothing yet"), Figure)


def test_token_numbers_contrast_with_their_patches():
    axis = plots.token_grid(IMAGES[0], torch.arange(16).view(4, 4), "tokens").axes[1]
    assert [int(text.get_text()) for text in axis.texts] == list(range(16))
    assert {text.get_color() for text in axis.texts} == {"black", "white"}
    luminance = np.asarray(axis.images[0].get_array())[..., :3] @ (0.299, 0.587, 0.114)
    for text, light in zip(axis.texts, luminance.flatten(), strict=True):
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


def test_texts_of_users_are_drawn_as_they_are_and_log_axes_as_numbers():
    figures = [plots.image(np.zeros((9, 99, 3), np.uint8), text) for text in ("x_1", "$x_1$", "$\\frac$ to $6")]
    narrow, wide, _ = (shown(x).any() and x.axes[0].title.get_window_extent().width for x in figures)
    assert wide > narrow + 5, "two dollars more"
    axis = plots.frequencies(torch.tensor([[0] * 999 + [2]]), 4, "codes").axes[0]
    shown(axis.figure), shown(axis.figure)
    label = next(tick.label1 for tick in axis.yaxis.get_major_ticks() if "10^" in tick.label1.get_text())
    assert label.get_window_extent().width < 45, label.get_text()


def test_a_character_takes_a_font_that_has_it_or_a_box_that_is_told(recwarn):
    """STIX comes with matplotlib and has a bold script A, which the default font has not; nobody has U+2FFFD."""
    with_glyph, box = (shown(plots.rows({text: IMAGES[:1]}, "")) for text in ("\U0001d4d0", "\U0002fffd"))
    assert not np.array_equal(with_glyph, box)
    for text in ("\U0002fffd b", "c\U0002fffd\u200d"):
        shown(plots.contact_sheet(IMAGES[:1], [text], text))
    (told,) = (str(warning.message) for warning in recwarn)
    assert "boxes stand for \U0002fffd: install a font that has it" in told


def test_columns_stand_under_their_labels():
    axis = plots.rows({"a": IMAGES[:3], "b": IMAGES[3:]}, "rows", ["1", "2", "3"]).axes[0]
    assert axis.get_xticks().tolist() == [8, 26, 44] and axis.get_yticks().tolist() == [8, 26]
    assert np.array_equal(axis.images[0].get_array()[18:34, 18:34], to_arrays(IMAGES[4:5])[0])


def test_a_saved_figure_is_shown_whatever_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = Image.open(ROOT / "results" / "reference" / "figures" / "images.png").convert("RGB")
    assert np.abs(np.asarray(plots.saved("images").convert("RGB"), int) - kept).mean() < 2
    assert "none/figures/images.png is not in results/" in plots.saved("images", "none")


def test_what_is_not_measured_or_infinite_is_said():
    evaluation = {"fid": {"0": 2.0}, "rfid": {"0": 1.0}, "floor": {"0": 0.5}, "protocol": "clip", "n": 9}
    assert plots.distances(evaluation, "without captions").axes[1].get_title() == "no captions, so no CapS"
    scores = {"none": {"fid": 0.0, "inf": 1.0}, "noise": {"fid": 9.0, "inf": float("inf")}}
    assert [text.get_text() for text in plots.corruptions(scores, "corruptions").axes[1].texts] == ["1", "infinite"]


def test_a_long_prompt_is_cut():
    title = plots.contact_sheet(IMAGES, ["a long prompt " * 9] * 6, "samples", columns=4).axes[0].get_title()
    assert title.count("\n") == 2 and title.endswith(" ...")
