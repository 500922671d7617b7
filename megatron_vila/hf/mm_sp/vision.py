"""Videos of a stock Transformers model under MM-SP: each rank encodes its frames, each token goes to its owner.

The model's own ``get_video_features`` encodes, so tower, projector and pooling stay the model's. Every rank runs it equally
often and on at least one picture, a black one if it has no frame: FSDP2 gathers weights in those calls, and every parameter
gets a gradient (of exact zeros there).

Legend: f frames of this rank, T tokens of a frame, N visual tokens made here, M owned here, H width of the language model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from megatron_vila.hf.mm_sp.data import ShardedRow, VideoTokens
from megatron_vila.hf.mm_sp.groups import MMSPGroups
from megatron_vila.parallel.reshard import Reshard


def llava_onevision_tokens(config: PreTrainedConfig) -> VideoTokens:
    """LLaVA-OneVision halves each side of the patch grid, and ends a video with one newline token."""
    side = -(-(config.vision_config.image_size // config.vision_config.patch_size) // 2)
    return VideoTokens(config.video_token_id, side * side, 1, config.vision_config.image_size)


def owned_video_features(
    model: nn.Module,
    pixels_f3HW: torch.Tensor,
    row: ShardedRow,
    video: VideoTokens,
    groups: MMSPGroups,
    frame_micro_batch: int,
    recompute: bool,
    **options,
) -> torch.Tensor:
    """Features [M, H] of the visual tokens that this rank owns, in the order of its tokens.

    ``options`` go to the model's ``get_video_features``. With ``recompute`` the backward pass encodes again, one micro-batch
    of frames at a time. All-to-all over the sample group, forward and backward; with several samples' groups also an
    all-reduce of one number over everyone.
    """
    encode = partial(_encode, model, options)
    if recompute and torch.is_grad_enabled():
        encode = partial(checkpoint, encode, use_reentrant=False, preserve_rng_state=False)
    rounds = _rounds(row, groups, frame_micro_batch, pixels_f3HW.device)
    frames, newline_1H = [], None
    for part in pixels_f3HW.tensor_split(rounds):
        black = part.new_zeros(1, *part.shape[1:])
        made_H = encode(part if len(part) else black)
        newline_1H = made_H[-1:]
        frames.append(made_H[: len(part) * video.per_frame])
    source_H = torch.cat([*frames, newline_1H])
    order_N = _token_order(row, groups.sample.rank(), video)
    made_NH = source_H.index_select(0, torch.from_numpy(order_N).to(source_H.device))
    return Reshard.of(row.plan.of_rank(groups.sample.rank()), groups.sample, source_H.device)(made_NH)


def _encode(model: Any, options: dict, pixels_f3HW: torch.Tensor) -> torch.Tensor:
    """Tokens [f*T + 1, H] of the frames as one video, its newline last."""
    return model.get_video_features(pixels_f3HW[None], return_dict=True, **options).pooler_output[0]


def _rounds(row: ShardedRow, groups: MMSPGroups, frame_micro_batch: int, device: torch.device) -> int:
    """Micro-batches of frames that every rank runs."""
    rounds = max(1, -(-int(np.diff(row.plan.boundaries).max()) // frame_micro_batch))
    if groups.grid.dp > 1:
        most = torch.tensor(rounds, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=groups.everyone)
        rounds = int(most)
    return rounds


def _token_order(row: ShardedRow, rank: int, video: VideoTokens) -> np.ndarray:
    """Index of each token that ``rank`` makes, in row order, among its frames' tokens and the newline behind them."""
    first, last = row.plan.boundaries[rank : rank + 2]
    tokens = (last - first) * video.per_frame
    order = []
    for frame in range(last - first):
        order.append(np.arange(frame * video.per_frame, (frame + 1) * video.per_frame))
        if row.video_ends[first + frame]:
            order.append(np.full(video.after_video, tokens))
    return np.concatenate(order) if order else np.zeros(0, dtype=np.int64)
