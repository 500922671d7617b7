"""RMSNorm for Megatron-Core layer specs that also works under Megatron sequence parallelism.

Megatron's local torch norm refuses sequence parallelism and its fused ones need Transformer Engine or Apex.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_vila.errors import SettingError
from megatron_vila.models.decoder.fused import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as in Llama and Qwen2.

    16-bit inputs are computed in float32, float32 and float64 in their own dtype; the result has the dtype of the
    input. Built with the keywords of Megatron-Core's norm builder. Under ``config.sequence_parallel`` each
    tensor-parallel rank sees a slice of the tokens: the weight carries Megatron's ``sequence_parallel`` mark, by
    which ``finalize_model_grads`` sums its gradient over the tensor-parallel group. Raises ``ValueError`` for
    settings that ask for another norm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise SettingError(
                f"normalization={config.normalization} with layernorm_zero_centered_gamma="
                f"{config.layernorm_zero_centered_gamma} is not what this RMSNorm computes; "
                "set normalization=RMSNorm and layernorm_zero_centered_gamma=False in the TransformerConfig"
            )
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as ``x`` [..., hidden_size]. No collectives."""
        return self.with_stream(x)[1]

    def with_stream(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream to use from here on, x or x + residual, and its norm, whose backward pass adds both gradients."""
        return rms_norm(x, self.weight, self.eps, residual)
