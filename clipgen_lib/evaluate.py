"""Evaluation: generate to a folder of PNGs, then score that folder against a reference (features -> statistics -> distance).

In: a generator and a split with captions, or any two folders of images. Out: numbers, each with the protocol card that says
how it was made. Blur and feature network are part of a metric's name; missing weights are named, never replaced by others.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .clip_embed import ClipEmbedder
from .config import EvaluateConfig
from .data import shapes
from .data.batches import ordered_batches
from .data.datasets import ImageSet, open_folder  # noqa: F401 (the second by others)
from .data.images import blur, codec, crop, eight_bit, from_arrays, jpeg, load_image, png, to_arrays, to_float
from .metrics import oracle
from .metrics.captions import PAIRS, caption_list, caption_scores, choose_captions
from .metrics.classifier import Classifier, accuracy
from .metrics.distances import frechet_distance, reconstruction_scores  # noqa: F401 (the first by others)
from .metrics.features import DEFINITIONS, FeatureNetwork, feature_network, lpips_network
from .metrics.memorisation import descriptions, memorisation
from .metrics.statistics import Moments, fid_by_radius, open_reference, saved_statistics, set_scores, set_statistics  # noqa: F401 (one by others)
from .runtime import distributed
from .runtime.checkpoints import MissingWeights, module_hash
from .runtime.runs import ClipgenError, progress, read_json, versions, write_atomic, write_json
from .text_to_image import TextToImage
from .vqgan import VQGAN, codebook_statistics

BLUR = "Gaussian, sigma = k pixels at the evaluation resolution, kernel to 4 sigma, reflected border, on {}, before the network's resize"
BLURRED = {"both": "both sets", "reference": "the reference alone"}
RESIZE = "short side to the resolution by Lanczos (a JPEG decoded at a coarser scale where that is enough), centre crop; untouched where it is of that size; turned as EXIF says, which pytorch-fid, clean-fid and torch-fidelity do not"
MAX_ROWS = 2**31
PUBLISHED_N = 30_000  # captions of COCO's val2014, one an image, that published figures are of
Change = Callable[[torch.Tensor], torch.Tensor]


class Evaluators(NamedTuple):
    """The networks that score images."""

    clip: ClipEmbedder  # the evaluation CLIP: CapS, R-precision, and the features of protocol `clip`
    classifier: Classifier | None = None  # of the reference's classes
    judges: Sequence[ClipEmbedder] = ()  # by which CapS and R-precision are measured as well
    networks: Callable[[str, ClipEmbedder], FeatureNetwork] = feature_network  # makes the network of a protocol


class Provenance(NamedTuple):
    """What is known of scored images by their rows; all of it may be unknown."""

    texts: dict[int, str] = {}  # the caption that an image was generated for
    rows: dict[int, int] = {}  # the row of the reference whose caption, embedding or class it was generated for
    seed: int = 0  # of the choice of captions
    captions: str = ""  # the caption list, for its hash
    reconstruct: Change | None = None  # the generator's tokenizer there and back, for rFID


def generate_images(
    generator: TextToImage, prompts: list[str] | torch.Tensor, folder: Path, seed: int = 0, **settings: object
) -> list[Path]:
    """Write one PNG for each prompt, image i with seed + i; a file that exists is not generated again.

    The processes of a launch take every world_size-th batch each. `generated.json` beside the images holds what decides
    them (weights, settings, seed, prompts): images of other facts are deleted first. `captions.txt` holds the prompts.

    Args:
        generator: anything with `generate_each(prompts, seeds, **settings)`; settings are fields of SampleConfig.
        prompts: texts, or CLIP embeddings (N, D) of images.

    Raises ClipgenError: the folder holds files that were not generated here, or an image has pixels that are not finite.
    """
    paths = [folder / f"{row:05d}.png" for row in range(len(prompts))]
    if distributed.is_main():
        _prepare(folder, generator, prompts, {"seed": seed, "settings": settings})
        if not isinstance(prompts, torch.Tensor):
            pairs = zip((path.name for path in paths), prompts, strict=True)
            write_atomic(folder / "captions.txt", caption_list(pairs))
    distributed.barrier()
    size = settings.get("batch_size") or getattr(getattr(generator, "settings", None), "batch_size", 64)
    batches = [range(first, min(first + size, len(paths))) for first in range(0, len(paths), size)]
    with progress(len(paths), f"generating {folder.name}", distributed.is_main()) as bar:
        for batch in batches[distributed.rank() :: distributed.world_size()]:
            rows = [row for row in batch if not paths[row].exists()]
            asked = prompts[rows] if isinstance(prompts, torch.Tensor) else [prompts[row] for row in rows]
            images = generator.generate_each(asked, [seed + row for row in rows], **settings) if rows else ()
            for row, image in zip(rows, images, strict=True):
                write_atomic(paths[row], png(eight_bit(image)))
            bar.update(len(batch) * distributed.world_size())
    distributed.barrier()
    return paths


def _prepare(folder: Path, generator: TextToImage, prompts: list[str] | torch.Tensor, facts: dict) -> None:
    """Leave images in a folder that the same weights, configs, prompts and facts have decided, and no others."""
    mark = folder / "generated.json"
    if not mark.exists() and folder.exists() and any(folder.iterdir()):
        raise ClipgenError(f"{folder} holds files that were not generated here: give a new or empty folder")
    is_module = isinstance(generator, torch.nn.Module)
    parts = {"generator": generator, "clip": generator.clip} if is_module else vars(generator)
    weights = {name: module_hash(part) for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    configs = [asdict(getattr(generator, name)) for name in ("settings", "config") if hasattr(generator, name)]
    text = prompts.cpu().numpy().tobytes() if isinstance(prompts, torch.Tensor) else "\n".join(prompts).encode()
    facts = {"by": type(generator).__name__, "weights": weights, "configs": configs, **facts}
    facts |= {"prompts": hashlib.sha256(text).hexdigest()[:16], "n": len(prompts)}
    if not mark.exists() or read_json(mark) != json.loads(json.dumps(facts)):
        for path in folder.glob("*.png"):
            path.unlink()
        write_json(mark, facts)


@torch.inference_mode()
def score_images(
    images: ImageSet,
    reference: ImageSet | Moments,
    config: EvaluateConfig,
    evaluators: Evaluators,
    provenance: Provenance = Provenance(),
) -> dict:
    """Score images, whatever generated them (`open_folder`), against a reference (`open_reference`) under a protocol.

    CapS is the mean cosine of caption and image under the evaluation CLIP (not times 100); `caps_ceiling` that of real
    images with their own captions, `caps_floor` with those of other images. rFID compares the reference with its
    reconstructions. `classes` are shares of images that are classified as the class they were generated for.

    Returns what `set_scores` gives, with `rfid`, `card`, `warnings`, `n` and `n_reference`; `also` holds the same of other
    protocols (config.also); `missing` says which weights are not on this machine (`fid`, `rfid` and `floor` are then empty);
    `caps` and so on where captions are known.
    """
    sets, clip = [some for some in (images, reference) if isinstance(some, ImageSet)], evaluators.clip
    numbers: dict = {
        "protocol": f"{config.protocol}-FID" + (f" with {clip.name}" if config.protocol == "clip" else ""),
        "blur": BLUR.format(BLURRED[config.blur_sets]),
        "resolution": images.size,
        "reference": f"{reference.name}/{reference.split}" if len(sets) == 2 else "statistics of a file",
        "judge": clip.name,
        **{"fid": {}, "rfid": {}, "floor": {}, "warnings": [], "n_reference": "not in the file"},
    }
    for protocol in dict.fromkeys((config.protocol, *config.also)):
        try:
            blur = config.blur if protocol == config.protocol else config.blur[:2]  # each is a pass over all images
            under = replace(config, protocol=protocol, blur=blur)
            found = _distances(images, reference, under, evaluators, provenance)
            numbers |= found if protocol == config.protocol else {"also": numbers.get("also", {}) | {protocol: found}}
        except MissingWeights as error:
            numbers["missing"] = [*numbers.get("missing", []), str(error)]
    if provenance.texts:
        numbers |= _caption_fit(images, reference, clip, provenance, config.caption_prefix)
        fit = partial(_caption_fit, images, reference, provenance=provenance, prefix=config.caption_prefix)
        judged = {judge.name: fit(clip=judge) | {"weights_hash": judge.weights_hash} for judge in evaluators.judges}
        numbers |= {"judges": judged} if judged else {}
        if without := len(images) - len(provenance.texts):
            numbers["warnings"].append(f"{without} of {len(images)} images have no caption: CapS is of the others")
        if truncated := numbers["truncated_captions"]:
            most = f"{clip.tokenizer.context_length} tokens: it has read their beginning only"
            numbers["warnings"].append(f"{truncated} captions are longer than CLIP's {most}")
    if evaluators.classifier and provenance.rows and len(sets) == 2 and reference.classes:
        numbers["classes"] = _class_shares(images, reference, evaluators.classifier, provenance)
    if len(sets) == 2 and re.fullmatch(r"val20\d\d", reference.split) and len(reference) < PUBLISHED_N:
        what = f"{reference.split} has {len(reference):,} images here, published figures of COCO are of {PUBLISHED_N:,}"
        numbers["warnings"].append(f"{what} captions of val2014, one an image: these do not compare with them")
    for skipped in (some.skipped for some in sets if some.skipped):
        name, why = next(iter(skipped.items()))
        numbers["warnings"].append(f"{len(skipped)} files were left out, the first {name} ({why})")
    return numbers | dict(zip(("n", "n_reference"), map(_count, sets), strict=False))


def _distances(
    images: ImageSet, reference: ImageSet | Moments, config: EvaluateConfig, by: Evaluators, provenance: Provenance
) -> dict:
    """FID-k and so on, with the protocol card: everything that decides a number beside the images' content."""
    network, device = by.networks(config.protocol, by.clip), by.clip.device
    radii = config.blur if config.blur_sets == "both" else (0,)
    scored, place = saved_statistics(images, network, radii, config.batch_size, device)
    counts, described, real, rfid = {"the scored set": _count(images)}, {"file": "statistics"}, reference, {}
    if isinstance(reference, ImageSet):
        real, _ = saved_statistics(reference, network, config.blur, config.batch_size, device)
        n = _count(reference)
        counts |= {"the reference": n, "half of the reference": n // 2}
        described = {"name": reference.name, "split": reference.split, "n": n, "codec": codec(reference.names)}
    if provenance.reconstruct:
        batches = _batches(reference, config.batch_size, device, provenance.reconstruct)
        rfid = fid_by_radius(set_statistics(batches, network, radii), real)
    place.unlink(missing_ok=True)  # the reference's stay, for the next set that is scored
    listed = provenance.captions
    digest = hashlib.sha256(listed.encode()).hexdigest()[:16]
    card = {
        "protocol": network.protocol,
        "definition": DEFINITIONS[network.protocol],
        "weights": network.weights,
        "weights_hash": network.weights_hash,
        "k": list(config.blur),
        "blur": BLUR.format(BLURRED[config.blur_sets]),
        "resolution": images.size,
        "resize": RESIZE,
        "scored": {"name": images.name, "n": _count(images), "codec": codec(images.names)},
        "reference": described,
        "captions": {"n": listed.count("\n"), "hash": digest, "seed": provenance.seed} if listed else None,
        "versions": versions(),
    }
    biased = "its distances are biased upwards and compare with themselves only"
    few = {name: n for name, n in counts.items() if n < scored.dim}
    warnings = [f"{name} has {n} images for {scored.dim} feature dimensions: {biased}" for name, n in few.items()]
    return set_scores(scored, real) | {"rfid": rfid, "warnings": warnings, "card": card}


def _batches(
    images: ImageSet, batch_size: int, device: torch.device, change: Change = lambda x: x, most: int = MAX_ROWS
) -> Iterator[torch.Tensor]:
    """The images that can be read, of the first `most`, changed, as (B, 3, H, W) in [-1, 1], under a progress bar."""
    chosen, workers = range(min(most, len(images))), 0 if device.type == "cpu" else 4
    with progress(len(chosen), f"scoring {images.name}") as bar:
        for rows, batch in ordered_batches(images, chosen, batch_size, workers):
            yield change(to_float(batch).to(device))
            bar.update(len(rows))


def _count(images: ImageSet) -> int:
    return len(images) - sum(name in images.skipped for name in images.names)


def _class_shares(images: ImageSet, reference: ImageSet, classifier: Classifier, provenance: Provenance) -> dict:
    """Shares of images classified as what they were generated for, beside those of real images and of their reconstructions."""
    asked = {row: reference.classes[real] for row, real in provenance.rows.items()}
    scores, beside = accuracy(classifier, images, asked), {"real": accuracy(classifier, reference)}
    if provenance.reconstruct:
        beside["reconstruction"] = accuracy(classifier, reference, change=provenance.reconstruct)
    for name, found in beside.items():
        scores[name] = found["accuracy"]
        for key, of_attribute in found.get("attributes", {}).items():
            scores["attributes"][key][name] = of_attribute["accuracy"]
    return scores


def _caption_fit(
    images: ImageSet, reference: ImageSet | Moments, clip: ClipEmbedder, provenance: Provenance, prefix: str
) -> dict:
    """CapS of the images, and the values of real images between which it lies; of every caption behind the prefix."""
    owners, seed = provenance.rows, provenance.seed
    pairs = [(row, prefix + text) for row, text in provenance.texts.items()]
    numbers = caption_scores(images, pairs, clip, seed, owners) | {"caption_prefix": prefix}
    numbers["clip_score"] = max(100 * numbers["caps"], 0.0)  # CLIPScore as torchmetrics defines it
    if isinstance(reference, ImageSet) and reference.has_captions:
        real_pairs = [(owners[row], text) for row, text in pairs] if owners else []
        real_pairs = real_pairs or [(row, prefix + text) for row, text in choose_captions(reference, len(pairs), seed)]
        real = caption_scores(reference, real_pairs[:PAIRS], clip, seed, range(len(reference)))
        numbers |= {"caps_ceiling": real["caps"], "caps_floor": real["caps_shuffled"]}
        numbers["r_precision_real"] = real["r_precision"]
    return numbers


@torch.inference_mode()
def evaluate_generator(
    generator: TextToImage,
    images: ImageSet,
    evaluators: Evaluators,
    config: EvaluateConfig,
    folder: Path,
    seed: int = 0,
    **settings: object,
) -> tuple[dict, dict]:
    """Generate for one caption each of `config.n` images of a split, and score what was generated against the split.

    Where a split has no captions, the CLIP embeddings of its images are the prompts. In a launch all processes generate and
    the first one scores. The generated images stay in `folder`. Returns what `score_images` gives, and a dict of the first
    64 `prompts` and `images` and the caption list as text, `captions`.
    """
    if images.has_captions:
        rows, prompts = map(list, zip(*choose_captions(images, config.n, seed), strict=True))
    else:
        rows, parts = [], []
        for kept, batch in ordered_batches(images, range(min(config.n, len(images))), config.batch_size):
            rows += kept
            parts.append(generator.clip.images(to_float(batch).to(generator.device)))
        prompts = torch.cat(parts)
    paths = generate_images(generator, prompts, folder, seed, **settings)
    if not distributed.is_main():
        return distributed.broadcast(None)  # what the first process has measured
    texts = dict(enumerate(prompts)) if images.has_captions else {}
    listed = caption_list((images.names[rows[i]], text) for i, text in texts.items())
    reconstruct = lambda x: generator.vqgan.decode(generator.vqgan.encode(x))
    generated = ImageSet(folder.name, "all", folder, [path.name for path in paths], images.size)
    provenance = Provenance(texts, dict(enumerate(rows)), seed, listed, reconstruct)
    numbers = score_images(generated, images, config, evaluators, provenance)
    if texts and isinstance(generator, TextToImage):
        numbers["nll"] = condition_nll(generator, images, {rows[i]: text for i, text in texts.items()}, **settings)
    numbers["condition"] = "captions" if texts else "embeddings of the reference images, which have no captions"
    if evaluators.clip.weights_hash == generator.clip.weights_hash:
        numbers["judge"] += " (also the conditioning CLIP)"
    _, first = next(ordered_batches(generated, range(min(64, len(paths))), 64))
    names = [texts.get(i, f"row {row}") for i, row in enumerate(rows[:64])]
    return distributed.broadcast((numbers, {"prompts": names, "images": to_float(first), "captions": listed}))


@torch.inference_mode()
def condition_nll(
    generator: TextToImage, images: ImageSet, captions: dict[int, str], **settings: object
) -> dict[str, float]:
    """NLL of the tokens of real images, in nats a token, given their own embeddings (`image`) and given a caption's (`text`).

    Their difference is what a caption leaves open, and the gap between the modalities. It has less noise than scores of generated
    images, but need not order recipes as they do, and compares on one tokenizer only. Of the first 1,000 rows of `captions`.
    """
    config, totals, count = replace(generator.settings, **settings), {"image": 0.0, "text": 0.0}, 0
    for rows, batch in ordered_batches(images, list(captions)[:1_000], 100):
        x = to_float(batch).to(generator.device)
        tokens, texts = generator.vqgan.encode(x).flatten(1), [captions[row] for row in rows]
        for kind, embeds in (("image", generator.embed(x)), ("text", generator.embed(texts))):
            condition = generator.condition(embeds, kind == "text", config.neighbours, config.align)
            logits = generator.transformer(condition, tokens).transpose(1, 2)
            totals[kind] += F.cross_entropy(logits, tokens, reduction="sum").item()
        count += tokens.numel()
    return {kind: total / count for kind, total in totals.items()} | {"n": count // tokens.shape[1]}


def oracle_list(n: int, seed: int = 0) -> str:
    """The caption list of the text prompts of `evaluate_oracle`, by the place of their images in its folder."""
    kinds = {kind: oracle.prompts(kind, n, seed) for kind in oracle.KINDS}
    return caption_list(
        (f"text-{kind}/{i:05d}.png", p.text) for kind, made in kinds.items() for i, p in enumerate(made)
    )


def nearest_images(
    generated: ImageSet, train: ImageSet, real: ImageSet, config: EvaluateConfig, evaluators: Evaluators
) -> tuple[dict, torch.Tensor]:
    """`memorisation` of generated images among config.nearest training images, beside as many real ones.

    By the features of the config's protocol, of the evaluation CLIP where its weights are missing. Returns the scores, their
    pairs by file names, and the closest by features side by side, (2 P, 3, H, W) in [-1, 1].
    """
    try:
        network = evaluators.networks(config.protocol, evaluators.clip)
    except MissingWeights:
        network = feature_network("clip", evaluators.clip)
    found, rows, device = [], [], evaluators.clip.device
    for images, most in ((generated, len(generated)), (real, len(generated)), (train, config.nearest)):
        found.append(descriptions(_batches(images, config.batch_size, device, most=most), network))
        rows.append([row for row in range(min(most, len(images))) if images.names[row] not in images.skipped])
    scores, (made, _, known) = memorisation(*found) | {"by": network.protocol}, rows
    pairs = [x for i, j, _ in scores["pairs"] for x in (generated[made[i]], crop(train[known[j]], generated.size))]
    for kind in (scores, scores["pixels"]):
        kind["pairs"] = [[generated.names[made[i]], train.names[known[j]], d] for i, j, d in kind["pairs"]]
    return scores, to_float(torch.stack(pairs))


@torch.inference_mode()
def evaluate_oracle(
    generator: TextToImage,
    folder: Path,
    n: int,
    seed: int = 0,
    modalities: tuple[str, ...] = ("text", "image", "reconstruction"),
    **settings: object,
) -> dict:
    """Shapes world only: what share of images shows what the prompt says, read by the oracle.

    Text prompts of every kind of `oracle.KINDS`; as image prompts, the embeddings of real scenes of one object; and, with
    nothing generated, the tokenizer's reconstructions of real scenes, above which no generator on its tokens can rise.
    Every prompt gets one image, image i with seed + i: nothing is picked or ranked.

    Returns modality -> kind -> what `oracle.score` gives.
    """
    shares: dict = {modality: {} for modality in modalities}
    for modality, kind in ((key, kind) for key in modalities for kind in (["one"] if key == "image" else oracle.KINDS)):
        prompts = oracle.prompts(kind, n, seed)
        scenes = from_arrays(np.stack([shapes.render(p.scene) for p in prompts])).to(generator.device).split(64)
        if modality == "reconstruction":
            arrays = np.concatenate([to_arrays(generator.vqgan.decode(generator.vqgan.encode(x))) for x in scenes])
        else:
            is_text = modality == "text"
            asked = [p.text for p in prompts] if is_text else torch.cat([generator.clip.images(x) for x in scenes])
            paths = generate_images(generator, asked, folder / f"{modality}-{kind}", seed, **settings)
            arrays = [load_image(path, shapes.CANVAS).permute(1, 2, 0).numpy() for path in paths]
        shares[modality][kind] = oracle.score([oracle.correct(*pair) for pair in zip(arrays, prompts, strict=True)])
    return shares


@torch.inference_mode()
def evaluate_vqgan(vqgan: VQGAN, images: ImageSet, lpips: torch.nn.Module | None = None) -> dict:
    """PSNR (dB), SSIM and LPIPS of reconstructions, means over images, and codebook use, over a set's first 1,000 images.

    `lpips` takes two (B, 3, H, W) in [-1, 1] and gives (B, 1, 1, 1). None takes LPIPS with AlexNet, and where its
    weights are not on this machine `missing` says so and the rest is measured.
    """
    device, missing, counts = vqgan.quantizer.codebook.device, {}, 0
    try:
        lpips = lpips or lpips_network(device)
    except MissingWeights as error:
        missing = {"missing": [str(error)]}
    scores = []
    for _, batch in ordered_batches(images, range(min(1_000, len(images))), 64):
        x = to_float(batch).to(device)
        tokens = vqgan.encode(x)
        counts = counts + torch.bincount(tokens.flatten(), minlength=vqgan.config.codebook_size)
        decoded = vqgan.decode(tokens)
        scores.append(reconstruction_scores(x, decoded))
        if lpips:
            scores[-1]["lpips"] = lpips(decoded.clamp(-1, 1), x).flatten()
    values = {key: torch.cat([part[key].cpu() for part in scores]) for key in scores[0]}
    means = {key: float(value.mean()) for key, value in values.items()}
    return {**means, "n": len(values["psnr"]), **codebook_statistics(counts), **missing}


CORRUPTIONS: dict[str, Change] = {
    "none": lambda x: x,
    "JPEG 50": lambda x: jpeg(x, 50),
    "blur": lambda x: blur(x, 2),
    "noise": lambda x: x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x),
}


def corruption_scores(images: ImageSet, network: FeatureNetwork, device: str = "cpu") -> dict[str, dict[str, float]]:
    """One half of a set's first 1,000 images, corrupted, against the other half: corruption -> metric -> value.

    They show whether the metrics order corruptions. Metrics are `fid`, `kid`, precision, recall, density, coverage, and `psnr` and `ssim` against the half as it was.
    """
    rows = range(min(1_000, len(images)))
    if len(rows) < 16:
        raise ClipgenError(f"{images.root} has {len(rows)} images, too few to halve and compare: use at least 16")
    whole = torch.cat([to_float(batch) for _, batch in ordered_batches(images, rows, 64)]).to(device)
    reference, scores = set_statistics(whole[::2].split(64), network, (0,)), {}
    for name, corrupt in CORRUPTIONS.items():
        parts = [corrupt(part) for part in whole[1::2].split(64)]
        distances = set_scores(set_statistics(parts, network, (0,)), reference)
        pairs = reconstruction_scores(whole[1::2], torch.cat(parts))
        manifold = {key: distances["manifold"][key] for key in ("precision", "recall", "density", "coverage")}
        scores[name] = {"fid": distances["fid"]["0"], "kid": distances["kid"]["mean"], **manifold}
        scores[name] |= {key: float(values.mean()) for key, values in pairs.items()}
    return scores
