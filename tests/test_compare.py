import json
import re
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
from clipgen_lib.workbench import Workbench

RECIPES = (
    Recipe("plain", "nothing", seeds=(0, 1)),
    Recipe("guided", "sampling alone", sample={"guidance": 2.0}),
    Recipe("near and shifted", "of the nearest, moved", sample={"neighbours": 2, "shift": True}, text="unpaired"),
    Recipe("centred", "means off", train={"centre": True}, text="unpaired"),
)
TABLE = Table("ablation", RECIPES, n_captions=8, n_oracle=4, columns=("caps", "fid_0"))
COMMITTED = compare.TABLES


def extracted(folder, preset, vqgan, data):
    """A run whose every part is small, with an untrained tokenizer and its stores."""
    preset = replace(
        preset,
        evaluate=replace(preset.evaluate, n=8, n_oracle=2, batch_size=8, blur=(0, 1)),
        fusion_gan=replace(preset.fusion_gan, channels=4, steps=2, batch_size=4, log_every=1),
        vqgan_clip=replace(preset.vqgan_clip, steps=2, cutouts=2, batch_size=4),
        classifier=replace(preset.classifier, width=8, steps=3, batch_size=8, warmup=1),
    )
    wb = Workbench(open_run("base", folder), preset, str(data))
    save_weights(wb.run.path / "vqgan", vqgan)
    wb.extract()
    return wb


@pytest.fixture(scope="module")
def wb(world, preset, vqgan, tmp_path_factory):
    """On a world of 40 scenes read as a COCO root."""
    return extracted(tmp_path_factory.mktemp("runs"), preset, vqgan, world)


