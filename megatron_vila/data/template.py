"""Chat templates as functions of the messages alone: that of a tokenizer, or one of VILA's own prompts by name.

A template may ask for the time (``strftime_now``); it is given a fixed one, so that a run renders the same text tomorrow. What
else could differ between two renderings is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from megatron_vila.config.text_rules import NO_TEMPLATE
from megatron_vila.errors import UserError

_SIGHT = (
    "You are able to understand the visual content that the user provides, and assist the user with a variety of tasks using "
    "natural language."
)
# llava/conversation.py of VILA. Each ends an answer as its separators say, also where a system text of the record's takes the
# place of the prompt's own.
NAMED = {
    "llama_3": (
        "{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n' }}"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
        f"{{{{ 'You are a helpful language and vision assistant. {_SIGHT}' }}}}"
        "{% endif %}{{ '<|eot_id|>' }}"
        "{% for message in messages if message['role'] != 'system' %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] }}"
        "{{ '<|end_of_text|>' if loop.last and not add_generation_prompt else '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "vicuna_v1": (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% else %}"
        "{{ \"A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. \" }}{% endif %}"
        "{% for message in messages if message['role'] != 'system' %}"
        "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + message['content'] + '</s>' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "hermes-2": (
        "{{ '<|im_start|>system\n' }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
        "{% else %}{{ 'Answer the questions.' }}{% endif %}{{ '<|im_end|>' }}"
        "{% for message in messages if message['role'] != 'system' %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
_DIRECTIVES = "aAwdbBmyYHIMSfpjUWcxXzZGuVDFTRehklnstP"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{4,}")
_PROBE = [
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]


class ChatTemplateError(UserError, ValueError):
    """A chat template cannot be used for training."""


class RenderError(UserError, ValueError):
    """One conversation cannot be rendered or tokenized, for example because its roles do not alternate."""


class ChatTemplate:
    """Renders messages at the time ``clock`` (ISO, such as 2024-07-26 or 2024-07-26T12:30).

    ``name`` is one of ``NAMED``; empty: the template of ``tokenizer``. Raises ``ChatTemplateError`` if it has none, and for a
    template that does not write the same text twice.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, clock: str) -> None:
        own = tokenizer.name_or_path or type(tokenizer).__name__
        self.label = f"chat template {name}" if name else f"the chat template of tokenizer {own}"
        self._tokenizer = tokenizer
        try:
            template = NAMED[name] if name else tokenizer.get_chat_template()
        except ValueError as error:
            raise ChatTemplateError(f"tokenizer {own} {NO_TEMPLATE}") from error
        self.text = with_clock(template, clock)
        reason = _chance(template)
        if not reason:
            texts = [self._probe() for _ in range(2)]
            if texts[0] != texts[1] or _ADDRESS.search(texts[0]):
                reason = f"it writes another text each time, such as {_difference(*texts)!r}"
        if reason:
            raise ChatTemplateError(f"{self.label} is no function of its messages: {reason}; take that out of the template")

    def render(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        """The text of a conversation; ``arguments`` are those of transformers' ``apply_chat_template``.

        Raises ``RenderError`` with whatever the template raises.
        """
        return render(self._tokenizer, self.text, messages, **arguments)

    def _probe(self) -> str:
        try:
            return self.render(_PROBE)
        except RenderError as error:
            raise ChatTemplateError(f"{self.label} cannot be rendered: {error}") from error


def render(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
    """The text that ``template`` makes of a conversation. Raises ``RenderError`` with whatever it raises."""
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)  # type: ignore[arg-type,return-value]
    except MemoryError:
        raise
    except jinja2.TemplateError as error:
        raise RenderError(str(error)) from error
    except Exception as error:
        raise RenderError(f"the chat template raises {type(error).__name__}: {error}") from error


def with_clock(template: str, clock: str) -> str:
    """``template`` with a ``strftime_now`` of its own, for which it is always ``clock``."""
    if "strftime_now" not in template:
        return template
    now = datetime.fromisoformat(clock)
    codes = [f"%{flag}{code}" for code in _DIRECTIVES for flag in ("", "-")]
    pairs = json.dumps([[code, now.strftime(code)] for code in codes])
    return (
        "{%- macro strftime_now(format) -%}{%- set made = namespace(text=format.replace('%%', '\ufdd6')) -%}"
        f"{{%- for code, value in {pairs} -%}}{{%- set made.text = made.text.replace(code, value) -%}}{{%- endfor -%}}"
        "{{ made.text.replace('\ufdd6', '%') }}{%- endmacro +%}"
    ) + template


def _chance(template: str) -> str:
    """What in a template gives random values, or nothing."""
    try:
        words = [(kind, word) for _, kind, word in jinja2.Environment().lex(template) if kind != "whitespace"]
    except jinja2.TemplateSyntaxError as error:
        return f"it cannot be read ({error})"
    for (_, before), (kind, word) in pairwise([("", ""), *words]):
        if kind == "name" and (word == "lipsum" or (word == "random" and before == "|")):
            return f"it draws lots with {word}"
    return ""


def _difference(first: str, second: str) -> str:
    if first == second and (address := _ADDRESS.search(first)):
        return address[0].strip()
    at = next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return first[max(at - 10, 0) : at + 20]
