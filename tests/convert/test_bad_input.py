"""What cannot be converted is refused with every reason at once, nothing of it is executed, and nothing is left behind."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.importer import import_checkpoint
from tests.convert import material


@pytest.fixture
def source(tmp_path):
    return material.write_vila(tmp_path / "source", "longvila-7b")


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refusal(source, out, **options) -> str:
    """The message of a refused import, after which no trace of the output is left."""
    with pytest.raises(ConversionError) as error:
        import_checkpoint(source, out, **options)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    return str(error.value)


def test_missing_extra_and_misshapen_tensors_are_listed_at_once_with_their_places(source, tmp_path):
    llm = material.read_tensors(source / "llm")
    for file in (source / "llm").glob("model*"):
        file.unlink()
    del llm["model.layers.2.self_attn.k_proj.weight"]
    llm["model.layers.1.mlp.down_proj.weight"] = torch.zeros(48, 32)
    llm["model.layers.9.mlp.down_proj.weight"] = torch.zeros(3)
    llm["model.embed_tokens.weight"] = torch.zeros(80, 32)
    material.write_weights(source / "llm", llm)
    (source / "mm_projector" / "model.safetensors").unlink()
    material.write_weights(source / "mm_projector", {"layers.1.weight": torch.zeros(64)})
    text = refusal(source, tmp_path / "out")
    assert "9 problems" in text
    assert (
        "llm.model.layers.2.self_attn.k_proj.weight is missing; it should be [16, 32] and go into "
        "llm.decoder.layers.self_attention.linear_qkv.weight[2]" in text
    )
    assert "llm.model.layers.1.mlp.down_proj.weight is [48, 32]; it should be [32, 48]" in text
    assert "llm.model.embed_tokens.weight is [80, 32]; it should be [83, 32]" in text
    assert "llm.model.layers.9.mlp.down_proj.weight [3] belongs to no part of this model" in text
    assert text.count("mm_projector.layers.") == 5 * 1 and text.count("go into projector.layers.") == 5


def test_truncated_files_are_named(source, tmp_path):
    file = source / "vision_tower" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    other = source / "llm" / "model-00002-of-00002.safetensors"
    other.write_bytes(other.read_bytes()[:20])
    text = refusal(source, tmp_path / "out")
    assert f"{file} is truncated or damaged" in text and f"{other} is truncated or damaged" in text


def test_a_file_that_the_index_names_is_missed(source, tmp_path):
    (source / "llm" / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names" in refusal(
        source, tmp_path / "out"
    )


def test_an_index_of_other_files_is_noticed(source, tmp_path):
    index = source / "llm" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    content["weight_map"]["model.gone.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    assert "names files that do not hold these tensors: " in refusal(source, tmp_path / "out")
    index.write_text("[]")
    assert "is not an index of safetensors files" in refusal(source, tmp_path / "out")


def test_the_same_tensor_in_two_files_is_refused(source, tmp_path):
    material.write_weights(source / "mm_projector" / "more", {"layers.1.weight": torch.zeros(64)})
    (source / "mm_projector/more/model.safetensors").rename(source / "mm_projector" / "other.safetensors")
    assert "layers.1.weight is in model.safetensors and in other.safetensors" in refusal(source, tmp_path / "out")


def test_weights_of_a_strange_element_type_are_refused(source, tmp_path):
    material.write_weights(source / "mm_projector", {"layers.1.weight": torch.zeros(64, dtype=torch.int8)})
    assert "has elements of type I8; save weights as F64, F32, F16, BF16" in refusal(source, tmp_path / "out")


class Attack:
    def __reduce__(self):
        return (os.mkdir, (os.environ["ATTACK_FOLDER"],))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "mm_projector.pt"])
def test_pickled_weights_are_refused_and_not_run(source, tmp_path, monkeypatch, name):
    proof = tmp_path / "attacked"
    monkeypatch.setenv("ATTACK_FOLDER", str(proof))
    (source / "mm_projector" / "model.safetensors").unlink()
    (source / "mm_projector" / name).write_bytes(pickle.dumps(Attack()))
    text = refusal(source, tmp_path / "out")
    assert f"holds pickled weights only ({name}); they are refused" in text
    assert not proof.exists()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "config.json",
            {"model_type": "llava_mistral"},
            "model_type='llava_mistral' is not known; use a whole model of type llava_llama",
        ),
        ("config.json", {"model_type": "nvila"}, "joins features of several scales"),
        (
            "llm/config.json",
            {"model_type": "mistral"},
            "language model: model_type='mistral' is not known; use a language model of type llama or qwen2",
        ),
        (
            "vision_tower/config.json",
            {"model_type": "clip_vision_model"},
            "model_type='clip_vision_model' is not known",
        ),
        (
            "mm_projector/config.json",
            {"mm_projector_type": "mlp_downsample_fix"},
            "model.projector.type=mlp_downsample_fix is not known",
        ),
        ("config.json", {"dynamic_s2": True}, "dynamic_s2=True .features of several scales. is not supported"),
        ("config.json", {"s2": True}, "s2=True"),
        ("config.json", {"ps3": True}, "ps3=True"),
        ("config.json", {"mm_hidden_size": 48}, "mm_hidden_size=48 .*is not supported, only 16 is"),
        (
            "config.json",
            {"mm_vision_select_feature": "patch"},
            "mm_vision_select_feature='patch' .*only 'cls_patch' is",
        ),
        ("config.json", {"vision_resolution": 448}, "vision_resolution=448"),
        (
            "config.json",
            {"mm_vision_select_layer": "last"},
            "mm_vision_select_layer is 'last', but must be a whole number",
        ),
        ("config.json", {"mm_vision_select_layer": -9}, "select_layer=-9 is outside"),
        (
            "config.json",
            {"image_encoder": {"_target_": "os.system"}},
            "image_encoder asks for 'os.system' to be run, which is refused",
        ),
        (
            "config.json",
            {"video_encoder": '{"_target_": "llava.model.encoders.TSPVideoEncoder"}'},
            "video_encoder asks for 'llava.model.encoders.TSPVideoEncoder'",
        ),
        ("config.json", {"chat": [{"deep": {"_target_": "x.Y"}}]}, "chat.deep asks for 'x.Y'"),
        ("llm/config.json", {"quantization": {"_target_": "x.Z"}}, "llm: quantization asks for 'x.Z'"),
        (
            "config.json",
            {"video_encoder": {"start_tokens": "<v>"}},
            "video_encoder.start_tokens='<v>': text before a picture is not supported",
        ),
        (
            "config.json",
            {"megatron_vila": {"format": 3}},
            "megatron_vila.format=3 is not known, only 1 and 2; update megatron_vila",
        ),
        (
            "config.json",
            {"megatron_vila": {"projector_token_order": "spiral"}},
            "model.projector.token_order=spiral is not known",
        ),
        (
            "llm/config.json",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling of type 'yarn' is not known",
        ),
        (
            "llm/config.json",
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling: factor is missing, but must be a number",
        ),
        ("llm/config.json", {"rope_scaling": 4}, "rope_scaling=4 is not an object"),
        ("llm/config.json", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("llm/config.json", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llm/config.json", {"hidden_size": None}, "hidden_size is missing, but must be a whole number"),
        ("llm/config.json", {"hidden_size": "big"}, "hidden_size is 'big', but must be a whole number"),
        ("llm/config.json", {"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ("llm/config.json", {"num_key_value_heads": 3}, "num_kv_heads=3 does not divide"),
        ("vision_tower/config.json", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        ("vision_tower/config.json", {"patch_size": 99}, "patch_size=99 is larger than"),
    ],
)
def test_a_configuration_that_this_model_cannot_be_is_refused_by_name(source, tmp_path, file, change, message):
    edit(source / file, **change)
    text = refusal(source, tmp_path / "out")
    assert re.search(message, text), text


def test_all_problems_of_all_files_are_told_together(source, tmp_path):
    edit(source / "config.json", model_type="other", s2=True, image_encoder={"_target_": "a.B"})
    edit(source / "llm" / "config.json", model_type="gpt2")
    edit(source / "mm_projector" / "config.json", mm_projector_type="magic")
    (source / "vision_tower" / "config.json").write_text("{")
    (source / "llm" / "model-00001-of-00002.safetensors").unlink()
    text = refusal(source, tmp_path / "out", vision=source / "vision_tower")
    for part in (
        "'other'",
        "s2=True",
        "a.B",
        "'gpt2'",
        "model.projector.type=magic",
        "cannot be read as JSON",
        "lacks model-00001",
        "--vision",
    ):
        assert part in text, part


def test_folders_that_are_no_model_are_told_apart(tmp_path):
    assert "is not a folder" in refusal(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "holds no *.safetensors file" in refusal(tmp_path / "empty", tmp_path / "out")
    material.write_weights(tmp_path / "strange", {"transformer.h.0.weight": torch.zeros(2)})
    text = refusal(tmp_path / "strange", tmp_path / "out")
    assert "none of the known layouts" in text and "transformer.h.0.weight" in text


def test_a_folder_layout_with_a_part_missing_is_told_so(source, tmp_path):
    (source / "mm_projector").rename(tmp_path / "elsewhere")
    assert "and mm_projector_cfg=" not in refusal(source, tmp_path / "out")
    edit(source / "config.json", mm_projector_cfg="Some/hub-model")
    assert "there is no mm_projector/, and mm_projector_cfg='Some/hub-model' is not a local folder" in refusal(
        source, tmp_path / "out"
    )
    edit(source / "config.json", mm_projector_cfg=str(tmp_path / "elsewhere"))
    import_checkpoint(source, tmp_path / "out")


def test_an_ambiguous_token_order_is_asked_for(source, tmp_path):
    for version in ("4.40.0", None, "unknown"):
        edit(source / "config.json", transformers_version=version)
        text = refusal(source, tmp_path / "out")
        assert "the token order of mlp_downsample is not recorded" in text
        assert "legacy_column_major for VILA-1.5" in text and "--token-order" in text
    import_checkpoint(source, tmp_path / "out", token_order="legacy_column_major")


def test_a_token_order_that_the_projector_never_had_is_refused(tmp_path):
    source = material.write_vila(tmp_path / "source", "nvila-lite")
    text = refusal(source, tmp_path / "out", token_order="legacy_column_major")
    assert "token_order=legacy_column_major belongs to model.projector.type=mlp_downsample, not to mlp_downsample_3x3" in text


def test_a_language_model_alone_needs_a_tower_and_a_whole_model_no_projector(source, tmp_path):
    assert "name the folder of its SigLIP vision tower with --vision" in refusal(source / "llm", tmp_path / "out")
    text = refusal(source / "llm", tmp_path / "out", vision=tmp_path / "nowhere", projector="magic")
    assert "--vision" in text and "is not a folder" in text and "model.projector.type=magic" in text
    assert "leave out --projector" in refusal(source, tmp_path / "out", projector="linear")


def test_a_tied_model_whose_output_layer_differs_from_its_table_is_refused(tmp_path):
    source = material.write_vila(tmp_path / "source", "longvila-1.5b")
    extra = {"lm_head.weight": torch.zeros(material.VOCAB, 32, dtype=torch.bfloat16)}
    material.write_weights(source / "llm" / "more", extra)
    (source / "llm/more/model.safetensors").rename(source / "llm" / "extra.safetensors")
    assert "llm.lm_head.weight differs from llm.model.embed_tokens.weight" in refusal(source, tmp_path / "out")
