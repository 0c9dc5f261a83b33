"""Passes over images: what each leaves behind, kept under the hash of what decides it.

In: batches of images (B, 3, H, W) in [-1, 1] and sinks that take them. Out: the sinks, filled. Memory does not grow with
the number of images. A pass that is killed goes on from its last checkpoint and ends with the same bits; one over
images that were seen before is read from `data/statistics/`.

A sink has two halves. `find` is the networks: every process of a launch does it for batches of its own. `add` sums what was
found: the first process does it in the order of the batches. The sums are therefore the same bits with any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..clip_embed import ClipEmbedder
from ..data.batches import ordered_batches
from ..data.datasets import ImageSet
from ..data.images import blur, eight_bit, to_float
from ..runtime import distributed
from ..runtime.checkpoints import load_checkpoint, module_hash, save_checkpoint
from ..runtime.runs import DATA, ClipgenError, Stop, progress, reason, stoppable, versions
from .classifier import Classifier
from .distances import ClassSums, FeatureSample, GaussianStatistics, Moments, frechet_distance
from .features import FeatureNetwork

STATISTICS = DATA / "statistics"
SAVE_SECONDS = 60  # between the checkpoints of a pass
SKIPPED = "skipped"  # the name of the one sink that looks at batches in which nothing could be read too
JUDGED = 10_000  # pairs of image and caption whose embeddings are kept, for what needs all of them at once
BLUR_DEFINITION = "Gaussian, sigma = k pixels at the evaluation resolution, kernel to 4 sigma, reflected border, on both sets, before the network's resize"


def digest(facts: object) -> str:
    """16 hex digits of the SHA-256 of facts as JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class SetStatistics:
    """What all distances need of one set of images under one protocol, at every blur radius at once.

    For each radius the sums of mean and covariance, in `parts` parts (image i is of part i mod parts: two parts are
    the halves whose distance is the floor); of the unblurred images a sample of features, and class sums where the
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
            "protocol": self.network.protocol,
            "weights": self.network.weights_hash,
            "head": self.classes is not None,
            "radii": list(self.by_radius),
            "parts": len(next(iter(self.by_radius.values()))),
            "blur": BLUR_DEFINITION,
            "sample": [self.sample.size, self.sample.seed],
            "versions": {name: versions()[name] for name in names},
        }

    @torch.inference_mode()
    def find(self, rows: list[int], pictures: torch.Tensor) -> dict:
        """Features (B, d) by radius, and logits where the network has a head; images are rounded to 8 bits, as files are."""
        pictures, found = eight_bit(pictures), {}
        for k in self.by_radius:
            found[k] = self.network(blur(pictures, k))
        if 0 in found and self.classes is not None:
            found["logits"] = self.network.logits(found[0])
        return {key: values.cpu() for key, values in found.items()}  # a GPU is waited for once

    def add(self, rows: list[int], found: dict) -> None:
        for k, parts in self.by_radius.items():
            for i, part in enumerate(parts):
                part.add(found[k][(i - self.n) % len(parts) :: len(parts)])
        if 0 in found:
            self.sample.add(found[0])
        if "logits" in found:
            self.classes.add(found["logits"])
        self.n += len(next(iter(found.values())))

    @property
    def dim(self) -> int:
        return len(next(iter(self.by_radius.values()))[0].total)

    def moments(self, k: int) -> Moments:
        return GaussianStatistics.union(self.by_radius[k]).moments()

    def distance(self, other: SetStatistics | StatisticsFile) -> dict[str, float]:
        """FID-k for every k that both have."""
        return {
            str(k): frechet_distance(*self.moments(k), *other.moments(k))
            for k in self.by_radius
            if k in other.by_radius
        }

    def floor(self) -> dict[str, float]:
        """FID-k of the two halves, one against the other."""
        return {str(k): frechet_distance(*a.moments(), *b.moments()) for k, (a, b) in self.by_radius.items()}

    def state(self) -> dict:
        sums = {k: [part.state() for part in parts] for k, parts in self.by_radius.items()}
        return {
            "n": self.n,
            "sums": sums,
            "sample": self.sample.state(),
            "classes": self.classes and self.classes.state(),
        }

    def restore(self, state: dict) -> None:
        self.n = state["n"]
        for k, parts in self.by_radius.items():
            for part, kept in zip(parts, state["sums"][k], strict=True):
                part.restore(kept)
        self.sample.restore(state["sample"])
        if self.classes is not None:
            self.classes.restore(state["classes"])


class StatisticsFile:
    """Mean and covariance of unblurred images from an npz file of pytorch-fid (`mu`, `sigma`)."""

    def __init__(self, path: Path):
        try:
            with np.load(path, allow_pickle=False) as content:
                self.mu, self.sigma = (np.asarray(content[key], np.float64) for key in ("mu", "sigma"))
        except FileNotFoundError:
            raise ClipgenError(f"{path} is missing: check the path") from None
        except Exception as error:  # of an archive of any bytes: zipfile, zlib and numpy raise whatever they like
            raise ClipgenError(
                f"{path} is cut short or holds no mu and sigma ({reason(error)}): make it again by pytorch-fid's --save-stats"
            ) from None
        d = len(self.mu) if self.mu.ndim == 1 else 0
        if self.sigma.shape != (d, d) or not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise ClipgenError(
                f"{path} holds mu {self.mu.shape} and sigma {self.sigma.shape}, not finite (d,) and (d, d): make it again by pytorch-fid's --save-stats"
            )
        self.by_radius = {0: None}

    def moments(self, k: int) -> Moments:
        return self.mu, self.sigma


class Embeddings:
    """The judge's embeddings (D,) of chosen rows, 8-bit images."""

    def __init__(self, judge: ClipEmbedder, rows: Iterable[int]):
        self.judge, self.wanted, self.found = judge, set(rows), {}

    @property
    def facts(self) -> dict:
        return {"judge": self.judge.weights_hash, "rows": digest(sorted(self.wanted))}

    @torch.inference_mode()
    def find(self, rows: list[int], pictures: torch.Tensor) -> torch.Tensor | None:
        kept = [i for i, row in enumerate(rows) if row in self.wanted]
        return self.judge.images(eight_bit(pictures[kept])).cpu() if kept else None

    def add(self, rows: list[int], found: torch.Tensor | None) -> None:
        if found is not None:
            self.found |= dict(zip([row for row in rows if row in self.wanted], found, strict=True))

    def of(self, rows: Sequence[int]) -> torch.Tensor:
        """(N, D) in the order of `rows`."""
        return torch.stack([self.found[row] for row in rows])

    def state(self) -> dict:
        return {"rows": list(self.found), "embeds": torch.stack(list(self.found.values())) if self.found else None}

    def restore(self, state: dict) -> None:
        self.found = dict(zip(state["rows"], state["embeds"] if state["rows"] else (), strict=True))


