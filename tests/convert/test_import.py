"""What an import makes of a folder: separate parts, configurations, token order, separators, and what it leaves out."""

import json
import logging

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_vila.checkpoint.resume import kept_settings, settings_of
from megatron_vila.config.load import load_config
from megatron_vila.config.text_rules import TextRules
from megatron_vila.convert.exporter import export_checkpoint
from megatron_vila.convert.importer import import_checkpoint
from megatron_vila.convert.stored_model import StoredModel
from megatron_vila.convert.token_order import suggest_token_order
from megatron_vila.data.chat import ChatEncoder
from megatron_vila.data.tokenizer import load_tokenizer
from tests.convert import material
from tests.convert.test_bad_input import edit
from tests.data.material import byte_level_tokenizer, metaspace_tokenizer

LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 83,
    "max_position_embeddings": 4096,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def language_folder(folder, kind="qwen2", **changes):
    """A language model saved by transformers itself."""
    torch.manual_seed(1)
    settings = LANGUAGE | changes
    model = {
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**settings)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**settings)),
    }
    model[kind]().to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    return folder


def tower_folder(folder, whole=False):
    """A SigLIP tower saved by transformers itself, or a whole SigLIP model with its text side."""
    torch.manual_seed(2)
    if whole:
        text = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "vocab_size": 9,
        }
        model = SiglipModel(SiglipConfig(vision_config=TOWER, text_config=text))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**TOWER))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "tied"), [("qwen2", True), ("qwen2", False), ("llama", False)])
@pytest.mark.parametrize("whole", [False, True], ids=["tower", "whole_siglip"])
def test_stage_1_starts_from_a_plain_language_model_and_siglip_with_a_fresh_projector(tmp_path, kind, tied, whole):
    llm = language_folder(tmp_path / "llm", kind, tie_word_embeddings=tied)
    vision = tower_folder(tmp_path / "vision", whole)
    imported = import_checkpoint(llm, tmp_path / "out", vision=vision, projector="mlp_downsample_2x2_fix")
    out = export_checkpoint(imported, tmp_path / "exported")
    written = material.read_tensors(out)
    original = {f"llm.{n}": t for n, t in material.read_tensors(llm).items()}
    assert material.same_bits(original, {n: t for n, t in written.items() if n.startswith("llm.")})
    tower = {n: t for n, t in material.read_tensors(vision).items() if not n.startswith(("text_model.", "logit_"))}
    tower = {f"vision_tower.vision_model.{n.removeprefix('vision_model.')}": t for n, t in tower.items()}
    assert material.same_bits(tower, {n: t for n, t in written.items() if n.startswith("vision_tower.")})
    projector = {n: t for n, t in written.items() if n.startswith("mm_projector.")}
    assert set(projector) == {f"mm_projector.layers.{n}.{kind}" for n in (1, 2, 4) for kind in ("weight", "bias")}
    assert 0.01 < projector["mm_projector.layers.2.weight"].float().std() < 0.03
    assert not projector["mm_projector.layers.2.bias"].any()
    again = import_checkpoint(llm, tmp_path / "again", vision=vision, projector="mlp_downsample_2x2_fix")
    same = StoredModel(again)
    assert all(torch.equal(same.read(name), projector[name]) for name in projector)


def test_an_exported_language_model_and_tower_load_in_transformers_with_the_same_answers(tmp_path):
    llm = language_folder(tmp_path / "llm", rope_theta=1e6)
    vision = tower_folder(tmp_path / "vision")
    out = export_checkpoint(import_checkpoint(llm, tmp_path / "imported", vision=vision), tmp_path / "out")
    ids = torch.arange(9)[None]
    before, after = (Qwen2ForCausalLM.from_pretrained(folder) for folder in (llm, out / "llm"))
    assert torch.equal(before(ids).logits, after(ids).logits)
    pixels = torch.randn(1, 3, 28, 28, dtype=torch.bfloat16)
    before, after = (SiglipVisionModel.from_pretrained(folder) for folder in (vision, out / "vision_tower"))
    assert torch.equal(before(pixels).pooler_output, after(pixels).pooler_output)


def test_the_configuration_of_a_published_folder_is_taken_over(tmp_path):
    tokenizer = material.write_tokenizer(tmp_path / "tokenizer")
    source = material.write_vila(tmp_path / "source", "longvila-7b", tokenizer=tokenizer)
    edit(source / "config.json", fps=2.0, image_aspect_ratio="pad", mm_vision_select_layer=-3)
    config = load_config(str(import_checkpoint(source, tmp_path / "out") / "config.yaml"), [])
    llm, vision, data = config.model.llm, config.model.vision, config.data
    assert (llm.rope_theta, llm.rope_scaling_factor, llm.max_positions) == (1062356830.0, 4.0, 1048576)
    assert (llm.qkv_bias, llm.tie_embeddings, llm.head_dim, llm.norm_eps) == (True, False, None, 1e-6)
    assert (vision.select_layer, vision.use_head, vision.image_size) == (-3, True, 56)
    assert (data.num_frames, data.fps, data.image_aspect) == (256, 2.0, "pad")
    newline = [4]
    assert (data.frame_separator_ids, data.image_separator_ids) == (newline, newline)
    assert data.tokenizer == str(tmp_path / "out" / "tokenizer")
    # What a run that starts from these weights is compared with.
    config = load_config(str(tmp_path / "out" / "config.yaml"), [])
    state = torch.load(tmp_path / "out" / "checkpoints" / "step-00000000" / "state.pt", weights_only=True)
    kept, now = kept_settings(state["extra"]), settings_of(config)
    assert kept["tokenizer.separators"] and kept.items() <= now.items()
    assert sorted(p.name for p in (tmp_path / "out/tokenizer").iterdir()) == sorted(p.name for p in tokenizer.iterdir())


