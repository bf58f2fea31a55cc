"""Where codes come from while a policy trains, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.processor import PolicyProcessorPipeline, RenameObservationsProcessorStep
from torch.utils.data import default_collate

from hlrp_core.contract import BackendMode
from hlrp_core.laq.quantizer import LatentActionQuantizer
from lerobot_hlrp.configuration_hlrp_qwen import HLRPQwenConfig
from lerobot_hlrp.label_sources import OnlineLabels, open_label_source, read_padding

CAMERA = "observation.images.top"


@pytest.fixture
def online(tiny_laq: Path) -> OnlineLabels:
    return OnlineLabels(LatentActionQuantizer.from_pretrained(tiny_laq), "user/laq", CAMERA)


@pytest.fixture
def make_pairs(make_lerobot_batch) -> Callable[[], dict]:
    """A batch of three pairs of frames, none of which crosses the end of its episode."""
    return lambda: {**make_lerobot_batch(num_frames=2), f"{CAMERA}_is_pad": torch.zeros(3, 2, dtype=torch.bool)}


def test_the_teacher_sees_later_frames_and_the_student_does_not(online, make_tiny_policy, make_pairs):
    """The leakage test at the policy: frame t+gap changes the labels and nothing that the student sees."""
    policy = make_tiny_policy(mode="codes", labels=online).eval()
    one, other = make_pairs(), make_pairs()
    other[CAMERA][:, 1] = 0.0
    a, b = policy.reader.read_training(one), policy.reader.read_training(other)
    assert not torch.equal(a.target_codes, b.target_codes)
    assert torch.equal(a.frames, b.frames)
    assert a.frames.shape[1] == 1
    assert torch.equal(policy.predict_codes(one).logits, policy.predict_codes(other).logits)

    seen = []
    policy.backend.core.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    for read in (a, b):
        same_labels = replace(read, target_codes=a.target_codes)
        policy.backend.loss_from_batch(same_labels, mode=BackendMode.CODES)
    (tokens_a, images_a), (tokens_b, images_b) = seen
    assert torch.equal(tokens_a.ids, tokens_b.ids)
    assert torch.equal(images_a.tensors["pixel_values"], images_b.tensors["pixel_values"])


def test_pairs_that_cross_the_end_of_an_episode_do_not_supervise(online, make_tiny_policy, make_pairs):
    policy = make_tiny_policy(mode="codes", labels=online).eval()
    batch = make_pairs()
    batch[f"{CAMERA}_is_pad"] = torch.tensor([[False, False], [False, True], [False, False]])
    assert policy.reader.read_training(batch).codes_valid.tolist() == [True, False, True]
    assert policy(batch, reduction="none")[0][1] == 0


def test_a_renamed_camera_keeps_its_padding(online, make_dataset, tmp_path):
    """LeRobot renames the camera alone, and not what tells where its episodes end."""
    front, side = (f"observation.images.{name}" for name in ("front", "side"))
    root = make_dataset(tmp_path / "data", cameras=(front, side))
    gaps = {key: [0, 0.3] for key in (front, side, "observation.state")}
    dataset = LeRobotDataset("test/tiny", root=root, delta_timestamps={**gaps, "action": [0, 0.1]})
    batch = default_collate([dataset[index] for index in (7, 8, 9, 11)])  # the first episode has 12 frames
    rename = PolicyProcessorPipeline([RenameObservationsProcessorStep({front: CAMERA})])
    renamed = rename(batch)
    assert f"{CAMERA}_is_pad" not in renamed
    frames = (renamed[CAMERA] * 255).round().to(torch.uint8).movedim(-3, -1)
    assert online.label(renamed, frames)[1].tolist() == [True, True, False, False]


def test_padding_that_is_not_told_is_refused():
    pad, none = torch.tensor([[False, True]]), torch.zeros(1, 2, dtype=torch.bool)
    others = {"observation.images.side_is_pad": pad, "observation.state_is_pad": pad}
    strange = {"action_is_pad": none, "observation.images.map_is_pad": torch.zeros(1, 1, dtype=torch.bool)}
    own = {**others, f"{CAMERA}_is_pad": none}
    assert torch.equal(read_padding(own, CAMERA, size=(1, 2)), none)
    assert torch.equal(read_padding({**others, **strange}, CAMERA, size=(1, 2)), pad)
    for batch, got in (
        (strange, r"got observation\.images\.map_is_pad"),
        ({}, "got no padding at all"),
        ({**others, "observation.state_is_pad": none}, r"side_is_pad, observation\.state_is_pad, which do not"),
    ):
        with pytest.raises(ValueError, match=rf"top_is_pad: expected \[1, 2\] bool.*{got}\. Next step"):
            read_padding(batch, CAMERA, size=(1, 2))


def test_a_teacher_needs_the_pair(online, make_tiny_policy, make_lerobot_batch):
    policy = make_tiny_policy(mode="codes", labels=online)
    with pytest.raises(ValueError, match=r"2 frames, 3 apart, for LAQ user/laq, got 1.*observation_delta_indices"):
        policy(make_lerobot_batch())


def test_a_teacher_is_neither_trained_nor_saved(online, tmp_path, make_tiny_policy, make_pairs):
    policy = make_tiny_policy(mode="codes", labels=online).train()
    policy(make_pairs())[0].backward()
    assert all(parameter.grad is None for parameter in online.laq.parameters())
    assert not online.laq.training
    assert len(policy.state_dict()) == len(make_tiny_policy(mode="codes").state_dict())


# -- what must fit --------------------------------------------------------------------------------------------------


@pytest.fixture
def meta(tiny_dataset: Path) -> LeRobotDatasetMetadata:
    return LeRobotDatasetMetadata("test/tiny", root=tiny_dataset)


def test_sizes_and_origin_come_from_the_labels(tiny_laq, tiny_dataset, code_table, meta):
    by_laq = HLRPQwenConfig(laq=str(tiny_laq), camera=CAMERA)
    assert open_label_source(by_laq, meta).facts["laq_hash"] == by_laq.laq_hash
    assert (by_laq.codebook_size, by_laq.code_seq_len, by_laq.frame_gap, by_laq.label_span) == (8, 4, 3, 3)
    assert by_laq.laq_id == "tiny-laq"  # not the path

    by_table = HLRPQwenConfig(codes=str(code_table(tiny_dataset)), camera=CAMERA)
    open_label_source(by_table, meta)
    assert (by_table.codebook_size, by_table.code_seq_len, by_table.frame_gap) == (8, 4, 3)
    assert (by_table.laq_id, by_table.laq_hash) == ("user/laq", "hash-of-a-laq")


def test_a_table_is_looked_up_by_the_global_frame_index(tiny_dataset, code_table, make_tiny_policy, make_lerobot_batch):
    labels = open_label_source(HLRPQwenConfig(codes=str(code_table(tiny_dataset)), camera=CAMERA), None)
    policy = make_tiny_policy(mode="codes", labels=labels)
    batch = {**make_lerobot_batch(), "index": torch.tensor([8, 9, 20])}  # the first episode has 12 frames
    read = policy.reader.read_training(batch)
    assert read.target_codes.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [4, 5, 6, 7]]
    assert read.codes_valid.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="index: expected the global frame index"):
        policy({key: value for key, value in batch.items() if key != "index"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codebook_size": 16}, r"codebook_size: expected 16.*got 8 from code table"),
        ({"code_seq_len": 2}, r"code_seq_len: expected 2.*got 4 from code table"),
        ({"frame_gap": 5}, r"frame_gap: expected 5.*got 3 from code table.*--policy\.frame_gap=null"),
        ({"laq_hash": "other"}, r"laq_hash: expected other.*got hash-of-a-laq.*--policy\.laq_hash=null"),
    ],
)
def test_labels_that_do_not_fit_the_policy_are_refused(settings, words, code_table, tiny_dataset):
    with pytest.raises(ValueError, match=words):
        open_label_source(HLRPQwenConfig(codes=str(code_table(tiny_dataset)), camera=CAMERA, **settings), None)


def test_a_table_of_another_dataset_is_refused(code_table, make_dataset, tiny_videos, tmp_path, meta):
    other = make_dataset(tmp_path / "other", seed=1)  # as long, with the same tasks and features
    for root in (tiny_videos, other):
        config = HLRPQwenConfig(codes=str(code_table(root, dataset_id="user/other")), camera=CAMERA)
        with pytest.raises(ValueError, match=r"expected one of the dataset test/tiny.*got one of user/other"):
            open_label_source(config, meta)


def test_a_table_of_another_camera_is_refused(code_table, tiny_dataset, meta):
    table = code_table(tiny_dataset, camera="observation.images.wrist")
    with pytest.raises(ValueError, match=r"camera: expected observation\.images\.top.*got observation\.images\.wrist"):
        open_label_source(HLRPQwenConfig(codes=str(table), camera=CAMERA), meta)


def test_a_gap_longer_than_every_episode_is_refused(code_table, tiny_dataset, meta):
    table = code_table(tiny_dataset, frame_gap=14)
    with pytest.raises(ValueError, match=r"frame_gap: expected .* less than 14 frames.*got 14 from code table"):
        open_label_source(HLRPQwenConfig(codes=str(table), camera=CAMERA), meta)


@pytest.mark.parametrize("flag", ["codes", "laq"])
def test_labels_that_are_not_there_are_refused(flag, tmp_path, meta):
    config = HLRPQwenConfig(**{flag: str(tmp_path)}, camera=CAMERA)
    with pytest.raises(ValueError, match="Next step"):
        open_label_source(config, meta)
