"""The frame table of a video: which frames a file holds, and when each is shown.

A table is made from the index of the file (``mp4_index``) or from its packets, without decoding. Frame i is the i-th smallest
presentation timestamp (PTS), which stays exact for B-frames, variable frame rates and edit lists, where arithmetic with a frame
rate is wrong.

* **Parts.** Where files were joined byte by byte, the time stamps start anew. A part ends where they run backwards, or jump in a
  broadcast format; frames are counted part after part.
* **Leading pictures.** A stream cut out of a longer one may begin with pictures that lack what they refer to: all before the
  first key frame, and those after it that are shown before it. The former are no frames. Of the latter some are whole, so the
  decoder is asked: it decodes these few pictures, and gives the same answer everywhere.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np

from megatron_vila.data.index_cache import cached
from megatron_vila.data.media import MediaError, MediaSource, Member, errors_of, open_video, state_of
from megatron_vila.data.mp4_index import SampleTable, read_sample_table
from megatron_vila.data.video_info import VideoInfo

BROADCAST_FORMATS = ("mpegts", "mpeg")
"""Containers in which a jump forward in time is a joint, not a picture that stands still."""

JUMP_S = 10.0
"""Seconds by which the time stamps of a broadcast format jump at a joint."""

BACKWARDS_S = 1.0
"""Seconds by which time stamps run backwards at a joint that does not begin with a key frame."""

COUNTED_FORMATS = ("avi", "asf", "mpeg")
"""Containers whose presentation times are not those of the file: AVI and asf hold none, a program stream holds some of them, and
what FFmpeg puts in their place depends on where it begins to read."""

HEAD_PACKETS = 64
"""Packets at the start of a part without times that are decoded to see how many frames come out."""

CHECKED_ENTRIES, CHECKED_PACKETS = 64, 16
"""How much of an index read here is compared with FFmpeg's: entries spread over the file, and packets at its start."""


class Stamp(NamedTuple):
    """What is kept of a packet: its time in units of the stream's time base, its place in the file in bytes, and its marks."""

    pts: int | None
    place: int | None
    key: bool
    discarded: bool
    corrupt: bool


class PartCounter:
    """Tells in which part of a joined stream a packet lies; packets are shown to it in the order of the file.

    ``part`` is the part of the last packet, ``place`` its place in that part, both from 0. Reading may begin before packet
    ``place`` of a later ``part``.
    """

    def __init__(self, stream: av.VideoStream, part: int = 0, place: int = 0) -> None:
        self.part, self.place = part, place - 1
        self._second = 1 / time_base(stream)
        self._jumps = stream.container.format.name in BROADCAST_FORMATS
        self._last: int | None = None

    def starts_part(self, packet: av.Packet) -> bool:
        """Count ``packet``; whether it begins a part other than the first one."""
        now, last = packet.dts, self._last
        joint = now is not None and last is not None and self._is_joint(now, last, packet.is_keyframe)
        self._last = last if now is None else now
        self.part += joint
        self.place = 0 if joint else self.place + 1
        return joint

    def _is_joint(self, now: int, last: int, key: bool) -> bool:
        if now < last:
            return key or now < last - BACKWARDS_S * self._second
        return self._jumps and key and now > last + JUMP_S * self._second


def time_base(stream: av.VideoStream) -> Fraction:
    """Seconds per unit of the stream's time stamps. Raises ``ValueError`` where the container gives none."""
    if stream.time_base is None:
        raise ValueError("its stream has no time base")
    return stream.time_base


def probe_video(source: MediaSource) -> VideoInfo:
    """The frame table of ``source``: of an mp4 or mov file from its index, else from all of its packets, or as kept from then.

    Raises ``MediaError`` for a file that is missing, empty, not a video, without a frame, or cut off. (A container without an
    index of its frames, such as a cut Matroska file, cannot tell that it was cut: the frames that are there are counted.)
    """
    container, stream = open_video(source)
    with container, errors_of(source, "not a video that can be read"):
        return from_index(source, stream) or cached(source, lambda: from_packets(source))


def from_index(source: MediaSource, stream: av.VideoStream) -> VideoInfo | None:
    """The table from the ``moov`` box of a plain mp4 or mov file; None if it must be read from the packets.

    The table counts only if FFmpeg's index of the file says the same, as far as that can be asked: the number of samples, and for
    some of them place, size, mark and decoding time; and of the first packets the presentation times.
    """
    if "mov" not in stream.container.format.name.split(","):
        return None
    table = read_sample_table(source, stream.id)
    if table is None or not _agrees(table, stream):
        return None
    size = state_of(source)[0]
    whole = int((table.offsets + table.sizes <= size).sum())
    if whole < len(table.pts):
        raise MediaError(source, f"cut off or corrupt: {whole} of {len(table.pts)} frames can be read")
    keys = np.flatnonzero(table.key)
    first_group = table.pts[: keys[1] if len(keys) > 1 else None]
    if (first_group < table.pts[0]).any():
        return None  # leading pictures
    return make_info(source, stream, [np.unique(table.pts)], [(0, int(pts), -1) for pts in table.pts[keys]], [0])


