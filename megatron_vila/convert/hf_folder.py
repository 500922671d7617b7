"""Opens a Hugging Face folder as one set of tensors with the names of the flat layout; no code of the folder is run.

Sub-folders and tensor names tell which of three kinds it is: ``vila`` (``llm/``, ``vision_tower/`` and ``mm_projector/``, each
a folder), ``flat`` (one state dict: ``llm.*``, ``vision_tower.*``, ``mm_projector.*``) or ``parts`` (a plain causal language
model, and a SigLIP model in another folder). ``misfits`` compares the tensors with those that a model needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_vila.config.schema import ModelConfig
from megatron_vila.convert.hf_sections import PARTS, HfSections, part_folder, read_json, sections_of, tower_section
from megatron_vila.convert.tensor_files import FileTensor, SourceTensor, find_tensors
from megatron_vila.convert.weight_map import shapes
from megatron_vila.errors import some

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")
"""Buffers that old versions of transformers saved beside the weights; their values follow from the configuration."""


@dataclass
class HfFolder:
    """What a folder holds.

    ``kind`` is vila, flat, parts or unknown. ``tensors`` are by flat name, ``sections`` are the model's settings;
    ``generation`` and ``preprocessor`` are the parsed JSON files beside the weights, {} where there are none. ``ignored``
    describes the tensors that were left out. ``tokenizer`` is the folder with the tokenizer's files, None if there are none.
    """

    path: Path
    kind: str
    tensors: dict[str, FileTensor] = field(default_factory=dict)
    sections: HfSections = field(default_factory=HfSections)
    generation: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    tokenizer: Path | None = None

    @property
    def has_head(self) -> bool:
        """Whether the tensors hold SigLIP's pooling head."""
        return any(name.startswith("vision_tower.vision_model.head.") for name in self.tensors)


def open_folder(path: Path, vision: Path | None, problems: list[str]) -> HfFolder:
    """Recognize the folder ``path`` and read its JSON files and the headers of its tensors.

    ``vision`` is the SigLIP folder that completes a plain language model, else None. Everything that is wrong is appended to
    ``problems``.
    """
    if not path.is_dir():
        problems.append(f"{path} is not a folder; give the folder of a Hugging Face model")
        return HfFolder(path, "unknown")
    if any((path / part).is_dir() for part in PARTS):
        folder = _open_vila(path, problems)
    else:
        tensors = find_tensors(path, problems)
        folder = _open_tensors(path, tensors, vision, problems)
    if vision is not None and folder.kind in ("vila", "flat"):
        problems.append(f"{path} has a vision tower of its own; leave out --vision {vision}")
    return folder


def misfits(
    folder: HfFolder, tensors: dict[str, Any], model: ModelConfig, places: Mapping[str, str] | None = None
) -> list[str]:
    """Which of ``tensors`` are missing, superfluous or of another shape for ``model``, a message each.

    ``places`` says for the messages where in a checkpoint each tensor would go. An output layer that only repeats the tied
    embedding table is removed from ``tensors``.
    """
    head, table = "llm.lm_head.weight", "llm.model.embed_tokens.weight"
    if model.llm.tie_embeddings and head in tensors and table in tensors:
        if not torch.equal(tensors[head].read(), tensors[table].read()):
            return [f"{head} differs from {table}, but tie_word_embeddings=true; set it to false in the language model"]
        del tensors[head]
        folder.ignored.append(f"{head}, which repeats the tied {table}")
    wanted, problems = shapes(model), []
    for name, shape in wanted.items():
        should = f"it should be {list(shape)}" + (f" and go into {places[name]}" if places else "")
        if name not in tensors:
            problems.append(f"{name} is missing; {should}")
        elif tensors[name].shape != shape:
            problems.append(f"{name} is {list(tensors[name].shape)}; {should}{_file_of(tensors[name])}")
    return problems + [
        f"{name} {list(tensors[name].shape)} belongs to no part of this model{_file_of(tensors[name])}"
        for name in sorted(tensors.keys() - wanted.keys())
    ]


def _file_of(tensor: SourceTensor) -> str:
    return f" ({tensor.file})" if isinstance(tensor, FileTensor) else ""


