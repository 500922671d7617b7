"""Shards for tests, written as ``energon prepare`` leaves them: tar files and the index beside them."""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from megatron_vila.data.sources.tar import members, split_name
from tests.data.material import conversation

Sample = tuple[str, Mapping[str, bytes | dict]]
"""A key and its parts; a dictionary is written as JSON."""

SCHEMA = (
    "CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL, "
    "byte_offset INTEGER, byte_size INTEGER)",
    "CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset INTEGER, "
    "content_byte_size INTEGER)",
)


def sample(number: int, **fields: object) -> dict:
    return {"id": f"s{number}", "conversations": conversation(f"Question {number}?", f"Answer {number}."), **fields}


def write_tar(path: Path, samples: Iterable[Sample], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as shard:
        for key, parts in samples:
            for part, content in parts.items():
                content = json.dumps(content).encode() if isinstance(content, dict) else content
                member = tarfile.TarInfo(f"{key}.{part}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


def write_shards(
    folder: Path, shards: Sequence[Sequence[Sample]], parts: Mapping[str, list[str]] | None = None, **options: int
) -> Path:
    """A folder with the shards ``000000.tar`` ..., all in ``train`` if ``parts`` does not say otherwise."""
    names = [f"{number:06d}.tar" for number in range(len(shards))]
    for name, samples in zip(names, shards, strict=True):
        write_tar(folder / name, samples, **options)
    index_shards(folder, names, parts)
    return folder


def index_shards(folder: Path, names: Sequence[str], parts: Mapping[str, list[str]] | None = None) -> None:
    """Write ``.nv-meta`` for the shards ``names``, with the schema and the values of Energon 7.4.1."""
    meta = folder / ".nv-meta"
    meta.mkdir(exist_ok=True)
    (meta / "index.sqlite").unlink(missing_ok=True)
    counts = {}
    with sqlite3.connect(meta / "index.sqlite") as database:
        for statement in SCHEMA:
            database.execute(statement)
        for shard, name in enumerate(names):
            content = (folder / name).read_bytes()
            samples: dict[str, list] = {}
            for member in members(lambda offset, size: content[offset : offset + size], 0, len(content)):  # noqa: B023
                samples.setdefault(split_name(member.name)[0], []).append(member)
            for number, (key, found) in enumerate(samples.items()):
                start, size = found[0].start, found[-1].end - found[0].start
                database.execute("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", (shard, key, number, start, size))
                rows = [(shard, number, split_name(m.name)[1], m.offset, m.size) for m in found]
                database.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", rows)
            counts[name] = len(samples)
    database.close()
    (meta / ".info.json").write_text(json.dumps({"energon_version": "7.4.1", "shard_counts": counts}))
    split = {"split_parts": dict(parts or {"train": list(names), "val": [], "test": []}), "exclude": []}
    (meta / "split.yaml").write_text(yaml.safe_dump(split))
    (meta / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    (meta / "index.uuid").write_text("f3b9db72-6d93-49fd-8982-85b9148bc6d4")
