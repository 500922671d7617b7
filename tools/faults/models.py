"""Faults of the model: shards, vision, decoder, fused operations, head."""

from .fault import POLICIES, Fault

HEAD = ("tests/models/test_loss.py", "-k", "plain_cross_entropy")
AHEAD = ("tests/models/test_vision.py", "-k", "ahead")
SEVERAL_STEPS = ("tests/models/test_vision.py", "-k", "overlapped_gradient_reduction")

FAULTS = [
    Fault(
        "labels shifted by one",
        "megatron_vila/plan/row_plan.py",
        "labels=row.labels[held]",
        "labels=np.roll(row.labels, 1)[held].clip(min=0)",
    ),
    Fault(
        "positions count local tokens",
        "megatron_vila/plan/row_plan.py",
        "positions=row.positions[mine]",
        "positions=np.arange(len(mine))",
    ),
    Fault(
        "rotary scaling is ignored",
        "megatron_vila/models/shard.py",
        "llm.rope_theta, llm.rope_scaling_factor, dtype",
        "llm.rope_theta, 1.0, dtype",
    ),
    Fault(
        "vision gradients are not summed over tp",
        "megatron_vila/models/vila.py",
        "parameter.sequence_parallel = grid.tp > 1",
        "parameter.sequence_parallel = False",
    ),
    Fault(
        "norm gradients are not summed over tp",
        "megatron_vila/models/decoder/norm.py",
        "self.weight.sequence_parallel = config.sequence_parallel",
        "self.weight.sequence_parallel = False",
    ),
    Fault(
        "ranks without frames leave the graph",
        "megatron_vila/models/vision/tower.py",
        " + zero_connected_to(used)",
        "",
        SEVERAL_STEPS,
    ),
    Fault(
        "layers of a block are run again in the wrong order",
        "megatron_vila/models/decoder/decoder.py",
        "enumerate(reversed(self._layers)):",
        "enumerate(self._layers):",
        POLICIES,
    ),
    Fault(
        "weight gradients of all tiles but the last are lost",
        "megatron_vila/models/decoder/weight_gradient.py",
        "        out.addmm_(a, b)\n",
        "        torch.mm(a, b, out=out)\n",
        POLICIES,
    ),
    Fault(
        "the gradient of the residual stream is lost where a norm passes it on",
        "megatron_vila/models/decoder/fused.py",
        "(dx + _wide(dstream)).to(x.dtype)",
        "dx.to(x.dtype)",
    ),
    Fault(
        "gradients of gate and up are exchanged",
        "megatron_vila/models/decoder/fused.py",
        "return dout * up * sigmoid * (1 + gate * (1 - sigmoid)), dout * gate * sigmoid",
        "return dout * gate * sigmoid, dout * up * sigmoid * (1 + gate * (1 - sigmoid))",
        POLICIES,
    ),
    Fault(
        "SwiGLU takes the place of its gradient too early",
        "megatron_vila/models/decoder/fused.py",
        "    gradients, value = _silu_times_gradient(gate, up, dout), _silu_times_of(gate, up)\n",
        "    value = dout.copy_(_silu_times_of(gate, up))\n    gradients = _silu_times_gradient(gate, up, dout)\n",
        POLICIES,
    ),
    Fault(
        "the first layer without the recompute policy is left out",
        "megatron_vila/models/decoder/decoder.py",
        "for layer in decoder.layers[again:]:",
        "for layer in decoder.layers[again + (0 < again) :]:",
        POLICIES,
    ),
    Fault(
        "head keeps its partial gradient under tp",
        "megatron_vila/models/loss.py",
        "dist.reduce_scatter_tensor(grads_CH, partial, group=vocabulary.group)",
        "grads_CH.copy_(partial.chunk(vocabulary.group.size())[vocabulary.group.rank()])",
    ),
    Fault(
        "head normalizes over the local vocabulary",
        "megatron_vila/models/loss.py",
        "_all_reduce(sums_C, dist.ReduceOp.SUM, vocabulary)",
        "pass",
    ),
    Fault(
        "the last few rows of the vocabulary have no part in the gradient of hidden states",
        "megatron_vila/models/loss.py",
        "for part in reversed(list(_fast_parts(len(weight_VH)))):",
        "for part in list(_fast_parts(len(weight_VH)))[:1]:",
        HEAD,
    ),
    Fault(
        "frames encoded ahead are taken for others",
        "megatron_vila/models/vision/tower.py",
        "if ahead is None or ahead[0] is not pixels_F3HW:",
        "if ahead is None:",
        AHEAD,
    ),
    Fault(
        "frames are encoded ahead beside kept activations",
        "megatron_vila/models/vision/tower.py",
        "if learns and not self._tower.config.recompute:",
        "if False:",
        AHEAD,
    ),
]
