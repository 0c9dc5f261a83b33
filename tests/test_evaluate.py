import copy
import hashlib
import json
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import StandIn
from PIL import Image

from clipgen_lib import cli, plots
from clipgen_lib.config import EvaluateConfig, SampleConfig
from clipgen_lib.data import shapes
from clipgen_lib.data.batches import ordered_batches
from clipgen_lib.data.datasets import open_images
from clipgen_lib.data.images import crop, from_arrays, to_arrays, to_float
from clipgen_lib.evaluate import (
    Evaluators,
    Provenance,
    codec,
    condition_nll,
    corruption_scores,
    evaluate_generator,
    evaluate_oracle,
    evaluate_vqgan,
    generate_images,
    open_folder,
    open_reference,
    score_images,
)
from clipgen_lib.metrics import oracle
from clipgen_lib.metrics.captions import caption_list, caption_scores, read_captions, texts_of
from clipgen_lib.metrics.distances import frechet_distance, reconstruction_scores
from clipgen_lib.metrics.features import FeatureNetwork, feature_network
from clipgen_lib.metrics.report import score_table, table
from clipgen_lib.metrics.statistics import set_scores, set_statistics
from clipgen_lib.runtime.checkpoints import MissingWeights
from clipgen_lib.runtime.runs import ClipgenError, read_json


def stand_ins(protocol, clip):
    """CLIP's own network, the stand-in for `inception`, and nothing else."""
    if protocol == "clip":
        return feature_network(protocol, clip)
    if protocol == "inception":
        head = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
        return FeatureNetwork(protocol, StandIn(), "stand-in", "0", head)
    raise MissingWeights(f"protocol {protocol!r} needs weights")


class Scenes(torch.nn.Module):
    """A perfect generator: the scene of a text, and where embeddings come in the scene of a seed. It notes its batches."""

    def __init__(self, clip, vqgan):
        super().__init__()
        self.vqgan, self.settings = vqgan, SampleConfig(batch_size=4)
        self.clip, self.device, self.calls = clip, torch.device("cpu"), []

    def generate_each(self, prompts, seeds, **settings):
        self.calls.append(list(seeds))
        one = oracle.prompts("one", 20, 0)
        known = {p.text: p for kind in oracle.KINDS for p in oracle.prompts(kind, 20, 0)}
        asked = [one[s] for s in seeds] if isinstance(prompts, torch.Tensor) else [known[text] for text in prompts]
        return from_arrays(np.stack([shapes.render(p.scene) for p in asked]))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensor_of(images):
    return torch.cat([to_float(batch) for _, batch in ordered_batches(images, range(len(images)), 20)])


def test_a_file_that_exists_is_not_generated_again(clip, vqgan, tmp_path):
    system, texts = Scenes(clip, vqgan), [p.text for p in oracle.prompts("one", 10, 0)]
    paths = generate_images(system, texts, tmp_path / "g", seed=3)
    assert system.calls == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12]] and [p.name for p in paths][-1] == "00009.png"
    whole = contents(tmp_path / "g")
    assert read_captions(tmp_path / "g" / "captions.txt") == {p.stem: t for p, t in zip(paths, texts, strict=True)}
    for row in (1, 5, 9):
        paths[row].unlink()
    generate_images(system, texts, tmp_path / "g", seed=3)
    assert system.calls[3:] == [[4], [8], [12]] and contents(tmp_path / "g") == whole


def test_images_of_other_facts_are_not_taken_for_these(generator, tmp_path):
    texts, folder = ["a red circle", "a blue star"], tmp_path / "g"
    generate_images(generator, texts, folder)
    before, facts = contents(folder), read_json(folder / "generated.json")
    assert set(facts["weights"]) == {"generator", "clip"} and facts["configs"][0]["guidance"] == 2.0
    for change in ({"seed": 5}, {"guidance": 5.0}):
        generate_images(generator, texts, folder, **change)
        assert contents(folder)["00000.png"] != before["00000.png"]
    generate_images(generator, texts[:1], folder)
    assert sorted(contents(folder)) == ["00000.png", "captions.txt", "generated.json"]
    (folder / "generated.json").unlink()  # without it an image is anybody's
    with pytest.raises(ClipgenError, match="were not generated here: give a new or empty folder"):
        generate_images(generator, texts, folder)
    assert sorted(contents(folder)) == ["00000.png", "captions.txt"]


