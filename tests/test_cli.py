"""The command line: in this process, or in one of its own where kernels, signals or the environment matter."""

import json
import re
import shlex
import shutil
from dataclasses import asdict

import nbformat
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipgen_lib import TextToImage
from clipgen_lib.cli import default_run, main, parameters_of, parse_parameter
from clipgen_lib.config import PRESETS, load_preset
from clipgen_lib.evaluate import oracle_list
from clipgen_lib.metrics.oracle import read_scene
from clipgen_lib.runtime.runs import ClipgenError


def command(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_all_notebooks_run_and_measure(smoke_run):
    summary = json.loads((smoke_run / "summary.json").read_text())
    keys = "run preset seed versions data parameters vqgan transformer evaluation oracle seconds"
    assert set(keys.split()) <= summary.keys()
    assert summary["data"]["n_train"] == 256 and summary["evaluation"]["n"] == 64
    assert {"vqgan", "extract", "transformer", "evaluate", "per_image", "total"} <= summary["seconds"].keys()
    assert {"n", "both", "relation", "position", "whole_interval"} <= summary["oracle"]["text"]["two"].keys()
    assert (smoke_run / "prompts.txt").read_text() == oracle_list(summary["oracle"]["text"]["three"]["n"])
    assert {"vqgan", "transformer", "clip"} == summary["parameters"].keys()
    figures = {path.stem for path in (smoke_run / "figures").glob("*.png")}
    wanted = "reconstructions vqgan_curves codebook token_grid neighbours previews contact_sheet"
    assert set(wanted.split()) <= figures


@pytest.mark.parametrize("stage, shown", [("vqgan", "reconstructions"), ("transformer", "previews")])
def test_a_tracker_has_each_line_of_metrics_once(smoke_run, clipgen, tmp_path, stage, shown):
    def tracked(run):
        events = EventAccumulator(str(run / "tracker" / f"clipgen-{stage}")).Reload()
        values = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
        assert len(values) == sum(len(events.Scalars(tag)) for tag in events.Tags()["scalars"])
        return values, [image.step for image in events.Images(f"{stage}_val/{shown}")]

    run = shutil.copytree(smoke_run, tmp_path / "smoke")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] in (stage, f"{stage}_val")]
    wanted = {(f"{x['stage']}/{k}", x["step"]): v for x in lines for k, v in x.items() if k not in ("stage", "step")}
    steps = [line["step"] for line in lines if line["stage"] == f"{stage}_val"]
    assert tracked(run) == (pytest.approx(wanted), steps)

    sorted((run / "checkpoints").glob(f"{stage}-*"))[-1].unlink()  # as after a kill
    done = clipgen(f"train-{stage}", "--run", "smoke", "--tracker", "tensorboard", results=tmp_path)
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr
    assert tracked(run) == (pytest.approx(wanted), steps) and len(steps) > 1
    (hyper_parameters,) = (run / "tracker").glob(f"clipgen-{stage}/*/hparams.yml")
    assert "preset.vqgan.codebook_size: " in hyper_parameters.read_text()


def test_an_unknown_tracker_is_refused_before_anything_is_written(results):
    arguments = ["train-vqgan", "--preset", "smoke", "--run", "y", "--tracker", "pen"]
    done = CliRunner().invoke(main, arguments, env={"CLIPGEN_TRACKER": ""})  # restored after
    assert done.exit_code == 1 and "tracker 'pen' is not here" in done.output and not results.exists()


def test_executed_copies_are_whole_and_clean(smoke_run):
    paths = sorted((smoke_run / "notebooks").glob("*.ipynb"))
    assert len(paths) == 4
    for path in paths:
        text = path.read_text()
        code = [c for c in nbformat.reads(text, as_version=4).cells if c.cell_type == "code"]
        assert all(c.execution_count for c in code) and "image/png" in text
        assert not any("it/s" in str(o.get("text")) for c in code for o in c.outputs)  # no progress bars
        assert str(smoke_run.parent) not in text and str(ROOT) not in text


