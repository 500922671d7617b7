"""Exact-match accuracy on held-out samples by one sharded forward pass each: is every token of the answers the arg-max?

A held-out sample that cannot be used is left out of every number, and a line of the log says how many were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_vila.config.schema import Config
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.held_out import LeftOut
from megatron_vila.data.rows import LoadedRow
from megatron_vila.data.sources.source import Source, media_of
from megatron_vila.training.feed import chance_level, evaluation_loader
from megatron_vila.training.roles import TaskName
from megatron_vila.training.run_data import RunData, held_out_gaps
from megatron_vila.training.step import Pass, exact_matches

LEFT_OUT = {
    "broken": "broken (the log names them)",
    "too_long": "do not fit train.seq_length",
    "unanswered": "have no answer",
}
"""Why a held-out sample does not count; ``left_out_<key>`` of an evaluation says how many."""


EVALUATION = TaskName("evaluation", "eval")


class HeldOut:
    """The evaluation (a ``roles.Task``) of a run with ``data.eval``, after the last step and every ``train.eval_every`` steps."""

    name = EVALUATION

    def __init__(self, config: Config) -> None:
        self._config = config

    def warnings(self, data: RunData) -> list[str]:
        gaps = held_out_gaps(data.held_out.records)
        return [gaps] if gaps else []

    def is_due(self, step: int, is_last: bool) -> bool:
        every = self._config.train.eval_every
        return is_last or (every > 0 and step % every == 0)

    def run(self, forward: Pass, data: RunData) -> dict[str, float]:
        return evaluate(self._config, forward, data.held_out)

    def remarks(self, results: Mapping[str, float]) -> list[str]:
        lines = []
        left_out = {why: int(results[f"left_out_{why}"]) for why in LEFT_OUT if results[f"left_out_{why}"]}
        if left_out:
            total = sum(left_out.values())
            reasons = ", ".join(f"{count} {LEFT_OUT[why]}" for why, count in left_out.items())
            lines.append(f"{total} of {total + int(results['samples'])} held-out samples are left out of all numbers: {reasons}")
        if results["left_out_videos"] and not results["videos"]:
            lines.append(f"no held-out video was tested: all {results['left_out_videos']} were left out")
        if not results["samples"]:
            lines.append("no held-out sample was tested: there is no accuracy and no loss")
        if results["truncated"]:
            cut = results["truncated"]
            lines.append(f"{cut} held-out samples were tested with fewer frames than asked for, to fit train.seq_length")
        return lines

    def summary(self, results: Mapping[str, float]) -> dict[str, float]:
        if "accuracy" not in results:
            return {}
        return {"held_out_accuracy": results["accuracy"], "chance": results["chance"]}


def evaluate(config: Config, forward: Pass, held_out: VilaDataset) -> dict[str, float]:
    """Numbers of the samples of ``held_out``, equal on all ranks.

    ``samples`` is the number of samples that were tested, ``videos`` that of samples with a video among them, and ``truncated``
    that of samples with fewer frames than asked for. ``accuracy``, ``chance`` (both 0 to 1) and ``loss`` (mean per supervised
    token) are those of the tested samples, and are missing if there are none. ``left_out_broken``, ``left_out_too_long`` and
    ``left_out_unanswered`` count the samples that were not tested; ``left_out_videos`` of these have a video.

    Teacher-forced, like the needle test of LongVILA section 4.3: no token is generated. Collective over all ranks: the
    model's own, sums over dp and cp, a broadcast over pp.
    """
    topology, device = forward.topology, forward.device
    training = forward.model.training
    forward.model.eval()
    right, losses = torch.zeros(1, device=device, dtype=torch.float64), torch.zeros(2, device=device, dtype=torch.float64)
    loader = evaluation_loader(config, topology, held_out)
    states = torch.full((len(held_out),), _UNSEEN, dtype=torch.int64, device=device)
    with loader, torch.no_grad():
        for step in range(math.ceil(len(held_out) / topology.grid.dp)):
            row = loader.sample(step)
            # In the last step some replicas begin the held-out samples again: these do not count.
            counted = row.number < len(held_out)
            if counted:
                states[row.number] = _state(row, held_out.records)
            if isinstance(row, LeftOut):
                continue
            reports = forward.run([row], forward_only=True)
            if not topology.is_last_stage:
                continue
            (match,) = exact_matches(reports, topology, device)
            if counted and match is not None:
                right += match
                losses += torch.stack([reports[0].loss_sum.double(), losses.new_tensor(reports[0].supervised)])
    dist.all_reduce(states, op=dist.ReduceOp.MAX, group=topology.dp)
    if topology.is_last_stage:
        dist.all_reduce(right, group=topology.dp)
        dist.all_reduce(losses, group=topology.dp_cp)
    results = torch.cat([right, losses])
    if topology.grid.pp > 1:
        dist.broadcast(results, group=topology.pp, group_src=topology.grid.pp - 1)
    forward.model.train(training)
    return _results(results.tolist(), states.tolist(), held_out.records)


_UNSEEN, _TESTED, _TRUNCATED, _UNANSWERED, _TOO_LONG, _BROKEN = range(6)
_VIDEO = 8  # added where the sample has a video


def _state(row: LoadedRow | LeftOut, records: Source) -> int:
    """What became of a held-out sample, as a number that ranks can exchange."""
    if isinstance(row, LeftOut):
        return (_BROKEN if row.kind == "broken" else _TOO_LONG) + _VIDEO * _has_video(records, row.index)
    state = _TRUNCATED if row.stats.truncated else _TESTED
    if not row.row.supervised_tokens:
        state = _UNANSWERED
    return state + _VIDEO * any(frame.is_video for frame in row.row.frames)


def _has_video(records: Source, index: int) -> bool:
    return any(medium.is_video for medium in media_of(records, index))


def _results(sums: list[float], states: list[int], records: Source) -> dict[str, float]:
    right, loss, tokens = sums
    kinds = [state % _VIDEO for state in states]
    tested = [index for index, kind in enumerate(kinds) if kind in (_TESTED, _TRUNCATED)]
    with_video = [index for index, state in enumerate(states) if state >= _VIDEO]
    videos = len(set(tested) & set(with_video))
    results: dict[str, float] = {}
    if tested:
        chance = chance_level(records, tested)
        results = {"accuracy": right / len(tested), "chance": chance, "loss": loss / max(tokens, 1)}
    return results | {
        "samples": len(tested),
        "videos": videos,
        "truncated": kinds.count(_TRUNCATED),
        "left_out_broken": kinds.count(_BROKEN),
        "left_out_too_long": kinds.count(_TOO_LONG),
        "left_out_unanswered": kinds.count(_UNANSWERED),
        "left_out_videos": len(with_video) - videos,
    }
