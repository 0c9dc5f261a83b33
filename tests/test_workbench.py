import pytest
import torch

from clipgen_lib.clip_embed import photo_notice
from clipgen_lib.data.batches import ordered_batches
from clipgen_lib.data.images import to_float
from clipgen_lib.metrics.captions import split_prompts
from clipgen_lib.runtime import runs
from clipgen_lib.runtime.runs import DATA, ClipgenError, open_run, read_json, write_json
from clipgen_lib.text_to_image import TextToImage
from clipgen_lib.workbench import Workbench, clip_fields


def test_a_run_from_before_a_field_existed_had_its_default(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    wb = Workbench.open("smoke", "old")
    config = read_json(wb.run.path / "config.json")
    del config["preset"]["sample"]["neighbours"]  # 0 is the default and the preset's
    write_json(wb.run.path / "config.json", config)
    assert Workbench.open("smoke", "old").preset == wb.preset
    del config["preset"]["sample"]["top_p"]  # the default is 1, the preset's is not
    write_json(wb.run.path / "config.json", config)
    with pytest.raises(ClipgenError, match=r"begun with another preset\.sample\.top_p"):
        Workbench.open("smoke", "old")


@pytest.mark.parametrize(
    "entries",
    [
        {"preset": None},
        {"preset": {}},
        {"preset": {"name": "smoke", "clip": None}},
        {"preset": {"name": 5}},
        {"data": 5},
        {"seed": None},
    ]
    + [{"preset": {"name": "smoke", "clip": {"name": ["shapes"]}}}],
)
def test_a_run_that_was_begun_with_nonsense_is_one_sentence(tmp_path, monkeypatch, entries):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    monkeypatch.setattr("clipgen_lib.workbench.RESULTS", tmp_path)
    path = Workbench.open("smoke", "odd").run.path / "config.json"
    whole = read_json(path)
    write_json(path, {**whole, **entries})
    for call in (lambda: Workbench.open("smoke", "odd"), lambda: Workbench.reopen("odd")):
        with pytest.raises(ClipgenError, match="config.json lacks the preset, data or seed"):
            call()
    for data in ("a\0b", "\ud800", "x\0" * 10_000):
        write_json(path, {**whole, "data": data})
        with pytest.raises(ClipgenError, match="is no path"):
            Workbench.reopen("odd")
    write_json(path, whole)
    with pytest.raises(ClipgenError, match="begun with another data"):
        Workbench.reopen("odd", data="~nobody-of-that-name/images")


def test_a_clip_is_a_folder_or_a_model_and_its_weights(tmp_path):
    assert clip_fields("shapes") == {"name": "shapes", "pretrained": None}
    assert clip_fields("ViT-B-32-quickgelu/openai") == {"name": "ViT-B-32-quickgelu", "pretrained": "openai"}
    assert (
        clip_fields("data/shapes_clip")
        == clip_fields(str(DATA / "shapes_clip"))
        == {"name": "data/shapes_clip", "pretrained": None}
    )
    assert clip_fields(str(tmp_path)) == {"name": str(tmp_path), "pretrained": None}
    with pytest.raises(ClipgenError, match="train-clip"):
        clip_fields("results/absent/clip")
    (tmp_path / "w.pt").write_bytes(b"")
    assert clip_fields(f"ViT-B-32/{tmp_path / 'w.pt'}") == {"name": "ViT-B-32", "pretrained": str(tmp_path / "w.pt")}


def test_the_mean_of_texts_needs_texts(world, preset, tmp_path):
    wb = Workbench(open_run("r", tmp_path), preset, str(world), 0, "cpu")
    expected = wb.clip.texts([texts[0] for texts in wb.images().captions]).mean(0)
    assert torch.allclose(wb.text_mean(), expected, atol=1e-6)
    pictures, texts = wb.text_image_pairs(5)
    assert pictures.shape == texts.shape == (5, wb.clip.dim)
    assert torch.allclose(texts[2], wb.clip.texts([wb.images("val").captions[2][0]])[0], atol=1e-6)
    (tmp_path / "bare").mkdir()
    for path in sorted((world / "train").glob("*.png")):
        (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    bare = Workbench(open_run("b", tmp_path), preset, str(tmp_path / "bare"), 0, "cpu")
    with pytest.raises(ClipgenError, match="has no captions"):
        bare.text_mean()


@pytest.fixture
def opened(world, preset, tmp_path, vqgan, transformer, clip, monkeypatch):
    """A workbench on images of a folder, with a generator that is ready."""
    generator = TextToImage.from_parts(vqgan, transformer, clip, {"name": "shapes", "pretrained": None}, preset.sample)
    monkeypatch.setattr(Workbench, "generator", lambda self: generator)

    def open_folder(captions="", folder="images"):
        root = tmp_path / folder
        root.mkdir()
        for path in sorted((world / "train").glob("*.png")):
            (root / path.name).write_bytes(path.read_bytes())
            if captions:
                (root / path.with_suffix(".txt").name).write_text(captions)
        return Workbench(open_run(f"run-{folder}", tmp_path), preset, str(root), 0, "cpu")

    return open_folder


def test_prompts_of_ones_own_come_first(opened):
    wb = opened("a caption\n")
    own = wb.own_prompts(" a dog |a  red car||a dog")
    assert own.prompts == own.titles == ["a dog", "a red car"] and own.source == "prompts of your own"
    sheet = wb.draw_prompts("a dog|a red car", each=3, guidance=1.5)
    assert sheet.images.shape == (6, 3, 64, 64) and sheet.columns == 6
    assert sheet.titles == ["a dog"] * 3 + ["a red car"] * 3
    again = wb.generator()("a red car", n=3, seed=0, guidance=1.5)[0]
    assert torch.allclose(sheet.images[3:], again, atol=1e-5)  # image j has seed + j
    assert wb.run.summary()["prompts"] == {"source": "prompts of your own", "asked": ["a dog", "a red car"]}


def test_captions_are_prompts_where_none_are_given(opened):
    own = opened("a thing\nanother thing\n").own_prompts()
    assert sorted(own.prompts) == ["a thing", "another thing"] and own.source == "captions of the val split"
    wb = opened("a thing\n", "bare-val")
    for path in wb.images("val").paths:
        path.with_suffix(".txt").unlink()
    assert wb.own_prompts() == (["a thing"], ["a thing"], "captions of the train split", None)


def test_without_captions_pictures_are_prompts(opened):
    wb = opened()
    own = wb.own_prompts(n=12)
    assert own.prompts.shape == (6, wb.clip.dim) and own.pictures.shape == (6, 3, 64, 64)
    assert own.titles == [path.name for path in wb.images("val").paths[:6]] and "no captions" in own.source
    assert torch.allclose(own.prompts[2], wb.clip.images(own.pictures[2:3])[0], atol=1e-5)
    sheet = wb.draw_prompts(n=12)
    assert (
        sheet.images.shape == (30, 3, 64, 64) and sheet.columns == 10 and torch.equal(sheet.images[5], own.pictures[1])
    )
    assert sheet.titles[5:10] == [own.titles[1]] + ["variation"] * 4


def test_a_text_of_bars_holds_no_prompt():
    assert split_prompts("") == []
    with pytest.raises(ClipgenError, match="a dog|a red car"):
        split_prompts(" | ")


def test_only_the_shapes_clip_on_photos_is_worth_a_word(opened):
    assert "knows coloured shapes, not photos" in opened().notice
    assert photo_notice("shapes", "shapes") == photo_notice("ViT-B-32", "/my/photos") == ""
    assert photo_notice("data/shapes_clip", "/my/photos") == photo_notice("shapes", "/my/photos")


def test_too_few_pictures_are_told_before_training(opened):
    wb = opened()
    for path in [*wb.images("train").paths, *wb.images("val").paths][6:]:
        path.unlink()
    with pytest.raises(ClipgenError, match="3 images to train on and 3 to test on: give at least 4 of each"):
        wb.train_vqgan()


def test_each_class_shows_its_photos_and_what_is_drawn_for_its_name(opened, world, preset, tmp_path):
    paths = sorted((world / "train").glob("*.png"))
    for split, name, of in (
        ("train", "a_cat", paths[:4]),
        ("train", "dog", paths[4:8]),
        ("val", "a_cat", paths[8:11]),
        ("val", "dog", paths[11:13]),
    ):
        (tmp_path / "classes" / split / name).mkdir(parents=True)
        for path in of:
            (tmp_path / "classes" / split / name / path.name).write_bytes(path.read_bytes())
    wb = Workbench(open_run("c", tmp_path), preset, str(tmp_path / "classes"), 0, "cpu")
    rows = wb.class_rows(real=2, drawn=3)
    assert list(rows) == ["a cat", "dog"] and rows["dog"].shape == (5, 3, 64, 64)
    batch = next(ordered_batches(wb.images("val"), [3, 4], 2))[1]
    assert torch.equal(rows["dog"][:2], to_float(batch))
    assert torch.allclose(rows["dog"][2:], wb.generator()("a photo of a dog", n=3, seed=0)[0], atol=1e-5)
    assert list(wb.class_rows(real=3, drawn=1)) == ["a cat"] and opened().class_rows() == {}
