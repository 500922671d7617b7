"""Videos of a Transformers model under MM-SP: each rank encodes its frames, and each token is sent to the rank that owns it.

The model's own ``get_video_features`` encodes, so tower, projector and pooling stay the model's. Every rank calls it equally
often, because FSDP2 gathers weights in those calls. A rank without frames encodes a black picture, so that all of its
parameters get a gradient (of exact zeros).

Legend: f frames of this rank, T tokens of a frame, N visual tokens made here, M owned here, H width of the language model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from megatron_vila import accelerator
from megatron_vila.hf.mm_sp.data import FramePlan, VideoTokens
from megatron_vila.hf.mm_sp.groups import MMSPGroups
from megatron_vila.parallel.reshard import Reshard


def llava_onevision_tokens(config: PreTrainedConfig) -> VideoTokens:
    """How LLaVA-OneVision writes videos: it halves each side of the patch grid, and ends a video with one newline token."""
    side = -(-(config.vision_config.image_size // config.vision_config.patch_size) // 2)
    return VideoTokens(config.video_token_id, side * side, 1, config.vision_config.image_size)


def owned_video_features(
    model: nn.Module,
    pixels_f3HW: torch.Tensor,
    plan: FramePlan,
    per_frame: int,
    groups: MMSPGroups,
    frame_micro_batch: int,
    recompute: bool,
    **options,
) -> torch.Tensor:
    """Features [M, H] of the visual tokens that this rank owns, in the order of its tokens.

    ``pixels_f3HW`` are this rank's frames, ``plan`` is its plan, ``per_frame`` the tokens of a frame; ``options`` are passed to
    the model's ``get_video_features``. With ``recompute`` the backward pass encodes again, one micro-batch of frames at a time,
    with the same dropout.
    All-to-all over the group ``sample``, forward and backward. With dp > 1 also an all-reduce of one number over ``everyone``.
    """
    encode = partial(_encode, model, options)
    if recompute and torch.is_grad_enabled():
        # With the random numbers of the first time, since the tower may have dropout.
        encode = partial(checkpoint, encode, use_reentrant=False)
    rounds = _rounds(plan, groups, frame_micro_batch, pixels_f3HW.device)
    parts, black = pixels_f3HW.tensor_split(rounds), pixels_f3HW.new_zeros(1, *pixels_f3HW.shape[1:])
    made = [encode(part if len(part) else black) for part in parts]
    frames = [made_H[: len(part) * per_frame] for made_H, part in zip(made, parts, strict=True)]
    source_H = torch.cat([*frames, made[-1][-1:]])
    order_N = accelerator.to_device(torch.from_numpy(plan.order), source_H.device)
    made_NH = source_H.index_select(0, order_N)
    return Reshard.of(plan.reshard, groups.sample, source_H.device)(made_NH)


def _encode(model: Any, options: dict, pixels_f3HW: torch.Tensor) -> torch.Tensor:
    """Tokens [f*T + 1, H] of the frames, encoded as one video; the last one is the video's newline."""
    return model.get_video_features(pixels_f3HW[None], return_dict=True, **options).pooler_output[0]


def _rounds(plan: FramePlan, groups: MMSPGroups, frame_micro_batch: int, device: torch.device) -> int:
    """Number of micro-batches of frames that every rank runs. With dp > 1 an all-reduce over ``everyone``."""
    rounds = max(1, -(-plan.most // frame_micro_batch))
    if groups.grid.dp > 1:
        most = torch.tensor(rounds, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=groups.everyone)
        rounds = int(most)
    return rounds
