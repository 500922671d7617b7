"""Checkpoints that cannot be loaded, on real gloo ranks: the message names what is wrong, and no code in a file is run."""

import json
import pickle
import re
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from megatron_vila.checkpoint.save_load import latest_checkpoint, load_checkpoint, save_checkpoint
from megatron_vila.checkpoint.tensors import read_metadata
from megatron_vila.errors import CheckpointError
from tests.checkpoint.damage import seal_info
from tests.checkpoint.test_checkpoint import DP2, ONE, TP2, save_weights, saves
from tests.ranks import pool
from tests.training.small_run import build


def refused_load(rank, layout, folder, message, options):
    run = build(layout, **options)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder, [run.ddp], run.optimizer, run.scheduler)
    dist.barrier()
    return True


def assert_refused(folder, message, layout=DP2, **options):
    assert pool.run(layout[0], refused_load, layout[1], str(folder), message, options) == [True] * layout[0]


def test_a_folder_without_a_finished_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoints" / ".step-00000010.partial").mkdir(parents=True)
    assert_refused(tmp_path, "nothing to load at .*no finished checkpoint there; give the folder of a step")
    assert_refused(tmp_path / "nowhere", "nothing to load at .*nowhere")


def test_missing_and_truncated_files_are_named(tmp_path):
    pool.run(2, saves, TP2[1], str(tmp_path), [10], 0)
    folder = latest_checkpoint(tmp_path)
    data = (folder / "__1_0.distcp").read_bytes()
    (folder / "__1_0.distcp").write_bytes(data[:-1])
    assert_refused(tmp_path, "step-00000010: missing or truncated files: __1_0.distcp; restore its files from a copy")
    (folder / "__1_0.distcp").unlink()
    (folder / "state.pt").unlink()
    assert_refused(folder, "missing or truncated files: __1_0.distcp, state.pt")


def test_tensors_of_another_shape_are_named_and_nothing_is_loaded(tmp_path):
    pool.run(1, saves, ONE[1], str(tmp_path), [10], 0)
    name = "llm.decoder.layers.mlp.linear_fc2.weight"
    assert_refused(
        tmp_path, rf"tensors of another shape: .*{name} \[2, 16, 16\] instead of", model__llm__ffn_hidden_size=24
    )
    assert_refused(tmp_path, "instead of .*load it with the model configuration", TP2, model__llm__ffn_hidden_size=24)


def test_missing_tensors_are_named(tmp_path):
    pool.run(1, saves_with, str(tmp_path), {"model__llm__qkv_bias": False})
    assert_refused(tmp_path, r"tensors missing: .*linear_qkv.bias")


def saves_with(rank, folder, options, with_configuration=False):
    run = build(ONE[1], **options)
    info = {"config": asdict(run.config)} if with_configuration else {}
    save_checkpoint(folder, 5, [run.ddp], run.optimizer, run.scheduler, info=info)


@pytest.mark.parametrize(
    ("saved", "wanted", "with_configuration", "words"),
    [
        (60, 100, False, "a vocabulary of 64: its rows from 64 on would be made up; set model.llm.vocab_size=64"),
        (60, 64, True, "a vocabulary of 60: its rows from 60 on would be made up; set model.llm.vocab_size=60"),
        (100, 60, True, "a vocabulary of 100: rows from 60 on would be lost; set model.llm.vocab_size=100"),
    ],
    ids=["fewer rows", "padding in the place of rows", "more rows"],
)
def test_a_checkpoint_of_another_vocabulary_is_refused_and_no_row_is_made_up_or_lost(
    tmp_path, saved, wanted, with_configuration, words
):
    pool.run(1, saves_with, str(tmp_path), {"model__llm__vocab_size": saved}, with_configuration)
    message = re.escape(f"model.llm.vocab_size={wanted}, and the checkpoint has {words} and data.tokenizer")
    assert_refused(tmp_path, message, TP2, model__llm__vocab_size=wanted)
    assert pool.run(1, loads_weights, str(tmp_path), saved)


def loads_weights(rank, folder, vocab_size):
    load_checkpoint(folder, [build(ONE[1], model__llm__vocab_size=vocab_size).model])
    return True


def test_optimizer_state_of_a_part_that_was_frozen_is_not_made_up(tmp_path):
    pool.run(1, saves_with, str(tmp_path), {"optim__vision__trainable": False})
    assert_refused(
        tmp_path, r"optimizer.exp_avg.vision.*parts that were frozen then have no optimizer state; .*checkpoint.load"
    )


def test_a_checkpoint_of_weights_alone_does_not_resume_a_run(tmp_path):
    pool.run(1, save_weights, str(tmp_path))
    assert_refused(tmp_path, "it holds weights only; start a new run from it with checkpoint.load=")


def test_a_newer_format_is_refused(tmp_path):
    pool.run(1, saves, ONE[1], str(tmp_path), [10], 0)
    path = latest_checkpoint(tmp_path) / "info.json"
    seal_info(path.parent, json.loads(path.read_text()) | {"format": 2})
    assert_refused(tmp_path, "it has format 2, this version reads up to 1; update megatron_vila", ONE)


class Getattr:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_members_of_an_enumeration_are_read_as_early_python_3_11_pickles_them_and_nothing_else_is(tmp_path):
    metadata = tmp_path / ".metadata"
    metadata.write_bytes(pickle.dumps(Getattr(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")))
    assert read_metadata(tmp_path) is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    for kind, name in ((_MEM_FORMAT_ENCODING, "__class__"), (torch.Size, "__doc__")):
        metadata.write_bytes(pickle.dumps(Getattr(kind, name)))
        with pytest.raises(CheckpointError, match="which no checkpoint of ours does; it was not run"):
            read_metadata(tmp_path)
