"""What one rank fails in by itself: every rank ends, the one with its own error, the others with what they can know of it."""

import pytest

from megatron_vila.errors import CheckpointError, DamagedError, PeerError, UserError
from megatron_vila.parallel.agreement import on_all_ranks, on_rank_zero
from tests.ranks import pool


def _met(rank, agree, error, failed):
    """Kind, text and cause of what this rank raises where rank 0 fails with ``error``, and whether it only heard of it."""

    def action():
        if rank == 0:
            raise error

    try:
        agree(action, failed)
    except Exception as raised:
        return type(raised), str(raised), type(raised.__cause__), getattr(raised, "elsewhere", None)


@pytest.mark.parametrize("agree", [on_rank_zero, on_all_ranks], ids=lambda agree: agree.__name__)
@pytest.mark.parametrize("error", [KeyError("a bug"), ValueError("of a library")], ids=lambda error: type(error).__name__)
def test_a_fault_of_the_program_stays_what_it_is_on_its_rank_and_the_others_leave_it_to_that_one(agree, error):
    own, other = pool.run(2, _met, agree, error, "not saved")
    assert own[:2] == (type(error), str(error))
    assert other[0] is PeerError


@pytest.mark.parametrize("agree", [on_rank_zero, on_all_ranks], ids=lambda agree: agree.__name__)
@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(28, "No space left on device"), CheckpointError, "OSError: [Errno 28] No space left on device"),
        (DamagedError("x.pt is cut"), DamagedError, "x.pt is cut"),
    ],
    ids=["refused by the system", "our own"],
)
def test_what_a_user_can_cure_has_one_text_on_all_ranks_and_its_cause_on_the_one_that_met_it(agree, error, kind, text):
    own, other = pool.run(2, _met, agree, error, "not saved")
    assert own[0] is other[0] is kind and own[1] == other[1]
    assert own[1].startswith("not saved") and own[1].endswith(text)
    assert own[2:] == (type(error), False) and other[2:] == (type(None), True)


def test_without_another_wording_the_others_hear_the_text_of_rank_0():
    own, other = pool.run(2, _met, on_rank_zero, UserError("in use; wait"), "")
    assert own[:2] == other[:2] == (UserError, "in use; wait") and (own[3], other[3]) == (False, True)
