"""A lock in ``train.output``, so that one run at a time writes to the folder. The lock of a dead owner does not count.

The lock is a file ``.lock-N`` that says who holds it. The exclusive creation of this file decides, which network file systems
have too. Nobody removes the file of a living owner. A start that finds the owner of ``.lock-N`` dead creates ``.lock-N+1``, which
succeeds for only one of several starts, and then removes the files of dead owners.

How a start finds out whether an owner lives:

* on the same machine (host, boot, process namespace) it looks for a process with the owner's number and start time;
* elsewhere the heartbeat counts: a thread of the owner renews the file's time stamp every ``BEAT_S`` seconds. An owner whose time
  stamp stands still for ``DEAD_AFTER_S`` is dead. A start waits that long at most, and compares only time stamps of the file
  server.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import random
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_vila.errors import UserError

logger = logging.getLogger(__name__)

BEAT_S = 5.0
DEAD_AFTER_S = 60.0
_TRIES = 50
_MOST_BYTES = 1 << 16
_held: set[RunLock] = set()


class LockedError(UserError):
    """Another run writes to the folder; the text says who, since when, and what to do."""


@dataclass(frozen=True)
class Owner:
    """What a lock says of the run that holds it; ``born`` is the start of the process (``_born``)."""

    token: str
    user: str
    host: str
    machine: str
    pid: int
    born: int
    since: str
    command: str

    @classmethod
    def of_this_process(cls) -> Owner:
        command = shlex.join([Path(sys.executable).name, *sys.argv])[:500]
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container without an entry for the user
            user = str(os.getuid())
        born = _born(os.getpid())
        return cls(uuid.uuid4().hex, user, socket.gethostname(), _machine(), os.getpid(), born, since=since, command=command)

    @classmethod
    def of_record(cls, record: Any) -> Owner:
        """The owner whose ``asdict`` is ``record``. Raises ``TypeError`` for anything else."""
        owner = cls(**record)
        if any(type(value) is not (int if name in ("pid", "born") else str) for name, value in record.items()):
            raise TypeError("a value of another type")
        return owner

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, started {self.since}: {self.command}"


class RunLock:
    """The lock of ``folder``. ``hold()`` is a context manager that holds it; ``lost`` says who has taken it over."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._owner = Owner.of_this_process()
        self._path = self._folder / ".lock-1"  # replaced when the lock is acquired, by a later number if this one exists
        self._inode = 0
        self._done = threading.Event()
        self.lost = ""
        """who has the lock instead, empty while it is held"""

    @contextlib.contextmanager
    def hold(self) -> Iterator[RunLock]:
        """Hold the lock inside the ``with`` block.

        Raises ``LockedError`` if another run holds it, ``UserError`` if no file can be written to the folder.
        """
        try:
            self._acquire()
        except OSError as error:
            raise UserError(
                f"train.output={self._folder} takes no file ({error.strerror}); free space or choose another folder"
            ) from error
        thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        thread.start()
        _held.add(self)
        try:
            yield self
        finally:
            self._done.set()
            thread.join(timeout=2 * BEAT_S)  # a file server that does not answer must not keep the process
            self.release()

    def release(self) -> None:
        """Give the lock back; nothing happens if another run holds it by now."""
        _held.discard(self)
        with contextlib.suppress(OSError):
            if self._owner_in(self._path) == self._owner:
                self._path.unlink()

    def _acquire(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):
            found = self._locks()
            for path in found:
                self._require_dead(path)
            mine = self._folder / f".lock-{_number(found[-1]) + 1 if found else 1}"
            if not self._create(mine):
                continue  # another start was faster
            # A lock that the first listing did not show (another number, or an outdated view of the folder): both starts give up
            # their locks and try again after a random pause.
            if set(self._locks()) - {mine} - set(found):
                mine.unlink()
                time.sleep(random.uniform(0.0, 0.3))
                continue
            self._path, self._inode = mine, self._folder.stat().st_ino
            for path in found:
                path.unlink(missing_ok=True)
            return
        raise LockedError(f"train.output={self._folder}: several runs start at once in this folder; start one of them")

    def _locks(self) -> list[Path]:
        return sorted((p for p in self._folder.glob(".lock-*") if p.name[6:].isdecimal()), key=_number)

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, json.dumps(asdict(self._owner)).encode())
            os.fsync(descriptor)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _require_dead(self, path: Path) -> None:
        """Return if the owner of ``path`` is dead or has gone, else raise ``LockedError``."""
        if not path.is_symlink() and path.exists() and not path.is_file():
            kind = "is no lock of a run but a folder, a pipe or a device"
            raise LockedError(f"{path} {kind}; remove it, or set another train.output")
        owner = self._owner_in(path)
        if owner is not None and owner.machine == self._owner.machine:
            alive = _born(owner.pid) == owner.born
        else:
            alive = self._beats(path, owner)
        if not path.exists():
            return
        if alive:
            owner = owner or self._owner_in(path)
            raise LockedError(
                f"train.output={self._folder} is in use by {owner or 'a run that is just starting'}; wait for it, end it, or "
                "set another train.output"
            )
        logger.warning("%s was held by a run that is dead and is taken over: %s", self._folder, owner or "unknown")

    def _beats(self, path: Path, owner: Owner | None) -> bool:
        """Whether the time stamp of ``path`` moves within ``DEAD_AFTER_S`` from its last move.

        A time stamp in the future, from a clock that was set back, counts as one of now.
        """
        first, begin_s = self._stamp(path), time.monotonic()
        age = max(0.0, self._now() - (first or 0.0))
        if first is not None and age < DEAD_AFTER_S:
            logger.warning("%s was in use %.0f seconds ago by %s; waiting to see whether it lives", self._folder, age, owner)
        while first is not None and age < DEAD_AFTER_S:
            time.sleep(min(BEAT_S / 5, DEAD_AFTER_S / 20))
            stamp = self._stamp(path)
            if stamp is None:
                return False
            if stamp != first:
                return True
            age = max(self._now() - first, time.monotonic() - begin_s)
        return False

    def _stamp(self, path: Path) -> float | None:
        """The time stamp that the file server has now: opening a file renews what the client knows of it."""
        try:
            with open(path, "rb", opener=_open_plain) as file:
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return None

    def _now(self) -> float:
        """The time on the file server's clock."""
        probe = self._folder / f".clock-{self._owner.token}"
        try:
            probe.write_bytes(b"x")
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _owner_in(self, path: Path) -> Owner | None:
        """The owner that the file ``path`` names; None if it names none, because it was just created or is damaged."""
        for _ in range(5):
            with contextlib.suppress(OSError, ValueError, TypeError), open(path, "rb", opener=_open_plain) as file:
                return Owner.of_record(json.loads(file.read(_MOST_BYTES)))
            time.sleep(0.02)
        return None

    def _beat(self) -> None:
        while not self._done.wait(BEAT_S):
            with contextlib.suppress(OSError):
                self._renew()
            if self.lost:
                return

    def _renew(self) -> None:
        """Renew the time stamp, or note that another run has taken over. A removed folder is made again, with the lock."""
        if self._path.exists():
            os.utime(self._path)
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        others = self._locks()
        if others:
            self.lost = str(self._owner_in(others[-1]) or "a run that says nothing of itself")
        elif self._folder.stat().st_ino == self._inode:
            self.lost = "a run that has ended since, or someone who removed the lock's file by hand"
        else:
            self._create(self._path)
            self._inode = self._folder.stat().st_ino


def release_all() -> None:
    """Release all locks of this process, for an end that does not leave the ``with`` blocks."""
    for lock in list(_held):
        lock.release()


def _open_plain(path: str, flags: int) -> int:
    """An opener that neither follows a link nor waits for the writer of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _number(path: Path) -> int:
    return int(path.name.removeprefix(".lock-"))


def _machine() -> str:
    """The machine, so that processes with an equal one can compare process numbers; unique if the system does not name it."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {uuid.uuid4().hex}"


def _born(pid: int) -> int:
    """Start of a process in clock ticks since the machine's start; 0 for one that has ended."""
    try:
        # the name in parentheses may hold anything
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in ("Z", "X") else int(fields[19])
