"""Documents cut into chunks: nothing is lost, no unit is parted, equal beginnings are cut alike."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vila.plan.chunks import TOKENS_PER_RANK, Chunk, cut, part, prefix_tokens, row_of, tokens_of_chunk
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row import MEDIA_TOKEN, Document
from megatron_vila.plan.row_plan import RowPlan
from tests import samples


def random_document(rng: np.random.Generator) -> Document:
    """Text, frames of 4 tokens and units of 3 to 12, in any order."""
    letters = rng.choice(list("tttFFFTVP"), size=int(rng.integers(1, 60)))
    return samples.document("random", "".join(letters))


def test_chunks_hold_every_token_and_unit_of_a_document_once_in_its_order():
    rng = np.random.default_rng(0)
    for _ in range(200):
        document, size = random_document(rng), int(rng.integers(1, 40))
        chunks = cut(document, size)
        parts = [part(document, chunk) for chunk in chunks]
        assert np.array_equal(np.concatenate([p.token_ids for p in parts]), document.token_ids)
        assert [frame for p in parts for frame in p.frames] == list(document.frames)
        starts = [chunk.first + p.frame_starts for chunk, p in zip(chunks, parts, strict=True)]
        assert np.array_equal(np.concatenate(starts), document.frame_starts)
        for chunk, p in zip(chunks, parts, strict=True):
            assert len(chunk) == len(p) > 0
            assert (p.token_ids == MEDIA_TOKEN).sum() == sum(frame.tokens for frame in p.frames)


def test_a_chunk_is_longer_than_asked_only_for_a_single_unit_and_short_only_where_a_unit_follows():
    rng = np.random.default_rng(1)
    for _ in range(200):
        document, size = random_document(rng), int(rng.integers(1, 40))
        chunks = cut(document, size)
        for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
            if len(chunk) > size:
                assert len(chunk.frames) == 1 and document.frames[chunk.frames[0]].tokens == len(chunk)
            elif len(chunk) < size and following is not None:
                assert document.frame_starts[following.frames[0]] == following.first
                assert len(chunk) + document.frames[following.frames[0]].tokens > size


def test_documents_that_begin_alike_are_cut_alike_up_to_where_they_differ():
    first, second = (samples.document("same", "tt" + "F" * 20 + tail) for tail in ("tttttttttt", "t"))
    end = prefix_tokens(first)
    assert end == prefix_tokens(second) == 2 + 80
    assert cut(first, 9, stop=end) == cut(second, 9, stop=end)
    assert cut(first, 9, end) == (Chunk(82, 91, range(20, 20)), Chunk(91, 92, range(20, 20)))


def test_the_shared_part_ends_with_the_last_unit():
    assert prefix_tokens(samples.document("d", "ttFtFtt")) == 2 + 4 + 1 + 4
    assert prefix_tokens(samples.document("d", "ttt")) == 0
    assert cut(samples.document("d", "ttt"), 5, 3) == ()


def test_positions_of_a_chunk_go_on_where_the_one_before_ended_in_every_layout():
    document = samples.document("d", "ttFFFtFFFt")
    for grid in (GridShape.of(1), GridShape.of(4, ulysses=2, ring=2), GridShape.of(4, tp=2, ring=2)):
        seen: dict[int, int] = {}
        for chunk in cut(document, 11):
            row = row_of([part(document, chunk)], [chunk.first], grid)
            plan = RowPlan.of(row, grid)
            for rank in range(grid.world_size):
                shard = plan.shard(rank)
                places = plan.places(rank)
                held = np.split(shard.positions, grid.tp)[grid.coordinates(rank).tp]
                for place, position in zip(places, held, strict=True):
                    if place < len(chunk):
                        assert row.token_ids[place] == document.token_ids[position]
                        seen[int(position)] = seen.get(int(position), 0) + 1
        assert seen == dict.fromkeys(range(len(document)), 1)


def test_rows_of_several_sequences_count_from_their_own_places():
    one, two = samples.document("a", "ttt"), samples.document("b", "ttttt")
    row = row_of([one, two], [100, 7], GridShape.of(1))
    assert row.positions.tolist() == [100, 101, 102, 103, 7, 8, 9, 10, 11, 12]


def test_a_border_inside_a_unit_or_outside_the_document_is_refused():
    document = samples.document("d", "tFt")
    with pytest.raises(ValueError, match="place 3 lies inside the tokens of a unit"):
        cut(document, 8, 3)
    with pytest.raises(ValueError, match="place 2 lies inside"):
        cut(document, 8, 0, 2)
    for arguments in ((0,), (4, 7), (4, 0, 7), (4, 5, 1)):
        with pytest.raises(ValueError, match="cannot be cut"):
            cut(document, *arguments)


def test_the_size_of_a_chunk_grows_with_the_ranks_unless_it_is_given():
    assert tokens_of_chunk(0, GridShape.of(1)) == TOKENS_PER_RANK
    assert tokens_of_chunk(0, GridShape.of(8, tp=2, ulysses=2, ring=2)) == 8 * TOKENS_PER_RANK
    assert tokens_of_chunk(100, GridShape.of(8, ring=8)) == 100
    with pytest.raises(ValueError, match="chunk_tokens=-1"):
        tokens_of_chunk(-1, GridShape.of(1))