def _agrees(table: SampleTable, stream: av.VideoStream) -> bool:
    container: Any = stream.container
    entries, samples = stream.index_entries, len(table.pts)
    if len(entries) != samples or stream.time_base != Fraction(1, table.timescale):
        return False
    shift = entries[0].timestamp - int(table.dts[0])
    for i in np.unique(np.linspace(0, samples - 1, CHECKED_ENTRIES).astype(int)).tolist():
        entry = entries[i]
        found = (entry.pos, entry.size, entry.is_keyframe, entry.timestamp - shift, entry.is_discard)
        if found != (table.offsets[i], table.sizes[i], table.key[i], table.dts[i], False):
            return False
    packets = itertools.islice((p for p in container.demux(stream) if p.size), CHECKED_PACKETS)
    return all(p.pts == table.pts[i] and p.is_keyframe == table.key[i] for i, p in enumerate(packets))


def from_packets(source: MediaSource) -> VideoInfo:
    """The table from the packets: the file is read once from end to end, without decoding. Raises ``MediaError``."""
    container, stream = open_video(source)
    with container, errors_of(source, "not a video that can be read"):
        return _read_packets(source, stream)


def _read_packets(source: MediaSource, stream: av.VideoStream) -> VideoInfo:
    container: Any = stream.container
    counter = PartCounter(stream)
    parts: list[list[Stamp]] = [[]]
    for packet in container.demux(stream):
        if packet.size:
            if counter.starts_part(packet):
                parts.append([])
            # Stamps, not packets: a film's packets would fill the memory.
            parts[-1].append(Stamp(packet.pts, packet.pos, packet.is_keyframe, packet.is_discard, packet.is_corrupt))
    indexed = sum(entry.size > 0 for entry in stream.index_entries)
    skipped = [next((place for place, stamp in enumerate(part) if stamp.key), 0) for part in parts]
    _refuse_damage(source, parts, skipped, indexed)
    parts = [part[first:] for part, first in zip(parts, skipped, strict=True)]
    if container.format.name in COUNTED_FORMATS or not all(map(_is_timed, parts)):
        return _counted(source, stream, parts, skipped)
    lost = _undecodable(source, parts, skipped)
    shown = [
        np.array([s.pts for i, s in enumerate(part) if not s.discarded and i not in gone], dtype=np.int64)
        for part, gone in zip(parts, lost, strict=True)
    ]
    times = list(map(np.unique, shown))
    if container.format.name in BROADCAST_FORMATS and sum(map(len, times)) < sum(map(len, shown)):
        return _counted(source, stream, parts, skipped)
    # Only transport streams can be entered at any byte.
    by_place = container.format.name == "mpegts"
    keys = [
        (number, stamp.pts, stamp.place if by_place and stamp.place is not None else -1)
        for number, part in enumerate(parts)
        for stamp in part
        if stamp.key and stamp.pts is not None
    ]
    return make_info(source, stream, times, keys, skipped)


def make_info(
    source: MediaSource,
    stream: av.VideoStream,
    parts: Sequence[np.ndarray],
    keys: Sequence[tuple[int, int, int]],
    skipped: Sequence[int],
) -> VideoInfo:
    """The table of the frames ``parts`` (ascending int64 PTS of each part) with the key frames ``keys`` (part, PTS, place)."""
    pts, bounds = np.concatenate(parts), np.cumsum([0, *map(len, parts)])
    if not len(pts):
        raise MediaError(source, "the video stream holds no frame")
    spans = [part[-1] - part[0] for part in parts if len(part)]
    gaps, span_s = len(pts) - len(spans), float(sum(map(int, spans)) * time_base(stream))
    fps = gaps / span_s if span_s > 0 else float(stream.average_rate or 1)
    # A stream refreshed bit by bit may mark no key frame at all.
    key_table = np.unique(np.array(keys or [(0, pts[0], -1)], dtype=np.int64), axis=0)
    return _info(source, stream, pts, key_table, bounds, skipped=skipped, fps=fps, has_pts=True)


def _counted(
    source: MediaSource, stream: av.VideoStream, parts: Sequence[Sequence[Stamp]], skipped: Sequence[int]
) -> VideoInfo:
    """The table of a file whose frames are told by their number only, as the decoder gives them."""
    lost = [0] * len(parts)
    if stream.container.format.name != "avi":  # there a packet may hold two frames, and the next one none
        groups = [next((i for i, s in enumerate(part) if i and s.key), len(part)) for part in parts]
        heads = [min(group, HEAD_PACKETS) for group in groups]
        given = _decode_heads(source, list(zip(skipped, heads, strict=True)))
        lost = [max(0, head - len(frames)) for head, frames in zip(heads, given, strict=True)]
    lengths = [sum(not s.discarded for s in part) - gone for part, gone in zip(parts, lost, strict=True)]
    frames = sum(lengths)
    if not frames:
        raise MediaError(source, "the video stream holds no frame")
    pts, fps = np.arange(frames, dtype=np.int64), float(stream.average_rate or _rate_of(parts) / time_base(stream) or 1)
    return _info(
        source, stream, pts, np.array([[0, 0, -1]]), np.cumsum([0, *lengths]), skipped=skipped, fps=fps, has_pts=False
    )


