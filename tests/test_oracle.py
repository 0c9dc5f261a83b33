import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clipgen_lib.data import shapes
from clipgen_lib.data.shapes import HELD_OUT, Claim, Scene, SceneObject
from clipgen_lib.evaluate import oracle_list
from clipgen_lib.metrics import oracle
from clipgen_lib.metrics.intervals import wilson
from clipgen_lib.runtime.runs import ROOT


def score(images, asked):
    return oracle.score([oracle.correct(image, prompt) for image, prompt in zip(images, asked, strict=True)])


def rendered(prompts):
    return np.stack([shapes.render(p.scene) for p in prompts])


def pairs(prompts):
    return {(obj.shape, obj.colour) for p in prompts for obj in p.claim.objects}


@pytest.mark.parametrize("wild", [False, True])
def test_it_reads_scenes_it_has_not_seen(wild):
    objects = correct = 0
    for index in range(300):
        scene = shapes.scene_at(seed=99, index=index, held_out=index % 4 == 0, wild=wild)
        read = oracle.read_scene(shapes.render(scene))
        assert len(read) <= 3
        for obj in scene.objects:
            objects += 1
            near = min(read, key=lambda r: (r.x - obj.x) ** 2 + (r.y - obj.y) ** 2)
            correct += (near.shape, near.colour, near.size) == (obj.shape, obj.colour, obj.size)
    assert correct / objects >= 0.98


def test_it_sees_what_is_wrong():
    asked = oracle.prompts("one", 40)
    images = rendered(asked)
    shifted = score(np.roll(images, 1, axis=0), asked)
    assert shifted["colour"] < 0.5 and shifted["shape"] < 0.5
    assert score(np.full_like(images, 128), asked)["colour"] == 0.0
    larger = [Claim((replace(p.claim.objects[0], size="large"),)) for p in asked]
    larger = score(images, [p._replace(claim=claim) for p, claim in zip(asked, larger, strict=True)])
    is_small = np.mean([p.claim.objects[0].size == "small" for p in asked])
    assert larger["size"] == larger["whole"] == 1 - is_small and larger["atoms"] == pytest.approx(1 - is_small / 5)
    assert larger["both"] == larger["count"] == 1.0
    two = oracle.prompts("two", 40)
    images = rendered(two)
    mirrored = score(images[:, ::-1, ::-1], two)  # every relation turns into its opposite
    assert mirrored["relation"] <= 0.05


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_the_scene_of_a_prompt_has_every_atom(kind):
    asked = oracle.prompts(kind, 60)
    found, names = score(rendered(asked), asked), "colour shape object count both atoms whole"
    names += {1: " size", 2: " position relation", 3: ""}[oracle.KINDS[kind][0]]
    assert found.pop("n") == 60 and set(found) == {key + end for key in names.split() for end in ("", "_interval")}
    assert all(found[key] == 1.0 and found[f"{key}_interval"] == list(wilson(60, 60)) for key in names.split())


PLACES = ((16, 16), (48, 16), (32, 48))
RED_STAR, BLUE_RING, GREEN_HEART = objects = (("star", "red"), ("ring", "blue"), ("heart", "green"))


@pytest.mark.parametrize(
    "shown, wrong",
    [
        (objects[:2], ""),
        ((RED_STAR, ("ring", "green")), "colour both relation"),
        ((RED_STAR, ("cross", "blue")), "shape both relation"),
        ((("star", "blue"), ("ring", "red")), "colour colour both relation"),  # exchanged colours leave the places
        ((BLUE_RING, RED_STAR), "position relation"),
        ((RED_STAR, BLUE_RING, RED_STAR), "count"),
        ((RED_STAR,), "colour shape object position count both relation"),
        ((RED_STAR, ("cross", "green")), "colour shape object position both relation"),  # it is no one's blue ring
        (objects, ""),
        ((RED_STAR, ("ring", "pink"), GREEN_HEART), "colour both"),
        ((GREEN_HEART, RED_STAR, BLUE_RING), ""),  # nothing is said of places
        ((RED_STAR, GREEN_HEART), "colour shape object count both"),
    ],
)
def test_a_mistake_lowers_the_atoms_that_it_touches(shown, wrong):
    asked = objects[: 3 if GREEN_HEART in shown else 2]
    claim = Claim(tuple(SceneObject(*pair) for pair in asked), "left of" if len(asked) == 2 else None)
    things = tuple(SceneObject(*pair, "small", x, y, 9.0) for pair, (x, y) in zip(shown, PLACES, strict=False))
    image = shapes.render(Scene(things, shapes.Background("plain", "grey", (0, 0, 0))))
    found, wrong = oracle.correct(image, oracle.Prompt("", claim, None)), wrong.split()
    whole, share, n = found.pop("whole"), found.pop("atoms"), len(asked)
    each, once = {"colour", "shape", "object"}, {"both", "relation"}
    assert found == pytest.approx({key: 1 - wrong.count(key) / (n if key in each else 1) for key in found})
    atoms = [key for key in wrong if key not in once]
    assert share == pytest.approx(1 - len(atoms) / (3 * n + (2 if n == 2 else 1))) and whole == (not wrong)


def test_prompts_say_all_that_is_scored():
    made = {kind: oracle.prompts(kind, 30) for kind in oracle.KINDS}
    for prompt in made["one"] + made["held_out"]:
        (obj,) = prompt.claim.objects
        assert prompt.text.split()[1:] == [obj.size, obj.colour, obj.shape]
    for prompt in made["two"] + made["three"] + made["held_out_two"]:
        names = [f"{shapes.article(t.colour)} {t.colour} {t.shape}" for t in prompt.claim.objects]
        link = prompt.claim.relation or "and"
        assert prompt.text == f" {link} ".join([", ".join(names[:-1]), names[-1]])
    unseen = [sum(pair in HELD_OUT for pair in pairs(made[kind])) / len(pairs(made[kind])) for kind in oracle.KINDS]
    assert unseen[:4] == [0, 0, 0, 1] and all(len(pairs([p]) & HELD_OUT) == 1 for p in made["held_out_two"])
    assert oracle.prompts("one", 5) == made["one"][:5]
    with pytest.raises(ValueError, match="choose one of one, two, three, held_out, held_out_two"):
        oracle.prompts("four", 1)
    with pytest.raises(ValueError, match="64x64x3"):
        oracle.read_scene(np.zeros((32, 32, 3), np.uint8))


def test_the_committed_prompts():
    """512 of each kind with seed 0, as an evaluation writes them."""
    assert (ROOT / "results" / "prompts" / "oracle.txt").read_text() == oracle_list(512)


def test_the_gap_of_the_committed_weights_is_measured(tmp_path):
    """`make gap` in small: real scenes are right, and texts come nearer to their images."""
    command, environment = [sys.executable, ROOT / "tests" / "gap.py", "-n", "8"], {"CLIPGEN_RESULTS": str(tmp_path)}
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    rows = {(row["kind"], row["condition"]): row for row in json.loads((tmp_path / "gap" / "table.json").read_text())}
    assert len(rows) == 30 and rows["one", "real"]["whole"] == rows["one", "text"]["whole"] == 1
    cosines = [rows["one", way]["cosine"] for way in ("text", "text, shift", "text, standardise")]
    assert 0.8 < cosines[0] < cosines[1] < cosines[2] < 0.95
    assert Image.open(tmp_path / "gap" / "figures" / "gap.png").width > 500
