"""Whose fault an error is: that of a sample, which is then broken and left out, or the machine's, which ends the run."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator

import jinja2

from megatron_vila.data.media import MediaError
from megatron_vila.data.sources.source import NO_MORE_FILES, ChangedFileError
from megatron_vila.errors import UserError

logger = logging.getLogger(__name__)

_FORESEEN = (UserError, jinja2.TemplateError)


class MachineError(RuntimeError):
    """The machine has run out of memory or of open files while it worked at a sample: no other sample would fare better."""


class FailureReasons:
    """Puts errors of samples into words; the traceback of an error that nobody foresaw is logged once for each place."""

    def __init__(self) -> None:
        self._told: set[tuple[type, str, int | None]] = set()

    def reason(self, error: Exception, sample: str) -> str:
        """What is wrong with ``sample``. Raises ``MachineError`` or ``ChangedFileError`` that names it if the error is not the
        fault of the sample."""
        for cause in _chain(error):
            if isinstance(cause, ChangedFileError):
                raise type(cause)(f"at sample {sample}: {cause}") from error
            # A file can ask for more memory than there is: that is its own fault.
            memory = isinstance(cause, MemoryError) and not isinstance(error, MediaError)
            if memory or (isinstance(cause, OSError) and cause.errno in NO_MORE_FILES):
                raise MachineError(f"at sample {sample}: {type(cause).__name__}: {cause}") from error
        text = " ".join(str(error).split("\n"))  # a line of a log belongs to one sample
        if isinstance(error, _FORESEEN):
            return text
        last = traceback.extract_tb(error.__traceback__)[-1:]
        place = (type(error), last[0].filename if last else "", last[0].lineno if last else None)
        if place not in self._told:
            self._told.add(place)
            logger.error("sample %s fails in a way that nobody foresaw:", sample, exc_info=error)
        return f"{type(error).__name__}: {text}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
