"""Finds out in which order an ``mlp_downsample`` projector emits the tokens of a picture: recorded, inferred, or unknown.

Weights of both orders look alike, and no key of a published configuration tells them apart. A model that was trained with one
order sees transposed pictures with the other. The code of VILA-1.5 and Llama-3-LongVILA (transformers 4.36 and 4.37) made
column-major tokens, that of NVILA and Qwen2-LongVILA (4.44 and later) row-major ones, so the version suggests the order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LEGACY = (4, 37)


def suggest_token_order(root: Mapping[str, Any]) -> tuple[str | None, str]:
    """The token order of a model with the root configuration ``root``, None if it is unknown; and the reason.

    An order in our own section ``megatron_vila`` is returned as it is, without a check. Projectors other than
    ``mlp_downsample`` have only one order. Otherwise the recorded ``transformers_version`` suggests the order.
    """
    recorded = (root.get("megatron_vila") or {}).get("projector_token_order")
    if recorded is not None:
        return recorded, "recorded by megatron_vila"
    kind = projector_type(root)
    if kind is not None and kind != "mlp_downsample":
        return "row_major", f"{kind} has no other order"
    recorded, number = root.get("transformers_version"), _version(root)
    if number is None:
        return None, "the root configuration records no transformers_version"
    if number <= _LEGACY:
        return "legacy_column_major", f"transformers {recorded} is of the time of VILA-1.5 and Llama-3-LongVILA"
    if number >= (4, 44):
        return "row_major", f"transformers {recorded} is of the time of NVILA and Qwen2-LongVILA"
    return None, f"transformers {recorded} lies between the versions of the two orders (up to 4.37, and from 4.44 on)"


def is_legacy(root: Mapping[str, Any]) -> bool:
    """Whether a root configuration is of the time of VILA-1.5 and Llama-3-LongVILA; false if it records no version."""
    number = _version(root)
    return number is not None and number <= _LEGACY


def _version(root: Mapping[str, Any]) -> tuple[int, int] | None:
    recorded = root.get("transformers_version")
    version = re.match(r"(\d+)\.(\d+)", recorded) if isinstance(recorded, str) else None
    return (int(version[1]), int(version[2])) if version else None


def projector_type(root: Mapping[str, Any]) -> str | None:
    """The projector's type: that of the projector's section, else that of the root, else what the root's model type implies."""
    part = root.get("mm_projector_cfg")
    if isinstance(part, Mapping) and part.get("mm_projector_type"):
        return part["mm_projector_type"]
    if root.get("mm_projector_type"):
        return root["mm_projector_type"]
    return "mlp_downsample_3x3_fix" if root.get("model_type") == "nvila_lite" else None
