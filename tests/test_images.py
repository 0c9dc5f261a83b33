import io
import resource
import struct
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import saved
from PIL import Image
from scipy.ndimage import gaussian_filter

from clipgen_lib.data.images import (
    EXTENSIONS,
    blur,
    crop,
    eight_bit,
    from_arrays,
    gif,
    grid,
    jpeg,
    load_image,
    png,
    to_arrays,
    to_float,
    to_uint8,
)
from clipgen_lib.runtime.runs import ClipgenError


def ramp(width=40, height=30):
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 6, y * 8, 255 - x * 6], -1).astype(np.uint8))


FORMATS = [(mode, "png") for mode in ("RGB", "L", "P", "RGBA", "LA", "1")] + [
    ("CMYK", "jpg"),
    ("L", "pgm"),
    ("1", "pbm"),
]
FORMATS += [("RGB", ending) for ending in ("jfif", "jpe", "dib", "mpo", "pnm", "tga", "webp", "tif", "jp2", "avif")]


@pytest.mark.parametrize("mode, ending", FORMATS)
def test_every_mode_and_format_becomes_rgb(tmp_path, mode, ending):
    if ending in ("jp2", "avif") and f".{ending}" not in EXTENSIONS:
        pytest.skip("Pillow here is built without it")
    path, image = tmp_path / f"x.{ending}", ramp().convert(mode)
    image.save(path, "JPEG" if ending == "mpo" else None)
    found = load_image(path, 30)
    assert found.shape == (3, 30, 40) and found.dtype == torch.uint8
    error = found.permute(1, 2, 0).numpy() - np.asarray(image.convert("RGB"), float)
    assert np.abs(error).mean() < 12 and np.abs(error.mean((0, 1))).max() < 6


@pytest.mark.parametrize(
    "kind, ending, top, wanted",
    [
        (np.uint16, "png", 65_535, 255),
        (np.float32, "tif", 1, 255),
        (np.float32, "tif", 255, 255),
        (np.float32, "tif", 60_000, 233),
    ],
)
def test_sixteen_bits_and_floats_keep_their_range(tmp_path, kind, ending, top, wanted):
    path = tmp_path / f"x.{ending}"
    Image.fromarray(np.linspace(0, top, 900).reshape(30, 30).astype(kind)).save(path)
    image = load_image(path, 30)
    assert image.min() == 0 and abs(int(image.max()) - wanted) <= (kind != np.uint16)
    assert abs(float(image.float().mean()) - wanted / 2) < 2


def test_alpha_lies_over_white(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "x.png")
    assert (load_image(tmp_path / "x.png", 20) == 255).all()


def test_exif_rotation_is_applied(tmp_path):
    image, exif = ramp(), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    turned = load_image(tmp_path / "x.jpg", 30)
    assert turned.shape == (3, 40, 30)
    assert np.allclose(turned.permute(1, 2, 0), np.asarray(image.rotate(-90, expand=True), float), atol=25)


def test_one_pixel_is_enough(tmp_path):
    Image.new("RGB", (1, 3), (10, 20, 30)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png", 16).shape == (3, 48, 16)


@pytest.mark.parametrize("content", [saved(ramp(200, 200), "JPEG")[:900], b"no image", b""])
def test_bad_files_are_one_sentence(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ClipgenError, match="x.jpg") as error:
        load_image(tmp_path / "x.jpg", 32)
    assert "\n" not in str(error.value)


def test_uint8_and_float_are_inverse():
    """Division, not a product with a rounded reciprocal, whatever the device."""
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(every), torch.from_numpy(np.arange(256, dtype=np.float32) / np.float32(127.5) - 1))
    assert torch.equal(to_uint8(to_float(every)), every)
    arrays = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    assert np.array_equal(to_arrays(from_arrays(arrays)), arrays)


def test_blur_is_the_gaussian_of_scipy():
    images = torch.rand(2, 3, 40, 48) * 2 - 1
    for sigma in (1, 2, 4):
        wanted = gaussian_filter(images.numpy(), (0, 0, sigma, sigma), truncate=4, mode="mirror")
        assert np.allclose(blur(images, sigma).numpy(), wanted, atol=1e-5)
    assert blur(images, 0) is images
    assert blur(images, 16).shape == images.shape  # a kernel larger than the image


def test_crop_and_grid():
    image = torch.arange(3 * 6 * 10).view(3, 6, 10).to(torch.uint8)
    assert torch.equal(crop(image, 6), image[:, :, 2:8])
    assert torch.equal(crop(image, 6, (0.0, 1.0)), image[:, :, 4:])
    assert grid(torch.zeros(5, 3, 8, 8), columns=3, gap=2).shape == (18, 28, 3)


def test_png_enlarges_every_pixel():
    image = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    array = np.asarray(Image.open(io.BytesIO(png(image, 3))))
    assert array.shape == (12, 18, 3)
    for y, x in ((0, 0), (2, 1)):
        assert np.array_equal(array[y::3, x::3], to_arrays(image[None])[0])


