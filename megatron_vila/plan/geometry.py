"""How many patches a picture of the tower's size has, and how many tokens the projector makes of it."""

from __future__ import annotations

from megatron_vila.config.schema import ProjectorConfig, VisionConfig

POOL_SIDE = {
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
    "linear": 1,
    "mlp2x_gelu": 1,
}
"""Side, in patches, of the square cell that each projector type merges into one token."""


def patches_per_side(vision: VisionConfig) -> int:
    """Patches along one side of a picture; pixels that do not fill a patch are not seen (384 / 14: 27)."""
    assert 0 < vision.patch_size <= vision.image_size, vision  # judged by validate.py
    return vision.image_size // vision.patch_size


def patches_per_square(vision: VisionConfig) -> int:
    """Patches of one picture as the tower takes it; 384 px with patch 14 gives 27 x 27."""
    return patches_per_side(vision) ** 2


def tokens_per_square(vision: VisionConfig, projector: ProjectorConfig) -> int:
    """LLM tokens that the projector makes of one picture as the tower takes it: the square of ceil(patches per side / rate)."""
    return (-(-patches_per_side(vision) // POOL_SIDE[projector.type])) ** 2
