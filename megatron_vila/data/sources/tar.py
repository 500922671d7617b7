"""The members of a tar file, read from their headers: where each one lies, and nothing is unpacked.

A shard (WebDataset) is a plain tar file in which the members ``KEY.json``, ``KEY.0.mp4`` ... one after the other are the parts
of one sample. What a header says is material of unknown origin: names are labels, never paths, and a size or a chain of headers
is followed only within the bytes that were asked for.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_vila.errors import UserError

BLOCK = tarfile.BLOCKSIZE

LARGEST_HEADER = 2**20
"""Bytes of the largest header beyond a block: names of that length are no names."""

_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__(?:$|/)")
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_KINDS = {
    tarfile.LNKTYPE: "a link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
    tarfile.GNUTYPE_SPARSE: "a file with holes",
}

Read = Callable[[int, int], bytes]
"""``read(offset, size)``: these bytes of a file; fewer at its end."""


class TarError(UserError, ValueError):
    """Bytes that are not what a tar file has; the text says where and why."""


class TarMember(NamedTuple):
    """A member called ``name``: its content is ``size`` bytes from ``offset``, its header begins at ``start``. ``kind`` is empty
    for a regular file, else it says what the member is."""

    name: str
    start: int
    offset: int
    size: int
    kind: str

    @property
    def end(self) -> int:
        """The byte at which the next header begins."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


def members(read: Read, start: int, end: int) -> Iterator[TarMember]:
    """The members whose headers begin from byte ``start`` on and before ``end``, up to the mark that ends a tar file.

    Names that are not UTF-8 are written with backslashes. Raises ``TarError``, also for a member that goes beyond ``end``.
    """
    while start < end:
        member = _member(read, start, end)
        if member is None:
            return
        yield member
        start = member.end


def split_name(name: str) -> tuple[str, str] | None:
    """Key and part of the member ``name``: what stands before and after the first dot behind the last slash. None for a member
    that belongs to no sample, as WebDataset and Energon say."""
    found = None if _META.match(name) else _NAME.fullmatch(name)
    return (found[1], found[2]) if found else None


def _member(read: Read, start: int, end: int) -> TarMember | None:
    place, name, size = start, "", -1
    while True:
        header = _header(read, place)
        if header is None:
            if place != start:
                raise TarError(f"at byte {place:,} the header of a member is missing that an earlier one announces")
            return None
        place += BLOCK
        if place > end:
            raise TarError(f"the headers that begin at byte {start:,} have no end")
        if header.type not in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *tarfile.GNU_TYPES[:2]):
            break
        extra = _extra(read, place, header.size)
        place += -(-header.size // BLOCK) * BLOCK
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = text_of(extra.rstrip(b"\0"))
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            fields = _pax(extra, place)
            name = text_of(fields[b"path"]) if b"path" in fields else name
            if b"size" in fields:
                size = int(fields[b"size"]) if fields[b"size"].isdigit() and len(fields[b"size"]) < 19 else -2
            if any(field.startswith(b"GNU.sparse") for field in fields):
                header.type = tarfile.GNUTYPE_SPARSE
    size = header.size if size == -1 else size
    kind = "" if header.type in _FILES else _KINDS.get(header.type, "no regular file")
    if kind:
        size = 0 if header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE) else size
    if size < 0 or place + size > end:
        raise TarError(f"the member at byte {start:,} has {size:,} bytes by its header, more than there are")
    return TarMember(name or clean(header.name), start, place, size, kind)


def _header(read: Read, place: int) -> tarfile.TarInfo | None:
    """The header in the block at ``place``; None for a block of zeros, which ends a tar file."""
    block = read(place, BLOCK)
    if len(block) < BLOCK:
        raise TarError(f"cut off: the file ends at byte {place + len(block):,}, within a header")
    if not block.strip(b"\0"):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError) as error:
        raise TarError(f"at byte {place:,} stands no header of a tar file ({error})") from error


def _extra(read: Read, place: int, size: int) -> bytes:
    if not 0 <= size <= LARGEST_HEADER:
        raise TarError(f"a header of {size:,} bytes at byte {place:,}; one has at most {LARGEST_HEADER:,}")
    content = read(place, size)
    if len(content) < size:
        raise TarError(f"cut off: the file ends at byte {place + len(content):,}, within a header")
    return content


def _pax(content: bytes, place: int) -> dict[bytes, bytes]:
    """The records ``length key=value`` of a pax header that ends before ``place``."""
    fields, begin = {}, 0
    while begin < len(content) and content[begin]:
        number = content[begin : begin + 8].partition(b" ")[0]
        length = int(number) if number.isdigit() else 0
        record = content[begin + len(number) + 1 : begin + length]
        key, equals, value = record.partition(b"=")
        if length <= len(number) + 1 or begin + length > len(content) or not equals or value[-1:] != b"\n":
            raise TarError(f"the pax header before byte {place:,} is damaged")
        fields[key] = value[:-1]
        begin += length
    return fields


def text_of(name: bytes) -> str:
    """A name in a tar file or an index, fit for a line of a log."""
    return clean(name.decode("utf-8", "backslashreplace"))


def clean(name: str) -> str:
    """A name for a line of a log."""
    return name if name.isprintable() else re.sub(r"[^ -~]", lambda found: ascii(found[0])[1:-1], name)
