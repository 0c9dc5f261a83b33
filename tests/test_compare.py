import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clipgen_lib.config import load_preset
from clipgen_lib.runtime.checkpoints import save_weights
from clipgen_lib.runtime.runs import ROOT, ClipgenError, open_run, read_json, write_json
from clipgen_lib.study import baselines, compare
from clipgen_lib.study.compare import Recipe, Table
from clipgen_lib.vqgan import VQGAN
from clipgen_lib.workbench import Workbench


@pytest.fixture(scope="module")
def wb(world, preset, vqgan, tmp_path_factory):
    """A run with an untrained tokenizer and its stores, on a world of 40 scenes read as a COCO root."""
    small = replace(
        preset,
        evaluate=replace(preset.evaluate, n=8, n_oracle=2, batch_size=8, blur=(0, 1)),
        fusion_gan=replace(preset.fusion_gan, channels=4, steps=2, batch_size=4, log_every=1),
        vqgan_clip=replace(preset.vqgan_clip, steps=2, cutouts=2, batch_size=4),
    )
    wb = Workbench(open_run("base", tmp_path_factory.mktemp("runs")), small, str(world))
    save_weights(wb.run.path / "vqgan", vqgan)
    wb.extract()
    return wb


ABLATION = Table(
    "ablation",
    (
        Recipe("plain", "nothing", seeds=(0, 1)),
        Recipe("guided", "sampling alone", sample={"guidance": 2.0}),
        Recipe("near and shifted", "of the nearest, moved", sample={"neighbours": 2, "shift": True}, text="unpaired"),
        Recipe("centred", "means off", train={"centre": True}, text="unpaired"),
    ),
    8,
    4,
    ("caps", "fid_0"),
)


