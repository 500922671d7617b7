"""Imports a Hugging Face folder: writes a distributed checkpoint of step 0 and a configuration to train it with.

The output folder holds ``config.yaml``, ``tokenizer/`` and ``checkpoints/``. The original JSON files are kept in the
checkpoint's info.json, and in that of every checkpoint of a run that starts from it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from megatron_vila.checkpoint.resume import tokenizer_settings
from megatron_vila.config.load import dump_config
from megatron_vila.config.schema import Config, ModelConfig
from megatron_vila.config.text_rules import NO_TEMPLATE, TextRules
from megatron_vila.convert.distributed import Part, write_checkpoint
from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.hf_config import Description, describe_model
from megatron_vila.convert.hf_folder import HfFolder, misfits, open_folder
from megatron_vila.convert.output import appearing, output_problems
from megatron_vila.convert.tensor_files import MemoryTensor, SourceTensor, TensorInfo
from megatron_vila.convert.tokenizer import copy_tokenizer, open_tokenizer, separator_ids, suggest_template
from megatron_vila.convert.weight_map import Entry, entries
from megatron_vila.models.vision.projector import Projector

logger = logging.getLogger(__name__)

STEP = "step-00000000"


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    vision: str | Path | None = None,
    projector: str | None = None,
    token_order: str | None = None,
    overwrite: bool = False,
    template: str | None = None,
) -> Path:
    """Convert the Hugging Face folder ``source`` into the folder ``out``, from which a run can start; return ``out``.

    A plain language model needs ``vision``, the folder of a SigLIP model, and gets a new projector of type ``projector`` (default
    mlp_downsample) with the random weights of a run with the default seed. ``token_order`` is the projector's token order, for a
    ``source`` that does not record it. ``template`` is the run's data.template: empty for the tokenizer's own chat template, None
    for the one that VILA's code used at the time of the model. ``overwrite`` permits replacing an earlier conversion in ``out``.

    Tensors keep their dtype, and no more than a few are in memory at a time. Raises ``ConversionError`` with all problems before
    anything is written, and if writing fails.
    """
    source, out = Path(source), Path(out)
    vision = None if vision is None else Path(vision)
    problems = output_problems(out, [path for path in (source, vision) if path is not None], overwrite)
    folder = open_folder(source, vision, problems)
    if projector is not None and folder.kind in ("vila", "flat"):
        problems.append(f"{source} has a projector of its own; leave out --projector {projector}")
    description = describe_model(folder.sections, problems, token_order, projector, folder.has_head)
    if problems:
        raise ConversionError(f"{source} cannot be imported", problems)
    model = description.model
    expected = entries(model)
    tensors: dict[str, Any] = {**folder.tensors}
    if folder.kind == "parts":
        tensors.update(_fresh_projector(model, tensors))
    places = {name: entry.place for entry in expected for name in entry.tensors}
    problems += misfits(folder, tensors, model, places)
    if problems:
        raise ConversionError(f"{source} cannot be imported", problems)
    for note in (*description.notes, *(f"left out: {text}" for text in folder.ignored)):
        logger.info(note)
    with appearing(out) as partial:
        config, tokenizer = _configuration(folder, description, out, partial, template)
        step = partial / "checkpoints" / STEP
        step.mkdir(parents=True)
        parts = [_part(entry, tensors, model) for entry in expected]
        write_checkpoint(step, parts, _info(config, folder), {"settings": _settings(config, tokenizer)})
        (partial / "checkpoints" / "latest").write_text(STEP + "\n")
        (partial / "config.yaml").write_text(dump_config(config))
    return out


def _fresh_projector(model: ModelConfig, tensors: Mapping[str, SourceTensor]) -> dict[str, MemoryTensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Config().train.seed)
        made = Projector(model.projector, model.vision, model.llm.hidden_size, model.init_std)
    table = tensors.get("llm.model.embed_tokens.weight")
    dtype = torch.float32 if table is None else table.dtype
    return {f"mm_projector.{name}": MemoryTensor.of(p.detach().to(dtype)) for name, p in made.named_parameters()}


def _part(entry: Entry, tensors: Mapping[str, SourceTensor], model: ModelConfig) -> Part:
    sources = [tensors[name] for name in entry.tensors]
    dtype = reduce(torch.promote_types, (source.dtype for source in sources))

    def make() -> torch.Tensor:
        return entry.how.join([source.read().to(dtype) for source in sources], model.llm.num_kv_heads)

    return Part(entry.key, TensorInfo(dtype, entry.shape), entry.layer, entry.layers, make)


def _configuration(
    folder: HfFolder, description: Description, out: Path, partial: Path, template: str | None
) -> tuple[Config, Any]:
    """The configuration of a run that starts from ``out``, and its tokenizer, copied into ``partial``; None if there is none."""
    config = Config(model=description.model, data=description.data)
    config.checkpoint.load = str(out.resolve())
    config.train.output = str(out.resolve() / "run")
    copied = None
    if folder.tokenizer is not None:
        copied = copy_tokenizer(folder.tokenizer, partial / "tokenizer")
        config.data.tokenizer = str(out.resolve() / "tokenizer")
    # Open the copy: beside a config.json transformers would take the model's default tokenizer class, whatever the files say.
    tokenizer, why_not = open_tokenizer(copied)
    if tokenizer is None:
        logger.warning(
            "%s: set data.tokenizer, data.image_separator_ids and data.frame_separator_ids in %s", why_not, out / "config.yaml"
        )
    else:
        for name, text in description.separator_texts.items():
            setattr(config.data, name, separator_ids(tokenizer, name, text))
    if template is not None:
        config.data.template = template
    elif description.legacy_prompt and tokenizer is not None:
        config.data.template = suggest_template(tokenizer)
    if tokenizer is not None and not tokenizer.chat_template and not config.data.template:
        logger.warning("the tokenizer in %s %s", out / "tokenizer", NO_TEMPLATE)
    return config, tokenizer


def _settings(config: Config, tokenizer: Any) -> dict[str, Any]:
    """The settings of texts with which a run that starts from these weights is compared."""
    names = ("frame_separator_ids", "image_separator_ids", *asdict(TextRules()))
    settings = {f"data.{name}": getattr(config.data, name) for name in names}
    return settings if tokenizer is None else settings | tokenizer_settings(tokenizer, config)


def _info(config: Config, folder: HfFolder) -> dict[str, Any]:
    """The entries of info.json besides its list of files."""
    return {
        "model": config.model.name,
        "config": asdict(config),
        "hugging_face": {
            "layout": folder.kind,
            "root": folder.sections.root,
            "llm": folder.sections.llm,
            "vision": folder.sections.vision,
            "generation": folder.generation,
            "preprocessor": folder.preprocessor,
        },
    }
