import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from conftest import same_weights
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.data import shapes
from clipgen_lib.data.images import from_arrays
from clipgen_lib.runtime.runs import DATA, ClipgenError

EMBEDDED = DATA / "shapes_clip"


def test_unit_norm_and_shape(clip):
    for embeds in (clip.images(torch.rand(2, 3, 64, 64) * 2 - 1), clip.texts(["a red circle", "a star"])):
        assert embeds.shape == (2, clip.dim) and embeds.dtype == torch.float32
        assert torch.allclose(embeds.norm(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (150, 100), (40, 90), (301, 203)])
def test_preprocessing_is_that_of_open_clip(clip, size):
    """Against the model's own transform, which works on 8-bit PIL images: equal up to its rounding."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    image = noise.resize(size, Image.BICUBIC)
    wanted = image_transform_v2(PreprocessCfg(**clip.model.visual.preprocess_cfg), is_train=False)(image)
    ours = clip.preprocess(from_arrays(np.asarray(image)[None]))[0]
    assert ours.shape == wanted.shape == (3, 64, 64)
    assert (ours - wanted).abs().max() * clip.std.min() < 2.1 / 255  # bicubic in 8 bits rounds twice


def test_same_embedding_as_open_clip_itself(clip):
    model = open_clip.create_model(f"local-dir:{EMBEDDED}").eval()
    images = from_arrays(np.stack([shapes.render(shapes.scene_at(5, i)) for i in range(4)]))
    with torch.no_grad():
        wanted = model.encode_image(((images + 1) / 2 - clip.mean) / clip.std, normalize=True)
    assert torch.allclose(clip.images(images), wanted, atol=1e-5)


def test_gradients_reach_images_and_not_weights(clip):
    images = torch.zeros(1, 3, 80, 64, requires_grad=True)
    clip.images(images)[0, 0].backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in clip.parameters())


def test_embedded_weights_are_small_and_half():
    assert (EMBEDDED / "open_clip_model.safetensors").stat().st_size < 12.5e6


def test_long_texts_are_noticed(clip, capsys):
    assert not clip.is_truncated("a small red circle left of a large blue star")
    assert clip.is_truncated("a small red circle " * 20)
    assert clip.texts(["a small red circle " * 20, "a circle"]).shape == (2, clip.dim)
    assert "tokens alone of 'a small red circle" in (told := capsys.readouterr().err) and told.count("\n") == 1


def test_padding_is_no_token(clip):
    """SigLIP's tokenizer fills up with ones."""

    class Padded:
        context_length = clip.tokenizer.context_length

        def __call__(self, texts, context_length=context_length):
            tokens = clip.tokenizer(texts, context_length=context_length)
            return torch.where(tokens == 0, 1, tokens)

    padded = ClipEmbedder(clip.model, Padded(), "padded", "")
    assert not padded.is_truncated("a small red circle") and padded.is_truncated("a small red circle " * 20)


def test_missing_and_wrong_models(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    shutil.copytree(EMBEDDED, tmp_path / "cut")
    whole = (EMBEDDED / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "cut" / "open_clip_model.safetensors").write_bytes(whole[:5000])
    # without its merges open_clip takes its own tokenizer of 49,408 words
    shutil.copytree(EMBEDDED, tmp_path / "bare", ignore=shutil.ignore_patterns("*.gz"))
    # open_clip only warns when OpenAI's weights meet the model without QuickGELU
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *a, **k: str(tmp_path / "none.pt"))
    for name, pretrained, sentence in (
        ("ViT-B-32", None, "needs `pretrained`"),
        ("ViT-B-32", "openai", "quickgelu"),
        ("no-such-model", "openai", "cannot be loaded"),
        (tmp_path / "empty", None, "open_clip_model.safetensors is missing"),
        (tmp_path / "cut", None, "is damaged"),
        (tmp_path / "bare", None, "49408 words, its text tower"),
    ):
        with pytest.raises(ClipgenError, match=sentence):
            ClipEmbedder.load(str(name), pretrained)


def test_local_checkpoint_file_of_a_known_architecture(clip, tmp_path):
    """An open_clip name with a checkpoint file, the way real weights are used offline."""
    config = json.loads((EMBEDDED / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": str(EMBEDDED / "bpe_merges.txt.gz")}
    (tmp_path / "tiny-shapes.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    embedder = ClipEmbedder.load("tiny-shapes", str(EMBEDDED / "open_clip_model.safetensors"))
    assert same_weights(embedder.model, clip.model) and embedder.name.startswith("tiny-shapes/")
    assert embedder.images(torch.rand(2, 3, 64, 64)).shape == (2, 256)


@pytest.mark.parametrize(
    "tower, entries",
    [
        ("", {"embed_dim": 5_000_000}),
        ("text_cfg", {"width": 8192, "heads": 64}),
        ("text_cfg", {"layers": 100}),
        ("text_cfg", {"layers": 10**9}),
        ("text_cfg", {"context_length": 10**8}),
        ("vision_cfg", {"layers": [1, 1, 1, 10**9]}),
        ("vision_cfg", {"image_size": 10**7}),
    ],
)
def test_a_config_of_other_sizes_than_its_weights_is_refused_before_it_is_built(tower, entries, tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "clip")
    path = tmp_path / "clip" / "open_clip_config.json"
    config = json.loads(path.read_text())
    (config["model_cfg"][tower] if tower else config["model_cfg"]).update(entries)
    path.write_text(json.dumps(config))
    with pytest.raises(ClipgenError, match="describes a CLIP of other sizes than .*: restore the original files"):
        ClipEmbedder.load(str(tmp_path / "clip"))
