import ast
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest

import clipgen_lib
from clipgen_lib.config import PRESETS, Preset, TransformerConfig, VQGANConfig, from_dict, load_preset
from clipgen_lib.runtime.runs import ClipgenError
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN
from clipgen_lib.workbench import count_and_step


def test_unknown_names_are_refused():
    with pytest.raises(ClipgenError, match="choose one of smoke, laptop"):
        load_preset("desktop")
    with pytest.raises(ClipgenError, match="no part 'vqgam'"):
        load_preset("smoke", vqgam={})
    with pytest.raises(ClipgenError, match="no field 'step'"):
        load_preset("smoke", vqgan_train={"step": 3})
    with pytest.raises(ClipgenError, match="no field step"):
        from_dict(VQGANConfig, asdict(VQGANConfig()) | {"step": 3})
    with pytest.raises(ClipgenError, match="lacks heads"):
        from_dict(TransformerConfig, {k: v for k, v in asdict(TransformerConfig()).items() if k != "heads"})


@pytest.mark.parametrize(
    "kind, values, word",
    [
        (VQGANConfig, {"codebook_update": "sgd"}, "codebook_update"),
        (VQGANConfig, {"image_size": 60}, "factor"),
        (VQGANConfig, {"codebook_size": 70_000}, "16 bits"),
        (TransformerConfig, {"heads": 5}, "5 heads"),
    ],
)
def test_contradictions_are_refused(kind, values, word):
    with pytest.raises(ClipgenError, match=word):
        kind(**values)


def test_overrides_change_one_field():
    changed, plain = load_preset("smoke", transformer_train={"steps": 3}), load_preset("smoke")
    assert changed.transformer_train.steps == 3 and changed.vqgan_train == plain.vqgan_train


def test_every_field_is_read_outside_the_config():
    """A knob that nothing reads would be a lie in the preset."""
    read = set()
    for path in Path(clipgen_lib.__file__).parent.glob("*.py"):
        if path.name != "config.py":
            read |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    inside = {"patch", "image_size", "channel_mult"}  # also read by properties of the config itself
    for part in fields(Preset):
        value = getattr(load_preset("smoke"), part.name)
        if is_dataclass(value):
            unread = {f.name for f in fields(value)} - read - inside
            assert not unread, f"{type(value).__name__}: nothing reads {unread}"


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_survive_json(name):
    preset = load_preset(name)
    for part in (preset.vqgan, preset.transformer, preset.sample):
        assert (
            from_dict(type(part), {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(part).items()}) == part
        )


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_of_released_models():
    """Parameter counts of public checkpoints: taming's f16/16384 and LlamaGen's f16 VQGAN, HFAiLab's transformer."""
    taming = VQGANConfig(image_size=256, code_dim=256, l2_norm=False)
    assert count(VQGAN(taming)) == 76_073_859
    coco = load_preset("coco")
    assert count(VQGAN(coco.vqgan)) == 71_948_939 - 65_536  # LlamaGen's file counts a usage buffer
    assert (
        count(ImageTransformer(coco.transformer, 16_384, 256, 512)) == 338_242_560 - 24 * 256 * 256
    )  # the file counts its causal masks


def test_paper_scale_takes_a_step():
    found = count_and_step(load_preset("coco"), clip_dim=512)
    assert found["vqgan_loss"] > 0 and 8 < found["transformer_nll"] < 12  # ln 16384 = 9.7
    assert load_preset("imagenet").vqgan == load_preset("coco").vqgan
    assert load_preset("imagenet").transformer == load_preset("coco").transformer


def test_gpu_preset_takes_a_step():
    found = count_and_step(load_preset("gpu64"), clip_dim=512)
    assert found["vqgan_loss"] > 0 and found["transformer_nll"] > 0
