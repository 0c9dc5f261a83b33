"""No file that is read and no value that is given runs code: weights, configs, archives, notebook parameters, our own source."""

import ast
import contextlib
import json
import os
import pickle
import shutil
import tempfile
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.translators import PythonTranslator
from PIL import Image
from safetensors.torch import load_file, save_file

import clipgen_lib
from clipgen_lib.cli import parse_parameter
from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.config import ClassifierConfig, VQGANTrainConfig, load_preset
from clipgen_lib.data.images import load_image
from clipgen_lib.metrics.classifier import Classifier
from clipgen_lib.metrics.statistics import read_statistics
from clipgen_lib.runtime.checkpoints import (
    Weights,
    load_checkpoint,
    read_weights,
    save_checkpoint,
    save_weights,
    weights_alone,
    weights_file,
)
from clipgen_lib.runtime.runs import DATA, ClipgenError, read_json
from clipgen_lib.study.released import RELEASES, load_released
from clipgen_lib.text_to_image import TextToImage
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN

PACKAGE = Path(clipgen_lib.__file__).parent


# ---------------------------------------------------------------------------------------------- weights with code


class Bomb:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def _torch_file(bomb: Bomb, path: Path, **options) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "model": bomb}, path, **options)


FORMS = {
    "pickle": lambda bomb, path: path.write_bytes(pickle.dumps({"model": bomb}, protocol=2)),
    "zip": _torch_file,
    "legacy": lambda bomb, path: _torch_file(bomb, path, _use_new_zipfile_serialization=False),
}


@pytest.fixture(params=FORMS)
def armed(request, tmp_path):
    """A maker of files with code, and the file that the code would make; that it would is seen first."""
    fired = tmp_path / "fired"

    def arm(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        FORMS[request.param](Bomb(fired), path)
        return path

    arm(tmp_path / "control")
    with (
        warnings.catch_warnings(),
        contextlib.suppress(RuntimeError),
    ):  # a plain pickle is no file of torch's, once it is read
        warnings.simplefilter("ignore")
        torch.load(tmp_path / "control", weights_only=False)
    assert fired.exists()
    fired.unlink()
    return arm, fired


def refused(call, fired: Path) -> str:
    with pytest.raises(ClipgenError) as error:
        call()
    assert not fired.exists()
    text = str(error.value)
    assert "\n" not in text and len(text) < 700, text
    return text


@pytest.mark.parametrize("name", ["last.ckpt", "last.pt", "last.pth", "last.bin", "last.safetensors"])
def test_released_weights_with_code(armed, name, tmp_path):
    arm, fired = armed
    refused(lambda: load_released("taming-f16-1024", arm(tmp_path / name)), fired)
    for release in RELEASES:
        refused(lambda release=release: load_released(release, arm(tmp_path / name)), fired)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """An open_clip model by name, as small as the embedded one."""
    config = json.loads((DATA / "shapes_clip" / "open_clip_config.json").read_text())["model_cfg"]
    path = tmp_path_factory.mktemp("models") / "tiny.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return "tiny"


@pytest.mark.parametrize("name", ["clip.pt", "clip.bin", "clip.pth", "clip.safetensors"])
def test_clip_checkpoint_with_code(armed, tiny_clip, name, tmp_path):
    arm, fired = armed
    assert "cannot be loaded" in refused(lambda: ClipEmbedder.load(tiny_clip, str(arm(tmp_path / name))), fired)


def test_torchscript_archive_that_is_not_openais(tiny_clip, tmp_path):
    """Opening one would run its `__setstate__`."""

    class Code(torch.nn.Module):
        def forward(self, x):
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Code()).save(tmp_path / "ViT-B-32.pt")
    assert "holds code" in refused(
        lambda: ClipEmbedder.load(tiny_clip, str(tmp_path / "ViT-B-32.pt")), tmp_path / "none"
    )


