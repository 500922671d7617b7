"""``verify`` tells equal from different, between folders and checkpoints of any layout."""

import json

import pytest
import torch

from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.exporter import export_checkpoint
from megatron_vila.convert.importer import import_checkpoint
from megatron_vila.convert.verify import verify
from tests.convert import material
from tests.convert.test_bad_input import edit


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """The same model in every form."""
    folder = tmp_path_factory.mktemp("four")
    source = material.write_vila(folder / "source", "longvila-7b")
    imported = import_checkpoint(source, folder / "imported")
    return [
        source,
        imported,
        export_checkpoint(imported, folder / "flat", layout="flat"),
        imported / "checkpoints/step-00000000",
    ]


def test_all_forms_of_a_model_are_equal(four):
    for a in four:
        report = verify(four[0], a)
        assert report.equal, report
        assert "121 tensors, 57,376 parameters compared bit by bit" in str(report)


def changed(tmp_path, **tensors):
    """Another folder of the same model with tensors of its projector replaced or (None) removed."""
    folder = material.write_vila(tmp_path / "changed", "longvila-7b")
    own = material.read_tensors(folder / "mm_projector") | {n.replace("__", "."): t for n, t in tensors.items()}
    material.write_weights(folder / "mm_projector", {n: t for n, t in own.items() if t is not None})
    return folder


def test_one_changed_bit_is_found_and_measured(tmp_path, four):
    bias = material.model_tensors("longvila-7b")["mm_projector.layers.4.bias"].clone()
    bias.view(torch.int16)[5] ^= 1
    other = changed(tmp_path, **{"layers__4__bias": bias})
    for a, b in ((four[1], other), (other, four[2])):
        report = verify(a, b)
        assert not report.equal
        (line,) = report.differences
        assert line.startswith("mm_projector.layers.4.bias: 1 of 32 elements differ, by up to ")


def test_signed_zeros_are_different_bits(tmp_path, four):
    one = changed(tmp_path / "1", **{"layers__4__bias": torch.zeros(32)})
    two = changed(tmp_path / "2", **{"layers__4__bias": -torch.zeros(32)})
    assert verify(one, two).differences == ["mm_projector.layers.4.bias: 0 of 32 elements differ, by up to 0"]


def test_another_element_type_is_a_difference_that_says_how_much_it_matters(tmp_path, four):
    bias = material.model_tensors("longvila-7b")["mm_projector.layers.4.bias"]
    report = verify(four[0], changed(tmp_path, **{"layers__4__bias": bias.float()}))
    assert report.differences == [
        "mm_projector.layers.4.bias: bfloat16 in A, float32 in B; 0 of 32 elements differ, by up to 0"
    ]


def test_tensors_of_one_side_and_other_shapes_are_named(tmp_path, four):
    report = verify(
        four[1],
        changed(
            tmp_path, **{"layers__4__bias": None, "layers__9__bias": torch.zeros(2), "layers__1__bias": torch.zeros(3)}
        ),
    )
    assert report.differences == [
        "only in A, 1 in number: mm_projector.layers.4.bias",
        "only in B, 1 in number: mm_projector.layers.9.bias",
        "mm_projector.layers.1.bias: shape [64] in A, [3] in B",
    ]


def test_model_settings_that_no_tensor_shows_are_compared(tmp_path, four):
    other = material.write_vila(tmp_path / "other", "longvila-7b")
    edit(other / "llm" / "config.json", rope_theta=5.0)
    edit(other / "config.json", megatron_vila={"projector_token_order": "legacy_column_major"})
    assert verify(four[0], other).differences == [
        "model.projector.token_order: row_major in A, legacy_column_major in B",
        "model.llm.rope_theta: 1062356830.0 in A, 5.0 in B",
    ]


def test_a_long_report_is_cut(tmp_path, four):
    other = material.write_vila(tmp_path / "other", "longvila-7b")
    tensors = material.read_tensors(other / "vision_tower")
    material.write_weights(other / "vision_tower", {n: t + 1 for n, t in tensors.items()})
    text = str(verify(four[0], other))
    assert text.startswith("different: A=") and text.count("\n- ") == 21 and "more" in text.splitlines()[-1]


def test_what_cannot_be_read_cannot_be_compared(tmp_path, four):
    with pytest.raises(ConversionError, match="cannot be compared"):
        verify(four[0], tmp_path)
    info = tmp_path / "step" / "info.json"
    info.parent.mkdir()
    info.write_text(json.dumps({"format": 1, "step": 1, "files": {"x": 1}}))
    with pytest.raises(ConversionError, match="missing or truncated files: x"):
        verify(info.parent, four[0])
