"""Faults of MM-SP under stock models of transformers that see: units, positions, features of the tower."""

from .fault import Fault

_TEST = "tests/hf/test_mm_sp_qwen.py"
_ADAPTER = "megatron_vila/hf/mm_sp/adapters/qwen_vl.py"
ROW = (_TEST, "-k", "float64")

FAULTS = [
    Fault(
        "m-rope takes the height of a picture for its width",
        _ADAPTER,
        "made[:, 0].numpy() + first",
        "made[[0, 2, 1], 0].numpy() + first",
        (_TEST, "-k", "positions_are_those"),
    ),
    Fault(
        "features of earlier layers of the tower go to the wrong layers",
        _ADAPTER,
        "for level in levels[1:]]",
        "for level in levels[:0:-1]]",
        ROW,
    ),
    Fault(
        "the parts of a video are read in reversed order",
        _ADAPTER,
        "medium.first_row + number * h * w",
        "medium.first_row + (t - 1 - number) * h * w",
        ROW,
    ),
    Fault(
        "units are dealt by their number and not by their patches",
        _ADAPTER,
        "self._tokens(medium.grid), h * w, is_video",
        "self._tokens(medium.grid), 1, is_video",
        (_TEST, "-k", "dealt"),
    ),
    Fault(
        "seconds between the frames of a video are forgotten",
        _ADAPTER,
        'seconds = sample.get("second_per_grid_ts")',
        "seconds = None",
        (_TEST, "-k", "positions_are_those"),
    ),
    Fault(
        "a rank without pictures does not run the tower",
        "megatron_vila/hf/mm_sp/vision.py",
        "(blank,), options)[:0])",
        "(blank,), options)[:0].detach())",
        (_TEST, "-k", "touches"),
    ),
    Fault(
        "an answer counts positions by the tokens of its prompt",
        "megatron_vila/hf/mm_sp/cache.py",
        "max(self.next_position, int(positions_n.max(initial=-1)) + 1)",
        "self._tokens + len(ids_n)",
        (_TEST, "-k", "generated"),
    ),
    Fault(
        "replicas encode in as many rounds as each needs itself",
        "megatron_vila/hf/mm_sp/vision.py",
        "rounds = int(most)",
        "pass",
        (_TEST, "-k", "replica and fsdp-"),
    ),
]
