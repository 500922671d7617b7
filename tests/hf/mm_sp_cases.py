"""Stock Transformers models with random weights, samples for them, and what one process makes of both."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.hf.mm_sp_language_cases import LANGUAGE, build_language
from tests.hf.mm_sp_qwen_cases import NAMES, build_qwen, stock_inputs

VOCAB, VIDEO, SIDE = 67, 65, 12
PER_FRAME = 4  # 3 x 3 patches, halved to 2 x 2


def build(
    name: str, dtype: torch.dtype = torch.float32, heads: int = 4, kv_heads: int = 2, tied: bool = False, **settings
) -> PreTrainedModel:
    """The model ``name`` with weights that are a function of the arguments alone. A model of ``LANGUAGE`` and a
    Qwen-VL take ``settings``."""
    torch.manual_seed(7)
    text = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 128, "tie_word_embeddings": tied, "initializer_range": 0.2,
    }  # fmt: skip
    if name in LANGUAGE:
        del text["tie_word_embeddings"]
        model = build_language(name, text, **settings)
    elif name in NAMES:
        model = build_qwen(name, **settings)
    elif name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**text))
    elif name == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**text))
    elif name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**text, head_dim=8))
    else:
        vision = {
            "model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": SIDE, "patch_size": 4, "vision_use_head": False, "initializer_range": 0.2,
        }  # fmt: skip
        config = LlavaOnevisionConfig(
            vision_config=vision, text_config={"model_type": "qwen2", **text}, image_token_index=66, video_token_index=VIDEO,
            tie_word_embeddings=tied,
        )  # fmt: skip
        model = LlavaOnevisionForConditionalGeneration(config)
    # Biases start at zero, which would hide a wrong one.
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).train()


class _Norm(nn.Module):
    """RMS norm in the dtype of its input; Transformers' own rounds to float32 inside."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.weight = stock.weight
        self._eps = stock.variance_epsilon if hasattr(stock, "variance_epsilon") else stock.eps
        self._offset = 1.0 if type(stock).__name__.startswith("Gemma") else 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self._offset + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._eps)


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64 throughout, but for softmax inside eager attention (Gemma 2) and the router of Qwen3-MoE."""
    model = model.double()
    if hasattr(model.config.get_text_config(), "num_experts"):
        model.set_experts_implementation("eager")  # the other ones have no float64
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, _Norm(child))
    return model


def text_sample(seed: int, length: int, supervised: slice = slice(None)) -> dict:
    """A sample of random text; ``supervised`` are the tokens with a label."""
    ids = torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, -100)
    labels[supervised] = ids[supervised]
    return {"input_ids": ids, "labels": labels}


def video_sample(seed: int, layout: list[int]) -> dict:
    """A sample from a layout: a positive number is a video of so many frames, a negative one so many text tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids, videos = [], []
    for part in layout:
        if part < 0:
            ids += torch.randint(0, 60, (-part,), generator=generator).tolist()
        else:
            ids += [VIDEO] * (part * PER_FRAME + 1)
            videos.append(torch.randn(part, 3, SIDE, SIDE, generator=generator))
    ids = torch.tensor(ids)
    return {"input_ids": ids, "labels": torch.where(ids == VIDEO, -100, ids), "pixel_values_videos": videos}


def truth(model: PreTrainedModel, samples: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over the supervised tokens of all samples and its gradients: one sample after the other, stock code only."""
    model = copy.deepcopy(model)
    total, count = torch.zeros((), dtype=model.dtype), 0
    for sample in samples:
        ids, labels = sample["input_ids"][None], sample["labels"][None]
        extra = {}
        if "image_grid_thw" in sample or "video_grid_thw" in sample:
            extra = stock_inputs(sample)
        elif sample.get("pixel_values_videos"):
            encoded = [
                model.model.get_video_features(video[None].to(model.dtype), return_dict=True).pooler_output[0]
                for video in sample["pixel_values_videos"]
            ]
            embeds = model.get_input_embeddings()(ids)
            extra = {"inputs_embeds": embeds.masked_scatter((ids == VIDEO)[..., None], torch.cat(encoded))}
        logits = model(**(extra or {"input_ids": ids}), use_cache=False).logits
        total = total + nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        count += int((labels[0, 1:] != -100).sum())
    mean = total / max(count, 1)
    mean.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return mean.item(), grads


def relative_errors(grads: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Norm of each gradient's difference by the norm of the gradient, and the same of ``all`` gradients as one vector.

    A key bias shifts all scores of a query alike, so its true gradient is zero and the query bias sets the scale.
    """
    errors = {}
    for name, grad in grads.items():
        scale = wanted[name.replace("k_proj.bias", "q_proj.bias")].norm().item()
        errors[name] = (grad - wanted[name]).norm().item() / max(scale, 1e-12)
    whole = torch.stack([(grads[name] - wanted[name]).norm() for name in grads]).norm()
    errors["all"] = (whole / torch.stack([grad.norm() for grad in wanted.values()]).norm().clamp(min=1e-12)).item()
    return errors
