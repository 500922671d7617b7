"""Presets: every file loads, models have their published sizes, stages train what the paper trains."""

import pytest
import yaml
from omegaconf import OmegaConf

from megatron_vila.config.load import PRESET_FOLDER, load_config, preset_names
from megatron_vila.config.schema import LoraConfig, ProjectorConfig
from megatron_vila.plan.grid import Layout
from megatron_vila.plan.pictures import pictures_of, places
from megatron_vila.plan.sizes import (
    PROJECTOR_TYPES,
    llm_layer_parameters,
    parameter_count,
    projector_parameters,
    vision_layers_run,
    vision_parameters,
)
from megatron_vila.plan.validate import validate, value_of

RUNS = [name for name in preset_names() if "/" not in name]
"""Complete runs: everything but the data is in the file."""


def leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def test_every_yaml_file_is_a_preset():
    assert len(preset_names()) == len(list(PRESET_FOLDER.rglob("*.yaml")))
    assert {"tiny", "longvila-7b-stage5", "longvila-1.5b-stage5", "llama3-longvila-8b-stage5"} < set(RUNS)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_with_what_its_file_says(name):
    config = load_config(name, [])
    own = leaves(OmegaConf.to_container(OmegaConf.load(PRESET_FOLDER / f"{name}.yaml")))
    own.pop("include", None)
    assert own
    assert {key: value_of(config, key) for key in own} == own


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_says_what_it_is_in_its_first_line(name):
    assert (PRESET_FOLDER / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_every_complete_run_is_valid_on_its_smallest_worlds(name, factor):
    config = load_config(name, [])
    block = Layout.of(config.parallel).size
    nodes = max(block, config.parallel.gpus_per_node) if name != "tiny" else 1
    assert validate(config, nodes * factor) == []


def test_stage_presets_set_no_model_shape():
    for stage in range(1, 6):
        tree = yaml.safe_load((PRESET_FOLDER / "stages" / f"stage{stage}.yaml").read_text())
        assert set(tree) <= {"include", "model", "memory", "optim", "data", "train"}
        shape = set(tree.get("model", {}).get("llm", {})) - {"rope_theta", "rope_scaling_factor", "max_positions"}
        assert shape == set()


def test_the_llama_3_projector_has_its_published_size():
    assert parameter_count(load_config("models/llama3-longvila-8b", []).model)["projector"] == 35_668_992


def test_a_3x3_projector_has_its_published_size():
    assert projector_parameters(ProjectorConfig(type="mlp_downsample_3x3_fix"), 1152, 3584) == 61_101_440


def test_the_siglip_towers_have_their_published_sizes():
    """bf16 files of 856.45 MB (384 px, with head) and 826.65 MB (448 px, without)."""
    at_384 = load_config("models/siglip-384", []).model.vision
    at_448 = load_config("models/siglip-448", []).model.vision
    assert vision_parameters(at_384) == 428_225_600
    assert vision_parameters(at_448) == 413_327_088


@pytest.mark.parametrize(
    ("name", "published_vocab", "published"),
    [
        ("models/qwen2-7b", 152_064, 7_615_616_512),
        ("models/qwen2-1.5b", 151_936, 1_543_714_304),
        ("models/llama3-8b", 128_256, 8_030_261_248),
    ],
)
def test_language_models_have_their_published_sizes(name, published_vocab, published):
    model = load_config(name, [f"model.llm.vocab_size={published_vocab}"]).model
    assert parameter_count(model)["llm"] == published


def test_the_total_is_the_sum_of_the_parts():
    counts = parameter_count(load_config("models/longvila-7b", []).model)
    assert counts["total"] == counts["vision"] + counts["projector"] + counts["llm"]


@pytest.mark.parametrize(
    ("name", "tokens"), [("models/longvila-7b", 196), ("models/longvila-7b-256f", 256), ("models/tiny", 4)]
)
def test_a_frame_becomes_the_known_number_of_tokens(name, tokens):
    assert places(pictures_of(load_config(name, []).model).units(1, True), 0) == tokens


def test_the_last_layer_of_the_tower_is_not_run():
    assert vision_layers_run(load_config("models/siglip-384", []).model.vision) == 26


def test_tied_embeddings_and_biases_are_counted():
    untied = load_config("models/qwen2-1.5b", ["model.llm.tie_embeddings=false"]).model
    tied = load_config("models/qwen2-1.5b", []).model
    assert parameter_count(untied)["llm"] - parameter_count(tied)["llm"] == 151_648 * 1536
    bare = load_config("models/qwen2-1.5b", ["model.llm.qkv_bias=false"]).model
    assert llm_layer_parameters(tied.llm) - llm_layer_parameters(bare.llm) == (12 + 2 * 2) * 128


def test_parameter_counts_are_those_of_the_built_tower_and_projectors():
    from megatron_vila.models.vision.projector import Projector
    from megatron_vila.models.vision.tower import VisionTower

    for head in ("true", "false"):
        model = load_config("tiny", [f"model.vision.use_head={head}"]).model
        tower = VisionTower(model.vision, model.init_std)
        assert sum(p.numel() for p in tower.parameters()) == parameter_count(model)["vision"]
    for kind in PROJECTOR_TYPES:
        model = load_config("tiny", [f"model.projector.type={kind}"]).model
        projector = Projector(model.projector, model.vision, model.llm.hidden_size, model.init_std)
        assert sum(p.numel() for p in projector.parameters()) == parameter_count(model)["projector"]


@pytest.mark.parametrize(
    ("stage", "vision", "projector", "llm", "lr", "schedule"),
    [
        (1, False, True, False, 1e-3, "cosine"),
        (2, False, True, True, 5e-5, "cosine"),
        (3, True, True, True, 1e-4, "cosine"),
        (4, False, False, True, 2e-5, "constant"),
        (5, True, True, True, 5e-5, "cosine"),
    ],
)
def test_stages_train_the_parts_of_the_paper_at_their_rates(stage, vision, projector, llm, lr, schedule):
    optim = load_config(f"stages/stage{stage}", []).optim
    assert (optim.vision.trainable, optim.projector.trainable, optim.llm.trainable) == (vision, projector, llm)
    assert (optim.lr, optim.schedule, optim.weight_decay) == (lr, schedule, 0.0)
    assert (optim.vision.lr, optim.projector.lr, optim.llm.lr) == (None, None, None)


def test_stage_4_with_lora_is_stage_4_with_what_the_paper_trains():
    plain, lora = load_config("stages/stage4", []), load_config("stages/stage4-lora", [])
    plain.model.lora = LoraConfig(rank=8, alpha=16.0, targets=["qkv", "proj"], also_train=["embeddings", "norms"])
    assert lora == plain
    overrides = ["model.lora.rank=8", "model.lora.also_train=[embeddings,norms]"]
    assert load_config("stages/stage4", overrides) == lora
    assert validate(load_config("longvila-7b-stage4", overrides), 64) == []


def test_published_long_context_settings_are_kept_together():
    at_1m = load_config("models/longvila-7b", []).model.llm
    assert (at_1m.rope_theta, at_1m.rope_scaling_factor, at_1m.max_positions) == (1_062_356_830.0, 4.0, 1_048_576)
    llama = load_config("models/llama3-longvila-8b", []).model
    assert (llama.llm.rope_theta, llama.projector.token_order) == (207_112_184.0, "legacy_column_major")
    assert load_config("models/longvila-7b", []).model.projector.token_order == "row_major"
