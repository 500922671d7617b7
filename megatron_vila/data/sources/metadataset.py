"""Energon's metadataset: a YAML file that names sets of samples and how they are mixed.

``splits`` has a node for each part (train, val). A node is one set (``path``), or a list of nodes: ``blend`` with a ``weight``
each (shares of the samples of a run), or ``blend_epochized`` with ``repetitions`` (how often a sample comes in an epoch). A set
may be anything that ``data.train`` may name, another metadataset too. ``split_part`` chooses a part of it, ``subset`` a range of
its samples. Labels (``subflavors``) are for Energon's own hooks and mean nothing here; all else is refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from megatron_vila.data.fields import RecordError, shown
from megatron_vila.data.sources.energon import SplitPart
from megatron_vila.data.sources.folder import small_file

ENDINGS = (".yaml", ".yml")

LARGEST_FILE = 2**24
DEEPEST = 16
MOST_REPETITIONS = 1000

_LISTS = {"blend": "weight", "datasets": "weight", "blend_epochized": "repetitions"}
_NODE = ("path", "split_part", "subset", "subflavors", "shuffle_over_epochs_multiplier")

_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)\s*%")

Bound = int | float | None
"""An end of a range: a number of samples, a share from 0 to 1, or None for the end of the set."""


@dataclass(frozen=True)
class Leaf:
    """One set of samples: what stands at ``path``, its ``part``, cut to ``ranges`` one after the other.

    ``weight`` is its share among all, ``repetitions`` is how often it is taken in an epoch; None where none are given.
    """

    path: str
    part: SplitPart
    weight: float | None = None
    repetitions: int | None = None
    ranges: tuple[tuple[Bound, Bound], ...] = ()


def read_metadataset(path: str, part: SplitPart, depth: int = 0) -> list[Leaf]:
    """The sets that the file ``path`` names for ``part``, those of nested files included.

    Raises ``RecordError`` that names the file, the place in it and the cure.
    """
    if depth > DEEPEST:
        raise RecordError(f"{path}: metadatasets name each other more than {DEEPEST} deep; one of them may name itself")
    content = _load(path)
    kind = content.get("__class__")
    if kind not in ("MetadatasetV2", "Metadataset"):
        raise RecordError(
            f"{path}: __class__ is {shown(kind)}; a metadataset of Energon (MetadatasetV2) is expected in a YAML file of samples"
        )
    splits = content.get("splits")
    if not isinstance(splits, dict) or part.name not in splits:
        known = ", ".join(map(str, splits)) if isinstance(splits, dict) else "none"
        raise RecordError(f"{path}: splits has no part '{part.name}'; it has {known}")
    return _leaves(path, f"splits.{part.name}", splits[part.name], part, depth)


def _leaves(path: str, place: str, node: Any, part: SplitPart, depth: int) -> list[Leaf]:
    where = f"{path}, {place}"
    if not isinstance(node, dict):
        raise RecordError(f"{where}: must be an object with 'path', 'blend' or 'blend_epochized', found {shown(node)}")
    lists = [name for name in _LISTS if name in node]
    if len(lists) + ("path" in node) != 1:
        raise RecordError(
            f"{where}: needs one of 'path', 'blend' and 'blend_epochized', found {shown(', '.join(map(str, node)))}"
        )
    _refuse_unknown(where, node, (*_NODE, *lists, "weight", "repetitions"))
    named = node.get("split_part") or part.name
    if not isinstance(named, str):
        raise RecordError(f"{where}.split_part: must be the name of a part, found {shown(named)}")
    own = SplitPart(named, meant=part.meant or bool(node.get("split_part")))
    if lists:
        leaves = _mixed(path, f"{place}.{lists[0]}", node[lists[0]], own, _LISTS[lists[0]], depth)
    else:
        leaves = _named(path, where, node["path"], own, depth)
    if node.get("subset") is not None:
        cut = _range(f"{where}.subset", node["subset"], is_leaf=not lists and len(leaves) == 1)
        leaves = [replace(leaf, ranges=(*leaf.ranges, cut)) for leaf in leaves]
    return leaves


def _mixed(path: str, place: str, nodes: Any, part: SplitPart, by: str, depth: int) -> list[Leaf]:
    """The leaves of a list of nodes, which are mixed ``by`` weight or repetitions."""
    if not isinstance(nodes, list) or not nodes:
        raise RecordError(f"{path}, {place}: must be a list with at least one set; an empty blend gives no sample")
    found = []
    for number, node in enumerate(nodes):
        here = f"{place}[{number}]"
        leaves = _leaves(path, here, node, part, depth)
        value = node.get(by, 1)
        other = {"weight": "repetitions", "repetitions": "weight"}[by]
        if other in node or any(getattr(leaf, other) is not None for leaf in leaves):
            raise RecordError(
                f"{path}, {here}: weights and repetitions cannot be mixed; use blend or blend_epochized throughout"
            )
        if by == "weight":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise RecordError(
                    f"{path}, {here}.weight: must be a number above 0, found {shown(value)}; leave out what has none"
                )
            whole = math.fsum(leaf.weight or 1.0 for leaf in leaves)
            found += [replace(leaf, weight=value * (leaf.weight or 1.0) / whole) for leaf in leaves]
        else:
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_REPETITIONS:
                raise RecordError(
                    f"{path}, {here}.repetitions: must be a whole number from 1 to {MOST_REPETITIONS}, found {shown(value)}; a "
                    "part of a set is taken with 'subset'"
                )
            found += [replace(leaf, repetitions=(leaf.repetitions or 1) * value) for leaf in leaves]
    return found


def _named(path: str, where: str, name: Any, part: SplitPart, depth: int) -> list[Leaf]:
    if not isinstance(name, str) or not name or "\0" in name:
        raise RecordError(f"{where}.path: must be a path, found {shown(name)}")
    found = name if "://" in name else os.path.join(os.path.dirname(path), name)
    if found.endswith(ENDINGS):
        return read_metadataset(found, part, depth + 1)
    return [Leaf(found, part)]


def _range(where: str, subset: Any, is_leaf: bool) -> tuple[Bound, Bound]:
    """Both ends of a subset: ``{range: [25%, 75%]}`` or ``{range: [100, end]}``."""
    ends = subset.get("range") if isinstance(subset, dict) and set(subset) == {"range"} else None
    if isinstance(ends, list) and len(ends) == 2:
        first, last = map(_bound, ends)
        for kind in (float, int) if is_leaf else (float,):
            if isinstance(first, kind) and (last is None or (isinstance(last, kind) and first <= last)):
                return first, last
    numbers_too = ", or of two numbers of samples (the second may be 'end')" if is_leaf else ""
    raise RecordError(
        f"{where}: must be {{range: [25%, 75%]}} with ascending shares{numbers_too}, found {shown(subset)}"
    )


def _bound(value: Any) -> Any:
    """A share as a float, a number as an int, None for ``end``; anything else as text."""
    if isinstance(value, str):
        if value.strip() == "end":
            return None
        percent = _PERCENT.fullmatch(value.strip())
        return float(percent[1]) / 100 if percent and float(percent[1]) <= 100 else value
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else shown(value)


def _refuse_unknown(where: str, node: Mapping[Any, Any], known: Sequence[str]) -> None:
    for name, value in node.items():
        if name == "join":
            raise RecordError(f"{where}.join: joined sets are not read; write one set whose samples hold all parts")
        if name == "aux":
            raise RecordError(
                f"{where}.aux: media in other sets are not read; put them into the samples (tools/prepare_data.py)"
            )
        if name not in known:
            raise RecordError(f"{where}: {shown(name)} is not read here; remove it, or prepare the set without it")
        if name == "shuffle_over_epochs_multiplier" and value not in (None, 1):
            raise RecordError(
                f"{where}.{name}: is {shown(value)}; every epoch is shuffled as a whole (data.shuffle), remove it or set it to 1"
            )


def _load(path: str) -> dict[str, Any]:
    text = small_file(path, LARGEST_FILE)
    try:
        content = yaml.safe_load(text.decode())
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise RecordError(f"{path}: not YAML that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path}: must be a metadataset of Energon, found {shown(content)}")
    return content
