"""Passes over pictures: what each leaves behind, kept under the hash of what decides it.

In: batches of pictures (B, 3, H, W) in [-1, 1] and sinks that take them. Out: the sinks, filled. Memory does not grow with
the number of pictures. A pass that is killed goes on from its last checkpoint and ends with the same bits; one over
pictures that were seen before is read from `data/statistics/`.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .classifier import Classifier
from .clip_embed import ClipEmbedder
from .data import ImageSet, ordered_batches
from .images import blur, eight_bit, to_float
from .metrics import ClassSums, FeatureSample, GaussianStatistics, Moments, frechet_distance
from .protocols import FeatureNetwork
from .runs import DATA, ClipgenError, load_checkpoint, module_hash, progress, save_checkpoint, versions

STATISTICS = DATA / "statistics"
SAVE_SECONDS = 60  # between the checkpoints of a pass
JUDGED = 10_000  # pairs of picture and caption whose embeddings are kept, for what needs all of them at once
BLUR_DEFINITION = "Gaussian, sigma = k pixels at the evaluation resolution, kernel to 4 sigma, reflected border, on both sets, before the network's resize"  # fmt: skip


def digest(facts: object) -> str:
    """16 hex digits of the SHA-256 of facts as JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- sinks


class SetStatistics:
    """What all distances need of one set of pictures under one protocol, at every blur radius at once.

    For each radius the sums of mean and covariance, in `parts` parts (picture i is of part i mod parts: two parts are
    the halves whose distance is the floor); of the unblurred pictures a sample of features, and class sums where the
    network has a head.
    """

    def __init__(self, network: FeatureNetwork, radii: Sequence[int], parts: int = 1):
        self.network, self.n = network, 0
        self.by_radius = {k: [GaussianStatistics() for _ in range(parts)] for k in radii}
        self.sample = FeatureSample()
        self.classes = ClassSums() if network.head is not None else None

    @property
    def facts(self) -> dict:
        names = ("torch", "torchvision", "pillow", "open_clip_torch", "torchmetrics", "pytorch-fid", "torch-fidelity")
        return {
            "protocol": self.network.protocol, "weights": self.network.weights_hash, "head": self.classes is not None,
            "radii": list(self.by_radius), "parts": len(next(iter(self.by_radius.values()))), "blur": BLUR_DEFINITION,
            "sample": [self.sample.size, self.sample.seed], "versions": {name: versions()[name] for name in names},
        }  # fmt: skip

    @torch.inference_mode()
    def add(self, rows: list[int], pictures: torch.Tensor) -> None:
        """pictures: (B, 3, H, W) in [-1, 1]; rounded to 8 bits first, as files are."""
        pictures = eight_bit(pictures)
        for k, parts in self.by_radius.items():
            features = self.network(blur(pictures, k))
            for i, part in enumerate(parts):
                part.add(features[(i - self.n) % len(parts) :: len(parts)])
            if k == 0:
                self.sample.add(features)
                if self.classes is not None:
                    self.classes.add(self.network.logits(features))
        self.n += len(pictures)

    @property
    def dim(self) -> int:
        return len(next(iter(self.by_radius.values()))[0].total)

    def moments(self, k: int) -> Moments:
        return GaussianStatistics.union(self.by_radius[k]).moments()

    def distance(self, other: SetStatistics | StatisticsFile) -> dict[str, float]:
        """FID-k for every k that both have."""
        return {str(k): frechet_distance(*self.moments(k), *other.moments(k)) for k in self.by_radius if k in other.by_radius}

    def floor(self) -> dict[str, float]:
        """FID-k of the two halves, one against the other."""
        return {str(k): frechet_distance(*a.moments(), *b.moments()) for k, (a, b) in self.by_radius.items()}

    def state(self) -> dict:
        sums = {k: [part.state() for part in parts] for k, parts in self.by_radius.items()}
        return {"n": self.n, "sums": sums, "sample": self.sample.state(), "classes": self.classes and self.classes.state()}

    def restore(self, state: dict) -> None:
        self.n = state["n"]
        for k, parts in self.by_radius.items():
            for part, kept in zip(parts, state["sums"][k], strict=True):
                part.restore(kept)
        self.sample.restore(state["sample"])
        if self.classes is not None:
            self.classes.restore(state["classes"])


