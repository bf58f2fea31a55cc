"""A LeRobotDataset with its codes as batches of the core's contract, for commands beside `lerobot-train`.

Shape legend: B batch, S code positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hlrp_core.codes.accuracy import CodeCounts
from hlrp_core.contract import FoundationBatch
from lerobot_hlrp.batch import BatchReader
from lerobot_hlrp.label_sources import TableLabels

if TYPE_CHECKING:
    from lerobot.configs.default import DatasetConfig
    from lerobot.datasets import LeRobotDataset

    from lerobot_hlrp.policy_config import HLRPConfig


def load_datasets(dataset: DatasetConfig, config: HLRPConfig) -> tuple[LeRobotDataset, LeRobotDataset | None]:
    """Training and held-out episodes, by the very rule of `lerobot-train` (`--dataset.eval_split`).

    Args:
        config: says which frames an item needs, frame t alone or a pair for an online LAQ, and which actions.
    """
    from lerobot.datasets.factory import make_train_eval_datasets

    wanted = SimpleNamespace(
        observation_delta_indices=config.observation_delta_indices,
        action_delta_indices=config.action_delta_indices if config.learns_actions else None,
        reward_delta_indices=None,
    )
    run = SimpleNamespace(dataset=dataset, trainable_config=wanted, tolerance_s=1e-4)
    return make_train_eval_datasets(run)  # type: ignore[arg-type, return-value]


class FoundationBatches:
    """Labelled batches of one dataset. Frames that no label covers are left out, where that is known beforehand.

    Args:
        dataset: LeRobot's, of the episodes to read.
        reader: turns LeRobot's batches into the contract's; it knows the camera and the labels.
        batch_size: B.
        shuffle_seed: of the order, another one in each pass; None reads in the dataset's order.
        num_workers: processes that load frames.
        shard: this process and the number of them; each reads its own share.
        device: where the batches go, so that an online LAQ runs there too.
        preprocess: a policy's preprocessor, which normalises the state; where no state is read there is no need of it.

    Raises:
        ValueError: no frame has a label.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        reader: BatchReader,
        *,
        batch_size: int,
        shuffle_seed: int | None = None,
        num_workers: int = 0,
        shard: tuple[int, int] = (0, 1),
        device: torch.device | str = "cpu",
        preprocess: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ):
        self.dataset = dataset
        self.reader = reader
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.num_workers = num_workers
        self.shard = shard
        self.device = torch.device(device)
        self.preprocess = preprocess
        self.items = labelled_items(dataset, reader)
        if len(self.items) < shard[1]:
            raise ValueError(
                f"labels: expected frames of {dataset.repo_id} with valid codes, got {len(self.items)} among "
                f"{len(dataset)}. Next step: check that the table is of this dataset, and that its episodes are longer "
                "than the frame gap."
            )

    def __len__(self) -> int:
        return len(self._batches_of(0))

    def __iter__(self) -> Iterator[FoundationBatch]:
        return self.read_from(0, 0)

    def read_from(self, epoch: int, start: int) -> Iterator[FoundationBatch]:
        """Pass `epoch` over the data, without its first `start` batches."""
        from lerobot.utils.collate import lerobot_collate_fn

        loader = DataLoader(
            self.dataset,
            batch_sampler=self._batches_of(epoch)[start:],  # type: ignore[arg-type]
            num_workers=self.num_workers,
            collate_fn=lerobot_collate_fn if self.dataset.meta.has_language_columns else None,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(epoch),  # or else every pass would draw from the global one
        )
        for loaded in loader:
            batch = self._to_device(loaded)
            yield self.reader.read_training(batch if self.preprocess is None else self.preprocess(batch))

    def _batches_of(self, epoch: int) -> list[list[int]]:
        items = self.items
        if self.shuffle_seed is not None:
            generator = torch.Generator().manual_seed(self.shuffle_seed * 1_000_003 + epoch)
            items = items[torch.randperm(len(items), generator=generator)]
        rank, num_shards = self.shard
        share = items[: len(items) // num_shards * num_shards][rank::num_shards]
        return [part.tolist() for part in share.split(self.batch_size)]

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.device.type == "cpu":
            return batch
        return {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }


def labelled_items(dataset: LeRobotDataset, reader: BatchReader, *, with_codes: bool = False) -> Tensor:
    """Positions in the dataset whose frames have a label, as far as that is known without looking at frames.

    Args:
        with_codes: an action is not enough.
    """
    has_actions = reader.config.learns_actions and not with_codes
    if has_actions or not isinstance(reader.labels, TableLabels):
        return torch.arange(len(dataset))
    _, valid = reader.labels.table.lookup(frame_indices(dataset))
    return valid.nonzero().flatten()


def spread(items: Tensor, most: int) -> Tensor:
    """At most `most` of the items, evenly spaced; all of them for 0."""
    if most == 0 or len(items) <= most:
        return items
    return items[torch.linspace(0, len(items) - 1, most).round().long()]


def frame_indices(dataset: LeRobotDataset) -> Tensor:
    """Global frame index of each item."""
    return torch.tensor(dataset.hf_dataset.data.column("index").to_numpy())


def count_training_codes(
    dataset: LeRobotDataset,
    reader: BatchReader,
    *,
    codebook_size: int,
    code_seq_len: int,
    max_batches: int = 50,
    **loading: Any,
) -> CodeCounts:
    """Codes of the training episodes: all of a table's, or a sample of those that an online LAQ gives.

    Args:
        max_batches: how large that sample is.
        loading: arguments of `FoundationBatches`.
    """
    from hlrp_core.training import count_codes

    if not isinstance(reader.labels, TableLabels):
        batches = FoundationBatches(dataset, reader, shuffle_seed=0, **loading)
        return count_codes(batches, codebook_size=codebook_size, code_seq_len=code_seq_len, max_batches=max_batches)
    counts = CodeCounts(codebook_size, code_seq_len)
    codes, valid = reader.labels.table.lookup(frame_indices(dataset))
    counts.add(codes[valid])
    return counts
