import hashlib
import json

import numpy as np
import pytest

from clipgen_lib.data import shapes
from clipgen_lib.data.shapes import HELD_OUT, Claim, Scene, SceneObject
from clipgen_lib.runtime.runs import ClipgenError, held


def test_seeds_keep_their_scenes_and_captions():
    """Weights that are trained, and results that are written down, stand for these very images and texts."""
    digest = hashlib.sha256()
    for index in range(60):
        for wild in (False, True):
            scene = shapes.scene_at(3, index, held_out=index % 3 == 0, wild=wild)
            digest.update(shapes.render(scene).tobytes() + "|".join(shapes.captions(scene)).encode())
    assert digest.hexdigest().startswith("2a7a1e4b68822cbf")


def test_the_world_keeps_to_its_grid_and_the_wild_one_does_not():
    tame, wild = ([shapes.scene_at(0, index, wild=w) for index in range(200)] for w in (False, True))
    assert all(t.x % shapes.GRID == t.y % shapes.GRID == 0 for scene in tame for t in scene.objects)
    assert {(t.size, t.radius) for scene in tame for t in scene.objects} == {("small", 9.25), ("large", 14.75)}
    assert len({t.radius for scene in wild for t in scene.objects}) > 200
    assert {s.background.kind for s in tame} == set(shapes.KINDS) - {"grainy"}
    assert {s.background.tint for s in tame} == {(0, 0, 0)}
    assert {s.background.kind for s in wild} == set(shapes.KINDS)
    for scene in tame:  # without noise: an unjittered background repeats exactly
        empty = shapes.render(Scene((), scene.background)).astype(int)
        steps = [np.abs(np.diff(empty[..., 0], axis=axis)).max() for axis in (0, 1)]
        assert (empty[..., 0] == empty[..., 2]).all() and min(steps) in (0, 30)


def test_held_out_pairs_are_held_out():
    held_shapes, held_colours = map(set, zip(*HELD_OUT, strict=True))
    assert len(HELD_OUT) == 8 and held_shapes == set(shapes.SHAPES) and held_colours == set(shapes.COLOURS)
    for index in range(200):
        assert not any((t.shape, t.colour) in HELD_OUT for t in shapes.scene_at(0, index).objects)
        first = shapes.scene_at(0, index, held_out=True).objects[0]
        assert (first.shape, first.colour) in HELD_OUT


def test_captions_are_varied_and_true():
    first_words = set()
    for index in range(100):
        scene = shapes.scene_at(1, index)
        text, claim = shapes.caption(scene, np.random.default_rng(index))
        first_words.add(text.split()[0])
        assert shapes.holds(claim, scene)
        assert len(set(shapes.captions(scene))) == 5 and shapes.captions(scene) == shapes.captions(scene)
    assert len(first_words) >= 5


def test_claims_can_be_false():
    red, blue = SceneObject("circle", "red", "small", 16, 32, 9), SceneObject("star", "blue", "small", 48, 32, 9)
    scene = Scene((red, blue), shapes.scene_at(0, 0).background)
    said = (SceneObject("circle", "red"), SceneObject("star", "blue"))
    assert shapes.holds(Claim(said, "left of"), scene) and shapes.holds(Claim(said[::-1], "right of"), scene)
    assert not shapes.holds(Claim(said, "right of"), scene)
    assert not shapes.holds(Claim((SceneObject("circle", "blue"),)), scene)
    assert not shapes.holds(Claim((SceneObject("circle", "red"), SceneObject("circle", "red"))), scene)


def test_a_world_is_a_function_of_its_seed(tmp_path):
    a, b, c = (shapes.make_world(tmp_path / name, 4, 2, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    name = "train/000000000003.png"
    assert (a / name).read_bytes() == (b / name).read_bytes() != (c / name).read_bytes()
    before = (a / name).stat()
    assert shapes.make_world(a, 4, 2, seed=1) == a and (a / name).stat().st_ino == before.st_ino  # left as it is
    assert (shapes.make_world(a, 5, 2, seed=1) / name).exists()  # another world takes its place
    content = json.loads((b / "annotations/captions_train.json").read_text())
    assert len(content["images"]) == 4 and len(content["annotations"]) == 20


@pytest.mark.parametrize("file", ["shapes.json", "annotations/captions_val.json", "train/000000000003.png"])
def test_a_damaged_world_is_made_again(tmp_path, file):
    world = shapes.make_world(tmp_path / "a", 4, 2, seed=1)
    whole = (world / file).read_bytes()
    for damaged in (b"", whole[:-3], None):
        (world / file).unlink() if damaged is None or file.endswith("png") else (world / file).write_bytes(damaged)
        assert shapes.make_world(world, 4, 2, seed=1) == world and (world / file).read_bytes() == whole


def test_one_process_at_a_time_makes_a_world(tmp_path):
    with held(tmp_path / "a", "the Shapes world"), pytest.raises(ClipgenError, match="is being made in .* by process"):
        shapes.make_world(tmp_path / "a", 4, 2)
    whole = shapes.make_world(tmp_path / "a", 4, 2)
    with held(whole, "the Shapes world"):
        assert shapes.make_world(whole, 4, 2) == whole  # what is there needs no lock