def test_the_files_are_the_images(generator, tmp_path):
    texts = ["a red circle", "a blue star", "a green ring"]
    paths = generate_images(generator, texts, tmp_path / "g", seed=7)
    wanted = to_arrays(generator.generate_each(texts, [7, 8, 9]))
    assert all(np.array_equal(np.asarray(Image.open(path)), a) for path, a in zip(paths, wanted, strict=True))
    broken = Scenes(generator.clip, generator.vqgan)
    broken.generate_each = lambda prompts, seeds: torch.full((len(seeds), 3, 64, 64), torch.nan)
    with pytest.raises(ClipgenError, match="NaN or infinite pixels"):
        generate_images(broken, texts, tmp_path / "n")


def test_the_whole_evaluation(generator, world, clip, preset, tmp_path):
    images = open_images(world, "val")
    config, other = replace(preset.evaluate, n=24, blur=(0, 1), batch_size=8), copy.deepcopy(clip)
    other.name, other.weights_hash = "other", "changed"
    other.model.text_projection.data[:, :64] *= -1  # reads captions otherwise
    numbers, shown = evaluate_generator(
        generator, images, Evaluators(clip, judges=[clip, other]), config, tmp_path / "g"
    )
    same, different = (numbers["judges"][name] for name in (clip.name, "other"))
    assert same == {key: numbers[key] for key in different if key != "weights_hash"} | {
        "weights_hash": clip.weights_hash
    }
    assert different["caps"] != same["caps"] and different["caps_ceiling"] < same["caps_ceiling"]
    assert table({"run": "x", "evaluation": numbers}).count("R-precision") == 3
    assert numbers["n"] == 24 and numbers["n_reference"] == 12 and set(numbers["fid"]) == {"0", "1"}
    assert numbers["fid"]["0"] > numbers["floor"]["0"] > 0 and numbers["rfid"]["0"] > 0
    assert numbers["caps_ceiling"] > numbers["caps_floor"]
    assert numbers["r_precision_real"] > 0.3  # two captions of one image compete
    assert "also the conditioning CLIP" in numbers["judge"] and numbers["reference"] == "world/val"
    assert len(numbers["warnings"]) == 3 and "24 images for 256" in numbers["warnings"][0]
    assert len(shown["prompts"]) == len(shown["images"]) == 24
    assert numbers["kid"]["mean"] > 0 and 0 <= numbers["manifold"]["precision"] <= 1
    assert list(numbers["fid_over_n"]) == ["24"] and numbers["judged"] == 24
    assert numbers["clip_score"] == pytest.approx(max(100 * numbers["caps"], 0))
    card = numbers["card"]
    assert card["protocol"] == "clip" and card["weights_hash"] == clip.weights_hash and card["k"] == [0, 1]
    assert card["reference"] == {"name": "world", "split": "val", "n": 12, "codec": "PNG"} and card["scored"]["n"] == 24
    digest = hashlib.sha256(shown["captions"].encode()).hexdigest()[:16]
    assert card["captions"] == {"n": 24, "hash": digest, "seed": 0} and "torch" in card["versions"]
    assert numbers["nll"]["n"] == 12 and "NLL a token" in table({"run": "x", "evaluation": numbers})
    assert "KID" in table({"run": "x", "evaluation": numbers}) and json.loads(json.dumps(numbers)) == numbers
    alone = score_images(open_folder(tmp_path / "g"), open_reference(world, 64), config, Evaluators(clip))
    assert alone["fid"] == numbers["fid"] and alone["floor"] == numbers["floor"] and "caps" not in alone


