import importlib.util

import numpy as np
import pytest
import pytorch_fid.inception
import torch
import torchvision
from conftest import StandIn
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from pytorch_fid.fid_score import calculate_activation_statistics, calculate_frechet_distance

from clipgen_lib.data.images import from_arrays, to_arrays, to_float
from clipgen_lib.metrics.distances import frechet_distance
from clipgen_lib.metrics.features import (
    WEIGHTS,
    FeatureNetwork,
    efficientnet_lite,
    feature_network,
    lpips_network,
    prepare,
)
from clipgen_lib.metrics.statistics import set_statistics
from clipgen_lib.runtime.checkpoints import MissingWeights, Weights
from clipgen_lib.runtime.runs import ClipgenError, file_hash


def random_images(n, side=40, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 6, 6, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC)) for c in coarse])


@pytest.mark.parametrize("side", [64, 400])
def test_clean_is_pillows_bicubic_on_floats(side):
    arrays = random_images(2, side)
    found = prepare("clean", from_arrays(arrays)).flatten(0, 1) * 128 + 128
    for plane, array in zip(found, arrays.transpose(0, 3, 1, 2).reshape(-1, side, side), strict=True):
        wanted = Image.fromarray(array.astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
        assert wanted.mode == "F" and np.abs(plane.numpy() - np.asarray(wanted).clip(0, 255)).max() < 0.01


def test_dmgan_is_pillows_resize_and_torchvisions_scaling():
    arrays = random_images(2, 100)
    found = prepare("dmgan", from_arrays(arrays))
    wanted = np.asarray(Image.fromarray(arrays[1]).resize((299, 299), Image.Resampling.BILINEAR)) / 255
    std, mean = np.array([0.229, 0.224, 0.225]), np.array([0.485, 0.456, 0.406])
    assert np.allclose(found[1].permute(1, 2, 0), wanted * (std / 0.5) + (mean - 0.5) / 0.5, atol=1e-6)


def test_the_others_leave_the_resize_to_their_network():
    x = from_arrays(random_images(2))
    assert torch.allclose(prepare("inception", x), (x + 1) / 2) and torch.equal(prepare("clip", x), x)
    for protocol in ("torchmetrics", "tf1"):
        assert prepare(protocol, x).dtype == torch.uint8 and torch.equal(to_float(prepare(protocol, x)), x)


def test_the_same_images_by_pytorch_fid(tmp_path):
    """Files of PNG through pytorch-fid's own pass and through ours, by one network object."""
    network, moments, theirs = StandIn(), [], []
    for seed in (0, 1):
        files, arrays = [tmp_path / f"{seed}-{i}.png" for i in range(60)], random_images(60, seed=seed)
        for file, array in zip(files, arrays, strict=True):
            Image.fromarray(array).save(file)
        theirs += calculate_activation_statistics(files, network, batch_size=20, dims=12, num_workers=0)
        ours = FeatureNetwork("inception", network, "stand-in", "0")
        moments += set_statistics(from_arrays(arrays).split(16), ours, (0,)).moments(0)
    assert all(np.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(moments, theirs, strict=True))
    # float32 pixels, summed in another order; on the same statistics test_distances.py compares the distances
    assert frechet_distance(*moments) == pytest.approx(calculate_frechet_distance(*theirs), rel=1e-4)


def test_the_fast_lite_network_is_the_plain_one(clip):
    """Its last features' means, in batches of any size."""
    network, _ = efficientnet_lite(2)
    for n in (3, 1):
        x = from_arrays(random_images(n, seed=n))
        with torch.no_grad():
            wanted = network.forward_features(prepare("lite", x)).mean((2, 3))
        assert torch.allclose(feature_network("lite", clip)(x), wanted, atol=1e-4) and wanted.std() > 0.1


@pytest.mark.parametrize("number", [0, 2])
def test_efficientnet_lite_is_the_packages_own(number):
    network, path = efficientnet_lite(number)
    theirs = EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=str(path)).eval()
    side = 224 + 18 * number  # their padding is that of this size
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(network(x), theirs(x), atol=1e-4) and theirs(x).std() > 0.5


def test_lite_and_dinov2_resize(clip):
    x = from_arrays(random_images(2, 64))
    wanted = Image.fromarray(random_images(2, 64)[1]).resize((260, 260), Image.Resampling.BICUBIC)
    assert (to_arrays(prepare("lite", x))[1].astype(int) - np.asarray(wanted)).max() <= 1
    wanted = np.asarray(Image.fromarray(random_images(2, 64)[1]).resize((224, 224), Image.Resampling.BICUBIC)) / 255
    wanted = torch.from_numpy((wanted - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(2, 0, 1)
    assert torch.allclose(prepare("dinov2", x)[1].double(), wanted, atol=1e-6)
    with pytest.raises(MissingWeights, match="hf download timm/vit_large_patch14_dinov2"):
        feature_network("dinov2", clip)


@pytest.mark.parametrize("protocol", WEIGHTS)
def test_missing_weights_are_one_sentence(clip, tmp_path, monkeypatch, protocol):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = "inception_v3_google-0cc3c7bd.pth" if protocol == "dmgan" else "pt_inception-2015-12-05-6726825d.pth"
    folder = tmp_path / "hub" / "checkpoints"
    with pytest.raises(MissingWeights) as error:
        feature_network(protocol, clip)
    text = str(error.value)
    assert file in text and "SHA-256" in text and str(folder) in text and "\n" not in text
    folder.mkdir(parents=True)
    (folder / file).write_bytes(b"something else")
    with pytest.raises(ClipgenError, match="delete it and fetch it again"):
        feature_network(protocol, clip)


def test_lpips_and_unknown_names(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match="alexnet-owt-7be5be79.pth"):
        lpips_network()
    with pytest.raises(
        ClipgenError, match="choose from inception, clean, torchmetrics, tf1, dmgan, clip, lite, dinov2"
    ):
        feature_network("vgg", clip)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(feature_network("clip", clip)(x), clip.features(x))


@pytest.fixture(scope="module")
def random_inceptions(tmp_path_factory):
    """Both Inceptions with random weights, in files of the published names, and the facts of these files."""
    home = tmp_path_factory.mktemp("torch")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(torchvision.models.Inception3, "load_state_dict", lambda self, state: None)
        torch.save(pytorch_fid.inception.fid_inception_v3().state_dict(), folder / WEIGHTS["inception"].file)
    whole = torchvision.models.inception_v3(weights=None, init_weights=False)
    torch.save(whole.state_dict(), folder / WEIGHTS["dmgan"].file)
    return home, {name: Weights(w.file, file_hash(folder / w.file), w.source) for name, w in WEIGHTS.items()}


@pytest.mark.parametrize("protocol, classes", [("clean", 1008), ("torchmetrics", 1008), ("tf1", 1008), ("dmgan", 0)])
def test_networks_load_from_their_files(clip, random_inceptions, monkeypatch, protocol, classes):
    home, weights = random_inceptions
    monkeypatch.setenv("TORCH_HOME", str(home))
    if protocol in ("torchmetrics", "tf1") and not importlib.util.find_spec("torch_fidelity"):
        with pytest.raises(MissingWeights, match="pip install torch-fidelity"):
            feature_network(protocol, clip, weights)
        return
    network = feature_network(protocol, clip, weights)
    x = from_arrays(random_images(2, 64))
    features = network(x)
    assert features.shape == (2, 2048) and features.dtype == torch.float32 and torch.isfinite(features).all()
    assert torch.allclose(network(x[:1]), features[:1], atol=1e-4)  # in eval mode: a row does not see the others
    assert network.logits(features).shape == (2, classes) if classes else network.head is None


def test_tf1_is_torch_fidelitys_default(clip, random_inceptions, monkeypatch):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    home, weights = random_inceptions
    monkeypatch.setenv("TORCH_HOME", str(home))
    arrays, path = random_images(3, 64), home / "hub" / "checkpoints" / weights["tf1"].file
    features, logits = theirs("inception-v3-compat", ["2048", "logits_unbiased"], str(path))(
        torch.from_numpy(arrays).permute(0, 3, 1, 2)
    )
    tf1, other = (feature_network(name, clip, weights) for name in ("tf1", "torchmetrics"))
    found, scale = tf1(from_arrays(arrays)), features.abs().mean()
    assert torch.equal(found, features) and torch.allclose(tf1.logits(found), logits, atol=1e-5 * scale)
    assert (other(from_arrays(arrays)) - features).abs().max() > 1e-3 * scale  # its resize is antialiased
