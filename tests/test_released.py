"""Released weights: key maps against the published names and shapes, and equality with the published formulas.

The reference below is written from the papers and the released files' names, apart from the library, on torch's own layers:
a model is a list of steps, each registered under its published name.
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
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from clipgen_lib import cli
from clipgen_lib.config import SampleConfig, TransformerConfig, VQGANConfig, load_preset
from clipgen_lib.data.batches import ordered_batches
from clipgen_lib.data.images import to_float
from clipgen_lib.runtime.checkpoints import save_weights
from clipgen_lib.runtime.runs import ClipgenError
from clipgen_lib.study import released
from clipgen_lib.text_to_image import TextToImage
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN
from clipgen_lib.workbench import Workbench

# ---------------------------------------------------------------------------------------------- reference


def steps(style, channels, mult, blocks, z, dim):
    """Encoder and decoder as lists of (kind, published name, channels in, channels out)."""
    last, widths, hfai = len(mult) - 1, [channels * m for m in mult], style == "hfai"

    def name(side, level, kind, i, flat):
        group = "down" if side == "encoder" else "up"
        if hfai:
            return f"{side}.{group}.{flat}" + (".conv" if kind in ("down", "up") else "")
        inner = {"res": f"block.{i}", "attn": f"attn.{i}", "down": "downsample.conv", "up": "upsample.conv"}[kind]
        if style == "llamagen":
            return f"{side}.conv_blocks.{level if side == 'encoder' else last - level}.{inner.replace('block', 'res')}"
        return f"{side}.{group}.{level}.{inner}"

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
        names = ("block_1", "attn_1", "block_2") if style == "taming" else "012"
        for kind, inner in zip(("res", "attn", "res"), names, strict=True):
            yield kind, f"{side}.mid.{inner}", widths[-1], widths[-1]

    def end(side, width, out):
        norm, conv = ("final.0", "final.2") if hfai else ("norm_out", "conv_out")
        return [("norm", f"{side}.{norm}", width, width), ("conv3", f"{side}.{conv}", width, out)]

    encoder = [("conv3", "encoder.conv_in", 3, channels), *levels("encoder", range(last + 1), blocks, "down", channels)]
    encoder += [*middle("encoder"), *end("encoder", widths[-1], z)]
    decoder = [("conv3", "decoder.conv_in", z, widths[-1]), *middle("decoder")]
    decoder += [*levels("decoder", range(last, -1, -1), blocks + 1, "up", widths[-1]), *end("decoder", widths[0], 3)]
    between = ("encoder.final.3", "decoder.quant_conv_in") if hfai else ("quant_conv", "post_quant_conv")
    return [*encoder, ("conv1", between[0], z, dim)], [("conv1", between[1], dim, z), *decoder]


def place(root, name, module):
    """Register a module under a dotted name, and return it."""
    *parents, last = name.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    root.add_module(last, module)
    return module


class Res(nn.Module):
    def __init__(self, style, a, b, epsilon):
        super().__init__()
        names = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
        if style == "hfai":
            names = ("block.0", "block.2", "block.3", "block.6", "shortcut")
        layers = [nn.GroupNorm(32, a, epsilon), nn.Conv2d(a, b, 3, padding=1)]
        layers += [nn.GroupNorm(32, b, epsilon), nn.Conv2d(b, b, 3, padding=1)]
        layers += [nn.Conv2d(a, b, 1)] if a != b else []
        self.layers = [place(self, *pair) for pair in zip(names, layers, strict=False)]

    def forward(self, x):
        norm1, conv1, norm2, conv2, *shortcut = self.layers
        return nn.Sequential(*shortcut)(x) + conv2(F.silu(norm2(conv1(F.silu(norm1(x))))))


class Attn(nn.Module):
    def __init__(self, style, width, epsilon):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, epsilon)
        if style == "hfai":
            self.attn = nn.MultiheadAttention(width, 1, batch_first=True)
        else:
            self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        if hasattr(self, "attn"):
            flat = h.flatten(2).mT
            return x + self.attn(flat, flat, flat)[0].mT.view_as(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # (B, width, positions)
        share = torch.einsum("bci,bcj->bij", q, k).div(x.shape[1] ** 0.5).softmax(2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", share, v).view_as(x))


class PublishedVQGAN(nn.Module):
    """The published computation, under the published names."""

    def __init__(self, style, codes, channels=128, mult=(1, 1, 2, 2, 4), blocks=2, z=256, dim=256, gumbel=False):
        super().__init__()
        self.style, self.gumbel = style, gumbel
        plans = steps(style, channels, mult, blocks, z, dim)
        self.encode, self.decode = ([self.layer(*step) for step in plan] for plan in plans)
        part, name = ("quantizer" if style == "hfai" else "quantize"), "embed" if gumbel else "embedding"
        self.codes = [place(self, f"{part}.{name}", nn.Embedding(codes, dim)).weight]
        if gumbel:
            place(self, "quantize.proj", nn.Conv2d(dim, codes, 1))
        if style == "llamagen":
            self.quantize.register_buffer("codebook_used", torch.zeros(65_536))

    def layer(self, kind, name, a, b):
        epsilon = 1e-5 if self.style == "hfai" else 1e-6
        if kind in ("res", "attn"):
            return place(self, name, Res(self.style, a, b, epsilon) if kind == "res" else Attn(self.style, a, epsilon))
        if kind == "norm":
            return nn.Sequential(place(self, name, nn.GroupNorm(32, a, epsilon)), nn.SiLU())
        sizes = {"conv1": (1,), "conv3": (3, 1, 1), "down": (3, 2), "up": (3, 1, 1)}[kind]  # kernel, stride, padding
        before = {"down": nn.ZeroPad2d((0, 1, 0, 1)), "up": nn.Upsample(scale_factor=2)}.get(kind, nn.Identity())
        return nn.Sequential(before, place(self, name, nn.Conv2d(a, b, *sizes)))

    def decoded(self, tokens):
        """Reconstructions of tokens (B, h, w)."""
        return nn.Sequential(*self.decode)(self.codes[0][tokens].permute(0, 3, 1, 2))

    def forward(self, images):
        """Latents (B, C, h, w), tokens (B, h, w) and reconstructions."""
        vectors = latents = nn.Sequential(*self.encode)(images)
        if self.style == "llamagen":
            self.codes, vectors = [F.normalize(self.codes[0], dim=1)], F.normalize(latents, dim=1)
        distances = (vectors[:, None] - self.codes[0][:, :, None, None]).pow(2).sum(2)
        tokens = self.quantize.proj(latents).argmax(1) if self.gumbel else distances.argmin(1)
        return latents, tokens, self.decoded(tokens)


class PublishedGPT(nn.Module):
    """Pre-norm blocks over [condition, t0 .. t(L-2)], all with biases and exact GELU."""

    def __init__(self, codes=16_384, layers=24, width=1_024, length=256, dim=512, heads=16):
        super().__init__()
        self.pos_emb = nn.Parameter(torch.zeros(1, length, width))
        self.tok_emb, self.cond_proj = nn.Embedding(codes, width), nn.Linear(dim, width)
        self.norm, self.head, self.blocks = nn.LayerNorm(width), nn.Linear(width, codes), nn.ModuleList()
        for _ in range(layers):
            self.blocks.append(block := nn.Module())
            block.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).triu(1))
            layer = partial(nn.TransformerEncoderLayer, dropout=0.0, activation="gelu", batch_first=True)
            block.encoder = layer(width, heads, 4 * width, norm_first=True)

    def forward(self, embeds, tokens):
        x = torch.cat([self.cond_proj(embeds)[:, None], self.tok_emb(tokens[:, :-1])], 1) + self.pos_emb
        for block in self.blocks:
            x = block.encoder(x, src_mask=block.mask)
        return self.head(self.norm(x))


def filled(module, seed=0):
    """A module whose activations neither die nor explode, biases and norms not at their initial values."""
    rng = torch.Generator().manual_seed(seed)
    for name, x in module.named_parameters():
        scale = 1 if x.ndim < 2 or "emb" in name else x[0].numel() ** -0.5
        x.data = torch.randn(x.shape, generator=rng) * (0.2 if x.ndim == 1 else scale)
        x.data += x.ndim == 1 and name.endswith("weight")
    return module.requires_grad_(False)


def on_meta(make):
    with torch.device("meta"):
        return make().state_dict()


# ---------------------------------------------------------------------------------------------- names, shapes, counts

DISCRIMINATOR = 78_841_287 - 76_073_859
MASKS = 24 * 256 * 256
taming, llamagen = partial(PublishedVQGAN, "taming"), partial(PublishedVQGAN, "llamagen", 16_384, dim=8)
gumbel, f8 = partial(taming, 8_192, mult=(1, 1, 2, 4), gumbel=True), partial(llamagen, mult=(1, 2, 2, 4))
RELEASED = {  # name in the manifests, the published model, tensors that are not parameters of the generator, all parameters
    "taming-f16-1024": ("taming_f16_1024", partial(taming, 1_024), 0, 72_141_699),
    "taming-f16-16384": ("taming_f16_16384", partial(taming, 16_384), 0, 76_073_859),
    "taming-gumbel-f8": ("taming_gumbel_f8", gumbel, 0, 68_995_971),
    "hfai-vqgan-coco": ("hfai_vqgan_coco", partial(PublishedVQGAN, "hfai", 16_384), DISCRIMINATOR, 78_841_287),
    "hfai-gpt-coco": ("hfai_gpt_coco", PublishedGPT, MASKS, 338_242_560),
    "llamagen-f16": ("llamagen_vq_f16", llamagen, 65_536, 71_948_939),
    "llamagen-f8": ("llamagen_vq_f8", f8, 65_536, 70_175_371),
}


@pytest.fixture(scope="module")
def facts(shared):
    if not (shared / "released").is_dir():
        pytest.skip("the facts of released models in shared/data are not on this machine")
    return shared / "released"


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", RELEASED)
def test_shapes_are_those_of_the_published_file(name, facts):
    key, make, _, total = RELEASED[name]
    manifest = json.loads((facts / "manifests.json").read_text())[key]
    published = {key: shape for key, shape in manifest["tensors"].items() if not key.startswith("discriminator.")}
    assert manifest["parameters"] == total
    assert published == {key: list(x.shape) for key, x in on_meta(make).items()}


@pytest.mark.parametrize("name", released.RELEASES)
def test_every_key_is_consumed_and_every_parameter_filled(name):
    _, make, apart, total = RELEASED[name]
    release, tensors = released.RELEASES[name], on_meta(make)
    more = torch.empty(3, device="meta")
    ignored = {"hfai-vqgan-coco": "discriminator.head.weight", "taming-f16-1024": "loss.discriminator.main.0.weight"}
    tensors |= {ignored[name]: more} if name in ignored else {}
    assert count(released.build(release.build, release.family, tensors)) == total - apart
    first = next(iter(tensors))
    for wrong, reason in (
        (tensors | {"encoder.more.weight": more}, r"Unexpected key\(s\) in state_dict: .encoder.more.weight"),
        ({key: value for key, value in tensors.items() if key != first}, r"Missing key\(s\)"),
        (tensors | {first: tensors[first][:1, :1]}, "size mismatch"),
    ):
        with pytest.raises(ClipgenError, match=reason):
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
_SIZES = {"channels": 32, "channel_mult": (1, 2, 4), "res_blocks": 1, "z_channels": 12, "code_dim": 6}
SMALL_CONFIG = VQGANConfig(image_size=32, l2_norm=False, codebook_size=40, **_SIZES)
SMALL_GPT = TransformerConfig(layers=2, width=32, heads=4)
FAMILIES = {
    "taming": ("taming", released.TAMING, SMALL_CONFIG),
    "gumbel": ("taming", released.TAMING, replace(SMALL_CONFIG, codebook_update="gumbel")),
    "llamagen": ("llamagen", released.LLAMAGEN, replace(SMALL_CONFIG, l2_norm=True)),
    "hfai": ("hfai", released.HFAI_VQGAN, SMALL_CONFIG),
}


def assert_same(module, images, latents, tokens, reconstruction):
    with torch.inference_mode():
        again, quantized = module(images)
        assert torch.equal(module.encode(images), tokens) and torch.equal(quantized.tokens, tokens)
        assert torch.allclose(module.decode(tokens), reconstruction.clamp(-1, 1), atol=1e-4)
        assert (module.quant_conv(module.encoder(images)) - latents).abs().max() < 1e-4
        assert (again - reconstruction).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vqgan_computes_the_published_formulas(name, tmp_path):
    style, family, config = FAMILIES[name]
    reference = filled(PublishedVQGAN(style, 40, gumbel=name == "gumbel", **SMALL))
    if style == "hfai":  # faint first features: there the epsilon of the norms counts
        reference.encoder.conv_in.weight *= 0.02
        reference.encoder.conv_in.bias *= 0.02
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tensors = reference.state_dict()
    module = released.build(partial(VQGAN, config), family, tensors)
    latents, tokens, reconstruction = reference(images)
    assert len(tokens.unique()) > 8 and reconstruction.std() > 0.1
    assert_same(module, images, latents, tokens, reconstruction)
    save_weights(tmp_path / "vqgan", module)  # and can be saved as ours
    assert torch.equal(VQGAN.load(tmp_path / "vqgan")(images)[0], module(images)[0])
    if style == "hfai":  # and what goes wrong without the epsilon
        plain = released.build(partial(VQGAN, config), family._replace(epsilon=1e-6), tensors)
        assert (plain(images)[0] - reconstruction).abs().max() > 1e-3


def read_small(path):
    with safe_open(path, framework="pt") as stream:
        sizes, tensors = json.loads(stream.metadata()["config"]), {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    return sizes, *({k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("model.", "io."))


def test_hfai_models_as_the_original_computes_them(facts):
    sizes, tensors, io = read_small(facts / "hfai_vqgan_small.safetensors")
    ours = {"resolution": "image_size", "ch": "channels", "ch_mult": "channel_mult", "num_res_blocks": "res_blocks"}
    ours |= {key: key for key in ("z_channels", "codebook_size", "code_dim")}
    values = {ours[key]: tuple(x) if isinstance(x, list) else x for key, x in sizes.items() if key in ours}
    config = VQGANConfig(l2_norm=False, **values)
    assert_same(released.build(partial(VQGAN, config), released.HFAI_VQGAN, tensors), **io)
    sizes, tensors, io = read_small(facts / "hfai_gpt_small.safetensors")
    config = TransformerConfig(layers=sizes["n_layer"], width=sizes["n_embed"], heads=sizes["n_head"])
    make = partial(ImageTransformer, config, sizes["vocab_size"], sizes["block_size"], sizes["n_cond_embed"])
    module = released.build(make, released.HFAI_GPT, tensors)
    assert (module(io["embeddings"], io["tokens"]) - io["logits"]).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------- files


class Code:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.fixture
def small(clip):
    """HFAiLab's releases in small sizes (4 x 4 tokens), each with a published model of that size."""
    make = partial(ImageTransformer, SMALL_GPT, 40, 16, clip.dim)
    vqgan = released.RELEASES["hfai-vqgan-coco"]._replace(build=partial(VQGAN, replace(SMALL_CONFIG, image_size=16)))
    gpt = released.RELEASES["hfai-gpt-coco"]._replace(build=make)
    published_gpt = filled(PublishedGPT(codes=40, layers=2, width=32, length=16, heads=4, dim=clip.dim))
    return (vqgan, filled(PublishedVQGAN("hfai", 40, **SMALL))), (gpt, published_gpt)


