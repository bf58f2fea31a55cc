"""`--policy.save_predicted_video=true`: predicted codes, drawn by the LAQ that made them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file

from hlrp_core.contract import LatentOutput
from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.quantizer import LatentActionQuantizer
from lerobot_hlrp.modeling_hlrp_qwen import HLRPQwenPolicy
from lerobot_hlrp.preview import Preview, to_video

SMALL_HEAD = ["--policy.action_expert.hidden_dim=32", "--policy.action_expert.num_layers=1"]
SMALL_HEAD += ["--policy.chunk_size=4", "--policy.n_action_steps=2", "--policy.action_head=prefix_flow"]


def random_frames(size: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, generator=generator)


def test_every_transition_is_drawn_from_the_picture_before_it():
    torch.manual_seed(0)
    config = LAQConfig(image_size=16, patch_size=4, hidden_dim=16, num_layers=1, num_frames=3, code_seq_len=2)
    laq = LatentActionQuantizer(config).eval()
    torch.nn.init.normal_(laq.decoder.to_target.weight)  # a new decoder draws no change
    frames, codes = random_frames(3, 16), torch.randint(0, 8, (3, 4))
    drawn = Preview(laq).draw(frames, LatentOutput(tokens=codes))
    assert drawn.shape == (3, 3, 1, 16, 48)
    observed, first, second = (drawn[:, :, 0] * 255).round().to(torch.uint8).movedim(1, -1).split(16, dim=2)
    assert torch.equal(observed, frames)
    for source, transition, target in ((observed, codes[:, :2], first), (first, codes[:, 2:], second)):
        expected = (laq.decode(source, transition).clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)
        assert torch.equal(target, expected)
        assert not torch.equal(target, source)
    steps = torch.cat([drawn, drawn.flip(0)], dim=2)
    assert torch.equal(to_video(steps), (steps[0].movedim(0, -1) * 255).round().to(torch.uint8))


def test_vectors_are_drawn_as_the_nearest_codes(tiny_laq: Path):
    preview = Preview(LatentActionQuantizer.from_pretrained(tiny_laq))
    frames, codes = random_frames(2, 32), torch.tensor([[0, 3, 5, 7], [1, 1, 2, 6]])
    vectors = preview.laq.code_vectors(codes).float()
    expected = preview.draw(frames, LatentOutput(tokens=codes))
    assert torch.equal(preview.draw(frames, LatentOutput(vector=vectors + 1e-3)), expected)


@pytest.fixture(scope="module")
def table(code_table: Callable, tabletop_dataset: Path, tiny_laq: Path) -> Path:
    laq_hash = LatentActionQuantizer.from_pretrained(tiny_laq).weights_hash()
    return code_table(tabletop_dataset, laq_id="tiny-laq", laq_hash=laq_hash)


@pytest.fixture(scope="module")
def plain(lerobot_train: Callable, tiny_qwen: Path, tabletop_dataset: Path, table: Path, tmp_path_factory) -> Path:
    """A policy of codes and actions that knows its LAQ by hash alone."""
    flags = ["--policy.type=hlrp_qwen", "--policy.mode=multitask", f"--policy.backbone={tiny_qwen}", *SMALL_HEAD]
    output = tmp_path_factory.mktemp("runs") / "run"
    return lerobot_train(*flags, f"--policy.codes={table}", root=tabletop_dataset, output=output, steps=1)


@pytest.fixture(scope="module")
def drawing(lerobot_train, plain: Path, tabletop_dataset: Path, table: Path, tiny_laq: Path, tmp_path_factory) -> Path:
    """The same, trained on with a LAQ to draw with, whose folder is deleted afterwards."""
    copy = Path(shutil.copytree(tiny_laq, tmp_path_factory.mktemp("laq") / "soon-gone"))
    flags = [f"--policy.path={plain}", f"--policy.codes={table}", "--policy.save_predicted_video=true"]
    output = tmp_path_factory.mktemp("runs") / "run"
    folder = lerobot_train(*flags, f"--policy.laq_weights={copy}", root=tabletop_dataset, output=output, steps=1)
    shutil.rmtree(copy)
    return folder


def evaluate(folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    from lerobot.scripts.lerobot_eval import main

    flags = (f"--policy.path={folder}", "--policy.device=cpu", f"--output_dir={output}", *flags)
    flags += ("--env.type=hlrp_tabletop", "--env.episode_length=5", "--eval.n_episodes=2", "--eval.batch_size=1")
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *flags, "--eval.use_async_envs=false"])
    main()


def test_lerobot_eval_saves_a_video_in_step_with_the_rollout(drawing, tmp_path, monkeypatch, tiny_laq):
    evaluate(drawing, tmp_path / "eval", monkeypatch)
    side = LatentActionQuantizer.from_pretrained(tiny_laq).config.image_size
    drawn = sorted((tmp_path / "eval").rglob("pred_episode_*.mp4"))
    assert [path.name for path in drawn] == ["pred_episode_0.mp4", "pred_episode_1.mp4"]
    with av.open(str(drawn[0])) as video:
        stream = video.streams.video[0]
        assert (stream.width, stream.height) == (2 * side, side)
        assert len(list(video.decode(video=0))) == 5


def test_the_laq_travels_with_the_policy_and_is_no_part_of_its_weights(drawing, plain, tiny_laq):
    names = set(load_file(drawing / "model.safetensors"))
    assert names == set(load_file(plain / "model.safetensors"))
    policy = HLRPQwenPolicy.from_pretrained(drawing)
    assert policy.preview.laq.weights_hash() == LatentActionQuantizer.from_pretrained(tiny_laq).weights_hash()
    assert not [name for name, _ in policy.named_parameters() if "laq" in name]
    assert not (plain / "laq").exists()


def test_a_policy_draws_with_a_laq_that_is_named_later(plain, tiny_laq, tmp_path, monkeypatch):
    flags = ["--policy.save_predicted_video=true", f"--policy.laq_weights={tiny_laq}"]
    evaluate(plain, tmp_path / "eval", monkeypatch, *flags)
    assert len(list((tmp_path / "eval").rglob("pred_episode_*.mp4"))) == 2


def test_what_cannot_be_drawn_is_refused(plain, other_laq, tiny_laq, tmp_path, monkeypatch):
    ask = "--policy.save_predicted_video=true"
    cases = {
        r"got None.*--policy\.laq_weights": [],
        "that of the policy's codes, with the hash": [f"--policy.laq_weights={other_laq}"],
        "got free": [f"--policy.laq_weights={tiny_laq}", "--policy.decoding=free"],
    }
    for message, flags in cases.items():
        with pytest.raises(ValueError, match=message):
            evaluate(plain, tmp_path / "eval", monkeypatch, ask, *flags)


def test_a_laq_of_features_cannot_draw(make_tiny_policy, tmp_path):
    sizes = {"image_size": 28, "patch_size": 4, "hidden_dim": 16, "num_layers": 1}
    target = {"target": "features", "feature_encoder": "user/encoder", "feature_shape": (12, 2)}
    LatentActionQuantizer(LAQConfig(**sizes, **target)).save_pretrained(tmp_path / "laq")
    with pytest.raises(ValueError, match=r"draws pixels \(--laq\.target=pixels\), got one whose target is features"):
        make_tiny_policy(save_predicted_video=True, laq_weights=str(tmp_path / "laq"))
