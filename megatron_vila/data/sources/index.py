"""The index of a file of records: where each one stands, and which are bad. Made once, kept, and shared by all ranks.

Every record is read and checked when the index is made, by as many processes as there are cores. The index is kept in
``~/.cache/megatron_vila/records`` (``kept.py``) and mapped into memory by whoever opens the file, until the file has another
size or time of change, or the rules another text. What is read later is compared with a checksum.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import subprocess
import sys
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np

from megatron_vila.data import addresses, fields, formats, placement, records
from megatron_vila.data.fields import RecordError
from megatron_vila.data.formats.read import read_record
from megatron_vila.data.kept import kept, kept_folder
from megatron_vila.data.records import RecordRules
from megatron_vila.data.sources import places
from megatron_vila.data.sources.places import name_of_record, record_places

SMALLEST_FILE = 2**22
"""Bytes below which a file is simply read again."""

PART = 2**25
"""Bytes of a file that are worth a process of their own."""

MOST_PROCESSES = 16

WAIT_S = 1800.0
"""Seconds that a process waits for another one to make an index, before it makes it itself."""

_FORMAT = 1
_COLUMNS = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RecordIndex:
    """``places`` are byte offset, byte size, number (the line of a JSONL file, else from 1) and CRC-32 of each record: int64
    [records, 4]. ``bad`` maps the places of bad records to what is wrong with them. ``digest`` is a hash of all that."""

    places: np.ndarray
    bad: dict[int, str]
    digest: str


def index_of(path: str, rules: RecordRules) -> RecordIndex:
    """The index of ``path``: the kept one, else one that is made and kept. Raises ``RecordError``."""
    try:
        status = os.stat(path)
    except OSError:
        return _make(path, rules)  # which says what is wrong
    if status.st_size < SMALLEST_FILE:
        return _make(path, rules)
    reading = [path, os.path.realpath(path), rules.media_dir, rules.media_format, *sorted(rules.ignore_fields)]
    identity = digest_of([*reading, status.st_size, status.st_mtime_ns, _FORMAT, _text_of_rules()])
    return kept(
        kept_folder("records"),
        # An index of the same file takes the place of that of an earlier state of it.
        f"{digest_of(reading)}.npy",
        lambda file: _read(file, identity),
        lambda: _make(path, rules),
        lambda stream, index: _write(stream, index, identity),
        WAIT_S,
    )


def digest_of(parts: Iterable[object]) -> str:
    """A hash of ``parts`` by their texts."""
    return hashlib.sha256(repr(list(parts)).encode("utf-8", "surrogateescape")).hexdigest()


def check_records(path: str, rules: RecordRules, found: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    """The CRC-32 (int64 [n]) of each record of ``found`` (int64 [n, 3] as ``record_places`` gives them), and what is wrong with
    the bad ones, by their row in ``found``."""
    checksums, bad = np.empty(len(found), dtype=np.int64), {}
    with open(path, "rb", buffering=0) as stream:
        for row, (offset, size, number) in enumerate(found.tolist()):
            text = os.pread(stream.fileno(), size, offset)
            checksums[row] = zlib.crc32(text)
            try:
                read_record(text, name_of_record(path, number), "", rules)
            except RecordError as error:
                bad[row] = str(error)
    return checksums, bad


def _make(path: str, rules: RecordRules) -> RecordIndex:
    found = record_places(path)
    before = os.stat(path)
    parts = _parts(before.st_size)
    if parts > 1:
        logger.info("checking the %d records of %s", len(found), path)
        checksums, bad = _check_in_parts(path, rules, found, parts)
    else:
        checksums, bad = check_records(path, rules, found)
    after = os.stat(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise RecordError(f"{path}: the file changes while it is read; start again when it is complete")
    table = np.concatenate([found, checksums[:, None]], axis=1)
    digest = hashlib.sha256(table.tobytes())
    digest.update(json.dumps(bad).encode())
    return RecordIndex(table, bad, digest.hexdigest())


def _parts(size: int) -> int:
    """How many processes check a file of ``size`` bytes."""
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES, size // PART)


def _check_in_parts(path: str, rules: RecordRules, found: np.ndarray, parts: int) -> tuple[np.ndarray, dict[int, str]]:
    """``check_records`` by ``parts`` processes, each of which starts from nothing: no fork copies the threads of this one."""
    asked = json.dumps([path, rules.media_dir, rules.media_format, sorted(rules.ignore_fields)])
    command = [sys.executable, "-P", "-m", "megatron_vila.data.sources.checker", asked]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    running, checksums, first = [], [], 0
    bad: dict[int, str] = {}
    with ExitStack() as undo:
        for part in np.array_split(found, parts):
            # Files, not pipes: a process that nobody reads from yet does not wait.
            rows, answer = undo.enter_context(TemporaryFile()), undo.enter_context(TemporaryFile())
            np.save(rows, part)
            rows.seek(0)
            process = undo.enter_context(subprocess.Popen(command, stdin=rows, stdout=answer, env=environment))
            undo.callback(process.kill)
            running.append((process, part, answer))
        for process, part, answer in running:
            if process.wait():
                sums, reasons = check_records(path, rules, part)
            else:
                answer.seek(0)
                sums, reasons = np.load(answer), json.load(answer)
            checksums.append(sums)
            bad |= {first + int(row): reason for row, reason in reasons.items()}
            first += len(part)
    return np.concatenate(checksums), bad


def _text_of_rules() -> str:
    """A hash of the text of all that decides which record is bad: a changed rule makes every index anew."""
    files = [Path(inspect.getfile(module)) for module in (addresses, fields, placement, records, places)]
    files += sorted(Path(inspect.getfile(formats)).parent.glob("*.py"))
    return digest_of(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)


def _write(stream: BinaryIO, index: RecordIndex, identity: str) -> None:
    """The table as an .npy file, which can be mapped into memory, and behind it the rest as one line of JSON."""
    np.save(stream, index.places)
    stream.write(json.dumps({"identity": identity, "digest": index.digest, "bad": index.bad}).encode())


def _read(file: Path, identity: str) -> RecordIndex | None:
    try:
        table = np.load(file, mmap_mode="r", allow_pickle=False)
        with file.open("rb") as stream:
            stream.seek(table.offset + table.nbytes)
            rest = json.loads(stream.read())
        if rest["identity"] != identity or table.dtype != np.int64 or table.shape[1:] != (_COLUMNS,):
            return None
        return RecordIndex(table, {int(row): str(reason) for row, reason in rest["bad"].items()}, str(rest["digest"]))
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError):
        return None
