"""Validation: what is refused, what is warned about, and the cure that the message proposes."""

from dataclasses import replace

import pytest

from megatron_vila.config.keys import config_keys
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import LanguageConfig
from megatron_vila.errors import ConfigError
from megatron_vila.plan.grid import Layout
from megatron_vila.plan.hardware import machine_of
from megatron_vila.plan.heads import HeadSplit
from megatron_vila.plan.layouts import chunk_problems, layout_problems, nearest_layouts
from megatron_vila.plan.sizes import linear_shapes
from megatron_vila.plan.validate import (
    ABOVE_ZERO,
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    CHOICES,
    LORA_NAMES,
    validate,
)


def refused(world_size: int, *overrides: str, preset: str = "tiny") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(load_config(preset, list(overrides)), world_size)
    return [line.removeprefix("- ") for line in str(caught.value).splitlines()[1:]]


def warned(world_size: int, *overrides: str, preset: str = "tiny") -> list[str]:
    return validate(load_config(preset, list(overrides)), world_size)


def test_a_good_configuration_has_neither_problems_nor_warnings():
    assert warned(2, "parallel.ulysses=2") == []


# ------------------------------------------------------------------------------------------------------- world and layout


def test_a_world_that_the_layout_does_not_divide_names_worlds_and_layouts_that_work():
    (message,) = refused(6, "parallel.ulysses=2", "parallel.ring=2")
    assert message.startswith(
        "world size 6 is not a multiple of tp*pp*ulysses*ring = 1*1*2*2 = 4; start 4 or 8 processes"
    )
    assert "for 6 use tp=1 pp=1 ulysses=2 ring=3" in message


def test_proposed_layouts_work():
    llm = load_config("models/qwen2-7b", []).model.llm
    for world in (6, 56, 100, 224):
        proposals = nearest_layouts(llm, Layout(4, 1, 8, 8), world)
        assert proposals
        assert all(layout_problems(llm, p) == [] and world % p.size == 0 for p in proposals)


def test_ulysses_that_does_not_divide_the_heads_names_the_sizes_that_do_and_a_layout_of_the_same_cp():
    (message,) = refused(8, "parallel.ulysses=8", "train.seq_length=32768", preset="models/qwen2-7b")
    assert (
        message == "parallel.ulysses=8 does not divide 28 query heads; use ulysses=4 or 7 (cp=8 as ulysses=4, ring=2)"
    )


def test_ulysses_divides_the_heads_that_tensor_parallelism_leaves():
    (message,) = refused(8, "parallel.tp=4", "parallel.ulysses=2", "train.seq_length=32768", preset="models/qwen2-7b")
    assert "does not divide 7 query heads of a tensor-parallel rank (28 / tp=4)" in message
    assert "(cp=2 as ulysses=1, ring=2)" in message


@pytest.mark.parametrize("ulysses", range(1, 33))
def test_ulysses_is_refused_exactly_when_the_exchange_refuses_it(ulysses):
    llm = LanguageConfig(num_heads=28, num_kv_heads=4, hidden_size=3584)
    try:
        HeadSplit(28, 4, ulysses)
        works = True
    except AssertionError:
        works = False
    assert (layout_problems(llm, Layout(1, 1, ulysses, 1)) == []) == works


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "works"),
    [
        (8, 2, 2, True),
        (8, 2, 4, True),  # fewer K/V heads than tp: replicated
        (8, 2, 8, True),
        (12, 4, 6, False),  # 4 K/V heads on 6 ranks
        (12, 6, 4, False),
        (8, 1, 8, True),
        (8, 2, 3, False),
    ],
)
def test_tensor_parallelism_is_refused_exactly_when_megatron_core_refuses_it(heads, kv_heads, tp, works):
    from megatron.core.transformer import TransformerConfig

    llm = LanguageConfig(num_heads=heads, num_kv_heads=kv_heads, hidden_size=heads * 16, ffn_hidden_size=96)
    accepted = True
    try:
        TransformerConfig(
            num_layers=1,
            hidden_size=heads * 16,
            num_attention_heads=heads,
            num_query_groups=kv_heads,
            tensor_model_parallel_size=tp,
        )
    except ValueError:
        accepted = False
    assert accepted == works
    assert (layout_problems(llm, Layout(tp, 1, 1, 1)) == []) == works


