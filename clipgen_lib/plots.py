"""Figures: each function takes data and returns a matplotlib Figure; nothing is shown or saved here."""

import os
import textwrap
import unicodedata
import warnings
from functools import cache, partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import Image

from .data.images import grid, to_arrays
from .runtime.runs import ROOT

plt.rcParams.update({"figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9})
BELOW = {"fontsize": 8, "loc": "upper left", "bbox_to_anchor": (0, -0.24), "ncols": 2, "frameon": False}  # a legend
BARE = {"frame_on": False, "xticks": [], "yticks": []}  # axes of an image


class TextFigure(Figure):
    """A figure that shows texts as they are: `$` is no mathematics, and a character takes a font that has it."""

    def draw(self, renderer: object) -> None:
        texts = {text: text.get_text() for text in self.findobj(Text)}
        lacking = set(map(ord, "".join(texts.values()))) - FT2Font(findfont("DejaVu Sans")).get_charmap().keys()
        families = _families(frozenset(lacking))
        for text, shown in texts.items():  # the mathematics is matplotlib's own numbers on a log axis
            text.set(parse_math="$" not in shown or "\\mathdefault" in shown, fontfamily=families)
        super().draw(renderer)


@cache
def _families(lacking: frozenset[int]) -> list[str]:
    """The default font, and those of this machine that have code points which it lacks; says which of them no font has."""
    families = list(plt.rcParams["font.family"])
    for font in fontManager.ttflist if lacking else []:
        is_real = os.path.isfile(font.fname) and "lastresort" not in font.name.lower().replace(" ", "")
        if is_real and (found := lacking & FT2Font(font.fname).get_charmap().keys()):
            lacking, families = lacking - found, [*families, font.name]
    unseen = ("Cc", "Cf", "Mn")  # joiners, marks
    if boxes := "".join(c for c in map(chr, sorted(lacking)) if unicodedata.category(c) not in unseen):
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # matplotlib's own, one for each
        warnings.warn(f"boxes stand for {boxes}: install a font that has it, such as Noto Sans CJK", stacklevel=3)
    return families


_subplots = partial(plt.subplots, FigureClass=TextFigure)


def saved(name: str, run: str = "reference", results: Path = ROOT / "results") -> Image.Image | str:
    """A figure that a run has kept, in 256 colours, by default one that comes with the project; else a sentence."""
    path = results / run / "figures" / f"{name}.png"
    if not path.is_file():
        return f"{run}/figures/{name}.png is not in {results.name}/: it comes with a clone of the project"
    return Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE)


def image(array: np.ndarray, title: str) -> Figure:
    """One uint8 image (H, W, 3), 1.6 times its pixels, under a title."""
    height, width = (side * 1.6 / 100 for side in array.shape[:2])
    figure, axis = _subplots(figsize=(width, height + 0.3), subplot_kw=BARE)
    axis.imshow(array, interpolation="nearest")
    axis.set_title(title)
    return figure


def curves(metrics: list[dict], panels: dict[str, tuple[str, ...]], title: str) -> Figure:
    """One panel for each entry of which anything was logged: panel title -> the logged scalars drawn in it."""
    logged = {key for line in metrics for key, value in line.items() if value is not None}
    panels = {label: found for label, keys in panels.items() if (found := [key for key in keys if key in logged])}
    columns = max(len(panels), 1)
    figure, axes = _subplots(1, columns, figsize=(3.2 * columns, 2.8), squeeze=False)
    for axis, (label, keys) in zip(axes[0], panels.items(), strict=False):
        for key in keys:
            points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
            axis.plot(*zip(*points, strict=True), label=key)
        axis.set(title=label, xlabel="step")
        axis.locator_params(axis="x", nbins=4, integer=True)
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(**BELOW)
    figure.suptitle(title)
    return figure


def frequencies(tokens: torch.Tensor, codebook_size: int, title: str) -> Figure:
    """How often each code is used, most frequent first, against the uniform share."""
    counts = np.sort(np.bincount(tokens.flatten().numpy(), minlength=codebook_size))[::-1] / tokens.numel()
    figure, axis = _subplots(figsize=(5, 2.6))
    axis.bar(np.arange(codebook_size), counts, width=1.0)
    axis.axhline(1 / codebook_size, color="black", linewidth=0.8, label="every code alike")
    axis.set(xlabel="codes, most frequent first", ylabel="share of tokens", yscale="log", title=title)
    axis.legend(**BELOW)
    return figure


def token_grid(image: torch.Tensor, tokens: torch.Tensor, title: str) -> Figure:
    """An image (3, H, W) in [-1, 1] beside its tokens (h, w), each number on its patch, black on light, white on dark."""
    figure, axes = _subplots(1, 2, figsize=(9, 4.6), subplot_kw=BARE)
    colours = plt.get_cmap("twilight")(plt.Normalize()(tokens.numpy()))  # (h, w, 4), RGBA in [0, 1]
    luminance = colours[..., :3] @ (0.299, 0.587, 0.114)
    axes[0].imshow(to_arrays(image[None])[0], interpolation="nearest")
    axes[1].imshow(colours)
    for (y, x), token in np.ndenumerate(tokens.numpy()):
        colour = "black" if luminance[y, x] > 0.5 else "white"
        axes[1].text(x, y, token, ha="center", va="center", fontsize=min(9, 72 / len(tokens)), color=colour)
    figure.suptitle(title)
    return figure


def strips(strips: dict[str, Path | np.ndarray], title: str, above: list[str] | None = None) -> Figure:
    """Strips of images, files or uint8 (H, W, 3), all of one size, each beside its label; `above` names the columns."""
    arrays = [np.asarray(Image.open(strip)) if isinstance(strip, Path) else strip for strip in strips.values()]
    above, gap = [wrapped(label, 13, lines=5) for label in above or []], 2
    sheet = np.vstack([np.pad(array, ((0, gap), (0, 0), (0, 0)), constant_values=255) for array in arrays])
    row, column = len(sheet) / len(arrays), (sheet.shape[1] + gap) / max(len(above), 1)
    inches, lines = 0.76 / row, max((label.count("\n") + 1 for label in above), default=0)
    figure, axis = _subplots(figsize=(sheet.shape[1] * inches + 1.8, len(sheet) * inches + 0.5 + 0.14 * lines))
    axis.imshow(sheet, interpolation="nearest")
    axis.set_yticks([(i + 0.5) * row - gap / 2 for i in range(len(arrays))], [wrapped(key, 16) for key in strips])
    axis.set_xticks([(i + 0.5) * column - gap / 2 for i in range(len(above))], above, fontsize=8)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    figure.suptitle(wrapped(title, int(11 * figure.get_figwidth())))
    return figure


def rows(images: dict[str, torch.Tensor], title: str, above: list[str] | None = None) -> Figure:
    """One row of images (C, 3, H, W) in [-1, 1] for each label, all of one size and number; `above` names the columns."""
    return strips({label: grid(row, len(row)) for label, row in images.items()}, title, above)


def contact_sheet(images: torch.Tensor, prompts: list[str], title: str, columns: int = 8) -> Figure:
    """Images (N, 3, H, W) in [-1, 1], each under its prompt."""
    columns = min(columns, len(prompts))
    rows = -(-len(prompts) // columns)
    figure, axes = _subplots(rows, columns, figsize=(1.4 * columns, 1.8 * rows + 0.4), squeeze=False, subplot_kw=BARE)
    for axis, array, prompt in zip(axes.flat, to_arrays(images), prompts, strict=False):
        axis.imshow(array, interpolation="nearest")
        axis.set_title(wrapped(prompt, 22), fontsize=7)
    figure.suptitle(wrapped(title, int(11 * figure.get_figwidth())))
    return figure


def wrapped(text: str, width: int, lines: int = 3) -> str:
    """A label on at most `lines` lines; one with lines of its own stays as it is. Chinese characters are twice as wide."""
    width //= 1 + any(unicodedata.east_asian_width(character) in "WF" for character in text)
    return text if "\n" in text else "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))


def distances(evaluation: dict, title: str) -> Figure:
    """FID-k of generator, tokenizer and real halves side by side, and CapS between its references."""
    figure, axes = _subplots(1, 2, figsize=(9, 3.2), width_ratios=(3, 2))
    radii = list(evaluation["fid"])
    for i, (label, key) in enumerate((("generator", "fid"), ("tokenizer (rFID)", "rfid"), ("real halves", "floor"))):
        axes[0].bar(np.arange(len(radii)) + 0.27 * (i - 1), [evaluation[key][k] for k in radii], 0.25, label=label)
    axes[0].set_xticks(range(len(radii)), radii)
    axes[0].set(xlabel="blur radius k (pixels)", ylabel="Frechet distance", yscale="log")
    axes[0].set_title(f"{evaluation['protocol']}, N = {evaluation['n']}")
    axes[0].legend(**BELOW)
    if "caps" in evaluation:
        bars = {"others'\ncaptions": "caps_floor", "generated": "caps", "own\ncaptions": "caps_ceiling"}
        axes[1].bar(list(bars), [evaluation[key] for key in bars.values()], color=["grey", "tab:blue", "grey"])
    axes[1].set_title("CapS (cosine under the evaluation CLIP)" if "caps" in evaluation else "no captions, so no CapS")
    figure.suptitle(title)
    return figure


def oracle(scores: dict, title: str) -> Figure:
    """Shares that the oracle finds correct, in percent: a row for each modality and kind of prompt, a column for each score."""
    rows = [(f"{modality}, {kind}", values) for modality, kinds in scores.items() for kind, values in kinds.items()]
    names = dict.fromkeys(key for _, values in rows for key in values if key != "n" and not key.endswith("_interval"))
    shares = np.array([[values.get(name, np.nan) for name in names] for _, values in rows])
    figure, axis = _subplots(figsize=(0.75 * len(names) + 2.5, 0.3 * len(rows) + 1.1))
    axis.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="Blues")
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            colour = "white" if share > 0.6 else "black"
            axis.text(column, row, f"{100 * share:.1f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_yticks(range(len(rows)), [f"{label}, n = {values['n']}" for label, values in rows], fontsize=8)
    axis.set_title(title, fontsize=10)
    return figure


def ablation(table: list[dict], key: str, title: str) -> Figure:
    """One metric of every row, its spread over seeds as a bar; the line is the first row, the plain recipe."""
    rows = [row for row in table if key in row][::-1]
    figure, axis = _subplots(figsize=(7, 0.24 * len(rows) + 1.2))
    for text, colour in {"none": "tab:blue", "unpaired": "tab:orange", "paired": "tab:red"}.items():
        places = [i for i, row in enumerate(rows) if row["text"] == text]
        means, stds = ([rows[i][key][part] for i in places] for part in ("mean", "std"))
        axis.errorbar(means, places, xerr=stds, fmt="o", color=colour, label=f"text in training: {text}")
    axis.axvline(rows[-1][key]["mean"], color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.set(xlabel=key, title=title)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    return figure


def tradeoff(curves: dict[str, dict[str, dict]], x: str, y: str, title: str) -> Figure:
    """Two metrics against each other: a line for each entry of `curves`, method -> {name of a point -> row of a table}."""
    figure, axis = _subplots(figsize=(9, 6))
    for i, (label, points) in enumerate(curves.items()):
        places = [(row[x]["mean"], row[y]["mean"]) for row in points.values()]
        (line,) = axis.plot(*zip(*places, strict=True), marker="o", markersize=4, linewidth=0.8, label=label)
        for name, place in zip(points, places, strict=True):  # above one line, below the next
            axis.annotate(name, place, (-4, 5 - 15 * (i % 2)), textcoords="offset points", color=line.get_color())
    axis.set(xlabel=x, ylabel=y, title=title, xscale="log")
    axis.grid(alpha=0.3, which="both")
    figure.legend(fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    return figure


def gap(images: torch.Tensor, texts: torch.Tensor, noised: torch.Tensor, title: str) -> Figure:
    """The modality gap: cosines of pairs, and both modalities on their first two principal axes.

    Embeddings are (N, D), images and texts of unit norm, text i of image i; the transformer trains on `noised`.
    """
    figure, axes = _subplots(1, 2, figsize=(10, 3.8))
    others = {"its text": texts, "another's text": texts.roll(1, 0), "another": images.roll(1, 0)}
    for label, other in {**others, "itself noised": noised}.items():
        cosines, bins = (images * other).sum(1).numpy(), np.linspace(-0.4, 1.001, 80)
        axes[0].hist(cosines, bins, alpha=0.5, density=True, label=f"image, {label}")
    axes[0].set(xlabel="cosine", yticks=[], title="cosines")
    centred = torch.cat([images, texts]) - torch.cat([images, texts]).mean(0)
    plane = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T).numpy()
    for label, part in (("images", plane[: len(images)]), ("texts", plane[len(images) :])):
        axes[1].scatter(part[:, 0], part[:, 1], s=4, alpha=0.5, label=label)
    axes[1].set(xticks=[], yticks=[], xlabel="first two principal axes", title="embeddings")
    for axis in axes:
        axis.legend(**BELOW)
    figure.suptitle(title)
    return figure


def speed_ratios(rows: list[dict], title: str) -> Figure:
    """How many times as long each peer takes as we do, on a log axis, one colour for each section.

    Rows of `results/speed/cpu.json` are as tests/speed.py writes them; a peer that was not installed has no ratio.
    """
    rows = [row for row in rows if row["ratio"] is not None]
    sections = list(dict.fromkeys(row["section"] for row in rows))
    figure, axis = _subplots(figsize=(10, 0.26 * len(rows) + 1.2))
    for place, row in enumerate(rows):
        colour, spread = f"C{sections.index(row['section'])}", row["ratio_range"]
        axis.plot(spread, [place, place], color=colour, linewidth=2, alpha=0.5)
        axis.plot(row["ratio"], place, "o", color=colour)
        axis.annotate(f"{row['ratio']:.2f}", (max(spread), place), (6, -3), textcoords="offset points")
    axis.set_yticks(range(len(rows)), [f"{row['section']}: {row['name']}; {row['peer']['name']}" for row in rows])
    axis.margins(x=0.1)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="seconds of the peer / ours: right of 1 we are faster", title=title)
    axis.grid(alpha=0.3, axis="x")
    return figure


def fid_over_n(curve: dict[str, float], title: str) -> Figure:
    """FID against the number of images it was computed from, {N: FID}; a curve that still falls is bias, not quality."""
    figure, axis = _subplots(figsize=(5, 3))
    axis.plot(list(curve), list(curve.values()), marker="o")
    axis.set(xlabel="N, images scored, each about twice the one before", ylabel="FID-0", title=title)
    axis.grid(alpha=0.3)
    return figure


def corruptions(scores: dict[str, dict[str, float]], title: str) -> Figure:
    """One panel for each metric, its value for corrupted images: what `evaluate.corruption_scores` gives."""
    metrics = list(next(iter(scores.values())))
    figure, axes = _subplots(2, -(-len(metrics) // 2), figsize=(11, 4.2), squeeze=False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        values = [row[metric] for row in scores.values()]
        bars = axis.bar(list(scores), [v if np.isfinite(v) else 0 for v in values], color="tab:blue")
        axis.bar_label(bars, [f"{v:.3g}" if np.isfinite(v) else "infinite" for v in values], fontsize=8)
        axis.set_title(metric)
        if metric in ("fid", "kid"):  # they span decades, and an unbiased KID may be below 0
            axis.set_yscale("symlog", linthresh=max(map(abs, values)) / 1_000)
        axis.margins(y=0.2)
        axis.tick_params(axis="y", which="both", left=False, labelleft=False)  # the numbers are on the bars
    for axis in axes.flat[len(metrics) :]:
        axis.axis("off")
    figure.suptitle(title)
    return figure
