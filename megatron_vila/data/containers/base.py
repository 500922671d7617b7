"""What the containers that are converted before training have in common, as a ``Source``."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import RecordError
from megatron_vila.data.records import RecordRules
from megatron_vila.data.sources.holdings import Holdings
from megatron_vila.data.sources.index import digest_of


class Container:
    """The part of a ``Source`` that is the same for all: nothing is known of a sample before it is read, so none counts as bad.

    ``files`` are those that the samples come from; their names, sizes and times make the ``digest``.
    """

    bad: Mapping[int, str] = {}
    holdings: Mapping[str, Holdings] = {}
    is_self_contained = False

    def __init__(self, files: list[str]) -> None:
        self.digest = digest_of((os.path.basename(path), *_state(path)) for path in files)


def rules_of(data: DataConfig, folder: str) -> RecordRules:
    """How the records of a container in ``folder`` are read by the settings of a run."""
    return RecordRules(data.media_dir or os.path.abspath(folder), data.media_format, frozenset(data.ignore_fields))


def text_of(content: bytes, where: str) -> str:
    """A text file's content. Raises ``RecordError`` that begins with ``where``."""
    try:
        return content.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise RecordError(f"{where}: not UTF-8 text: {error}; write it as UTF-8 (iconv -f LATIN1 -t UTF-8)") from error


def _state(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
