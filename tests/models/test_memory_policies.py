"""What is kept between forward and backward pass: attention runs once, host memory is used up to its budget, tiles are equal."""

import weakref
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from megatron_vila.config.schema import LoraConfig, MemoryConfig, ParallelConfig
from megatron_vila.models.decoder import saved
from megatron_vila.models.decoder.gated import Apart
from megatron_vila.models.decoder.saved import HostStore
from megatron_vila.parallel.ring import Ring
from megatron_vila.plan.activations import _kept_by_policy, whole_layer_bytes
from megatron_vila.plan.row import pack
from tests import samples
from tests.parallel import contract
from tests.ranks import pool

CPU = torch.device("cpu")


def bytes_of(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def test_what_is_kept_comes_back_bit_for_bit_from_the_host_and_from_the_device():
    first, second, third = torch.randn(3, 5), torch.randn(4, dtype=torch.float64), torch.randn(2, 2).bfloat16()
    host = HostStore(bytes_of(first, second), CPU)
    kept = [host.save(x) for x in (first.clone(), second.clone(), third)]
    assert host.used_bytes == bytes_of(first, second)
    kept[1].prefetch()
    assert kept[2].take() is third
    assert torch.equal(kept[1].take(), second) and torch.equal(kept[0].take(), first)
    with pytest.raises(IndexError):
        kept[2].take()
    assert host.used_bytes == 0 and host.peak_bytes == bytes_of(first, second)


def test_buffers_are_used_again_and_the_budget_counts_what_is_held():
    host = HostStore(40, CPU)
    kept = host.save(torch.ones(10))
    stays = torch.ones(1)
    assert host.save(stays).take() is stays
    buffer = kept._buffer
    kept.take()
    assert host.save(torch.zeros(10))._buffer is buffer


def test_rows_of_many_lengths_take_no_more_host_memory_than_the_budget():
    host = HostStore(1000, CPU)
    for length in (10, 100, 90, 30, 120, 7, 125, 60):
        row = torch.randn(length), torch.randn(length)
        kept = [host.save(x.clone()) for x in row]
        assert host.used_bytes + sum(buffer.nbytes for buffer in host._free) <= 1000
        assert all(torch.equal(held.take(), x) for held, x in zip(kept, row, strict=True))
    assert host.used_bytes == 0 and host.peak_bytes <= 1000
    # Half of what a buffer holds is enough to use it again, less is not.
    host = HostStore(1000, CPU)
    large = host.save(torch.zeros(125))
    large.take()
    assert host.save(torch.zeros(70))._buffer is large._buffer and host.save(torch.zeros(20))._buffer.nbytes < 500


def test_once_the_longest_row_was_seen_nothing_is_page_locked_any_more(monkeypatch):
    sizes, page_locked = [], saved.page_locked
    monkeypatch.setattr(saved, "page_locked", lambda size, setting: sizes.append(size) or page_locked(size, setting))
    host = HostStore(1000, CPU)
    for length in (12, 100, 20, 100, 9, 57, 100):
        row = [torch.randn(length), torch.randn(length), torch.randn(length // 8)]
        kept = [host.save(x.clone()) for x in row]
        assert host.used_bytes > 0 and all(torch.equal(held.take(), x) for held, x in zip(kept, row, strict=True))
        assert host.used_bytes + sum(buffer.nbytes for buffer in host._free) <= 1000
    # Small ones as long as there is room for them, none after 20.
    assert sizes == [48, 48, 4, 400, 400, 80, 8]


def test_longer_rows_find_their_host_memory_page_locked(monkeypatch):
    def row(size):
        kept = [host.save(torch.full((n,), n, dtype=torch.uint8)) for n in (4 * size, size, 4 * size, size)]
        assert [int(x.take()[0]) for x in reversed(kept)] == [size, 4 * size, size, 4 * size]

    locked, page_locked = [], saved.page_locked
    monkeypatch.setattr(saved, "page_locked", lambda size, setting: locked.append(size) or page_locked(size, setting))
    host = HostStore(90, CPU)
    row(5)
    host.scale(2)
    # The budget ends before the last one.
    assert locked == [20, 5, 20, 5, 40, 10, 40]
    row(10)
    assert len(locked) == 7 and host.peak_bytes == 90


def test_nothing_goes_to_the_host_without_a_budget():
    x = torch.ones(3)
    assert HostStore(0, CPU).save(x).take() is x


def one_step(rank, memory):
    """Forward and backward pass of one row: what ran how often, and the most and the last bytes in host memory."""
    config = samples.config(layers=4)
    config.memory = memory
    topology, model, _ = contract.build(config, ParallelConfig())
    runs = Counter()
    with counted(runs, Ring, "forward"), counted(runs, Ring, "backward"), counted(runs, Apart, "gate_up"):
        row = pack([samples.document("counted", "ttFtttFttt")], 1, 1)
        shard = contract.shard_of(row, topology, config.model.llm, torch.float64)
        model(shard, contract.made(model, samples.pixels(row.frames))).loss_sum.backward()
    topology.destroy()
    return dict(runs), model.host.peak_bytes, model.host.used_bytes


@contextmanager
def counted(runs, owner, name):
    original = getattr(owner, name)

    def run(*args):
        runs[f"{owner.__name__}.{name}"] += 1
        return original(*args)

    setattr(owner, name, run)
    try:
        yield
    finally:
        setattr(owner, name, original)


@pytest.mark.parametrize(
    ("memory", "attention_runs", "mlp_runs"),
    [
        (MemoryConfig(), 4, 4),
        (MemoryConfig(recompute="full"), 8, 8),
        (MemoryConfig(recompute="attention_output"), 4, 8),
        # Of a block of two, the first layer's output is rebuilt.
        (MemoryConfig(recompute="attention_output", block_layers=2), 4, 10),
        (MemoryConfig(recompute="attention_output", block_layers=4), 4, 11),
        # 16 tokens in two tiles: forward, and once more in the backward pass, but not when the layer is run for its gradients.
        (MemoryConfig(recompute="attention_output", mlp_tile=8), 4, 16),
        (MemoryConfig(mlp_tile=8), 4, 16),
    ],
    ids=str,
)
def test_attention_runs_once_unless_recompute_is_full_and_the_mlp_as_often_as_said(memory, attention_runs, mlp_runs):
    ((runs, *_),) = pool.run(1, one_step, memory)
    assert runs == {"Ring.forward": attention_runs, "Ring.backward": 4, "Apart.gate_up": mlp_runs}


def test_all_that_a_policy_keeps_is_on_the_host_until_the_backward_pass():
    """16 tokens of 4 layers in float64: 8 heads of 4 for the outputs, 8 for the log-sum-exp, 16 for an input."""
    per_layer, per_input = 16 * (8 * 4 + 8) * 8, 16 * 16 * 8
    for block_layers, inputs in ((1, 4), (2, 2), (3, 2)):
        memory = MemoryConfig(recompute="attention_output", block_layers=block_layers, offload_gib=1.0)
        ((_, peak, left),) = pool.run(1, one_step, memory)
        assert (peak, left) == (4 * per_layer + inputs * per_input, 0)


def most_outputs_back(rank, memory):
    """How many layers' attention outputs are back from the host at the same time, at most."""
    back, most, original = [], [0], saved._SavedOnHost.prefetch

    def prefetch(self):
        original(self)
        if self._shape == (16, 8, 4) and all(self._here[0] is not tensor() for tensor in back):
            back.append(weakref.ref(self._here[0]))
        most[0] = max(most[0], sum(tensor() is not None for tensor in back))

    saved._SavedOnHost.prefetch = prefetch
    try:
        one_step(rank, memory)
    finally:
        saved._SavedOnHost.prefetch = original
    return len(back), most[0]


@pytest.mark.parametrize("block_layers,most", [(1, 2), (2, 3), (3, 3), (4, 4)])
def test_one_layer_comes_back_ahead_of_the_block_that_is_at_work(block_layers, most):
    memory = MemoryConfig(recompute="attention_output", block_layers=block_layers, offload_gib=1.0)
    assert pool.run(1, most_outputs_back, memory) == [(4, most)]


def most_kept_on_device(rank, memory):
    """Bytes of kept tensors on the device, those that came back included, at most; bytes on the host, at most and in the end."""
    alive, most = {}, [0]

    def see(x):
        storage = x.untyped_storage()
        if storage._cdata not in alive:
            alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, alive.pop, storage._cdata)
            most[0] = max(most[0], sum(alive.values()))

    stay, prefetch = saved.Saved.__init__, saved._SavedOnHost.prefetch

    def stays(self, *here):
        stay(self, *here)
        for x in here:
            see(x)

    def comes_back(self):
        prefetch(self)
        see(self._here[0])

    saved.Saved.__init__, saved._SavedOnHost.prefetch = stays, comes_back
    try:
        _, peak, left = one_step(rank, memory)
    finally:
        saved.Saved.__init__, saved._SavedOnHost.prefetch = stay, prefetch
    return most[0], peak, left


@pytest.mark.parametrize("budget", [0, 10_000, 16_500, 18_000, 25_000, 100_000])
@pytest.mark.parametrize("block_layers", [1, 2, 3])
def test_what_is_kept_on_the_device_and_on_the_host_is_what_is_predicted(block_layers, budget):
    """The last tensor that the budget has no room for stays, and so may later smaller ones go."""
    config = samples.config(layers=4)
    config.train.seq_length, config.memory = 16, MemoryConfig(recompute="attention_output", block_layers=block_layers)
    everything, _ = _kept_by_policy(config, 4, 1, 8)
    config.memory.offload_gib = budget / 2**30
    on_device, most = _kept_by_policy(config, 4, 1, 8)
    assert pool.run(1, most_kept_on_device, config.memory) == [(most, everything - on_device, 0)]
    assert everything - budget <= on_device <= most <= everything


def long_row_config(layers, memory, lora, trainable):
    config = samples.config(layers=layers)
    llm = config.model.llm
    llm.hidden_size, llm.head_dim, llm.ffn_hidden_size = 128, 16, 352
    config.model.attention, config.model.lora = "cpu", lora
    config.memory, config.train.seq_length, config.optim.llm.trainable = memory, 512, trainable
    return config


def saved_bytes(rank, *settings):
    """Bytes that autograd holds for the backward pass of a row of 512 tokens, weights not counted."""
    config = long_row_config(*settings)
    llm = config.model.llm
    topology, model, _ = contract.build(config, ParallelConfig(), torch.bfloat16)
    row = pack([samples.document("long", "t" * 512, slice(0, 1))], 1, 1)
    shard = contract.shard_of(row, topology, llm, torch.bfloat16)
    held = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}

    def hold(x):
        held.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        alive.append(x)
        return x

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        model(shard, contract.made(model, samples.pixels([])))
    topology.destroy()
    return sum(held.values())


ALL = ["qkv", "proj", "fc1", "fc2"]


@pytest.mark.parametrize("memory", [MemoryConfig(), MemoryConfig(mlp_tile=64)], ids=["whole MLP", "tiles"])
@pytest.mark.parametrize(
    ("lora", "trainable"),
    [
        (LoraConfig(), True),
        (LoraConfig(), False),
        (LoraConfig(rank=8), True),
        (LoraConfig(rank=8, targets=ALL), True),
    ],
    ids=["learns", "frozen", "updates of attention", "updates of all"],
)
def test_the_predicted_activations_are_what_autograd_saves(memory, lora, trainable):
    (three,), (two,) = (pool.run(1, saved_bytes, layers, memory, lora, trainable) for layers in (3, 2))
    assert three - two == 512 * whole_layer_bytes(long_row_config(3, memory, lora, trainable), 2)
