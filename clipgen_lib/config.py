"""Every number that shapes a run: frozen dataclasses, checked by pydantic; presets are YAML files of what differs.

In: a preset's name. Out: a `Preset`. The same code serves a laptop and a cluster; only the preset differs.
Importing this module imports no torch.
"""

import difflib
import shlex
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import yaml
from pydantic import ConfigDict, Field, ValidationError, model_validator

from .runtime.runs import ClipgenError, reading, shortened

checked_dataclass = partial(
    pydantic.dataclasses.dataclass, frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
)
MOST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=MOST)]
CountFromZero = Annotated[int, Field(ge=0, le=MOST)]
Depth = Annotated[int, Field(ge=1, le=1_000)]  # of a loop that builds modules
Amount = Annotated[float, Field(ge=0, le=MOST)]
Share = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Several = Field(min_length=1, max_length=16)
Protocol = Literal["inception", "clean", "torchmetrics", "tf1", "dmgan", "clip", "lite", "dinov2"]


@checked_dataclass
class Config:
    """Base of every part of a preset. A wrong value raises `ClipgenError` with its field and what to give."""

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_sentence(cls, values: object, validate):
        try:
            return validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        known, name = [f.name for f in fields(cls)], next(iter(first["loc"]), "the value")
        if first["type"] == "unexpected_keyword_argument":
            raise ClipgenError(f"{cls.__name__} has no field {_shown(name)}: choose one of {_nearest(name, known)}")
        name = known[name] if isinstance(name, int) else name  # of a positional argument
        wanted = first["msg"].replace("Input should", "it should").replace("Tuple", "it")
        raise ClipgenError(f"{name} of {cls.__name__} is {_shown(first['input'])}: {wanted}")


def _shown(value: object) -> str:
    try:
        return shortened(repr(value), 80)
    except (ValueError, RecursionError):  # Python writes no numbers of more than 4,300 digits
        return "too long to show"


def _nearest(name: object, known: list[str]) -> str:
    """The known names that are most like a name, all of them where none is."""
    return ", ".join(difflib.get_close_matches(str(name), known) or known)


@checked_dataclass
class ShapesConfig(Config):
    """Size of the embedded Shapes world, in images."""

    n_train: Count = 20_000
    n_val: Count = 1_000


@checked_dataclass
class ClipConfig(Config):
    """Which CLIP conditions, and judges too; `evaluate.judges` names others that judge beside it."""

    name: str = "shapes"
    pretrained: str | None = None


@checked_dataclass
class SharedConfig(Config):
    """Stages taken from elsewhere, where a text is given, in place of being made by the run."""

    vqgan: str = (
        ""  # a run, a folder of a VQGAN or a generator, shapes, or RELEASE=FILE; the run's, where others are given
    )
    store: str = ""  # a run of the same VQGAN, CLIP and images
    transformer: str = ""  # a run of the same store


@checked_dataclass
class FitConfig(Config):
    """What all trainings share, with the numbers of the classifier's: AdamW, linear warm-up then cosine."""

    steps: CountFromZero = 1_200
    batch_size: Count = 128
    lr: Amount = 2e-3
    warmup: CountFromZero = 100
    weight_decay: Amount = 0.05
    precision: Literal["bf16", "no"] = "bf16"  # of autocast, on a device that computes in bfloat16
    log_every: Count = 20
    save_every: Count = 400


@checked_dataclass
class ClassifierConfig(FitConfig):
    """The classifier of generated images of classes."""

    network: Literal["resnet18", "tf_efficientnet_lite0"] = "resnet18"  # the second begins with ImageNet's weights
    width: Count = 32  # channels of the resnet's first stage


@checked_dataclass
class ClipTrainConfig(FitConfig):
    """Training of the embedded CLIP (notebooks/appendix_train_clip.ipynb)."""

    image_tower: Literal["resnet", "efficientnet"] = "resnet"  # or EfficientNet-Lite0 from ImageNet's weights
    image_width: Count = 24  # of the resnet's first stage
    scenes: Count = 160_000
    steps: CountFromZero = 2_000
    batch_size: Count = 512
    lr: Amount = 1.5e-3
    warmup: CountFromZero = 150
    weight_decay: Amount = 0.1
    save_every: Count = 200


@checked_dataclass
class VQGANConfig(Config):
    """Architecture of stage 1; the downsampling factor is patch * 2^(levels - 1)."""

    image_size: Count = 64
    patch: Count = 1  # side of the pixel square folded into channels before the first convolution
    channels: Count = 128
    channel_mult: Annotated[tuple[Count, ...], Several] = (1, 1, 2, 2, 4)
    res_blocks: Depth = 2
    local: bool = False  # a token depends on its own square of pixels alone; such tokens are easier to predict
    z_channels: Count = 256
    codebook_size: Annotated[int, Field(ge=1, le=65_536)] = 16_384  # the token store keeps 16 bits a token
    code_dim: Count = 8
    l2_norm: bool = True  # nearest code by cosine (else euclidean)
    codebook_update: Literal["gradient", "ema", "gumbel"] = "gradient"  # gumbel: in released weights only
    codebook_decay: Share = 0.99  # of the EMA codebook
    restart_after: CountFromZero = 200  # training steps without use before a code is restarted; 0 never

    def __post_init__(self):
        if self.image_size % self.factor:
            what = f"image_size {self.image_size} does not divide by the downsampling factor {self.factor}"
            raise ClipgenError(f"{what}: change one of them")

    @property
    def factor(self) -> int:
        return self.patch * 2 ** (len(self.channel_mult) - 1)

    @property
    def side(self) -> int:
        """Tokens along one side."""
        return self.image_size // self.factor


@checked_dataclass
class OptimConfig(FitConfig):
    """What both stages share: also gradient clipping, EMA of the weights, and several processes."""

    steps: CountFromZero = 100_000
    batch_size: Count = 32  # over all processes
    accumulate: Count = 1  # backward passes to an optimiser step
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon trains a small model in far fewer steps
    lr: Amount = 1e-4
    warmup: CountFromZero = 1_000
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    max_grad_norm: Amount = 1.0
    ema_decay: Share = 0.999
    compile: bool = False
    log_every: Count = 100
    save_every: Count = 5_000
    workers: CountFromZero = 8  # processes that decode images; 0 decodes in the loop and keeps what fits in memory
    seed: CountFromZero = 0  # added to the run's: other weights, batches and noise on the same images


@checked_dataclass
class VQGANTrainConfig(OptimConfig):
    """Training of stage 1."""

    beta: Amount = 0.25  # of the commitment loss
    l1_weight: Amount = 1.0
    l2_weight: Amount = 0.0  # of the mean squared error; with it small coloured objects are learnt sooner
    perceptual: Literal["lpips", "clip", "none"] = "lpips"
    perceptual_weight: Amount = 1.0
    adversarial_weight: Amount = 0.1
    adversarial_ramp: tuple[Share, Share] = (0.2, 0.4)  # shares of the training: 0 before, full after
    adaptive_max: Amount = 10.0  # clamp of the adaptive weight
    discriminator_channels: Count = 64
    discriminator_layers: Depth = 3
    discriminator_lr: Amount = 1e-4
    flip: bool = True
    random_crop: bool = True

    def __post_init__(self):
        if self.adversarial_ramp[0] > self.adversarial_ramp[1]:
            raise ClipgenError(f"adversarial_ramp is {self.adversarial_ramp}: give two rising shares between 0 and 1")


@checked_dataclass
class TransformerConfig(Config):
    """Architecture of stage 2; codebook, token count and CLIP dimension come from the store."""

    layers: Depth = 24
    width: Count = 1_024
    heads: Count = 16
    conditioning: Literal["prefix", "words"] = "prefix"  # or text tokens, in the comparison
    condition_tokens: Count = 1  # inputs before the first image token
    rope: bool = False  # positions by turning queries and keys too (2-D RoPE), beside those that are learned
    qk_norm: bool = False  # queries and keys of one length
    dropout: Share = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise ClipgenError(f"width {self.width} does not divide by {self.heads} heads: change one of them")
        if self.rope and self.width // self.heads % 4:
            per_head = f"width {self.width} and {self.heads} heads are {self.width // self.heads} entries a head"
            raise ClipgenError(f"{per_head}, which do not divide by 4, as rope needs: change one of them")


@checked_dataclass
class TransformerTrainConfig(OptimConfig):
    """Training of stage 2."""

    condition_dropout: Share = 0.1  # share of rows trained without condition, for guidance
    noise_cos: Cosine = 1.0  # lowest target cosine of the noised and the clean embedding; 1 adds no noise
    embedding_weight: Amount = 0.1  # of the CLIP embedding reconstruction loss
    embedding_share: Share = 0.125  # of the batch that it is computed on
    embedding_path: Literal["straight-through", "gumbel"] = "straight-through"  # or through sampled tokens
    embedding_form: Literal["cosine", "log"] = "cosine"  # 1 - similarity, or -log of it
    flip: bool = True  # horizontally flipped images as extra rows of the store


@checked_dataclass
class SampleConfig(Config):
    """How images are sampled; every field may be replaced in a call."""

    temperature: Amount = 1.0
    top_k: CountFromZero = 0  # 0 keeps all
    top_p: Share = 1.0
    guidance: Annotated[float, Field(ge=-MOST, le=MOST)] = 3.0  # 1 is no guidance
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"  # or from 1 at the first token up to it
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)  # shares of the tokens between which there is guidance
    neighbours: CountFromZero = 0  # training images whose mean embedding replaces a text's; 0 takes the text's own
    align: Literal["none", "shift", "standardise"] = "none"  # texts to images; needs some texts, of whatever images
    candidates: Count = 1  # images sampled for each one kept, the one that CLIP finds nearest to the prompt
    batch_size: Count = 64

    def __post_init__(self):
        if self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ClipgenError(f"guidance_interval is {self.guidance_interval}: give two rising shares between 0 and 1")


@checked_dataclass
class FusionGANConfig(Config):
    """The conditional GAN of the comparison, and its training (DF-GAN's rates)."""

    channels: Count = 16  # at full resolution, up to four times as many below
    noise_dim: Count = 64
    steps: CountFromZero = 1_500
    batch_size: Count = 32
    generator_lr: Amount = 1e-4
    critic_lr: Amount = 4e-4
    ema_decay: Share = 0.99
    log_every: Count = 50


@checked_dataclass
class VQGANCLIPConfig(Config):
    """Optimisation of VQGAN's latents for CLIP, in the comparison; rate and noise are those of the released notebook."""

    steps: CountFromZero = 100
    cutouts: Count = 4
    lr: Amount = 0.1
    noise: Amount = 0.1
    batch_size: Count = 32  # images optimised side by side


@checked_dataclass
class EvaluateConfig(Config):
    """How a run is evaluated."""

    n: Count = 30_000  # captions
    n_oracle: CountFromZero = 512  # prompts of each kind (Shapes world only)
    blur: Annotated[tuple[CountFromZero, ...], Several] = (0, 1, 2, 4, 8)  # k of FID-k, pixels
    blur_sets: Literal["both", "reference"] = "both"  # which sets FID-k blurs: DALL-E's paper says both, CogView one
    protocol: Protocol = "inception"  # feature network of FID
    also: tuple[Protocol, ...] = ()  # other networks under which the images are scored as well
    nearest: CountFromZero = 50_000  # training images among which generated ones are looked for; 0 looks for none
    split: str = "val"  # that is generated for and scored against; val2014 of COCO in published figures
    classifier: str = ""  # the run whose classifier reads the images; empty takes this run's, where it has one
    judges: tuple[str, ...] = ()  # CLIPs by which CapS and R-precision are measured as well: folders, or MODEL/WEIGHTS
    also_splits: tuple[str, ...] = ()  # scored in the same way, each beside the first
    caption_prefix: str = ""  # before every caption that is scored; "A photo depicts " in CLIPScore's paper
    batch_size: Count = 64


@checked_dataclass
class Preset(Config):
    """All parts of a run's configuration."""

    name: str = "custom"
    shapes: ShapesConfig = ShapesConfig()
    clip: ClipConfig = ClipConfig()
    clip_train: ClipTrainConfig = ClipTrainConfig()
    shared: SharedConfig = SharedConfig()
    vqgan: VQGANConfig = VQGANConfig()
    vqgan_train: VQGANTrainConfig = VQGANTrainConfig()
    transformer: TransformerConfig = TransformerConfig()
    transformer_train: TransformerTrainConfig = TransformerTrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    fusion_gan: FusionGANConfig = FusionGANConfig()
    vqgan_clip: VQGANCLIPConfig = VQGANCLIPConfig()
    classifier: ClassifierConfig = ClassifierConfig()


def replaced(config: Config, values: dict) -> Config:
    """A copy of a config with some fields replaced: lists as tuples, texts as what they spell where the field is no text."""
    return replace(config, **{name: _spelled(value, getattr(config, name, "")) for name, value in values.items()})


def _spelled(value: object, before: object) -> object:
    if isinstance(value, str) and not isinstance(before, str):
        with suppress(ValueError, yaml.YAMLError):  # YAML takes 1e-3 for a text
            value = float(value) if isinstance(before, float) else yaml.safe_load(value)
    return tuple(value) if isinstance(value, list) else value


def scaled(preset: Preset, scale: float) -> Preset:
    """A preset with another size of transformer and what belongs to it, at about `scale`^4 times the compute.

    Width, heads and batch are multiplied by `scale`, layers and steps by its square root; the learning rate is divided by the
    square root, as for AdamW in github.com/karpathy/nanochat. The tokenizer stays, so that NLLs compare.
    """
    model, train, root = preset.transformer, preset.transformer_train, scale**0.5
    heads, accumulate = max(1, round(model.heads * scale)), train.accumulate
    sizes = {"heads": heads, "width": heads * (model.width // model.heads)}
    sizes["layers"] = max(1, round(model.layers * root))
    batch_size = accumulate * max(1, round(train.batch_size * scale / accumulate))
    training = {"batch_size": batch_size, "steps": round(train.steps * root), "lr": train.lr / root}
    return replace(preset, transformer=replace(model, **sizes), transformer_train=replace(train, **training))


def changed(preset: Preset, parts: dict[str, dict]) -> Preset:
    """A copy of a preset with some fields of some parts replaced, as by `replaced`; first of all `scaled`, where "scale" is a part."""
    known = [f.name for f in fields(Preset)[1:]]
    if "scale" in parts:
        scale = _spelled(parts["scale"], 1.0)
        if not isinstance(scale, (int, float)) or not 1 / 64 <= scale <= 64:
            raise ClipgenError(f"scale is {_shown(scale)}: give a number from 1/64 to 64, such as 0.5 or 2")
        preset, parts = scaled(preset, scale), {part: values for part, values in parts.items() if part != "scale"}
    for part, values in parts.items():
        if part not in known:
            raise ClipgenError(f"a preset has no part {_shown(part)}: choose one of {_nearest(part, known)}")
        if not isinstance(values, dict):
            raise ClipgenError(f"part {part} of a preset is {_shown(values)}: give some of its fields")
    return replace(preset, **{part: replaced(getattr(preset, part), values) for part, values in parts.items()})


PRESETS = ("smoke", "laptop", "reference", "fashion", "gpu64", "coco", "imagenet")  # files of the folder presets/


class _UniqueKeys(yaml.SafeLoader):
    """`yaml.safe_load`, but for a key that stands in a mapping twice, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if doubled := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(
                f"{doubled[0]!r} stands twice among the keys that begin in line {node.start_mark.line + 1}"
            )
        return super().construct_mapping(node, deep)


def _read_preset(path: Path) -> Preset:
    """A preset from a YAML file: fields of its parts, in place of those of the preset that it names as `base`."""
    with reading(path, "check its name", "correct it", "is no preset"):
        parts = _UniqueKeys(path.read_text(encoding="utf-8")).get_single_data() or {}
        base = parts.pop("base", None)
        is_file = str(base).endswith((".yaml", ".yml"))
        base = load_preset(str(path.parent / base) if is_file else base) if base else Preset()
        return replace(changed(base, parts), name=path.stem)


_named = cache(lambda name: _read_preset(Path(__file__).parent / "presets" / f"{name}.yaml"))


def load_preset(name: str, changes: str | dict = "", **overrides: dict) -> Preset:
    """A preset with fields of its parts replaced: `load_preset("laptop", vqgan_train={"steps": 100})`.

    Args:
        name: one of PRESETS, or a YAML file such as `mine.yaml`: its `base`, a preset, and fields by parts.
        changes: "transformer.width=256 vqgan_train.lr=1e-3", or {"transformer": {"width": 256}}. Values of a text are
            written as in YAML, in quotes where they hold blanks. "scale=2" sets all of a larger transformer (`scaled`).

    Raises:
        ClipgenError: unknown preset, part or field, or a value that the field cannot have.
    """
    if name not in PRESETS and not str(name).endswith((".yaml", ".yml")):
        raise ClipgenError(f"unknown preset {_shown(name)}: choose one of {', '.join(PRESETS)}, or a YAML file")
    preset = _named(name) if name in PRESETS else _read_preset(Path(name))
    return changed(changed(preset, _parsed(changes) if isinstance(changes, str) else changes), overrides)


def _parsed(text: str) -> dict[str, dict]:
    parts: dict[str, dict] = {}
    try:
        for change in shlex.split(text):
            place, value = change.split("=", 1)
            if place == "scale":
                parts[place] = value
                continue
            part, field = place.split(".")
            parts.setdefault(part, {})[field] = value
    except ValueError:  # no such signs, or a quote without its end
        raise ClipgenError(f"{_shown(text)} is not PART.FIELD=VALUE: write for example transformer.width=256") from None
    return parts


def with_clip(preset: Preset, clip: dict[str, str | None]) -> Preset:
    """A preset with another CLIP; where that is of published weights, or no longer is, noise and perceptual loss go with it."""
    published = clip["pretrained"] is not None
    if published == (preset.clip.pretrained is not None):
        return changed(preset, {"clip": clip})
    noise = {"noise_cos": 0.32 if published else 0.85}  # ViT-B/32 in LAFITE; the embedded CLIP in results/ablation
    loss = {"perceptual": "none"} if published else {}  # by a ViT-B/32 a step takes 20 seconds on a CPU
    return changed(preset, {"clip": clip, "transformer_train": noise, "vqgan_train": loss})


def from_dict(kind: type, values: dict, whole: bool = True) -> Config:
    """Rebuild a config from its JSON form (lists for tuples); unless `whole`, a missing field has its default.

    Raises ClipgenError: no JSON object, or a field that is missing, unknown or of another kind.
    """
    if not isinstance(values, dict):
        raise ClipgenError(f"{kind.__name__} is {_shown(values)}, not its fields: restore the original file")
    defaults = {f.name: f.default for f in fields(kind)}
    if whole and (missing := [name for name in defaults if name not in values]):
        raise ClipgenError(f"{kind.__name__} lacks {', '.join(missing)}: the file was written by another version")
    made = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    parts = {name: default for name, default in defaults.items() if isinstance(default, Config) and name in values}
    return kind(**made | {name: from_dict(type(default), values[name], whole) for name, default in parts.items()})
