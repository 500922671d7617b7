"""Packing documents into a row."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, pack
from tests.samples import document

DOCUMENTS = [document("a", "tFtt"), document("b", "ttt"), document("c", "Ft")]


def test_each_document_is_padded_and_the_last_one_fills_the_row():
    row = pack(DOCUMENTS, document_multiple=4, row_multiple=16)
    assert row.cu_seqlens.tolist() == [0, 8, 12, 32]
    assert row.lengths == (7, 3, 5) and row.length == 32
    assert (row.labels[7:8] == IGNORE).all() and (row.labels[17:] == IGNORE).all()
    assert row.token_ids[17:].tolist() == [0] * 15


def test_positions_restart_in_each_document():
    row = pack(DOCUMENTS, document_multiple=4, row_multiple=4)
    assert row.positions.tolist() == [*range(8), *range(4), *range(8)]


def test_frames_keep_their_places_and_order():
    row = pack(DOCUMENTS, document_multiple=4, row_multiple=4)
    assert [frame.source for frame in row.frames] == ["a-0", "c-0"]
    for start, frame in zip(row.frame_starts, row.frames, strict=True):
        assert (row.token_ids[start : start + frame.tokens] == MEDIA_TOKEN).all()
    assert (row.token_ids == MEDIA_TOKEN).sum() == sum(frame.tokens for frame in row.frames)


def test_labels_stay_in_their_documents():
    row = pack(DOCUMENTS, document_multiple=4, row_multiple=4)
    for start, sample in zip(row.cu_seqlens[:-1], DOCUMENTS, strict=True):
        np.testing.assert_array_equal(row.labels[start : start + len(sample)], sample.labels)
    assert row.supervised_tokens == sum(int((d.labels != IGNORE).sum()) for d in DOCUMENTS)


@pytest.mark.parametrize(
    "documents, multiples, message",
    [
        ([], (1, 1), "at least one document"),
        ([document("empty", "")], (1, 1), "without tokens cannot be packed: empty"),
        (DOCUMENTS, (4, 6), "row_multiple=6 must be a multiple of document_multiple=4"),
    ],
)
def test_rows_that_cannot_be_are_refused(documents, multiples, message):
    with pytest.raises(ValueError, match=message):
        pack(documents, *multiples)
