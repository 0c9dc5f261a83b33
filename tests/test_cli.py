"""The command line, run as a user runs it, in results of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from clipgen_lib.cli import _default_run, _parameters_of, _parse
from clipgen_lib.data import shapes

ROOT = Path(__file__).parents[1]


def clipgen(*arguments, results, timeout=400):
    environment = {**os.environ, "CLIPGEN_RESULTS": str(results), "CLIPGEN_PROGRESS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "clipgen_lib", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All four notebooks by papermill at preset smoke."""
    results = tmp_path_factory.mktemp("results")
    done = clipgen("run", "--preset", "smoke", "--run", "whole", "-p", "SEED=1", results=results)
    assert done.returncode == 0, done.stderr[-3000:]
    return results, done


def test_all_notebooks_run_and_measure(smoke):
    results, done = smoke
    summary = json.loads((results / "whole" / "summary.json").read_text())
    assert {
        "run",
        "preset",
        "seed",
        "versions",
        "data",
        "parameters",
        "vqgan",
        "transformer",
        "evaluation",
        "oracle",
        "seconds",
    } <= summary.keys()
    assert summary["seed"] == 1 and summary["data"]["n_train"] == 256 and summary["evaluation"]["n"] == 64
    assert {"vqgan", "extract", "transformer", "evaluate", "per_image", "total"} <= summary["seconds"].keys()
    assert summary["oracle"]["text"]["two"].keys() == {"n", "both", "relation"}
    assert {"vqgan", "transformer", "clip"} == summary["parameters"].keys()
    figures = {p.stem for p in (results / "whole" / "figures").glob("*.png")}
    assert {
        "reconstructions",
        "vqgan_curves",
        "codebook",
        "token_grid",
        "neighbours",
        "previews",
        "contact_sheet",
    } <= figures
    assert "FID-k, generator" in done.stdout and "figures" in done.stdout
    assert "training VQGAN" in done.stderr and "training transformer" in done.stderr  # bars reach the terminal


def test_executed_copies_are_whole_and_clean(smoke):
    for path in sorted((smoke[0] / "whole" / "notebooks").glob("*.ipynb")):
        text = path.read_text()
        notebook = nbformat.reads(text, as_version=4)
        code = [c for c in notebook.cells if c.cell_type == "code"]
        assert all(c.execution_count for c in code) and "image/png" in text
        assert not any(
            "it/s" in str(o.get("text")) for c in code for o in c.outputs
        )  # in an image's base64 it may well be
        assert str(smoke[0]) not in text and str(ROOT) not in text


def test_generate_from_the_run(smoke, tmp_path):
    out = tmp_path / "out.png"
    done = clipgen("generate", "a red circle", "--run", "whole", "-n", "3", "--seed", "5", "-o", out, results=smoke[0])
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size == (3 * 64 + 4, 64)


def test_stages_go_on_from_what_is_there(smoke):
    done = clipgen(
        "evaluate", "--preset", "smoke", "--run", "whole", "--seed", "1", "--guidance", "1.5", results=smoke[0]
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((smoke[0] / "whole" / "summary.json").read_text())["sample"]["guidance"] == 1.5


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("run", "--preset", "smoke", "-p", "STEPS=3"), "no notebook has a parameter 'STEPS'"),
        (("run", "--preset", "smoke", "-p", "STEPS"), "not KEY=VALUE"),
        (("run", "--preset", "smoke", "-p", "PROMPTS= | "), "without a prompt"),
        (("run", "--preset", "smoke", "--notebook", "09"), "0 notebooks match '09'"),
        (("run", "--preset", "smoke", "--run", "x", "-p", "DATA=/nowhere/at/all"), "is not a folder of images"),
        (("generate", "a prompt", "--run", "none"), "there is no run 'none'"),
        (("extract", "--preset", "smoke", "--run", "fresh"), "is missing"),
        (("train-vqgan", "--preset", "smoke", "--run", "whole", "--seed", "2"), "begun with another seed"),
        (("train-vqgan", "--preset", "smoke", "--run", "y", "--device", "cuda:7"), "cannot be used here"),
    ],
)
def test_mistakes_are_one_sentence(smoke, arguments, sentence):
    done = clipgen(*arguments, results=smoke[0])
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr


def test_a_run_of_other_data_has_a_name_of_its_own():
    assert _default_run("laptop", "shapes") == "laptop"
    assert _default_run("laptop", "/my/Holiday photos (2)") == "laptop-Holiday-photos-2"
    assert _default_run("laptop", "/") == "laptop-images"


def test_texts_stay_texts():
    assert _parse("DATA=2017", {"DATA"}) == ("DATA", "2017") and _parse("SEED=2017", {"DATA"}) == ("SEED", 2017)
    known = _parameters_of("04_evaluate")
    assert known["DATA"] and known["PROMPTS"] and not known["SEED"] and not known["GUIDANCE"]


def test_doctor_answers_for_this_machine(tmp_path):
    done = clipgen("doctor", results=tmp_path / "results")
    assert done.returncode == 0, done.stderr
    assert "data/shapes_clip                      yes" in done.stdout and "laptop      yes" in done.stdout


def test_real_photos_by_the_same_command(shared, tmp_path):
    done = clipgen(
        "run",
        "--preset",
        "smoke",
        "--run",
        "photos",
        "-p",
        f"DATA={shared / 'coco-mini'}",
        "-p",
        "VQGAN_STEPS=6",
        "-p",
        "TRANSFORMER_STEPS=6",
        "-p",
        "PROMPTS=a dog|7",
        results=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "photos" / "summary.json").read_text())
    assert summary["prompts"]["asked"] == ["a dog", "7"] and (tmp_path / "photos" / "figures" / "prompts.png").is_file()
    assert "2 prompts drawn (prompts of your own)" in done.stdout
    assert "not photos" in done.stderr.splitlines()[0] and "not photos" in done.stdout
    assert "not photos" in (tmp_path / "photos" / "notebooks" / "04_evaluate.ipynb").read_text()
    assert summary["data"]["name"] == "coco-mini" and summary["data"]["n_train"] == 80 and "oracle" not in summary
    assert summary["evaluation"]["r_precision"] < 0.3  # a CLIP that knows shapes is near chance on photos


def test_the_generator_of_the_project_draws(tmp_path):
    """What a newcomer types first: no run is named and none is there."""
    out = tmp_path / "out.png"
    done = clipgen("generate", "a large red circle", "-n", "2", "--candidates", "4", "-o", out, results=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = np.asarray(Image.open(out))
    things = [shapes.read_scene(shown[:, left : left + 64])[0] for left in (0, 66)]
    assert all((thing.colour, thing.shape) == ("red", "circle") for thing in things)


def test_the_quickstart_runs_by_name_in_a_folder_of_its_own(tmp_path):
    done = clipgen("run", "--notebook", "00", "-p", "PROMPT=a blue star", results=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"quickstart"}
    figures = {path.name for path in (tmp_path / "quickstart" / "figures").iterdir()}
    assert {"prompt.png", "variations.png", "completion.png", "blends.png", "walk.png", "walk.gif"} <= figures
    saved = (tmp_path / "quickstart" / "notebooks" / "00_quickstart.ipynb").read_text()
    assert "a blue star" in saved and "widget-view" not in saved


def test_cost_is_told_and_kept(tmp_path):
    out = tmp_path / "cost.json"
    done = clipgen("cost", "laptop", "--images", "1000", "--gpus", "2", "-o", out, results=tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())
    assert found["gpus"] == 2 and found["images"] == 1000 and "laptop, 1,000 images" in done.stdout


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("cost", "laptop", "--gpus", "0"), "0 is not in the range"),
        (("cost", "laptop", "--share", "0"), "0.0 is not in the range"),
        (("export", "--run", "absent", "-n", "0"), "0 is not in the range"),
        (("generate", "a red circle", "-o", "out.foo"), "cannot be written as an image"),
    ],
)
def test_numbers_and_names_that_cannot_be_are_told_first(arguments, sentence, tmp_path):
    done = clipgen(*arguments, results=tmp_path)
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr
