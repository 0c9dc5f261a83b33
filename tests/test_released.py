"""Released weights: key maps against the published names and shapes, and equality with the published formulas.

The reference below is written from the papers and the released files' names, apart from the library: a model is a list
of steps, each with its published name, from which the shapes follow and by which it is computed.
"""

import itertools
import json
import os
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from clipgen_lib.config import SampleConfig, TransformerConfig, VQGANConfig, load_preset
from clipgen_lib.runtime.checkpoints import save_weights
from clipgen_lib.runtime.runs import ClipgenError
from clipgen_lib.study import released
from clipgen_lib.text_to_image import TextToImage
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN

# ---------------------------------------------------------------------------------------------- reference

RES = {
    "taming": ("norm1", "conv1", "norm2", "conv2", "nin_shortcut"),
    "llamagen": ("norm1", "conv1", "norm2", "conv2", "nin_shortcut"),
    "hfai": ("block.0", "block.2", "block.3", "block.6", "shortcut"),
}


def steps(style, channels, mult, blocks, z, dim):
    """Encoder and decoder as lists of (kind, published name, channels in, channels out)."""
    last, widths = len(mult) - 1, [channels * m for m in mult]

    def name(side, level, kind, i, flat):
        if style == "hfai":
            return f"{side}.{'down' if side == 'encoder' else 'up'}.{flat}" + (
                ".conv" if kind in ("down", "up") else ""
            )
        inner = {"res": f"block.{i}", "attn": f"attn.{i}", "down": "downsample.conv", "up": "upsample.conv"}[kind]
        if style == "llamagen":
            return f"{side}.conv_blocks.{level if side == 'encoder' else last - level}.{inner.replace('block', 'res')}"
        return f"{side}.{'down' if side == 'encoder' else 'up'}.{level}.{inner}"

    def levels(side, order, blocks, resampling, width):
        flat = itertools.count()
        for level in order:
            for i in range(blocks):
                yield "res", name(side, level, "res", i, next(flat)), width, (width := widths[level])
                if level == last:
                    yield "attn", name(side, level, "attn", i, next(flat)), width, width
            if level != order[-1]:
                yield resampling, name(side, level, resampling, 0, next(flat)), width, width

    def middle(side):
        inner = ("block_1", "attn_1", "block_2") if style == "taming" else "012"
        for kind, part in zip(("res", "attn", "res"), inner, strict=True):
            yield kind, f"{side}.mid.{part}", widths[-1], widths[-1]

    hfai = style == "hfai"
    out = {
        side: [f"{side}.final.{i}" for i in (0, 2)] if hfai else [f"{side}.norm_out", f"{side}.conv_out"]
        for side in ("encoder", "decoder")
    }
    encoder = [
        ("conv3", "encoder.conv_in", 3, channels),
        *levels("encoder", range(last + 1), blocks, "down", channels),
        *middle("encoder"),
        ("norm", out["encoder"][0], widths[-1], widths[-1]),
        ("conv3", out["encoder"][1], widths[-1], z),
        ("conv1", "encoder.final.3" if hfai else "quant_conv", z, dim),
    ]
    decoder = [
        ("conv1", "decoder.quant_conv_in" if hfai else "post_quant_conv", dim, z),
        ("conv3", "decoder.conv_in", z, widths[-1]),
        *middle("decoder"),
        *levels("decoder", range(last, -1, -1), blocks + 1, "up", widths[-1]),
        ("norm", out["decoder"][0], widths[0], widths[0]),
        ("conv3", out["decoder"][1], widths[0], 3),
    ]
    return encoder, decoder


def shapes_of(style, kind, name, a, b):
    def layer(part, *shape):
        return {f"{name}{part}.weight": shape, f"{name}{part}.bias": shape[:1]}

    if kind == "norm":
        return layer("", a)
    if kind == "attn" and style == "hfai":
        fused = {f"{name}.attn.in_proj_weight": (3 * a, a), f"{name}.attn.in_proj_bias": (3 * a,)}
        return layer(".norm", a) | fused | layer(".attn.out_proj", a, a)
    if kind == "attn":
        return layer(".norm", a) | {
            k: v for part in ("q", "k", "v", "proj_out") for k, v in layer(f".{part}", a, a, 1, 1).items()
        }
    if kind == "res":
        norm1, conv1, norm2, conv2, shortcut = (f".{part}" for part in RES[style])
        found = layer(norm1, a) | layer(conv1, b, a, 3, 3) | layer(norm2, b) | layer(conv2, b, b, 3, 3)
        return found | (layer(shortcut, b, a, 1, 1) if a != b else {})
    return layer("", b, a, *(1, 1) if kind == "conv1" else (3, 3))


def vqgan_shapes(style, codes, channels=128, mult=(1, 1, 2, 2, 4), blocks=2, z=256, dim=256, gumbel=False):
    found = {}
    for step in itertools.chain(*steps(style, channels, mult, blocks, z, dim)):
        found |= shapes_of(style, *step)
    if gumbel:
        return found | {
            "quantize.proj.weight": (codes, dim, 1, 1),
            "quantize.proj.bias": (codes,),
            "quantize.embed.weight": (codes, dim),
        }
    if style == "llamagen":
        found["quantize.codebook_used"] = (65_536,)
    return found | {"quantizer.embedding.weight" if style == "hfai" else "quantize.embedding.weight": (codes, dim)}


def gpt_shapes(codes=16_384, layers=24, width=1_024, length=256, dim=512):
    found = {
        "pos_emb": (1, length, width),
        "tok_emb.weight": (codes, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "cond_proj.weight": (width, dim),
        "cond_proj.bias": (width,),
        "head.weight": (codes, width),
        "head.bias": (codes,),
    }
    for i in range(layers):
        found[f"blocks.{i}.mask"] = (length, length)
        found |= {
            f"blocks.{i}.encoder.self_attn.in_proj_weight": (3 * width, width),
            f"blocks.{i}.encoder.self_attn.in_proj_bias": (3 * width,),
        }
        for part, a, b in (
            ("self_attn.out_proj", width, width),
            ("linear1", 4 * width, width),
            ("linear2", width, 4 * width),
        ):
            found |= {f"blocks.{i}.encoder.{part}.weight": (a, b), f"blocks.{i}.encoder.{part}.bias": (a,)}
        for part in ("norm1", "norm2"):
            found |= {f"blocks.{i}.encoder.{part}.weight": (width,), f"blocks.{i}.encoder.{part}.bias": (width,)}
    return found


class Reference:
    """The published computation on published tensors: a dict by name, of any size."""

    def __init__(self, style, tensors, *sizes):
        self.style, self.t = style, tensors
        self.encoder, self.decoder = steps(style, *sizes)
        self.epsilon = 1e-5 if style == "hfai" else 1e-6

    def norm(self, x, name):
        grouped = x.reshape(len(x), 32, -1)
        grouped = grouped - grouped.mean(2, keepdim=True)
        grouped = grouped / (grouped.pow(2).mean(2, keepdim=True) + self.epsilon).sqrt()
        return grouped.view_as(x) * self.t[f"{name}.weight"][:, None, None] + self.t[f"{name}.bias"][:, None, None]

    def conv(self, x, name, **options):
        return F.conv2d(x, self.t[f"{name}.weight"], self.t[f"{name}.bias"], **options)

    def res(self, x, name, a, b):
        norm1, conv1, norm2, conv2, shortcut = (f"{name}.{part}" for part in RES[self.style])
        h = self.norm(x, norm1)
        h = self.norm(self.conv(h * h.sigmoid(), conv1, padding=1), norm2)
        return (x if a == b else self.conv(x, shortcut)) + self.conv(h * h.sigmoid(), conv2, padding=1)

    def attn(self, x, name, width):
        flat = self.norm(x, f"{name}.norm").flatten(2)  # (B, width, positions)
        if self.style == "hfai":
            weight, bias = self.t[f"{name}.attn.in_proj_weight"], self.t[f"{name}.attn.in_proj_bias"]
            q, k, v = (weight @ flat + bias[:, None]).split(width, dim=1)
            out = (self.t[f"{name}.attn.out_proj.weight"], self.t[f"{name}.attn.out_proj.bias"])
        else:
            q, k, v = (
                self.t[f"{name}.{p}.weight"][..., 0, 0] @ flat + self.t[f"{name}.{p}.bias"][:, None] for p in "qkv"
            )
            out = (self.t[f"{name}.proj_out.weight"][..., 0, 0], self.t[f"{name}.proj_out.bias"])
        share = torch.einsum("bci,bcj->bij", q, k).div(width**0.5).softmax(2)
        return x + (out[0] @ torch.einsum("bij,bcj->bci", share, v) + out[1][:, None]).view_as(x)

    def run(self, plan, x):
        for kind, name, a, b in plan:
            if kind == "norm":
                x = self.norm(x, name)
                x = x * x.sigmoid()
            elif kind == "res":
                x = self.res(x, name, a, b)
            elif kind == "attn":
                x = self.attn(x, name, a)
            elif kind == "down":
                x = self.conv(F.pad(x, (0, 1, 0, 1)), name, stride=2)
            elif kind == "up":
                x = self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), name, padding=1)
            else:
                x = self.conv(x, name, padding=int(kind == "conv3"))
        return x

    def __call__(self, images):
        """Latents (B, C, h, w), tokens (B, h, w) and reconstructions."""
        latents = self.run(self.encoder, images)
        if "quantize.proj.weight" in self.t:
            tokens, codes = self.conv(latents, "quantize.proj").argmax(1), self.t["quantize.embed.weight"]
        else:
            codes = self.t["quantizer.embedding.weight" if self.style == "hfai" else "quantize.embedding.weight"]
            vectors = latents
            if self.style == "llamagen":
                codes, vectors = codes / codes.norm(dim=1, keepdim=True), latents / latents.norm(dim=1, keepdim=True)
            tokens = (vectors[:, None] - codes[:, :, None, None]).pow(2).sum(2).argmin(1)
        return latents, tokens, self.run(self.decoder, codes[tokens].permute(0, 3, 1, 2))


