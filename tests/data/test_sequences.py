"""Batches: right padding and order."""

import pytest
import torch

from compresskit.data import Sequences

ROWS = Sequences([[index] * (index % 4 + 1) for index in range(1, 11)], pad_token_id=0)


def tokens(batches) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in batches]


def test_batches_in_order_hold_every_row_padded_on_the_right_under_a_mask():
    batches = list(ROWS.batches(4))
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
    rows = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert rows == ROWS.rows
    first = batches[0]
    assert first["input_ids"].shape == (4, 4)
    assert first["input_ids"].dtype == torch.int64
    assert first["input_ids"][3].tolist() == [4, 0, 0, 0]
    assert first["attention_mask"][3].tolist() == [1, 0, 0, 0]


def test_limit_takes_the_first_rows():
    assert len(ROWS.limit(3)) == 3
    assert len(ROWS.limit(99)) == 10
    assert tokens(ROWS.batches(2, limit=3)) == tokens(ROWS.limit(3).batches(2))


def test_by_length_orders_rows_from_the_shortest_and_keeps_ties_in_order():
    assert ROWS.by_length().rows == [[4], [8], [1, 1], [5, 5], [9, 9], [2] * 3, [6] * 3, [10] * 3, [3] * 4, [7] * 4]


def test_no_rows_or_no_size_is_a_programming_error():
    with pytest.raises(ValueError):
        Sequences([], 0).batches(2)
    with pytest.raises(ValueError):
        ROWS.batches(0)
