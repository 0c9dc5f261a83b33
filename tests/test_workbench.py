"""One run, step by step; `open` and `reopen` are tried in a process with results of its own."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from clipgen_lib.clip_embed import photo_notice
from clipgen_lib.data.batches import ordered_batches
from clipgen_lib.data.images import to_float
from clipgen_lib.metrics.captions import split_prompts
from clipgen_lib.runtime.checkpoints import module_hash, save_weights
from clipgen_lib.runtime.runs import DATA, ClipgenError, held, open_run
from clipgen_lib.workbench import Workbench, clip_fields

OUTCOMES = """
import json, sys
from clipgen_lib.runtime.runs import RESULTS, ClipgenError, read_json, write_json
from clipgen_lib.workbench import Workbench

def outcome(call):
    try:
        call()
        return "opened"
    except ClipgenError as error:
        return str(error)

path = Workbench.open("smoke", "r").run.path / "config.json"
whole, found = read_json(path), []
for keys, value in json.loads(sys.argv[1]):
    changed = json.loads(json.dumps(whole))
    place = changed
    for key in keys[:-1]:
        place = place[key]
    if value == "(removed)":
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    write_json(path, changed)
    found.append([outcome(lambda: Workbench.open("smoke", "r")), outcome(lambda: Workbench.reopen("r"))])
write_json(path, whole)
found.append([outcome(lambda: Workbench.open("smoke", "r", seed=1)), outcome(lambda: Workbench.reopen("none"))])
found.append([outcome(lambda: Workbench.reopen("r", data="~nobody-of-that-name/images"))])
path.unlink()
found.append([outcome(lambda: Workbench.open("smoke", "r", seed=7)), str(path.exists()), outcome(lambda: Workbench.open("smoke", "r"))])
print(json.dumps(found))
"""


def test_a_run_is_opened_again_only_as_it_was_begun(tmp_path):
    nonsense = [
        (["preset"], None),
        (["preset", "clip"], None),
        (["preset", "name"], 5),
        (["data"], 5),
        (["seed"], None),
        (["preset", "clip", "name"], ["shapes"]),
        (["preset", "vqgan", "channels"], "many"),
        (["preset", "vqgan", "chanels"], 3),
    ]
    changes = [
        (["preset", "sample", "neighbours"], "(removed)"),  # the default is the preset's: as if it were there
        (["preset", "sample", "top_p"], "(removed)"),  # the default is 1, the preset's is not
        *((["data"], text) for text in ("a\0b", "x\0" * 10_000)),
        *nonsense,
    ]
    command = [sys.executable, "-c", OUTCOMES, json.dumps(changes)]
    environment = {**os.environ, "CLIPGEN_RESULTS": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[0] == ["opened", "opened"]
    assert "begun with another preset.sample.top_p" in found[1][0] and found[1][1] == "opened"
    assert all("is no path" in text for text in (found[2][1], found[3][1]))
    for texts in found[4 : 4 + len(nonsense)]:
        assert all("does not say what the run was begun with" in text for text in texts), texts
    assert "begun with another seed" in found[-3][0] and "there is no run 'none'" in found[-3][1]
    assert "begun with another data" in found[-2][0]
    assert "was begun with preset smoke and seed 0: give these" in found[-1][0] and found[-1][1:] == ["False", "opened"]


IDENTITY = r"""
import json, shutil, sys
from pathlib import Path
from clipgen_lib.runtime.runs import RESULTS, ClipgenError
from clipgen_lib.workbench import Workbench

def outcome(data, **values):
    try:
        Workbench.open(**{"preset": "smoke", "run": "r", "data": str(data), **values})
        return "opened"
    except ClipgenError as error:
        return str(error)

