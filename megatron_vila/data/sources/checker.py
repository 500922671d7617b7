"""A process that checks a part of a file of records for ``index.py``: rows of ``record_places`` on stdin as an .npy file, their
checksums on stdout in the same form, and behind these what is wrong with the bad ones as JSON."""

from __future__ import annotations

import io
import json
import signal
import sys

import numpy as np

from megatron_vila.data.records import RecordRules
from megatron_vila.data.sources.index import check_records


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for this one ends it
    path, media_dir, media_format, ignored = json.loads(sys.argv[1])
    found = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
    checksums, bad = check_records(path, RecordRules(media_dir, media_format, frozenset(ignored)), found)
    np.save(sys.stdout.buffer, checksums)
    sys.stdout.buffer.write(json.dumps(bad).encode())


if __name__ == "__main__":
    main()
