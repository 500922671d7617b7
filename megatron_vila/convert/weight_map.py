"""The weight map: which tensor of a distributed checkpoint holds which tensors of a Hugging Face folder.

It is a table that imports and exports both use. A row names our key, the Hugging Face tensors that it holds with their shapes,
and how they are put together. ``*`` is a layer's number; ``[*]`` says that our key stacks the layers on a leading axis. Hugging
Face names carry the prefixes of the flat layout (``llm.``, ``vision_tower.``, ``mm_projector.``); the folder layout has one
folder for each. ``python -m megatron_vila.convert`` prints the rows (docs/checkpoints.md).

Legend of shapes: vocab, hidden, ffn: rows of the embedding table, width and feed-forward width of the language model; q, kv:
widths of all query heads and of all key/value heads; tower, tower_ffn: width and feed-forward width of the vision tower;
patches: patches of a picture; patch: side of a patch in pixels; cell: channels of the patches that the projector merges into
one token; wide: 3 * tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_vila.config.schema import ModelConfig
from megatron_vila.convert.transforms import COPY, FUSE_QKV, PAD_ROWS, STACK_ROWS, Transform
from megatron_vila.plan.geometry import POOL_SIDE, patches_per_square
from megatron_vila.plan.sizes import head_dim


@dataclass(frozen=True)
class Row:
    """``ours`` is our key, ``hf`` maps each Hugging Face name to its shape in words of the legend, ``how`` puts them together.

    A model has the row only if it has the feature ``only_with``; empty means that every model has it.
    """

    ours: str
    hf: Mapping[str, str]
    how: Transform = COPY
    only_with: str = ""


@dataclass(frozen=True)
class Entry:
    """A row of the map for one layer of one model, with all sizes as numbers.

    ``key`` names our tensor. Where layers are stacked it has ``layers`` places on a leading axis, and the entry is the one at
    index ``layer``, which is None otherwise. ``shape`` is that of our tensor, without that axis and with padding rows of the
    vocabulary; ``tensors`` maps the Hugging Face names to their shapes.
    """

    key: str
    layer: int | None
    layers: int
    shape: tuple[int, ...]
    tensors: Mapping[str, tuple[int, ...]]
    how: Transform

    @property
    def place(self) -> str:
        """How messages name the place of the tensors in a distributed checkpoint."""
        return self.key if self.layer is None else f"{self.key}[{self.layer}]"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor ``key`` in a distributed checkpoint."""
        return self.shape if self.layer is None else (self.layers, *self.shape)


def _layer(ours: str, hf: Mapping[str, str], how: Transform = COPY, only_with: str = "") -> Row:
    names = {f"llm.model.layers.*.{name}": shape for name, shape in hf.items()}
    return Row(f"llm.decoder.layers[*].{ours}", names, how, only_with)


LANGUAGE = (
    Row("llm.embedding.word_embeddings.weight", {"llm.model.embed_tokens.weight": "vocab hidden"}, PAD_ROWS),
    _layer("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": "hidden"}),
    _layer(
        "self_attention.linear_qkv.weight",
        {
            "self_attn.q_proj.weight": "q hidden",
            "self_attn.k_proj.weight": "kv hidden",
            "self_attn.v_proj.weight": "kv hidden",
        },
        FUSE_QKV,
    ),
    _layer(
        "self_attention.linear_qkv.bias",
        {"self_attn.q_proj.bias": "q", "self_attn.k_proj.bias": "kv", "self_attn.v_proj.bias": "kv"},
        FUSE_QKV,
        only_with="qkv bias",
    ),
    _layer("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "hidden q"}),
    _layer("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": "hidden"}),
    _layer(
        "mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"}, STACK_ROWS
    ),
    _layer("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "hidden ffn"}),
    Row("llm.decoder.final_layernorm.weight", {"llm.model.norm.weight": "hidden"}),
    Row(
        "llm.output_layer.weight",
        {"llm.lm_head.weight": "vocab hidden"},
        PAD_ROWS,
        only_with="an output layer of its own",
    ),
)


def _tower(name: str, shape: str, only_with: str = "") -> Row:
    return Row(f"vision.vision_model.{name}", {f"vision_tower.vision_model.{name}": shape}, only_with=only_with)


def _linear(name: str, rows: str, columns: str, only_with: str = "") -> tuple[Row, Row]:
    return _tower(f"{name}.weight", f"{rows} {columns}", only_with), _tower(f"{name}.bias", rows, only_with)


def _norm(name: str, only_with: str = "") -> tuple[Row, Row]:
    return _tower(f"{name}.weight", "tower", only_with), _tower(f"{name}.bias", "tower", only_with)


_HEAD = "a pooling head"

VISION = (
    _tower("embeddings.patch_embedding.weight", "tower 3 patch patch"),
    _tower("embeddings.patch_embedding.bias", "tower"),
    _tower("embeddings.position_embedding.weight", "patches tower"),
    *_norm("encoder.layers.*.layer_norm1"),
    *_linear("encoder.layers.*.self_attn.q_proj", "tower", "tower"),
    *_linear("encoder.layers.*.self_attn.k_proj", "tower", "tower"),
    *_linear("encoder.layers.*.self_attn.v_proj", "tower", "tower"),
    *_linear("encoder.layers.*.self_attn.out_proj", "tower", "tower"),
    *_norm("encoder.layers.*.layer_norm2"),
    *_linear("encoder.layers.*.mlp.fc1", "tower_ffn", "tower"),
    *_linear("encoder.layers.*.mlp.fc2", "tower", "tower_ffn"),
    *_norm("post_layernorm"),
    _tower("head.probe", "1 1 tower", _HEAD),
    _tower("head.attention.in_proj_weight", "wide tower", _HEAD),
    _tower("head.attention.in_proj_bias", "wide", _HEAD),
    *_linear("head.attention.out_proj", "tower", "tower", _HEAD),
    *_norm("head.layernorm", _HEAD),
    *_linear("head.mlp.fc1", "tower_ffn", "tower", _HEAD),
    *_linear("head.mlp.fc2", "tower", "tower_ffn", _HEAD),
)


