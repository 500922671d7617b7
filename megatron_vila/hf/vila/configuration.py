"""Configuration of a VILA for transformers, read from either root ``config.json``.

The flat layout (model type ``vila``) has ``text_config`` and ``vision_config``; the layout of the VILA code (``llava_llama``)
has ``llm_cfg``, ``vision_tower_cfg`` and ``mm_projector_cfg``. ``convert/hf_config.py`` reads both, here as at an import, and
what it finds becomes the same object; ``save_pretrained`` writes the flat form. What neither format has a key for stands
under ``megatron_vila``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, SiglipVisionConfig
from transformers.configuration_utils import SubConfigSpec

from megatron_vila.config.schema import ModelConfig
from megatron_vila.convert.hf_config import (
    LANGUAGE_TYPES,
    SEPARATORS,
    Description,
    describe_model,
    separator_text,
)
from megatron_vila.convert.hf_config_out import language_keys, own_section, vision_keys
from megatron_vila.convert.hf_sections import HfSections, sections_of
from megatron_vila.errors import UserError
from megatron_vila.plan.geometry import tokens_per_square

_LANGUAGE_CONFIGS = dict(zip(LANGUAGE_TYPES, (LlamaConfig, Qwen2Config), strict=True))
# Keys of a root of the VILA code that mean something here; all others are its own.
_KEPT = (
    *("mm_vision_select_layer", "mm_vision_select_feature", "image_encoder", "video_encoder", "image_token_id"),
    *("video_token_id", "transformers_version", "name_or_path"),
)
_logger = logging.getLogger(__name__)


class VilaConfigError(UserError, RuntimeError):
    """A configuration that cannot be used; ``problems`` are all that were found, each with its cure.

    Not a ``ValueError``: ``AutoProcessor`` would take one for "not a model of mine" and return the bare tokenizer.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("this VILA configuration cannot be used:\n  " + "\n  ".join(problems))


