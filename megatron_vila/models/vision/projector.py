"""Projectors from patch features to LLM tokens: the NVILA and LongVILA kinds, module indices as in their weight files.

Legend: F frames, P patches of a frame (Y rows, X columns), C tower width, T LLM tokens of a frame (I rows, J columns of
cells), R side of a cell in patches, H LLM width.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_vila.config.schema import ProjectorConfig, VisionConfig
from megatron_vila.models.initialize import initialize_vision
from megatron_vila.models.vision.no_frames import zero_connected_to
from megatron_vila.plan.geometry import POOL_SIDE, patches_per_side, patches_per_square, tokens_per_square


class SpaceToChannel(nn.Module):
    """Puts the patches of each cell of rate x rate into one token.

    The map of ``side`` x ``side`` patches is padded with zeros at the bottom and at the right to whole cells.
    Channels of a cell are in row-major order of its patches; tokens are in row-major order of the cells, or in
    column-major order if ``column_major`` (what VILA-1.5 and Llama-3-LongVILA were trained with).
    """

    def __init__(self, side: int, rate: int, column_major: bool) -> None:
        super().__init__()
        self.side, self.rate, self.column_major = side, rate, column_major

    def forward(self, features_FPC: torch.Tensor) -> torch.Tensor:
        """[F, side^2, C] -> [F, ceil(side/rate)^2, rate^2 * C]."""
        frames, _, channels = features_FPC.shape
        missing = -self.side % self.rate
        map_FYXC = features_FPC.view(frames, self.side, self.side, channels)
        map_FYXC = nn.functional.pad(map_FYXC, (0, 0, 0, missing, 0, missing))
        cells = (self.side + missing) // self.rate
        map_FIRJRC = map_FYXC.view(frames, cells, self.rate, cells, self.rate, channels)
        order = (0, 3, 1, 2, 4, 5) if self.column_major else (0, 1, 3, 2, 4, 5)
        return map_FIRJRC.permute(order).reshape(frames, cells * cells, self.rate * self.rate * channels)


class Projector(nn.Module):
    """Maps features [F, P, C] of the vision tower to tokens [F, T, H] of the LLM.

    ``hidden_size`` is the LLM's width H. Weights are drawn on the CPU with standard deviation ``init_std`` from
    torch's generator (the caller seeds it and casts the module). Type and token order
    are among those that ``plan/validate.py`` lets pass.
    """

    def __init__(self, projector: ProjectorConfig, vision: VisionConfig, hidden_size: int, init_std: float) -> None:
        super().__init__()
        self.num_patches = patches_per_square(vision)
        self.num_tokens = tokens_per_square(vision, projector)
        self.in_channels, self.hidden_size = vision.hidden_size, hidden_size
        self.layers = _build_layers(projector, patches_per_side(vision), vision.hidden_size, hidden_size)
        initialize_vision(self, init_std)

    def forward(self, features_FPC: torch.Tensor) -> torch.Tensor:
        """Tokens [F, T, H] in the dtype of the features.

        No frames give an empty tensor from which the features and every trainable parameter get gradients of exact
        zeros. Raises ``ValueError`` for features of another shape. No collectives.
        """
        if features_FPC.dim() != 3 or tuple(features_FPC.shape[1:]) != (self.num_patches, self.in_channels):
            raise ValueError(
                f"the projector got features of shape {tuple(features_FPC.shape)} but was built for "
                f"[frames, {self.num_patches}, {self.in_channels}]; build it from the tower's own configuration"
            )
        if len(features_FPC) == 0:
            empty_FTH = features_FPC.new_zeros(0, self.num_tokens, self.hidden_size)
            return empty_FTH + zero_connected_to([features_FPC, *self.parameters()])
        return self.layers(features_FPC)


def _build_layers(projector: ProjectorConfig, side: int, channels: int, hidden: int) -> nn.Module:
    """The modules of ``projector.type``; their indices are part of the weight names."""
    rate = POOL_SIDE[projector.type]
    cell = rate * rate * channels
    column_major = {"row_major": False, "legacy_column_major": True}[projector.token_order]
    gather = SpaceToChannel(side, rate, column_major)
    if projector.type == "linear":
        return nn.Linear(channels, hidden)
    if projector.type == "mlp2x_gelu":
        return nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    if projector.type == "mlp_downsample_3x3_fix":
        return nn.Sequential(
            gather,
            nn.LayerNorm(cell),
            nn.Linear(cell, 3 * channels),
            nn.GELU(),
            nn.LayerNorm(3 * channels),
            nn.Linear(3 * channels, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
        )
    return nn.Sequential(gather, nn.LayerNorm(cell), nn.Linear(cell, hidden), nn.GELU(), nn.Linear(hidden, hidden))
