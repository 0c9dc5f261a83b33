"""One run, step by step."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import same_weights

from clipgen_lib.clip_embed import photo_notice
from clipgen_lib.config import SharedConfig, changed, load_preset
from clipgen_lib.data.batches import ordered_batches
from clipgen_lib.data.images import to_float
from clipgen_lib.metrics.report import table
from clipgen_lib.runtime.checkpoints import module_hash, save_weights
from clipgen_lib.runtime.runs import DATA, ClipgenError, held, open_run, read_json, write_json
from clipgen_lib.study.released import named_sources
from clipgen_lib.workbench import Workbench, clip_fields


def outcome(call, *arguments, **values):
    try:
        call(*arguments, **values)
    except ClipgenError as error:
        return str(error)
    return "opened"


REMOVED = object()
NONSENSE = "does not say what the run was begun with"
ANOTHER = "begun with another preset.sample.top_p"
WRONG = {"preset": None, "preset clip": None, "preset name": 5, "data": 5, "seed": None}
WRONG |= {"preset clip name": ["shapes"], "preset vqgan channels": "many", "preset vqgan chanels": 3}


@pytest.mark.parametrize(
    "place, value, opened, reopened",
    [
        ("preset sample neighbours", REMOVED, "opened", "opened"),  # the default is the preset's: as if it were there
        ("preset sample top_p", REMOVED, ANOTHER, "opened"),  # the default is 1, the preset's is not
        ("data", "a\0b", "begun with another data", "is no path"),
        ("data", "x\0" * 10_000, "begun with another data", "is no path"),
        *((place, value, NONSENSE, NONSENSE) for place, value in WRONG.items()),
    ],
)
def test_a_config_that_changed_opens_if_it_means_the_same(results, place, value, opened, reopened):
    path = Workbench.open("smoke", "r").run.path / "config.json"
    config = part = read_json(path)
    *outer, key = place.split()
    for name in outer:
        part = part[name]
    part[key] = value
    if value is REMOVED:
        part.pop(key)
    write_json(path, config)
    assert opened in outcome(Workbench.open, "smoke", "r") and reopened in outcome(Workbench.reopen, "r")


def test_a_run_is_opened_only_as_it_was_begun(results):
    path = Workbench.open("smoke", "r").run.path / "config.json"
    assert "begun with another seed" in outcome(Workbench.open, "smoke", "r", seed=1)
    wide = load_preset("smoke", "transformer.width=128")
    assert "begun with another preset.transformer.width" in outcome(Workbench.open, wide, "r")
    assert outcome(Workbench.open, wide, "wide") == outcome(Workbench.open, wide, "wide") == "opened"
    assert Workbench.reopen("wide").preset == wide
    assert "there is no run 'none'" in outcome(Workbench.reopen, "none")
    assert "begun with another data" in outcome(Workbench.reopen, "r", data="~nobody-of-that-name/images")
    path.unlink()
    sentence = "was begun with preset smoke and seed 0: give these"
    assert sentence in outcome(Workbench.open, "smoke", "r", seed=7) and not path.exists()
    assert "begun with other settings or data" in outcome(Workbench.open, load_preset("smoke", "sample.top_k=9"), "r")
    assert "is missing: restore it" in outcome(Workbench.reopen, "r") and not path.exists()
    assert outcome(Workbench.open, "smoke", "r") == "opened"


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"seed": -1}, "whole number"),
        ({"device": "meta"}, "cannot be used"),
        ({"preset": "none"}, "unknown preset"),
        ({"data": ""}, "no path"),
        ({"data": "/nope"}, "not a folder of images"),
        ({"data": "no\0where"}, "no path"),
        ({"clip": "no/such/clip"}, "CLIP"),
    ],
)
def test_a_wrong_value_begins_nothing(results, images_folder, values, sentence):
    given = {"preset": "smoke", "run": "r", "data": str(images_folder)} | values
    assert sentence in outcome(Workbench.open, **given) and not results.exists()


def test_data_are_known_by_their_content(results, images_folder, tmp_path):
    assert outcome(Workbench.open, "smoke", "r", str(images_folder)) == "opened"
    shutil.copytree(images_folder, tmp_path / "renamed")
    next(images_folder.glob("*.png")).unlink()  # the same name, and not the same images
    assert "begun with another data" in outcome(Workbench.open, "smoke", "r", str(images_folder))
    assert outcome(Workbench.open, "smoke", "r", str(tmp_path / "renamed")) == "opened"
    assert Workbench.reopen("r").data == "images"


def test_a_clip_is_a_folder_or_a_model_and_its_weights(tmp_path):
    folder, file = str(tmp_path), str(tmp_path / "w.pt")
    (tmp_path / "w.pt").touch()
    for name in ("shapes", "data/shapes_clip", folder):
        assert clip_fields(name) == {"name": name, "pretrained": None}
    assert clip_fields(str(DATA / "shapes_clip")) == clip_fields("data/shapes_clip")
    for weights in ("openai", file):
        assert clip_fields(f"ViT-B-32/{weights}") == {"name": "ViT-B-32", "pretrained": weights}
    assert "train-clip" in outcome(clip_fields, "results/absent/clip")


@pytest.fixture
def open_folder(preset, tmp_path, vqgan, transformer, clip):
    """Opens a workbench on a folder, with the weights of untrained networks in its run."""
    preset = replace(preset, vqgan_train=replace(preset.vqgan_train, perceptual="none"))  # faster

    def open_on(folder):
        wb = Workbench(open_run("r", tmp_path / "runs"), preset, str(folder))
        save_weights(wb.run.path / "vqgan", vqgan)
        trained_with = {"vqgan": module_hash(vqgan), "clip": clip.weights_hash}
        save_weights(wb.run.path / "transformer", transformer, trained_with=trained_with)
        return wb

    return open_on


@pytest.fixture
def wb(open_folder, images_folder):
    """A workbench on a folder of images without captions."""
    return open_folder(images_folder)


def test_the_moments_of_texts_need_texts(open_folder, wb, world):
    assert "has no captions" in outcome(wb.text_moments)
    wb = open_folder(world)
    texts = wb.clip.texts([texts[0] for texts in wb.images().captions])
    expected = torch.stack([texts.mean(0), texts.std(0, correction=0)])
    assert torch.allclose(wb.text_moments(), expected, atol=1e-6)


def test_an_evaluation_on_val2014_says_what_training_has_seen(open_folder, results, preset, world, tmp_path):
    root, content = tmp_path / "coco", read_json(world / "annotations" / "captions_train.json")
    for split, first, prefix in (("train2017", 0, ""), ("val2017", 30, ""), ("val2014", 24, "COCO_val2014_")):
        (root / split).mkdir(parents=True)
        images = [{"id": entry["id"], "file_name": prefix + entry["file_name"]} for entry in content["images"][first:]]
        for image in images[: 30 if split == "train2017" else None]:
            shutil.copy(world / "train" / image["file_name"][-16:], root / split / image["file_name"])
        write_json(root / "annotations" / f"captions_{split}.json", content | {"images": images})
    wb = open_folder(f"{root}?year=2017")
    wb = replace(
        wb,
        preset=changed(
            wb.preset, {"evaluate": {"n": 20, "split": "val2014", "also_splits": ["val2017"], "judges": ["shapes"]}}
        ),
    )
    wb.evaluate()
    found = wb.run.summary()["evaluation"]
    assert found["judges"]["shapes"]["caps"] == found["caps"]
    assert found["reference"] == "coco/val2014" and found["n"] == 20 and found["n_reference"] == 16
    assert any("6 of 16 images of val2014 are in train2017" in warning for warning in found["warnings"])
    assert any("val2014 has 16 images here, published figures of COCO" in warning for warning in found["warnings"])
    names = [line.split("\t")[0] for line in (wb.run.path / "captions.txt").read_text().splitlines()]
    assert len(set(names[:16])) == 16 and len(names) == 20  # one caption of each image first
    other = wb.run.summary()["evaluation val2017"]
    assert other["reference"] == "coco/val2017" and not any("are in train2017" in w for w in other["warnings"])
    assert (
        wb.run.summary()["evaluation"] == found and len(list((wb.run.path / "generated").glob("captions*/*.png"))) == 40
    )
    assert table(wb.run.summary()).count("CapS") == 4  # of two splits, by two CLIPs
    absent = {"split": "val2015"}, {"also_splits": ["val2015"]}, {"judges": ["results/none"]}, {"classifier": "none"}
    told = ["has no split 'val2015': use one of train2017"] * 2 + [
        "CLIP 'results/none' is neither",
        "has no classifier",
    ]
    for wrong, sentence in zip(absent, told, strict=True):
        assert sentence in outcome(Workbench.open, changed(preset, {"evaluate": wrong}), "r", f"{root}?year=2017")
    assert not results.exists()


def test_a_users_prompts_come_first(wb, images_folder):
    for path in images_folder.glob("*.png"):
        path.with_suffix(".txt").write_text("a caption\n")
    user = wb.user_prompts(" a dog |a  red car||a dog")
    assert user.prompts == user.titles == ["a dog", "a red car"] and user.source == "prompts of your own"
    grid = wb.generate_for_user("a dog|a red car", each=3, guidance=1.5)
    assert grid.images.shape == (6, 3, 64, 64) and grid.columns == 6
    assert grid.titles == ["a dog"] * 3 + ["a red car"] * 3
    again = wb.generator()("a red car", n=3, seed=0, guidance=1.5)[0]
    assert torch.allclose(grid.images[3:], again, atol=1e-5)  # image j has seed + j
    assert wb.run.summary()["prompts"] == {"source": "prompts of your own", "asked": ["a dog", "a red car"]}


@pytest.mark.parametrize("split", ["val", "train"])
def test_captions_are_prompts_where_none_are_given(wb, images_folder, split):
    """Those of the validation images, where these have any."""
    names = wb.images("train").names + wb.images("val").names * (split == "val")
    for name in names:
        (images_folder / name).with_suffix(".txt").write_text("a thing\nanother thing\n")
    user = wb.user_prompts()
    assert sorted(user.prompts) == ["a thing", "another thing"] and user.source == f"captions of the {split} split"


def test_without_captions_images_are_prompts(wb):
    user = wb.user_prompts(n=12)
    titles = [name.rpartition("/")[2] for name in wb.images("val").names]
    assert user.titles == titles[:6] and "no captions" in user.source
    assert user.prompts.shape == (len(user.titles), wb.clip.dim) and user.images.shape[1:] == (3, 64, 64)
    assert torch.allclose(user.prompts[1], wb.clip.images(user.images[1:2])[0], atol=1e-5)
    grid = wb.generate_for_user(n=12)
    assert grid.images.shape == (5 * len(user.titles), 3, 64, 64) and grid.columns == 10
    assert torch.equal(grid.images[5], user.images[1])
    assert grid.titles[5:10] == [user.titles[1]] + ["variation"] * 4


def test_a_notice_only_for_the_shapes_clip_on_photos(wb):
    assert "knows coloured shapes, not photos" in wb.notice
    assert photo_notice("shapes", "shapes") == photo_notice("ViT-B-32", "/my/photos") == ""
    assert photo_notice("data/shapes_clip", "/my/photos") == photo_notice("shapes", "/my/photos")


def test_a_training_that_begins_anew_drops_what_later_steps_recorded(wb):
    of_others = {"oracle": 1, "export": 2, "transformer": 3, "classifier": 4, "seed": 0, "seconds": {"vqgan": 1e9}}
    wb.run.add_to_summary(**of_others)
    shutil.rmtree(wb.run.path / "vqgan")
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


def test_a_training_whose_checkpoints_were_deleted_is_kept(wb, capsys):
    shutil.rmtree(wb.run.path / "vqgan")
    wb.train_vqgan()
    wb.extract()
    wb.train_transformer()
    wb.run.add_to_summary(oracle=1)
    before, weights = wb.run.summary(), [module_hash(wb.vqgan()), module_hash(wb.generator().transformer)]
    shutil.rmtree(wb.run.path / "checkpoints")
    wb.train_vqgan()
    wb.train_transformer()
    assert weights == [module_hash(wb.vqgan()), module_hash(wb.generator().transformer)]
    assert wb.run.summary() | {"seconds": 0} == before | {"seconds": 0}
    assert capsys.readouterr().err.count("is kept as it is, without a checkpoint to go on from") == 2


def test_one_process_at_a_time_writes_a_run(wb):
    sentence = f"the transformer is being made in .* by process {os.getpid()} on .* since"
    with held(wb.run.path, "the transformer"), pytest.raises(ClipgenError, match=sentence):
        wb.train_vqgan()
    assert not (wb.run.path / "metrics.jsonl").exists()


def test_too_few_images_are_told_before_training(wb, images_folder):
    for path in sorted(images_folder.glob("*.png"))[6:]:
        path.unlink()
    with pytest.raises(ClipgenError, match=r"images to train on and \d to test on: give at least 4 of each"):
        wb.train_vqgan()


def test_each_class_shows_its_photos_and_what_its_name_gives(open_folder, wb, class_folders):
    assert wb.class_rows() == {}
    wb = open_folder(class_folders({"train/a_cat": 4, "train/dog": 4, "val/a_cat": 3, "val/dog": 2}))
    rows = wb.class_rows(real=2, generated=3)
    assert list(rows) == ["a cat", "dog"] and rows["dog"].shape == (5, 3, 64, 64)
    batch = next(ordered_batches(wb.images("val"), [3, 4], 2))[1]
    assert torch.equal(rows["dog"][:2], to_float(batch))
    assert torch.allclose(rows["dog"][2:], wb.generator()("a photo of a dog", n=3, seed=0)[0], atol=1e-5)
    assert list(wb.class_rows(real=3, generated=1)) == ["a cat"]


@pytest.fixture
def source(results, preset, images_folder):
    """A run `source`, and a function that begins others which take stages from elsewhere."""
    preset = replace(preset, vqgan_train=replace(preset.vqgan_train, perceptual="none"))  # faster

    def begin(run, parts=(), **shared):
        return Workbench.open(changed(preset, {**dict(parts), "shared": shared}), run, str(images_folder))

    wb = begin("source")
    wb.train_vqgan()
    wb.extract()
    wb.train_transformer()
    return wb, begin


def test_a_run_takes_stages_of_another_one(source, results, images_folder, monkeypatch):
    wb, begin = source
    other = begin("other", store=str(results / "source"))
    losses = other.train_transformer()  # what comes before it is taken first
    assert same_weights(other.generator(), wb.generator())  # bit for bit
    entries, own = other.run.summary(), wb.run.summary()
    taken = {"source": "source", "hash": module_hash(wb.vqgan())}
    assert entries["vqgan"] == own["vqgan"] | taken and entries["transformer"] == own["transformer"] == losses
    files = ["store/train/tokens.u16", "store/val/meta.json"]
    assert all((other.run.path / file).samefile(wb.run.path / file) for file in files)
    assert not other.run.metrics("vqgan") and other.run.metrics("transformer") == wb.run.metrics("transformer")
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: os.link("/nowhere", "/nowhere"))
    last = begin("last", parts={"transformer": {"width": 64}}, transformer="source", store="other")
    assert last.preset.transformer == wb.preset.transformer
    taken["hash"] = module_hash(wb.generator().transformer)
    assert last.train_transformer() == losses and last.run.summary()["transformer"] == losses | taken
    assert [path.name for path in (last.run.path / "previews").iterdir()] == ["000000.png"]
    assert not (last.run.path / files[0]).samefile(wb.run.path / files[0])
    begun = begin("begun", vqgan="source")
    assert "begun with another preset.shared.vqgan" in outcome(begin, "source", vqgan="last")
    assert "begun with another preset.shared.store" in outcome(begin, "last", store="source", transformer="source")
    wb.run.path.rename(results / "moved")  # what was taken is the run's own
    for run in ("other", "last"):
        assert Workbench.reopen(run, data=str(images_folder)).train_transformer() == losses
    assert "neither a run, a folder of weights nor RELEASE=FILE" in outcome(begun.train_vqgan)


def test_a_wrong_source_begins_nothing(source, results, images_folder, tmp_path):
    wb, begin = source
    shutil.copytree(wb.run.path / "vqgan", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    (results / "empty").mkdir()
    shutil.copytree(wb.run.path / "store", results / "foreign" / "store")
    meta = results / "foreign" / "store" / "train" / "meta.json"
    write_json(meta, read_json(meta) | {"clip_hash": "another"})
    before = sorted(results.rglob("*"))
    for shared, sentence in (
        ({"vqgan": "none"}, "'none' is neither a run, a folder of weights nor RELEASE=FILE"),
        ({"vqgan": "hfai-gpt-coco=gpt_coco.pt"}, "neither a run"),  # no VQGAN
        ({"vqgan": "taming-f16-1024=/nowhere"}, "last.ckpt is missing: get it from github.com/CompVis"),
        ({"vqgan": "empty"}, "empty/vqgan/config.json is missing"),
        ({"vqgan": str(tmp_path / "cut")}, "is damaged"),
        ({"vqgan": "source/transformer"}, "VQGANConfig"),
        ({"vqgan": "x\0" * 3_000}, "neither a run"),
        ({"vqgan": "source", "store": "empty"}, "holds no finished token store"),
        ({"vqgan": "shapes", "store": "source"}, "is of another VQGAN"),
        ({"vqgan": "shapes", "transformer": "source"}, "was trained with"),
        ({"store": "source", "parts": {"transformer_train": {"flip": False}}}, "made from other images"),
        ({"vqgan": "source", "store": "foreign"}, "is of another CLIP (another, not"),
    ):
        assert sentence in outcome(begin, "r", **shared), shared
    next(images_folder.glob("*.png")).unlink()
    assert "made from other images" in outcome(begin, "r", store="source")
    assert sorted(results.rglob("*")) == before


def test_a_source_has_one_name_from_anywhere(results, tmp_path, monkeypatch):
    (results / "a,b=1" / "vqgan").mkdir(parents=True)
    (tmp_path / "last.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    release, folder = "taming-f16-1024=", str(tmp_path)
    for name, others in {
        "a,b=1": ("a,b=1", "results/a,b=1", f"{results}/a,b=1/vqgan/.."),
        folder: (".", folder),
        f"{release}{folder}/last.ckpt": (f"{release}last.ckpt", f"{release}{folder}/last.ckpt"),
        "data/shapes_generator": ("shapes", "data/shapes_generator", str(DATA / "shapes_generator")),
    }.items():
        assert {named_sources(SharedConfig(other)).vqgan for other in others} == {name}
    assert named_sources(SharedConfig(store="a,b=1")) == SharedConfig("a,b=1", "a,b=1")
    (results / "fashion").mkdir()  # as in a clone, without weights
    assert named_sources(SharedConfig("fashion")).vqgan == "data/fashion_generator"
    (results / "fashion" / "vqgan").mkdir()
    assert named_sources(SharedConfig("fashion")).vqgan == "fashion"
