import ast
import json
import shlex
from dataclasses import asdict, fields, replace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from conftest import ROOT

from clipgen_lib import config
from clipgen_lib.config import Preset, TransformerConfig, VQGANConfig, from_dict, load_preset, with_clip
from clipgen_lib.runtime.runs import ClipgenError

NAMES = ("smoke", "laptop", "reference", "fashion", "gpu64", "coco", "imagenet")
PARTS = [part.name for part in fields(Preset)[1:]]
LACKING = {key: value for key, value in asdict(TransformerConfig()).items() if key != "heads"}


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: load_preset("desktop"), f"unknown preset 'desktop': choose one of {', '.join(NAMES)}"),
        (lambda: load_preset("smoke", vqgam={}), "no part 'vqgam'"),
        (lambda: load_preset("smoke", vqgan_train={"step": 3}), "no field 'step'"),
        (lambda: from_dict(VQGANConfig, asdict(VQGANConfig()) | {"step": 3}), "no field 'step'"),
        (lambda: from_dict(TransformerConfig, LACKING), "lacks heads"),
        (lambda: from_dict(VQGANConfig, None), "VQGANConfig is None, not its fields"),
    ],
)
def test_unknown_names_are_refused(call, sentence):
    with pytest.raises(ClipgenError, match=sentence):
        call()


CHOICES = {"VQGANTrainConfig": "precision perceptual optimizer", "TransformerConfig": "conditioning"}
CHOICES |= {"TransformerTrainConfig": "embedding_path embedding_form", "SampleConfig": "guidance_schedule"}
CHOICES |= {"EvaluateConfig": "protocol"}


@pytest.mark.parametrize(
    "kind, values, sentence",
    [
        *((kind, {name: "os.system"}, f"{name} .* be '") for kind in CHOICES for name in CHOICES[kind].split()),
        ("VQGANConfig", {"codebook_update": "sgd"}, "codebook_update of VQGANConfig is 'sgd': .*'gradient', 'ema' or"),
        ("VQGANConfig", {"image_size": 60}, "image_size 60 does not divide by the downsampling factor 16"),
        ("VQGANConfig", {"codebook_size": 70_000}, "codebook_size .* less than or equal to 65536"),
        ("VQGANConfig", {"channel_mult": ()}, "channel_mult .* at least 1 item"),
        ("VQGANConfig", {"channel_mult": (1, 0)}, "channel_mult of VQGANConfig is 0: .* greater than or equal to 1"),
        ("VQGANConfig", {"res_blocks": 1_001}, "res_blocks .* less than or equal to 1000"),
        ("TransformerConfig", {"heads": 5}, "width 1024 does not divide by 5 heads"),
        ("OptimConfig", {"steps": -1}, "steps of OptimConfig is -1: it should be greater than or equal to 0"),
        ("OptimConfig", {"steps": 2.5}, "steps of OptimConfig is 2.5: it should be a valid integer"),
        ("OptimConfig", {"steps": True}, "steps of OptimConfig is True"),
        ("OptimConfig", {"steps": 10**5_000}, "steps of OptimConfig is too long to show"),
        ("OptimConfig", {"lr": "0.1"}, "lr of OptimConfig is '0.1': it should be a valid number"),
        ("OptimConfig", {"lr": float("nan")}, "lr of OptimConfig is nan: it should be a finite number"),
        ("OptimConfig", {"beta2": 1}, "beta2 of OptimConfig is 1: it should be less than 1"),
        ("OptimConfig", {"compile": 1}, "compile of OptimConfig is 1: it should be a valid boolean"),
        ("VQGANTrainConfig", {"adversarial_ramp": (0.1,)}, "adversarial_ramp"),
        ("SampleConfig", {"guidance_interval": (0.6, 0.5)}, "two rising shares"),
        ("SampleConfig", {"top_p": 1.5}, "top_p .* less than or equal to 1"),
        ("EvaluateConfig", {"blur": [0, 1]}, "blur .* valid tuple"),
        ("ClipConfig", {"name": None}, "name of ClipConfig is None: it should be a valid string"),
        ("Preset", {"vqgan": {}}, "VQGANConfig"),
    ],
)
def test_wrong_values_are_one_sentence(kind, values, sentence):
    kind = getattr(config, kind)
    with pytest.raises(ClipgenError, match=sentence) as error:
        kind(**values)
    assert len(str(error.value)) < 200
    with pytest.raises(ClipgenError):
        replace(kind(), **values)


def test_overrides_change_one_field():
    changed, plain = load_preset("smoke", transformer_train={"steps": 3}), load_preset("smoke")
    assert changed.transformer_train.steps == 3 and changed.vqgan_train == plain.vqgan_train
    assert load_preset("laptop", sample={"guidance": 3}).sample.guidance == 3.0
    assert changed.name == "smoke"


def test_presets_build_on_each_other():
    smoke, laptop, reference, fashion, _, coco, imagenet = map(load_preset, NAMES)
    assert laptop.vqgan.codebook_size == 512 and laptop.transformer_train.steps == 4_500
    assert replace(reference.vqgan, codebook_size=512, restart_after=40) == laptop.vqgan
    assert replace(fashion.vqgan, patch=4, codebook_size=512, restart_after=40, local=True) == laptop.vqgan
    assert fashion.sample == laptop.sample
    assert replace(smoke.vqgan, channels=64, codebook_size=512) == laptop.vqgan
    assert imagenet.vqgan == coco.vqgan and imagenet.transformer == coco.transformer


