"""What the gap between texts and images costs a generator that has seen images alone: `make gap` writes results/gap.

The generator, `shapes`, stays as it is; what differs is the embedding it is given for a prompt: that of the text, as it is or
moved by unpaired statistics (`sample.align`), or that of a real image of which the text is true. What the image's embedding loses
is the transformer's and CLIP's, what the tokenizer's decodings lose is the tokenizer's, and the gap costs the rest. Beside it the
cosines of texts and their images. `--photos RUN --data DATA` measures a run on photos in the same way, by its classifier.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image

from clipgen_lib import TextToImage, Workbench
from clipgen_lib.data import shapes
from clipgen_lib.data.batches import ordered_batches
from clipgen_lib.data.datasets import ImageSet, open_folder
from clipgen_lib.data.images import eight_bit, from_arrays, load_image, png, to_float
from clipgen_lib.evaluate import generate_images
from clipgen_lib.metrics import oracle
from clipgen_lib.metrics.captions import choose_captions
from clipgen_lib.metrics.classifier import accuracy, attributes
from clipgen_lib.metrics.intervals import wilson
from clipgen_lib.runtime.runs import open_run, refuse_published, write_json
from clipgen_lib.sample import aligned

WAYS = ("text", "text, shift", "text, standardise", "image")


class Scenes:
    """The Shapes world's prompts of one kind, the scenes that they describe, and the oracle."""

    def __init__(self, kind: str, n: int):
        self.asked = oracle.prompts(kind, n)
        self.texts = [prompt.text for prompt in self.asked]
        self.images = from_arrays(np.stack([shapes.render(prompt.scene) for prompt in self.asked]))

    def scores(self, folder: Path) -> dict:
        arrays = [load_image(path, shapes.CANVAS).permute(1, 2, 0).numpy() for path in sorted(folder.glob("*.png"))]
        return oracle.score([oracle.correct(array, asked) for array, asked in zip(arrays, self.asked, strict=True)])


def product_colour(array: np.ndarray) -> np.ndarray:
    """The median in CIELAB of the pixels of a photo (H, W, 3) uint8 that are not white, of all where hardly any is."""
    lab = oracle.cielab(array)
    is_product = (lab[..., 0] < 93) | (np.hypot(lab[..., 1], lab[..., 2]) > 8)
    return np.median(lab[is_product] if is_product.mean() > 0.02 else lab.reshape(-1, 3), axis=0)


def palette_of(images: ImageSet) -> dict[str, np.ndarray]:
    """Colour -> the median of `product_colour` over real photos that are named so; empty where classes name no colours."""
    found: dict[str, list] = {}
    for rows, batch in ordered_batches(images, range(len(images)), 125):
        for row, array in zip(rows, batch.permute(0, 2, 3, 1).numpy(), strict=True):
            if colour := attributes(images.classes[row]).get("colour"):
                found.setdefault(colour, []).append(product_colour(array))
    return {colour: np.median(values, axis=0) for colour, values in found.items()}


class Photos:
    """Captions of one split of a run's photos, one an image, the run's classifier, and a plain reader of colours."""

    def __init__(self, wb: Workbench, split: str, palette: dict[str, np.ndarray]):
        self.classifier, images, self.palette = wb.classifier(), wb.images(split), palette
        rows, self.texts = map(list, zip(*choose_captions(images, len(images), 0), strict=True))
        self.classes = {i: images.classes[row] for i, row in enumerate(rows)}
        self.images = torch.cat([to_float(batch) for _, batch in ordered_batches(images, rows, 125)])

    def scores(self, folder: Path) -> dict:
        found = accuracy(self.classifier, open_folder(folder), self.classes)
        each = found.pop("attributes", {})
        parts = {name: of["accuracy"] for name, of in each.items()}
        parts |= {f"{name}_interval": of["accuracy_interval"] for name, of in each.items()}
        if self.palette:
            paths, names, known = (
                sorted(folder.glob("*.png")),
                list(self.palette),
                np.stack(list(self.palette.values())),
            )
            read = [product_colour(np.asarray(Image.open(path))) for path in paths]
            read = [names[np.linalg.norm(known - lab, axis=1).argmin()] for lab in read]
            hits = sum(attributes(self.classes[i])["colour"] == colour for i, colour in enumerate(read))
            parts |= {"colour_by_pixels": hits / len(read), "colour_by_pixels_interval": list(wilson(hits, len(read)))}
        return {"n": found["n"], "whole": found["accuracy"], "whole_interval": found["accuracy_interval"], **parts}


