"""A model that answers, from whatever holds its weights: a run's folder, one of its checkpoints, an import, a Hugging Face
folder.

The layout is that of the processes at hand, whatever layout trained the model. Everything that a user can cure is said before
the weights are read, on all ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from transformers import PreTrainedTokenizerBase

from megatron_vila import accelerator, processes
from megatron_vila.checkpoint.folder import is_finished, is_ours, resolve_checkpoint
from megatron_vila.checkpoint.resume import kept_settings, tokenizer_settings
from megatron_vila.checkpoint.save_load import load_checkpoint, read_info
from megatron_vila.config.schema import Config, ParallelConfig
from megatron_vila.config.text_rules import TextRules
from megatron_vila.convert.importer import import_checkpoint
from megatron_vila.convert.stored_model import config_of
from megatron_vila.data.chat import ChatEncoder
from megatron_vila.data.frame_chooser import FrameChooser
from megatron_vila.data.kept import kept_folder
from megatron_vila.data.tokenizer import load_tokenizer, tokenizer_warnings
from megatron_vila.errors import CheckpointError, SettingError
from megatron_vila.generate.engine import Engine
from megatron_vila.generate.frames import FrameSource
from megatron_vila.generate.loaded import LoadedModel
from megatron_vila.host_memory import most_bytes, ranks_here
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.agreement import on_all_ranks, on_rank_zero
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.cache_memory import CACHE_DTYPES, cache_memory, layout_for
from megatron_vila.plan.chunks import tokens_of_chunk
from megatron_vila.plan.grid import GridShape

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "bf16", "fp32", "fp64")


def load_model(
    folder: str | Path,
    *,
    tp: int = 1,
    ulysses: int = 0,
    ring: int = 0,
    precision: str = "auto",
    cache: str = "auto",
    chunk_tokens: int = 0,
    attention: str = "auto",
    tokenizer: str = "",
    timeout_minutes: float = 30.0,
) -> LoadedModel:
    """The model of ``folder`` on all ranks: of the newest checkpoint of a run's folder, of a checkpoint's, of an import or of a
    Hugging Face folder, which is imported into ``~/.cache/megatron_vila/imported`` first.

    Ranks form one replica of tp x ulysses x ring; 0 chooses (``plan/cache_memory.layout_for``). ``precision`` is one of
    ``PRECISIONS``, ``cache`` of ``CACHE_DTYPES``; ``chunk_tokens`` of a prompt are read at once (0: chosen). ``tokenizer`` is a
    folder, for a model whose own is not there any more. A process holds one model at a time: the groups of an earlier one are
    left. Collective over all ranks; a lone process needs no environment.

    Raises ``SettingError``, ``CheckpointError`` and ``ConversionError`` with the cure.
    """
    for name, value, known in (("precision", precision, PRECISIONS), ("cache", cache, CACHE_DTYPES)):
        if value not in known:
            raise SettingError(f"{name}={value} is unknown; use {', '.join(known)}")
    processes.init_distributed(timeout_minutes)
    checkpoint = on_rank_zero(lambda: _checkpoint_of(Path(folder)), f"no model can be loaded from {folder}")
    failed = f"cannot load {checkpoint}"
    info = on_rank_zero(lambda: read_info(checkpoint), failed)
    config = _config(config_of(info, checkpoint), precision, attention)
    layout = layout_for(config.model.llm, dist.get_world_size(), tp, ulysses, ring)
    config.parallel = ParallelConfig(*layout)
    words = on_all_ranks(lambda: _tokenizer(config, checkpoint, tokenizer), failed)
    _require_room(config, cache, chunk_tokens)
    accelerator.set_deterministic(False)
    ParallelTopology.destroy()  # of a model that was loaded before
    topology = ParallelTopology.create(config.parallel, timeout_minutes)
    model_parallel_cuda_manual_seed(config.train.seed)
    model = VilaModel(config, topology, accelerator.dtype_of(precision), accelerator.device())
    model.requires_grad_(False)
    extra = load_checkpoint(checkpoint, [model])
    _require_same_tokenizer(kept_settings(extra), words, config, checkpoint)
    identity = _identity(info, checkpoint, config)
    encoder, chooser = ChatEncoder(words, TextRules.of(config.data)), FrameChooser(config.data, config.model)
    return LoadedModel(
        engine=Engine(model, topology, config, cache_dtype=cache, chunk_tokens=chunk_tokens),
        cache=cache,
        config=config,
        encoder=encoder,
        identity=identity,
        chooser=chooser,
        pictures=FrameSource(model.vision, model.projector, config, chooser, identity, most_bytes() // ranks_here() // 4),
        folder=checkpoint,
    )


def _checkpoint_of(folder: Path) -> Path:
    """The checkpoint that ``folder`` means; a Hugging Face folder is imported, unless it has been before."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a run's folder, a checkpoint, an import, or a Hugging Face folder")
    if is_finished(folder) or is_ours(folder) or (folder / "checkpoints").exists():
        return resolve_checkpoint(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds neither checkpoints (a run or an import) nor a config.json (a Hugging Face model); give the folder "
            "of a model"
        )
    return resolve_checkpoint(_imported(folder))


