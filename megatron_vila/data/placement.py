r"""Where the pictures and videos of a conversation stand, and what its text is then.

``<image>`` and ``<video>`` in a human turn or a document are *markers*: they say that media belong there and are no text.
``\<image>`` and ``\<video>`` are the words themselves. In a system text and in an answer a marker is text, as it is where there
are no media.

Two rules place the media. ``vila`` is that of VILA's ``LLaVADataset`` (and of LongVILA for videos): markers are taken out with
their line break, all media stand before the first human turn, images before videos, and every turn is stripped of white space
at both ends. ``verbatim`` leaves the text as it is and each medium at its marker.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_vila.errors import UserError

IMAGE, VIDEO = "<image>", "<video>"

DOCUMENT = "document"
"""The role of a text that is trained as a whole and is no part of a conversation."""

MARKED = ("user", DOCUMENT)
"""The roles in whose texts markers stand for media."""

_WORD = re.compile("<(?:image|video)>")
# Begun with the character to look for, a search is many times as fast as with the look behind it: both words have 7 characters.
MARKER = re.compile(rf"{_WORD.pattern}(?<!\\.{{7}})")
"""What stands for one picture or video in a human turn."""

RESERVED = re.compile("[\ufdd0-\ufdef]")
"""Code points that are no characters in any text; the encoder uses them as signs of its own."""

_ESCAPED = re.compile(rf"\\({_WORD.pattern})")
_HIDDEN = {IMAGE: "\ufdd0", VIDEO: "\ufdd1"}
# White space is never given back, so a long run of it costs no more than its length.
_PLACED = re.compile(rf"\A\s*+{MARKER.pattern}[ \t]*+(?:\r?\n|\Z)|(?:\A|\n)[ \t]*+{MARKER.pattern}\s*+\Z")
_UNREADABLE = re.compile(f"{RESERVED.pattern}|[\ud800-\udfff\0]")


class PlacementError(UserError, ValueError):
    """Media and markers of a conversation do not fit; the text says how, and what to do."""


class Turn(NamedTuple):
    """One turn of a conversation; ``role`` is system, user or assistant. A turn of the role ``document`` stands alone."""

    role: str
    text: str


def unreadable(text: str) -> str:
    """What is wrong with a text that no tokenizer can read, because it holds what is not a character; empty for any other."""
    if text.isascii() and "\0" not in text:  # known without a look at each character
        return ""
    found = _UNREADABLE.search(text)
    return f"holds U+{ord(found[0]):04X}, which is not a character; remove it" if found else ""


def place_media(turns: Sequence[Turn], images: int, videos: int, rule: str) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Turns in which every unescaped marker of a human turn stands for one medium, and these markers in their order.

    A conversation with so many ``images`` and ``videos``; ``rule`` is one of ``MEDIA_FORMATS``. Images keep their order among
    themselves, as videos do. In a document each medium stays at its marker under every rule, as in VILA's sets of documents.
    Placing twice changes nothing. Raises ``PlacementError`` for media that no human turn can take, and
    for markers that do not fit.
    """
    for turn in turns:
        if not turn.text.isascii() and (found := RESERVED.search(turn.text)):
            raise PlacementError(f"the text holds U+{ord(found[0]):04X}, which is not a character; remove it")
    roles = [turn.role for turn in turns]
    moves = rule == "vila" and DOCUMENT not in roles
    if moves:
        turns = [Turn(turn.role, turn.text.strip()) for turn in turns]
    if not images + videos:
        return tuple(_marked(turns, _as_words)), ()
    if "user" not in roles and DOCUMENT not in roles:
        raise PlacementError("there are media, but no human turn to put them before")
    if moves:
        return tuple(_media_first(turns, images, videos)), (IMAGE,) * images + (VIDEO,) * videos
    turns = _media_in_place(turns, images, videos)
    return tuple(turns), tuple(_markers(turns))


def escape(text: str) -> str:
    """A human turn that means ``text``, its markers being words."""
    return _WORD.sub(r"\\\g<0>", text)


def unescape(text: str) -> str:
    """The text that a human turn without markers means."""
    return _ESCAPED.sub(r"\1", text)


def _marked(turns: Sequence[Turn], change: Callable[[str], str]) -> list[Turn]:
    marked = DOCUMENT if turns[0].role == DOCUMENT else "user"
    return [Turn(turn.role, change(turn.text)) if turn.role == marked else turn for turn in turns]


def _markers(turns: Sequence[Turn]) -> list[str]:
    """The markers of the human turns, or of a document."""
    texts = (turn.text for turn in turns if turn.role in MARKED and "<" in turn.text)
    return [marker for text in texts for marker in MARKER.findall(text)]


def _as_words(text: str) -> str:
    if "<" not in text:
        return text
    if _PLACED.search(text):
        raise PlacementError(
            f"a marker stands for a file, and none is given; add the file, or write {escape(VIDEO)} for the word"
        )
    return MARKER.sub(r"\\\g<0>", text)


def _media_first(turns: Sequence[Turn], images: int, videos: int) -> list[Turn]:
    markers = len(_markers(turns))
    if markers > images + videos and any(_amid_a_line(turn.text) for turn in turns if turn.role == "user"):
        raise PlacementError(
            f"{markers} markers for {images + videos} files; add the files that are missing, or write "
            f"{escape(IMAGE)} and {escape(VIDEO)} for the words"
        )
    return _before_the_text(_marked(turns, _without_markers), images, videos)


def _before_the_text(turns: Sequence[Turn], images: int, videos: int) -> list[Turn]:
    first = next(place for place, turn in enumerate(turns) if turn.role in MARKED)
    marked = Turn(turns[first].role, IMAGE * images + VIDEO * videos + turns[first].text)
    return [*turns[:first], marked, *turns[first + 1 :]]


def _without_markers(text: str) -> str:
    """What ``_remove_media_tokens`` of VILA leaves; words stay escaped."""
    if "<" not in text:
        return text.strip()
    words = _HIDDEN.items() if "\\<" in text else ()
    for marker, hidden in words:
        text = text.replace(f"\\{marker}", hidden)
    for marker in (IMAGE, VIDEO):
        if marker in text:
            text = text.replace(f"{marker}\n", "").replace(f"\n{marker}", "").replace(marker, "")
    text = text.strip()
    if "<" in text:
        text = MARKER.sub(r"\\\g<0>", text)
    for marker, hidden in words:
        text = text.replace(hidden, f"\\{marker}")
    return text


def _amid_a_line(text: str) -> bool:
    """Whether a marker has other text on both sides in its line, as a word has."""
    return any(sum(bool(piece.strip()) for piece in MARKER.split(line)) > 1 for line in text.split("\n"))


def _media_in_place(turns: Sequence[Turn], images: int, videos: int) -> list[Turn]:
    if videos and not images:
        # LLaVA-Video writes <image> for its videos.
        turns = _marked(turns, lambda text: MARKER.sub(VIDEO, text))
    markers = _markers(turns)
    if not markers:
        return _before_the_text(turns, images, videos)
    times = {}
    for marker, files in ((IMAGE, images), (VIDEO, videos)):
        found = markers.count(marker)
        if found != files and (found != 1 or not files):
            raise PlacementError(
                f"{found} markers {marker} for {files} files; one marker stands for one file, or for all of them; write "
                f"{escape(marker)} for the word"
            )
        times[marker] = files if found == 1 else 1
    return _marked(turns, lambda text: MARKER.sub(lambda found: found[0] * times[found[0]], text))