def _open_tensors(path: Path, tensors: Mapping[str, FileTensor], vision: Path | None, problems: list[str]) -> HfFolder:
    names = list(tensors)
    if any(name.startswith("llm.") for name in names):
        return _open_flat(path, tensors, problems)
    if any(name.startswith("model.layers.") for name in names):
        return _open_parts(path, tensors, vision, problems)
    if names:
        problems.append(
            f"{path} is none of the known layouts: it has no {'/, '.join(PARTS)}/ folders, and its tensors "
            f"({some(sorted(names), 3)}) begin neither with llm. (flat layout) nor with model.layers. (a language model); "
            "give a folder of one of these"
        )
    return HfFolder(path, "unknown")


def _open_vila(path: Path, problems: list[str]) -> HfFolder:
    root = read_json(path / "config.json", problems)
    folder = HfFolder(path, "vila", sections=sections_of(root, path, problems))
    places = {part: part_folder(root, path, part) for part in PARTS}
    for part, place in places.items():
        if place is None:
            if not isinstance(root.get(f"{part}_cfg"), str):
                problems.append(f"{path} has no {part}/ folder; the VILA layout needs {', '.join(PARTS)}")
            continue
        _add(folder, find_tensors(place, problems), part, problems)
    _take_files(folder, places["llm"] or path, places["vision_tower"] or path, problems)
    return folder


def _open_flat(path: Path, tensors: Mapping[str, FileTensor], problems: list[str]) -> HfFolder:
    root = read_json(path / "config.json", problems)
    folder = HfFolder(path, "flat", sections=sections_of(root, path, problems))
    _add(folder, tensors, "", problems)
    _take_files(folder, path, path, problems)
    return folder


def _open_parts(path: Path, tensors: Mapping[str, FileTensor], vision: Path | None, problems: list[str]) -> HfFolder:
    folder = HfFolder(path, "parts", sections=HfSections(path, llm=read_json(path / "config.json", problems)))
    _add(folder, tensors, "llm", problems)
    _take_files(folder, path, vision or path, problems)
    if vision is None:
        problems.append(f"{path} is a language model alone; name the folder of its SigLIP vision tower with --vision")
    elif not vision.is_dir():
        problems.append(f"--vision {vision} is not a folder; give the folder of a SigLIP model")
    else:
        folder.sections.vision = tower_section(read_json(vision / "config.json", problems))
        _add(folder, find_tensors(vision, problems), "vision_tower", problems)
    return folder


def _add(folder: HfFolder, tensors: Mapping[str, FileTensor], part: str, problems: list[str]) -> None:
    left_out = []
    for name, tensor in tensors.items():
        flat = _flat_name(name, part)
        if flat is None:
            left_out.append(name)
        elif flat in folder.tensors:
            problems.append(f"{name} of {tensor.file} and {folder.tensors[flat].name} both mean {flat}; remove one")
        else:
            folder.tensors[flat] = tensor
    if left_out:
        folder.ignored.append(f"tensors that the model does not use ({len(left_out)}): {some(sorted(left_out), 3)}")


def _flat_name(name: str, part: str) -> str | None:
    """The name in the flat layout; None for buffers and for SigLIP's text side."""
    if _BUFFERS.search(name):
        return None
    if part in ("llm", "mm_projector"):
        return f"{part}.{name}"
    if part == "vision_tower":
        if name.startswith("text_model.") or name in ("logit_scale", "logit_bias"):
            return None
        # transformers 5 saves the tower's tensors without this prefix.
        prefix = "" if name.startswith("vision_model.") else "vision_model."
        return f"vision_tower.{prefix}{name}"
    return name.replace("vision_tower.vision_tower.", "vision_tower.", 1)


def _take_files(folder: HfFolder, llm: Path, tower: Path, problems: list[str]) -> None:
    """Find the tokenizer, and read the JSON files beside the weights of the language model and of the tower."""
    folder.tokenizer = next((place for place in (folder.path, llm) if (place / "tokenizer_config.json").is_file()), None)
    folder.generation = _optional_json(llm / "generation_config.json", problems)
    folder.preprocessor = _optional_json(tower / "preprocessor_config.json", problems)


def _optional_json(path: Path, problems: list[str]) -> dict[str, Any]:
    return read_json(path, problems) if path.is_file() else {}
