import pytest
import torch

from clipgen_lib import runs
from clipgen_lib.runs import DATA, ClipgenError, open_run, read_json, write_json
from clipgen_lib.workbench import Workbench, clip_fields


def test_a_run_from_before_a_field_existed_had_its_default(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    bench = Workbench.open("smoke", "old")
    config = read_json(bench.run.path / "config.json")
    del config["preset"]["sample"]["neighbours"]  # 0 is the default and the preset's
    write_json(bench.run.path / "config.json", config)
    assert Workbench.open("smoke", "old").preset == bench.preset
    del config["preset"]["sample"]["top_p"]  # the default is 1, the preset's is not
    write_json(bench.run.path / "config.json", config)
    with pytest.raises(ClipgenError, match=r"begun with another preset\.sample\.top_p"):
        Workbench.open("smoke", "old")


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


def test_the_mean_of_texts_needs_texts(world, preset, tmp_path):
    bench = Workbench(open_run("r", tmp_path), preset, str(world), 0, "cpu")
    expected = bench.clip.texts([texts[0] for texts in bench.images().captions]).mean(0)
    assert torch.allclose(bench.text_mean(), expected, atol=1e-6)
    pictures, texts = bench.text_image_pairs(5)
    assert pictures.shape == texts.shape == (5, bench.clip.dim)
    assert torch.allclose(texts[2], bench.clip.texts([bench.images("val").captions[2][0]])[0], atol=1e-6)
    (tmp_path / "bare").mkdir()
    for path in sorted((world / "train").glob("*.png")):
        (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    bare = Workbench(open_run("b", tmp_path), preset, str(tmp_path / "bare"), 0, "cpu")
    with pytest.raises(ClipgenError, match="has no captions"):
        bare.text_mean()
