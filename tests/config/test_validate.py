"""Validation: what is refused, what is warned about, and the cure that the message proposes."""

import json
import os

import pytest

from megatron_vila.config.layouts import Layout, chunk_problems, layout_problems, nearest_layouts
from megatron_vila.config.load import ConfigError, config_keys, load_config
from megatron_vila.config.memory import GIB, estimate_memory, state_on_host
from megatron_vila.config.schema import Config, LanguageConfig
from megatron_vila.config.sizes import linear_shapes
from megatron_vila.config.validate import (
    ABOVE_ZERO,
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    CHOICES,
    LORA_NAMES,
    tokenizer_problems,
    validate,
)
from megatron_vila.models.geometry import downsample_rate
from megatron_vila.parallel.ulysses import HeadSplit


def refused(world_size: int, *overrides: str, preset: str = "tiny") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(load_config(preset, list(overrides)), world_size, check_files=False)
    return [line.removeprefix("- ") for line in str(caught.value).splitlines()[1:]]


def warned(world_size: int, *overrides: str, preset: str = "tiny") -> list[str]:
    return validate(load_config(preset, list(overrides)), world_size, check_files=False)


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
    except ValueError:
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
    assert message == f"{name}=nonsense is not known; choose one of {', '.join(CHOICES[name])}"


def test_choices_are_those_of_the_code():
    assert all(downsample_rate(kind) for kind in CHOICES["model.projector.type"])
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
    own_rule |= {"optim.beta1", "optim.beta2", "optim.offload_fraction"}
    own_rule |= {f"optim.{part}.lr" for part in ("vision", "projector", "llm")}
    numbers = {k.name for k in config_keys() if k.type in (int, float, int | None, float | None)}
    assert numbers == bounded | own_rule


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optim.beta2=1", "optim.beta2=1.0 must be at least 0 and below 1"),
        ("optim.llm.lr=0", "to freeze the part set optim.llm.trainable=false"),
        ("optim.lr=.nan", "optim.lr=nan must be above 0"),
        ("optim.lr=.inf", "optim.lr=inf must be above 0"),
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
    (message,) = refused(1, override)
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


def test_more_host_memory_than_there_is_is_refused_with_the_largest_value(data_folder):
    settings = [*data_folder, "memory.recompute=attention_output", "memory.offload_gib=100000"]
    with pytest.raises(
        ConfigError, match=r"100000 on 1 ranks of a node asks for 100000.0 GiB of host memory, and .* lower it to"
    ):
        validate(load_config("tiny", settings), 1)


def test_optimizer_state_counts_towards_host_memory(data_folder, monkeypatch):
    monkeypatch.setattr("megatron_vila.config.validate.host_memory", lambda: 100 * GIB)
    settings = [*data_folder, "train.global_batch_size=4", "memory.recompute=attention_output", "memory.offload_gib=20"]
    assert not [warning for warning in validate(load_config("models/qwen2-7b", settings), 4) if "host" in warning]
    settings.append("optim.offload_fraction=0.5")
    with pytest.raises(
        ConfigError,
        match=r"memory.offload_gib=20 and optim.offload_fraction=0.5 \(7.5 GiB a rank\) on 4 ranks of a node asks for 110.1 "
        r"GiB of host memory, and 100.0 GiB are there; lower both to 25.0 GiB a rank or less",
    ):
        validate(load_config("models/qwen2-7b", settings), 4)


@pytest.mark.parametrize("fraction", ["-0.1", "1.5", ".nan"])
def test_a_share_of_optimizer_state_that_is_none_is_refused(fraction):
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


# ------------------------------------------------------------------------------------------------------------------ memory


def test_memory_that_cannot_fit_is_a_warning_with_a_cure(data_folder):
    overrides = [*data_folder, "train.seq_length=200000000", "model.llm.max_positions=200000000"]
    warnings = validate(load_config("tiny", overrides), 1)
    (warning,) = [w for w in warnings if "GiB" in w]
    assert warning.startswith("a rank needs about ")
    assert "set memory.recompute=attention_output" in warning


def test_chunks_of_the_exchange_deal_out_whole_key_value_heads():
    """Llama-3-8B has 8 key/value heads."""
    llm = load_config("models/llama3-8b", []).model.llm
    for tp, ulysses, chunks in ((1, 2, 1), (1, 2, 4), (1, 4, 2), (2, 2, 2), (1, 1, 1), (1, 16, 1)):
        assert chunk_problems(llm, Layout(tp, 1, ulysses, 1), chunks) == []
    (three,) = chunk_problems(llm, Layout(1, 1, 2, 1), 3)
    assert three.startswith("parallel.ulysses_chunks=3 with ulysses=2 does not") and three.endswith("=1 or 2 or 4")
    (no_exchange,) = chunk_problems(llm, Layout(1, 1, 1, 4), 2)
    assert no_exchange.endswith("use ulysses_chunks=1")


