"""Which distance orders generators the same way at a small N? `make stability` writes results/stability/table.json and its figure.

The generators are the committed one under different sampling settings; each generates images for 1,000 captions of the Shapes
world, by three seeds. A score is stable where its order of the settings, from N images of one seed, agrees with its own order from
all images of all seeds, by Kendall's tau over the pairs of settings.
"""

import json
import os
from itertools import product

import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy.stats import kendalltau

from clipgen_lib import ClipEmbedder, TextToImage, open_images
from clipgen_lib.data.batches import ordered_batches
from clipgen_lib.data.datasets import open_folder
from clipgen_lib.data.images import eight_bit, to_float
from clipgen_lib.evaluate import generate_images
from clipgen_lib.metrics.captions import choose_captions
from clipgen_lib.metrics.distances import cmmd, frechet_distance, kernel_distance, sliced_distance
from clipgen_lib.metrics.features import FeatureNetwork, feature_network
from clipgen_lib.runtime.runs import open_run, progress, refuse_published, write_json

SETTINGS = {
    "as exported": {},
    "guidance 1": {"guidance": 1.0},
    "guidance 4": {"guidance": 4.0},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 1.1": {"temperature": 1.1},
    "top-p 0.8": {"top_p": 0.8},
}
SEEDS, SIZES = (0, 1, 2), (250, 500, 1_000)
PROTOCOLS = ("clip", "lite")


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False)


SCORES = {
    "FID": lambda real, fake: frechet_distance(*moments(real.double().numpy()), *moments(fake.double().numpy())),
    "KID": lambda real, fake: kernel_distance(real, fake, subsets=20)["mean"],
    "MIND": lambda real, fake: sliced_distance(real[: len(fake)], fake),
    "CMMD": cmmd,
}


@torch.inference_mode()
def features_of(images, network: FeatureNetwork) -> torch.Tensor:
    parts = ordered_batches(images, range(len(images)), 125)
    return torch.cat([network(eight_bit(to_float(batch))).cpu() for _, batch in parts])


def table(values: dict[tuple, float]) -> list[dict]:
    """(score, N, setting, seed) -> value; a row for each score and N: `tau`, mean over seeds, and each seed's."""
    rows = []
    for score, n in dict.fromkeys((score, n) for score, n, _, _ in values):
        whole = [np.mean([values[score, max(SIZES), name, seed] for seed in SEEDS]) for name in SETTINGS]
        taus = [kendalltau([values[score, n, name, seed] for name in SETTINGS], whole).statistic for seed in SEEDS]
        rows.append({"score": score, "n": n, "tau": float(np.mean(taus)), "taus": list(map(float, taus))})
    return rows


def main() -> None:
    run = open_run("stability")
    refuse_published(run.path)
    generator, clip, val = TextToImage.from_pretrained("shapes"), ClipEmbedder.load(), open_images("shapes", "val")
    prompts = [text for _, text in choose_captions(val, max(SIZES), 0)]
    networks = {protocol: feature_network(protocol, clip) for protocol in PROTOCOLS}
    real = {protocol: features_of(val, network) for protocol, network in networks.items()}
    values = {}
    with progress(len(SETTINGS) * len(SEEDS), "scoring") as bar:
        for (name, changes), seed in product(SETTINGS.items(), SEEDS):
            folder = run.file("generated", name.replace(" ", "-"), str(seed))
            generate_images(generator, prompts, folder, 10_000 * seed, **changes)
            for protocol, network in networks.items():
                fake = features_of(open_folder(folder), network)
                for (score, distance), n in product(SCORES.items(), SIZES):
                    if score != "CMMD" or protocol == "clip":
                        values[f"{score}, {protocol}", n, name, seed] = distance(real[protocol], fake[:n])
            bar.update()
    rows = table(values)
    keys = ("score", "n", "setting", "seed", "value")
    facts = [dict(zip(keys, (*key, float(value)), strict=True)) for key, value in values.items()]
    write_json(run.file("table.json"), {"rows": rows, "values": facts})
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for score in dict.fromkeys(row["score"] for row in rows):
        some = [row for row in rows if row["score"] == score]
        axis.plot([row["n"] for row in some], [row["tau"] for row in some], marker="o", label=score)
    axis.set(xlabel="N generated images", ylabel="Kendall's tau with its own order of all", xticks=SIZES)
    axis.set_title("Which score orders six sampling settings the same way at a small N?", fontsize=9)
    axis.legend(fontsize=7)
    run.keep(figure, "stability")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
