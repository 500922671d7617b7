"""A shard in the making: a tar file that appears under its name when it is whole. The same members give the same bytes."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from pathlib import Path

from megatron_vila.data.prepare.sample import Members

_BLOCK = tarfile.BLOCKSIZE


def shard_name(part: int, number: int) -> str:
    """Names in the order of the samples: parts are ranges of records, one after the other."""
    return f"shard-{part:05d}-{number:06d}.tar"


def size_of(members: Members) -> int:
    """Bytes that ``members`` take in a shard."""
    sizes = [len(content) if isinstance(content, bytes) else content.stat().st_size for _, content in members]
    return sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in sizes)


class Shard:
    """Samples are added to a temporary file beside ``path``; ``finish`` puts it in place, ``drop`` removes it."""

    def __init__(self, path: Path) -> None:
        self.path, self._temporary = path, path.with_name(f".{path.name}.part")
        self._file = self._temporary.open("wb")
        # GNU's form has room for members of any size; headers hold nothing of the machine or of the time.
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)

    @property
    def bytes(self) -> int:
        """Bytes of the samples so far."""
        return self._tar.offset

    def add(self, members: Members) -> None:
        for name, content in members:
            header = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                header.size = len(content)
                self._tar.addfile(header, io.BytesIO(content))
            else:
                with open(content, "rb") as file:
                    header.size = os.fstat(file.fileno()).st_size
                    self._tar.addfile(header, file)

    def finish(self) -> int:
        """Put the shard in place; returns its bytes."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        os.replace(self._temporary, self.path)
        return size

    def drop(self) -> None:
        self._temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk does not take what is left to write
            self._file.close()