def test_tensor_parallelism_must_divide_the_feed_forward_layer():
    (message,) = refused(4, "parallel.tp=4", "model.llm.ffn_hidden_size=258")
    assert "parallel.tp=4 does not divide model.llm.ffn_hidden_size=258; use parallel.tp=2" in message


def test_the_joint_projection_must_be_shared_out_when_key_value_heads_are_replicated():
    llm = LanguageConfig(num_heads=8, num_kv_heads=1, head_dim=2, hidden_size=16, ffn_hidden_size=64)
    (message,) = layout_problems(llm, Layout(8, 1, 1, 1))
    assert "parallel.tp=8 does not divide the 20 rows of the joint query/key/value projection" in message


def test_pipeline_stages_must_divide_the_layers():
    (message,) = refused(3, "parallel.pp=3", "train.global_batch_size=3")
    assert message == "parallel.pp=3 does not divide model.llm.num_layers=4; use parallel.pp=2 or 4"


def test_the_batch_must_be_a_multiple_of_the_data_parallel_size():
    (message,) = refused(6, "parallel.ring=2")
    assert message.startswith("train.global_batch_size=4 is not a multiple of the data-parallel size 3")
    assert message.endswith("use 3 or 6")


def test_chunks_of_the_exchange_deal_out_whole_key_value_heads():
    """Llama-3-8B has 8 key/value heads."""
    llm = load_config("models/llama3-8b", []).model.llm
    for tp, ulysses, chunks in ((1, 2, 1), (1, 2, 4), (1, 4, 2), (2, 2, 2), (1, 1, 1), (1, 16, 1)):
        assert chunk_problems(llm, Layout(tp, 1, ulysses, 1), chunks) == []
    (three,) = chunk_problems(llm, Layout(1, 1, 2, 1), 3)
    assert three.startswith("parallel.ulysses_chunks=3 with ulysses=2 does not") and three.endswith("=1 or 2 or 4")
    (no_exchange,) = chunk_problems(llm, Layout(1, 1, 1, 4), 2)
    assert no_exchange.endswith("use ulysses_chunks=1")


def test_all_problems_are_listed_at_once():
    messages = refused(
        6,
        "parallel.pp=3",
        "parallel.ulysses=8",
        "model.vision.num_heads=7",
        "optim.warmup_fraction=1",
        "data.frame_separator_ids=[512]",
    )
    assert len(messages) == 6


# ---------------------------------------------------------------------------------------------------------- single values


@pytest.mark.parametrize("name", CHOICES)
def test_a_value_outside_the_known_ones_lists_them(name):
    (message,) = refused(1, f"{name}=nonsense")
    known = [str(choice).lower() if isinstance(choice, bool) else choice for choice in CHOICES[name]]
    assert message == f"{name}=nonsense is not known; choose one of {', '.join(known)}"


def test_a_token_order_that_the_projector_never_had_is_refused():
    (message,) = refused(1, "model.projector.type=linear", "model.projector.token_order=legacy_column_major")
    assert "token_order=legacy_column_major belongs to model.projector.type=mlp_downsample, not to linear" in message


def test_choices_are_those_of_the_code():
    defaults = {key.name: key.default for key in config_keys()}
    assert all(defaults[name] in choices for name, choices in CHOICES.items())


@pytest.mark.parametrize(
    ("name", "too_small", "bound"),
    [
        *((f"{s}.{leaf}", 0, "at least 1") for s, leaves in AT_LEAST_ONE.items() for leaf in leaves),
        *((f"{s}.{leaf}", -1, "at least 0") for s, leaves in AT_LEAST_ZERO.items() for leaf in leaves),
        *((f"{s}.{leaf}", 0, "above 0") for s, leaves in ABOVE_ZERO.items() for leaf in leaves),
    ],
)
def test_a_value_below_its_bound_is_refused(name, too_small, bound):
    (message,) = refused(1, f"{name}={too_small}")
    assert message.startswith(f"{name}={too_small}")
    assert f"must be {bound}" in message


