"""Signs in a text while a chat template renders it: for a medium, and for a control token that is only text.

A sign is a code point that is not a character (U+FDD0 to U+FDEF), so no text holds one and no template writes one.
"""

from __future__ import annotations

import re

from megatron_vila.data.placement import IMAGE, MARKER, VIDEO, escape, unescape

_MEDIA = {IMAGE: "\ufdd2", VIDEO: "\ufdd3"}
MEDIUM = re.compile("[\ufdd2\ufdd3]")
"""The sign of a picture or a video."""

CONTROL_TEXT = "\ufdd4"
"""With one more character: a control token that is only text (``control_tokens.py``)."""

CONTROL_TOKEN = "\ufdd5"
"""With one more character: a control token that is one."""

OTHER_TEXT = "\ufdd0"
"""An answer that differs from every other."""


def with_signs(text: str) -> str:
    """The text of a human turn with signs for its markers, and with the words that it escapes."""
    return unescape(MARKER.sub(lambda found: _MEDIA[found[0]], text))


def markers_of(text: str) -> list[str]:
    """The markers that the signs in ``text`` stand for, in their order."""
    names = {sign: marker for marker, sign in _MEDIA.items()}
    return [names[sign] for sign in MEDIUM.findall(text)]


def without_signs(text: str) -> str:
    """A rendered text in the form of a human turn: markers for signs, a backslash before the words."""
    markers = iter(markers_of(text))
    return MEDIUM.sub(lambda _: next(markers), escape(text))
