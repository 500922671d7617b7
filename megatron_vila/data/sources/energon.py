"""The index of a folder that ``energon prepare`` has made: WebDataset shards and, in ``.nv-meta``, where their samples stand.

Read by the standard library's sqlite3, without Energon, whose own loader cannot change the number of ranks between two runs.
What stands in the index is checked: it may be of other shards, of no origin that can be trusted, or no database at all.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import yaml

from megatron_vila.data.fields import RecordError, shown
from megatron_vila.data.sources.folder import Folder
from megatron_vila.data.sources.sample_table import SampleTable, kept_table
from megatron_vila.data.sources.tar import BLOCK, text_of

META = ".nv-meta"
INDEX = f"{META}/index.sqlite"
CRUDE = "CrudeWebdataset"

LONGEST_CELL = 2**16
"""Bytes of the longest value that is taken from the index."""

_ROWS = 2**14
_PREPARE = "run `energon prepare` on the folder again"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")


class SplitPart(NamedTuple):
    """A part of a split: its ``name`` (train, val, test ...), and whether it is ``meant``, so that no other may stand for it."""

    name: str
    meant: bool = False


TRAIN = SplitPart("train")


def energon_table(folder: Folder, part: SplitPart) -> SampleTable:
    """The samples of ``part`` of an Energon folder, in the order of its shards.

    Unless the part is meant, a folder whose shards are all in one other part is read whole. A sample that lies beyond the end of
    its shard is bad.
    Raises ``RecordError`` for a folder that is not whole, an index that is none, and shards that are missing.
    """
    info = _shard_counts(folder)
    shards, left_out = _chosen(folder, info, part)
    state = [folder.state(INDEX), info, shards, sorted(left_out), folder.quick_states(shards)]
    return kept_table(folder.identity, ["energon", part.name], state, lambda: _make(folder, info, shards, left_out))


def _shard_counts(folder: Folder) -> dict[str, int]:
    """The shards of the folder in the order of their numbers, and how many samples each has."""
    _check_sample_type(folder)
    for name in (".info.json", ".info.yaml"):
        info = _load(folder, f"{META}/{name}")
        if info is not None:
            break
    path = folder.place(f"{META}/.info.json")
    if info is None:
        raise RecordError(f"{path}: there is no such file; {_PREPARE}, or name another folder")
    counts = info.get("shard_counts") if isinstance(info, dict) else None
    if not isinstance(counts, dict) or not counts or not all(isinstance(count, int) for count in counts.values()):
        raise RecordError(f"{path}: names no shards (shard_counts); {_PREPARE}")
    for name in counts:
        if not isinstance(name, str) or os.path.isabs(name) or ".." in name.split("/") or "\0" in name:
            raise RecordError(f"{path}: {shown(name)} is not the name of a shard in the folder")
    return counts


def _check_sample_type(folder: Folder) -> None:
    """Raise ``RecordError`` for a folder that was prepared for samples of another kind than JSON with media."""
    path = folder.place(f"{META}/dataset.yaml")
    content = _load(folder, f"{META}/dataset.yaml")
    kind = content.get("__class__") if isinstance(content, dict) else None
    if kind not in (None, CRUDE):
        raise RecordError(
            f"{path}: the folder was prepared as {shown(kind)}; only {CRUDE} is read, whose samples hold a JSON record and media "
            f"(`energon prepare --sample-type {CRUDE}`)"
        )


def _chosen(folder: Folder, counts: Mapping[str, int], part: SplitPart) -> tuple[list[str], set[str]]:
    """The shards of ``part``, and what is left out of them as ``shard/key``."""
    path = folder.place(f"{META}/split.yaml")
    split = _load(folder, f"{META}/split.yaml")
    if split is None:
        split = _load(folder, f"{META}/split.json")
    parts = split.get("split_parts") if isinstance(split, dict) else None
    if not isinstance(parts, dict):
        raise RecordError(f"{path}: names no split_parts; {_PREPARE}")
    left_out = set(_expanded(path, split.get("exclude") or []))
    found = {str(name): [s for s in _expanded(path, names or []) if s not in left_out] for name, names in parts.items()}
    filled = [name for name, names in found.items() if names]
    name = filled[0] if not part.meant and not found.get(part.name) and len(filled) == 1 else part.name
    shards = found.get(name, [])
    if not shards:
        raise RecordError(
            f"{path}: no shard is in the part '{name}'; parts with shards are {', '.join(filled) or 'none'}"
        )
    if unknown := [name for name in shards if name not in counts]:
        raise RecordError(f"{path}: {shown(unknown[0])} is not among the shards of {META}/.info.json; {_PREPARE}")
    return shards, {name for name in left_out if name not in counts}


def _expanded(path: str, names: Any) -> Iterator[str]:
    """``names`` with their braces written out: ``{000..004}`` and ``{a,b}``."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecordError(f"{path}: must list the names of shards, found {shown(names)}")
    waiting = names[::-1]
    for _ in range(10**7):
        if not waiting:
            return
        name = waiting.pop()
        braces = _BRACES.search(name)
        if not braces:
            yield name
            continue
        if ends := _RANGE.fullmatch(braces[1]):
            width = max(map(len, ends.groups())) if any(e[0] == "0" and len(e) > 1 for e in ends.groups()) else 0
            low, high = map(int, ends.groups())
            if abs(high - low) > 10**6:
                raise RecordError(f"{path}: {shown(name)} stands for more than 1,000,000 shards")
            step = 1 if low <= high else -1
            choices = [str(number).zfill(width) for number in range(low, high + step, step)]
        else:
            choices = braces[1].split(",")
        waiting += [name[: braces.start()] + choice + name[braces.end() :] for choice in reversed(choices)]
    raise RecordError(f"{path}: its braces stand for more than 10,000,000 names")


