"""The sample table of an mp4 or mov file, read from its ``moov`` box alone.

FFmpeg reads this box too when it opens a file, but PyAV hands out decoding times only. Here the few boxes that give presentation
times are read (ISO/IEC 14496-12: stts, ctts, stss, stsz, stsc, stco and elst). Only the plain case is handled. For all else, and
for anything odd, the answer is None and the packets of the file are read instead; so a hostile file gains nothing but that.

Legend: N samples (frames) of the video track, in the order in which they are decoded.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from megatron_vila.data.media import MediaSource, open_media

LARGEST_MOOV = 2**26
"""Bytes of the largest ``moov`` box that is read: some 40 hours of video."""

MOST_SAMPLES = 2**24
"""Most samples of a track that are read."""

MOST_BOXES = 1000
"""Most boxes beside each other that are looked at."""


@dataclass(frozen=True, eq=False)
class SampleTable:
    """``pts`` and ``dts`` (int64 [N], units of ``timescale`` per second, edit list applied to ``pts``), ``key`` (bool [N]), and
    where the samples lie in the file: ``offsets`` and ``sizes`` (int64 [N], bytes)."""

    timescale: int
    pts: np.ndarray
    dts: np.ndarray
    key: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


class _Unusual(Exception):
    """The file is not of the plain kind that is read here."""


def read_sample_table(source: MediaSource, track_id: int) -> SampleTable | None:
    """The samples of track ``track_id``, or None if the file is not of the plain kind.

    Raises ``MediaError`` if it cannot be opened.
    """
    with open_media(source) as file:
        try:
            return _track(_moov(file), track_id)
        except (_Unusual, struct.error, ValueError, IndexError, OverflowError, OSError, MemoryError):
            return None


def _moov(file: BinaryIO) -> memoryview:
    """The content of the only ``moov`` box."""
    size, place, boxes, found = file.seek(0, os.SEEK_END), 0, 0, []
    while place + 8 <= size:
        boxes += 1
        length, kind = struct.unpack(">I4s", _read(file, 8, place))
        header = 8
        if length == 1:
            (length,), header = struct.unpack(">Q", _read(file, 8, place + 8)), 16
        elif length == 0:
            length = size - place
        if length < header or kind == b"moof" or boxes > MOST_BOXES:
            raise _Unusual
        if kind == b"moov":
            found.append((place + header, length - header))
        place += length
    if len(found) != 1 or found[0][1] > LARGEST_MOOV or sum(found[0]) > size:
        raise _Unusual
    return memoryview(_read(file, found[0][1], found[0][0]))


def _read(file: BinaryIO, size: int, place: int) -> bytes:
    file.seek(place)
    return file.read(size)


def _boxes(content: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The boxes that lie in ``content``."""
    place, boxes = 0, 0
    while place + 8 <= len(content):
        boxes += 1
        length, kind = struct.unpack_from(">I4s", content, place)
        if not 8 <= length <= len(content) - place or boxes > MOST_BOXES:
            raise _Unusual
        yield kind, content[place + 8 : place + length]
        place += length


def _only(content: memoryview, *names: bytes) -> memoryview:
    """The box at the end of the path ``names``, each of which must be there once."""
    for name in names:
        found = [box for kind, box in _boxes(content) if kind == name]
        if len(found) != 1:
            raise _Unusual
        content = found[0]
    return content


def _track(moov: memoryview, track_id: int) -> SampleTable:
    if any(kind not in (b"mvhd", b"trak", b"udta", b"meta", b"iods") for kind, _ in _boxes(moov)):
        raise _Unusual  # fragments, compressed headers
    tracks = [box for kind, box in _boxes(moov) if kind == b"trak" and _id(box) == track_id]
    if len(tracks) != 1:
        raise _Unusual
    track = tracks[0]
    table = dict(_boxes(_only(track, b"mdia", b"minf", b"stbl")))
    if not table.keys() <= {
        b"stsd",
        b"stts",
        b"ctts",
        b"stss",
        b"stsz",
        b"stsc",
        b"stco",
        b"co64",
        b"sgpd",
        b"sbgp",
        b"sdtp",
        b"cslg",
    }:
        raise _Unusual
    if struct.unpack_from(">I", table[b"stsd"], 4)[0] != 1 or (
        b"sbgp" in table and bytes(table[b"sbgp"][4:8]) != b"roll"
    ):
        raise _Unusual
    sizes = _sizes(table[b"stsz"])
    dts = np.concatenate([[0], np.cumsum(_runs(table[b"stts"], len(sizes)))[:-1]])
    shift = _runs(table[b"ctts"], len(sizes)) if b"ctts" in table else np.zeros(len(sizes), dtype=np.int64)
    timescale = _timescale(_only(track, b"mdia", b"mdhd"))
    key = np.ones(len(sizes), dtype=bool)
    if b"stss" in table:
        key[:] = False
        key[_column(table[b"stss"], 1)[:, 0] - 1] = True
    pts = dts + shift + _edit(track, dts + shift, timescale, _timescale(_only(moov, b"mvhd")))
    if not key[0] or (np.diff(dts) <= 0).any():
        raise _Unusual
    return SampleTable(timescale, pts, dts, key, _offsets(table, sizes), sizes)


