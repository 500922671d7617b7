"""The faults that ``seeded_faults.py`` plants, and the tests that have to notice them."""

from __future__ import annotations

from typing import NamedTuple

CONTRACT = "tests/parallel/test_gradient_contract.py"
LAYOUTS = "world4-tp2-pp1-u2-r1 or world4-tp1-pp1-u2-r2 or world4-tp1-pp1-u1-r4 or world4-tp2-pp1-u1-r1"


EVERY_LAYOUT = (CONTRACT, "-k", LAYOUTS)
POLICIES = (CONTRACT, "-k", "memory_policy and tp2-pp1-u2-r1")
CHUNKS = (CONTRACT, "-k", "travel_in_chunks and u2-r2")
PEERS = ("tests/parallel/test_peers.py", "-k", "contract_holds and u4-attention_output")
OFFLOAD = ("tests/training/test_offload.py", "-k", "gradients_are_clipped or cut_parameters and 1.0-1000")
HEAD = ("tests/models/test_head.py", "-k", "plain_cross_entropy")
PLATFORM = ("tests/test_platform.py", "-k", "few_versions or deterministic_mode")
AHEAD = ("tests/models/test_vision.py", "-k", "ahead")
SEVERAL_STEPS = ("tests/models/test_vision.py", "-k", "overlapped_gradient_reduction")


