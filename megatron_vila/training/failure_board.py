"""Which rank failed first: what ranks that fail write into the store that all of them share.

One entry holds the failure that counts. A cause comes before a stall, a stall before what only follows from another failure, and
of two alike the earlier one comes first, by the clocks of their nodes. So the order in which they are written does not matter.
Each different cause is kept with its text too, a few of them, and told by one rank. A rank asks the store for a few
values, however many ranks there are.
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
"""kinds of failures, what counts most first"""
FIRST = "megatron_vila/failure"
"""key in the store of the failure that counts; there as soon as any rank has failed"""
_FAILED = f"{FIRST}/ranks"
_CAUSES = f"{FIRST}/causes"
_TOLD = f"{FIRST}/told"
_SHOWN = 4
"""most different causes that are told"""
_WAIT_S = 10.0
"""how long the store may take to answer"""


@dataclass(frozen=True)
class Failure:
    """What ended a rank. ``kind`` is one of ``CAUSE``, ``STALL``, ``CONSEQUENCE``; ``time_s`` is in seconds since 1970;
    ``status`` the exit code; ``doing`` where the rank was; ``text`` one for all ranks that meet the same."""

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
    """One rank's view of the failures of all ranks. A lone rank has no store, nor have ranks that have not met: each of its
    failures is the first one. So it is from where the store does not answer: its process has ended or is stopped."""

    def __init__(self) -> None:
        self._store = within(_WAIT_S, processes.shared_store)
        self._world = processes.rank_and_world()[1]

    @property
    def is_shared(self) -> bool:
        return self._store is not None

    def write(self, failure: Failure, shown: str) -> None:
        """Note ``failure``, and what the screen is to show of it if it is a new cause."""

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
        """The failure that counts by now; None if there is none up to the kind ``at_most`` within ``wait_s``."""
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
        """Whether it is this rank that tells the cause ``text``: it is told once."""
        return self._ask(lambda store: store.add(f"{_key(text)}/told", 1)) in (1, None)

    def untold(self) -> list[str]:
        """What the screen is to show of the other causes so far, claimed for this rank, which tells them with its own."""

        def take(store: dist.Store) -> list[str]:
            kept = [f"{_CAUSES}/{number}" for number in range(1, min(store.add(_CAUSES, 0), _SHOWN) + 1)]
            causes = [json.loads(store.get(key)) for key in kept if store.check([key])]
            return [cause["shown"] for cause in causes if store.add(f"{_key(cause['text'])}/told", 1) == 1]

        return self._ask(take) or []

    def told(self) -> None:
        """Let the others go: what there is to say has been said."""
        self._ask(lambda store: store.add(_TOLD, 1))

    def await_told(self, wait_s: float) -> bool:
        """Whether the first rank has told, after ``wait_s`` at most."""
        end = time.monotonic() + wait_s
        while self._store is not None and time.monotonic() < end:
            if self._ask(lambda store: store.check([_TOLD])):
                return True
            time.sleep(0.05)
        return False

    def _ask(self, action: Callable[[dist.Store], T]) -> T | None:
        """None where the store does not answer; it is not asked again then."""
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
