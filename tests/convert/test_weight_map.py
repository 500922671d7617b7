"""The weight map: complete on both sides, right about Megatron's layout, and the sizes of published models."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vila.config.load import load_config
from megatron_vila.config.schema import ProjectorConfig
from megatron_vila.convert.tensor_files import TensorInfo, _bytes, _header
from megatron_vila.convert.transforms import COPY, FUSE_QKV, PAD_ROWS, STACK_ROWS
from megatron_vila.convert.weight_map import PROJECTOR, describe, entries, shapes
from megatron_vila.plan.sizes import PROJECTOR_TYPES, parameter_count
from tests import samples
from tests.convert import material
from tests.ranks import pool
from tests.training.small_run import build

DOCS = Path(__file__).parents[2] / "docs"


def small(tied: bool, bias: bool, head: bool, kind: str):
    model = samples.model_config(layers=2, tied=tied, bias=bias)
    model.vision = replace(model.vision, use_head=head)
    model.projector = ProjectorConfig(kind)
    return model


def saved_keys(rank, model_changes):
    run = build((1, 1, 1, 1), **model_changes)
    state = run.model.sharded_state_dict()
    from megatron_vila.checkpoint.save_load import _model_state, _tensors

    assert state
    return {tensor.key: tuple(tensor.global_shape) for tensor in _tensors(_model_state([run.model]))}


@pytest.mark.parametrize("kind", PROJECTOR_TYPES)
@pytest.mark.parametrize(("tied", "bias", "head"), [(True, True, False), (False, False, True)])
def test_every_tensor_of_the_model_is_in_the_map_and_nothing_else(kind, tied, bias, head):
    changes = {
        "tied": tied,
        "model__llm__qkv_bias": bias,
        "model__vision__use_head": head,
        "model__projector__type": kind,
    }
    (keys,) = pool.run(1, saved_keys, changes)
    assert {entry.key: entry.stored_shape for entry in entries(small(tied, bias, head, kind))} == keys


@pytest.mark.parametrize("family", material.FAMILIES)
def test_the_hugging_face_side_is_the_published_key_set(family, tmp_path):
    from megatron_vila.convert.hf_config import describe_model
    from megatron_vila.convert.hf_folder import open_folder

    problems = []
    folder = open_folder(material.write_vila(tmp_path / "vila", family), None, problems)
    model = describe_model(folder.sections, problems, has_head=folder.has_head).model
    assert not problems
    assert shapes(model) == {name: tuple(t.shape) for name, t in material.model_tensors(family).items()}


def test_no_name_occurs_twice():
    for kind in PROJECTOR:
        found = entries(small(False, True, True, kind))
        names = [name for entry in found for name in entry.tensors]
        places = [(entry.key, entry.layer) for entry in found]
        assert len(set(names)) == len(names) and len(set(places)) == len(places)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.sampled_from([(), (5,)]))
def test_fused_rows_follow_each_key_value_head_and_come_apart_again(groups, queries, size, rest):
    q, k, v = (
        torch.arange(groups * heads * size * max(1, *rest, 1)).view(groups * heads * size, *rest) + offset
        for heads, offset in ((queries, 0), (1, 10_000), (1, 20_000))
    )
    fused = FUSE_QKV.join([q, k, v], groups)
    assert tuple(fused.shape) == FUSE_QKV.shape([tuple(t.shape) for t in (q, k, v)])
    expected = []
    for group in range(groups):
        expected += [q[group * queries * size : (group + 1) * queries * size]]
        expected += [t[group * size : (group + 1) * size] for t in (k, v)]
    assert torch.equal(fused, torch.cat(expected))
    parts = FUSE_QKV.split(fused, [len(t) for t in (q, k, v)], groups)
    assert all(torch.equal(a, b) for a, b in zip(parts, (q, k, v), strict=True))


@given(st.integers(1, 200))
def test_the_table_is_padded_with_zeros_and_cut_again(rows):
    table = torch.arange(1, rows * 3 + 1).view(rows, 3)
    padded = PAD_ROWS.join([table], 1)
    assert len(padded) % 64 == 0 and len(padded) - rows < 64 and not padded[rows:].any()
    assert tuple(padded.shape) == PAD_ROWS.shape([(rows, 3)])
    assert torch.equal(PAD_ROWS.split(padded, [rows], 1)[0], table)


def test_gate_comes_before_up():
    gate, up = torch.zeros(4, 2), torch.ones(4, 2)
    assert torch.equal(STACK_ROWS.join([gate, up], 1), torch.cat([gate, up]))
    assert torch.equal(STACK_ROWS.split(torch.cat([gate, up]), [4, 4], 1)[1], up)
    assert COPY.join([up], 1) is up


def test_the_map_in_the_docs_is_the_one_of_the_code():
    assert describe() in (DOCS / "checkpoints.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# published sizes: parameters exactly, files in bfloat16 as the model pages show them


def part_sizes(name: str, *overrides: str) -> dict[str, tuple[int, int]]:
    """(parameters, bytes of the bfloat16 file) of each part."""
    found: dict[str, tuple[int, int]] = {}
    sizes = shapes(load_config(name, overrides).model)
    for part in ("llm", "vision_tower", "mm_projector"):
        own = {
            n.removeprefix(f"{part}."): TensorInfo(torch.bfloat16, s) for n, s in sizes.items() if n.startswith(part)
        }
        size = len(_header(own)) + sum(map(_bytes, own.values()))
        found[part] = (sum(torch.Size(info.shape).numel() for info in own.values()), size)
    return found


def megabytes(size: int) -> float:
    return round(size / 1e6, 1)


def test_llama_3_longvila_has_its_published_projector():
    parameters, size = part_sizes("models/llama3-longvila-8b")["mm_projector"]
    assert parameters == 35_668_992 and megabytes(size) == 71.3


def test_qwen2_longvila_1_5b_has_its_published_projector_file():
    assert megabytes(part_sizes("models/longvila-1.5b")["mm_projector"][1]) == 18.9


def test_nvila_lite_8b_has_its_published_projector():
    found = part_sizes("models/longvila-7b-256f", "model.projector.type=mlp_downsample_3x3_fix")["mm_projector"]
    assert found[0] == 61_101_440 and megabytes(found[1]) == 122.2


def test_nvila_8b_has_its_published_projector_file():
    """Its tower gives 3456 channels, three scales of 1152."""
    found = part_sizes("models/longvila-7b-256f", "model.vision.hidden_size=3456", "model.vision.num_heads=48")
    assert megabytes(found["mm_projector"][1]) == 124.9


@pytest.mark.parametrize(
    ("name", "parameters", "published"), [("384", 428_225_600, 856.5), ("448", 413_327_088, 826.7)]
)
def test_the_towers_have_their_published_files(name, parameters, published):
    found = part_sizes("models/longvila-7b" if name == "384" else "models/longvila-7b-256f")["vision_tower"]
    assert found[0] == parameters and megabytes(found[1]) == published


@pytest.mark.parametrize(
    ("name", "vocab", "parameters"),
    [
        ("models/qwen2-7b", 152_064, 7_615_616_512),
        ("models/qwen2-1.5b", 151_936, 1_543_714_304),
        ("models/llama3-8b", 128_256, 8_030_261_248),
    ],
)
def test_the_language_models_have_their_published_parameters(name, vocab, parameters):
    assert part_sizes(name, f"model.llm.vocab_size={vocab}")["llm"][0] == parameters


@pytest.mark.parametrize(
    "name", ["models/llama3-longvila-8b", "models/longvila-1.5b", "models/longvila-7b", "models/tiny"]
)
def test_the_map_counts_what_the_planner_counts(name):
    counted = parameter_count(load_config(name, []).model)
    mapped = part_sizes(name)
    assert [mapped[part][0] for part in ("llm", "vision_tower", "mm_projector")] == [
        counted[part] for part in ("llm", "vision", "projector")
    ]
