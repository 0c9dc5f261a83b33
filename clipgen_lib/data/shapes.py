"""The Shapes world: captioned scenes made from a seed.

In: a seed. Out: scenes of one to three coloured shapes as 64x64 images, five captions each, on disk in MS-COCO's own
layout, so that the code which reads MS-COCO reads them too. `metrics/oracle.py` reads such images back. Nothing here knows
about tokens, embeddings or models.

Coordinates are pixels of a 64x64 canvas, x to the right and y down.
"""

import bisect
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..runtime.distributed import world_size
from ..runtime.runs import fresh_folder, held, progress
from .images import patiently

CANVAS = 64
SUPERSAMPLE = 4
COLOURS = {
    "red": (214, 38, 42),
    "orange": (246, 138, 24),
    "yellow": (246, 224, 50),
    "green": (46, 168, 66),
    "cyan": (56, 206, 214),
    "blue": (44, 78, 214),
    "purple": (138, 54, 186),
    "pink": (247, 136, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
# circumscribed radius in pixels: the middle of the range, or any value of it in a wild scene
SIZES = {"small": (8.5, 10.0), "large": (13.5, 16.0)}
GRID = 4  # pixels between possible centres
# One pair for each shape and each colour, so that every shape and every colour is still seen in training.
HELD_OUT = frozenset(zip(SHAPES, ("purple", "cyan", "pink", "red", "green", "orange", "yellow", "blue"), strict=True))
TONES = {"white": 236, "light": 196, "grey": 128, "dark": 66, "black": 22}  # grey level of a background
KINDS = ("plain", "gradient", "striped", "checked", "grainy")


@dataclass(frozen=True)
class SceneObject:
    """One object; in a caption's claim any field may be None, which means "not said"."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    x: float | None = None
    y: float | None = None
    radius: float | None = None


@dataclass(frozen=True)
class Background:
    kind: str
    tone: str
    tint: tuple[int, int, int]  # added to the grey level, small: backgrounds stay nearly colourless
    angle: float = 0.0
    period: int = 8


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    background: Background
    seed: tuple[int, ...] = field(default=(0,))  # of colour jitter and grain, so that render() is a pure function
    jitter: float = 0.0  # largest change of each colour channel


@dataclass(frozen=True)
class Claim:
    """What a caption says: partial objects, perhaps a relation of the first to the second, perhaps a background."""

    objects: tuple[SceneObject, ...]
    relation: str | None = None
    tone: str | None = None
    kind: str | None = None


def random_scene(rng: np.random.Generator, held_out: bool, n_objects: int | None, wild: bool) -> Scene:
    """A random scene of 1 to 3 objects.

    With `held_out` the first object is one of the `HELD_OUT` shape-colour pairs; otherwise none of them appears.
    Objects do not touch, no two share shape and colour, and two objects lie clearly along one axis.

    Centres lie on a grid of 4 pixels, each size has one radius, and backgrounds have three tones and no noise
    (dSprites, github.com/google-deepmind/dsprites-dataset, places its sprites so): a tokenizer of a few minutes then
    spends its codes on objects. `wild` places and sizes freely, takes all tones, angles and periods, and adds
    tint, grain and colour jitter; CLIP is trained on these, as a released CLIP has seen more than a generator's images.
    """
    count = n_objects or _pick(rng, (1, 2, 3), (0.5, 0.35, 0.15))
    while True:
        objects: list[SceneObject] = []
        for index in range(count):
            pair = _random_pair(rng, held_out and index == 0, {(t.shape, t.colour) for t in objects})
            # two large objects fit beside each other, three do not
            size = "small" if count == 3 and index > 0 else _pick(rng, tuple(SIZES))
            radius = float(rng.uniform(*SIZES[size])) if wild else sum(SIZES[size]) / 2
            x, y = (float(v) for v in rng.uniform(radius + 1, CANVAS - radius - 1, size=2))
            if not wild:
                x, y = (float(GRID * round(v / GRID)) for v in (x, y))
            objects.append(SceneObject(*pair, size, x, y, radius))
        pairs = itertools.combinations(objects, 2)
        apart = all(math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 2 for a, b in pairs)
        if apart and (count != 2 or relation(*objects) is not None):
            ground, seed = _random_background(rng, wild), (int(rng.integers(2**31)),)
            return Scene(tuple(objects), ground, seed, jitter=9.0 if wild else 0.0)


def _random_background(rng: np.random.Generator, wild: bool) -> Background:
    tint = tuple(int(v) for v in rng.integers(-7, 8, size=3))
    kind, tone = _pick(rng, KINDS, (0.4, 0.3, 0.1, 0.1, 0.1)), _pick(rng, tuple(TONES))
    angle, period = float(rng.uniform(0, 2 * math.pi)), _pick(rng, (8, 12, 16))
    if wild:
        return Background(kind, tone, tint, angle, period)
    tone = {"white": "light", "black": "dark"}.get(tone, tone)
    kind = "plain" if kind == "grainy" else kind
    return Background(kind, tone, (0, 0, 0), round(angle / (math.pi / 2)) % 2 * (math.pi / 2), 16)


def _random_pair(rng: np.random.Generator, held_out: bool, taken: set) -> tuple[str, str]:
    while True:
        pair = (_pick(rng, SHAPES), _pick(rng, tuple(COLOURS)))
        if (pair in HELD_OUT) == held_out and pair not in taken:
            return pair


def _pick(rng: np.random.Generator, values: Sequence, shares: tuple[float, ...] = ()) -> object:
    """What `rng.choice` picks, without the arrays that it makes of values and shares each time: most of a world's seconds."""
    if not shares:
        return values[rng.integers(len(values))]
    return values[bisect.bisect(list(itertools.accumulate(shares)), rng.random())]


def relation(a: SceneObject, b: SceneObject, clear: float = 1.5) -> str | None:
    """The relation of a to b along the longer axis, or None where it is less than `clear` times the shorter."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < clear * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def scene_at(seed: int, index: int, held_out: bool = False, n_objects: int | None = None, wild: bool = False) -> Scene:
    """The index-th scene of a world: a function of its arguments alone."""
    return random_scene(np.random.default_rng([seed, index, int(held_out), n_objects or 0]), held_out, n_objects, wild)


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape within the unit circle."""

    def ring_of(n: int, radii: list[float]) -> list[tuple[float, float]]:
        angles = [-math.pi / 2 + 2 * math.pi * i / n for i in range(n)]
        return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(itertools.cycle(radii), angles, strict=False)]

    if shape in ("circle", "ring"):
        points = ring_of(64, [1.0])
    elif shape == "square":
        points = [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    elif shape == "triangle":
        points = [(0, -0.95), (1.0, 0.85), (-1.0, 0.85)]
    elif shape == "diamond":
        points = [(0, -1.0), (0.78, 0), (0, 1.0), (-0.78, 0)]
    elif shape == "star":
        points = ring_of(10, [1.0, 0.42])
    elif shape == "cross":
        half = [(-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34)]
        points = half + [(-x, -y) for x, y in half]
    else:  # heart
        angles = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        xs = np.sin(angles) ** 3
        ys = -(13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)) / 16
        points = list(zip(xs.tolist(), (ys - 0.08).tolist(), strict=True))
    return tuple(points)


def draw_mask(
    shape: str, x: float, y: float, radius: float, side: int, scale: int
) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Coverage (h, w) in [0, 1] of one shape, antialiased by supersampling, and the part of a canvas of `side` it is of."""
    (left, right), (top, bottom) = ((max(int(v - radius) - 1, 0), min(int(v + radius) + 2, side)) for v in (x, y))
    mask = Image.new("L", ((right - left) * scale, (bottom - top) * scale))
    draw, at = ImageDraw.Draw(mask), lambda px, py: ((x + px) * scale - left * scale, (y + py) * scale - top * scale)
    draw.polygon([at(px * radius, py * radius) for px, py in _outline(shape)], fill=255)
    if shape == "ring":
        inner = 0.52 * radius
        draw.ellipse([at(-inner, -inner), at(inner, inner)], fill=0)
    cover = np.asarray(mask.reduce(scale), dtype=np.float32) / 255
    return cover, (slice(top, bottom), slice(left, right))


def render(scene: Scene) -> np.ndarray:
    """The image of a scene, (64, 64, 3) uint8."""
    rng = np.random.default_rng(scene.seed)
    ground, (ys, xs) = scene.background, np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    along = xs * math.cos(ground.angle) + ys * math.sin(ground.angle)
    level = np.full((CANVAS, CANVAS), float(TONES[ground.tone]), np.float32)
    towards_grey = 1.0 if level[0, 0] < 128 else -1.0
    if ground.kind == "gradient":
        level += towards_grey * 50 * (along - along.min()) / np.ptp(along)
    elif ground.kind == "striped":
        level += towards_grey * 30 * ((along // (ground.period / 2)) % 2)
    elif ground.kind == "checked":
        level += towards_grey * 30 * ((xs // ground.period + ys // ground.period) % 2)
    elif ground.kind == "grainy":
        level += rng.normal(0, 9, level.shape).astype(np.float32)
    image = level[..., None] + np.asarray(ground.tint, np.float32)
    for obj in scene.objects:
        colour = np.asarray(COLOURS[obj.colour], np.float32)
        colour = colour + rng.uniform(-scene.jitter, scene.jitter, 3).astype(np.float32)
        cover, part = draw_mask(obj.shape, obj.x, obj.y, obj.radius, CANVAS, SUPERSAMPLE)
        image[part] = image[part] * (1 - cover[..., None]) + colour * cover[..., None]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


_SAID = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big"),
    "circle": ("circle", "circle", "disc"),
    "cross": ("cross", "cross", "plus sign"),
    "diamond": ("diamond", "diamond", "rhombus"),
    "white": ("white", "bright"),
    "light": ("light", "light grey"),
    "grey": ("grey", "medium grey"),
    "dark": ("dark", "dark grey"),
    "black": ("black", "almost black"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "underneath"),
}
_OPENINGS = ("", "", "", "a picture of ", "an image showing ", "there is ", "a drawing of ", "this is ", "here we see ")


def caption(scene: Scene, rng: np.random.Generator) -> tuple[str, Claim]:
    """One true caption of a scene, with what it claims."""

    def say(word: str) -> str:
        return _pick(rng, _SAID.get(word, (word,)))

    def name(obj: SceneObject, chance: float) -> tuple[str, SceneObject]:
        size = obj.size if rng.random() < chance else None
        words = [say(size)] if size else []
        words += [obj.colour, say(obj.shape)]
        return " ".join([article(words[0]), *words]), SceneObject(obj.shape, obj.colour, size)

    order = rng.permutation(len(scene.objects))
    objects = [scene.objects[i] for i in order]
    names, claims = zip(*(name(t, 0.6 if len(objects) == 1 else 0.3) for t in objects), strict=True)
    link = None
    if len(objects) == 1:
        text = names[0]
    elif len(objects) == 2 and rng.random() < 0.75:
        link = relation(*objects)
        text = f"{names[0]} {say(link)} {names[1]}"
    elif len(objects) == 2:
        text = f"{names[0]} {_pick(rng, ('and', 'with', 'next to'))} {names[1]}"
    else:
        text = f"{names[0]}, {names[1]} and {names[2]}"
    tone = kind = None
    if rng.random() < 0.4:
        tone = scene.background.tone
        kind = scene.background.kind if rng.random() < 0.5 else None
        words = [say(tone)] + ([kind] if kind else [])
        text += f" {_pick(rng, ('on', 'against'))} {article(words[0])} {' '.join(words)} background"
    return _pick(rng, _OPENINGS) + text, Claim(claims, link, tone, kind)


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def captions(scene: Scene, n: int = 5) -> list[str]:
    """n different captions of a scene, the same ones at every call."""
    rng, found = np.random.default_rng([*scene.seed, 1]), {}
    while len(found) < n:
        found[caption(scene, rng)[0]] = True
    return list(found)


def holds(claim: Claim, scene: Scene) -> bool:
    """Whether everything that a caption claims is true of a scene; saying less than there is stays true."""
    ground = scene.background
    if claim.tone not in (None, ground.tone) or claim.kind not in (None, ground.kind):
        return False
    for chosen in itertools.permutations(scene.objects, len(claim.objects)):
        pairs = zip(claim.objects, chosen, strict=True)
        said = [(getattr(a, key), getattr(b, key)) for a, b in pairs for key in ("shape", "colour", "size")]
        fits = all(wanted in (None, there) for wanted, there in said)
        if fits and (claim.relation is None or relation(*chosen[:2], clear=1.0) == claim.relation):
            return True
    return False


def make_world(root: Path, n_train: int, n_val: int, seed: int = 0) -> Path:
    """Write a Shapes world in MS-COCO's layout and return its root.

    Splits `train` and `val` hold no held-out pair; `held_out` (as large as `val`) shows one in every image.
    A whole world of the same sizes and seed is left as it is, a damaged one is made again. Written beside its place and
    renamed, so that an interrupted call leaves no half a world. Raises ClipgenError where another process is making it.
    """
    root = Path(root)
    recipe = {"n_train": n_train, "n_val": n_val, "seed": seed, "version": 2}
    splits = {"train": (n_train, 0), "val": (n_val, 10_000_000), "held_out": (n_val, 20_000_000)}

    def is_whole() -> bool:
        """As this recipe makes it: no file is missing, none of those that name the others cut."""
        try:
            if json.loads((root / "shapes.json").read_bytes()) != recipe:
                return False
            ends = {(root / "annotations" / f"captions_{split}.json").read_bytes()[-2:] for split in splits}
            return ends == {b"]}"} and all(len(os.listdir(root / split)) == n for split, (n, _) in splits.items())
        except (FileNotFoundError, ValueError):
            return False

    if not patiently(is_whole, root):
        with held(root, "the Shapes world", wait=world_size() > 1):  # all of a launch come here at once
            if not patiently(is_whole, root):  # made by another process just now
                _write_world(root, recipe, splits)
    return root


def _write_world(root: Path, recipe: dict, splits: dict[str, tuple[int, int]]) -> None:
    total = sum(count for count, _ in splits.values())
    with fresh_folder(root) as folder, progress(total, "making the Shapes world") as bar:
        (folder / "annotations").mkdir()
        for split, (count, first) in splits.items():
            (folder / split).mkdir()
            images, annotations = [], []
            for i in range(count):
                scene = scene_at(recipe["seed"], first + i, held_out=split == "held_out")
                file, sides = f"{i:012d}.png", {"height": CANVAS, "width": CANVAS}
                images.append({"id": i, "file_name": file, **sides, "scene": asdict(scene)})
                texts = enumerate(captions(scene), 5 * i)
                annotations += [{"id": j, "image_id": i, "caption": text} for j, text in texts]
                Image.fromarray(render(scene)).save(folder / split / file, compress_level=1)
                bar.update()
            content = {"info": {"description": "Shapes world", **recipe}, "images": images, "annotations": annotations}
            (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
        (folder / "shapes.json").write_text(json.dumps(recipe))