def test_folders_with_code_for_weights(armed, tmp_path):
    """The folders of this project: whatever lies beside or in place of model.safetensors is not run."""
    arm, fired = armed
    smoke = load_preset("smoke")
    save_weights(tmp_path / "classifier", Classifier(ClassifierConfig(width=8), ["a", "b"]))
    save_weights(tmp_path / "vqgan", VQGAN(smoke.vqgan))
    save_weights(tmp_path / "transformer", ImageTransformer(smoke.transformer, 32, 4, 16))
    shutil.copytree(DATA / "shapes_generator", tmp_path / "generator")
    loads = {
        "classifier": Classifier.load,
        "vqgan": VQGAN.load,
        "transformer": ImageTransformer.load,
        "generator": TextToImage.from_pretrained,
    }
    for name, load in loads.items():
        folder = tmp_path / name
        arm(folder / "model.safetensors")
        arm(folder / "pytorch_model.bin")
        refused(lambda load=load, folder=folder: load(folder), fired)
        (folder / "model.safetensors").unlink()
        refused(lambda load=load, folder=folder: load(folder), fired)
    refused(lambda: read_weights(arm(tmp_path / "vqgan" / "model.safetensors").parent), fired)
    refused(lambda: load_checkpoint(arm(tmp_path / "checkpoint.safetensors")), fired)


def test_clip_folder_with_code_for_weights(armed, tmp_path):
    arm, fired = armed
    shutil.copytree(DATA / "shapes_clip", tmp_path / "clip")
    for name in ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "pytorch_model.bin"):
        arm(tmp_path / "clip" / name)
    assert ClipEmbedder.load(str(tmp_path / "clip")).dim == 256 and not fired.exists()  # the safetensors go first
    arm(tmp_path / "clip" / "open_clip_model.safetensors")
    refused(lambda: ClipEmbedder.load(str(tmp_path / "clip")), fired)


def test_statistics_with_code(tmp_path):
    fired = tmp_path / "fired"
    np.savez(tmp_path / "x.npz", mu=np.array([Bomb(fired)], dtype=object), sigma=np.eye(1))
    refused(lambda: read_statistics(tmp_path / "x.npz"), fired)
    (tmp_path / "y.npz").write_bytes(pickle.dumps(Bomb(fired)))
    refused(lambda: read_statistics(tmp_path / "y.npz"), fired)
    with np.load(tmp_path / "x.npz", allow_pickle=True) as content:  # the same file fires where pickles are allowed
        content["mu"]
    assert fired.exists()