def test_the_nll_given_image_or_caption(generator, world):
    """Beside torch's cross entropy of all tokens at once; a condition of another caption gives another."""
    images = open_images(world, "val")
    captions = {5: "a small red star", 2: "a large blue ring"}
    found = condition_nll(generator, images, captions, guidance=4.0)
    x = to_float(torch.stack([crop(images[row], 64) for row in captions]))
    tokens = generator.vqgan.encode(x).flatten(1)
    for kind, embeds in (("image", generator.clip.images(x)), ("text", generator.clip.texts(list(captions.values())))):
        logits = generator.transformer(embeds, tokens)
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item()
        assert found[kind] == pytest.approx(wanted, rel=1e-5)
    assert found["n"] == 2 and found["text"] != found["image"]
    others = condition_nll(generator, images, {5: "a large blue ring", 2: "a small red star"})
    assert others["image"] == found["image"] and others["text"] != found["text"]


def test_missing_weights_leave_the_rest(generator, world, clip, preset, tmp_path):
    config, judges = replace(preset.evaluate, n=12, protocol="dmgan"), Evaluators(clip, networks=stand_ins)
    numbers, _ = evaluate_generator(generator, open_images(world, "val"), judges, config, tmp_path / "g")
    assert numbers["fid"] == numbers["rfid"] == numbers["floor"] == {} and "card" not in numbers
    assert "'dmgan' needs weights" in numbers["missing"][0] and -1 < numbers["caps"] < 1
    assert "missing: protocol 'dmgan'" in table({"run": "x", "evaluation": numbers})


class Colours(torch.nn.Linear):
    """A classifier of class folders `dark` and `bright` that needs no training."""

    names = {"class": ["bright", "dark"]}

    def read(self, images):
        return [{"class": "bright" if x.mean() > 0 else "dark"} for x in images]


def test_classes_and_images_without_captions(clip, vqgan, tmp_path):
    data, plain = tmp_path / "data", tmp_path / "plain"
    (plain / "train").mkdir(parents=True)
    for name, level in (("dark", 40), ("bright", 215)):
        (data / "val" / name).mkdir(parents=True)
        for i in range(6):
            noise = np.random.default_rng([i, level]).integers(-30, 31, (64, 64, 3))
            Image.fromarray((level + noise).astype(np.uint8)).save(data / "val" / name / f"{i}.png")
            shutil.copy(data / "val" / name / f"{i}.png", plain / "train" / f"{name}{i}.png")
    shutil.copytree(data / "val", data / "train")
    shutil.copytree(plain / "train", plain / "val")  # without class folders there is neither class nor caption
    (plain / "val" / "bright0.png").write_bytes(b"broken")
    dark, judges = Scenes(clip, vqgan), Evaluators(clip, Colours(1, 1))
    shade = lambda seeds: torch.tensor(seeds).view(-1, 1, 1, 1) / 500 - 0.7
    dark.generate_each = lambda prompts, seeds: shade(seeds).expand(-1, 3, 64, 64)
    config = EvaluateConfig(n=12, blur=(0,), protocol="clip")
    numbers, _ = evaluate_generator(dark, open_images(data, "val"), judges, config, tmp_path / "g")
    assert numbers["classes"]["accuracy"] == 0.5 and numbers["classes"]["real"] == 1.0 and numbers["classes"]["n"] == 12
    assert numbers["condition"] == "captions" and "class accuracy" in score_table(numbers)
    numbers, shown = evaluate_generator(dark, open_images(plain, "val"), judges, config, tmp_path / "h")
    assert "caps" not in numbers and "classes" not in numbers and "no captions" in numbers["condition"]
    assert numbers["n"] == numbers["n_reference"] == 11 and shown["captions"] == "" and len(shown["prompts"]) == 11
    assert any("bright0.png" in w for w in numbers["warnings"])


