"""The memory that a part of the model takes when it runs alone, as its benchmark runs it; the measured memory is beside it."""

from __future__ import annotations

from megatron_vila.config.schema import Config
from megatron_vila.plan.activations import (
    attention_backward_bytes,
    decoder_bytes,
    local_tokens,
    logit_bytes,
    ring_backward_bytes,
    tower_bytes,
)
from megatron_vila.plan.pictures import pictures_of, places
from megatron_vila.plan.sizes import llm_layer_parameters, parameter_count


def decoder_alone(config: Config, element: int) -> int:
    """Bytes of a rank that runs the decoder layers alone, forward and backward (``benchmarks/layer.py``): weights and their
    gradient buffers; the input and the gradient of the output; kept and in use."""
    llm, tp = config.model.llm, config.parallel.tp
    per_weight = element + (4 if config.optim.grad_reduce_fp32 else element)
    weights = llm_layer_parameters(llm) // tp * llm.num_layers * per_weight
    streams = 2 * local_tokens(config) * llm.hidden_size // tp * element
    return weights + streams + decoder_bytes(config, 1, element)[1]


def tower_alone(config: Config, frames: int, element: int, device_bytes: int) -> int:
    """Bytes of a rank that runs tower and projector alone on ``frames`` (``benchmarks/vision.py``): weights, their gradients
    where they learn, pixels of a byte for each color, tokens, kept and in use."""
    counts, optim = parameter_count(config.model), config.optim
    learning = counts["vision"] * optim.vision.trainable + counts["projector"] * optim.projector.trainable
    weights = counts["vision"] + counts["projector"] + learning
    pixels = frames * 3 * config.model.vision.image_size**2
    tokens = places(pictures_of(config.model).units(frames, True), 0)
    return weights * element + pixels + sum(tower_bytes(config, frames, tokens, 1, element, device_bytes))


def head_alone(tokens: int, hidden: int, rows: int, element: int, gradient: int) -> int:
    """Bytes of a rank that runs the fused head alone (``benchmarks/head.py``): hidden states, ``rows`` of the vocabulary, their
    gradients (the weight's of ``gradient`` bytes a number), and what it works in."""
    operands = 2 * tokens * hidden * element + rows * hidden * (element + gradient)
    return operands + logit_bytes(tokens, hidden, rows, element, gradient >= 4)


def reshard_alone(made: int, owned: int, gathered: int) -> int:
    """Bytes of a rank that moves visual tokens alone, forward and backward (``benchmarks/reshard.py``): it makes ``made`` bytes
    of them and gets ``owned``, or first all of ``gathered``, padded (else 0)."""
    # Gradients: of all; or as they come back, and once more in order.
    return made + 2 * owned + (gathered or 2 * made)


def attention_alone(
    part: str, q: int, k: int, lse: int, *, ulysses: int, ring: int, chunks: int, peers: bool, packed: bool
) -> int:
    """Bytes of a rank that runs 2D attention alone with fa4, in a ring of at most 2, while ``part`` of it is measured
    (``benchmarks/attention.py``).

    ``q``, ``k`` and ``lse``: bytes of a rank's queries, keys and log-sum-exp. ``peers``: exchanges go by ``parallel/peers.py``,
    whose buffer is not counted.
    """
    given = q + 2 * k
    # Of two: all queries with half of the keys, or half of the queries, copied in packed rows, with all keys.
    ring_forward = q if ring == 1 else max(2 * q + k + 4 * lse, (2 if packed else 1.5) * q + 2 * k)
    backward = attention_backward_bytes(q, k, ulysses, ring, chunks, again=False, packed=packed)
    if ulysses == 1:
        saved, forward = q + lse, ring_forward + lse
    else:
        saved = q + given + q + lse  # the output in both layouts; q, k and v at the heads
        if chunks > 1:
            # Behind the last chunk: it arrives, or is worked on, or the one before is, while the output of another leaves.
            last = q + ((chunks - 1) * (given + q) + 2 * q) / chunks
            before = last - (given + q) / chunks
            forward = max(last + 2 * given / chunks, last + (given + ring_forward) / chunks)
            forward = max(forward, before + (3 * given + ring_forward) / chunks) + lse
        elif peers:
            forward, backward = q + given + ring_forward + lse, max(ring_backward_bytes(q, k, ring, packed), 2 * given)
        else:
            # What is sent, what has arrived, what is in order; the latter with what was put together.
            forward = max(q + 3 * given, q + given + ring_forward + lse, q + given + 3 * q + lse)
    # The results of one forward pass are there from the start; fa4 works in two more of the size of the log-sum-exp.
    at_work = {"forward": forward, "backward": backward + 2 * lse, "both": max(forward, saved + backward + 2 * lse)}
    return int(q + given + saved + at_work[part])


def plain_ring_alone(part: str, q: int, k: int, lse: int) -> int:
    """``attention_alone`` for the plain ring of two with flash2 (``benchmarks/plain_ring.py``): outputs and gradients are summed
    in float32, and flash2 has a gradient of keys and values for each query head."""
    given, saved = q + 2 * k, q + lse
    forward, backward = 9 * q + 2 * k + 4 * lse, 8 * q + 10 * k + lse
    at_work = {"forward": forward, "backward": backward, "both": max(forward, saved + backward)}
    return q + given + saved + at_work[part]