def _projector(shapes: Mapping[str, str]) -> tuple[Row, ...]:
    return tuple(
        Row(f"projector.layers.{name}", {f"mm_projector.layers.{name}": shape}) for name, shape in shapes.items()
    )


_TWO_BY_TWO = _projector(
    {
        "1.weight": "cell",
        "1.bias": "cell",
        "2.weight": "hidden cell",
        "2.bias": "hidden",
        "4.weight": "hidden hidden",
        "4.bias": "hidden",
    }
)

PROJECTOR = {
    "mlp_downsample": _TWO_BY_TWO,
    "mlp_downsample_2x2_fix": _TWO_BY_TWO,
    "mlp_downsample_3x3_fix": _projector(
        {
            "1.weight": "cell",
            "1.bias": "cell",
            "2.weight": "wide cell",
            "2.bias": "wide",
            "4.weight": "wide",
            "4.bias": "wide",
            "5.weight": "hidden wide",
            "5.bias": "hidden",
            "7.weight": "hidden hidden",
            "7.bias": "hidden",
        }
    ),
    "linear": _projector({"weight": "hidden tower", "bias": "hidden"}),
    "mlp2x_gelu": _projector(
        {"0.weight": "hidden tower", "0.bias": "hidden", "2.weight": "hidden hidden", "2.bias": "hidden"}
    ),
}
"""Rows of each projector type."""


def entries(model: ModelConfig) -> list[Entry]:
    """An entry for every tensor of ``model``: of language model, tower and projector, layer by layer.

    Each pair of our key and a layer, and each Hugging Face name, occurs once. Raises ``KeyError`` for an unknown projector type.
    """
    sizes, has = _sizes(model), _features(model)
    found: list[Entry] = []
    for rows, layers in (
        (LANGUAGE, model.llm.num_layers),
        (VISION, model.vision.num_layers),
        (PROJECTOR[model.projector.type], 0),
    ):
        present = [row for row in rows if not row.only_with or row.only_with in has]
        found += [_entry(row, None, 0, sizes, model) for row in present if "*" not in row.ours]
        found += [
            _entry(row, layer, layers, sizes, model) for layer in range(layers) for row in present if "*" in row.ours
        ]
    return found


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor of ``model`` by flat name."""
    return {name: shape for entry in entries(model) for name, shape in entry.tensors.items()}


def describe() -> str:
    """The weight map as Markdown tables."""
    lines: list[str] = []
    parts = {"Language model": LANGUAGE, "Vision tower": VISION}
    parts |= {f"Projector `{kind}`": rows for kind, rows in PROJECTOR.items() if kind != "mlp_downsample_2x2_fix"}
    for title, rows in parts.items():
        title = title.replace("`mlp_downsample`", "`mlp_downsample` and `mlp_downsample_2x2_fix`")
        lines += [f"### {title}", "", "| Hugging Face | shape | ours | how |", "|---|---|---|---|"]
        lines += [_describe_row(row) for row in rows]
        lines.append("")
    return "\n".join(lines)


def _describe_row(row: Row) -> str:
    names = "<br>".join(f"`{name}`" for name in row.hf)
    dims = "<br>".join(shape.replace(" ", ", ") for shape in row.hf.values())
    how = row.how.name + (f"; only with {row.only_with}" if row.only_with else "")
    return f"| {names} | {dims} | `{row.ours}` | {how} |"


def _entry(row: Row, layer: int | None, layers: int, sizes: Mapping[str, int], model: ModelConfig) -> Entry:
    tensors = {
        name.replace("*", str(layer)): tuple(int(d) if d.isdigit() else sizes[d] for d in shape.split())
        for name, shape in row.hf.items()
    }
    stacked = "[*]" in row.ours
    return Entry(
        key=row.ours.replace("[*]", "").replace("*", str(layer)),
        layer=layer if stacked else None,
        layers=layers if stacked else 0,
        shape=row.how.shape(list(tensors.values())),
        tensors=tensors,
        how=row.how,
    )


def _sizes(model: ModelConfig) -> dict[str, int]:
    llm, vision = model.llm, model.vision
    return {
        "vocab": llm.vocab_size,
        "hidden": llm.hidden_size,
        "ffn": llm.ffn_hidden_size,
        "q": llm.num_heads * head_dim(llm),
        "kv": llm.num_kv_heads * head_dim(llm),
        "tower": vision.hidden_size,
        "tower_ffn": vision.ffn_hidden_size,
        "patches": patches_per_square(vision),
        "patch": vision.patch_size,
        "wide": 3 * vision.hidden_size,
        "cell": POOL_SIDE[model.projector.type] ** 2 * vision.hidden_size,
    }


def _features(model: ModelConfig) -> set[str]:
    """The features of ``model`` that rows may ask for in ``only_with``."""
    features = {
        "qkv bias": model.llm.qkv_bias,
        "an output layer of its own": not model.llm.tie_embeddings,
        _HEAD: model.vision.use_head,
    }
    return {name for name, present in features.items() if present}
