"""The oracle of the Shapes world: plain image processing, without a network, reads an image back.

In: a 64x64 image. Out: which shapes, colours, sizes and relation it shows, and so whether it matches a prompt: a measured
fact. Also the evaluation prompts, whose wording says all that is scored.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from ..data import shapes
from ..data.shapes import CANVAS, COLOURS, SHAPES, Claim, Scene, SceneObject, match, relation


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB in [0, 255]; the standard formula, IEC 61966-2-1 and CIE 15."""
    linear = rgb.astype(np.float32) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    primaries = [[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]]
    xyz = linear @ np.array(primaries, np.float32) / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


_PALETTE = _lab(np.array(list(COLOURS.values())))
_TEMPLATE_SIDE = 24
_MIN_AREA = 45  # pixels; the smallest object of a real scene covers about 75
_MIN_CHROMA = 24.0  # CIELAB; backgrounds stay below 12, the palest colour lies at 45
_MIN_OVERLAP = 0.6  # intersection over union with the best template, below which a blob has no shape


def _boxed(mask: np.ndarray) -> np.ndarray:
    """A mask's bounding box stretched to a square of fixed side, as coverage in [0, 1]."""
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    image = Image.fromarray((mask[box] * 255).astype(np.uint8))
    return np.asarray(image.resize((_TEMPLATE_SIDE, _TEMPLATE_SIDE), Image.BILINEAR), np.float32) / 255


_TEMPLATES = np.stack([_boxed(shapes.draw_mask(shape, 48, 48, 44, 96, 2) > 0.5) for shape in SHAPES])


def read_scene(image: np.ndarray) -> tuple[SceneObject, ...]:
    """Read the objects of an image (64, 64, 3) uint8, largest first.

    Pixels with colour are grouped into connected blobs; a blob of two colours is split; the colour is the palette
    entry nearest in CIELAB to the blob's median, the shape the template of largest intersection over union (None
    below 0.6), the size by its extent.
    """
    if image.shape != (CANVAS, CANVAS, 3) or image.dtype != np.uint8:
        raise ValueError(f"the oracle reads {CANVAS}x{CANVAS}x3 uint8 images, not {image.shape} {image.dtype}")
    lab = _lab(image)
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


def prompts(kind: str, n: int, seed: int = 0) -> list[Prompt]:
    """n evaluation prompts: `one` object, `two` objects with their relation, or one object of a `held_out` pair.

    The wording is fixed ("a small red star", "a red star left of a blue ring"): sampled wording belongs to the
    captions, and a prompt must say all that is scored.
    """
    if kind not in ("one", "two", "held_out"):
        raise ValueError(f"unknown kind of prompt {kind!r}: choose one, two or held_out")
    made = []
    for index in range(n):
        scene = shapes.scene_at(seed, 30_000_000 + index, kind == "held_out", 2 if kind == "two" else 1)
        if kind == "two":
            claim = Claim(tuple(SceneObject(t.shape, t.colour) for t in scene.objects), relation(*scene.objects))
        else:
            claim = Claim(tuple(SceneObject(t.shape, t.colour, t.size) for t in scene.objects))
        made.append(Prompt(f" {claim.relation} ".join(map(_plain, claim.objects)), claim, scene))
    return made


def _plain(obj: SceneObject) -> str:
    words = [word for word in (obj.size, obj.colour, obj.shape) if word]
    return " ".join([shapes.article(words[0]), *words])


def correct(image: np.ndarray, prompt: Prompt) -> dict[str, bool]:
    """What of a prompt an image (64, 64, 3) uint8 shows, read by the oracle: the parts of `score`."""
    reading, claim = read_scene(image), prompt.claim
    if len(claim.objects) == 2:
        return {"both": bool(match(claim, reading, with_relation=False)), "relation": bool(match(claim, reading))}
    shown = reading[0] if reading else SceneObject(None, None, None)
    parts = {key: getattr(claim.objects[0], key) == getattr(shown, key) for key in ("colour", "shape", "size")}
    return {**parts, "both": parts["colour"] and parts["shape"], "count": len(reading) == 1}


def score(answers: list[dict[str, bool]]) -> dict[str, float]:
    """Shares of images that show what their prompts ask for, from what is `correct` in each; all prompts of one kind.

    One object asked for: `colour`, `shape`, `size` of the largest object read, `both` (colour and shape) and `count`
    (exactly one object there). Two: `both` (each with shape and colour, anywhere) and `relation` (both, and placed
    as asked; so never above `both`).
    """
    return {"n": len(answers), **{key: float(np.mean([parts[key] for parts in answers])) for key in answers[0]}}
