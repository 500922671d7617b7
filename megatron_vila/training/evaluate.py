"""Exact-match accuracy on held-out samples by one sharded forward pass each: is every token of the answers the arg-max?"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_vila.config.schema import Config
from megatron_vila.training.feed import chance_level, evaluation_loader
from megatron_vila.training.step import MicroBatch, Pass, exact_matches


def evaluate(config: Config, forward: Pass) -> dict[str, float]:
    """``accuracy``, ``loss`` (mean per supervised token), ``chance`` and ``samples`` of ``data.eval``, equal on all ranks.

    Teacher-forced, like the needle test of LongVILA section 4.3: no token is generated. Collective over all ranks: the
    model's own, sums over dp and cp, a broadcast over pp.
    """
    topology, device = forward.topology, forward.device
    training = forward.model.training
    forward.model.eval()
    matched, losses = (torch.zeros(2, dtype=torch.float64, device=device) for _ in range(2))
    loader, samples = evaluation_loader(config, topology)
    with loader, torch.no_grad():
        for step in range(math.ceil(samples / topology.grid.dp)):
            rows = loader.rows(step)
            reports = forward.run([MicroBatch(r.row, r.pixels) for r in rows], forward_only=True)
            if not topology.is_last_stage:
                continue
            # In the last step some replicas hold samples of a second round; a broken sample's replacement is no second try.
            counts = [row.number < samples and not row.stats.replaced_broken for row in rows]
            for match, report, counted in zip(exact_matches(reports, topology, device), reports, counts, strict=True):
                if counted:
                    losses += torch.stack([report["loss_sum"].double(), losses.new_tensor(report["supervised"])])
                if counted and match is not None:
                    matched += matched.new_tensor([match, 1])
    if topology.is_last_stage:
        dist.all_reduce(matched, group=topology.dp)
        dist.all_reduce(losses, group=topology.dp_cp)
    results = torch.cat([matched, losses])
    if topology.grid.pp > 1:
        dist.broadcast(results, group=topology.pp, group_src=topology.grid.pp - 1)
    forward.model.train(training)
    right, counted, loss, tokens = results.tolist()
    return {
        "accuracy": right / max(counted, 1),
        "chance": chance_level(config.data.eval, config.data.media_dir, config.data.media_format),
        "loss": loss / max(tokens, 1),
        "samples": counted,
    }
