"""MM-SP under an unmodified Transformers model: ``mm_sp = enable_mm_sp(model, ulysses=2, ring=1)``.

The frames and the tokens of one sample are spread over ulysses x ring processes (LongVILA, arXiv 2408.10188, section 3).
Transformers' AttentionInterface calls the project's 2D attention; the model's code, its weights and their names stay as they
are. Weights are sharded by FSDP2 or replicated by DDP, as usual. Megatron-Core is not needed.

Legend: s local tokens, n supervised ones among them, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from megatron_vila.accelerator import to_device
from megatron_vila.hf.mm_sp.adapters import VisionAdapter, adapter_of
from megatron_vila.hf.mm_sp.cache import DecodedToken, PromptChunk, ShardedCache
from megatron_vila.hf.mm_sp.checks import (
    check_call,
    check_layout,
    check_model,
    check_token,
    check_unchanged,
    check_whole,
)
from megatron_vila.hf.mm_sp.data import PIXELS, ShardCollator, ShardedRow, VisionPlan
from megatron_vila.hf.mm_sp.generate import Generator
from megatron_vila.hf.mm_sp.groups import MMSPGroups
from megatron_vila.hf.mm_sp.language_attention import ATTENTION, attention, no_mask
from megatron_vila.hf.mm_sp.loss import FusedHead, mean_over_group
from megatron_vila.hf.mm_sp.same_row import check_same_row
from megatron_vila.hf.mm_sp.scored import SCORED, ScoredRows
from megatron_vila.hf.mm_sp.tower_attention import TOWER_ATTENTION, tower_attention
from megatron_vila.hf.mm_sp.vision import kept_bytes, owned_features, room_for_kept
from megatron_vila.parallel.attention2d import Attention2D, RowIndices
from megatron_vila.parallel.cache import FP8
from megatron_vila.parallel.cached_attention import CachedAttention
from megatron_vila.parallel.kernels import require_kernel, select_kernel
from megatron_vila.parallel.peers import PeerMemory
from megatron_vila.parallel.windows import WindowedKernel, windowed
from megatron_vila.plan.heads import HeadSplit

_STOOD_IN = ("logits", "image_hidden_states", "video_hidden_states")
"""What an output with a loss leaves out: a sum of losses, and features of this rank's visual tokens."""


def enable_mm_sp(
    model: PreTrainedModel,
    ulysses: int = 1,
    ring: int = 1,
    group: dist.ProcessGroup | None = None,
    kernel: str = "auto",
    frame_micro_batch: int = 16,
) -> MMSP:
    """Turn MM-SP on in ``model``, before or after ``fully_shard``, and return the object that makes its batches.

    ``group`` holds the processes that train together (default: all). Every ulysses*ring consecutive ranks of it are a replica,
    whose ranks share their samples; the replicas are data-parallel. ``kernel`` is auto, fa4, cudnn, flash2, cpu or reference.
    A model with vision encodes ``frame_micro_batch`` pictures or frames at once (or as many groups of frames, where it merges
    frames). Collective over ``group``: it makes process groups.

    While MM-SP is on, ``model(**batch)`` takes only batches of ``collator()``, and ``model.generate`` reads one prompt over the
    ulysses x ring processes, which all give it the same arguments. With labels, ``loss`` is the mean over the
    supervised tokens of the whole group, equal on all ranks, and no ``logits`` are returned. The average of the ranks'
    gradients, which FSDP2 and DDP form, is the gradient of that mean. Without labels, ``logits`` are those of this rank's tokens.

    Raises ``ValueError`` for sizes that do not fit the group and for settings of the model that would give wrong results,
    ``RuntimeError`` without an initialized process group. A call of the model raises ``ValueError`` on all ranks of a replica
    that were given different samples, before anything else is exchanged.
    """
    everyone = group or dist.group.WORLD
    if everyone is None:
        raise RuntimeError(
            "MM-SP needs a process group; call torch.distributed.init_process_group and start with torchrun"
        )
    if not (isinstance(ulysses, int) and isinstance(ring, int)):
        raise ValueError(f"ulysses={ulysses!r} and ring={ring!r} are not both whole numbers; give numbers of ranks")
    model = getattr(model, "get_base_model", lambda: model)()  # of PEFT
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"MM-SP runs under models of Transformers, and {type(model).__name__} is none; call enable_mm_sp before the model is "
            "wrapped, or with the model inside (model.module of DistributedDataParallel)"
        )
    check_model(model, ulysses, ATTENTION)
    require_kernel(kernel, "kernel")
    if frame_micro_batch < 1:
        raise ValueError(f"frame_micro_batch={frame_micro_batch} encodes nothing; use 1 or more")
    groups = MMSPGroups.of(ulysses, ring, everyone)
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, no_mask)
    AttentionInterface.register(TOWER_ATTENTION, tower_attention)
    mm_sp = MMSP(model, groups, kernel, frame_micro_batch)
    mm_sp.enable()
    return mm_sp


