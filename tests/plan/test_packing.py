"""Rows of a step from waiting samples, and rows to replicas: rules that hold for any numbers, and how well it is done."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vila.plan.dealing import deal_rows, spread
from megatron_vila.plan.packing import LOOK_AHEAD, pack_samples

quick = settings(max_examples=60, deadline=None)
samples = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 30)), max_size=60)


@quick
@given(samples, st.integers(1, 8), st.integers(20, 60))
def test_rows_open_with_the_oldest_hold_no_sample_twice_and_keep_to_both_limits(waiting, rows, vision_capacity):
    tokens, vision = [t for t, _ in waiting], [v for _, v in waiting]
    packed = pack_samples(tokens, vision, rows, 100, vision_capacity)
    placed = [place for row in packed for place in row]
    assert len(set(placed)) == len(placed) and len(packed) <= rows and all(packed)
    before: set[int] = set()
    for row in packed:
        assert row == sorted(row)
        assert row[0] == min(set(range(len(tokens))) - before), "the sample that has waited longest"
        before |= set(row)
        assert sum(tokens[place] for place in row) <= 100
        pictures = [vision[place] for place in row if vision[place]]
        assert sum(pictures) <= vision_capacity or len(pictures) == 1
    if len(packed) < rows:
        assert len(placed) == len(tokens), "nobody waits while a row is missing"


@quick
@given(samples, st.integers(1, 8))
def test_no_sample_that_goes_on_waiting_would_have_fitted_a_row(waiting, rows):
    tokens, vision = [t for t, _ in waiting], [v for _, v in waiting]
    packed = pack_samples(tokens, vision, rows, 100, 60)
    placed = {place for row in packed for place in row}
    for row in packed:
        room, vision_room = 100 - sum(tokens[p] for p in row), 60 - sum(vision[p] for p in row)
        assert not [p for p in range(len(tokens)) if p not in placed and tokens[p] <= room and vision[p] <= vision_room]


def test_the_oldest_batch_goes_first_and_the_rest_by_size():
    # A batch is one row of 10 tokens: the newest three batches are the last six samples. Best fit alone would choose 4 + 6.
    assert pack_samples([4, 2, 1, 5, 6, 6, 3, 5, 5], [0] * 9, 1, 10, 1) == [[0, 1, 2, 6]]


def test_a_sample_with_more_vision_than_a_row_may_have_stands_with_text_alone():
    assert pack_samples([5, 3, 3], [9, 1, 0], 1, 10, 8) == [[0, 2]]


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a sample of 11 tokens cannot be packed into rows of 10"):
        pack_samples([3, 11], [0, 0], 1, 10, 1)


def test_no_sample_waits_longer_than_the_look_ahead():
    random = np.random.default_rng(0)
    tokens = random.integers(1, 100, 4000).tolist()
    waiting, following, entered = [], 0, {}
    for step in range(60):
        while sum(tokens[n] for n in waiting) < LOOK_AHEAD * 4 * 100:
            entered[following] = step
            waiting.append(following)
            following += 1
        rows = pack_samples([tokens[n] for n in waiting], [0] * len(waiting), 4, 100, 1)
        used = {waiting[place] for row in rows for place in row}
        assert all(step - entered[n] <= 3 * LOOK_AHEAD for n in used)
        waiting = [n for n in waiting if n not in used]


@quick
@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_each_replica_gets_as_many_rows_and_every_row_goes_to_one(replicas, each, data):
    costs = data.draw(st.lists(st.integers(0, 2**60), min_size=replicas * each, max_size=replicas * each))
    hands = deal_rows(costs, replicas)
    assert [len(hand) for hand in hands] == [each] * replicas
    assert sorted(row for hand in hands for row in hand) == list(range(len(costs)))
    assert hands == sorted(hands) and all(hand == sorted(hand) for hand in hands)
    in_turn = [list(range(replica, len(costs), replicas)) for replica in range(replicas)]
    assert spread(costs, hands) <= spread(costs, in_turn) + 1e-12


def test_replicas_take_about_as_long_where_rows_differ_twofold():
    costs = np.random.default_rng(1).integers(10**6, 2 * 10**6, 64).tolist()
    assert spread(costs, deal_rows(costs, 8)) < 0.005
    assert deal_rows(costs, 1) == [list(range(64))]
    assert spread([0, 0], [[0], [1]]) == 0


def test_rows_that_cannot_be_dealt_in_equal_numbers_are_refused():
    with pytest.raises(ValueError, match="6 rows cannot be dealt to 4 replicas"):
        deal_rows([1] * 6, 4)