class CaptionFit:
    """How well images fit their texts under a judge: the sum of all cosines, and the embeddings of the first JUDGED pairs.

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
    def find(self, rows: list[int], pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        kept = [i for i, row in enumerate(rows) if row in self.texts]
        if not kept:
            return None
        texts = [self.texts[rows[i]] for i in kept]
        return self.judge.images(eight_bit(pictures[kept])).cpu(), self.judge.texts(texts).cpu()

    def add(self, rows: list[int], found: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        if found is None:
            return
        rows, (embeds, texts) = [row for row in rows if row in self.texts], found
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
    """How many images a classifier reads as the class of their row."""

    def __init__(self, classifier: Classifier, classes: Sequence[str]):
        self.classifier, self.classes, self.n, self.right = classifier, classes, 0, 0

    @property
    def facts(self) -> dict:
        return {"classifier": module_hash(self.classifier), "classes": digest(list(self.classes))}

    def find(self, rows: list[int], pictures: torch.Tensor) -> int:
        found = self.classifier.read(pictures)
        return sum(name == self.classes[row] for name, row in zip(found, rows, strict=True))

    def add(self, rows: list[int], found: int) -> None:
        self.n, self.right = self.n + len(rows), self.right + found

    @property
    def share(self) -> float:
        return self.right / self.n

    def state(self) -> dict:
        return {"n": self.n, "right": self.right}

    def restore(self, state: dict) -> None:
        self.n, self.right = state["n"], state["right"]


class FirstPictures:
    """The first `count` images, to be shown."""

    def __init__(self, count: int):
        self.count, self.pictures = count, []
        self.room = count  # what this process may still find: its batches come in their order, so no more can be needed

    def find(self, rows: list[int], pictures: torch.Tensor) -> torch.Tensor:
        pictures = pictures[: self.room].to("cpu", copy=True)  # not a view, which would travel with its whole batch
        self.room -= len(pictures)
        return pictures

    def add(self, rows: list[int], found: torch.Tensor) -> None:
        self.pictures += list(found[: self.count - len(self.pictures)])

    def state(self) -> dict:
        return {"images": self.pictures}

    def restore(self, state: dict) -> None:
        self.pictures = list(state["images"])
        self.room = self.count - len(self.pictures)


class _Skipped:
    """The files that could not be read, so that a pass that is not made again still knows them."""

    def __init__(self, images: ImageSet):
        self.images, self.told = images, set()

    def find(self, rows: list[int], pictures: torch.Tensor) -> dict[str, str]:
        """Those that this process has come upon since it was asked last."""
        new = {name: why for name, why in self.images.skipped.items() if name not in self.told}
        self.told |= new.keys()
        return new

    def add(self, rows: list[int], found: dict[str, str]) -> None:
        self.images.skipped.update(found)

    def state(self) -> dict:
        return dict(self.images.skipped)

    def restore(self, state: dict) -> None:
        self.images.skipped.update(state)


def stream(
    batches: Callable[[range], Iterator[tuple[list[int], torch.Tensor]]],
    total: int,
    batch_size: int,
    sinks: dict,
    label: str,
    show: bool = True,
    partial: Path | None = None,
) -> None:
    """Feed batches to sinks under a bar with an ETA; in a launch every process ends with the same sinks.

    Args:
        batches: numbers of batches -> (rows, images) of each, in order; a process asks for its own alone.
        total: images. partial: file that the sinks are kept in every minute; where it is there, the pass goes on from it.

    Raises:
        Stopped: SIGTERM or SIGINT has come, and the sinks are kept in `partial`.
    """
    done, count = 0, -(-total // batch_size)
    if kept := _read(partial):
        state, done = kept[0], kept[1]["batches"]
        for name, sink in sinks.items():
            sink.restore(state[name])

    def save() -> None:
        if distributed.is_main():
            save_checkpoint(partial, {name: sink.state() for name, sink in sinks.items()}, {"batches": done})

    def save_for_all() -> None:
        save()
        distributed.barrier()  # a process that ends takes the others with it

    saved, mine = time.monotonic(), batches(range(done + distributed.rank(), count, distributed.world_size()))
    bar = progress(total, label, show and distributed.is_main(), min(done * batch_size, total))
    with bar, stoppable() if partial else nullcontext(Stop()) as stop:
        while done < count:
            found = None
            if done + distributed.rank() < count:
                rows, pictures = next(mine)
                found = (
                    rows,
                    {name: sink.find(rows, pictures) for name, sink in sinks.items() if rows or name == SKIPPED},
                )
            for rows, parts in filter(None, distributed.gather(found)):
                for name, part in parts.items():
                    sinks[name].add(rows, part)
            done = min(done + distributed.world_size(), count)
            bar.update(min(done * batch_size, total) - bar.n)
            stop.number = distributed.broadcast(stop.number)
            stop.raise_if_asked(save_for_all, f"after {done} of {count} batches ({label})")
            if partial and time.monotonic() - saved >= SAVE_SECONDS:
                save()
                saved = time.monotonic()
    if distributed.world_size() > 1:
        state = distributed.broadcast(
            {name: sink.state() for name, sink in sinks.items()} if distributed.is_main() else None
        )
        for name, sink in sinks.items():
            if not distributed.is_main():
                sink.restore(state[name])


def _read(path: Path | None) -> tuple[dict, dict] | None:
    """What a pass left behind as the first process finds it, for all; None where there is nothing, or nothing whole."""
    found = None
    if distributed.is_main() and path is not None and path.exists():
        try:
            found = load_checkpoint(path)
        except ClipgenError:  # it can be made again, unlike what a person has made
            warnings.warn(f"{path} is damaged or of another version: it is made again", stacklevel=3)
    return distributed.broadcast(found)


class Change(NamedTuple):
    """What is done to images (B, 3, H, W) before they are measured, and the name that it is cached under."""

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]


def measure(
    images: ImageSet,
    sinks: dict,
    change: Change,
    batch_size: int,
    label: str,
    show: bool = True,
    folder: Path = STATISTICS,
) -> None:
    """Fill sinks with all images of a set, or read from `folder` what such a pass left there before.

    A result is kept under the hash of the files' bytes, the resolution, the change and the sink's own facts; batch size
    and device are not among them, which differ in the last bits.
    """
    pictures = distributed.broadcast(images.hash if distributed.is_main() else None)  # reads every file
    content = {"images": pictures, "size": images.size, "change": change.name}
    files = {name: folder / f"{name}-{digest([content, sink.facts])}.safetensors" for name, sink in sinks.items()}
    skipped, todo = _Skipped(images), {}
    for name, sink in sinks.items():
        if kept := _read(files[name]):
            sink.restore(kept[0]["sink"])
            skipped.restore(kept[0]["skipped"])
        else:
            todo[name] = sink
    if not todo:
        return

    def batches(numbers: range) -> Iterator[tuple[list[int], torch.Tensor]]:
        rows = [row for i in numbers for row in range(i * batch_size, min((i + 1) * batch_size, len(images)))]
        # a GPU leaves the cores to those that decode; what a CPU computes needs them itself
        workers = 4 if torch.cuda.is_initialized() else 0
        for kept, batch in ordered_batches(images, rows, batch_size, workers):
            yield kept, change.function(to_float(batch)) if kept else batch

    partial = folder / f"partial-{digest([batch_size, *(files[name].name for name in todo)])}.safetensors"
    stream(batches, len(images), batch_size, {**todo, SKIPPED: skipped}, label, show, partial)
    if distributed.is_main():
        for name, sink in todo.items():
            save_checkpoint(files[name], {"sink": sink.state(), "skipped": skipped.state()}, {**content, **sink.facts})
        partial.unlink(missing_ok=True)
