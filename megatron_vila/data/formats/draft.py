"""What a reader of a shape makes of a record, before its media are placed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_vila.data.fields import Media
from megatron_vila.data.placement import Turn


class Draft(NamedTuple):
    """The turns of a record, and its images and its videos, each in the order of their markers."""

    turns: tuple[Turn, ...]
    images: Sequence[Media]
    videos: Sequence[Media]
