"""LeRobot's batches and the contract's types."""

from __future__ import annotations

import pytest
import torch

from lerobot_hlrp.batch import read_instructions, select_rows, to_frames


def test_every_pixel_value_survives():
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 256)[None, :, None, :]  # (1, 3, 1, 256)
    as_lerobot_does = pixels.to(torch.float32) / 255.0
    assert torch.equal(to_frames(as_lerobot_does), pixels.movedim(1, -1)[:, None])
    assert torch.equal(to_frames(as_lerobot_does.double()), to_frames(pixels))


def test_frames_keep_time_and_place():
    images = torch.randint(0, 256, (2, 4, 3, 5, 6), dtype=torch.uint8)
    frames = to_frames(images)
    assert frames.shape == (2, 4, 5, 6, 3)
    assert frames[1, 2, 3, 4, 0] == images[1, 2, 0, 3, 4]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 8, 8, 3), r"expected \[B, 3, H, W\]"),
        (torch.zeros(2, 1, 8, 8), r"expected \[B, 3, H, W\]"),
        (torch.full((2, 3, 8, 8), -0.5), "-0.5"),
        (torch.full((2, 3, 8, 8), 255.0), "255"),
        (torch.full((2, 3, 8, 8), float("nan")), "nan"),
    ],
)
def test_what_is_no_image_is_refused(images, words):
    with pytest.raises(ValueError, match=words):
        to_frames(images)


def test_an_empty_instruction_is_one_and_a_missing_one_is_not():
    assert read_instructions({"task": ["", "reach"]}, 2) == ["", "reach"]
    assert read_instructions({"task": "reach"}, 1) == ["reach"]
    for batch in ({}, {"task": None}, {"task": ["reach"]}):
        with pytest.raises(ValueError, match=r"task: expected 2 instruction.*Next step"):
            read_instructions(batch, 2)


def test_rows_without_a_label_hold_no_filler():
    values = torch.tensor([[1.0, 2.0], [float("nan"), 3.0]])
    assert torch.equal(select_rows(values, torch.tensor([True, False])), torch.tensor([[1.0, 2.0], [0.0, 0.0]]))


# -- through the policy's reader ------------------------------------------------------------------------------------


def test_a_missing_camera_lists_those_there_are(make_tiny_policy, make_lerobot_batch):
    batch = make_lerobot_batch()
    batch["observation.images.side"] = batch.pop("observation.images.top")
    with pytest.raises(ValueError, match=r"observation.images.top.*observation.images.side.*--rename_map"):
        make_tiny_policy(mode="actions").select_action(batch)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("action", None, "--policy.mode=codes"),
        ("action", torch.zeros(3, 2), "chunks"),
        ("action", torch.zeros(3, 9, 2), "chunks"),
        ("observation.state", None, "observation.state"),
        ("observation.state", torch.zeros(3, 5), "observation.state"),
        ("task", None, "task"),
    ],
)
def test_a_training_batch_that_lacks_something_is_refused(key, value, words, make_tiny_policy, make_lerobot_batch):
    with pytest.raises(ValueError, match=words):
        make_tiny_policy(mode="actions")({**make_lerobot_batch(), key: value})


def test_codes_need_a_source(make_tiny_policy, make_lerobot_batch):
    with pytest.raises(ValueError, match=r"--policy\.codes.*--policy\.laq"):
        make_tiny_policy(mode="codes")(make_lerobot_batch())


@pytest.mark.parametrize("key", ["action", "observation.state"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_an_error_that_names_the_frame(key, value, make_tiny_policy, make_lerobot_batch):
    batch = make_lerobot_batch()
    batch["index"] = torch.tensor([17, 18, 19])
    batch[key] = batch[key].clone()
    batch[key][1] = value
    with pytest.raises(ValueError, match=rf"{key}: expected finite.*\[18\].*--policy\.action_episodes"):
        make_tiny_policy(mode="actions")(batch)


def test_nan_where_nothing_supervises_is_no_error(make_tiny_policy, make_lerobot_batch):
    policy = make_tiny_policy(mode="actions").train()
    policy.reader.action_episodes = torch.tensor([0, 2])
    batch = make_lerobot_batch()
    batch["action"][0, -1] = float("nan")  # past the end of the episode
    for key in ("action", "observation.state"):
        batch[key][1] = float("nan")  # an episode without actions
    loss, _ = policy(batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())


def test_episodes_that_may_not_supervise_do_not(make_tiny_policy, make_lerobot_batch):
    policy = make_tiny_policy(mode="actions", action_head="mlp").train()
    policy.reader.action_episodes = torch.tensor([0, 2])
    batch = make_lerobot_batch()
    loss, _ = policy(batch)
    per_sample, _ = policy(batch, reduction="none")
    assert per_sample[1] == 0
    assert loss.item() == pytest.approx(per_sample[[0, 2]].mean().item(), rel=1e-5)
    batch["action"][1] += 100
    assert torch.equal(policy(batch)[0], loss)


def test_all_ranks_report_the_same_metrics(make_tiny_policy, make_lerobot_batch, listed_labels):
    labels = listed_labels([[1, 2, 3, 4]] * 3, [False] * 3)
    policy = make_tiny_policy(mode="multitask", labels=labels)
    without = policy(make_lerobot_batch())[1]
    labels.valid[:] = True
    assert list(policy(make_lerobot_batch())[1]) == list(without)


def test_a_batch_without_labels_does_not_pull_the_logged_loss_down(make_tiny_policy, make_lerobot_batch):
    policy = make_tiny_policy(mode="actions").train()
    before = policy(make_lerobot_batch())[1]
    policy.reader.action_episodes = torch.tensor([99])
    loss, metrics = policy(make_lerobot_batch())
    assert loss == 0
    assert metrics == before


def test_further_cameras_are_seen_at_time_t(make_tiny_policy, make_lerobot_batch, listed_labels):
    policy = make_tiny_policy(mode="codes", labels=listed_labels([[1, 2, 3, 4]] * 3)).eval()
    batch = make_lerobot_batch(num_frames=2)
    one = policy.predict_codes(batch).logits
    policy.config.extra_cameras = ["observation.images.wrist"]
    batch["observation.images.wrist"] = torch.rand(3, 2, 3, 32, 32)
    two = policy.predict_codes(batch).logits
    assert not torch.equal(one, two)
    batch["observation.images.wrist"][:, 1] = 0
    assert torch.equal(policy.predict_codes(batch).logits, two)
