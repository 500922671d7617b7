"""A small tokenizer trained on given texts, and loading of any tokenizer with a chat template.

``train_tokenizer`` trains a SentencePiece unigram model and writes it next to the same model as a Hugging Face fast tokenizer,
so that text becomes the same ids in both. Conversations are written as ChatML: ``<|im_start|>role``, newline, text,
``<|im_end|>``, newline.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_vila.config.schema import Config
from megatron_vila.data.control_tokens import MEDIA_NAMES
from megatron_vila.errors import SettingError
from megatron_vila.start_checks import tokenizer_folder_problem

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_SPACE = "▁"
_UNUSED_SCORE = -1000.0
# How pieces begin that stand for no text: bytes, and those that fill the vocabulary.
_NOT_OF_TEXT = "<(?=0x[0-9A-F]{2}>|unused_[0-9]+>)"
# Embeddings that models have beyond their tokenizer: Qwen2 400, to be a multiple of 512.
_PADDING = 1024


def train_tokenizer(
    texts: Iterable[str], out_dir: str | os.PathLike, vocab_size: int, fill: bool = False
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on ``texts``, write it to the folder ``out_dir`` and return it.

    The folder holds ``tokenizer.model`` (SentencePiece) and the files that ``AutoTokenizer.from_pretrained`` reads offline.
    Text survives encoding and decoding (but for the character U+2581, SentencePiece's space): no normalization, no space put
    in front, and a character that the texts never showed becomes bytes. Ids 0..3 are unknown, ``<|pad|>``, ``<|im_start|>``
    and ``<|im_end|>``, which also ends a text. The vocabulary is smaller than ``vocab_size`` if the texts hold fewer pieces:
    ``len`` of the result is its size. With ``fill`` it is filled up to ``vocab_size`` with pieces that no text uses, in the fast
    form alone: so the tokenizer fits a model of that size. The same texts in the same order give the same files.

    Raises ``SettingError`` for texts without a character and for a ``vocab_size`` below what bytes and characters need.
    """
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    if not lines:
        raise SettingError("cannot train a tokenizer: the texts are empty")
    least = 4 + 256 + 1 + len({c for line in lines for c in line})
    if vocab_size < least:
        raise SettingError(
            f"vocab_size={vocab_size} is too small for bytes and the characters of the texts; use {least} or more"
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        control_symbols=[PAD, START, END],
        user_defined_symbols=["\n"],
        max_sentence_length=1 << 24,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_fast_tokenizer(processor, vocab_size if fill else 0),
        unk_token="<unk>",
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return tokenizer


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a local folder; nothing is downloaded and no code of the folder is run.

    Raises ``SettingError`` if there is no such folder or it holds no tokenizer. Whether it is a fast one with a chat template is
    for ``ChatEncoder`` to say.
    """
    if problem := tokenizer_folder_problem(os.fspath(folder)):
        raise SettingError(problem)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SettingError(f"data.tokenizer={str(folder)!r} holds no tokenizer that can be loaded: {error}") from error
    return tokenizer


def tokenizer_warnings(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Why ``tokenizer`` may not be that of the model of ``config``. Raises ``SettingError`` where it cannot be."""
    separators = {f"data.{name}": getattr(config.data, name) for name in ("frame_separator_ids", "image_separator_ids")}
    return check_tokenizer(tokenizer, config.model.llm.vocab_size, separators)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, separators: Mapping[str, Sequence[int]]) -> list[str]:
    """Whether ``tokenizer`` can be that of a model with ``rows`` embeddings, with ``separators``, ids by the name of their key.

    Returns warnings. Raises ``SettingError`` for pieces beyond the table, for a table of which more than half would never be
    used, and for separators that are no tokens. Control tokens may lie beyond the table: VILA's media tokens do.
    """
    size, added = len(tokenizer), tokenizer.added_tokens_decoder
    own = f"data.tokenizer={str(tokenizer.name_or_path)!r}"
    cure = "use the tokenizer that belongs to the model"
    beyond = [text for text, id_ in tokenizer.get_vocab().items() if id_ >= rows and not (id_ in added and added[id_].special)]
    beyond = [text for text in beyond if text not in MEDIA_NAMES]
    if beyond:
        raise SettingError(
            f"{own} has {len(beyond)} tokens beyond model.llm.vocab_size={rows}, such as {beyond[0]!r}; {cure}, or a larger "
            "vocabulary"
        )
    if rows > 2 * size + _PADDING:
        raise SettingError(f"{own} has {size} tokens, but model.llm.vocab_size={rows}: it is that of another model; {cure}")
    warnings = []
    if rows - size > max(_PADDING, rows // 20):
        warnings.append(f"{own} uses {size} of the model's {rows} embeddings; is it the tokenizer of this model?")
    for name, ids in separators.items():
        strange = [id_ for id_ in ids if tokenizer.convert_ids_to_tokens(id_) is None]
        if strange:
            raise SettingError(f"{name} holds id {strange[0]}, which is not a token of {own}; {cure}, or other separators")
        text = str(tokenizer.decode(list(ids)))
        if text.strip() and not all(id_ in added for id_ in ids):
            warnings.append(f"{name}={list(ids)} is the text {text!r} in {own}; VILA writes line breaks or nothing")
    return warnings


def _fast_tokenizer(processor: sentencepiece.SentencePieceProcessor, least: int) -> Tokenizer:
    """The SentencePiece unigram model as a ``tokenizers`` pipeline with the same ids, and at least so many pieces."""
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    pieces += [(f"<unused_{i}>", _UNUSED_SCORE) for i in range(len(pieces), least)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # SentencePiece makes no byte of the text "<0x41>"; ``tokenizers`` finds every piece in a text unless it is cut.
            pre_tokenizers.Split(Regex(_NOT_OF_TEXT), "isolated"),
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (PAD, START, END)])
    return tokenizer
