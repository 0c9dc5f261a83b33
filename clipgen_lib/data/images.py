"""The pixel contract: images inside the library are (B, 3, H, W) float in [-1, 1], RGB.

Only this module converts between files, uint8 and that range. In: files or tensors. Out: tensors, uint8 arrays, grids.
It knows nothing of CLIP's mean and standard deviation: that is `ClipEmbedder`'s alone.
"""

import io
import os
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features

from ..runtime.runs import ClipgenError, reason

with suppress(ImportError):  # photos of phones, for whoever has installed it
    import pillow_heif

    pillow_heif.register_heif_opener()

_ENDINGS = Image.registered_extensions()
# whatever the name says; Pillow hands EPS to another program, and takes any bytes for a TGA, so that its name must say it
_READ = Image.OPEN.keys() & {"JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF"}
_PARTS = {"AVIF": "avif", "JPEG2000": "jpg_2000"}  # a build of Pillow may be without
_READ -= {kind for kind in _READ & _PARTS.keys() if not features.check(_PARTS[kind])}
_ENDINGS = {end: kind for end, kind in _ENDINGS.items() if kind in _READ | {"MPO", "TGA"}}
FORMATS, EXTENSIONS = sorted(_READ), tuple(_ENDINGS)
MAX_BYTES = 1 << 30  # of a file or of a member of an archive
MAX_PIXELS = 100_000_000  # a larger header is a decompression bomb or not meant for training
MAX_SCANS = 20  # passes of a progressive JPEG over MAX_PIXELS, of a smaller one as many more
MAX_ASPECT = 100  # long to short side: with the short side as asked, a line of 1 x 60,000 pixels would fill the memory
PAUSES = (0.2, 0.8, 3.0)  # seconds before a read that failed is tried again: a file server that comes back


class BadImage(ClipgenError):
    """An image whose bytes are no picture to train on: it is left out and counted, where every other error stops."""


def patiently(read: Callable, path: object) -> Any:
    """What `read` returns; where the disk or the memory fails it is called again, after each of PAUSES.

    Raises ClipgenError where it failed each time.
    """
    for pause in (*PAUSES, 0):
        try:
            return read()
        except (OSError, MemoryError) as error:
            why = getattr(error, "strerror", None) or reason(error)
        time.sleep(pause)
    raise ClipgenError(f"{path} cannot be read ({why}): mend that, then run the same command again to resume")


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises ClipgenError where it cannot be read, is larger than 1 GB, or is in another encoding.
    """
    content = patiently(lambda: _content(path), path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else reason(error)
        raise ClipgenError(f"{path} cannot be read as UTF-8 ({why}): save it as UTF-8") from None


def _content(path: Path) -> bytes:
    """The bytes of a file. Raises BadImage where there are more than MAX_BYTES."""
    with open(path, "rb") as stream:
        if (size := os.fstat(stream.fileno()).st_size) > MAX_BYTES:
            raise BadImage(f"{path} has {size / 1e9:.3g} GB: give a file of less than {MAX_BYTES / 1e9:.3g}")
        return stream.read()


def load_image(source: Path | bytes, size: int, name: str = "") -> torch.Tensor:
    """Read an image, a file or its bytes, upright and in RGB, its short side resized to `size` pixels.

    Grey, palette, CMYK, 16-bit, float and alpha images become 8-bit RGB (alpha over white); EXIF rotation is applied.
    Returns (3, H, W) uint8 with min(H, W) == size; the longer side is kept for `crop`. Raises BadImage where the file is no
    image of these formats, is cut short, is larger than 100 megapixels or 1 GB, or is a line; ClipgenError where it cannot
    be read, now or some seconds later, or there is no memory for it. Errors call it `name`, or by its path.
    """
    return patiently(lambda: _load(source, size, str(name or source)), name or source)


def _load(source: Path | bytes, size: int, path: str) -> torch.Tensor:
    content = source if isinstance(source, bytes) else _content(source)
    formats = [*FORMATS, "TGA"] if _ENDINGS.get(os.path.splitext(path)[1].lower()) == "TGA" else FORMATS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is in _decoded
            array = _decoded(content, size, formats, path)
    except Image.DecompressionBombError:  # Pillow's own limit, of twice as many
        raise BadImage(f"{path} has more than 100 megapixels: shrink it") from None
    except UnidentifiedImageError:
        raise BadImage(f"{path} is not an image that Pillow can read: remove it or save it again") from None
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # of a file of any bytes: Pillow's plugins raise whatever they stumble over
        raise BadImage(f"{path} is damaged ({reason(error)}): remove it or restore it from its source") from None
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _decoded(content: bytes, size: int, formats: list[str], path: str) -> np.ndarray:
    """(H, W, 3) uint8 with a short side of `size` pixels; raises BadImage where it is too large or a line."""
    with Image.open(io.BytesIO(content), formats=formats) as image:
        pixels = f"{path} has {image.width}x{image.height} pixels"
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{pixels}: shrink it below 100 megapixels")
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise BadImage(f"{pixels}, more than {MAX_ASPECT} times as long as wide: crop it")
        if image.format in ("JPEG", "MPO"):
            scans = content.count(b"\xff\xda")  # inside of a scan no such bytes stand
            if scans * image.width * image.height > MAX_SCANS * MAX_PIXELS:
                raise BadImage(f"{pixels} in {scans} scans, which take minutes: save it again")
            image.draft("RGB", (2 * size, 2 * size))  # decodes at a coarser scale where that is enough
        ImageOps.exif_transpose(image, in_place=True)  # a copy only where it has to be turned
        image = _to_rgb(image)
        short = min(image.size)
        target = [max(size, round(side * size / short)) for side in image.size]
        return np.array(image if target == list(image.size) else image.resize(target, Image.Resampling.LANCZOS))


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode."""
    if image.mode.startswith(("I;16", "I", "F")):  # Pillow clips these to 8 bits; scale the range instead
        values = np.asarray(image)
        least, most = values.min(), values.max()
        if not np.isfinite((least, most)).all():
            raise ValueError("it has pixels that are not finite")
        top = 65535.0 if most > 255 else 1.0 if image.mode == "F" and most <= 1 else 255.0
        scaled = np.empty(values.shape, np.uint8)
        for row, line in zip(scaled, values, strict=True):  # one by one: float64 of all takes eight times the memory
            row[:] = np.clip(line.astype(np.float64) * 255 / top, 0, 255)
        return Image.fromarray(scaled).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba, flat = image if image.mode == "RGBA" else image.convert("RGBA"), Image.new("RGB", image.size, "white")
        flat.paste(rgba, mask=rgba)
        return flat
    return image if image.mode == "RGB" else image.convert("RGB")


