"""The global order, and its cut over ranks and micro-batches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from grasp_dist.training.batches import GlobalOrder, collate, micro_batches
from grasp_dist.training.examples import IGNORED, Example
from grasp_dist.training.packing import pack
from tests.training.training_cases import random_examples


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (32, 32), (7, 16), (5, 1)])
def test_epochs_are_permutations_that_follow_each_other(count, batch_size):
    order = GlobalOrder(count, seed=3)
    steps = 6 * count
    stream = [index for step in range(steps) for index in order.samples(step * batch_size, batch_size)]
    assert len(stream) == steps * batch_size
    epochs = [stream[start : start + count] for start in range(0, len(stream), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 5 or len({tuple(epoch) for epoch in epochs}) > 1
    fresh = GlobalOrder(count, seed=3)
    places = [(17, 3), (2, 9)]
    assert [fresh.samples(*place) for place in places] == [stream[first : first + n] for first, n in places], "anywhere"
    assert any(GlobalOrder(count, seed=4).samples(first, 4) != stream[first : first + 4] for first in range(5))


@pytest.mark.parametrize(("world_size", "size"), [(1, None), (1, 3), (2, None), (3, None), (3, 2), (4, 1), (12, 5)])
def test_every_target_is_taken_once_and_ranks_run_alike(world_size, size):
    examples = random_examples(23)
    indices = GlobalOrder(23, seed=0).samples(10, 10)
    shares = [
        micro_batches(examples, indices, world_rank=rank, world_size=world_size, size=size)
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch.input_ids) <= (size or 10) for share in shares for batch in share)
    found = Counter(int(target) for share in shares for batch in share for target in batch.targets)
    expected = Counter(label for index in indices for label in examples[index].labels[1:] if label != IGNORED)
    assert found == expected


def test_collate_pads_on_the_right_and_points_at_targets():
    batch = collate([Example([4, 5, 6], [IGNORED, IGNORED, 6]), Example([7, 8], [IGNORED, 8])])
    assert batch.input_ids.tolist() == [[4, 5, 6], [7, 8, 8]]
    assert batch.positions.tolist() == [1, 3]
    assert batch.targets.tolist() == [6, 8]
    assert batch.position_ids is None


def test_positions_start_again_with_each_packed_part():
    examples = [Example([1, 2, 3], [IGNORED, 2, 3]), Example([4, 5], [IGNORED, 5]), Example([6], [IGNORED])]
    (packed,) = pack(examples, 8)
    batch = collate([packed, Example([9] * 8, [IGNORED] * 8)])
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], list(range(8))]
    assert torch.equal(batch.input_ids[0, :6], torch.tensor([1, 2, 3, 4, 5, 6]))
    assert batch.positions.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [2, 3, 5]
