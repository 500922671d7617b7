"""YAML files and command-line overrides to a typed ``Config``, and back.

A file may name other files to start from::

    include: [models/longvila-7b, stages/stage5]     # presets, or files relative to this one; later ones win
    train:
      steps: 100                                     # the file's own keys win over what it includes

Overrides (``parallel.tp=2``) win over every file; ``include=[contexts/524288]`` among them takes in files after that of the run,
relative to the working folder. Each value is checked against the type of its dataclass field; all
problems of all files are collected and raised together, each with the file (or "command line") that holds it.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_vila.config.keys import Key, config_keys, section_names, sections
from megatron_vila.config.schema import Config
from megatron_vila.errors import ConfigError

PRESET_FOLDER = Path(__file__).parent / "presets"

COMMAND_LINE = "command line"

UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, OSError, RecursionError)
"""What YAML and OmegaConf raise for text that is not a value."""

SHOWN = 200
"""Characters of a value or an error that a message shows."""


def load_config(path_or_preset: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file or preset (``tiny``, ``longvila-7b-stage5``) with dotted ``overrides`` applied.

    Raises ``ConfigError`` that lists all problems: a missing file, an include cycle, broken YAML, unknown keys (with the
    closest known ones) and values of the wrong type.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    path = _find(path_or_preset, Path(), problems)
    if path is not None:
        values.update(_read(path, (), problems))
    included = [override for override in overrides if override.startswith("include=")]
    for override in included:
        values.update(_included(_value(override, problems), Path(), COMMAND_LINE, (), problems))
    for override in overrides:
        if override not in included:
            values.update(_parse_override(override, problems))
    return _filled(values, problems)


def config_from_dict(tree: dict[str, Any], origin: str) -> Config:
    """The configuration whose ``asdict`` is ``tree``; raises as ``load_config``, with ``origin`` in place of the file."""
    problems: list[str] = []
    return _filled(_flatten(tree, "", origin, problems), problems)


def _filled(values: dict[str, Any], problems: Sequence[str]) -> Config:
    """The configuration with ``values`` by dotted name. Raises ``ConfigError`` if there are ``problems``."""
    if problems:
        raise ConfigError("\n".join(problems))
    config = Config()
    for name, value in values.items():
        *sections, leaf = name.split(".")
        target = config
        for section in sections:
            target = getattr(target, section)
        setattr(target, leaf, value)
    return config


def dump_config(config: Config) -> str:
    """YAML with every key; ``load_config`` of it gives the same configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def preset_names() -> list[str]:
    """Names that ``load_config`` and ``include`` accept in place of a path, complete runs first."""
    names = [str(p.relative_to(PRESET_FOLDER).with_suffix("")) for p in PRESET_FOLDER.rglob("*.yaml")]
    return sorted(names, key=lambda n: (n.count("/"), n))


