"""Random initial weights that do not depend on the process grid.

Language model: a function of (seed, name) alone. Each parameter is drawn whole from a generator seeded by its global name, and
each rank keeps its tensor-parallel slice. Tower and projector, whole on each rank that has them, follow from torch's seed.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import nn

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")


def global_name(name: str, layer_offset: int) -> str:
    """The name of a parameter in the whole model: layers counted over all pipeline stages, tied output under its table."""
    return _LAYER.sub(lambda match: str(int(match.group()) + layer_offset), name)


def tensor_parallel_slice(
    full: torch.Tensor, name: str, parameter: nn.Parameter, tp: int, tp_rank: int
) -> torch.Tensor:
    """The part of ``full`` that tensor-parallel rank ``tp_rank`` holds of ``parameter``.

    Megatron's fused gate/up projection (and its LoRA update) holds [gate slice, up slice], everything else one contiguous
    slice of ``partition_dim``.
    """
    if tp == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return full
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    if name.endswith(("linear_fc1.weight", "linear_fc1.lora_b")):
        return torch.cat([half.chunk(tp, dim)[tp_rank] for half in full.chunk(2, dim)], dim)
    return full.chunk(tp, dim)[tp_rank]


def initialize_language_model(
    model: nn.Module, *, seed: int, std: float, num_layers: int, layer_offset: int, tp: int, tp_rank: int
) -> None:
    """Fill the parameters of a ``GPTModel`` shard in place: N(0, std), output projections N(0, std/sqrt(2*layers)), norms 1,
    biases 0, LoRA's A N(0, 1/(3*inputs)) and its B 0. ``layer_offset`` counts the decoder layers of earlier pipeline stages.
    No collectives."""
    tied = model.share_embeddings_and_output_weights
    with torch.no_grad():
        for local_name, parameter in model.named_parameters():
            name = global_name(local_name, layer_offset)
            if tied and name == "output_layer.weight":
                name = "embedding.word_embeddings.weight"
            if name.endswith(("bias", "lora_b")):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            elif name.endswith("lora_a"):
                scale = (3 * _whole_shape(parameter, tp)[1]) ** -0.5
                parameter.copy_(_draw(parameter, name, seed, scale, tp, tp_rank))
            else:
                residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
                scale = std / math.sqrt(2.0 * num_layers) if residual else std
                parameter.copy_(_draw(parameter, name, seed, scale, tp, tp_rank))


def initialize_vision(module: nn.Module, std: float) -> None:
    """Fill every parameter of ``module`` in place: matrices from N(0, std), biases 0, norm weights 1.

    The order is that of the sorted parameter names and the numbers come from torch's CPU generator: the weights follow
    from ``torch.manual_seed`` before the module is built, whatever the process grid.
    """
    for name, parameter in sorted(module.named_parameters()):
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=std)


def _draw(parameter: nn.Parameter, name: str, seed: int, std: float, tp: int, tp_rank: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    full = torch.empty(_whole_shape(parameter, tp), dtype=torch.float32, device=parameter.device)
    full.normal_(0.0, std, generator=generator)
    return tensor_parallel_slice(full, name, parameter, tp, tp_rank)


def _whole_shape(parameter: nn.Parameter, tp: int) -> list[int]:
    """Shape over all tensor-parallel ranks."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tp  # type: ignore[attr-defined]
    return shape
