"""Signs in a text while a chat template renders it: what stands for a medium there, and what is only a word.

A sign is a code point that is no character (U+FDD0 to U+FDEF), so no text holds one and no template writes one.
"""

from __future__ import annotations

import re

from megatron_vila.data.placement import IMAGE, MARKER, VIDEO, escape, unescape

_SIGNS = {IMAGE: "\ufdd2", VIDEO: "\ufdd3"}
MEDIUM = re.compile("[\ufdd2\ufdd3]")
"""The sign of a picture or a video."""

OTHER_TEXT = "\ufdd0"
"""An answer that differs from every other."""


def with_signs(text: str) -> str:
    """The text of a human turn with signs for its markers, and with the words that it escapes."""
    return unescape(MARKER.sub(lambda found: _SIGNS[found[0]], text))


def without_signs(text: str) -> str:
    """A rendered text in the form of a human turn: markers for signs, a backslash before the words."""
    markers = {sign: marker for marker, sign in _SIGNS.items()}
    return MEDIUM.sub(lambda found: markers[found[0]], escape(text))