def test_every_number_of_the_schema_has_a_bound_or_a_rule_of_its_own():
    bounded = {
        f"{s}.{leaf}" for table in (AT_LEAST_ONE, AT_LEAST_ZERO, ABOVE_ZERO) for s, ls in table.items() for leaf in ls
    }
    own_rule = {"model.vision.select_layer", "model.llm.head_dim"}
    own_rule |= {"optim.beta1", "optim.beta2", "optim.offload_fraction", "data.max_broken", "data.cache_gib"}
    own_rule |= {f"optim.{part}.lr" for part in ("vision", "projector", "llm")}
    numbers = {k.name for k in config_keys() if k.type in (int, float, int | None, float | None)}
    assert numbers == bounded | own_rule


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optim.beta2=1", "optim.beta2=1.0 must be at least 0 and below 1"),
        ("train.steps=1 optim.warmup_fraction=0.6", "optim.warmup_fraction=0.6 leaves no step after the warm-up of"),
        ("optim.llm.lr=0", "to freeze the part set optim.llm.trainable=false"),
        ("optim.weight_decay=100 optim.lr=0.01", "optim.weight_decay=100.0 with optim.lr=0.01 takes away each whole weight"),
        ("checkpoint.save_every=5 checkpoint.save=false", "checkpoint.save_every=5, but checkpoint.save=false"),
        ("profile.ranks=[-1]", "profile.ranks=[-1]: [-1] do not exist in this run; use 0 to 0"),
        ("model.llm.head_dim=0", "model.llm.head_dim=0 must be at least 1"),
        ("model.llm.head_dim=15", "is odd"),
        (
            "model.llm.hidden_size=130",
            "model.llm.num_heads=4 does not divide model.llm.hidden_size=130; use 2 or 5 heads",
        ),
        ("model.llm.num_kv_heads=3", "use 2 or 4 key/value heads"),
        ("model.vision.num_heads=5", "use 4 or 8 heads"),
        ("model.vision.patch_size=57", "a picture has no patch; use a patch of at most 56"),
        ("model.vision.select_layer=4", "use -4 to 3"),
        ("model.vision.select_layer=-5", "use -4 to 3"),
        ("data.image_separator_ids=[-1]", "data.image_separator_ids has the ids [-1]"),
        ("data.frame_separator_ids=[512]", "use 0 to model.llm.vocab_size-1 = 511"),
        ("optim.warmup_steps=100", "leaves no step after the warm-up of train.steps=100; use at most 99"),
        ("optim.min_lr=0.01", "optim.min_lr=0.01 is above optim.lr=0.001"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_its_cure(override, part):
    (message,) = refused(1, *override.split())
    assert part in message


@pytest.mark.parametrize(
    "override", ["model.vision.select_layer=3", "model.vision.select_layer=-4", "model.vision.patch_size=15"]
)
def test_values_at_the_edge_are_accepted(override):
    assert warned(1, override) == []


def test_a_pixel_remainder_is_no_problem():
    """384 / 14 leaves 6 pixels: the published model."""
    assert warned(1, "train.seq_length=4096", preset="models/qwen2-7b") == []


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["targets=[]"], "model.lora.targets is empty: no layer gets an update; name some of qkv, proj, fc1, fc2"),
        (["targets=[qkv,attn]"], "model.lora.targets=[qkv,attn] may name qkv, proj, fc1, fc2, each at most once"),
        (["targets=[fc1,fc1]"], "each at most once"),
        (["also_train=[head]"], "model.lora.also_train=[head] may name embeddings, norms"),
        (["rank=0", "also_train=[norms]"], "model.lora.rank=0: optim.llm.trainable decides"),
    ],
)
def test_updates_that_cannot_be_meant_are_refused_with_their_cure(overrides, part):
    (message,) = refused(1, "model.lora.rank=8", *(f"model.lora.{override}" for override in overrides))
    assert part in message


def test_updates_that_never_learn_are_refused():
    (message,) = refused(1, "model.lora.rank=8", "optim.llm.trainable=false")
    assert message.startswith("model.lora.rank=8 adds updates that optim.llm.trainable=false freezes")


def test_the_known_layers_with_updates_are_those_of_the_model():
    assert LORA_NAMES["targets"] == tuple(linear_shapes(load_config("tiny").model.llm))


