"""The oracle of the Shapes world: plain image processing, without a network, reads an image back.

In: a 64x64 image. Out: which shapes, colours, sizes and relation it shows, and so whether it matches a prompt: a measured
fact. Also the evaluation prompts, whose wording says all that is scored. In one of some 300 scenes of two objects these have
one colour and corners that touch, and are read as one.
"""

import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from ..data import shapes
from ..data.shapes import CANVAS, COLOURS, SHAPES, Claim, Scene, SceneObject, relation
from .intervals import interval


def cielab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB in [0, 255]; the standard formula, IEC 61966-2-1 and CIE 15."""
    linear = rgb.astype(np.float32) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    primaries = [[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]]
    xyz = linear @ np.array(primaries, np.float32) / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


_PALETTE = cielab(np.array(list(COLOURS.values())))
_TEMPLATE_SIDE = 24
_MIN_AREA = 45  # pixels; the smallest object of a real scene covers about 75
_MIN_CHROMA = 24.0  # CIELAB; backgrounds stay below 12, the palest colour lies at 45
_MIN_OVERLAP = 0.6  # intersection over union with the best template, below which a blob has no shape


def _boxed(mask: np.ndarray) -> np.ndarray:
    """A mask's bounding box stretched to a square of fixed side, as coverage in [0, 1]."""
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    image = Image.fromarray((mask[box] * 255).astype(np.uint8))
    return np.asarray(image.resize((_TEMPLATE_SIDE, _TEMPLATE_SIDE), Image.BILINEAR), np.float32) / 255


_TEMPLATES = np.stack([_boxed(shapes.draw_mask(shape, 48, 48, 44, 96, 2)[0] > 0.5) for shape in SHAPES])


def read_scene(image: np.ndarray) -> tuple[SceneObject, ...]:
    """Read the objects of an image (64, 64, 3) uint8, largest first.

    Pixels with colour are grouped into connected blobs; a blob of two colours is split; the colour is the palette
    entry nearest in CIELAB to the blob's median, the shape the template of largest intersection over union (None
    below 0.6), the size by its extent.
    """
    if image.shape != (CANVAS, CANVAS, 3) or image.dtype != np.uint8:
        raise ValueError(f"the oracle reads {CANVAS}x{CANVAS}x3 uint8 images, not {image.shape} {image.dtype}")
    lab = cielab(image)
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    nearest = np.linalg.norm(lab[:, :, None] - _PALETTE, axis=-1).argmin(-1)
    blobs, count = ndimage.label(chroma > _MIN_CHROMA)
    objects = []
    for blob in range(1, count + 1):
        whole = blobs == blob
        if whole.sum() < _MIN_AREA:
            continue
        core = ndimage.binary_erosion(whole) if whole.sum() > 2 * _MIN_AREA else whole
        shares = np.bincount(nearest[core], minlength=len(COLOURS)) / max(core.sum(), 1)
        colours = np.flatnonzero(shares >= 0.2)
        parts = [whole] if len(colours) < 2 else [ndimage.binary_opening(whole & (nearest == c)) for c in colours]
        objects += [_read_blob(part, lab, chroma) for part in parts]
    return tuple(sorted(filter(None, objects), key=lambda t: -t.radius))


def _read_blob(part: np.ndarray, lab: np.ndarray, chroma: np.ndarray) -> SceneObject | None:
    if part.sum() < _MIN_AREA:
        return None
    full = np.percentile(chroma[part], 75)
    mask = part & (chroma > 0.5 * full)  # the edge lies where colour and background mix half and half
    inside = mask & (chroma > 0.8 * full)
    colour = np.linalg.norm(np.median(lab[inside], axis=0) - _PALETTE, axis=-1).argmin()
    box = _boxed(mask)
    overlap = np.minimum(box, _TEMPLATES).sum((1, 2)) / np.maximum(box, _TEMPLATES).sum((1, 2))
    shape = SHAPES[overlap.argmax()] if overlap.max() >= _MIN_OVERLAP else None
    ((rows, columns),) = ndimage.find_objects(mask.astype(np.uint8))
    extent = max(rows.stop - rows.start, columns.stop - columns.start)
    x, y = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
    return SceneObject(shape, list(COLOURS)[colour], "small" if extent < 22.5 else "large", x, y, extent / 2)


class Prompt(NamedTuple):
    """A text to generate from, and what an image must show to be correct."""

    text: str
    claim: Claim
    scene: Scene  # a scene of which the text is true, for an image as the condition