def test_every_field_is_read_outside_the_config():
    """A knob that nothing reads would be a lie in the preset."""
    paths = [path for path in (ROOT / "clipgen_lib").rglob("*.py") if path.name != "config.py"]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {"patch", "image_size", "channel_mult"}  # also read by properties of the config itself
    for part in PARTS:
        unread = {field.name for field in fields(getattr(Preset(), part))} - read
        assert not unread, f"{part}: nothing reads {unread}"


@pytest.mark.parametrize("name", NAMES)
def test_presets_survive_json(name):
    preset = load_preset(name)
    assert from_dict(Preset, json.loads(json.dumps(asdict(preset)))) == preset


def test_noise_and_perceptual_loss_go_with_the_clip():
    published, own = {"name": "ViT-B-32", "pretrained": "openai"}, {"name": "results/my/clip", "pretrained": None}
    smoke, gpu64 = load_preset("smoke"), load_preset("gpu64")
    changed = with_clip(smoke, published)
    assert (changed.transformer_train.noise_cos, changed.vqgan_train.perceptual) == (0.32, "none")
    assert changed.clip.name == "ViT-B-32" and changed.transformer == smoke.transformer
    assert with_clip(smoke, own).transformer_train == smoke.transformer_train
    assert with_clip(smoke, own).vqgan_train.perceptual == "clip"
    assert with_clip(gpu64, own).transformer_train.noise_cos == 0.85
    assert with_clip(gpu64, published).vqgan_train == gpu64.vqgan_train


def another(value, kind):
    """A value that the field may have as well."""
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if isinstance(value, tuple):  # the empty one is of protocols
        return ((0.1, 0.2) if isinstance(value[0], float) else (1, 2)) if value else ("clip",)
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return not value if isinstance(value, bool) else f"{value} 2"
    return value / 2 + 0.1 if isinstance(value, float) else 2 * value or 1


@pytest.mark.parametrize("part", PARTS)
def test_every_field_of_every_part_is_changed_by_a_text(part):
    before = getattr(load_preset("smoke"), part)
    kinds = get_type_hints(type(before))
    values = {field.name: another(getattr(before, field.name), kinds[field.name]) for field in fields(before)}
    assert all(value != getattr(before, name) for name, value in values.items())
    text = " ".join(f"{part}.{name}={shlex.quote(json.dumps(value).strip(chr(34)))}" for name, value in values.items())
    assert getattr(load_preset("smoke", text), part) == replace(before, **values)
    assert getattr(load_preset("smoke", {part: values}), part) == replace(before, **values)


def test_one_dial_sets_width_layers_batch_rate_and_steps():
    base = load_preset("laptop")
    large, coco = load_preset("laptop", "scale=4 transformer_train.warmup=9"), load_preset("coco", {"scale": 0.26})
    model, train = large.transformer, large.transformer_train
    assert (model.width, model.heads, model.layers) == (512, 16, 12) and large.vqgan == base.vqgan
    assert (train.batch_size, train.steps, train.lr, train.warmup) == (128, 9_000, 6e-3, 9)
    assert coco.transformer_train.batch_size == 68  # divides by its 4 backward passes
    assert load_preset("laptop", "scale=1") == base


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("scale=0", "scale is 0.0: give a number from 1/64 to 64"),
        ("scale=big", "scale is 'big': give a number"),
        ("transformer.wdth=2", "TransformerConfig has no field 'wdth': choose one of width"),
        ("transfrmer.width=2", "no part 'transfrmer': choose one of transformer, transformer_train"),
        ("width=2", "'width=2' is not PART.FIELD=VALUE"),
        ("sample.top_p='0.5", "is not PART.FIELD=VALUE"),
        ("transformer.width=wide", "width of TransformerConfig is 'wide': it should be a valid integer"),
        ("transformer.heads=5", "width 64 does not divide by 5 heads"),
        ("name.x=2", "no part 'name'"),
    ],
)
def test_changes_that_cannot_be_are_one_sentence(text, sentence):
    with pytest.raises(ClipgenError, match=sentence):
        load_preset("smoke", text)
    assert load_preset("smoke", "transformer.heads=5 transformer.width=100").transformer.width == 100  # taken together


def test_a_file_of_ones_own_is_a_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: smoke\ntransformer: {width: 128}\nvqgan_train:\n  lr: 1e-3\n")
    mine, smoke = load_preset(str(path)), load_preset("smoke")
    assert mine == replace(load_preset("smoke", "transformer.width=128 vqgan_train.lr=0.001"), name="mine")
    assert mine.vqgan == smoke.vqgan
    for content, sentence in (
        ("base: lap", "unknown preset 'lap'"),
        ("[", "is no preset"),
        (
            "base: laptop\nsample:\n  top_k: 1\n  top_k: 2",
            "is no preset .'top_k' stands twice among the keys that begin in line 3",
        ),
        ("sample: {top_k: 1}\nsample: {top_p: 0.5}", "'sample' stands twice among the keys that begin in line 1"),
        ("vqgan: 3", "part vqgan of a preset is 3"),
    ):
        path.write_text(content)
        with pytest.raises(ClipgenError, match=sentence):
            load_preset(str(path))
    with pytest.raises(ClipgenError, match="absent.yaml is missing"):
        load_preset("absent.yaml")