@pytest.mark.parametrize(
    ("written", "theta", "factor"),
    [
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6, 1.0),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}}, 1e6, 2.0),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 5e5, 8.0),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7.0, 1.0),
        (
            {
                "rope_theta": None,
                "rope_scaling": None,
                "rope_parameters": {"rope_theta": 7.0, "rope_type": "linear", "factor": 3.0},
            },
            7.0,
            3.0,
        ),
        ({"rope_theta": None, "rope_scaling": None}, 10000.0, 1.0),
    ],
)
def test_rotary_base_and_scaling_are_read_in_every_way_they_are_written(tmp_path, written, theta, factor):
    source = material.write_vila(tmp_path / "source", "longvila-7b")
    edit(source / "llm" / "config.json", **written)
    if written["rope_theta"] is None or written.get("rope_scaling", 0) is None:
        content = json.loads((source / "llm/config.json").read_text())
        for key in ("rope_theta", "rope_scaling"):
            if written.get(key, 0) is None:
                content.pop(key, None)
        (source / "llm/config.json").write_text(json.dumps(content))
    if "rope_scaling" not in written:
        edit(source / "llm/config.json", rope_scaling=None)
    llm = load_config(str(import_checkpoint(source, tmp_path / "out") / "config.yaml"), []).model.llm
    assert (llm.rope_theta, llm.rope_scaling_factor) == (theta, factor)


@pytest.mark.parametrize(
    ("root", "order"),
    [
        ({"transformers_version": "4.36.2"}, "legacy_column_major"),
        ({"transformers_version": "4.37.2", "mm_projector_type": "mlp_downsample"}, "legacy_column_major"),
        ({"transformers_version": "4.38.0"}, None),
        ({"transformers_version": "4.43.4"}, None),
        ({"transformers_version": "4.44.2"}, "row_major"),
        ({"transformers_version": "5.1.0"}, "row_major"),
        ({"transformers_version": "4.36.2", "mm_projector_type": "mlp_downsample_3x3_fix"}, "row_major"),
        ({"transformers_version": "4.36.2", "mm_projector_cfg": {"mm_projector_type": "linear"}}, "row_major"),
        ({"transformers_version": "4.36.2", "megatron_vila": {"projector_token_order": "row_major"}}, "row_major"),
        ({"model_type": "nvila_lite"}, "row_major"),
        ({"transformers_version": 4.4}, None),
        ({}, None),
    ],
)
def test_the_token_order_is_suggested_with_a_reason(root, order):
    suggested, reason = suggest_token_order(root)
    assert suggested == order and reason


def test_the_token_order_is_logged_stored_and_comes_back(tmp_path, caplog):
    source = material.write_vila(tmp_path / "source", "vila-1.5")
    with caplog.at_level(logging.INFO, "megatron_vila"):
        imported = import_checkpoint(source, tmp_path / "out")
    assert "projector token order: legacy_column_major (transformers 4.36.2 is of the time of VILA-1.5" in caplog.text
    assert load_config(str(imported / "config.yaml"), []).model.projector.token_order == "legacy_column_major"
    root = json.loads((export_checkpoint(imported, tmp_path / "exported") / "config.json").read_text())
    assert root["megatron_vila"]["projector_token_order"] == "legacy_column_major"
    # Other readers guess by the version: it must still tell the truth.
    del root["megatron_vila"]
    assert suggest_token_order(root)[0] == "legacy_column_major"
    given = import_checkpoint(source, tmp_path / "given", token_order="row_major")
    assert load_config(str(given / "config.yaml"), []).model.projector.token_order == "row_major"


def test_the_prompt_of_early_models_is_suggested_and_can_be_chosen(tmp_path, caplog):
    tokenizers = {"hermes-2": material.write_tokenizer(tmp_path / "own")}
    for name, tokenizer in (("llama_3", byte_level_tokenizer("llama3")), ("vicuna_v1", metaspace_tokenizer())):
        tokenizer.chat_template = None
        tokenizer.save_pretrained(tmp_path / name)
        tokenizers[name] = tmp_path / name
    for name, tokenizer in tokenizers.items():
        source = material.write_vila(tmp_path / f"source-{name}", "vila-1.5", tokenizer=tokenizer)
        with caplog.at_level(logging.INFO, "megatron_vila"):
            data = load_config(str(import_checkpoint(source, tmp_path / f"out-{name}") / "config.yaml"), []).data
        assert data.template == name and f"chat template: {name}" in caplog.text
        assert ChatEncoder(load_tokenizer(data.tokenizer), TextRules.of(data)).stops
    assert "has no chat template" not in caplog.text
    for template in ("", "llama_3"):
        chosen = import_checkpoint(source, tmp_path / f"chosen-{template}", template=template)
        assert load_config(str(chosen / "config.yaml"), []).data.template == template
    later = import_checkpoint(material.write_vila(tmp_path / "later", "longvila-7b"), tmp_path / "out-later")
    data = load_config(str(later / "config.yaml"), []).data
    assert TextRules.of(data) == TextRules(), "published files are VILA's"