def _make(folder: Folder, counts: Mapping[str, int], shards: Sequence[str], left_out: set[str]) -> SampleTable:
    index, sizes = folder.place(INDEX), [size for size, _ in folder.states(shards)]
    number_of = {name: number for number, name in enumerate(shards)}
    numbers = {number: number_of[name] for number, name in enumerate(counts) if name in number_of}
    with folder.as_file(INDEX) as file:
        rows, keys = _read_index(index, file)
    order = np.lexsort((rows[:, 1], rows[:, 0]))
    rows, keys = rows[order], keys[order]
    for number, (name, count) in enumerate(counts.items()):
        found = int(np.searchsorted(rows[:, 0], number, "right") - np.searchsorted(rows[:, 0], number, "left"))
        if found != count:
            raise RecordError(
                f"{index}: has {found} samples of {name}, and .info.json says {count}: the two do not belong together; {_PREPARE}"
            )
    shard = np.array([numbers.get(number, -1) for number in range(len(counts))], dtype=np.int64)[rows[:, 0]]
    order = np.argsort(shard, kind="stable")[int((shard < 0).sum()) :]
    places, keys = np.stack([shard[order], rows[order, 2], rows[order, 3]], axis=1), keys[order]
    if left_out:
        names = [f"{shards[number]}/{text_of(key)}" for number, key in zip(places[:, 0], keys, strict=True)]
        kept = np.array([name not in left_out for name in names], dtype=bool)
        places, keys = places[kept], keys[kept]
    return SampleTable.of(shards, sizes, places, keys.tolist(), _beyond_the_end(folder, shards, sizes, places, keys))


def _beyond_the_end(
    folder: Folder, shards: Sequence[str], sizes: Sequence[int], places: np.ndarray, keys: np.ndarray
) -> dict[int, str]:
    sizes_of = np.asarray(sizes, np.int64)[places[:, 0]]
    bad = {}
    for index in np.flatnonzero(places[:, 1] + places[:, 2] > sizes_of).tolist():
        shard, start, size = places[index].tolist()
        bad[index] = (
            f"{folder.place(shards[shard])}, sample {text_of(keys[index])}: cut off: the index puts it before byte "
            f"{start + size:,}, and the file has {sizes[shard]:,}"
        )
    return bad


def _read_index(index: str, file: str) -> tuple[np.ndarray, np.ndarray]:
    """Shard, number in it, first byte and bytes of each sample, int64 [samples, 4], and their keys (bytes objects).

    ``index`` names the index, ``file`` is where it lies on this machine.
    """
    uri = f"file:{quote(os.path.abspath(file))}?mode=ro&immutable=1"
    rows = [np.empty((0, 4), np.int64)]
    keys: list[bytes] = []
    try:
        with closing(sqlite3.connect(uri, uri=True)) as database:
            database.text_factory = bytes
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_CELL)
            database.execute("PRAGMA trusted_schema = OFF")
            kind = database.execute("SELECT type FROM sqlite_master WHERE name = 'samples'").fetchone()
            if kind != (b"table",):
                raise RecordError(f"{index}: has no table of samples; {_PREPARE}")
            cursor = database.execute(
                "SELECT tar_file_id, sample_index, byte_offset, byte_size, sample_key FROM samples"
            )
            while block := cursor.fetchmany(_ROWS):
                *numbers, names = zip(*block, strict=True)
                if not all(set(map(type, column)) == {int} for column in numbers) or set(map(type, names)) != {bytes}:
                    raise RecordError(
                        f"{index}: the table of samples holds values that are not those of an index; {_PREPARE}"
                    )
                rows.append(np.array(numbers, dtype=np.int64).T)
                keys += names
    except (sqlite3.Error, OverflowError) as error:
        raise RecordError(f"{index}: not an index that can be read: {error}; {_PREPARE}") from error
    table = np.concatenate(rows)
    if len(table) and (table.min() < 0 or (table[:, 2] % BLOCK).any() or (table[:, 2:].max() > 2**60)):
        raise RecordError(f"{index}: holds places that are none in a tar file; {_PREPARE}")
    return table, np.fromiter(keys, dtype=object, count=len(keys))


def _load(folder: Folder, name: str) -> Any:
    """A file of YAML or JSON; None if there is none. Raises ``RecordError``."""
    content = folder.content(name)
    if content is None:
        return None
    try:
        return json.loads(content) if name.endswith(".json") else yaml.safe_load(content)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise RecordError(
            f"{folder.place(name)}: not what `energon prepare` writes: {' '.join(str(error).split())}; {_PREPARE}"
        ) from error
