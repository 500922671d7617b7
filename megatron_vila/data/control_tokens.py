"""Tokenizing text in which some control tokens are only text.

A control token is a special token of the tokenizer (``<|im_end|>``), or a name that VILA gives to media. The one that a chat
template writes has its meaning; the same characters in a message are characters. Before a template renders messages, ``mark``
puts signs in place of the control tokens in them; ``encode`` reads the signs as text.

Text without signs is tokenized as the tokenizer does it. Text with signs goes through a copy of the tokenizer in which the
control tokens have private names, which stand for those that the template wrote: so what is left is text to it, whatever stands
beside it, with the same rules and ids.

Legend: L tokens, C characters.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from megatron_vila.data.placement import IMAGE, VIDEO
from megatron_vila.data.signs import CONTROL_TEXT, CONTROL_TOKEN
from megatron_vila.errors import UserError

MEDIA_NAMES = (IMAGE, VIDEO, "<vila/video>", "<vila/sentinel>")
# What some tokenizers make of characters that their vocabulary lacks.
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_FIRST = 0xF0000


@functools.lru_cache(maxsize=4)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """The ``ControlTokens`` of a tokenizer, made once."""
    return ControlTokens(tokenizer)


class ControlTokenError(UserError, ValueError):
    """A control token that is only text cannot be told from a real one."""


class ControlTokens:
    """The control tokens of a fast ``tokenizer``, whose ids are ``ids`` (int64, ascending). Safe for threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._names = tuple(
            sorted(
                {
                    token.content
                    for token in added.values()
                    if (token.special or token.content in MEDIA_NAMES) and not _BYTE.fullmatch(token.content)
                },
                # The longest first, as tokenizers match them.
                key=lambda name: (-len(name), name),
            )
        )
        self._place = {name: place for place, name in enumerate(self._names)}
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or "(?!)")
        self._parts = re.compile(f"{CONTROL_TEXT}(?P<text>.)|(?P<token>{self._pattern.pattern})", re.DOTALL)
        ids = {id_ for id_, token in added.items() if token.content in self._place and token.content != tokenizer.unk_token}
        self.ids = np.array(sorted(ids), dtype=np.int64)

    def mark(self, value: Any) -> Any:
        """``value`` with signs for the control tokens in every text of it: a text, or lists and dicts of texts."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: CONTROL_TEXT + chr(_FIRST + self._place[found[0]]), value)
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def shown(self, text: str) -> str:
        """Marked ``text`` for people."""
        return re.sub(f"{CONTROL_TEXT}(.)", lambda found: self._names[ord(found[1]) - _FIRST], text, flags=re.DOTALL)

    def end_of_token(self, text: str, at: int) -> int:
        """The end of the control token that begins at character ``at`` of a rendered text; -1 if there is none."""
        found = self._pattern.match(text, at)
        return found.end() if found else -1

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [L] of marked ``text``, and for each its first and last character in ``text``, int64 [L, 2] (end exclusive).

        Raises ``ControlTokenError`` if the tokenizer makes a control token of what is text.
        """
        ids, places_L2 = _encode(self._tokenizer, text)
        written = sum(found["token"] is not None for found in self._parts.finditer(text))
        if CONTROL_TEXT not in text and np.isin(ids, self.ids).sum() <= written:
            return ids, places_L2
        renamed, origins_C2 = self._renamed(text)
        encoding = self._copy.encode(renamed, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int64)
        if np.isin(ids, self.ids).sum() > written:
            raise ControlTokenError("the tokenizer makes a control token of the characters of a text")
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        ends = np.where(ends > 0, origins_C2[np.maximum(ends, 1) - 1, 1], 0)
        return ids, np.stack([np.minimum(origins_C2[starts, 0], ends), ends], axis=1)

    def _renamed(self, text: str) -> tuple[str, np.ndarray]:
        """The text for the copy; and for each of its characters, and its end, the first and last character of ``text`` that
        it comes from: int64 [C + 1, 2] (end exclusive)."""
        pieces, sources, at = [], [], 0

        def keep(end: int) -> None:
            pieces.append(text[at:end])
            sources.append(np.arange(at, end)[:, None] + [0, 1])

        for found in self._parts.finditer(text):
            keep(found.start())
            if found["token"] is None:
                pieces.append(self._names[ord(found["text"]) - _FIRST])
            else:
                pieces.append(_private(self._place[found["token"]]))
            sources.append(np.tile(found.span(), (len(pieces[-1]), 1)))
            at = found.end()
        keep(len(text))
        sources.append(np.array([[len(text)] * 2]))
        return "".join(pieces), np.concatenate(sources)

    @functools.cached_property
    def _copy(self) -> Tokenizer:
        """The tokenizer with private names for its control tokens, in its vocabulary too: no text can give their ids."""
        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        private = {name: _private(place) for name, place in self._place.items()}
        for token in content["added_tokens"]:
            token["content"] = private.get(token["content"], token["content"])
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {private.get(piece, piece): id_ for piece, id_ in model["vocab"].items()}
        else:
            model["vocab"] = [[private.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in private:
            model["unk_token"] = private[model["unk_token"]]
        if "merges" in model:
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & private.keys()]
        copy = Tokenizer.from_str(json.dumps(content))
        copy.no_truncation()
        copy.no_padding()
        for name, renamed in private.items():
            if copy.token_to_id(renamed) != self._tokenizer.convert_tokens_to_ids(name):
                raise ControlTokenError(f"the tokenizer does not let {name} be told from text")
        return copy


def _private(place: int) -> str:
    return CONTROL_TOKEN + chr(_FIRST + place)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    return ids, np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