@pytest.fixture(scope="module")
def made(wb, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    compare.run_table(wb, ABLATION, folder, steps=2)
    return folder


@pytest.fixture
def results(made, tmp_path):
    """A copy of results with the table ABLATION."""
    return Path(shutil.copytree(made, tmp_path / "results"))


def test_rows_are_trained_once_evaluated_and_kept(wb, results):
    table = compare.read_table(results / "ablation", ABLATION.recipes)
    assert [entry["name"] for entry in table] == [row.name for row in ABLATION.recipes]
    assert table[0]["seeds"] == [0, 1] and table[0]["fid_0"]["std"] > 0 and table[1]["fid_0"]["std"] == 0
    rows = [read_json(results / "ablation" / "rows" / f"plain-{seed}.json") for seed in (0, 1)]
    assert table[0]["caps"]["mean"] == pytest.approx(sum(compare.metrics(row)["caps"] for row in rows) / 2)
    trainings = list((results / "ablation" / "trainings").iterdir())
    assert len(trainings) == 3  # two seeds and centred: the others only sample otherwise
    before = {path: path.stat().st_mtime_ns for path in (results / "ablation").rglob("*.safetensors")}
    assert compare.run_table(wb, ABLATION, results, steps=2) == table
    assert before == {path: path.stat().st_mtime_ns for path in (results / "ablation").rglob("*.safetensors")}
    lines = compare.table_text(table, ABLATION.columns).splitlines()
    assert "±" in lines[1] and "±" not in lines[2]
    path = results / "ablation" / "rows" / "guided-0.json"
    older = read_json(path)
    del older["recipe"]["sample"]["shift"]  # written before the field existed
    write_json(path, older)
    assert compare.run_table(wb, ABLATION, results, steps=2) == table and read_json(path) == older
    assert list(compare.image_files(results / "ablation", ABLATION.recipes)) == [row.name for row in ABLATION.recipes]


def test_rows_of_another_recipe_or_run_are_not_mixed_in(wb, results):
    path, names = results / "ablation" / "rows" / "guided-0.json", [row.name for row in ABLATION.recipes]
    stale = read_json(path)
    stale["recipe"]["sample"]["guidance"] = 3.0
    write_json(path, stale)
    table = compare.read_table(results / "ablation", ABLATION.recipes)
    assert [entry["name"] for entry in table] == [name for name in names if name != "guided"]
    stale["recipe"]["vqgan"] = "another"
    write_json(path, stale)
    with pytest.raises(ClipgenError, match="rows of another run"):
        compare.run_table(wb, ABLATION, results, steps=2)


def test_a_row_is_measured_again_when_its_judges_change(wb, results):
    path = results / "ablation" / "rows" / "guided-0.json"
    before = path.stat().st_mtime_ns
    compare.run_table(wb, replace(ABLATION, n_captions=6), results, steps=2, only=["guided"])
    assert path.stat().st_mtime_ns > before and read_json(path)["evaluation"]["n"] == 6


def test_every_system_runs_in_the_same_harness(wb, tmp_path):
    table = compare.run_table(wb, compare.TABLES["systems"], tmp_path, steps=2)
    assert [entry["name"] for entry in table] == [row.name for row in compare.TABLES["systems"].recipes]
    for entry in table:
        assert entry["fid_0"]["mean"] > 0 and -1 <= entry["caps"]["mean"] <= 1
        assert entry["seconds_per_image"]["mean"] > 0
        assert ("seconds_train" in entry) == (entry["name"] not in ("retrieval", "VQGAN-CLIP"))


def test_an_unknown_row_is_one_sentence(wb, tmp_path):
    with pytest.raises(ClipgenError, match="no row 'plane'"):
        compare.run_table(wb, ABLATION, tmp_path, only=["plane"])


def test_pairs_are_each_caption_of_unmirrored_images(wb):
    store, captions = wb.store(), wb.images().captions
    texts = baselines.paired_store(store, captions, wb.clip, words=False)
    words = baselines.paired_store(store, captions, wb.clip, words=True)
    assert store.meta["flip"] and len(store) == 80 and len(texts) == len(words) == sum(map(len, captions)) == 200
    assert torch.equal(texts.tokens(slice(5, 10)), store.tokens(slice(1, 2)).expand(5, -1))
    assert torch.allclose(texts.embeds(slice(5, 10)), wb.clip.texts(list(captions[1])), atol=1e-3)
    assert torch.equal(words.embeds(slice(5, 10)), wb.clip.tokenizer(list(captions[1])))


def test_every_row_changes_the_plain_recipe_by_what_it_names(wb):
    plain = compare.configs_of(wb, compare.TABLES["ablation"].recipes[0])
    assert plain["train"].noise_cos == 1 and plain["sample"].guidance == 1 and plain["train"].condition_dropout == 0
    assert len({row.name for row in compare.TABLES["ablation"].recipes}) == len(compare.TABLES["ablation"].recipes)
    for row in compare.TABLES["ablation"].recipes[1:]:
        made = compare.configs_of(wb, row)
        for part in ("transformer", "train", "sample"):
            changed = {k for k, v in vars(made[part]).items() if v != vars(plain[part])[k]}
            assert changed == set(getattr(row, part))
        assert made != plain
    words = next(row for row in compare.TABLES["systems"].recipes if row.system == "supervised")
    assert compare.configs_of(wb, words)["transformer"].condition_tokens == wb.clip.tokenizer.context_length


def test_the_laptop_preset_is_the_best_row():
    laptop, named = (
        load_preset("laptop"),
        next(row for row in compare.TABLES["ablation"].recipes if row.name == "best, no rerank"),
    )
    parts = {"transformer": laptop.transformer, "train": laptop.transformer_train, "sample": laptop.sample}
    for name, part in parts.items():
        for key, value in {**compare.PLAIN[name], **getattr(named, name)}.items():
            assert getattr(part, key) == value, key


def test_photos_are_judged_by_classes(world, preset, clip, tmp_path):
    """Class folders, with a classifier of the real images beside the run."""
    data = tmp_path / "classes"
    for split, n in (("train", 24), ("val", 8)):
        for i, name in enumerate(("red", "blue")):
            (data / split / name).mkdir(parents=True)
            for path in sorted((world / f"{split}").glob("*.png"))[i::2][: n // 2]:
                shutil.copy(path, data / split / name)
    small = replace(
        preset,
        evaluate=replace(preset.evaluate, n=8, batch_size=8, blur=(0, 1)),
        classifier=replace(preset.classifier, width=8, steps=3, batch_size=8, warmup=1),
    )
    wb = Workbench(open_run("base", tmp_path), small, str(data))
    torch.manual_seed(0)
    save_weights(wb.run.path / "vqgan", VQGAN(preset.vqgan).eval())
    wb.extract()
    assert wb.train_classifier() == wb.run.summary()["classifier"] and wb.run.summary()["classifier"]["n"] == 8
    entry = compare.run_table(wb, compare.TABLES["photos"], tmp_path, steps=2, only=["plain", "retrieval"])[0]
    real = wb.run.summary()["classifier"]["accuracy"]
    assert entry["class_accuracy_real"]["mean"] == real and 0 <= entry["class_accuracy"]["mean"] <= 1
    assert "oracle_error" not in entry and (tmp_path / "photos" / "table.json").is_file()


def test_a_val_split_without_classes_is_one_sentence(tmp_path, preset, world):
    for name in ("train/red", "train/blue", "val"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for path in sorted((world / "train").glob("*.png"))[:2]:
            shutil.copy(path, tmp_path / "data" / name)
    wb = Workbench(open_run("r", tmp_path), preset, str(tmp_path / "data"))
    with pytest.raises(ClipgenError, match="no classes to try a classifier on"):
        wb.train_classifier()


@pytest.mark.parametrize("name", compare.TABLES)
def test_committed_tables_are_those_of_their_rows(name):
    table = compare.read_table(ROOT / "results" / name, compare.TABLES[name].recipes)
    assert table == json.loads((ROOT / "results" / name / "table.json").read_text())
    assert [row["name"] for row in table] == [recipe.name for recipe in compare.TABLES[name].recipes]