def test_nothing_to_train_is_refused():
    frozen = [f"optim.{part}.trainable=false" for part in ("vision", "projector", "llm")]
    (message,) = refused(1, *frozen)
    assert "there is nothing to train" in message


@pytest.mark.parametrize("kernel", ["fa4", "cudnn", "flash2"])
def test_a_bf16_kernel_in_fp32_is_refused(kernel):
    (message,) = refused(1, f"model.attention={kernel}", "train.precision=fp32")
    assert f"model.attention={kernel} computes in bf16 only" in message


def test_memory_settings_that_do_not_go_together_are_refused():
    (message,) = refused(1, "memory.block_layers=2")
    assert "set memory.recompute=attention_output or block_layers=1" in message
    (message,) = refused(1, "memory.offload_gib=1")
    assert "memory.offload_gib=1 is for what a recompute policy keeps" in message


@pytest.mark.parametrize("fraction", ["-0.1", "1.5"])
def test_a_share_that_is_none_is_refused(fraction):
    (message,) = refused(1, f"data.max_broken={fraction}")
    assert "is a share; use 0 (no sample may be broken) to 1" in message
    (message,) = refused(1, f"optim.offload_fraction={fraction}")
    assert "is a share of the optimizer state; use 0 (none) to 1 (all of it)" in message


# ---------------------------------------------------------------------------------------------------------------- warnings


def test_rows_longer_than_the_model_is_meant_for_are_warned_about():
    (warning,) = warned(1, "train.seq_length=16384")
    assert warning.startswith("train.seq_length=16384 exceeds model.llm.max_positions=8192")


def test_packed_rows_may_be_longer_than_a_document():
    assert warned(1, "train.seq_length=16384", "data.packing=true") == []


@pytest.mark.parametrize(("policy", "fate"), [("truncate", "keep at most 256 frames"), ("drop", "are dropped")])
def test_more_frames_than_fit_are_warned_about_with_what_happens_to_them(policy, fate):
    (warning,) = warned(1, "data.num_frames=300", f"data.over_long={policy}")
    assert "data.num_frames=300 frames of 4 tokens make 1200 tokens, more than train.seq_length=1024" in warning
    assert warning.endswith(fate) or fate in warning


def test_groups_that_should_stay_in_a_node_are_warned_about_when_they_do_not():
    (warning,) = warned(16, "parallel.tp=4", "parallel.ring=4", "parallel.gpus_per_node=2")
    assert "parallel.tp=4 * parallel.ulysses=1 = 4 ranks do not lie inside nodes of parallel.gpus_per_node=2" in warning
    assert warned(16, "parallel.tp=4", "parallel.ring=4", "parallel.gpus_per_node=8") == []


def test_nvlink_of_a_known_machine_may_join_several_nodes():
    def told(*settings):
        config = load_config("tiny", ["parallel.tp=2", "parallel.ulysses=2", "train.global_batch_size=32", *settings])
        return validate(config, 128, replace(machine_of("gb200"), gpu_bytes=10**13))

    assert told("parallel.gpus_per_node=4") == []
    (warning,) = told("parallel.gpus_per_node=1")
    assert "= 4 ranks do not lie among the 18 ranks that NVLink joins on a GB200: their all-to-all" in warning
    (warning,) = told("parallel.gpus_per_node=8")
    assert warning == (
        "parallel.gpus_per_node=8, but the nodes planned for (a GB200) have 4 GPUs; set parallel.gpus_per_node=4"
    )


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("[1]", "has 1 numbers and data.train 2 entries"),
        ("[1, 2, 3]", "has 3 numbers and data.train 2 entries"),
        ("[0, 1]", "0 is not the share of an entry"),
        ("[1, -2]", "-2 is not the share of an entry"),
        ("[1, .nan]", "nan is not the share of an entry"),
        ("[1, .inf]", "inf is not the share of an entry"),
    ],
)
def test_weights_of_a_blend_that_are_no_shares_of_its_entries_are_refused(weights, words):
    config = load_config("tiny", ["data.train=[a.json,b.json]", f"data.weights={weights}"])
    with pytest.raises(ConfigError, match=words):
        validate(config, 1)
