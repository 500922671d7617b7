"""What stands under a path: the formats in which sets are kept, told by what is there and never guessed."""

from __future__ import annotations

import os

from megatron_vila.data.fields import RecordError

FORMATS = {
    "json": "a JSON file with one list of records",
    "jsonl": "a JSONL file, one record a line",
}
"""The formats by name, and what each is in words."""


def detect(path: str) -> str:
    """The name of the format of what stands at ``path``. Raises ``RecordError`` that says what could stand there."""
    if not os.path.exists(path):
        raise RecordError(f"{path}: there is no such file or folder")
    ending = os.path.splitext(path)[1].lower()
    if ending in (".json", ".jsonl"):
        return ending[1:]
    known = "; ".join(f"{name} ({what})" for name, what in FORMATS.items())
    raise RecordError(f"{path}: none of the formats that are known: {known}")
