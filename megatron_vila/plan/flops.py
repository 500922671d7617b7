"""Model FLOPs, and MFU: the one definition that every log line, table and plan of this project uses.

    MFU = model FLOPs of the step / (step time * number of GPUs * peak of one GPU)

Model FLOPs are the matrix products that the mathematics of the step asks for, and nothing that an implementation adds: no
recompute, no padding, no masked half of causal attention, no logits at places without a label. With every part trained
and every token supervised this is the usual formula, per token of a document of S tokens::

    6 * N_matmul + 6 * L * h * d * S        (L layers, h query heads of size d; causal attention counted as half)

where N_matmul are the weights of the decoder layers and of the output layer (not the embedding table, which is looked up).
What the formula leaves open is decided as follows, always on the side that cannot flatter:

* a product costs 2 FLOPs per weight and token forward, 2 for the gradient of its input and 2 for that of its weight; the
  last two count only where they are needed. A frozen tower counts 2 (forward only); a frozen LLM below which something
  trains counts 4 (the gradient passes through, no weight gradient). With LoRA the frozen weights count 4, the updates and what
  learns beside them 6; where nothing learns below the first update, no gradient passes through what runs before it;
* attention needs twice its forward products in the backward pass, whenever a gradient passes through; S**2 is summed over
  documents, since documents of a packed row do not see each other;
* the output layer counts at supervised positions only: no other logits are needed, and a video row has few labels. Where all
  tokens are supervised, as in published text benchmarks, this is N_matmul per token;
* document lengths are real tokens, without the padding of the layout.

Source of the convention: PaLM (arXiv 2204.02311, appendix B) with causal attention halved, as Megatron-LM counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_vila.config.schema import ModelConfig, OptimConfig, ProjectorConfig
from megatron_vila.plan.geometry import POOL_SIDE, patches_per_square
from megatron_vila.plan.pictures import Unit
from megatron_vila.plan.sizes import head_dim, linear_shapes, lora_layer_parameters, vision_layers_run


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of forward and backward by part; add them up over rows, ranks or steps with ``+``."""

    llm: float = 0.0
    """weights of the decoder layers and of the output layer"""
    attention: float = 0.0
    """causal attention of the decoder"""
    vision: float = 0.0
    """vision tower and projector"""

    @property
    def total(self) -> float:
        return self.llm + self.attention + self.vision

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.llm + other.llm, self.attention + other.attention, self.vision + other.vision)


def model_flops(
    document_lengths: Sequence[int],
    supervised_tokens: int,
    units: Sequence[Unit],
    model: ModelConfig,
    optim: OptimConfig,
) -> Flops:
    """Model FLOPs of one training step over some documents, on all ranks together.

    ``document_lengths`` are the LLM tokens of each document without padding, visual tokens included;
    ``supervised_tokens`` the labels of all of them; ``units`` their pictures. ``optim`` says which parts train.
    """
    price = flop_prices(model, optim, pictures=len(units) > 0)
    return Flops(
        llm=sum(document_lengths) * price.token + supervised_tokens * price.label,
        attention=sum(length**2 for length in document_lengths) * price.pair,
        vision=sum(unit.squares for unit in units) * price.square + sum(unit.tokens for unit in units) * price.visual_token,
    )


class FlopPrices(NamedTuple):
    """Model FLOPs of forward and backward for one of each."""

    token: int
    """LLM token, in the weights of the decoder layers"""
    label: int
    """supervised token, in the output layer"""
    pair: int
    """square of a document's tokens, in attention"""
    square: int
    """picture as the tower takes it"""
    visual_token: int
    """token that the projector makes"""


def flop_prices(model: ModelConfig, optim: OptimConfig, pictures: bool) -> FlopPrices:
    """What ``model_flops`` multiplies with: ``pictures`` says whether a gradient flows through the decoder to what makes them."""
    train_vision, train_projector, train_llm = (p.trainable for p in (optim.vision, optim.projector, optim.llm))
    below = pictures and (train_vision or train_projector)
    gradient_in_llm = train_llm or below
    llm, lora = model.llm, model.lora
    frozen = train_llm and lora.rank > 0
    table_learns = train_llm and (not frozen or (llm.tie_embeddings and "embeddings" in lora.also_train))
    layer = sum(outputs * inputs for outputs, inputs in linear_shapes(llm).values())
    products = llm.num_layers * layer * _passes(gradient_in_llm, train_llm and not frozen)
    products += llm.num_layers * lora_layer_parameters(model) * _passes(gradient_in_llm, train_llm)
    attention = llm.num_layers * (3 if gradient_in_llm else 1)
    if frozen and not below and not lora.also_train:
        products -= _products_without_gradient(model)
        attention -= 0 if "qkv" in lora.targets else 2
    return FlopPrices(
        token=2 * products,
        label=2 * llm.vocab_size * llm.hidden_size * _passes(gradient_in_llm, table_learns),
        pair=2 * attention * llm.num_heads * head_dim(llm),
        square=_tower_flops(model, train_vision),
        visual_token=_projector_flops(model, train_vision, train_projector),
    )


def mfu(flops: float, seconds: float, gpus: int, peak: float | None) -> float | None:
    """Model FLOPs utilization, 0 to 1, of ``gpus`` devices of ``peak`` FLOP/s each; None where the peak is not known."""
    return None if peak is None or seconds <= 0 else flops / (seconds * gpus * peak)


def _passes(input_gradient: bool, weight_gradient: bool) -> int:
    return 1 + input_gradient + weight_gradient


def _products_without_gradient(model: ModelConfig) -> int:
    """Weights in the first decoder layer whose inputs need no gradient: up to the first one with an update, and its A."""
    weights = 0
    for name, (outputs, inputs) in linear_shapes(model.llm).items():
        weights += outputs * inputs
        if name in model.lora.targets:
            return weights + model.lora.rank * inputs
    return weights


def _tower_flops(model: ModelConfig, trainable: bool) -> int:
    """FLOPs of the tower for one square: patch embedding and the layers below ``select_layer``; attention is not causal."""
    vision = model.vision
    patches = patches_per_square(vision)
    layer_weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size
    layer = 2 * patches * layer_weights + 4 * patches**2 * vision.hidden_size
    embedding = 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size
    return (
        _passes(trainable, trainable) * vision_layers_run(vision) * layer
        + _passes(input_gradient=False, weight_gradient=trainable) * embedding
    )


def _projector_flops(model: ModelConfig, train_vision: bool, train_projector: bool) -> int:
    """FLOPs of the projector for one token; its first product needs an input gradient only for a trained tower."""
    first, *others = _projector_products(model.projector, model.vision.hidden_size, model.llm.hidden_size)
    inner = train_vision or train_projector
    return 2 * (_passes(train_vision, train_projector) * first + _passes(inner, train_projector) * sum(others))


def _projector_products(projector: ProjectorConfig, vision_hidden: int, llm_hidden: int) -> list[int]:
    """Weights of the projector's matrix products in order."""
    cell = POOL_SIDE[projector.type] ** 2 * vision_hidden
    if projector.type == "linear":
        return [cell * llm_hidden]
    if projector.type == "mlp_downsample_3x3_fix":
        return [cell * 3 * vision_hidden, 3 * vision_hidden * llm_hidden, llm_hidden**2]
    return [cell * llm_hidden, llm_hidden**2]
