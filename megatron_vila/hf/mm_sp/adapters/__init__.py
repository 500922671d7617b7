"""The models with vision that MM-SP takes, each with its adapter: see ``base.py``."""

from __future__ import annotations

from transformers import PreTrainedConfig

from megatron_vila.hf.mm_sp.adapters.base import Piece, VisionAdapter, VisionUnit
from megatron_vila.hf.mm_sp.adapters.internvl import InternVL
from megatron_vila.hf.mm_sp.adapters.llava_next_video import LlavaNextVideo
from megatron_vila.hf.mm_sp.adapters.llava_onevision import LlavaOnevision
from megatron_vila.hf.mm_sp.adapters.qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL
from megatron_vila.hf.mm_sp.adapters.smolvlm import SmolVLM
from megatron_vila.hf.mm_sp.adapters.video_llama_3 import VideoLlama3
from megatron_vila.hf.mm_sp.adapters.vila import Vila

ADAPTERS: dict[str, type[VisionAdapter]] = {
    "vila": Vila,
    "llava_onevision": LlavaOnevision,
    "llava_next_video": LlavaNextVideo,
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
    "qwen3_vl_moe": Qwen3VL,
    "internvl": InternVL,
    "smolvlm": SmolVLM,
    "video_llama_3": VideoLlama3,
}
"""By the ``model_type`` of a configuration."""

VISION_KEYS = frozenset(key for adapter in ADAPTERS.values() for key in adapter.keys)
"""Fields of a sample with which some model is given pictures or videos."""


def adapter_of(config: PreTrainedConfig) -> VisionAdapter | None:
    """The adapter for a model of this configuration; None for one that MM-SP knows as a text model or does not know."""
    adapter = ADAPTERS.get(config.model_type)
    return None if adapter is None else adapter.of(config)


__all__ = ["ADAPTERS", "VISION_KEYS", "Piece", "VisionAdapter", "VisionUnit", "adapter_of"]