def gpt_reference(t, embeds, tokens, heads):
    """Pre-norm blocks over [condition, t0 .. t(L-2)], all with biases and exact GELU."""

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]

    x = torch.cat([linear(embeds, "cond_proj")[:, None], t["tok_emb.weight"][tokens[:, :-1]]], 1)
    x = x + t["pos_emb"][:, : x.shape[1]]
    ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    for i in range(sum(name.endswith(".mask") for name in t)):
        block = f"blocks.{i}.encoder"
        h = norm(x, f"{block}.norm1") @ t[f"{block}.self_attn.in_proj_weight"].T + t[f"{block}.self_attn.in_proj_bias"]
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in h.chunk(3, -1)
        )  # (B, heads, L, E / heads)
        share = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(ahead, -torch.inf).softmax(-1)
        x = x + linear((share @ v).transpose(1, 2).flatten(2), f"{block}.self_attn.out_proj")
        h = linear(norm(x, f"{block}.norm2"), f"{block}.linear1")
        x = x + linear(h * (1 + torch.erf(h / 2**0.5)) / 2, f"{block}.linear2")
    return linear(norm(x, "norm"), "head")


def filled(shapes, seed=0):
    """Random tensors under which activations neither die nor explode, biases and norms not at their initial values."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        scale = 1 if len(shape) < 2 or "emb" in name else torch.Size(shape[1:]).numel() ** -0.5
        found[name] = torch.randn(shape, generator=rng) * (0.2 if len(shape) == 1 else scale)
        if len(shape) == 1 and name.endswith("weight"):
            found[name] += 1
        if name.endswith(".mask"):
            found[name] = torch.ones(shape, dtype=torch.bool).triu(1)
    return found


# ---------------------------------------------------------------------------------------------- names, shapes, counts

DISCRIMINATOR = 78_841_287 - 76_073_859
MASKS = 24 * 256 * 256
RELEASED = {  # name in the manifests, published shapes, tensors that are not parameters of the generator, all parameters
    "taming-f16-1024": ("taming_f16_1024", vqgan_shapes("taming", 1_024), 0, 72_141_699),
    "taming-f16-16384": ("taming_f16_16384", vqgan_shapes("taming", 16_384), 0, 76_073_859),
    "taming-gumbel-f8": (
        "taming_gumbel_f8",
        vqgan_shapes("taming", 8_192, mult=(1, 1, 2, 4), gumbel=True),
        0,
        68_995_971,
    ),
    "hfai-vqgan-coco": ("hfai_vqgan_coco", vqgan_shapes("hfai", 16_384), DISCRIMINATOR, 78_841_287),
    "hfai-gpt-coco": ("hfai_gpt_coco", gpt_shapes(), MASKS, 338_242_560),
    "llamagen-f16": ("llamagen_vq_f16", vqgan_shapes("llamagen", 16_384, dim=8), 65_536, 71_948_939),
    "llamagen-f8": ("llamagen_vq_f8", vqgan_shapes("llamagen", 16_384, mult=(1, 2, 2, 4), dim=8), 65_536, 70_175_371),
}


@pytest.fixture(scope="module")
def facts(shared):
    if not (shared / "released").is_dir():
        pytest.skip("the facts of released models in shared/data are not on this machine")
    return shared / "released"


def on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_every_release_is_here():
    assert set(RELEASED) == set(released.RELEASES)


@pytest.mark.parametrize("name", RELEASED)
def test_shapes_are_those_of_the_published_file(name, facts):
    manifest = json.loads((facts / "manifests.json").read_text())[RELEASED[name][0]]
    published = {key: tuple(shape) for key, shape in manifest["tensors"].items()}
    assert manifest["parameters"] == RELEASED[name][3]
    assert {key: shape for key, shape in published.items() if not key.startswith("discriminator.")} == RELEASED[name][1]
    module = released.build(released.RELEASES[name].build, released.RELEASES[name].family, on_meta(published))
    assert count(module) == manifest["parameters"] - RELEASED[name][2]


@pytest.mark.parametrize("name", RELEASED)
def test_every_key_is_consumed_and_every_parameter_filled(name):
    _, shapes, apart, total = RELEASED[name]
    release, tensors = released.RELEASES[name], on_meta(shapes)
    extra = {"hfai-vqgan-coco": "discriminator.head.weight"}.get(name, "loss.discriminator.main.0.weight")
    tensors |= on_meta({extra: (1, 512, 4, 4)}) if "gpt" not in name and "llamagen" not in name else {}
    module = released.build(release.build, release.family, tensors)
    assert count(module) == total - apart
    first = next(iter(shapes))
    for wrong, reason in (
        (tensors | on_meta({"encoder.more.weight": (3,)}), "unknown: encoder.more.weight"),
        (tensors | on_meta({"image_mean": (512,), "quantizer.idle": (16_384,)}), "unknown: image_mean, quantizer.idle"),
        ({key: value for key, value in tensors.items() if key != first}, "nothing for: "),
        (tensors | {first: tensors[first][:1, :1]}, f"of another shape: {first}"),
    ):
        with pytest.raises(released.Mismatch, match=reason):
            released.build(release.build, release.family, wrong)


def test_the_coco_preset_is_the_size_of_the_released_models():
    coco = load_preset("coco")
    with torch.device("meta"):
        taming = VQGAN(replace(coco.vqgan, code_dim=256, l2_norm=False))
        assert count(taming) == 78_841_287 - DISCRIMINATOR == 76_073_859  # HFAiLab's, without its discriminator
        assert count(VQGAN(coco.vqgan)) == 71_948_939 - 65_536  # LlamaGen's, without the buffer of codes used
        assert count(ImageTransformer(coco.transformer, 16_384, 256, 512)) == 338_242_560 - MASKS  # HFAiLab's


# ---------------------------------------------------------------------------------------------- the same function

SMALL = {"channels": 32, "mult": (1, 2, 4), "blocks": 1, "z": 12, "dim": 6}
SMALL_CONFIG = VQGANConfig(
    image_size=32,
    channels=32,
    channel_mult=(1, 2, 4),
    res_blocks=1,
    z_channels=12,
    codebook_size=40,
    code_dim=6,
    l2_norm=False,
)
FAMILIES = {
    "taming": ("taming", released.TAMING, SMALL_CONFIG),
    "gumbel": ("taming", released.TAMING, replace(SMALL_CONFIG, codebook_update="gumbel")),
    "llamagen": ("llamagen", released.LLAMAGEN, replace(SMALL_CONFIG, l2_norm=True)),
    "hfai": ("hfai", released.HFAI_VQGAN, SMALL_CONFIG),
}


def differences(module, images, latents, tokens, reconstruction):
    with torch.inference_mode():
        again, quantized = module(images)
        assert torch.equal(module.encode(images), tokens) and torch.equal(quantized.tokens, tokens)
        assert torch.allclose(module.decode(tokens), reconstruction.clamp(-1, 1), atol=1e-4)
        return (module.quant_conv(module.encoder(images)) - latents).abs().max(), (again - reconstruction).abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vqgan_computes_the_published_formulas(name):
    style, family, config = FAMILIES[name]
    tensors = filled(vqgan_shapes(style, 40, gumbel=name == "gumbel", **SMALL))
    if style == "hfai":  # faint first features: there the epsilon of the norms counts
        tensors["encoder.conv_in.weight"] *= 0.02
        tensors["encoder.conv_in.bias"] *= 0.02
    reference = Reference(style, tensors, *SMALL.values())
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents, tokens, reconstruction = reference(images)
    assert len(tokens.unique()) > 8 and reconstruction.std() > 0.1
    module = released.build(partial(VQGAN, config), family, tensors)
    assert max(differences(module, images, latents, tokens, reconstruction)) < 1e-4
    if style == "hfai":  # and what goes wrong without that
        plain = released.build(partial(VQGAN, config), family._replace(epsilon=1e-6), tensors)
        assert (plain(images)[0] - reconstruction).abs().max() > 1e-3


def test_the_transformer_computes_the_published_formulas():
    tensors = filled(gpt_shapes(codes=40, layers=2, width=32, length=16, dim=8))
    config = TransformerConfig(layers=2, width=32, heads=4)
    module = released.build(partial(ImageTransformer, config, 40, 16, 8), released.HFAI_GPT, tensors)
    rng = torch.Generator().manual_seed(1)
    embeds, tokens = (
        F.normalize(torch.randn(3, 8, generator=rng), dim=1),
        torch.randint(0, 40, (3, 16), generator=rng),
    )
    wanted = gpt_reference(tensors, embeds, tokens, heads=4)
    assert wanted.std() > 0.1 and (module(embeds, tokens) - wanted).abs().max() < 1e-4


def read_small(path):
    with safe_open(path, framework="pt") as stream:
        sizes, tensors = json.loads(stream.metadata()["config"]), {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    return sizes, *({k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("model.", "io."))


def test_hfai_vqgan_as_the_original_computes_it(facts):
    sizes, tensors, io = read_small(facts / "hfai_vqgan_small.safetensors")
    config = VQGANConfig(
        image_size=sizes["resolution"],
        channels=sizes["ch"],
        channel_mult=tuple(sizes["ch_mult"]),
        l2_norm=False,
        res_blocks=sizes["num_res_blocks"],
        z_channels=sizes["z_channels"],
        codebook_size=sizes["codebook_size"],
        code_dim=sizes["code_dim"],
    )
    module = released.build(partial(VQGAN, config), released.HFAI_VQGAN, tensors)
    assert max(differences(module, **io)) < 1e-4


def test_hfai_transformer_as_the_original_computes_it(facts):
    sizes, tensors, io = read_small(facts / "hfai_gpt_small.safetensors")
    config = TransformerConfig(layers=sizes["n_layer"], width=sizes["n_embed"], heads=sizes["n_head"])
    make = partial(ImageTransformer, config, sizes["vocab_size"], sizes["block_size"], sizes["n_cond_embed"])
    module = released.build(make, released.HFAI_GPT, tensors)
    assert (module(io["embeddings"], io["tokens"]) - io["logits"]).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------- files


class Code:
    def __reduce__(self):
        return os.system, ("echo this must never run",)


def small_releases(clip):
    """HFAiLab's releases in small sizes, and their published tensors."""
    config = replace(SMALL_CONFIG, image_size=16)  # 4 x 4 tokens
    make = partial(ImageTransformer, TransformerConfig(layers=2, width=32, heads=4), 40, 16, clip.dim)
    vqgan = released.RELEASES["hfai-vqgan-coco"]._replace(build=partial(VQGAN, config))
    gpt = released.RELEASES["hfai-gpt-coco"]._replace(build=make)
    tensors = filled(vqgan_shapes("hfai", 40, **SMALL) | {"discriminator.head.weight": (1, 8, 4, 4)})
    return vqgan, tensors, gpt, filled(gpt_shapes(codes=40, layers=2, width=32, length=16, dim=clip.dim))