def describe_keys() -> str:
    """The text of docs/configuration.md: every key with its type, default and meaning."""
    lines = [_DOCS_HEAD.format(presets="\n".join(f"* `{name}`" for name in preset_names()))]
    for section, doc, keys in sections(Config, ""):
        if not keys:
            continue
        lines += [f"## {section}", "", doc, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key in keys:
            default = OmegaConf.to_yaml(OmegaConf.create([key.default])).strip().removeprefix("- ").replace("'", "")
            shown = f"`{default}`" if default else "empty"
            lines.append(f"| `{key.name}` | {_type_name(key.type).removeprefix('a ')} | {shown} | {key.help} |")
        lines.append("")
    return "\n".join(lines)


def _find(name: str, folder: Path, problems: list[str], origin: str = "") -> Path | None:
    """The file that ``name`` means: a path relative to ``folder``, else a preset."""
    for candidate in (folder / name, PRESET_FOLDER / name, PRESET_FOLDER / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    where = f"{origin}: include: " if origin else ""
    looked = folder / name
    message = f"{where}no configuration file '{looked}' and no preset '{name}'"
    if looked.is_dir():
        message = f"{where}'{looked}' is a folder; name a YAML file in it"
    close = difflib.get_close_matches(name.removesuffix(".yaml"), preset_names(), n=3, cutoff=0.5)
    if close:
        message += f"; did you mean {_one_of(close)}?"
    if not name.endswith((".yaml", ".yml")) or close:
        message += f"{'' if close else '.'} Presets: {', '.join(preset_names())}."
    problems.append(message)
    return None


def _read(path: Path, chain: tuple[Path, ...], problems: list[str]) -> dict[str, Any]:
    """Typed values of one file with its includes, by dotted name."""
    if path.resolve() in chain:
        circle = " -> ".join(str(p) for p in (*chain, path.resolve()))
        problems.append(f"{path}: the files include each other: {circle}; take one include out")
        return {}
    try:
        container = OmegaConf.load(path)
        tree = OmegaConf.to_container(container, resolve=True)
    except UNREADABLE as error:
        problems.append(f"{path}: cannot be read as YAML: {_one_line(error)}")
        return {}
    if not isinstance(tree, dict):
        problems.append(f"{path}: must hold 'key: value' lines, found a {type(tree).__name__}")
        return {}
    values = _included(tree.pop("include", None) or [], path.parent, str(path), (*chain, path.resolve()), problems)
    values.update(_flatten(tree, "", str(path), problems))
    return values


def _included(names: Any, folder: Path, origin: str, chain: tuple[Path, ...], problems: list[str]) -> dict[str, Any]:
    """Typed values of the files that ``origin`` includes; later ones win."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(f"{origin}: include={names!r} must be a list of files or presets, e.g. [models/tiny]")
        return {}
    values: dict[str, Any] = {}
    for name in names:
        found = _find(name, folder, problems, origin)
        if found is not None:
            values.update(_read(found, chain, problems))
    return values


def _flatten(tree: dict[Any, Any], prefix: str, origin: str, problems: list[str]) -> dict[str, Any]:
    known = {key.name: key for key in config_keys()}
    values: dict[str, Any] = {}
    for part, value in tree.items():
        name = f"{prefix}{part}"
        if name in known:
            values.update(_typed(known[name], value, origin, problems))
        elif name in section_names():
            if isinstance(value, dict):
                values.update(_flatten(value, f"{name}.", origin, problems))
            elif value is not None:
                problems.append(_group_given_a_value(name, value, origin))
        else:
            problems.append(_unknown(name, origin))
    return values


def _parse_override(override: str, problems: list[str]) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not equals:
        problems.append(f"{COMMAND_LINE}: '{override}' must be written as key=value, e.g. parallel.tp=2")
        return {}
    known = {key.name: key for key in config_keys()}
    if name in section_names():
        problems.append(_group_given_a_value(name, text, COMMAND_LINE))
        return {}
    if name not in known:
        problems.append(_unknown(name, COMMAND_LINE))
        return {}
    if known[name].type is str:
        # A path such as 2024 or 1e3 is meant literally: a shell user cannot be asked for quotes inside quotes.
        return {name: text}
    before = len(problems)
    value = _value(override, problems)
    return _typed(known[name], value, COMMAND_LINE, problems) if len(problems) == before else {}


def _value(override: str, problems: list[str]) -> Any:
    """What stands behind the equals sign, read as YAML; None where it cannot be read."""
    name, _, text = override.partition("=")
    try:
        container = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=True)
    except UNREADABLE as error:
        problems.append(f"{COMMAND_LINE}: {name}={text[:SHOWN]}: cannot be read as YAML: {_one_line(error)}")
        return None
    return container["value"] if isinstance(container, dict) else None


def _typed(key: Key, value: Any, origin: str, problems: list[str]) -> dict[str, Any]:
    if _matches(value, key.type):
        try:
            return {key.name: float(value) if key.type in (float, float | None) and value is not None else value}
        except OverflowError:
            problems.append(f"{origin}: {key.name} has more digits than any number that is computed with; use a smaller one")
            return {}
    shown = "empty" if value is None else repr(value)[:SHOWN]
    hint = ""
    if typing.get_origin(key.type) is list and not isinstance(value, list | dict) and value is not None:
        hint = f"; write {key.name}=[{value}]"
    elif key.type is str and isinstance(value, int | float):
        hint = "; put it in quotes"
    problems.append(f"{origin}: {key.name} is {shown}, but must be {_type_name(key.type)}{hint}")
    return {}


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(wanted))
    if wanted is type(None):
        return value is None
    if typing.get_origin(wanted) is list:
        return isinstance(value, list) and all(_matches(v, typing.get_args(wanted)[0]) for v in value)
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted)


def _type_name(wanted: Any) -> str:
    if wanted == bool | str:
        return "true, false or text"
    if isinstance(wanted, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(wanted))
    if typing.get_origin(wanted) is list:
        return {int: "a list of whole numbers", float: "a list of numbers", str: "a list of text"}[typing.get_args(wanted)[0]]
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[wanted]


def _unknown(name: str, origin: str) -> str:
    names = [key.name for key in config_keys()]
    leaf = name.split(".")[-1]
    likeness = {known: _likeness(name, known) for known in names}
    likely = [known for known in names if likeness[known] >= max(0.7, max(likeness.values()) - 0.05)]
    same_leaf = [known for known in names if _likeness(leaf, known.split(".")[-1]) >= 0.85]
    if likely and name.rpartition(".")[0] in section_names():
        same_leaf = []
    proposals = list(dict.fromkeys([*sorted(likely, key=likeness.__getitem__, reverse=True), *same_leaf]))[:4]
    cure = f"did you mean {_one_of(proposals)}?" if proposals else "docs/configuration.md lists all keys"
    return f"{origin}: unknown key '{name}'; {cure}"


def _one_line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "its lists or groups are nested too deeply"
    return " ".join(str(error).split())[:SHOWN]


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _group_given_a_value(name: str, value: Any, origin: str) -> str:
    members = [key.name for key in config_keys() if key.name.startswith(f"{name}.")]
    return f"{origin}: '{name}' is a group of keys and cannot be {value!r}; set one of its keys, e.g. {', '.join(members[:3])}"


def _one_of(names: Sequence[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


_DOCS_HEAD = """# Configuration

Every key of a run, printed by `python -m megatron_vila.config` from `megatron_vila/config/schema.py`.

A run is described by a YAML file or preset and dotted overrides, which win over the file:

```bash
python -m megatron_vila.launch --nproc-per-node 8 my_run.yaml parallel.tp=2 parallel.ring=4 train.steps=100
```

```yaml
# my_run.yaml
include: [models/longvila-7b, stages/stage5]   # presets, or files relative to this one; later ones win
data:
  train: [/data/longvila_sft.json]
  media_dir: /data/videos
  tokenizer: /data/qwen2-7b-longvila-1M/llm
```

Paths are relative to the folder the run starts in (only `include` is relative to its file), and `~` does not stand for a home
folder: write `$HOME/...`. `${{oc.env:NAME}}` in a value is replaced by the environment variable NAME. On the command line a
list is written `data.train=[a.json,b.json]` (in zsh within quotes), and `include=[contexts/524288]` takes in presets or files
after that of the run. Every run writes the whole configuration it used to
`config.yaml` in its output folder. `--dry-run` checks everything and exits;
`python -m megatron_vila.explain my_run.yaml world_size=256` shows what the layout means, with no process started
([launching](launching.md#before)). Each number has a largest value, far above what is trained, so that a slip of the keyboard is
refused at the start (`megatron_vila/plan/bounds.py`).

## Presets

{presets}
"""
