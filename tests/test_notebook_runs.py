"""Whole notebooks by `clipgen run`, in a process of their own: errors and signals in their kernels, photos, the quickstart."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = {
    "10_where": "from pathlib import Path\nimport clipgen_lib\nassert Path(IMAGE).read_text() == 'an image'\n"
    "Path(IMAGE).write_text(clipgen_lib.__file__)",
    "11_rights": "raise PermissionError(13, 'Permission denied', '/somewhere')",
    "12_killed": "import os\nos.kill(os.getpid(), 9)",
    "13_waits": "from pathlib import Path\nfrom clipgen_lib.runtime.runs import stoppable\nimport time\n"
    "with stoppable() as stop:\n    Path(IMAGE).write_text('begun')\n    while not stop.number: time.sleep(0.1)\n"
    "    stop.raise_if_asked(lambda: Path(IMAGE).write_text('saved'), 'after step 3')",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Starts `clipgen run` of a small notebook in another clone than the installed one."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "clipgen_lib", folder / "clipgen_lib")
    (folder / "notebooks").mkdir()
    for name, source in NOTEBOOKS.items():
        parameters = nbformat.v4.new_code_cell('RUN = "r"\nIMAGE = ""', metadata={"tags": ["parameters"]})
        notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(source)])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")
    (folder / "image").write_text("an image")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CLIPGEN_RESULTS")}

    def start(name):
        words = [sys.executable, "-m", "clipgen_lib", "run", "--notebook", name, "-p", "IMAGE=image"]
        options = {"cwd": folder, "env": environment, "stderr": subprocess.PIPE, "text": True}
        options["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's would be inherited
        return folder, subprocess.Popen(words, **options)

    return start


def test_a_notebook_runs_the_library_of_its_command_and_finds_relative_paths(clone):
    folder, process = clone("10")
    assert process.wait() == 0, process.stderr.read()[-3000:]
    assert (folder / "image").read_text() == str(folder / "clipgen_lib" / "__init__.py")
    assert (folder / "results" / "where" / "notebooks" / "10_where.ipynb").is_file()


@pytest.mark.parametrize(
    "sentence",
    [
        "11_rights: Permission denied: '/somewhere': get the right to it",
        "12_killed: the memory is used up (Kernel died)",
    ],
)
def test_an_error_in_a_kernel_is_the_commands_own_sentence(clone, sentence):
    _, process = clone(sentence[:2])
    _, told = process.communicate()
    assert process.returncode == 1 and f"Error: {sentence}" in told and "Traceback" not in told


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_to_the_command_lets_its_notebook_save(clone, name):
    folder, process = clone("13")
    while (folder / "image").read_text() != "begun" and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.Signals[name])
    _, told = process.communicate()
    assert (folder / "image").read_text() == "saved"
    assert process.returncode == 128 + signal.Signals[name] and f"stopped by {name} in 13_waits" in told


def test_real_photos_by_the_same_command(clipgen, shared, tmp_path):
    given = (f"DATA={shared / 'coco-mini'}", "VQGAN_STEPS=6", "TRANSFORMER_STEPS=6", "PROMPTS=a dog|7")
    parameters = [word for text in given for word in ("-p", text)]
    done = clipgen("run", "--preset", "smoke", "--run", "photos", *parameters, results=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "photos"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["prompts"]["asked"] == ["a dog", "7"] and (folder / "figures" / "prompts.png").is_file()
    assert "images for 2 prompts (prompts of your own)" in done.stdout
    copy = (folder / "notebooks" / "04_evaluate.ipynb").read_text()
    assert all("not photos" in told for told in (done.stderr.partition("01_train_vqgan.ipynb")[0], done.stdout, copy))
    assert summary["data"]["name"] == "coco-mini" and summary["data"]["n_train"] == 80 and "oracle" not in summary
    assert summary["evaluation"]["r_precision"] < 0.3  # a CLIP that knows shapes is near chance on photos


def test_the_quickstart_runs_by_name_in_a_folder_of_its_own(clipgen, tmp_path):
    done = clipgen("run", "--notebook", "00", "-p", "PROMPT=a blue star", results=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"quickstart"}
    figures = {path.name for path in (tmp_path / "quickstart" / "figures").iterdir()}
    assert {"prompt.png", "variations.png", "completion.png", "blends.png", "walk.png", "walk.gif"} <= figures
    saved = (tmp_path / "quickstart" / "notebooks" / "00_quickstart.ipynb").read_text()
    assert "a blue star" in saved and "widget-view" not in saved
