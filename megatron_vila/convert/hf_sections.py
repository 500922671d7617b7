"""The JSON of a Hugging Face model part by part, wherever it stands: in the root file or in the folders of the parts.

The VILA layout has a folder for each part, and a copy of its settings (or its name) in the root ``config.json``; the flat layout
has the settings in the root alone. Nothing here looks at weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTS = ("llm", "vision_tower", "mm_projector")
FLAT_KEYS = {"llm": "text_config", "vision_tower": "vision_config"}
"""Where the root of a flat layout describes a part; its projector is the root's ``mm_projector_type``."""


@dataclass
class HfSections:
    """``root`` is the model's configuration ({} for a language model beside a tower), ``llm``, ``vision`` and ``projector`` those
    of its parts, {} where there is none. ``path`` is the folder that messages name, if they come from one."""

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
    """The sections of a whole model with the parsed root configuration ``root``; ``path`` is its folder, where it has one.

    What stands in a part's folder counts, as in the VILA code; what the root says of the part stands in for it. Appended to
    ``problems``: a part that is described nowhere, and files that cannot be read.
    """
    llm, vision, projector = (_section(root, path, part, problems) for part in PARTS)
    return HfSections(path, dict(root), llm, tower_section(vision), projector)


def part_folder(root: Mapping[str, Any], path: Path, part: str) -> Path | None:
    """The folder of a part: inside ``path``, or the local folder that the root configuration names instead."""
    named = root.get(f"{part}_cfg")
    places = [path / part, *((path / named, Path(named)) if isinstance(named, str) and named else ())]
    return next((place for place in places if place.is_dir()), None)


def tower_section(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a tower: a whole SigLIP model keeps them in a section."""
    section = config.get("vision_config")
    return {"model_type": "siglip_vision_model", **section} if isinstance(section, Mapping) else config


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


def decoded(value: Any) -> Any:
    """What a value means: VILA writes its encoders as objects or as strings of JSON."""
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
        problems.append(f"{file}: there is no {part}/, and {part}_cfg={named!r} is not a local folder; put the part there")
    elif part in FLAT_KEYS:
        problems.append(f"{file} describes no {part}; give its settings as {FLAT_KEYS[part]} or {part}_cfg, or in {part}/")
    return {}
