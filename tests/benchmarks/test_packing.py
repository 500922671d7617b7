"""The figures of packing that the data page promises, on fewer steps."""

import pytest

from benchmarks.packing import CASES, measured


@pytest.mark.parametrize("case", CASES)
def test_rows_are_full_replicas_equal_and_kinds_keep_their_share(case):
    found = measured(case, 64, "best_fit", steps=60)
    assert found["useful"] >= 0.98
    assert found["spread_of_worst_step"] <= 0.03
    assert found["share_off"] <= 0.1
    assert found["useful"] > measured(case, 64, "first_fit", steps=60)["useful"]
