"""Speed of the passes over pictures, extraction and evaluation, beside the networks alone: two sections of `clipgen bench`.

In: a device, and synthetic photos in a temporary folder. Out: rows that say what a pass takes beyond the forwards of its networks
over the same pictures, which lie in memory as tensors then. Weights are random where none come with the project: the same work.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import scale
from .clip_embed import ClipEmbedder
from .config import load_preset
from .data import ImageSet, ordered_batches, spare_workers
from .images import to_float
from .metrics import FeatureSample, frechet_distance, spread_moments
from .passes import SetStatistics, stream
from .protocols import FeatureNetwork, MissingWeights, feature_network
from .store import TokenStore, disk_work, extract, pictures_at_once
from .timing import ABSENT, in_turns, peers, profiled, ratio, row, spread, waiter
from .vqgan import VQGAN

GOALS = {"pass": 1.1, "disk": 0.05, "frechet": 3.0, "difference": 1e-6, "growth": 0.02}  # the last in GB
SIZES = {"photos": (640, 480), "pictures": (64, 64)}  # of the JPEG files
BATCHES = (4, 16, 64, 256)  # of which the bare encoders get the best
DISTINCT = 16  # photos; the others are the same files under other names
RADII = (0, 1, 2, 4, 8)
COUNTS = (500, 4_000)  # pictures between which memory must not grow


# ---------------------------------------------------------------------------------------------- extraction


def extraction(
    device: torch.device, limits: dict, rounds: int = 3, presets: Sequence[str] = ("laptop", "gpu64"), pictures: int = 0,
    batches: Sequence[int] = BATCHES, kinds: Sequence[str] = tuple(SIZES),
) -> dict:  # fmt: skip
    """Seconds of `store.extract` over JPEG files beside its two encoders alone, at the batch size that is best for them.

    `laptop` is so small that reading a photo takes longer than encoding it; `gpu64` has an encoder of the size that photos want.
    Both stand beside the embedded CLIP.

    Args:
        pictures: of a pass; 0 takes as many as keep a section at a few minutes.
        kinds: of the files, keys of SIZES.

    Returns:
        `table`, `rounds` and `details`: of each preset and kind the seconds of the `bare` encoders by batch size and at the best,
        of `extract`, of reading and decoding alone (`read`, by as many workers), and of bringing its rows to the `disk`.
    """
    found: dict = {"table": [], "rounds": rounds, "details": []}
    clip, workers = ClipEmbedder.load(device=device), spare_workers(device)
    for name in presets:
        torch.manual_seed(0)
        vqgan = VQGAN(load_preset(name).vqgan).to(device).eval().requires_grad_(False)
        n = pictures or (8_192 if device.type == "cuda" else 1_024 if name == "laptop" else 96)
        for kind in kinds:
            with tempfile.TemporaryDirectory() as place:
                part = _extraction(vqgan, clip, Path(place), kind, n, batches, workers, rounds, f"extraction, {name}, {kind}")
            seconds, width = part["seconds"], "x".join(map(str, SIZES[kind]))
            what = f"{name}, JPEGs of {width}, batch {part['batch_size']}, {workers} workers"
            taken = {key: ratio(seconds["bare"], seconds[key]) for key in ("extract", "read")}
            disk = ratio(seconds["extract"], seconds["disk"])
            found["table"] += [
                row(what, f"time of the bare encoders, batch {part['best']}", taken["extract"], GOALS["pass"], most=True),
                row(what, "reading and decoding alone, of the same", taken["read"]),
                row(what, "of the extraction for the disk", disk, GOALS["disk"], most=True, unit="%"),
            ]
            shown = {key: spread(values) for key, values in seconds.items()}
            found["details"].append({"preset": name, "kind": kind, "pictures": n, "workers": workers, **part, "seconds": shown})
    return found


def _extraction(
    vqgan: VQGAN, clip: ClipEmbedder, place: Path, kind: str, n: int, batches: Sequence[int], workers: int, rounds: int, label: str
) -> dict:  # fmt: skip
    size, device = vqgan.config.image_size, clip.device
    paths, wait = photos(place / "photos", n, *SIZES[kind]), waiter(device)
    at_once = pictures_at_once(vqgan.config, device)

    def images() -> ImageSet:  # a new one each time: it keeps what it has decoded
        return ImageSet(kind, "train", place / "photos", paths, size)

    def extracted() -> TokenStore:
        shutil.rmtree(place / "store", ignore_errors=True)
        return extract(images(), vqgan, clip, place / "store", batch_size=at_once, workers=workers, show_progress=False)

    def read() -> None:
        for _ in ordered_batches(images(), range(n), at_once, workers):
            pass

    x = torch.cat([to_float(squares) for _, squares in ordered_batches(images(), range(n), at_once)]).to(device)
    sizes = sorted({min(size, n) for size in batches})
    by_batch = in_turns({str(b): partial(encoded, vqgan, clip, x, b) for b in sizes}, 2, wait, label=f"{label}, batch sizes")
    best = min(sizes, key=lambda b: np.median(by_batch[str(b)]))
    bare = partial(encoded, vqgan, clip, x, best)
    tokens, embeds = (found.cpu() for found in bare())
    disk = lambda: disk_work(place / "disk", tokens.flatten(1), embeds)
    seconds = in_turns({"bare": bare, "extract": extracted, "read": read, "disk": disk}, rounds, wait, label=label)
    share = {key: float(np.median(seconds[key]) / np.median(seconds["extract"])) for key in ("bare", "read", "disk")}
    return {
        "seconds": seconds, "batch_size": at_once, "best": best, "bare_by_batch": {b: spread(s) for b, s in by_batch.items()},
        "share_of_extraction": share, "profile": profiled(bare, device),
        "pictures_per_second": {key: n / float(np.median(seconds[key])) for key in ("bare", "extract", "read")},
    }  # fmt: skip


@torch.inference_mode()
def encoded(vqgan: VQGAN, clip: ClipEmbedder, pictures: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (N, h, w) and embeddings (N, D) of pictures (N, 3, H, W) in [-1, 1], by the encoders alone."""
    found = [(vqgan.encode(part), clip.images(part)) for part in pictures.split(batch)]
    return torch.cat([tokens for tokens, _ in found]), torch.cat([embeds for _, embeds in found])


