"""Metrics: pure functions on statistics that are streamed over batches.

In: features (B, d) of a network, logits, embeddings or pairs of images. Out: numbers. Nothing here knows a file, a model
or a protocol. Sums are float64 and do not grow with N; what needs the features themselves (KID, precision, recall, density,
coverage, FID over N) looks at a sample of at most SAMPLE rows that is chosen by seed, and says how many it looked at.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..data.datasets import ImageSet
from ..runtime.runs import ClipgenError, read_json, reason, shortened


def clip_score(caps: float) -> float:
    """CLIPScore as torchmetrics defines it (after arXiv 2104.08718): the mean cosine times 100, not below 0.

    The paper itself has 2.5 max(cosine, 0) and a prefix "A photo depicts"; neither is here.
    """
    return max(100 * caps, 0.0)


def caption_scores(
    pictures: torch.Tensor, texts: torch.Tensor, wording: list[str], seed: int = 0, owners: Sequence[int] = ()
) -> dict[str, float]:
    """How N images fit N captions: `caps` with their own, `shuffled` with those of others, and R-precision.

    Args:
        images, texts: (N, D) embeddings of unit norm, row i of both belonging together.
        owners: the real image that each caption describes, where one image has several; none are alike by default.
    """
    owner = np.asarray(owners) if len(owners) else np.arange(len(wording))
    shift = int(np.random.default_rng([seed, 19]).integers(1, max(len(wording), 2)))
    other = torch.from_numpy(owner != np.roll(owner, shift)) if len(wording) > 1 else torch.ones(1, dtype=torch.bool)
    return {
        "caps": float((pictures * texts).sum(1).mean()),
        "shuffled": float((pictures * texts.roll(shift, 0)).sum(1)[other].mean()),
        "r_precision": r_precision(pictures, texts, wording, owners=owner),
    }


def r_precision(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    texts: list[str],
    others: int = 99,
    owners: Sequence[int] = (),
) -> float:
    """Share of images whose own caption ranks first among itself and `others` captions of other images.

    AttnGAN's protocol (arXiv 1711.10485, section 4.1) with CLIP as the ranker; captions of the same wording, or of the
    same image, are not drawn as others. Fewer others are used where there are not so many; chance is 1 / (others + 1).

    Args:
        image_embeds, text_embeds: (N, D), row i of both belonging to text i.
        owners: the real image that each text describes, where one image has several.
    """
    draw, hits = np.random.default_rng(23), []
    wording = np.unique(np.array(texts, dtype=object), return_inverse=True)[1]
    owner = np.asarray(owners) if len(owners) else np.arange(len(texts))
    for first in range(0, len(texts), 1_000):
        similarity = (image_embeds[first : first + 1_000] @ text_embeds.T).cpu().numpy()
        for i, row in enumerate(similarity, first):
            candidates = np.flatnonzero((wording != wording[i]) & (owner != owner[i]))
            chosen = draw.choice(candidates, min(others, len(candidates)), replace=False)
            hits.append(bool((row[i] > row[chosen]).all()))
    return float(np.mean(hits))


def choose_captions(images: ImageSet, n: int, seed: int) -> list[tuple[int, str]]:
    """(row, caption) pairs to evaluate on: one caption for each of n images, chosen by seed.

    A smaller set gives further captions of its images until n or all of them are used.
    """
    order = np.random.default_rng([seed, 17]).permutation(len(images))
    rounds = max((len(c) for c in images.captions), default=0)
    pairs = [
        (int(row), images.captions[row][i]) for i in range(rounds) for row in order if i < len(images.captions[row])
    ]
    if not pairs:
        raise ClipgenError(
            f"the {images.split} split of {images.root} has images but no captions: evaluate on another split"
        )
    return pairs[:n]


def split_prompts(text: str) -> list[str]:
    """The prompts of one text, with `|` between them; none of an empty text.

    Raises:
        ClipgenError: a text that is not empty and holds no prompt.
    """
    found = list(dict.fromkeys(" ".join(part.split()) for part in text.split("|") if part.strip()))
    if text and not found:
        raise ClipgenError(
            f"PROMPTS is {shortened(text)!r}, without a prompt: write them with | between, such as 'a dog|a red car'"
        )
    return found


def caption_list(pairs: Iterable[tuple[str, str]]) -> str:
    """A caption list as text: `name<TAB>caption` lines, names and captions on one line each."""
    return "".join(f"{name}\t{' '.join(text.split())}\n" for name, text in pairs)


def caption_facts(text: str) -> dict:
    """Length and hash of a caption list, for the card."""
    return {"n": text.count("\n"), "hash": hashlib.sha256(text.encode()).hexdigest()[:16]}


def read_captions(path: Path, seed: int = 0) -> dict[str, str]:
    """Captions of images from a file: name without its ending -> caption; of several captions one is chosen by seed.

    Args:
        path: a text file of `name<TAB>caption` lines, COCO's captions json, or a json object {name: caption}.

    Raises:
        ClipgenError: missing, not in one of these layouts, or without a caption.
    """
    found: dict[str, list[str]] = {}
    if path.suffix == ".json":
        content = read_json(path)
        try:
            if "annotations" in content:
                names = {int(image["id"]): image["file_name"] for image in content["images"]}
                pairs = [(names[int(a["image_id"])], a["caption"]) for a in content["annotations"]]
            else:
                pairs = list(content.items())
            for name, text in pairs:
                found.setdefault(_stem(name), []).append(" ".join(text.split()))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ClipgenError(
                f"{path} is neither COCO's captions nor {{name: caption}} ({type(error).__name__}: {reason(error)}): restore the original file"
            ) from None
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ClipgenError(
                f"captions {path} cannot be read ({reason(error)}): give a UTF-8 text file or a json"
            ) from None
        for number, line in enumerate(lines, 1):
            name, tab, text = line.partition("\t")
            if line.strip() and not (tab and name.strip() and text.strip()):
                raise ClipgenError(f"line {number} of {path} is not name<TAB>caption: mend that line")
            if line.strip():
                found.setdefault(_stem(name.strip()), []).append(" ".join(text.split()))
    if not found:
        raise ClipgenError(f"{path} holds no captions: write one name<TAB>caption line for each image")
    draw = np.random.default_rng([seed, 37])
    return {name: texts[int(draw.integers(len(texts)))] for name, texts in sorted(found.items())}


def texts_of(images: ImageSet, path: Path, seed: int = 0) -> dict[int, str]:
    """Row -> caption of the images that a caption file has one for, by their place in the folder or their bare name.

    Raises:
        ClipgenError: the file cannot be read, or names none of them.
    """
    known = read_captions(path, seed)
    bare = _unambiguous(known, images.names)
    found = {}
    for row, name in enumerate(images.names):
        text = known.get(_stem(name)) or bare.get(Path(name).stem)
        if text:
            found[row] = text
    if not found:
        raise ClipgenError(
            f"{path} names none of the {len(images)} images in {images.root} (an image is {shortened(Path(images.names[0]).name, 80)}, a caption's name {shortened(next(iter(known)), 80)}): use the images' file names"
        )
    return found


def _unambiguous(known: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    """Captions by bare name, where one caption and one image have that name."""
    captions = Counter(Path(name).name for name in known)
    pictures = Counter(Path(name).stem for name in names)
    return {
        bare: text for name, text in known.items() if captions[bare := Path(name).name] == 1 and pictures[bare] == 1
    }


def _stem(name: str) -> str:
    path = Path(name)  # "." and "/" have no name whose ending could be taken off
    return path.with_suffix("").as_posix() if path.name else name