class StatisticsFile:
    """Mean and covariance of unblurred pictures from an npz file of pytorch-fid (`mu`, `sigma`)."""

    def __init__(self, path: Path):
        try:
            with np.load(path, allow_pickle=False) as content:
                self.mu, self.sigma = (np.asarray(content[key], np.float64) for key in ("mu", "sigma"))
        except FileNotFoundError:
            raise ClipgenError(f"{path} is missing: check the path") from None
        except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError) as error:
            raise ClipgenError(f"{path} is cut short or holds no mu and sigma ({error}): make it again by pytorch-fid's --save-stats") from None  # fmt: skip
        d = len(self.mu) if self.mu.ndim == 1 else 0
        if self.sigma.shape != (d, d) or not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise ClipgenError(f"{path} holds mu {self.mu.shape} and sigma {self.sigma.shape}, not finite (d,) and (d, d): make it again by pytorch-fid's --save-stats")  # fmt: skip
        self.by_radius = {0: None}

    def moments(self, k: int) -> Moments:
        return self.mu, self.sigma


class Embeddings:
    """The judge's embeddings (D,) of chosen rows, 8-bit pictures."""

    def __init__(self, judge: ClipEmbedder, rows: Iterable[int]):
        self.judge, self.wanted, self.found = judge, set(rows), {}

    @property
    def facts(self) -> dict:
        return {"judge": self.judge.weights_hash, "rows": digest(sorted(self.wanted))}

    @torch.inference_mode()
    def add(self, rows: list[int], pictures: torch.Tensor) -> None:
        kept = [i for i, row in enumerate(rows) if row in self.wanted]
        if kept:
            embeds = self.judge.images(eight_bit(pictures[kept])).cpu()
            self.found |= {rows[i]: embed for i, embed in zip(kept, embeds, strict=True)}

    def of(self, rows: Sequence[int]) -> torch.Tensor:
        """(N, D) in the order of `rows`."""
        return torch.stack([self.found[row] for row in rows])

    def state(self) -> dict:
        return {"rows": list(self.found), "embeds": torch.stack(list(self.found.values())) if self.found else None}

    def restore(self, state: dict) -> None:
        self.found = dict(zip(state["rows"], state["embeds"] if state["rows"] else (), strict=True))


class CaptionFit:
    """How well pictures fit their texts under a judge: the sum of all cosines, and the embeddings of the first JUDGED pairs.

    Args:
        texts: row -> its text; rows without one are passed over.
    """

    def __init__(self, judge: ClipEmbedder, texts: dict[int, str]):
        self.judge, self.texts = judge, texts
        self.n, self.total, self.truncated = 0, 0.0, 0
        self.rows: list[int] = []  # of the pairs that are kept
        self.pictures: list[torch.Tensor] = []
        self.captions: list[torch.Tensor] = []

    @property
    def facts(self) -> dict:
        return {"judge": self.judge.weights_hash, "texts": digest(sorted(self.texts.items()))}

    @torch.inference_mode()
    def add(self, rows: list[int], pictures: torch.Tensor) -> None:
        kept = [i for i, row in enumerate(rows) if row in self.texts]
        if not kept:
            return
        rows = [rows[i] for i in kept]
        embeds = self.judge.images(eight_bit(pictures[kept])).cpu()
        texts = self.judge.texts([self.texts[row] for row in rows]).cpu()
        self.n, self.total = self.n + len(rows), self.total + float((embeds * texts).sum(1).double().sum())
        self.truncated += sum(self.judge.is_truncated(self.texts[row]) for row in rows)
        room = JUDGED - len(self.rows)
        self.rows += rows[:room]
        self.pictures += list(embeds[:room])
        self.captions += list(texts[:room])

    @property
    def caps(self) -> float:
        return self.total / self.n

    def state(self) -> dict:
        pairs = [torch.stack(x) if x else None for x in (self.pictures, self.captions)]
        return {"n": self.n, "total": self.total, "truncated": self.truncated, "rows": self.rows, "pairs": pairs}

    def restore(self, state: dict) -> None:
        self.n, self.total, self.truncated, self.rows = (state[key] for key in ("n", "total", "truncated", "rows"))
        self.pictures, self.captions = ([] if pair is None else list(pair) for pair in state["pairs"])


