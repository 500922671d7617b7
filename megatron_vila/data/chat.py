"""Conversations to tokens: the chat template, label spans of assistant turns, places of pictures.

The template comes from the tokenizer, or is one of VILA's by name. What the model is trained to write is found as spans of
characters: a conversation is rendered up to each assistant turn, once as it is and once with another answer; what differs is the
answer, what follows it is the stop token. So an answer of several lines is trained whole, and nothing is matched token by token
(LongVILA's own masking loses the first line break of an answer). The text is cut at the markers of its human turns, which
``placement.py`` has put where the media stand, and each piece is tokenized on its own; control tokens in the turns are text
(``control_tokens.py``).

Legend: L tokens, F frames, C characters.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_vila.config.text_rules import DEFAULT, TextRules
from megatron_vila.data.control_tokens import ControlTokenError, ControlTokens
from megatron_vila.data.media import name_of
from megatron_vila.data.placement import DOCUMENT, MARKED, Turn, unreadable
from megatron_vila.data.signs import MEDIUM, OTHER_TEXT, with_signs
from megatron_vila.data.template import ChatTemplate, ChatTemplateError, RenderError
from megatron_vila.plan.pictures import in_units, tokens_each
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Document, FrameRef


@dataclass(frozen=True)
class Segment:
    """Text between two pictures: ``token_ids`` int64 [L], and ``supervised`` bool [L], true where the model learns to write."""

    token_ids: np.ndarray
    supervised: np.ndarray


class ChatEncoder:
    """Encodes conversations with ``tokenizer`` by ``rules``, which also name the chat template.

    No special token is added to what the tokenizer's template writes, so there is one BOS if the template writes one, else none.
    Under a template of VILA's the tokenizer's own BOS comes first, as in VILA's code (with Llama 3 there are two).

    Raises ``ChatTemplateError`` if the tokenizer has no chat template or no character offsets, or if the template changes
    earlier turns when later ones follow (reasoning templates that drop old thoughts do): spans could not be found then.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: TextRules = DEFAULT) -> None:
        self.tokenizer, self.rules = tokenizer, rules
        if not tokenizer.is_fast:
            raise ChatTemplateError(
                f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} gives no character offsets; save its fast form "
                "(tokenizer.json)"
            )
        self._template = ChatTemplate(tokenizer, rules.template, rules.template_clock)
        self._control = ControlTokens(tokenizer)
        self._start = own_start(tokenizer, rules)
        try:
            self.stops = self._stops()
        except RenderError as error:
            raise ChatTemplateError(f"{self._template.label} cannot be rendered: {error}") from error

    def encode(self, turns: Sequence[Turn]) -> tuple[Segment, ...]:
        """Tokens of a conversation, cut at the markers of its human turns: one segment more than there are markers (some may be
        empty). What is escaped there becomes the word.

        A document is not put into the template: the tokenizer's own first tokens, the text and the token that ends a text, all
        supervised but the first tokens.

        Raises ``RenderError`` for a text that no tokenizer can read, and if the template refuses the conversation or does not
        show each marker once.
        """
        for turn in turns:
            if problem := unreadable(turn.text):
                raise RenderError(f"the text of a turn {problem}")
        turns = [turn._replace(text=with_signs(turn.text)) if turn.role in MARKED else turn for turn in turns]
        if not self.rules.parse_control_tokens:
            turns = [turn._replace(text=self._control.mark(turn.text)) for turn in turns]
        if any(turn.role == DOCUMENT for turn in turns):
            (document,) = turns
            return self._document(document.text)
        text, spans = self.spans(turns)
        wanted_C = np.zeros(len(text), dtype=bool)
        for start, end in spans:
            wanted_C[start:end] = True
        markers = [m.span() for m in MEDIUM.finditer(text)]
        asked = sum(len(MEDIUM.findall(turn.text)) for turn in turns)
        if len(markers) != asked:
            raise RenderError(f"the chat template shows {len(markers)} of {asked} media markers")
        cuts = [0, *(place for marker in markers for place in marker), len(text)]
        segments = [self._tokenize(text[a:b], wanted_C[a:b]) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
        return (_joined(_unsupervised(self._start), segments[0]), *segments[1:])

    def prompt(self, turns: Sequence[Turn]) -> tuple[Segment, ...]:
        """Tokens of a conversation that ends with a human turn, and of what training shows before the answer to it; cut and
        raising as ``encode``.

        Nothing of it depends on the answer: a token that one answer shares with the text before it is the model's to write.
        """
        *before, last = self.encode([*turns, Turn("assistant", "a")])
        *_, other = self.encode([*turns, Turn("assistant", "1")])
        heads = [segment.token_ids[: _last_answer(segment)] for segment in (last, other)]
        shared = len(os.path.commonprefix([head.tolist() for head in heads]))
        return (*before, _unsupervised(last.token_ids[:shared]))

    def _document(self, text: str) -> tuple[Segment, ...]:
        if self.tokenizer.eos_token_id is None:
            raise RenderError("the tokenizer has no token that ends a text (eos_token), so a text cannot be trained as a whole")
        segments = [self._tokenize(piece, np.ones(len(piece), dtype=bool)) for piece in MEDIUM.split(text)]
        end = Segment(np.array([self.tokenizer.eos_token_id], dtype=np.int64), np.ones(1, dtype=bool))
        segments[0] = _joined(_unsupervised(first_tokens(self.tokenizer)), segments[0])
        segments[-1] = _joined(segments[-1], end)
        return tuple(segments)

    def spans(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and the (start, end) characters of each answer with its stop token.

        White space after the stop token is left out. Where a template ends an answer with white space alone, that is its stop.
        A template may end the last answer with another control token than earlier ones.
        """
        text, spans, done, since = self._render(turns), [], 0, 0
        head: tuple[Sequence[Turn], int] = ((), 0)
        for k, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            # Most templates write a piece alike after all turns and after the first ones: rendering all again for each answer
            # would take time with the square of their number.
            own = turns[since : k + 1]
            found = self._span(text, done, *head, own) or self._span(text, done, turns[:since], done, own)
            if found is None:
                raise ChatTemplateError(
                    f"{self._template.label} changes earlier turns when later ones follow, so the answers cannot be told from "
                    "the rest; use a template that only appends"
                )
            start, end, done = found
            spans.append((start, end))
            head = head if since else (turns[: k + 1], done)
            since = k + 1
        return text, spans

    def _span(
        self, text: str, done: int, before: Sequence[Turn], begin: int, own: Sequence[Turn]
    ) -> tuple[int, int, int] | None:
        """Start and end of the answer that ends ``own`` in ``text``, which holds the piece of ``own`` from ``done`` on, and the
        end of that piece; None if the template writes another piece behind ``before``, where it begins at ``begin``."""
        shown = self._render([*before, *own])
        varied = self._render([*before, *own[:-1], Turn("assistant", OTHER_TEXT)])
        start = begin + len(os.path.commonprefix([shown[begin:], varied[begin:]]))
        suffix = os.path.commonprefix([shown[start:][::-1], varied[start:][::-1]])[::-1]
        answered = len(shown) - len(suffix)
        end = len(shown) - (len(suffix) - len(suffix.rstrip()) if suffix.strip() else 0)
        behind, shift = len(shown), done - begin
        if not text.startswith(shown[begin:], done):
            # shown ends with the stop of a last answer: among more turns another one may stand there.
            end = behind = self._control.end_of_token(text, answered + shift) - shift
        alike = shown[:begin] == varied[:begin] == text[:begin] and text.startswith(shown[begin:answered], done)
        return (start + shift, end + shift, behind + shift) if alike and behind >= answered else None

    def fingerprint(self) -> str:
        """A hash of the vocabulary, the splitting rules, the template and the rules."""
        content = self.tokenizer.backend_tokenizer.to_str() + self._template.text + repr(astuple(self.rules))
        return hashlib.sha256(content.encode()).hexdigest()

    def _stops(self) -> tuple[int, ...]:
        """Ids of the control tokens that end an answer, in the middle of a conversation and at its end."""
        text, spans = self.spans(
            [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")]
        )
        found = [self._control.encode(text[start + 1 : end])[0] for start, end in spans]
        return tuple(dict.fromkeys(int(ids[0]) for ids in found if len(ids) == 1))

    def _render(self, turns: Sequence[Turn]) -> str:
        return self._template.render([{"role": turn.role, "content": turn.text} for turn in turns])

    def _tokenize(self, text: str, wanted_C: np.ndarray) -> Segment:
        if not text:
            return Segment(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool))
        try:
            token_ids, places_L2 = self._control.encode(text)
        except ControlTokenError as error:
            raise RenderError(f"{error}; set data.parse_control_tokens=true, or take it out of the text") from error
        starts, ends = places_L2.T
        # Byte-level tokenizers cut spaces off the offsets and give all pieces of one character the same ones.
        ends = np.maximum.accumulate(ends)
        previous = np.concatenate([[0], ends[:-1]])
        wanted_before = np.concatenate([[0], np.cumsum(wanted_C)])
        supervised = wanted_before[ends] > wanted_before[np.minimum(starts, previous)]
        return Segment(token_ids, supervised)


def _unsupervised(token_ids: np.ndarray) -> Segment:
    return Segment(token_ids, np.zeros(len(token_ids), dtype=bool))


def _last_answer(segment: Segment) -> int:
    """Where the last run of supervised tokens begins."""
    begins = np.flatnonzero(segment.supervised & ~np.append(False, segment.supervised[:-1]))
    return int(begins[-1])


def _joined(first: Segment, second: Segment) -> Segment:
    return Segment(
        np.concatenate([first.token_ids, second.token_ids]), np.concatenate([first.supervised, second.supervised])
    )


def own_start(tokenizer: PreTrainedTokenizerBase, rules: TextRules) -> np.ndarray:
    """What stands before the text of a template of VILA's: the tokens that the tokenizer puts before any text, int64 [L]."""
    return first_tokens(tokenizer) if rules.template else np.zeros(0, dtype=np.int64)


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The tokens that the tokenizer puts before any text, int64 [L]."""
    plain, full = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    return np.array(full[: full.index(plain[0])], dtype=np.int64)


def assemble(
    segments: Sequence[Segment],
    pictures: Sequence[Sequence[FrameRef]],
    image_separator_ids: Sequence[int],
    frame_separator_ids: Sequence[int],
    sample_id: str,
) -> Document:
    """Put the frames ``pictures[k]`` of medium k between segments k and k + 1.

    Each unit becomes ``tokens`` places of MEDIA_TOKEN, followed by the separator ids of its kind; neither is supervised. The
    labels are shifted here, over the whole document, and never again.
    """
    separators = {
        is_video: np.array(ids, dtype=np.int64)
        for is_video, ids in ((False, image_separator_ids), (True, frame_separator_ids))
    }
    ids, supervised, starts, length = [], [], [], 0

    def append(token_ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        nonlocal length
        ids.append(token_ids)
        supervised.append(np.zeros(len(token_ids), dtype=bool) if mask is None else mask)
        length += len(token_ids)

    append(segments[0].token_ids, segments[0].supervised)
    for frames, segment in zip(pictures, segments[1:], strict=True):
        for frame in frames:
            starts.append(length)
            append(np.full(frame.tokens, MEDIA_TOKEN, dtype=np.int64))
            append(separators[frame.is_video])
        append(segment.token_ids, segment.supervised)
    token_ids, wanted = np.concatenate(ids), np.concatenate(supervised)
    labels = np.full(length, IGNORE, dtype=np.int64)
    labels[:-1] = np.where(wanted[1:], token_ids[1:], IGNORE)
    frames = tuple(frame for medium in pictures for frame in medium)
    return Document(token_ids, labels, frames, np.array(starts, dtype=np.int64), sample_id, tuple(map(len, pictures)))


def describe(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """The document as text for the log: ``{...}`` stands for pictures, ``[[...]]`` encloses what the model learns to write.

    Separators between the frames of a video are not shown, those after the last frame are.
    """
    supervised_L = np.concatenate([[False], document.labels[:-1] != IGNORE])
    text, at = "", 0
    for run in media_runs(document):
        text += _text(document.token_ids[at : run.first], supervised_L[at : run.first], tokenizer) + f"{{{_label(run)}}}"
        at = run.end
    text += _text(document.token_ids[at:], supervised_L[at:], tokenizer)
    return f"sample {document.sample_id}: {len(document)} tokens, {int(supervised_L.sum())} supervised\n{text}"


class MediaRun(NamedTuple):
    """What fills the places from ``first`` to before ``end`` of a document: an image, or the frames of a video and the separators
    between them."""

    first: int
    end: int
    frames: tuple[FrameRef, ...]


def media_runs(document: Document) -> list[MediaRun]:
    """The media of an assembled document, in their order."""
    starts, runs, first = document.frame_starts.tolist(), [], 0
    for units in document.media:
        frames = document.frames[first : first + units]
        first += units
        runs.append(MediaRun(starts[first - units], starts[first - 1] + frames[-1].tokens, frames))
    return runs


def _label(run: MediaRun) -> str:
    units, source = [frame.unit for frame in run.frames], name_of(run.frames[0].source)
    name = f"{sum(unit.frames for unit in units)} {in_units(units)} of {source}" if run.frames[0].is_video else source
    return f"{name}, {tokens_each(units)} tokens each"


def _text(token_ids: np.ndarray, supervised_L: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    text, edges = "", np.flatnonzero(np.diff(supervised_L)) + 1
    for start, end in itertools.pairwise([0, *edges.tolist(), len(token_ids)]):
        words = str(tokenizer.decode(token_ids[start:end].tolist()))
        text += f"[[{words}]]" if end > start and supervised_L[start] else words
    return text
