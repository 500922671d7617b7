"""Token embeddings with marks in the places of visual tokens, whose ids lie beyond the table.

A program that embeds ids by itself and gives the model ``inputs_embeds`` and pictures (PEFT's prompt tuning) so keeps the places.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_vila.hf.vila.configuration import IMAGE_TOKEN_ID, VIDEO_TOKEN_ID

# No row of a table is full of it, and every float dtype holds it exactly.
MARK = 2.0**15


class TokenEmbedding(nn.Embedding):
    """``nn.Embedding`` that gives ``MARK`` for the ids of visual tokens."""

    @classmethod
    def of(cls, embedding: nn.Module) -> nn.Module:
        """``embedding`` itself, which marks visual tokens from now on. A module of another class is returned unchanged."""
        if type(embedding) is nn.Embedding:
            embedding.__class__ = cls
        return embedding

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        visual = is_visual(input)
        if not visual.any():
            return super().forward(input)
        return super().forward(input.masked_fill(visual, 0)).masked_fill(visual[..., None], MARK)


def is_visual(ids: torch.Tensor) -> torch.Tensor:
    """Which of ``ids`` stand for visual tokens."""
    return (ids == IMAGE_TOKEN_ID) | (ids == VIDEO_TOKEN_ID)


def is_marked(embeddings_BSH: torch.Tensor) -> torch.Tensor:
    """[B, S]: which of these embeddings are marks."""
    return (embeddings_BSH == MARK).all(dim=-1)


def masked_labels(labels: torch.Tensor) -> torch.Tensor:
    """``labels`` with -100 for visual tokens: nothing is learned of them."""
    return labels.masked_fill(is_visual(labels), -100)
