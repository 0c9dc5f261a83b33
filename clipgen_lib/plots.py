"""Figures: each function takes data and returns a matplotlib Figure; nothing is shown or saved here."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from .data.images import grid, to_arrays

plt.rcParams.update({"figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9})


def picture(sheet: np.ndarray, title: str, scale: float = 1.6) -> Figure:
    """One uint8 image, as large as its pixels, under a title."""
    figure, axis = plt.subplots(figsize=(sheet.shape[1] * scale / 100, sheet.shape[0] * scale / 100 + 0.3))
    axis.imshow(sheet, interpolation="nearest")
    axis.set_title(title)
    axis.axis("off")
    return figure


def reconstructions(originals: torch.Tensor, decoded: torch.Tensor, title: str) -> Figure:
    """Originals in the upper row, what the tokens kept of them in the lower; (B, 3, H, W) in [-1, 1]."""
    return picture(
        grid(torch.cat([originals, decoded]), columns=len(originals)),
        f"{title}\nabove: originals, below: decoded from tokens",
    )


def curves(metrics: list[dict], panels: dict[str, tuple[str, ...]], title: str) -> Figure:
    """One panel for each entry of which anything was logged: panel title -> the logged scalars drawn in it."""
    panels = {
        label: keys
        for label, keys in panels.items()
        if any(line.get(key) is not None for line in metrics for key in keys)
    }
    figure, axes = plt.subplots(1, max(len(panels), 1), figsize=(3.2 * max(len(panels), 1), 2.6), squeeze=False)
    for axis, (label, keys) in zip(axes[0], panels.items(), strict=False):
        for key in keys:
            points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=key)
        axis.set_title(label)
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    return figure


def frequencies(tokens: torch.Tensor, codebook_size: int, title: str) -> Figure:
    """How often each code is used, most frequent first, against the uniform share."""
    counts = np.sort(np.bincount(tokens.flatten().numpy(), minlength=codebook_size))[::-1] / tokens.numel()
    figure, axis = plt.subplots(figsize=(5, 2.6))
    axis.bar(np.arange(codebook_size), counts, width=1.0)
    axis.axhline(1 / codebook_size, color="black", linewidth=0.8, label="every code alike")
    axis.set(xlabel="codes, most frequent first", ylabel="share of tokens", yscale="log", title=title)
    axis.legend()
    return figure


def token_grid(image: torch.Tensor, tokens: torch.Tensor, title: str) -> Figure:
    """An image (3, H, W) in [-1, 1] beside its tokens (h, w), each number on its patch."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 4))
    axes[0].imshow(to_arrays(image[None])[0], interpolation="nearest")
    axes[1].imshow(tokens.numpy(), cmap="twilight")
    for (y, x), token in np.ndenumerate(tokens.numpy()):
        axes[1].text(x, y, token, ha="center", va="center", fontsize=6, color="white")
    for axis in axes:
        axis.axis("off")
    figure.suptitle(title)
    return figure


def neighbours(rows: list[torch.Tensor], title: str) -> Figure:
    """Each row: an image, then those nearest to it; list of (1 + k, 3, H, W) in [-1, 1]."""
    return picture(grid(torch.cat(rows), columns=len(rows[0])), f"{title}\nfirst column: the query")


def previews(folder: Path, title: str, most: int = 6) -> Figure:
    """The sheets drawn during training, one line each, from the first step to the last."""
    paths = sorted(Path(folder).glob("*.png"))
    paths = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).astype(int))]
    return strips({f"step\n{int(path.stem)}": path for path in paths}, title)


def strips(paths: dict[str, Path], title: str) -> Figure:
    """Image files of equal size below each other, each beside its label."""
    figure, axes = plt.subplots(len(paths), 1, figsize=(8, 0.85 * len(paths) + 0.4), squeeze=False)
    for axis, (label, path) in zip(axes[:, 0], paths.items(), strict=True):
        axis.imshow(np.asarray(Image.open(path)), interpolation="nearest")
        axis.set_ylabel(
            "\n".join(_wrap(label, 16)) if "\n" not in label else label, rotation=0, labelpad=4, va="center", ha="right"
        )
        axis.set(xticks=[], yticks=[])
    figure.suptitle(title)
    return figure


