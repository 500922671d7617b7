"""Models with vision, with random weights, samples as their processors make them, and what one process makes of both."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    PreTrainedModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)

from megatron_vila.hf.vila.configuration import IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, VilaConfig
from megatron_vila.hf.vila.modeling import VILAForConditionalGeneration

VOCAB, IMAGE, VIDEO = 67, 65, 66
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "rms_norm_eps": 3e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
}  # fmt: skip
VISION = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


def internvl(**text) -> PreTrainedModel:
    vision = VISION | {"image_size": [16, 16], "patch_size": [4, 4], "attention_bias": True, "layer_scale_init_value": 0.7}
    text = TEXT | {"model_type": "qwen3", "head_dim": 6} | text
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=4)
    return InternVLForConditionalGeneration(config)


def internvl_moe() -> PreTrainedModel:
    return internvl(model_type="qwen3_moe", num_experts=5, num_experts_per_tok=3, moe_intermediate_size=12, norm_topk_prob=True)


def llava_next_video() -> PreTrainedModel:
    vision = VISION | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4}
    config = LlavaNextVideoConfig(
        vision_config=vision, text_config=TEXT | {"model_type": "mistral", "sliding_window": 50},
        image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        vision_feature_layer=-2, spatial_pool_mode="conv",
    )  # fmt: skip
    return LlavaNextVideoForConditionalGeneration(config)


def smolvlm() -> PreTrainedModel:
    vision = VISION | {"image_size": 16, "patch_size": 4}
    config = SmolVLMConfig(
        vision_config=vision, text_config=TEXT | {"model_type": "llama", "pad_token_id": 1}, image_token_id=IMAGE, scale_factor=2
    )
    return SmolVLMForConditionalGeneration(config)


def video_llama_3() -> PreTrainedModel:
    vision = VISION | {"patch_size": 4, "rope_parameters": {"rope_type": "axial", "rope_theta": 70.0}}
    config = VideoLlama3Config(
        vision_config=vision, text_config=TEXT | {"model_type": "qwen2"}, image_token_id=IMAGE, video_token_id=VIDEO
    )
    return VideoLlama3ForConditionalGeneration(config)


def vila() -> PreTrainedModel:
    vision = VISION | {"model_type": "siglip_vision_model", "image_size": 12, "patch_size": 4, "vision_use_head": False}
    text = TEXT | {"model_type": "qwen2"}
    return VILAForConditionalGeneration(VilaConfig(text_config=text, vision_config=vision, mm_projector_type="mlp_downsample"))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "internvl": internvl, "internvl_moe": internvl_moe, "llava_next_video": llava_next_video, "smolvlm": smolvlm,
    "video_llama_3": video_llama_3, "vila": vila,
}  # fmt: skip


def build_vision(name: str) -> PreTrainedModel:
    """The model ``name`` with weights that are a function of the name alone."""
    torch.manual_seed(7)
    model = MODELS[name]()
    # Biases start at zero and norms at one, which would hide wrong ones.
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.0 if key.endswith("bias") else 1.0, std=0.3)
    return model.train()


class _Writer:
    """Writes a sample: text, visual tokens and pixels as functions of a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.ids: list[int] = []
        self.pixels: dict[str, list] = {}

    def text(self, tokens: int) -> None:
        self.ids += torch.randint(2, 60, (tokens,), generator=self.generator).tolist()

    def visual(self, token: int, count: int) -> None:
        self.ids += [token] * count

    def add(self, key: str, *shape: int) -> None:
        self.pixels.setdefault(key, []).append(torch.randn(*shape, generator=self.generator))

    def note(self, key: str, value: object) -> None:
        self.pixels.setdefault(key, []).append(value)

    def sample(self, **fields) -> dict:
        ids = torch.tensor(self.ids)
        labels = ids.masked_fill((ids == IMAGE) | (ids == VIDEO), -100)
        return {"input_ids": ids, "labels": labels} | fields


def tiles_sample(name: str, seed: int, layout: list) -> dict:
    """Of a model of equal tiles: a negative number is text, a positive one a picture of so many tiles, a list a video of so many
    frames with text between them."""
    size = 12 if name == "vila" else 16
    picture, frame = (IMAGE_TOKEN_ID, VIDEO_TOKEN_ID) if name == "vila" else (IMAGE, IMAGE)
    writer = _Writer(seed)
    for part in layout:
        if isinstance(part, int) and part < 0:
            writer.text(-part)
            continue
        count = part if isinstance(part, int) else part[0]
        for tile in range(count):
            if tile and (isinstance(part, list) or name == "smolvlm"):
                writer.text(1)
            writer.visual(picture if isinstance(part, int) else frame, 4)
            writer.add("pixel_values", 3, size, size)
    if not writer.pixels:
        return writer.sample()
    pixels = torch.stack(writer.pixels["pixel_values"])
    if name != "smolvlm":
        return writer.sample(pixel_values=pixels)
    # The last tile has padding below and at the right.
    mask = torch.ones(len(pixels), size, size, dtype=torch.int64)
    mask[-1, 9:], mask[-1, :, 12:] = 0, 0
    return writer.sample(pixel_values=pixels[None], pixel_attention_mask=mask[None])