def test_gif_goes_there_and_back_for_ever():
    levels = [-1.0, -0.5, 0.5, 1.0]
    frames = torch.tensor(levels).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    film = Image.open(io.BytesIO(gif(frames, scale=2, milliseconds=100, rest=500)))
    assert film.info["loop"] == 0 and film.size == (16, 16) and film.n_frames == 6
    found, durations = [], []
    for i in range(film.n_frames):
        film.seek(i)
        found.append(int(np.asarray(film.convert("RGB"))[0, 0, 0]))
        durations.append(film.info["duration"])
    assert found == [0, 64, 191, 255, 191, 64] and durations == [500, 100, 100, 500, 100, 100]


def test_blur_leaves_what_it_keeps_usable_with_gradients():
    x = torch.rand(2, 3, 9, 12, dtype=torch.float64)
    with torch.inference_mode():
        wanted = blur(x, 1.5)
    x = x.requires_grad_()
    found = blur(x, 1.5)
    found.sum().backward()
    assert torch.equal(found.detach(), wanted) and x.grad.sum().item() == pytest.approx(x.numel())


def test_eight_bit_and_jpeg_are_what_comes_back_from_files(tmp_path):
    images = from_arrays(np.asarray(ramp())[None]) + 1e-3
    assert torch.equal(eight_bit(images), to_float(to_uint8(images)))
    with pytest.raises(ClipgenError, match="NaN"):
        eight_bit(images * float("nan"))
    ramp().save(tmp_path / "x.jpg", quality=60)
    assert torch.equal(jpeg(images, 60), from_arrays(np.asarray(Image.open(tmp_path / "x.jpg"))[None]))


# ---------------------------------------------------------------------------------------------- bombs


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, *chunks: bytes, rows: int = 1) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(rows * (width + 1))))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def bombs() -> dict[str, tuple[bytes, str]]:
    """Name -> (small file that asks for much, what the error says; nothing where it may be read nevertheless)."""
    much = zlib.compress(bytes(300_000_000), 1)
    first, *others = [Image.new("L", (64, 64), i % 251) for i in range(1_000)]
    frames, pages = (saved(first, kind, save_all=True, append_images=others) for kind in ("GIF", "TIFF"))
    large, bmp = bytearray(saved(first, "GIF")), bytearray(saved(ramp(), "BMP"))
    large[large.index(b",") + 5 : large.index(b",") + 9] = b"\xff" * 4  # a frame of 65,535 pixels a side
    bmp[18:26] = struct.pack("<ii", 2**30, -(2**30))
    progressive = saved(Image.new("RGB", (3_000, 3_000)), "JPEG", progressive=True)
    return {
        "huge header": (png_of(50_000, 50_000), "megapixels"),
        "a line": (png_of(60_000, 1), "as long as wide"),
        "a line on end": (png_of(1, 60_000, rows=60_000), "as long as wide"),
        "text": (png_of(9, 9, chunk(b"zTXt", b"a\0\0" + much), rows=9), " is "),
        "profile": (png_of(9, 9, chunk(b"iCCP", b"a\0\0" + much), rows=9), " is "),
        "frames": (frames, ""),
        "pages": (pages, ""),
        "large frame": (bytes(large), "pixels"),
        "bmp": (bytes(bmp), "megapixels"),
        "ppm": (b"P6 50000 50000 255\n" + bytes(99), "megapixels"),
        "16 bits": (saved(Image.fromarray(np.zeros((5_000, 5_000), np.uint16)), "PNG"), ""),
        "alpha": (saved(Image.new("RGBA", (5_000, 5_000)), "PNG"), ""),
        "scans": (progressive[:-2] + 1_000 * progressive[progressive.rindex(b"\xff\xda") : -2], "scans"),
    }


def read_with_little_memory(paths):
    """The shape of each image, or why it is refused, with 400 MB beyond what this process has taken."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 400_000_000,) * 2)
    found = []
    for path in paths:
        try:
            found.append(tuple(load_image(path, 64).shape))
        except ClipgenError as error:
            found.append(str(error))
    return found


def test_bombs_take_no_memory(tmp_path):
    """Refused, or read without the rest of the file."""
    known = {tmp_path / name: bomb for name, bomb in bombs().items()}
    for path, (content, _) in known.items():
        assert path.write_bytes(content) < 5_000_000
    with ProcessPoolExecutor(1, get_context("fork")) as process:  # the memory of this one stays without a limit
        answers = process.submit(read_with_little_memory, list(known)).result()
    for (path, (_, says)), found in zip(known.items(), answers, strict=True):
        assert (str(path) in found and says in found) if says else found == (3, 64, 64), (path, found)
        assert "memory" not in str(found).replace(str(path), "").lower(), (path, found)