def photos(folder: Path, n: int, width: int, height: int) -> list[Path]:
    """n JPEG files, of which DISTINCT differ."""
    folder.mkdir()
    files = [scale.photo(seed, width, height) for seed in range(min(n, DISTINCT))]
    paths = [folder / f"{i:06d}.jpg" for i in range(n)]
    for i, path in enumerate(paths):
        path.write_bytes(files[i % len(files)])
    return paths


# ---------------------------------------------------------------------------------------------- evaluation


def evaluation(
    device: torch.device, limits: dict, rounds: int = 3, dim: int = 2_048, pictures: int = 0, counts: tuple[int, int] = COUNTS
) -> dict:  # fmt: skip
    """The Frechet distance beside pytorch-fid's, feature passes beside their networks alone, and the memory of a pass.

    Args:
        dim: of the Frechet distance. pictures: of a pass; 0 takes as many as keep a section at a few minutes.
        counts: pictures of two passes whose memory is compared.

    Returns:
        `table`, `rounds` and `details`, with the seconds and the profile of each pass and the bytes of each process.
    """
    found: dict = {"table": [], "rounds": rounds, "details": {}}
    if peers()["pytorch-fid"] != ABSENT:
        _add_distance(found, dim, rounds)
    clip = ClipEmbedder.load(device=device)
    inception, name = _inception(clip)
    few = pictures or (4_096 if device.type == "cuda" else 16)
    many = pictures or (8_192 if device.type == "cuda" else 1_024)
    networks = {"the embedded CLIP": (feature_network("clip", clip), many), name: (inception, few)}
    for name, (network, n) in networks.items():
        for radii in ((0,), RADII) if network.protocol == "clip" else ((0,),):
            _add_pass(found, network, name, n, radii, rounds, device)
    grown = {str(n): scale.in_a_process("print_pass_memory", n, device, module=__name__)["own"] for n in counts}
    growth = (grown[str(counts[1])] - grown[str(counts[0])]) / 1e9
    what = f"pass of {counts[1]:,} pictures"
    found["table"].append(row(what, f"own memory beyond one of {counts[0]:,}", spread([growth]), GOALS["growth"], most=True, unit="GB"))  # fmt: skip
    found["details"]["memory"] = grown
    return found


