"""Reading pictures, and what the vision tower gets."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megatron_vila.data import images
from megatron_vila.data.images import PAD_COLOR, load_image, preprocess
from megatron_vila.data.video import MediaError
from megatron_vila.models.vision.tower import scale_pixels


def noise(width, height, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def saved(tmp_path, image, name="picture.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixel(image, x=0, y=0):
    return image.getpixel((x, y))


@pytest.mark.parametrize("shape", [(100, 60), (60, 100), (56, 56), (7, 400)])
@pytest.mark.parametrize("size", [56, 384])
def test_resize_equals_the_siglip_processor_of_transformers(shape, size):
    images = [Image.fromarray(noise(*shape, seed=s)) for s in range(3)]
    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    expected = processor(images, return_tensors="pt")["pixel_values"]
    found = preprocess(images, size, "resize")
    assert found.shape == (3, 3, size, size) and found.dtype == torch.uint8 and found.is_contiguous()
    torch.testing.assert_close(scale_pixels(found), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(100, 60), (60, 101), (56, 56)])
def test_pad_centers_the_picture_on_a_square_of_the_mean_color(shape):
    image = Image.fromarray(noise(*shape))
    side = max(shape)
    square = np.full((side, side, 3), PAD_COLOR[0], np.uint8)
    top, left = (side - shape[1]) // 2, (side - shape[0]) // 2
    square[top : top + shape[1], left : left + shape[0]] = np.asarray(image)
    expected = SiglipImageProcessorPil(size={"height": 56, "width": 56})([Image.fromarray(square)], return_tensors="pt")
    found = scale_pixels(preprocess([image], 56, "pad"))
    torch.testing.assert_close(found, expected["pixel_values"], rtol=0, atol=1e-6)


def test_pictures_of_different_sizes_become_one_tensor_and_none_an_empty_one():
    pixels = preprocess([Image.fromarray(noise(30, 50)), Image.fromarray(noise(80, 20, 1))], 28)
    assert pixels.shape == (2, 3, 28, 28)
    assert preprocess([], 28).shape == (0, 3, 28, 28)


def test_a_picture_goes_through_as_its_bytes_and_colors_stay_in_their_planes():
    values = noise(4, 4)
    assert np.array_equal(preprocess([Image.fromarray(values)], 4)[0], values.transpose(2, 0, 1))


def test_an_unknown_aspect_is_refused():
    with pytest.raises(ValueError, match="resize or pad"):
        preprocess([Image.new("RGB", (9, 9))], 4, "dynamic")


def test_a_picture_survives_reading(tmp_path):
    pixels = noise(20, 10)
    image = load_image(saved(tmp_path, Image.fromarray(pixels)))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels)


def test_the_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 10, 10))  # blue on the left as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    shown = load_image(saved(tmp_path, image, "photo.png", exif=exif))
    assert shown.size == (10, 20)
    assert pixel(shown, 5, 2) == (0, 0, 255) and pixel(shown, 5, 18) == (255, 0, 0)


def test_transparent_pixels_are_laid_on_white(tmp_path):
    hidden = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert pixel(load_image(saved(tmp_path, hidden))) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert abs(pixel(load_image(saved(tmp_path, half)))[0] - 127) <= 1
    gray = Image.new("LA", (4, 4), (10, 0))
    assert pixel(load_image(saved(tmp_path, gray))) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    assert pixel(load_image(saved(tmp_path, palette, transparency=0))) == (255, 255, 255)


@pytest.mark.parametrize(
    ("bits", "kind", "row", "hidden", "shown"),
    [
        (1, 0, b"\x80", b"\0\1", [255, 0]), (2, 0, b"\x1b", b"\0\1", [0, 255, 170]), (4, 0, b"\x01", b"\0\1", [0, 255]),
        (8, 0, b"\0\1", b"\0\1", [0, 255]), (16, 0, b"\0\0\0\1", b"\0\1", [0, 255]),
        (8, 2, bytes(3) + b"\1\1\1", b"\0\1" * 3, [0, 255]), (16, 2, bytes(6) + b"\1\0" * 3, b"\1\0" * 3, [0, 255]),
    ],
)  # fmt: skip
def test_the_transparent_color_of_a_png_is_laid_on_white_at_every_depth(tmp_path, bits, kind, row, hidden, shown):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", len(shown), 1, bits, kind, 0, 0, 0))
    path = tmp_path / "hidden.png"
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", hidden) + pixels + chunk(b"IEND", b""))
    assert grays(path) == shown


def test_gray_palette_and_sixteen_bit_pictures_become_rgb(tmp_path):
    assert pixel(load_image(saved(tmp_path, Image.new("L", (4, 4), 77)))) == (77, 77, 77)
    deep = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert pixel(load_image(saved(tmp_path, deep))) == (128, 128, 128)
    assert pixel(load_image(saved(tmp_path, Image.new("RGB", (4, 4), (1, 2, 3)).quantize()))) == (1, 2, 3)


def gray_tiff(path, values, bits, kind=1, meaning=1):
    """A TIFF file of one row of gray ``values``; ``kind``: 1 unsigned, 2 signed, 3 float; ``meaning`` 0: zero is white."""
    content = values if isinstance(values, bytes) else values.tobytes()
    width = len(content) * 8 // bits
    entries = {256: width, 257: 1, 258: bits, 259: 1, 262: meaning, 273: 0, 277: 1, 278: 1, 279: len(content), 339: kind}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + content)
    return path


def grays(path):
    return np.asarray(load_image(path))[0, :, 0].tolist()


def test_gray_of_more_than_eight_bits_keeps_black_white_and_what_lies_between(tmp_path):
    deep = np.array([0, 257, 65535 // 2, 65535], np.uint16)
    path = tmp_path / "gray"
    assert grays(gray_tiff(path, deep, 16)) == [0, 1, 127, 255]
    assert grays(gray_tiff(path, deep, 16, meaning=0)) == [255, 254, 128, 0], "zero is white"
    assert grays(gray_tiff(path, bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00]), 12)) == [0, 128, 255, 0]
    path.write_bytes(b"P5 4 1 65535\n" + deep.astype(">u2").tobytes())
    assert grays(path) == [0, 1, 127, 255]
    path.write_bytes(b"P5 2 1 1023\n" + np.array([0, 1023], ">u2").tobytes())
    assert grays(path) == [0, 255]
    assert grays(saved(tmp_path, Image.fromarray(deep[None]))) == [0, 1, 127, 255]
    assert grays(saved(tmp_path, Image.fromarray(deep[None]), transparency=257)) == [0, 255, 127, 255], "a hidden gray"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("float", "floats"), ("PFM", "floats"), ("32 bits", "whole numbers of 32 bits"),
        ("signed 32 bits", "signed numbers"), ("signed 16 bits", "signed numbers"), ("signed 8 bits", "signed numbers"),
    ],
)  # fmt: skip
def test_values_without_a_known_black_and_white_are_refused_and_not_turned_black(tmp_path, kind, said):
    path, values = tmp_path / "gray", np.linspace(0, 1, 8, dtype=np.float32)
    whole = np.arange(8, dtype=np.int32) * 9
    if kind == "float":
        gray_tiff(path, values, 32, kind=3)
    elif kind == "PFM":
        path.write_bytes(b"Pf\n8 1\n-1.0\n" + values.tobytes())
    elif kind == "32 bits":
        gray_tiff(path, whole, 32)
    else:
        bits = int(kind.split()[1])
        gray_tiff(path, whole.astype(f"int{bits}"), bits, kind=2)
    with pytest.raises(MediaError, match=f"its values are {said}, .*; save it with 8 or 16 unsigned bits a channel"):
        load_image(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_a_picture_of_every_mode_that_a_tiff_file_may_have_shows_what_was_saved(tmp_path, mode):
    black_and_white = Image.fromarray(np.array([[0, 255]], np.uint8))
    if mode == "I;16":
        black_and_white = Image.fromarray(np.array([[0, 65535]], np.uint16))
    path = saved(tmp_path, black_and_white.convert(mode), "picture.tif")
    assert Image.open(path).mode == mode
    assert grays(path) == [0, 255]


def test_the_first_picture_of_an_animation_is_read(tmp_path):
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    path = saved(tmp_path, first, "moving.gif", save_all=True, append_images=[second])
    assert pixel(load_image(path)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["missing", "empty", "not an image", "cut off", "a folder"])
def test_a_broken_image_is_a_media_error_that_names_the_file(tmp_path, name):
    path = tmp_path / "picture.png"
    if name == "empty":
        path.write_bytes(b"")
    elif name == "not an image":
        path.write_bytes(b"some text" * 40)
    elif name == "cut off":
        saved(tmp_path, Image.fromarray(noise(64, 64)))
        path.write_bytes(path.read_bytes()[:2000])
    elif name == "a folder":
        path.mkdir()
    reasons = {"missing": "no such file", "empty": "the file is empty", "a folder": "not a regular file but a folder"}
    reasons["not an image"] = "not an image that can be read: none of JPEG, PNG, .*, or its header is damaged"
    reason = reasons.get(name, "not an image that can be read")
    with pytest.raises(MediaError, match=reason) as caught:
        load_image(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("shape", [(100, 60), (60, 101), (7, 400), (400, 7), (1, 300)])
def test_scaling_a_padded_picture_in_bands_gives_equal_pixels(shape, monkeypatch):
    image = Image.fromarray(noise(*shape))
    whole = preprocess([image], 56, "pad")
    monkeypatch.setattr(images, "BAND_PIXELS", 3 * max(shape))
    assert torch.equal(preprocess([image], 56, "pad"), whole)