SIZES = {(16, 32): (3, 52), (10, 32): (3, 34), (30, 14): (3, 56), (32, 32): (5, 88)}
"""LLaVA-NeXT-Video: height and width of a picture, to its tiles and tokens."""


def next_sample(seed: int, layout: list) -> dict:
    """A tuple is a picture of ``SIZES``, a list a video of so many frames."""
    writer = _Writer(seed)
    for part in layout:
        if isinstance(part, int):
            writer.text(-part)
        elif isinstance(part, tuple):
            tiles, tokens = SIZES[part]
            writer.visual(IMAGE, tokens)
            writer.add("pixel_values", tiles, 3, 16, 16)
            writer.note("image_sizes", part)
        else:
            writer.visual(VIDEO, part[0] * 4)
            writer.add("pixel_values_videos", part[0], 3, 16, 16)
    fields = dict(writer.pixels)
    if "image_sizes" in fields:
        most = max(len(tiles) for tiles in fields["pixel_values"])
        padded = [torch.cat([tiles, tiles.new_zeros(most - len(tiles), 3, 16, 16)]) for tiles in fields["pixel_values"]]
        fields |= {"image_sizes": torch.tensor(fields["image_sizes"]), "pixel_values": torch.stack(padded)}
    if "pixel_values_videos" in fields:
        fields["pixel_values_videos"] = torch.stack(fields["pixel_values_videos"])
    return writer.sample(**fields)


def patches_sample(seed: int, layout: list) -> dict:
    """Of VideoLLaMA 3: (height, width, merge) is a picture, [frames, height, width] a video whose squares of 2 patches become a
    token, of which a third is left out."""
    writer = _Writer(seed)
    for part in layout:
        if isinstance(part, int):
            writer.text(-part)
        elif isinstance(part, tuple):
            height, width, merge = part
            writer.visual(IMAGE, height * width // merge**2)
            writer.add("pixel_values", height * width, 48)
            writer.note("image_grid_thw", (1, height, width))
            writer.note("image_merge_sizes", merge)
        else:
            frames, height, width = part
            mask = torch.rand(frames, height * width // 4, generator=writer.generator) > 1 / 3
            mask[:, 0], mask[0] = True, True
            for frame in range(frames):
                writer.text(1)
                writer.visual(VIDEO, int(mask[frame].sum()))
            writer.add("pixel_values_videos", frames * height * width, 48)
            writer.note("video_grid_thw", part)
            writer.note("video_merge_sizes", 2)
            writer.note("video_compression_mask", mask.flatten())
    whole = {key: torch.cat(x) if torch.is_tensor(x[0]) else torch.tensor(x) for key, x in writer.pixels.items()}
    return writer.sample(**whole)


SAMPLES: dict[str, list[dict]] = {
    **{
        name: [
            tiles_sample(name, 1, [-3, 3, -2, [5], -6]),
            tiles_sample(name, 2, [-9]),
            tiles_sample(name, 3, [-2, 1, -9]),
            tiles_sample(name, 4, [[2], -5, 2, -3]),
        ]
        for name in ("internvl", "internvl_moe", "smolvlm", "vila")
    },
    "llava_next_video": [
        next_sample(1, [-3, (16, 32), -2, [3], -5]),
        next_sample(2, [-9]),
        next_sample(3, [-2, (10, 32), (30, 14), -9]),
        next_sample(4, [[5], -3]),
    ],
    "video_llama_3": [
        patches_sample(1, [-3, (3, 5, 1), -2, [3, 4, 6], -5]),
        patches_sample(2, [-9]),
        patches_sample(3, [-2, (4, 2, 2), -9]),
        patches_sample(4, [[2, 4, 4], [4, 2, 2], -3]),
    ],
}  # fmt: skip


def of_one_prompt(sample: dict, dtype: torch.dtype = torch.float32) -> dict:
    """A sample as the model's own forward takes it, without labels."""
    fields = {key: value.to(dtype) if value.is_floating_point() else value for key, value in sample.items()}
    del fields["labels"]
    return fields | {"input_ids": sample["input_ids"][None]}


def vision_truth(model: PreTrainedModel, samples: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over the supervised tokens of all samples and its gradients: the stock model, one sample after the other."""
    model = copy.deepcopy(model)
    total, count = torch.zeros((), dtype=model.dtype), 0
    for sample in samples:
        labels = sample["labels"].masked_fill(sample["labels"] >= VOCAB, -100)
        logits = model(**of_one_prompt(sample, model.dtype), use_cache=False).logits
        total = total + nn.functional.cross_entropy(logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
    mean = total / count
    mean.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return mean.item(), grads
