"""The stream of a run on made-up cards: every usable sample of an epoch once, in an order that nothing else changes."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vila.data.cards import BROKEN, FIELDS, TOO_LONG, USABLE, Cards
from megatron_vila.data.dataset import NoUsableSampleError
from megatron_vila.data.order import SampleOrder
from megatron_vila.data.stream import CardsMissingError, Stream, StreamState
from megatron_vila.plan.flops import FlopPrices

LENGTH = 100
quick = settings(max_examples=40, deadline=None)
runs = st.fixed_dictionaries(
    {
        "states": st.lists(st.sampled_from([USABLE] * 6 + [BROKEN, TOO_LONG]), min_size=2, max_size=40),
        "wrecks": st.sets(st.integers(0, 39), max_size=8),
        "rows": st.integers(1, 6),
        "packing": st.booleans(),
        "weighted": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


class World:
    """Records of which some have no usable card, and some turn out to be wrecks when they are decoded."""

    def __init__(self, states, wrecks, rows, packing, weighted, seed):
        self.usable = {n for n, state in enumerate(states) if state == USABLE and n not in wrecks}
        self.wrecks, self.rows, self.packing, self.seed = wrecks, rows, packing, seed
        self.states = states
        half = len(states) // 2
        self.sizes = [half, len(states) - half] if weighted else [len(states)]
        self.weights = [0.3, 0.7] if weighted else ()
        random = np.random.default_rng(seed)
        self.table = np.zeros((len(states), len(FIELDS)), dtype=np.int64)
        self.table[:, 0] = states
        self.table[:, 1:] = random.integers(1, LENGTH + 1, (len(states), 1)) * (np.array(states) == USABLE)[:, None]

    def stream(self, known=None):
        cards = Cards(len(self.states))
        known = np.arange(len(self.states)) if known is None else known
        cards.put(known, self.table[known])
        order = SampleOrder(self.sizes, self.seed, True, self.weights)
        price = FlopPrices(10**6, 1, 10**4, 1, 1)
        sizes = {"rows": self.rows, "packing": self.packing, "seq_length": LENGTH, "vision_capacity": 10**6}
        return Stream(order, cards, price, **sizes)

    def steps(self, count, state=None):
        """Plans of ``count`` steps, each planned anew until it holds no wreck."""
        stream, state = self.stream(), state or StreamState()
        for _ in range(count):
            found = set()
            plan = stream.plan(state)
            while wrecks := {record for row in plan.rows for record in row} & self.wrecks:
                assert not wrecks & set(state.undecodable.tolist()) and not wrecks & found, "what is known is not tried again"
                found |= wrecks
                plan = stream.plan(state, found)
            assert set(plan.after.undecodable.tolist()) == set(state.undecodable.tolist()) | found
            yield plan
            state = plan.after


def told(plan):
    return [plan.rows, plan.instances, plan.costs, dict(plan.counts), plan.after.to_json()]


@quick
@given(runs)
def test_every_usable_sample_of_the_order_comes_once_and_what_is_left_out_is_counted(run):
    world = World(**run)
    if not world.usable:
        with pytest.raises(NoUsableSampleError, match=f"none of the {len(world.states)} samples can be used"):
            list(world.steps(1))
        return
    plans = list(world.steps(12))
    order = world.stream().order
    after = plans[-1].after
    drawn = order.records(0, after.following)
    instances = [n for plan in plans for row in plan.instances for n in row]
    # What came before the end of the window is in a row, waits, or cannot be used.
    wanted = [n for n, record in enumerate(drawn.tolist()) if record in world.usable]
    waiting = set(after.waiting.tolist())
    assert sorted(instances) == [n for n in wanted if n not in waiting]
    assert [record for plan in plans for row in plan.rows for record in row] == drawn[instances].tolist()
    if not world.packing:
        assert instances == wanted[: len(instances)], "without packing they come in the order itself"
    counts = {name: sum(plan.counts[name] for plan in plans) for name in plans[0].counts}
    assert counts["drawn"] == after.following
    assert counts["drawn"] == len(instances) + len(waiting) + counts["left_out_broken"] + counts["left_out_too_long"]
    assert counts["left_out_too_long"] == sum(world.states[record] == TOO_LONG for record in drawn)
    assert all(len(plan.rows) == world.rows for plan in plans)


@quick
@given(runs, st.integers(1, 9))
def test_a_run_that_goes_on_from_a_saved_state_plans_the_same_steps(run, stop):
    world = World(**run)
    if not world.usable:
        return
    whole = list(world.steps(10))
    kept = json.loads(json.dumps(whole[stop - 1].after.to_json()))
    rest = list(world.steps(10 - stop, StreamState.from_json(kept, len(world.states))))
    assert [told(plan) for plan in rest] == [told(plan) for plan in whole[stop:]]


@quick
@given(runs, st.sets(st.integers(0, 39)))
def test_a_step_is_planned_when_its_cards_are_known_and_is_the_same_whatever_else_is_known(run, known):
    world = World(**run)
    if not world.usable:
        return
    whole = told(world.stream().plan(StreamState()))
    stream = world.stream(np.array([n for n in sorted(known) if n < len(world.states)], dtype=np.int64))
    place = 0
    while not stream.covers(StreamState(), place, 1):
        record = stream.order.records(place, 1)
        stream.cards.put(record, world.table[record])
        place += 1
    assert told(stream.plan(StreamState())) == whole


def test_a_step_whose_cards_are_not_known_is_not_planned():
    world = World([USABLE] * 4, set(), 2, False, False, 0)
    with pytest.raises(CardsMissingError):
        world.stream(np.array([], dtype=np.int64)).plan(StreamState())


@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"following": -1, "waiting": [], "undecodable": []},
        {"following": True, "waiting": [], "undecodable": []},
        {"following": 5, "waiting": [3, 3], "undecodable": []},
        {"following": 5, "waiting": [5], "undecodable": []},
        {"following": 5, "waiting": [1.5], "undecodable": []},
        {"following": 5, "waiting": [], "undecodable": [7]},
        {"following": 5, "waiting": None, "undecodable": []},
    ],
)
def test_a_state_that_no_run_has_saved_is_refused(kept):
    with pytest.raises(ValueError, match="is not one that a run has saved"):
        StreamState.from_json(kept, 7)
