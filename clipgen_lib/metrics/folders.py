"""What is scored and what it is scored against: any folder of images, a data set's split, or statistics of a file."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from PIL import Image

from ..data.datasets import ImageSet, open_images
from ..data.folders import list_folder
from ..runtime.distributed import tell
from ..runtime.runs import ClipgenError
from .statistics import Moments, read_statistics


def open_folder(root: Path, size: int = 0) -> ImageSet:
    """Every image below a folder, without splits and captions.

    Args:
        size: short side in pixels; 0 takes the images' own.

    Raises:
        ClipgenError: no folder, fewer than 2 images, or images of different sizes and no `size`.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ClipgenError(f"{root} is not a folder of images: check the path, or unpack the archive")
    listing = list_folder(root)
    tell(f"{root}: every one of {listing.describe()}")
    names, sizes = listing.names, set()
    if len(names) < 2:
        raise ClipgenError(f"{root} holds {len(names)} images, too few to compare: give a folder of at least 2")
    for name in names if not size else ():
        with suppress(OSError, Image.DecompressionBombError), Image.open(root / name) as image:  # reading will say why
            sizes.add(image.size)
    if not size and not sizes:
        raise ClipgenError(f"none of {len(names)} images in {root} could be read: restore them")
    if not size and len(sizes) != 1:
        some = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:3])
        raise ClipgenError(
            f"the images in {root} have {len(sizes)} different sizes ({some}, ...): say by --size which side they are brought to"
        )
    return ImageSet(root.resolve().name, "all", root, names, size or min(*sizes.pop()))


def open_reference(reference: str | Path, size: int, split: str = "val") -> ImageSet | Moments:
    """What images are scored against: pytorch-fid's statistics (.npz), a data set's split, or every image below a folder without splits."""
    path = Path(reference)
    if path.suffix == ".npz":
        return read_statistics(path)
    if path.is_dir() and not any(path.glob("annotations/captions_*.json")):
        listing = list_folder(path)
        if listing.names and not listing.splits():
            return open_folder(path, size)
    return open_images(reference, split, size)


def codec(names: Iterable[str]) -> str:
    """PNG, JPEG, ..., or mixed with their names, by the endings of file names."""
    known, endings = Image.registered_extensions(), {Path(name).suffix for name in names}
    codecs = sorted({known.get(ending.lower(), ending) for ending in endings})
    return codecs[0] if len(codecs) == 1 else "mixed: " + ", ".join(codecs)