def test_the_oracle_gives_a_perfect_generator_full_marks(clip, vqgan, tmp_path):
    system = Scenes(clip, vqgan)
    scores = evaluate_oracle(system, tmp_path, n=12)
    blind = scores["reconstruction"]["one"]  # an untrained tokenizer keeps nothing of the scenes
    assert blind["both"] < 0.3 and scores["reconstruction"]["two"]["both"] == 0.0
    assert scores["text"]["one"]["both"] == scores["text"]["two"]["relation"] == scores["image"]["one"]["shape"] == 1.0
    assert set(scores["text"]) == set(oracle.KINDS) and scores["text"]["three"]["whole"] == 1.0
    assert len(system.calls) == 18
    (tmp_path / "text-two" / "00003.png").unlink()
    assert evaluate_oracle(system, tmp_path, n=12) == scores and system.calls[18:] == [[3]]


def test_reconstructions_by_hand(vqgan, world, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    images = open_images(world, "val")
    scores = evaluate_vqgan(vqgan, images)
    assert "alexnet" in scores["missing"][0] and "lpips" not in scores and -1 < scores["ssim"] < 1
    stand_in = lambda a, b: (a - b).abs().mean((1, 2, 3), keepdim=True)
    assert 0 < evaluate_vqgan(vqgan, images, lpips=stand_in)["lpips"] < 2
    assert scores["n"] == 12 and 0 < scores["codebook_usage"] <= 1
    x = tensor_of(images)
    wanted = reconstruction_scores(x, vqgan.decode(vqgan.encode(x)))["psnr"].mean()
    assert scores["psnr"] == pytest.approx(wanted.item(), abs=1e-3)


@pytest.fixture
def folders(world, tmp_path):
    """Two folders of 20 images each, and a caption file of the first."""
    images = open_images(world, "train")
    for name, rows in (("a", range(20)), ("b", range(20, 40))):
        (tmp_path / name).mkdir()
        for row in rows:
            shutil.copy(images.encoded(row), tmp_path / name)
    pairs = zip(images.names, images.captions, strict=True)
    (tmp_path / "captions.txt").write_text(
        caption_list((name[6:], texts[0]) for name, texts in pairs)
    )  # without train/
    return tmp_path


def score(folders, clip, reference="b", protocol="clip", size=0, captions=None, **options):
    images = open_folder(folders / "a", size)
    texts = texts_of(images, captions) if captions else {}
    listed = caption_list((images.names[row], text) for row, text in texts.items())
    reference = open_reference(folders / reference, images.size)
    config = EvaluateConfig(protocol=protocol, blur=(0, 2), **options)
    judges = Evaluators(clip, networks=stand_ins)
    return score_images(images, reference, config, judges, Provenance(texts, captions=listed))


def test_a_folder_scores_as_its_tensors_do(folders, clip):
    tensors = [tensor_of(open_folder(folders / name)) for name in "ab"]
    network = stand_ins("inception", clip)
    ours, theirs = (set_statistics([x], network, (0, 2)) for x in tensors)
    wanted, found = set_scores(ours, theirs), score(folders, clip, protocol="inception")
    for key in ("fid", "floor"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-5)
    assert found["kid"] == pytest.approx(wanted["kid"], rel=1e-4) and found["manifold"] == wanted["manifold"]
    assert found["inception_score"]["mean"] > 1
    moments = [(x.mean(0), np.cov(x.T)) for x in (network(x).double().numpy() for x in tensors)]
    assert found["fid"]["0"] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-4)


