"""Attention alone: 2D attention in several layouts and kernels, and a plain ring as LongVILA's baseline runs it.

TFLOP/s count causal attention as half and per document: forward 2, backward 5 products of a score matrix (part ``both``: the
model FLOPs 2 + 4, as MFU counts them).

Settings: ``documents`` (lengths), ``heads``, ``kv_heads``, ``head_dim``.

Legend: s local tokens (S/cp), H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.plain_ring import plain_ring_attention
from benchmarks.predicted import attention_alone, plain_ring_alone
from benchmarks.worker import measure, parse_variant
from megatron_vila import accelerator
from megatron_vila.config.schema import ParallelConfig
from megatron_vila.parallel.attention2d import Attention2D, RowIndices
from megatron_vila.parallel.kernels import select_kernel
from megatron_vila.parallel.peers import PeerMemory
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.budgets import MOST_PEER_BYTES
from megatron_vila.plan.heads import HeadSplit
from megatron_vila.plan.row_plan import AttentionPlan

VARIANT = {"ulysses": 1, "ulysses_chunks": 1, "ring": 1, "kernel": "auto"}
VARIANT |= {"method": ("mmsp", "plain_ring"), "exchange": ("peers", "collective")}
PRODUCTS = {"forward": 2, "backward": 5, "both": 6}


def rows(settings: dict[str, Any], text: str) -> Iterator[dict[str, Any]]:
    """One for each part of the variant ``text``."""
    variant = parse_variant(text, VARIANT)
    heads, kv_heads, dim = (settings[name] for name in ("heads", "kv_heads", "head_dim"))
    documents = np.array(settings["documents"])
    device, dtype = accelerator.device(), accelerator.dtype_of("auto")
    topology = ParallelTopology.create(ParallelConfig(ulysses=variant["ulysses"], ring=variant["ring"]))
    grid = topology.grid
    unit = grid.document_multiple
    if (documents % unit).any():
        raise ValueError(f"documents of {documents.tolist()} tokens are no multiples of 2*cp = {unit}")
    cu_seqlens = np.concatenate([[0], np.cumsum(documents)])
    tokens = int(cu_seqlens[-1]) // grid.cp
    kernel = select_kernel(variant["kernel"], dim, dtype, device)
    generator = torch.Generator(device).manual_seed(topology.rank)
    q_sHD, k_sKD, v_sKD = (
        torch.randn(tokens, n, dim, device=device, dtype=dtype, generator=generator).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    dout_sHD = torch.randn(tokens, heads, dim, device=device, dtype=dtype, generator=generator)
    if variant["method"] == "plain_ring":
        if len(documents) > 1:
            raise ValueError(f"variant {text}: the plain ring has no packed rows; give one document")

        def forward():
            return plain_ring_attention(q_sHD, k_sKD, v_sKD, kernel, dim**-0.5, topology.ring)
    else:
        split = HeadSplit(heads, kv_heads, grid.ulysses, variant["ulysses_chunks"])
        peers = PeerMemory.of(topology.ulysses, device) if variant["exchange"] == "peers" else None
        attention = Attention2D.of(
            split,
            kernel,
            dim**-0.5,
            ulysses_group=topology.ulysses,
            ring_group=topology.ring,
            device=device,
            peers=peers,
        )
        row = RowIndices.of(AttentionPlan.of(cu_seqlens, grid, topology.place.ring), device)

        def forward():
            return attention(q_sHD, k_sKD, v_sKD, row)

    predicted = predicted_bytes(settings, variant, kernel.name, dtype.itemsize)
    out_sHD = forward()
    steps = {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out_sHD, (q_sHD, k_sKD, v_sKD), dout_sHD, retain_graph=True),
        "both": lambda: torch.autograd.grad(forward(), (q_sHD, k_sKD, v_sKD), dout_sHD),
    }
    score = heads * dim * float((documents.astype(np.float64) ** 2).sum())
    for part, step in steps.items():
        found = measure(step, settings["warmup"], settings["timed"])
        yield {
            "model": f"{heads}/{kv_heads} heads of {dim}" + f", {len(documents)} documents" * (len(documents) > 1),
            "part": part,
            "tp": 1,
            "ulysses": grid.ulysses,
            "ring": grid.ring,
            "attention": kernel.name,
            "seq_len": int(cu_seqlens[-1]),
            "tflops_per_gpu": float(f"{PRODUCTS[part] * score / found.seconds / dist.get_world_size() / 1e12:.4g}"),
            **found.columns(predicted and predicted[part]),
        }
    topology.destroy()


def predicted_bytes(settings: dict[str, Any], variant: dict[str, Any], kernel: str, element: int) -> dict[str, int] | None:
    """Of each part on a rank; None where the memory of a kernel or layout is not modeled."""
    ulysses, ring, chunks = variant["ulysses"], variant["ring"], variant["ulysses_chunks"]
    tokens = sum(settings["documents"]) // (ulysses * ring)
    q, k = (tokens * settings[name] * settings["head_dim"] * element for name in ("heads", "kv_heads"))
    lse = tokens * settings["heads"] * max(element, 4)
    if variant["method"] == "plain_ring" and kernel == "flash2" and ring == 2:
        return {part: plain_ring_alone(part, q, k, lse) for part in PRODUCTS}
    whole_groups = HeadSplit(settings["heads"], settings["kv_heads"], ulysses, chunks).expansion(0) is None
    if variant["method"] == "plain_ring" or kernel != "fa4" or ring > 2 or not whole_groups:
        return None
    peers = variant["exchange"] == "peers" and q + 2 * k <= MOST_PEER_BYTES
    packed = len(settings["documents"]) > 1
    layout = {"ulysses": ulysses, "ring": ring, "chunks": chunks, "peers": peers, "packed": packed}
    return {part: attention_alone(part, q, k, lse, **layout) for part in PRODUCTS}
