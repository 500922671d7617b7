"""Hugging Face configurations to ours: what the model is, and how its pictures were prepared.

Values are checked against fixed lists. Nothing that a configuration names is imported or run: an unknown model type,
projector or ``_target_`` is a problem that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megatron_vila.config.schema import Config, DataConfig, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_vila.config.text_rules import TextRules
from megatron_vila.convert.hf_folder import HfFolder
from megatron_vila.convert.token_order import is_legacy, projector_type, suggest_token_order
from megatron_vila.errors import ConfigError
from megatron_vila.plan.sizes import PROJECTOR_TYPES
from megatron_vila.plan.validate import validate

METADATA_FORMAT = 2
"""Format of the section ``megatron_vila`` in a root configuration."""

ROOT_TYPES = ("llava_llama", "vila", "nvila_lite")
LANGUAGE_TYPES = ("llama", "qwen2")
ENCODERS = ("llava.model.encoders.BasicImageEncoder", "llava.model.encoders.BasicVideoEncoder")

# What transformers leaves out of a file because its classes have it as default.
_SIGLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
UNSUPPORTED = {
    "s2": "features of several scales",
    "dynamic_s2": "features of several scales",
    "ps3": "selection of high-resolution patches",
    "mm_use_im_start_end": "start and end tokens around pictures",
}


@dataclass
class Description:
    """A model in our terms. ``separator`` is the text written after each frame or picture unless ``data`` has its ids;
    ``legacy_prompt``: VILA's code did not use the tokenizer's chat template then. ``notes`` are for the user."""

    model: ModelConfig
    data: DataConfig
    separator: str | None = "\n"
    has_separator_ids: bool = False
    legacy_prompt: bool = False
    notes: list[str] = field(default_factory=list)


def describe_model(
    folder: HfFolder, projector: str | None, token_order: str | None, problems: list[str]
) -> Description:
    """The model in ``folder``; everything that is wrong is appended to ``problems``.

    ``projector`` is the type of a fresh one (``parts`` only); ``token_order`` wins over what the folder suggests.
    """
    model, data = ModelConfig(name=folder.path.resolve().name), DataConfig()
    description = Description(model, data)
    _refuse_targets(folder, problems)
    model.llm = _language(folder.llm, f"{folder.path}: language model", problems)
    use_head = any(name.startswith("vision_tower.vision_model.head.") for name in folder.tensors)
    if folder.vision:
        model.vision = _vision(folder.vision, use_head, f"{folder.path}: vision tower", problems)
    if folder.kind == "parts":
        model.projector = ProjectorConfig(projector or "mlp_downsample", token_order or "row_major")
        _check_projector(model.projector, folder, problems)
    elif folder.kind in ("vila", "flat"):
        _root(folder, description, token_order, problems)
    if not problems:
        try:
            # Shapes that do not fit together are told as for any run.
            validate(Config(model=model), world_size=1)
        except ConfigError as error:
            problems += [line.removeprefix("- ") for line in str(error).splitlines()[1:]]
    return description


def _language(config: Mapping[str, Any], where: str, problems: list[str]) -> LanguageConfig:
    kind = config.get("model_type")
    if kind not in LANGUAGE_TYPES:
        problems.append(f"{where}: model_type={kind!r} is not known; this converter reads {', '.join(LANGUAGE_TYPES)}")
        return LanguageConfig()
    read = _Reader(config, where, problems)
    heads, hidden = read.whole("num_attention_heads"), read.whole("hidden_size")
    theta, factor = _rope(config, where, problems)
    read.expect("hidden_act", "silu")
    for key in ("use_sliding_window", "attention_bias", "mlp_bias"):
        read.expect(key, False)
    read.expect("partial_rotary_factor", 1.0)
    head_dim = read.whole("head_dim", hidden // max(heads, 1))
    return LanguageConfig(
        num_layers=read.whole("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=read.whole("num_key_value_heads", heads),
        head_dim=None if head_dim * heads == hidden else head_dim,
        ffn_hidden_size=read.whole("intermediate_size"),
        vocab_size=read.whole("vocab_size"),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        qkv_bias=kind == "qwen2",
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_theta=theta,
        rope_scaling_factor=factor,
        max_positions=read.whole("max_position_embeddings"),
    )


def _rope(config: Mapping[str, Any], where: str, problems: list[str]) -> tuple[float, float]:
    """Base and linear factor; both are taken as they are, also together."""
    newer = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or newer
    if not isinstance(scaling, Mapping) or not isinstance(newer, Mapping):
        problems.append(f"{where}: rope_scaling={scaling!r} is no object; write null or a type and a factor")
        return 1.0, 1.0
    theta = _Reader({**newer, **config}, where, problems).number("rope_theta", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, 1.0
    if kind != "linear":
        problems.append(
            f"{where}: rope_scaling of type {kind!r} is not known; this model scales positions linearly or not"
        )
        return theta, 1.0
    return theta, _Reader(scaling, f"{where}: rope_scaling", problems).number("factor")


def _vision(config: Mapping[str, Any], has_head: bool, where: str, problems: list[str]) -> VisionConfig:
    kind = config.get("model_type", "siglip_vision_model")
    if kind != "siglip_vision_model":
        problems.append(f"{where}: model_type={kind!r} is not known; this converter reads siglip_vision_model")
        return VisionConfig()
    read = _Reader(_SIGLIP_DEFAULTS | dict(config), where, problems)
    read.expect("hidden_act", "gelu_pytorch_tanh")
    read.expect("num_channels", 3)
    return VisionConfig(
        hidden_size=read.whole("hidden_size"),
        num_layers=read.whole("num_hidden_layers"),
        num_heads=read.whole("num_attention_heads"),
        ffn_hidden_size=read.whole("intermediate_size"),
        image_size=read.whole("image_size"),
        patch_size=read.whole("patch_size"),
        use_head=bool(config.get("vision_use_head", has_head)),
        layer_norm_eps=read.number("layer_norm_eps", 1e-6),
    )


def _root(folder: HfFolder, description: Description, token_order: str | None, problems: list[str]) -> None:
    """Projector, feature selection and pictures, from the root configuration of a whole model."""
    root, where, model = folder.root, f"{folder.path / 'config.json'}", description.model
    kind = root.get("model_type")
    if kind == "nvila":
        problems.append(
            f"{where}: model_type='nvila' joins features of several scales (dynamic S2), unknown to this model"
        )
    elif kind not in ROOT_TYPES:
        problems.append(f"{where}: model_type={kind!r} is not known; this converter reads {', '.join(ROOT_TYPES)}")
    for key, meaning in UNSUPPORTED.items():
        if root.get(key):
            problems.append(f"{where}: {key}={root[key]!r} ({meaning}) is unknown to this model")
    read = _Reader(root, where, problems)
    read.expect("vision_resolution", -1)
    read.expect("mm_vision_select_feature", "cls_patch")
    read.expect("mm_hidden_size", model.vision.hidden_size)
    model.vision.select_layer = read.integer("mm_vision_select_layer", -2)
    named = folder.projector.get("mm_projector_type") or projector_type(root)
    model.projector = ProjectorConfig(named, token_order or "row_major")
    if _check_projector(model.projector, folder, problems) and token_order is None:
        _settle_token_order(root | {"mm_projector_type": named, "mm_projector_cfg": {}}, where, description, problems)
    _pictures(root, where, description, problems)


def _check_projector(projector: ProjectorConfig, folder: HfFolder, problems: list[str]) -> bool:
    if projector.type not in PROJECTOR_TYPES:
        problems.append(
            f"{folder.path}: mm_projector_type={projector.type!r} is not known; this model has {', '.join(PROJECTOR_TYPES)}"
        )
        return False
    if projector.token_order != "row_major" and projector.type != "mlp_downsample":
        problems.append(
            f"--token-order {projector.token_order} belongs to mlp_downsample, not to {projector.type}; leave it out"
        )
    return True


def _settle_token_order(root: Mapping[str, Any], where: str, description: Description, problems: list[str]) -> None:
    try:
        order, reason = suggest_token_order(root)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return
    if order is None:
        problems.append(
            f"{where}: the token order of mlp_downsample cannot be told: {reason}; give --token-order legacy_column_major for "
            "VILA-1.5 and Llama-3-LongVILA, --token-order row_major for NVILA and Qwen2-LongVILA"
        )
        return
    description.model.projector.token_order = order
    description.notes.append(f"projector token order: {order} ({reason})")


def _pictures(root: Mapping[str, Any], where: str, description: Description, problems: list[str]) -> None:
    own = root.get("megatron_vila") or {}
    if own.get("format", METADATA_FORMAT) > METADATA_FORMAT:
        problems.append(
            f"{where}: megatron_vila.format={own['format']} is newer than {METADATA_FORMAT}; update megatron_vila"
        )
        return
    data, read = description.data, _Reader(root, where, problems)
    description.legacy_prompt = not own and is_legacy(root)
    if own:
        for name, value in asdict(stored_text_rules(own)).items():
            setattr(data, name, value)
    data.num_frames = own.get("num_frames", read.whole("num_video_frames", data.num_frames))
    data.fps = own.get("fps", read.number("fps", 0.0))
    data.fps_rule = own.get("fps_rule", "spread")
    aspect = own.get("image_aspect", root.get("image_aspect_ratio") or "resize")
    data.image_aspect = aspect if aspect in ("resize", "pad") else "resize"
    if data.image_aspect != aspect:
        description.notes.append(
            f"image_aspect_ratio={aspect!r} is unknown here: pictures will be resized, exports say so"
        )
    if root.get("num_time_tokens"):
        description.notes.append(f"num_time_tokens={root['num_time_tokens']}: time tokens are trained as plain text")
    separators = {_separator(root, key, where, problems) for key in ("image_encoder", "video_encoder")}
    if "frame_separator_ids" in own:
        data.frame_separator_ids = list(own["frame_separator_ids"])
        data.image_separator_ids = list(own.get("image_separator_ids", []))
        description.has_separator_ids = True
    elif len(separators) > 1:
        problems.append(
            f"{where}: image_encoder and video_encoder end differently; add megatron_vila.frame_separator_ids"
        )
    else:
        (description.separator,) = separators


def stored_text_rules(own: Mapping[str, Any]) -> TextRules:
    """The rules in the section ``megatron_vila``, where it is of format 1 completed by what was done then."""
    early = {"media_format": "verbatim", "parse_control_tokens": True} if own.get("format") == 1 else {}
    given = {field.name: own[field.name] for field in fields(TextRules) if field.name in own}
    return TextRules(**{**early, **given})


def _separator(root: Mapping[str, Any], key: str, where: str, problems: list[str]) -> str | None:
    """The text that an encoder of VILA's adds after each picture: a newline unless it says otherwise."""
    encoder = decoded(root.get(key))
    if not isinstance(encoder, Mapping):
        return "\n"
    if encoder.get("start_tokens") is not None:
        problems.append(
            f"{where}: {key}.start_tokens={encoder['start_tokens']!r}: this model writes nothing before a picture"
        )
    return encoder.get("end_tokens", "\n")


