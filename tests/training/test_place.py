"""The place among the samples: what a checkpoint keeps, and where a run goes on from one that keeps it, or another, or none."""

import json

import numpy as np
import pytest

from megatron_vila.data.stream import StreamState
from megatron_vila.errors import CheckpointError
from megatron_vila.training.place import carried_counts, kept_place, place_of

STATE = StreamState(40, np.array([31, 35, 36]), np.array([2, 7]))


def test_a_place_is_kept_and_found_again():
    kept = json.loads(json.dumps(kept_place(STATE, "one order")))
    found, told = place_of(kept, "one order", drawn=40, samples=10)
    assert found.to_json() == STATE.to_json() and told == ""


def test_in_another_order_the_run_goes_on_behind_what_was_drawn_and_says_so():
    found, told = place_of(kept_place(STATE, "one order"), "another", drawn=40, samples=5)
    assert found.to_json() == StreamState(40).to_json()
    assert "data.weights" in told and "some come again" in told


def test_a_checkpoint_of_an_earlier_version_goes_on_behind_what_was_drawn_and_says_so():
    found, told = place_of(None, "one order", drawn=12, samples=5)
    assert found.to_json() == StreamState(12).to_json() and "goes on after the 12 samples" in told
    counts = {"drawn": 12, "replaced_broken": 2, "left_out": 1, "replaced_too_long": 4, "truncated": 5, "unsupervised": 6}
    assert carried_counts(counts) == {
        "drawn": 12, "left_out_broken": 3, "left_out_too_long": 4, "truncated": 5, "unsupervised": 6,
    }  # fmt: skip


@pytest.mark.parametrize("change", [{"order": 3}, {"following": "40"}, {"waiting": [36, 31]}, {"undecodable": [10]}])
def test_a_damaged_place_is_refused(change):
    with pytest.raises(CheckpointError, match="the place among the samples in the checkpoint is damaged"):
        place_of(kept_place(STATE, "one order") | change, "one order", drawn=40, samples=10)
    with pytest.raises(CheckpointError):
        place_of([1], "one order", drawn=40, samples=10)
