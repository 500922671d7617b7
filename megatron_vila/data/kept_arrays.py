"""A file of arrays with a note: what is kept of large tables, in a form that many processes map into memory at once.

The first line is JSON that says where each array lies behind it; nothing in the file is a pickled object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_DTYPES = ("int64", "uint8")
_ALIGNED = 64


def write_arrays(stream: BinaryIO, arrays: Mapping[str, np.ndarray], note: Mapping[str, Any]) -> None:
    """Write ``arrays`` (int64 or uint8) and ``note``, which JSON can hold."""
    places, offset = {}, 0
    for name, array in arrays.items():
        places[name] = [array.dtype.name, list(array.shape), offset]
        offset = _rounded(offset + array.nbytes)
    head = json.dumps({"note": note, "arrays": places, "bytes": offset}).encode()
    stream.write(head.ljust(_rounded(len(head) + 1) - 1) + b"\n")
    for array in arrays.values():
        stream.write(np.ascontiguousarray(array).data)
        stream.write(bytes(_rounded(array.nbytes) - array.nbytes))


def read_arrays(
    file: Path, names: Mapping[str, tuple[str, int]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The arrays of ``file``, mapped and read-only, and its note; None for a file that is not there, damaged or of something else
    than the arrays ``names`` (dtype and number of dimensions of each)."""
    try:
        with file.open("rb") as stream:
            head = stream.readline()
            told = json.loads(head)
        if set(told["arrays"]) != set(names) or file.stat().st_size != len(head) + told["bytes"]:
            return None
        arrays = {}
        for name, (dtype, shape, offset) in told["arrays"].items():
            if dtype not in _DTYPES or (dtype, len(shape)) != names[name]:
                return None
            whole = (
                np.zeros(shape, dtype) if 0 in shape else np.memmap(file, dtype, "r", len(head) + offset, tuple(shape))
            )
            arrays[name] = whole
        return arrays, dict(told["note"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _rounded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
