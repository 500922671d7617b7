"""Units: what they refuse, how many fit, and that every sum over pictures is over what the units say."""

import dataclasses

import pytest

from megatron_vila.config.load import load_config
from megatron_vila.plan import activations
from megatron_vila.plan.memory import estimate_memory, pictures_on_host
from megatron_vila.plan.pictures import Squares, Unit, in_units, most_frames, pictures_of, places, tokens_each
from megatron_vila.plan.row import FrameRef, references
from tests.samples import Pooled


@pytest.mark.parametrize("wrong", ["frames", "tiles", "tokens", "cost"])
def test_a_unit_without_frames_tiles_tokens_or_cost_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{wrong}=0.*at least 1"):
        dataclasses.replace(Unit(2, 3, 4, 5), **{wrong: 0})
    assert Unit(2, 3, 4, 5).squares == 6


def test_each_frame_is_a_unit_of_one_square_today():
    config = load_config("longvila-7b-stage5", [])
    for is_video in (False, True):
        assert pictures_of(config.model).units(3, is_video) == (Unit(1, 1, 196, 729),) * 3


def test_the_frames_of_a_medium_are_dealt_to_its_units_in_order():
    units = Pooled(3, 1, 5).units(8, True)
    names = [f"{i}.png" for i in range(90)]
    refs = references("folder", range(0, 80, 10), True, units, names)
    assert [ref.indices for ref in refs] == [(0, 10, 20), (30, 40, 50), (60, 70)]
    assert refs[2] == FrameRef("folder", (60, 70), True, Unit(2, 1, 5, 32), ("60.png", "70.png"))
    assert (refs[0].tokens, refs[2].cost) == (5, 32)
    with pytest.raises(ValueError, match="units of 8 frames are not those of 9 chosen frames"):
        references("folder", range(9), True, units)
    with pytest.raises(ValueError, match="has 2 frames, not 1 indices and 0 files"):
        FrameRef("v.mp4", (1,), True, Unit(2, 1, 5, 32))


FITTING = [(0, 0, 0), (5, 0, 0), (6, 1, 3), (17, 2, 6), (18, 3, 9), (6000, 1000, 3000)]


@pytest.mark.parametrize(("room", "squares", "pooled"), FITTING)
def test_the_most_frames_are_those_whose_units_fit_with_their_separators(room, squares, pooled):
    assert most_frames(Squares(Unit(1, 1, 4, 16)), room, 2) == squares
    assert most_frames(Pooled(3, 1, 4), room, 2) == pooled
    assert most_frames(Pooled(3, 1, 4), room, 2, limit=5) == min(pooled, 5)


def test_units_are_told_in_words():
    mixed = [Unit(1, 1, 4, 16), Unit(1, 1, 9, 16)]
    assert (in_units(mixed), tokens_each(mixed), tokens_each(mixed, 1)) == ("frames", "4 to 9", "5 to 10")
    assert (in_units([Unit(8, 1, 4, 16)]), tokens_each([Unit(8, 1, 4, 16)])) == ("frames in 1 unit", "4")
    assert places(mixed, 2) == 17


def test_memory_follows_the_squares_and_tokens_of_the_rank_with_most_of_them(monkeypatch):
    """1,200 pooled frames on 8 ranks: 150 units of 8 frames, 18 or 19 of them a rank."""
    overrides = ["parallel.ring=8", "parallel.ulysses=1", "parallel.tp=1", "data.num_frames=1200", "data.packing=false"]
    config = load_config("longvila-7b-stage5", overrides)
    today = activations.pictures_of_a_rank(config)
    assert today == (150, 150 * 196)
    before = estimate_memory(config, 8, 80 * 2**30)
    monkeypatch.setattr(activations, "pictures_of", lambda model: Pooled(8, 1, 196))
    assert activations.pictures_of_a_rank(config) == (19 * 8, 19 * 196)
    monkeypatch.setattr(activations, "pictures_of", lambda model: Pooled(1, 12, 196))
    assert activations.pictures_of_a_rank(config) == (150 * 12, 150 * 196)
    after = estimate_memory(config, 8, 80 * 2**30)
    assert after.llm_activations == before.llm_activations and after.total >= before.total


@dataclasses.dataclass(frozen=True)
class DearFirst:
    """The first frame of a medium costs what eight of the others do."""

    def units(self, frames, is_video, size=None):
        return (Unit(1, 8, 5, 8), *(Unit(1, 1, 5, 1),) * (frames - 1))[:frames]


def test_memory_counts_with_units_dealt_by_their_cost(monkeypatch):
    """9 units on 2 ranks: one of 8 squares, 8 of one square."""
    sizes = {"parallel.ring": 2, "parallel.ulysses": 1, "parallel.tp": 1, "data.num_frames": 9}
    config = load_config("longvila-7b-stage5", [*(f"{key}={value}" for key, value in sizes.items()), "data.packing=false"])
    monkeypatch.setattr(activations, "pictures_of", lambda model: DearFirst())
    assert activations.pictures_of_a_rank(config) == (8, 8 * 5)


def test_decoded_pictures_take_a_byte_for_each_color_of_each_pixel_in_every_row_that_is_held(monkeypatch):
    """2 rows of a step on each of 2 replicas and 3 rows ahead, of 150 frames a rank."""
    sizes = {"parallel.ring": 8, "parallel.ulysses": 1, "parallel.tp": 1, "data.num_frames": 1200, "data.prefetch": 3}
    overrides = [f"{key}={value}" for key, value in sizes.items()]
    config = load_config("longvila-7b-stage5", [*overrides, "data.packing=false", "train.global_batch_size=4"])
    assert pictures_on_host(config, 16) == (2 + 3) * 150 * 3 * 384 * 384
    monkeypatch.setattr(activations, "pictures_of", lambda model: Pooled(1, 12, 196))
    assert pictures_on_host(config, 16) == (2 + 3) * 150 * 12 * 3 * 384 * 384
