import json
from collections import Counter

import numpy as np
import pytest

from clipgen_lib.data import shapes
from clipgen_lib.data.shapes import HELD_OUT, Claim, Scene, SceneObject


def score(pictures, asked):
    return shapes.score([shapes.right(picture, prompt) for picture, prompt in zip(pictures, asked, strict=True)])


@pytest.mark.parametrize("wild", [False, True])
def test_oracle_reads_scenes_it_has_not_seen(wild):
    objects = right = 0
    for index in range(300):
        scene = shapes.scene_at(seed=99, index=index, held_out=index % 4 == 0, wild=wild)
        read = shapes.read_scene(shapes.render(scene))
        assert len(read) <= 3
        for obj in scene.objects:
            objects += 1
            near = min(read, key=lambda r: (r.x - obj.x) ** 2 + (r.y - obj.y) ** 2)
            right += (near.shape, near.colour, near.size) == (obj.shape, obj.colour, obj.size)
    assert right / objects >= 0.98


def test_oracle_sees_what_is_wrong():
    asked = shapes.prompts("one", 40)
    pictures = np.stack([shapes.render(p.scene) for p in asked])
    assert score(pictures, asked)["both"] == 1.0
    shifted = score(np.roll(pictures, 1, axis=0), asked)
    assert shifted["colour"] < 0.5 and shifted["shape"] < 0.5
    assert score(np.full_like(pictures, 128), asked)["colour"] == 0.0
    two = shapes.prompts("two", 40)
    pictures = np.stack([shapes.render(p.scene) for p in two])
    assert score(pictures, two) == {"n": 40, "both": 1.0, "relation": 1.0}
    mirrored = score(pictures[:, ::-1, ::-1], two)  # every relation turns into its opposite
    assert mirrored["relation"] <= 0.05


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
    assert (
        len(HELD_OUT) == 8
        and {s for s, _ in HELD_OUT} == set(shapes.SHAPES)
        and {c for _, c in HELD_OUT} == set(shapes.COLOURS)
    )
    for index in range(200):
        assert not any((t.shape, t.colour) in HELD_OUT for t in shapes.scene_at(0, index).objects)
        first = shapes.scene_at(0, index, held_out=True).objects[0]
        assert (first.shape, first.colour) in HELD_OUT
    assert all(
        (p.claim.objects[0].shape, p.claim.objects[0].colour) in HELD_OUT for p in shapes.prompts("held_out", 30)
    )


def test_captions_are_varied_and_true():
    wordings = Counter()
    for index in range(100):
        scene = shapes.scene_at(1, index)
        rng = np.random.default_rng(index)
        text, claim = shapes.caption(scene, rng)
        wordings[text.split()[0]] += 1
        assert shapes.holds(claim, scene)
        assert len(set(shapes.captions(scene))) == 5 and shapes.captions(scene) == shapes.captions(scene)
    assert len(wordings) >= 5


def test_claims_can_be_false():
    red, blue = SceneObject("circle", "red", "small", 16, 32, 9), SceneObject("star", "blue", "small", 48, 32, 9)
    scene = Scene((red, blue), shapes.scene_at(0, 0).background)
    said = (SceneObject("circle", "red"), SceneObject("star", "blue"))
    assert shapes.holds(Claim(said, "left of"), scene) and shapes.holds(Claim(said[::-1], "right of"), scene)
    assert not shapes.holds(Claim(said, "right of"), scene)
    assert not shapes.holds(Claim((SceneObject("circle", "blue"),)), scene)
    assert not shapes.holds(Claim((SceneObject("circle", "red"), SceneObject("circle", "red"))), scene)


def test_a_world_is_a_function_of_its_seed(tmp_path):
    a = shapes.make_world(tmp_path / "a", 4, 2, seed=1, show_progress=False)
    b = shapes.make_world(tmp_path / "b", 4, 2, seed=1, show_progress=False)
    c = shapes.make_world(tmp_path / "c", 4, 2, seed=2, show_progress=False)
    name = "train/000000000003.png"
    assert (a / name).read_bytes() == (b / name).read_bytes() != (c / name).read_bytes()
    content = json.loads((a / "annotations/captions_train.json").read_text())
    assert len(content["images"]) == 4 and len(content["annotations"]) == 20


@pytest.mark.parametrize("bad", [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.float32)])
def test_oracle_refuses_other_pictures(bad):
    with pytest.raises(ValueError, match="64x64x3 uint8"):
        shapes.read_scene(bad)
