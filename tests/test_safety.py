"""No file that is read and no value that is given runs code: weights, configs, archives, notebook parameters, our own source."""

import ast
import contextlib
import os
import pickle
import shutil
import tempfile
import warnings
from pathlib import Path

import nbformat
import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.translators import PythonTranslator
from PIL import Image
from safetensors.torch import load_file, save_file

import clipgen_lib
from clipgen_lib.cli import parse_parameter
from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.config import ClassifierConfig, load_preset
from clipgen_lib.data.images import load_image
from clipgen_lib.metrics.classifier import Classifier
from clipgen_lib.metrics.statistics import read_statistics
from clipgen_lib.runtime import checkpoints
from clipgen_lib.runtime.checkpoints import load_checkpoint, save_checkpoint, save_weights
from clipgen_lib.runtime.runs import DATA, ClipgenError, read_json, write_json
from clipgen_lib.study.released import RELEASES, load_released
from clipgen_lib.text_to_image import TextToImage
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN

PACKAGE = ROOT / "clipgen_lib"
READERS = {
    "config.json": read_json,
    "x.safetensors": load_checkpoint,
    "x.npz": read_statistics,
    "vqgan/model.safetensors": lambda path: VQGAN.load(path.parent),
    "vqgan/config.json": lambda path: VQGAN.load(path.parent),
    "transformer/model.safetensors": lambda path: ImageTransformer.load(path.parent),
    "classifier/model.safetensors": lambda path: Classifier.load(path.parent),
    "clip/open_clip_model.safetensors": lambda path: ClipEmbedder.load(str(path.parent)),
    "clip/open_clip_config.json": lambda path: ClipEmbedder.load(str(path.parent)),
    "generator/model.safetensors": lambda path: TextToImage.from_pretrained(path.parent),
    "generator/config.json": lambda path: TextToImage.from_pretrained(path.parent).clip,
}
WEIGHTS = [name for name in READERS if name.endswith("model.safetensors")]


SMOKE = load_preset("smoke")
MAKERS = {
    "config.json": lambda path: path.write_text("{}"),
    "x.safetensors": lambda path: save_checkpoint(path, {"x": torch.ones(2)}, {}),
    "x.npz": lambda path: np.savez(path, mu=np.zeros(2), sigma=np.eye(2)),
    "vqgan": lambda path: save_weights(path, VQGAN(SMOKE.vqgan)),
    "transformer": lambda path: save_weights(path, ImageTransformer(SMOKE.transformer, 32, 4, 16)),
    "classifier": lambda path: save_weights(
        path, Classifier(ClassifierConfig(width=8), {"class": ["hf-hub:a/b", "os.system"]})
    ),
    "clip": lambda path: shutil.copytree(DATA / "shapes_clip", path),
    "generator": lambda path: shutil.copytree(DATA / "shapes_generator", path),
}


def whole(name: str, folder: Path) -> Path:
    """A file of READERS that is what it should be, in a folder."""
    top = name.partition("/")[0]
    MAKERS[top](folder / top)
    return folder / name


def refused(call, *arguments) -> str:
    """The sentence by which a call is refused."""
    with pytest.raises(ClipgenError) as error:
        call(*arguments)
    text = str(error.value)
    assert "\n" not in text and len(text) < 700, text
    return text


# ---------------------------------------------------------------------------------------------- weights with code


