"""Small random models in the exact key sets of published folders, written without the converter's own weight map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_vila.config.schema import Config, DataConfig, ModelConfig
from megatron_vila.convert.hf_config_out import flat_root, language_config, vision_config
from megatron_vila.data.synthetic import corpus
from megatron_vila.data.tokenizer import train_tokenizer

VOCAB = 83

TOWER = {
    "architectures": ["SiglipVisionModel"],
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 16,
    "image_size": 56,
    "intermediate_size": 24,
    "layer_norm_eps": 1e-6,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 14,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 262144,
    "model_max_length": 262144,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 207112184.0,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 262144,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.2",
    "use_cache": True,
    "vocab_size": VOCAB,
}
QWEN2 = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "max_position_embeddings": 1048576,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "linear", "factor": 4.0},
    "rope_theta": 1062356830.0,
    "sliding_window": 131072,
    "transformers_version": "4.44.2",
    "use_sliding_window": False,
}
QWEN2.pop("attention_bias")

FAMILIES: dict[str, dict[str, Any]] = {
    # Llama-3-VILA1.5-8B and Llama-3-LongVILA: no biases, output layer of its own, tower with pooling head.
    "vila-1.5": {"llm": LLAMA, "head": True, "projector": "mlp_downsample", "version": "4.36.2"},
    "longvila-1.5b": {
        "llm": QWEN2 | {"tie_word_embeddings": True, "rope_scaling": None, "rope_theta": 15300000.0},
        "head": True,
        "projector": "mlp_downsample",
        "version": "4.44.2",
    },
    "longvila-7b": {"llm": QWEN2, "head": True, "projector": "mlp_downsample", "version": "4.46.0"},
    "nvila-lite": {
        "llm": QWEN2
        | {"rope_scaling": None, "rope_theta": 1e6, "max_position_embeddings": 32768, "model_max_length": 8192},
        "head": False,
        "projector": "mlp_downsample_3x3_fix",
        "version": "4.46.0",
    },
    "nvila-video": {"llm": QWEN2, "head": False, "projector": "mlp_downsample_2x2_fix", "version": "4.46.0"},
}
"""Published layouts in miniature. ``version`` is the transformers version that the root configuration records."""


def language_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of a causal language model as transformers names them."""
    h, f, heads, kv = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    d = h // heads
    tensors = {"model.embed_tokens.weight": (config["vocab_size"], h), "model.norm.weight": (h,)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (config["vocab_size"], h)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        for name, rows in (("q", heads * d), ("k", kv * d), ("v", kv * d)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = (rows, h)
            if config["model_type"] == "qwen2":
                tensors[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        tensors[f"{layer}.self_attn.o_proj.weight"] = (h, heads * d)
        tensors[f"{layer}.mlp.gate_proj.weight"] = tensors[f"{layer}.mlp.up_proj.weight"] = (f, h)
        tensors[f"{layer}.mlp.down_proj.weight"] = (h, f)
        tensors[f"{layer}.input_layernorm.weight"] = tensors[f"{layer}.post_attention_layernorm.weight"] = (h,)
    return tensors


def tower_tensors(config: dict[str, Any], head: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of a SigLIP vision tower as published files name them."""
    c, f, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]

    def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (c,), f"{name}.bias": (c,)}

    tensors = {
        "embeddings.patch_embedding.weight": (c, 3, patch, patch),
        "embeddings.patch_embedding.bias": (c,),
        "embeddings.position_embedding.weight": ((config["image_size"] // patch) ** 2, c),
        **norm("post_layernorm"),
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{n}"
        tensors |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= linear(f"{layer}.self_attn.{name}", c, c)
        tensors |= linear(f"{layer}.mlp.fc1", f, c) | linear(f"{layer}.mlp.fc2", c, f)
    if head:
        tensors |= {"head.probe": (1, 1, c), "head.attention.in_proj_weight": (3 * c, c)}
        tensors |= {"head.attention.in_proj_bias": (3 * c,)} | linear("head.attention.out_proj", c, c)
        tensors |= norm("head.layernorm") | linear("head.mlp.fc1", f, c) | linear("head.mlp.fc2", c, f)
    return {f"vision_model.{name}": shape for name, shape in tensors.items()}


def projector_tensors(kind: str, c: int, h: int) -> dict[str, tuple[int, ...]]:
    """Tensors of VILA's projectors."""
    linears = {
        "mlp_downsample": {2: (h, 4 * c), 4: (h, h)},
        "mlp_downsample_2x2_fix": {2: (h, 4 * c), 4: (h, h)},
        "mlp_downsample_3x3_fix": {2: (3 * c, 9 * c), 5: (h, 3 * c), 7: (h, h)},
        "mlp2x_gelu": {0: (h, c), 2: (h, h)},
    }
    norms = {"mlp_downsample_3x3_fix": {1: 9 * c, 4: 3 * c}, "mlp2x_gelu": {}}.get(kind, {1: 4 * c})
    if kind == "linear":
        return {"layers.weight": (h, c), "layers.bias": (h,)}
    tensors: dict[str, tuple[int, ...]] = {}
    for n, size in norms.items():
        tensors |= {f"layers.{n}.weight": (size,), f"layers.{n}.bias": (size,)}
    for n, (rows, columns) in linears[kind].items():
        tensors |= {f"layers.{n}.weight": (rows, columns), f"layers.{n}.bias": (rows,)}
    return tensors


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in sorted(shapes.items())}


def model_tensors(family: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """All tensors of a family by flat name."""
    kind = FAMILIES[family]
    shapes = {f"llm.{k}": v for k, v in language_tensors(kind["llm"]).items()}
    shapes |= {f"vision_tower.{k}": v for k, v in tower_tensors(TOWER, kind["head"]).items()}
    shapes |= {
        f"mm_projector.{k}": v
        for k, v in projector_tensors(kind["projector"], TOWER["hidden_size"], kind["llm"]["hidden_size"]).items()
    }
    return random_tensors(shapes, dtype, seed=len(family))


def tower_config(family: str) -> dict[str, Any]:
    return TOWER if FAMILIES[family]["head"] else TOWER | {"vision_use_head": False, "num_image_tokens": 256}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], files: int = 1) -> None:
    """A safetensors file, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    places = {name: f"model-{n % files + 1:05d}-of-{files:05d}.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file, {"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def root_config(family: str) -> dict[str, Any]:
    """A root configuration with the keys that the VILA code writes."""
    kind = FAMILIES[family]
    return {
        "architectures": ["LlavaLlamaModel"],
        "drop_path_rate": 0.0,
        "fps": 0.0,
        "hidden_size": kind["llm"]["hidden_size"],
        "image_aspect_ratio": "resize",
        "image_encoder": json.dumps({"_target_": "llava.model.encoders.BasicImageEncoder"}),
        "interpolate_mode": "linear",
        "llm_cfg": kind["llm"] | {"_name_or_path": "/somewhere/else/llm"},
        "mm_hidden_size": TOWER["hidden_size"],
        "mm_projector_cfg": {"mm_projector_type": kind["projector"], "model_type": "v2l_projector"},
        "mm_use_im_patch_token": True,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": -2,
        "model_dtype": "torch.bfloat16",
        "model_type": "llava_llama",
        "num_video_frames": 256,
        "resume_path": "./vlm",
        "s2": False,
        "transformers_version": kind["version"],
        "tune_language_model": True,
        "video_encoder": {"_target_": "llava.model.encoders.BasicVideoEncoder"},
        "vision_resolution": -1,
        "vision_tower_cfg": tower_config(family),
    }


def write_vila(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, tokenizer: Path | None = None) -> Path:
    """A folder as the VILA code writes it; the language model in two files with an index."""
    tensors = model_tensors(family, dtype)
    for part in ("llm", "vision_tower", "mm_projector"):
        own = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        write_weights(folder / part, own, files=2 if part == "llm" else 1)
    kind = FAMILIES[family]
    write_json(folder / "llm/config.json", kind["llm"])
    write_json(folder / "llm/generation_config.json", {"eos_token_id": [3, 0], "temperature": 0.7, "do_sample": True})
    write_json(folder / "vision_tower/config.json", tower_config(family))
    write_json(
        folder / "vision_tower/preprocessor_config.json", {"image_mean": [0.5] * 3, "size": {"height": 56, "width": 56}}
    )
    write_json(
        folder / "mm_projector/config.json", {"model_type": "v2l_projector", "mm_projector_type": kind["projector"]}
    )
    write_json(folder / "config.json", root_config(family))
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            (folder / "llm" / file.name).write_bytes(file.read_bytes())
    return folder


def write_flat(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder with one state dict."""
    write_weights(folder, model_tensors(family, dtype), files=3)
    kind = FAMILIES[family]
    root = root_config(family)
    for key in ("llm_cfg", "vision_tower_cfg", "mm_projector_cfg", "resume_path"):
        del root[key]
    root |= {
        "architectures": ["VILAForConditionalGeneration"],
        "image_token_id": 151649,
        "mm_projector_type": kind["projector"],
        "model_type": "vila",
        "text_config": kind["llm"],
        "video_token_id": 151650,
        "vision_config": tower_config(family),
    }
    write_json(folder / "config.json", root)
    return folder


def write_tokenizer(folder: Path) -> Path:
    train_tokenizer(corpus(), folder, 400)
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of either layout by flat name, read without the converter."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        prefix = "" if file.parent == folder else f"{file.parent.name}."
        for name, tensor in load_file(file).items():
            assert prefix + name not in found
            found[prefix + name] = tensor
    return found


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), name
    return True


def vila_config(model: ModelConfig, data: DataConfig, tokenizer: Any) -> Any:
    """The configuration that an export of a model of our own settings has in the flat layout."""
    from megatron_vila.hf import VilaConfig

    parts = {
        "llm": language_config(model.llm, {}, "float32", tokenizer),
        "vision_tower": vision_config(model.vision, {}, "float32"),
    }
    return VilaConfig.from_dict(flat_root(Config(model=model, data=data), {}, parts, tokenizer))
