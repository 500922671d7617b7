"""Which parallel layouts a model allows, why another is refused, and which one to use in its place.

Pure arithmetic on the configuration, used by ``validate`` and ``explain``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_vila.config.schema import LanguageConfig
from megatron_vila.plan.grid import Layout
from megatron_vila.plan.sizes import head_dim


def layout_problems(llm: LanguageConfig, layout: Layout) -> list[str]:
    """Why ``llm`` cannot be cut this way, with the cure; empty if it can. Sizes must be at least 1."""
    return [*_pipeline_problems(llm, layout), *_tensor_problems(llm, layout), *_ulysses_problems(llm, layout)]


def chunk_problems(llm: LanguageConfig, layout: Layout, chunks: int) -> list[str]:
    """Why the exchange over ``layout.ulysses`` ranks cannot travel in ``chunks`` chunks of heads; empty if it can."""
    kv_heads = max(llm.num_kv_heads // layout.tp, 1)
    if chunks == 1 or (layout.ulysses > 1 and kv_heads % (layout.ulysses * chunks) == 0):
        return []
    works = [n for n in range(1, kv_heads + 1) if n == 1 or (layout.ulysses > 1 and kv_heads % (layout.ulysses * n) == 0)]
    return [
        f"parallel.ulysses_chunks={chunks} with ulysses={layout.ulysses} does not deal out {kv_heads} key/value heads of a "
        f"tensor-parallel rank; use ulysses_chunks={' or '.join(map(str, works))}"
    ]


def world_problem(llm: LanguageConfig, layout: Layout, world_size: int) -> str | None:
    """Why ``world_size`` ranks cannot run ``layout``, with world sizes and layouts that work; None if they can."""
    problem = layout.world_problem(world_size)
    if problem and (proposals := nearest_layouts(llm, layout, world_size)):
        problem += f", or for {world_size} use " + "; ".join(f"{p}" for p in proposals)
    return problem


def nearest_layouts(llm: LanguageConfig, layout: Layout, world_size: int, limit: int = 3) -> list[Layout]:
    """Layouts that ``llm`` allows on ``world_size`` ranks, the most similar to ``layout`` first."""

    def distance(other: Layout) -> tuple[int, float, int]:
        changed = sum(a != b for a, b in zip(other, layout, strict=True))
        ratio = max(other.size / layout.size, layout.size / other.size)
        return changed, ratio, other.ring

    allowed = (c for c in _candidates(world_size) if not layout_problems(llm, c))
    return sorted(allowed, key=distance)[:limit]


def nearest_divisors(total: int, wanted: int) -> str:
    """The divisors of ``total`` below and above ``wanted``, which is none, as text for a message."""
    return _near(_divisors(total), wanted)


def _candidates(world_size: int) -> Iterator[Layout]:
    for tp in _divisors(world_size):
        for pp in _divisors(world_size // tp):
            for ulysses in _divisors(world_size // tp // pp):
                for ring in _divisors(world_size // tp // pp // ulysses):
                    yield Layout(tp, pp, ulysses, ring)


def _pipeline_problems(llm: LanguageConfig, layout: Layout) -> list[str]:
    if llm.num_layers % layout.pp == 0:
        return []
    sizes = nearest_divisors(llm.num_layers, layout.pp)
    return [f"parallel.pp={layout.pp} does not divide model.llm.num_layers={llm.num_layers}; use parallel.pp={sizes}"]


def _tensor_problems(llm: LanguageConfig, layout: Layout) -> list[str]:
    tp, problems = layout.tp, []
    works = [t for t in _divisors(llm.num_heads) if _tp_fits(llm, t)]
    cure = f"use parallel.tp={_near(works, tp)}"
    if llm.num_heads % tp:
        problems.append(
            f"parallel.tp={tp} does not divide the {llm.num_heads} query heads (model.llm.num_heads); {cure}"
        )
    if llm.ffn_hidden_size % tp:
        problems.append(f"parallel.tp={tp} does not divide model.llm.ffn_hidden_size={llm.ffn_hidden_size}; {cure}")
    if llm.num_kv_heads % tp and tp % llm.num_kv_heads:
        problems.append(
            f"parallel.tp={tp} is neither a divisor nor a multiple of the {llm.num_kv_heads} key/value heads "
            f"(model.llm.num_kv_heads), so they can be neither split nor replicated evenly; {cure}"
        )
    elif not problems and not _tp_fits(llm, tp):
        rows = (llm.num_heads + 2 * llm.num_kv_heads) * head_dim(llm)
        problems.append(
            f"parallel.tp={tp} does not divide the {rows} rows of the joint query/key/value projection; {cure}"
        )
    return problems


def _tp_fits(llm: LanguageConfig, tp: int) -> bool:
    """Megatron-Core shares out the joint QKV rows also when it replicates the key/value heads that are too few."""
    kv_fits = llm.num_kv_heads % tp == 0 or tp % llm.num_kv_heads == 0
    rows = (llm.num_heads + 2 * llm.num_kv_heads) * head_dim(llm)
    return kv_fits and llm.num_heads % tp == 0 and llm.ffn_hidden_size % tp == 0 and rows % tp == 0


def _ulysses_problems(llm: LanguageConfig, layout: Layout) -> list[str]:
    if llm.num_heads % layout.tp:
        return []
    heads, cp = llm.num_heads // layout.tp, layout.cp
    whose = f" of a tensor-parallel rank ({llm.num_heads} / tp={layout.tp})" if layout.tp > 1 else ""
    problem = ulysses_problem(heads, layout.ulysses, whose)
    best = max(u for u in _divisors(heads) if cp % u == 0)
    return [f"parallel.{problem} (cp={cp} as ulysses={best}, ring={cp // best})"] if problem else []


def ulysses_problem(heads: int, ulysses: int, whose: str = "") -> str | None:
    """Why ``heads`` query heads cannot be dealt to ``ulysses`` ranks, with sizes that can; None if they can."""
    if heads % ulysses == 0:
        return None
    below = [str(u) for u in _divisors(heads) if u < ulysses][-2:]
    return f"ulysses={ulysses} does not divide {heads} query heads{whose}; use ulysses={' or '.join(below)}"


def _near(allowed: list[int], wanted: int) -> str:
    """The allowed size below ``wanted`` and the one above it."""
    below, above = [a for a in allowed if a < wanted], [a for a in allowed if a > wanted]
    return " or ".join(str(size) for size in [*below[-1:], *above[:1]])


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(max(n, 0)) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