# kind of prompt: how many objects, and whether the first is of an unseen pair of shape and colour
KINDS = {"one": (1, False), "two": (2, False), "three": (3, False), "held_out": (1, True), "held_out_two": (2, True)}


def prompts(kind: str, n: int, seed: int = 0) -> list[Prompt]:
    """n evaluation prompts of one of KINDS: the first n of an endless list that kind and seed decide.

    The wording is fixed ("a small red star", "a red star left of a blue ring", "a red star, a blue ring and a pink
    heart"): sampled wording belongs to the captions, and a prompt must say all that is scored.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of prompt {kind!r}: choose one of {', '.join(KINDS)}")
    count, held_out = KINDS[kind]
    made = []
    for index in range(n):
        scene = shapes.scene_at(seed, 30_000_000 + index, held_out, count)
        objects = tuple(SceneObject(t.shape, t.colour, t.size if count == 1 else None) for t in scene.objects)
        claim = Claim(objects, relation(*scene.objects) if count == 2 else None)
        *names, last = map(_plain, objects)
        link = f" {claim.relation} " if count == 2 else " and "
        made.append(Prompt(link.join(filter(None, (", ".join(names), last))), claim, scene))
    return made


def _plain(obj: SceneObject) -> str:
    words = [word for word in (obj.size, obj.colour, obj.shape) if word]
    return " ".join([shapes.article(words[0]), *words])


def correct(image: np.ndarray, prompt: Prompt) -> dict[str, float]:
    """What of a prompt an image (64, 64, 3) uint8 shows, read by the oracle: of each atom the share that is correct.

    Each object asked for has the atoms `object` (one that shares its shape or colour is there), `colour`, `shape` and,
    where one object is asked for, `size`; the image has `count` (no more and no fewer objects) and, of two, `position`
    (placed as asked, whatever their colours and shapes). `atoms` is the share of all of them, `whole` whether it is 1.
    Of several atoms are `both` (colour and shape of every object) and `relation` (both, and placed as asked).
    """
    reading, claim = read_scene(image), prompt.claim
    shown = _assigned(claim, reading)
    atoms = {**_atoms(claim, shown), "count": [len(reading) == len(shown)]}
    every, both = sum(atoms.values(), []), all(atoms["colour"] + atoms["shape"])
    parts = {key: sum(values) / len(values) for key, values in atoms.items()} | {"both": float(both)}
    parts |= {"relation": float(both and atoms["position"][0])} if claim.relation else {}
    return parts | {"atoms": sum(every) / len(every), "whole": float(all(every))}


def _atoms(claim: Claim, shown: tuple[SceneObject, ...]) -> dict[str, list[bool]]:
    """The atoms of a claim but the count, and whether they are true of objects, one for each of its own."""
    pairs = list(zip(claim.objects, shown, strict=True))
    keys = [key for key in ("colour", "shape", "size") if getattr(claim.objects[0], key)]
    atoms = {key: [getattr(a, key) == getattr(b, key) for a, b in pairs] for key in keys}
    atoms["object"] = [colour or shape for colour, shape in zip(atoms["colour"], atoms["shape"], strict=True)]
    if claim.relation:
        atoms["position"] = [all(atoms["object"]) and relation(*shown, clear=1.0) == claim.relation]
    return atoms


def _assigned(claim: Claim, objects: tuple[SceneObject, ...]) -> tuple[SceneObject, ...]:
    """The objects of an image that stand for those of a claim, in its order; for a missing one `SceneObject()`.

    One object is asked for: the largest. Several: of all assignments (a relation is of two objects at once, so this is no
    sum over pairs) the one with most correct colours and shapes; of those one that is placed as asked, then one with more
    correct shapes, then one of larger objects.
    """
    if len(claim.objects) == 1:
        return objects[:1] or (SceneObject(),)

    def rank(shown: tuple[SceneObject, ...]) -> tuple:
        atoms = _atoms(claim, shown)
        return sum(atoms["colour"] + atoms["shape"]), atoms.get("position"), sum(atoms["shape"])

    near = [t for t in objects if any(t.shape == a.shape or t.colour == a.colour for a in claim.objects)]
    missing = [SceneObject()] * len(claim.objects)
    return max(itertools.permutations((*near, *missing), len(missing)), key=rank)


def score(answers: list[dict[str, float]]) -> dict[str, float | list[float]]:
    """Means over images of what is `correct` in each, all prompts of one kind; of each the 95% interval, `<name>_interval`."""
    shares: dict = {"n": len(answers)}
    for key in answers[0]:
        values = [parts[key] for parts in answers]
        shares |= {key: float(np.mean(values)), f"{key}_interval": list(interval(values))}
    return shares
