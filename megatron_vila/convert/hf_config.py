"""Turns Hugging Face configurations into our settings: what the model is, and how its pictures and texts were prepared.

It is the only reader of such configurations. Imports, comparisons and the classes for transformers all use it, so they accept
and refuse the same models with the same messages. Values are checked against fixed lists. Nothing that a configuration names
is imported or run: an unknown model type, projector or ``_target_`` is reported by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_vila.config.schema import Config, DataConfig, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_vila.config.text_rules import TextRules
from megatron_vila.convert.hf_sections import FLAT_KEYS, PARTS, HfSections, decoded
from megatron_vila.convert.token_order import is_legacy, projector_type, suggest_token_order
from megatron_vila.plan.validate import shape_problems, value_problems

METADATA_FORMAT = 2
"""The ``format`` that exports write in the section ``megatron_vila`` of a root configuration; format 1 is read too."""

ROOT_TYPES = ("llava_llama", "vila", "nvila_lite")
LANGUAGE_TYPES = ("llama", "qwen2")
ENCODERS = ("llava.model.encoders.BasicImageEncoder", "llava.model.encoders.BasicVideoEncoder")
DTYPES = ("bfloat16", "float16", "float32", "float64")
SEPARATORS = {"image_separator_ids": "image_encoder", "frame_separator_ids": "video_encoder"}
"""For each of our keys of separator ids, the key of VILA's encoder that holds the same separator as text."""

# transformers leaves these values out of a file, because its classes have them as defaults.
_SIGLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
_UNSUPPORTED = {
    "s2": "features of several scales",
    "dynamic_s2": "features of several scales",
    "ps3": "selection of high-resolution patches",
    "mm_use_im_start_end": "start and end tokens around pictures",
}


@dataclass
class Description:
    """A model in our settings. ``notes`` are remarks for the user.

    ``separator_texts`` has an entry for each key of ``SEPARATORS`` whose token ids the configuration does not hold: the text that
    VILA writes after each picture. ``legacy_prompt`` says that VILA's code had prompts of its own at the time of the model, and
    did not use the tokenizer's chat template. ``dtype`` names the dtype of the weights, None if the configuration does not.
    """

    model: ModelConfig
    data: DataConfig
    separator_texts: dict[str, str] = field(default_factory=dict)
    legacy_prompt: bool = False
    dtype: str | None = None
    notes: list[str] = field(default_factory=list)


def describe_model(
    sections: HfSections,
    problems: list[str],
    token_order: str | None = None,
    fresh_projector: str | None = None,
    has_head: bool = True,
) -> Description:
    """The model that ``sections`` describe; everything that is wrong with it is appended to ``problems``.

    ``token_order``, if given, is used instead of the projector token order that the sections suggest. ``fresh_projector`` is the
    type of the projector that a language model and a tower without a root configuration will get. ``has_head`` says whether the
    tower has SigLIP's pooling head; it counts only if the tower's settings do not say so.
    """
    model = ModelConfig(name=sections.path.resolve().name if sections.path else "")
    description = Description(model, DataConfig())
    _refuse_targets(sections, description, problems)
    if sections.llm:
        model.llm = _language(sections.llm, sections.part("language model"), problems)
    tower = _vision(sections.vision, has_head, sections.part("vision tower"), problems) if sections.vision else None
    model.vision = tower or model.vision
    if sections.root:
        _root(sections, tower, description, token_order, problems)
    else:
        model.projector = ProjectorConfig(fresh_projector or "mlp_downsample", token_order or "row_major")
    # The checks of any run: of values always, of sizes against each other only if all of them could be read.
    config = Config(model=model, data=description.data)
    unfit = [*value_problems(config)] or ([] if problems else [*shape_problems(config)])
    problems += [f"{sections.part('as settings of a run')}, {problem}" for problem in unfit]
    return description


def _language(config: Mapping[str, Any], where: str, problems: list[str]) -> LanguageConfig:
    kind = config.get("model_type")
    if kind not in LANGUAGE_TYPES:
        problems.append(
            f"{where}: model_type={kind!r} is not known; use a language model of type {' or '.join(LANGUAGE_TYPES)}"
        )
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
    """Base and linear factor of the rotary embedding. Each is taken as it is written, also if both are set."""
    newer = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or newer
    if not isinstance(scaling, Mapping) or not isinstance(newer, Mapping):
        problems.append(f"{where}: rope_scaling={scaling!r} is not an object; write null or a type and a factor")
        return 1.0, 1.0
    theta = _Reader({**newer, **config}, where, problems).number("rope_theta", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, 1.0
    if kind != "linear":
        problems.append(
            f"{where}: rope_scaling of type {kind!r} is not known; use a model whose scaling is linear or null"
        )
        return theta, 1.0
    return theta, _Reader(scaling, f"{where}: rope_scaling", problems).number("factor")


def _vision(config: Mapping[str, Any], has_head: bool, where: str, problems: list[str]) -> VisionConfig | None:
    kind = config.get("model_type") or "siglip_vision_model"
    if kind != "siglip_vision_model":
        problems.append(f"{where}: model_type={kind!r} is not known; use a tower of type siglip_vision_model")
        return None
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
        use_head=read.flag("vision_use_head", has_head),
        layer_norm_eps=read.number("layer_norm_eps", 1e-6),
    )


