"""Explained bytes are those that the real collectives of the model send."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config, ParallelConfig
from megatron_vila.plan import traffic
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row import pack
from megatron_vila.plan.row_plan import RowPlan
from tests import samples
from tests.ranks import pool


class Recorder:
    """Bytes that this rank sends to each other rank through the real collectives, by kind of exchange."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.clear()

    def clear(self) -> None:
        self.sent = {kind: [0] * self.world for kind in ("reshard", "ulysses", "ring", "tp")}

    def add(self, kind: str, group, group_rank: int, tensor_bytes: int) -> None:
        to = dist.get_process_group_ranks(group)[group_rank]
        if to != self.rank:
            self.sent[kind][to] += tensor_bytes

    def all_to_all(self, call):
        def recorded(out, given, recv=None, send=None, group=None, **options):
            # Visual tokens are [tokens, hidden]; heads travel flat or as [tokens, heads, D].
            kind = "reshard" if given.dim() == 2 else "ulysses"
            width = given[0:1].numel() if len(given) else 0
            for peer, items in enumerate(send or [len(given) // group.size()] * group.size()):
                self.add(kind, group, peer, items * width * given.element_size())
            return call(out, given, recv, send, group=group, **options)

        return recorded

    def point_to_point(self, call):
        def recorded(operations):
            for operation in operations:
                if operation.op is dist.isend:
                    self.add("ring", operation.group, operation.group_peer, operation.tensor.nbytes)
            return call(operations)

        return recorded

    def tp(self, call):
        """Gathers and scatters: each peer gets, or is sent, the smaller of the two."""

        def recorded(out, given, group, **options):
            for peer in range(group.size()):
                self.add("tp", group, peer, min(out.nbytes, given.nbytes))
            return call(out, given, group=group, **options)

        return recorded

    @contextmanager
    def listening(self):
        from megatron.core.tensor_parallel import layers, mappings

        places = [(dist, "all_to_all_single", self.all_to_all), (dist, "batch_isend_irecv", self.point_to_point)]
        places += [(dist, "all_gather_into_tensor", self.tp), (dist, "reduce_scatter_tensor", self.tp)]
        for module in (layers, mappings):
            places += [
                (module, "dist_all_gather_func", self.tp),
                (module, "dist_reduce_scatter_func", self.tp),
            ]
        kept = [getattr(module, name) for module, name, _ in places]
        try:
            for (module, name, wrapper), call in zip(places, kept, strict=True):
                setattr(module, name, wrapper(call))
            yield
        finally:
            for (module, name, _), call in zip(places, kept, strict=True):
                setattr(module, name, call)


def measure(rank: int, config: Config, parallel: ParallelConfig, document) -> dict[str, dict[str, list[int]]]:
    """Bytes sent by this rank in the forward and in the backward pass of one row through the whole model."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_vila.models.vila import VilaModel
    from megatron_vila.parallel.topology import ParallelTopology
    from tests.parallel import contract

    topology = ParallelTopology.create(parallel)
    model_parallel_cuda_manual_seed(1)
    cpu = torch.device("cpu")
    model = VilaModel(config, topology, torch.float64, cpu)
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    loaded = contract.loaded([document], topology)
    shard = contract.shard_of(loaded.row, topology, config.model.llm, torch.float64)
    recorder, result = Recorder(), {}
    with recorder.listening():
        loss_sum = model(shard, contract.made(model, loaded.pixels)).loss_sum
        result["forward"] = recorder.sent
        recorder.clear()
        loss_sum.backward()
        result["backward"] = recorder.sent
    topology.destroy()
    return result


LAYOUTS = [
    ParallelConfig(ulysses=2, ring=2),
    ParallelConfig(ulysses=4),  # 4 ranks share 2 key/value heads
    ParallelConfig(ring=4),
    ParallelConfig(tp=2, ulysses=2),
    ParallelConfig(tp=2, ring=2),
    ParallelConfig(tp=4),  # 4 ranks share 2 key/value heads
]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=lambda p: f"tp{p.tp}-u{p.ulysses}-r{p.ring}")
def test_explained_bytes_are_those_that_the_model_sends(parallel):
    document = samples.document("explained", "tt" + "Ft" * 7 + "F" * 4 + "t" * 9)
    grid = GridShape.of(4, parallel.tp, parallel.pp, parallel.ulysses, parallel.ring)
    row = pack([document], grid.document_multiple, grid.row_multiple)
    one, two = (samples.config(layers=layers) for layers in (1, 2))
    at_one, at_two = (pool.run(4, measure, config, parallel, document) for config in (one, two))
    llm, element = one.model.llm, 8
    expected = {
        "tp": traffic.tensor_bytes(grid, llm, row.length, element),
        "ulysses": traffic.ulysses_bytes(grid, llm, row.length, element),
        "ring": traffic.ring_bytes(grid, llm, row.length, element),
    }
    for kind, passes in expected.items():
        for direction, wanted in zip(("forward", "backward"), passes, strict=True):
            # What two layers send beyond one layer is the traffic of a layer.
            a_layer = [np.array(b[direction][kind]) - a[direction][kind] for a, b in zip(at_one, at_two, strict=True)]
            np.testing.assert_array_equal(np.array(a_layer), wanted.matrix(), err_msg=f"{kind} {direction}")
    reshard = traffic.reshard_bytes(RowPlan.of(row, grid).reshard, llm.hidden_size, element)
    for direction, wanted in zip(("forward", "backward"), reshard, strict=True):
        assert wanted.matrix().any()
        np.testing.assert_array_equal(np.array([rank[direction]["reshard"] for rank in at_one]), wanted.matrix())


def test_a_ring_moves_three_quarters_of_passing_every_block_to_every_rank():
    grid, llm = GridShape.of(8, ring=8), load_config("models/qwen2-7b", []).model.llm
    forward, _ = traffic.ring_bytes(grid, llm, 1024, 2)
    everything = 8 * 7 * (1024 // 8) * 2 * llm.num_kv_heads * 128 * 2
    assert forward.matrix().sum() == everything * 3 // 4


def test_bytes_are_booked_on_the_link_that_carries_them():
    sent_NN = np.array([[0, 1, 10], [2, 0, 20], [100, 200, 0]])
    links = traffic.Links.of(traffic.Sent(np.arange(3)[None], sent_NN[None]), np.array([0, 0, 1]))
    assert (links.inside_nodes, links.between_nodes, links.most_sent_by_a_rank) == (3, 330, 300)


def test_bytes_told_once_count_for_each_group():
    """Two groups, encoders 0 and 2, 1 and 3: the first lies in one node, the second in two."""
    groups, nodes = np.array([[0, 2], [1, 3]]), np.array([0, 0, 0, 1])
    told_once = traffic.Sent(groups, np.array([[[0, 5], [7, 0]]]))
    told_twice = traffic.Sent(groups, np.array([[[0, 5], [7, 0]]] * 2))
    for sent in (told_once, told_twice):
        assert traffic.Links.of(sent, nodes) == (12, 12, 7)
        assert sent.matrix().tolist() == [[0, 0, 5, 0], [0, 0, 0, 5], [7, 0, 0, 0], [0, 7, 0, 0]]


def test_the_block_of_a_later_replica_and_stage_is_found():
    grid = GridShape.of(32, tp=2, pp=2, ulysses=2, ring=2)
    assert traffic.block_ranks(grid) == list(range(8))
    assert traffic.block_ranks(grid, dp=1, pp=1) == list(range(24, 32))
