"""Whatever lies in a file: a reader gives what it promises, or one sentence of ours; nothing else, and no new file beside it.

Each property takes hypothesis' data and an empty folder. The quick run is the same every time; the long one is marked slow.
"""

import copy
import io
import json
import math
import shutil
import struct
import tempfile
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.config import ClassifierConfig, Preset, from_dict, load_preset
from clipgen_lib.data.datasets import open_images
from clipgen_lib.metrics.captions import read_captions, split_prompts, texts_of
from clipgen_lib.metrics.classifier import Classifier
from clipgen_lib.metrics.statistics import read_statistics
from clipgen_lib.runtime.checkpoints import load_checkpoint, load_strictly, read_weights, save_checkpoint, save_weights
from clipgen_lib.runtime.runs import DATA, ClipgenError, Run, read_json
from clipgen_lib.text_to_image import TextToImage
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN
from clipgen_lib.workbench import Workbench

PARTS = {f.name: type(getattr(Preset(), f.name)) for f in fields(Preset) if is_dataclass(getattr(Preset(), f.name))}
LONGEST = 600  # characters of a sentence, without the test's own folder in it


def outcome(call, folder, *named):
    """What a reader returns, None where it refuses; the refusal is one sentence that names the file or the entry."""
    before = sorted(folder.rglob("*"))
    try:
        value = call()
    except ClipgenError as error:
        value, text = None, str(error)
        assert text.splitlines() == [text] and text.encode(), repr(text)
        assert len(text.replace(str(folder), "")) <= LONGEST, text
        assert any(name in text for name in named), text
    assert sorted(folder.rglob("*")) == before
    return value


# ---------------------------------------------------------------------------------------------- strategies

NUMBERS = [0, -1, 10**400, 2**63, 1e308, -math.inf]
TEXTS = ["", "..", "../x.png", "/etc/passwd", "a\0b", "a\nb", "x" * 10_000, "\ud800", "1" * 5_000, "hf-hub:a/b"]
PLAIN = [st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)]
ODD = st.one_of(*PLAIN, st.sampled_from([*NUMBERS, *TEXTS, "builtins.eval", [], {}, [[[]]], {"a": None}]))
ODD = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def mutated(draw, valid):
    """A copy of a JSON value with up to three places of it replaced, dropped or joined by others."""
    content = copy.deepcopy(valid)

    def odd():
        return copy.deepcopy(draw(ODD))  # what is drawn may be changed in the next round, and is hypothesis' own

    for _ in range(draw(st.integers(0, 3))):
        node = content
        while True:
            places = sorted(node) if isinstance(node, dict) else list(range(len(node)))
            if not places:
                break
            place = draw(st.sampled_from(places))
            if isinstance(node[place], (dict, list)) and draw(st.integers(0, 3)):
                node = node[place]
                continue
            action = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
            if action == "drop":
                del node[place]
            elif action == "replace":
                node[place] = odd()
            elif isinstance(node, dict):
                node[draw(st.text(max_size=8))] = odd()
            else:
                node.append(odd())
            break
    return content


def damaged(draw, whole: bytes) -> bytes:
    """Bytes that were a file: cut short, a few of them changed, some taken out or put in; or never a file at all."""
    kind = draw(st.sampled_from(["whole", "cut", "changed", "changed", "spliced", "longer", "noise"]))
    if kind == "noise":
        return draw(st.binary(max_size=200))
    content, at = bytearray(whole), draw(st.integers(0, max(len(whole) - 1, 0)))
    if kind == "cut":
        del content[at:]
    if kind == "longer":
        content += draw(st.binary(min_size=1, max_size=50))
    if kind == "spliced":
        content[at : at + draw(st.integers(0, 20))] = draw(st.binary(max_size=20))
    for _ in range(draw(st.integers(1, 6)) if kind == "changed" else 0):
        # headers are short and at the beginning: look there more often
        content[draw(st.integers(0, min(len(whole), 120) - 1) | st.integers(0, len(whole) - 1))] = draw(
            st.integers(0, 255)
        )
    return bytes(content)


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode("utf-8", "surrogatepass"))
    return path


