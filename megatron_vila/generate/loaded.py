"""A loaded model and what is asked of it: questions in, text out; one prefix for all questions about the same media."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_vila import accelerator
from megatron_vila.config.schema import Config
from megatron_vila.data.chat import ChatEncoder
from megatron_vila.data.frame_chooser import FrameChooser
from megatron_vila.errors import SettingError
from megatron_vila.generate.engine import Engine, Prefix, Progress, Request
from megatron_vila.generate.frames import FrameSource, document_key
from megatron_vila.generate.prompt import Pictures, Prompts, media_of
from megatron_vila.generate.sampling import Sampling
from megatron_vila.parallel.agreement import gathered
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.cache_memory import cache_memory, cache_problem
from megatron_vila.plan.row import Document

logger = logging.getLogger(__name__)

_MARGIN_BYTES = GIB // 2
"""Left free beside what is counted: kernels and libraries take some when they first run."""


@dataclass(frozen=True)
class Reply:
    """An answer to a prompt of ``prompt_tokens`` tokens about ``frames`` frames; reading what was not held of them took
    ``read_s`` seconds. ``stopped_by`` is "stop" or "length"; ``tail`` are the token ids (int64) of the prompt after the last
    frame."""

    question: str
    text: str
    token_ids: np.ndarray
    tail: np.ndarray
    stopped_by: str
    frames: int
    prompt_tokens: int
    read_s: float
    first_token_s: float
    decode_s: float


class LoadedModel:
    """A model ready to answer; ``load`` makes it. All ranks call its methods with the same arguments.

    The prefix of the last media is held, so that more questions about them read no frame. ``close`` it.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        cache: str,
        config: Config,
        encoder: ChatEncoder,
        identity: str,
        chooser: FrameChooser,
        pictures: FrameSource,
        folder: Path,
    ) -> None:
        self.engine, self.topology, self.config, self.encoder = engine, engine.topology, config, encoder
        self.identity, self.pictures, self.folder = identity, pictures, folder
        self.tokenizer, self.prompts = encoder.tokenizer, Prompts(config, encoder, chooser)
        self.chooser, self._cache = chooser, cache
        self.prefix: Prefix | None = None
        self._given: Prefix | None = None

    def close(self) -> None:
        """Stop the threads and let go of the cache."""
        self.pictures.close()
        self.prefix = self._given = None

    def ask(
        self,
        question: str | Sequence[str],
        *,
        videos: Sequence[str] = (),
        images: Sequence[str] = (),
        num_frames: int | None = None,
        fps: float | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Reply | list[Reply]:
        """The answer to ``question``, or the answers to several questions about the same media, which are given together.

        Arguments are those of ``media_of``, ``Prompts.choose``, ``read`` and ``Engine.answer``; ``sampling`` of this class makes
        one that ends where the model was trained to. Collective. Raises ``PromptError``, ``MediaError``, ``SettingError`` where
        the cache does not fit, and ``UnreadableError``.
        """
        pictures = self.prompts.choose(media_of(images, videos, start_s, end_s), num_frames, fps)
        questions = [question] if isinstance(question, str) else list(question)
        replies = self.answer(questions, pictures, sampling, progress, on_token)
        return replies[0] if isinstance(question, str) else replies

    def answer(
        self,
        questions: Sequence[str],
        pictures: Pictures,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Reply]:
        """``ask`` about media that are chosen already (``Prompts.choose``)."""
        sampling = sampling or self.sampling()
        documents = [self.prompts.document(question, pictures) for question in questions]
        longest, known = max(map(len, documents)) + sampling.max_new_tokens, self.config.model.llm.max_positions
        if longest > known:
            logger.warning(
                "warning: %d tokens go beyond model.llm.max_positions=%d: later positions are new to the model; take fewer "
                "frames if the answer is worthless",
                longest,
                known,
            )
        started_s = time.perf_counter()
        requests = []
        for document in documents:
            prefix, tail = self.read(document, progress, len(questions) * sampling.max_new_tokens)
            requests.append(Request(prefix, tail))
        read_s = time.perf_counter() - started_s
        answers = self.engine.answer(requests, sampling, on_token)
        return [
            Reply(
                question=question,
                text=self.text(answer.token_ids),
                token_ids=answer.token_ids,
                tail=request.tail,
                stopped_by=answer.stopped_by,
                frames=sum(frame.unit.frames for frame in document.frames),
                prompt_tokens=len(document),
                read_s=read_s,
                first_token_s=answer.first_token_s,
                decode_s=answer.decode_s,
            )
            for question, document, request, answer in zip(questions, documents, requests, answers, strict=True)
        ]

    def read(
        self, document: Document, progress: Progress | None = None, answer_tokens: int = 0, *, over_last: bool = False
    ) -> tuple[Prefix | None, np.ndarray]:
        """The prefix of ``document``, read unless it is held, and the tail of it that is the question.

        The one held before goes; with ``over_last`` nobody else holds it either, and what fits is read over it
        (``Engine.prefill``). Collective. Raises ``SettingError`` on every rank, before anything is decoded, if the cache and
        ``answer_tokens`` more do not fit: with how many frames would.
        """
        beginning, tail = self.engine.split(document)
        if beginning is None:
            return None, tail
        if self.prefix is self._given and self.prefix is not None and _is_of(self.prefix, beginning):
            return self.prefix, tail
        key = document_key(beginning, self.pictures.hashes, self.identity)
        if self.prefix is not None and self.prefix.key == key:
            return self.prefix, tail
        last, self.prefix, self._given = self.prefix, None, None
        if not over_last or last is None or not self.engine.has_room(last, beginning):
            last = None  # its memory is free now
            self._require_room(document, answer_tokens)
        self.prefix = self.engine.prefill(beginning, self.pictures, key, progress, instead_of=last)
        return self.prefix, tail

    def hold(self, prefix: Prefix) -> None:
        """Go on with a prefix that was read elsewhere, such as a snapshot. Its files need not be there any more."""
        self.prefix = self._given = prefix
        self.engine.hold(prefix)

    def pictures_of(self, prefix: Prefix) -> Pictures:
        """The media of a prefix, to ask about again."""
        frames, pictures, first = prefix.document.frames, [], 0
        for units in prefix.document.media or (len(frames),):
            pictures.append(frames[first : first + units])
            first += units
        return tuple(pictures)

    def sampling(self, **settings: float | int) -> Sampling:
        """Settings of ``Sampling`` with the tokens that end an answer of this model."""
        own = self.tokenizer.eos_token_id
        stops = dict.fromkeys([*self.encoder.stops, *([own] if own is not None else [])])
        return Sampling(**settings, stop_ids=tuple(stops))  # type: ignore[arg-type]

    def text(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """Tokens of an answer as text."""
        return str(self.tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=True)).strip()

    def _require_room(self, document: Document, answer_tokens: int) -> None:
        problem = self._room_problem(document, answer_tokens)
        if problem:
            accelerator.collect_garbage()  # takes a good part of a second, and may free what nobody needs any more
            problem = self._room_problem(document, answer_tokens)
        if problem:
            raise SettingError(problem)

    def _room_problem(self, document: Document, answer_tokens: int) -> str | None:
        """Why ``document`` does not fit, the same on all ranks. An all-gather of a number over the block."""
        engine = self.engine
        element, device_bytes = engine.dtype.itemsize, accelerator.device_memory_bytes()
        memory, small = (
            cache_memory(self.config, kind, engine.chunk_tokens, element, device_bytes) for kind in (self._cache, "fp8")
        )
        mine = accelerator.room_bytes() - memory.work - _MARGIN_BYTES
        room = min(gathered(mine, self.topology.block_cpu))
        others = [small] if small.per_token < memory.per_token else []
        wanted = self.prompts.wanted(document, answer_tokens)
        return cache_problem(self.config, wanted, memory, room, others)


def _is_of(prefix: Prefix, beginning: Document) -> bool:
    held = prefix.document
    return held.frames == beginning.frames and np.array_equal(held.token_ids, beginning.token_ids)
