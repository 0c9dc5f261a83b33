import numpy as np
import pytest

from clipgen_lib.data import shapes
from clipgen_lib.data.shapes import HELD_OUT
from clipgen_lib.metrics import oracle


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
    assert score(images, asked)["both"] == 1.0
    shifted = score(np.roll(images, 1, axis=0), asked)
    assert shifted["colour"] < 0.5 and shifted["shape"] < 0.5
    assert score(np.full_like(images, 128), asked)["colour"] == 0.0
    two = oracle.prompts("two", 40)
    images = rendered(two)
    assert score(images, two) == {"n": 40, "both": 1.0, "relation": 1.0}
    mirrored = score(images[:, ::-1, ::-1], two)  # every relation turns into its opposite
    assert mirrored["relation"] <= 0.05


def test_prompts_say_all_that_is_scored():
    one, two, held = (oracle.prompts(kind, 30) for kind in ("one", "two", "held_out"))
    for prompt in one + held:
        (obj,) = prompt.claim.objects
        assert prompt.text.split()[1:] == [obj.size, obj.colour, obj.shape]
    assert all(p.claim.relation in p.text for p in two) and oracle.prompts("one", 5) == one[:5]
    assert pairs(held) <= set(HELD_OUT) and not pairs(one) & set(HELD_OUT)
    with pytest.raises(ValueError, match="one, two or held_out"):
        oracle.prompts("three", 1)
    with pytest.raises(ValueError, match="64x64x3"):
        oracle.read_scene(np.zeros((32, 32, 3), np.uint8))
