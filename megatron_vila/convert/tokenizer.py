"""The tokenizer of a checkpoint: copies its files unchanged, and reads from it the few token ids that configurations name."""

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
    """Copy the tokenizer's files from ``source`` to the folder ``target``, which is made if needed; return ``target``.

    ``chat_template``, if given, replaces the tokenizer's own.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if chat_template is not None:
        (target / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        # Older readers look for the template here.
        settings = target / "tokenizer_config.json"
        content = json.loads(settings.read_text(encoding="utf-8")) | {"chat_template": chat_template}
        settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def suggest_template(tokenizer: Any) -> str:
    """Name of the prompt that VILA's code used with this tokenizer, up to its versions for transformers 4.37; it is logged."""
    known = tokenizer.get_vocab()
    prompts = {"<|start_header_id|>": "llama_3", "<|im_end|>": "hermes-2"}
    name = next((prompt for token, prompt in prompts.items() if token in known), "vicuna_v1")
    logger.warning(
        "chat template: %s, VILA's own prompt at the time of this model; for the tokenizer's own template, give --template own "
        "to an import, or template='' to from_pretrained",
        name,
    )
    return name


def separator_ids(tokenizer: Any, name: str, text: str) -> list[int]:
    """Token ids of ``text``, which VILA writes after a picture, for the key ``name``; empty for no text. They are logged."""
    ids = tokenizer.encode(text, add_special_tokens=False) if text else []
    logger.warning("%s=%s: %r, what VILA writes after a picture", name, ids, text)
    return ids


def open_tokenizer(folder: Path | None) -> tuple[Any, str]:
    """The tokenizer of a local folder and an empty text, or None and the reason; no code of the folder is run."""
    if folder is None:
        return None, "there is no tokenizer_config.json"
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False), ""
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        return None, f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: {error})"


def media_token_ids(tokenizer: Any) -> tuple[int, int]:
    """Token ids of ``<image>`` and ``<vila/video>``.

    For a tokenizer without them they are the ids under which VILA's loader appends them: it first adds a sentinel behind the
    last token, then these two. They may lie beyond the embedding table, in which they are never looked up.
    """
    known = tokenizer.get_vocab()
    return known.get(IMAGE, len(tokenizer) + 1), known.get(VIDEO, len(tokenizer) + 2)
