"""Evaluation: features -> statistics -> distance, and how well an image fits its text.

In: a generator and a split with captions, or any two folders of images. Out: numbers, each with the protocol card that
says how it was made. The feature network and the blur are part of a metric's name; weights that are not there are named
among what is missing, and never replaced by others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .clip_embed import ClipEmbedder
from .config import EvaluateConfig
from .data import shapes
from .data.batches import ordered_batches
from .data.datasets import ImageSet, open_images
from .data.images import EXTENSIONS, blur, crop, from_arrays, jpeg, to_arrays, to_float
from .metrics import oracle
from .metrics.captions import caption_facts, caption_list, caption_scores, choose_captions, clip_score, texts_of
from .metrics.classifier import Classifier
from .metrics.distances import (
    few_pictures,
    frechet_distance,
    frechet_over_n,
    kernel_distance,
    manifold_scores,
    reconstruction_scores,
)
from .metrics.features import DEFINITIONS, FeatureNetwork, feature_network, lpips_network
from .metrics.passes import (
    BLUR_DEFINITION,
    JUDGED,
    STATISTICS,
    CaptionFit,
    Change,
    ClassHits,
    Embeddings,
    FirstPictures,
    SetStatistics,
    StatisticsFile,
    digest,
    measure,
    stream,
)
from .runtime.checkpoints import MissingWeights, module_hash
from .runtime.runs import ClipgenError, versions
from .text_to_image import TextToImage
from .vqgan import VQGAN, codebook_statistics

__all__ = ["frechet_distance", "feature_network"]  # part of this module's interface, defined elsewhere
RESIZE = "short side to the resolution by Lanczos (a JPEG decoded at a coarser scale where that is enough), centre crop; untouched where it is of that size"
DRAWN_CODEC = "none: 8-bit arrays"
Networks = Callable[[str, ClipEmbedder], FeatureNetwork]


def set_scores(scored: SetStatistics, reference: SetStatistics | StatisticsFile) -> dict:
    """All that compares one set of images with another under one protocol.

    Returns:
        `fid` (k -> FID-k), `floor` (FID-k of the reference's halves), and where both keep features: `kid`, `manifold`
        (precision, recall, density, coverage, of as many images `n` of either set: coverage falls where the sets
        differ in size) and `fid_over_n`; `inception_score` where the network has a head.
    """
    found: dict = {"fid": scored.distance(reference)}
    if isinstance(reference, SetStatistics):
        found["floor"] = reference.floor()
        real, fake = reference.sample.features(), scored.sample.features()
        n = min(len(real), len(fake))
        if n > 5:  # the fifth neighbour
            found["kid"] = kernel_distance(real, fake)
            found["manifold"] = {**manifold_scores(real[:n], fake[:n]), "n": n}  # their order is random
        found["fid_over_n"] = frechet_over_n(fake, reference.moments(0))
    if scored.classes is not None:
        found["inception_score"] = scored.classes.score()
    return found


def card(
    network: FeatureNetwork, radii: Sequence[int], size: int, scored: dict, reference: dict, captions: dict | None
) -> dict:
    """The protocol card: everything that decides a number beside the images' content.

    Args:
        scored, reference: what is known of each set: `n`, `codec`, `split` and so on.
        captions: `n` and `hash` of the caption list, or None where no caption is read.
    """
    return {
        "protocol": network.protocol,
        "definition": DEFINITIONS[network.protocol],
        "weights": network.weights,
        "weights_hash": network.weights_hash,
        "k": list(radii),
        "blur": BLUR_DEFINITION,
        "resolution": size,
        "resize": RESIZE,
        "scored": scored,
        "reference": reference,
        "captions": captions,
        "versions": versions(),
    }


def codec(paths: Iterable[Path]) -> str:
    """PNG, JPEG, ..., or mixed with their names, by the endings of files."""
    known = Image.registered_extensions()
    names = sorted({known.get(path.suffix.lower(), path.suffix) for path in paths})
    return names[0] if len(names) == 1 else "mixed: " + ", ".join(names)


@torch.inference_mode()
def evaluate_vqgan(
    vqgan: VQGAN, images: ImageSet, limit: int = 1_000, batch_size: int = 64, lpips: torch.nn.Module | None = None
) -> dict:
    """PSNR (dB), SSIM and LPIPS of reconstructions, means over images, and codebook use, over a set's first `limit` images.

    Args:
        lpips: two (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1); None takes LPIPS with AlexNet, and where its weights are not on
            this machine `missing` says so and the rest is measured.
    """
    device, missing, tokens = vqgan.last_layer.device, [], []
    try:
        lpips = lpips or lpips_network(device)
    except MissingWeights as error:
        missing.append(str(error))
    scores: dict[str, list[torch.Tensor]] = {}
    for _, batch in ordered_batches(images, range(min(limit, len(images))), batch_size):
        x = to_float(batch).to(device)
        tokens.append(vqgan.encode(x))
        decoded = vqgan.decode(tokens[-1])
        found = reconstruction_scores(x, decoded) | (
            {"lpips": lpips(decoded.clamp(-1, 1), x).flatten()} if lpips else {}
        )
        for key, values in found.items():
            scores.setdefault(key, []).append(values.cpu())
    means = {key: float(torch.cat(values).mean()) for key, values in scores.items()}
    codes = codebook_statistics(torch.cat([t.flatten() for t in tokens]), vqgan.config.codebook_size)
    return {**means, "n": sum(map(len, scores["psnr"])), **codes} | ({"missing": missing} if missing else {})


@torch.inference_mode()
def evaluate_generator(
    generator: TextToImage,
    images: ImageSet,
    judge: ClipEmbedder,
    config: EvaluateConfig,
    seed: int = 0,
    show_progress: bool = True,
    classifier: Classifier | None = None,
    networks: Networks = feature_network,
    folder: Path = STATISTICS,
    resume: Path | None = None,
    **settings: float,
) -> tuple[dict, dict]:
    """FID-k, rFID, KID, CapS, R-precision and so on of images drawn for a split's captions.

    FID-k compares one image for each chosen caption with all images of the split; rFID the split's images with
    their own reconstructions; `floor` the two halves of the split, real against real. CapS is the mean cosine of
    caption and image under the judge CLIP (not times 100), `caps_ceiling` that of real images with their own
    captions, `caps_floor` with captions of other images. `classes` is the share of images that a classifier reads
    as the class that was asked for: drawn ones, real ones, and the tokenizer's decodings of real ones.

    What depends on the real images and the tokenizer alone is computed once and kept in `folder`.

    Args:
        classifier: of the classes of `images`; None leaves `classes` out.
        networks: what gives the feature network of a protocol.
        resume: folder for the checkpoint from which an interrupted drawing goes on; None begins anew. It stays there
            for the caller to delete when the numbers are safe.
        settings: fields of SampleConfig, such as guidance.

    Returns:
        (numbers, shown): `numbers` for summary.json, with `missing` where weights are not on this machine (`fid`, `rfid`
        and `floor` are then empty); `shown` holds a few `prompts` and their `images`, and the caption list as text.
    """
    network, missing = None, []
    classifier = classifier if images.classes else None
    try:
        network = networks(config.protocol, judge)
    except MissingWeights as error:
        missing.append(str(error))

    def sinks(parts: int, classes: Sequence[str]) -> dict:
        statistics = {"statistics": SetStatistics(network, config.blur, parts)} if network else {}
        return statistics | ({"classes": ClassHits(classifier, classes)} if classifier else {})

    prompts = (
        choose_captions(images, config.n, seed) if images.has_captions else [(row, None) for row in range(len(images))]
    )
    real, decoded = sinks(2, images.classes), sinks(1, images.classes)
    if images.has_captions:
        real["embeds"] = Embeddings(judge, {row for row, _ in prompts[:JUDGED]})
    device, vqgan = judge.device, generator.vqgan
    same = Change("none", lambda x: x.to(device))
    through = Change(f"decoded by {module_hash(vqgan)}", lambda x: vqgan.decode(vqgan.encode(x.to(device))))
    measure(images, real, same, config.batch_size, "features of real images", show_progress, folder)
    measure(images, decoded, through, config.batch_size, "features of reconstructions", show_progress, folder)

    names = images.names
    prompts = [(row, text) for row, text in prompts[: config.n] if names[row] not in images.skipped]
    drawn = sinks(1, [images.classes[row] for row, _ in prompts] if classifier else ())
    drawn["shown"] = FirstPictures(64)
    if images.has_captions:
        drawn["captions"] = CaptionFit(judge, dict(enumerate(text for _, text in prompts)))

    def drawings(numbers: range):
        for i in numbers:
            positions = list(range(i * config.batch_size, min((i + 1) * config.batch_size, len(prompts))))
            part = [prompts[j] for j in positions]
            yield (
                positions,
                generator.generate_each(_prompts(generator, images, part), [seed + j for j in positions], **settings),
            )

    listed = caption_list((names[row], text or "") for row, text in prompts)
    partial = None
    if resume is not None:
        weights = [module_hash(generator), generator.clip.weights_hash, asdict(generator.settings), settings, seed]
        facts = [weights, config.batch_size, listed, *(sink.facts for sink in drawn.values() if hasattr(sink, "facts"))]
        partial = resume / f"drawn-{digest(facts)}.safetensors"
    stream(drawings, len(prompts), config.batch_size, drawn, "drawing for captions", show_progress, partial)

    n_real = len(images) - sum(name in images.skipped for name in names)
    numbers = {
        "protocol": f"{config.protocol}-FID" + (f" with {judge.name}" if config.protocol == "clip" else ""),
        "blur": BLUR_DEFINITION,
        "resolution": images.size,
        "reference": f"{images.name}/{images.split}",
        "condition": "captions"
        if images.has_captions
        else "embeddings of the reference images, which have no captions",
        "n": len(prompts),
        "n_reference": n_real,
        "warnings": [],
        "judge": judge.name
        + (" (also the conditioning CLIP)" if judge.weights_hash == generator.clip.weights_hash else ""),
        "fid": {},
        "rfid": {},
        "floor": {},
    }
    if network:
        numbers |= set_scores(drawn["statistics"], real["statistics"])
        numbers["rfid"] = decoded["statistics"].distance(real["statistics"])
        counts = {"the drawn set": len(prompts), "the reference": n_real, "a real half": n_real // 2}
        numbers["warnings"] = few_pictures(counts, drawn["statistics"].dim)
        numbers["card"] = card(
            network,
            config.blur,
            images.size,
            {"n": len(prompts), "codec": DRAWN_CODEC},
            {"name": images.name, "split": images.split, "n": n_real, "codec": codec(map(Path, images.names))},
            {**caption_facts(listed), "seed": seed} if images.has_captions else None,
        )
    if images.has_captions:
        owners = dict(enumerate(row for row, _ in prompts))
        numbers |= _fit_scores(drawn["captions"], seed, owners) | _real_fit(real["embeds"], prompts, seed)
    if classifier:
        shares = {"real": real, "reconstruction": decoded, "accuracy": drawn}
        numbers["classes"] = {key: held["classes"].share for key, held in shares.items()} | {"n": len(prompts)}
    if missing:
        numbers["missing"] = missing
    shown = {
        "prompts": [text or f"row {row}" for row, text in prompts[:64]],
        "images": torch.stack(drawn["shown"].pictures),
    }
    return numbers, {**shown, "captions": listed if images.has_captions else ""}


def _fit_scores(fit: CaptionFit, seed: int, owners: dict[int, int] | None = None) -> dict:
    """CapS over all images; R-precision and the cosine with shuffled captions over the pairs that are kept.

    `owners`: row -> the real image that its caption describes, where several rows share one.
    """
    wording = [fit.texts[row] for row in fit.rows]
    described = [owners[row] for row in fit.rows] if owners else ()
    found = caption_scores(torch.stack(fit.pictures), torch.stack(fit.captions), wording, seed, described)
    return {
        "caps": fit.caps,
        "caps_shuffled": found["shuffled"],
        "clip_score": clip_score(fit.caps),
        "r_precision": found["r_precision"],
        "truncated_captions": fit.truncated,
        "judged": len(fit.rows),
    }


def _real_fit(embeds: Embeddings, pairs: list[tuple[int, str]], seed: int) -> dict:
    """What `_fit_scores` finds of drawn images, of real ones: between them and `caps_floor` a drawn one is to be read."""
    pairs = [(row, text) for row, text in pairs if row in embeds.found][:JUDGED]
    texts = [text for _, text in pairs]
    known = torch.cat([embeds.judge.texts(texts[i : i + 256]).cpu() for i in range(0, len(texts), 256)])
    rows = [row for row, _ in pairs]
    found = caption_scores(embeds.of(rows), known, texts, seed, rows)
    return {"caps_ceiling": found["caps"], "caps_floor": found["shuffled"], "r_precision_real": found["r_precision"]}


def _prompts(
    generator: TextToImage, images: ImageSet, prompts: list[tuple[int, str | None]]
) -> list[str] | torch.Tensor:
    """The captions, or embeddings (B, D) of the images themselves where there are none."""
    if prompts[0][1] is not None:
        return [text for _, text in prompts]
    pictures = torch.stack([crop(images[row], images.size) for row, _ in prompts])
    return generator.clip.images(to_float(pictures).to(generator.device))


@torch.inference_mode()
def evaluate_folder(
    images: Path,
    reference: Path,
    judge: ClipEmbedder,
    protocols: Sequence[str] = ("inception", "clip"),
    captions: Path | None = None,
    size: int = 0,
    split: str = "val",
    seed: int = 0,
    show_progress: bool = True,
    networks: Networks = feature_network,
    folder: Path = STATISTICS,
) -> dict:
    """Score any folder of images, whatever drew them, under each protocol whose weights are there.

    Args:
        images: every image below this folder is scored.
        reference: a COCO root (its `split`), shards (those named as of `split`, all where none is), a folder (every image
            below it), or an npz of pytorch-fid, which allows FID-0 alone.
        captions: what the images were drawn for (see `read_captions`), matched by file name without its ending.
        size: side in pixels that both sets are brought to; 0 takes the scored images' own, if they share one.
        networks: what gives the feature network of a protocol.

    Returns:
        `protocols` (name -> what `set_scores` gives, with its `card` and `warnings`), `missing` (name -> why it is not
        there), `captions` (CapS and so on), `warnings`, and the sizes of both sets.

    Raises:
        ClipgenError: fewer than 2 images, different sizes without `size`, a damaged reference or caption file, or no
            protocol that can be computed.
    """
    config = EvaluateConfig()
    scored = open_folder(images, size)
    size, same = scored.size, Change("none", lambda x: x.to(judge.device))
    texts = texts_of(scored, captions, seed) if captions else {}
    listed = caption_list((scored.names[row], text) for row, text in texts.items())
    if reference.suffix == ".npz":
        real: ImageSet | StatisticsFile = StatisticsFile(reference)
    else:
        real = _open_reference(reference, split, size)
    result: dict = {
        "images": scored.name,
        "reference": reference.resolve().name,
        "resolution": size,
        "protocols": {},
        "missing": {},
        "warnings": [],
    }

    def statistics(pictures: ImageSet, network: FeatureNetwork, parts: int, label: str) -> SetStatistics:
        found = SetStatistics(network, config.blur, parts)
        measure(
            pictures,
            {"statistics": found},
            same,
            config.batch_size,
            f"{network.protocol}: {label}",
            show_progress,
            folder,
        )
        return found

    for name in protocols:
        try:
            network = networks(name, judge)
        except MissingWeights as error:
            result["missing"][name] = str(error)
            continue
        ours = statistics(scored, network, 1, "scored images")
        if isinstance(real, StatisticsFile):
            if len(real.mu) != ours.dim:
                result["missing"][name] = (
                    f"{reference.name} holds {len(real.mu)} dimensions, protocol {name!r} has {ours.dim}: give statistics of the same network"
                )
                continue
            theirs, known = real, {"name": reference.name, "n": "not in the file", "codec": "not in the file"}
        else:
            theirs = statistics(real, network, 2, "reference")
            known = {"name": real.name, "split": real.split, "n": theirs.n, "codec": codec(map(Path, real.names))}
        counts = {"the scored set": ours.n} | ({"the reference": theirs.n} if "split" in known else {})
        result["protocols"][name] = set_scores(ours, theirs) | {
            "warnings": few_pictures(counts, ours.dim),
            "card": card(
                network,
                config.blur,
                size,
                {"name": scored.name, "n": ours.n, "codec": codec(map(Path, scored.names))},
                known,
                caption_facts(listed) if texts else None,
            ),
        }
    if texts:
        fit = CaptionFit(judge, texts)
        measure(scored, {"captions": fit}, same, config.batch_size, "captions", show_progress, folder)
        result["captions"] = {"judge": judge.name, **_fit_scores(fit, seed)}
        if isinstance(real, ImageSet) and real.has_captions:
            pairs = choose_captions(real, min(len(texts), JUDGED), seed)
            embeds = Embeddings(judge, {row for row, _ in pairs})
            measure(
                real, {"embeds": embeds}, same, config.batch_size, "captions of the reference", show_progress, folder
            )
            result["captions"] |= _real_fit(embeds, pairs, seed)
        result["caption_list"] = listed
        result["warnings"] += _caption_warnings(fit, len(scored))
    if not result["protocols"] and not texts:
        raise ClipgenError(" ".join(result["missing"].values()))
    result["n"] = len(scored) - sum(name in scored.skipped for name in scored.names)
    result["warnings"] += _skipped_warnings(scored) + (_skipped_warnings(real) if isinstance(real, ImageSet) else [])
    return result


def _open_reference(path: Path, split: str, size: int) -> ImageSet:
    if path.is_file() or (path / "annotations").is_dir():
        return open_images(path, split, size)
    return open_folder(path, size)


def open_folder(root: Path, size: int = 0) -> ImageSet:
    """Every image below a folder, without splits and captions.

    Args:
        size: short side in pixels; 0 takes the images' own.

    Raises:
        ClipgenError: no folder, fewer than 2 images, or images of different sizes and no `size`.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ClipgenError(
            f"{root} is not a folder of images: check the path, or unpack the archive and give its folder"
        )
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if len(paths) < 2:
        raise ClipgenError(f"{root} holds {len(paths)} images, too few to compare: give a folder of at least 2")
    if not size:
        sizes = {found for path in paths if (found := _picture_size(path))}
        if len(sizes) > 1:
            some = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:3])
            raise ClipgenError(
                f"the images in {root} have {len(sizes)} different sizes ({some}, ...): say by --size which side they are brought to"
            )
        if not sizes:
            raise ClipgenError(f"none of the {len(paths)} images in {root} can be read: check the files")
        size = min(*sizes.pop())
    return ImageSet(root.resolve().name, "all", root, paths, size)


