from dataclasses import replace

import pytest
import torch

from clipgen_lib import compare
from clipgen_lib.compare import Row
from clipgen_lib.config import TransformerTrainConfig, load_preset
from clipgen_lib.runs import ClipgenError, open_run, read_json
from clipgen_lib.workbench import Workbench


@pytest.fixture
def bench(world, preset, vqgan, tmp_path):
    """A run with an untrained tokenizer and its stores, on a world of 40 scenes read as a COCO root."""
    from clipgen_lib.runs import save_weights

    small = replace(preset, evaluate=replace(preset.evaluate, n=8, batch_size=8, blur=(0, 1)))
    bench = Workbench(open_run("base", tmp_path), small, str(world), 0, "cpu")
    save_weights(bench.run.path / "vqgan", vqgan)
    bench.extract()
    return bench


ROWS = (
    Row("plain", "nothing", seeds=(0, 1)),
    Row("guided", "sampling alone", sample={"guidance": 2.0}),
    Row("near", "projection", sample={"neighbours": 2}),
    Row("centred", "means off", train={"centre": True}, text="unpaired"),
    Row("twin", "captions", text="paired"),
)


def test_rows_are_trained_once_evaluated_and_kept(bench, tmp_path, monkeypatch):
    folder = tmp_path / "ablation"
    table = compare.run_rows(bench, folder, steps=2, rows=ROWS)
    assert [entry["name"] for entry in table] == [row.name for row in ROWS]
    assert table[0]["seeds"] == [0, 1] and table[0]["fid_0"]["std"] > 0 and table[1]["fid_0"]["std"] == 0
    first, second = (read_json(folder / "rows" / f"plain-{seed}.json") for seed in (0, 1))
    values = [compare.metrics(result)["caps"] for result in (first, second)]
    assert table[0]["caps"]["mean"] == pytest.approx(sum(values) / 2)
    assert len(list((folder / "trainings").iterdir())) == 4  # two seeds, centred, twin: the others only sample otherwise
    monkeypatch.setattr(compare.train, "train_transformer", lambda *a, **k: pytest.fail("trained again"))
    assert compare.run_rows(bench, folder, steps=2, rows=ROWS) == table
    assert "plain" in compare.lines_of(table) and "±" in compare.lines_of(table).splitlines()[1]


def test_an_unknown_row_is_one_sentence(bench, tmp_path):
    with pytest.raises(ClipgenError, match="no row 'plane'"):
        compare.run_rows(bench, tmp_path, only=["plane"], rows=ROWS)


def test_the_twin_reads_each_caption_of_unmirrored_pictures(bench):
    store, twin, captions = bench.store(), compare.paired_texts(bench, "train"), bench.images().captions
    assert store.meta["flip"] and len(store) == 80 and len(twin) == sum(map(len, captions)) == 200
    assert torch.equal(twin.tokens(slice(5, 10)), store.tokens(slice(1, 2)).expand(5, -1))
    assert torch.allclose(twin.embeds(slice(5, 10)), bench.clip.texts(list(captions[1])), atol=1e-3)


def test_every_row_changes_the_plain_recipe_by_what_it_names(bench):
    plain = compare.recipe(bench, compare.ROWS[0], 0, 0)
    assert plain["train"].noise_cos == 1 and plain["sample"].guidance == 1 and plain["train"].condition_dropout == 0
    assert len({row.name for row in compare.ROWS}) == len(compare.ROWS)
    for row in compare.ROWS[1:]:
        made = compare.recipe(bench, row, 0, 0)
        for part in ("transformer", "train", "sample"):
            changed = {k for k, v in vars(made[part]).items() if v != vars(plain[part])[k]}
            assert changed == set(getattr(row, part))
        assert made != plain


def test_the_best_recipe_is_the_laptop_preset():
    """What the comparison calls best is what the preset does."""
    laptop, best = load_preset("laptop"), next(row for row in compare.ROWS if row.name == "best")
    for part, values in (("transformer", best.transformer), ("transformer_train", best.train), ("sample", best.sample)):
        for key, value in {**compare.PLAIN[part.removeprefix("transformer_")], **values}.items():
            assert getattr(getattr(laptop, part), key) == value, key
    assert isinstance(laptop.transformer_train, TransformerTrainConfig)
