"""Caption lists: which caption each picture is drawn for and judged by, chosen by seed, kept by hash.

In: a split with captions, or a caption file. Out: (row, caption) pairs and their list as text. For evaluation only.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .data import ImageSet
from .runs import ClipgenError, read_json, reason, shortened


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
    """Captions of pictures from a file: name without its ending -> caption; of several captions one is chosen by seed.

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
            raise ClipgenError(f"{path} is neither COCO's captions nor {{name: caption}} ({type(error).__name__}: {reason(error)}): restore the original file") from None  # fmt: skip
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ClipgenError(f"captions {path} cannot be read ({reason(error)}): give a UTF-8 text file or a json") from None
        for number, line in enumerate(lines, 1):
            name, tab, text = line.partition("\t")
            if line.strip() and not (tab and name.strip() and text.strip()):
                raise ClipgenError(f"line {number} of {path} is not name<TAB>caption: mend that line")
            if line.strip():
                found.setdefault(_stem(name.strip()), []).append(" ".join(text.split()))
    if not found:
        raise ClipgenError(f"{path} holds no captions: write one name<TAB>caption line for each picture")
    draw = np.random.default_rng([seed, 37])
    return {name: texts[int(draw.integers(len(texts)))] for name, texts in sorted(found.items())}


def texts_of(images: ImageSet, path: Path, seed: int = 0) -> dict[int, str]:
    """Row -> caption of the pictures that a caption file has one for, by their place in the folder or their bare name.

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
        raise ClipgenError(f"{path} names none of the {len(images)} pictures in {images.root} (a picture is {shortened(Path(images.names[0]).name, 80)}, a caption's name {shortened(next(iter(known)), 80)}): use the pictures' file names")  # fmt: skip
    return found


def _unambiguous(known: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    """Captions by bare name, where one caption and one picture have that name."""
    captions = Counter(Path(name).name for name in known)
    pictures = Counter(Path(name).stem for name in names)
    return {bare: text for name, text in known.items() if captions[bare := Path(name).name] == 1 and pictures[bare] == 1}


def _stem(name: str) -> str:
    path = Path(name)  # "." and "/" have no name whose ending could be taken off
    return path.with_suffix("").as_posix() if path.name else name
