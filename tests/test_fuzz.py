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
import open_clip
import pytest
import torch
from conftest import saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file

from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.config import ClassifierConfig, Preset, from_dict, load_preset
from clipgen_lib.data.datasets import open_images
from clipgen_lib.data.images import MAX_ASPECT, load_image
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


def places(node):
    """Every place in a JSON value: a list or object, and the key in it."""
    keys = sorted(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [(node, key) for key in keys] + [place for key in keys for place in places(node[key])]


def mutated(draw, valid):
    """A copy of a JSON value with up to three places of it replaced, dropped or joined by others."""
    content = copy.deepcopy(valid)
    for _ in range(draw(st.integers(0, 3))):
        known = places(content)
        if not known:
            break
        node, key = known[draw(st.integers(0, len(known) - 1))]
        odd = copy.deepcopy(draw(ODD))  # what is drawn may be changed in the next round, and is hypothesis' own
        action = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if action == "drop":
            del node[key]
        elif action == "replace":
            node[key] = odd
        elif isinstance(node, dict):
            node[draw(st.text(max_size=8))] = odd
        else:
            node.append(odd)
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
        near = st.integers(0, min(len(whole), 120) - 1)  # headers are short and at the beginning: look there more often
        content[draw(near | st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def read_back(read, path, content):
    """What is read of a file of that content, None where it is refused."""
    write(path, content)
    return outcome(lambda: read(path), path.parent, str(path))


# ---------------------------------------------------------------------------------------------- configs and files


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
    content = data.draw(st.sampled_from(hostile)) if data.draw(st.booleans()) else damaged(data.draw, content)
    assert isinstance(read_back(read_json, folder / "x.json", content), (dict, type(None)))


STATE = {"step": 3, "model": {"a": torch.arange(6.0).view(2, 3), 7: [torch.ones(1), "x", None]}}
HOSTILE_STATES = ["[" * 100_000, '{"tensor": "000009"}', '{"tensor": ["x"]}', '{"pairs": 5}', '{"pairs": [[1]]}']
HOSTILE_STATES += ['{"pairs": [[[1], 2]]}', "5", ""]


def checkpoint(data, folder):
    """Damaged bytes, or whole safetensors around a JSON that describes something else."""
    if data.draw(st.booleans()):
        save_checkpoint(folder / "whole", STATE, {"kind": "test"})
        content = damaged(data.draw, (folder / "whole").read_bytes())
    else:
        skeleton = {"pairs": [["a", {"tensor": "000000"}], [7, [{"pairs": [["b", 1]]}, "text"]]]}
        state = data.draw(st.sampled_from([json.dumps(mutated(data.draw, skeleton))] * 8 + HOSTILE_STATES))
        meta = data.draw(st.sampled_from(["{}", "{}", "{}", "[]", "", "{" * 100_000]))
        content = save({"000000": torch.ones(2)}, {"state": state, "meta": meta})
    found = read_back(load_checkpoint, folder / "c.safetensors", content)
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
    text = json.dumps(header).encode()
    length = data.draw(st.sampled_from([len(text)] * 5 + [0, 2**63, len(text) + 9]))
    write(folder / "model.safetensors", struct.pack("<Q", length) + text + bytes(32))

    def load():
        load_strictly(module := torch.nn.Linear(3, 2), read_weights(folder), folder)
        return module

    module = outcome(load, folder, str(folder))
    assert module is None or (module.weight == 0).all()


def metrics(data, folder):
    lines = [{"stage": "vqgan", "step": 1, "loss": 0.5}, {"stage": "vqgan", "step": 2, "loss": None}]
    content = "".join(json.dumps(mutated(data.draw, line)) + "\n" for line in lines)
    write(folder / "metrics.jsonl", damaged(data.draw, content.encode()))
    found = outcome(lambda: Run(folder).metrics("vqgan"), folder, str(folder))
    assert all(line["stage"] == "vqgan" and isinstance(line["step"], int) for line in found)


# ---------------------------------------------------------------------------------------------- folders

_BASE = tempfile.TemporaryDirectory()  # goes when the process ends
WHOLE = Path(_BASE.name)


@cache
def whole(name: str) -> Path:
    """A whole folder of each kind, made once."""
    folder, smoke = WHOLE / name, load_preset("smoke")
    torch.manual_seed(0)
    if name == "classifier":
        save_weights(folder, Classifier(ClassifierConfig(width=8), {"class": ["a cat", "a dog"]}))
    if name == "clip":
        config = json.loads((DATA / "shapes_clip" / "open_clip_config.json").read_text())
        config["model_cfg"]["vision_cfg"] |= {"width": 8, "layers": [1, 1, 1, 1]}
        config["model_cfg"]["text_cfg"] |= {"width": 16, "heads": 1, "layers": 1}
        write(folder / "open_clip_config.json", config)
        weights = open_clip.CLIP(**config["model_cfg"]).state_dict()
        save_file({key: value.clone() for key, value in weights.items()}, folder / "open_clip_model.safetensors")
        shutil.copy(DATA / "shapes_clip" / "bpe_merges.txt.gz", folder)
    if name == "vqgan":
        save_weights(folder, VQGAN(replace(smoke.vqgan, channels=8, z_channels=16, codebook_size=32, code_dim=8)))
    if name == "transformer":
        config = replace(smoke.transformer, layers=1, width=32)
        save_weights(folder, ImageTransformer(config, 32, smoke.vqgan.side**2, 256))
    if name == "generator":
        vqgan, transformer = VQGAN.load(whole("vqgan")), ImageTransformer.load(whole("transformer"))
        clip = str(whole("clip"))
        source = {"name": clip, "pretrained": None}
        TextToImage.from_parts(vqgan, transformer, ClipEmbedder.load(clip), source, smoke.sample).export(folder)
    if name == "images":
        for place in ("train/a.png", "train/b.png", "val/a.png", "val/b.png"):
            write(folder / place, saved(Image.new("RGB", (8, 8), "red"), "PNG"))
    if name == "run":
        in_results(WHOLE, lambda: Workbench.open("smoke", "run"))
    return folder


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


LOADS = {  # how a folder is read, and what must hold of it
    "classifier": lambda place: sum(map(len, Classifier.load(place).names.values())) == 2,
    "clip": lambda place: ClipEmbedder.load(str(place)).texts(["a red circle"]).shape == (1, 256),
    "generator": lambda place: TextToImage.from_pretrained(place).clip.dim == 256,
    "transformer": ImageTransformer.load,
    "vqgan": VQGAN.load,
}


def model_folder(data, folder):
    name = data.draw(st.sampled_from(sorted(LOADS)))
    place = with_one_file_mutated(data, name, folder)
    named = (str(folder), "Config", "Sizes", "CLIP", "image_size", "codebook_update")
    assert outcome(lambda: LOADS[name](place), folder, *named) is not False


def run_folder(data, folder):
    with_one_file_mutated(data, "run", folder)
    names = ("run", "data", "preset", "Config", "CLIP")
    opened = outcome(lambda: in_results(folder, lambda: Workbench.open("smoke", "run")), folder, *names)
    again = outcome(lambda: in_results(folder, lambda: Workbench.reopen("run")), folder, *names)
    assert opened is None or (opened.preset, opened.seed) == (again.preset, again.seed)


def statistics_file(data, folder):
    stream = io.BytesIO()
    np.savez(stream, mu=np.zeros(2), sigma=np.eye(2))
    found = read_back(read_statistics, folder / "x.npz", damaged(data.draw, stream.getvalue()))
    assert found is None or found.sigma.shape == (len(found.mu),) * 2


# ---------------------------------------------------------------------------------------------- images and texts


@cache
def whole_images() -> list[bytes]:
    """Small whole images of every format and of modes that are rare, one of them animated, three of them turned by EXIF."""
    values = np.arange(12 * 9 * 3, dtype=np.uint8).reshape(9, 12, 3)
    rgb, exif, grey = Image.fromarray(values), Image.Exif(), values[:, :, 0].astype(np.float32)
    exif[0x0112] = 6
    files = [saved(rgb, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")]
    files += [saved(rgb, kind, exif=exif) for kind in ("JPEG", "WEBP", "PNG")]
    modes = (("LA", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("RGBA", "WEBP"), ("1", "PNG"), ("L", "PPM"))
    files += [saved(rgb.convert(mode), kind) for mode, kind in modes]
    files += [saved(rgb.convert("P"), kind, transparency=3) for kind in ("PNG", "GIF")]
    files += [saved(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)])]
    files += [saved(rgb, "TIFF", compression=name) for name in ("tiff_lzw", "jpeg")]
    files += [saved(Image.fromarray(values[:, :, 0].astype(np.uint16) * 200), "PNG")]
    floats = (grey, np.where(grey < 9, np.nan, 1).astype(np.float32))
    return files + [saved(Image.fromarray(array), "TIFF") for array in floats]


def image_bytes(data, folder):
    content = damaged(data.draw, data.draw(st.sampled_from(whole_images())))
    size = data.draw(st.sampled_from([1, 8, 31]))
    with np.errstate(all="ignore"):
        found = outcome(lambda: load_image(content, size, "the file"), folder, "the file ")
    if found is not None:
        assert found.dtype == torch.uint8 and found.shape[0] == 3 and min(found.shape[1:]) == size
        assert max(found.shape[1:]) <= MAX_ASPECT * size + 1


def image_metadata(data, folder):
    """COCO's annotations or metadata.jsonl with odd entries or bytes."""
    root = shutil.copytree(whole("images"), folder / "images")
    entries = [{"id": i, "file_name": f"{name}.png", "text": "a"} for i, name in enumerate("abc")]
    if data.draw(st.booleans()):
        content = {"images": entries, "annotations": [{"image_id": 0, "caption": "a"}]}
        path = write(root / "annotations" / "captions_val.json", mutated(data.draw, content))
    else:
        lines = "".join(json.dumps(mutated(data.draw, entry)) + "\n" for entry in entries)
        path = write(root / "val" / "metadata.jsonl", damaged(data.draw, lines.encode()))

    def captions():
        images = open_images(root, "val", 8)
        return images.captions if images.has_captions else []

    found = outcome(captions, folder, path.name)
    assert found is None or all(isinstance(text, str) for texts in found for text in texts)


def caption_list(data, folder):
    lines = b"a.png\ta cat\nb/c.png\ta dog on a mat\n./d\ttwo dogs\n/\tnothing\n..\tabove\n"
    found = read_back(read_captions, folder / "captions.txt", damaged(data.draw, lines))
    assert found is None or all(name and text and "\n" not in text for name, text in found.items())


def caption_json(data, folder):
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b/c.png"}],
        "annotations": [{"image_id": 1, "caption": "a cat"}, {"image_id": 2, "caption": "a dog"}],
    }
    content = data.draw(st.sampled_from([coco, {"a.png": "a cat", "c": "a dog"}]))
    path = folder / "captions.json"
    found = read_back(read_captions, path, mutated(data.draw, content))
    assert found is None or all(isinstance(text, str) for text in found.values())
    rows = outcome(lambda: texts_of(open_images(whole("images"), "train", 8), path), folder, str(path))
    assert rows is None or (set(rows) <= {0, 1} and all(rows.values()))


def prompts(data, folder):
    text = data.draw(st.text(alphabet="| \n\0ab", max_size=30) | st.just("|" * 10_000) | st.text())
    found = outcome(lambda: split_prompts(text), folder, "PROMPTS")
    assert found is None or all(p and "|" not in p and p == " ".join(p.split()) for p in found)


# ---------------------------------------------------------------------------------------------- all of them


QUICK = {  # examples -> properties
    300: [image_bytes],
    200: [config_from_json, preset_with_overrides],
    250: [checkpoint],
    150: [safetensors_header],
    100: [json_file, metrics, model_folder, caption_list, caption_json],
    80: [prompts],
    60: [run_folder, statistics_file, image_metadata],
}
SAME_EVERY_TIME = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.filterwarnings("ignore")  # Pillow's, of files that are damaged on purpose
@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("examples, check", [(number, check) for number, checks in QUICK.items() for check in checks])
def test_readers(examples, check, times):
    @settings(max_examples=times * examples, **SAME_EVERY_TIME)
    @given(st.data())
    def attempt(data):
        with tempfile.TemporaryDirectory() as folder:
            check(data, Path(folder))

    attempt()