def _picture_size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None  # reading it will say why


def _caption_warnings(fit: CaptionFit, n: int) -> list[str]:
    found = []
    if fit.n < n:
        found.append(f"{n - fit.n} of {n} images have no caption: CapS and R-precision are of the other {fit.n}")
    if fit.truncated:
        found.append(
            f"{fit.truncated} captions are longer than CLIP's {fit.judge.tokenizer.context_length} tokens: it has read their beginning only"
        )
    return found


def _skipped_warnings(images: ImageSet) -> list[str]:
    if not images.skipped:
        return []
    name, why = next(iter(images.skipped.items()))
    return [f"{len(images.skipped)} files of {images.name} were left out, the first {name} ({why})"]


CORRUPTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "JPEG 50": lambda x: jpeg(x, 50),
    "blur": lambda x: blur(x, 2),
    "noise": lambda x: x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x),
}


@torch.inference_mode()
def corruption_scores(
    images: ImageSet, network: FeatureNetwork, limit: int = 1_000, device: str | torch.device = "cpu"
) -> dict[str, dict[str, float]]:
    """One half of a set, damaged more and more, against the other half: do the metrics order the corruptions?

    Returns:
        damage -> `fid`, `kid`, precision, recall, density, coverage against the other half, and `psnr` and `ssim` against
        the undamaged same half. `none` is the floor, real against real.
    """
    rows = range(min(limit, len(images)))
    if len(rows) < 16:
        raise ClipgenError(f"{images.root} has {len(rows)} images, too few to halve and compare: use at least 16")
    whole = torch.cat([to_float(batch) for _, batch in ordered_batches(images, rows, 64)])
    first, second = whole[::2], whole[1::2]
    reference, found = SetStatistics(network, (0,), 2), {}
    _add(reference, first.to(device))
    for name, damage in CORRUPTIONS.items():
        damaged = torch.cat([damage(part) for part in second.split(64)])
        scored = SetStatistics(network, (0,))
        _add(scored, damaged.to(device))
        scores = set_scores(scored, reference)
        pairs = reconstruction_scores(second, damaged)
        manifold = {key: value for key, value in scores["manifold"].items() if key != "n"}
        found[name] = {
            "fid": scores["fid"]["0"],
            "kid": scores["kid"]["mean"],
            **manifold,
            **{key: float(values.mean()) for key, values in pairs.items()},
        }
    return found


