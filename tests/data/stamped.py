"""Real videos whose pictures carry their own number as black and white blocks."""

from fractions import Fraction

import av
import numpy as np

from megatron_vila.data.video import decode_video_frames

SIDE = 64


def stamped(number: int, side: int = SIDE) -> np.ndarray:
    """A gray picture with the 16 bits of ``number`` as blocks: uint8 [side, side, 3]."""
    bits = np.array([number >> b & 1 for b in range(16)], dtype=np.uint8).reshape(4, 4)
    return np.repeat(np.kron(bits * 255, np.ones((side // 4, side // 4), np.uint8))[..., None], 3, axis=2)


def number_of(picture) -> int:
    """The number that a picture is stamped with."""
    block = picture.width // 4
    middle = np.asarray(picture.convert("L"))[block // 2 :: block, block // 2 :: block]
    return sum(1 << b for b, bright in enumerate((middle > 128).ravel()) if bright)


def write(
    path,
    frames=300,
    codec="libx264",
    gop=250,
    b_frames=3,
    params="",
    first=0,
    rate=24,
    side=SIDE,
    begin_s=0,
    pts_ms=None,
    pictures=None,
    **muxer,
):
    """Write a video whose frames are stamped ``first``, ``first`` + 1 ...

    ``pts_ms``: times of the frames (variable frame rate), else ``rate`` per second from ``begin_s`` on.
    """
    options = {"threads": "1", "preset": "veryfast", "sc_threshold": "0"} if codec == "libx264" else {"threads": "1"}
    if codec == "libx265":
        options = {"preset": "ultrafast"}
        params = f"log-level=error:pools=none:frame-threads=1:keyint={gop}:min-keyint={gop}:scenecut=0:{params}"
    if params:
        options[f"{codec[3:]}-params"] = params
    with av.open(str(path), "w", options=muxer) as out:
        stream = out.add_stream(codec, rate=rate, options={**options, "bf": str(b_frames), "g": str(gop)})
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        if pts_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            picture = stamped(first + i, side) if pictures is None else pictures[i]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pts_ms is not None:
                frame.pts, frame.time_base = pts_ms[i], Fraction(1, 1000)
            elif begin_s:
                frame.pts, frame.time_base = begin_s * rate + i, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return str(path)


def numbers(path, indices, info=None):
    """What the frames ``indices`` of a video are stamped with."""
    return [number_of(p) for p in decode_video_frames(path, indices, info)]