def contact_sheet(images: torch.Tensor, prompts: list[str], title: str, columns: int = 8) -> Figure:
    """Images (N, 3, H, W) in [-1, 1], each over its prompt."""
    rows = -(-len(prompts) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.1 * columns, 1.4 * rows + 0.4), squeeze=False)
    arrays = to_arrays(images)
    for axis, index in zip(axes.flat, range(rows * columns), strict=True):
        axis.axis("off")
        if index < len(prompts):
            axis.imshow(arrays[index], interpolation="nearest")
            axis.set_title("\n".join(_wrap(prompts[index], 24)), fontsize=5)
    figure.suptitle(title)
    return figure


def _wrap(text: str, width: int, most: int = 3) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, max_lines=most, placeholder=" ...")


def rows(pictures: dict[str, torch.Tensor], title: str, above: list[str] | None = None) -> Figure:
    """One row of images (C, 3, H, W) in [-1, 1] for each label, all of one size and number; `above` names the columns."""
    images = torch.cat(list(pictures.values()))
    columns, (height, width), gap = len(images) // len(pictures), images.shape[-2:], 2
    sheet = grid(images, columns, gap)
    inches = 0.75 / width  # of a pixel
    figure, axis = plt.subplots(figsize=(sheet.shape[1] * inches + 1.4, sheet.shape[0] * inches + 0.5))
    axis.imshow(sheet, interpolation="nearest")
    axis.set_yticks([i * (height + gap) + height / 2 for i in range(len(pictures))])
    axis.set_yticklabels(["\n".join(_wrap(label, 16)) for label in pictures])
    axis.set_xticks([i * (width + gap) + width / 2 for i in range(columns)] if above else [], above or [])
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    figure.suptitle(title)
    return figure