def _add(statistics: SetStatistics, pictures: torch.Tensor) -> None:
    for part in pictures.split(64):
        statistics.add([], statistics.find([], part))


class _OracleReads:
    """What the oracle finds right in each image: row -> parts of `oracle.score`."""

    def __init__(self, prompts: Sequence[oracle.Prompt]):
        self.prompts, self.found = prompts, {}

    def find(self, rows: list[int], pictures: torch.Tensor) -> list[dict[str, bool]]:
        return [oracle.right(image, self.prompts[row]) for row, image in zip(rows, to_arrays(pictures), strict=True)]

    def add(self, rows: list[int], found: list[dict[str, bool]]) -> None:
        self.found |= dict(zip(rows, found, strict=True))

    def state(self) -> dict:
        return {"found": [[row, parts] for row, parts in self.found.items()]}

    def restore(self, state: dict) -> None:
        self.found = {row: parts for row, parts in state["found"]}


@torch.inference_mode()
def evaluate_oracle(
    generator: TextToImage,
    n: int,
    seed: int = 0,
    show_progress: bool = True,
    modalities: tuple[str, ...] = ("text", "image", "reconstruction"),
    batch_size: int = 128,
    resume: Path | None = None,
    **settings: float,
) -> dict:
    """Shapes world only: what share of images shows what was asked for, read by the oracle.

    Text prompts of one object, of two with a relation, and of held-out pairs; as image prompts, the embeddings of real
    scenes of one object; and, with nothing generated, the tokenizer's reconstructions of real scenes, above which no
    generator on its tokens can rise. Every prompt gets one image: nothing is picked or ranked.

    Args:
        resume: folder for the checkpoint from which an interrupted drawing goes on; None begins anew.
        settings: fields of SampleConfig, such as guidance.
    """
    kinds = {"text": ("one", "two", "held_out"), "image": ("one",), "reconstruction": ("one", "two", "held_out")}
    groups = [(modality, kind) for modality in modalities for kind in kinds[modality]]
    prompts = [prompt for _, kind in groups for prompt in oracle.prompts(kind, n, seed)]

    def pictures_of(modality: str, rows: list[int]) -> torch.Tensor:
        asked = [prompts[row] for row in rows]
        if modality != "text":
            scenes = from_arrays(np.stack([shapes.render(p.scene) for p in asked])).to(generator.device)
        if modality == "reconstruction":
            return generator.vqgan.decode(generator.vqgan.encode(scenes))
        texts = [p.text for p in asked] if modality == "text" else generator.clip.images(scenes)
        return generator.generate_each(texts, [seed + row % n for row in rows], **settings)

    def drawings(numbers: range) -> Iterator[tuple[list[int], torch.Tensor]]:
        for i in numbers:
            rows = list(range(i * batch_size, min((i + 1) * batch_size, len(prompts))))
            parts = itertools.groupby(rows, lambda row: groups[row // n][0])
            yield rows, torch.cat([pictures_of(modality, list(part)) for modality, part in parts])

    reads, partial = _OracleReads(prompts), None
    if resume is not None:
        weights = [module_hash(generator), generator.clip.weights_hash, asdict(generator.settings)]
        partial = resume / f"oracle-{digest([weights, settings, n, seed, groups, batch_size])}.safetensors"
    stream(drawings, len(prompts), batch_size, {"reads": reads}, "drawing for the oracle", show_progress, partial)
    found: dict = {modality: {} for modality in modalities}
    for i, (modality, kind) in enumerate(groups):
        found[modality][kind] = oracle.score([reads.found[row] for row in range(i * n, (i + 1) * n)])
    return found
