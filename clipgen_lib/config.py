"""Every number that shapes a run: frozen dataclasses and the presets made of them.

In: a preset's name. Out: a `Preset`. The same code serves a laptop and a cluster; nothing differs but the preset.
No field is read by nobody: a test walks them all. Importing this module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from numbers import Integral, Real
from typing import get_args, get_origin, get_type_hints

from .runtime.runs import ClipgenError, shortened

# Counts are from 1, these from 0; other numbers are not below zero, and these not above one, or of either sign.
FROM_ZERO = {"steps", "warmup", "workers", "restart_after", "top_k", "neighbours", "n_oracle", "blur"}
SHARES = {
    "beta2",
    "codebook_decay",
    "ema_decay",
    "dropout",
    "condition_dropout",
    "embedding_share",
    "top_p",
    "adversarial_ramp",
    "guidance_interval",
}


SIGNED = {"guidance", "noise_cos"}
DEPTHS = {"layers", "res_blocks", "discriminator_layers"}  # not above a thousand: each is a loop of modules to build
MOST = 2**31 - 1


class Config:
    """What every part of a preset is: a dataclass of numbers, names, switches and rows of numbers, each of its own kind."""

    def __post_init__(self):
        for name, hint in _hints(type(self)).items():
            if wanted := _misfit(name, getattr(self, name), hint):
                raise ClipgenError(f"{name} of {type(self).__name__} is {_shown(getattr(self, name))}: give {wanted}")


_hints = cache(get_type_hints)


def _misfit(name: str, value: object, hint: type) -> str:
    """What a field takes, where the value is none of it; else nothing."""
    if get_origin(hint) is tuple:
        kind, *others = get_args(hint)
        length, count = (range(1, 17), "1 to 16 values") if Ellipsis in others else ([2], "2 values")
        good = isinstance(value, tuple) and len(value) in length and not any(_misfit(name, v, kind) for v in value)
        return "" if good else f"{count}, each {_misfit(name, None, kind)}"
    if hint in (int, float):
        low = -MOST if name in SIGNED else int(hint is int and name not in FROM_ZERO)
        high = 1 if name in SHARES else 1_000 if name in DEPTHS else MOST
        good = (
            isinstance(value, Integral if hint is int else Real)
            and not isinstance(value, bool)
            and low <= value <= high
        )
        return "" if good else f"a {'whole ' if hint is int else ''}number from {low} to {high}"
    return "" if isinstance(value, hint) else {bool: "true or false", str: "a text"}.get(hint, "a text or nothing")


def _shown(value: object) -> str:
    try:
        return shortened(repr(value), 80)
    except (ValueError, RecursionError):  # Python writes no numbers of more than 4,300 digits
        return "too much to be shown"


@dataclass(frozen=True)
class ShapesConfig(Config):
    """Size of the embedded Shapes world."""

    n_train: int = 20_000
    n_val: int = 1_000


@dataclass(frozen=True)
class ClipConfig(Config):
    """Which CLIP conditions, and which one judges CapS and R-precision (None: the same one, and the result says so)."""

    name: str = "shapes"
    pretrained: str | None = None
    judge_name: str | None = None
    judge_pretrained: str | None = None


@dataclass(frozen=True)
class FitConfig(Config):
    """What the trainings of CLIP and of the classifier share: AdamW on one device, linear warm-up then cosine."""

    steps: int = 1_200
    batch_size: int = 128
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    bfloat16: bool = True
    log_every: int = 20
    save_every: int = 400


@dataclass(frozen=True)
class ClassifierConfig(FitConfig):
    """The classifier that judges drawn images of classes: a resnet18, `width` channels in its first stage."""

    width: int = 32


@dataclass(frozen=True)
class ClipTrainConfig(FitConfig):
    """Training of the embedded CLIP (notebooks/appendix_train_clip.ipynb)."""

    scenes: int = 160_000
    steps: int = 2_000
    batch_size: int = 512
    lr: float = 1.5e-3
    warmup: int = 150
    weight_decay: float = 0.1
    save_every: int = 200


@dataclass(frozen=True)
class VQGANConfig(Config):
    """Architecture of stage 1; the downsampling factor is patch * 2^(levels - 1)."""

    image_size: int = 64
    patch: int = 1  # side of the pixel square folded into channels before the first convolution
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    local: bool = False  # a token depends on its own square of pixels alone: equal squares get equal tokens, which are easier to predict
    z_channels: int = 256
    codebook_size: int = 16_384
    code_dim: int = 8
    l2_norm: bool = True  # nearest code by cosine (else euclidean)
    codebook_update: str = "gradient"  # or "ema"; or "gumbel": tokens by a learnt projection, in released weights only
    codebook_decay: float = 0.99  # of the EMA codebook
    restart_after: int = 200  # training steps without use before a code is restarted; 0 never

    def __post_init__(self):
        super().__post_init__()
        if self.codebook_update not in ("gradient", "ema", "gumbel"):
            raise ClipgenError(f"codebook_update is {_shown(self.codebook_update)}: choose 'gradient' or 'ema'")
        if self.image_size % self.factor:
            raise ClipgenError(
                f"image_size {self.image_size} does not divide by the downsampling factor {self.factor}: change one of them"
            )
        if self.codebook_size > 65_536:
            raise ClipgenError(
                f"codebook_size {self.codebook_size} does not fit the token store's 16 bits: use at most 65536"
            )

    @property
    def factor(self) -> int:
        return self.patch * 2 ** (len(self.channel_mult) - 1)

    @property
    def side(self) -> int:
        """Tokens along one side."""
        return self.image_size // self.factor


@dataclass(frozen=True)
class OptimConfig(Config):
    """What both stages share. Linear warm-up then cosine, gradient clipping, EMA of the weights."""

    steps: int = 100_000
    batch_size: int = 32  # over all processes
    accumulate: int = 1  # backward passes to an optimiser step
    optimizer: str = "adamw"  # or "muon", which learns a small model in far fewer steps; of generator and transformer
    lr: float = 1e-4
    warmup: int = 1_000
    beta2: float = 0.95
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    precision: str = "bf16"  # autocast: bf16, fp16 or no
    compile: bool = False
    log_every: int = 100
    save_every: int = 5_000
    workers: int = 8  # processes that decode images; 0 decodes in the loop and keeps what fits in memory

    def __post_init__(self):
        super().__post_init__()
        if self.precision not in ("bf16", "fp16", "no"):
            raise ClipgenError(f"precision is {_shown(self.precision)}: choose 'bf16', 'fp16' or 'no'")
        if self.beta2 == 1:
            raise ClipgenError("beta2 is 1, with which Adam never learns the size of a gradient: give a number below 1")


@dataclass(frozen=True)
class VQGANTrainConfig(OptimConfig):
    beta: float = 0.25  # of the commitment loss
    l1_weight: float = 1.0
    l2_weight: float = 0.0  # of the mean squared error beside it; small coloured things are learnt sooner with it
    perceptual: str = "lpips"  # or "clip" or "none"
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.1
    adversarial_ramp: tuple[float, float] = (
        0.2,
        0.4,
    )  # shares of the training: 0 before the first, full after the second
    adaptive_max: float = 10.0  # clamp of the adaptive weight
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    discriminator_lr: float = 1e-4
    flip: bool = True
    random_crop: bool = True


@dataclass(frozen=True)
class TransformerConfig(Config):
    """Architecture of stage 2; codebook, token count and CLIP dimension come from the store."""

    layers: int = 24
    width: int = 1_024
    heads: int = 16
    conditioning: str = (
        "prefix"  # or "adaln": adaptive layer norm in every block; or "words": text tokens as the prefix
    )
    condition_tokens: int = 1  # inputs before the first image token
    dropout: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.conditioning not in ("prefix", "adaln", "words"):
            raise ClipgenError(f"conditioning is {_shown(self.conditioning)}: choose 'prefix', 'adaln' or 'words'")
        if self.width % self.heads:
            raise ClipgenError(f"width {self.width} does not divide by {self.heads} heads: change one of them")


@dataclass(frozen=True)
class TransformerTrainConfig(OptimConfig):
    condition_dropout: float = 0.1  # share of rows trained without condition, for guidance
    noise_cos: float = 1.0  # lowest target cosine of the noised and the clean embedding; 1 adds no noise
    centre: bool = False  # take each modality's mean off its embeddings; needs some texts, of whatever images
    embedding_weight: float = 0.1  # of the CLIP embedding reconstruction loss
    embedding_share: float = 0.125  # of the batch that it is computed on
    embedding_path: str = "straight-through"  # gradient through the likeliest tokens; or "gumbel": through sampled ones
    embedding_form: str = "cosine"  # 1 - similarity; or "log": -log of it
    flip: bool = True  # horizontally flipped images as extra rows of the store

    def __post_init__(self):
        super().__post_init__()
        if self.embedding_path not in ("straight-through", "gumbel"):
            raise ClipgenError(
                f"embedding_path is {_shown(self.embedding_path)}: choose 'straight-through' or 'gumbel'"
            )
        if self.embedding_form not in ("cosine", "log"):
            raise ClipgenError(f"embedding_form is {_shown(self.embedding_form)}: choose 'cosine' or 'log'")


@dataclass(frozen=True)
class SampleConfig(Config):
    temperature: float = 1.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    guidance: float = 3.0  # 1 is no guidance
    guidance_schedule: str = "constant"  # or "linear", "cosine": from 1 at the first token up to `guidance` at the last
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # shares of the tokens between which there is guidance
    neighbours: int = 0  # training images whose mean embedding takes the place of a text's; 0 takes the text's own
    shift: bool = False  # move a text's embedding by mean image minus mean text; needs some texts, of whatever images
    candidates: int = 1  # images drawn for each one kept, the one that CLIP finds nearest to the prompt
    batch_size: int = 64

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_schedule not in ("constant", "linear", "cosine"):
            raise ClipgenError(
                f"guidance_schedule is {_shown(self.guidance_schedule)}: choose 'constant', 'linear' or 'cosine'"
            )
        first, last = self.guidance_interval
        if not 0 <= first < last <= 1:
            raise ClipgenError(f"guidance_interval is {self.guidance_interval}: give two rising shares between 0 and 1")


@dataclass(frozen=True)
class FusionGANConfig(Config):
    """The conditional GAN of the comparison, and its training (DF-GAN's rates)."""

    channels: int = 16  # at full resolution, up to four times as many below
    noise_dim: int = 64
    steps: int = 1_500
    batch_size: int = 32
    generator_lr: float = 1e-4
    critic_lr: float = 4e-4
    ema_decay: float = 0.99
    log_every: int = 50


@dataclass(frozen=True)
class VQGANCLIPConfig(Config):
    """Optimisation of VQGAN's latents for CLIP, in the comparison; rate and noise are those of the released notebook."""

    steps: int = 100
    cutouts: int = 4
    lr: float = 0.1
    noise: float = 0.1
    batch_size: int = 32  # images optimised side by side


@dataclass(frozen=True)
class EvaluateConfig(Config):
    n: int = 30_000  # captions
    n_oracle: int = 512  # prompts of each kind (Shapes world only)
    blur: tuple[int, ...] = (0, 1, 2, 4, 8)  # k of FID-k, pixels
    protocol: str = "inception"  # feature network of FID: inception or clip
    batch_size: int = 64


@dataclass(frozen=True)
class Preset:
    name: str = "custom"
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    clip_train: ClipTrainConfig = field(default_factory=ClipTrainConfig)
    vqgan: VQGANConfig = field(default_factory=VQGANConfig)
    vqgan_train: VQGANTrainConfig = field(default_factory=VQGANTrainConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    transformer_train: TransformerTrainConfig = field(default_factory=TransformerTrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    fusion_gan: FusionGANConfig = field(default_factory=FusionGANConfig)
    vqgan_clip: VQGANCLIPConfig = field(default_factory=VQGANCLIPConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)


def _laptop() -> Preset:
    return Preset(
        shapes=ShapesConfig(n_train=20_000, n_val=1_000),
        vqgan=VQGANConfig(
            image_size=64,
            patch=4,
            channels=64,
            channel_mult=(1, 1),
            res_blocks=1,
            local=True,
            z_channels=64,
            codebook_size=256,
            code_dim=16,
            l2_norm=False,
            codebook_update="ema",
            codebook_decay=0.97,
            restart_after=20,
        ),
        vqgan_train=VQGANTrainConfig(
            steps=3_500,
            batch_size=16,
            optimizer="muon",
            lr=1.5e-3,
            warmup=50,
            beta2=0.99,
            weight_decay=0.01,
            ema_decay=0.99,
            log_every=50,
            save_every=500,
            workers=0,
            l1_weight=0.3,
            l2_weight=1.0,
            perceptual="none",
            adversarial_weight=0.05,
            adversarial_ramp=(0.75, 0.9),
            discriminator_channels=16,
            discriminator_lr=2e-4,
            flip=False,
            random_crop=False,
        ),
        transformer=TransformerConfig(layers=6, width=128, heads=4),
        transformer_train=TransformerTrainConfig(
            steps=8_000,
            batch_size=32,
            optimizer="muon",
            lr=4e-3,
            warmup=50,
            ema_decay=0.99,
            log_every=50,
            save_every=1_000,
            workers=0,
            noise_cos=0.85,
            embedding_weight=0.0,
            embedding_share=0.0625,  # what pays here: results/ablation
        ),
        sample=SampleConfig(guidance=2.0, guidance_schedule="linear", top_p=0.95, batch_size=128),
        evaluate=EvaluateConfig(n=1_000, n_oracle=512, protocol="clip", batch_size=125),
    )


def _reference() -> Preset:
    """`laptop` with five times the scenes, four times the codes and hours instead of minutes: the weights of `shapes`."""
    laptop = _laptop()
    return replace(
        laptop,
        shapes=ShapesConfig(n_train=100_000, n_val=1_000),
        vqgan=replace(laptop.vqgan, codebook_size=1_024, restart_after=100),
        vqgan_train=replace(laptop.vqgan_train, steps=12_000),
        transformer=replace(laptop.transformer, width=256, condition_tokens=4),
        transformer_train=replace(
            laptop.transformer_train, steps=10_000, batch_size=64, lr=3e-3, warmup=100, ema_decay=0.995
        ),
        sample=replace(
            laptop.sample, temperature=0.9
        ),  # chosen on prompts of another seed than the one that is reported
        evaluate=replace(laptop.evaluate, n_oracle=1_000),
    )


def _smoke() -> Preset:
    """Everything of `laptop`, so small that each notebook takes seconds; its images are not worth looking at."""
    laptop = _laptop()
    return replace(
        laptop,
        shapes=ShapesConfig(n_train=256, n_val=64),
        clip_train=replace(laptop.clip_train, scenes=512, steps=6, batch_size=64, warmup=2, log_every=2, save_every=3),
        vqgan=replace(laptop.vqgan, channels=16, codebook_size=128),
        vqgan_train=replace(
            laptop.vqgan_train,
            perceptual="clip",
            perceptual_weight=0.1,
            steps=40,
            batch_size=16,
            warmup=10,
            ema_decay=0.9,
            log_every=5,
            save_every=20,
        ),
        transformer=replace(laptop.transformer, layers=2, width=64, heads=2),
        transformer_train=replace(
            laptop.transformer_train,
            embedding_weight=0.1,
            steps=40,
            batch_size=32,
            warmup=10,
            ema_decay=0.9,
            log_every=5,
            save_every=20,
        ),
        evaluate=replace(laptop.evaluate, n=64, n_oracle=16, batch_size=32),
    )


def _gpu64() -> Preset:
    """64x64 photos on one GPU: 256 tokens of 4,096 codes and an 85M transformer."""
    return Preset(
        clip=ClipConfig("ViT-B-32-quickgelu", "openai"),
        vqgan=VQGANConfig(image_size=64, channels=128, channel_mult=(1, 2, 2), codebook_size=4_096),
        vqgan_train=VQGANTrainConfig(steps=60_000, batch_size=128, lr=2e-4, compile=True),
        transformer=TransformerConfig(layers=12, width=768, heads=12, condition_tokens=4, dropout=0.1),
        transformer_train=TransformerTrainConfig(
            steps=60_000, batch_size=256, accumulate=4, lr=4e-4, noise_cos=0.32, compile=True
        ),
        sample=SampleConfig(guidance=3.0, batch_size=256),
        evaluate=EvaluateConfig(n=10_000),
    )


def _coco() -> Preset:
    """The paper's scale on MS-COCO: 256x256, f16, 16,384 codes, ViT-B/32, 24 blocks of width 1,024."""
    return Preset(
        clip=ClipConfig("ViT-B-32-quickgelu", "openai"),
        vqgan=VQGANConfig(image_size=256),
        vqgan_train=VQGANTrainConfig(steps=250_000, batch_size=64, accumulate=2),
        transformer=TransformerConfig(gradient_checkpointing=True),
        transformer_train=TransformerTrainConfig(steps=200_000, batch_size=256, lr=2e-4, noise_cos=0.32, accumulate=4),
        sample=SampleConfig(guidance=3.0, top_k=4_096, batch_size=32),
        evaluate=EvaluateConfig(n=30_000),
    )


def _imagenet() -> Preset:
    """The coco preset with the longer training that a million images ask for."""
    coco = _coco()
    return replace(
        coco,
        vqgan_train=replace(coco.vqgan_train, steps=500_000, batch_size=128, accumulate=4),
        transformer_train=replace(coco.transformer_train, steps=500_000, batch_size=512, accumulate=8),
        evaluate=replace(coco.evaluate, n=50_000),
    )


PRESETS = {
    "smoke": _smoke,
    "laptop": _laptop,
    "reference": _reference,
    "gpu64": _gpu64,
    "coco": _coco,
    "imagenet": _imagenet,
}


def load_preset(name: str, **overrides: dict) -> Preset:
    """A preset by name, with fields of its parts replaced: `load_preset("laptop", vqgan_train={"steps": 100})`.

    Raises:
        ClipgenError: unknown preset, part or field.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ClipgenError(f"unknown preset {_shown(name)}: choose one of {', '.join(PRESETS)}")
    preset = replace(PRESETS[name](), name=name)
    for part, values in overrides.items():
        if part not in {f.name for f in fields(preset)} or not is_dataclass(getattr(preset, part)):
            raise ClipgenError(
                f"preset {name!r} has no part {part!r}: choose one of {', '.join(f.name for f in fields(preset)[1:])}"
            )
        preset = replace(preset, **{part: replace_fields(getattr(preset, part), values)})
    return preset


def replace_fields(config: object, values: dict) -> object:
    """A copy of a config with some fields replaced; an unknown one is refused by name."""
    known = {f.name for f in fields(config)}
    for key in values:
        if key not in known:
            raise ClipgenError(
                f"{type(config).__name__} has no field {_shown(key)}: choose one of {', '.join(sorted(known))}"
            )
    return replace(config, **values)


def from_dict(kind: type, values: dict) -> object:
    """Rebuild a config from its JSON form, lists to tuples; an unknown field is refused, a missing one too, one of another kind too."""
    if not isinstance(values, dict):
        raise ClipgenError(f"{kind.__name__} is {_shown(values)} where its fields should be: restore the original file")
    if missing := [f.name for f in fields(kind) if f.name not in values]:
        raise ClipgenError(f"{kind.__name__} lacks {', '.join(missing)}: the file was written by another version")
    if unknown := [key for key in values if key not in _hints(kind)]:
        raise ClipgenError(
            f"{kind.__name__} has no field {shortened(', '.join(map(str, unknown)))}: the file was written by another version"
        )
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
