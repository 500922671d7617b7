"""Where a medium lies, from what a record says: a path, a ``file://`` or ``data:`` address, or bytes in a column of a table.

Nothing is downloaded: an address of another kind is refused.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from typing import Any

from megatron_vila.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DATA = re.compile(r"data:(image|video|audio)/([^;,]*)")
_FILE = "file://"


class AddressError(UserError, ValueError):
    """What a record says of a medium names none; the text says what is wrong."""


def source_of(value: Any, media_dir: str) -> str | bytes:
    """The medium that ``value`` names; a relative path starts at ``media_dir``.

    ``value`` is a text, or ``{"bytes": ..., "path": ...}`` as tables of the datasets library have it: the bytes count, the path
    if there are none. Raises ``AddressError``.
    """
    if isinstance(value, dict) and "bytes" in value:
        if value["bytes"]:
            return _bytes(value["bytes"])
        value = value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise AddressError
    if "\0" in value:
        raise AddressError("holds a zero byte")
    if value.startswith("data:"):
        return _of_data(value)
    if "://" in value and (scheme := _SCHEME.match(value)):
        if not value.startswith(_FILE):
            raise AddressError(f"is an address ({scheme[1]}) and nothing is downloaded; download the file and give its path")
        value = value.removeprefix(_FILE)
    return os.path.join(media_dir, value)


def bytes_of_base64(text: Any) -> bytes:
    """The medium that is written as base64. Raises ``AddressError``."""
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise AddressError(f"is not base64: {error}") from error
    if not found:
        raise AddressError("holds no bytes")
    return found


def kind_in(value: Any) -> str:
    """"image", "video" or "audio" for a text that carries one in a ``data:`` address, else ""."""
    found = _DATA.match(value) if isinstance(value, str) and value.startswith("data:") else None
    return found[1] if found else ""


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else bytes_of_base64(value)


def _of_data(value: str) -> bytes:
    kind, (head, comma, body) = kind_in(value), value.partition(",")
    if kind not in ("image", "video") or not comma or not head.endswith(";base64"):
        raise AddressError("is a data: address of another kind than data:image/...;base64, or data:video/...;base64,")
    if "," in body:
        raise AddressError("holds several pictures in one data: address; give them as a list of addresses, one for each")
    return bytes_of_base64(body)
