"""Evaluation: features -> statistics -> distance, and how well a picture fits its text.

In: pictures (B, 3, H, W) in [-1, 1] and captions. Out: numbers, each with the protocol that made it. The feature
network and the blur are part of a metric's name; weights that are not there are an error, never another network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from . import shapes
from .classifier import Classifier
from .clip_embed import ClipEmbedder
from .config import EvaluateConfig
from .data import ImageSet, ordered_batches
from .images import blur, crop, from_arrays, to_arrays, to_float, to_uint8
from .runs import ClipgenError, progress
from .sample import TextToImage
from .vqgan import VQGAN, codebook_statistics

BLUR_DEFINITION = "Gaussian, sigma = k pixels at the evaluation resolution, kernel to 4 sigma, reflected border, on both sets, before the network's resize"  # fmt: skip
Network = Callable[[torch.Tensor], torch.Tensor]


# ---------------------------------------------------------------------------------------------- features


def feature_network(protocol: str, clip: ClipEmbedder) -> Network:
    """The feature network that a protocol names: (B, 3, H, W) in [-1, 1] -> (B, d).

    `clip`: the image features of the given CLIP, before normalisation (CLIP-FID, arXiv 2203.06026).
    `inception`: the TF-ported Inception of pytorch-fid with its own bilinear resize to 299 (d = 2048).

    Raises:
        ClipgenError: unknown protocol, or weights that are not on this machine.
    """
    if protocol == "clip":
        return clip.features
    if protocol == "inception":
        weights = Path(torch.hub.get_dir()) / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
        if not weights.is_file():
            raise ClipgenError(f"protocol 'inception' needs {weights.name} (release fid_weights of mseitzer/pytorch-fid on GitHub): put it at {weights}, or choose protocol 'clip'")  # fmt: skip
        from pytorch_fid.inception import InceptionV3

        network = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval().to(clip.device)
        return lambda images: network((images + 1) / 2)[0].flatten(1)
    raise ClipgenError(f"unknown protocol {protocol!r}: choose clip or inception")


class GaussianStatistics:
    """Mean and covariance of features, summed in float64 over batches; memory does not grow with N."""

    def __init__(self) -> None:
        self.n, self.total, self.outer = 0, 0.0, 0.0

    def add(self, features: torch.Tensor) -> None:
        """features: (B, d), finite."""
        x = features.detach().cpu().double()
        if not torch.isfinite(x).all():
            raise ClipgenError("a feature is not finite: look for NaN pixels in the pictures that are evaluated")
        self.n, self.total, self.outer = self.n + len(x), self.total + x.sum(0), self.outer + x.T @ x

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (d,) and unbiased covariance (d, d), float64."""
        if self.n < 2:
            raise ClipgenError(f"statistics of {self.n} pictures have no covariance: give at least 2")
        mean = self.total / self.n
        covariance = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return mean.numpy(), covariance.numpy()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians (arXiv 1706.08500, equation 6), in float64.

    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). The trace of the root is the sum of the square
    roots of the eigenvalues of the symmetric sigma1^(1/2) sigma2 sigma1^(1/2): no complex numbers, also where a
    covariance is singular.
    """
    mu1, mu2 = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    sigma1, sigma2 = np.asarray(sigma1, np.float64), np.asarray(sigma2, np.float64)
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ClipgenError(f"statistics of {len(mu1)} and {len(mu2)} dimensions: use one feature network for both sets")
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


class BlurredStatistics:
    """Feature statistics of one set of pictures at every blur radius at once."""

    def __init__(self, network: Network, radii: Iterable[int]):
        self.network = network
        self.by_radius = {k: GaussianStatistics() for k in radii}

    @torch.inference_mode()
    def add(self, images: torch.Tensor) -> None:
        """images: (B, 3, H, W) in [-1, 1]; rounded to 8 bits first, as files are."""
        images = to_float(to_uint8(images))
        for k, statistics in self.by_radius.items():
            statistics.add(self.network(blur(images, k)))

    def distance(self, other: BlurredStatistics) -> dict[str, float]:
        """FID-k for every k."""
        return {str(k): frechet_distance(*s.moments(), *other.by_radius[k].moments()) for k, s in self.by_radius.items()}


def few_pictures(counts: dict[str, int], dim: int) -> list[str]:
    """A sentence for each set whose covariance of `dim` dimensions is estimated from fewer than that many pictures."""
    return [
        f"{what} has {n} pictures for {dim} feature dimensions: its distances are biased upwards and compare with themselves only"
        for what, n in counts.items()
        if n < dim
    ]


# ---------------------------------------------------------------------------------------------- stage 1


@torch.inference_mode()
def evaluate_vqgan(vqgan: VQGAN, images: ImageSet, limit: int = 1_000, batch_size: int = 64) -> dict[str, float]:
    """PSNR (dB, 8-bit pictures, mean over pictures) and codebook use over the first `limit` pictures of a set."""
    device, scores, tokens = vqgan.last_layer.device, [], []
    for _, batch in ordered_batches(images, range(min(limit, len(images))), batch_size):
        x = to_float(batch).to(device)
        found = vqgan.encode(x)
        tokens.append(found.flatten())
        decoded = to_uint8(vqgan.decode(found)).float()
        scores.append(peak_signal_noise_ratio(decoded, to_uint8(x).float(), data_range=(0.0, 255.0), reduction="none", dim=(1, 2, 3)))  # fmt: skip
    psnr = torch.cat(scores)
    return {"psnr": float(psnr.mean()), "n": len(psnr), **codebook_statistics(torch.cat(tokens), vqgan.config.codebook_size)}


# ---------------------------------------------------------------------------------------------- stage 2


def choose_captions(images: ImageSet, n: int, seed: int) -> list[tuple[int, str]]:
    """(row, caption) pairs to evaluate on: one caption for each of n pictures, chosen by seed.

    A smaller set gives further captions of its pictures until n or all of them are used.
    """
    order = np.random.default_rng([seed, 17]).permutation(len(images))
    rounds = max((len(c) for c in images.captions), default=0)
    pairs = [(int(row), images.captions[row][i]) for i in range(rounds) for row in order if i < len(images.captions[row])]
    if not pairs:
        raise ClipgenError(f"the {images.split} split of {images.root} has pictures but no captions: evaluate on another split")
    return pairs[:n]


def r_precision(image_embeds: torch.Tensor, text_embeds: torch.Tensor, texts: list[str], others: int = 99) -> float:
    """Share of pictures whose own caption ranks first among itself and `others` captions of other pictures.

    AttnGAN's protocol (arXiv 1711.10485, section 4.1) with CLIP as the ranker; captions of the same wording are not
    drawn as others. Fewer others are used where there are not so many; chance is 1 / (others + 1).
    """
    draw, hits = np.random.default_rng(23), []
    wording = np.array(texts)
    similarity = (image_embeds @ text_embeds.T).cpu().numpy()
    for i in range(len(texts)):
        candidates = np.flatnonzero(wording != wording[i])
        chosen = draw.choice(candidates, min(others, len(candidates)), replace=False)
        hits.append(bool((similarity[i, i] > similarity[i, chosen]).all()))
    return float(np.mean(hits))


@torch.inference_mode()
def evaluate_generator(
    generator: TextToImage, images: ImageSet, judge: ClipEmbedder, config: EvaluateConfig, seed: int = 0,
    show_progress: bool = True, classifier: Classifier | None = None, **settings: float,
) -> tuple[dict, dict]:  # fmt: skip
    """FID-k, rFID, CapS and R-precision of pictures drawn for a split's captions.

    FID-k compares one picture for each chosen caption with all pictures of the split; rFID the split's pictures with
    their own reconstructions; `floor` the two halves of the split, real against real. CapS is the mean cosine of
    caption and picture under the judge CLIP (not times 100), `caps_ceiling` that of real pictures with their own
    captions, `caps_floor` with captions of other pictures. `classes` is the share of pictures that a classifier reads
    as the class that was asked for: drawn ones, real ones, and the tokenizer's decodings of real ones.

    Args:
        classifier: of the classes of `images`; None leaves `classes` out.
        settings: fields of SampleConfig, such as guidance.

    Returns:
        (numbers, shown): `numbers` for summary.json; `shown` holds a few `prompts` and their `images`.
    """
    network = feature_network(config.protocol, judge)
    sets = {name: BlurredStatistics(network, config.blur) for name in ("real", "first", "second", "decoded", "drawn")}
    image_embeds, position = torch.zeros(len(images), judge.dim), 0
    right: dict[str, list[bool]] = {"real": [], "reconstruction": [], "accuracy": []}

    def classify(kind: str, pictures: torch.Tensor, rows: list[int]) -> None:
        if classifier is not None:
            found = classifier.read(pictures)
            right[kind] += [name == images.classes[row] for name, row in zip(found, rows, strict=True)]

    for rows, batch in _with_bar(images, config.batch_size, show_progress):
        x = to_float(batch).to(judge.device)
        sets["real"].add(x)
        for name, offset in (("first", position % 2), ("second", 1 - position % 2)):
            if len(x[offset::2]):
                sets[name].add(x[offset::2])
        decoded = generator.vqgan.decode(generator.vqgan.encode(x))
        sets["decoded"].add(decoded)
        classify("real", x, rows)
        classify("reconstruction", decoded, rows)
        image_embeds[rows] = judge.images(x).cpu()
        position += len(rows)

    prompts = choose_captions(images, config.n, seed) if images.has_captions else [(row, None) for row in range(len(images))]
    prompts = [(row, text) for row, text in prompts[: config.n] if image_embeds[row].any()]  # only of readable pictures
    drawn_embeds, shown = [], []
    with progress(len(prompts), "drawing for captions", show_progress) as bar:
        for i in range(0, len(prompts), config.batch_size):
            part = prompts[i : i + config.batch_size]
            x = generator.draw_each(_prompts(generator, images, part), [seed + i + j for j in range(len(part))], **settings)
            sets["drawn"].add(x)
            classify("accuracy", x, [row for row, _ in part])
            drawn_embeds.append(judge.images(to_float(to_uint8(x))).cpu())
            shown.append(x[: max(0, 64 - i)].cpu())
            bar.update(len(part))
    n_drawn, n_real = (sets[name].by_radius[config.blur[0]].n for name in ("drawn", "real"))
    dim = len(sets["real"].by_radius[config.blur[0]].total)
    numbers = {
        "protocol": f"{config.protocol}-FID" + (f" with {judge.name}" if config.protocol == "clip" else ""),
        "blur": BLUR_DEFINITION,
        "resolution": images.size,
        "reference": f"{images.name}/{images.split}",
        "condition": "captions" if images.has_captions else "embeddings of the reference pictures, which have no captions",
        "n": n_drawn,
        "n_reference": n_real,
        "warnings": few_pictures({"the drawn set": n_drawn, "the reference": n_real, "a real half": n_real // 2}, dim),
        "judge": judge.name + (" (also the conditioning CLIP)" if judge.weights_hash == generator.clip.weights_hash else ""),
        "fid": sets["drawn"].distance(sets["real"]),
        "rfid": sets["decoded"].distance(sets["real"]),
        "floor": sets["first"].distance(sets["second"]),
    }
    if images.has_captions:
        own = image_embeds[[row for row, _ in prompts]]
        numbers |= caption_scores(torch.cat(drawn_embeds), own, [text for _, text in prompts], judge, seed)
    if classifier is not None:
        numbers["classes"] = {kind: float(np.mean(hits)) for kind, hits in right.items()} | {"n": n_drawn}
    names = [text or f"row {row}" for row, text in prompts]
    return numbers, {"prompts": names[:64], "images": torch.cat(shown)[:64]}


def _prompts(generator: TextToImage, images: ImageSet, prompts: list[tuple[int, str | None]]) -> list[str] | torch.Tensor:
    """The captions, or embeddings (B, D) of the pictures themselves where there are none."""
    if prompts[0][1] is not None:
        return [text for _, text in prompts]
    pictures = torch.stack([crop(images[row], images.size) for row, _ in prompts])
    return generator.clip.images(to_float(pictures).to(generator.device))


@torch.inference_mode()
def caption_scores(drawn: torch.Tensor, real: torch.Tensor, texts: list[str], judge: ClipEmbedder, seed: int = 0) -> dict:
    """CapS with its ceiling and floor, and R-precision.

    Args:
        drawn, real: (N, D) unit-norm judge embeddings of the pictures drawn for N texts, and of the real pictures that
            the texts describe.
    """
    embeds = torch.cat([judge.texts(texts[i : i + 256]).cpu() for i in range(0, len(texts), 256)])
    shift = int(np.random.default_rng([seed, 19]).integers(1, max(len(texts), 2)))
    return {
        "caps": float((drawn * embeds).sum(1).mean()),
        "caps_ceiling": float((real * embeds).sum(1).mean()),
        "caps_floor": float((real * embeds.roll(shift, 0)).sum(1).mean()),
        "r_precision": r_precision(drawn, embeds, texts),
        "r_precision_real": r_precision(real, embeds, texts),
        "truncated_captions": sum(judge.is_truncated(text) for text in texts),
    }


def _with_bar(images: ImageSet, batch_size: int, show: bool) -> Iterator[tuple[list[int], torch.Tensor]]:
    with progress(len(images), "features of real pictures", show) as bar:
        for rows, batch in ordered_batches(images, range(len(images)), batch_size):
            bar.update(batch_size)
            if rows:
                yield rows, batch


@torch.inference_mode()
def evaluate_oracle(
    generator: TextToImage, n: int, seed: int = 0, show_progress: bool = True,
    modalities: tuple[str, ...] = ("text", "image", "reconstruction"), **settings: float,
) -> dict:  # fmt: skip
    """Shapes world only: what share of pictures shows what was asked for, read by the oracle.

    Text prompts of one thing, of two with a relation, and of held-out pairs; as image prompts, the embeddings of real
    scenes of one thing; and, with nothing generated, the tokenizer's reconstructions of real scenes, above which no
    generator on its tokens can rise. Every prompt gets one picture: nothing is picked or ranked.
    """
    kinds = {"text": ("one", "two", "held_out"), "image": ("one",), "reconstruction": ("one", "two")}
    kinds = {modality: kinds[modality] for modality in modalities}
    found: dict = {modality: {} for modality in kinds}
    with progress(n * sum(map(len, kinds.values())), "drawing for the oracle", show_progress) as bar:
        for modality, kind in ((m, k) for m in kinds for k in kinds[m]):
            prompts = shapes.prompts(kind, n, seed)
            if modality != "text":
                scenes = from_arrays(np.stack([shapes.render(p.scene) for p in prompts])).to(generator.device)
            if modality == "reconstruction":
                images = torch.cat([generator.vqgan.decode(generator.vqgan.encode(part)) for part in scenes.split(64)])
            else:
                asked = [p.text for p in prompts] if modality == "text" else generator.clip.images(scenes)
                images = generator.draw_each(asked, list(range(seed, seed + n)), **settings)
            found[modality][kind] = shapes.score(to_arrays(images), prompts)
            bar.update(n)
    return found


def table(summary: dict) -> str:
    """The numbers of a summary as lines a person can read."""
    e = summary["evaluation"]
    lines = [
        f"run {summary['run']}   preset {summary.get('preset')}   seed {summary.get('seed')}",
        f"{e['protocol']}, N = {e['n']} drawn against {e['n_reference']} real ({e['reference']}), {e['resolution']} px",
        f"{'':28}" + "".join(f"k = {k:<8}" for k in e["fid"]),
    ]
    for label, key in (("FID-k, generator", "fid"), ("rFID-k, tokenizer", "rfid"), ("FID-k, real halves", "floor")):
        lines.append(f"{label:28}" + "".join(f"{value:<12.4g}" for value in e[key].values()))
    if "caps" in e:
        lines += [
            f"{'CapS':28}{e['caps']:.3f}   (real with own captions {e['caps_ceiling']:.3f}, with others' {e['caps_floor']:.3f})",
            f"{'R-precision':28}{e['r_precision']:.3f}   (real pictures {e['r_precision_real']:.3f}, chance about {1 / min(100, e['n']):.2g})",
            f"{'judge':28}{e['judge']}",
        ]
    if c := e.get("classes"):
        lines.append(f"{'class accuracy':28}{c['accuracy']:.3f}   (real pictures {c['real']:.3f}, the tokenizer's decodings {c['reconstruction']:.3f}; by a classifier of real pictures)")  # fmt: skip
    for modality, kinds in summary.get("oracle", {}).items():
        for kind, scores in kinds.items():
            shares = "   ".join(f"{key} {100 * value:.1f}%" for key, value in scores.items() if key != "n")
            lines.append(f"{'oracle, ' + modality + ' ' + kind:28}{shares}   (n = {scores['n']})")
    for sentence in e["warnings"]:
        lines.append(f"warning: {sentence}")
    return "\n".join(lines)
