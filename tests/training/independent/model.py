"""VILA from stock modules: SigLIP and Qwen2 or Llama of transformers, configured by hand, and a projector in plain torch.

Legend: F frames, P patches of a frame, C tower width, L tokens of a document, H width of the language model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

VOCABULARY = 259  # three special tokens and a token for each byte

TOWER = {
    "attention_dropout": 0.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 12,
    "image_size": 30,  # four patches a side and two pixels that nobody sees
    "intermediate_size": 20,
    "layer_norm_eps": 0.03,
    "num_attention_heads": 3,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 7,
}
_LANGUAGE = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 24,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


@dataclass(frozen=True)
class Shape:
    """One kind of model: settings of the language model as published files write them, and what joins it to the tower."""

    language: dict[str, Any]
    projector: str
    column_major: bool
    select_layer: int
    head: bool
    rope_factor: float
    rope_theta: float


QWEN2 = Shape(
    language=_LANGUAGE
    | {"intermediate_size": 20, "num_hidden_layers": 2, "rms_norm_eps": 0.05, "tie_word_embeddings": False},
    projector="mlp_downsample",
    column_major=False,
    select_layer=-2,
    head=True,
    rope_factor=1.7,
    rope_theta=37.0,
)
LLAMA = Shape(
    language=_LANGUAGE
    | {
        "attention_bias": False,
        "head_dim": 8,
        "intermediate_size": 28,
        "mlp_bias": False,
        "num_hidden_layers": 3,
        "rms_norm_eps": 0.02,
        "tie_word_embeddings": True,
    },
    projector="mlp_downsample_3x3_fix",
    column_major=False,
    select_layer=-3,
    head=False,
    rope_factor=1.0,
    rope_theta=211.0,
)
LEGACY = Shape(QWEN2.language, "mlp_downsample", True, 1, True, 2.5, 83.0)
"""As Llama-3-LongVILA has its visual tokens: column by column."""


class Cells(nn.Module):
    """Joins the patches of cells of ``rate`` x ``rate``, as VILA's downsampling projectors do. [F, P, C] -> [F, T, rate^2 C]."""

    def __init__(self, rate: int, column_major: bool) -> None:
        super().__init__()
        self.rate, self.column_major = rate, column_major

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        frames, patches, channels = features.shape
        side = round(patches**0.5)
        cells = -(-side // self.rate)
        places = [(i, j) for i in range(cells) for j in range(cells)]
        if self.column_major:
            places = [(i, j) for j in range(cells) for i in range(cells)]
        nothing = features.new_zeros(frames, channels)
        tokens = []
        for i, j in places:
            rows = range(i * self.rate, (i + 1) * self.rate)
            columns = range(j * self.rate, (j + 1) * self.rate)
            parts = [features[:, y * side + x] if max(y, x) < side else nothing for y in rows for x in columns]
            tokens.append(torch.cat(parts, dim=1))
        return torch.stack(tokens, dim=1)


class Projector(nn.Module):
    """The two projectors of published models, under the names of their files."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        c, h = TOWER["hidden_size"], shape.language["hidden_size"]
        if shape.projector == "mlp_downsample":
            middle = [nn.LayerNorm(4 * c, eps=1e-5), nn.Linear(4 * c, h), nn.GELU(), nn.Linear(h, h)]
            self.layers = nn.Sequential(Cells(2, shape.column_major), *middle)
        else:
            middle = [nn.LayerNorm(9 * c, eps=1e-5), nn.Linear(9 * c, 3 * c), nn.GELU(), nn.LayerNorm(3 * c, eps=1e-5)]
            end = [nn.Linear(3 * c, h), nn.GELU(), nn.Linear(h, h)]
            self.layers = nn.Sequential(Cells(3, shape.column_major), *middle, *end)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


class Rotary(nn.Module):
    """Cosines and sines of linearly scaled positions in float64; transformers rounds them to float32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads, hidden = self.shape.language["num_attention_heads"], self.shape.language["hidden_size"]
        dim = self.shape.language.get("head_dim", hidden // heads)
        speed = self.shape.rope_theta ** (-torch.arange(0, dim, 2).double() / dim)
        angle = position_ids[0, :, None].double() / self.shape.rope_factor * speed
        angle = torch.cat([angle, angle], dim=-1)[None]
        return angle.cos(), angle.sin()


class Vila(nn.Module):
    """The whole model in float64, one document at a time.

    ``exact`` puts float64 in the two places where transformers always computes in float32: its RMSNorm becomes torch's, and
    the rotary angles are written out.
    """

    def __init__(self, shape: Shape, exact: bool = True) -> None:
        super().__init__()
        self.shape = shape
        rope = {"rope_type": "linear", "factor": shape.rope_factor, "rope_theta": shape.rope_theta}
        if shape.rope_factor == 1:
            rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
        qwen2 = shape.language.get("mlp_bias") is None
        config, language = (Qwen2Config, Qwen2ForCausalLM) if qwen2 else (LlamaConfig, LlamaForCausalLM)
        self.vision_tower = SiglipVisionModel(
            SiglipVisionConfig(**TOWER, vision_use_head=shape.head, attn_implementation="sdpa")
        )
        self.mm_projector = Projector(shape)
        self.llm = language(config(**shape.language, rope_parameters=rope, attn_implementation="sdpa"))
        if exact:
            self.llm.model.rotary_emb = Rotary(shape)
            for owner in self.llm.modules():
                for name, module in list(owner.named_children()):
                    if type(module).__name__.endswith("RMSNorm"):
                        setattr(owner, name, nn.RMSNorm(len(module.weight), eps=shape.language["rms_norm_eps"]))
        self.double()

    def frames(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens [F, T, H] of pixels [F, 3, 30, 30]."""
        states = self.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        return self.mm_projector(states[self.shape.select_layer])

    def forward(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Logits [L, vocabulary]; a place of ``ids`` that is -1 takes the next token of the frames."""
        embeddings = self.llm.get_input_embeddings()(ids.clamp(min=0))
        if len(pixels):
            embeddings = embeddings.masked_scatter((ids == -1)[:, None], self.frames(pixels).flatten(0, 1))
        return self.llm(inputs_embeds=embeddings[None], use_cache=False).logits[0]

    def part(self, name: str) -> nn.Module:
        """vision, projector or llm, as the settings of rates call them."""
        return {"vision": self.vision_tower, "projector": self.mm_projector, "llm": self.llm}[name]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by the names of published files."""
        found = {}
        for name, parameter in self.named_parameters():
            if name.startswith("vision_tower.") and ".vision_model." not in name:
                name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
            found[name] = parameter
        return found

    @torch.no_grad()
    def load(self, folder: Path) -> Vila:
        """Take the weights of a folder with the parts in folders of their own; each must be there, and no other."""
        stored = {}
        for part in ("llm", "vision_tower", "mm_projector"):
            for file in sorted((folder / part).glob("*.safetensors")):
                for name, tensor in load_file(file).items():
                    level = "" if part != "vision_tower" or name.startswith("vision_model.") else "vision_model."
                    stored[f"{part}.{level}{name}"] = tensor
        mine = self.tensors()
        assert sorted(stored) == sorted(mine), sorted(set(stored) ^ set(mine))
        for name, parameter in mine.items():
            parameter.copy_(stored[name])
        return self


@torch.no_grad()
def randomized(shape: Shape, seed: int) -> Vila:
    """A model whose every weight matters: norms are not one, biases are not zero."""
    model, generator = Vila(shape), torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.tensors().items()):
        # Rounded to float32, as files hold it.
        values = torch.randn(parameter.shape, generator=generator)
        norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.copy_(1 + 0.3 * values if norm else 0.3 * values)
    return model


def write_folder(folder: Path, model: Vila, tokenizer: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model as VILA's code writes it: llm/, vision_tower/, mm_projector/ and a root configuration."""
    shape = model.shape
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if "mlp_bias" not in shape.language:
        kind = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
    scaling = None if shape.rope_factor == 1 else {"type": "linear", "factor": shape.rope_factor}
    language = shape.language | kind | {"rope_theta": shape.rope_theta, "rope_scaling": scaling}
    tower = TOWER | {"model_type": "siglip_vision_model", "vision_use_head": shape.head}
    root = {
        "architectures": ["LlavaLlamaModel"],
        "hidden_size": shape.language["hidden_size"],
        "image_aspect_ratio": "resize",
        "mm_hidden_size": TOWER["hidden_size"],
        "mm_projector_cfg": {"mm_projector_type": shape.projector, "model_type": "v2l_projector"},
        "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": shape.select_layer,
        "model_type": "llava_llama",
        "num_video_frames": 5,
        "transformers_version": "4.37.2" if shape.column_major else "4.46.0",
        "llm_cfg": language,
        "vision_tower_cfg": tower,
    }
    projector = {"mm_projector_type": shape.projector, "model_type": "v2l_projector"}
    tensors = model.tensors()
    for part, config in (("llm", language), ("vision_tower", tower), ("mm_projector", projector)):
        (folder / part).mkdir(parents=True)
        own = {n.removeprefix(f"{part}."): t.detach().to(dtype).contiguous() for n, t in tensors.items() if n.startswith(part)}
        save_file(own, folder / part / "model.safetensors", {"format": "pt"})
        (folder / part / "config.json").write_text(json.dumps(config))
    for file in tokenizer.iterdir():
        (folder / "llm" / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(root))
    return folder
