"""The faults that ``seeded_faults.py`` plants, and the tests that have to notice them."""

from . import (
    formats,
    guards,
    house,
    inference,
    inputs,
    mm_sp,
    models,
    parallel,
    prepare,
    runs,
    steps,
    trainers,
    view,
    weights,
)

FAULTS = [
    *parallel.FAULTS,
    *models.FAULTS,
    *runs.FAULTS,
    *inputs.FAULTS,
    *weights.FAULTS,
    *steps.FAULTS,
    *guards.FAULTS,
    *house.FAULTS,
    *formats.FAULTS,
    *prepare.FAULTS,
    *view.FAULTS,
    *inference.FAULTS,
    *mm_sp.FAULTS,
    *trainers.FAULTS,
]
