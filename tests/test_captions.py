import pytest
import torch
from conftest import normal
from PIL import Image
from torchmetrics.multimodal.clip_score import CLIPScore

from clipgen_lib.data.batches import ordered_batches
from clipgen_lib.data.datasets import open_images
from clipgen_lib.data.images import to_float
from clipgen_lib.evaluate import open_folder
from clipgen_lib.metrics.captions import (
    caption_scores,
    choose_captions,
    embed_pairs,
    fit_scores,
    read_captions,
    texts_of,
)
from clipgen_lib.runtime.runs import ClipgenError


def test_pairs_are_embedded_row_by_row(clip, world):
    images = open_images(world, "val")
    pairs = [(row, images.captions[row][0]) for row in (4, 0, 4)]
    kept, shown, texts = embed_pairs(images, pairs, clip)
    assert kept == pairs and shown.shape == texts.shape == (3, clip.dim) and torch.equal(shown[0], shown[2])
    assert torch.allclose(texts[1], clip.texts([images.captions[0][0]])[0], atol=1e-6)


def test_captions_are_chosen_by_seed(world):
    images = open_images(world, "val")
    few, again, other = choose_captions(images, 12, 0), choose_captions(images, 12, 0), choose_captions(images, 12, 1)
    assert few == again != other and sorted(row for row, _ in few) == list(range(12))
    everything = choose_captions(images, 1000, 0)
    assert len(everything) == 60 and all(text in images.captions[row] for row, text in everything)


def test_captions_of_one_image_are_not_each_others_rivals():
    """Five captions to an image, a perfect encoder: every image finds one of its own."""
    embeds, owners = torch.nn.functional.normalize(normal(20, 16), dim=1).repeat(5, 1), list(range(20)) * 5
    texts = [f"caption {i}" for i in range(100)]
    assert fit_scores(embeds, embeds, texts)["r_precision"] < 0.5  # the same embedding is never above itself
    scores = fit_scores(embeds, embeds, texts, owners=owners)
    assert scores["r_precision"] == 1.0 and scores["caps_shuffled"] < 0.5


def test_r_precision_from_perfect_to_chance():
    texts, same = [str(i) for i in range(300)], ["same"] * 150 + [str(i) for i in range(150)]
    embeds = torch.nn.functional.normalize(normal(300, 32), dim=1)
    scores = fit_scores(embeds, embeds, texts)
    assert scores["r_precision"] == 1.0 and abs(scores["caps_shuffled"]) < 0.1
    assert fit_scores(embeds.roll(1, 0), embeds, texts)["r_precision"] < 0.05
    assert fit_scores(embeds, embeds, same)["r_precision"] == 1.0  # equal captions are no mistakes


def test_clip_score_is_that_of_torchmetrics(clip, world):
    """The same CLIP behind the interface that torchmetrics knows."""

    class Model(torch.nn.Module):
        config = None

        def get_image_features(self, pixels):
            return clip.images(to_float(pixels))

        def get_text_features(self, ids, mask):
            return clip.texts(self.asked)

    model = Model()

    def processor(images=None, text=None, return_tensors="pt", padding=True):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        model.asked = text
        return {"input_ids": torch.zeros(1), "attention_mask": torch.ones(1)}

    images = open_images(world, "val")
    (_, batch), texts = next(ordered_batches(images, range(12), 12)), [c[0] for c in images.captions]
    theirs = CLIPScore(lambda: (model, processor))
    theirs.update(batch, texts)
    found = caption_scores(images, list(enumerate(texts)), clip)
    assert 100 * found["caps"] == pytest.approx(theirs.compute().item(), rel=1e-6) and found["caps"] > 0.5
    assert found["judged"] == 12 and found["truncated_captions"] == 0


def test_captions_of_coco(world):
    path, images = world / "annotations" / "captions_val.json", open_images(world, "val")
    by_coco = read_captions(path)
    assert len(by_coco) == 12 and all(
        by_coco[name.split("/")[1][:-4]] in texts for name, texts in zip(images.names, images.captions, strict=True)
    )
    assert read_captions(path, seed=1) != by_coco


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("a.json", b'{"x/1.png": "one", "2.jpg": "two  words"}', {"x/1": "one", "2": "two words"}),
        ("null.json", b'{"1.png": null, "2.png": " ", "3.png": "three"}', {"3": "three"}),
        ("bom.txt", "1.png\tone\n".encode("utf-8-sig"), {"1": "one"}),
        ("wide.txt", "1.png\tone\n".encode("utf-16"), "wide.txt cannot be read as UTF-8 .UTF-16.: save it as UTF-8"),
        ("b.json", b'{"1.png": 3}', "neither COCO's captions"),
        ("c.json", b'{"images": [], "annotations": [{}]}', "neither COCO's"),
        ("a.txt", b"a.png no tab\n", "line 1 of"),
        ("b.txt", b"", "holds no captions"),
        ("absent.txt", None, "absent.txt are no file"),
        ("c.txt", b"elsewhere.png\ta text\n", "names none of the 12 images"),
    ],
)
def test_caption_files(world, tmp_path, capsys, name, content, found):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    if isinstance(found, str):
        with pytest.raises(ClipgenError, match=found):
            texts_of(open_images(world, "val"), tmp_path / name)
    else:
        assert read_captions(tmp_path / name) == found
        assert ("2 of 3 captions in" in capsys.readouterr().err) == (name == "null.json")


def test_bare_names_are_used_only_where_they_say_which(tmp_path):
    for name in ("bee/0.png", "bee/1.png", "goldfish/0.png"):
        (tmp_path / "generated" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "generated" / name)
    folder = open_folder(tmp_path / "generated")
    (tmp_path / "list.txt").write_text("goldfish/0.png\ta goldfish\n1.png\ta bee\n")
    found = {folder.names[row]: text for row, text in texts_of(folder, tmp_path / "list.txt").items()}
    assert found == {"goldfish/0.png": "a goldfish", "bee/1.png": "a bee"}
