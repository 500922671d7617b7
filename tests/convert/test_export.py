"""What an export writes: files, configurations of either layout, element types, and what training changed."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_vila.checkpoint.save_load import read_info, save_checkpoint
from megatron_vila.config.load import load_config
from megatron_vila.config.text_rules import TextRules
from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.exporter import export_checkpoint
from megatron_vila.convert.importer import import_checkpoint
from megatron_vila.data.template import NAMED
from megatron_vila.hf import VilaConfig
from tests.checkpoint.damage import seal_info
from tests.convert import material
from tests.data.material import byte_level_tokenizer
from tests.ranks import pool
from tests.training.small_run import build

PARTS = ("llm", "vision_tower", "mm_projector")


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    """An import with everything that a published folder has."""
    folder = tmp_path_factory.mktemp("imported")
    tokenizer = material.write_tokenizer(folder / "tokenizer")
    source = material.write_vila(folder / "source", "longvila-7b", tokenizer=tokenizer)
    return import_checkpoint(source, folder / "imported")


def config_of(folder: Path, *parts: str) -> dict:
    return json.loads(folder.joinpath(*parts, "config.json").read_text())


def test_the_folder_layout_is_what_the_vila_code_loads(tmp_path, imported):
    out = export_checkpoint(imported, tmp_path / "out")
    root = config_of(out)
    assert root["model_type"] == "llava_llama" and "llava" in root["architectures"][0].lower()
    assert root["resume_path"] and "_name_or_path" not in root
    for part in PARTS:
        # The rule of TensorRT-LLM; the VILA code takes the name of the key.
        folder = os.path.basename(root[f"{part}_cfg"]["_name_or_path"].strip("/"))
        assert folder == part
        assert root[f"{part}_cfg"] == config_of(out, folder) | {"_name_or_path": part}
        assert "_name_or_path" not in config_of(out, part)
        assert (out / folder / "model.safetensors").is_file()
    assert config_of(out, "llm")["architectures"] == ["Qwen2ForCausalLM"]
    assert config_of(out, "vision_tower")["architectures"] == ["SiglipVisionModel"]
    assert config_of(out, "mm_projector") == {
        "architectures": ["MultimodalProjector"],
        "mm_projector_type": "mlp_downsample",
        "model_type": "v2l_projector",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0",
    }
    assert (root["mm_vision_select_layer"], root["mm_vision_select_feature"]) == (-2, "cls_patch")
    assert (root["hidden_size"], root["mm_hidden_size"], root["model_dtype"]) == (32, 16, "torch.bfloat16")
    # Carried: what the original said and training has nothing to do with.
    assert root["drop_path_rate"] == 0.0 and root["mm_use_im_patch_token"] is True
    assert json.loads((out / "llm/generation_config.json").read_text())["temperature"] == 0.7
    assert json.loads((out / "vision_tower/preprocessor_config.json").read_text())["size"]["height"] == 56


def test_rotary_settings_and_lengths_are_carried(tmp_path, imported):
    llm = config_of(export_checkpoint(imported, tmp_path / "out"), "llm")
    assert llm["rope_theta"] == 1062356830.0 and llm["max_position_embeddings"] == 1048576
    assert llm["rope_scaling"]["type"] == "linear" and llm["rope_scaling"]["factor"] == 4.0
    assert (llm["model_max_length"], llm["tokenizer_model_max_length"]) == (262144, 262144)
    assert llm["use_sliding_window"] is False and llm["sliding_window"] == 131072


def test_the_context_that_training_extended_is_written_everywhere(tmp_path, imported):
    step = imported / "checkpoints" / "step-00000000"
    info = json.loads((step / "info.json").read_text())
    info["config"]["model"]["llm"] |= {"rope_theta": 5.0, "rope_scaling_factor": 1.0, "max_positions": 99}
    longer = tmp_path / "longer" / "checkpoints" / "step-00000000"
    longer.mkdir(parents=True)
    for file in step.iterdir():
        (longer / file.name).write_bytes(file.read_bytes())
    seal_info(longer, info)
    out = export_checkpoint(tmp_path / "longer", tmp_path / "out")
    llm = config_of(out, "llm")
    assert (llm["rope_theta"], llm["rope_scaling"], llm["max_position_embeddings"]) == (5.0, None, 99)
    assert (llm["model_max_length"], llm["tokenizer_model_max_length"]) == (99, 99)
    assert config_of(out)["model_max_length"] == 99 and config_of(out)["megatron_vila"]["max_positions"] == 99


def test_the_flat_layout_has_one_state_dict_and_the_keys_of_flat_loaders(tmp_path, imported):
    out = export_checkpoint(imported, tmp_path / "out", layout="flat")
    root = config_of(out)
    assert (root["model_type"], root["architectures"]) == ("vila", ["VILAForConditionalGeneration"])
    assert root["text_config"]["model_type"] == "qwen2" and root["vision_config"]["vision_use_head"] is True
    for key in ("hidden_size", "mm_hidden_size", "mm_projector_type", "mm_vision_select_layer", "torch_dtype"):
        assert key in root
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert root["image_token_id"] == len(tokenizer) + 1 and root["video_token_id"] == len(tokenizer) + 2
    assert {p.name for p in out.iterdir() if p.is_dir()} == set()
    assert {"model.safetensors", "generation_config.json", "preprocessor_config.json"} <= {
        p.name for p in out.iterdir()
    }


@pytest.mark.parametrize("layout", ["vila", "flat"])
def test_the_tokenizer_of_an_export_gives_the_ids_of_the_run(tmp_path, imported, layout):
    out = export_checkpoint(imported, tmp_path / "out", layout=layout)
    trained, exported = (AutoTokenizer.from_pretrained(folder) for folder in (imported / "tokenizer", out))
    text = "Which colour?\nblue"
    assert trained(text)["input_ids"] == exported(text)["input_ids"]
    assert exported.chat_template == trained.chat_template
    if layout == "vila":
        assert (out / "llm" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


def test_media_tokens_that_the_tokenizer_knows_are_named(tmp_path, imported):
    tokenizer = AutoTokenizer.from_pretrained(imported / "tokenizer")
    tokenizer.add_tokens(["<vila/video>", "<image>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    root = config_of(export_checkpoint(imported, tmp_path / "out", tokenizer=tmp_path / "tokenizer"))
    assert (root["image_token_id"], root["video_token_id"]) == (len(tokenizer) - 1, len(tokenizer) - 2)


def changed_import(imported, folder, **data):
    """A copy of an import whose run has other settings of the data."""
    shutil.copytree(imported, folder)
    content = read_info(folder)
    content["config"]["data"] |= data
    seal_info(folder / "checkpoints" / "step-00000000", content)
    return folder


def test_the_rules_of_texts_travel_with_an_export_and_back(tmp_path, imported):
    rules = {
        "media_format": "verbatim",
        "template": "hermes-2",
        "template_clock": "2031-02-03",
        "parse_control_tokens": True,
    }
    out = export_checkpoint(changed_import(imported, tmp_path / "run", **rules), tmp_path / "out")
    own = config_of(out)["megatron_vila"]
    assert own["format"] == 2 and own | rules == own
    again = load_config(str(import_checkpoint(out, tmp_path / "again") / "config.yaml"))
    assert asdict(TextRules.of(again.data)) == rules
    # Where other readers look for the prompt.
    for place in (out, out / "llm"):
        assert AutoTokenizer.from_pretrained(place).chat_template == NAMED["hermes-2"]
        assert json.loads((place / "tokenizer_config.json").read_text())["chat_template"] == NAMED["hermes-2"]


def test_an_export_from_before_the_rules_keeps_what_was_done_then(tmp_path, imported):
    out = export_checkpoint(imported, tmp_path / "out")
    root = config_of(out)
    root["megatron_vila"] = {"format": 1, **{k: v for k, v in root["megatron_vila"].items() if k in ("frame_separator_ids",)}}
    (out / "config.json").write_text(json.dumps(root))
    data = load_config(str(import_checkpoint(out, tmp_path / "again") / "config.yaml")).data
    assert TextRules.of(data) == TextRules(media_format="verbatim", parse_control_tokens=True)
    assert VilaConfig.from_pretrained(out).megatron_vila["media_format"] == "verbatim"


def test_generation_ends_at_every_stop_of_the_template(tmp_path, imported):
    out = export_checkpoint(imported, tmp_path / "carried")
    end = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|im_end|>")
    assert json.loads((out / "llm/generation_config.json").read_text())["eos_token_id"] == [3, 0] and end == 3
    tokenizer = byte_level_tokenizer("llama3")
    tokenizer.save_pretrained(tmp_path / "llama3")
    out = export_checkpoint(
        changed_import(imported, tmp_path / "run", template="llama_3"), tmp_path / "out", tokenizer=tmp_path / "llama3"
    )
    stops = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    assert set(stops) <= set(json.loads((out / "llm/generation_config.json").read_text())["eos_token_id"])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_element_type_can_be_chosen(tmp_path, name, dtype):
    source = material.write_vila(tmp_path / "source", "nvila-lite", torch.float32 if name == "bf16" else torch.bfloat16)
    original = material.read_tensors(source)
    out = export_checkpoint(import_checkpoint(source, tmp_path / "imported"), tmp_path / "out", dtype=name)
    assert material.same_bits({n: t.to(dtype) for n, t in original.items()}, material.read_tensors(out))
    assert config_of(out)["model_dtype"] == str(dtype)


def train_in_bf16(rank, folder):
    run = build((2, 1, 1, 1), torch.bfloat16, model__vision__use_head=True)
    for step in range(3):
        run.step(step)
    save_checkpoint(folder, 3, [run.ddp], run.optimizer, run.scheduler, info={"config": asdict(run.config)})


def test_an_export_in_float32_of_a_16_bit_run_has_the_copies_that_adam_updates(tmp_path):
    pool.run(2, train_in_bf16, str(tmp_path / "run"))
    exact = material.read_tensors(export_checkpoint(tmp_path / "run", tmp_path / "fp32", dtype="fp32"))
    rounded = material.read_tensors(export_checkpoint(tmp_path / "run", tmp_path / "bf16"))
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}
    assert material.same_bits({n: t.bfloat16() for n, t in exact.items()}, rounded)
    finer = [n for n, t in exact.items() if not torch.equal(t, rounded[n].float())]
    assert {n.split(".")[0] for n in finer} == set(PARTS)
    assert not any("post_layernorm" in n for n in finer)


def test_a_model_that_never_was_a_folder_gets_every_configuration(tmp_path):
    """Random initial weights of our own: nothing is carried and there is no tokenizer."""
    pool.run(2, train_in_bf16, str(tmp_path / "run"))
    assert read_info(tmp_path / "run").get("hugging_face") is None
    out = export_checkpoint(tmp_path / "run", tmp_path / "out")
    root, llm = config_of(out), config_of(out, "llm")
    assert root["image_encoder"] == '{"_target_": "llava.model.encoders.BasicImageEncoder", "end_tokens": null}'
    assert (llm["rope_theta"], llm["rope_scaling"]["factor"], llm["max_position_embeddings"]) == (100.0, 2.0, 256)
    assert llm["model_max_length"] == llm["tokenizer_model_max_length"] == 256
    assert llm["head_dim"] == 4 and llm["hidden_act"] == "silu"
    assert (out / "llm/generation_config.json").is_file() and (out / "vision_tower/preprocessor_config.json").is_file()
    again = import_checkpoint(out, tmp_path / "again")
    assert material.same_bits(
        material.read_tensors(out), material.read_tensors(export_checkpoint(again, tmp_path / "out2"))
    )


def test_a_checkpoint_without_a_usable_configuration_is_refused_with_the_reason(tmp_path, imported):
    older = tmp_path / "older"
    shutil.copytree(imported, older)
    step = older / "checkpoints" / "step-00000000"
    content = read_info(older)
    seal_info(step, {key: value for key, value in content.items() if key != "config"})
    with pytest.raises(ConversionError, match="holds no configuration, because an older version wrote it; continue"):
        export_checkpoint(older, tmp_path / "out")
    content["config"]["model"]["recompute"] = "full"
    seal_info(step, content)
    with pytest.raises(ConversionError, match="no usable configuration: .*unknown key 'model.recompute'"):
        export_checkpoint(older, tmp_path / "out")
    assert not (tmp_path / "out").exists()
