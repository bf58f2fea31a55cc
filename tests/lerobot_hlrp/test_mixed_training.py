"""hlrp-train-codes on several datasets: other cameras, image sizes and frame rates, with and without actions."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors

from hlrp_core.bundle import load_backend, read_manifest
from hlrp_core.laq.code_table import CodeTable
from hlrp_core.laq.quantizer import LatentActionQuantizer
from hlrp_core.training import MixedBatches
from lerobot_hlrp.cli import eval_codes, train_codes
from lerobot_hlrp.cli.command import run_command
from lerobot_hlrp.foundation_batches import FoundationBatches
from lerobot_hlrp.frame_reader import read_frame
from lerobot_hlrp.mixing import mix_batches
from lerobot_hlrp.modeling_hlrp_qwen import HLRPQwenPolicy

SPLIT = 0.5  # episodes 0 and 1 train, 2 and 3 are held out


@pytest.fixture(autouse=True)
def _fresh_accelerator(monkeypatch):
    monkeypatch.setenv("HLRP_DEBUG", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def fast_videos(make_dataset: Callable, tmp_path_factory) -> Path:
    """Video without actions at 20 frames per second, from another camera of another size."""
    root = tmp_path_factory.mktemp("data") / "fast"
    cameras = ("observation.images.front",)
    return make_dataset(root, cameras=cameras, image_size=64, state_dim=0, action_dim=0, fps=20, video=True)


@pytest.fixture
def entries(tiny_dataset: Path, fast_videos: Path, code_table: Callable) -> dict[str, dict]:
    """A robot dataset and the video, with labels 0.3 seconds apart in both."""
    common = {"repo_id": "test/tiny", "eval_split": SPLIT}
    robot = {"name": "robot", "root": tiny_dataset, "codes": code_table(tiny_dataset), "weight": 3}
    video = {"name": "video", "root": fast_videos, "codes": code_table(fast_videos, frame_gap=6), "weight": 1}
    return {"robot": {**common, **robot}, "video": {**common, **video}}


def parse(backbone: Path, output: Path, entries: dict[str, dict], *flags: str, steps: int = 3) -> list[str]:
    paths = ("root", "codes")
    listed = [{key: str(value) if key in paths else value for key, value in e.items()} for e in entries.values()]
    usual = [f"--output_dir={output}", f"--steps={steps}", "--batch_size=4", "--num_workers=0", "--warmup_steps=0"]
    usual += ["--lr=1e-3", "--log_freq=1", "--eval_freq=2", "--save_freq=2", "--image_size=32"]
    return [f"--backbone={backbone}", "--backend=qwen_plain", f"--datasets={json.dumps(listed)}", *usual, *flags]


def train(*args, **settings) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    run_command(train_codes.TrainCodesCommand, train_codes.train, parse(*args, **settings))
    return args[1] / "checkpoints" / "last" / "pretrained_model"


def measure(model: Path, entry: dict, *flags: str) -> dict:
    """What hlrp-eval-codes says of the model on one dataset of the mix."""
    found: list[dict] = []
    dataset = [f"--dataset.{name}={entry[name]}" for name in ("repo_id", "root", "eval_split")]
    flags = (f"--policy.path={model}", *dataset, f"--codes={entry['codes']}", *flags)
    run_command(eval_codes.EvalCodesCommand, lambda c: found.append(eval_codes.evaluate(c)), list(flags))
    return found[0]


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def open_datasets(*args, **settings):
    """What the command opens, without training."""
    opened: list = []

    def run(command):
        wanted = train_codes.list_datasets(command)
        opened.extend(train_codes.open_datasets(command, wanted, device="cpu"))

    run_command(train_codes.TrainCodesCommand, run, parse(*args, **settings))
    return opened


def test_a_mix_of_video_and_robot_data(tiny_qwen, entries, tmp_path, capsys):
    folder = train(tiny_qwen, tmp_path / "run", entries)
    assert load_backend(folder).name == "qwen_plain"
    records = read_metrics(tmp_path / "run")
    expected = MixedBatches(dict.fromkeys(entries, ()), {"robot": 3, "video": 1}, batch_size=4)  # type: ignore[arg-type]
    counts = [expected.draw(step) for step in range(3)]
    last = [record for record in records if "drawn" in record][-1]
    for name, of in last["drawn"].items():
        assert of["samples"] == sum(count[name] for count in counts)
        assert of["share"] == pytest.approx(of["samples"] / 12)
    figures = records[-1]
    assert figures["by_source"]["robot"]["num_samples"] == (14 - 3) + (10 - 3)
    assert figures["by_source"]["video"]["num_samples"] == (14 - 6) + (10 - 6)
    assert figures["evaluation"]["num_samples"] == 18 + 12
    printed = capsys.readouterr().out
    assert "robot: 75.0% of the samples" in printed
    assert "frame gap 6 (0.3 s)" in printed
    assert f"{last['drawn']['video']['samples']} samples" in printed

    config = json.loads((folder / "config.json").read_text())
    assert (config["camera"], config["frame_gap"]) == ("observation.images.top", 3)  # the first one's
    assert config["frame_gap_s"] == pytest.approx(0.3)
    assert read_manifest(folder)["extra"]["laq"]["hash"] == "hash-of-a-laq"
    found = measure(folder, entries["video"], "--camera=front")
    assert found["code_accuracy"] == pytest.approx(figures["by_source"]["video"]["code_accuracy"])


def test_an_interrupted_mix_continues_and_another_is_refused(tiny_qwen, entries, tmp_path, monkeypatch):
    whole = train(tiny_qwen, tmp_path / "whole", entries, steps=4)
    read = FoundationBatches.read_from
    signals: list[int] = []

    def interrupting(self, epoch, start):
        for number, batch in enumerate(read(self, epoch, start)):
            if self.shuffle_seed is not None and number == 2 and not signals:
                signals.append(number)
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(FoundationBatches, "read_from", interrupting)
        with pytest.raises(SystemExit) as exit_:
            train(tiny_qwen, tmp_path / "stopped", entries, steps=4)
    assert exit_.value.code == 130
    heavier = {**entries, "video": {**entries["video"], "weight": 2}}
    with pytest.raises(ValueError, match=r"weight of video=1.*got weight of video=2"):
        train(tiny_qwen, tmp_path / "stopped", heavier, steps=4)
    with pytest.raises(ValueError, match=r"datasets=\['robot', 'video'\].*got datasets=\['robot'\]"):
        train(tiny_qwen, tmp_path / "stopped", {"robot": entries["robot"]}, steps=4)
    continued = train(tiny_qwen, tmp_path / "stopped", entries, steps=4)
    assert (continued / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    drawn = [[r["drawn"] for r in read_metrics(tmp_path / name) if "drawn" in r] for name in ("whole", "stopped")]
    assert drawn[0] == drawn[1]


def test_samples_are_those_of_the_datasets_by_weight(tiny_qwen, entries, tmp_path):
    _, datasets = open_datasets(tiny_qwen, tmp_path / "run", entries)
    mix = mix_batches(datasets, batch_size=4, seed=0)
    for name, source in mix.sources.items():
        sides = {batch.frames.shape[2] for batch in source}
        assert sides == {{"robot": 32, "video": 64}[name]}
        table = CodeTable.load(entries[name]["codes"])
        seen = sorted(tuple(row) for batch in source for row in batch.target_codes.tolist())
        valid = table.valid.clone()
        valid[21:] = False  # held out
        assert seen == sorted(tuple(row) for row in table.codes[valid].tolist())


def test_no_dataset_is_copied_with_the_settings(tiny_qwen, entries, tmp_path, monkeypatch):
    def refuse(self, memo):
        raise AssertionError("LeRobot keeps a dataset's notes in the settings, with a row for each of its episodes")

    monkeypatch.setattr(LeRobotDatasetMetadata, "__deepcopy__", refuse, raising=False)
    policy, datasets = open_datasets(tiny_qwen, tmp_path / "run", entries)
    configs = [dataset.reader.config for dataset in datasets]
    assert configs[0] is policy.config
    assert [config.camera.rsplit(".")[-1] for config in configs] == ["top", "front"]
    assert [list(config.image_features) for config in configs] == [[config.camera] for config in configs]


def test_a_laq_labels_every_dataset_at_its_own_frame_rate(tiny_qwen, entries, tiny_laq, tmp_path):
    bare = {name: {k: v for k, v in entry.items() if k != "codes"} for name, entry in entries.items()}
    policy, datasets = open_datasets(tiny_qwen, tmp_path / "run", bare, f"--laq={tiny_laq}", "--frame_gap_s=0.3")
    assert [dataset.reader.config.frame_gap for dataset in datasets] == [3, 6]
    assert (policy.config.frame_gap, policy.config.frame_gap_s) == (3, pytest.approx(0.3))
    video = datasets[1].training
    item = video[2]
    assert item["observation.images.front"].shape[0] == 2
    batch = {key: value[None] if isinstance(value, torch.Tensor) else [value] for key, value in item.items()}
    codes = datasets[1].reader.read_training(batch).target_codes
    plain = [read_frame(video, "observation.images.front", i) for i in (2, 8)]  # frame t of an item's pair
    pair = torch.from_numpy(np.stack(plain))[None]
    assert torch.equal(codes, LatentActionQuantizer.from_pretrained(tiny_laq).encode(pair).long())
    with pytest.raises(ValueError, match=r"frame_gap: expected frames 0.3 s apart in all datasets.*0.15 s"):
        open_datasets(tiny_qwen, tmp_path / "run", bare, f"--laq={tiny_laq}")


def test_frame_gaps_that_differ_on_purpose(tiny_qwen, entries, fast_videos, code_table, tiny_laq, tmp_path):
    entries["video"]["codes"] = code_table(fast_videos, frame_gap=3)
    with pytest.raises(ValueError, match=r"3 frames at 20 per second, which are 0.15 s, in video.*frame_gap_s=0.3"):
        open_datasets(tiny_qwen, tmp_path / "run", entries)
    entries["robot"]["frame_gap_s"], entries["video"]["frame_gap_s"] = 0.3, 0.15
    policy, _ = open_datasets(tiny_qwen, tmp_path / "run", entries)
    assert (policy.config.frame_gap, policy.config.frame_gap_s) == (None, None)
    bare = {name: {k: v for k, v in entry.items() if k != "codes"} for name, entry in entries.items()}
    folder = train(tiny_qwen, tmp_path / "run", bare, f"--laq={tiny_laq}", steps=1)
    flags = [f"--policy.path={folder}", "--dataset.repo_id=test/tiny", f"--dataset.root={fast_videos}"]
    flags += [f"--laq={tiny_laq}", "--camera=front"]
    with pytest.raises(ValueError, match=r"frame_gap_s: expected Δ of the labels.*Set --frame_gap_s"):
        run_command(eval_codes.EvalCodesCommand, eval_codes.evaluate, flags)
    found: list[dict] = []
    flags += ["--frame_gap_s=0.15", "--extra_cameras=[]"]
    run_command(eval_codes.EvalCodesCommand, lambda c: found.append(eval_codes.evaluate(c)), flags)
    assert found[0]["num_samples"] == 45 - 4 * 3


def test_every_robot_has_its_own_statistics_and_width_of_state(tiny_qwen, entries, make_dataset, code_table, tmp_path):
    two_axes = make_dataset(tmp_path / "two_axes", state_dim=2, action_dim=2)
    other = {"name": "two_axes", "root": two_axes, "codes": code_table(two_axes), "weight": 3}
    robots = {"robot": entries["robot"], "two_axes": {**entries["robot"], **other}}
    flags = ["--prompt.state_text=true"]
    _, datasets = open_datasets(tiny_qwen, tmp_path / "run", robots, *flags)
    for dataset, source in zip(datasets, mix_batches(datasets, batch_size=4, seed=0).sources.values(), strict=True):
        states = torch.stack([torch.as_tensor(state) for state in dataset.training.hf_dataset["observation.state"]])
        read = torch.cat([batch.state for batch in source])
        stats = dataset.meta.stats["observation.state"]
        mean, std = (torch.as_tensor(stats[name]).float() for name in ("mean", "std"))
        assert read.shape[1] == states.shape[1]
        distances = torch.cdist(read, (states - mean) / std)
        assert distances.min(1).values.max() < 1e-3
    model = train(tiny_qwen, tmp_path / "run", robots, *flags, steps=2)
    in_training = read_metrics(tmp_path / "run")[-1]["by_source"]
    with pytest.raises(ValueError, match=r"width of observation\.state: expected 3.*got 2.*--own_statistics=true"):
        measure(model, robots["two_axes"])
    for name, robot in robots.items():
        measured = measure(model, robot, "--own_statistics=true")
        assert measured["loss"] == pytest.approx(in_training[name]["loss"], rel=1e-5)
    with pytest.raises(ValueError, match=r"data for prompt\.state_text: expected a state"):
        open_datasets(tiny_qwen, tmp_path / "run", entries, *flags)


# -- codes and actions ----------------------------------------------------------------------------------------------

MULTITASK = ["--mode=multitask", "--action_head=prefix_flow", "--chunk_size=4", "--n_action_steps=2"]
MULTITASK += [f"--action_expert.{setting}" for setting in ("hidden_dim=32", "num_layers=1", "num_flow_steps=2")]


def test_a_mix_teaches_codes_and_actions(tiny_qwen, entries, tmp_path):
    """Of the video codes alone; the result is a policy that acts."""
    flags = [*MULTITASK, "--codes_loss_weight=0.5", "--actions_loss_weight=2", "--max_eval_samples=10"]
    folder = train(tiny_qwen, tmp_path / "run", entries, *flags, steps=4)
    records = [record for record in read_metrics(tmp_path / "run") if "drawn" in record]
    drawn = records[-1]["drawn"]
    assert (drawn["robot"]["actions"], drawn["video"]["actions"]) == (drawn["robot"]["samples"], 0)
    assert 0 < drawn["robot"]["codes"] < drawn["robot"]["samples"]  # the last frames of an episode have actions alone
    assert drawn["video"]["codes"] == drawn["video"]["samples"]
    for record in records:
        parts = 0.5 * record["codes_loss"] + 2 * record["actions_loss"]
        assert record["loss"] == pytest.approx(parts, rel=1e-4)

    measured = read_metrics(tmp_path / "run")[-1]["by_source"]  # frames with a code alone
    assert [measured[name]["num_samples"] for name in ("robot", "video")] == [10, 10]

    policy = HLRPQwenPolicy.from_pretrained(folder)
    assert policy.config.mode == "multitask"
    prepare, undo = make_pre_post_processors(policy.config, str(folder))
    observation = {
        "observation.images.top": torch.rand(3, 32, 32),
        "observation.state": torch.zeros(3),
        "task": "reach",
    }
    action = undo(policy.select_action(prepare(observation)))
    assert action.shape == (1, 2)
    assert action.isfinite().all()


def test_actions_of_a_mix_are_those_of_the_robots(tiny_qwen, entries, make_dataset, code_table, tmp_path):
    """In the scale of the first one, whose statistics the policy has."""
    again = make_dataset(tmp_path / "again", seed=1)
    second = {**entries["robot"], "name": "again", "root": again, "codes": code_table(again), "actions": True}
    policy, datasets = open_datasets(tiny_qwen, tmp_path / "run", {**entries, "again": second}, *MULTITASK)
    stats = datasets[0].meta.stats["action"]
    mean, std = (torch.as_tensor(stats[name]).float() for name in ("mean", "std"))
    for dataset, source in zip(datasets, mix_batches(datasets, batch_size=4, seed=0).sources.values(), strict=True):
        for batch in source:
            assert batch.actions.shape[1:] == (4, 2) and batch.state.shape[1:] == (3,)
            assert bool(batch.action_valid.all()) == (dataset.title != "video")
            if dataset.title == "video":
                assert not batch.action_valid.any() and batch.codes_valid.all()
                continue
            stored = torch.stack([torch.as_tensor(action) for action in dataset.training.hf_dataset["action"]])
            distances = torch.cdist(batch.actions[:, 0], (stored - mean) / std)
            assert distances.min(1).values.max() < 1e-3
    assert policy.config.action_feature.shape == (2,)


def test_a_multitask_mix_continues_bit_by_bit(tiny_qwen, entries, tmp_path):
    whole = train(tiny_qwen, tmp_path / "whole", entries, *MULTITASK, steps=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "continued", symlinks=True)
    shutil.rmtree(tmp_path / "continued" / "checkpoints" / "000004")
    with pytest.raises(ValueError, match=r"action_episodes=None.*got action_episodes=\[0\]"):
        train(tiny_qwen, tmp_path / "continued", entries, *MULTITASK, "--action_episodes=[0]", steps=4)
    continued = train(tiny_qwen, tmp_path / "continued", entries, *MULTITASK, steps=4)
    assert (continued / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_errors_of_a_multitask_mix(tiny_qwen, entries, make_dataset, code_table, tmp_path):
    wide = make_dataset(tmp_path / "wide", action_dim=5)
    other = {**entries["robot"], "name": "wide", "root": wide, "codes": code_table(wide)}
    video = {**entries["video"], "actions": True}
    for wanted, flags, words in (
        ({**entries, "wide": {**other, "actions": True}}, [], r"action of wide: expected width 2.*got width 5.*alone"),
        ({**entries, "video": video}, [], r"action of video: expected width 2.*got none"),
        (dict(reversed(entries.items())), [], "'action'"),  # the video first
        (
            entries,
            ["--action_episodes=[2,3]"],
            r"action_episodes: expected episodes of robot that.*\[2, 3\], of which none",
        ),
        (entries, ["--prompt.state_text=true"], r"observation\.state of video: expected width 3.*got none"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            open_datasets(tiny_qwen, tmp_path / "run", wanted, *MULTITASK, *flags)
        assert "Next step" in str(error.value)
    open_datasets(tiny_qwen, tmp_path / "run", {**entries, "wide": other}, *MULTITASK)  # it teaches codes
    for settings, words in (
        ({"mode": "actions"}, "mode: expected one of codes, multitask"),
        ({"action_head": "mlp"}, "action_head: expected mode=multitask.*Next step: Set --mode=multitask"),
    ):
        with pytest.raises(ValueError, match=words):
            train_codes.TrainCodesCommand(output_dir=tmp_path, backbone=str(tiny_qwen), **settings)


def test_errors(tiny_qwen, entries, tiny_dataset, fast_videos, code_table, tmp_path):
    def change(title: str, /, **settings) -> dict[str, dict]:
        changed = {**entries[title], **settings}
        return {**entries, title: {key: value for key, value in changed.items() if value is not None}}

    other_laq = code_table(fast_videos, frame_gap=6, laq_hash="other")
    other_size = code_table(fast_videos, frame_gap=6, codebook_size=16)
    for wanted, flags, words in (
        (change("video", weight=None), [], "a weight for each.*none for video"),
        (change("video", weight=-1), [], "weight: expected a number above 0.*video: -1"),
        (change("video", name="robot"), [], "names of their own.*robot"),
        (change("video", codes=None), [], "labels: expected .*none for video"),
        (entries, ["--laq=unused"], "labels: expected a dataset without `codes`.*got --laq beside"),
        (change("video", streaming=True), [], "streaming: expected datasets on disk.*got streaming=true for video"),
        (change("video", codes=other_laq), [], "laq_hash of the labels: expected hash-of-a-laq.*got other in video"),
        (change("video", codes=other_size), [], "codebook_size of the labels: expected 8.*got 16 in video"),
        (change("video", codes=entries["robot"]["codes"]), [], "camera: expected observation.images.front"),
        (change("video", frame_gap_s=0.31), [], r"frame_gap_s: expected a whole number.*6.2 frames.*Use 0.3 or 0.35 s"),
        (change("robot", frame_gap_s=0.5), [], "frame_gap: expected 5"),
        (change("video", camera="top"), [], "camera: expected one of observation.images.front"),
        (entries, ["--dataset.repo_id=test/tiny"], "data: expected one dataset.*got both"),
        (entries, ["--camera=top"], "settings of a dataset within its entry, got --camera"),
        (entries, ["--frame_gap=3", "--frame_gap_s=0.3"], "one of them"),
        ({}, [], "data: expected one dataset.*got neither"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            open_datasets(tiny_qwen, tmp_path / "run", wanted, *flags)
        assert "Next step" in str(error.value)