def test_any_folder_with_its_captions(folders, clip):
    found = score(folders, clip, captions=folders / "captions.txt")
    assert found["caps"] > 0.5 and found["judged"] == found["n"] == 20 and "inception_score" not in found
    assert found["card"]["scored"] == {"name": "a", "n": 20, "codec": "PNG"} and found["card"]["captions"]["n"] == 20
    text = score_table(found)
    for word in ("weights_hash", "blur", "versions", "R-precision", "CLIPScore", "FID-0 over N", "reference halves"):
        assert word in text
    prefix, texts = "A photo depicts ", list(read_captions(folders / "captions.txt").values())[:20]
    wanted = caption_scores(open_folder(folders / "a"), [(i, prefix + text) for i, text in enumerate(texts)], clip)
    prefixed = score(folders, clip, captions=folders / "captions.txt", caption_prefix=prefix)
    assert prefixed["caps"] == pytest.approx(wanted["caps"]) and prefixed["caps"] != found["caps"]
    assert f"captions behind {prefix!r}" in score_table(prefixed) and "captions behind" not in text
    alone = score(folders, clip, blur_sets="reference")
    assert alone["fid"]["0"] == found["fid"]["0"] and alone["fid"]["2"] != found["fid"]["2"]
    assert "on the reference alone" in alone["card"]["blur"] and "on both sets" in found["card"]["blur"]
    zero = score(folders, clip, reference="a")
    assert abs(zero["fid"]["0"]) < 1e-3 * found["fid"]["0"] and zero["manifold"]["precision"] == 1.0
    assert plots.fid_over_n(found["fid_over_n"], "bias").axes[0].lines and list(found["fid_over_n"]) == ["20"]


def test_statistics_as_reference(folders, clip):
    features = stand_ins("inception", clip)(tensor_of(open_folder(folders / "b"))).double().numpy()
    np.savez(folders / "b.npz", mu=features.mean(0), sigma=np.cov(features.T))
    found = score(folders, clip, reference="b.npz", protocol="inception", captions=folders / "captions.txt")
    by_folder = score(folders, clip, protocol="inception")["fid"]
    assert found["fid"] == {"0": pytest.approx(by_folder["0"], rel=1e-4)} and found["floor"] == {}
    assert "FID-k" in score_table(found) and found["caps"] > 0.5
    with pytest.raises(ClipgenError, match="256 and 12 dimensions: use one feature network"):
        score(folders, clip, reference="b.npz")


def test_mistakes_with_folders_are_one_sentence(folders, clip, tmp_path):
    (tmp_path / "few").mkdir()
    for n in (0, 1):
        with pytest.raises(ClipgenError, match=f"holds {n} images, too few"):
            open_folder(tmp_path / "few")
        Image.new("RGB", (64, 64)).save(tmp_path / "few" / f"{n}.png")
    for n in (0, 1):
        Image.new("RGB", (80, 60)).save(tmp_path / "few" / f"{n}.png")
    with pytest.raises(ClipgenError, match="are 80x60: say by --size which square"):
        open_folder(tmp_path / "few")
    Image.new("RGB", (80, 60)).save(tmp_path / "a" / "large.png")
    with pytest.raises(ClipgenError, match=r"2 different sizes \(64x64, 80x60, ...\): say by --size"):
        score(folders, clip)
    assert score(folders, clip, size=32)["card"]["resolution"] == 32
    (tmp_path / "short.npz").write_bytes(b"PK\x03\x04")
    for reference, sentence in (("short.npz", "short.npz holds no mean and covariance"), ("nowhere", "nowhere")):
        with pytest.raises(ClipgenError, match=sentence):
            score(folders, clip, reference=reference, size=64)


def test_an_image_with_nan_pixels_is_left_out_and_named(folders, clip):
    values = np.full((64, 64), 0.5, np.float32)
    values[3, 3] = np.nan
    Image.fromarray(values).save(folders / "a" / "nan.tif")
    found = score(folders, clip)
    assert found["n"] == found["card"]["scored"]["n"] == 20
    assert any("nan.tif" in w and "not finite" in w for w in found["warnings"])
    assert found["card"]["scored"]["codec"] == "mixed: PNG, TIFF" and codec(["a.JPG", "b.jpeg"]) == "JPEG"