class ClassHits:
    """How many pictures a classifier reads as the class of their row."""

    def __init__(self, classifier: Classifier, classes: Sequence[str]):
        self.classifier, self.classes, self.n, self.right = classifier, classes, 0, 0

    @property
    def facts(self) -> dict:
        return {"classifier": module_hash(self.classifier), "classes": digest(list(self.classes))}

    def add(self, rows: list[int], pictures: torch.Tensor) -> None:
        found = self.classifier.read(pictures)
        self.right += sum(name == self.classes[row] for name, row in zip(found, rows, strict=True))
        self.n += len(rows)

    @property
    def share(self) -> float:
        return self.right / self.n

    def state(self) -> dict:
        return {"n": self.n, "right": self.right}

    def restore(self, state: dict) -> None:
        self.n, self.right = state["n"], state["right"]


class FirstPictures:
    """The first `count` pictures, to be shown."""

    def __init__(self, count: int):
        self.count, self.pictures = count, []

    def add(self, rows: list[int], pictures: torch.Tensor) -> None:
        self.pictures += list(pictures[: self.count - len(self.pictures)].cpu())

    def state(self) -> dict:
        return {"pictures": self.pictures}

    def restore(self, state: dict) -> None:
        self.pictures = list(state["pictures"])


class _Skipped:
    """The files that could not be read, so that a pass that is not made again still knows them."""

    def __init__(self, images: ImageSet):
        self.images = images

    def add(self, rows: list[int], pictures: torch.Tensor) -> None:
        """Nothing: the set itself keeps the list."""

    def state(self) -> dict:
        return dict(self.images.skipped)

    def restore(self, state: dict) -> None:
        self.images.skipped.update(state)


# ---------------------------------------------------------------------------------------------- passes


def stream(
    batches: Callable[[int], Iterable[tuple[list[int], torch.Tensor]]], total: int, batch_size: int, sinks: dict,
    label: str, show: bool = True, partial: Path | None = None,
) -> None:  # fmt: skip
    """Feed batches to sinks under a bar with an ETA.

    Args:
        batches: number of batches to leave out -> (rows, pictures) of the others, in order.
        total: pictures. partial: file that the sinks are kept in every minute; where it is there, the pass goes on from it.
    """
    done = 0
    if partial is not None and partial.exists():
        state, meta = load_checkpoint(partial)
        done = meta["batches"]
        for name, sink in sinks.items():
            sink.restore(state[name])
    saved = time.monotonic()
    with progress(total, label, show, min(done * batch_size, total)) as bar:
        for rows, pictures in batches(done):
            for sink in sinks.values():
                if rows:
                    sink.add(rows, pictures)
            done += 1
            bar.update(min(batch_size, total - bar.n))
            if partial is not None and time.monotonic() - saved >= SAVE_SECONDS:
                save_checkpoint(partial, {name: sink.state() for name, sink in sinks.items()}, {"batches": done})
                saved = time.monotonic()


class Change(NamedTuple):
    """What is done to pictures (B, 3, H, W) before they are measured, and the name that it is cached under."""

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]


def measure(
    images: ImageSet, sinks: dict, change: Change, batch_size: int, label: str, show: bool = True, folder: Path = STATISTICS
) -> None:  # fmt: skip
    """Fill sinks with all pictures of a set, or read from `folder` what such a pass left there before.

    A result is kept under the hash of the files' bytes, the resolution, the change and the sink's own facts; batch size
    and device are not among them, which differ in the last bits.
    """
    content = {"pictures": images.content_hash, "size": images.size, "change": change.name}
    files = {name: folder / f"{name}-{digest([content, sink.facts])}.safetensors" for name, sink in sinks.items()}
    skipped, todo = _Skipped(images), {}
    for name, sink in sinks.items():
        if files[name].exists():
            state, _ = load_checkpoint(files[name])
            sink.restore(state["sink"])
            skipped.restore(state["skipped"])
        else:
            todo[name] = sink
    if not todo:
        return

    def batches(start: int):
        for rows, batch in ordered_batches(images, range(start * batch_size, len(images)), batch_size):
            yield rows, change.function(to_float(batch)) if rows else batch

    partial = folder / f"partial-{digest([batch_size, *(files[name].name for name in todo)])}.safetensors"
    stream(batches, len(images), batch_size, {**todo, "skipped": skipped}, label, show, partial)
    for name, sink in todo.items():
        save_checkpoint(files[name], {"sink": sink.state(), "skipped": skipped.state()}, {**content, **sink.facts})
    partial.unlink(missing_ok=True)
