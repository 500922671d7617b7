"""Model FLOPs against sums worked out by hand and against published figures brought to the same convention."""

from dataclasses import replace

import pytest

from megatron_vila.config.schema import (
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ProjectorConfig,
    VisionConfig,
)
from megatron_vila.plan.flops import Flops, mfu, model_flops
from megatron_vila.plan.hardware import PRESETS
from megatron_vila.plan.pictures import Unit, pictures_of

LLAMA_3_8B = ModelConfig(llm=LanguageConfig(vocab_size=128256))
LLAMA_2_7B = ModelConfig(llm=LanguageConfig(num_kv_heads=32, ffn_hidden_size=11008, vocab_size=32000))
SMALL = ModelConfig(
    vision=VisionConfig(hidden_size=4, num_layers=3, num_heads=2, ffn_hidden_size=8, image_size=8, patch_size=2),
    projector=ProjectorConfig(type="mlp_downsample"),
    llm=LanguageConfig(num_layers=2, hidden_size=8, num_heads=4, num_kv_heads=2, ffn_hidden_size=16, vocab_size=32),
)
# 2 decoder layers: q and o 8*8, k and v 8*4, three MLP matrices 8*16; output layer 8*32
LAYER = 64 + 64 + 32 + 32 + 3 * 128
HEAD = 256
# one frame: 16 patches, 2 of the 3 layers run; 4 tokens; projector 16 -> 8 -> 8
TOWER_LAYER = 2 * 16 * (4 * 16 + 2 * 32) + 4 * 16**2 * 4
PATCH_EMBEDDING = 2 * 16 * 12 * 4
PROJECTOR_FIRST, PROJECTOR_SECOND = 2 * 4 * 16 * 8, 2 * 4 * 8 * 8


def parts(vision: bool, projector: bool, llm: bool) -> OptimConfig:
    optim = OptimConfig()
    optim.vision.trainable, optim.projector.trainable, optim.llm.trainable = vision, projector, llm
    return optim


def flops_of(lengths, supervised_tokens, frames, model, optim):
    return model_flops(lengths, supervised_tokens, pictures_of(model).units(frames, True), model, optim)


def test_a_small_model_with_every_part_trained_counts_three_times_its_forward_products():
    flops = flops_of([10, 6], supervised_tokens=5, frames=3, model=SMALL, optim=parts(True, True, True))
    assert flops.llm == 6 * (16 * 2 * LAYER + 5 * HEAD)
    assert flops.attention == 6 * 2 * 4 * 2 * (10**2 + 6**2)
    projector = 3 * (PROJECTOR_FIRST + PROJECTOR_SECOND)
    assert flops.vision == 3 * (3 * 2 * TOWER_LAYER + 2 * PATCH_EMBEDDING + projector)
    assert flops.total == flops.llm + flops.attention + flops.vision


def test_the_tower_counts_by_squares_and_the_projector_by_tokens():
    one, optim = flops_of([], 0, 1, SMALL, parts(False, False, False)).vision, parts(False, False, False)
    projector = PROJECTOR_FIRST + PROJECTOR_SECOND
    tiles, pooled = Unit(frames=1, tiles=5, tokens=20, cost=80), Unit(frames=8, tiles=1, tokens=4, cost=128)
    assert model_flops([], 0, [tiles], SMALL, optim).vision == 5 * one
    assert model_flops([], 0, [pooled, tiles], SMALL, optim).vision == 13 * (one - projector) + 6 * projector


def test_a_frozen_tower_counts_its_forward_pass_only():
    flops = flops_of([8], 8, 1, SMALL, parts(False, True, True))
    assert flops.vision == 2 * TOWER_LAYER + PATCH_EMBEDDING + 2 * PROJECTOR_FIRST + 3 * PROJECTOR_SECOND


def test_a_frozen_llm_that_passes_a_gradient_on_counts_four_per_weight():
    frozen = flops_of([8], 8, 1, SMALL, parts(False, True, False))
    trained = flops_of([8], 8, 1, SMALL, parts(False, True, True))
    assert frozen.llm == pytest.approx(trained.llm * 4 / 6)
    assert frozen.attention == trained.attention


def test_a_frozen_llm_without_pictures_is_a_forward_pass():
    flops = flops_of([8], 8, 0, SMALL, parts(True, True, False))
    assert flops.llm == 2 * (8 * 2 * LAYER + 8 * HEAD)
    assert flops.attention == 2 * 2 * 4 * 2 * 8**2


def test_a_frozen_tower_and_projector_below_a_trained_llm_are_a_forward_pass():
    flops = flops_of([8], 8, 1, SMALL, parts(False, False, True))
    assert flops.vision == 2 * TOWER_LAYER + PATCH_EMBEDDING + PROJECTOR_FIRST + PROJECTOR_SECOND


# rank 2 on all four linear layers of 8 + 8 outputs and inputs or more
UPDATES = 2 * ((16 + 8) + (8 + 8) + (32 + 8) + (8 + 16))


def with_lora(*targets: str, also_train: tuple[str, ...] = (), tied: bool = False) -> ModelConfig:
    lora = LoraConfig(rank=2, targets=list(targets), also_train=list(also_train))
    return replace(SMALL, lora=lora, llm=replace(SMALL.llm, tie_embeddings=tied))


