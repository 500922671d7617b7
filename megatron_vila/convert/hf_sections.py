"""Finds the settings of each part of a Hugging Face model, in the root ``config.json`` or in the folder of the part.

The VILA layout has a folder for each part, and a copy of its settings (or the folder's name) in the root ``config.json``; the
flat layout has the settings in the root alone. Nothing here looks at weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTS = ("llm", "vision_tower", "mm_projector")
FLAT_KEYS = {"llm": "text_config", "vision_tower": "vision_config"}
"""Keys of a flat layout's root that hold the settings of a part. The projector is described by ``mm_projector_type``."""


@dataclass
class HfSections:
    """The parsed settings of a model: ``root`` of the whole ({} for a language model and a tower in two folders), ``llm``,
    ``vision`` and ``projector`` of its parts ({} where there are none). ``path`` is the folder that they come from, which
    messages name; None if they come from no folder."""

    path: Path | None = None
    root: dict[str, Any] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    projector: dict[str, Any] = field(default_factory=dict)

    @property
    def root_file(self) -> str:
        """How messages name the root configuration."""
        return "config.json" if self.path is None else str(self.path / "config.json")

    def part(self, name: str) -> str:
        """How messages name the settings of a part, such as ``language model``."""
        return name if self.path is None else f"{self.path}: {name}"


def sections_of(root: Mapping[str, Any], path: Path | None, problems: list[str]) -> HfSections:
    """The sections of a whole model with the parsed root configuration ``root``; ``path`` is its folder, or None.

    As in the VILA code, config.json in a part's folder comes first; without one, the root's description of the part is taken.
    Parts that are described nowhere and files that cannot be read are appended to ``problems``.
    """
    llm, vision, projector = (_section(root, path, part, problems) for part in PARTS)
    return HfSections(path, dict(root), llm, tower_section(vision), projector)


def part_folder(root: Mapping[str, Any], path: Path, part: str) -> Path | None:
    """The folder of a part: inside ``path``, or the local folder that the root configuration names; None if there is none."""
    named = root.get(f"{part}_cfg")
    places = [path / part, *((path / named, Path(named)) if isinstance(named, str) and named else ())]
    return next((place for place in places if place.is_dir()), None)


def tower_section(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a vision tower; the configuration of a whole SigLIP model has them in its section ``vision_config``."""
    section = config.get("vision_config")
    return {"model_type": "siglip_vision_model", **section} if isinstance(section, Mapping) else config


def read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in the file ``path``; {} and a message in ``problems`` if there is none."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a plain file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path} is missing; copy or download it")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path} cannot be read as JSON: {error}; copy or download it again")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path} holds a {type(value).__name__}, not a JSON object; copy or download it again")
        return {}
    return value


def decoded(value: Any) -> Any:
    """``value``, or what it says if it is a JSON object in a string: VILA writes its encoders in either form."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _section(root: Mapping[str, Any], path: Path | None, part: str, problems: list[str]) -> dict[str, Any]:
    place = None if path is None else part_folder(root, path, part)
    if place is not None and (place / "config.json").exists():
        return read_json(place / "config.json", problems)
    for key in (FLAT_KEYS.get(part, ""), f"{part}_cfg"):
        if isinstance(root.get(key), Mapping) and root[key]:
            return dict(root[key])
    file, named = HfSections(path).root_file, root.get(f"{part}_cfg")
    if place is not None:
        problems.append(f"{place / 'config.json'} is missing; copy or download it again")
    elif isinstance(named, str) and named:
        problems.append(
            f"{file}: there is no {part}/, and {part}_cfg={named!r} is not a local folder; copy the part's folder to {part}/"
        )
    elif part in FLAT_KEYS:
        problems.append(
            f"{file} describes no {part}; give its settings as {FLAT_KEYS[part]} or {part}_cfg, or in {part}/config.json"
        )
    return {}
