"""Faults of plans, units, failures, the index of records, and what a run is handed."""

from __future__ import annotations

from .fault import Fault

ROW_PLAN = ("tests/plan/test_row_plan.py",)
CACHE = ("tests/parallel/test_attention2d.py",)
FAILURES = ("tests/training/test_failures.py", "-k", "causes_count_before or earlier_start")
INDEX = ("tests/data/test_record_index.py", "-k", "changes_after or made_anew")
TOWER = ("tests/models/test_vision.py", "-k", "byte")

FAULTS = [
    Fault(
        "labels of a row are those of another rank's slice",
        "megatron_vila/plan/row_plan.py",
        "held = mine[place.tp * len(slices[0]) + selected]",
        "held = mine[selected]",
        ROW_PLAN,
    ),
    Fault(
        "a later pipeline stage decodes frames too",
        "megatron_vila/plan/row_plan.py",
        "encodes, encoder = place.pp == 0, grid.encoder_rank(rank)",
        "encodes, encoder = True, grid.encoder_rank(rank)",
        ROW_PLAN,
    ),
    Fault(
        "a cache gets values in the place of keys",
        "megatron_vila/parallel/attention2d.py",
        "attended.append(HeadAttention(q, k, v, out, lse))",
        "attended.append(HeadAttention(q, v, k, out, lse))",
        CACHE,
    ),
    Fault(
        "what an exchange brought may be read after the next one has begun",
        "megatron_vila/parallel/peers.py",
        "if self.peers.exchanges != self.exchange:",
        "if False:",
        ("tests/parallel/test_peers.py", "-k", "refused_once"),
    ),
    Fault(
        "pixels are scaled by another range",
        "megatron_vila/models/vision/tower.py",
        ".mul_(2 / 255).sub_(1)",
        ".mul_(2 / 256).sub_(1)",
        TOWER,
    ),
    Fault(
        "a medium takes the room of its first unit only",
        "megatron_vila/plan/pictures.py",
        "return sum(unit.tokens for unit in units) + separators * len(units)",
        "return sum(units[0].tokens for _ in units) + separators * len(units)",
        ("tests/plan/test_pictures.py",),
    ),
    Fault(
        "the failure that counts is the earliest, whatever its kind",
        "megatron_vila/failing/failure_board.py",
        "return self.kind, self.time_s, self.rank",
        "return self.time_s, self.kind, self.rank",
        FAILURES,
    ),
    Fault(
        "a record that changed since its file was opened is read",
        "megatron_vila/data/sources/json_files.py",
        "if zlib.crc32(text) != checksum:",
        "if False:",
        INDEX,
    ),
    Fault(
        "a run ends without the task that is due at its end",
        "megatron_vila/training/trainer.py",
        "return {} if self.stopped_by else self._do_tasks(data, is_last=True)",
        "return {}",
        ("tests/training/test_exit.py", "-k", "due_at_the_step"),
    ),
    Fault(
        "the plan of a row needs torch",
        "megatron_vila/plan/row_plan.py",
        "import numpy as np\n",
        "import numpy as np\nimport torch  # noqa: F401\n",
        ("tests/plan/test_purity.py",),
    ),
]