def _id(track: memoryview) -> int:
    header = _only(track, b"tkhd")
    return struct.unpack_from(">I", header, 20 if header[0] else 12)[0]


def _timescale(header: memoryview) -> int:
    """Units per second of a ``mvhd`` or ``mdhd`` box."""
    scale = struct.unpack_from(">I", header, 20 if header[0] else 12)[0]
    if not scale:
        raise _Unusual
    return scale


def _column(box: memoryview, columns: int, kind: str = ">u4", start: int = 4) -> np.ndarray:
    """The rows of a table that follow their count at ``start``: int64 [rows, columns]."""
    (rows,) = struct.unpack_from(">I", box, start)
    if not rows:
        raise _Unusual
    values = np.frombuffer(box, dtype=kind, count=rows * columns, offset=start + 4)
    return values.astype(np.int64).reshape(rows, columns)


def _runs(box: memoryview, samples: int) -> np.ndarray:
    """The values of a table of (count, value), one for each sample: int64 [N]. ``ctts`` may hold negative values."""
    counts, values = _column(box, 2).T
    if counts.sum() != samples:
        raise _Unusual
    return np.repeat(values.astype(np.uint32).view(np.int32).astype(np.int64), counts)


def _sizes(box: memoryview) -> np.ndarray:
    same, samples = struct.unpack_from(">II", box, 4)
    if not 0 < samples <= MOST_SAMPLES:
        raise _Unusual
    sizes = np.full(samples, same, dtype=np.int64) if same else _column(box, 1, start=8)[:, 0]
    if not sizes.all():
        raise _Unusual
    return sizes


def _offsets(table: dict[bytes, memoryview], sizes: np.ndarray) -> np.ndarray:
    """Where the samples begin, from the chunks that they lie in."""
    wide = b"co64" in table
    chunks = _column(table[b"co64" if wide else b"stco"], 1, ">u8" if wide else ">u4")[:, 0]
    first, per_chunk, description = _column(table[b"stsc"], 3).T
    if first[0] != 1 or (np.diff(first) <= 0).any() or first[-1] > len(chunks) or (description != 1).any():
        raise _Unusual
    counts = np.repeat(per_chunk, np.diff(np.append(first, len(chunks) + 1)))
    if counts.sum() != len(sizes) or (chunks < 0).any():
        raise _Unusual
    begins = np.cumsum(sizes) - sizes
    first_in_chunk = (np.cumsum(counts) - counts)[counts > 0]
    return np.repeat(chunks[counts > 0] - begins[first_in_chunk], counts[counts > 0]) + begins


def _edit(track: memoryview, times: np.ndarray, timescale: int, movie_timescale: int) -> int:
    """What an edit list adds to the times of the samples. It must show all of them."""
    edits = [box for kind, box in _boxes(track) if kind == b"edts"]
    if not edits:
        return 0
    box = _only(edits[0], b"elst")
    layout = struct.Struct(">Qqhh" if box[0] else ">Iihh")
    (count,) = struct.unpack_from(">I", box, 4)
    if len(edits) > 1 or not 1 <= count <= 2:
        raise _Unusual
    entries = [layout.unpack_from(box, 8 + layout.size * i) for i in range(count)]
    empty_s, (duration, begin, *rate) = entries[:-1], entries[-1]
    if rate != [1, 0] or begin < 0 or any(entry[1] != -1 for entry in empty_s):
        raise _Unusual
    if times.min() < begin or times.max() >= begin + duration * timescale // movie_timescale:
        raise _Unusual
    return sum((2 * entry[0] * timescale + movie_timescale) // (2 * movie_timescale) for entry in empty_s) - begin
