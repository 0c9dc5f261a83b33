"""The command line, run as a user runs it, in results of its own."""

import json
import shutil

import nbformat
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image

from clipgen_lib.cli import default_run, main, parameters_of, parse_parameter
from clipgen_lib.metrics.oracle import read_scene
from clipgen_lib.runtime.runs import ClipgenError


def test_all_notebooks_run_and_measure(smoke_run):
    summary = json.loads((smoke_run / "summary.json").read_text())
    keys = "run preset seed versions data parameters vqgan transformer evaluation oracle seconds"
    assert set(keys.split()) <= summary.keys()
    assert summary["data"]["n_train"] == 256 and summary["evaluation"]["n"] == 64
    assert {"vqgan", "extract", "transformer", "evaluate", "per_image", "total"} <= summary["seconds"].keys()
    assert summary["oracle"]["text"]["two"].keys() == {"n", "both", "relation"}
    assert {"vqgan", "transformer", "clip"} == summary["parameters"].keys()
    figures = {path.stem for path in (smoke_run / "figures").glob("*.png")}
    wanted = "reconstructions vqgan_curves codebook token_grid neighbours previews contact_sheet"
    assert set(wanted.split()) <= figures


def test_executed_copies_are_whole_and_clean(smoke_run):
    paths = sorted((smoke_run / "notebooks").glob("*.ipynb"))
    assert len(paths) == 4
    for path in paths:
        text = path.read_text()
        code = [c for c in nbformat.reads(text, as_version=4).cells if c.cell_type == "code"]
        assert all(c.execution_count for c in code) and "image/png" in text
        assert not any("it/s" in str(o.get("text")) for c in code for o in c.outputs)  # no progress bars
        assert str(smoke_run.parent) not in text and str(ROOT) not in text


def test_a_run_generates_and_is_evaluated_again(clipgen, smoke_run, tmp_path):
    shutil.copytree(smoke_run, tmp_path / "smoke")
    out = tmp_path / "out.png"
    done = clipgen("generate", "a red circle", "--run", "smoke", "-n", 3, "--seed", 5, "-o", out, results=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size == (3 * 64 + 4, 64)
    options = ("--preset", "smoke", "--run", "smoke", "--guidance", 1.5)
    done = clipgen("evaluate", *options, results=tmp_path)
    assert done.returncode == 0 and "FID-k" in done.stdout, done.stderr
    assert json.loads((tmp_path / "smoke" / "summary.json").read_text())["sample"]["guidance"] == 1.5


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("run", "--preset", "smoke", "-p", "STEPS=3"), "no notebook has a parameter 'STEPS'"),
        (("run", "--preset", "smoke", "-p", "PROMPTS= | "), "holds no prompt"),
        (("run", "--preset", "smoke", "--notebook", "09"), "0 notebooks match '09'"),
        (("generate", "a prompt", "--run", "none"), "there is no run 'none'"),
        (("generate", "a red circle", "-o", "out.foo"), "cannot be written: give an image name"),
        (("train-vqgan", "--preset", "smoke", "--run", "y", "--device", "cuda:7"), "cannot be used here"),
        (("evaluate", "--reference", "x"), "name it by --images"),
        (("evaluate", "--images", "x"), "give --reference"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence):
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and sentence in done.output and "Traceback" not in done.output


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("run", "--preset", "smoke", "--run", "x", "-p", "DATA=/nowhere/at/all"), "is not a folder of images"),
        (("extract", "--preset", "smoke", "--run", "fresh"), "is missing"),
    ],
)
def test_mistakes_in_a_run_are_one_sentence(clipgen, arguments, sentence, tmp_path):
    done = clipgen(*arguments, results=tmp_path)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr


def test_a_run_of_other_data_has_a_name_of_its_own():
    assert default_run("laptop", "shapes") == "laptop"
    assert default_run("laptop", "/my/Holiday photos (2)") == "laptop-Holiday-photos-2"
    assert default_run("laptop", "/") == "laptop-images"


def test_parameters_are_texts_or_numbers():
    known = parameters_of("04_evaluate")
    assert known["DATA"] and known["PROMPTS"] and not known["SEED"] and not known["GUIDANCE"]
    assert parse_parameter("DATA=2017", known) == ("DATA", "2017")
    assert parse_parameter("PROMPTS=a=b", known) == ("PROMPTS", "a=b")
    assert parse_parameter("SEED=2017", known) == ("SEED", 2017)
    assert parse_parameter("GUIDANCE=2e-1", known) == ("GUIDANCE", 0.2)
    for text in ("SEED=one", "SEED=", "SEED=[1]", "SEED=__import__('os')"):
        with pytest.raises(ClipgenError, match="give a number"):
            parse_parameter(text, known)


def test_real_photos_by_the_same_command(clipgen, shared, tmp_path):
    given = (f"DATA={shared / 'coco-mini'}", "VQGAN_STEPS=6", "TRANSFORMER_STEPS=6", "PROMPTS=a dog|7")
    parameters = [word for text in given for word in ("-p", text)]
    done = clipgen("run", "--preset", "smoke", "--run", "photos", *parameters, results=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "photos" / "summary.json").read_text())
    assert summary["prompts"]["asked"] == ["a dog", "7"] and (tmp_path / "photos" / "figures" / "prompts.png").is_file()
    assert "images for 2 prompts (prompts of your own)" in done.stdout
    assert "not photos" in done.stderr.splitlines()[0] and "not photos" in done.stdout
    assert "not photos" in (tmp_path / "photos" / "notebooks" / "04_evaluate.ipynb").read_text()
    assert summary["data"]["name"] == "coco-mini" and summary["data"]["n_train"] == 80 and "oracle" not in summary
    assert summary["evaluation"]["r_precision"] < 0.3  # a CLIP that knows shapes is near chance on photos


def test_the_generator_of_the_project_generates(clipgen, tmp_path):
    """What a newcomer types first: no run is named and none is there."""
    out = tmp_path / "out.png"
    done = clipgen("generate", "a large red circle", "-n", 2, "--candidates", 4, "-o", out, results=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = np.asarray(Image.open(out))
    objects = [read_scene(shown[:, left : left + 64])[0] for left in (0, 66)]
    assert all((one.colour, one.shape) == ("red", "circle") for one in objects)


def test_the_quickstart_runs_by_name_in_a_folder_of_its_own(clipgen, tmp_path):
    done = clipgen("run", "--notebook", "00", "-p", "PROMPT=a blue star", results=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"quickstart"}
    figures = {path.name for path in (tmp_path / "quickstart" / "figures").iterdir()}
    assert {"prompt.png", "variations.png", "completion.png", "blends.png", "walk.png", "walk.gif"} <= figures
    saved = (tmp_path / "quickstart" / "notebooks" / "00_quickstart.ipynb").read_text()
    assert "a blue star" in saved and "widget-view" not in saved