def test_captions_in_chinese_and_of_300_words(folders, clip):
    names = sorted(p.name for p in (folders / "a").iterdir())
    texts = ["一个红色的圆圈", "a red circle " * 100, "a small blue star"]
    (folders / "odd.txt").write_text(caption_list(zip(names, texts, strict=False)), encoding="utf-8")
    found = score(folders, clip, captions=folders / "odd.txt")
    assert found["judged"] == 3 and np.isfinite(found["caps"]) and found["truncated_captions"] == 1
    warnings = "\n".join(found["warnings"])
    assert "17 of 20 images have no caption" in warnings
    assert f"1 captions are longer than CLIP's {clip.tokenizer.context_length}" in warnings


def test_the_command(folders, world):
    run = lambda *arguments: CliRunner().invoke(cli.main, ["evaluate", *map(str, arguments)])
    images = ("--images", folders / "a")
    done = run(*images, "--reference", world, "--captions", folders / "captions.txt", "-o", folders / "r.json")
    assert done.exit_code == 0, done.output
    assert "missing: protocol 'inception' needs pt_inception" in done.output and "clip-FID" in done.output
    scores = json.loads((folders / "r.json").read_text())
    assert list(scores) == ["inception", "clip"] and scores["clip"]["card"]["captions"]["n"] == 20
    of_coco = scores["clip"]  # a COCO root has captions of its own
    assert of_coco["caps_ceiling"] > of_coco["caps_floor"] and "real with own captions" in done.output
    assert of_coco["card"]["reference"]["split"] == "val" and of_coco["n_reference"] == 12
    assert "give --reference" in run(*images).output and "name it by --images" in run("--protocol", "clip").output
    np.savez(folders / "s.npz", mu=np.zeros(2), sigma=np.eye(2))
    for protocols in ((), ("--protocol", "clip", "--protocol", "clean")):
        wrong = run(*images, "--reference", folders / "s.npz", *protocols)
        assert wrong.exit_code == 1 and "statistics of one protocol: name it by --protocol (inception" in wrong.output
    listed = (folders / "r.captions.txt").read_text()
    assert (
        listed.count("\n") == 20
        and hashlib.sha256(listed.encode()).hexdigest()[:16] == of_coco["card"]["captions"]["hash"]
    )
    for protocol, sentence in (("vgg", "'vgg': it should be 'inception'"), ("dmgan", "needs inception_v3")):
        wrong = run(*images, "--reference", folders / "b", "--protocol", protocol)
        assert wrong.exit_code == 1 and sentence in wrong.output


def test_photos_are_ordered_by_corruption(shared, clip, tmp_path):
    """Real against real < JPEG < blur < noise, for every metric that knows this order.

    Precision and density do not: an image made softer may well stay inside, or lie deeper in, the real manifold.
    """
    archive = shared / "tiny-imagenet-20.zip"
    if not archive.is_file():
        pytest.skip("tiny-imagenet-20.zip is not on this machine")
    with zipfile.ZipFile(archive) as content:
        names = [n for n in content.namelist() if "/val/" in f"/{n}" and n.lower().endswith((".jpeg", ".jpg", ".png"))]
        content.extractall(tmp_path, names)
    found = corruption_scores(open_folder(tmp_path), feature_network("clip", clip))
    for metric, sign in (("fid", 1), ("kid", 1), ("recall", -1), ("coverage", -1), ("psnr", -1), ("ssim", -1)):
        values = [sign * scores[metric] for scores in found.values()]
        assert values == sorted(values) and values[0] < values[-1], (metric, values)
    for metric in ("precision", "density"):
        assert found["noise"][metric] < 0.5 * found["none"][metric]
    assert all(np.isfinite(v) for scores in found.values() for key, v in scores.items() if key != "psnr")
    assert plots.corruptions(found, "photos").axes


def test_few_photos_are_ordered_by_distance(shared, clip):
    found = corruption_scores(open_folder(shared / "coco-mini", 64), feature_network("clip", clip))
    for metric in ("fid", "kid"):
        values = [scores[metric] for scores in found.values()]
        assert values == sorted(values)
