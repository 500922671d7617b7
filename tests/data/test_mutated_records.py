"""Some of the damaged records of ``tools/mutate_records.py``, which uses thousands: none ends a run."""

import logging

from tests.ranks import pool
from tools import mutate_records


def _run(rank, keep):
    logging.getLogger("megatron_vila").setLevel(logging.ERROR)
    try:
        return mutate_records.run(100, seed=1, limit_s=300, keep=keep)
    finally:
        logging.getLogger("megatron_vila").setLevel(logging.NOTSET)


def test_no_damaged_record_ends_a_run(tmp_path):
    ((counts, faults),) = pool.run(1, _run, tmp_path)
    assert not faults, faults[0][1]
    assert (counts["damaged"], counts["runs"], counts["unforeseen"]) == (100, 1, 0)
    assert min(counts["bad"], counts["broken"], counts["used"]) > 0


def test_a_file_that_ends_a_run_is_kept_with_its_traceback(tmp_path, monkeypatch):
    def use(config, counts):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(mutate_records, "_use", use)
    counts, ((path, what),) = mutate_records.run(3, seed=1, limit_s=60, keep=tmp_path)
    assert "ZeroDivisionError: planted" in what and len(path.read_bytes().splitlines()) == 3 + mutate_records.GOOD_IN_A_FILE
