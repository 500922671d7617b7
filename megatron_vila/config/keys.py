"""The leaves of the schema by their dotted names: what the loader, the bounds and the page of all keys walk over."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from megatron_vila.config.schema import Config


@dataclass(frozen=True)
class Key:
    """One leaf of the configuration: its dotted name, type, default and documentation."""

    name: str
    type: Any
    default: Any
    help: str


@functools.cache
def config_keys() -> tuple[Key, ...]:
    """Every leaf key in the order of the schema."""
    return tuple(_walk_schema(Config, ""))


@functools.cache
def section_names() -> frozenset[str]:
    """Dotted names of the groups of keys."""
    return frozenset(name for name, _, _ in sections(Config, "") if name)


def sections(cls: Any, prefix: str) -> Iterator[tuple[str, str, list[Key]]]:
    """Name, documentation and own keys of ``cls``, which stands at ``prefix``, and of the sections in it."""
    leaves = [key for key in _walk_schema(cls, prefix) if "." not in key.name.removeprefix(prefix)]
    yield prefix.rstrip("."), (cls.__doc__ or "").strip(), leaves
    for field, hint in _fields(cls):
        if is_dataclass(hint):
            yield from sections(hint, f"{prefix}{field.name}.")


def _walk_schema(cls: Any, prefix: str) -> Iterator[Key]:
    for field, hint in _fields(cls):
        if is_dataclass(hint):
            yield from _walk_schema(hint, f"{prefix}{field.name}.")
        else:
            default = getattr(cls(), field.name)
            yield Key(f"{prefix}{field.name}", hint, default, field.metadata["help"])


def _fields(cls: Any) -> list[tuple[Any, Any]]:
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in fields(cls)]