def test_chunks_of_the_exchange_take_less_memory_in_the_backward_pass():
    def workspace(chunks):
        settings = ["parallel.ulysses=2", f"parallel.ulysses_chunks={chunks}", "train.seq_length=524288"]
        settings += ["memory.recompute=attention_output", "memory.mlp_tile=8192"]
        return estimate_memory(load_config("models/llama3-8b", settings), 2, on_gpu=True).workspace

    assert workspace(4) < workspace(2) < workspace(1)


def test_a_small_model_fits(data_folder):
    assert validate(load_config("tiny", data_folder), 1) == []


def test_weights_and_gradients_of_a_7b_model_are_what_is_known():
    """7.6 G parameters: bf16 weights, float32 gradients, 12 bytes of optimizer state shared by the whole world."""
    config = load_config("models/qwen2-7b", ["optim.vision.trainable=false", "optim.projector.trainable=false"])
    estimate = estimate_memory(config, 8, on_gpu=True)
    llm, frozen = 7_612_634_624, 428_225_600 + 29_376_512
    assert estimate.weights == pytest.approx(2 * (llm + frozen), rel=1e-3)
    assert estimate.gradients == pytest.approx(4 * llm, rel=1e-3)
    assert estimate.optimizer == pytest.approx(12 * llm / 8, rel=1e-3)


