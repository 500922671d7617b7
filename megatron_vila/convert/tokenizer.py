"""Tokenizer files of a checkpoint: copied as they are, and asked for the few ids that configurations name."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_vila.convert.hf_folder import TOKENIZER_FILES

IMAGE, VIDEO = "<image>", "<vila/video>"

logger = logging.getLogger(__name__)


def copy_tokenizer(source: Path, target: Path, chat_template: str | None = None) -> Path:
    """Copy the tokenizer's files into the folder ``target``, if asked for with another chat template; returns ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if chat_template is not None:
        (target / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        # Where older readers look for it.
        settings = target / "tokenizer_config.json"
        content = json.loads(settings.read_text(encoding="utf-8")) | {"chat_template": chat_template}
        settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def suggest_template(tokenizer: Any) -> str:
    """VILA's own prompt for a language model with this tokenizer, as its code chose it until transformers 4.37; it is logged."""
    known = tokenizer.get_vocab()
    prompts = {"<|start_header_id|>": "llama_3", "<|im_end|>": "hermes-2"}
    name = next((prompt for token, prompt in prompts.items() if token in known), "vicuna_v1")
    logger.warning(
        "chat template: %s, VILA's own prompt at the time of this model (the tokenizer's own: --template own at an import, "
        "template='' in from_pretrained)",
        name,
    )
    return name


def separator_ids(tokenizer: Any, name: str, text: str) -> list[int]:
    """The ids of what VILA writes after a picture, for the key ``name``; they are logged."""
    ids = tokenizer.encode(text, add_special_tokens=False) if text else []
    logger.warning("%s=%s: %r, what VILA writes after a picture", name, ids, text)
    return ids


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
