"""Several cameras with `lerobot-train`: the LAQ's, and further images of the prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

from hlrp_core.contract import SamplingOptions
from lerobot_hlrp.batch import resize_view
from lerobot_hlrp.configuration_hlrp_qwen import HLRPQwenConfig
from lerobot_hlrp.modeling_hlrp_qwen import HLRPQwenPolicy

TOP, WRIST, SIDE = (f"observation.images.{name}" for name in ("top", "wrist", "side"))
SMALL_HEAD = ["--policy.action_expert.hidden_dim=32", "--policy.action_expert.num_layers=1"]
SMALL_HEAD += ["--policy.chunk_size=4", "--policy.n_action_steps=2"]


@pytest.fixture(scope="module")
def three_cameras(make_dataset: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "cameras", cameras=(SIDE, TOP, WRIST))


@pytest.fixture(scope="module")
def trained(lerobot_train, tiny_qwen, tiny_laq, three_cameras, tmp_path_factory) -> Path:
    """Codes of the top camera from an online LAQ, then actions from the top and the wrist camera."""
    runs = tmp_path_factory.mktemp("runs")
    flags = ["--policy.type=hlrp_qwen", f"--policy.backbone={tiny_qwen}", f"--policy.laq={tiny_laq}"]
    stage_two = lerobot_train(*flags, "--policy.camera=top", root=three_cameras, output=runs / "codes")
    flags = [f"--policy.path={stage_two}", "--policy.mode=actions", "--policy.action_head=prefix_flow"]
    flags += ["--policy.extra_cameras=[wrist]", *SMALL_HEAD]
    return lerobot_train(*flags, root=three_cameras, output=runs / "actions")


def observation() -> dict:
    rng = torch.Generator().manual_seed(0)
    images = {key: torch.rand(2, 3, 32, 32, generator=rng) for key in (TOP, WRIST, SIDE)}
    return {**images, "observation.state": torch.zeros(2, 3), "task": ["reach the red disc", ""]}


def test_each_camera_is_an_image_of_the_prompt(trained):
    policy, batch = HLRPQwenPolicy.from_pretrained(trained), observation()
    assert policy.config.cameras == [TOP, WRIST]
    assert sorted(policy.config.image_features) == [TOP, WRIST]
    calls: list = []
    policy.backend.core.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    noise = torch.randn(2, 4, 2)
    chunk = policy.predict_action_chunk(batch, noise=noise)
    _, images = calls[0]
    assert len(images.layouts) == 4  # two for each sample
    for key in (TOP, WRIST):
        assert not torch.equal(policy.predict_action_chunk({**batch, key: 1 - batch[key]}, noise=noise), chunk)
    assert torch.equal(policy.predict_action_chunk({**batch, SIDE: 1 - batch[SIDE]}, noise=noise), chunk)
    swapped = {**batch, TOP: batch[WRIST], WRIST: batch[TOP]}
    assert not torch.equal(policy.predict_action_chunk(swapped, noise=noise), chunk)
    del batch[SIDE]
    assert torch.equal(policy.predict_action_chunk(batch, noise=noise), chunk)


def test_a_policy_that_knows_two_cameras_needs_both(trained):
    batch = observation()
    del batch[WRIST]
    with pytest.raises(ValueError, match=rf"camera: expected {WRIST} in the batch, got .*top"):
        HLRPQwenPolicy.from_pretrained(trained).predict_action_chunk(batch)


def test_the_core_alone_takes_the_views(trained):
    from hlrp_core.bundle import load_backend

    policy = HLRPQwenPolicy.from_pretrained(trained)
    batch, noise = policy.reader.read_observation(observation()), torch.randn(2, 4, 2)
    assert list(batch.views) == [WRIST]
    by_core = load_backend(trained).predict_action_chunk(batch, sampling=SamplingOptions(noise=noise)).actions
    assert torch.equal(by_core, policy.predict_action_chunk(observation(), noise=noise))


def test_cameras_of_another_size_are_resized(trained):
    policy, batch, noise = HLRPQwenPolicy.from_pretrained(trained), observation(), torch.randn(2, 4, 2)
    batch[WRIST] = torch.full((2, 3, 24, 48), 0.4)
    chunk = policy.predict_action_chunk(batch, noise=noise)
    batch[WRIST] = torch.full((2, 3, 32, 32), 0.4)
    assert torch.equal(policy.predict_action_chunk(batch, noise=noise), chunk)


def test_resizing_keeps_what_is_there():
    view = torch.randint(0, 256, (2, 6, 8, 3), dtype=torch.uint8)
    assert resize_view(view, (6, 8)) is view
    halves = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(8).view(1, 1, 16, 1).expand(1, 4, 16, 3)
    small = resize_view(halves, (2, 8))
    assert small.shape == (1, 2, 8, 3)
    assert small[0, 0, :3].max() == 0
    assert small[0, 0, 5:].min() == 255


def test_cameras_that_are_not_seen_are_logged(caplog):
    config = HLRPQwenConfig(camera="top")
    config.input_features = {key: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for key in (TOP, WRIST)}
    with caplog.at_level(logging.INFO):
        config.validate_features()
        config.validate_features()  # once: then it is settled
    assert caplog.text.count("--policy.extra_cameras=[wrist]") == 1