def test_a_run_generates_and_is_evaluated_again(smoke_run, results, tmp_path):
    shutil.copytree(smoke_run, results / "smoke")
    out = tmp_path / "out.png"
    done = command("generate", "a red circle", "--run", "smoke", "-n", 3, "--seed", 5, "-o", out)
    assert done.exit_code == 0, done.output
    assert Image.open(out).size == (3 * 64 + 4, 64)
    done = command("evaluate", "--preset", "smoke", "--run", "smoke", "--guidance", 1.5, "--split", "held_out")
    assert done.exit_code == 0 and "FID-k" in done.output, done.output
    summary = json.loads((results / "smoke" / "summary.json").read_text())
    done = command("export", "--run", "smoke", "-n", 2, "--candidates", 2, "--to", tmp_path / "exported")
    assert done.exit_code == 0, done.output
    made = TextToImage.from_pretrained(tmp_path / "exported")("a red circle", align="standardise")
    summary = json.loads((results / "smoke" / "summary.json").read_text())
    assert made.shape == (1, 1, 3, 64, 64) and set(summary["export"]["oracle"]) == {"1", "2"}
    shutil.rmtree(results / "smoke" / "transformer")
    done = command("generate", "a red circle", "--run", "smoke", "-o", out)
    assert done.exit_code == 1 and "no trained transformer here: train it, or name a --generator" in done.output
    assert summary["sample"]["guidance"] == 1.5 and summary["evaluation held_out"]["reference"] == "shapes/held_out"


@pytest.mark.parametrize("options", [(), ("--align", "standardise")])
def test_the_generator_of_the_project_generates(tmp_path, options):
    """What a newcomer types first: no run is named."""
    done = command("generate", "a large red circle", "-n", 2, "--candidates", 4, "-o", tmp_path / "out.png", *options)
    assert done.exit_code == 0, done.output
    shown = np.asarray(Image.open(tmp_path / "out.png"))
    objects = [read_scene(shown[:, left : left + 64])[0] for left in (0, 66)]
    assert all((one.colour, one.shape) == ("red", "circle") for one in objects)


def test_the_photo_generator_draws_colours_on_white(tmp_path):
    """Of a pair of kind and colour that none of its training photos shows."""
    means = {}
    for colour in ("red", "blue"):
        done = command("generate", f"a {colour} handbag", "--generator", "fashion", "-n", 4, "-o", tmp_path / "out.png")
        assert done.exit_code == 0, done.output
        pixels = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).reshape(-1, 3).astype(float)
        product = pixels[pixels.min(1) < 200]
        assert 0.1 < len(product) / len(pixels) < 0.7
        means[colour] = product.mean(0)
    assert means["red"][0] > means["red"][2] + 30 and means["blue"][2] > means["blue"][0]


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("run --preset smoke -p STEPS=3", "no notebook has a parameter 'STEPS'"),
        ("run --preset smoke -p PROMPTS=|", "holds no prompt: write for example 'a dog|a red car'"),
        ("run --preset smoke --notebook 09", "0 notebooks match '09'"),
        ("run -p SEED=abc", "give a whole number from 0"),
        ("run -p PROCESSES=two", "give a whole number from 0"),
        ("run --notebook 04 -p GUIDANCE=1e999", "give a number from 0"),
        ("run -p PROCESSES=0", "PROCESSES is 0"),
        ("run --run one -p RUN=two", "give one of them"),
        ("generate x --run one --generator shapes", "from run 'one' or from generator 'shapes': give one of them"),
        ("run --preset laptp", "unknown preset 'laptp'"),
        ("run --set width=2", "is not PART.FIELD=VALUE"),
        ("run --preset smoke -p OVERRIDES=sample.topk=1", "no field 'topk': choose one of top_k"),
        ("run --preset smoke -p CLIP=nonsense", "neither a folder here nor an open_clip MODEL/WEIGHTS"),
        ("run --preset smoke -p DATA=/nowhere", "is not a folder of images"),
        ("run --preset smoke -p DEVICE=meta", "cannot be used here"),
        (f"run --run {'x' * 300}", "at most 100 letters"),
        ("run --preset smoke --run laptop", "is a published result"),
        ("train-vqgan --preset smoke --run y --data /nowhere", "is not a folder of images"),
        ("train-vqgan --preset smoke --run y --device cuda:7", "cannot be used here"),
        ("train-vqgan --run laptop --seed 5", "is a published result"),
        ("train-clip --run shapes-clip", "is a published result"),
        ("generate prompt --run none", "there is no run 'none'"),
        ("generate prompt -o out.foo", "cannot be written: give an image name"),
        ("generate prompt -o out.psd", "cannot be written: give an image name"),
        (f"generate prompt -o {ROOT}/results/laptop/figures/x.png", "results/laptop is a published result"),
        ("generate prompt --temperature 1e-300", "use a value above"),
        ("generate ' ' -o x.png", "the prompt is empty"),
        ("evaluate --images x --reference y -o z.txt", "give a name such as scores.json"),
        ("evaluate --reference x", "name it by --images"),
        ("evaluate --images x", "give --reference"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence):
    before = sorted((ROOT / "results").iterdir())
    done = command(*shlex.split(words))
    assert done.exit_code == 1 and sentence in done.output and "Traceback" not in done.output
    assert sorted((ROOT / "results").iterdir()) == before


