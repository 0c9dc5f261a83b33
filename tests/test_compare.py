import itertools
import json
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import same_weights
from scipy.stats import ttest_ind

from clipgen_lib.config import Preset, changed, load_preset
from clipgen_lib.runtime import runs
from clipgen_lib.runtime.checkpoints import save_weights
from clipgen_lib.runtime.runs import ROOT, ClipgenError, open_run, read_json
from clipgen_lib.study import baselines, compare
from clipgen_lib.study.compare import Recipe, Table
from clipgen_lib.workbench import Workbench, begun_with

RECIPES = (
    Recipe("plain", "nothing", seeds=(0, 1)),
    Recipe("guided / 2", "sampling alone", sample={"guidance": 2.0}),
    Recipe("near and shifted", "of the nearest, moved", sample={"neighbours": 2, "align": "shift"}, text="unpaired"),
    Recipe("half", "less noise", transformer_train={"noise_cos": 0.5}, text="unpaired"),
)
TABLE = Table("ablation", RECIPES, n_captions=8, n_oracle=4, columns=("caps", "fid_0"))
COMMITTED = compare.TABLES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder for runs in place of the project's results/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "RESULTS", tmp_path_factory.mktemp("results"))
        yield runs.RESULTS


def extracted(preset, vqgan, name, data):
    """A run whose every part is small, with an untrained tokenizer and its stores."""
    small = {
        "vqgan_train": {"perceptual": "none"},
        "evaluate": {"n": 8, "n_oracle": 2, "batch_size": 8, "blur": (0, 1)},
        "fusion_gan": {"channels": 4, "steps": 2, "batch_size": 4, "log_every": 1},
        "vqgan_clip": {"steps": 2, "cutouts": 2, "batch_size": 4},
        "classifier": {"width": 8, "steps": 3, "batch_size": 8, "warmup": 1},
    }
    wb = Workbench.open(changed(preset, small), name, str(data))
    save_weights(wb.run.path / "vqgan", vqgan)
    wb.extract()
    return wb


@pytest.fixture(scope="module")
def wb(results, preset, vqgan, world):
    """On a world of 40 scenes read as a COCO root."""
    return extracted(preset, vqgan, "base", world)


@pytest.fixture(scope="module")
def made(wb):
    return compare.run_table(wb, TABLE, steps=2)


def names(entries):
    return [entry["name"] for entry in entries]


def test_rows_are_trained_once_evaluated_and_kept(wb, made, results):
    table = results / "ablation"
    assert names(made) == [recipe.name for recipe in RECIPES] == list(compare.image_files(table, RECIPES))
    assert made == compare.read_table(table, RECIPES) == json.loads((table / "table.json").read_text())
    assert made[0]["seeds"] == [0, 1] and made[0]["fid_0"]["std"] > 0 and made[1]["fid_0"]["std"] == 0
    caps = [compare.metrics(read_json(table / f"plain-{seed}" / "summary.json"))["caps"] for seed in (0, 1)]
    assert made[0]["caps"]["mean"] == pytest.approx(sum(caps) / 2)
    trained = {path.parent.name for path in table.glob("*/checkpoints")}
    assert trained == {"plain-0", "plain-1", "half-0"}  # the others only sample otherwise
    lines = compare.table_text(made, TABLE.columns).splitlines()
    assert "±" in lines[1] and "±" not in lines[2]
    (table / "guided-2-0" / "summary.json").unlink()  # this row alone is made again, to the same numbers
    before = {path: path.stat().st_mtime_ns for path in table.rglob("summary.json")}
    again = compare.run_table(wb, TABLE, steps=2)
    assert again[1]["caps"] == made[1]["caps"] and again[0] == made[0] and again[2:] == made[2:]
    assert before == {path: path.stat().st_mtime_ns for path in before} and len(before) == 4


def test_rows_of_another_recipe_or_run_are_not_mixed_in(wb, made, preset, vqgan, world, monkeypatch):
    guided, paired = replace(RECIPES[1], sample={"guidance": 3.0}), replace(RECIPES[0], text="paired")
    other = replace(TABLE, recipes=(RECIPES[0], guided, *RECIPES[2:]))
    assert names(compare.run_table(wb, other, steps=2, only=["plain"])) == ["plain", "near and shifted", "half"]
    for base, table, steps, another in (
        (wb, other, 2, "sample.guidance"),
        (wb, replace(TABLE, n_captions=6), 2, "evaluate.n"),
        (wb, replace(TABLE, recipes=(paired,)), 2, "preset .*clip-gen, not .*paired"),
        (wb, TABLE, 3, "transformer_train.steps"),
        (extracted(preset, vqgan, "other", world), TABLE, 2, "shared.store"),
    ):
        with pytest.raises(ClipgenError, match=f"begun with another .*{another}.*: choose another run name or delete"):
            compare.run_table(base, table, steps)
    monkeypatch.setattr(Workbench, "store", lambda _: SimpleNamespace(meta={"hash": "another"}))
    with pytest.raises(ClipgenError, match="rows of another run"):
        compare.run_table(wb, TABLE, steps=2)