def _add_distance(found: dict, dim: int, rounds: int) -> None:
    from pytorch_fid.fid_score import calculate_frechet_distance

    moments = spread_moments(dim)
    values: dict[str, float] = {}

    def ours() -> None:
        values["ours"] = frechet_distance(*moments)

    def theirs() -> None:
        values["pytorch_fid"] = calculate_frechet_distance(*moments)

    seconds = in_turns({"ours": ours, "pytorch_fid": theirs}, rounds, label="Frechet distance")
    difference, what = float(abs(values["ours"] / values["pytorch_fid"] - 1)), f"Frechet distance, {dim} dimensions"
    found["table"] += [
        row(what, "pytorch-fid", ratio(seconds["ours"], seconds["pytorch_fid"]), GOALS["frechet"]),
        row(what, "its difference from pytorch-fid's", spread([difference]), GOALS["difference"], most=True, unit="%"),
    ]
    found["details"]["distance"] = {"seconds": {key: spread(taken) for key, taken in seconds.items()}, "values": values}


def _add_pass(
    found: dict, network: FeatureNetwork, name: str, n: int, radii: tuple[int, ...], rounds: int, device: torch.device
) -> None:  # fmt: skip
    x, batch = noise(0, n, device), min(n, 64)
    actions = {"bare": partial(features, network, x, batch, len(radii)), "pass": partial(statistics, network, x, batch, radii)}
    what = f"features of {name}" + (f", {len(radii)} radii of blur" if len(radii) > 1 else "")
    seconds = in_turns(actions, rounds, waiter(device), label=what)
    peer = "time of as many bare forwards" if len(radii) > 1 else "time of the bare forward"
    found["table"].append(row(what, peer, ratio(seconds["bare"], seconds["pass"]), GOALS["pass"], most=True))
    found["details"][what] = {
        "pictures": n, "batch_size": batch, "seconds": {key: spread(taken) for key, taken in seconds.items()},
        "profile": profiled(actions["pass"], device),
    }  # fmt: skip


def noise(seed: int, n: int, device: torch.device | str, size: int = 64) -> torch.Tensor:
    """(n, 3, size, size) in [-1, 1] at the levels of 8 bits."""
    draw = torch.Generator().manual_seed(seed)
    return to_float(torch.randint(0, 256, (n, 3, size, size), generator=draw, dtype=torch.uint8)).to(device)


def features(network: FeatureNetwork, pictures: torch.Tensor, batch: int, times: int = 1) -> torch.Tensor:
    """(N, d) by the network alone, so many times."""
    for _ in range(times):
        found = torch.cat([network(part) for part in pictures.split(batch)])
    return found


def statistics(network: FeatureNetwork, pictures: torch.Tensor, batch: int, radii: Sequence[int] = (0,)) -> SetStatistics:
    """The same as a pass of the evaluation makes of it: sums of two halves at every radius of blur, a sample, class sums."""
    sink, parts = SetStatistics(network, radii, 2), pictures.split(batch)
    batches = lambda numbers: ((list(range(i * batch, i * batch + len(parts[i]))), parts[i]) for i in numbers)
    stream(batches, len(pictures), batch, {"statistics": sink}, "", show=False)
    return sink


def _inception(clip: ClipEmbedder) -> tuple[FeatureNetwork, str]:
    """Inception of the protocol `inception`; where its weights are not here torchvision's, the same in size, of random weights."""
    try:
        return feature_network("inception", clip), "Inception"
    except MissingWeights:
        from torchvision.models import inception_v3

        torch.manual_seed(0)
        network = inception_v3(weights=None, init_weights=False, transform_input=False, aux_logits=False)
        network.fc = nn.Identity()
        network = network.eval().requires_grad_(False).to(clip.device)
        resized: Callable = lambda x: network(F.interpolate(x, (299, 299), mode="bilinear", align_corners=False))
        head = torch.randn(1_008, 2_048, generator=torch.Generator().manual_seed(0)) / 2_048
        return FeatureNetwork("inception", resized, "random", "0", head), "Inception (random weights)"


def print_pass_memory(pictures: str, device: str) -> None:
    """Take a pass over so many pictures and print the most memory this process had after a batch, as JSON.

    The sample of features is of the size it has after the fewest pictures: all it may hold, 10,000 rows, would take longer.
    """
    clip, total, batch, seen = ClipEmbedder.load(device=device), int(pictures), 50, []
    sink = SetStatistics(feature_network("clip", clip), (0,), 2)
    sink.sample = FeatureSample(COUNTS[0])

    def batches(numbers: range) -> Iterator[tuple[list[int], torch.Tensor]]:
        for i in numbers:
            seen.append(scale.resident())
            rows = list(range(i * batch, min((i + 1) * batch, total)))
            yield rows, noise(i, len(rows), device)

    stream(batches, total, batch, {"statistics": sink}, "", show=False)
    print(json.dumps({key: max(values[key] for values in [*seen, scale.resident()]) for key in ("own", "files")}))
