"""Faults of the parallel layer: layout, re-shard, ring, Ulysses, groups."""

from .fault import CONTRACT, POLICIES, Fault

CHUNKS = (CONTRACT, "-k", "travel_in_chunks and u2-r2")
PEERS = ("tests/parallel/test_peers.py", "-k", "contract_holds and u4-attention_output")
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
        "megatron_vila/plan/tokens.py",
        "slots=self.slot[self.owner == rank],",
        "slots=self.slot[self.owner == rank][::-1].copy(),",
    ),
    Fault(
        "zigzag takes the wrong second half",
        "megatron_vila/plan/tokens.py",
        "(2 * parts - 1 - part) * chunk]",
        "(parts + part) * chunk]",
    ),
    Fault(
        "ring step takes the later ranks for the earlier",
        "megatron_vila/plan/tokens.py",
        "if source < rank:",
        "if source > rank:",
    ),
    Fault(
        "ring attends to the back half of earlier keys",
        "megatron_vila/plan/tokens.py",
        "return RingStep(source, ALL, FRONT, causal=False)",
        "return RingStep(source, ALL, BACK, causal=False)",
    ),
    Fault(
        "own ring block is not causal",
        "megatron_vila/plan/tokens.py",
        "return RingStep(source, ALL, ALL, causal=True)",
        "return RingStep(source, ALL, ALL, causal=False)",
    ),
    Fault(
        "tensor-parallel slice of a token off by one rank",
        "megatron_vila/plan/tokens.py",
        "return cp_rank * tp + local // per_rank, local % per_rank",
        "return cp_rank * tp + (local // per_rank + 1) % tp, local % per_rank",
    ),
    Fault(
        "Ulysses result is not permuted",
        "megatron_vila/plan/tokens.py",
        'return np.argsort(np.concatenate(members), kind="stable")',
        "return np.arange(sum(map(len, members)))",
    ),
    Fault(
        "packed documents attend to each other",
        "megatron_vila/plan/row_plan.py",
        "lengths = tuple((np.diff(cu_seqlens) // grid.ring).tolist())",
        "cu_seqlens = cu_seqlens[[0, -1]]\n        lengths = tuple((np.diff(cu_seqlens) // grid.ring).tolist())",
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
        PARALLEL + "megatron_attention.py",
        "self._tp_rank % ranks * self._per_group",
        "(self._tp_rank + 1) % ranks * self._per_group",
        (CONTRACT, "-k", "world4-tp4-pp1-u1-r1"),
    ),
    Fault(
        "a rank takes its neighbor's key/value heads",
        "megatron_vila/plan/heads.py",
        "queries = self.query_range(rank, chunk)",
        "queries = self.query_range((rank + 1) % self.ulysses, chunk)",
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
        "a block takes the place of the sum at some tokens",
        PARALLEL + "ring.py",
        "total[index] = total[index] + x",
        "total[index] = x",
    ),
]