def distances(evaluation: dict, title: str) -> Figure:
    """FID-k of generator, tokenizer and real halves side by side; what the tokenizer costs is not the generator's."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), width_ratios=(3, 2))
    radii = list(evaluation["fid"])
    for i, (label, key) in enumerate((("generator", "fid"), ("tokenizer (rFID)", "rfid"), ("real halves", "floor"))):
        axes[0].bar(np.arange(len(radii)) + 0.27 * (i - 1), [evaluation[key][k] for k in radii], 0.25, label=label)
    axes[0].set(xticks=range(len(radii)), xlabel="blur radius k (pixels)", ylabel="Frechet distance", yscale="log")
    axes[0].set_xticklabels(radii)
    axes[0].set_title(f"{evaluation['protocol']}, N = {evaluation['n']}")
    axes[0].legend(fontsize=7)
    bars = (
        {}
        if "caps" not in evaluation
        else {"others'\ncaptions": "caps_floor", "generated": "caps", "own\ncaptions": "caps_ceiling"}
    )
    axes[1].bar(list(bars), [evaluation[key] for key in bars.values()], color=["grey", "tab:blue", "grey"][: len(bars)])
    axes[1].set_title("CapS (cosine under the judge CLIP)" if bars else "no captions, so no CapS")
    figure.suptitle(title)
    return figure


def oracle(scores: dict, title: str) -> Figure:
    """Shares that the oracle finds right, one group of bars for each kind of prompt."""
    groups = [(f"{modality}, {kind}", values) for modality, kinds in scores.items() for kind, values in kinds.items()]
    figure, axes = plt.subplots(1, len(groups), figsize=(1.9 * len(groups), 2.9), sharey=True, squeeze=False)
    for axis, (label, values) in zip(axes[0], groups, strict=True):
        shares = {key: value for key, value in values.items() if key != "n"}
        bars = axis.bar(list(shares), list(shares.values()))
        axis.bar_label(bars, [f"{100 * value:.0f}" for value in shares.values()], fontsize=7)
        axis.set(title=f"{label}\nn = {values['n']}", ylim=(0, 1.1))
        axis.tick_params(axis="x", rotation=45)
    figure.suptitle(title)
    return figure


def ablation(table: list[dict], key: str, title: str) -> Figure:
    """One metric of every row, its spread over seeds as a bar; the line is the first row, the plain recipe."""
    rows = [entry for entry in table if key in entry][::-1]
    figure, axis = plt.subplots(figsize=(7, 0.24 * len(rows) + 0.9))
    colours = {"none": "tab:blue", "unpaired": "tab:orange", "paired": "tab:red"}
    for text, colour in colours.items():
        places = [i for i, entry in enumerate(rows) if entry["text"] == text]
        means, stds = ([rows[i][key][part] for i in places] for part in ("mean", "std"))
        axis.errorbar(means, places, xerr=stds, fmt="o", color=colour, label=f"text in training: {text}")
    axis.axvline(rows[-1][key]["mean"], color="black", linewidth=0.8)
    axis.set(yticks=range(len(rows)), xlabel=key, title=title)
    axis.set_yticklabels([entry["name"] for entry in rows])
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=7)
    return figure


def tradeoff(curves: dict[str, dict[str, dict]], x: str, y: str, title: str) -> Figure:
    """Two metrics against each other: a line for each entry of `curves`, method -> {name of a point -> row of a table}."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for label, points in curves.items():
        places = [(row[x]["mean"], row[y]["mean"]) for row in points.values()]
        axis.plot(*zip(*places, strict=True), marker="o", markersize=4, linewidth=0.8, label=label)
        for name, place in zip(points, places, strict=True):
            axis.annotate(name, place, fontsize=6, xytext=(3, 3), textcoords="offset points")
    axis.set(xlabel=x, ylabel=y, title=title, xscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    return figure


def gap(images: torch.Tensor, texts: torch.Tensor, noised: torch.Tensor, title: str) -> Figure:
    """The text/image gap: cosines of pairs, and both modalities on their first two principal axes.

    Args:
        images, texts: (N, D) of unit norm, text i said of image i. noised: (N, D), what the transformer trains on.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    pairs = {
        "image, its text": (images, texts),
        "image, another's text": (images, texts.roll(1, 0)),
        "image, another": (images, images.roll(1, 0)),
        "image, itself noised": (images, noised),
    }
    for label, (a, b) in pairs.items():
        axes[0].hist((a * b).sum(1).numpy(), bins=np.linspace(-0.4, 1.001, 80), alpha=0.5, density=True, label=label)
    axes[0].set(xlabel="cosine", yticks=[], title="cosines")
    axes[0].legend(fontsize=7)
    both = torch.cat([images, texts])
    centred = both - both.mean(0)
    flat = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T).numpy()
    for label, part in (("images", flat[: len(images)]), ("texts", flat[len(images) :])):
        axes[1].scatter(part[:, 0], part[:, 1], s=4, alpha=0.5, label=label)
    axes[1].set(xticks=[], yticks=[], title="first two principal axes")
    axes[1].legend(fontsize=7)
    figure.suptitle(title)
    return figure


def fid_over_n(curves: dict[str, dict[str, float]], title: str) -> Figure:
    """FID against the number of images it was computed from: label -> {N: FID}; a curve that still falls is bias, not quality."""
    figure, axis = plt.subplots(figsize=(5, 3))
    for label, curve in curves.items():
        axis.plot([int(n) for n in curve], list(curve.values()), marker="o", label=label)
    axis.set(xlabel="N, images scored", ylabel="FID-0", xscale="log", yscale="log", title=title)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    return figure


def corruptions(found: dict[str, dict[str, float]], title: str) -> Figure:
    """One panel for each metric, its value for images that are damaged more and more; what `evaluate.corruption_scores` gives."""
    metrics = list(next(iter(found.values())))
    figure, axes = plt.subplots(2, -(-len(metrics) // 2), figsize=(11, 4.2), squeeze=False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        values = [scores[metric] for scores in found.values()]
        axis.bar(range(len(values)), [v if np.isfinite(v) else 0 for v in values], color="tab:blue")
        axis.set_title(metric)
        axis.set_xticks(range(len(values)), list(found), fontsize=7)
        if metric in ("fid", "kid"):  # they span decades, and an unbiased KID may be below 0
            axis.set_yscale("symlog", linthresh=max(map(abs, values)) / 1_000)
        for i, v in enumerate(values):
            if not np.isfinite(v):
                axis.annotate("infinite", (i, 0), ha="center", fontsize=7, xytext=(0, 3), textcoords="offset points")
    for axis in axes.flat[len(metrics) :]:
        axis.axis("off")
    figure.suptitle(title)
    return figure


def against_peers(sections: dict[str, dict], title: str) -> Figure:
    """Rows of a speed file that have a goal, with their spread: times as fast as a peer, and shares of what a row may take at most.

    Args:
        sections: name -> what `wb.run` found, with `table` of `timing.row`s.
    """
    rows = [(name, row) for name, part in sections.items() for row in part["table"] if row["asked"] is not None]
    halves = {
        False: "times as fast, or share of the limit (black: at least)",
        True: "share of what is allowed (black: at most)",
    }
    found = {most: [pair for pair in rows if pair[1]["most"] == most] for most in halves}
    figure, axes = plt.subplots(1, 2, figsize=(13, 0.24 * max(map(len, found.values())) + 1.0), dpi=80)
    colours = {name: f"C{i}" for i, name in enumerate(sections)}
    for axis, (most, label) in zip(axes, halves.items(), strict=True):
        for place, (name, row) in enumerate(found[most]):
            unit = row["asked"] if most else 1
            value, low, high = (row["value"][key] / unit for key in ("median", "least", "most"))
            axis.barh(place, value, color=colours[name], xerr=[[value - low], [high - value]], ecolor="grey")
            axis.plot([row["asked"] / unit] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)
        axis.set_yticks(
            range(len(found[most])), [f"{name}: {row['what']}; {row['peer']}" for name, row in found[most]], fontsize=6
        )
        axis.invert_yaxis()
        axis.set(xlabel=label, xscale="linear" if most else "log")
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle(title)
    return figure


def roofline(points: dict[str, dict], limits: dict[str, float], title: str) -> Figure:
    """Operations a second of stages over their operations to a byte, under what the machine reaches (Williams et al. 2009).

    Args:
        points: name -> `operations`, `bytes` moved at least, `seconds`.
        limits: as `timing.limits` gives them.
    """
    figure, axis = plt.subplots(figsize=(7, 4.2))
    intensity = np.logspace(-1, 4, 200)
    for dtype, style in (("float32", "--"), ("bfloat16", "-")):
        roof = np.minimum(intensity * limits["copy"], limits[f"matmul_{dtype}"])
        axis.plot(intensity, roof / 1e9, style, color="black", label=f"copy, and matmul in {dtype}")
    for i, (name, point) in enumerate(points.items()):
        x, y = point["operations"] / point["bytes"], point["operations"] / point["seconds"] / 1e9
        axis.plot(x, y, "os^vDP*X"[i % 8], color=f"C{i % 10}", label=name)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="operations to a byte of weights and their state",
        ylabel="GFLOP/s",
        title=title,
    )
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    return figure


def stage_seconds(runs: dict[str, dict[str, float]], title: str) -> Figure:
    """Seconds of each stage of some runs, laid end to end."""
    figure, axis = plt.subplots(figsize=(8, 0.6 * len(runs) + 1.2))
    stages = [stage for stage in next(iter(runs.values())) if stage not in ("total", "per_image")]
    begun = np.zeros(len(runs))
    for stage in stages:
        taken = np.array([seconds[stage] for seconds in runs.values()])
        axis.barh(list(runs), taken, left=begun, label=stage)
        for place, (start, width) in enumerate(zip(begun, taken, strict=True)):
            axis.text(start + width / 2, place, f"{width:.0f}", ha="center", va="center", color="white", fontsize=8)
        begun += taken
    axis.invert_yaxis()
    axis.set(xlabel="seconds", title=title)
    axis.legend(fontsize=8, ncols=len(stages), loc="upper center", bbox_to_anchor=(0.5, -0.35))
    return figure