# ---------------------------------------------------------------------------------------------- configs and json


def config_from_json(data, folder):
    kind = data.draw(st.sampled_from(list(PARTS.values())))
    values = mutated(data.draw, json.loads(json.dumps(asdict(kind()))))
    values = values if data.draw(st.integers(0, 9)) else data.draw(ODD)
    made = outcome(lambda: from_dict(kind, values), folder, kind.__name__, *(f.name for f in fields(kind)))
    if made is not None:
        assert json.loads(json.dumps(asdict(made))) == values
        assert all(math.isfinite(v) for v in values.values() if isinstance(v, (int, float)))


def preset_with_overrides(data, folder):
    part = data.draw(st.sampled_from(list(PARTS)))
    known = [f.name for f in fields(PARTS[part])]
    values = data.draw(st.dictionaries(st.sampled_from(known) | st.text(max_size=5), ODD, max_size=3))
    made = outcome(lambda: load_preset("smoke", **{part: values}), folder, PARTS[part].__name__, *known)
    assert made is None or all(getattr(getattr(made, part), key) == value for key, value in values.items())


def json_file(data, folder):
    content = json.dumps(asdict(load_preset("smoke"))).encode()
    hostile = [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5_000, b'{"a": ' + b"9" * 5_000 + b"}"]
    hostile += [b"\xff\xfe{}", b"NaN", b"{}x", b""]
    path = write(
        folder / "x.json",
        data.draw(st.sampled_from(hostile)) if data.draw(st.booleans()) else damaged(data.draw, content),
    )
    assert isinstance(outcome(lambda: read_json(path), folder, str(path)), (dict, type(None)))


# ---------------------------------------------------------------------------------------------- weights

STATE = {"step": 3, "model": {"a": torch.arange(6.0).view(2, 3), 7: [torch.ones(1), "x", None]}}


def checkpoint(data, folder):
    save_checkpoint(folder / "whole", STATE, {"kind": "test"})
    path = write(folder / "c.safetensors", damaged(data.draw, (folder / "whole").read_bytes()))
    found = outcome(lambda: load_checkpoint(path), folder, str(path))
    assert found is None or all(isinstance(part, dict) for part in found)


def checkpoint_of_hostile_json(data, folder):
    skeleton = {"pairs": [["a", {"tensor": "000000"}], [7, [{"pairs": [["b", 1]]}, "text"]]]}
    hostile = ["[" * 100_000, '{"tensor": "000009"}', '{"tensor": ["x"]}', '{"pairs": 5}', '{"pairs": [[1]]}']
    hostile += ['{"pairs": [[[1], 2]]}', "5", ""]
    state = (
        data.draw(st.sampled_from(hostile)) if data.draw(st.booleans()) else json.dumps(mutated(data.draw, skeleton))
    )
    meta = data.draw(st.sampled_from(["{}", "{}", "{}", "[]", "", "{" * 100_000]))
    path = write(folder / "c.safetensors", save({"000000": torch.ones(2)}, {"state": state, "meta": meta}))
    found = outcome(lambda: load_checkpoint(path), folder, str(path))
    assert found is None or all(isinstance(part, dict) for part in found)


def safetensors_header(data, folder):
    """Shapes, dtypes and places of another making, some of them huge, over the same bytes."""
    header = {
        "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "bias": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
    }
    header = mutated(data.draw, header)
    if data.draw(st.booleans()):
        header["weight"] = {
            "dtype": data.draw(st.sampled_from(["F32", "F4", "F8_E8M0", "BOOL", "C64", "I64", "F6_E2M3"])),
            "shape": data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 6, 24, 48, 2**40, 2**62]), max_size=4)),
            "data_offsets": [0, 24],
        }
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = data.draw(st.sampled_from([len(text)] * 5 + [0, 2**63, len(text) + 9]))
    write(folder / "model.safetensors", struct.pack("<Q", length) + text + bytes(32))

    def load():
        load_strictly(module := torch.nn.Linear(3, 2), read_weights(folder), folder)
        return module

    module = outcome(load, folder, str(folder))
    assert module is None or (module.weight == 0).all()


