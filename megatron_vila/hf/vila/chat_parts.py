"""What a chat template reads: which variables, and whether contents as texts or as lists of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

from megatron_vila.data.template import RenderError, render

_WORD = "c0ntent"


class _Generation(jinja2.ext.Extension):
    """The tag by which templates mark what an assistant writes; transformers renders it as its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def reads(template: str) -> frozenset[str]:
    """The variables that ``template`` takes from its caller. Empty for a template that cannot be parsed."""
    environment = jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(template)))
    except jinja2.TemplateSyntaxError:
        return frozenset()


def walks_over_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether ``template`` writes a content that is a list of parts, but nothing of one that is a text.

    Raises ``ValueError`` for a template that writes neither. One that cannot be rendered for a single question is taken to write
    texts; what it raises for the conversation itself is told there.
    """
    message = {"role": "user", "content": _WORD}
    written = [_writes(tokenizer, template, one) for one in (message, *with_parts([message]))]
    if written == [False, False]:
        raise ValueError("the chat template writes nothing of what a user says; give another chat_template")
    return not written[0] and written[1] is True


def with_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``messages`` with each text as a list of one part."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else dict(message)
        for message in messages
    ]


def _writes(tokenizer: PreTrainedTokenizerBase, template: str, message: Mapping[str, Any]) -> bool | None:
    """Whether the template writes the word of ``message``; None if it cannot be rendered."""
    try:
        return _WORD in render(tokenizer, template, [message])
    except RenderError:
        return None