def test_every_system_runs_in_the_same_harness(wb):
    entries = compare.run_table(wb, COMMITTED["systems"], steps=2)
    assert names(entries) == [recipe.name for recipe in COMMITTED["systems"].recipes]
    for entry in entries:
        assert entry["fid_0"]["mean"] > 0 and -1 <= entry["caps"]["mean"] <= 1
        assert entry["seconds_per_image"]["mean"] > 0
        trained = {"GAN": "gan", "retrieval": None, "VQGAN-CLIP": None}.get(entry["name"], "transformer")
        assert [key for key in ("gan", "transformer") if f"seconds_{key}" in entry] == [trained] * bool(trained)


def test_one_row_alone_takes_the_training_that_it_shares(wb, results):
    (entry,) = compare.run_table(wb, replace(TABLE, name="alone"), steps=2, only=["guided / 2"])
    assert entry["name"] == "guided / 2" and not (results / "alone" / "plain-0" / "generated").exists()
    assert {path.parent.name for path in (results / "alone").glob("*/checkpoints")} == {"plain-0"}
    with pytest.raises(ClipgenError, match="no row 'plane'"):
        compare.run_table(wb, TABLE, only=["plane"])


def test_pairs_are_each_caption_of_unmirrored_images(wb):
    store, captions = wb.store(), wb.images().captions
    texts, words = (baselines.paired_store(store, captions, wb.clip, words) for words in (False, True))
    assert store.meta["flip"] and len(store) == 80 and len(texts) == len(words) == sum(map(len, captions)) == 200
    assert torch.equal(texts.tokens(slice(5, 10)), store.tokens(slice(1, 2)).expand(5, -1))
    assert torch.allclose(texts.embeds(slice(5, 10)), wb.clip.texts(list(captions[1])), atol=1e-3)
    assert torch.equal(words.embeds(slice(5, 10)), wb.clip.tokenizer(list(captions[1])))


def test_every_row_changes_the_plain_recipe_by_what_it_names(wb):
    table = COMMITTED["ablation"]
    first, *others = table.recipes
    plain = compare.preset_of(wb, table, first)
    train = plain.transformer_train
    assert (train.noise_cos, train.condition_dropout, plain.sample.guidance) == (1, 0, 1)
    assert len({first.name, *(row.name for row in others)}) == 1 + len(others)
    for row in others:
        preset = compare.preset_of(wb, table, row)
        wanted = [f"{part}.{name}" for part in compare.PLAIN for name in getattr(row, part)]
        found = runs.differences(asdict(plain), asdict(replace(preset, name=plain.name)))
        assert found == sorted(wanted) and preset != plain
    words = next(row for row in COMMITTED["systems"].recipes if row.system == "supervised")
    assert compare.preset_of(wb, table, words).transformer.condition_tokens == wb.clip.tokenizer.context_length


def test_the_laptop_preset_is_the_best_row(wb):
    laptop, table = load_preset("laptop"), COMMITTED["ablation"]
    best = next(row for row in table.recipes if row.name == "best, no rerank")
    preset = compare.preset_of(replace(wb, preset=laptop), table, best)
    assert [getattr(preset, part) == getattr(laptop, part) for part in compare.PLAIN] == [True] * 3


def test_photos_are_judged_by_classes(preset, vqgan, class_folders, results):
    """Class folders, with a classifier of the real images beside the run."""
    data = class_folders({"train/red": 12, "train/blue": 12, "val/red": 4, "val/blue": 4})
    wb = extracted(preset, vqgan, "classes", data)
    assert wb.train_classifier() == wb.run.summary()["classifier"] and wb.run.summary()["classifier"]["n"] == 8
    entry = compare.run_table(wb, COMMITTED["photos"], steps=2, only=["plain", "retrieval"])[0]
    real = wb.run.summary()["classifier"]["accuracy"]
    assert entry["class_accuracy_real"]["mean"] == real and 0 <= entry["class_accuracy"]["mean"] <= 1
    of_another = replace(wb, preset=changed(wb.preset, {"evaluate": {"classifier": "classes"}}), run=open_run("other"))
    assert (
        same_weights(of_another.classifier(), wb.classifier()) and replace(wb, run=of_another.run).classifier() is None
    )
    with pytest.raises(ClipgenError, match="run 'none' has no classifier: make it by"):
        replace(wb, preset=changed(wb.preset, {"evaluate": {"classifier": "none"}})).classifier()
    assert "oracle_error" not in entry and (results / "photos" / "table.json").is_file()


def test_a_val_split_without_classes_is_one_sentence(preset, class_folders, tmp_path):
    data = class_folders({"train/red": 2, "train/blue": 2, "val": 2})
    with pytest.raises(ClipgenError, match="no classes to try a classifier on"):
        Workbench(open_run("r", tmp_path), preset, str(data)).train_classifier()


