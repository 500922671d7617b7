"""Where the samples of a set of shards stand: a table that is made once for a set, kept, and mapped by all ranks of a node.

It says nothing of what is in a sample: that is read from the shard itself, which also shows whether the table belongs to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_vila.data.kept import kept, kept_folder
from megatron_vila.data.kept_arrays import read_arrays, write_arrays
from megatron_vila.data.sources.index import digest_of

WAIT_S = 1800.0
"""Seconds that a process waits for another one to make a table, before it makes it itself."""

_FORMAT = 1
_ARRAYS = {"places": ("int64", 2), "sizes": ("int64", 1), "key_ends": ("int64", 1), "keys": ("uint8", 1)}


@dataclass(frozen=True, eq=False)
class SampleTable:
    """``places`` int64 [samples, 3] are the shard, first byte and bytes of each sample; ``shards`` names the shards within their
    folder, ``sizes`` int64 [shards] are their bytes. ``keys`` uint8 holds the keys of all samples, that of sample i before
    ``key_ends[i]`` (int64 [samples]). ``bad`` maps samples that cannot be read to the reason, ``digest`` is their hash."""

    shards: tuple[str, ...]
    places: np.ndarray
    sizes: np.ndarray
    key_ends: np.ndarray
    keys: np.ndarray
    bad: dict[int, str]
    digest: str

    @classmethod
    def of(
        cls,
        shards: Sequence[str],
        sizes: Sequence[int],
        places: np.ndarray,
        keys: Sequence[bytes],
        bad: dict[int, str],
    ) -> SampleTable:
        ends = np.cumsum(np.fromiter(map(len, keys), np.int64, len(keys)))
        joined = np.frombuffer(b"".join(keys), dtype=np.uint8)
        sizes_S = np.asarray(sizes, np.int64)
        digest = hashlib.sha256()
        for part in (places, sizes_S, ends, joined):
            digest.update(np.ascontiguousarray(part).data)
        digest.update(json.dumps([list(shards), sorted(bad)]).encode())
        return cls(
            shards=tuple(shards),
            places=places,
            sizes=sizes_S,
            key_ends=ends,
            keys=joined,
            bad=bad,
            digest=digest.hexdigest(),
        )

    def __len__(self) -> int:
        return len(self.places)

    def key(self, index: int) -> str:
        begin = self.key_ends[index - 1] if index else 0
        return self.keys[begin : self.key_ends[index]].tobytes().decode("utf-8", "backslashreplace")


def kept_table(
    folder: str, reading: Sequence[object], state: Sequence[object], make: Callable[[], SampleTable]
) -> SampleTable:
    """The table of ``folder``, as kept, else ``make()``, which is kept. Raises what ``make`` raises.

    ``reading`` is what was asked for, ``state`` what the files are like: a table of their present state takes the place of an
    earlier one.
    """
    identity = digest_of([folder, *reading, *state, _FORMAT])
    where, name = kept_folder("shards"), f"{digest_of([folder, *reading])}.table"
    table = kept(
        where,
        name,
        lambda file: _read(file, identity),
        make,
        lambda stream, table: _write(stream, table, identity),
        WAIT_S,
    )
    # The process that made the table lets go of its own copy of it.
    mapped = None if where is None or isinstance(table.places, np.memmap) else _read(where / name, identity)
    return mapped or table


def _write(stream: BinaryIO, table: SampleTable, identity: str) -> None:
    arrays = {name: getattr(table, name) for name in _ARRAYS}
    note = {"identity": identity, "shards": table.shards, "bad": table.bad, "digest": table.digest}
    write_arrays(stream, arrays, note)


def _read(file: Path, identity: str) -> SampleTable | None:
    found = read_arrays(file, _ARRAYS)
    if found is None or found[1].get("identity") != identity:
        return None
    arrays, note = found
    bad = {int(index): str(reason) for index, reason in note["bad"].items()}
    return SampleTable(tuple(note["shards"]), bad=bad, digest=str(note["digest"]), **arrays)
