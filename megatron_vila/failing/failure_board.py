"""Finds out which rank failed first: ranks that fail write what happened into the store that all of them share.

One entry holds the failure that counts. A cause counts before a stall, and a stall before a consequence of another failure. Of
two failures of one kind the earlier one counts, by the clocks of their nodes. So the order in which they are written does not
matter. The texts of the first few different causes are kept as well, and each of them is printed by one rank only. A rank asks
the store for a few values, however many ranks there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch.distributed as dist

from megatron_vila import processes

T = TypeVar("T")

CAUSE, STALL, CONSEQUENCE = range(3)
"""kinds of failures, the one that counts most first"""
FIRST = "megatron_vila/failure"
"""the store's key of the failure that counts; it exists as soon as any rank has failed"""
_FAILED = f"{FIRST}/ranks"
_CAUSES = f"{FIRST}/causes"
_TOLD = f"{FIRST}/told"
_SHOWN = 4
"""most different causes that are printed"""
_WAIT_S = 10.0
"""how long the store may take to answer"""


@dataclass(frozen=True)
class Failure:
    """What ended a rank. ``kind`` is one of ``CAUSE``, ``STALL``, ``CONSEQUENCE``; ``time_s`` is in seconds since 1970;
    ``status`` is the exit code; ``doing`` says where the rank was; ``text`` is the same on all ranks that meet the same error."""

    kind: int
    time_s: float
    rank: int
    process: str
    status: int
    doing: str
    text: str

    @property
    def order(self) -> tuple[int, float, int]:
        return self.kind, self.time_s, self.rank

    @property
    def headline(self) -> str:
        who = f"rank {self.rank} ({self.process})"
        if self.kind == STALL:
            return "ranks waited in vain for others"
        return f"{who} {'failed' if self.kind == CAUSE else 'lost its connection to others'} first ({self.doing})"


class Board:
    """One rank's view of the failures of all ranks.

    Without a store, each failure of a rank counts as the first one. A lone rank has no store, and ranks that have not met have
    none. A store that does not answer, because its process has ended or is stopped, is not asked again.
    """

    def __init__(self) -> None:
        self._store = within(_WAIT_S, processes.shared_store)
        self._world = processes.rank_and_world()[1]

    @property
    def is_shared(self) -> bool:
        return self._store is not None

    def write(self, failure: Failure, shown: str) -> None:
        """Write ``failure`` into the store and, if it is a new cause, the text ``shown`` that is to be printed of it."""

        def write(store: dist.Store) -> bool:
            mine, held = json.dumps(asdict(failure)), b""
            while not held or failure.order < _read(held).order:
                now = store.compare_set(FIRST, held.decode(), mine)
                if now.decode() == mine:
                    break
                held = now
            if failure.kind == CAUSE and store.add(_key(failure.text), 1) == 1:
                number = store.add(_CAUSES, 1)
                if number <= _SHOWN:
                    store.set(f"{_CAUSES}/{number}", json.dumps({"text": failure.text, "shown": shown}))
            store.add(_FAILED, 1)
            return True

        self._ask(write)

    def first(self, wait_s: float = 0.0, at_most: int = CONSEQUENCE) -> Failure | None:
        """The failure that counts so far; None if within ``wait_s`` there is none of the kinds up to ``at_most``."""
        end = time.monotonic() + wait_s
        while self._store is not None:
            found = self._ask(lambda store: _read(store.get(FIRST))) if self._ask(lambda store: store.check([FIRST])) else None
            if found is not None and found.kind <= at_most:
                return found
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        return None

    def settle(self, wait_s: float) -> None:
        """Wait until all ranks have failed, ``wait_s`` at most: an earlier failure may still be on its way."""
        end, pause_s = time.monotonic() + wait_s, 0.02
        while time.monotonic() < end:
            failed = self._ask(lambda store: store.add(_FAILED, 0))
            if failed is None or failed >= self._world:
                return
            time.sleep(pause_s)
            pause_s *= 2  # thousands of ranks may ask

    def claim(self, text: str) -> bool:
        """Whether this rank is to print the cause ``text``, which one rank prints; true as well if the store does not answer."""
        return self._ask(lambda store: store.add(f"{_key(text)}/told", 1)) in (1, None)

    def untold(self) -> list[str]:
        """The texts to print of the other causes so far. They are claimed for this rank, which prints them with its own."""

        def take(store: dist.Store) -> list[str]:
            kept = [f"{_CAUSES}/{number}" for number in range(1, min(store.add(_CAUSES, 0), _SHOWN) + 1)]
            causes = [json.loads(store.get(key)) for key in kept if store.check([key])]
            return [cause["shown"] for cause in causes if store.add(f"{_key(cause['text'])}/told", 1) == 1]

        return self._ask(take) or []

    def told(self) -> None:
        """Note that everything has been printed, so that the other ranks can end."""
        self._ask(lambda store: store.add(_TOLD, 1))

    def await_told(self, wait_s: float) -> bool:
        """Wait until the first rank has printed, ``wait_s`` at most; returns whether it has."""
        end = time.monotonic() + wait_s
        while self._store is not None and time.monotonic() < end:
            if self._ask(lambda store: store.check([_TOLD])):
                return True
            time.sleep(0.05)
        return False

    def _ask(self, action: Callable[[dist.Store], T]) -> T | None:
        """The result of ``action``; None if the store does not answer, which is not asked again then."""
        store = self._store
        answer = None if store is None else within(_WAIT_S, lambda: action(store))
        if answer is None:
            self._store = None
        return answer


def within(seconds: float, action: Callable[[], T]) -> T | None:
    """The result of ``action``, None if it fails or takes longer: a store whose process is stopped never answers."""
    found: list[T] = []

    def act() -> None:
        with contextlib.suppress(RuntimeError, OSError):
            found.append(action())

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _read(value: bytes) -> Failure:
    return Failure(**json.loads(value))


def _key(text: str) -> str:
    return f"{_CAUSES}/{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]}"
