"""A folder of VILA's WebDataset: tar files and ``wids-meta.json``, which lists them.

``{"__kind__": "VILA-WebDataset", "wids_version": 1, "shardlist": [{"url": ..., "nsamples": ..., "filesize": ...}]}``. The list
does not say where samples stand: each shard is gone through once, header by header, and the table is kept. As in wids, a sample
is a run of members with one key, and samples have the order of the list. Objects that wids would unpickle are never read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from megatron_vila.data.fields import RecordError, shown
from megatron_vila.data.formats.detect import files_under
from megatron_vila.data.sources.folder import small_file
from megatron_vila.data.sources.sample_table import SampleTable, kept_table
from megatron_vila.data.sources.tar import TarError, members, split_name

META = "wids-meta.json"

LARGEST_META = 2**28
"""Bytes of the largest list of shards."""

MOST_LOST = 10**6
"""Most samples of one shard that are counted as lost."""


class Shard(NamedTuple):
    """A shard of the list: ``name`` as it stands there, ``samples`` and ``size`` in bytes, -1 where the list does not say."""

    name: str
    samples: int
    size: int


def wids_table(folder: str) -> SampleTable:
    """The samples of all shards that ``wids-meta.json`` in ``folder`` lists.

    What a damaged or cut shard has lost is counted by bad samples, as many as the list says. Raises ``RecordError`` for a list
    that is none, and for shards that are missing or have another size than the list says.
    """
    path = os.path.join(folder, META)
    shards = _listed(path)
    states = [_state(path, folder, shard) for shard in shards]
    return kept_table(os.path.realpath(folder), ["wids"], [shards, states], lambda: _make(folder, shards))


def tar_table(path: str) -> SampleTable:
    """The samples of the tar file ``path``, or of all tar files in and below the folder ``path``, which have no list.

    Raises ``RecordError`` for files that cannot be looked at.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    found = files_under(path) if os.path.isdir(path) else [os.path.basename(path)]
    shards = [Shard(name, -1, -1) for name in found if name.lower().endswith(".tar")]
    states = [_state(path, folder, shard) for shard in shards]
    return kept_table(os.path.realpath(folder), ["tar", *shards], [states], lambda: _make(folder, shards))


def _listed(path: str) -> list[Shard]:
    text = small_file(path, LARGEST_META)
    try:
        content = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not JSON: {error}") from error
    listed = content.get("shardlist") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not listed:
        raise RecordError(
            f"{path}: names no shards; a list 'shardlist' of objects with 'url' and 'nsamples' is expected"
        )
    return [_shard(path, number, entry) for number, entry in enumerate(listed, start=1)]


def _shard(path: str, number: int, entry: Any) -> Shard:
    url = entry.get("url") if isinstance(entry, dict) else None
    if not isinstance(url, str) or not url or "\0" in url:
        raise RecordError(f"{path}, shard {number}: 'url' must name a tar file, found {shown(url)}")
    if "://" in url:
        raise RecordError(
            f"{path}, shard {number}: {shown(url)} is not on this machine; copy the shards beside the list"
        )
    counts = [entry.get(name, -1) for name in ("nsamples", "filesize")]
    for name, value in zip(("nsamples", "filesize"), counts, strict=True):
        if not isinstance(value, int) or isinstance(value, bool):
            raise RecordError(f"{path}, shard {number}: '{name}' must be a whole number, found {shown(value)}")
    return Shard(url, *counts)


def _state(path: str, folder: str, shard: Shard) -> tuple[int, int]:
    name = os.path.join(folder, shard.name)
    try:
        status = os.stat(name)
    except OSError as error:
        raise RecordError(
            f"{name}: a shard that {META} lists cannot be read: {error.strerror}; put it there"
        ) from error
    if shard.size not in (-1, status.st_size):
        raise RecordError(
            f"{name}: has {status.st_size:,} bytes, and {path} says {shard.size:,}: copy it anew, or make the list anew"
        )
    return status.st_size, status.st_mtime_ns


def _make(folder: str, shards: list[Shard]) -> SampleTable:
    places, keys, sizes = [], [], []
    bad: dict[int, str] = {}
    for number, shard in enumerate(shards):
        path = os.path.join(folder, shard.name)
        found = 0
        with _opened(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            sizes.append(size)
            try:
                for key, start, length in _samples(stream.fileno(), size):
                    places.append((number, start, length))
                    keys.append(key.encode())
                    found += 1
            except TarError as error:
                reason = f"{path}, after its first {found} samples: {error}; the samples behind are lost: copy the shard anew"
                for lost in range(min(MOST_LOST, max(1, shard.samples - found))):
                    bad[len(places)] = reason
                    places.append((number, size, 0))
                    keys.append(f"lost {lost + 1}".encode())
    table = np.array(places, dtype=np.int64).reshape(-1, 3)
    return SampleTable.of([shard.name for shard in shards], sizes, table, keys, bad)


def _opened(path: str) -> IO[bytes]:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise RecordError(f"{path}: the shard cannot be read: {error.strerror}; mend that and start again") from error


def _samples(descriptor: int, size: int) -> Iterator[tuple[str, int, int]]:
    """Key, first byte and bytes of each sample of an open shard. Raises ``TarError`` where the shard cannot be followed."""
    key, start, end = "", 0, 0
    for member in members(lambda offset, count: os.pread(descriptor, count, offset), 0, size):
        named = split_name(member.name)
        if named is None:
            continue
        if named[0] != key:
            if end:
                yield key, start, end - start
            key, start = named[0], member.start
        end = min(member.end, size)
    if end:
        yield key, start, end - start
