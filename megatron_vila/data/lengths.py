"""The table of sample lengths that packing needs, made once and kept in a JSON file beside the run's output."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np

from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.media import MediaSource, state_of

RULES_VERSION = 2
"""Counts the changes of the rules by which frames are found, counted and sampled: tables made by earlier ones are not used."""

logger = logging.getLogger(__name__)


def length_table(dataset: VilaDataset, cache: str, workers: int) -> np.ndarray:
    """Tokens of each sample (or of the one that replaces it) without padding: int64 [samples].

    It depends on the files and the data settings alone, never on a layout. ``cache`` is read if its fingerprint (text files,
    sizes and times of the media, tokenizer, settings) is the same, else written anew in one step, so a reader never sees half
    a file. ``workers`` threads read the media. When several ranks share a file system, call it on one of them first.

    Raises ``NoUsableSampleError`` if no sample can be used.
    """
    fingerprint = _fingerprint(dataset)
    known = _read(cache, fingerprint)
    if known is not None and len(known) == len(dataset):
        return known
    logger.info("measuring the lengths of %d samples for packing", len(dataset))

    def length(index: int) -> int:
        known = dataset.records.cost(index)
        return len(dataset.document(index)) if known is None else known

    with ThreadPoolExecutor(max(1, workers)) as pool:
        lengths = list(pool.map(length, range(len(dataset))))
    _write(cache, {"fingerprint": fingerprint, "lengths": lengths})
    return np.array(lengths, dtype=np.int64)


def _fingerprint(dataset: VilaDataset) -> str:
    settings = asdict(dataset.data)
    for key in (
        *("train", "eval", "media_dir", "tokenizer", "packing", "shuffle", "workers", "prefetch", "image_aspect"),
        *("video_decoder", "host_memory_gib"),
        *("bad_records", "max_broken", "ignore_fields"),
    ):
        del settings[key]
    settings |= {
        "seq_length": dataset.seq_length,
        "pictures": repr(dataset.pictures),
        "encoder": dataset.encoder.fingerprint(),
        "rules": RULES_VERSION,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for index in range(len(dataset)):
        if index in dataset.records.bad:
            digest.update(b"bad")
            continue
        record = dataset.records.record(index)
        media = [(medium, *_state(medium.path)) for medium in record.media]
        digest.update(repr((record.sample_id, record.turns, media)).encode())
    return digest.hexdigest()


def _state(source: MediaSource) -> tuple[int | str, ...]:
    try:
        return state_of(source)
    except OSError:
        return -1, -1


def _read(cache: str, fingerprint: str) -> np.ndarray | None:
    try:
        if os.path.exists(cache) and not os.path.isfile(cache):
            raise OSError(0, "it is not a plain file")  # a pipe would be waited for
        with open(cache) as stream:
            content = json.load(stream)
        if content["fingerprint"] == fingerprint:
            return np.array(content["lengths"], dtype=np.int64)
        logger.info("%s belongs to other files or settings and is made anew", cache)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read and is made anew: %s", cache, error)
    return None


def _write(cache: str, content: dict) -> None:
    """The file only saves the time of measuring again: a full disk is reported and does not end the run."""
    folder, temporary = os.path.dirname(os.path.abspath(cache)), None
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as stream:
            temporary = stream.name
            json.dump(content, stream)
        os.chmod(temporary, 0o644)
        os.replace(temporary, cache)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the next start measures again", cache, error.strerror)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
