"""Exports a distributed checkpoint of any parallel layout to a Hugging Face folder, in one process and without a GPU.

The export has the folders of the VILA code (``llm/``, ``vision_tower/``, ``mm_projector/``), or one flat state dict, or is a
PEFT adapter of the language model alone. Tensors are read, split and written one by one; config.json is written last.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_vila.config.text_rules import TextRules
from megatron_vila.convert import adapter as peft
from megatron_vila.convert import hf_config_out as hf
from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.hf_sections import PARTS
from megatron_vila.convert.output import appearing, output_problems
from megatron_vila.convert.stored_model import StoredModel
from megatron_vila.convert.tensor_files import SHARD_BYTES, TensorInfo, write_tensors
from megatron_vila.convert.tokenizer import copy_tokenizer, open_tokenizer
from megatron_vila.data.chat import ChatEncoder
from megatron_vila.data.template import NAMED, ChatTemplateError

logger = logging.getLogger(__name__)

LAYOUTS = ("vila", "flat")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    layout: str = "vila",
    dtype: str | None = None,
    adapter: bool = False,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write ``checkpoint`` (the folder of a step, of a run or of an import) as the Hugging Face folder ``out``; return ``out``.

    ``layout`` is vila (a folder for each part) or flat. ``dtype`` is bf16, fp32 or None, which keeps the stored dtypes; fp32
    takes the float32 copies that Adam updates, where a 16-bit run stored them. LoRA updates are merged into the weights, or
    with ``adapter`` written alone in PEFT's format. ``tokenizer`` is a folder to use instead of the run's data.tokenizer.
    ``overwrite`` permits replacing an earlier conversion in ``out``. ``shard_bytes`` limits the bytes of a safetensors file.

    No more than a few tensors are in memory at a time. Raises ``ConversionError`` with all problems before anything is
    written, and if reading or writing fails.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    problems = output_problems(out, [checkpoint], overwrite)
    if layout not in LAYOUTS:
        problems.append(f"layout={layout!r} is not known; choose one of {', '.join(LAYOUTS)}")
    if dtype is not None and dtype not in DTYPES:
        problems.append(f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}, or leave it out to keep dtypes")
    try:
        model = StoredModel(checkpoint, merge=not adapter, main=dtype == "fp32")
    except ConversionError as error:
        raise ConversionError(f"{checkpoint} cannot be exported", problems + error.problems) from error
    folder = _tokenizer_folder(tokenizer, model, problems)
    if adapter:
        problems += peft.adapter_problems(model)
    if problems:
        raise ConversionError(f"{checkpoint} cannot be exported", problems)
    with appearing(out) as partial:
        if adapter:
            peft.write_adapter(partial, model, DTYPES.get(dtype or ""))
        else:
            _write_model(partial, model, layout, DTYPES.get(dtype or ""), folder, shard_bytes)
    return out


def _write_model(
    out: Path,
    model: StoredModel,
    layout: str,
    dtype: torch.dtype | None,
    tokenizer_folder: Path | None,
    shard_bytes: int,
) -> None:
    """Write all files of a whole model; the root config.json comes last."""
    infos = {name: TensorInfo(dtype or info.dtype, info.shape) for name, info in model.infos.items()}
    tokenizer, why_not = open_tokenizer(tokenizer_folder)
    if tokenizer is None:
        logger.warning("%s: the export has no tokenizer; --tokenizer names the folder of one", why_not)
    rules = TextRules.of(model.config.data)
    parts = _part_configs(model, infos, tokenizer)
    vision, carried = model.config.model.vision, model.hugging_face
    # A model that was imported as a language model and a tower has no root configuration; all of it is written anew.
    root = carried.get("root") or {}
    if layout == "flat":
        llm = tower = out
        write_tensors(out, "model", infos, model.read, shard_bytes)
    else:
        llm, tower = out / "llm", out / "vision_tower"
        for part in PARTS:
            (out / part).mkdir()
            _write_part(out / part, part, infos, model, shard_bytes)
    if tokenizer_folder is not None:
        # The VILA code looks into llm/. There transformers 5 takes the language model's default tokenizer class, whatever the
        # files say, so a second copy stands at the root.
        for place in {out, llm}:
            copy_tokenizer(tokenizer_folder, place, NAMED.get(rules.template))
    stops = () if tokenizer is None else _stops(tokenizer, rules)
    _write_json(llm / "generation_config.json", hf.generation_config(carried.get("generation") or {}, tokenizer, stops))
    preprocessor = hf.preprocessor_config(vision, carried.get("preprocessor") or {})
    if layout == "flat":
        # The key names SigLIP's processor; at the root AutoProcessor would use that one for the whole model.
        preprocessor.pop("processor_class", None)
    _write_json(tower / "preprocessor_config.json", preprocessor)
    if layout == "flat":
        _write_json(out / "config.json", hf.flat_root(model.config, root, parts, tokenizer))
        return
    for part in PARTS:
        _write_json(out / part / "config.json", parts[part])
    _write_json(out / "config.json", hf.vila_root(model.config, root, parts, tokenizer, trained=model.step > 0))


def _write_part(folder: Path, part: str, infos: Mapping[str, TensorInfo], model: StoredModel, shard_bytes: int) -> None:
    own = {name.removeprefix(f"{part}."): info for name, info in infos.items() if name.startswith(f"{part}.")}
    write_tensors(folder, "model", own, lambda name: model.read(f"{part}.{name}"), shard_bytes)


def _part_configs(model: StoredModel, infos: Mapping[str, TensorInfo], tokenizer: Any) -> dict[str, dict[str, Any]]:
    carried, ours = model.hugging_face, model.config.model
    dtypes = {part: _dtype_name(infos, part) for part in PARTS}
    return {
        "llm": hf.language_config(ours.llm, carried.get("llm") or {}, dtypes["llm"], tokenizer),
        "vision_tower": hf.vision_config(ours.vision, carried.get("vision") or {}, dtypes["vision_tower"]),
        "mm_projector": hf.projector_config(ours.projector.type, dtypes["mm_projector"]),
    }


def _stops(tokenizer: Any, rules: TextRules) -> tuple[int, ...]:
    """Token ids that end an answer under the run's chat template; empty if no run could train with that template."""
    try:
        return ChatEncoder(tokenizer, rules).stops
    except ChatTemplateError as error:
        logger.warning("the ids that end an answer are not known: %s", error)
        return ()


def _dtype_name(infos: Mapping[str, TensorInfo], part: str) -> str:
    """The dtype of most elements of the part, as configurations write it, such as ``bfloat16``."""
    sizes: dict[torch.dtype, int] = {}
    for name, info in infos.items():
        if name.startswith(f"{part}."):
            sizes[info.dtype] = sizes.get(info.dtype, 0) + torch.Size(info.shape).numel()
    return str(max(sizes, key=sizes.__getitem__)).removeprefix("torch.")


def _tokenizer_folder(given: str | Path | None, model: StoredModel, problems: list[str]) -> Path | None:
    if given is None and not model.config.data.tokenizer:
        return None
    folder = Path(given or model.config.data.tokenizer)
    if not (folder / "tokenizer_config.json").is_file():
        source = "--tokenizer" if given else "the run's data.tokenizer"
        problems.append(f"{source} {folder} holds no tokenizer; name the folder of one with --tokenizer")
    return folder


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
