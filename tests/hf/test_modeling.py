"""An exported model in transformers: the same logits, features and greedy tokens as the Megatron model, in both layouts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from megatron_vila.hf import VILAForConditionalGeneration, VILAModel
from megatron_vila.plan.row import MEDIA_TOKEN
from tests.data.material import write_video
from tests.hf.megatron_side import Prompt, answer, config, export
from tests.ranks import pool

KINDS = [
    ("mlp_downsample", "row_major"),
    ("mlp_downsample", "legacy_column_major"),
    ("mlp_downsample_2x2_fix", "row_major"),
    ("mlp_downsample_3x3_fix", "row_major"),
    ("linear", "row_major"),
    ("mlp2x_gelu", "row_major"),
]
PATCHES = {384: 27, 448: 32, 56: 4}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Pictures and videos of different shapes."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for name, size in (("wide.png", (90, 40)), ("tall.png", (30, 70))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    write_video(folder / "long.mp4", 20)
    write_video(folder / "short.mp4", 2)
    return folder


def conversations(media):
    """Text alone, one image, several images, a video, images and videos together."""

    def ask(*parts):
        shown = [{"type": "video" if p.endswith("mp4") else "image", "path": str(media / p)} for p in parts]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": "What is shown?"}]}]

    return [
        ask(),
        ask("wide.png"),
        ask("wide.png", "tall.png", "wide.png"),
        ask("long.mp4"),
        ask("short.mp4", "tall.png", "long.mp4"),
    ]


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs), AutoProcessor.from_pretrained(folder)


def prompt_of(inputs, processor):
    """The inputs of one prompt in the terms of training."""
    token_ids = inputs["input_ids"][0].numpy().copy()
    token_ids[np.isin(token_ids, [processor.image_token_id, processor.video_token_id])] = MEDIA_TOKEN
    none = torch.zeros(0, 3, processor.image_size, processor.image_size)
    return Prompt(token_ids, inputs.get("pixel_values", none).numpy())


def inputs_of(processor, conversation):
    return processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)


def largest_difference(a, b):
    assert a.shape == b.shape
    return float(np.abs(a - b).max(initial=0))


@pytest.mark.parametrize("image_size", [384, 448])
@pytest.mark.parametrize(("projector", "order"), KINDS)
def test_logits_and_features_equal_those_of_the_megatron_model(media, tmp_path, image_size, projector, order):
    settings = config(tmp_path, image_size, projector, order)
    pool.run(1, export, settings, tmp_path, ("vila",))
    model, processor = load(tmp_path / "vila")
    assert model.model.vision_tower.num_patches == PATCHES[image_size] ** 2
    batches = [inputs_of(processor, one) for one in conversations(media)[1::3]]
    wanted = pool.run(1, answer, settings, [prompt_of(b, processor) for b in batches], 0)[0]
    with torch.no_grad():
        for inputs, truth in zip(batches, wanted, strict=True):
            features = model.get_image_features(inputs["pixel_values"]).pooler_output.numpy()
            assert largest_difference(features, truth.features) < 1e-5
            logits = model(**inputs).logits[0].numpy()
            assert largest_difference(logits, truth.logits) < 1e-5
            assert truth.logits.std() > 0.1


def test_the_token_order_matters_to_the_logits(media, tmp_path):
    found = []
    for order in ("row_major", "legacy_column_major"):
        folder = tmp_path / order
        settings = config(folder, 56, order=order)
        pool.run(1, export, settings, folder, ("vila",))
        model, processor = load(folder / "vila")
        with torch.no_grad():
            found.append(model(**inputs_of(processor, conversations(media)[1])).logits.numpy())
    assert largest_difference(*found) > 1e-3


SHAPES = pytest.mark.parametrize(("tied", "bias"), [(False, True), (True, True), (True, False)])


@SHAPES
def test_both_layouts_give_the_logits_of_every_kind_of_prompt(media, tmp_path, tied, bias):
    settings = config(tmp_path, tied=tied, bias=bias)
    pool.run(1, export, settings, tmp_path, ("vila", "flat"))
    models = [load(tmp_path / layout) for layout in ("vila", "flat")]
    batches = [inputs_of(models[0][1], one) for one in conversations(media)]
    wanted = pool.run(1, answer, settings, [prompt_of(b, models[0][1]) for b in batches], 0)[0]
    for model, processor in models:
        for conversation, truth in zip(conversations(media), wanted, strict=True):
            with torch.no_grad():
                logits = model(**inputs_of(processor, conversation)).logits[0].numpy()
            assert largest_difference(logits, truth.logits) < 1e-5


@SHAPES
def test_greedy_generation_writes_the_tokens_of_the_megatron_model(media, tmp_path, tied, bias):
    settings = config(tmp_path, tied=tied, bias=bias, init_std=0.6)
    pool.run(1, export, settings, tmp_path, ("vila",))
    model, processor = load(tmp_path / "vila")
    batches = [inputs_of(processor, one) for one in conversations(media)]
    wanted = pool.run(1, answer, settings, [prompt_of(b, processor) for b in batches], 12)[0]
    for inputs, truth in zip(batches, wanted, strict=True):
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert tokens[0, inputs["input_ids"].shape[1] :].tolist() == truth.tokens
    assert len({token for truth in wanted for token in truth.tokens}) > 5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a small model in both layouts."""
    folder = tmp_path_factory.mktemp("exported")
    pool.run(1, export, config(folder, tied=True), folder, ("vila", "flat"))
    return folder


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
@pytest.mark.parametrize("layout", ["vila", "flat"])
def test_every_auto_class_loads_every_layout_with_all_weights(exported, layout, auto):
    model, info = auto.from_pretrained(exported / layout, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not model.training and model.name_or_path == str(exported / layout)
    if auto is AutoModel:
        assert type(model) is VILAModel
    else:
        assert type(model) is VILAForConditionalGeneration and type(model.base_model) is VILAModel
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("layout", ["vila", "flat"])
def test_the_base_model_gives_the_hidden_states_of_which_the_logits_are_made(exported, media, layout):
    model, processor = load(exported / layout)
    base = AutoModel.from_pretrained(exported / layout)
    inputs = inputs_of(processor, conversations(media)[4])
    with torch.no_grad():
        hidden = base(**inputs).last_hidden_state
        assert torch.equal(hidden, model.base_model(**inputs).last_hidden_state)
        assert torch.equal(model.lm_head(hidden), model(**inputs).logits)


def test_a_saved_model_has_the_names_and_values_of_the_exported_files(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported / "flat").save_pretrained(tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, exported / "flat"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("layout", ["vila", "flat"])
def test_what_is_saved_again_is_the_flat_layout_with_the_same_weights(exported, media, tmp_path, layout):
    model, processor = load(exported / layout)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vila"
    again, its_processor = load(tmp_path)
    weights, reloaded = model.state_dict(), again.state_dict()
    assert weights.keys() == reloaded.keys()
    assert all(torch.equal(weights[name], reloaded[name]) for name in weights)
    assert again.config.megatron_vila == model.config.megatron_vila
    ours, theirs = (inputs_of(p, conversations(media)[4]) for p in (processor, its_processor))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("layout", ["vila", "flat"])
def test_sharded_files_and_other_dtypes_load(exported, tmp_path, layout):
    model, _ = load(exported / layout, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 == model.config.dtype
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    half = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="float64", attn_implementation="eager")
    assert half.dtype == torch.float64 and half.model.language_model.config._attn_implementation == "eager"
    assert all(
        torch.equal(a, b.double().to(a.dtype)) for a, b in zip(again.parameters(), half.parameters(), strict=True)
    )


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"vision_tower": "cpu", "mm_projector": "cpu", "llm": "cpu"}])
def test_a_device_map_places_every_weight(exported, device_map):
    pytest.importorskip("accelerate", reason="transformers wants accelerate for device_map")
    model = AutoModelForCausalLM.from_pretrained(exported / "vila", device_map=device_map, dtype="bfloat16")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.bfloat16)}


@pytest.mark.parametrize("layout", ["vila", "flat"])
def test_parts_that_are_left_on_the_disk_give_the_same_answer(exported, media, tmp_path, layout):
    pytest.importorskip("accelerate", reason="transformers wants accelerate for device_map")
    model, processor = load(exported / layout)
    inputs = inputs_of(processor, conversations(media)[4])
    away = AutoModelForCausalLM.from_pretrained(exported / layout, device_map={"": "disk"}, offload_folder=tmp_path)
    assert {parameter.device.type for parameter in away.parameters()} == {"meta"}
    with torch.no_grad():
        assert torch.equal(away(**inputs).logits, model(**inputs).logits)


def test_a_base_model_that_is_saved_alone_loads_again_and_gets_a_new_output_layer(tmp_path):
    pool.run(1, export, config(tmp_path), tmp_path, ("flat",))
    AutoModel.from_pretrained(tmp_path / "flat").save_pretrained(tmp_path / "base")
    assert not any("lm_head" in name for name in load_file(tmp_path / "base" / "model.safetensors"))
    base, whole = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("base", "flat"))
    assert all(torch.equal(base[name], whole[name]) for name in whole)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