def test_a_step_before_its_time_says_what_is_missing(results):
    done = command("extract", "--preset", "smoke", "--run", "fresh")
    assert done.exit_code == 1 and "there is no run 'fresh'" in done.output and not results.exists()


def test_a_preset_is_printed_as_a_file_that_makes_it(tmp_path):
    done = command("config", "smoke", "--set", "transformer.width=128")
    (tmp_path / "wide.yaml").write_text(done.output)
    assert asdict(load_preset(str(tmp_path / "wide.yaml"))) == asdict(load_preset("smoke", "transformer.width=128")) | {
        "name": "wide"
    }


def test_an_error_of_the_disk_is_one_sentence(tmp_path):
    (tmp_path / "out.png").mkdir()
    done = command("generate", "a red circle", "-n", "1", "-o", tmp_path / "out.png")
    assert done.exit_code == 1 and "Is a directory" in done.output and "out.png': restore it" in done.output


def test_without_notebooks_the_command_says_so(clipgen, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPGEN_HOME", str(tmp_path))  # as after `pip install .`, without --editable
    done = clipgen("run", results=tmp_path / "results")
    assert done.returncode == 1 and "has no notebooks: install a clone" in done.stderr and not list(tmp_path.iterdir())


def test_committed_results_are_published_and_no_default_name_is_one_of_them():
    kept = set(re.findall(r"^!/results/([\w-]+)/$", (ROOT / ".gitignore").read_text(), re.M))
    assert {"laptop", "reference", "photos"} <= kept
    assert kept == {path.parent.name for path in (ROOT / "results").glob("*/published")}
    options = [option for command in main.commands.values() for option in command.params]
    names = {
        default_run(preset, data)
        for preset in (*PRESETS, "/my/laptop.yaml")
        for data in ("shapes", "/my/photos", "clip")
    }
    assert not kept & (names | {option.default for option in options if option.name == "run"})


def test_a_run_of_other_data_has_a_name_of_its_own():
    assert default_run("laptop", "shapes") == "my-laptop"
    assert default_run("laptop", "/my/Holiday photos (2)") == "my-laptop-Holiday-photos-2"
    assert default_run("laptop", "/") == "my-laptop-images"


def test_parameters_are_texts_or_numbers():
    known = parameters_of("04_evaluate")
    assert (known["DATA"], known["PROMPTS"], known["SEED"], known["GUIDANCE"]) == ("shapes", "", 0, 0.0)
    for text, value in (("DATA=2017", "2017"), ("PROMPTS=a=b", "a=b"), ("SEED=2017", 2017), ("GUIDANCE=2e-1", 0.2)):
        assert parse_parameter(text, known) == (text.partition("=")[0], value)
    for value in ("one", "", "[1]", "__import__('os')", "1.5", "-1", 2**64, "True"):
        with pytest.raises(ClipgenError, match="give a whole number"):
            parse_parameter(f"SEED={value}", known)
