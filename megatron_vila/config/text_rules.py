"""How a conversation becomes text and tokens: the settings that training, imports, exports and the processor share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

MEDIA_FORMATS = ("vila", "verbatim")
TEMPLATES = ("llama_3", "vicuna_v1", "hermes-2")
"""VILA's own prompts, by the names that its code has for them (``template.py``)."""

NO_TEMPLATE = (
    "has no chat template; put a chat_template.jinja into its folder, use the tokenizer of an instruction-tuned model, or set "
    "data.template"
)
"""What is said of a tokenizer, behind its name."""

DEFAULT_CLOCK = "2024-07-26"
"""The date that the templates of Llama 3 write where they cannot ask for one."""


@dataclass(frozen=True)
class TextRules:
    """Fields are keys of ``data``, and of ``megatron_vila`` in an exported configuration."""

    media_format: str = "vila"
    template: str = ""
    template_clock: str = DEFAULT_CLOCK
    parse_control_tokens: bool = False

    @classmethod
    def of(cls, settings: Any) -> TextRules:
        """Those among the attributes of ``settings``: ``DataConfig``, or a processor."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


DEFAULT = TextRules()
