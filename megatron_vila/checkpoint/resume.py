"""Where a run continues, and what it must have in common with the run that was saved: settings kept in the checkpoint, and what
it means that one has changed.

``settings_of`` gives the settings as a flat dict, key -> plain value; the trainer keeps it in the checkpoint's ``extra``.
``changes`` compares two of them: each difference becomes a line, or an error where going on makes no sense. To watch one more
setting add a ``Rule``; a setting without a rule is told with the last one. A key that the checkpoint lacks, because an older
version wrote it, is not compared, unless its rule says which value that version stood for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_vila.checkpoint.folder import to_resume
from megatron_vila.checkpoint.save_load import newest_whole
from megatron_vila.config.keys import config_keys
from megatron_vila.config.schema import Config
from megatron_vila.data.tokenizer import load_tokenizer
from megatron_vila.errors import CheckpointError, SettingError
from megatron_vila.parallel.agreement import on_rank_zero
from megatron_vila.plan.bounds import value_of
from megatron_vila.plan.sizes import head_dim

_NEW_RUN = "or start a new run from the weights (checkpoint.load, and another train.output)"
_OTHER_MODEL = "the weights mean something else then"


@dataclass(frozen=True)
class Rule:
    """What a change of the settings ``keys`` (exact, or with ``*``) means. With ``cure`` it is refused.

    ``before`` is the value that checkpoints without the key stand for; None: such checkpoints are not compared.
    """

    keys: tuple[str, ...]
    effect: str
    cure: str = ""
    before: Any = None


RULES = (
    Rule(
        ("tokenizer.vocabulary",),
        "this is another tokenizer, whose ids mean other text than the weights have learned",
        f"set data.tokenizer to the tokenizer of the saved run, {_NEW_RUN}",
    ),
    Rule(
        (
            "model.projector.*",
            "model.llm.num_heads",
            "model.llm.num_kv_heads",
            "model.llm.head_dim",
            "model.vision.num_heads",
            "model.vision.patch_size",
            "model.vision.image_size",
        ),
        _OTHER_MODEL,
        f"set it back, {_NEW_RUN}",
    ),
    Rule(
        ("data.media_format",),
        "conversations become other tokens than those that were learned",
        f"set data.media_format to the rule of the saved run (verbatim, where the checkpoint names none), {_NEW_RUN}",
        before="verbatim",
    ),
    Rule(
        ("data.template",),
        "conversations become other tokens than those that were learned",
        f"set data.template to that of the saved run (empty, where the checkpoint names none), {_NEW_RUN}",
        before="",
    ),
    Rule(("data.parse_control_tokens",), "control tokens in the turns of coming samples are read in another way", before=True),
    Rule(("tokenizer.chat_template", "tokenizer.separators"), "the text around the turns is another one from the next step on"),
    Rule(("model.attention", "train.precision", "train.deterministic"), "coming steps differ by rounding"),
    Rule(
        ("train.seed", "data.train", "data.weights", "data.shuffle"),
        "the order of coming samples is not that of the saved run: some come again, others are left out",
    ),
    Rule(
        ("train.global_batch_size", "data.packing"),
        "coming steps hold other rows; the samples go on where the saved run stood, none comes again or is left out",
    ),
    Rule(("data.eval",), "results on held-out samples are not comparable with earlier ones"),
    Rule(("data.*", "train.seq_length"), "coming samples are made in another way than those before"),
    Rule(
        ("train.steps",),
        "the run ends there, and learning rates that follow its length (cosine, warmup_fraction) are from the next step on "
        "those of a run of this length",
    ),
    Rule(
        ("optim.lr", "optim.*.lr", "optim.min_lr", "optim.schedule", "optim.warmup_*"),
        "learning rates follow another schedule from the next step on",
    ),
    Rule(("optim.*", "model.lora.*"), "coming updates follow another rule"),
    Rule(("model.*",), "the model computes something else with the same weights"),
    Rule(("*",), "results of coming steps may differ"),
)
"""The first rule that fits counts."""

UNWATCHED = (
    # How and where it runs. Layouts and memory policies agree up to rounding.
    "parallel.*",
    "memory.*",
    "profile.*",
    "checkpoint.*",
    "data.workers",
    "data.video_decoder",
    "data.prefetch",
    "data.host_memory_gib",
    # What becomes of bad samples counts where there are some, and is told then.
    "data.bad_records",
    "data.max_broken",
    "optim.offload_fraction",
    "model.name",
    "model.init_std",
    "model.vision.recompute",
    "model.vision.frame_micro_batch",
    "train.output",
    "train.log_every",
    "train.eval_every",
    "train.on_nan",
    "train.max_skips",
    "train.timeout_minutes",
    # Tensors of another shape, too few or too many are named when they are loaded.
    "model.*.num_layers",
    "model.*.hidden_size",
    "model.*.ffn_hidden_size",
    "model.lora.rank",
    "model.lora.targets",
)
"""Settings on which the numbers of coming steps do not depend, or whose change is noticed elsewhere."""


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run continues from, None for a new run, and the newer ones that are damaged, with the reason."""

    checkpoint: Path | None = None
    passed_over: Mapping[Path, str] = field(default_factory=dict)
    checked: bool = False