@pytest.mark.parametrize(
    ("encoder", "ids"),
    [({}, [4]), ({"end_tokens": "\n"}, [4]), ({"end_tokens": None}, []), ({"end_tokens": "\n\n"}, [4, 4])],
)
def test_separators_are_what_the_encoders_write_as_token_ids(tmp_path, encoder, ids):
    source = material.write_vila(
        tmp_path / "source", "longvila-7b", tokenizer=material.write_tokenizer(tmp_path / "tokenizer")
    )
    name = "llava.model.encoders.Basic{}Encoder"
    edit(
        source / "config.json",
        image_encoder=json.dumps({"_target_": name.format("Image")} | encoder),
        video_encoder={"_target_": name.format("Video")} | encoder,
    )
    imported = import_checkpoint(source, tmp_path / "out")
    data = load_config(str(imported / "config.yaml"), []).data
    assert (data.frame_separator_ids, data.image_separator_ids) == (ids, ids)
    root = json.loads((export_checkpoint(imported, tmp_path / "exported") / "config.json").read_text())
    assert root["megatron_vila"]["frame_separator_ids"] == ids
    again = import_checkpoint(tmp_path / "exported", tmp_path / "again")
    assert load_config(str(again / "config.yaml"), []).data.frame_separator_ids == ids


def test_remote_code_of_a_folder_is_ignored_and_never_imported(tmp_path, caplog):
    source = material.write_vila(tmp_path / "source", "vila-1.5")
    edit(
        source / "config.json",
        model_type="vila",
        architectures=["VILAForCausalLM"],
        auto_map={"AutoModel": "modeling_vila.X"},
    )
    (source / "modeling_vila.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with caplog.at_level(logging.INFO, "megatron_vila"):
        imported = import_checkpoint(source, tmp_path / "out")
    assert "root configuration: the code that auto_map names is not used" in caplog.text
    assert "auto_map" not in json.loads(
        (export_checkpoint(imported, tmp_path / "exported") / "config.json").read_text()
    )
    assert not (tmp_path / "ran").exists()


def test_leftovers_of_old_files_are_left_out(tmp_path, caplog):
    source = material.write_vila(tmp_path / "source", "longvila-1.5b")
    tensors = material.model_tensors("longvila-1.5b")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "lm_head.weight": tensors["llm.model.embed_tokens.weight"].clone(),
    }
    material.write_weights(source / "llm" / "more", extra)
    (source / "llm/more/model.safetensors").rename(source / "llm" / "extra.safetensors")
    with caplog.at_level(logging.INFO, "megatron_vila"):
        imported = import_checkpoint(source, tmp_path / "out")
    assert (
        "left out: tensors that the model does not use (1): model.layers.0.self_attn.rotary_emb.inv_freq" in caplog.text
    )
    assert "left out: llm.lm_head.weight, which repeats the tied" in caplog.text
    assert material.same_bits(tensors, material.read_tensors(export_checkpoint(imported, tmp_path / "exported")))


def test_a_flat_state_dict_of_the_training_code_and_nvila_lite_are_read(tmp_path):
    """While it trains, VILA's own model has the tower one level deeper."""
    source = tmp_path / "source"
    tensors = material.model_tensors("nvila-lite")
    deeper = {n.replace("vision_tower.", "vision_tower.vision_tower.", 1): t for n, t in tensors.items()}
    material.write_flat(source, "nvila-lite")
    for file in source.glob("model*"):
        file.unlink()
    material.write_weights(source, deeper)
    edit(source / "config.json", model_type="nvila_lite", mm_projector_type=None, transformers_version=None)
    imported = import_checkpoint(source, tmp_path / "out")
    assert load_config(str(imported / "config.yaml"), []).model.projector.type == "mlp_downsample_3x3_fix"
    assert material.same_bits(tensors, material.read_tensors(export_checkpoint(imported, tmp_path / "exported")))


def test_a_picture_policy_that_is_unknown_here_is_told(tmp_path, caplog):
    source = material.write_vila(tmp_path / "source", "nvila-lite")
    edit(source / "config.json", image_aspect_ratio="dynamic", num_time_tokens=100)
    with caplog.at_level(logging.INFO, "megatron_vila"):
        imported = import_checkpoint(source, tmp_path / "out")
    assert "image_aspect_ratio='dynamic' is not supported: pictures" in caplog.text and "num_time_tokens=100" in caplog.text
    assert load_config(str(imported / "config.yaml"), []).data.image_aspect == "resize"
