"""Pictures and videos are used upright, whatever says how they lie; what cannot be read of that does not matter."""

import itertools
import struct

import av
import numpy as np
import pytest
from PIL import Image

from megatron_vila.data.images import load_image
from megatron_vila.data.video import decode_video_frames


@pytest.mark.parametrize(
    "field",
    [
        struct.pack("<HHI", 0x0103, 11, 1) + struct.pack("<f", float("nan")),
        struct.pack("<HHI", 0x0103, 3, 0xFFFFFFF0) + b"\xff\xff\xff\xff",
        struct.pack("<HHI", 0x8769, 4, 1) + struct.pack("<I", 8),
        struct.pack("<HHI", 0x010E, 2, 4) + b"\xff\xfe\xfd\xfc",
    ],
)
def test_a_picture_with_an_odd_exif_field_is_used_and_upright(tmp_path, field):
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + field + bytes(4)
    Image.new("RGB", (20, 10)).save(tmp_path / "odd.jpg", exif=exif)
    assert load_image(tmp_path / "odd.jpg").size == (10, 20)


def test_a_picture_with_unreadable_exif_data_is_used_as_stored(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "odd.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert load_image(tmp_path / "odd.jpg").size == (20, 10)


MATRICES = [
    (a, b, c, d)
    for straight, turned in itertools.product((1, -1), repeat=2)
    for a, b, c, d in ((straight, 0, 0, turned), (0, straight, turned, 0))
]


def shown_by_hand(pixels: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """Each pixel (x, y) of ``pixels`` put at (a x + c y, b x + d y), as the specification of the display matrix says."""
    height, width = pixels.shape
    places = {(a * x + c * y, b * x + d * y): pixels[y, x] for y in range(height) for x in range(width)}
    left, top = (min(place[axis] for place in places) for axis in (0, 1))
    shown = np.zeros((height, width) if a else (width, height), pixels.dtype)
    for (x, y), value in places.items():
        shown[y - top, x - left] = value
    return shown


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_video_is_shown_in_each_of_the_eight_orientations(tmp_path, matrix):
    assert len(set(MATRICES)) == 8
    a, b, c, d = matrix
    gray = np.zeros((32, 64), np.uint8)
    gray[:16, :32], gray[16:, :32], gray[16:, 32:] = 250, 160, 80
    with av.open(str(tmp_path / "turned.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=8, options={"crf": "1", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_matrix([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30])
        for _ in range(2):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.repeat(gray[..., None], 3, 2), format="rgb24")))
        out.mux(stream.encode())
    found = np.asarray(decode_video_frames(tmp_path / "turned.mp4", [1])[0].convert("L")).astype(int)
    expected = shown_by_hand(gray, a, b, c, d)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 12