def committed_row(folder, recipe, seed):
    """The result of a row, with its recipe: a run, or of an earlier version a file, where `train` is now `transformer_train`."""
    name = compare.row_name(recipe, seed)
    if not (folder / name).is_dir():
        path = folder / "rows" / f"{name}.json"
        return read_json(path) if path.exists() else None
    preset = begun_with(folder / name / "config.json").preset
    assert preset.name == f"fashion, {recipe.system}" + ", paired" * (recipe.text == "paired")
    parts = {part.removeprefix("transformer_"): asdict(getattr(preset, part)) for part in compare.PLAIN}
    return compare.result_of(folder / name) | {"recipe": parts}


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_tables_are_those_of_their_rows_and_in_the_text(name):
    """A block of the text is some lines of its table."""
    folder, recipes = ROOT / "results" / name, COMMITTED[name].recipes
    entries = compare.read_table(folder, recipes)
    assert entries == json.loads((folder / "table.json").read_text()) and len(entries) == len(recipes)
    for entry, recipe in zip(entries, recipes, strict=True):
        rows = list(filter(None, (committed_row(folder, recipe, seed) for seed in recipe.seeds)))
        facts = {"name": recipe.name, "description": recipe.description, "text": recipe.text}
        assert entry == facts | compare.mean_and_std(rows)
        assert {row["recipe"].get("system", recipe.system) for row in rows} == {recipe.system}
        for (part, plain), row in itertools.product(compare.PLAIN.items(), rows):
            wanted, before = plain | getattr(recipe, part), row["recipe"].get(part.removeprefix("transformer_"))
            found = asdict(getattr(Preset(), part)) | (before or wanted)  # other systems have no such parts
            differing = {key for key in wanted if found[key] != wanted[key]}
            assert differing == ({"condition_tokens"} if wanted.get("conditioning") == "words" else set())
    blocks = re.findall(r"```\n( +\w.*?)\n```", (ROOT / "results" / "README.md").read_text(), re.DOTALL)
    lines = compare.table_text(entries, COMMITTED[name].columns).splitlines()
    found = [block.splitlines() for block in blocks if block.startswith(lines[0])]
    assert (name == "curves") == (not found)
    assert all(len(block) > 5 and set(block) <= set(lines) for block in found)


def row_of(name, values, interval=None):
    cell = {"mean": float(np.mean(values)), "std": float(np.std(values))} | ({"interval": interval} if interval else {})
    return {"name": name, "seeds": list(range(len(values))), "caps": cell}


@pytest.mark.parametrize(
    "shift, differs", [(0.04, False), (0.05, True), (-0.05, True)]
)  # 0.04 would, by a std of ddof 0
def test_three_seeds_are_compared_by_welch(shift, differs):
    plain = np.array([0.50, 0.52, 0.54])
    assert (ttest_ind(plain + shift, plain, equal_var=False).pvalue < 0.05) == differs
    rows = [
        row_of("plain", plain),
        row_of("a", plain + shift),
        row_of("b", plain[:2] + 1),
        row_of("c", [0.9], [0.8, 1]),
    ]
    cells = {line[:7].strip(): line[7:].strip() for line in compare.table_text(rows, ("caps",)).splitlines()[1:]}
    assert cells["a"] == "*" * differs + f"{0.52 + shift:.3f} ± 0.016"
    assert cells["b"] == "1.510 ± 0.010" and cells["c"] == "0.900 (0.800 to 1.000)" and len(cells) == 4 + differs


def test_one_seed_is_compared_by_its_intervals():
    rows = [row_of(name, [0.5], ends) for name, ends in (("plain", [0.4, 0.6]), ("a", [0.59, 0.7]), ("b", [0.61, 0.7]))]
    *lines, note = compare.table_text([*rows, row_of("old", [0.9])], ("caps",)).splitlines()
    assert ["*" in line for line in lines] == [False, False, False, True, False] and note.startswith(
        "* differs from plain"
    )


def test_a_result_has_the_intervals_of_its_columns():
    one = {"colour": 0.9, "colour_interval": [0.8, 0.95], "shape": 0.5, "shape_interval": [0.4, 0.6], "whole": 0.25}
    text = {"one": one, "two": {"both": 0.5, "relation": 0.25}, "held_out": one}
    result = {
        "evaluation": {"fid": {}, "caps": 0.3, "caps_interval": [0.2, 0.4]},
        "oracle": {"text": text},
        "seconds": {},
    }
    row = compare.mean_and_std([result | {"seed": 3}])
    found = {key: row[key].get("interval") for key in ("caps", "colour", "held_out_shape", "one_whole", "two_both")}
    assert found == {"caps": [0.2, 0.4], "colour": [0.8, 0.95], "held_out_shape": [0.4, 0.6]} | dict.fromkeys(
        ("one_whole", "two_both")
    )
    error = row["oracle_error"]
    assert error["mean"] == pytest.approx(0.3) and error["interval"] == pytest.approx([0.225, 0.4]) and len(row) == 11
    assert "interval" not in compare.mean_and_std([result | {"seed": seed} for seed in (0, 1)])["caps"]


def test_a_damaged_table_is_one_sentence(tmp_path):
    (tmp_path / "table.json").write_text('[{"name": "plain"')
    with pytest.raises(ClipgenError, match="table.json is damaged .*restore it"):
        compare.read_table(tmp_path, COMMITTED["ablation"].recipes)
