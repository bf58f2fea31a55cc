"""The batches between a LeRobotDataset and the core."""

from __future__ import annotations

import pytest
import torch
from lerobot.configs.default import DatasetConfig

from lerobot_hlrp.foundation_batches import FoundationBatches, load_datasets, spread
from lerobot_hlrp.policy_types import make_code_policy

SPLIT = 0.5  # episodes 0 and 1 train, 2 and 3 are held out: of each task the last one


@pytest.fixture(scope="module")
def policy_and_data(tiny_qwen, tiny_dataset, code_table):
    dataset = DatasetConfig("test/tiny", root=str(tiny_dataset), eval_split=SPLIT)
    policy, _ = make_code_policy(
        dataset, "qwen_plain", device="cpu", backbone=str(tiny_qwen), codes=str(code_table(tiny_dataset))
    )
    return policy, load_datasets(dataset, policy.config)


def codes_of(batches) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.target_codes.tolist()]


def test_batches_cover_every_labelled_frame_once(policy_and_data, tiny_dataset, code_table):
    policy, (training, _) = policy_and_data
    in_order = FoundationBatches(training, policy.reader, batch_size=4)
    shuffled = FoundationBatches(training, policy.reader, batch_size=4, shuffle_seed=1)
    expected = sorted(tuple((i + s) % 8 for s in range(4)) for i in [*range(9), *range(12, 18)])
    assert len(in_order) == 4
    assert [batch.batch_size for batch in in_order] == [4, 4, 4, 3]
    for batches in (in_order, shuffled):
        assert sorted(codes_of(batches)) == expected
        assert all(bool(batch.codes_mask().all()) for batch in batches)
        assert all(batch.frames.dtype == torch.uint8 and batch.frames.shape[1] == 1 for batch in batches)
    first, second = (codes_of(shuffled.read_from(epoch, 0)) for epoch in (0, 1))
    assert first != second != codes_of(in_order)
    assert codes_of(shuffled.read_from(1, 2)) == second[8:]
    other_seed = FoundationBatches(training, policy.reader, batch_size=4, shuffle_seed=2)
    assert codes_of(other_seed) != first


def test_reading_draws_no_global_random_numbers(policy_and_data):
    policy, (training, _) = policy_and_data
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in FoundationBatches(training, policy.reader, batch_size=4, shuffle_seed=1):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_share_the_frames(policy_and_data):
    policy, (training, _) = policy_and_data
    shards = [
        FoundationBatches(training, policy.reader, batch_size=2, shuffle_seed=1, shard=(rank, 2)) for rank in (0, 1)
    ]
    assert len(shards[0]) == len(shards[1])  # or else one process would wait for the other for ever
    seen = [set(torch.cat([torch.tensor(b) for b in s._batches_of(0)]).tolist()) for s in shards]
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 14


def test_spreading():
    items = torch.arange(10) * 7
    assert torch.equal(spread(items, 0), items)
    assert torch.equal(spread(items, 10), items)
    assert spread(items, 4).tolist() == [0, 21, 42, 63]
    assert spread(items, 1).tolist() == [0]