def classifier_folder(data, folder):
    config = {"config": asdict(ClassifierConfig(width=8)), "names": ["a cat", "a dog"]}
    save_weights(folder / "classifier", SMALLEST)
    write(folder / "classifier" / "config.json", mutated(data.draw, config))
    loaded = outcome(lambda: Classifier.load(folder / "classifier"), folder, str(folder), "ClassifierConfig")
    assert loaded is None or len(loaded.names) == 2


def clip_folder(data, folder):
    shutil.copytree(DATA / "shapes_clip", folder / "clip")
    config = json.loads((folder / "clip" / "open_clip_config.json").read_text())
    write(folder / "clip" / "open_clip_config.json", mutated(data.draw, config))
    clip = outcome(lambda: ClipEmbedder.load(str(folder / "clip")), folder, str(folder), "CLIP")
    assert clip is None or clip.texts(["a red circle"]).shape == (1, clip.dim)


def clip_merges(data, folder):
    shutil.copytree(DATA / "shapes_clip", folder / "clip")
    path = folder / "clip" / "bpe_merges.txt.gz"
    write(path, damaged(data.draw, path.read_bytes()))
    outcome(lambda: ClipEmbedder.load(str(folder / "clip")), folder, str(folder))


def metrics(data, folder):
    lines = [{"stage": "vqgan", "step": 1, "loss": 0.5}, {"stage": "vqgan", "step": 2, "loss": None}]
    content = "".join(json.dumps(mutated(data.draw, line)) + "\n" for line in lines).encode("utf-8", "surrogatepass")
    write(folder / "metrics.jsonl", damaged(data.draw, content))
    found = outcome(lambda: Run(folder).metrics("vqgan"), folder, str(folder))
    assert all(line["stage"] == "vqgan" and isinstance(line["step"], int) for line in found)


SMALLEST = Classifier(ClassifierConfig(width=8), ["a cat", "a dog"])


# ---------------------------------------------------------------------------------------------- folders

_BASE = tempfile.TemporaryDirectory()  # goes when the process ends
WHOLE = Path(_BASE.name)


@cache
def whole(name: str) -> Path:
    """A whole folder of each kind, made once."""
    folder, smoke = WHOLE / name, load_preset("smoke")
    torch.manual_seed(0)
    if name == "vqgan":
        save_weights(folder, VQGAN(replace(smoke.vqgan, channels=8, z_channels=16, codebook_size=32, code_dim=8)))
    if name == "transformer":
        save_weights(
            folder, ImageTransformer(replace(smoke.transformer, layers=1, width=32), 32, smoke.vqgan.side**2, 256)
        )
    if name == "generator":
        vqgan, transformer = VQGAN.load(whole("vqgan")), ImageTransformer.load(whole("transformer"))
        source = {"name": "shapes", "pretrained": None}
        TextToImage.from_parts(vqgan, transformer, clip(), source, smoke.sample).export(folder)
    if name == "run":
        in_results(WHOLE, lambda: Workbench.open("smoke", "run"))
    return folder


@cache
def clip() -> ClipEmbedder:
    return ClipEmbedder.load()


