"""Configuration of a VILA for transformers, read from either root ``config.json``.

The flat layout (model type ``vila``) has ``text_config`` and ``vision_config``; the layout of the VILA code (``llava_llama``)
has ``llm_cfg``, ``vision_tower_cfg`` and ``mm_projector_cfg``. ``convert/hf_config.py`` reads both, as it does for imports, and
both become the same class; ``save_pretrained`` writes the flat form. The section ``megatron_vila`` holds the settings for which
neither layout has a key.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

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
# Keys in a root configuration of the VILA code that are used here; all others concern only the VILA code.
_KEPT = (
    *("mm_vision_select_layer", "mm_vision_select_feature", "image_encoder", "video_encoder"),
    *("transformers_version", "name_or_path"),
)
# Far beyond every table of embeddings, so that no token that a user adds gets them; they fit in 32 bits.
IMAGE_TOKEN_ID, VIDEO_TOKEN_ID = 2**31 - 3, 2**31 - 2
_logger = logging.getLogger(__name__)


class VilaConfigError(UserError, RuntimeError):
    """A configuration that cannot be used; ``problems`` lists all that were found, each with its cure.

    It is not a ``ValueError``, because ``AutoProcessor`` catches those and returns the bare tokenizer.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("this VILA configuration cannot be used:\n  " + "\n  ".join(problems))


class VilaConfig(PreTrainedConfig):
    """Settings of ``VILAForConditionalGeneration`` and of ``VilaProcessor``.

    ``megatron_vila`` holds ``format``, ``projector_token_order``, ``frame_separator_ids``, ``image_separator_ids``,
    ``num_frames``, ``fps``, ``image_aspect``, ``max_positions``, ``fps_rule`` and the ``TextRules``. Separators are null if the
    file has no ids of them; the processor then makes them of ``separator_text``. ``template`` is null if the processor should
    choose VILA's prompt by the tokenizer.

    ``image_token_id`` and ``video_token_id`` stand for the visual tokens of pictures and of video frames in ``input_ids``. They
    are the same for every model, lie beyond every embedding table and are never looked up: the ids that a file names are those of
    the VILA code, which a token that is added to the tokenizer could get. ``model_settings`` is the model in our settings.

    Raises ``VilaConfigError`` that lists everything in the file that is not supported, with the messages of an import.
    """

    model_type = "vila"
    auto_map: ClassVar[dict] = {}  # no code of a model's folder is run, and TRL asks for it
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
        self.image_token_id, self.video_token_id = IMAGE_TOKEN_ID, VIDEO_TOKEN_ID
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        if self.dtype is None:
            self.dtype = self.text_config.dtype

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> VilaConfig:
        """As in transformers. The sub-folders of the VILA layout are read too."""
        given = "name_or_path" in kwargs
        kwargs.setdefault("name_or_path", os.fspath(pretrained_model_name_or_path))  # for from_dict
        result = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if not given:
            (result[0] if isinstance(result, tuple) else result).name_or_path = ""
        return result

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> VilaConfig:
        """From a parsed root ``config.json`` of either layout. The keyword ``projector_token_order`` wins over what it says.

        Raises ``VilaConfigError``.
        """
        folder = kwargs.get("name_or_path")
        problems: list[str] = []
        sections = sections_of(config_dict, Path(folder) if folder else None, problems)
        described = _read(sections, kwargs.pop("projector_token_order", None), problems)
        is_flat = "llm_cfg" not in config_dict
        kept = {key: value for key, value in config_dict.items() if key in _KEPT or (is_flat and key != "torch_dtype")}
        llm = {key: value for key, value in sections.llm.items() if key not in ("rope_parameters", "auto_map")}
        tower = {key: value for key, value in sections.vision.items() if key != "model_type"}
        content: dict[str, Any] = {
            "text_config": llm | language_keys(described.model.llm, llm),
            "vision_config": tower | vision_keys(described.model.vision),
            "mm_projector_type": described.model.projector.type,
            "megatron_vila": _own_section(described),
            "dtype": described.dtype,
        }
        if not is_flat:
            content["architectures"] = ["VILAForConditionalGeneration"]
        return super().from_dict(kept | content, **kwargs)

    @property
    def model_settings(self) -> ModelConfig:
        """The model in our settings."""
        return _read(self._sections()).model

    def separator_text(self, key: str) -> str:
        """What VILA writes after a picture, for the key ``key`` of ``SEPARATORS``: a newline unless the file says otherwise."""
        return separator_text(getattr(self, SEPARATORS[key]), SEPARATORS[key], [])

    @property
    def tokens_per_frame(self) -> int:
        """Number of visual tokens of one picture or video frame, without separators."""
        model = self.model_settings
        return tokens_per_square(model.vision, model.projector)

    def _sections(self) -> HfSections:
        """This configuration in the form that ``describe_model`` reads."""
        keys: tuple[str, ...] = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "mm_hidden_size")
        keys += ("model_type", "image_aspect_ratio", "num_video_frames", "fps", "image_encoder", "video_encoder")
        own = {"projector_token_order": "row_major", "template": "", **self.megatron_vila}
        root = {key: getattr(self, key) for key in keys} | {"megatron_vila": own}
        parts = [(self.text_config, Qwen2Config), (self.vision_config, SiglipVisionConfig)]
        llm, vision = (dict(p) if isinstance(p, Mapping) else (p or default()).to_dict() for p, default in parts)
        return HfSections(None, root, llm, vision)


class _OtherType(VilaConfig):
    """Registered for another model type of a root configuration, which it reads as a ``VilaConfig``."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> VilaConfig:
        return VilaConfig.from_dict(config_dict, **kwargs)


# The last one is registered so that its refusal says why.
OTHER_TYPES: list[type[VilaConfig]] = [
    type(f"_{name}", (_OtherType,), {"model_type": name}) for name in ("llava_llama", "nvila_lite", "nvila")
]


def _read(sections: HfSections, token_order: str | None = None, problems: Sequence[str] = ()) -> Description:
    """The model that ``sections`` describe; notes are logged. Raises ``VilaConfigError`` with ``problems`` and new ones."""
    found = list(problems)
    described = describe_model(sections, found, token_order)
    if found:
        raise VilaConfigError(found)
    for note in described.notes:
        _logger.warning(note)
    return described


def _own_section(described: Description) -> dict[str, Any]:
    """The section ``megatron_vila``; keys whose value depends on the tokenizer are null."""
    unknown = [*described.separator_texts, *["template"] * described.legacy_prompt]
    return own_section(described.model, described.data) | dict.fromkeys(unknown)


def _language_config(value: Any) -> LlamaConfig | Qwen2Config:
    """The language model's configuration from its dict; its class is taken from a fixed list."""
    if isinstance(value, (LlamaConfig, Qwen2Config)):
        return value
    settings = value.to_dict() if isinstance(value, PreTrainedConfig) else dict(value or {"model_type": "qwen2"})
    return _LANGUAGE_CONFIGS[settings.pop("model_type")](**settings)