def _imported(folder: Path) -> Path:
    """The import of a Hugging Face folder in the folder of kept files; its name tells the state of the files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), state]).encode()).hexdigest()[:16]
    kept = kept_folder("imported")
    if kept is None:
        raise CheckpointError(
            f"{folder} must be imported, and there is no home folder to do it in; set XDG_CACHE_HOME, or import it with "
            f"tools/convert_checkpoint.py import {folder} OUT and give OUT"
        )
    out = kept / f"{folder.resolve().name}-{key}"
    if out.exists():
        return out
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    needed, free = sum(size for _, size, _ in state), shutil.disk_usage(kept).free
    if needed > free:
        raise CheckpointError(
            f"importing {folder} needs {needed / GIB:.1f} GiB in {kept}, where {free / GIB:.1f} GiB are free; set XDG_CACHE_HOME "
            f"to a larger disk, or import it with tools/convert_checkpoint.py import {folder} OUT and give OUT"
        )
    logger.info("importing %s into %s (once)", folder, out)
    return import_checkpoint(folder, out)


def _config(config: Config, precision: str, attention: str) -> Config:
    """The configuration of a run, for answering: what concerns training alone is left as a new run has it."""
    answering = Config(model=config.model, data=config.data)
    answering.train.precision, answering.train.seed = precision, config.train.seed
    answering.model.attention = attention
    return answering


def _tokenizer(config: Config, checkpoint: Path, given: str) -> PreTrainedTokenizerBase:
    """That of ``given``, else of the training run, else the one beside its checkpoints: an import may have been moved."""
    beside = checkpoint.parent.parent / "tokenizer"
    folder = given or config.data.tokenizer
    if not given and not Path(folder).is_dir() and beside.is_dir():
        folder = str(beside)
    config.data.tokenizer = folder
    try:
        tokenizer = load_tokenizer(folder)
    except SettingError as error:
        raise SettingError(f"{error}; name the tokenizer's folder with --tokenizer") from error
    for warning in tokenizer_warnings(config, tokenizer):
        logger.warning("warning: %s", warning)
    return tokenizer


def _require_same_tokenizer(
    saved: dict[str, Any], tokenizer: PreTrainedTokenizerBase, config: Config, checkpoint: Path
) -> None:
    now, key = tokenizer_settings(tokenizer, config), "tokenizer.vocabulary"
    if key in saved and saved[key] != now[key]:
        raise SettingError(
            f"the tokenizer in {config.data.tokenizer} has other tokens ({now[key]}) than the one that {checkpoint} was trained "
            f"with ({saved[key]}): its ids mean other text; name that one's folder with --tokenizer"
        )


def _require_room(config: Config, cache: str, chunk_tokens: int) -> None:
    """Raise ``SettingError`` on every rank if the weights and the work on a chunk do not fit the device of any."""
    grid = GridShape.of(dist.get_world_size(), config.parallel.tp, 1, config.parallel.ulysses, config.parallel.ring)
    element = accelerator.dtype_of(config.train.precision).itemsize
    memory = cache_memory(config, cache, tokens_of_chunk(chunk_tokens, grid), element, accelerator.device_memory_bytes())

    def check() -> None:
        room = accelerator.room_bytes()
        if memory.weights + memory.work > room:
            raise SettingError(
                f"the weights take {memory.weights / GIB:.1f} GiB on a rank and work on a chunk {memory.work / GIB:.1f} GiB, and "
                f"{room / GIB:.1f} GiB are free; read fewer tokens at once (--chunk-tokens), or share the weights among more "
                "GPUs (--tp)"
            )

    on_all_ranks(check, "the model does not fit")


def _identity(info: dict[str, Any], checkpoint: Path, config: Config) -> str:
    """A key of the weights and of how they are read: of the checksums of the checkpoint's files where it has any."""
    files = info.get("files") or str(checkpoint.resolve())
    parts = [files, info.get("step"), str(accelerator.dtype_of(config.train.precision))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
