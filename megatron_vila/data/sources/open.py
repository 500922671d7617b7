"""Opens the records of a run: what stands under a path says which kind of source reads it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, NoReturn

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import RecordError
from megatron_vila.data.formats.detect import PREPARED, command, detect
from megatron_vila.data.sources import energon, wids
from megatron_vila.data.sources.energon import TRAIN, SplitPart
from megatron_vila.data.sources.joined import Joined, Part
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.data.sources.metadataset import ENDINGS, Bound, Leaf, read_metadataset
from megatron_vila.data.sources.remote import is_address
from megatron_vila.data.sources.shards import Shards
from megatron_vila.data.sources.source import Source

PARTS = {"train": "train", "eval": "val"}
"""The part of a set of shards that is read where ``data.train`` or ``data.eval`` names the set."""


class Blend(NamedTuple):
    """Records numbered through, one source after the other. ``sizes`` are the records of each source; of the samples of a run,
    each source has the share of its weight in ``weights``. Without weights all are one source: records come once an epoch."""

    records: Source
    sizes: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Format:
    """One way to keep records: ``is_at`` tells whether a path holds them, ``open`` makes one source of several such paths by the
    settings of a run; its last argument is the part of a set of shards. Raises ``RecordError``."""

    is_at: Callable[[str], bool]
    open: Callable[[DataConfig, Sequence[str], SplitPart], Source]


FORMATS = (
    Format(
        lambda path: is_address(path) or os.path.isdir(os.path.join(path, energon.META)),
        lambda data, paths, part: _joined([Shards.of_energon(data, path, part) for path in paths]),
    ),
    Format(
        lambda path: os.path.isfile(os.path.join(path, wids.META)),
        lambda data, paths, part: _joined([Shards.of_wids(data, path) for path in paths]),
    ),
    Format(
        lambda path: _found(path) == "tar",
        lambda data, paths, part: _joined([Shards.of_tars(data, path) for path in paths]),
    ),
    Format(lambda path: _found(path) in PREPARED, lambda data, paths, part: _refuse(data, paths[0])),
    Format(lambda path: True, lambda data, paths, part: JsonFiles.of(data, paths)),
)
"""The first format that is at a path reads it. JSON is last: it takes every other path, and says what is wrong with it."""


def open_blend(
    data: DataConfig, paths: Sequence[str], part: str = PARTS["train"], weights: Sequence[float] = ()
) -> Blend:
    """The records of ``paths`` and how they are mixed, by the settings of a run.

    With ``weights``, one a path, each path has the share of its weight, which the weights of a metadataset divide further.
    Without, paths are one source, and a metadataset with weights stands alone. Raises ``RecordError`` for a path that cannot be
    read.
    """
    if weights:
        return _open_weighted(data, paths, part, weights)
    leaves: list[Leaf] = []
    for path in paths:
        found = _named(path, part)
        if len(paths) > 1 and any(leaf.weight is not None for leaf in found):
            raise RecordError(
                f"{path}: gives weights, and other paths stand beside it; name it alone and the others in it"
            )
        leaves += found
    if not leaves or leaves[0].weight is None:
        records = _open_leaves(data, leaves)
        return Blend(records, (len(records),), ())
    sources = [_open_leaf(data, leaf) for leaf in leaves]
    return Blend(_joined(sources), tuple(map(len, sources)), tuple(leaf.weight or 0.0 for leaf in leaves))


def _named(path: str, part: str) -> list[Leaf]:
    """The sets at ``path``, of which ``part`` is read; another part stands only for that of a run."""
    wanted = SplitPart(part, meant=part not in PARTS.values())
    return read_metadataset(path, wanted) if path.endswith(ENDINGS) else [Leaf(path, wanted)]


def _open_weighted(data: DataConfig, paths: Sequence[str], part: str, weights: Sequence[float]) -> Blend:
    shares: list[tuple[Source, float]] = []
    for path, weight in zip(paths, weights, strict=True):
        leaves = _named(path, part)
        if leaves[0].weight is None:
            shares.append((_open_leaves(data, leaves), weight))
        else:
            total = sum(leaf.weight or 0.0 for leaf in leaves)
            shares += [(_open_leaf(data, leaf), weight * (leaf.weight or 0.0) / total) for leaf in leaves]
    sources = [source for source, _ in shares]
    return Blend(_joined(sources), tuple(map(len, sources)), tuple(weight for _, weight in shares))


def open_records(data: DataConfig, paths: Sequence[str], part: str = PARTS["train"]) -> Source:
    """The records of ``paths``, one source after the other, whatever their weights. Raises ``RecordError``."""
    return open_blend(data, paths, part).records


def _open_leaves(data: DataConfig, leaves: Sequence[Leaf]) -> Source:
    """One source of ``leaves``; plain paths of one format that stand side by side are opened together."""
    if not leaves:
        return FORMATS[-1].open(data, [], TRAIN)  # which says what is expected

    def kind(leaf: Leaf) -> object:
        plain = not leaf.ranges and leaf.repetitions in (None, 1)
        return (_format(leaf.path), leaf.part) if plain else leaf

    sources: list[Source] = []
    for _, group in groupby(leaves, kind):
        alike = list(group)
        first = alike[0]
        if first.ranges or (first.repetitions or 1) > 1:
            for leaf in alike:
                sources += [_open_leaf(data, leaf)] * (leaf.repetitions or 1)
        else:
            sources.append(_format(first.path).open(data, [leaf.path for leaf in alike], first.part))
    return _joined(sources)


def _open_leaf(data: DataConfig, leaf: Leaf) -> Source:
    source = _format(leaf.path).open(data, [leaf.path], leaf.part)
    for first, end in leaf.ranges:
        source = Part(source, _place(first, len(source)), _place(end, len(source)))
    return source


def _place(bound: Bound, records: int) -> int:
    if bound is None:
        return records
    return int(records * bound) if isinstance(bound, float) else bound


def _format(path: str) -> Format:
    return next(each for each in FORMATS if each.is_at(path))


def _found(path: str) -> str:
    """The format that is found at ``path``; "text_files" for a text file, which may hold one document or many."""
    folder = os.path.isdir(path)
    if not folder and (path.endswith((".json", ".jsonl")) or not os.path.isfile(path)):
        return ""
    if not folder and path.lower().endswith(".txt"):
        return "text_files"
    try:
        return detect(path)
    except RecordError:
        return "folder" if folder else ""


def _refuse(data: DataConfig, path: str) -> NoReturn:
    """Raise ``RecordError`` with the command that makes shards of what training does not read in place."""
    name = detect(path)  # which tells what to say where it is not clear
    convert = command(path, media_dir=data.media_dir, ignore_fields=tuple(data.ignore_fields))
    raise RecordError(
        f"{path}: {PREPARED[name]}, which training does not read in place; make shards of it with `{convert}` and set "
        "data.train=[FOLDER]"
    )


def _joined(sources: Sequence[Source]) -> Source:
    return sources[0] if len(sources) == 1 else Joined(sources)
