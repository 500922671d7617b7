"""Where each record stands in a file of samples, found without parsing it: brackets and strings are followed, nothing else.

So a record that is not JSON, too deep or too large for a parser is one bad record and does not hide those after it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import numpy as np

from megatron_vila.errors import UserError

# A string of JSON ends on its line: a lost quotation mark in an indented file spoils one record only.
_TOKEN = re.compile(rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"|[\[\]{},]')
_OPENING, _CLOSING, _QUOTE = b"[{", b"]}", ord('"')
_BOM = b"\xef\xbb\xbf"


class RecordError(UserError, ValueError):
    """A record or a file of records that cannot be used; the message names the file, the record and the field."""


def record_places(path: str) -> np.ndarray:
    """Byte offset, byte size and number (from 1; the line in a JSONL file) of each record of ``path``: int64 [records, 3].

    Raises ``RecordError`` for a file that cannot be read, has another ending than .json and .jsonl, holds no record, or whose
    list has no end.
    """
    if path.endswith(".jsonl"):
        find = _in_lines
    elif path.endswith(".json"):
        find = _in_list
    else:
        raise RecordError(f"{path}: the name must end in .json (one list of records) or .jsonl (one record a line)")
    if os.path.exists(path) and not os.path.isfile(path):
        raise RecordError(f"{path}: not a regular file")
    try:
        places = np.array(list(find(path)), dtype=np.int64).reshape(-1, 3)
    except OSError as error:
        raise RecordError(f"{path}: the file with samples cannot be read: {error.strerror}") from error
    if not len(places):
        raise RecordError(f"{path}: the file holds no record")
    return places


def _in_lines(path: str) -> Iterator[tuple[int, int, int]]:
    offset = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield offset, len(line), number
            offset += len(line)


def _in_list(path: str) -> Iterator[tuple[int, int, int]]:
    with open(path, "rb") as stream:
        content = stream.read()
    begin = len(_BOM) if content.startswith(_BOM) else 0
    if not content[begin:].lstrip().startswith(b"["):
        raise RecordError(
            f"{path}: a .json file must hold one list of records; name a file with one record a line .jsonl"
        )
    depth, number = 0, 1
    for match in _TOKEN.finditer(content, begin):
        at = match.start()
        token = content[at]
        if token == _QUOTE:
            continue
        if token in _OPENING:
            depth += 1
            if depth == 1:
                begin = at + 1
            continue
        depth -= token in _CLOSING
        if depth > 1 or (depth == 1 and token in _CLOSING):
            continue
        # A comma between two records, or the end of the list; a comma before the end is forgiven.
        if depth == 1 or content[begin:at].strip():
            yield begin, at - begin, number
            number += 1
        begin = at + 1
        if depth == 0:
            break
    else:
        raise RecordError(f"{path}, record {number}: the list breaks off; expected ',' or ']'")
    if content[begin:].strip():
        raise RecordError(f"{path}, record {number}: text follows the end of the list, so a bracket is wrong before it")
