"""Configuration of a VILA for transformers: read from either root ``config.json``, or made from our own model settings.

The flat layout (model type ``vila``) has ``text_config`` and ``vision_config``; the layout of the VILA code (``llava_llama``)
has ``llm_cfg``, ``vision_tower_cfg`` and ``mm_projector_cfg``. Both become the same object, and ``save_pretrained`` writes
the flat form. What neither format has a key for stands under ``megatron_vila``. Classes and functions that a file names
(``_target_``) are compared with a fixed list and never called.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, SiglipVisionConfig
from transformers.configuration_utils import SubConfigSpec

from megatron_vila.config.schema import Config, DataConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_vila.config.text_rules import MEDIA_FORMATS, TEMPLATES
from megatron_vila.convert.hf_config import (
    ENCODERS,
    LANGUAGE_TYPES,
    METADATA_FORMAT,
    UNSUPPORTED,
    decoded,
    stored_text_rules,
)
from megatron_vila.convert.hf_config_out import flat_root, language_config, vision_config
from megatron_vila.convert.token_order import ORDERS, suggest_token_order
from megatron_vila.data.sampling import FPS_RULES
from megatron_vila.errors import UserError
from megatron_vila.plan.geometry import tokens_per_square
from megatron_vila.plan.sizes import PROJECTOR_TYPES

_LANGUAGE_CONFIGS = dict(zip(LANGUAGE_TYPES, (LlamaConfig, Qwen2Config), strict=True))
_ENCODERS = tuple(name.rpartition(".")[2] for name in ENCODERS)
_DTYPES = ("bfloat16", "float16", "float32", "float64")
_logger = logging.getLogger(__name__)


class VilaConfigError(UserError, RuntimeError):
    """A configuration that cannot be used.

    Not a ``ValueError``: ``AutoProcessor`` would take one for "not a model of mine" and return the bare tokenizer.
    """


class VilaConfig(PreTrainedConfig):
    """Settings of ``VILAForConditionalGeneration`` and of ``VilaProcessor``.

    ``megatron_vila`` holds ``format``, ``projector_token_order``, ``frame_separator_ids`` and ``image_separator_ids`` (null
    where the file does not say: the processor turns ``separator_text`` into ids), ``num_frames``, ``fps``, ``image_aspect``,
    ``max_positions``, ``fps_rule`` and the ``TextRules``. ``image_token_id`` and ``video_token_id`` stand for the visual tokens
    of pictures and of video frames in ``input_ids``; they may lie beyond the embedding table and are never looked up.

    Raises ``VilaConfigError`` that lists everything about the file that the model cannot do, and one that asks for
    ``projector_token_order`` where a ``mlp_downsample`` projector was saved without it by an unknown version.
    """

    model_type = "vila"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "vision_config": SiglipVisionConfig,
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
    megatron_vila: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _language_config(self.text_config)
        super().__post_init__(**kwargs)
        self.hidden_size, self.mm_hidden_size = self.text_config.hidden_size, self.vision_config.hidden_size
        given = dict(self.megatron_vila or {})
        written = given.get("format", METADATA_FORMAT)
        self.megatron_vila = {
            "format": METADATA_FORMAT if written == 1 else written,
            "projector_token_order": given.get("projector_token_order", "row_major"),
            "frame_separator_ids": given.get("frame_separator_ids"),
            "image_separator_ids": given.get("image_separator_ids"),
            "num_frames": int(given.get("num_frames", self.num_video_frames)),
            "fps": float(given.get("fps", self.fps)),
            "image_aspect": given.get("image_aspect", self.image_aspect_ratio),
            "max_positions": int(given.get("max_positions", self.text_config.max_position_embeddings)),
            "fps_rule": given.get("fps_rule", "spread"),
            **asdict(stored_text_rules(given)),
        }
        if self.megatron_vila["image_aspect"] not in ("resize", "pad"):
            _logger.warning(
                "image_aspect_ratio=%s is unknown here: pictures are resized", self.megatron_vila["image_aspect"]
            )
            self.megatron_vila["image_aspect"] = "resize"
        self.image_aspect_ratio = self.megatron_vila["image_aspect"]
        self.num_video_frames, self.fps = self.megatron_vila["num_frames"], self.megatron_vila["fps"]
        if self.image_token_id is None or self.video_token_id is None:
            # VILA appends a sentinel, then these two.
            self.image_token_id, self.video_token_id = (self.text_config.vocab_size + n for n in (1, 2))
        if self.dtype is None:
            self.dtype = self.text_config.dtype
        problems = self._problems()
        if problems:
            raise VilaConfigError("this VILA configuration cannot be used:\n  " + "\n  ".join(problems))

    def _problems(self) -> list[str]:
        own, vision = self.megatron_vila, self.vision_config
        found = []
        if own["format"] != METADATA_FORMAT:
            found.append(
                f"megatron_vila.format={own['format']} is not {METADATA_FORMAT}; load it with the version that wrote it"
            )
        known = {"media_format": MEDIA_FORMATS, "template": ("", *TEMPLATES), "fps_rule": FPS_RULES}
        for key, choices in known.items():
            if own[key] not in choices:
                found.append(f"megatron_vila.{key}={own[key]} is unknown; use one of {', '.join(choices)}")
        if self.mm_vision_select_feature != "cls_patch":
            found.append(
                f"mm_vision_select_feature={self.mm_vision_select_feature} would drop a patch of SigLIP; use cls_patch"
            )
        if own["projector_token_order"] not in ORDERS:
            found.append(
                f"projector_token_order={own['projector_token_order']} is unknown; use one of {', '.join(ORDERS)}"
            )
        if not (isinstance(vision.image_size, int) and isinstance(vision.patch_size, int)):
            found.append(
                f"vision_config.image_size={vision.image_size}, patch_size={vision.patch_size}: squares are whole numbers"
            )
        if vision.hidden_act != "gelu_pytorch_tanh" or vision.num_channels != 3:
            found.append(
                f"vision_config.hidden_act={vision.hidden_act}, num_channels={vision.num_channels}: only SigLIP with "
                "gelu_pytorch_tanh and 3 channels is built"
            )
        if self.mm_projector_type not in PROJECTOR_TYPES:
            found.append(f"mm_projector_type={self.mm_projector_type} is not one of {', '.join(PROJECTOR_TYPES)}")
        return found

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> VilaConfig:
        """As in transformers; sub-folders of the VILA layout are read where the root file does not hold their settings."""
        kwargs.setdefault("name_or_path", os.fspath(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> VilaConfig:
        """From a parsed root ``config.json`` of either layout. ``projector_token_order`` may be given beside it."""
        content = dict(config_dict)
        if "llm_cfg" in content:
            content = _from_vila_layout(content, kwargs.get("name_or_path", ""))
        missing = [name for name in ("text_config", "vision_config") if not isinstance(content.get(name), Mapping)]
        if missing:
            raise VilaConfigError(
                f"this VILA configuration has no {' and no '.join(missing)}; the flat layout describes its parts there, "
                "the layout of the VILA code in llm_cfg and vision_tower_cfg"
            )
        order = kwargs.pop("projector_token_order", None) or _token_order(content)
        own = {**(content.get("megatron_vila") or {}), "projector_token_order": order}
        return super().from_dict({**content, "megatron_vila": own}, **kwargs)

    @classmethod
    def from_model_config(cls, model: ModelConfig, data: DataConfig, tokenizer: Any) -> VilaConfig:
        """The configuration of a model that was trained with our own settings, read with ``tokenizer``.

        The media tokens are the tokenizer's ``<image>`` and ``<vila/video>``, else ids that it does not use.
        """
        parts = {
            "llm": language_config(model.llm, {}, "float32", tokenizer),
            "vision_tower": vision_config(model.vision, {}, "float32"),
        }
        return cls.from_dict(flat_root(Config(model=model, data=data), {}, parts, tokenizer))

    @property
    def vision_settings(self) -> VisionConfig:
        """Our settings of the vision tower."""
        vision = self.vision_config
        return VisionConfig(
            hidden_size=vision.hidden_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            ffn_hidden_size=vision.intermediate_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            select_layer=self.mm_vision_select_layer,
            use_head=vision.vision_use_head,
            layer_norm_eps=vision.layer_norm_eps,
        )

    @property
    def projector_settings(self) -> ProjectorConfig:
        """Our settings of the projector."""
        return ProjectorConfig(self.mm_projector_type, self.megatron_vila["projector_token_order"])

    def separator_text(self, encoder: str) -> str:
        """What VILA's ``image_encoder`` or ``video_encoder`` writes after a picture: a line break unless it says otherwise."""
        return _encoder(getattr(self, encoder)).get("end_tokens", "\n") or ""

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of one picture or video frame, separators not counted."""
        return tokens_per_square(self.vision_settings, self.projector_settings)


class LlavaLlamaConfig(VilaConfig):
    """Registered for the model type that the VILA code writes; what it reads becomes a ``VilaConfig``."""

    model_type = "llava_llama"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> VilaConfig:
        return VilaConfig.from_dict(config_dict, **kwargs)


def _token_order(root: Mapping[str, Any]) -> str:
    """The order of the projector's tokens as recorded, or as the version that wrote the file suggests, which is logged.

    Raises ``VilaConfigError`` that names the argument to give where it cannot be told.
    """
    recorded = (root.get("megatron_vila") or {}).get("projector_token_order")
    if recorded is not None:
        return recorded
    order, reason = suggest_token_order(root)
    if order is None:
        raise VilaConfigError(
            f"the order of the projector's tokens is unknown: {reason}; give projector_token_order=legacy_column_major "
            "(VILA-1.5, Llama-3-LongVILA) or row_major (NVILA, Qwen2-LongVILA)"
        )
    _logger.warning("projector_token_order=%s: %s", order, reason)
    return order


def _language_config(value: Any) -> LlamaConfig | Qwen2Config:
    """The language model's configuration from its dict; the class comes from a fixed list."""
    if isinstance(value, (LlamaConfig, Qwen2Config)):
        return value
    settings = value.to_dict() if isinstance(value, PreTrainedConfig) else dict(value or {"model_type": "qwen2"})
    model_type = settings.pop("model_type", None)
    if model_type not in _LANGUAGE_CONFIGS:
        raise VilaConfigError(f"language model type {model_type} is not one of {', '.join(_LANGUAGE_CONFIGS)}")
    return _LANGUAGE_CONFIGS[model_type](**settings)