@pytest.fixture(scope="module")
def made(wb, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    compare.run_table(wb, TABLE, folder, steps=2)
    return folder


@pytest.fixture
def table(made, tmp_path):
    """A copy of the folder of TABLE."""
    return Path(shutil.copytree(made, tmp_path / "results")) / "ablation"


def names(entries):
    return [entry["name"] for entry in entries]


def test_rows_are_trained_once_evaluated_and_kept(wb, table):
    entries = compare.read_table(table, RECIPES)
    assert names(entries) == [recipe.name for recipe in RECIPES] == list(compare.image_files(table, RECIPES))
    assert entries[0]["seeds"] == [0, 1] and entries[0]["fid_0"]["std"] > 0 and entries[1]["fid_0"]["std"] == 0
    rows = [read_json(table / "rows" / f"plain-{seed}.json") for seed in (0, 1)]
    assert entries[0]["caps"]["mean"] == pytest.approx(sum(compare.metrics(row)["caps"] for row in rows) / 2)
    assert len(list((table / "trainings").iterdir())) == 3  # two seeds and centred: the others only sample otherwise
    lines = compare.table_text(entries, TABLE.columns).splitlines()
    assert "±" in lines[1] and "±" not in lines[2]
    path = table / "rows" / "guided-0.json"
    older = read_json(path)
    del older["recipe"]["sample"]["shift"]  # written before the field existed
    write_json(path, older)
    before = {path: path.stat().st_mtime_ns for path in table.rglob("*.safetensors")}
    assert compare.run_table(wb, TABLE, table.parent, steps=2) == entries and read_json(path) == older
    assert before == {path: path.stat().st_mtime_ns for path in table.rglob("*.safetensors")}


def test_rows_of_another_recipe_or_run_are_not_mixed_in(wb, table):
    path = table / "rows" / "guided-0.json"
    stale = read_json(path)
    stale["recipe"]["sample"]["guidance"] = 3.0
    write_json(path, stale)
    assert names(compare.read_table(table, RECIPES)) == ["plain", "near and shifted", "centred"]
    stale["recipe"]["vqgan"] = "another"
    write_json(path, stale)
    with pytest.raises(ClipgenError, match="rows of another run"):
        compare.run_table(wb, TABLE, table.parent, steps=2)


def test_a_row_is_measured_again_when_its_judges_change(wb, table):
    path = table / "rows" / "guided-0.json"
    before = path.stat().st_mtime_ns
    compare.run_table(wb, replace(TABLE, n_captions=6), table.parent, steps=2, only=["guided"])
    assert path.stat().st_mtime_ns > before and read_json(path)["evaluation"]["n"] == 6


def test_every_system_runs_in_the_same_harness(wb, tmp_path):
    entries = compare.run_table(wb, COMMITTED["systems"], tmp_path, steps=2)
    assert names(entries) == [recipe.name for recipe in COMMITTED["systems"].recipes]
    for entry in entries:
        assert entry["fid_0"]["mean"] > 0 and -1 <= entry["caps"]["mean"] <= 1
        assert entry["seconds_per_image"]["mean"] > 0
        assert ("seconds_train" in entry) == (entry["name"] not in ("retrieval", "VQGAN-CLIP"))


def test_an_unknown_row_is_one_sentence(wb, tmp_path):
    with pytest.raises(ClipgenError, match="no row 'plane'"):
        compare.run_table(wb, TABLE, tmp_path, only=["plane"])


def test_pairs_are_each_caption_of_unmirrored_images(wb):
    store, captions = wb.store(), wb.images().captions
    texts, words = (baselines.paired_store(store, captions, wb.clip, words) for words in (False, True))
    assert store.meta["flip"] and len(store) == 80 and len(texts) == len(words) == sum(map(len, captions)) == 200
    assert torch.equal(texts.tokens(slice(5, 10)), store.tokens(slice(1, 2)).expand(5, -1))
    assert torch.allclose(texts.embeds(slice(5, 10)), wb.clip.texts(list(captions[1])), atol=1e-3)
    assert torch.equal(words.embeds(slice(5, 10)), wb.clip.tokenizer(list(captions[1])))


def test_every_row_changes_the_plain_recipe_by_what_it_names(wb):
    first, *others = COMMITTED["ablation"].recipes
    plain = compare.configs_of(wb, first)
    assert plain["train"].noise_cos == 1 and plain["sample"].guidance == 1 and plain["train"].condition_dropout == 0
    assert len({first.name, *(row.name for row in others)}) == 1 + len(others)
    for row in others:
        configs = compare.configs_of(wb, row)
        for part in ("transformer", "train", "sample"):
            changed = {k for k, v in vars(configs[part]).items() if v != vars(plain[part])[k]}
            assert changed == set(getattr(row, part))
        assert configs != plain
    words = next(row for row in COMMITTED["systems"].recipes if row.system == "supervised")
    assert compare.configs_of(wb, words)["transformer"].condition_tokens == wb.clip.tokenizer.context_length


def test_the_laptop_preset_is_the_best_row(wb):
    laptop = load_preset("laptop")
    best = next(row for row in COMMITTED["ablation"].recipes if row.name == "best, no rerank")
    configs = compare.configs_of(replace(wb, preset=laptop), best)
    parts = laptop.transformer, laptop.transformer_train, laptop.sample
    assert (configs["transformer"], configs["train"], configs["sample"]) == parts


def test_photos_are_judged_by_classes(preset, vqgan, class_folders, tmp_path):
    """Class folders, with a classifier of the real images beside the run."""
    data = class_folders({"train/red": 12, "train/blue": 12, "val/red": 4, "val/blue": 4})
    wb = extracted(tmp_path, preset, vqgan, data)
    assert wb.train_classifier() == wb.run.summary()["classifier"] and wb.run.summary()["classifier"]["n"] == 8
    entry = compare.run_table(wb, COMMITTED["photos"], tmp_path, steps=2, only=["plain", "retrieval"])[0]
    real = wb.run.summary()["classifier"]["accuracy"]
    assert entry["class_accuracy_real"]["mean"] == real and 0 <= entry["class_accuracy"]["mean"] <= 1
    assert "oracle_error" not in entry and (tmp_path / "photos" / "table.json").is_file()


def test_a_val_split_without_classes_is_one_sentence(preset, class_folders, tmp_path):
    data = class_folders({"train/red": 2, "train/blue": 2, "val": 2})
    with pytest.raises(ClipgenError, match="no classes to try a classifier on"):
        Workbench(open_run("r", tmp_path), preset, str(data)).train_classifier()


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_tables_are_those_of_their_rows_and_in_the_text(name):
    """A block of the text is some lines of its table; `curves` are drawn."""
    recipes = COMMITTED[name].recipes
    entries = compare.read_table(ROOT / "results" / name, recipes)
    assert entries == json.loads((ROOT / "results" / name / "table.json").read_text())
    assert names(entries) == [recipe.name for recipe in recipes]
    blocks = re.findall(r"```\n( +\w.*?)\n```", (ROOT / "results" / "README.md").read_text(), re.DOTALL)
    lines = compare.table_text(entries, COMMITTED[name].columns).splitlines()
    found = [block.splitlines() for block in blocks if block.startswith(lines[0])]
    assert (name == "curves") == (not found)
    assert all(len(block) > 5 and set(block) <= set(lines) for block in found)
