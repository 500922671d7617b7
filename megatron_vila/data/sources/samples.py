"""A record from the parts of one sample of a shard: its JSON or caption, and media that are members of the tar file.

The JSON of a sample is a record as in a file of records (``records.py``). It names its media by the parts of the sample
(``0.mp4``), by their whole names, or, if there is one medium of a kind, by whatever name it had. A record that names none has all
media of the sample, in natural order. A medium that no field names is not overlooked, and nothing outside of the sample is read.
Parts that hold pickled objects are never read.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_vila.data.clips import natural
from megatron_vila.data.fields import (
    MEDIA_ENDINGS,
    READABLE_PICTURES,
    VIDEO_ENDINGS,
    Media,
    RecordError,
    shown,
)
from megatron_vila.data.formats.read import names_media, parse_json, parse_record, with_caption, without_fields
from megatron_vila.data.media import Member, Storage
from megatron_vila.data.records import Record, RecordRules
from megatron_vila.data.sources.tar import Read, TarError, TarMember, members, split_name

RECORD, CAPTION = "json", "txt"

LARGEST_TEXT = 2**26
"""Bytes of the largest JSON or caption of a sample."""

MOST_PARTS = 2**17
"""Most parts of a sample: the pictures of 18 hours at two a second."""

# Eagle's shards call every picture .img.
_PICTURES = READABLE_PICTURES | {".img"}
_MEDIA = MEDIA_ENDINGS | _PICTURES
_PICKLES = frozenset({".pkl", ".pickle", ".pyd", ".pth", ".pt"})


def read_sample(
    path: str, read: Read, start: int, size: int, key: str, rules: RecordRules, storage: Storage | None = None
) -> Record:
    """The record of the sample ``key`` in ``size`` bytes from ``start`` of the shard ``path``.

    ``storage`` reads its media if the shard lies elsewhere; ``rules.media_dir`` is not used. Raises ``RecordError`` that names
    shard, key and what is wrong, ``TarError`` where the bytes are not those of this sample in a tar file.
    """
    where = f"{path}, sample {key}"
    parts = _parts(read, start, start + size, key, where)
    content = _content(parts, read, where)
    unnamed = _media_of(parts, rules.ignore_fields)
    if isinstance(content, dict):
        content = without_fields(content, rules.ignore_fields)
        if not names_media(content):
            content |= _as_fields(unnamed)
    record = parse_record(content, where, key, "", rules.media_format)
    finder = _Finder(path, storage, parts, where, record.media)
    media = tuple(map(finder.found, record.media))
    if left := [part for part in unnamed if part not in finder.used]:
        raise RecordError(
            f"{where}, field 'image' or 'video': the part {shown(left[0])} of the sample is not named; name it, or list it in "
            "data.ignore_fields"
        )
    return record._replace(media=media)


def _parts(read: Read, start: int, end: int, key: str, where: str) -> dict[str, TarMember]:
    """The members of a sample by the name of the part."""
    parts: dict[str, TarMember] = {}
    for member in members(read, start, end):
        named = split_name(member.name)
        if named is None:
            continue
        if named[0] != key:
            raise TarError(f"a member of sample {shown(named[0])} stands at byte {member.start:,}")
        if named[1] in parts:
            raise RecordError(f"{where}: the part {shown(named[1])} stands twice in the sample")
        parts[named[1]] = member
        if len(parts) > MOST_PARTS:
            raise RecordError(f"{where}: the sample has more than {MOST_PARTS:,} parts")
    if not parts:
        raise TarError(f"no member of the sample stands at byte {start:,}")
    return parts


def _content(parts: Mapping[str, TarMember], read: Read, where: str) -> Any:
    """The record as JSON gives it, with the caption for its text where it says nothing itself."""
    content = parse_json(_text(parts, RECORD, read, where), where) if RECORD in parts else {}
    if isinstance(content, dict):
        caption = None
        if CAPTION in parts:
            try:
                caption = _text(parts, CAPTION, read, where).decode()
            except UnicodeDecodeError as error:
                raise RecordError(f"{where}, part {CAPTION}: not UTF-8 text: {error}") from error
        content = with_caption(content, caption)
    if RECORD not in parts and CAPTION not in parts:
        pickled = next((part for part in parts if _ending(part) in _PICKLES), None)
        raise RecordError(
            f"{where}: the sample has no part {RECORD} with its record and no {CAPTION} with a caption, but "
            f"{_listed(parts)}"
            + (f"; {pickled} may hold a pickled object, which is never read: write it as JSON" if pickled else "")
        )
    return content


def _text(parts: Mapping[str, TarMember], part: str, read: Read, where: str) -> bytes:
    member = parts[part]
    if member.kind:
        raise RecordError(f"{where}: the part {part} is {member.kind}, not a regular file")
    if member.size > LARGEST_TEXT:
        raise RecordError(f"{where}: the part {part} has {member.size:,} bytes; a text has at most {LARGEST_TEXT:,}")
    content = read(member.offset, member.size)
    if len(content) < member.size:
        raise TarError(f"cut off: the file ends at byte {member.offset + len(content):,}, within the part {part}")
    return content


def _media_of(parts: Mapping[str, TarMember], ignored: Iterable[str]) -> list[str]:
    """The parts that are media, in natural order."""
    found = [part for part in parts if _ending(part) in _MEDIA and part not in ignored]
    return sorted(found, key=natural)


def _as_fields(media: Iterable[str]) -> dict[str, list[str]]:
    """The fields that name ``media``; what is neither a picture nor a video is left out, to be told as not named."""
    kinds = (("image", _PICTURES), ("video", VIDEO_ENDINGS))
    found = {name: [part for part in media if _ending(part) in endings] for name, endings in kinds}
    return {name: parts for name, parts in found.items() if parts}


class _Finder:
    """The members that the media of one record stand for; ``used`` are their parts."""

    def __init__(
        self,
        path: str,
        storage: Storage | None,
        parts: Mapping[str, TarMember],
        where: str,
        media: tuple[Media, ...],
    ) -> None:
        self._path, self._storage, self._parts, self._where = path, storage, parts, where
        self._by_name = {posixpath.basename(member.name): part for part, member in parts.items()}
        self._single: dict[bool, str] = {}
        for is_video, endings in ((False, _PICTURES), (True, VIDEO_ENDINGS)):
            named = [medium for medium in media if medium.is_video == is_video and not medium.pictures]
            given = [part for part in parts if _ending(part) in endings]
            if len(named) == len(given) == 1:
                self._single[is_video] = given[0]
        self.used: set[str] = set()

    def found(self, medium: Media) -> Media:
        if medium.pictures:
            label = f"{self._where}, {medium.path if isinstance(medium.path, str) and medium.path else 'pictures'}"
            return medium._replace(path=label, pictures=tuple(self._member(name, False) for name in medium.pictures))
        return medium._replace(path=self._member(medium.path, medium.is_video))

    def _member(self, name: str | Member | bytes, is_video: bool) -> Member | bytes:
        if isinstance(name, bytes):  # the record carries it
            return name
        name = str(name)
        part = (
            name if name in self._parts else self._by_name.get(posixpath.basename(name)) or self._single.get(is_video)
        )
        if part is None:
            raise RecordError(
                f"{self._where}, field '{'video' if is_video else 'image'}': no part of the sample is called {shown(name)}; it "
                f"has {_listed(self._parts)}"
            )
        member = self._parts[part]
        if member.kind:
            raise RecordError(f"{self._where}: the part {part} is {member.kind}, not a regular file")
        self.used.add(part)
        return Member(self._path, member.offset, member.size, member.name, self._storage)


def _ending(part: str) -> str:
    return "." + part.rpartition(".")[2].lower()


def _listed(parts: Iterable[str], most: int = 6) -> str:
    names = list(parts)
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
