"""How much memory a part of a step may take at once: the parts keep to it, and the estimate of a rank's memory counts with it."""

from __future__ import annotations

from megatron_vila.config.schema import VisionConfig
from megatron_vila.plan.geometry import patches_per_square
from megatron_vila.plan.sizes import vision_layers_run

GIB = 2**30

HEAD_LOGIT_BYTES = 640 * 2**20
"""Logits and their gradients that the fused loss holds at once (``models/loss.py``)."""

MOST_FRAMES_AT_ONCE = 64

MOST_PEER_BYTES = GIB
"""Largest buffer of an exchange without NCCL (``parallel/peers.py``). What is larger stays with NCCL: there attention, which
grows with the square, leaves it little weight."""


def peer_buffer_bytes(exchanged: int) -> int:
    """The buffer of a rank whose largest exchange brings ``exchanged`` bytes, in steps of a factor of 2: it seldom grows."""
    return min(MOST_PEER_BYTES, 1 << max(0, exchanged - 1).bit_length())


def frames_at_once(vision: VisionConfig, learns: bool, element: int, device_bytes: int) -> int:
    """Squares that the tower takes at once: ``vision.frame_micro_batch``, or (0) as many, up to 64, as take an eighth of the
    device's memory while their gradients are formed; 16 on a CPU (``device_bytes`` = 0)."""
    if vision.frame_micro_batch:
        return vision.frame_micro_batch
    if not device_bytes:
        return 16
    layers = max(1, vision_layers_run(vision)) if learns else 1
    per_square = patches_per_square(vision) * layers * vision_activation_elements(vision) * element
    return max(1, min(MOST_FRAMES_AT_ONCE, device_bytes // 8 // per_square))


def vision_activation_elements(vision: VisionConfig) -> int:
    """Elements per patch that one tower layer saves for its backward pass."""
    return 8 * vision.hidden_size + 2 * vision.ffn_hidden_size