def test_with_lora_frozen_weights_count_four_and_updates_six():
    """A projector that learns below the decoder asks for every input gradient."""
    flops = flops_of([8], 5, 1, with_lora("qkv", "proj", "fc1", "fc2"), parts(False, True, True))
    assert flops.llm == 8 * 2 * (4 * LAYER + 6 * UPDATES) + 5 * 4 * HEAD
    assert flops.attention == 6 * 2 * 4 * 2 * 8**2


def test_embeddings_that_learn_beside_the_updates_count_in_a_tied_output_layer_only():
    for tied, per_weight in ((False, 4), (True, 6)):
        model = with_lora("qkv", "proj", "fc1", "fc2", also_train=("embeddings",), tied=tied)
        flops = flops_of([8], 5, 0, model, parts(False, False, True))
        assert flops.llm == 8 * 2 * (4 * LAYER + 6 * UPDATES) + 5 * per_weight * HEAD


def test_no_gradient_passes_through_what_runs_before_the_first_update():
    """Frozen below: the inputs of the first layer's qkv need no gradient, nor does all before fc1 where that is the first."""
    optim = parts(False, False, True)
    from_qkv = flops_of([8], 5, 0, with_lora("qkv"), optim)
    qkv = 16 * 8
    assert from_qkv.llm == 8 * (2 * (4 * LAYER + 6 * 2 * (16 + 8)) - 2 * qkv - 2 * 2 * 8) + 5 * 4 * HEAD
    assert from_qkv.attention == 6 * 2 * 4 * 2 * 8**2
    from_fc1 = flops_of([8], 5, 0, with_lora("fc2", "fc1"), optim)
    before = 16 * 8 + 8 * 8 + 32 * 8
    updates = 2 * ((32 + 8) + (8 + 16))
    assert from_fc1.llm == 8 * (2 * (4 * LAYER + 6 * updates) - 2 * before - 2 * 2 * 8) + 5 * 4 * HEAD
    assert from_fc1.attention == (6 + 2) * 4 * 2 * 8**2


def test_documents_of_a_packed_row_add_up_as_if_they_were_alone():
    optim = parts(True, True, True)
    packed = flops_of([100, 7, 33], 20, 4, SMALL, optim)
    alone = [flops_of([100], 15, 1, SMALL, optim), flops_of([7], 0, 0, SMALL, optim)]
    assert sum(alone, Flops()) + flops_of([33], 5, 3, SMALL, optim) == packed


@pytest.mark.parametrize(
    ("length", "gigaflops_per_token"), [(131072, 148), (262144, 251), (524288, 457), (1048576, 870)]
)
def test_llama_3_8b_costs_per_token_what_the_published_comparison_says(length, gigaflops_per_token):
    flops = flops_of([length], length, 0, LLAMA_3_8B, parts(True, True, True))
    assert flops.llm / 6 / length == pytest.approx(7.50e9, rel=1e-3)
    assert flops.total / length / 1e9 == pytest.approx(gigaflops_per_token, rel=0.005)


@pytest.mark.parametrize(
    ("model", "length", "tokens_per_s_per_gpu", "percent"),
    [(LLAMA_2_7B, 131072, 2258, 32.6), (LLAMA_2_7B, 1048576, 317, 27.7), (LLAMA_3_8B, 131072, 2280, 34.1)],
)
def test_published_throughputs_on_h100_give_the_known_causal_mfu(model, length, tokens_per_s_per_gpu, percent):
    flops = flops_of([length], length, 0, model, parts(True, True, True)).total
    gpus = 8
    seconds = length / (tokens_per_s_per_gpu * gpus)
    assert 100 * mfu(flops, seconds, gpus, PRESETS["h100"].peak_flops) == pytest.approx(percent, abs=0.1)


def test_the_siglip_tower_costs_its_known_forward_flops_per_frame():
    # SigLIP so400m at 384 px, 26 of 27 layers: 729 patches, about 0.40 G weights and 12 % attention on top
    flops = flops_of([196], 0, 1, LLAMA_3_8B, parts(False, False, False)).vision
    weights = 26 * (4 * 1152**2 + 2 * 1152 * 4304) + 588 * 1152
    projector = 196 * (4608 * 4096 + 4096**2)
    assert flops == 2 * 729 * weights + 26 * 4 * 729**2 * 1152 + 2 * projector


@pytest.mark.parametrize(
    ("kind", "products"),
    [
        ("linear", 16 * 4 * 8),
        ("mlp2x_gelu", 16 * (4 * 8 + 8 * 8)),
        ("mlp_downsample_2x2_fix", 4 * (16 * 8 + 8 * 8)),
        ("mlp_downsample_3x3_fix", 4 * (36 * 12 + 12 * 8 + 8 * 8)),
    ],
)
def test_each_projector_counts_its_own_products(kind, products):
    model = ModelConfig(vision=SMALL.vision, projector=ProjectorConfig(type=kind), llm=SMALL.llm)
    flops = flops_of([4], 0, 1, model, parts(False, False, False)).vision
    assert flops == 2 * TOWER_LAYER + PATCH_EMBEDDING + 2 * products


def test_there_is_no_mfu_where_the_peak_is_not_known():
    assert mfu(1e12, 1.0, 1, None) is None