@torch.inference_mode()
def rows_of(generator: TextToImage, case: Scenes | Photos, kind: str, folder: Path) -> tuple[list[dict], dict]:
    """A row for each way and one of the decodings, and the cosines of image j and text j by way."""
    embeds = torch.cat([generator.clip.images(part) for part in case.images.split(64)])
    texts, rows, cosines = generator.clip.texts(case.texts), [], {}
    for way in WAYS:
        base, _, align = way.partition(", ")
        prompts, settings = (case.texts, {"align": align or "none"}) if base == "text" else (embeds, {})
        place = folder / f"{kind}-{way.replace(', ', '-')}"
        generate_images(generator, prompts, place, **settings)
        rows.append({"kind": kind, "condition": way, **case.scores(place)})
        if base == "text":
            moved = aligned(texts, generator.moments, align) if align else texts
            cosines[way] = (moved * embeds).sum(1).tolist()
            rows[-1]["cosine"] = float(np.mean(cosines[way]))
    for name, change in (
        ("decodings", lambda x: generator.vqgan.decode(generator.vqgan.encode(x))),
        ("real", lambda x: x),
    ):
        place = folder / f"{kind}-{name}"
        place.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(torch.cat([change(part) for part in case.images.split(64)])):
            (place / f"{i:05d}.png").write_bytes(png(eight_bit(image)))
        rows.append({"kind": kind, "condition": name, **case.scores(place)})
    return rows, cosines


def figure_of(rows: list[dict], cosines: dict[str, dict[str, list]], title: str) -> plt.Figure:
    """Shares by kind, and below them the cosines of texts and their images."""
    kinds, conditions = (list(dict.fromkeys(row[key] for row in rows)) for key in ("kind", "condition"))
    figure, axes = plt.subplots(2, 1, figsize=(8, 5.6), layout="constrained", height_ratios=(3, 2))
    for i, condition in enumerate(conditions):
        some = [row for row in rows if row["condition"] == condition]
        places = np.arange(len(kinds)) + 0.15 * (i - 2.5)
        shares, ends = [row["whole"] for row in some], np.array([row["whole_interval"] for row in some]).T
        axes[0].bar(places, shares, 0.14, yerr=np.abs(ends - shares), label=condition, error_kw={"linewidth": 0.8})
    axes[0].set_xticks(range(len(kinds)), kinds)
    axes[0].set(ylabel="images that are right as a whole", ylim=(0, 1.02), title=title)
    axes[0].legend(fontsize=8, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    values = {way: np.concatenate([of[way] for of in cosines.values()]) for way in WAYS[:-1]}
    bins = np.linspace(*np.percentile(list(values.values()), (0, 100)), 80)
    for way, found in values.items():
        axes[1].hist(found, bins, alpha=0.5, density=True, label=way)
    axes[1].set(xlabel="cosine of a text and its image", yticks=[])
    axes[1].legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=512, help="prompts of each kind of the Shapes world")
    parser.add_argument("--photos", metavar="RUN", help="a run on photos with captions and a classifier")
    parser.add_argument("--data", default="", help="where its photos lie")
    given = parser.parse_args()
    name = f"gap-{given.photos}" if given.photos else "gap"
    run = open_run(name)
    refuse_published(run.path)
    if given.photos:
        wb = Workbench.reopen(given.photos, data=given.data)
        generator = TextToImage.from_pretrained(given.photos)
        splits, palette = (wb.preset.evaluate.split, *wb.preset.evaluate.also_splits), palette_of(wb.images())
        cases = {split: Photos(wb, split, palette) for split in splits}
    else:
        generator, cases = TextToImage.from_pretrained("shapes"), {kind: Scenes(kind, given.n) for kind in oracle.KINDS}
    rows, cosines = [], {}
    for kind, case in cases.items():
        found, cosines[kind] = rows_of(generator, case, kind, run.file("generated"))
        rows += found
        write_json(run.file("table.json"), rows)
    run.keep(figure_of(rows, cosines, f"{given.photos or 'shapes'}: one image a prompt, 95% intervals"), "gap")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
