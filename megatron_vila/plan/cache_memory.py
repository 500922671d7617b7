"""How many tokens and frames the cache of inference has room for: what a rank keeps of each token, and what the model and its
work on a chunk take beside it.

A rank keeps the keys and values of the tokens of its ring part (the tokens are dealt evenly over the ring), for the key/value
heads that its Ulysses rank needs. So ``tp`` and ``ulysses`` make the cache of a token smaller as long as there are key/value
heads to deal out, and ``ring`` deals out the tokens.

Legend: s tokens of a chunk on a CP rank, K key/value heads of a rank, D head size; H, q and F widths of the hidden states, of the
queries and of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vila.config.schema import Config, LanguageConfig
from megatron_vila.errors import SettingError
from megatron_vila.plan.budgets import GIB, frames_at_once
from megatron_vila.plan.geometry import patches_per_square
from megatron_vila.plan.grid import Layout
from megatron_vila.plan.heads import HeadSplit
from megatron_vila.plan.layouts import layout_problems, nearest_layouts
from megatron_vila.plan.memory import SLACK_BYTES, stage_parameters
from megatron_vila.plan.pictures import most_frames, pictures_of
from megatron_vila.plan.sizes import head_dim

CACHE_DTYPES = ("auto", "bf16", "fp32", "fp64", "fp8")
"""Of kept keys and values: as the model computes (auto), one of its dtypes, or fp8 with a float32 scale for each token and
head."""

FP8_BLOCK_TOKENS = 65536
"""Tokens of fp8 that a chunk of a prompt reads at once in the dtype of the model: enough to keep a kernel busy."""

_SCALE_BYTES = 4


def kv_heads_of_a_rank(llm: LanguageConfig, layout: Layout) -> int:
    """Key/value heads of the rank that keeps the most of them."""
    split = HeadSplit(llm.num_heads // layout.tp, llm.num_kv_heads // layout.tp, layout.ulysses)
    return max(len(split.kv_range(rank)) for rank in range(layout.ulysses))


def token_bytes(llm: LanguageConfig, layout: Layout, cache_dtype: str, element: int) -> int:
    """Bytes of the cache of one token on a rank that keeps it, all layers; ``element`` are those of a number of the model."""
    numbers = {"auto": element, "bf16": 2, "fp32": 4, "fp64": 8, "fp8": 1}[cache_dtype]
    scale = _SCALE_BYTES if cache_dtype == "fp8" else 0
    return 2 * llm.num_layers * kv_heads_of_a_rank(llm, layout) * (head_dim(llm) * numbers + scale)


@dataclass(frozen=True)
class CacheMemory:
    """Bytes on the fullest rank: ``weights``, ``work`` on a chunk and its frames, ``slack`` as in ``plan/memory.py``, and
    ``per_token`` for each token that it keeps of a sequence dealt over ``ring`` ranks."""

    weights: int
    work: int
    slack: int
    per_token: int
    ring: int

    def cache(self, tokens: int) -> int:
        """Bytes for a sequence of ``tokens`` tokens."""
        return -(-tokens // self.ring) * self.per_token

    def tokens_in(self, room_bytes: int) -> int:
        """Tokens of a sequence whose cache takes at most ``room_bytes`` on each rank."""
        return max(0, room_bytes) // self.per_token * self.ring

    def tokens_on(self, device_bytes: int) -> int:
        """Tokens of a sequence on devices of ``device_bytes`` that hold nothing yet."""
        return self.tokens_in(device_bytes - self.weights - self.work - self.slack)


def cache_memory(config: Config, cache_dtype: str, chunk_tokens: int, element: int, device_bytes: int) -> CacheMemory:
    """For the layout of ``config`` (pp = 1), chunks of ``chunk_tokens`` tokens over all ranks, and devices of ``device_bytes``
    (0: on a CPU)."""
    llm, layout = config.model.llm, Layout.of(config.parallel)
    held, _ = stage_parameters(config)
    work = _work(config, layout, chunk_tokens, element, device_bytes)
    if cache_dtype == "fp8":
        # Keys and values of a block as the kernels take them, and in float32 while the scales are applied.
        work += 2 * FP8_BLOCK_TOKENS * kv_heads_of_a_rank(llm, layout) * head_dim(llm) * (element + 2 * 4)
    return CacheMemory(
        weights=held * element,
        work=work,
        slack=SLACK_BYTES if device_bytes else 0,
        per_token=token_bytes(llm, layout, cache_dtype, element),
        ring=layout.ring,
    )


def _work(config: Config, layout: Layout, chunk_tokens: int, element: int, device_bytes: int) -> int:
    """Most that is in use at once while a layer works on a chunk and the tower on the frames of the next one."""
    llm, vision = config.model.llm, config.model.vision
    s = -(-chunk_tokens // layout.cp)
    q, kv = llm.num_heads * head_dim(llm), llm.num_kv_heads * head_dim(llm)
    streams = 4 * llm.hidden_size * (1 if layout.tp == 1 else 2)  # residual, norm, what is added; whole and in tp slices
    mlp = 3 * llm.ffn_hidden_size // layout.tp
    exchanged = (2 if layout.ulysses > 1 else 1) * (q + 2 * kv) // layout.tp
    # Queries of all ring ranks, their outputs and the merged ones in float32.
    gathered = layout.ring * q // layout.tp * (element + 2 * 4)
    tokens = s * ((streams + max(mlp, exchanged)) * element + gathered)
    squares = frames_at_once(vision, False, element, device_bytes)
    inner = 7 * vision.hidden_size + vision.ffn_hidden_size
    # Embeddings of the chunk's own frames and of the next ones.
    return tokens + squares * patches_per_square(vision) * inner * element + 2 * s * llm.hidden_size * element


def frames_that_fit(config: Config, tokens: int, text_tokens: int, separators: int) -> int:
    """Most frames of one video beside ``text_tokens`` tokens of text in a sequence of ``tokens``."""
    return most_frames(pictures_of(config.model), max(0, tokens - text_tokens), separators)


@dataclass(frozen=True)
class Wanted:
    """The sequence that somebody asks for: its ``tokens``, of which ``text_tokens`` are neither visual tokens nor separators, and
    the ``frames`` of its media; ``separators`` tokens stand behind each frame."""

    tokens: int
    text_tokens: int
    frames: int
    separators: int


def cache_problem(
    config: Config, wanted: Wanted, memory: CacheMemory, room_bytes: int, others: Sequence[CacheMemory] = ()
) -> str:
    """Why ``wanted`` does not fit ``room_bytes`` on each rank, how many frames would, and what else to do; empty if it fits.

    ``room_bytes`` is what is left beside weights and work. ``others`` are the same memory with an fp8 cache, where that is a
    cure.
    """
    needed = memory.cache(wanted.tokens)
    if needed <= room_bytes:
        return ""

    def fitting(of: CacheMemory) -> int:
        return frames_that_fit(config, of.tokens_in(room_bytes), wanted.text_tokens, wanted.separators)

    room = memory.tokens_in(room_bytes)
    if not wanted.frames or (room and memory.cache(wanted.text_tokens) > room_bytes):  # too much text, whatever the frames
        needed = memory.cache(wanted.text_tokens)
        what, fit = f"{wanted.text_tokens:,} tokens of question and answer", f"{room:,} tokens"
        cures = ["ask for a shorter answer (--max-new-tokens), or with a shorter question"] if room else []
    else:
        what, fit = f"{wanted.frames:,} frames ({wanted.tokens:,} tokens)", f"{fitting(memory):,} frames"
        cures = [f"ask with --frames {fitting(memory)}"] if fitting(memory) else []
        cures += [f"use --cache fp8 ({fitting(other):,} frames)" for other in others]
    ring = _ring_that_fits(memory, wanted.tokens, room_bytes)
    cures.append(f"use more GPUs (--ring {ring})" if ring else "use more GPUs (--tp)")
    return (
        f"these {what} need {needed / GIB:.3g} GiB of cache on each rank, and {max(0, room_bytes) / GIB:.3g} GiB are free for it "
        f"beside the model and its work; {fit} would fit: {', or '.join(cures)}"
    )


def _ring_that_fits(memory: CacheMemory, tokens: int, room_bytes: int) -> int:
    """The next larger ring that keeps few enough tokens on a rank; 0 if a rank has no room for a single one."""
    ring = memory.ring
    while room_bytes >= memory.per_token and -(-tokens // ring) * memory.per_token > room_bytes:
        ring *= 2
    return ring if room_bytes >= memory.per_token else 0


def layout_for(llm: LanguageConfig, world_size: int, tp: int = 1, ulysses: int = 0, ring: int = 0) -> Layout:
    """The layout of inference on ``world_size`` ranks; sizes of 0 are chosen: as many Ulysses ranks as share the heads and keep
    fewer key/value heads each, the others in the ring.

    Raises ``SettingError`` for sizes that are not those of one replica, and for a layout that the model does not allow.
    """
    if min(tp, ulysses + 1, ring + 1) < 1:
        raise SettingError(f"tp={tp}, ulysses={ulysses} and ring={ring} must be at least 1 (0 chooses ulysses or ring)")
    ranks = max(1, world_size // (tp * max(1, ulysses) * max(1, ring)))  # left to what is chosen
    if not ulysses:
        heads, kv_heads = llm.num_heads // tp, llm.num_kv_heads // tp
        fits = [u for u in range(1, ranks + 1) if ranks % u == 0 and heads % u == 0 and (u <= kv_heads or ring)]
        ulysses = max(fits, default=1)
        ranks //= ulysses
    layout = Layout(tp, 1, ulysses, ring or ranks)
    if layout.size != world_size:
        near = _of_one_replica(llm, layout, world_size)
        proposals = "; ".join(f"tp={other.tp} ulysses={other.ulysses} ring={other.ring}" for other in near)
        raise SettingError(
            f"{world_size} processes are not tp*ulysses*ring = {layout.tp}*{layout.ulysses}*{layout.ring} = {layout.size}, and "
            f"replicas do not share a question (dp=1): start {layout.size}, or for {world_size} use {proposals}"
        )
    if problems := layout_problems(llm, layout):
        raise SettingError("\n".join(problems))
    return layout


def _of_one_replica(llm: LanguageConfig, layout: Layout, world_size: int) -> list[Layout]:
    return [near for near in nearest_layouts(llm, layout, world_size, limit=99) if near.pp == 1 and near.size == world_size][:3]

