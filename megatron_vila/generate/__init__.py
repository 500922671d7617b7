"""Answers questions about long videos: prefill, a cache shared by all GPUs, decoding. docs/inference.md tells how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_vila.generate.loaded import LoadedModel


def load(folder: str | Path, **settings: Any) -> LoadedModel:
    """The model of ``folder``, ready to answer: ``load(folder).ask("What happens?", videos=["hour.mp4"]).text``.

    ``settings`` and errors are those of ``loading.load_model``.
    """
    from megatron_vila import accelerator

    accelerator.prepare()
    # Imported late: Megatron-Core must be prepared for this machine first.
    from megatron_vila.generate.loading import load_model

    return load_model(folder, **settings)