root = Path(sys.argv[1])
shutil.copytree(root / "images", root / "a" / "photos")
shutil.copytree(root / "images", root / "b" / "photos")
next((root / "b" / "photos").glob("*.png")).unlink()
wrong = [dict(seed=seed) for seed in (-1, 2**64, 1.5, "abc")] + [dict(device="meta"), dict(preset="none")]
wrong += [dict(data=""), dict(data="/nope"), dict(data="no\0where"), dict(clip="no/such/clip")]
found = [outcome(**{"data": root / "a" / "photos", **values}) for values in wrong]
found.append(str(RESULTS.exists()))
found += [outcome(root / "a" / "photos"), outcome(root / "b" / "photos")]
(root / "a" / "photos").rename(root / "renamed")
found.append(outcome(root / "renamed"))
found.append(str(Workbench.reopen("r").data))
print(json.dumps(found))
"""


def test_data_are_known_by_their_content_and_a_wrong_value_begins_nothing(images_folder, tmp_path):
    environment = {**os.environ, "CLIPGEN_RESULTS": str(tmp_path / "results")}
    done = subprocess.run(
        [sys.executable, "-c", IDENTITY, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    *wrong, begun, first, other, renamed, label = json.loads(done.stdout)
    sentences = ["whole number"] * 4 + [
        "cannot be used",
        "unknown preset",
        "no path",
        "not a folder of images",
        "no path",
        "CLIP",
    ]
    assert all(sentence in found for sentence, found in zip(sentences, wrong, strict=True)), wrong
    assert begun == "False" and first == renamed == "opened" and "begun with another data" in other
    assert label == "photos"


def test_a_clip_is_a_folder_or_a_model_and_its_weights(tmp_path):
    assert clip_fields("shapes") == {"name": "shapes", "pretrained": None}
    assert clip_fields("ViT-B-32-quickgelu/openai") == {"name": "ViT-B-32-quickgelu", "pretrained": "openai"}
    embedded = {"name": "data/shapes_clip", "pretrained": None}
    assert clip_fields("data/shapes_clip") == clip_fields(str(DATA / "shapes_clip")) == embedded
    assert clip_fields(str(tmp_path)) == {"name": str(tmp_path), "pretrained": None}
    with pytest.raises(ClipgenError, match="train-clip"):
        clip_fields("results/absent/clip")
    (tmp_path / "w.pt").write_bytes(b"")
    assert clip_fields(f"ViT-B-32/{tmp_path / 'w.pt'}") == {"name": "ViT-B-32", "pretrained": str(tmp_path / "w.pt")}


def test_the_mean_of_texts_needs_texts(world, preset, images_folder, tmp_path):
    wb = Workbench(open_run("r", tmp_path), preset, str(world))
    expected = wb.clip.texts([texts[0] for texts in wb.images().captions]).mean(0)
    assert torch.allclose(wb.text_mean(), expected, atol=1e-6)
    embeds, texts = wb.text_image_pairs(5)
    assert embeds.shape == texts.shape == (5, wb.clip.dim)
    assert torch.allclose(texts[2], wb.clip.texts([wb.images("val").captions[2][0]])[0], atol=1e-6)
    with pytest.raises(ClipgenError, match="has no captions"):
        Workbench(open_run("b", tmp_path), preset, str(images_folder)).text_mean()


@pytest.fixture
def open_folder(preset, tmp_path, vqgan, transformer, clip):
    """Opens a workbench on a folder, with the weights of untrained networks in its run."""

    def open_on(folder):
        wb = Workbench(open_run("r", tmp_path / "results"), preset, str(folder))
        save_weights(wb.run.path / "vqgan", vqgan)
        trained_with = {"vqgan": module_hash(vqgan), "clip": clip.weights_hash}
        save_weights(wb.run.path / "transformer", transformer, trained_with=trained_with)
        return wb

    return open_on


def captioned(folder, captions):
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text(captions)
    return folder


def test_a_users_prompts_come_first(open_folder, images_folder):
    wb = open_folder(captioned(images_folder, "a caption\n"))
    user = wb.user_prompts(" a dog |a  red car||a dog")
    assert user.prompts == user.titles == ["a dog", "a red car"] and user.source == "prompts of your own"
    grid = wb.generate_for_user("a dog|a red car", each=3, guidance=1.5)
    assert grid.images.shape == (6, 3, 64, 64) and grid.columns == 6
    assert grid.titles == ["a dog"] * 3 + ["a red car"] * 3
    again = wb.generator()("a red car", n=3, seed=0, guidance=1.5)[0]
    assert torch.allclose(grid.images[3:], again, atol=1e-5)  # image j has seed + j
    assert wb.run.summary()["prompts"] == {"source": "prompts of your own", "asked": ["a dog", "a red car"]}


def test_captions_are_prompts_where_none_are_given(open_folder, images_folder):
    wb = open_folder(captioned(images_folder, "a thing\nanother thing\n"))
    user = wb.user_prompts()
    assert sorted(user.prompts) == ["a thing", "another thing"] and user.source == "captions of the val split"
    for name in wb.images("val").names:
        (images_folder / name).with_suffix(".txt").unlink()
    user = wb.user_prompts()
    assert sorted(user.prompts) == ["a thing", "another thing"] and user.source == "captions of the train split"


def test_without_captions_images_are_prompts(open_folder, images_folder):
    wb = open_folder(images_folder)
    user = wb.user_prompts(n=12)
    titles = [name.rpartition("/")[2] for name in wb.images("val").names]
    assert user.titles == titles[:6] and "no captions" in user.source
    assert user.prompts.shape == (len(user.titles), wb.clip.dim) and user.images.shape[1:] == (3, 64, 64)
    assert torch.allclose(user.prompts[1], wb.clip.images(user.images[1:2])[0], atol=1e-5)
    grid = wb.generate_for_user(n=12)
    assert grid.images.shape == (5 * len(user.titles), 3, 64, 64) and grid.columns == 10
    assert torch.equal(grid.images[5], user.images[1])
    assert grid.titles[5:10] == [user.titles[1]] + ["variation"] * 4


def test_a_text_of_bars_holds_no_prompt():
    assert split_prompts("") == []
    with pytest.raises(ClipgenError, match="a dog|a red car"):
        split_prompts(" | ")


def test_a_notice_only_for_the_shapes_clip_on_photos(open_folder, images_folder):
    assert "knows coloured shapes, not photos" in open_folder(images_folder).notice
    assert photo_notice("shapes", "shapes") == photo_notice("ViT-B-32", "/my/photos") == ""
    assert photo_notice("data/shapes_clip", "/my/photos") == photo_notice("shapes", "/my/photos")


def test_a_training_that_begins_anew_drops_what_later_steps_recorded(open_folder, images_folder):
    wb = open_folder(images_folder)
    of_others = {"oracle": 1, "export": 2, "transformer": 3, "classifier": 4, "seed": 0, "seconds": {"vqgan": 1e9}}
    wb.run.add_to_summary(**of_others)
    wb.train_vqgan()
    summary = wb.run.summary()
    assert set(summary) == {"run", "seed", "classifier", "seconds", "parameters", "vqgan", "data"}
    assert summary["seconds"]["vqgan"] < 1e9
    wb.extract()
    wb.run.add_to_summary(oracle=1)
    wb.train_vqgan()  # it is done: nothing is trained
    assert wb.run.summary()["oracle"] == 1
    wb.train_transformer()
    assert "oracle" not in wb.run.summary() and {"vqgan", "data", "transformer"} <= set(wb.run.summary())


def test_one_process_at_a_time_writes_a_run(open_folder, images_folder):
    wb = open_folder(images_folder)
    with (
        held(wb.run.path, "the transformer"),
        pytest.raises(ClipgenError, match=f"the transformer is being made in .* by process {os.getpid()} on .* since"),
    ):
        wb.train_vqgan()
    assert not (wb.run.path / "metrics.jsonl").exists()


def test_too_few_images_are_told_before_training(open_folder, images_folder):
    for path in sorted(images_folder.glob("*.png"))[6:]:
        path.unlink()
    with pytest.raises(ClipgenError, match=r"images to train on and \d to test on: give at least 4 of each"):
        open_folder(images_folder).train_vqgan()


def test_each_class_shows_its_photos_and_what_its_name_gives(open_folder, world, images_folder, tmp_path):
    paths = sorted((world / "train").glob("*.png"))
    for name, of in (
        ("train/a_cat", paths[:4]),
        ("train/dog", paths[4:8]),
        ("val/a_cat", paths[8:11]),
        ("val/dog", paths[11:13]),
    ):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for path in of:
            shutil.copy(path, tmp_path / "classes" / name)
    wb = open_folder(tmp_path / "classes")
    rows = wb.class_rows(real=2, generated=3)
    assert list(rows) == ["a cat", "dog"] and rows["dog"].shape == (5, 3, 64, 64)
    batch = next(ordered_batches(wb.images("val"), [3, 4], 2))[1]
    assert torch.equal(rows["dog"][:2], to_float(batch))
    assert torch.allclose(rows["dog"][2:], wb.generator()("a photo of a dog", n=3, seed=0)[0], atol=1e-5)
    assert list(wb.class_rows(real=3, generated=1)) == ["a cat"]
    assert open_folder(images_folder).class_rows() == {}