def _from_vila_layout(root: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The flat form of a root ``config.json`` of the VILA code. Raises ``VilaConfigError`` for what this model does not do."""
    problems = [f"{key}={root[key]} ({meaning}) is not supported" for key, meaning in UNSUPPORTED.items() if root.get(key)]
    for key in ("image_encoder", "video_encoder"):
        encoder = _encoder(root.get(key))
        target = str(encoder.get("_target_", _ENCODERS[0]))
        if target.rpartition(".")[2] not in _ENCODERS:
            problems.append(f"{key} names {target}, which is not one of {', '.join(_ENCODERS)}")
        if encoder.get("start_tokens") is not None:
            problems.append(f"{key}.start_tokens={encoder['start_tokens']!r}: nothing is written before a picture")
    parts = {key: _part(root, key, folder, problems) for key in ("llm_cfg", "vision_tower_cfg", "mm_projector_cfg")}
    tower_type = parts["vision_tower_cfg"].get("model_type", "siglip_vision_model")
    if tower_type not in ("siglip_vision_model", "siglip"):
        problems.append(f"vision tower type {tower_type} is not siglip_vision_model")
    language = parts["llm_cfg"]
    written = root.get("model_dtype") or language.get("dtype") or language.get("torch_dtype") or "float32"
    dtype = str(written).removeprefix("torch.")
    if dtype not in _DTYPES:
        problems.append(f"model_dtype={written} is not one of {', '.join(_DTYPES)}")
    if problems:
        raise VilaConfigError("this VILA configuration cannot be used:\n  " + "\n  ".join(problems))
    kept = ("mm_vision_select_layer", "mm_vision_select_feature", "image_aspect_ratio", "num_video_frames", "fps")
    kept += ("image_encoder", "video_encoder", "image_token_id", "video_token_id", "transformers_version")
    kept += ("megatron_vila", "name_or_path")
    projector = parts["mm_projector_cfg"].get("mm_projector_type", root.get("mm_projector_type"))
    return {key: root[key] for key in kept if root.get(key) is not None} | {
        "text_config": language,
        "vision_config": {k: v for k, v in parts["vision_tower_cfg"].items() if k != "model_type"},
        "mm_projector_type": projector or "none",
        "dtype": dtype,
    }


def _part(root: Mapping[str, Any], key: str, folder: str, problems: list[str]) -> dict[str, Any]:
    """Settings of a part: those in the root file, or in the part's own folder where the root has a name only."""
    value = root.get(key)
    if isinstance(value, Mapping) and "model_type" in value:
        return dict(value)
    path = os.path.join(folder, key.removesuffix("_cfg"), "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError) as error:
        problems.append(f"{key} holds no settings and {path} cannot be read: {error}")
        return {}


def _encoder(value: Any) -> dict[str, Any]:
    """The settings of one of VILA's encoders; a plain text is its class's name."""
    encoder = decoded(value)
    if isinstance(encoder, str):
        return {"_target_": encoder}
    return dict(encoder) if isinstance(encoder, Mapping) else {}
