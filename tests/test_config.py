import ast
import json
from dataclasses import asdict, fields, replace

import pytest
from conftest import ROOT

from clipgen_lib import config
from clipgen_lib.config import Preset, TransformerConfig, VQGANConfig, from_dict, load_preset, with_clip
from clipgen_lib.runtime.runs import ClipgenError

NAMES = ("smoke", "laptop", "reference", "gpu64", "coco", "imagenet")
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
    smoke, laptop, reference, _, coco, imagenet = map(load_preset, NAMES)
    assert laptop.vqgan.codebook_size == 256 and laptop.transformer_train.steps == 8_000
    assert replace(reference.vqgan, codebook_size=256, restart_after=20) == laptop.vqgan
    assert replace(smoke.vqgan, channels=64, codebook_size=256) == laptop.vqgan
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