def test_broken_and_foreign_files_are_one_sentence(tmp_path, clip, capfd):
    path, source = tmp_path / "vqgan_coco.pt", "get it from github.com/HFAiLab/clip-gen"
    vqgan, vqgan_tensors, _, gpt_tensors = small_releases(clip)

    def refused(reason, path=path):
        with pytest.raises(ClipgenError) as caught:
            released.load_released(vqgan, path)
        assert reason in str(caught.value) and source in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert str(tmp_path) in refused("vqgan_coco.pt is missing", tmp_path)
    torch.save({"model": vqgan_tensors, "epoch": 3}, path)
    whole = path.read_bytes()
    codebook = released.load_released(vqgan, path).quantizer.codebook
    assert torch.equal(codebook, vqgan_tensors["quantizer.embedding.weight"])
    for damaged in (b"", whole[:5], whole[: len(whole) // 2], whole[:-3], b"<!DOCTYPE html><html>not found</html>"):
        path.write_bytes(damaged)
        assert str(path) in refused("cut short, damaged or no weights at all")
    for layout in (True, False):
        torch.save({"model": vqgan_tensors, "more": Code()}, path, _use_new_zipfile_serialization=layout)
        refused("it holds code, posix.system, which is not run")
    assert "must never run" not in capfd.readouterr().out
    torch.save(vqgan_tensors, path)
    refused("no tensors under 'model'")
    torch.save({"model": gpt_tensors}, path)
    refused("unknown: pos_emb, tok_emb.weight, ")
    tensors = tmp_path / "vqgan.safetensors"
    save_file(vqgan_tensors, tensors)
    assert released.load_released(vqgan, tensors).config == replace(SMALL_CONFIG, image_size=16)
    tensors.write_bytes(tensors.read_bytes()[:-9])
    refused("cut short", tensors)
    with pytest.raises(ClipgenError, match="unknown release 'vqgan': choose one of taming-f16-1024"):
        released.load_released("vqgan", tmp_path)
    with pytest.raises(ClipgenError, match="vqgan_coco.pt is missing: get it from github.com/HFAiLab/clip-gen"):
        released.load_hfai_coco(tmp_path / "nowhere")


def test_a_lightning_checkpoint_is_read_without_lightning(tmp_path, monkeypatch):
    """Published checkpoints of taming keep a callback's state under its class, which need not be installed."""
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    tensors = filled(vqgan_shapes("taming", 40, **SMALL)) | {"loss.discriminator.main.0.weight": torch.zeros(3)}
    torch.save({"state_dict": tensors, "callbacks": {module.ModelCheckpoint: {"best": 0.0}}}, tmp_path / "last.ckpt")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    assert released.read_tensors(tmp_path / "last.ckpt", "state_dict").keys() == tensors.keys()


def test_a_released_generator_generates_and_is_saved(clip, tmp_path):
    vqgan, vqgan_tensors, gpt, gpt_tensors = small_releases(clip)
    torch.save({"model": vqgan_tensors, "epoch": 3}, tmp_path / "vqgan_coco.pt")
    torch.save({"model": gpt_tensors, "epoch": 3}, tmp_path / "gpt_coco.pt")
    parts = [released.load_released(release, tmp_path) for release in (vqgan, gpt)]
    settings = SampleConfig(guidance=1.0, top_k=500, top_p=0.95)
    generator = TextToImage.from_parts(*parts, clip, {"name": "shapes", "pretrained": None}, settings)
    images = generator(["a red circle", "a blue star"], n=2, seed=5)
    assert images.shape == (2, 2, 3, 16, 16) and not torch.equal(images[0], images[1])
    text, tokens = clip.texts(["a red circle"]), torch.randint(0, 40, (1, 16))
    wanted = gpt_reference(gpt_tensors, text, tokens, heads=4)
    assert (generator.transformer(text, tokens) - wanted).abs().max() < 1e-4
    reference = Reference("hfai", vqgan_tensors, *SMALL.values())
    codes = vqgan_tensors["quantizer.embedding.weight"][tokens.view(1, 4, 4)].permute(0, 3, 1, 2)
    assert (generator.vqgan.decode_codes(codes) - reference.run(reference.decoder, codes)).abs().max() < 1e-4
    generator.save_pretrained(tmp_path / "model")
    again = TextToImage.from_pretrained(str(tmp_path / "model"))
    assert torch.equal(again("a red circle", seed=3), generator("a red circle", seed=3))
    other = {"name": "ViT-B-32-quickgelu", "pretrained": "elsewhere/ViT-B-32.pt"}
    assert TextToImage.from_pretrained(str(tmp_path / "model"), clip=other).clip_source == other


@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_vqgan_can_be_saved_as_ours(name, tmp_path):
    style, family, config = FAMILIES[name]
    module = released.build(
        partial(VQGAN, config), family, filled(vqgan_shapes(style, 40, gumbel=name == "gumbel", **SMALL))
    )
    save_weights(tmp_path / "vqgan", module)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(VQGAN.load(tmp_path / "vqgan")(images)[0], module(images)[0])
