"""Which record is instance n of a run: epochs, and blends of sources by weight."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vila.data.order import SampleOrder, epoch_order

quick = settings(max_examples=60, deadline=None)
blends = st.lists(st.tuples(st.integers(1, 20), st.floats(0.01, 100)), min_size=1, max_size=5)


@quick
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 2**40), st.booleans(), st.integers(0, 50))
def test_without_weights_the_epochs_of_all_records_follow_each_other(sizes, seed, shuffle, first):
    samples = sum(sizes)
    order = SampleOrder(sizes, seed, shuffle)
    assert order.epoch == samples
    whole = np.concatenate([epoch_order(samples, seed, epoch, shuffle) for epoch in range(3 + 100 // samples)])
    assert order.records(first, 50).tolist() == whole[first : first + 50].tolist()


@quick
@given(blends, st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 60))
def test_a_blend_is_the_same_wherever_one_starts_and_each_source_has_whole_epochs(blend, seed, far, cut):
    sizes, weights = zip(*blend, strict=True)
    order = SampleOrder(sizes, seed, True, weights)
    whole = order.records(0, 200)
    fresh = SampleOrder(sizes, seed, True, weights)
    assert (np.concatenate([fresh.records(0, cut), fresh.records(cut, 200 - cut)]) == whole).all()
    assert (order.records(far, 60)[20:] == order.records(far + 20, 40)).all()
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        mine = whole[(whole >= start) & (whole < start + size)]
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(start, start + size))


@quick
@given(blends, st.integers(0, 10**9))
def test_every_stretch_of_a_blend_holds_each_source_in_its_share(blend, first):
    sizes, weights = zip(*blend, strict=True)
    sources, numbers = SampleOrder(sizes, 0, True, weights).locate(first, 300)
    for source, weight in enumerate(weights):
        share, mine = weight / sum(weights), numbers[sources == source]
        assert abs(len(mine) - 300 * share) <= 1 + share * len(weights)
        assert mine.tolist() == list(range(mine[0], mine[0] + len(mine))) if len(mine) else True


def test_repetitions_as_weights_give_exactly_these_in_an_epoch():
    order = SampleOrder([6, 10], 3, True, [6 * 2, 10 * 0.5])
    records = order.records(0, 17)
    assert np.bincount(records, minlength=16).tolist() == [2] * 6 + np.bincount(records[records >= 6] - 6, minlength=10).tolist()
    assert (records >= 6).sum() == 5


def test_after_an_epoch_of_a_blend_each_record_has_come():
    order = SampleOrder([3, 50], 1, True, [0.9, 0.1])
    assert set(order.records(0, order.epoch)) == set(range(53))


def test_a_blend_of_one_source_is_that_source_and_sources_are_shuffled_apart():
    assert (SampleOrder([20], 7, True, [0.3]).records(0, 60) == SampleOrder([20], 7, True).records(0, 60)).all()
    both = SampleOrder([20, 20], 7, True, [1, 1]).records(0, 40)
    assert both[both < 20].tolist() != (both[both >= 20] - 20).tolist()


@pytest.mark.parametrize("sizes, weights", [([], ()), ([0], ()), ([3, 3], [1.0]), ([3], [0.0]), ([3], [float("nan")])])
def test_an_order_without_records_or_with_wrong_weights_is_refused(sizes, weights):
    with pytest.raises(ValueError, match="sources"):
        SampleOrder(sizes, 0, True, weights)