class MMSP:
    """MM-SP of one model, made by ``enable_mm_sp``. ``groups`` holds this rank's place in the layout and its process groups."""

    def __init__(self, model: PreTrainedModel, groups: MMSPGroups, kernel: str, frame_micro_batch: int) -> None:
        self.model, self.groups = model, groups
        self._kernel, self._frame_micro_batch = kernel, frame_micro_batch
        self._adapter = adapter_of(model.config)
        text = model.config.get_text_config()
        self._split = HeadSplit(text.num_attention_heads, text.num_key_value_heads, groups.grid.ulysses)
        self._backbone: Any = model.model if self._adapter is None else self._adapter.backbone(model)
        self._tower: Any = None if self._adapter is None else self._adapter.packed_tower(model)
        self._head = FusedHead(model.get_output_embeddings(), groups.alone, model.config)
        self._attentions: dict[tuple[torch.dtype, torch.device, float, bool], Attention2D] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._mean_over = groups.everyone
        self._kept_numbers: float | None = None
        self._before = self._settings()

    @property
    def output_layer(self) -> nn.Linear:
        """The layer whose products and loss MM-SP computes in pieces."""
        return self._head.layer

    @property
    def dp_rank(self) -> int:
        """Index of this rank's data-parallel replica among ``dp_size``: the ``rank`` of a DistributedSampler."""
        return self.groups.grid.coordinates(self.groups.everyone.rank()).dp

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas: the ``num_replicas`` of a DistributedSampler."""
        return self.groups.grid.dp

    def collator(self) -> ShardCollator:
        """The ``collate_fn`` of this rank. All ranks of a replica must be given the same samples in the same order."""
        return ShardCollator(self.groups.grid, self.groups.everyone.rank(), self._adapter, self._head.layer.out_features)

    def cache(self, dtype: str = "auto") -> ShardedCache:
        """An empty key/value cache of this rank, for ``past_key_values`` of ``generate``: what the prompts of several calls have
        in common at their beginning is read once. ``dtype`` is auto, the model's, or fp8, which takes half the memory of bf16.
        No collective. Raises ``ValueError`` for another one."""
        if dtype not in ("auto", "fp8"):
            raise ValueError(f"dtype={dtype} is none of a cache; use auto or fp8")
        layers, kept = self.model.config.get_text_config().num_hidden_layers, FP8 if dtype == "fp8" else None
        return ShardedCache(self.groups.grid, self.groups.everyone.rank(), layers, kept)

    def count_supervised(self, batches: Iterable[Mapping[str, Any]]) -> torch.Tensor:
        """Supervised tokens of a step in the whole group, int64 [], for ``num_items_in_batch``.

        ``batches`` are this rank's micro-batches of the step. All-reduce over the group of all ranks that train together.
        """
        batches = list(batches)
        for batch in batches:
            check_call((), batch, ShardedRow)
        own = sum(len(batch["mm_sp_row"].selected) for batch in batches)
        count = torch.tensor(own, device=_device(self.model))
        dist.all_reduce(count, group=self.groups.everyone)
        return count

    @contextmanager
    def loss_of_replica(self) -> Iterator[None]:
        """Inside the ``with`` block ``loss`` is the mean over the batch of this rank's replica, for evaluation. Its gradient
        must not be taken: the average of all ranks' would not be that of a mean."""
        self._mean_over = self.groups.sample
        try:
            yield
        finally:
            self._mean_over = self.groups.everyone

    def _settings(self) -> tuple[str, str | None, Any]:
        tower = None if self._tower is None else self._tower.config._attn_implementation
        return self._backbone.config._attn_implementation, tower, self.model.__dict__.get("_loss_function")

    def enable(self) -> None:
        """Turn MM-SP on again after ``disable``. No collective."""
        if self._hooks:
            return
        self._before = self._settings()
        self._backbone.set_attn_implementation(ATTENTION)
        if self._before[1] == "sdpa":
            # set_attn_implementation would look for a package of this name
            self._tower.config._attn_implementation = TOWER_ATTENTION
        self.model.loss_function = self._loss
        self._head.install()
        model: Any = self.model
        model.mm_sp = self
        device = partial(_device, model)
        model.generate = Generator(model, model.generate, self.groups, self.collator(), self.cache, device).generate
        self._hooks = [
            self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        if self._adapter is not None:
            encode = partial(self._encode, self._adapter)
            self._hooks.append(self.model.model.register_forward_pre_hook(encode, with_kwargs=True))

    def disable(self) -> None:
        """Turn MM-SP off and restore the model as it was. No collective."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._head.remove()
        del self.model.generate, self.model.mm_sp
        attention, tower, loss_function = self._before
        del self.model._loss_function
        if loss_function is not None:
            self.model.loss_function = loss_function
        self._backbone.set_attn_implementation(attention)
        if self._tower is not None:
            self._tower.config._attn_implementation = tower

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Turn MM-SP off inside the ``with`` block, for calls with whole sequences on each rank. Blocks may be nested;
        where MM-SP is off already, it stays off. Raises ``ValueError`` for a call with a batch of ``collator()``."""
        was_on = bool(self._hooks)
        self.disable()
        guard = self.model.register_forward_pre_hook(check_whole, with_kwargs=True)
        try:
            yield
        finally:
            guard.remove()
            if was_on:
                self.enable()

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the model's forward: check the call, copy the batch to the device, choose the supervised tokens. An all-gather
        over ``host`` in training."""
        device = _device(model)
        check_unchanged(model, self._head.layer, self._backbone.config._attn_implementation, ATTENTION)
        scored: ScoredRows | None = kwargs.get(SCORED)
        if scored is not None:
            kwargs = scored.arguments()
        cache: Any = kwargs.get("past_key_values")
        is_generating = isinstance(cache, ShardedCache)
        if not is_generating:
            check_call(args, kwargs, ShardedRow)
            check_layout(kwargs["mm_sp_row"], self.groups.grid, self.groups.everyone.rank())
            check_same_row(kwargs["mm_sp_row"].fingerprint, self.groups.host)
        elif "mm_sp_row" not in kwargs:
            check_token(args, kwargs)
        kwargs = {k: to_device(v, device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        row: ShardedRow | None = kwargs.get("mm_sp_row")
        if row is None:
            return args, kwargs | {"mm_sp_row": DecodedToken(kwargs["input_ids"][0], cache, self._cached)}
        indices = RowIndices.of(row.attention, device)
        if is_generating:
            self._head.expect(None, torch.empty(0, dtype=torch.int64, device=device))
            return args, kwargs | {"mm_sp_row": PromptChunk(row, indices, cache, self._cached)}
        kwargs |= {"mm_sp_row": _LiveRow(row, indices, self, scored), "use_cache": False}
        if kwargs.get("labels") is not None:
            selected_n = to_device(torch.from_numpy(row.selected), device)
            kwargs["labels"] = kwargs["labels"][:, selected_n]
            self._head.expect(kwargs["labels"][0], selected_n)
        return args, kwargs

    def _leave(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """After the model's forward, also a failed one: drop the values that stood in for others."""
        self._head.expect(None, None)
        row = kwargs.get("mm_sp_row")
        if isinstance(row, PromptChunk | DecodedToken):
            if output is not None:
                row.commit()
            return None
        if isinstance(row, _LiveRow) and row.scored is not None and output is not None:
            return row.scored.whole(output, self.groups.sample)
        if output is None or kwargs.get("labels") is None:
            return None
        kept = {name: value for name, value in output.items() if name not in _STOOD_IN}
        return type(output)(**kept)

    def _encode(
        self, adapter: VisionAdapter, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Before the forward of a model with vision: replace the pixels by the features of this rank's visual tokens."""
        pixels = kwargs.pop(PIXELS, None)
        if pixels is None:  # a decoded token
            return args, kwargs
        plan: VisionPlan = kwargs["mm_sp_row"].row.vision
        checkpoints = bool(model.is_activation_checkpointing)
        features_MC = owned_features(
            model,
            adapter,
            pixels,
            plan,
            self.groups,
            self._frame_micro_batch,
            recompute_above=self._recompute_above(pixels.device) if checkpoints and model.training else None,
            options={name: kwargs.get(name) for name in adapter.options},
        )
        return args, kwargs | adapter.arguments(features_MC, plan.is_video)

    def _recompute_above(self, device: torch.device) -> float:
        """Numbers of pixels of which the tower keeps its layers' inputs. The first time an all-reduce over ``everyone``."""
        if self._kept_numbers is None:
            self._kept_numbers = room_for_kept(self.groups, device) / kept_bytes(self.model.config.vision_config)
        return self._kept_numbers

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor, vocab_size=None, num_items_in_batch=None, **_unused
    ) -> torch.Tensor:
        """The model's loss function; some models give ``vocab_size`` by position. ``logits`` is the loss sum [] that
        ``FusedHead`` returned. All-reduce over the group."""
        return mean_over_group(logits, labels.shape[1], num_items_in_batch, self._mean_over)

    def attention(self, query_1HsD: torch.Tensor, scale: float, in_window: bool = False) -> Attention2D:
        """The 2D attention for such queries, in a sliding window or in whole documents."""
        case = query_1HsD.dtype, query_1HsD.device, scale, in_window
        if case not in self._attentions:
            kernel = select_kernel(self._kernel, query_1HsD.shape[-1], *case[:2], setting="kernel")
            kernel = WindowedKernel(kernel) if in_window else kernel
            peers = PeerMemory.of(self.groups.ulysses, query_1HsD.device)
            groups = {"ulysses_group": self.groups.ulysses, "ring_group": self.groups.ring}
            self._attentions[case] = Attention2D.of(
                self._split, kernel, scale, **groups, device=query_1HsD.device, peers=peers
            )
        return self._attentions[case]

    def _cached(self, query_1HsD: torch.Tensor, scale: float) -> CachedAttention:
        return CachedAttention(self.attention(query_1HsD, scale))


def _device(model: nn.Module) -> torch.device:
    """The device on which the model computes; FSDP2 may keep its weights on another one."""
    weight = next(model.parameters())
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or mesh.device_type == weight.device.type:
        return weight.device
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


class _LiveRow:
    """The keyword ``mm_sp_row`` on its way through the layers. No dataclass, because FSDP2 takes those apart to cast tensors."""

    def __init__(self, row: ShardedRow, indices: RowIndices, mm_sp: MMSP, scored: ScoredRows | None = None) -> None:
        self.row, self._indices, self._mm_sp, self.scored = row, indices, mm_sp, scored
        self._in_window: dict[int, RowIndices] = {}

    def attend(
        self, layer: int, query_1HsD: torch.Tensor, key_1KsD, value_1KsD, scale: float, window: int | None
    ) -> torch.Tensor:
        """2D attention of the local tokens, [1, s, H, D], with ``window`` to themselves and the window - 1 tokens before. The
        collectives are those of ``Attention2D``."""
        q_sHD, k_sKD, v_sKD = (x[0].transpose(0, 1) for x in (query_1HsD, key_1KsD, value_1KsD))
        if window is None or window >= self.row.longest:
            return self._mm_sp.attention(query_1HsD, scale)(q_sHD, k_sKD, v_sKD, self._indices)[None]
        if window not in self._in_window:
            ring = self._mm_sp.groups.ring
            self._in_window[window] = windowed(self._indices, self.row.attention, ring.size(), ring.rank(), window)
        attention = self._mm_sp.attention(query_1HsD, scale, in_window=True)
        return attention(q_sHD, k_sKD, v_sKD, self._in_window[window])[None]
