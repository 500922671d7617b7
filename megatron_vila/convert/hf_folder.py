"""A Hugging Face folder as one set of tensors in flat names, recognized by its keys; nothing in it is executed.

Three kinds are known: ``vila`` (``llm/``, ``vision_tower/`` and ``mm_projector/``, each a folder), ``flat`` (one state dict,
``llm.*``, ``vision_tower.*``, ``mm_projector.*``) and ``parts`` (a plain causal language model and a SigLIP folder beside it).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vila.convert.tensor_files import FileTensor, find_tensors
from megatron_vila.errors import some

PARTS = ("llm", "vision_tower", "mm_projector")
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
"""What old versions of transformers saved beside the weights; it follows from the configuration."""


@dataclass
class HfFolder:
    """What was found: tensors by flat name, the JSON files of each part ({} where there is none), and where files lie.

    ``root`` is the model's configuration ({} for ``parts``), ``llm``, ``vision`` and ``projector`` those of its parts;
    ``ignored`` says what was left out and why.
    """

    path: Path
    kind: str
    tensors: dict[str, FileTensor] = field(default_factory=dict)
    root: dict[str, Any] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    projector: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    tokenizer: Path | None = None


def open_folder(path: Path, vision: Path | None, problems: list[str]) -> HfFolder:
    """Recognize and read ``path`` (headers and JSON only). ``vision`` is the SigLIP folder beside a plain language model.

    Everything that is wrong is appended to ``problems``.
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


def _open_tensors(path: Path, tensors: Mapping[str, FileTensor], vision: Path | None, problems: list[str]) -> HfFolder:
    names = list(tensors)
    if any(name.startswith("llm.") for name in names):
        return _open_flat(path, tensors, problems)
    if any(name.startswith("model.layers.") for name in names):
        return _open_parts(path, tensors, vision, problems)
    if names:
        problems.append(
            f"{path} is none of the known layouts: it has no {'/, '.join(PARTS)}/ folders, and its tensors "
            f"({some(sorted(names), 3)}) begin neither with llm. (flat layout) nor with model.layers. (a language model)"
        )
    return HfFolder(path, "unknown")


def _open_vila(path: Path, problems: list[str]) -> HfFolder:
    folder = HfFolder(path, "vila", root=read_json(path / "config.json", problems))
    configurations = {}
    for part in PARTS:
        place = _part_folder(path, part, folder.root, problems)
        if place is None:
            continue
        configurations[part] = read_json(place / "config.json", problems)
        _add(folder, find_tensors(place, problems), part, problems)
        if part == "llm":
            folder.tokenizer = _tokenizer_folder(path) or _tokenizer_folder(place)
            folder.generation = _optional_json(place / "generation_config.json", problems)
        if part == "vision_tower":
            folder.preprocessor = _optional_json(place / "preprocessor_config.json", problems)
    folder.llm = configurations.get("llm", {})
    folder.vision = _vision_section(configurations.get("vision_tower", {}))
    folder.projector = configurations.get("mm_projector", {})
    return folder


def _part_folder(path: Path, part: str, root: Mapping[str, Any], problems: list[str]) -> Path | None:
    """The folder of a part: inside ``path``, or the local folder that the root configuration names instead."""
    if (path / part).is_dir():
        return path / part
    named = root.get(f"{part}_cfg")
    if isinstance(named, str) and named:
        for place in (path / named, Path(named)):
            if place.is_dir():
                return place
        problems.append(f"{path} has no {part}/, and {part}_cfg={named!r} is no local folder; put the part there")
    else:
        problems.append(f"{path} has no {part}/ folder; the VILA layout needs {', '.join(PARTS)}")
    return None


def _open_flat(path: Path, tensors: Mapping[str, FileTensor], problems: list[str]) -> HfFolder:
    root = read_json(path / "config.json", problems)
    folder = HfFolder(path, "flat", root=root)
    for part in ("text_config", "vision_config"):
        if not isinstance(root.get(part), Mapping):
            problems.append(f"{path / 'config.json'}: {part} is missing; a flat layout describes its parts there")
    folder.llm = _mapping(root.get("text_config"))
    folder.vision = _mapping(root.get("vision_config"))
    _add(folder, tensors, "", problems)
    folder.tokenizer = _tokenizer_folder(path)
    folder.generation = _optional_json(path / "generation_config.json", problems)
    folder.preprocessor = _optional_json(path / "preprocessor_config.json", problems)
    return folder


def _open_parts(path: Path, tensors: Mapping[str, FileTensor], vision: Path | None, problems: list[str]) -> HfFolder:
    folder = HfFolder(path, "parts", llm=read_json(path / "config.json", problems))
    _add(folder, tensors, "llm", problems)
    folder.tokenizer = _tokenizer_folder(path)
    folder.generation = _optional_json(path / "generation_config.json", problems)
    if vision is None:
        problems.append(f"{path} is a language model alone; name the folder of its SigLIP vision tower with --vision")
    elif not vision.is_dir():
        problems.append(f"--vision {vision} is not a folder; give the folder of a SigLIP model")
    else:
        folder.vision = _vision_section(read_json(vision / "config.json", problems))
        folder.preprocessor = _optional_json(vision / "preprocessor_config.json", problems)
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
        # transformers 5 saves the tower without this level.
        prefix = "" if name.startswith("vision_model.") else "vision_model."
        return f"vision_tower.{prefix}{name}"
    return name.replace("vision_tower.vision_tower.", "vision_tower.", 1)


def read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in ``path``, or {} and a problem."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a plain file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path} is missing")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path} cannot be read as JSON: {error}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path} holds a {type(value).__name__}, not an object")
        return {}
    return value


def _optional_json(path: Path, problems: list[str]) -> dict[str, Any]:
    return read_json(path, problems) if path.is_file() else {}


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _vision_section(config: dict[str, Any]) -> dict[str, Any]:
    """A whole SigLIP model keeps its tower's settings in a section."""
    section = config.get("vision_config")
    return {"model_type": "siglip_vision_model", **section} if isinstance(section, Mapping) else config


def _tokenizer_folder(path: Path) -> Path | None:
    return path if (path / "tokenizer_config.json").is_file() else None
