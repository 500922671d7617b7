"""What a training step sends over NVLink and over the network, and the least time that takes on a machine. A prediction.

Assumed: a link moves data at its published rate in both directions at once; NVLink and the network work side by side; an exchange
ends when its busiest rank has sent and received everything; exchanges follow each other and nothing hides under computation. So
a real exchange takes longer than told here, and a step waits for less of it where it is hidden (ring, gradients).

Gradients are summed and new weights gathered inside NVLink first; then each of the ranks that it joins exchanges its share with
those that it does not reach. Left out: exchanges of a few numbers, those of the loss, and sums over tp of replicated weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_vila.config.schema import Config
from megatron_vila.plan import traffic
from megatron_vila.plan.flops import model_flops
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.hardware import Machine
from megatron_vila.plan.memory import element_bytes, gradient_bytes, stage_parameters
from megatron_vila.plan.row_plan import RowPlan
from megatron_vila.plan.traffic import Sent


@dataclass(frozen=True)
class Load:
    """Bytes of one exchange, or of several, through the busiest rank of each link, in the direction that has more of them."""

    nvlink: float = 0.0
    network: float = 0.0

    @classmethod
    def of(cls, sent: Sent, domains_E: np.ndarray) -> Load:
        """``domains_E`` tells which encoders NVLink joins: those with the same number."""
        domains_GN = domains_E[sent.members_GN]
        joined_GNN = domains_GN[:, :, None] == domains_GN[:, None, :]
        busiest = (
            max(int(bytes_GNN.sum(axis=axis).max()) for axis in (1, 2))
            for bytes_GNN in (sent.bytes_GNN * joined_GNN, sent.bytes_GNN * ~joined_GNN)
        )
        return cls(*busiest)

    def seconds(self, machine: Machine) -> float:
        """The least time of one exchange. The links of ``machine`` must be known."""
        assert machine.nvlink and machine.network, machine
        return max(self.nvlink / machine.nvlink, self.network / machine.network)


@dataclass(frozen=True)
class StepTraffic:
    """One kind of traffic of a step: the bytes of its busiest rank over each link, and the least time."""

    name: str
    nvlink: float
    network: float
    seconds: float


def step_traffic(config: Config, plan: RowPlan, machine: Machine) -> list[StepTraffic]:
    """The traffic of a step whose rows are all like that of ``plan``, in the first replica; kinds that send nothing are left out.

    The links of ``machine`` must be known.
    """
    told = []
    for name, calls in _exchanges(config, plan, machine):
        nvlink = sum(times * load.nvlink for times, load in calls)
        network = sum(times * load.network for times, load in calls)
        if nvlink or network:
            seconds = sum(times * load.seconds(machine) for times, load in calls)
            told.append(StepTraffic(name, nvlink, network, seconds))
    return told


def step_flop_seconds(config: Config, plan: RowPlan, peak_flops: float) -> float:
    """The time of a step's model FLOPs at the peak of all ranks (``plan/flops.py`` says what counts)."""
    row = plan.row
    flops = model_flops(row.lengths, row.supervised_tokens, row.units, config.model, config.optim).total
    return flops * config.train.global_batch_size / (plan.grid.world_size * peak_flops)


def _exchanges(config: Config, plan: RowPlan, machine: Machine) -> Iterator[tuple[str, list[tuple[int, Load]]]]:
    """Each kind of traffic with its exchanges: how often one happens in a step, and its load."""
    llm, grid, optim, memory = config.model.llm, plan.grid, config.optim, config.memory
    element = element_bytes(config.train.precision, on_gpu=True)
    domains = np.arange(grid.world_size) // machine.joined_ranks(config.parallel.gpus_per_node)
    domains_E = domains[traffic.block_ranks(grid)]
    rows, layers = config.train.global_batch_size // grid.dp, llm.num_layers // grid.pp
    again = 0 if memory.recompute == "none" else min(memory.recompute_layers or layers, layers)

    def both(passes: tuple[Sent, Sent], forward: int, backward: int) -> list[tuple[int, Load]]:
        loads = (Load.of(sent, domains_E) for sent in passes)
        return [(rows * times, load) for times, load in zip((forward, backward), loads, strict=True)]

    per_layer = (grid, llm, plan.row.length, element)
    yield "TP gather and scatter", both(traffic.tensor_bytes(*per_layer), layers + again, layers)
    yield "Ulysses all-to-all", both(traffic.ulysses_bytes(*per_layer), layers + again, layers)
    again *= memory.recompute == "full"
    yield "ring K/V", both(traffic.ring_bytes(*per_layer), layers + again, layers)
    below = optim.vision.trainable or optim.projector.trainable
    yield "stage-2 re-shard", both(traffic.reshard_bytes(plan.reshard, llm.hidden_size, element), 1, int(below))
    boundary = plan.row.length // grid.encoders * llm.hidden_size * element
    yield "pipeline", [(2 * rows, _between_stages(grid, domains, boundary))]
    _, trained = stage_parameters(config)
    each = gradient_bytes(config, element) + element
    yield "gradients and new weights", [(1, _over_replicas(grid, domains, trained * each))]


def _between_stages(grid: GridShape, domains: np.ndarray, boundary: int) -> Load:
    """``boundary`` bytes from every rank of the first replica to its successor on the next stage."""
    stages_PE = np.array([domains[traffic.block_ranks(grid, pp=stage)] for stage in range(grid.pp)])
    joined = stages_PE[:-1] == stages_PE[1:]
    return Load(boundary * bool(joined.any()), boundary * bool((~joined).any()))


def _over_replicas(grid: GridShape, domains: np.ndarray, size: int) -> Load:
    """A reduce-scatter or an all-gather of ``size`` bytes over dp x cp, inside NVLink first."""
    reached, members = np.unique(domains[grid.group("dp_cp", 0)], return_counts=True)
    inside, parts = int(members.min()), len(reached)
    return Load(size * (inside - 1) / inside, size / inside * (parts - 1) / parts)