def _root(
    sections: HfSections,
    tower: VisionConfig | None,
    description: Description,
    token_order: str | None,
    problems: list[str],
) -> None:
    """Read projector, feature selection, pictures and texts from the root configuration of a whole model."""
    root, where, model = sections.root, sections.root_file, description.model
    kind = root.get("model_type")
    if kind == "nvila":
        problems.append(
            f"{where}: model_type='nvila' joins features of several scales (dynamic S2), which is not supported; "
            "use an NVILA-Lite model"
        )
    elif kind not in ROOT_TYPES:
        problems.append(f"{where}: model_type={kind!r} is not known; use a whole model of type {' or '.join(ROOT_TYPES)}")
    read = _Reader(root, where, problems)
    for key, meaning in _UNSUPPORTED.items():
        if root.get(key):
            read.expect(key, False, meaning)
    if tower and root.get("vision_resolution") != tower.image_size:
        read.expect("vision_resolution", -1, "pictures of another size than the tower's")
    read.expect("mm_vision_select_feature", "cls_patch", "SigLIP has no class token that could be dropped")
    if tower:
        read.expect("mm_hidden_size", tower.hidden_size, "channels of the projector's input")
    model.vision.select_layer = read.integer("mm_vision_select_layer", -2)
    description.dtype = _dtype(sections, problems)
    own = root.get("megatron_vila") or {}
    if not isinstance(own, Mapping):
        problems.append(f"{where}: megatron_vila={own!r} is not an object; write its keys into {{}}, or leave it out")
    elif own.get("format", METADATA_FORMAT) not in (1, METADATA_FORMAT):
        problems.append(
            f"{where}: megatron_vila.format={own['format']!r} is not known, only 1 and {METADATA_FORMAT}; update megatron_vila"
        )
    else:
        _projector(sections, own, description, token_order, problems)
        _pictures(root, own, where, description, problems)
        _texts(root, own, where, description, problems)


def _dtype(sections: HfSections, problems: list[str]) -> str | None:
    """The dtype in which the weights are stored; None if the configurations do not say it."""
    root, llm = sections.root, sections.llm
    given = (root.get("model_dtype"), *(section.get(key) for section in (root, llm) for key in ("dtype", "torch_dtype")))
    written = next((dtype for dtype in given if dtype is not None), None)
    dtype = None if written is None else str(written).removeprefix("torch.")
    if dtype is not None and dtype not in DTYPES:
        problems.append(f"{sections.root_file}: the dtype {written!r} of the model is not known; use {', '.join(DTYPES)}")
    return dtype


def _projector(
    sections: HfSections, own: Mapping[str, Any], description: Description, token_order: str | None, problems: list[str]
) -> None:
    root = sections.root | {"mm_projector_cfg": sections.projector}
    projector = description.model.projector = ProjectorConfig(projector_type(root))  # type: ignore[arg-type]
    order, reason = (token_order, "") if token_order else suggest_token_order(root)
    if order is None:
        problems.append(
            f"{sections.root_file}: the token order of mlp_downsample is not recorded: {reason}; give --token-order "
            "(projector_token_order= in from_pretrained): legacy_column_major for VILA-1.5 and Llama-3-LongVILA, row_major for "
            "NVILA and Qwen2-LongVILA"
        )
    else:
        projector.token_order = order
        if not token_order and "projector_token_order" not in own:
            description.notes.append(f"projector token order: {order} ({reason})")


def _pictures(
    root: Mapping[str, Any], own: Mapping[str, Any], where: str, description: Description, problems: list[str]
) -> None:
    data, read = description.data, _Reader(root, where, problems)
    ours = _Reader(own, f"{where}: megatron_vila", problems)
    data.num_frames = ours.whole("num_frames", read.whole("num_video_frames", data.num_frames))
    data.fps = ours.number("fps", read.number("fps", 0.0))
    data.fps_rule = ours.text("fps_rule", data.fps_rule)
    aspect = own.get("image_aspect") or root.get("image_aspect_ratio") or "resize"
    data.image_aspect = aspect if aspect in ("resize", "pad") else "resize"
    if data.image_aspect != aspect:
        description.notes.append(
            f"image_aspect_ratio={aspect!r} is not supported: pictures will be resized, and exports will say resize"
        )
    if root.get("num_time_tokens"):
        description.notes.append(f"num_time_tokens={root['num_time_tokens']}: time tokens are trained as plain text")
    for name, key in SEPARATORS.items():
        text = separator_text(root.get(key), f"{where}: {key}", problems)
        if own.get(name) is None:
            description.separator_texts[name] = text
        elif isinstance(own[name], list) and all(type(id_) is int for id_ in own[name]):
            setattr(data, name, list(own[name]))
        else:
            problems.append(f"{where}: megatron_vila.{name}={own[name]!r} is not a list of token ids; write a list, or null")


