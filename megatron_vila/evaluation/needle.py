"""Needle in a video haystack (LongVILA section 4.3, after LongVA's V-NIAH): does the model find one picture among many frames?

A picture that answers a question, the needle, is put into a long video at a depth. A cell of the test is a number of frames, the
needle among them, and a depth; its score is the share of the needles whose question was answered. There are two modes:

* ``teacher-forcing``, the paper's: one forward pass over prompt and answer; at each token of the answer the arg-max must be that
  token, given all tokens before it.
* ``generate``: the answer is written token by token with the cache, as users get it, and is compared as text. It is the harder
  test: the model must begin by itself, go on from its own words, and stop.

The haystack of a cell are the first frames of one long video, so all cells see the same frames, and each frame is encoded once.
Prompts are those of training: its chat template, its text rules, the video before the question.

Legend: N frames of a cell, L tokens, A tokens of an answer.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vila.config.text_rules import TextRules
from megatron_vila.data.placement import VIDEO, Turn, place_media
from megatron_vila.errors import SettingError
from megatron_vila.evaluation.grid import GENERATE, MODES, Cell
from megatron_vila.evaluation.haystack import Haystack, Needle, needle_frame
from megatron_vila.evaluation.results import Answered, CellResult, Results
from megatron_vila.generate.engine import Request
from megatron_vila.generate.loaded import LoadedModel
from megatron_vila.plan.pictures import pictures_of
from megatron_vila.plan.row import Document

_AT_ONCE = 65536
"""Tokens of prompts that are asked at once."""

_BEYOND = 16
"""Tokens that an answer may have beyond the longest expected one: a model that goes on without an end is wrong anyway."""


@dataclass(frozen=True)
class Question:
    """The ``prompt`` up to where the answer begins.

    For teacher forcing, ``forced`` int64 [L] are the tokens behind the last frame, up to the one before the last of the expected
    answer; after those at ``places`` int64 [A] the model must predict the answer's tokens.
    """

    prompt: Document
    forced: np.ndarray
    places: np.ndarray


class NeedleTest:
    """Asks ``loaded`` for the ``needles`` in ``haystack``. Collective: every method is called alike by all ranks.

    Raises ``SettingError`` for another ``mode`` than those of ``MODES``.
    """

    def __init__(self, loaded: LoadedModel, haystack: Haystack, needles: Sequence[Needle], mode: str) -> None:
        if mode not in MODES:
            raise SettingError(f"--mode {mode} is unknown; use {' or '.join(MODES)}")
        self._loaded, self._haystack, self._needles, self._mode = loaded, haystack, needles, mode

    def run(self, cells: Sequence[Cell], results: Results, save: Callable[[], None], asked: Callable[[], None]) -> None:
        """Add to ``results`` the cells that are not there yet, ``save`` after each; ``asked`` is called after each question."""
        for cell in cells:
            if (cell.frames, cell.depth) in results.cells:
                continue
            started = time.monotonic()
            questions = [self.question(cell, needle) for needle in self._needles]
            answers: list[Answered] = []
            for numbers in together([len(question.prompt) for question in questions]):
                texts = self._texts([questions[number] for number in numbers])
                answers += [self._judged(number, text) for number, text in zip(numbers, texts, strict=True)]
                for _ in numbers:
                    asked()
            tokens = max(len(question.prompt) for question in questions)
            seconds = round(time.monotonic() - started, 3)
            results.add(CellResult(cell.frames, cell.depth, cell.place, tokens, seconds, tuple(answers)))
            save()

    def question(self, cell: Cell, needle: Needle) -> Question:
        """The conversation as training tokenizes it. Raises ``SettingError`` for an answer that has no token."""
        config, encoder = self._loaded.config, self._loaded.encoder
        units = pictures_of(config.model).units(cell.frames, True)
        rest = iter(range(len(self._haystack)))
        frames = tuple(
            needle_frame(needle, unit) if number == cell.place else self._haystack.frame(next(rest), unit)
            for number, unit in enumerate(units)
        )
        asked = f"{VIDEO}\n{needle.question}"
        prompt = self._loaded.prompts.document(asked, [frames], f"{cell.frames} frames, needle {needle.picture}")
        said = Turn("user", asked), Turn("assistant", needle.answer)
        turns, _ = place_media(said, 0, 1, TextRules.of(config.data).media_format)
        after_video = encoder.encode(turns)[-1]
        (answered,) = np.nonzero(after_video.supervised)
        answered = answered[~np.isin(after_video.token_ids[answered], encoder.stops)]
        if not len(answered):
            raise SettingError(
                f"the answer {needle.answer!r} of {needle.picture} has no token under the model's chat template"
            )
        # The separators behind the last frame belong to the tail as well.
        between = np.array(config.data.frame_separator_ids, dtype=np.int64)
        forced = np.concatenate([between, after_video.token_ids[: answered[-1]]])
        return Question(prompt, forced, len(between) + answered - 1)

    def _texts(self, questions: Sequence[Question]) -> list[str]:
        """What the model answers to questions that are asked at once, without white space around it."""
        loaded, requests = self._loaded, []
        room = max(len(question.places) for question in questions) + _BEYOND
        for question in questions:
            prefix, tail = loaded.read(question.prompt, answer_tokens=room, over_last=len(questions) == 1)
            requests.append(Request(prefix, tail if self._mode == GENERATE else question.forced))
        if self._mode == GENERATE:
            answers = loaded.engine.answer(requests, loaded.sampling(max_new_tokens=room))
            return [loaded.text(answer.token_ids) for answer in answers]
        predicted = loaded.engine.predictions(requests)
        return [loaded.text(ids[question.places]) for ids, question in zip(predicted, questions, strict=True)]

    def _judged(self, number: int, answer: str) -> Answered:
        expected = self._needles[number].answer
        return Answered(number, expected, answer, normalized(answer) == normalized(expected))


def together(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of questions, in order, in groups that are asked at once: each holds prompts of at most ``_AT_ONCE`` tokens in all,
    or one longer prompt alone, so that a cache of one long video is all that memory has to hold."""
    groups: list[list[int]] = []
    room = 0
    for number, length in enumerate(lengths):
        if length > room:
            groups.append([])
            room = _AT_ONCE
        groups[-1].append(number)
        room -= length
    return groups


def normalized(text: str) -> str:
    """What of an answer is compared: letters and digits alone, in one case. (The paper takes out spaces and case.)"""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(sign for sign in folded if sign.isalnum()) or folded.strip()