def crop(image: torch.Tensor, size: int, at: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
    """A (3, size, size) square of a (3, H, W) image; `at` places it, (0.5, 0.5) is the centre."""
    top = round(at[0] * (image.shape[1] - size))
    left = round(at[1] * (image.shape[2] - size))
    return image[:, top : top + size, left : left + size]


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    # a tensor, because a GPU would multiply by the reciprocal of a plain number: other bits
    return images.float() / torch.full((), 127.5, device=images.device) - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1], clamped -> uint8 in [0, 255], rounded to nearest."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def eight_bit(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1], clamped and rounded to the 256 levels of a file; raises ClipgenError where a pixel is not finite."""
    if not torch.isfinite(images).all():
        raise ClipgenError("an image has NaN or infinite pixels: check its generator and the precision it ran in")
    return to_float(to_uint8(images))


def jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] as it comes back from JPEG files of that quality (1 to 95)."""
    arrays = []
    for array in to_arrays(images):
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, "JPEG", quality=quality)
        arrays.append(np.asarray(Image.open(stream)))
    return from_arrays(np.stack(arrays)).to(images.device)


def to_arrays(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) float in [-1, 1] -> (B, H, W, 3) uint8 array."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def from_arrays(arrays: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 array -> (B, 3, H, W) float in [-1, 1]."""
    return to_float(torch.from_numpy(np.array(arrays)).permute(0, 3, 1, 2))


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur with a standard deviation of `sigma` pixels; 0 returns the input.

    The blur of FID-k (DALL-E, arXiv 2102.12092, section 3.1 "varying radius"): no published code fixes kernel size or
    border, so here the kernel reaches 4 sigma and the border is reflected (repeated where the image is smaller
    than the kernel). Applied separably, at the resolution of the input, which is linear along either axis.
    """
    if sigma == 0:
        return images
    shortest, kind = min(images.shape[-2:]), (images.dtype, images.device)
    down, across = (_blurring(side, sigma, shortest, *kind) for side in images.shape[-2:])
    return down @ (images @ across.T)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _blurring(side: int, sigma: float, shortest: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The blur of one axis as a matrix (side, side): on a CPU several times faster than a convolution of single channels."""
    from scipy.ndimage import gaussian_filter1d

    radius = int(np.ceil(4 * sigma))
    mode = "mirror" if radius < shortest else "nearest"
    matrix = gaussian_filter1d(np.eye(side), sigma, axis=0, mode=mode, radius=radius)
    return torch.from_numpy(matrix).to(device, dtype)


def codec(names: Iterable[str]) -> str:
    """PNG, JPEG, ..., or mixed with their names, by the endings of file names."""
    known, endings = Image.registered_extensions(), {Path(name).suffix for name in names}
    codecs = sorted({known.get(ending.lower(), ending) for ending in endings})
    return codecs[0] if len(codecs) == 1 else "mixed: " + ", ".join(codecs)


def png(image: torch.Tensor, scale: int = 1) -> bytes:
    """A PNG file of one image (3, H, W) in [-1, 1], each pixel a square of `scale`."""
    stream = io.BytesIO()
    _enlarged(image[None], scale)[0].save(stream, "PNG")
    return stream.getvalue()


def gif(images: torch.Tensor, scale: int = 1, milliseconds: int = 120, rest: int = 600) -> bytes:
    """A GIF file that goes through frames (B, 3, H, W) in [-1, 1], there and back for ever; it rests at either end."""
    frames = [frame.quantize(dither=Image.Dither.NONE) for frame in _enlarged(images, scale)]
    durations = [rest] + [milliseconds] * (len(frames) - 2) + [rest]
    back, stream = slice(-2, 0, -1), io.BytesIO()
    every = {"append_images": frames[1:] + frames[back], "duration": durations + durations[back]}
    frames[0].save(stream, "GIF", save_all=True, loop=0, **every)
    return stream.getvalue()


def _enlarged(images: torch.Tensor, scale: int) -> list[Image.Image]:
    return [Image.fromarray(array.repeat(scale, 0).repeat(scale, 1)) for array in to_arrays(images)]


def grid(images: torch.Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> one uint8 image, row by row on white, `gap` pixels apart."""
    lacking = -len(images) % columns
    arrays = np.pad(to_arrays(images), ((0, lacking), (0, gap), (0, gap), (0, 0)), constant_values=255)
    rows = [np.hstack(arrays[i : i + columns]) for i in range(0, len(arrays), columns)]
    return np.vstack(rows)[:-gap, :-gap]
