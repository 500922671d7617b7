"""What a source of records is, for all that reads them; and what is said of bad ones."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Protocol

from megatron_vila.data.fields import Media, RecordError
from megatron_vila.data.records import Record
from megatron_vila.data.sources.holdings import Holdings
from megatron_vila.errors import UserError

NO_MORE_FILES = {errno.EMFILE, errno.ENFILE}
"""Errors of a process that may open no more files: not the fault of any of them."""

SHOWN_BAD = 10
"""So many bad records stand in a message; all of them in the file that goes with it."""


class Source(Protocol):
    """The records of a set, by number from 0. Any number of threads may read at once.

    Every rank makes the same source by itself: number, order and content of the records, and which of them are bad, are the same
    everywhere and do not change during a run.
    """

    @property
    def bad(self) -> Mapping[int, str]:
        """Records that were found to be unusable when the source was opened: their number, and place, field and reason."""

    @property
    def digest(self) -> str:
        """A hash of all records; two sources with the same one are the same."""

    @property
    def holdings(self) -> Mapping[str, Holdings]:
        """What prepared sets among the records hold, by their folders."""

    @property
    def is_self_contained(self) -> bool:
        """Whether media lie in the files of the set itself, so that none can be missing alone."""

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record:
        """Record ``index``. Raises ``RecordError`` for a bad one, ``ChangedFileError`` if the source is not what it was."""

    def name(self, index: int) -> str:
        """The place of record ``index``, for messages; good and bad records have one."""


class BadRecordsError(RecordError):
    """Records that cannot be used, where none may be bad or all are; ``bad`` as in ``Source``."""

    def __init__(self, message: str, bad: Mapping[int, str]) -> None:
        super().__init__(message)
        self.bad = bad


class ChangedFileError(UserError, RuntimeError):
    """A file of records is no longer what it was when the run began; the text names it and the cure."""


def lost(name: str, error: OSError) -> ChangedFileError:
    """What ends a run when ``name``, a file of samples, cannot be opened. Raises ``error`` where the process is at its end."""
    if error.errno in NO_MORE_FILES:
        raise error
    if isinstance(error, FileNotFoundError):
        return ChangedFileError(f"{name} is gone since it was opened; put it back and start again")
    return ChangedFileError(f"{name} cannot be read: {error.strerror}; mend that and start again")


def media_of(source: Source, index: int) -> tuple[Media, ...]:
    """The media of record ``index``; none of one that cannot be read, which a source may find out only then."""
    try:
        return source.record(index).media
    except RecordError:
        return ()


def report_bad_records(bad: Mapping[int, str], records: int) -> str:
    """How many of ``records`` are bad and what is wrong with the first of them."""
    lines = [f"{len(bad)} of {records} records cannot be used:", *list(bad.values())[:SHOWN_BAD]]
    if len(bad) > SHOWN_BAD:
        lines.append(f"... and {len(bad) - SHOWN_BAD} more")
    return "\n  ".join(lines)
