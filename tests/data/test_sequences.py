"""Batches: right padding, order, and an endless shuffle that resumes."""

from itertools import islice

import pytest
import torch

from compresskit.data import Sequences

ROWS = Sequences([[index] * (index % 4 + 1) for index in range(1, 11)], pad_token_id=0)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def test_an_epoch_visits_no_row_twice_and_the_next_has_another_order():
    batches = tokens(islice(ROWS.batches(3, generator=seeded()), 6))
    first = [row[0] for batch in batches[:3] for row in batch]
    second = [row[0] for batch in batches[3:] for row in batch]
    assert len(set(first)) == len(set(second)) == 9
    assert first != second


def test_the_same_generator_state_gives_the_same_batches_whatever_is_drawn_later():
    one, two = seeded(), seeded()
    left, right = ROWS.batches(3, generator=one), ROWS.batches(3, generator=two)
    torch.rand(5, generator=two)
    assert tokens(islice(left, 8)) == tokens(islice(right, 8))
    assert tokens(islice(ROWS.batches(3, generator=seeded(4)), 8)) != tokens(
        islice(ROWS.batches(3, generator=seeded()), 8)
    )


@pytest.mark.parametrize("start", [1, 3, 5, 7])
def test_a_walk_resumed_at_start_goes_on_where_the_whole_one_would(start):
    whole = tokens(islice(ROWS.batches(3, generator=seeded()), 10))
    assert tokens(islice(ROWS.batches(3, generator=seeded(), start=start), 10 - start)) == whole[start:]
    assert tokens(ROWS.batches(3, start=start)) == tokens(ROWS.batches(3))[start:]


def test_a_part_smaller_than_a_batch_is_one_batch():
    batch = next(ROWS.limit(2).batches(16, generator=seeded()))
    assert batch["input_ids"].shape[0] == 2


def test_no_rows_or_no_size_is_a_programming_error():
    with pytest.raises(ValueError):
        Sequences([], 0).batches(2)
    with pytest.raises(ValueError):
        ROWS.batches(0)
