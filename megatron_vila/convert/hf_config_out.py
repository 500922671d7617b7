"""Turns our settings into Hugging Face configurations: the contents of the JSON files of an exported folder.

``carried`` is always the same file of the Hugging Face folder from which the weights were imported, {} if there was none. Its
values are kept, and those that training may have changed are written over them. Without it, every key that the VILA code reads
is written. Rotary base, rotary scaling and length limits are always those of the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_vila.config.schema import Config, DataConfig, LanguageConfig, ModelConfig, VisionConfig
from megatron_vila.config.text_rules import TextRules
from megatron_vila.convert.hf_config import METADATA_FORMAT
from megatron_vila.convert.tokenizer import media_token_ids
from megatron_vila.plan.sizes import head_dim

Parts = Mapping[str, Mapping[str, Any]]

# Keys that are not carried over. The VILA code would use a _name_or_path at the root before resume_path; vila_root writes new
# ones for the parts.
_DROPPED = ("_name_or_path", "auto_map", "dtype", "rope_parameters", "llm_cfg", "vision_tower_cfg", "mm_projector_cfg")
# For each token order, a version of transformers from its time: other readers infer the order from the version.
_VERSIONS = {"row_major": "4.46.0", "legacy_column_major": "4.37.2"}
# Values of the root of a model that was not imported.
_FIRST_ROOT = {
    "drop_path_rate": 0.0,
    "dynamic_s2": False,
    "interpolate_mode": "linear",
    "max_tiles": 12,
    "min_tiles": 1,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "cls_patch",
    "num_time_tokens": 0,
    "s2": False,
    "time_token_format": "<t{t}>",
    "video_max_tiles": 1,
    "vision_resolution": -1,
}


def language_config(llm: LanguageConfig, carried: Mapping[str, Any], dtype: str, tokenizer: Any) -> dict[str, Any]:
    """Content of ``llm/config.json``; ``dtype`` names the dtype of the weights, ``tokenizer`` may be None.

    ``model_max_length`` is ``max_positions`` if training changed that, else the carried value.
    """
    changed = carried.get("max_position_embeddings") != llm.max_positions
    lengths = {
        key: llm.max_positions if changed or not carried.get(key) else carried[key]
        for key in ("model_max_length", "tokenizer_model_max_length")
    }
    first = {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tokenizer_padding_side": "right",
        "transformers_version": _VERSIONS["row_major"],
        "use_cache": True,
        **_special_ids(tokenizer),
    }
    kind = _kind(llm)
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]
    if kind == "llama":
        first |= {"attention_bias": False, "mlp_bias": False}
    return first | _kept(carried) | language_keys(llm, carried) | {
        "architectures": [architecture],
        "torch_dtype": dtype,
        **lengths,
    }  # fmt: skip


def language_keys(llm: LanguageConfig, carried: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings of a language model under Hugging Face's names, to be written over those of ``carried``."""
    keys = {
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.ffn_hidden_size,
        "max_position_embeddings": llm.max_positions,
        "model_type": _kind(llm),
        "num_attention_heads": llm.num_heads,
        "num_hidden_layers": llm.num_layers,
        "num_key_value_heads": llm.num_kv_heads,
        "rms_norm_eps": llm.norm_eps,
        "rope_scaling": _rope_scaling(llm.rope_scaling_factor),
        "rope_theta": llm.rope_theta,
        "tie_word_embeddings": llm.tie_embeddings,
        "vocab_size": llm.vocab_size,
    }
    told = head_dim(llm) * llm.num_heads != llm.hidden_size or "head_dim" in carried
    return keys | ({"head_dim": head_dim(llm)} if told else {})


def vision_config(vision: VisionConfig, carried: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Content of ``vision_tower/config.json``; ``dtype`` names the dtype of the weights."""
    first = {"attention_dropout": 0.0, "transformers_version": _VERSIONS["row_major"]}
    return first | _kept(carried) | vision_keys(vision) | {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "torch_dtype": dtype,
    }  # fmt: skip


def vision_keys(vision: VisionConfig) -> dict[str, Any]:
    """Our settings of a vision tower under Hugging Face's names."""
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "intermediate_size": vision.ffn_hidden_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_layers,
        "patch_size": vision.patch_size,
        "vision_use_head": vision.use_head,
    }


def projector_config(kind: str, dtype: str) -> dict[str, Any]:
    """Content of ``mm_projector/config.json``; ``kind`` is the projector's type, ``dtype`` names the dtype of the weights."""
    return {
        "architectures": ["MultimodalProjector"],
        "mm_projector_type": kind,
        "model_type": "v2l_projector",
        "torch_dtype": dtype,
        "transformers_version": _VERSIONS["row_major"],
    }


def preprocessor_config(vision: VisionConfig, carried: Mapping[str, Any]) -> dict[str, Any]:
    """Content of ``preprocessor_config.json``: the carried one, else SigLIP's, with which training prepares pictures."""
    size = {"height": vision.image_size, "width": vision.image_size}
    return dict(carried) or {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": size,
    }


