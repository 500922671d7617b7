"""Faults of inference: chunks, the cache, decoding, sampling and what is kept of prompts."""

from .fault import Fault

ANSWERS = (
    "tests/generate/test_engine.py::test_answers_are_those_of_one_process"
    "[uneven-{'ulysses': 2, 'ring': 2}-torch.float32-16]",
)

FAULTS = [
    Fault(
        "every ring rank keeps each decoded token",
        "megatron_vila/generate/runner.py",
        "step.tails.places(step.positions_B % grid.ring == self.topology.place.ring)",
        "step.tails.places(step.positions_B >= 0)",
        ANSWERS,
    ),
    Fault(
        "positions of a later chunk start anew",
        "megatron_vila/plan/chunks.py",
        "positions=row.positions + shift",
        "positions=row.positions",
        ANSWERS,
    ),
    Fault(
        "padding of a chunk is kept in the cache",
        "megatron_vila/parallel/cached_attention.py",
        "part[part - start < length] - start",
        "part - start",
        ANSWERS,
    ),
    Fault(
        "what ring ranks found for a decoded token is merged without log-sum-exp",
        "megatron_vila/parallel/cached_attention.py",
        "weights_RBh = (lses - torch.logsumexp(lses, 0)).exp().transpose(1, 2)",
        "weights_RBh = torch.full_like(lses, 1 / ring.size).transpose(1, 2)",
        ANSWERS,
    ),
    Fault(
        "a decoded token reads fp8 keys without their scales",
        "megatron_vila/parallel/kernels/decode.py",
        "k_uKD = k_uKD * part.k_scale_UK[first:last].unsqueeze(-1)",
        "pass",
        ("tests/parallel/test_decode_kernel.py", "-k", "float8"),
    ),
    Fault(
        "each rank goes on with the token that it chose itself",
        "megatron_vila/generate/engine.py",
        "dist.broadcast(token_ids_B, group=self.topology.tp_cp, group_src=0)",
        "pass",
        ("tests/generate/test_engine.py", "-k", "first_rank"),
    ),
    Fault(
        "prompts with other frames have the same key",
        "megatron_vila/generate/frames.py",
        'digest.update(f"{start}:{frame.tokens}:{hashes.unit(frame)};".encode())',
        'digest.update(f"{start}:{frame.tokens};".encode())',
        ("tests/generate/test_frames.py",),
    ),
    Fault(
        "checksums of a snapshot are not compared",
        "megatron_vila/generate/raw_tensors.py",
        "if xxhash.xxh3_64_hexdigest(block) != sums[begin // BLOCK]:",
        "if not sums:",
        ("tests/generate/test_raw_tensors.py",),
    ),
    Fault(
        "tokens are drawn without the one that reaches top_p",
        "megatron_vila/generate/sampling.py",
        "is_out_BV = probabilities_BV.cumsum(-1) - probabilities_BV >= sampling.top_p",
        "is_out_BV = probabilities_BV.cumsum(-1) >= sampling.top_p",
        ("tests/generate/test_sampling.py",),
    ),
]
