import json
import shutil
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from clipgen_lib import cli, evaluate, plots
from clipgen_lib.config import SampleConfig
from clipgen_lib.data import shapes
from clipgen_lib.data.batches import ordered_batches
from clipgen_lib.data.datasets import open_images
from clipgen_lib.data.images import from_arrays, to_float
from clipgen_lib.evaluate import (
    codec,
    corruption_scores,
    evaluate_folder,
    evaluate_generator,
    evaluate_oracle,
    evaluate_vqgan,
    open_folder,
)
from clipgen_lib.metrics import passes
from clipgen_lib.metrics.captions import caption_facts, caption_list, choose_captions, read_captions
from clipgen_lib.metrics.distances import frechet_distance
from clipgen_lib.metrics.features import FeatureNetwork, feature_network
from clipgen_lib.metrics.report import folder_table, table
from clipgen_lib.runtime.checkpoints import MissingWeights
from clipgen_lib.runtime.runs import ClipgenError
from clipgen_lib.text_to_image import TextToImage


class StandIn(torch.nn.Module):
    """A fixed small network in the place of Inception: (B, 3, H, W) -> (B, 12)."""

    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.randn(12, 3, 5, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.nn.functional.conv2d(x, self.kernel, stride=3).relu().mean((2, 3))


def stand_ins(protocol, clip):
    """CLIP's own network, the stand-in for `inception`, and nothing else."""
    if protocol == "clip":
        return feature_network(protocol, clip)
    if protocol == "inception":
        return FeatureNetwork(
            protocol, StandIn(), "stand-in", "0", torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
        )
    raise MissingWeights(f"protocol {protocol!r} needs weights")


def test_captions_are_chosen_by_seed(world):
    images = open_images(world, "val")
    few, again, other = choose_captions(images, 12, 0), choose_captions(images, 12, 0), choose_captions(images, 12, 1)
    assert few == again != other and sorted(row for row, _ in few) == list(range(12))
    everything = choose_captions(images, 1000, 0)
    assert len(everything) == 60 and all(text in images.captions[row] for row, text in everything)


@pytest.fixture
def generator(vqgan, transformer, clip):
    return TextToImage.from_parts(
        vqgan, transformer, clip, {"name": "shapes", "pretrained": None}, SampleConfig(guidance=2.0)
    )


def test_the_whole_evaluation(generator, world, clip, preset, tmp_path):
    images = open_images(world, "val")
    config = replace(preset.evaluate, n=24, blur=(0, 1), batch_size=8)
    numbers, shown = evaluate_generator(generator, images, clip, config, folder=tmp_path)
    assert numbers["n"] == 24 and numbers["n_reference"] == 12 and set(numbers["fid"]) == {"0", "1"}
    assert numbers["fid"]["0"] > numbers["floor"]["0"] > 0 and numbers["rfid"]["0"] > 0
    assert (
        numbers["caps_ceiling"] > numbers["caps_floor"] and numbers["r_precision_real"] > 0.3
    )  # two captions of one image compete
    assert "also the conditioning CLIP" in numbers["judge"] and "12" in str(numbers["n_reference"])
    assert (
        len(numbers["warnings"]) == 3
        and "24 images for 256" in numbers["warnings"][0]
        and numbers["reference"] == "world/val"
    )
    assert len(shown["prompts"]) == len(shown["images"]) == 24
    assert (
        numbers["kid"]["mean"] > 0
        and 0 <= numbers["manifold"]["precision"] <= 1
        and list(numbers["fid_over_n"]) == ["24"]
    )
    assert numbers["clip_score"] == pytest.approx(100 * numbers["caps"]) and numbers["judged"] == 24
    card = numbers["card"]
    assert card["protocol"] == "clip" and card["weights_hash"] == clip.weights_hash and card["k"] == [0, 1]
    assert card["reference"] == {"name": "world", "split": "val", "n": 12, "codec": "PNG"} and card["scored"]["n"] == 24
    assert card["captions"] == {**caption_facts(shown["captions"]), "seed": 0} and "torch" in card["versions"]
    summary = {"run": "x", "evaluation": numbers}
    assert "KID" in table(summary) and json.loads(json.dumps(summary)) == summary
    guided, _ = evaluate_generator(generator, images, clip, config, folder=tmp_path, guidance=5.0)
    assert (
        guided["caps"] != numbers["caps"] and guided["rfid"] == numbers["rfid"] and guided["floor"] == numbers["floor"]
    )


def test_the_real_pictures_are_seen_once(generator, world, clip, preset, tmp_path, monkeypatch):
    images, config = open_images(world, "val"), replace(preset.evaluate, n=12, blur=(0,))
    first, _ = evaluate_generator(generator, images, clip, config, folder=tmp_path)
    monkeypatch.setattr(passes, "ordered_batches", lambda *a: pytest.fail("the images were read again"))
    again, _ = evaluate_generator(generator, open_images(world, "val"), clip, config, folder=tmp_path)
    assert again == first


def test_an_interrupted_drawing_goes_on(generator, world, clip, preset, tmp_path, monkeypatch):
    images, config = open_images(world, "val"), replace(preset.evaluate, n=24, blur=(0,), batch_size=4)
    whole, shown = evaluate_generator(generator, images, clip, config, folder=tmp_path)
    monkeypatch.setattr(passes, "SAVE_SECONDS", 0)
    draw, calls = TextToImage.generate_each, []

    def killed(self, *arguments, **settings):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw(self, *arguments, **settings)

    monkeypatch.setattr(TextToImage, "generate_each", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_generator(generator, images, clip, config, folder=tmp_path, resume=tmp_path / "run")
    again, shown_again = evaluate_generator(generator, images, clip, config, folder=tmp_path, resume=tmp_path / "run")
    assert len(calls) == 7 and again == whole and torch.equal(shown["images"], shown_again["images"])
    assert len(list((tmp_path / "run").iterdir())) == 1  # for the caller to delete


def test_missing_weights_leave_the_rest(generator, world, clip, preset, tmp_path):
    config = replace(preset.evaluate, n=12, protocol="dmgan")
    numbers, _ = evaluate_generator(
        generator, open_images(world, "val"), clip, config, networks=stand_ins, folder=tmp_path
    )
    assert numbers["fid"] == numbers["rfid"] == numbers["floor"] == {} and "card" not in numbers
    assert "'dmgan' needs weights" in numbers["missing"][0] and -1 < numbers["caps"] < 1
    assert "missing: protocol 'dmgan'" in table({"run": "x", "evaluation": numbers})


class Perfect(torch.nn.Module):
    """Draws exactly what it is asked for: the scene of a text, and where embeddings come in the scene of a seed."""

    def __init__(self, clip, vqgan):
        super().__init__()
        self.vqgan = vqgan
        self.clip, self.device, self.settings = clip, torch.device("cpu"), SampleConfig()

    def generate_each(self, prompts, seeds, **settings):
        one = shapes.prompts("one", 20, 0)
        known = {p.text: p for kind in ("one", "two", "held_out") for p in shapes.prompts(kind, 20, 0)}
        asked = (
            [one[seed] for seed in seeds] if isinstance(prompts, torch.Tensor) else [known[text] for text in prompts]
        )
        return from_arrays(np.stack([shapes.render(p.scene) for p in asked]))


def test_the_oracle_gives_a_perfect_generator_full_marks(clip, vqgan):
    scores = evaluate_oracle(Perfect(clip, vqgan), n=20)
    blind = scores["reconstruction"]["one"]  # an untrained tokenizer keeps nothing of the scenes
    assert blind["both"] < 0.3 and scores["reconstruction"]["two"]["both"] == 0.0
    assert scores["text"]["one"]["both"] == scores["text"]["two"]["relation"] == scores["image"]["one"]["shape"] == 1.0
    assert set(scores["text"]) == {"one", "two", "held_out"}


def test_an_interrupted_oracle_goes_on_and_finds_the_same(generator, tmp_path, monkeypatch):
    whole = evaluate_oracle(generator, n=6, seed=4, batch_size=4)
    monkeypatch.setattr(passes, "SAVE_SECONDS", 0)
    real, calls = shapes.right, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 19:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(shapes, "right", breaks)
    with pytest.raises(KeyboardInterrupt):
        evaluate_oracle(generator, n=6, seed=4, batch_size=4, resume=tmp_path)
    assert evaluate_oracle(generator, n=6, seed=4, batch_size=4, resume=tmp_path) == whole
    assert len(calls) == 19 + 42 - 16  # what was read before the last checkpoint is not read again


def test_the_oracle_is_not_fooled_by_an_untrained_one(generator):
    assert evaluate_oracle(generator, n=24)["text"]["one"]["both"] < 0.3


def test_reconstructions_by_hand(vqgan, world, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    images = open_images(world, "val")
    scores = evaluate_vqgan(vqgan, images)
    assert "alexnet" in scores["missing"][0] and "lpips" not in scores and -1 < scores["ssim"] < 1
    stand_in = lambda a, b: (a - b).abs().mean((1, 2, 3), keepdim=True)
    assert 0 < evaluate_vqgan(vqgan, images, lpips=stand_in)["lpips"] < 2
    assert scores["n"] == 12 and 0 < scores["codebook_usage"] <= 1
    x = torch.cat([to_float(b) for _, b in ordered_batches(images, range(12), 12)])
    a, b = ((t.clamp(-1, 1) + 1) * 127.5 for t in (x, vqgan.decode(vqgan.encode(x))))
    wanted = (20 * torch.log10(255 / (a - b.round()).pow(2).mean((1, 2, 3)).sqrt())).mean()
    assert scores["psnr"] == pytest.approx(wanted.item(), abs=1e-3)


# ---------------------------------------------------------------------------------------------- any folder


@pytest.fixture
def pictures(world, tmp_path):
    """Two folders of 20 images each, and a caption file of the first."""
    images = open_images(world, "train")
    for row, path in enumerate(images.paths):
        folder = tmp_path / ("a" if row < 20 else "b")
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.name)
    (tmp_path / "captions.txt").write_text(
        caption_list((p.name, c[0]) for p, c in zip(images.paths, images.captions, strict=True))
    )
    return tmp_path


def score(pictures, clip, reference="b", **arguments):
    arguments = {
        "protocols": ("inception", "clip", "dmgan"),
        "networks": stand_ins,
        "folder": pictures / "kept",
        **arguments,
    }
    return evaluate_folder(pictures / "a", pictures / reference, clip, show_progress=False, **arguments)


def test_any_folder_under_every_protocol_that_is_there(pictures, clip):
    result = score(pictures, clip, captions=pictures / "captions.txt")
    assert list(result["protocols"]) == ["inception", "clip"] and list(result["missing"]) == ["dmgan"]
    for name, scores in result["protocols"].items():
        assert (
            set(scores["fid"]) == set(scores["floor"]) == {"0", "1", "2", "4", "8"}
            and scores["card"]["protocol"] == name
        )
        assert {"kid", "manifold", "fid_over_n", "warnings"} <= scores.keys()
        assert (
            scores["card"]["scored"] == {"name": "a", "n": 20, "codec": "PNG"} and scores["card"]["captions"]["n"] == 20
        )
    assert result["protocols"]["inception"]["inception_score"]["mean"] >= 1 and result["captions"]["caps"] > 0.5
    assert "inception_score" not in result["protocols"]["clip"] and result["n"] == 20 and result["resolution"] == 64
    text = folder_table(result)
    for word in (
        "weights_hash",
        "blur",
        "versions",
        "R-precision",
        "CLIPScore",
        "missing: protocol 'dmgan'",
        "FID-0 over N",
    ):
        assert word in text
    assert score(pictures, clip, captions=pictures / "captions.txt") == result  # from what was kept
    zero = score(pictures, clip, reference="a", protocols=("clip",))["protocols"]["clip"]
    assert (
        abs(zero["fid"]["0"]) < 1e-3 * result["protocols"]["clip"]["fid"]["0"] and zero["manifold"]["precision"] == 1.0
    )


def test_a_coco_root_as_reference_has_ceiling_and_floor(pictures, world, clip):
    result = evaluate_folder(
        pictures / "a", world, clip, ("clip",), pictures / "captions.txt", show_progress=False, folder=pictures / "kept"
    )
    captions, card = result["captions"], result["protocols"]["clip"]["card"]
    assert captions["caps_ceiling"] > captions["caps_floor"] and "real with own captions" in folder_table(result)
    assert card["reference"]["split"] == "val" and card["reference"]["n"] == 12


def test_shards_as_reference(pictures, clip):
    """The images of a folder in tars: those named as of the split, all where none is; the numbers are the folder's."""
    files = sorted((pictures / "b").iterdir())
    for name, part in (("val-0.tar", files[::2]), ("val-1.tar", files[1::2]), ("train-0.tar", files[:4])):
        (pictures / "tars").mkdir(exist_ok=True)
        with tarfile.open(pictures / "tars" / name, "w") as tar:
            for file in part:
                tar.add(file, file.name)
                (pictures / "caption.txt").write_text("a large red circle")
                tar.add(pictures / "caption.txt", f"{file.stem}.txt")
    by_folder = score(pictures, clip)["protocols"]["clip"]
    result = score(pictures, clip, reference="tars", captions=pictures / "captions.txt")
    found = result["protocols"]["clip"]
    assert found["fid"] == pytest.approx(by_folder["fid"], rel=1e-4) and "caps_floor" in result["captions"]
    assert found["card"]["reference"] == {"name": "tars", "split": "val", "n": 20, "codec": "PNG"}
    alone = score(pictures, clip, reference="tars/train-0.tar")["protocols"]["clip"]["card"]["reference"]
    assert alone == {"name": "train-0.tar", "split": "all", "n": 4, "codec": "PNG"}
    shutil.copy(files[0], pictures / "tars")
    with pytest.raises(ClipgenError, match="both images"):
        score(pictures, clip, reference="tars")


def test_statistics_as_reference(pictures, clip):
    batch = torch.cat([to_float(b) for _, b in ordered_batches(open_folder(pictures / "b"), range(20), 20)])
    features = stand_ins("inception", clip)(batch).double().numpy()
    np.savez(pictures / "b.npz", mu=features.mean(0), sigma=np.cov(features.T))
    result = score(pictures, clip, reference="b.npz")
    by_folder = score(pictures, clip)["protocols"]["inception"]["fid"]
    assert result["protocols"]["inception"]["fid"] == {"0": pytest.approx(by_folder["0"], rel=1e-4)}
    assert "12 dimensions, protocol 'clip' has 256" in result["missing"]["clip"]
    assert "FID-k" in folder_table(result)


def test_mistakes_with_folders_are_one_sentence(pictures, clip, tmp_path):
    for n, name in enumerate(("none", "one")):
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.new("RGB", (64, 64)).save(tmp_path / name / f"{i}.png")
        with pytest.raises(ClipgenError, match=f"holds {n} images, too few"):
            score(tmp_path, clip, reference=name)
    Image.new("RGB", (80, 60)).save(tmp_path / "a" / "large.png")
    with pytest.raises(ClipgenError, match=r"2 different sizes \(64x64, 80x60, ...\): say by --size"):
        score(pictures, clip)
    assert score(pictures, clip, size=32)["protocols"]["clip"]["card"]["resolution"] == 32
    with pytest.raises(ClipgenError, match="needs weights"):
        score(pictures, clip, size=64, protocols=("dmgan",))
    (tmp_path / "short.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ClipgenError, match="cut short"):
        score(pictures, clip, reference="short.npz", size=64)
    with pytest.raises(ClipgenError, match="is not a folder"):
        score(pictures, clip, reference="nowhere", size=64)


def test_a_picture_with_nan_pixels_is_left_out_and_named(pictures, clip):
    values = np.full((64, 64), 0.5, np.float32)
    values[3, 3] = np.nan
    Image.fromarray(values).save(pictures / "a" / "nan.tif")
    result = score(pictures, clip, protocols=("clip",))
    assert result["n"] == 20 and "nan.tif" in result["warnings"][0] and "not finite" in result["warnings"][0]
    assert result["protocols"]["clip"]["card"]["scored"]["codec"] == "mixed: PNG, TIFF"


def test_captions_in_chinese_and_of_300_words(pictures, clip):
    names = sorted(p.name for p in (pictures / "a").iterdir())
    texts = ["一个红色的圆圈", "a red circle " * 100, "a small blue star"]
    (pictures / "odd.txt").write_text(caption_list(zip(names, texts, strict=False)), encoding="utf-8")
    result = score(pictures, clip, captions=pictures / "odd.txt", protocols=("clip",))
    assert result["captions"]["judged"] == 3 and np.isfinite(result["captions"]["caps"])
    assert result["captions"]["truncated_captions"] == 1
    assert any("17 of 20 images have no caption" in w for w in result["warnings"])
    assert any(
        f"1 captions are longer than CLIP's {clip.tokenizer.context_length} tokens" in w for w in result["warnings"]
    )


def test_caption_files(pictures, world, tmp_path):
    by_coco = read_captions(world / "annotations" / "captions_val.json")
    images = open_images(world, "val")
    assert len(by_coco) == 12 and all(by_coco[p.stem] in c for p, c in zip(images.paths, images.captions, strict=True))
    assert read_captions(world / "annotations" / "captions_val.json", seed=1) != by_coco
    (tmp_path / "c.json").write_text(json.dumps({"x/1.png": "one", "2.jpg": "two  words"}))
    assert read_captions(tmp_path / "c.json") == {"x/1": "one", "2": "two words"}
    for name, content, sentence in (
        ("d.json", '{"1.png": 3}', "neither COCO's captions"),
        ("e.json", '{"images": [], "annotations": [{}]}', "neither COCO's"),
        ("f.txt", "a.png no tab\n", "line 1 of"),
        ("g.txt", "", "holds no captions"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ClipgenError, match=sentence):
            read_captions(tmp_path / name)
    with pytest.raises(ClipgenError, match="cannot be read"):
        read_captions(tmp_path / "absent.txt")
    (tmp_path / "h.txt").write_text("elsewhere.png\ta text\n")
    with pytest.raises(ClipgenError, match="names none of the 20 images"):
        evaluate.texts_of(open_folder(pictures / "a"), tmp_path / "h.txt")


def test_codecs(tmp_path):
    assert codec([tmp_path / "a.JPG", tmp_path / "b.jpeg"]) == "JPEG"
    assert codec([tmp_path / "a.png", tmp_path / "b.jpeg"]) == "mixed: JPEG, PNG"


def test_the_command(pictures, world):
    run = lambda *arguments: CliRunner().invoke(cli.main, ["evaluate", *map(str, arguments)])
    done = run(
        "--images",
        pictures / "a",
        "--reference",
        world,
        "--captions",
        pictures / "captions.txt",
        "-o",
        pictures / "r.json",
    )
    assert done.exit_code == 0, done.output
    assert "missing: protocol 'inception' needs pt_inception" in done.output and "protocol clip" in done.output
    result, listed = json.loads((pictures / "r.json").read_text()), (pictures / "r.captions.txt").read_text()
    assert result["protocols"]["clip"]["card"]["captions"] == caption_facts(listed)
    assert "give --reference" in run("--images", pictures / "a").output
    assert "name it by --images" in run("--protocol", "clip").output
    wrong = run("--images", pictures / "a", "--reference", pictures / "b", "--protocol", "vgg")
    assert wrong.exit_code == 1 and "choose from inception" in wrong.output
    done = CliRunner().invoke(
        cli.main, ["captions", "--data", str(world), "-n", "500", "-o", str(pictures / "list.txt")]
    )
    assert done.exit_code == 0 and "12 captions of world/val" in done.output
    assert len(read_captions(pictures / "list.txt")) == 12


# ---------------------------------------------------------------------------------------------- real photos


def check_order(found):
    """Real against real < JPEG < blur < noise, for every metric that knows this order.

    Precision and density do not: an image made softer may well stay inside, or lie deeper in, the real manifold.
    """
    for metric, sign in (("fid", 1), ("kid", 1), ("recall", -1), ("coverage", -1), ("psnr", -1), ("ssim", -1)):
        values = [sign * scores[metric] for scores in found.values()]
        assert values == sorted(values) and values[0] < values[-1], (metric, values)
    for metric in ("precision", "density"):
        assert found["noise"][metric] < 0.5 * found["none"][metric]
    assert all(np.isfinite(v) for scores in found.values() for key, v in scores.items() if key != "psnr")


def test_photos_are_ordered_by_damage(shared, clip, tmp_path):
    archive = shared / "tiny-imagenet-20.zip"
    if not archive.is_file():
        pytest.skip("tiny-imagenet-20.zip is not on this machine")
    with zipfile.ZipFile(archive) as content:
        names = [n for n in content.namelist() if "/val/" in f"/{n}" and n.lower().endswith((".jpeg", ".jpg", ".png"))]
        content.extractall(tmp_path, names)
    found = corruption_scores(open_folder(tmp_path), feature_network("clip", clip))
    check_order(found)
    assert plots.corruptions(found, "photos").axes


def test_few_photos_are_ordered_by_distance(shared, clip):
    found = corruption_scores(open_folder(shared / "coco-mini", 64), feature_network("clip", clip))
    for metric in ("fid", "kid"):
        values = [scores[metric] for scores in found.values()]
        assert values == sorted(values)


def test_fid_over_n_is_drawn(pictures, clip):
    found = score(pictures, clip, protocols=("clip",))["protocols"]["clip"]["fid_over_n"]
    assert plots.fid_over_n({"a": found}, "bias").axes[0].lines and list(found) == ["20"]
    assert frechet_distance is evaluate.frechet_distance


def test_bare_names_are_used_only_where_they_say_which(tmp_path):
    for name in ("bee", "goldfish"):
        (tmp_path / "drawn" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "drawn" / name / "0.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "drawn" / "bee" / "1.png")
    folder = open_folder(tmp_path / "drawn")
    (tmp_path / "list.txt").write_text("goldfish/0.png\ta goldfish\n1.png\ta bee\n")
    found = {
        folder.paths[row].relative_to(folder.root).as_posix(): text
        for row, text in evaluate.texts_of(folder, tmp_path / "list.txt").items()
    }
    assert found == {"goldfish/0.png": "a goldfish", "bee/1.png": "a bee"}
