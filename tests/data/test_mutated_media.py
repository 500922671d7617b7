"""A few of the damaged files of ``tools/mutate_media.py``, which reads thousands: each is used or refused, none does more."""

import os
import signal
import time

from tools import mutate_media


def test_damaged_media_are_used_or_refused_and_nothing_else(tmp_path):
    counts, faults, largest_mib = mutate_media.run(150, seed=1, limit_s=300, keep=tmp_path)
    assert not faults
    assert counts.total() == 150 and counts["used"] > 15 and counts["refused"] > 50
    assert largest_mib < 1024


def test_a_crash_a_hang_and_another_exception_are_seen_and_belong_to_their_file(tmp_path, monkeypatch):
    def use(path):
        if path.name == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if path.name == "hang":
            time.sleep(60)
        if path.name == "raise":
            raise KeyError("x")

    monkeypatch.setattr(mutate_media, "_use", use)
    monkeypatch.setattr(mutate_media, "LIMIT_S", 1.0)
    paths = [tmp_path / name for name in ("good", "crash", "good2", "hang", "good3", "raise", "good4")]
    found = {path.name: what for path, what, _ in mutate_media.read_batch(paths)}
    assert found["crash"] == "ended the process with status -9"
    assert found["hang"] == "took more than 1 s" and found["raise"] == "raised KeyError: 'x'"
    assert {found[name] for name in ("good", "good2", "good3", "good4")} == {"used"}
