"""The inputs that the processor makes."""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature

from megatron_vila.hf.vila.token_embedding import masked_labels


class VilaInputs(BatchFeature):
    """A ``BatchFeature`` whose ``labels`` hold -100 in the places of visual tokens.

    Programs set ``labels`` to a copy of ``input_ids`` (TRL's collators), count those that are not -100, and divide the loss by
    this number.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, masked_labels(value) if name == "labels" else value)
