"""Files as an attacker or a bad disk leaves them: only the file named is opened, nothing is waited for, memory has a bound."""

import contextlib
import ctypes
import os
import socket
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from megatron_vila.data import media
from megatron_vila.data.images import load_image, preprocess
from megatron_vila.data.video import MediaError, decode_video_frames, probe_video
from tests.data.material import write_video

LIBC = ctypes.CDLL(None, use_errno=True)
IN_OPEN = 0x20


class Opened:
    """Whether a file was opened by anybody while the block ran."""

    def __init__(self, path):
        self._watch = LIBC.inotify_init1(os.O_NONBLOCK)
        assert LIBC.inotify_add_watch(self._watch, os.fsencode(path), IN_OPEN) >= 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        try:
            self.seen = bool(os.read(self._watch, 4096))
        except BlockingIOError:
            self.seen = False
        os.close(self._watch)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("secret") / "film.mp4", 8)


def mov_with_external_data(film: Path) -> bytes:
    """The film's header, whose sample data are said to be in the file itself, by an alias with its absolute path."""
    data = bytearray(film.read_bytes())
    entry = struct.pack(">I4sI", 12, b"url ", 1)
    start = data.find(entry)
    path = os.fsencode(film)
    alias = bytes(150) + struct.pack(">HH", 2, len(path)) + path + b"\xff\xff\x00\x00"
    alias = alias[:6] + struct.pack(">HH", len(alias), 2) + alias[10:]
    new = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    data[start : start + 12] = new
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = data.find(name) - 4
        size = int.from_bytes(data[place : place + 4], "big")
        data[place : place + 4] = (size + len(new) - 12).to_bytes(4, "big")
    return bytes(data)


HOSTILE = {
    "concat": ("list.ffconcat", "ffconcat version 1.0\nfile 'film.mp4'\n"),
    "HLS": ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfilm.mp4\n#EXT-X-ENDLIST\n"),
    "DASH": (
        "list.mpd",
        '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT9S">'
        '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>film.mp4</BaseURL>'
        "<SegmentBase/></Representation></AdaptationSet></Period></MPD>",
    ),
    "Smooth Streaming, ISM": ("list.ism", '<?xml version="1.0"?><smil><body><video src="film.mp4"/></body></smil>'),
    "SDP": ("x.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 26\n"),
    "playlist": ("x.pls", "[playlist]\nFile1=film.mp4\nNumberOfEntries=1\nVersion=2\n"),
    "subtitles": ("x.srt", "1\n00:00:00,000 --> 00:00:09,000\n<img src=film.mp4>\n"),
    "MPEG-4 object descriptor": ("x.vpk", "RL2\nfilm.mp4\n"),
    "image list": ("x.txt", "film.mp4\n"),
    "lavfi graph": ("x.lavfi", "movie=film.mp4"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_names_another_one_does_not_open_it(film, name):
    suffix, text = HOSTILE[name]
    path = film.parent / suffix
    path.write_text(text)
    with Opened(film) as other:
        for use in (probe_video, load_image):
            with pytest.raises(MediaError, match=r"not a video|not an image"):
                use(path)
    assert not other.seen


def test_plain_ffmpeg_would_open_what_a_list_names(film):
    path = film.parent / "control.ffconcat"
    path.write_text(HOSTILE["concat"][1])
    with Opened(film) as other:
        av.open(str(path)).close()
    assert other.seen


def test_a_mov_whose_data_lie_in_another_file_reads_its_own_only(film, tmp_path):
    path = tmp_path / "external.mov"
    path.write_bytes(mov_with_external_data(film))
    with Opened(film) as other, contextlib.suppress(MediaError):
        decode_video_frames(path, [0])
    assert not other.seen


@pytest.mark.parametrize(
    "name", ["frame%d.png", "concat:{film}|{film}", "subfile,,start,0,end,0,,:{film}", "file:{film}"]
)
def test_a_path_is_a_path_and_neither_a_pattern_nor_an_address(film, tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "frame1.png")
    with Opened(film) as other, pytest.raises(MediaError, match="no such file"):
        probe_video(name.format(film=film) if "{" in name else tmp_path / name)
    assert not other.seen


def test_postscript_under_another_name_starts_no_interpreter(tmp_path, monkeypatch):
    interpreter, started = tmp_path / "gs", tmp_path / "started"
    interpreter.write_text(f"#!/bin/sh\ntouch {started}\n")
    interpreter.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "picture.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    assert Image.open(path).format == "EPS"  # Pillow by itself would run Ghostscript on it
    with pytest.raises(MediaError, match="not an image that can be read"):
        load_image(path)
    assert not started.exists()


def pipe(path):
    os.mkfifo(path)


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("use", [probe_video, load_image])
@pytest.mark.parametrize("name", ["zero\0byte.mp4", "half \ud83d.mp4", "x" * 5000, "not/there.mp4", ""])
def test_a_name_that_no_file_can_have_is_a_media_error_that_can_be_written(use, name):
    with pytest.raises(MediaError) as caught:
        use(name)
    assert str(caught.value).encode() and caught.value.path == name


@pytest.mark.parametrize("use", [probe_video, load_image])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (pipe, "not a regular file but a pipe"),
        (a_socket, "cannot be opened"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file but a device"),
        (lambda path: path.mkdir(), "not a regular file but a folder"),
        (lambda path: path.symlink_to("/proc/self/status"), "empty"),
    ],
)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, monkeypatch, use, make, reason):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    make(Path("x.mp4"))
    with pytest.raises(MediaError, match=reason):
        use("x.mp4")