def test_with_lora_only_what_learns_has_gradients_and_optimizer_state():
    """Rank 8 on q, k, v and o of Qwen2-7B: 28 layers of 8 * (3584 + 4608 + 3584 + 3584) parameters, 2 bytes a weight."""
    frozen = ["optim.vision.trainable=false", "optim.projector.trainable=false"]
    whole = estimate_memory(load_config("models/qwen2-7b", frozen), 8, on_gpu=True)

    def estimate(*overrides):
        return estimate_memory(
            load_config("models/qwen2-7b", [*frozen, "model.lora.rank=8", *overrides]), 8, on_gpu=True
        )

    updates = 28 * 8 * (3584 + 4608 + 3584 + 3584)
    assert estimate().gradients == 4 * updates
    assert estimate().optimizer == 12 * updates // 8
    assert estimate().weights == whole.weights + 2 * updates
    # Of qkv A is whole, of proj B: half of the parameters but for the wider qkv.
    assert estimate("parallel.tp=4").gradients == 4 * 28 * 8 * (3584 + 4608 // 4 + 3584 // 4 + 3584)
    beside = estimate("model.lora.also_train=[embeddings,norms]")
    assert beside.gradients == 4 * (updates + 151_648 * 3584 + (2 * 28 + 1) * 3584)
    assert estimate().llm_activations < whole.llm_activations


def test_optimizer_state_is_shared_by_data_and_context_parallel_ranks():
    def optimizer(*overrides):
        return estimate_memory(load_config("models/qwen2-7b", list(overrides)), 8, on_gpu=True).optimizer

    assert optimizer("parallel.ring=2", "parallel.ulysses=4") == optimizer()


def test_offloaded_optimizer_state_leaves_the_device_for_the_host():
    def both(fraction):
        config = load_config("models/qwen2-7b", [f"optim.offload_fraction={fraction}"])
        return estimate_memory(config, 8, on_gpu=True).optimizer, state_on_host(config, 8, on_gpu=True)

    (whole, nothing), (half, half_on_host), (none, on_host) = both(0), both(0.5), both(1)
    assert nothing == none == 0
    assert half == pytest.approx(whole / 2) and half_on_host == pytest.approx(on_host / 2)
    assert on_host == pytest.approx(whole)


def test_activations_shrink_with_tp_and_cp_and_with_recompute():
    def activations(*overrides):
        settings = ["train.seq_length=1048576", *overrides]
        return estimate_memory(load_config("models/qwen2-7b", settings), 16, on_gpu=True).llm_activations

    whole = activations()
    for split in ("parallel.tp=4", "parallel.ring=4"):
        assert activations(split) == pytest.approx(whole / 4, rel=0.05)
    # The exchange makes a copy of attention's output: 2 bytes of 28 x 3584 values for each token of a rank.
    assert activations("parallel.ulysses=4") == whole / 4 + 2 * 28 * 3584 * 1048576 // 4
    assert activations("memory.recompute=full") < whole / 5
    kept = activations("memory.recompute=attention_output")
    assert activations("memory.recompute=full") < kept < whole / 4
    assert activations("memory.recompute=attention_output", "memory.block_layers=4") < kept
    assert activations("memory.recompute=attention_output", "memory.offload_gib=10") == kept - 10 * GIB


def test_tower_activations_shrink_with_its_recompute_and_vanish_when_frozen():
    def activations(*overrides):
        settings = ["train.seq_length=262144", "data.num_frames=512", *overrides]
        return estimate_memory(load_config("models/qwen2-7b", settings), 1, on_gpu=True).vision_activations

    pixels = 512 * 3 * 384**2 * 4
    assert activations("model.vision.recompute=true") == activations("optim.vision.trainable=false") == pixels
    assert activations() > 100 * pixels


def test_the_estimate_reads_as_a_sum():
    estimate = estimate_memory(load_config("models/qwen2-7b", []), 8, on_gpu=True)
    assert str(estimate).startswith(f"{estimate.total / GIB:.1f} GiB (weights ")


def test_published_long_runs_fit_80_gib():
    for name, world in (("longvila-7b-stage5", 256), ("longvila-7b-stage4", 64), ("llama3-longvila-8b-stage5", 64)):
        assert estimate_memory(load_config(name, []), world, on_gpu=True).total < 80 * GIB


# ------------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def data_folder(tmp_path) -> list[str]:
    """Overrides that name files which exist."""
    samples, tokenizer, media = tmp_path / "train.json", tmp_path / "tokenizer", tmp_path / "media"
    samples.write_text(json.dumps([{"conversations": []}]))
    tokenizer.mkdir()
    media.mkdir()
    (tokenizer / "tokenizer_config.json").write_text("{}")
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    return [
        f"data.train=[{samples}]",
        f"data.media_dir={media}",
        f"data.tokenizer={tokenizer}",
        f"train.output={tmp_path / 'runs' / 'new'}",
    ]


def files_refused(overrides: list[str], *changes: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(load_config("tiny", [*overrides, *changes]), 1)
    return str(caught.value).splitlines()[1:]


def test_files_are_not_looked_at_when_told_so():
    assert validate(load_config("tiny", ["data.train=[nowhere.json]"]), 1, check_files=False) == []


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("data.train=[nowhere.json]", "data.train names 'nowhere.json', which does not exist"),
        ("data.eval=[nowhere.json]", "data.eval names 'nowhere.json', which does not exist"),
        ("data.train=[]", "data.train is empty"),
        ("data.media_dir=nowhere", "data.media_dir='nowhere' is not a folder"),
        ("data.tokenizer=", "data.tokenizer is empty"),
        ("data.tokenizer=nowhere", "data.tokenizer='nowhere' is not a folder"),
        ("checkpoint.load=nowhere", "checkpoint.load='nowhere' is not a folder"),
    ],
)
def test_a_missing_file_is_refused(data_folder, change, part):
    (message,) = files_refused(data_folder, change)
    assert part in message


def test_an_empty_sample_file_and_a_folder_in_its_place_are_refused(data_folder, tmp_path):
    (tmp_path / "empty.json").touch()
    messages = files_refused(data_folder, f"data.train=[{tmp_path / 'empty.json'},{tmp_path}]")
    assert "which is empty" in messages[0]
    assert "which is not a file" in messages[1]


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (message,) = tokenizer_problems(str(tmp_path))
    assert "has no chat template" in message
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert list(tokenizer_problems(str(tmp_path))) == []


def test_an_output_below_a_file_is_refused(data_folder, tmp_path):
    (message,) = files_refused(data_folder, f"train.output={tmp_path / 'train.json' / 'run'}")
    assert "is a file; choose another folder" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission_is_refused(data_folder, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    (message,) = files_refused(data_folder, f"train.output={closed / 'run'}")
    assert "no permission" in message


def test_the_output_folder_is_not_made_by_validation(data_folder, tmp_path):
    validate(load_config("tiny", data_folder), 1)
    assert not (tmp_path / "runs").exists()


def test_problems_of_values_and_of_files_come_together(data_folder):
    assert len(files_refused(data_folder, "data.train=[nowhere.json]", "parallel.pp=3")) >= 2


def test_the_default_configuration_lacks_only_data():
    with pytest.raises(ConfigError) as caught:
        validate(Config(), 1)
    assert [line[2:].split(" ")[0] for line in str(caught.value).splitlines()[1:]] == ["data.train", "data.tokenizer"]
