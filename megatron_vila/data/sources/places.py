"""Where each record stands in a file of samples, found without parsing it: brackets and strings are followed, nothing else.

So a record that is not JSON, too deep or too large for a parser is one bad record and does not hide those after it.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator

import numpy as np

from megatron_vila.data.fields import RecordError

# A string of JSON ends on its line: a lost quotation mark in an indented file spoils one record only.
_STRING = rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"'
_TOKEN = re.compile(_STRING + rb"|[\[\]{},]")
_OPENING, _CLOSING, _QUOTE, _COMMA = b"[{", b"]}", ord('"'), ord(",")
_BOM = b"\xef\xbb\xbf"
_USUAL_DEPTH = 4


def _balanced(depth: int) -> bytes:
    """A pattern of what stands between two commas of a list, with lists and objects up to ``depth`` in each other."""
    inner = rb'[^"\[\]{}%s]++|' + _STRING + b'|"'
    if depth:
        inner += rb"|[\[{]" + _balanced(depth - 1).replace(b"%s", b"") + rb"[\]}]"
    return b"(?:" + inner + b")*+"


# A whole record at once: tens of tokens that Python need not look at.
_RECORD = re.compile(_balanced(_USUAL_DEPTH).replace(b"%s", b","))


def record_places(path: str) -> np.ndarray:
    """Byte offset, byte size and number (from 1; the line in a JSONL file) of each record of ``path``: int64 [records, 3].

    Raises ``RecordError`` for a file that cannot be read, has another ending than .json and .jsonl, holds no record, or whose
    list has no end.
    """
    if path.endswith(".jsonl"):
        find = _in_lines
    elif path.endswith(".json"):
        find = _in_list
    elif not os.path.exists(path):
        raise RecordError(f"{path}: there is no such file or folder; mend the path")
    else:
        raise RecordError(f"{path}: the name must end in .json (one list of records) or .jsonl (one record a line)")
    if os.path.exists(path) and not os.path.isfile(path):
        raise RecordError(f"{path}: not a regular file")
    try:
        places = np.fromiter(find(path), dtype=np.dtype((np.int64, 3)))
    except OSError as error:
        raise RecordError(f"{path}: the file with samples cannot be read: {error.strerror}") from error
    if not len(places):
        raise RecordError(f"{path}: the file holds no record")
    return places


def name_of_record(path: str, number: int) -> str:
    """File and number of a record, for messages."""
    return f"{path}, {'line' if path.endswith('.jsonl') else 'record'} {number}"


def _in_lines(path: str) -> Iterator[tuple[int, int, int]]:
    offset = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield offset, len(line), number
            offset += len(line)


def _in_list(path: str) -> Iterator[tuple[int, int, int]]:
    with open(path, "rb") as stream:
        if not os.fstat(stream.fileno()).st_size:
            yield from _places_in_list(path, b"")
            return
        # The pages of the file are its cache's: nothing of a large file is copied into this process.
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield from _places_in_list(path, content)


def _places_in_list(path: str, content: bytes | mmap.mmap) -> Iterator[tuple[int, int, int]]:
    begin = len(_BOM) if content[: len(_BOM)] == _BOM else 0
    first = re.compile(rb"\S").search(content, begin)
    if first is None or first[0] != b"[":
        raise RecordError(
            f"{path}: a .json file must hold one list of records; name a file with one record a line .jsonl"
        )
    begin, number = first.end(), 1
    while True:
        end = _end_of_record(content, begin)
        if end is None:
            raise RecordError(f"{path}, record {number}: the list breaks off; expected ',' or ']'")
        # A comma before the end of the list is forgiven.
        last = content[end] != _COMMA
        if not last or content[begin:end].strip():
            yield begin, end - begin, number
            number += 1
        begin = end + 1
        if last:
            break
    if re.compile(rb"\S").search(content, begin):
        raise RecordError(f"{path}, record {number}: text follows the end of the list, so a bracket is wrong before it")


def _end_of_record(content: bytes | mmap.mmap, begin: int) -> int | None:
    """Where the comma or the bracket stands that ends the record that starts at ``begin``; None if there is none."""
    plain = _RECORD.match(content, begin)
    end = plain.end() if plain else begin
    if content[end : end + 1] in (b",", b"]", b"}"):
        return end
    depth = 0
    for match in _TOKEN.finditer(content, end):
        token = content[match.start()]
        if token == _QUOTE:
            continue
        if token in _OPENING:
            depth += 1
        elif depth:
            depth -= token in _CLOSING
        else:
            return match.start()
    return None