def resume_point(config: Config) -> ResumePoint:
    """Where ``checkpoint.resume`` lets the run go on. Collective over all ranks. Raises ``CheckpointError``."""
    if config.checkpoint.resume == "newest_whole":
        return ResumePoint(*newest_whole(config.train.output), checked=True)
    if not config.checkpoint.resume:
        return ResumePoint()
    known = on_rank_zero(lambda: to_resume(config.train.output), f"cannot continue in train.output={config.train.output}")
    return ResumePoint(known[0] if known else None)


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that a checkpoint keeps. Reads ``data.tokenizer``; one that cannot be read is the data's own error later."""
    settings = {key.name: value_of(config, key.name) for key in config_keys() if not _fits(key.name, UNWATCHED)}
    settings["model.llm.head_dim"] = head_dim(config.model.llm)
    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
    except SettingError:
        return settings
    # Where the folder lies does not matter.
    del settings["data.tokenizer"]
    return settings | tokenizer_settings(tokenizer, config)


def tokenizer_settings(tokenizer: Any, config: Config) -> dict[str, Any]:
    """What is kept of a tokenizer: its vocabulary, its template, and what the separators of ``config`` say in it."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    data = config.data
    return {
        "tokenizer.vocabulary": f"{len(vocabulary)} pieces, {_digest(vocabulary)}",
        "tokenizer.chat_template": _digest(tokenizer.chat_template),
        "tokenizer.separators": [tokenizer.decode(ids) for ids in (data.frame_separator_ids, data.image_separator_ids)],
    }


def other_text(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a new run reads in another way than the run that its weights come from: one line each.

    Raises ``CheckpointError`` where the ids of the separators are the same and mean another text: that is another tokenizer.
    """
    ids = ("data.frame_separator_ids", "data.image_separator_ids")
    texts = [settings.get("tokenizer.separators") for settings in (saved, now)]
    if None not in texts and texts[0] != texts[1] and all(saved.get(key) == now.get(key) for key in ids):
        raise CheckpointError(
            f"data.frame_separator_ids={now[ids[0]]} and data.image_separator_ids={now[ids[1]]} were the texts {texts[0]} and "
            f"are {texts[1]} in this tokenizer; set data.tokenizer to the tokenizer of the weights"
        )
    keys = ("tokenizer.vocabulary", "tokenizer.chat_template", "data.media_format", "data.template")
    return [
        f"{key}: {_short(saved[key])} -> {_short(now[key])}"
        for key in keys
        if key in saved and key in now and saved[key] != now[key]
    ]


def is_of_a_run(extra: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's ``extra`` holds what a run goes on with."""
    counts = extra.get("counts")
    numbers = [extra.get("step"), extra.get("skipped"), *(counts.values() if isinstance(counts, dict) else [None])]
    return all(type(number) is int and number >= 0 for number in numbers) and isinstance(kept_settings(extra), dict)


def kept_settings(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a checkpoint's ``extra``; early versions kept what the order of samples depends on, as ``data``."""
    return extra["settings"] if "settings" in extra else extra.get("data", {})


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each setting that differs: from, to, and what follows from it.

    Raises ``CheckpointError`` with all differences that make no sense, each with its cure.
    """
    lines, refused = [], []
    for key, value in now.items():
        rule = next(rule for rule in RULES if _fits(key, rule.keys))
        before = saved.get(key, rule.before)
        if before == value or (key not in saved and rule.before is None):
            continue
        line = f"{key}: {_short(before)} -> {_short(value)}: {rule.effect}"
        if rule.cure:
            refused.append(f"{line}; {rule.cure}")
        else:
            lines.append(line)
    if refused:
        raise CheckpointError("\n".join(refused))
    return lines


def _fits(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _short(value: Any, most: int = 200) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."