def _rate_of(parts: Sequence[Sequence[Stamp]]) -> Fraction:
    """Packets per unit of the time base, as far as they have times; 0 if that tells nothing."""
    known = [[stamp.pts for stamp in part if stamp.pts is not None] for part in parts]
    span = sum(max(times) - min(times) for times in known if times)
    return Fraction(sum(len(times) - 1 for times in known if times), span) if span else Fraction(0)


def _info(
    source: MediaSource,
    stream: av.VideoStream,
    pts: np.ndarray,
    keys: np.ndarray,
    parts: Sequence[int] | np.ndarray,
    skipped: Sequence[int],
    fps: float,
    has_pts: bool,
) -> VideoInfo:
    return VideoInfo(
        source=source if isinstance(source, bytes | Member) else os.fspath(source),
        num_frames=len(pts),
        fps=fps,
        duration_s=len(pts) / fps,
        width=stream.codec_context.width,
        height=stream.codec_context.height,
        time_base=time_base(stream),
        pts=pts,
        key_pts=keys[:, 1],
        has_pts=has_pts,
        key_parts=keys[:, 0],
        key_places=keys[:, 2],
        parts=np.array(parts, dtype=np.int64),
        skipped=np.array(skipped, dtype=np.int64),
    )


def _refuse_damage(
    source: MediaSource, parts: Sequence[Sequence[Stamp]], skipped: Sequence[int], indexed: int
) -> None:
    """Raise ``MediaError`` if frames of the index are missing or the container marks a packet as corrupt.

    Just before a joint and before a key frame, where there may be one, the mark is left to the decoder: the counters of transport
    streams do not go on there, so that a whole packet is marked.
    """
    stamps, damaged = sum(map(len, parts)), []
    for number, (part, first) in enumerate(zip(parts, skipped, strict=True)):
        before_joint = len(part) - 2 if number + 1 < len(parts) else len(part)
        for place, stamp in enumerate(part):
            if stamp.corrupt and first <= place < before_joint and not any(s.key for s in part[place + 1 : place + 3]):
                damaged.append(sum(map(len, parts[:number])) + place)
    if damaged or stamps < indexed:
        found = damaged[0] if damaged else stamps
        raise MediaError(source, f"cut off or corrupt: {found} of {max(indexed, stamps)} frames can be read")


def _is_timed(part: Sequence[Stamp]) -> bool:
    """Whether the packets of ``part`` have a PTS, but for leading pictures right after the first, which are no key frames."""
    timed = itertools.dropwhile(lambda stamp: stamp.pts is None and not stamp.key, part[1:])
    return not part or all(stamp.pts is not None for stamp in (part[0], *timed))


def _leading(part: Sequence[Stamp]) -> list[int]:
    """Places of the pictures that follow the first key frame of ``part`` and are shown before it, or at no time."""
    group = next((place for place, stamp in enumerate(part) if place and stamp.key), len(part))
    first, *others = [stamp.pts for stamp in part[:group]] or [None]
    return [i for i, pts in enumerate(others, 1) if pts is None or (first is not None and pts < first)]


def _undecodable(source: MediaSource, parts: Sequence[Sequence[Stamp]], skipped: Sequence[int]) -> list[set[int]]:
    """The places in each part of the leading pictures that the decoder does not give."""
    leading = [_leading(part) for part in parts]
    if not any(leading):
        return [set() for _ in parts]
    counts = [places[-1] + 1 if places else 0 for places in leading]
    given = _decode_heads(source, list(zip(skipped, counts, strict=True)))
    whole = [{pts for pts, corrupt in frames if not corrupt} - {None} for frames in given]
    return [
        {place for place in places if part[place].pts not in known}
        for part, places, known in zip(parts, leading, whole, strict=True)
    ]


def _decode_heads(source: MediaSource, heads: Sequence[tuple[int, int]]) -> list[list[tuple[int | None, bool]]]:
    """(PTS, is corrupt) of the frames of the first packets of each part; ``heads`` are (packets to skip, packets)."""
    container, stream = open_video(source)
    given: list[list[tuple[int | None, bool]]] = [[] for _ in heads]
    left, counter, decoder = sum(count > 0 for _, count in heads), PartCounter(stream), stream.codec_context
    with container:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            counter.starts_part(packet)
            first, count = heads[counter.part]
            if first <= counter.place < first + count:
                frames = decoder.decode(packet)
                if counter.place == first + count - 1:
                    frames += decoder.decode(None)
                    decoder.flush_buffers()
                    left -= 1
                given[counter.part] += [(frame.pts, frame.is_corrupt) for frame in frames]
                if not left:
                    break
    return given
