"""LoRA (arXiv 2106.09685) on Megatron-Core's parallel linear layers: y = W x + alpha / rank * B A x, with W frozen.

The linear layers of a decoder layer get the parameters ``lora_a`` [rank, inputs] and ``lora_b`` [outputs, rank] beside
``weight``. Each update is computed on the tokens that a rank holds under Megatron sequence parallelism, so that only values of
size ``rank`` are exchanged.

Legend: t tokens of this rank (s/tp), s tokens of the CP rank, I inputs and O outputs held by this rank, r rank.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import ModuleSpec
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import nn

from megatron_vila.config.schema import LoraConfig

FACTORS = ("lora_a", "lora_b")
"""Last parts of the parameters' names."""


class LowRankColumn(ColumnParallelLinear):
    """A layer whose outputs are split over tp: so are the rows of ``lora_b``, while ``lora_a`` is whole on each rank.

    Subclasses set ``rank`` and ``scale``. With tp > 1 ``config.sequence_parallel`` must be on: ``lora_a`` sees a slice of the
    tokens and carries Megatron's mark, by which ``finalize_model_grads`` sums its gradient over tp.
    """

    rank: int
    scale: float

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        outputs, inputs = self.weight.shape
        self.lora_a = _whole(self.weight, (self.rank, inputs), self.sequence_parallel)
        self.lora_b = _split(self.weight, (outputs, self.rank), dim=0)

    def forward(self, x_t1I: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[t, 1, I] to [s, 1, O], and Megatron's bias. All-gather over tp of x and of [t, r]."""
        x_tI = x_t1I.squeeze(1)
        out_sO, bias = super().forward(x_tI, *args, **kwargs)
        low_sr = nn.functional.linear(x_tI, self.lora_a)
        if self.sequence_parallel:
            low_sr = gather_from_sequence_parallel_region(low_sr, group=self.tp_group)
        # In place, and on no view (whose backward pass copies): this is the widest tensor of a layer.
        return out_sO.addmm_(low_sr, self.lora_b.t(), alpha=self.scale).unsqueeze(1), bias

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return state | _shard(self, "lora_b", 0, prefix, sharded_offsets, metadata)


class LowRankRow(RowParallelLinear):
    """A layer whose inputs are split over tp: so are the columns of ``lora_a``, while ``lora_b`` is whole on each rank.

    Subclasses set ``rank`` and ``scale``. ``lora_b`` is applied to this rank's tokens, after the sum over tp; the rest is as in
    ``LowRankColumn``.
    """

    rank: int
    scale: float

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        outputs, inputs = self.weight.shape
        self.lora_a = _split(self.weight, (self.rank, inputs), dim=1)
        self.lora_b = _whole(self.weight, (outputs, self.rank), self.sequence_parallel)

    def forward(self, x_s1I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, 1, I] to [t, 1, O], and Megatron's bias. Reduce-scatter over tp of W x and of [s, r]."""
        x_sI = x_s1I.squeeze(1)
        out_tO, bias = super().forward(x_sI)
        low_tr = nn.functional.linear(x_sI, self.lora_a)
        if self.sequence_parallel:
            low_tr = reduce_scatter_to_sequence_parallel_region(low_tr, group=self.tp_group)
        return torch.addmm(out_tO, low_tr, self.lora_b.t(), alpha=self.scale).unsqueeze(1), bias

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return state | _shard(self, "lora_a", 1, prefix, sharded_offsets, metadata)


def add_low_rank(layer: ModuleSpec, lora: LoraConfig) -> None:
    """Put the layers of this file in the places of a decoder layer's spec that ``lora.targets`` names; rank 0: none."""
    if not lora.rank:
        return
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp
    mlp = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules  # Megatron-Core 0.19, 0.16
    update = {"rank": lora.rank, "scale": lora.alpha / lora.rank}
    # Only a class is taken as a builder by all four places of both versions.
    column, row = (type(base.__name__, (base,), update) for base in (LowRankColumn, LowRankRow))
    places = {"qkv": (attention, column), "proj": (attention, row), "fc1": (mlp, column), "fc2": (mlp, row)}
    for target in lora.targets:
        submodules, linear = places[target]
        setattr(submodules, f"linear_{target}", linear)


def set_trainable(llm: nn.Module, lora: LoraConfig, trainable: bool) -> None:
    """Freeze the parameters of a ``GPTModel`` shard that do not learn: with LoRA all but the updates and ``lora.also_train``."""
    table = ["embedding.word_embeddings.weight"]
    if llm.share_embeddings_and_output_weights:
        table.append("output_layer.weight")  # the last stage's copy
    for name, parameter in llm.named_parameters():
        learns = not lora.rank or name.endswith(FACTORS)
        learns |= "norms" in lora.also_train and "layernorm" in name
        learns |= "embeddings" in lora.also_train and name in table
        parameter.requires_grad_(trainable and learns)


def _whole(weight: nn.Parameter, shape: tuple[int, int], sees_part_of_tokens: bool) -> nn.Parameter:
    parameter = nn.Parameter(weight.new_empty(shape))
    parameter.sequence_parallel = sees_part_of_tokens  # type: ignore[attr-defined]
    return parameter


def _split(weight: nn.Parameter, shape: tuple[int, int], dim: int) -> nn.Parameter:
    parameter = nn.Parameter(weight.new_empty(shape))
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
    return parameter


def _shard(linear: nn.Module, name: str, dim: int, prefix: str, sharded_offsets, metadata) -> dict:
    """The entry of a checkpoint for a factor that is split over tp: Megatron knows ``weight`` and ``bias`` only."""
    key, groups = prefix + name, {"tp_group": linear.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
    shard = make_tp_sharded_tensor_for_checkpoint(
        getattr(linear, name), key, dim, prepend_offsets=sharded_offsets, **groups
    )
    return {key: shard}