class Fault(NamedTuple):
    """``old`` stands exactly once in ``file`` and becomes ``new``; ``tests`` are pytest's arguments."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = EVERY_LAYOUT


PARALLEL = "megatron_vila/parallel/"
FAULTS = [
    Fault(
        "re-shard drops the gradient",
        PARALLEL + "reshard.py",
        "return torch.empty_like(sent_NH).index_copy_(0, reshard.send_order, sent_NH), None",
        "return torch.zeros_like(sent_NH), None",
    ),
    Fault(
        "re-shard returns gradients in sending order",
        PARALLEL + "reshard.py",
        "return torch.empty_like(sent_NH).index_copy_(0, reshard.send_order, sent_NH), None",
        "return sent_NH, None",
    ),
    Fault(
        "visual tokens land in reversed slots",
        PARALLEL + "layout.py",
        "return self.slot[self.owner == rank]",
        "return self.slot[self.owner == rank][::-1].copy()",
    ),
    Fault(
        "zigzag takes the wrong second half",
        PARALLEL + "layout.py",
        "(2 * parts - 1 - part) * chunk]",
        "(parts + part) * chunk]",
    ),
    Fault(
        "ring step takes the later ranks for the earlier",
        PARALLEL + "layout.py",
        "if source < rank:",
        "if source > rank:",
    ),
    Fault(
        "ring attends to the back half of earlier keys",
        PARALLEL + "layout.py",
        "return RingStep(source, ALL, FRONT, causal=False)",
        "return RingStep(source, ALL, BACK, causal=False)",
    ),
    Fault(
        "own ring block is not causal",
        PARALLEL + "layout.py",
        "return RingStep(source, ALL, ALL, causal=True)",
        "return RingStep(source, ALL, ALL, causal=False)",
    ),
    Fault(
        "tensor-parallel slice of a token off by one rank",
        PARALLEL + "layout.py",
        "return cp_rank * tp + local // per_rank, local % per_rank",
        "return cp_rank * tp + (local // per_rank + 1) % tp, local % per_rank",
    ),
    Fault(
        "Ulysses result is not permuted",
        PARALLEL + "layout.py",
        'return np.argsort(np.concatenate(members), kind="stable")',
        "return np.arange(sum(map(len, members)))",
    ),
    Fault(
        "labels shifted by one",
        "megatron_vila/models/shard.py",
        "labels_n=_to(row.labels[held], device)",
        "labels_n=_to(np.roll(row.labels, 1)[held].clip(min=0), device)",
    ),
    Fault(
        "positions count local tokens",
        "megatron_vila/models/shard.py",
        "_to(row.positions[mine], device)",
        "_to(np.arange(len(mine)), device)",
    ),
    Fault(
        "rotary scaling is ignored",
        "megatron_vila/models/shard.py",
        "llm.rope_theta, llm.rope_scaling_factor, dtype",
        "llm.rope_theta, 1.0, dtype",
    ),
    Fault(
        "packed documents attend to each other",
        PARALLEL + "ring.py",
        "lengths = tuple(int(n) // ring for n in np.diff(cu_seqlens))",
        "cu_seqlens = cu_seqlens[[0, -1]]\n        lengths = tuple(int(n) // ring for n in np.diff(cu_seqlens))",
    ),
    Fault(
        "token count of the loss misses cp",
        "megatron_vila/training/optimizer.py",
        "dist.all_reduce(num_tokens, group=pg_collection.dp_cp)",
        "dist.all_reduce(num_tokens, group=pg_collection.dp)",
    ),
    Fault(
        "Ulysses and ring groups swapped",
        PARALLEL + "topology.py",
        "ulysses, ring = parallel_state.get_hierarchical",
        "ring, ulysses = parallel_state.get_hierarchical",
    ),
    Fault(
        "last dK/dV transfer is lost",
        PARALLEL + "ring.py",
        "        returning.collect(totals[1:])\n        return",
        "        [work.wait() for work in returning._works]\n        return",
    ),
    Fault(
        "dK/dV are added to the wrong half",
        PARALLEL + "ring.py",
        "self._layout.add(total, x, self._part)",
        "self._layout.add(total, x, BACK if self._part == FRONT else self._part)",
    ),
    Fault(
        "merge forgets to rescale the running output",
        PARALLEL + "ring.py",
        "out.to(mine.dtype) * mine + ",
        "out.to(mine.dtype) + ",
    ),
    Fault(
        "merge forgets the running log-sum-exp",
        PARALLEL + "ring.py",
        "total = torch.logaddexp(lse_hn, part_lse)",
        "total = torch.maximum(lse_hn, part_lse)",
    ),
    Fault(
        "ring sends back halves for front halves",
        PARALLEL + "ring.py",
        "keys = ring_step(ring.size, to, step).keys\n",
        "keys = BACK if ring_step(ring.size, to, step).keys == FRONT else ALL\n",
    ),
    Fault(
        "gradients of replicated key/value heads overwrite each other",
        PARALLEL + "ulysses.py",
        "total[:, kv.start : kv.start + replicated] += part[:, :replicated]",
        "total[:, kv.start : kv.start + replicated] = part[:, :replicated]",
    ),
    Fault(
        "gradient of the output is not permuted",
        PARALLEL + "ulysses.py",
        "return [take_rows(part, order) for part in buffer.split([heads] * count, dim=1)]",
        "return list(buffer.split([heads] * count, dim=1))",
    ),
    Fault(
        "a rank writes the gradient of the output where its receiver's tokens stand",
        PARALLEL + "ulysses.py",
        "put_rows(x[:, ranges[u].start : ranges[u].stop], self._tokens_of(self.rank, inverse), there)",
        "put_rows(x[:, ranges[u].start : ranges[u].stop], self._tokens_of(u, inverse), there)",
        PEERS,
    ),
    Fault(
        "the gradient of a value takes the place of its key's",
        PARALLEL + "rope.py",
        "dqkv_SKGD[:, :, -1] = dv_SKD",
        "dqkv_SKGD[:, :, -2] = dv_SKD",
    ),
    Fault(
        "a rank that shares a key/value head takes another one's queries",
        PARALLEL + "attention.py",
        "self._tp_rank % ranks * self._per_group",
        "(self._tp_rank + 1) % ranks * self._per_group",
        (CONTRACT, "-k", "world4-tp4-pp1-u1-r1"),
    ),
    Fault(
        "a rank takes its neighbour's key/value heads",
        PARALLEL + "ulysses.py",
        "queries = self.query_range(rank, chunk)",
        "queries = self.query_range((rank + 1) % self.ulysses, chunk)",
    ),
    Fault(
        "vision gradients are not summed over tp",
        "megatron_vila/models/vila.py",
        "parameter.sequence_parallel = grid.tp > 1",
        "parameter.sequence_parallel = False",
    ),
    Fault(
        "norm gradients are not summed over tp",
        "megatron_vila/models/norm.py",
        "self.weight.sequence_parallel = config.sequence_parallel",
        "self.weight.sequence_parallel = False",
    ),
    Fault(
        "ranks without frames leave the graph",
        "megatron_vila/models/vision.py",
        " + zero_connected_to(used)",
        "",
        SEVERAL_STEPS,
    ),
    Fault(
        "layers of a block are run again in the wrong order",
        "megatron_vila/models/decoder.py",
        "enumerate(reversed(self._layers)):",
        "enumerate(self._layers):",
        POLICIES,
    ),
    Fault(
        "kept attention outputs are not exchanged for their gradients",
        PARALLEL + "attention2d.py",
        "outputs = ulysses.outputs_to_heads([dout_sHD, out_sHD], row.order, row.inverse, chunk)",
        "outputs = ulysses.outputs_to_heads([dout_sHD, dout_sHD], row.order, row.inverse, chunk)",
        POLICIES,
    ),
    Fault(
        "a chunk of heads lands in the place of another",
        PARALLEL + "ulysses.py",
        "[:, :, chunk]",
        "[:, :, -1 - chunk]",
        CHUNKS,
    ),
    Fault(
        "a rank writes into its peers where another one's heads belong",
        PARALLEL + "ulysses.py",
        "first = tokens * dim * sum(widths[a][u] for a in range(self.rank))",
        "first = tokens * dim * sum(widths[a][u] for a in range(self.split.ulysses - 1 - self.rank))",
        PEERS,
    ),
    Fault(
        "memory of peers is read only after the next exchange",
        PARALLEL + "ulysses.py",
        "self._finish = lambda: arrived",
        "self._finish = finish",
        PEERS,
    ),
    Fault(
        "kept log-sum-exps are those of another chunk",
        PARALLEL + "attention2d.py",
        "return dout, q, k, v, out, lses[chunk]",
        "return dout, q, k, v, out, lses[-1 - chunk]",
        CHUNKS,
    ),
    Fault(
        "weight gradients of all tiles but the last are lost",
        "megatron_vila/models/weight_gradient.py",
        "        out.addmm_(a, b)\n",
        "        torch.mm(a, b, out=out)\n",
        POLICIES,
    ),
    Fault(
        "the gradient of the residual stream is lost where a norm passes it on",
        "megatron_vila/models/fused.py",
        "(dx + _wide(dstream)).to(x.dtype)",
        "dx.to(x.dtype)",
    ),
    Fault(
        "gradients of gate and up are exchanged",
        "megatron_vila/models/fused.py",
        "return dout * up * sigmoid * (1 + gate * (1 - sigmoid)), dout * gate * sigmoid",
        "return dout * gate * sigmoid, dout * up * sigmoid * (1 + gate * (1 - sigmoid))",
        POLICIES,
    ),
    Fault(
        "SwiGLU takes the place of its gradient too early",
        "megatron_vila/models/fused.py",
        "    gradients, value = _silu_times_gradient(gate, up, dout), _silu_times_of(gate, up)\n",
        "    value = dout.copy_(_silu_times_of(gate, up))\n    gradients = _silu_times_gradient(gate, up, dout)\n",
        POLICIES,
    ),
    Fault(
        "the first layer without the recompute policy is left out",
        "megatron_vila/models/decoder.py",
        "for layer in decoder.layers[again:]:",
        "for layer in decoder.layers[again + (0 < again) :]:",
        POLICIES,
    ),
    Fault(
        "head keeps its partial gradient under tp",
        "megatron_vila/models/head.py",
        "dist.reduce_scatter_tensor(grads_CH, partial, group=vocabulary.group)",
        "grads_CH.copy_(partial.chunk(vocabulary.group.size())[vocabulary.group.rank()])",
    ),
    Fault(
        "head normalises over the local vocabulary",
        "megatron_vila/models/head.py",
        "_all_reduce(sums_C, dist.ReduceOp.SUM, vocabulary)",
        "pass",
    ),
    Fault(
        "the last few rows of the vocabulary have no part in the gradient of hidden states",
        "megatron_vila/models/head.py",
        "for part in reversed(list(_fast_parts(len(weight_VH)))):",
        "for part in list(_fast_parts(len(weight_VH)))[:1]:",
        HEAD,
    ),
    Fault(
        "a block takes the place of the sum at some tokens",
        PARALLEL + "ring.py",
        "total[index] = total[index] + x",
        "total[index] = x",
    ),
    Fault(
        "compiled code has versions for what wants gradients",
        "megatron_vila/platform.py",
        "arg.detach() if isinstance(arg, torch.Tensor) else arg",
        "arg",
        PLATFORM,
    ),
    Fault(
        "code is compiled in deterministic mode too",
        "megatron_vila/platform.py",
        "return not torch.are_deterministic_algorithms_enabled()",
        "return True",
        PLATFORM,
    ),
    Fault(
        "state on the device misses its update while the host's comes",
        "megatron_vila/training/offload.py",
        "for own in here[index * per_arrival",
        "for own in here[1 + index * per_arrival",
        OFFLOAD,
    ),
    Fault(
        "a chunk of optimizer state stays on the device after its update",
        "megatron_vila/training/offload.py",
        "_copy_rows(chunk.state, state)",
        "pass",
        OFFLOAD,
    ),
    Fault(
        "a slot is filled before its state went back to the host",
        "megatron_vila/training/offload.py",
        "range(min(SLOTS - 1, len(chunks))))",
        "range(min(SLOTS + 1, len(chunks))))",
        OFFLOAD,
    ),
    Fault(
        "offloaded gradients are not clipped",
        "megatron_vila/training/offload.py",
        "gradients_E.mul_(grad_scale)",
        "pass",
        OFFLOAD,
    ),
    Fault(
        "frames encoded ahead are taken for others",
        "megatron_vila/models/vision.py",
        "if pixels is not pixels_F3HW:",
        "if pixels is None:",
        AHEAD,
    ),
    Fault(
        "frames are encoded ahead beside kept activations",
        "megatron_vila/models/vision.py",
        "if learns and not self._tower.config.recompute:",
        "if False:",
        AHEAD,
    ),
    Fault(
        "frames encoded ahead are those of the same row",
        "megatron_vila/training/step.py",
        "zip(rows, (*rows[1:], None), strict=True)",
        "zip(rows, (*rows[:-1], None), strict=True)",
        (CONTRACT, "-k", "encodes_the_next"),
    ),
    Fault(
        "what comes back from the host is in no estimate",
        "megatron_vila/config/activations.py",
        "most = max(most, held + back)",
        "most = max(most, held)",
        ("tests/models/test_memory_policies.py", "-k", "is_what_is_predicted"),
    ),
    Fault(
        "copies of packed rows in the ring are in no estimate",
        "megatron_vila/config/activations.py",
        "copies = 1.5 * q * packed",
        "copies = 0",
        ("tests/models/test_workspace.py", "-k", "ring"),
    ),
    Fault(
        "a run's estimate is that of another GPU",
        "megatron_vila/training/memory_report.py",
        "estimate_memory(config, world_size, platform.device_memory_bytes())",
        "estimate_memory(config, world_size, 80 * 10**9)",
        ("tests/training/test_memory_report.py", "-k", "share"),
    ),
    Fault(
        "a run's report plans for no GPU",
        "megatron_vila/training/memory_report.py",
        "estimate_memory(config, dist.get_world_size(), platform.device_memory_bytes())",
        "estimate_memory(config, dist.get_world_size(), 0)",
        ("tests/training/test_memory_report.py", "-k", "predicted"),
    ),
    Fault(
        "a report compares tensors with what the allocator does not hand out",
        "megatron_vila/training/memory_report.py",
        "{estimate.allocated / GIB:.2f}",
        "{estimate.total / GIB:.2f}",
        ("tests/training/test_memory_report.py", "-k", "predicted"),
    ),
    Fault(
        "full collections pass over all that a run keeps",
        "megatron_vila/training/trainer.py",
        "                    gc.freeze()\n",
        "",
        ("tests/training/test_trainer.py", "-k", "collections"),
    ),
    Fault(
        "what a run kept is never collected",
        "megatron_vila/training/trainer.py",
        "            gc.unfreeze()\n",
        "",
        ("tests/training/test_trainer.py", "-k", "collections"),
    ),
    Fault(
        "a variant is measured beside the model of the one before",
        "megatron_vila/benchmark/worker.py",
        "        platform.collect_garbage()\n",
        "",
        ("tests/benchmark/test_benchmarks.py", "-k", "left_behind"),
    ),
]
