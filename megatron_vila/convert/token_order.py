"""In which order the tokens of an ``mlp_downsample`` projector come: known, guessed from a version, or not to be guessed.

The weights of both orders are alike and no key of a published configuration tells them apart: a model trained with one gets
transposed pictures with the other. The code of VILA-1.5 and Llama-3-LongVILA (transformers 4.36 and 4.37) made column-major
tokens, that of NVILA and Qwen2-LongVILA (4.44 and later) row-major ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LEGACY = (4, 37)


def suggest_token_order(root: Mapping[str, Any]) -> tuple[str | None, str]:
    """The token order of a model with the root configuration ``root``, and why; None where it cannot be told.

    Our own metadata says it, whatever it says; other projectors than ``mlp_downsample`` have one order only; else the recorded
    ``transformers_version`` suggests it.
    """
    recorded = (root.get("megatron_vila") or {}).get("projector_token_order")
    if recorded is not None:
        return recorded, "recorded by megatron_vila"
    kind = projector_type(root)
    if kind is not None and kind != "mlp_downsample":
        return "row_major", f"{kind} has no other"
    recorded, number = root.get("transformers_version"), _version(root)
    if number is None:
        return None, "the root configuration records no transformers_version"
    if number <= _LEGACY:
        return "legacy_column_major", f"transformers {recorded} is of the time of VILA-1.5 and Llama-3-LongVILA"
    if number >= (4, 44):
        return "row_major", f"transformers {recorded} is of the time of NVILA and Qwen2-LongVILA"
    return None, f"transformers {recorded} lies between the two orders (up to 4.37 and from 4.44 on)"


def is_legacy(root: Mapping[str, Any]) -> bool:
    """Whether a root configuration is of the time of VILA-1.5 and Llama-3-LongVILA, as far as it says."""
    number = _version(root)
    return number is not None and number <= _LEGACY


def _version(root: Mapping[str, Any]) -> tuple[int, int] | None:
    recorded = root.get("transformers_version")
    version = re.match(r"(\d+)\.(\d+)", recorded) if isinstance(recorded, str) else None
    return (int(version[1]), int(version[2])) if version else None


def projector_type(root: Mapping[str, Any]) -> str | None:
    """``mm_projector_type`` of a root configuration: of its projector part, else its own, else what its model type implies."""
    part = root.get("mm_projector_cfg")
    if isinstance(part, Mapping) and part.get("mm_projector_type"):
        return part["mm_projector_type"]
    if root.get("mm_projector_type"):
        return root["mm_projector_type"]
    return "mlp_downsample_3x3_fix" if root.get("model_type") == "nvila_lite" else None
