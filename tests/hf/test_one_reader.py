"""Imports and the classes for transformers accept and refuse the same configurations, with the same words."""

import json
import re
import shutil
from dataclasses import asdict

import pytest
import torch

from megatron_vila.config.load import load_config
from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.importer import import_checkpoint
from megatron_vila.hf import VilaConfig, VilaConfigError
from tests.convert import material
from tests.convert.test_bad_input import edit

ROOT, LLM, TOWER, PROJECTOR = "config.json", "llm/config.json", "vision_tower/config.json", "mm_projector/config.json"
TSP = "llava.model.encoders.TSPVideoEncoder"
BASIC = "llava.model.encoders.BasicVideoEncoder"

REFUSED = [
    (ROOT, {"model_type": "nvila"}, "model_type='nvila' joins features of several scales"),
    (ROOT, {"model_type": "llava_mistral"}, "model_type='llava_mistral' is not known; use a whole model of type"),
    (ROOT, {"vision_resolution": 896}, "vision_resolution=896 .* only -1 is"),
    (ROOT, {"mm_hidden_size": 48}, "mm_hidden_size=48 .* only 16 is"),
    (ROOT, {"mm_vision_select_feature": "patch"}, "mm_vision_select_feature='patch' .* write 'cls_patch'"),
    (ROOT, {"mm_vision_select_layer": "last"}, "mm_vision_select_layer is 'last', but must be a whole number"),
    (ROOT, {"mm_vision_select_layer": -9}, "select_layer=-9 is outside"),
    (ROOT, {"dynamic_s2": True}, "dynamic_s2=True"),
    (ROOT, {"ps3": True}, "ps3=True"),
    (ROOT, {"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
    (ROOT, {"video_encoder": TSP}, f"video_encoder asks for '{TSP}' to be run"),
    (ROOT, {"video_encoder": {"_target_": TSP}}, f"video_encoder asks for '{TSP}' to be run"),
    (ROOT, {"video_encoder": json.dumps({"_target_": TSP})}, f"video_encoder asks for '{TSP}' to be run"),
    (ROOT, {"video_encoder": {"_target_": "elsewhere.BasicVideoEncoder"}}, "asks for 'elsewhere.BasicVideoEncoder'"),
    (ROOT, {"video_encoder": '{"_target_": '}, "video_encoder asks for '{\"_target_\": ' to be run"),
    (ROOT, {"video_encoder": 3}, "video_encoder=3 describes no encoder"),
    (ROOT, {"video_encoder": {"end_tokens": 3}}, "video_encoder.end_tokens=3 is not a text"),
    (ROOT, {"image_encoder": {"start_tokens": "<v>"}}, "image_encoder.start_tokens='<v>'"),
    (ROOT, {"chat": [{"deep": {"_target_": "os.system"}}]}, "chat.deep asks for 'os.system' to be run"),
    (LLM, {"quantization": {"_target_": "x.Z"}}, "llm: quantization asks for 'x.Z'"),
    (ROOT, {"num_video_frames": "many"}, "num_video_frames is 'many', but must be a whole number"),
    (ROOT, {"num_video_frames": 0}, "num_video_frames=0 must be at least 1"),
    (ROOT, {"fps": -1}, "data.fps=-1.0 must be at least 0"),
    (ROOT, {"model_dtype": "torch.int8"}, "the dtype 'torch.int8' of the model is not known; use bfloat16"),
    (ROOT, {"transformers_version": "4.40.0"}, "the token order of mlp_downsample is not recorded"),
    (ROOT, {"megatron_vila": 3}, "megatron_vila=3 is not an object"),
    (ROOT, {"megatron_vila": {"format": 3}}, "megatron_vila.format=3 is not known, only 1 and 2"),
    (ROOT, {"megatron_vila": {"projector_token_order": "spiral"}}, "token_order=spiral is not known; choose one of"),
    (ROOT, {"megatron_vila": {"media_format": "mixed"}}, "media_format=mixed is not known; choose one of"),
    (ROOT, {"megatron_vila": {"template": "mistral"}}, "template=mistral is not known; choose one of"),
    (ROOT, {"megatron_vila": {"template_clock": "noon"}}, "template_clock=noon is no date"),
    (ROOT, {"megatron_vila": {"parse_control_tokens": "no"}}, "parse_control_tokens is 'no', but must be true or false"),
    (ROOT, {"megatron_vila": {"fps_rule": "middle"}}, "fps_rule=middle is not known; choose one of"),
    (ROOT, {"megatron_vila": {"frame_separator_ids": "4"}}, "frame_separator_ids='4' is not a list of token ids"),
    (ROOT, {"megatron_vila": {"frame_separator_ids": [99]}}, "frame_separator_ids has the ids \\[99\\] outside"),
    (PROJECTOR, {"mm_projector_type": "mlp_downsample_fix"}, "type=mlp_downsample_fix is not known; choose one of"),
    (
        PROJECTOR,
        {"mm_projector_type": "linear", "order": "legacy_column_major"},
        "token_order=legacy_column_major belongs to model.projector.type=mlp_downsample, not to linear",
    ),
    (LLM, {"model_type": "mixtral"}, "model_type='mixtral' is not known; use a language model of type llama or qwen2"),
    (LLM, {"use_sliding_window": True}, "use_sliding_window=True is not supported, only False is"),
    (LLM, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn' is not known"),
    (LLM, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    (LLM, {"hidden_size": "big"}, "hidden_size is 'big', but must be a whole number"),
    (LLM, {"max_position_embeddings": None}, "max_position_embeddings is missing, but must be a whole number"),
    (LLM, {"num_key_value_heads": 3}, "num_kv_heads=3 does not divide"),
    (TOWER, {"model_type": "intern_vit_6b"}, "model_type='intern_vit_6b' is not known; use a tower of type"),
    (TOWER, {"model_type": "siglip"}, "model_type='siglip' is not known"),
    (TOWER, {"num_channels": 4}, "num_channels=4"),
    (TOWER, {"patch_size": [14, 14]}, "patch_size is \\[14, 14\\], but must be a whole number"),
    (TOWER, {"vision_use_head": "yes"}, "vision_use_head is 'yes', but must be true or false"),
]

ACCEPTED = [
    (ROOT, {}),
    (ROOT, {"model_type": "nvila_lite"}),
    # The table of a tower that was resized so is of this size already.
    (ROOT, {"vision_resolution": 56}),
    (ROOT, {"vision_resolution": None, "mm_hidden_size": None, "fps": None}),
    (ROOT, {"num_time_tokens": 100, "image_aspect_ratio": "dynamic"}),
    (ROOT, {"video_encoder": BASIC, "image_encoder": None}),
    (ROOT, {"video_encoder": {"_target_": BASIC, "end_tokens": None}}),
    (ROOT, {"image_aspect_ratio": "pad", "mm_vision_select_layer": -3, "num_video_frames": 5, "fps": 2}),
    (ROOT, {"megatron_vila": {"format": 1, "frame_separator_ids": [4], "fps_rule": "first", "num_frames": 3}}),
    (ROOT, {"megatron_vila": {"frame_separator_ids": None, "template": None, "template_clock": "2025-01-01"}}),
    (ROOT, {"model_dtype": None, "auto_map": {"AutoModel": "modeling_vila.X"}}),
    (LLM, {"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_theta": 5}),
    (LLM, {"rope_scaling": None, "rope_theta": None, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}),
    (LLM, {"num_attention_heads": 2, "num_key_value_heads": None, "head_dim": None}),
    (LLM, {"rms_norm_eps": None, "tie_word_embeddings": None, "hidden_act": None}),
    (TOWER, {"layer_norm_eps": 1e-5, "model_type": None}),
]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return material.write_vila(tmp_path_factory.mktemp("published") / "model", "longvila-7b")


def changed(published, tmp_path, file, change):
    folder = shutil.copytree(published, tmp_path / "model")
    if "order" in change:
        edit(folder / ROOT, megatron_vila={"projector_token_order": change.pop("order")})
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | change))
    return folder


@pytest.mark.parametrize(("file", "change", "message"), REFUSED)
def test_what_is_refused_is_refused_by_both_with_the_same_words(published, tmp_path, file, change, message):
    folder = changed(published, tmp_path, file, dict(change))
    with pytest.raises(ConversionError) as at_an_import:
        import_checkpoint(folder, tmp_path / "out")
    with pytest.raises(VilaConfigError) as in_transformers:
        VilaConfig.from_pretrained(folder)
    assert at_an_import.value.problems == in_transformers.value.problems
    assert re.search(message, "\n".join(at_an_import.value.problems)), at_an_import.value


@pytest.mark.parametrize(("file", "change"), ACCEPTED)
def test_what_is_accepted_means_the_same_to_both(published, tmp_path, file, change):
    folder = changed(published, tmp_path, file, change)
    if change.keys() & {"num_attention_heads"}:
        # The tensors of a model with other heads.
        llm = json.loads((folder / LLM).read_text()) | {"num_key_value_heads": 2}
        for path in (folder / "llm").glob("model*"):
            path.unlink()
        shapes = material.language_tensors(llm)
        material.write_weights(folder / "llm", material.random_tensors(shapes, torch.bfloat16, 1))
    imported = load_config(str(import_checkpoint(folder, tmp_path / "out") / "config.yaml"), [])
    config = VilaConfig.from_pretrained(folder)
    assert asdict(config.model_settings) | {"name": ""} == asdict(imported.model) | {"name": ""}
    for key in ("num_frames", "fps", "fps_rule", "image_aspect", "media_format", "template_clock", "parse_control_tokens"):
        assert config.megatron_vila[key] == getattr(imported.data, key), key
    # And it means that after a round trip through transformers' own files.
    config.save_pretrained(tmp_path / "saved")
    again = VilaConfig.from_pretrained(tmp_path / "saved")
    assert asdict(again.model_settings) == asdict(config.model_settings) and again.megatron_vila == config.megatron_vila
    assert again.to_json_string() == config.to_json_string()


def test_a_configuration_made_in_python_is_judged_by_the_same_rules():
    with pytest.raises(VilaConfigError, match="mlp_downsample_fix is not known"):
        VilaConfig(mm_projector_type="mlp_downsample_fix")
    with pytest.raises(VilaConfigError, match="language model: rope_scaling of type 'yarn' is not known"):
        VilaConfig(text_config={"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 2.0}})
    assert VilaConfig().model_settings.vision.image_size == 224