def test_broken_and_foreign_files_are_one_sentence(small, tmp_path, monkeypatch):
    path, source = tmp_path / "vqgan_coco.pt", "get it from github.com/HFAiLab/clip-gen"
    (vqgan, published), (_, gpt) = small
    published = published.state_dict() | {"discriminator.head.weight": torch.zeros(3)}

    def refused(reason, path=path):
        with pytest.raises(ClipgenError) as caught:
            released.load_released(vqgan, path)
        assert reason in str(caught.value) and source in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert str(tmp_path) in refused("vqgan_coco.pt is missing", tmp_path)
    torch.save({"model": published, "epoch": 3}, path)
    whole = path.read_bytes()
    released.load_released(vqgan, path)
    for damaged in (b"", whole[:5], whole[: len(whole) // 2], whole[:-3], b"<!DOCTYPE html><html>not found</html>"):
        path.write_bytes(damaged)
        assert str(path) in refused("cut short, damaged or no weights at all")
    for layout in (True, False):
        torch.save({"model": published, "more": Code()}, path, _use_new_zipfile_serialization=layout)
        refused("it holds code, posix.system, which is not run")
    for content, reason in (
        (published, "no tensors under 'model'"),
        ({"model": gpt.state_dict()}, "Missing key(s)"),
    ):
        torch.save(content, path)
        refused(reason)
    save_file(published, tensors := tmp_path / "vqgan.safetensors")
    assert released.load_released(vqgan, tensors).config == replace(SMALL_CONFIG, image_size=16)
    tensors.write_bytes(tensors.read_bytes()[:-9])
    refused("cut short", tensors)
    torch.save(
        {"model": {"w": torch.zeros(1)}, "ema": {"w": torch.ones(1)}}, path
    )  # LlamaGen's: its loader takes ema first
    assert released.read_tensors(path, released.LLAMAGEN.entry) == {"w": torch.ones(1)}
    torch.save({"state_dict": {"w": torch.ones(1)}}, path)
    assert released.read_tensors(path, released.LLAMAGEN.entry) == {"w": torch.ones(1)}
    with pytest.raises(ClipgenError, match="unknown release 'vqgan': choose one of taming-f16-1024"):
        released.load_released("vqgan", tmp_path)
    with pytest.raises(ClipgenError, match="vqgan_coco.pt is missing: get it from github.com/HFAiLab/clip-gen"):
        released.load_hfai_coco(tmp_path / "nowhere")
    monkeypatch.setattr(released, "load_released", lambda *arguments: None)
    (tmp_path / "clip_vit_b32.pt").write_bytes(b"damaged")
    with pytest.raises(ClipgenError, match=f"{tmp_path}/clip_vit_b32.pt"):
        released.load_hfai_coco(tmp_path)


def test_a_lightning_checkpoint_is_read_without_lightning(tmp_path, monkeypatch):
    """Published checkpoints of taming keep a callback's state under its class, which need not be installed."""
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    tensors = PublishedVQGAN("taming", 40, **SMALL).state_dict() | {"loss.discriminator.main.0.weight": torch.zeros(3)}
    with monkeypatch.context() as installed:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            installed.setitem(sys.modules, name, module)
        callbacks = {module.ModelCheckpoint: {"best": 0.0}}
        torch.save({"state_dict": tensors, "callbacks": callbacks}, tmp_path / "last.ckpt")
    assert released.read_tensors(tmp_path / "last.ckpt", "state_dict").keys() == tensors.keys()


def test_a_released_generator_computes_the_published_formulas_and_is_saved(small, clip, tmp_path):
    for release, published in small:
        torch.save({"model": published.state_dict(), "epoch": 3}, tmp_path / release.file)
    parts = [released.load_released(release, tmp_path) for release, _ in small]
    settings = SampleConfig(guidance=1.0, top_k=500, top_p=0.95)
    generator = TextToImage.from_parts(*parts, clip, {"name": "shapes", "pretrained": None}, settings)
    images = generator(["a red circle", "a blue star"], n=2, seed=5)
    assert images.shape == (2, 2, 3, 16, 16) and not torch.equal(images[0], images[1])
    (_, published_vqgan), (_, published_gpt) = small
    texts, tokens = clip.texts(["a red circle", "a blue star", "a pink ring"]), torch.randint(0, 40, (3, 16))
    logits, decoded = published_gpt(texts, tokens), published_vqgan.decoded(tokens.view(3, 4, 4)).clamp(-1, 1)
    assert logits.std() > 0.1 and (generator.transformer(texts, tokens) - logits).abs().max() < 1e-4
    assert (generator.vqgan.decode(tokens.view(3, 4, 4)) - decoded).abs().max() < 1e-4
    generator.save_pretrained(tmp_path / "model")
    again = TextToImage.from_pretrained(str(tmp_path / "model"))
    assert torch.equal(again("a red circle", seed=3), generator("a red circle", seed=3))
    other = {"name": "ViT-B-32-quickgelu", "pretrained": "elsewhere/ViT-B-32.pt"}
    assert TextToImage.from_pretrained(str(tmp_path / "model"), clip=other).clip_source == other


def test_a_released_tokenizer_takes_the_place_of_a_trained_one(results, images_folder, tmp_path, monkeypatch):
    published = filled(PublishedVQGAN("taming", 40, **SMALL))
    torch.save({"state_dict": published.state_dict()}, tmp_path / "last.ckpt")
    small = released.RELEASES["taming-f16-16384"]._replace(build=partial(VQGAN, SMALL_CONFIG))
    monkeypatch.setitem(released.RELEASES, "taming-f16-16384", small)
    monkeypatch.chdir(tmp_path)

    def command(name, *words):
        done = CliRunner().invoke(cli.main, [name, *map(str, words)])
        assert done.exit_code == 0, done.output

    for path in (".", tmp_path):  # the second time it is done
        source = f"taming-f16-16384={path}/last.ckpt"
        options = ["--preset", "smoke", "--data", images_folder, "--set", "transformer_train.steps=3"]
        command("train-transformer", "--run", "r", "--vqgan", source, *options)
    wb = Workbench.reopen("r", data=str(images_folder))
    assert wb.preset.vqgan == SMALL_CONFIG and wb.run.summary()["vqgan"]["source"] == source
    _, batch = next(ordered_batches(wb.images("val"), range(4), 4))
    assert torch.equal(wb.store("val").tokens(slice(0, 4)), published(to_float(batch))[1].flatten(1))
    command("generate", "a red circle", "--run", "r", "-n", 2)
    assert Image.open("out.png").width > 2 * 32
