"""What ranks tell each other of samples and rows that failed: lines of text, which they put together and sort."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from megatron_vila.errors import PeerError


class LoaderError(PeerError):
    """Loading failed on a rank of the run for another reason than a sample; raised on every rank of it."""


def broken_report(record: int, reason: str) -> str:
    """``record`` is broken."""
    return json.dumps(["broken", record, reason])


def error_report(error: Exception, where: str) -> str:
    """``error`` is none of a sample's; ``where`` it came up, in words."""
    return json.dumps(["error", f"{type(error).__name__}: {error}{where and f' ({where})'}"])


def broken_in(reports: Sequence[str], doing: str, own_error: Exception | None) -> Iterator[tuple[int, str]]:
    """The broken records that ``reports`` tell of, with the reason.

    Raises ``LoaderError`` at one of another error: ``doing`` failed. ``own_error`` is that of this rank, if it has one.
    """
    for kind, *report in map(json.loads, reports):
        if kind == "error":
            raise LoaderError(f"{doing} failed on a rank: {report[0]}") from own_error
        yield report[0], report[1]