def generation_config(carried: Mapping[str, Any], tokenizer: Any, stops: Sequence[int]) -> dict[str, Any]:
    """Content of ``generation_config.json``: the carried one, else the tokenizer's ids that begin, end and pad a text.

    ``stops`` are the token ids that end an answer under the run's template; they are added to those that end generation.
    """
    config = dict(carried) or {"_from_model_config": True, **_special_ids(tokenizer)}
    known = config.get("eos_token_id")
    known = [] if known is None else known if isinstance(known, list) else [known]
    ends = [*known, *(stop for stop in stops if stop not in known)]
    return config | {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else config


def vila_root(
    config: Config, carried: Mapping[str, Any], parts: Parts, tokenizer: Any, trained: bool
) -> dict[str, Any]:
    """Content of the root ``config.json`` of the folder layout; ``parts`` has the configuration of each of ``PARTS``.

    ``trained`` says that the checkpoint was trained by a run, so that the parts which the run trains replace the carried
    ``tune_*`` keys.
    """
    model, data = config.model, config.data
    llm = parts["llm"]
    kept = _kept(carried)
    # These keys of the flat layout mean nothing to the VILA code.
    kept = {key: value for key, value in kept.items() if key not in ("text_config", "vision_config")}
    encoders = {
        f"{medium}_encoder": json.dumps(_encoder(name, ids, tokenizer))
        for medium, name, ids in (
            ("image", "BasicImageEncoder", data.image_separator_ids),
            ("video", "BasicVideoEncoder", data.frame_separator_ids),
        )
    }
    tuned = {
        f"tune_{part}": getattr(config.optim, ours).trainable
        for part, ours in (("language_model", "llm"), ("mm_projector", "projector"), ("vision_tower", "vision"))
    }
    return _FIRST_ROOT | {"chat_template": None, **encoders, **tuned} | kept | (tuned if trained else {}) | {
        "architectures": ["LlavaLlamaModel"],
        # TensorRT-LLM finds the folder of a part by _name_or_path, the VILA code by the key.
        **{f"{part}_cfg": {**config, "_name_or_path": part} for part, config in parts.items()},
        "mm_projector_type": model.projector.type,
        "model_dtype": f"torch.{llm['torch_dtype']}",
        "model_max_length": llm["model_max_length"],
        "model_type": "llava_llama",
        "resume_path": "./",
        **_common(config, carried, tokenizer),
    }  # fmt: skip


def flat_root(config: Config, carried: Mapping[str, Any], parts: Parts, tokenizer: Any) -> dict[str, Any]:
    """Content of the root ``config.json`` of the flat layout; ``parts`` has the configuration of each of ``PARTS``."""
    llm = parts["llm"]
    return {
        "architectures": ["VILAForConditionalGeneration"],
        "mm_projector_type": config.model.projector.type,
        "mm_vision_select_feature": "cls_patch",
        "model_type": "vila",
        "text_config": dict(llm),
        "tie_word_embeddings": llm["tie_word_embeddings"],
        "torch_dtype": llm["torch_dtype"],
        "vision_config": dict(parts["vision_tower"]),
        **_common(config, carried, tokenizer),
    }


def own_section(model: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """The section ``megatron_vila`` of a root configuration: the settings for which neither layout has a key."""
    return {
        "format": METADATA_FORMAT,
        "projector_token_order": model.projector.token_order,
        "frame_separator_ids": list(data.frame_separator_ids),
        "image_separator_ids": list(data.image_separator_ids),
        "num_frames": data.num_frames,
        "fps": data.fps,
        "fps_rule": data.fps_rule,
        "image_aspect": data.image_aspect,
        "max_positions": model.llm.max_positions,
        **asdict(TextRules.of(data)),
    }


def _common(config: Config, carried: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The keys that the root configurations of both layouts have."""
    model, data = config.model, config.data
    common = {
        "fps": data.fps,
        "hidden_size": model.llm.hidden_size,
        "image_aspect_ratio": data.image_aspect,
        "megatron_vila": own_section(model, data),
        "mm_hidden_size": model.vision.hidden_size,
        "mm_vision_select_layer": model.vision.select_layer,
        "num_video_frames": data.num_frames,
        "transformers_version": carried.get("transformers_version") or _VERSIONS[model.projector.token_order],
    }
    if tokenizer is not None:
        common["image_token_id"], common["video_token_id"] = media_token_ids(tokenizer)
    return common


def _encoder(name: str, separator_ids: list[int], tokenizer: Any) -> dict[str, Any]:
    """Settings of VILA's encoder ``name``, which writes a newline after a picture unless ``end_tokens`` says otherwise."""
    encoder: dict[str, Any] = {"_target_": f"llava.model.encoders.{name}"}
    if not separator_ids:
        return encoder | {"end_tokens": None}
    text = "\n" if tokenizer is None else tokenizer.decode(separator_ids)
    return encoder if text == "\n" else encoder | {"end_tokens": text}


def _kind(llm: LanguageConfig) -> str:
    return "qwen2" if llm.qkv_bias else "llama"


def _rope_scaling(factor: float) -> dict[str, Any] | None:
    # Older readers look for "type", newer ones for "rope_type".
    return None if factor == 1.0 else {"type": "linear", "rope_type": "linear", "factor": factor}


def _special_ids(tokenizer: Any) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name, None) for name in names}
    return {name: id_ for name, id_ in ids.items() if id_ is not None}


def _kept(carried: Mapping[str, Any]) -> dict[str, Any]:
    """``carried`` without the keys that name another place or are written in another form."""
    return {key: value for key, value in carried.items() if key not in _DROPPED}
