"""Tokenizer files of a checkpoint: copied as they are, and asked for the few ids that configurations name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_vila.checkpoint.hf_folder import TOKENIZER_FILES

IMAGE, VIDEO = "<image>", "<vila/video>"


def copy_tokenizer(source: Path, target: Path) -> Path:
    """Copy the tokenizer's files into the folder ``target``; returns it."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return target


def open_tokenizer(folder: Path | None) -> tuple[Any, str]:
    """The tokenizer of a local folder, or None and why; no code of the folder is run."""
    if folder is None:
        return None, "there is no tokenizer_config.json"
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False), ""
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        return None, f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: {error})"


def media_token_ids(tokenizer: Any) -> tuple[int, int]:
    """Ids of ``<image>`` and ``<vila/video>``.

    A tokenizer without them gets them behind its last token, after the sentinel, as VILA's loader appends them; they may lie
    beyond the embedding table and are never looked up.
    """
    known = tokenizer.get_vocab()
    return known.get(IMAGE, len(tokenizer) + 1), known.get(VIDEO, len(tokenizer) + 2)
