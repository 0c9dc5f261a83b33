import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from clipgen_lib.data.images import blur, crop, from_arrays, gif, grid, load_image, png, to_arrays, to_float, to_uint8
from clipgen_lib.runtime.runs import ClipgenError


def ramp_picture(width=40, height=30):
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 6, y * 8, 255 - x * 6], -1).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    ramp_picture().convert(mode).save(path)
    image = load_image(path, 30)
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8
    wanted = np.asarray(ramp_picture().convert(mode).convert("RGB"), float).mean((0, 1))
    assert np.allclose(image.float().mean((1, 2)), wanted, atol=6)


def test_sixteen_bit_keeps_its_range(tmp_path):
    values = np.linspace(0, 65535, 900).reshape(30, 30).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    image = load_image(tmp_path / "x.png", 30)
    assert image.min() == 0 and image.max() == 255 and abs(float(image.float().mean()) - 127) < 2


def test_alpha_lies_over_white(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "x.png")
    assert (load_image(tmp_path / "x.png", 20) == 255).all()


def test_exif_rotation_is_applied(tmp_path):
    picture, exif = ramp_picture(), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture.save(tmp_path / "x.jpg", exif=exif, quality=95)
    turned = load_image(tmp_path / "x.jpg", 30)
    assert turned.shape == (3, 40, 30)
    assert torch.allclose(
        turned.float(), torch.tensor(np.asarray(picture.rotate(-90, expand=True))).permute(2, 0, 1).float(), atol=25
    )


def test_one_pixel_is_enough(tmp_path):
    Image.new("RGB", (1, 3), (10, 20, 30)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png", 16).shape == (3, 48, 16)


def test_bad_files_are_one_sentence(tmp_path):
    whole = tmp_path / "whole.jpg"
    ramp_picture(200, 200).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("cut.jpg", "text.jpg", "empty.jpg", "missing.jpg"):
        with pytest.raises(ClipgenError, match=name) as error:
            load_image(tmp_path / name, 32)
        assert "\n" not in str(error.value)


def test_huge_headers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("clipgen_lib.data.images.MAX_PIXELS", 100)
    ramp_picture().save(tmp_path / "x.png")
    with pytest.raises(ClipgenError, match="megapixels"):
        load_image(tmp_path / "x.png", 32)


def test_uint8_and_float_are_inverse():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_float(every).min() == -1 and to_float(every).max() == 1
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


def test_pixels_become_the_nearest_floats():
    """Division, not a product with a rounded reciprocal, whatever the device."""
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(levels), torch.from_numpy(np.arange(256, dtype=np.float32) / np.float32(127.5) - 1))