def separator_text(value: Any, where: str, problems: list[str]) -> str:
    """The text that one of VILA's encoders writes after each picture: a newline unless ``end_tokens`` says otherwise.

    ``value`` holds the encoder's settings, ``where`` names them in messages. What is wrong is appended to ``problems``.
    """
    encoder = _encoder(value)
    if not isinstance(encoder, Mapping):
        problems.append(f"{where}={value!r} describes no encoder; write an object with _target_, or leave it out")
        return ""
    if encoder.get("start_tokens") is not None:
        problems.append(
            f"{where}.start_tokens={encoder['start_tokens']!r}: text before a picture is not supported; use a model without it"
        )
    text = encoder.get("end_tokens", "\n")
    if not isinstance(text, str | None):
        problems.append(f"{where}.end_tokens={text!r} is not a text; write a text, or null for no separator")
        return ""
    return text or ""


def _encoder(value: Any) -> Any:
    """The settings of one of VILA's encoders; a plain string is the name of its class."""
    encoder = decoded(value)
    return {"_target_": encoder} if isinstance(encoder, str) else {} if encoder is None else encoder


def _texts(
    root: Mapping[str, Any], own: Mapping[str, Any], where: str, description: Description, problems: list[str]
) -> None:
    """Read the ``TextRules``. Exports of format 1 lack some of them, which get the values that training had at that time."""
    ours = _Reader(own, f"{where}: megatron_vila", problems)
    early = {"media_format": "verbatim", "parse_control_tokens": True} if own.get("format") == 1 else {}
    for rule in fields(TextRules):
        read: Any = ours.flag if isinstance(rule.default, bool) else ours.text
        setattr(description.data, rule.name, read(rule.name, early.get(rule.name, rule.default)))
    undecided = own.get("template", "") is None if own else is_legacy(root)
    description.legacy_prompt = undecided


def _refuse_targets(sections: HfSections, description: Description, problems: list[str]) -> None:
    """Report every class that a configuration wants to be made, except the two encoders that are built in here."""
    parts = {*FLAT_KEYS.values(), *(f"{part}_cfg" for part in PARTS)}
    root = {key: value for key, value in sections.root.items() if key not in parts}
    root |= {key: _encoder(root[key]) for key in SEPARATORS.values() if key in root}
    found = {"": root, "llm: ": sections.llm, "vision tower: ": sections.vision, "projector: ": sections.projector}
    for section, config in found.items():
        for place, target in _targets(config, ""):
            if target not in ENCODERS:
                problems.append(
                    f"{sections.part(f'{section}{place}')} asks for {target!r} to be run, which is refused; use a model with "
                    f"{' and '.join(name.rpartition('.')[2] for name in ENCODERS)}, which are built in"
                )
        if "auto_map" in config:
            description.notes.append(f"{section or 'root configuration: '}the code that auto_map names is not used")


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


class _Reader:
    """Reads values of a configuration and checks their types. A value that is missing or null gets the default.

    A wrong value is appended to ``problems``, with ``where`` in front, and a harmless one is returned in its place.
    """

    def __init__(self, config: Mapping[str, Any], where: str, problems: list[str]) -> None:
        self.config, self.where, self.problems = config, where, problems

    def integer(self, key: str, default: int | None = None) -> int:
        return self._value(key, default, int, "a whole number", 1)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            self.problems.append(f"{self.where}: {key}={value} must be at least 1")
            return 1
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._value(key, default, (int, float), "a number", 1))

    def text(self, key: str, default: str) -> str:
        return self._value(key, default, str, "a text", default)

    def flag(self, key: str, default: bool) -> bool:
        return self._value(key, default, bool, "true or false", default)

    def expect(self, key: str, wanted: Any, meaning: str = "") -> None:
        """Report ``key`` if it is set to anything but ``wanted``; it may be missing or null. ``meaning`` explains the value."""
        value = self.config.get(key)
        if value is not None and value != wanted:
            meant = f" ({meaning})" if meaning else ""
            self.problems.append(
                f"{self.where}: {key}={value!r}{meant} is not supported, only {wanted!r} is; use another model, or "
                f"write {wanted!r} if the weights were trained with it"
            )

    def _value(self, key: str, default: Any, types: Any, meant: str, instead: Any) -> Any:
        value = self.config.get(key)
        value = default if value is None else value
        if value is None or (isinstance(value, bool) and types is not bool) or not isinstance(value, types):
            found = "is missing" if value is None else f"is {value!r}"
            self.problems.append(f"{self.where}: {key} {found}, but must be {meant}")
            return instead
        return value
