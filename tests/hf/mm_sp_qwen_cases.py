"""Stock Qwen-VL models with random weights and no setting at its default, and samples for them."""

from __future__ import annotations

import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
IMAGE, VIDEO, START, END = 61, 65, 62, 63
MERGE, PATCH = 2, 2 * 3 * 6 * 6  # two frames of 6 x 6 pixels in three colors

_CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
}


def config(name: str, **settings) -> Qwen2VLConfig:
    """The configuration ``name``; ``settings`` are those of its language model."""
    text = {
        "vocab_size": 67, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "rms_norm_eps": 3e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 9000.0, "mrope_section": [1, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 16, "num_heads": 2, "patch_size": 6, "temporal_patch_size": 2, "spatial_merge_size": MERGE,
        "initializer_range": 0.2, "in_channels": 3,
    }  # fmt: skip
    if name == "qwen2_vl":
        vision |= {"embed_dim": 16, "hidden_size": 24, "mlp_ratio": 3, "hidden_act": "gelu_pytorch_tanh"}
    elif name == "qwen2_5_vl":
        # A window has 2 x 2 tokens.
        vision |= {
            "intermediate_size": 20, "window_size": 24, "fullatt_block_indexes": [1, 3], "out_hidden_size": 24,
            "tokens_per_second": 3,
        }  # fmt: skip
    else:
        text |= {"head_dim": 12, "rope_parameters": text["rope_parameters"] | {"mrope_section": [2, 2, 2]}}
        vision |= {
            "intermediate_size": 20, "out_hidden_size": 24, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2],
        }  # fmt: skip
    if name == "qwen3_vl_moe":
        text |= {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "mlp_only_layers": [1]}
    return _CLASSES[name][0](
        text_config=text | settings, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip


def build_qwen(name: str, **settings) -> PreTrainedModel:
    """The model ``name`` with random weights. The caller seeds."""
    return _CLASSES[name][1](config(name, **settings))


def qwen_sample(name: str, seed: int, layout: list[int | tuple[int, ...]]) -> dict:
    """A sample from a layout: a number is so many text tokens, (h, w) a picture of such a grid, (t, h, w) a video."""
    generator = torch.Generator().manual_seed(seed)

    def text(tokens: int) -> list[int]:
        return torch.randint(0, 60, (tokens,), generator=generator).tolist()

    ids: list[int] = []
    media: dict[int, list[tuple[int, ...]]] = {IMAGE: [], VIDEO: []}
    for part in layout:
        if isinstance(part, int):
            ids += text(part)
            continue
        grid = part if len(part) == 3 else (1, *part)
        token = VIDEO if len(part) == 3 else IMAGE
        each = grid[1] * grid[2] // MERGE**2
        media[token].append(grid)
        if token == VIDEO and name.startswith("qwen3"):
            for _ in range(grid[0]):
                ids += [*text(2), START, *[token] * each, END]
        else:
            ids += [START, *[token] * (grid[0] * each), END]
    sample = {"input_ids": (tensor := torch.tensor(ids)), "labels": torch.where(tensor < 60, tensor, -100)}
    for token, pixels, grids in ((IMAGE, "pixel_values", "image_grid_thw"), (VIDEO, "pixel_values_videos", "video_grid_thw")):
        if media[token]:
            sample[grids] = torch.tensor(media[token])
            sample[pixels] = torch.cat([_pixels(seed, i, grid) for i, grid in enumerate(media[token])])
    if name == "qwen2_5_vl" and media[VIDEO]:
        sample["second_per_grid_ts"] = torch.linspace(0.3, 1.9, len(media[VIDEO]))
    if len(sample) > 2:
        sample["mm_token_type_ids"] = (tensor == IMAGE).int() + 2 * (tensor == VIDEO).int()
    return sample


def _pixels(seed: int, number: int, grid: tuple[int, ...]) -> torch.Tensor:
    """Patches of a medium, whatever follows it in the sample."""
    t, h, w = grid
    return torch.randn(t * h * w, PATCH, generator=torch.Generator().manual_seed(100 * seed + number))


def stock_inputs(sample: dict) -> dict:
    """A sample as the stock model takes it."""
    per_token = ("input_ids", "labels", "mm_token_type_ids")
    return {key: value[None] if key in per_token else value for key, value in sample.items() if key != "labels"}
