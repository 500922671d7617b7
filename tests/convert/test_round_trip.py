"""Import and export of random models in the key sets of published folders: every tensor comes back bit for bit."""

import json

import pytest
import torch

from megatron_vila.convert.exporter import export_checkpoint
from megatron_vila.convert.importer import import_checkpoint
from megatron_vila.convert.stored_model import StoredModel
from tests.convert import material


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return material.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("layout", ["vila", "flat"])
@pytest.mark.parametrize("family", material.FAMILIES)
def test_folder_to_checkpoint_to_folder_is_bitwise(tmp_path, family, layout):
    source = material.write_vila(tmp_path / "source", family)
    imported = import_checkpoint(source, tmp_path / "imported")
    out = export_checkpoint(imported, tmp_path / "out", layout=layout, shard_bytes=30_000)
    assert material.same_bits(material.model_tensors(family), material.read_tensors(out))
    assert list(out.glob("**/*.index.json"))


@pytest.mark.parametrize("family", material.FAMILIES)
def test_flat_state_dict_to_checkpoint_to_folder_is_bitwise(tmp_path, family):
    imported = import_checkpoint(material.write_flat(tmp_path / "source", family), tmp_path / "imported")
    out = export_checkpoint(imported, tmp_path / "out")
    assert material.same_bits(material.model_tensors(family), material.read_tensors(out))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_every_element_type_is_kept(tmp_path, dtype):
    source = material.write_vila(tmp_path / "source", "longvila-1.5b", dtype)
    out = export_checkpoint(import_checkpoint(source, tmp_path / "imported"), tmp_path / "out")
    assert material.same_bits(material.model_tensors("longvila-1.5b", dtype), material.read_tensors(out))
    assert json.loads((out / "llm/config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_tensors_of_mixed_types_that_are_fused_take_the_wider_one(tmp_path):
    source = material.write_vila(tmp_path / "source", "nvila-lite")
    tensors = material.read_tensors(source / "mm_projector")
    material.write_weights(source / "mm_projector", {name: t.float() for name, t in tensors.items()})
    out = export_checkpoint(import_checkpoint(source, tmp_path / "imported"), tmp_path / "out")
    written = material.read_tensors(out)
    assert {t.dtype for name, t in written.items() if name.startswith("mm_projector.")} == {torch.float32}
    assert {t.dtype for name, t in written.items() if name.startswith("llm.")} == {torch.bfloat16}


def test_the_unused_weights_of_the_tower_come_back(tmp_path):
    """The last layer, the final norm and the head never run, but the folder must load strictly elsewhere."""
    source = material.write_vila(tmp_path / "source", "vila-1.5")
    out = export_checkpoint(import_checkpoint(source, tmp_path / "imported"), tmp_path / "out")
    before, after = material.read_tensors(source), material.read_tensors(out)
    unused = [n for n in before if any(part in n for part in (".layers.2.", "post_layernorm", "vision_model.head."))]
    unused = [n for n in unused if n.startswith("vision_tower.")]
    assert len(unused) == 16 + 2 + 11
    assert material.same_bits({n: before[n] for n in unused}, {n: after[n] for n in unused})


def test_exporting_twice_gives_the_same_files(tmp_path, tokenizer):
    source = material.write_vila(tmp_path / "source", "longvila-7b", tokenizer=tokenizer)
    once = export_checkpoint(import_checkpoint(source, tmp_path / "imported"), tmp_path / "once")
    again = export_checkpoint(import_checkpoint(once, tmp_path / "again" / "imported"), tmp_path / "twice")
    files = sorted(path.relative_to(once) for path in once.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for name in files:
        assert (once / name).read_bytes() == (again / name).read_bytes(), name


def test_a_written_checkpoint_names_its_step_and_its_origin(tmp_path):
    imported = import_checkpoint(material.write_vila(tmp_path / "source", "vila-1.5"), tmp_path / "imported")
    stored = StoredModel(imported)
    assert stored.step == 0 and stored.folder == imported / "checkpoints/step-00000000"
    assert stored.hugging_face["layout"] == "vila"
    assert stored.hugging_face["root"]["transformers_version"] == "4.36.2"
    assert stored.config.checkpoint.load == str(imported)
