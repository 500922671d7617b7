"""The token strip of a document: its tokens as text, what of them is trained, and a block for each medium.

Legend: L tokens of the document.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_vila.data.chat import media_runs
from megatron_vila.data.control_tokens import control_tokens
from megatron_vila.plan.row import IGNORE, Document

LONGEST_CHARACTER = 16
"""Most tokens that may be needed for one character: what is not one by then is shown as it is."""

_LETTERS = {ord(control): chr(0x2400 + ord(control)) for control in map(chr, range(32))} | {
    ord("\n"): "↵\n",
    ord("\t"): "⇥\t",
    0x7F: "␡",
}
# Signs that turn the direction of all text behind them would turn the page's own.
_TURNING = {turning: f"[U+{turning:04X}]" for turning in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_VISIBLE = _LETTERS | _TURNING


@dataclass(frozen=True)
class Token:
    """A token at ``place`` of its document. ``label`` is the id that this place must predict, None where it predicts nothing."""

    place: int
    id: int
    label: int | None
    is_control: bool


@dataclass(frozen=True)
class Written:
    """Text that ``tokens`` write together: mostly one; several where each holds only bytes of a character."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Stretch:
    """Text of which all is trained, or nothing."""

    trained: bool
    written: tuple[Written, ...]
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Block:
    """The places ``first`` to before ``end`` of medium number ``medium``."""

    medium: int
    first: int
    end: int
    kind: str = field(default="medium", init=False)


@dataclass(frozen=True)
class Gap:
    """So many tokens of text that are not shown."""

    tokens: int
    kind: str = field(default="gap", init=False)


Part = Stretch | Block | Gap


@dataclass(frozen=True)
class Strip:
    """The parts of a document, and what the vocabulary calls each id that occurs: its piece."""

    parts: tuple[Part, ...]
    pieces: dict[int, str]


def strip_of(document: Document, tokenizer: PreTrainedTokenizerBase, most: int) -> Strip:
    """The strip with at most ``most`` tokens of text, half of them from the start and half from the end of the document."""
    trained_L = np.concatenate([[False], document.labels[:-1] != IGNORE])
    runs = media_runs(document)
    texts = [
        range(a, b)
        for a, b in zip([0, *(run.end for run in runs)], [*(run.first for run in runs), len(document)], strict=True)
    ]
    in_all = sum(map(len, texts))
    hidden = range(most - most // 2, in_all - most // 2) if in_all > most else range(0)
    parts: list[Part] = []
    before = 0
    for number, text in enumerate(texts):
        parts += _text_parts(document, tokenizer, trained_L, text, before, hidden)
        before += len(text)
        if number < len(runs):
            parts.append(Block(number, runs[number].first, runs[number].end))
    shown = [
        token for part in parts if isinstance(part, Stretch) for written in part.written for token in written.tokens
    ]
    ids = {token.id for token in shown} | {token.label for token in shown if token.label is not None}
    return Strip(tuple(parts), {id_: visible(str(tokenizer.convert_ids_to_tokens(id_))) for id_ in sorted(ids)})


def visible(text: str) -> str:
    """``text`` with signs for what would not be seen: line ends, tabs, control characters and changes of direction."""
    return text.translate(_VISIBLE).encode("utf-8", "backslashreplace").decode()


def written(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, str]]:
    """``token_ids`` in groups that write whole characters: how many tokens, and their text.

    Many tokenizers write a character of several bytes with several tokens, and none of them is text by itself.
    """
    start = read = 0
    for end in range(1, len(token_ids) + 1):
        # With the group before it: some decoders take away the space that begins a text.
        known, text = _decoded(token_ids[start:read], tokenizer), _decoded(token_ids[start:end], tokenizer)
        whole = len(text) > len(known) and not text.endswith("\ufffd")
        if whole or end == len(token_ids) or end - read == LONGEST_CHARACTER:
            yield end - read, text[len(known) :]
            start, read = read, end


def _decoded(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _text_parts(
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    trained_L: np.ndarray,
    text: range,
    before: int,
    hidden: range,
) -> Iterator[Part]:
    """The tokens ``text``, before which there are ``before`` others of text; those ``hidden`` (counted so) become a gap."""
    first, end = (min(max(text.start + bound - before, text.start), text.stop) for bound in (hidden.start, hidden.stop))
    yield from _stretches(document, tokenizer, trained_L, range(text.start, first))
    if first < end:
        yield Gap(end - first)
    yield from _stretches(document, tokenizer, trained_L, range(max(first, end), text.stop))


def _stretches(
    document: Document, tokenizer: PreTrainedTokenizerBase, trained_L: np.ndarray, places: range
) -> Iterator[Stretch]:
    edges = np.flatnonzero(np.diff(trained_L[places.start : places.stop])) + places.start + 1
    for start, end in itertools.pairwise([places.start, *edges.tolist(), places.stop]):
        if start < end:
            yield Stretch(bool(trained_L[start]), tuple(_written(document, tokenizer, range(start, end))))


def _written(document: Document, tokenizer: PreTrainedTokenizerBase, places: range) -> Iterator[Written]:
    ids, labels = document.token_ids, document.labels
    is_control = np.isin(ids[places.start : places.stop], control_tokens(tokenizer).ids)
    edges = np.flatnonzero(is_control | np.concatenate([[False], is_control[:-1]])) + places.start
    for start, end in itertools.pairwise([places.start, *edges.tolist(), places.stop]):
        control = end == start + 1 and bool(is_control[start - places.start])
        for count, text in written(ids[start:end].tolist(), tokenizer):
            tokens = tuple(
                Token(place, int(ids[place]), None if labels[place] == IGNORE else int(labels[place]), control)
                for place in range(start, start + count)
            )
            yield Written(visible(text or str(tokenizer.convert_ids_to_tokens(tokens[0].id))), tokens)
            start += count