def in_results(results: Path, call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipgen_lib.runtime.runs.RESULTS", results)
        return call()


def with_one_file_mutated(data, name: str, folder: Path) -> Path:
    """A copy of a whole folder in which one file is another: of a JSON its values, of anything else its bytes."""
    shutil.copytree(whole(name), folder / name)
    path = data.draw(st.sampled_from(sorted(p for p in (folder / name).rglob("*") if p.is_file())))
    if path.suffix == ".json" and data.draw(st.integers(0, 4)):
        write(path, mutated(data.draw, json.loads(path.read_text())))
    else:
        write(path, damaged(data.draw, path.read_bytes()))
    return folder / name


def model_folder(data, folder):
    loads = {
        "vqgan": VQGAN.load,
        "transformer": ImageTransformer.load,
        "generator": lambda place: TextToImage.from_pretrained(place).clip,
    }
    name = data.draw(st.sampled_from(sorted(loads)))
    place = with_one_file_mutated(data, name, folder)
    outcome(lambda: loads[name](place), folder, str(folder), "Config", "Sizes", "CLIP", "image_size", "codebook_update")


def run_folder(data, folder):
    with_one_file_mutated(data, "run", folder)
    names = ("run", "data", "preset", "Config", "CLIP")
    opened = outcome(lambda: in_results(folder, lambda: Workbench.open("smoke", "run")), folder, *names)
    again = outcome(lambda: in_results(folder, lambda: Workbench.reopen("run")), folder, *names)
    assert opened is None or (opened.preset, opened.seed) == (again.preset, again.seed)


def statistics_file(data, folder):
    stream = io.BytesIO()
    np.savez(stream, mu=np.zeros(2), sigma=np.eye(2))
    path = write(folder / "x.npz", damaged(data.draw, stream.getvalue()))
    found = outcome(lambda: read_statistics(path), folder, str(path))
    assert found is None or found.sigma.shape == (len(found.mu),) * 2


# ---------------------------------------------------------------------------------------------- texts


def caption_list(data, folder):
    lines = b"a.png\ta cat\nb/c.png\ta dog on a mat\n./d\ttwo dogs\n/\tnothing\n..\tabove\n"
    path = write(folder / "captions.txt", damaged(data.draw, lines))
    found = outcome(lambda: read_captions(path), folder, str(path))
    assert found is None or all(name and text and "\n" not in text for name, text in found.items())


def caption_json(data, folder):
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b/c.png"}],
        "annotations": [{"image_id": 1, "caption": "a cat"}, {"image_id": 2, "caption": "a dog"}],
    }
    path = write(
        folder / "captions.json",
        mutated(data.draw, data.draw(st.sampled_from([coco, {"a.png": "a cat", "c": "a dog"}]))),
    )
    found = outcome(lambda: read_captions(path), folder, str(path))
    assert found is None or all(isinstance(text, str) for text in found.values())
    pictures = small_folder(folder / "images", ["a.png"])
    rows = outcome(lambda: texts_of(open_images(pictures, "train", 8), path), folder, str(path))
    assert rows is None or (set(rows) <= {0} and all(rows.values()))


def prompts(data, folder):
    text = data.draw(st.text(alphabet="| \n\0ab", max_size=30) | st.just("|" * 10_000) | st.text())
    found = outcome(lambda: split_prompts(text), folder, "PROMPTS")
    assert found is None or all(p and "|" not in p and p == " ".join(p.split()) for p in found)


def small_folder(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / "train" / name, "PNG")
    shutil.copytree(folder / "train", folder / "val", dirs_exist_ok=True)
    return folder


# ---------------------------------------------------------------------------------------------- all of them


QUICK = {
    config_from_json: 200,
    preset_with_overrides: 200,
    json_file: 100,
    checkpoint: 150,
    checkpoint_of_hostile_json: 100,
    safetensors_header: 150,
    classifier_folder: 12,
    caption_list: 100,
    caption_json: 100,
    prompts: 80,
    metrics: 100,
    clip_folder: 25,
    clip_merges: 10,
    model_folder: 60,
    run_folder: 60,
    statistics_file: 60,
}


def attempt(check, examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def one(data):
        with tempfile.TemporaryDirectory() as folder:
            check(data, Path(folder))

    one()


@pytest.mark.filterwarnings("ignore")  # Pillow's, of files that are damaged on purpose
@pytest.mark.parametrize("check", QUICK, ids=lambda check: check.__name__)
def test_readers(check):
    attempt(check, QUICK[check])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", QUICK, ids=lambda check: check.__name__)
def test_readers_at_length(check):
    attempt(check, 20 * QUICK[check])
