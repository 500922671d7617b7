"""What a step holds beside weights, gradients and optimizer state: bytes that are kept from forward to backward pass, and the
most that is in use on top of them. Pure arithmetic that follows the code (``models/decoder/decoder.py``,
``models/decoder/fused.py``, ``models/decoder/mlp.py``, ``models/loss.py``, ``parallel/attention2d.py``); the tests compare what
is kept with autograd.

Legend: T tokens of a CP rank (S/cp); in elements per such token, divided by tp: H hidden size, q and k widths of all query and
of all key heads, F width of the MLP.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from megatron_vila.config.schema import Config, VisionConfig
from megatron_vila.plan.budgets import (
    GIB,
    HEAD_LOGIT_BYTES,
    frames_at_once,
    peer_buffer_bytes,
    vision_activation_elements,
)
from megatron_vila.plan.frames import deal_frames
from megatron_vila.plan.geometry import patches_per_square
from megatron_vila.plan.grid import Layout
from megatron_vila.plan.pictures import most_frames, pictures_of, places
from megatron_vila.plan.sizes import (
    head_dim,
    linear_shapes,
    vision_layers_run,
)


@dataclass(frozen=True)
class Activations:
    """Bytes on the device: ``llm`` and ``vision`` are kept for the backward pass, ``workspace`` is in use on top at the peak."""

    llm: int
    vision: int
    workspace: int


def activations(config: Config, dp: int, element: int, device_bytes: int) -> Activations:
    """Of the fullest rank of a pipeline stage with tower, head and an equal share of the layers."""
    kept, decoder_peak = decoder_bytes(config, dp, element)
    kept_vision, vision_peak = _vision(config, dp, element, device_bytes)
    # The tower runs before and after the decoder, and beside it on the frames of the next micro-batch, whose tokens stay.
    tokens_ahead, frames_ahead = _frames_ahead(config, dp, element, device_bytes)
    peak = max(kept + _head_workspace(config, element) + frames_ahead, decoder_peak + frames_ahead, vision_peak) + tokens_ahead
    always = local_tokens(config) * (2 * head_dim(config.model.llm) * element + 24)  # rotary angles, ids, orders of the exchange
    return Activations(kept, kept_vision, peak - kept + always)


def decoder_bytes(config: Config, dp: int, element: int) -> tuple[int, int]:
    """Bytes that the layers of a stage keep on the device, and the most that they hold in their backward pass."""
    parallel, memory = config.parallel, config.memory
    layers = config.model.llm.num_layers // parallel.pp
    # The first stage of 1F1B holds the activations of up to pp micro-batches.
    in_flight = min(parallel.pp, max(1, config.train.global_batch_size // dp))
    again = 0 if memory.recompute == "none" else min(memory.recompute_layers or layers, layers)
    first, most = _kept_by_policy(config, again, in_flight, element)
    kept = first + in_flight * local_tokens(config) * (layers - again) * whole_layer_bytes(config, element)
    # The last layers go back first; those under the policy may need more, later.
    last, earlier = (_layer_workspace(config, element, policy) for policy in (again == layers, again > 0))
    return kept, max(kept + last, most + earlier)


def _kept_by_policy(config: Config, layers: int, rows: int, element: int) -> tuple[int, int]:
    """Bytes on the device of what the recompute policy keeps of ``layers`` layers of each of ``rows`` micro-batches: after the
    forward passes, and at most in the first backward pass, which brings a block of layers and one layer of that before it back
    from the host (``models/decoder/saved.py``, ``models/decoder/decoder.py``)."""
    block = config.memory.block_layers if config.memory.recompute == "attention_output" else 1
    left = int(config.memory.offload_gib * GIB)
    on_device, on_host = [], []  # by layer, row after row
    for layer in [*range(layers)] * rows:
        here = 0
        pieces = _kept_pieces(config, layer % block == 0, element)
        for piece in pieces:
            if piece <= left:
                left -= piece
            else:
                here += piece
        on_device.append(here)
        on_host.append(sum(pieces) - here)
    held = most = sum(on_device)
    for start in reversed(range(0, layers, block)):
        end = min(start + block, layers)
        back = sum(on_host[start:end]) + (on_host[start - block] if start else 0)
        most = max(most, held + back)
        held -= sum(on_device[start:end])
    return sum(on_device), most


def _kept_pieces(config: Config, begins_block: bool, element: int) -> list[int]:
    """Bytes of each tensor that a recompute policy keeps of a layer: the input of a block, attention's output and log-sum-exp."""
    llm, tokens = config.model.llm, local_tokens(config)
    heads = llm.num_heads // config.parallel.tp
    inputs = [llm.hidden_size // config.parallel.tp * element] * begins_block
    attention = [heads * head_dim(llm) * element, heads * max(element, 4)] * (config.memory.recompute == "attention_output")
    return [tokens * size for size in (*inputs, *attention)]


def local_tokens(config: Config) -> int:
    """Tokens of a CP rank."""
    return -(-config.train.seq_length // Layout.of(config.parallel).cp)


def peer_bytes(config: Config, element: int) -> int:
    """What the buffer of the Ulysses exchange takes on a GPU. The largest brings q, k and v, or the output and its gradient."""
    if config.parallel.ulysses == 1 or config.parallel.ulysses_chunks > 1:
        return 0
    q, k = _widths(config)
    both = 2 * q if config.memory.recompute == "attention_output" else 0
    return peer_buffer_bytes(local_tokens(config) * max(q + 2 * k, both) // config.parallel.tp * element)


def whole_layer_bytes(config: Config, element: int) -> int:
    """Bytes per token of a CP rank that one layer keeps when nothing is recomputed."""
    tp, wide = config.parallel.tp, max(element, 4)
    return layer_elements(config) * element + config.model.llm.num_heads // tp * wide + 2 * wide // tp


def layer_elements(config: Config) -> int:
    """Elements per token of a CP rank that one layer saves when nothing is recomputed: inputs of the norms and of linear layers
    that learn, q, k, v, attention's output (twice where the Ulysses exchange makes a copy), gate and up, inner values of LoRA's
    updates."""
    llm, lora, tp = config.model.llm, config.model.lora, config.parallel.tp
    q, kv = llm.num_heads * head_dim(llm), llm.num_kv_heads * head_dim(llm)
    learning = set(lora.targets if lora.rank else linear_shapes(llm)) if config.optim.llm.trainable else set()
    tiled = 0 < config.memory.mlp_tile < local_tokens(config) // tp
    hidden = 2 + ("qkv" in learning) + (tiled or "fc1" in learning)
    outputs = 2 if config.parallel.ulysses > 1 and "proj" in learning else 1
    # With updates in the MLP autograd runs it, and keeps the product of gate and up too.
    product = bool(lora.rank) and "fc2" in learning
    mlp = 0 if tiled else (2 + product) * llm.ffn_hidden_size
    # Updates of column-parallel layers (qkv, fc1) keep theirs for the tokens of all tp ranks.
    per_update = {"qkv": tp, "proj": 1} | ({} if tiled else {"fc1": tp, "fc2": 1})
    inner = lora.rank * sum(size for name, size in per_update.items() if name in learning)
    return (hidden * llm.hidden_size + (1 + outputs) * q + 2 * kv + mlp + inner) // tp


def _layer_workspace(config: Config, element: int, again: bool) -> int:
    """Bytes in use by the layer whose backward pass runs; ``again``: under a recompute policy. The larger of two moments: when
    gradients of the MLP are formed, and when those of attention are."""
    llm, tp, memory = config.model.llm, config.parallel.tp, config.memory
    tokens = local_tokens(config)
    h, q, k, f = (x / tp for x in (llm.hidden_size, *_widths(config), llm.ffn_hidden_size))
    tiled = 0 < memory.mlp_tile < tokens // tp
    tile = memory.mlp_tile * tp / tokens if tiled else 1
    # What the layer saves for itself: three normed or summed streams, q, k, v.
    saved = 3 * h + q + 2 * k if again else 0
    streams = 3 * h if again else 2 * h  # gradients of output and input; the output, as the root of a pass of its own
    # gate and up, their product in the place of its gradient, their gradients; kept ones count elsewhere; autograd takes one more
    autograd = bool(config.model.lora.rank and {"fc1", "fc2"} & set(config.model.lora.targets))
    inner = ((5 if again or tiled else 3) + autograd) * f + (3 * tp * h if tp > 1 else 0)
    mlp = saved + streams + tile * inner
    parallel = config.parallel
    at_heads = attention_backward_bytes(q, k, parallel.ulysses, parallel.ring, parallel.ulysses_chunks, again, packed=True)
    attention = saved - 2 * h * again + streams + q + at_heads  # q: dout
    rebuilt = (memory.block_layers - 1) * h if again else 0
    # Tiles sum the gradients of the MLP's weights in float32, unless the gradient buffer is float32 itself.
    apart = tiled and element == 2 and not config.optim.grad_reduce_fp32 and config.optim.llm.trainable
    sums = 3 * llm.hidden_size * llm.ffn_hidden_size // tp * 4 * apart
    return int(tokens * (max(mlp, attention) + rebuilt) * element) + sums


def attention_backward_bytes(q: float, k: float, ulysses: int, ring: int, chunks: int, again: bool, packed: bool) -> float:
    """The most that the backward pass of attention holds beside what was saved, for ``q`` and ``k`` bytes of queries and keys;
    ``again``: of a kept output, so that q, k, v and output go to the heads too. Exchanges by NCCL. ``packed``: a row of several
    documents."""
    work, grads = ring_backward_bytes(q, k, ring, packed), q + 2 * k
    if ulysses == 1:
        return work
    inputs = grads if again else 0  # q, k and v
    outputs = 2 * q if again else q  # the output's gradient, and the output
    in_order = inputs + outputs
    if chunks == 1:
        more_arrives = inputs + outputs + 2 * outputs  # as sent and as received
        return max(in_order + work, more_arrives, 4 * grads)  # the last: as formed, sent, received and in order
    # A chunk at work; the next, sent and received, or the gradients of the one before and of all, or both.
    at_work, coming, returning = in_order + work, 2 * in_order, 2 * grads
    return max((at_work + coming) / chunks, (at_work + returning + coming * (chunks > 2)) / chunks + grads)


def ring_backward_bytes(q: float, k: float, ring: int, packed: bool) -> float:
    """The most that the backward pass of a ring holds (``parallel/ring.py``), for ``q`` and ``k`` bytes of queries and keys."""

    def at_work(queries: float, keys: float) -> float:
        """Gradients of a block, and the kernel's float32 sums of them."""
        grads = queries + 2 * keys
        return grads + 2 * grads

    if ring == 1:
        return at_work(q, k)
    # Behind its own block a rank has all queries with half of another's keys, or half of the queries with all of its keys.
    totals = (q + 2 * k) * (1 if ring == 2 else 2)  # float32 from three ranks on
    half, whole = k, 2 * k  # keys and values of another rank, or their gradients
    copies = 1.5 * q * packed  # half of the queries, of the output and of its gradient
    half_keys = totals + at_work(q, k / 2) + half
    half_queries = totals + at_work(q / 2, k) + whole + copies
    if ring > 2:
        # The next keys arrive; gradients of the ones before leave, while the other part of our own comes back.
        half_keys += half + half + whole
        half_queries += whole + whole + half + half * packed  # packed: a copy of what is sent of our own keys
    return max(half_keys, half_queries)


def _widths(config: Config) -> tuple[int, int]:
    llm = config.model.llm
    return llm.num_heads * head_dim(llm), llm.num_kv_heads * head_dim(llm)


def _head_workspace(config: Config, element: int) -> int:
    """The decoder's output, its norm, hidden states of supervised tokens (at most all) and their gradients; what the head works
    in."""
    llm, tp, tokens = config.model.llm, config.parallel.tp, local_tokens(config)
    wide_sums = element != 2 or config.optim.grad_reduce_fp32
    logits = logit_bytes(tokens, llm.hidden_size, llm.vocab_size // tp, element, wide_sums)
    return logits + 4 * tokens * llm.hidden_size // tp * element


def logit_bytes(tokens: int, hidden: int, rows: int, element: int, wide_sums: bool) -> int:
    """Logits and their gradients; without a float32 gradient buffer also the float32 sums of a block of rows."""
    per_logit = element + max(element, 4)
    sums = 0 if wide_sums else math.isqrt(HEAD_LOGIT_BYTES // per_logit) * hidden * 4
    return min(HEAD_LOGIT_BYTES, tokens * rows * per_logit) + sums


def _vision(config: Config, dp: int, element: int, device_bytes: int) -> tuple[int, int]:
    """Kept by the tower for its backward pass, and in use while it works on a micro-batch."""
    in_flight = min(config.parallel.pp, max(1, config.train.global_batch_size // dp))
    return tower_bytes(config, *pictures_of_a_rank(config), in_flight, element, device_bytes)


def pictures_of_a_rank(config: Config) -> tuple[int, int]:
    """Most squares of a row that a rank encodes, and most tokens that a rank makes of them: of the longest video that fits."""
    parallel, pictures = config.parallel, pictures_of(config.model)
    limit = None if config.data.packing else config.data.num_frames
    units = pictures.units(most_frames(pictures, config.train.seq_length, limit=limit), True)
    bounds = deal_frames([unit.cost for unit in units], parallel.ulysses * parallel.ring * parallel.tp)
    shares = [units[first:end] for first, end in itertools.pairwise(bounds.tolist())]
    return max(sum(unit.squares for unit in share) for share in shares), max(places(share, 0) for share in shares)


def _frames_ahead(config: Config, dp: int, element: int, device_bytes: int) -> tuple[int, int]:
    """Tokens of the next micro-batch, and the frames of it that are in work under the layers of this one, where the step has a
    next one and the tower keeps nothing (``models/vision/tower.py``)."""
    vision, learns = config.model.vision, config.optim.vision.trainable
    if config.train.global_batch_size <= dp or (learns and not vision.recompute):
        return 0, 0
    squares, tokens = pictures_of_a_rank(config)
    in_work = _squares_in_work(vision, min(squares, frames_at_once(vision, learns, element, device_bytes)), element)
    return tokens * config.model.llm.hidden_size * element, in_work


def _squares_in_work(vision: VisionConfig, squares: int, element: int) -> int:
    """Where no activations are kept: a layer's input, its norm, q, k and v, attention's output and its projection."""
    return squares * patches_per_square(vision) * 7 * vision.hidden_size * element


def tower_bytes(config: Config, squares: int, tokens: int, in_flight: int, element: int, device_bytes: int) -> tuple[int, int]:
    """Kept from forward to backward pass for ``squares`` of each of ``in_flight`` micro-batches, and in use on top: the
    ``tokens`` that they become, their gradients if something below learns, and the squares that are in work."""
    vision, learns = config.model.vision, config.optim.vision.trainable
    streams = 1 + (learns or config.optim.projector.trainable)
    made = streams * tokens * config.model.llm.hidden_size * element
    at_once = min(squares, frames_at_once(vision, learns, element, device_bytes))
    if not learns:
        return 0, made + _squares_in_work(vision, at_once, element)
    # The gradients of a layer are about as large as what it keeps.
    per_layer = patches_per_square(vision) * vision_activation_elements(vision) * element
    whole, gradients = vision_layers_run(vision) * per_layer, at_once * per_layer
    if vision.recompute:
        return 0, made + gradients + at_once * whole
    return squares * in_flight * whole, made + gradients
