"""The token store: every picture once through both frozen encoders, kept as flat memory-mapped files.

In: pictures, a frozen VQGAN, a frozen CLIP image encoder. Out: a folder with tokens.u16 (N, L), embeds.f16 (N, D),
rows.i32 (N,) (which picture a row came from) and meta.json. Stage 2 trains from it alone. No caption comes near it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .clip_embed import ClipEmbedder
from .data import ImageSet, ordered_batches
from .images import to_float
from .runs import ClipgenError, module_hash, progress, read_json, write_json
from .vqgan import VQGAN

FILES = {"tokens": ("tokens.u16", np.uint16), "embeds": ("embeds.f16", np.float16), "rows": ("rows.i32", np.int32)}


@dataclass(frozen=True)
class TokenStore:
    """An opened store; rows are read by index, in any order, without loading the rest."""

    folder: Path
    meta: dict
    arrays: dict[str, np.ndarray]

    @classmethod
    def open(cls, folder: Path, vqgan: VQGAN | None = None, clip: ClipEmbedder | None = None) -> TokenStore:
        """Map a finished store.

        Args:
            vqgan, clip: where given, the store must have been made by these very weights.

        Raises:
            ClipgenError: missing, unfinished or damaged store, or one made by other weights.
        """
        folder = Path(folder)
        if not (folder / "meta.json").is_file():
            raise ClipgenError(f"{folder} holds no finished token store: run the extraction (notebook 02) first")
        meta = read_json(folder / "meta.json")
        for kind, given in (("VQGAN", vqgan and module_hash(vqgan)), ("CLIP", clip and clip.weights_hash)):
            made_by = meta.get(f"{kind.lower()}_hash")
            if given is not None and given != made_by:
                raise ClipgenError(f"{folder} was made by another {kind} (weights {made_by}, not {given}): extract again with this one")  # fmt: skip
        try:
            shapes = {"tokens": (meta["N"], meta["L"]), "embeds": (meta["N"], meta["D"]), "rows": (meta["N"],)}
            arrays = {key: np.memmap(folder / name, dtype, "r", shape=shapes[key]) for key, (name, dtype) in FILES.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ClipgenError(f"{folder} is damaged ({error}): delete it and extract again") from None
        for key, (name, dtype) in FILES.items():
            if (folder / name).stat().st_size != arrays[key].size * np.dtype(dtype).itemsize:
                raise ClipgenError(f"{folder / name} has another size than meta.json says: delete the store and extract again")
        return cls(folder, meta, arrays)

    def __len__(self) -> int:
        return self.meta["N"]

    def tokens(self, rows: np.ndarray | slice) -> torch.Tensor:
        """(len(rows), L) int64."""
        return torch.from_numpy(self.arrays["tokens"][rows].astype(np.int64))

    def embeds(self, rows: np.ndarray | slice) -> torch.Tensor:
        """(len(rows), D) float32, unit-norm again after float16."""
        return F.normalize(torch.from_numpy(self.arrays["embeds"][rows].astype(np.float32)), dim=-1)

    @property
    def n_unmirrored(self) -> int:
        """Rows before the mirrored ones."""
        return len(self) // (2 if self.meta["flip"] else 1)

    def mean_embed(self) -> torch.Tensor:
        """Mean (D,) of all embeddings."""
        parts = (self.embeds(slice(i, i + 65_536)).double().sum(0) for i in range(0, len(self), 65_536))
        return (sum(parts) / len(self)).float()

    def nearest(self, embed: torch.Tensor, k: int) -> np.ndarray:
        """The k rows whose pictures are nearest in CLIP space to one embedding (D,), nearest first."""
        return nearest(self.embeds(slice(None)), embed[None].cpu().float(), k)[0].numpy()


def nearest(bank: torch.Tensor, queries: torch.Tensor, k: int, exact_below: int = 1_000_000) -> torch.Tensor:
    """Rows of a bank of unit vectors (M, D) nearest to each query (B, D) by cosine: (B, k) int64, nearest first.

    Above `exact_below` rows by faiss (also exhaustive, a block of rows at a time) where it is installed.
    """
    k = min(k, len(bank))
    if len(bank) > exact_below and find_spec("faiss"):
        import faiss

        _, rows = faiss.knn(queries.cpu().numpy(), bank.cpu().numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(rows).to(bank.device)
    return (queries @ bank.T).topk(k, dim=1).indices


@torch.inference_mode()
def extract(
    images: ImageSet,
    vqgan: VQGAN,
    clip: ClipEmbedder,
    folder: Path,
    flip: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    show_progress: bool = True,
) -> TokenStore:
    """Run both frozen encoders over all pictures, once, and return the opened store.

    A finished store of the same pictures and weights is opened as it is. An interrupted extraction goes on where it
    stopped. With `flip`, mirrored pictures follow as rows of their own. Pictures that cannot be read have no row and
    are listed in meta.json.

    Raises:
        ClipgenError: the folder holds a store made from other pictures or by other weights.
    """
    folder, partial = Path(folder), Path(folder).with_name(Path(folder).name + ".partial")
    device = clip.device
    side = vqgan.config.side
    meta = {
        "N": len(images) * (2 if flip else 1), "L": side * side, "K": vqgan.config.codebook_size, "D": clip.dim,
        "vqgan_hash": module_hash(vqgan), "clip_hash": clip.weights_hash, "clip": clip.name, "data": images.name,
        "split": images.split, "data_hash": images.hash, "transform": f"short side {images.size}, centre crop",
        "flip": flip,
    }  # fmt: skip
    if (folder / "meta.json").is_file():
        store = TokenStore.open(folder, vqgan, clip)
        if any(store.meta.get(key) != meta[key] for key in ("data_hash", "flip", "transform")):
            raise ClipgenError(f"{folder} was made from other pictures: delete it or choose another run name")
        images.skipped.update(store.meta["skipped"])
        return store
    done = _resume(partial, meta)
    shapes = {"tokens": (meta["N"], meta["L"]), "embeds": (meta["N"], meta["D"]), "rows": (meta["N"],)}
    mode = "r+" if done["read"] else "w+"
    arrays = {key: np.memmap(partial / name, dtype, mode, shape=shapes[key]) for key, (name, dtype) in FILES.items()}
    images.skipped.update(done["skipped"])
    with progress(meta["N"], f"extracting {images.split}", show_progress, initial=done["read"]) as bar:
        while done["read"] < meta["N"]:
            # a round of several batches for one loader, then the state on disk moves forward with the data
            first, mirrored = done["read"] % len(images), done["read"] >= len(images)
            part = range(first, min(first + 16 * batch_size, len(images)))
            for kept, squares in ordered_batches(images, part, batch_size, workers):
                x = to_float(squares.flip(3) if mirrored else squares).to(device)
                written = slice(done["written"], done["written"] + len(kept))
                if len(kept):
                    arrays["tokens"][written] = vqgan.encode(x).flatten(1).cpu().numpy()
                    arrays["embeds"][written] = clip.images(x).cpu().numpy()
                    arrays["rows"][written] = kept
                done["written"] += len(kept)
                bar.update(len(squares))
            done["read"] += len(part)
            done["skipped"] = images.skipped
            for array in arrays.values():
                array.flush()
            write_json(partial / "progress.json", {"meta": meta, **done})
    if done["written"] == 0:
        raise ClipgenError(f"none of the {len(images)} pictures of {images.root} could be read: check the data")
    del arrays
    meta |= {"N": done["written"], "skipped": images.skipped}
    for key, (name, dtype) in FILES.items():
        per_row = {"tokens": meta["L"], "embeds": meta["D"], "rows": 1}[key] * np.dtype(dtype).itemsize
        with open(partial / name, "r+b") as stream:
            stream.truncate(meta["N"] * per_row)
    (partial / "progress.json").unlink()
    write_json(partial / "meta.json", meta)
    partial.rename(folder)
    return TokenStore.open(folder, vqgan, clip)


def _resume(partial: Path, meta: dict) -> dict:
    """How far an interrupted extraction of the very same kind came; anything else in the folder is cleared away."""
    if (partial / "progress.json").is_file():
        done = read_json(partial / "progress.json")
        if done.pop("meta") == meta:
            return done
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return {"read": 0, "written": 0, "skipped": {}}
