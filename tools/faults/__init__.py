"""The faults that ``seeded_faults.py`` plants, and the tests that have to notice them."""

from . import models, parallel, runs

FAULTS = [*parallel.FAULTS, *models.FAULTS, *runs.FAULTS]
