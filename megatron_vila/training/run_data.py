"""The data sets of a run, opened once for all that read them, and what is logged about their records at the start."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_vila.config.schema import Config
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.fields import RecordError
from megatron_vila.data.media import is_there, name_of
from megatron_vila.data.sources.holdings import holdings_warnings
from megatron_vila.data.sources.open import PARTS, Blend, open_blend, open_records
from megatron_vila.data.sources.source import BadRecordsError, Source, media_of, report_bad_records
from megatron_vila.data.tokenizer import load_tokenizer, tokenizer_warnings
from megatron_vila.errors import ConfigError, PeerError, UserError, some
from megatron_vila.parallel.agreement import gathered
from megatron_vila.plain_files import replace_file
from megatron_vila.training.report_files import Reporting

SHOWN_FILES = 4
"""most missing files that are named"""

BAD_RECORDS_FILE = "bad_records.txt"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """The samples of ``data.train``, then those of ``data.eval`` if it names files; ``blend`` says how the former are mixed."""

    opened: Sequence[VilaDataset]
    blend: Blend

    @property
    def train(self) -> VilaDataset:
        return self.opened[0]

    @property
    def held_out(self) -> VilaDataset:
        """Raises ``IndexError`` for a run without ``data.eval``, which has no task that reads it."""
        return self.opened[1]


def open_run_data(config: Config, is_writer: bool) -> RunData:
    """Open the files of a run, on every rank. The writer logs in one report which records are bad, and lists all of them in
    ``bad_records.txt`` in the output folder.

    Collective over all ranks (one all-gather). A rank that cannot open the files raises ``ConfigError``, and the others then
    ``PeerError``. All raise ``ConfigError`` if any rank finds other records in its files than rank 0.
    """
    opened, blend, problem = _open_all(config, is_writer)
    everywhere = gathered((problem, [dataset.records.digest for dataset in opened]))
    if problem or blend is None:
        raise ConfigError(problem)
    if any(problem for problem, _ in everywhere):
        raise PeerError("another rank cannot open its files of samples")
    digests = [digest for _, digest in everywhere]
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ConfigError(
            f"data.train={config.data.train} and data.eval={config.data.eval} are not the same files on all nodes: rank "
            f"{some(others)} found other records in them than rank 0; copy them anew"
        )
    return RunData(opened, blend)


def open_dataset(config: Config, name: str) -> VilaDataset:
    """The samples of data.``name`` (train or eval) as documents. Raises ``UserError`` that names file, place and cure."""
    try:
        return _dataset(config, open_records(config.data, getattr(config.data, name), PARTS[name]), _tokenizer(config))
    except BadRecordsError as error:
        raise ConfigError(_explained(config, error)) from error


def held_out_gaps(held_out: Source) -> str:
    """A line about files that the records of ``data.eval`` name and that are not there; empty if all are."""
    if held_out.is_self_contained:
        return ""
    media = [medium for index in range(len(held_out)) for medium in media_of(held_out, index)]
    paths = dict.fromkeys(path for medium in media for path in medium.pictures or (medium.path,))
    missing = [path for path in paths if not is_there(path)]
    if not missing:
        return ""
    named = some(list(map(name_of, missing)), SHOWN_FILES)
    return (
        f"data.eval names {len(paths)} media files, of which {len(missing)} are missing: "
        f"{named}; restore them or set data.media_dir before the evaluation comes: "
        "samples without their files are left out of it"
    )


def _open_all(config: Config, is_writer: bool) -> tuple[list[VilaDataset], Blend | None, str]:
    """The data sets and the blend of the first, or why there are none."""
    blends: list[Blend] = []
    sources: list[Source] = []
    bad: list[str] = []
    problem: UserError | None = None
    for name, part in PARTS.items():
        files = getattr(config.data, name)
        if not files:
            continue
        try:
            blends.append(open_blend(config.data, files, part, config.data.weights if name == "train" else ()))
            sources.append(blends[-1].records)
            bad += sources[-1].bad.values()
        except RecordError as error:
            problem = problem or error
            bad += error.bad.values() if isinstance(error, BadRecordsError) else ()
    if is_writer:
        tell_bad_records(config, sources, bad)
    try:
        if problem is not None:
            raise problem
        tokenizer = _tokenizer(config)
        return [_dataset(config, source, tokenizer) for source in sources], blends[0], ""
    except UserError as error:
        return [], None, _explained(config, error)


def _tokenizer(config: Config) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(config.data.tokenizer)
    tokenizer_warnings(config, tokenizer)
    return tokenizer


def _dataset(config: Config, source: Source, tokenizer: PreTrainedTokenizerBase) -> VilaDataset:
    return VilaDataset(source, tokenizer, config.data, config.model, config.train.seq_length)


def _explained(config: Config, error: UserError) -> str:
    if not isinstance(error, BadRecordsError):
        return str(error)
    cure = "mend them"
    if config.data.bad_records == "stop":
        cure += ", or leave them out with data.bad_records=skip"
    return f"{error}\n{cure}; `python -m megatron_vila.data check` lists all of them"


def tell_bad_records(config: Config, sources: Sequence[Source], bad: Sequence[str]) -> None:
    """Log the bad records of ``sources``, and where prepared ones hold less than the settings want.

    ``bad`` are also the bad records of files that cannot be opened, which the error tells.
    """
    for source in sources:
        if source.bad:
            logger.warning("%s", report_bad_records(source.bad, len(source)))
        for warning in holdings_warnings(config, source.holdings):
            logger.warning("%s", warning)
    path = Path(config.train.output) / BAD_RECORDS_FILE
    text = "".join(f"{reason}\n" for reason in bad)

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    if bad:
        Reporting().attempt(str(path), lambda: replace_file(path, write))
        logger.warning("all bad records are listed in %s", path)
    else:
        Reporting().attempt(str(path), lambda: path.unlink(missing_ok=True))