def test_feature_network_with_code(armed, tmp_path, monkeypatch):
    """Refused by its hash; and were the hash right, the packages that read these files would still run nothing."""
    arm, fired = armed
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = arm(tmp_path / "hub" / "checkpoints" / "alexnet.pth")
    weights = Weights(path.name, "7be5be79", "nowhere")
    assert "SHA-256" in refused(lambda: weights_file(weights, "LPIPS", "go without it"), fired)
    with weights_alone(), pytest.raises(pickle.UnpicklingError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.hub.load_state_dict_from_url("https://nowhere/alexnet.pth", str(path.parent))
    assert not fired.exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_an_image_is_given_to_no_other_program(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    Image.new("RGB", (20, 20)).save(tmp_path / "x.eps", "EPS")
    shutil.copy(tmp_path / "x.eps", tmp_path / "x.png")
    assert "not an image" in refused(lambda: load_image(tmp_path / "x.png", 8), tmp_path / "none")


# ---------------------------------------------------------------------------------------------- what is no plain file


READERS = {
    "config.json": read_json,
    "x.safetensors": load_checkpoint,
    "x.npz": read_statistics,
    "vqgan/model.safetensors": lambda path: VQGAN.load(path.parent),
    "vqgan/config.json": lambda path: VQGAN.load(path.parent),
    "clip/open_clip_model.safetensors": lambda path: ClipEmbedder.load(str(path.parent)),
    "clip/open_clip_config.json": lambda path: ClipEmbedder.load(str(path.parent)),
    "generator/model.safetensors": lambda path: TextToImage.from_pretrained(path.parent),
    "generator/config.json": lambda path: TextToImage.from_pretrained(path.parent),
}


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.json").write_text("{}")
    save_checkpoint(folder / "x.safetensors", {}, {})
    np.savez(folder / "x.npz", mu=np.zeros(2), sigma=np.eye(2))
    save_weights(folder / "vqgan", VQGAN(load_preset("smoke").vqgan))
    shutil.copytree(DATA / "shapes_clip", folder / "clip")
    shutil.copytree(DATA / "shapes_generator", folder / "generator")
    return folder


@pytest.fixture
def open_to_all():
    """A folder that every user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_plain_file_is_one_sentence(name, whole_files, open_to_all):
    """A pipe, which nobody writes to, a folder, and a file that the user may not read."""
    shutil.copytree(whole_files, open_to_all / "x")
    (open_to_all / "x").chmod(0o755)
    path, user, none = open_to_all / "x" / name, os.geteuid(), open_to_all / "none"
    READERS[name](path)
    path.chmod(0)
    os.seteuid(user or 65534)  # root may read everything
    try:
        assert f"no right to read {path}" in refused(lambda: READERS[name](path), none)
    finally:
        os.seteuid(user)
    path.unlink()
    os.mkfifo(path)
    assert path.name in refused(lambda: READERS[name](path), none)
    path.unlink()
    path.mkdir()
    assert path.name in refused(lambda: READERS[name](path), none)


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith("model.safetensors")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(name, value, whole_files, tmp_path):
    shutil.copytree(whole_files / name.partition("/")[0], tmp_path / name.partition("/")[0])
    tensors = load_file(tmp_path / name)
    next(x for x in tensors.values() if x.is_floating_point() and x.numel()).view(-1)[0] = value
    save_file(tensors, tmp_path / name)
    assert "is not finite" in refused(lambda: READERS[name](tmp_path / name), tmp_path / "none")


# ---------------------------------------------------------------------------------------------- configs that name code


ELSEWHERE = ["hf-hub:someone/model", "local-dir:/tmp/model", "/tmp/model", "../model", "https://nowhere/model", "a:b"]


@pytest.fixture
def offline(monkeypatch):
    def ask(*args, **kwargs):
        pytest.fail("the network was asked")

    monkeypatch.setattr("socket.create_connection", ask)
    monkeypatch.setattr("socket.getaddrinfo", ask)
    monkeypatch.setattr(urllib.request, "urlopen", ask)


@pytest.mark.parametrize("key", ["timm_model_name", "hf_model_name"])
@pytest.mark.parametrize("place", ELSEWHERE)
def test_a_clip_folder_names_no_model_elsewhere(key, place, tmp_path, offline):
    shutil.copytree(DATA / "shapes_clip", tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    for tower in ("vision_cfg", "text_cfg"):
        changed = {**config, "model_cfg": {**config["model_cfg"], tower: {**config["model_cfg"][tower], key: place}}}
        (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(changed))
        assert key in refused(lambda: ClipEmbedder.load(str(tmp_path / "clip")), tmp_path / "none")


@pytest.mark.parametrize(
    "name",
    [p for p in ELSEWHERE if ":" in p] + ["builtins.eval", "os.system", "x" * 10_000, "a\0b", "", None, ["shapes"]],
)
def test_a_generator_names_no_clip_elsewhere(name, tmp_path, offline):
    shutil.copytree(DATA / "shapes_generator", tmp_path / "generator")
    config = json.loads((tmp_path / "generator" / "config.json").read_text())
    (tmp_path / "generator" / "config.json").write_text(
        json.dumps({**config, "clip": {"name": name, "pretrained": "x"}})
    )
    refused(lambda: TextToImage.from_pretrained(tmp_path / "generator").clip, tmp_path / "none")


@pytest.mark.parametrize("name", ["builtins.eval", "os.system", "torch.optim.SGD", "__import__('os')"])
def test_a_choice_by_name_is_among_ours(name):
    for call in (
        lambda: VQGANTrainConfig(precision=name),
        lambda: VQGANTrainConfig(perceptual=name),
        lambda: VQGANTrainConfig(optimizer=name),
        lambda: load_preset("smoke", vqgan={"codebook_update": name}),
        lambda: load_preset("smoke", transformer={"conditioning": name}),
        lambda: load_preset("smoke", evaluate={"protocol": name}),
        lambda: load_preset(name),
    ):
        with pytest.raises(ClipgenError, match="should be '|choose one of"):
            call()


def test_names_of_classes_are_no_models(tmp_path):
    """What a classifier's folder calls its classes and its config goes nowhere near timm's register of models."""
    save_weights(tmp_path, Classifier(ClassifierConfig(width=8), ["hf-hub:a/b", "os.system"]))
    assert Classifier.load(tmp_path).names == ["hf-hub:a/b", "os.system"]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "config": {**config["config"], "width": "hf-hub:a/b"}}))
    assert "width" in refused(lambda: Classifier.load(tmp_path), tmp_path / "none")


# ---------------------------------------------------------------------------------------------- notebook parameters


HOSTILE = ["; rm -rf /", "$(touch x)", "`touch x`", "'; import os; '", '"; import os; "', '"""', "a\nimport os\n"]
HOSTILE += ["\\", '\\"', "{x}", "%s", "!ls", "%run x", "# comment", "a=b=c", "\x00", "\u2028", "\udcff", "None or 1"]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(HOSTILE) | st.text())
def test_a_value_becomes_a_literal(value):
    """What is given by -p stands in the injected cell as one literal, which gives the value back."""
    known = {"DATA": "", "SEED": 0}
    assert parse_parameter(f"DATA={value}", known) == ("DATA", value)
    given = [("DATA", value)]
    with contextlib.suppress(ClipgenError):  # no number
        given.append(parse_parameter(f"SEED={value}", known))
    for key, parsed in given:
        cell = ast.parse(PythonTranslator.codify({key: parsed})).body
        assert len(cell) == 1 and isinstance(cell[0], ast.Assign) and cell[0].targets[0].id == key
        assert ast.literal_eval(cell[0].value) == parsed


@pytest.mark.parametrize("text", ["os.system=1", "a b=1", "DATA;x=1", "=1", "DATA", "a[0]=1", "x\nimport os=1"])
def test_a_key_is_a_plain_name(text):
    with pytest.raises(ClipgenError, match="not KEY=VALUE"):
        parse_parameter(text, {"DATA": ""})


# ---------------------------------------------------------------------------------------------- our own source


NEVER = "pickle cPickle _pickle dill cloudpickle joblib marshal shelve code runpy"
CALLS = (
    "eval exec compile __import__ os.system os.popen os.execv os.execvp os.spawnv yaml.load yaml.unsafe_load "
    "yaml.full_load torch.hub.load pickle.load pickle.loads pd.read_pickle"
)


def unsafe(source: str) -> list[str]:
    """Lines of a source that could run what a file or a parameter holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: imports {m}" for m in modules if m.split(".")[0] in NEVER.split()]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        bad = (
            name in CALLS.split()
            or (name.endswith("torch.load") and given.get("weights_only") is not True)
            or given.get("allow_pickle") is True
            or given.get("weights_only") is False
            or given.get("shell") is True
            or given.get("trust_remote_code") is True
            or name.endswith((".extractall", ".unpack_archive"))
            or (name.endswith(".extract") and name != "wb.extract")  # the one is of archives, the other of tokens
        )
        if bad:
            found.append(f"{node.lineno}: {name}")
    return found


def cells(path: Path) -> str:
    """The code of a notebook; a line of IPython's own (%, !), which may be a shell's, is no Python and fails in the scan."""
    found = [c["source"] for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    return "\n".join("".join(source) if isinstance(source, list) else source for source in found)


@pytest.mark.parametrize(
    "path",
    sorted(PACKAGE.rglob("*.py")) + sorted((PACKAGE.parent / "notebooks").glob("*.ipynb")),
    ids=lambda path: path.name,
)
def test_source_runs_nothing_that_it_reads(path):
    assert unsafe(cells(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")) == []


LINES = """
torch.load(x)
torch.load(x, weights_only=False)
np.load(x, allow_pickle=True)
import pickle
from pickle import loads
eval(x)
os.system(x)
subprocess.run(x, shell=True)
yaml.load(x)
archive.extractall(x)
tar.extract(m, x)
exec(x)
"""


@pytest.mark.parametrize("line", LINES.split("\n")[1:-1])
def test_the_scan_sees_it(line):
    assert unsafe(line)


def test_a_name_from_outside_is_imported_nowhere():
    """`import_module` is the package's own lazy loading, by a table of its own; `jit.load` is of archives of known hashes."""
    for word, users in (("import_module", ["__init__.py"]), ("jit.load(", ["clip_embed.py"])):
        found = [path.name for path in PACKAGE.rglob("*.py") if word in path.read_text(encoding="utf-8")]
        assert found == users
    with pytest.raises(AttributeError):
        clipgen_lib.os  # noqa: B018
