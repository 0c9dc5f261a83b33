"""Captions for evaluation: which are chosen, how they are read from files, and how well images fit them.

In: unit-norm CLIP embeddings (N, D) of images and of texts, or caption files. Out: CapS, R-precision, row -> caption.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from ..clip_embed import ClipEmbedder
from ..data.batches import ordered_batches
from ..data.datasets import ImageSet
from ..data.images import read_text, to_float
from ..runtime.distributed import tell
from ..runtime.runs import ClipgenError, read_json, reason, shortened
from .intervals import bootstrap, wilson

PAIRS = 10_000  # of image and caption, on which R-precision and shuffled captions are measured
Pairs = list[tuple[int, str]]  # row, caption


@torch.inference_mode()
def embed_pairs(images: ImageSet, pairs: Pairs, clip: ClipEmbedder) -> tuple[Pairs, torch.Tensor, torch.Tensor]:
    """The pairs whose image can be read, and the embeddings of image and caption of each, (N, D) on the CPU."""
    embeds: dict[int, torch.Tensor] = {}
    for rows, batch in ordered_batches(images, sorted({row for row, _ in pairs}), 64):
        embeds |= zip(rows, clip.images(to_float(batch).to(clip.device)).cpu(), strict=True)
    kept = [(row, text) for row, text in pairs if row in embeds]
    return kept, torch.stack([embeds[row] for row, _ in kept]), clip.texts([text for _, text in kept]).cpu()


def caption_scores(
    images: ImageSet, pairs: Pairs, clip: ClipEmbedder, seed: int = 0, owners: dict | range = range(0)
) -> dict[str, float]:
    """How images fit their captions under a CLIP.

    Args:
        pairs: (row, caption); those whose image cannot be read are left out, ClipgenError where none can.
        owners: row -> the real image that its caption describes, where some share one.

    Returns `caps` (CapS, the mean cosine) with its 95% interval over the pairs, `truncated_captions`, and of the first PAIRS pairs what `fit_scores` gives and
    their number as `judged`.
    """
    kept, shown, texts = embed_pairs(images, pairs, clip)
    cosines = (shown * texts).sum(1).double()
    wording, described = [text for _, text in kept], [owners[row] for row, _ in kept] if owners else []
    return {
        "caps": float(cosines.mean()),
        "caps_interval": list(bootstrap(cosines.numpy())),
        "truncated_captions": sum(map(clip.is_truncated, wording)),
        "judged": len(kept[:PAIRS]),
        **fit_scores(shown[:PAIRS], texts[:PAIRS], wording[:PAIRS], seed, described[:PAIRS]),
    }


def fit_scores(
    images: torch.Tensor, texts: torch.Tensor, wording: list[str], seed: int = 0, owners: Sequence[int] = ()
) -> dict[str, float]:
    """`caps_shuffled`, the mean cosine of N images with captions of other images, and `r_precision` with its 95% interval.

    R-precision is the share of images whose own caption ranks first among itself and 99 captions of other images: AttnGAN's
    protocol (arXiv 1711.10485, section 4.1) with CLIP as the ranker. Captions of the same wording, or of the same image,
    are not chosen as others; a small set has fewer.

    Args:
        images, texts: (N, D) embeddings of unit norm; row i of both belongs together.
        owners: the real image that each caption describes, where one image has several captions.
    """
    same = np.unique(np.array(wording, dtype=object), return_inverse=True)[1]
    owner = np.array(owners if len(owners) else range(len(wording)))
    shift = int(np.random.default_rng([seed, 19]).integers(1, max(len(wording), 2)))
    other = torch.from_numpy((owner != np.roll(owner, shift)) | (len(wording) == 1))
    shuffled = float((images * texts.roll(shift, 0)).sum(1)[other].mean())
    rng, hits = np.random.default_rng(23), []
    for first in range(0, len(wording), 1_000):
        for i, row in enumerate((images[first : first + 1_000] @ texts.T).cpu().numpy(), first):
            candidates = np.flatnonzero((same != same[i]) & (owner != owner[i]))
            chosen = rng.choice(candidates, min(99, len(candidates)), replace=False)
            hits.append(bool((row[i] > row[chosen]).all()))
    spread = list(wilson(sum(hits), len(hits)))
    return {"caps_shuffled": shuffled, "r_precision": float(np.mean(hits)), "r_precision_interval": spread}


def choose_captions(images: ImageSet, n: int, seed: int) -> Pairs:
    """(row, caption) pairs to evaluate on: one caption for each of n images, chosen by seed.

    A smaller set gives further captions of its images until n or all of them are used.
    """
    order, captions = np.random.default_rng([seed, 17]).permutation(len(images)).tolist(), images.captions
    rounds = range(max(map(len, captions)))
    return [(row, captions[row][i]) for i in rounds for row in order if i < len(captions[row])][:n]


def split_prompts(text: str) -> list[str]:
    """The prompts of one text, separated by `|`; none for an empty text. ClipgenError where another text holds none."""
    prompts = list(dict.fromkeys(" ".join(part.split()) for part in text.split("|") if part.strip()))
    if text and not prompts:
        raise ClipgenError(f"PROMPTS {shortened(text)!r} holds no prompt: write for example 'a dog|a red car'")
    return prompts


def caption_list(pairs: Iterable[tuple[str, str]]) -> str:
    """A caption list as text: `name<TAB>caption` lines, names and captions on one line each."""
    return "".join(f"{name}\t{' '.join(text.split())}\n" for name, text in pairs)


def read_captions(path: Path, seed: int = 0) -> dict[str, str]:
    """Captions of images from a file: name without its ending -> caption; of several captions one is chosen by seed.

    The file holds `name<TAB>caption` lines, COCO's captions json, or a json object {name: caption}. ClipgenError where
    it is missing, not in one of these layouts, or without a caption.
    """
    if not path.is_file():
        raise ClipgenError(f"captions {path} are no file: check the path")
    captions: dict[str, list[str]] = {}
    for name, text in _json_pairs(path) if path.suffix == ".json" else _text_pairs(path):
        captions.setdefault(_stem(name), []).append(" ".join(text.split()))
    if not captions:
        raise ClipgenError(f"{path} holds no captions: write one name<TAB>caption line for each image")
    rng = np.random.default_rng([seed, 37])
    return {name: texts[int(rng.integers(len(texts)))] for name, texts in sorted(captions.items())}


def _json_pairs(path: Path) -> list[tuple[str, str]]:
    content = read_json(path)
    try:
        if "annotations" not in content:
            found = [(name, text or "") for name, text in content.items()]
        else:
            names = {int(image["id"]): str.strip(image["file_name"]) for image in content["images"]}
            found = [(names[int(a["image_id"])], a["caption"] or "") for a in content["annotations"]]
        kept = [(name, text) for name, text in found if str.strip(text)]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        why = f"{type(error).__name__}: {reason(error)}"
        raise ClipgenError(f"{path} is neither COCO's captions nor {{name: caption}} ({why}): restore it") from None
    if len(kept) < len(found):
        tell(f"{len(found) - len(kept)} of {len(found)} captions in {path} are null or empty and were left out")
    return kept


def _text_pairs(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        name, _, text = map(str.strip, line.partition("\t"))
        if name and text:
            yield name, text
        elif line.strip():
            raise ClipgenError(f"line {number} of {path} is not name<TAB>caption: correct that line")


def texts_of(images: ImageSet, path: Path, seed: int = 0) -> dict[int, str]:
    """Row -> caption of the images that a caption file names, by their place in the folder or by their bare file name.

    A bare name counts only where one caption and one image have it. ClipgenError where the file cannot be read, or
    names none of the images.
    """
    known = read_captions(path, seed)
    counts = [Counter(Path(name).name for name in known), Counter(Path(name).stem for name in images.names)]
    bare = {Path(name).name: text for name, text in known.items()}
    bare = {name: text for name, text in bare.items() if all(count[name] == 1 for count in counts)}
    texts = {row: known.get(_stem(name)) or bare.get(Path(name).stem) for row, name in enumerate(images.names)}
    texts = {row: text for row, text in texts.items() if text}
    if not texts:
        image, name = shortened(Path(images.names[0]).name, 80), shortened(next(iter(known)), 80)
        some = f"(an image is {image}, a caption's name {name}): use the images' file names"
        raise ClipgenError(f"{path} names none of the {len(images)} images in {images.root} {some}")
    return texts


def _stem(name: str) -> str:
    path = Path(name)  # "." and "/" have no name whose ending could be taken off
    return path.with_suffix("").as_posix() if path.name else name
