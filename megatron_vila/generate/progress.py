"""What a user sees while a prompt is read and an answer is written: progress on stderr, the answer's text on stdout."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from megatron_vila.busy import LastingConsole, busy
from megatron_vila.config.schema import LanguageConfig
from megatron_vila.generate.engine import Progress
from megatron_vila.plan.sizes import head_dim, llm_parameters

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for the bytes of a character that is not complete yet."""


@contextlib.contextmanager
def reading(frames: int, llm: LanguageConfig, shown: bool) -> Iterator[Progress | None]:
    """A line about a prompt with ``frames`` frames while ``llm`` reads it: frames, tokens a second, time left. On a terminal it
    moves, in a log one comes now and then; nothing unless ``shown``."""
    if not shown:
        yield None
        return
    started_s = time.monotonic()

    def describe(tokens: int, done: int, total: int) -> None:
        seconds = time.monotonic() - started_s
        left_s = round(seconds * (work(llm, total) / work(llm, tokens) - 1))
        change(
            f"reading: {done:,} of {frames:,} frames, {tokens / seconds:,.0f} tokens/s, about {left_s // 3600}:"
            f"{left_s // 60 % 60:02}:{left_s % 60:02} left"
        )

    with busy(f"reading {frames:,} frames", LastingConsole(stderr=True)) as change:
        yield describe


def work(llm: LanguageConfig, tokens: int) -> int:
    """What reading ``tokens`` tokens takes, in FLOP: a token attends to all before it, so the later ones take longer."""
    return 2 * tokens * llm_parameters(llm) + 2 * llm.num_layers * llm.num_heads * head_dim(llm) * tokens**2


class StreamedText:
    """Writes the text of an answer as its tokens come, whole characters only; ``decode`` makes text of all tokens so far."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode, self._shown = decode, ""
        self._ids: list[int] = []

    def token(self, token: int) -> None:
        """One more token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.startswith(self._shown) and not text.endswith(_UNFINISHED):
            say(text[len(self._shown) :], end="")
            self._shown = text

    def finish(self, text: str) -> None:
        """The whole ``text`` is known: write what is missing of it, and end the line."""
        say(text[len(self._shown) :] if text.startswith(self._shown) else f"\n{text}")


def say(text: str, end: str = "\n") -> None:
    """Print on stdout at once. One that takes no more (a closed pipe) does not end the command."""
    with contextlib.suppress(OSError):
        print(text, end=end, file=sys.stdout, flush=True)