def _refuse_targets(folder: HfFolder, problems: list[str]) -> None:
    """Name every class that a configuration wants to be made, but for the two encoders that this model has built in."""
    sections = {"": folder.root, "llm: ": folder.llm, "vision tower: ": folder.vision, "projector: ": folder.projector}
    for section, config in sections.items():
        for place, target in _targets(config, ""):
            if target not in ENCODERS:
                problems.append(
                    f"{folder.path}: {section}{place} asks for {target!r} to be run, which is refused; this model has "
                    f"{' and '.join(name.rpartition('.')[2] for name in ENCODERS)} built in"
                )
        if "auto_map" in config:
            folder.ignored.append(f"auto_map in {section or 'the root '}configuration: its code is not used")


def _targets(value: Any, place: str) -> Iterable[tuple[str, Any]]:
    value = decoded(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "_target_":
                yield place or key, item
            else:
                yield from _targets(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _targets(item, place)


def decoded(value: Any) -> Any:
    """What a value means: VILA writes its encoders as objects or as strings of JSON."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


class _Reader:
    """Values of a configuration with their types checked."""

    def __init__(self, config: Mapping[str, Any], where: str, problems: list[str]) -> None:
        self.config, self.where, self.problems = config, where, problems

    def integer(self, key: str, default: int | None = None) -> int:
        return self._value(key, default, int, "a whole number")

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            self.problems.append(f"{self.where}: {key}={value} must be at least 1")
            return 1
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._value(key, default, (int, float), "a number"))

    def expect(self, key: str, wanted: Any) -> None:
        """A key that may be missing or null but must not ask for something else."""
        value = self.config.get(key)
        if value is not None and value != wanted:
            self.problems.append(f"{self.where}: {key}={value!r} is unknown to this model, which has {wanted!r}")

    def _value(self, key: str, default: Any, types: Any, meant: str) -> Any:
        value = self.config.get(key)
        value = default if value is None else value
        if value is None or isinstance(value, bool) or not isinstance(value, types):
            found = "is missing" if value is None else f"is {value!r}"
            self.problems.append(f"{self.where}: {key} {found}, but must be {meant}")
            return 1
        return value
