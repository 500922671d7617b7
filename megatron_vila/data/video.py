"""Exact frames of a video file, by index, without decoding what lies before them.

``probe_video`` makes the table of the frames (``video_index``). ``decode_video_frames`` seeks to the key frame before the first
wanted frame and goes forward; it seeks again only if a key frame lies between what has been read and the next wanted frame,
because a seek per frame decodes the same group of pictures again and again. A file that was joined from several is entered by
byte, if it is a transport stream, or read from its start.

Legend: N frames of the file, n wanted frames.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from megatron_vila.data.images import UPRIGHT
from megatron_vila.data.media import MediaError, MediaSource, check_size, errors_of, name_of, open_video
from megatron_vila.data.video_engines import VideoEngines
from megatron_vila.data.video_index import PartCounter, probe_video
from megatron_vila.data.video_info import VideoInfo


def decode_video_frames(
    source: MediaSource, indices: Sequence[int] | np.ndarray, info: VideoInfo | None = None
) -> list[Image.Image]:
    """Decode the frames ``indices`` (ascending, repeats allowed) of ``source`` as RGB pictures, upright.

    ``info`` saves a second probe of the same file. Decoding uses the calling thread alone, so many files can be decoded at
    once from many threads or forked workers. Raises ``MediaError`` if the file cannot be read or a frame cannot be had,
    ``ValueError`` for indices that are not ascending or out of range.
    """
    wanted = [int(i) for i in indices]
    info = info or probe_video(source)
    if wanted != sorted(wanted):
        raise ValueError(f"frame indices must ascend, got {wanted}")
    if wanted and not 0 <= wanted[0] <= wanted[-1] < info.num_frames:
        raise ValueError(
            f"frames {wanted[0]}..{wanted[-1]} asked of {name_of(info.source)}, which has frames 0..{info.num_frames - 1}"
        )
    if not wanted:
        return []
    with VideoReader(info, wanted) as reader:
        pictures = {i: reader.frame(i) for i in dict.fromkeys(wanted)}
    return [pictures[i] for i in wanted]


def shown_size(info: VideoInfo) -> tuple[int, int]:
    """Width and height of the first frame as it is shown, in pixels. It is decoded: only frames tell of a rotation. Raises
    ``MediaError``."""
    with VideoReader(info, [0]) as reader:
        return reader.frame(0).size


class VideoReader:
    """An open video that gives frames by ascending index. Use it as a context manager: it holds a decoder.

    ``wanted`` names all frames that will be asked for: of the others, those that no frame refers to are not decoded. Without it
    every frame on the way is. ``threads`` above 1 have FFmpeg decode several frames at once, ``engines`` the GPU's video engines;
    both raise where the video is none that they can do, and threads where a frame is damaged, though a reader without them may
    give it. Engines give frames that are damaged inside.

    What was done so far: ``packets`` read, ``frames_decoded``, ``seeks``, ``read_s`` and ``decode_s`` seconds in either.
    """

    def __init__(
        self,
        info: VideoInfo,
        wanted: Sequence[int] | None = None,
        *,
        threads: int = 1,
        engines: VideoEngines | None = None,
    ) -> None:
        self.info = info
        self._threads, self._engines = threads, engines
        self._wanted = {int(info.pts[i]) for i in wanted} if wanted is not None and info.has_pts else None
        self.packets, self.frames_decoded, self.seeks = 0, 0, 0
        self.read_s, self.decode_s = 0.0, 0.0
        # One converter for all frames: VideoFrame.to_image builds tables and starts threads for each.
        self._to_rgb = VideoReformatter()
        self._open()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._container.close()

    def frame(self, index: int) -> Image.Image:
        """Frame ``index``, which must lie after every frame asked for before; RGB and upright. Raises ``MediaError``."""
        with errors_of(self.info.source, f"decoding frame {index} of {self.info.num_frames} failed"):
            frame = self._find(index)
            if frame is None or frame.is_corrupt:
                raise MediaError(self.info.source, f"frame {index} of {self.info.num_frames} cannot be decoded")
            check_size(self.info.source, frame.width, frame.height)
            if self._engines is not None:
                frame = self._engines.fetch(frame, (self.info.width, self.info.height), self._to_rgb)
            picture = Image.fromarray(self._to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())
            turn = UPRIGHT.get(_orientation(frame))
            return picture if turn is None else picture.transpose(turn)

    def _find(self, index: int) -> av.VideoFrame | None:
        if not self.info.has_pts:
            return next((frame for place, (_, frame) in self._counted if place == index), None)
        part, target = int(np.searchsorted(self.info.parts, index, side="right")) - 1, int(self.info.pts[index])
        sought = self._enter(part, target)
        frame = self._forward_to(part, target)
        if (frame is None or frame.is_corrupt) and (sought or self._wanted is not None):
            # Some streams mark pictures as keys that need earlier ones (gradual refresh), and some do not say how far a decoder
            # must reorder, so that leaving out frames misleads it: only the start and every frame are safe.
            self._wanted = None
            self._container.close()
            self._open()
            frame = self._forward_to(part, target)
        return frame

    def _enter(self, part: int, target: int) -> bool:
        """Go to the key frame before ``target`` if it lies ahead; whether that was done."""
        first, last = np.searchsorted(self.info.key_parts, (part, part + 1))
        if first == last:
            return False
        before = np.searchsorted(self.info.key_pts[first:last], target, side="right") - 1
        place = int(first + max(0, before))
        key = int(self.info.key_pts[place])
        if (part, key) <= self._read_key:
            return False
        if len(self.info.skipped) == 1:
            self._seek(key, target)
            return True
        # A time names one place only in a file of one part.
        return self.info.key_places[place] >= 0 and self._seek_to_byte(part, key, int(self.info.key_places[place]))

    def _forward_to(self, part: int, target: int) -> av.VideoFrame | None:
        for lies_in, frame in self._frames:
            if lies_in > part:
                return None
            if lies_in == part and frame.pts is not None and frame.pts >= target:
                return frame if frame.pts == target else None
        return None

    def _open(self) -> None:
        started_s = time.perf_counter()
        if self._engines is None:
            self._container, self._stream = open_video(self.info.source, self._threads)
        else:
            self._container, self._stream = self._engines.open_video(self.info.source)
        self.read_s += time.perf_counter() - started_s
        self._leaves_out = self._wanted is not None and _marks_references(self._stream.codec_context)
        self._read_key = (int(self.info.key_parts[0]), int(self.info.key_pts[0]))
        self._frames = self._decode_parts(self._packets(), PartCounter(self._stream))
        self._counted = enumerate(self._frames)

    def _packets(self) -> Iterator[av.Packet]:
        packets = self._container.demux(self._stream)
        while True:
            started_s = time.perf_counter()
            packet = next(packets, None)
            self.read_s += time.perf_counter() - started_s
            if packet is None:
                return
            yield packet

    def _seek(self, key: int, target: int) -> None:
        """Stand on key frame ``key``, the last one up to ``target``, or on an earlier one if the container cannot do better."""
        self.seeks += 1
        before = int(self.info.key_pts[int(np.searchsorted(self.info.key_pts, key)) - 1])
        for offset in (target, key, before):
            self._container.seek(offset, backward=True, any_frame=False, stream=self._stream)
            packets = self._packets()
            found = next(((p, p.pts) for p in packets if p.is_keyframe and p.pts is not None), None)
            # Containers that seek by decoding time may land behind the key frame: then its group would lack a reference.
            if found is not None and found[1] <= key:
                first, pts = found
                self._read_key = (0, pts)
                self._frames = ((0, f) for p in itertools.chain([first], packets) for f in self._decode(p, 0))
                return
        self._container.close()
        self._open()

    def _seek_to_byte(self, part: int, key: int, place: int) -> bool:
        """Stand on the key frame ``key`` of ``part``, which begins at byte ``place``; whether it was found there."""
        self.seeks += 1
        self._container.seek(place, unsupported_byte_offset=True, stream=self._stream)
        packets = self._packets()
        first = next((p for p in packets if p.is_keyframe), None)
        if first is None or first.pts != key or first.pos != place:
            self._container.close()
            self._open()
            return False
        self._read_key = (part, key)
        counter = PartCounter(self._stream, part, int(self.info.skipped[part]))
        self._frames = self._decode_parts(itertools.chain([first], packets), counter)
        return True

    def _decode_parts(self, packets: Iterable[av.Packet], counter: PartCounter) -> Iterator[tuple[int, av.VideoFrame]]:
        """The frames of ``packets``, each with the part that it lies in."""
        for packet in packets:
            if packet.size and counter.starts_part(packet):
                # What the decoder still holds belongs to the part before; nothing of it may serve as a reference.
                yield from ((counter.part - 1, frame) for frame in self._decode(None, counter.part - 1))
                self._stream.codec_context.flush_buffers()
            if not packet.size or counter.place >= self.info.skipped[counter.part]:
                yield from ((counter.part, frame) for frame in self._decode(packet, counter.part))

    def _decode(self, packet: av.Packet | None, part: int) -> list[av.VideoFrame]:
        if packet is not None and packet.is_keyframe and packet.pts is not None:
            self._read_key = max(self._read_key, (part, packet.pts))
        if self._leaves_out:
            needed = self._wanted is None or packet is None or packet.pts is None or packet.pts in self._wanted
            self._stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
        started_s = time.perf_counter()
        frames = self._stream.codec_context.decode(packet)
        self.decode_s += time.perf_counter() - started_s
        self.packets += packet is not None and packet.size > 0
        self.frames_decoded += len(frames)
        return frames


def _marks_references(decoder: av.VideoCodecContext) -> bool:
    """Whether the stream says of each frame if any other refers to it, and the decoder can leave out those to which none does."""
    if decoder.codec.name == "hevc":
        # The mark of HEVC speaks of one temporal layer: what it calls unused may serve a higher one. hvcC counts the layers.
        extra = decoder.extradata or b""
        return len(extra) > 22 and extra[0] == 1 and extra[21] >> 3 & 7 == 1
    return decoder.codec.name in ("h264", "mpeg4", "mpeg1video", "mpeg2video")


def _orientation(frame: av.VideoFrame) -> int:
    """How the picture is to be shown, in the numbers of EXIF, from the display matrix of the frame.

    A point (x, y) is shown at (a x + c y, b x + d y); y points down. Angles between the right ones count as the nearest.
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1
    a, b, _, c, d = (value / 65536 for value in np.frombuffer(bytes(matrix), dtype=np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return {(False, False): 1, (True, False): 2, (True, True): 3, (False, True): 4}[a < 0, d < 0]
    return {(False, False): 5, (False, True): 6, (True, True): 7, (True, False): 8}[b < 0, c < 0]