class VilaConfig(PreTrainedConfig):
    """Settings of ``VILAForConditionalGeneration`` and of ``VilaProcessor``.

    ``megatron_vila`` holds ``format``, ``projector_token_order``, ``frame_separator_ids`` and ``image_separator_ids`` (null
    where the file does not say: the processor turns ``separator_text`` into ids), ``num_frames``, ``fps``, ``image_aspect``,
    ``max_positions``, ``fps_rule`` and the ``TextRules`` (``template`` is null where the processor takes VILA's prompt for the
    tokenizer). ``image_token_id`` and ``video_token_id`` stand for the visual tokens of pictures and of video frames in
    ``input_ids``; they may lie beyond the embedding table and are never looked up. ``model_settings`` is the model in our terms.

    Raises ``VilaConfigError`` that lists everything about the file that the model cannot do, as an import lists it.
    """

    model_type = "vila"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "vision_config": SiglipVisionConfig,  # type: ignore[dict-item]
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    mm_projector_type: str = "mlp_downsample"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "cls_patch"
    hidden_size: int | None = None
    mm_hidden_size: int | None = None
    image_aspect_ratio: str = "resize"
    num_video_frames: int = 8
    fps: float = 0.0
    image_token_id: int | None = None
    video_token_id: int | None = None
    image_encoder: dict | str | None = None
    video_encoder: dict | str | None = None
    megatron_vila: dict = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        described = _read(self._sections())
        self.text_config = _language_config(self.text_config)
        super().__post_init__(**kwargs)
        self.hidden_size, self.mm_hidden_size = self.text_config.hidden_size, described.model.vision.hidden_size
        self.megatron_vila = _own_section(described)
        self.image_aspect_ratio = described.data.image_aspect
        self.num_video_frames, self.fps = described.data.num_frames, described.data.fps
        if self.image_token_id is None or self.video_token_id is None:
            # VILA appends a sentinel, then these two.
            self.image_token_id, self.video_token_id = (self.text_config.vocab_size + n for n in (1, 2))
        if self.dtype is None:
            self.dtype = self.text_config.dtype

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> VilaConfig:
        """As in transformers; sub-folders of the VILA layout are read where there are any."""
        kwargs.setdefault("name_or_path", os.fspath(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> VilaConfig:
        """From a parsed root ``config.json`` of either layout. ``projector_token_order`` may be given beside it."""
        folder = kwargs.get("name_or_path")
        problems: list[str] = []
        sections = sections_of(config_dict, Path(folder) if folder else None, problems)
        described = _read(sections, kwargs.pop("projector_token_order", None), problems)
        is_flat = "llm_cfg" not in config_dict
        kept = {key: value for key, value in config_dict.items() if key in _KEPT or (is_flat and key != "torch_dtype")}
        llm = {key: value for key, value in sections.llm.items() if key not in ("rope_parameters", "auto_map")}
        tower = {key: value for key, value in sections.vision.items() if key != "model_type"}
        content = {
            "text_config": llm | language_keys(described.model.llm, llm),
            "vision_config": tower | vision_keys(described.model.vision),
            "mm_projector_type": described.model.projector.type,
            "megatron_vila": _own_section(described),
            "dtype": described.dtype,
        }
        return super().from_dict(kept | content, **kwargs)

    @property
    def model_settings(self) -> ModelConfig:
        """The model in our terms."""
        return _read(self._sections()).model

    def separator_text(self, key: str) -> str:
        """What VILA writes after a picture, where the ids ``key`` are null: a line break unless the file says otherwise."""
        return separator_text(getattr(self, SEPARATORS[key]), SEPARATORS[key], [])

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of one picture or video frame, separators not counted."""
        model = self.model_settings
        return tokens_per_square(model.vision, model.projector)

    def _sections(self) -> HfSections:
        """This configuration as the one reader takes it."""
        keys: tuple[str, ...] = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "mm_hidden_size")
        keys += ("model_type", "image_aspect_ratio", "num_video_frames", "fps", "image_encoder", "video_encoder")
        own = {"projector_token_order": "row_major", "template": "", **self.megatron_vila}
        root = {key: getattr(self, key) for key in keys} | {"megatron_vila": own}
        parts = [(self.text_config, Qwen2Config), (self.vision_config, SiglipVisionConfig)]
        llm, vision = (dict(p) if isinstance(p, Mapping) else (p or default()).to_dict() for p, default in parts)
        return HfSections(None, root, llm, vision)


class _OtherType(VilaConfig):
    """Registered for another model type of a root; what it reads becomes a ``VilaConfig``."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> VilaConfig:
        return VilaConfig.from_dict(config_dict, **kwargs)


# The last one is refused, with words that say why.
OTHER_TYPES: list[type[VilaConfig]] = [
    type(f"_{name}", (_OtherType,), {"model_type": name}) for name in ("llava_llama", "nvila_lite", "nvila")
]


def _read(sections: HfSections, token_order: str | None = None, problems: Sequence[str] = ()) -> Description:
    """The one reader's result; what it has to say is logged. Raises ``VilaConfigError`` with ``problems`` and its own."""
    found = list(problems)
    described = describe_model(sections, found, token_order)
    if found:
        raise VilaConfigError(found)
    for note in described.notes:
        _logger.warning(note)
    return described


def _own_section(described: Description) -> dict[str, Any]:
    """What stands under ``megatron_vila``; null where the tokenizer is needed to tell."""
    unknown = [*described.separator_texts, *["template"] * described.legacy_prompt]
    return own_section(described.model, described.data) | dict.fromkeys(unknown)


def _language_config(value: Any) -> LlamaConfig | Qwen2Config:
    """The language model's configuration from its dict; the class comes from a fixed list."""
    if isinstance(value, (LlamaConfig, Qwen2Config)):
        return value
    settings = value.to_dict() if isinstance(value, PreTrainedConfig) else dict(value or {"model_type": "qwen2"})
    return _LANGUAGE_CONFIGS[settings.pop("model_type")](**settings)
