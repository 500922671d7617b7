"""Root configurations of both layouts, our own settings, and folders that are refused with everything that is wrong."""

import json
import logging
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, LlamaConfig, Qwen2Config

from megatron_vila.config.load import load_config
from megatron_vila.convert.errors import ConversionError
from megatron_vila.hf import VilaConfig, VilaConfigError, VILAForConditionalGeneration, VilaProcessor
from megatron_vila.plan.pictures import pictures_of, places
from tests.convert import material
from tests.data.material import byte_level_tokenizer
from tests.hf.megatron_side import config, export
from tests.ranks import pool


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    settings = config(folder, order="legacy_column_major", fps=1.5, fps_rule="first", image_aspect="pad")
    pool.run(1, export, settings, folder, ("vila", "flat"))
    return folder, settings


@pytest.fixture
def root(exported):
    """The root configuration of the VILA layout, free to be changed."""
    return json.loads((exported[0] / "vila" / "config.json").read_text())


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of the exported VILA layout, free to be damaged."""
    return shutil.copytree(exported[0] / "vila", tmp_path / "vila")


LANGUAGE_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "eos_token_id", "pad_token_id",
)  # fmt: skip


@pytest.mark.parametrize("layout", ["vila", "flat"])
def test_both_layouts_give_the_settings_that_were_trained(exported, layout):
    folder, settings = exported
    read = AutoConfig.from_pretrained(folder / layout)
    assert type(read) is VilaConfig and read.dtype == torch.float32
    assert replace(read.model_settings.vision, frame_micro_batch=2) == settings.model.vision
    assert read.model_settings.projector == settings.model.projector
    assert read.tokens_per_frame == places(pictures_of(settings.model).units(1, True), 0) == 4
    ours = material.vila_config(settings.model, settings.data, byte_level_tokenizer("qwen2"))
    for key in ("megatron_vila", "image_token_id", "video_token_id", "mm_projector_type", "mm_vision_select_layer"):
        assert getattr(read, key) == getattr(ours, key), key
    assert read.megatron_vila["fps"] == 1.5 and read.megatron_vila["fps_rule"] == "first"
    assert read.megatron_vila["image_aspect"] == "pad"
    for key in LANGUAGE_KEYS:
        assert getattr(read.text_config, key) == getattr(ours.text_config, key), key
    for key in ("rope_theta", "rope_type", "factor"):
        assert read.text_config.rope_parameters[key] == ours.text_config.rope_parameters[key], key


@pytest.mark.parametrize(
    ("preset", "language"),
    [("longvila-7b-stage5", Qwen2Config), ("llama3-longvila-8b-stage5", LlamaConfig)],
)
def test_presets_become_configurations_and_come_back_from_a_file(preset, language, tmp_path):
    settings = load_config(preset)
    tokenizer = byte_level_tokenizer("qwen2")
    made = material.vila_config(settings.model, settings.data, tokenizer)
    made.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read.text_config) is language and read.to_json_string() == made.to_json_string()
    assert read.tokens_per_frame == places(pictures_of(settings.model).units(1, True), 0)
    llm = settings.model.llm
    rope = read.text_config.rope_parameters
    assert (rope["rope_theta"], rope.get("factor", 1.0)) == (llm.rope_theta, llm.rope_scaling_factor)


@pytest.mark.parametrize(
    ("version", "order"),
    [
        ("4.36.2", "legacy_column_major"),
        ("4.37.2", "legacy_column_major"),
        ("4.44.2", "row_major"),
        ("4.46.0", "row_major"),
    ],
)
def test_the_token_order_of_published_files_follows_their_version_and_is_told(root, version, order, caplog):
    del root["megatron_vila"]
    with caplog.at_level(logging.WARNING, "megatron_vila"):
        read = VilaConfig.from_dict(root | {"transformers_version": version})
    assert read.model_settings.projector.token_order == order
    assert order in caplog.text and version in caplog.text


def test_an_ambiguous_token_order_is_asked_for_and_can_be_given(root, folder):
    del root["megatron_vila"]
    root["transformers_version"] = "4.40.0"
    (folder / "config.json").write_text(json.dumps(root))
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained, AutoProcessor.from_pretrained):
        with pytest.raises(VilaConfigError, match=r"4\.40\.0.*projector_token_order= in from_pretrained\): legacy_column_major"):
            load(folder)
        assert load(folder, projector_token_order="legacy_column_major") is not None
    model = AutoModelForCausalLM.from_pretrained(folder, projector_token_order="row_major")
    assert not model.model.mm_projector.layers[0].column_major


def test_a_given_token_order_wins_over_the_recorded_one(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.model.mm_projector.layers[0].column_major
    model = AutoModelForCausalLM.from_pretrained(folder, projector_token_order="row_major")
    assert not model.model.mm_projector.layers[0].column_major


def test_published_files_without_our_section_are_read(root):
    for key in ("megatron_vila", "image_token_id", "video_token_id"):
        del root[key]
    read = VilaConfig.from_dict(root)
    assert read.megatron_vila["frame_separator_ids"] is None
    assert (read.megatron_vila["num_frames"], read.megatron_vila["image_aspect"]) == (3, "pad")
    assert read.image_token_id > read.text_config.vocab_size


def test_parts_named_by_text_are_read_from_their_folders(root, folder):
    root |= {key: "./" + key.removesuffix("_cfg") for key in ("llm_cfg", "vision_tower_cfg", "mm_projector_cfg")}
    (folder / "config.json").write_text(json.dumps(root))
    read = AutoConfig.from_pretrained(folder)
    assert read.text_config.hidden_size == 16 and read.mm_projector_type == "mlp_downsample"
    shutil.rmtree(folder / "llm")
    with pytest.raises(VilaConfigError, match=r"there is no llm/, and llm_cfg='./llm' is not a local folder"):
        AutoConfig.from_pretrained(folder)


def test_everything_that_a_configuration_asks_for_in_vain_is_listed_at_once(root):
    root |= {"dynamic_s2": True, "model_dtype": "__import__('os')"}
    root["video_encoder"] = json.dumps({"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]})
    root["image_encoder"] = {"_target_": "os.system"}
    root["vision_tower_cfg"]["model_type"] = "intern_vit_6b"
    with pytest.raises(VilaConfigError) as caught:
        VilaConfig.from_dict(root)
    for word in ("dynamic_s2=True", "TSPVideoEncoder", "os.system", "__import__", "intern_vit_6b"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_vision_select_feature": "patch"}, "only 'cls_patch' is"),
        (
            {"mm_projector_cfg": {"model_type": "v2l_projector", "mm_projector_type": "mlp_downsample_fix"}},
            "mlp_downsample_fix",
        ),
        ({"llm_cfg": {"model_type": "mixtral"}}, "model_type='mixtral' is not known; use a language model"),
        ({"megatron_vila": {"format": 3, "projector_token_order": "row_major"}}, "format=3 is not known, only 1 and 2"),
        ({"megatron_vila": {"projector_token_order": "diagonal"}}, "diagonal"),
    ],
)
def test_unknown_kinds_are_refused_by_name(root, change, message):
    with pytest.raises(VilaConfigError, match=message):
        VilaConfig.from_dict(root | change)


def test_a_flat_file_without_its_parts_is_refused(exported):
    root = json.loads((exported[0] / "flat" / "config.json").read_text())
    del root["text_config"], root["vision_config"]
    with pytest.raises(VilaConfigError, match="describes no llm; give its settings as text_config(.|\n)*no vision_tower"):
        VilaConfig.from_dict(root)


def test_a_path_that_is_no_folder_is_refused_with_the_cure(tmp_path):
    for load in (VILAForConditionalGeneration.from_pretrained, VilaProcessor.from_pretrained):
        with pytest.raises(FileNotFoundError, match="hf download NAME"):
            load("someone/some-vila")


def test_missing_extra_and_wrongly_shaped_weights_are_listed_together(folder):
    path = folder / "mm_projector" / "model.safetensors"
    tensors = load_file(path)
    tensors["layers.9.weight"] = tensors.pop("layers.4.weight")
    tensors["layers.2.bias"] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(ConversionError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "3 problems" in str(caught.value)
    assert "mm_projector.layers.4.weight is missing; it should be [16, 16]" in str(caught.value)
    assert f"mm_projector.layers.9.weight [16, 16] belongs to no part of this model ({path})" in str(caught.value)
    assert f"mm_projector.layers.2.bias is [3]; it should be [16] ({path})" in str(caught.value)


def test_a_truncated_file_and_pickled_weights_are_refused_by_name(folder):
    path = folder / "llm" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    (folder / "vision_tower" / "model.safetensors").unlink()
    (folder / "vision_tower" / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ConversionError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert f"{path} is truncated" in str(caught.value)
    assert "pickled weights" in str(caught.value) and "pytorch_model.bin" in str(caught.value)


def test_the_tokenizer_of_another_model_is_refused_with_the_cure(folder):
    path = folder / "llm" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 300}))
    with pytest.raises(VilaConfigError, match=r"the tokenizer in .* has \d+ tokens.*vocab_size=300.* put the model's own"):
        AutoProcessor.from_pretrained(folder)


def test_the_tokenizers_settings_reach_it(folder):
    assert AutoProcessor.from_pretrained(folder, truncation_side="left").tokenizer.truncation_side == "left"


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_a_dtype_is_that_of_the_files_or_the_one_that_is_asked_for(folder, dtype):
    model = VILAForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    assert model.dtype == (torch.float32 if dtype == "auto" else dtype)
