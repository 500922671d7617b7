"""Which tokens may be drawn, and how often they are."""

import pytest
import torch

from megatron_vila.errors import SettingError
from megatron_vila.generate.sampling import Sampling, choose

PROBABILITIES = torch.tensor([0.5, 0.1, 0.25, 0.15], dtype=torch.float64)
DRAWS = 20000


def _shares(**settings) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    drawn = choose(PROBABILITIES.log().expand(DRAWS, 4), Sampling(**settings), generator)
    return (torch.bincount(drawn, minlength=4) / DRAWS).tolist()


def test_without_temperature_the_likeliest_token_is_taken():
    assert _shares() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "kept", "power"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3], 1),
        ({"temperature": 0.5}, [0, 1, 2, 3], 2),
        ({"temperature": 1.0, "top_k": 2}, [0, 2], 1),
        ({"temperature": 1.0, "top_p": 0.5}, [0], 1),
        ({"temperature": 1.0, "top_p": 0.76}, [0, 2, 3], 1),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0, 2], 1),
        ({"temperature": 1.0, "top_k": 9}, [0, 1, 2, 3], 1),
        ({"temperature": 1e-45}, [0], 1),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_their_probabilities_among_those_that_are_kept(settings, kept, power):
    wanted = torch.zeros(4, dtype=torch.float64)
    wanted[kept] = PROBABILITIES[kept] ** power
    wanted /= wanted.sum()
    # Five standard deviations of a share.
    assert torch.allclose(torch.tensor(_shares(**settings), dtype=torch.float64), wanted, atol=5 * 0.5 / DRAWS**0.5)


WITHOUT_MEANING = [
    {"max_new_tokens": 0},
    {"temperature": -1},
    {"temperature": float("nan")},
    {"top_k": -1},
    {"top_p": 0},
]


@pytest.mark.parametrize("setting", WITHOUT_MEANING, ids=str)
def test_settings_without_a_meaning_are_refused(setting):
    (name,) = setting
    with pytest.raises(SettingError, match=f"^{name}="):
        Sampling(**setting)