def test_a_file_that_takes_too_long_to_read_is_refused(film, monkeypatch):
    monkeypatch.setattr(media, "TIME_LIMIT_S", 1e-9)
    with pytest.raises(MediaError, match="not a video that can be read: it took longer than 0 s"):
        probe_video(film)


def test_a_link_to_a_file_is_followed(film, tmp_path):
    (tmp_path / "link.mp4").symlink_to(film)
    assert probe_video(tmp_path / "link.mp4").num_frames == 8


def peak_growth_mib(function) -> float:
    """MiB by which the memory of this process grew at most while ``function`` ran."""

    def status(name):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


@pytest.mark.parametrize("size", [(25000, 2), (2, 25000)])
def test_padding_a_long_thin_picture_does_not_build_its_square(tmp_path, size):
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "thin.png")
    picture = load_image(tmp_path / "thin.png")
    assert peak_growth_mib(lambda: preprocess([picture], 28, "pad")) < 150  # the square alone would take 2.4 GiB


def png_header(width, height) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(1000))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def webp_animation(width, height) -> bytes:
    small = (b"VP8L", b"\x2f\x00\x00\x00\x00\x88\x88\x08")
    canvas = bytes([2, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = bytes(12) + bytes(4) + small[0] + struct.pack("<I", len(small[1])) + small[1]
    chunks = [(b"VP8X", canvas), (b"ANIM", bytes(6)), (b"ANMF", frame)]
    body = b"WEBP" + b"".join(name + struct.pack("<I", len(data)) + data for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = {
    "png": png_header(9000, 9000),
    "png with a long side": png_header(100_000, 2),
    "gif": b"GIF89a"
    + struct.pack("<HHBBB", 9000, 9000, 0, 0, 0)
    + b","
    + struct.pack("<HHHHB", 0, 0, 9000, 9000, 0)
    + b"\x02\x01\x00\x00;",
    "gif whose picture is larger than its screen": b"GIF89a"
    + struct.pack("<HHBBB", 9, 9, 0, 0, 0)
    + b","
    + struct.pack("<HHHHB", 0, 0, 9000, 9000, 0)
    + b"\x02\x01\x00\x00;",
    "bmp": b"BM"
    + struct.pack("<IHHI", 100, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 9000, 9000, 1, 24, 0, 0, 0, 0, 0, 0),
    "ppm": b"P6 9000 9000 255\n" + bytes(100),
    "webp": webp_animation(9000, 9000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_over_the_budget_is_refused_by_its_header(tmp_path, name):
    path = tmp_path / "bomb"
    path.write_bytes(BOMBS[name])

    def read():
        with pytest.raises(MediaError, match=r"\d+ x \d+ pixels are more than a picture may have"):
            load_image(path)

    assert peak_growth_mib(read) < 20


def test_a_jpeg_of_many_scans_is_refused_and_a_usual_one_is_not(tmp_path):
    usual, slow = tmp_path / "usual.jpg", tmp_path / "slow.jpg"
    Image.new("RGB", (4096, 4096), (9, 9, 9)).save(usual, progressive=True)
    data = usual.read_bytes()
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    slow.write_bytes(data[:-2] + 200 * last_scan + data[-2:])
    assert load_image(usual).getpixel((0, 0)) == (9, 9, 9)
    with pytest.raises(MediaError, match="scans of 16,777,216 pixels are more than a JPEG may have"):
        load_image(slow)


@pytest.mark.parametrize("name", ["a.webp", "a.avif", "a.jpg"])
def test_a_picture_file_of_many_gigabytes_is_not_read(tmp_path, name):
    path = tmp_path / name
    Image.new("RGB", (8, 8)).save(path)
    os.truncate(path, 2**40)  # a hole that takes no room on the disk
    with pytest.raises(MediaError, match="bytes are more than a picture file may have"):
        load_image(path)


def test_compressed_text_in_a_png_is_not_unpacked_without_bound(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "a" * 30_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=text)
    del text

    def read():
        with pytest.raises(MediaError):
            load_image(tmp_path / "bomb.png")

    assert peak_growth_mib(read) < 20


def test_a_video_over_the_budget_is_refused_when_it_is_opened(film, monkeypatch):
    monkeypatch.setattr(media, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(MediaError, match="64 x 64 pixels are more than a picture may have"):
        probe_video(film)


def test_an_index_that_claims_more_frames_than_memory_holds_is_not_built(film, tmp_path):
    data, claimed = bytearray(film.read_bytes()), (60_000_000).to_bytes(4, "big")
    for box, place, value in (
        (b"stsz", 8, (1).to_bytes(4, "big") + claimed),  # samples of one byte each
        (b"stsc", 16, claimed),  # all in the first chunk
        (b"stts", 12, claimed),
    ):
        start = data.find(box)
        data[start + place : start + place + len(value)] = value
    path = tmp_path / "claims.mp4"
    path.write_bytes(data)

    def read():
        with pytest.raises(MediaError):
            probe_video(path)

    assert peak_growth_mib(read) < 200  # FFmpeg by itself takes 4 GiB


def test_any_exception_of_a_library_names_the_file_and_an_interrupt_passes():
    for error in (
        MemoryError(),
        RecursionError("deep"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        KeyError("x"),
    ):
        with pytest.raises(MediaError, match="a.mp4: reading failed: ."), media.errors_of("a.mp4", "reading failed"):
            raise error
    with pytest.raises(KeyboardInterrupt), media.errors_of("a.mp4", "reading failed"):
        raise KeyboardInterrupt


def test_tags_that_are_not_utf8_do_not_matter(tmp_path):
    path = tmp_path / "latin1.mp4"
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "Caf# au lait"
        stream = out.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode())
    data = path.read_bytes()
    assert b"Caf# au lait" in data
    path.write_bytes(data.replace(b"Caf# au lait", b"Caf\xe9 au lait"))
    assert len(decode_video_frames(path, [0, 2])) == 2


def encoded(path, container, codec):
    """A short video in the ``container`` (FFmpeg's name)."""
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for gray in range(50):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 4 * gray, np.uint8), format="rgb24")
            out.mux(stream.encode(frame.reformat(format="yuv420p")))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("container", "codec"),
    [("h264", "libx264"), ("yuv4mpegpipe", "rawvideo"), ("nut", "mpeg4"), ("mxf", "mpeg2video"), ("ivf", "libvpx")],
)
def test_a_video_in_a_container_that_is_not_read_is_told_what_makes_it_one(tmp_path, container, codec):
    path = encoded(tmp_path / "film.mp4", container, codec)
    with pytest.raises(MediaError) as caught:
        probe_video(path)
    assert caught.value.reason.startswith("not a video that can be read: its format is none of mp4, mov, ")
    assert "`ffmpeg -i film.mp4 -c copy out.mp4`" in caught.value.reason


def test_a_hole_in_a_transport_stream_is_told_as_a_hole(tmp_path):
    path = encoded(tmp_path / "film.ts", "mpegts", "mpeg2video")
    packets = path.read_bytes()
    middle = len(packets) // 376 * 188
    path.write_bytes(packets[:middle] + bytes(2**18) + packets[middle:])
    with pytest.raises(MediaError, match="a stretch of it holds no packet .a hole, or overwritten bytes."):
        probe_video(path)
