"""Writes the page: one file of HTML that loads nothing and runs no script but its own.

Texts of samples come from anywhere. They are escaped, and the page's own rules (its Content-Security-Policy) forbid every other
script and every request, so that a text that is pasted into a record stays text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from megatron_vila.explain.text import number
from megatron_vila.explain.view.pictures import SMALL_SIDE
from megatron_vila.explain.view.rows import Row
from megatron_vila.explain.view.samples import Sample

FOLDER = Path(__file__).parent

COUNT_NAMES = {
    "tokens": "tokens",
    "trained": "trained tokens",
    "visual": "visual tokens",
    "frames": "frames and pictures",
    "squares": "squares for the tower",
    "patches": "vision cost in patches",
}


@dataclass(frozen=True)
class Page:
    """What a page shows: ``settings`` are names and values, ``side`` is that of a picture in pixels,
    ``rows_note`` stands above ``rows``."""

    title: str
    settings: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    samples: Sequence[Sample]
    side: int
    rows: Sequence[Row] = ()
    rows_note: str = ""

    @property
    def longest_row(self) -> int:
        """tokens of the longest row with its padding and the room that is left in it"""
        return max((row.tokens + max(row.padding, row.room) for row in self.rows), default=0)


def render(page: Page) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    pieces = {id_: piece for sample in page.samples if sample.strip for id_, piece in sample.strip.pieces.items()}
    environment.filters["number"] = number
    return environment.get_template("page.html.jinja").render(
        **vars(page),
        longest_row=page.longest_row,
        shown={sample.anchor for sample in page.samples},
        pieces=pieces,
        count_names=COUNT_NAMES,
        small_side=SMALL_SIDE,
        style=Markup(style),
        script=Markup(script),
        script_hash=Markup("sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()),
    )