class Bomb:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(params=["pickle", "zip", "legacy"])
def arm(request, tmp_path):
    """Makes files with code. The code would make another: seen before a test; it has not: seen after the test."""
    fired = tmp_path / "fired"

    def write(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"state_dict": {"a": torch.zeros(1)}, "model": Bomb(fired)}
        if request.param == "pickle":
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=request.param == "zip")
        return path

    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):  # a plain pickle is no file of torch's
        warnings.simplefilter("ignore")
        torch.load(write(tmp_path / "control"), weights_only=False)
    assert fired.exists()
    fired.unlink()
    yield write
    assert not fired.exists()


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """An open_clip model by name, as small as the embedded one."""
    path = tmp_path_factory.mktemp("models") / "tiny.json"
    write_json(path, read_json(DATA / "shapes_clip" / "open_clip_config.json")["model_cfg"])
    open_clip.add_model_config(path)
    return "tiny"


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth", "bin", "safetensors"])
def test_a_published_file_with_code_is_refused(arm, suffix, tiny_clip, tmp_path):
    path = arm(tmp_path / f"weights.{suffix}")
    for release in RELEASES:
        refused(load_released, release, path)
    assert "cannot be loaded" in refused(ClipEmbedder.load, tiny_clip, str(path))


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz", *WEIGHTS])
def test_code_beside_or_in_place_of_our_own_weights_is_not_run(arm, name, tmp_path):
    path = whole(name, tmp_path)
    for other in ("pytorch_model.bin", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"):
        arm(path.with_name(other))
    READERS[name](path)  # the safetensors go first
    refused(READERS[name], arm(path))
    path.unlink()
    refused(READERS[name], path)


def test_torchscript_archive_that_is_not_openais(tiny_clip, tmp_path):
    """Opening one would run its `__setstate__`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Identity()).save(tmp_path / "ViT-B-32.pt")
    assert "holds code" in refused(ClipEmbedder.load, tiny_clip, str(tmp_path / "ViT-B-32.pt"))


def test_statistics_with_code(tmp_path):
    fired = tmp_path / "fired"
    np.savez(tmp_path / "x.npz", mu=np.array([Bomb(fired)], dtype=object), sigma=np.eye(1))
    refused(read_statistics, tmp_path / "x.npz")
    assert not fired.exists()
    with np.load(tmp_path / "x.npz", allow_pickle=True) as content:  # the same file fires where pickles are allowed
        content["mu"]
    assert fired.exists()


def test_feature_network_with_code(arm, tmp_path, monkeypatch):
    """Refused by its hash; and were the hash right, the packages that read these files would still run nothing."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = arm(tmp_path / "hub" / "checkpoints" / "alexnet.pth")
    weights = checkpoints.Weights(path.name, "7be5be79", "nowhere")
    assert "SHA-256" in refused(checkpoints.weights_file, weights, "LPIPS", "go without it")
    with checkpoints.weights_alone(), pytest.raises(pickle.UnpicklingError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.hub.load_state_dict_from_url("https://nowhere/alexnet.pth", str(path.parent))
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_an_image_is_given_to_no_other_program(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png", "EPS")
    assert "not an image" in refused(load_image, tmp_path / "x.png", 8)


# ---------------------------------------------------------------------------------------------- what is no plain file


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_plain_file_is_one_sentence(name):
    """A file that the user may not read, a pipe, which nobody writes to, and a folder."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # every user may enter it, unlike pytest's
        path, user = whole(name, Path(folder)), os.geteuid()
        READERS[name](path)
        path.chmod(0)
        os.seteuid(user or 65534)  # root may read everything
        try:
            assert f"no right to read {path}" in refused(READERS[name], path)
        finally:
            os.seteuid(user)
        for make in (os.mkfifo, os.mkdir):
            path.unlink()
            make(path)
            assert path.name in refused(READERS[name], path)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(name, value, tmp_path):
    path = whole(name, tmp_path)
    tensors = load_file(path)
    next(x for x in tensors.values() if x.is_floating_point() and x.numel()).view(-1)[0] = value
    save_file(tensors, path)
    assert "is not finite" in refused(READERS[name], path)


# ---------------------------------------------------------------------------------------------- configs that name code


PLACES = ["hf-hub:someone/model", "local-dir:/tmp/model", "https://nowhere/model", "a:b"]


@pytest.fixture
def offline(monkeypatch):
    def ask(*args, **kwargs):
        pytest.fail("the network was asked")

    for name in ("socket.create_connection", "socket.getaddrinfo", "urllib.request.urlopen"):
        monkeypatch.setattr(name, ask)


@pytest.mark.parametrize("key", ["timm_model_name", "hf_model_name"])
@pytest.mark.parametrize("place", [*PLACES, "/tmp/model", "../model"])
def test_a_clip_folder_names_no_model_elsewhere(key, place, tmp_path, offline):
    path = whole("clip/open_clip_config.json", tmp_path)
    for tower in ("vision_cfg", "text_cfg"):
        config = read_json(DATA / "shapes_clip" / "open_clip_config.json")
        config["model_cfg"][tower][key] = place
        write_json(path, config)
        assert key in refused(ClipEmbedder.load, str(path.parent))


@pytest.mark.parametrize("name", [*PLACES, "builtins.eval", "os.system", "x" * 10_000, "a\0b", "", None, ["shapes"]])
def test_a_generator_names_no_clip_elsewhere(name, tmp_path, offline):
    path = whole("generator/config.json", tmp_path)
    write_json(path, read_json(path) | {"clip": {"name": name, "pretrained": "x"}})
    refused(READERS["generator/config.json"], path)


# ---------------------------------------------------------------------------------------------- notebook parameters


HOSTILE = ["; rm -rf /", "$(touch x)", "`touch x`", "'; import os; '", '"; import os; "', '"""', "a\nimport os\n"]
HOSTILE += ["\\", '\\"', "{x}", "%s", "!ls", "%run x", "# comment", "a=b=c", "\x00", "\u2028", "\udcff", "None or 1"]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(HOSTILE) | st.text())
def test_a_value_becomes_a_literal(value):
    """What is given by -p stands in the injected cell as one literal, which gives the value back."""
    known = {"DATA": "", "SEED": 0}
    assert parse_parameter(f"DATA={value}", known) == ("DATA", value)
    given = {"DATA": value}
    with contextlib.suppress(ClipgenError):  # no number
        given["SEED"] = parse_parameter(f"SEED={value}", known)[1]
    for key, parsed in given.items():
        (assignment,) = ast.parse(PythonTranslator.codify({key: parsed})).body
        assert isinstance(assignment, ast.Assign) and assignment.targets[0].id == key
        assert ast.literal_eval(assignment.value) == parsed


@pytest.mark.parametrize("text", ["os.system=1", "a b=1", "DATA;x=1", "=1", "DATA", "a[0]=1", "x\nimport os=1"])
def test_a_key_is_a_plain_name(text):
    assert "not KEY=VALUE" in refused(parse_parameter, text, {"DATA": ""})


# ---------------------------------------------------------------------------------------------- our own source


NEVER = "pickle cPickle _pickle dill cloudpickle joblib marshal shelve code runpy"
CALLS = (
    "eval exec compile __import__ os.system os.popen os.execv os.execvp os.spawnv yaml.load yaml.unsafe_load "
    "yaml.full_load torch.hub.load pickle.load pickle.loads pd.read_pickle"
)
OPTIONS = {("allow_pickle", True), ("weights_only", False), ("shell", True), ("trust_remote_code", True)}


def unsafe(source: str) -> list[str]:
    """Imports and calls in a source that could run what a file or a parameter holds."""
    nodes = list(ast.walk(ast.parse(source)))
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    found = [f"imports {name}" for name in imported if name.split(".")[0] in NEVER.split()]
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {(k.arg, k.value.value) for k in call.keywords if isinstance(k.value, ast.Constant)}
        if (
            name in CALLS.split()
            or given & OPTIONS
            or (name.endswith("torch.load") and ("weights_only", True) not in given)
            or name.endswith((".extractall", ".unpack_archive"))
            or (name.endswith(".extract") and (call.args or call.keywords))  # of archives; that of tokens takes nothing
        ):
            found.append(f"{call.lineno}: {name}")
    return found


@pytest.mark.parametrize(
    "path", sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("notebooks/*.ipynb")]), ids=lambda p: p.name
)
def test_source_runs_nothing_that_it_reads(path):
    """In a notebook a line of IPython's own (%, !), which may be a shell's, is no Python and fails too."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(source, as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert unsafe(source) == []


LINES = """torch.load(x); torch.load(x, weights_only=False); np.load(x, allow_pickle=True); import pickle; eval(x); exec(x);
from pickle import loads; os.system(x); subprocess.run(x, shell=True); yaml.load(x); archive.extractall(x); tar.extract(m, x)"""


@pytest.mark.parametrize("line", LINES.split(";"))
def test_the_scan_sees_it(line):
    assert unsafe(line.strip())


def test_a_name_from_outside_is_imported_nowhere():
    """`import_module` is the package's own lazy loading, by a table of its own; `jit.load` is of archives of known hashes."""
    for word, users in (("import_module", ["__init__.py"]), ("jit.load(", ["clip_embed.py"])):
        found = [path.name for path in PACKAGE.rglob("*.py") if word in path.read_text(encoding="utf-8")]
        assert found == users
    with pytest.raises(AttributeError):
        clipgen_lib.os  # noqa: B018
