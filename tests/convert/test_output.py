"""Output folders appear whole or not at all, and distributed checkpoints that cannot be exported say why."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.exporter import export_checkpoint
from megatron_vila.convert.importer import import_checkpoint
from tests.checkpoint.damage import seal_info
from tests.convert import material

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path):
    return material.write_vila(tmp_path / "source", "longvila-7b")


def test_an_output_folder_that_exists_is_refused_unless_told(source, tmp_path):
    out = tmp_path / "out"
    import_checkpoint(source, out)
    before = (out / "checkpoints/step-00000000/info.json").read_text()
    for convert in (import_checkpoint, export_checkpoint):
        with pytest.raises(ConversionError, match="exists and is not empty; give another output folder, or --overwrite"):
            convert(
                source if convert is import_checkpoint else out,
                tmp_path / "out" if convert is import_checkpoint else source,
            )
    assert (out / "checkpoints/step-00000000/info.json").read_text() == before
    import_checkpoint(source, out, overwrite=True)
    assert not list(tmp_path.glob(".*"))


def test_overwriting_spares_what_is_no_converted_model_and_what_is_read(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for out, message in (
        (tmp_path / "mine", "holds no converted model, so --overwrite does not replace it"),
        (tmp_path / "file", "is a file"),
        (source, "is the source, or a folder that holds it"),
        (tmp_path, "is the source, or a folder that holds it"),
    ):
        with pytest.raises(ConversionError, match=message):
            import_checkpoint(source, out, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_full_disk_leaves_nothing_that_looks_finished(source, tmp_path):
    imported = import_checkpoint(source, tmp_path / "imported")
    export_checkpoint(imported, tmp_path / "old")
    before = material.read_tensors(tmp_path / "old")
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        for action in (
            lambda: import_checkpoint(source, tmp_path / "new"),
            lambda: export_checkpoint(imported, tmp_path / "new"),
            lambda: export_checkpoint(imported, tmp_path / "old", overwrite=True),
        ):
            with pytest.raises(ConversionError, match=r"(?s)was not written.*File too large.*free space"):
                action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))
    assert material.same_bits(before, material.read_tensors(tmp_path / "old"))


EXPORT_FOR_EVER = """
import sys
from megatron_vila import accelerator
accelerator.prepare()
from megatron_vila.convert.exporter import export_checkpoint
while True:
    export_checkpoint(sys.argv[1], sys.argv[2], overwrite=True)
"""


def test_kill_9_in_the_middle_of_an_export_leaves_no_folder_or_a_whole_one(source, tmp_path):
    imported = import_checkpoint(source, tmp_path / "imported")
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-c", EXPORT_FOR_EVER, str(imported), str(out)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        while not list(tmp_path.glob(".out.partial/llm/*")):
            assert process.poll() is None
            time.sleep(0.0005)
    finally:
        process.kill()
        process.wait()
    if out.exists():
        assert material.same_bits(material.model_tensors("longvila-7b"), material.read_tensors(out))
    export_checkpoint(imported, out, overwrite=True)
    assert material.same_bits(material.model_tensors("longvila-7b"), material.read_tensors(out))
    assert not list(tmp_path.glob(".out*"))


# ---------------------------------------------------------------------------------------------------------------------
# distributed checkpoints


def test_a_distributed_checkpoint_that_does_not_fit_its_configuration_is_refused(source, tmp_path):
    imported = import_checkpoint(source, tmp_path / "imported")
    step = imported / "checkpoints" / "step-00000000"
    info = json.loads((step / "info.json").read_text())
    llm = info["config"]["model"]["llm"]
    llm["ffn_hidden_size"], llm["qkv_bias"], llm["tie_embeddings"] = 64, False, True
    seal_info(step, info)
    with pytest.raises(ConversionError) as error:
        export_checkpoint(imported, tmp_path / "out")
    text = str(error.value)
    assert "4 problems" in text
    assert "llm.decoder.layers.mlp.linear_fc1.weight is [4, 96, 32]; it should be [4, 128, 32]" in text
    assert "llm.decoder.layers.self_attention.linear_qkv.bias [4, 64] belongs to no part of the model" in text
    llm["qkv_bias"] = "yes"
    seal_info(step, info)
    with pytest.raises(ConversionError, match="model.llm.qkv_bias is 'yes', but must be true or false"):
        export_checkpoint(imported, tmp_path / "out")


def test_a_truncated_distributed_checkpoint_and_wrong_options_are_told_together(source, tmp_path):
    imported = import_checkpoint(source, tmp_path / "imported")
    file = imported / "checkpoints/step-00000000/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConversionError) as error:
        export_checkpoint(imported, tmp_path / "out", layout="cubic", dtype="int4")
    for part in (
        "missing or truncated files: __0_0.distcp",
        "layout='cubic' is not known",
        "dtype='int4' is not known",
    ):
        assert part in str(error.value)
    with pytest.raises(ConversionError, match="no finished checkpoint there"):
        export_checkpoint(source, tmp_path / "out")


def test_a_tokenizer_that_is_gone_and_an_adapter_that_never_was_are_told(source, tmp_path):
    imported = import_checkpoint(source, tmp_path / "imported")
    with pytest.raises(ConversionError) as error:
        export_checkpoint(imported, tmp_path / "out", tokenizer=tmp_path / "gone", adapter=True)
    assert "gone holds no tokenizer" in str(error.value) and "holds no LoRA; leave out --adapter" in str(error.value)
