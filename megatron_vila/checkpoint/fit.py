"""Whether the tensors of a checkpoint are those of a model: its vocabulary, and the name and shape of each."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor

from megatron_vila.checkpoint.tensors import StoredTensor
from megatron_vila.errors import CheckpointError, some
from megatron_vila.models.decoder.lora import FACTORS

_TABLES = ("llm.embedding.word_embeddings.weight", "llm.output_layer.weight")
"""one row for each id of the vocabulary, then padding that no id reaches"""


def require_vocabulary(vocab_size: int, stored: Mapping[str, StoredTensor], info: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` unless the tables of a checkpoint hold the ``vocab_size`` rows of the model, no more and no less.

    Padding behind them may differ, as it does with tp. ``info`` is the checkpoint's info.json, whose configuration tells where
    padding begins; one of an early version has none, and then only a table with too few rows is known to be another.
    """
    rows = min((tensor.shape[0] for key, tensor in stored.items() if key.endswith(_TABLES) and tensor.shape), default=vocab_size)
    told = _vocabulary_of(info)
    if rows >= vocab_size and told in (vocab_size, None):
        return
    held = min(rows, told or rows)
    what = f"its rows from {held} on would be made up" if held < vocab_size else f"rows from {vocab_size} on would be lost"
    raise CheckpointError(
        f"model.llm.vocab_size={vocab_size}, and the checkpoint has a vocabulary of {held}: {what}; set "
        f"model.llm.vocab_size={held} and data.tokenizer as in the run that saved it, or load another checkpoint"
    )


def _vocabulary_of(info: Mapping[str, Any]) -> int | None:
    value: Any = info
    for name in ("config", "model", "llm", "vocab_size"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if type(value) is int and value > 0 else None


KEEP_UPDATES = "set model.lora as in the run that saved them, or merge them (tools/convert_checkpoint.py export, then import)"
"""the cure for ``lost_updates``"""


def lost_updates(stored: Iterable[str], known: Container[str] = ()) -> str:
    """What is said of the LoRA factors among ``stored`` tensors that are not ``known`` to the model; empty without any."""
    lost = [key for key in stored if key not in known and key.endswith(FACTORS) and not key.startswith("optimizer.")]
    return f"{len(lost)} LoRA tensors that the model has no place for: {some(sorted(lost))}" if lost else ""


def require_tensors(wanted: Iterable[ShardedTensor], stored: Mapping[str, StoredTensor]) -> None:
    """Raise ``CheckpointError`` naming the tensors that a checkpoint does not have, or has in another shape, and the LoRA factors
    that would be lost. Rows of a table of the vocabulary are ``require_vocabulary``'s."""
    missing, different, known = set(), set(), set()
    for tensor in wanted:
        known.add(tensor.key)
        if tensor.key not in stored:
            missing.add(tensor.key)
            continue
        found, shape = tuple(stored[tensor.key].shape), tuple(tensor.global_shape)
        if found[1:] != shape[1:] or (found != shape and not tensor.allow_shape_mismatch):
            different.add(f"{tensor.key} {list(found)} instead of {list(shape)}")
    lost = lost_updates(stored, known)
    problems = [lost] if lost else []
    if different:
        problems.append(f"{len(different)} tensors of another shape: {some(sorted(different))}")
    if missing:
        problems.append(f"{len(missing)} tensors missing: {some(sorted(missing))}")
    if problems:
        cure = "load it with the model configuration that it was saved with"
        if lost and not different and not missing:
            cure = KEEP_UPDATES
        elif not different and all(key.startswith("optimizer.") for key in missing):
            cure = "parts that were frozen then have no optimizer state; start a new run from the weights with checkpoint.load"
        raise CheckpointError(f"{'; '.join(problems)}; {cure}")
