"""hlrp-train-codes and hlrp-eval-codes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from lerobot.configs.default import DatasetConfig
from lerobot.datasets.factory import make_train_eval_datasets
from lerobot.policies.factory import get_policy_class

from hlrp_core.bundle import load_backend, read_manifest, save_pretrained
from hlrp_core.contract import BackendMode, FoundationBatch
from hlrp_core.laq.code_table import CodeTable
from hlrp_core.registry import available_backends, get_recipe
from lerobot_hlrp.cli import eval_codes, train_codes
from lerobot_hlrp.cli.command import run_command, spell_flags
from lerobot_hlrp.foundation_batches import FoundationBatches
from lerobot_hlrp.policy_types import build_policy_config, find_policy_type

SPLIT = 0.5  # episodes 0 and 1 train, 2 and 3 are held out: of each task the last one
HELD_OUT = [2, 3]


@pytest.fixture(autouse=True)
def _fresh_accelerator(monkeypatch):
    monkeypatch.setenv("HLRP_DEBUG", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def data_flags(root: Path) -> list[str]:
    return ["--dataset.repo_id=test/tiny", f"--dataset.root={root}"]


def train(root: Path, output: Path, *flags: str, steps: int = 3) -> Path:
    usual = [f"--output_dir={output}", f"--steps={steps}", "--batch_size=4", "--num_workers=0", "--warmup_steps=0"]
    usual += ["--lr=1e-3", "--log_freq=1", "--eval_freq=2", "--save_freq=2", f"--dataset.eval_split={SPLIT}"]
    run_command(train_codes.TrainCodesCommand, train_codes.train, [*data_flags(root), *usual, *flags])
    return output / "checkpoints" / "last" / "pretrained_model"


def evaluate(root: Path, path: Path, *flags: str) -> dict:
    figures: list[dict] = []
    command = [*data_flags(root), f"--policy.path={path}", *flags]
    run_command(eval_codes.EvalCodesCommand, lambda c: figures.append(eval_codes.evaluate(c)), command)
    return figures[0]


@pytest.fixture(scope="module")
def trained(tiny_qwen: Path, tiny_videos: Path, code_table: Callable, tmp_path_factory) -> Path:
    """A policy folder that hlrp-train-codes made from action-free video."""
    output = tmp_path_factory.mktemp("runs") / "codes"
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = [f"--backbone={tiny_qwen}", f"--codes={code_table(tiny_videos)}", "--prompt.image_position=before"]
    return train(tiny_videos, output, *flags, "--backend=qwen_plain", "--token_scheme.separator=", "--image_size=48")


# -- training ---------------------------------------------------------------------------------------------------------


def test_its_result_is_a_core_bundle_and_a_policy(trained, tiny_videos):
    backend = load_backend(trained)
    assert backend.name == "qwen_plain"
    assert backend.config.prompt.image_position == "before"
    assert backend.config.token_scheme.separator == ""
    assert backend.config.image_size == 48
    extra = read_manifest(trained)["extra"]
    assert extra["laq"] == {"id": "user/laq", "hash": "hash-of-a-laq", "frame_gap": 3}
    assert extra["camera"] == "observation.images.top"
    policy = get_policy_class("hlrp_qwen").from_pretrained(trained)
    one, other = backend.state_dict(), policy.backend.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (trained / "policy_preprocessor.json").is_file()
    for path in trained.rglob("*.json"):
        assert str(tiny_videos) not in path.read_text(), path.name


SETTINGS = {
    "latent_head": ["--latent_pooling=query", "--image_size=32"],
    "vector_head": ["--vector_objective=flow", "--image_size=32"],
    "smol": ["--image_splitting=true", "--image_size=16"],
    "qwen": ["--image_size=48"],
}


@pytest.mark.parametrize("name", available_backends())
def test_every_backend_of_the_registry(name, tiny_backbone, tiny_videos, code_table, tmp_path):
    backbone = tiny_backbone(get_recipe(name).family)
    table = code_table(tiny_videos, vectors=torch.randn(4, 8, 2))
    flags = [f"--backend={name}", f"--backbone={backbone}", f"--codes={table}"]
    flags += next(flags for word, flags in SETTINGS.items() if word in name)
    folder = train(tiny_videos, tmp_path / "run", *flags, steps=2)
    config = load_backend(folder).config
    assert config.name == name
    assert (config.latent_pooling == "query") == ("latent_head" in name)
    assert config.image_splitting == (name in ("smol_chat", "smol_plain"))
    figures = evaluate(tiny_videos, folder, f"--codes={table}", "--max_samples=2")
    assert figures.get("decoding") == (None if "latent_head" in name or "vector_head" in name else "constrained")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2]
    assert records[-1]["evaluation"]["num_samples"] == (14 - 3) + (10 - 3)
    assert (records[-1]["evaluation"]["vector_r2"] is not None) == get_recipe(name).predicts_vectors


def test_what_it_reports(trained):
    run = trained.parents[2]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3]
    evaluations = [r["evaluation"] for r in records if "evaluation" in r]
    assert len(evaluations) == 2
    assert evaluations[-1]["num_samples"] == (14 - 3) + (10 - 3)
    assert evaluations[-1]["constant_from"] == "training"
    settings = json.loads((run / "settings.json").read_text())
    assert settings["eval_split"] == SPLIT
    assert settings["laq_hash"] == "hash-of-a-laq"


def test_lerobot_train_goes_on_from_it(trained, lerobot_train, tiny_dataset, tmp_path):
    folder = lerobot_train(
        f"--policy.path={trained}",
        "--policy.mode=actions",
        "--policy.action_head=mlp",
        "--policy.action_expert.hidden_dim=32",
        "--policy.action_expert.num_layers=1",
        root=tiny_dataset,
        output=tmp_path / "actions",
        steps=1,
    )
    backend = load_backend(folder)
    assert backend.modes == set(BackendMode)
    assert backend.config.prompt.image_position == "before"
    assert backend.config.token_scheme.separator == ""


def test_an_interrupted_run_continues_by_the_same_command(
    tiny_qwen, tiny_dataset, code_table, tmp_path, monkeypatch, capsys
):
    flags = [f"--backbone={tiny_qwen}", f"--codes={code_table(tiny_dataset)}", "--backend=qwen_plain"]
    whole = train(tiny_dataset, tmp_path / "whole", *flags, steps=4)

    read = FoundationBatches.read_from

    def interrupting(self, epoch, start):
        for number, batch in enumerate(read(self, epoch, start)):
            if self.shuffle_seed is not None and number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(FoundationBatches, "read_from", interrupting)
        with pytest.raises(SystemExit) as exit_:
            train(tiny_dataset, tmp_path / "stopped", *flags, steps=4)
    assert exit_.value.code == 130
    assert "step 3 of 4" in capsys.readouterr().out
    AcceleratorState._reset_state(reset_partial_state=True)
    continued = train(tiny_dataset, tmp_path / "stopped", *flags, steps=4)
    assert (continued / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"batch_size=4.*got batch_size=2"):
        train(tiny_dataset, tmp_path / "stopped", *flags, "--batch_size=2", steps=4)


def test_an_online_laq_labels_like_its_table(tiny_qwen, tiny_dataset, tiny_laq, tmp_path):
    flags = [f"--backbone={tiny_qwen}", "--backend=qwen_plain"]
    online = train(tiny_dataset, tmp_path / "online", *flags, f"--laq={tiny_laq}", steps=1)
    assert read_manifest(online)["extra"]["laq"]["id"] == "tiny-laq"
    result = evaluate(tiny_dataset, online, f"--laq={tiny_laq}", f"--dataset.eval_split={SPLIT}")
    assert result["num_samples"] == (14 - 3) + (10 - 3)
    assert result["constant_from"] == "training"


def test_errors_of_training(tiny_qwen, tiny_dataset, tiny_videos, tiny_laq, code_table, tmp_path, capsys):
    output, table = tmp_path / "run", code_table(tiny_dataset)
    backbone = f"--backbone={tiny_qwen}"
    for flags, text in (
        ([backbone], "labels: expected --codes="),
        ([backbone, f"--codes={table}", f"--laq={tiny_laq}"], "one source of labels"),
        ([backbone, f"--codes={table}", "--backend=qwen_chad"], "Did you mean 'qwen_chat'"),
        ([backbone, f"--codes={table}", "--camera=side"], "camera: expected one of"),
        ([backbone, f"--codes={table}", "--frame_gap=5"], "frame_gap: expected 5"),
        ([backbone, f"--codes={tmp_path / 'none'}"], "code table: expected a file"),
        (["--backbone=/nowhere", f"--codes={table}"], "backbone: expected a folder"),
        ([backbone, f"--codes={code_table(tiny_videos)}"], "code table: expected one of the dataset"),
    ):
        with pytest.raises(ValueError, match=text) as error:
            train(tiny_dataset, output, *flags)
        assert "Next step" in str(error.value) or "Did you mean" in str(error.value)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not output.exists()


@pytest.fixture
def parse(tiny_qwen, tiny_dataset, tmp_path) -> Callable[..., train_codes.TrainCodesCommand]:
    def make(**settings) -> train_codes.TrainCodesCommand:
        data = DatasetConfig("test/tiny", root=str(tiny_dataset))
        return train_codes.TrainCodesCommand(
            dataset=data, backbone=str(tiny_qwen), output_dir=tmp_path / "run", **settings
        )

    return make


def test_bad_numbers_are_refused_at_once(parse, tiny_dataset):
    for name, value in (("batch_size", 0), ("num_workers", -1), ("max_eval_samples", -1)):
        with pytest.raises(ValueError, match=rf"{name}: expected . or more, got {value}\. Next step"):
            parse(**{name: value})
    for name, value in (("batch_size", 0), ("num_workers", -1), ("max_samples", -1)):
        with pytest.raises(ValueError, match=rf"{name}: expected . or more, got {value}\. Next step"):
            eval_codes.EvalCodesCommand(
                policy=eval_codes.SavedPolicy(path="p"), dataset=DatasetConfig("test/tiny"), **{name: value}
            )


def test_data_labels_and_places_that_are_not_there(tiny_qwen, tiny_dataset, code_table, tmp_path):
    (tmp_path / "file").touch()
    usual = [f"--backbone={tiny_qwen}", f"--codes={code_table(tiny_dataset)}"]
    for root, output, flags, text in (
        (tmp_path / "nowhere", "run", usual, r"dataset\.root: expected .*nowhere, which is no folder"),
        (tiny_dataset, "run", [*usual, "--dataset.episodes=[7]"], r"dataset\.episodes: expected some of 0 to 3.*got 7"),
        (tiny_dataset, "run", [*usual, "--dataset.streaming=true"], r"dataset\.streaming: expected a dataset on disk"),
        (tiny_dataset, "run", [usual[0], "--laq=outputs/laq"], "laq: expected .*got outputs/laq, which is no folder"),
        (tiny_dataset, "run", [usual[0], "--laq=/nowhere"], "laq: expected .*got /nowhere, which is no folder"),
        (tiny_dataset, "file", usual, "output_dir: expected a folder.*got the file"),
        (tiny_dataset, "file/run", usual, "output_dir: expected a folder.*where .*file is a file"),
    ):
        with pytest.raises(ValueError, match=text) as error:
            train(root, tmp_path / output, *flags)
        assert "Next step" in str(error.value)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_policy_types_and_settings_of_a_backend(trained):
    assert find_policy_type("qwen_chat") == ("hlrp_qwen", "chat", "tokens")
    with pytest.raises(ValueError, match="qwen_chat"):
        find_policy_type("nothing")
    backend = load_backend(trained)
    config = build_policy_config(backend.config)
    for name in ("codebook_size", "code_seq_len", "prompt", "token_scheme", "image_size", "decoding", "freeze_vision"):
        assert getattr(config, name) == getattr(backend.config, name)
    assert (config.prompting, config.code_head, config.mode) == ("plain", "tokens", "codes")


def test_messages_name_the_commands_own_flags(tiny_qwen, make_dataset, code_table, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HLRP_DEBUG")
    two_cameras = make_dataset(tmp_path / "two", cameras=("observation.images.top", "observation.images.side"))
    for flags in ([], ["--camera=top", "--prompt.state_bins=1"]):
        with pytest.raises(SystemExit):
            train(
                two_cameras, tmp_path / "run", f"--backbone={tiny_qwen}", f"--codes={code_table(two_cameras)}", *flags
            )
    printed = capsys.readouterr().err
    assert "Set --camera, for example to observation.images.top" in printed
    assert "--policy." not in printed
    assert spell_flags("Set --policy.path.", eval_codes.EvalCodesCommand) == "Set --policy.path."


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_held_out_episodes(trained, tiny_videos, code_table, tmp_path, capsys):
    table = code_table(tiny_videos)
    output = tmp_path / "deep" / "figures.json"
    flags = [f"--codes={table}", f"--dataset.eval_split={SPLIT}", "--batch_size=5", f"--output={output}"]
    figures = evaluate(tiny_videos, trained, *flags)
    assert json.loads(output.read_text()) == json.loads(json.dumps(figures))
    assert figures["is_held_out"]
    assert figures["episodes"] == HELD_OUT
    assert "eval_split=0.5" in (printed := capsys.readouterr().out)
    assert "code accuracy" in printed

    backend, codes = load_backend(trained), CodeTable.load(table)
    data = make_train_eval_datasets(
        SimpleNamespace(
            dataset=DatasetConfig("test/tiny", root=str(tiny_videos), eval_split=SPLIT),
            trainable_config=SimpleNamespace(
                observation_delta_indices=None, action_delta_indices=None, reward_delta_indices=None
            ),
            tolerance_s=1e-4,
        )
    )
    right, total = 0, 0
    for item in data[1]:
        target, valid = codes.lookup(item["index"][None])
        if valid:
            image = item["observation.images.top"]  # bytes, as LeRobot's commands read video
            assert image.dtype == torch.uint8
            batch = FoundationBatch(image.movedim(0, -1)[None, None], [item["task"]])
            right += int((backend.latent_from_batch(batch, mode=BackendMode.CODES).tokens == target).sum())
            total += 4
    assert figures["num_samples"] == total / 4
    assert figures["code_accuracy"] == pytest.approx(right / total)
    # the constant prediction: the most frequent codes of episodes 0 and 1
    frames = torch.cat([torch.arange(0, 12 - 3), torch.arange(12, 21 - 3)])
    constant = torch.stack([torch.bincount(column, minlength=8).argmax() for column in codes.codes[frames].long().T])
    held_out = torch.cat([torch.arange(21, 35 - 3), torch.arange(35, 45 - 3)])
    assert figures["constant_accuracy"] == pytest.approx((codes.codes[held_out] == constant).float().mean().item())


def test_named_episodes_without_a_split(trained, tiny_videos, code_table, capsys):
    figures = evaluate(tiny_videos, trained, f"--codes={code_table(tiny_videos)}", "--dataset.episodes=[3]")
    assert figures["num_samples"] == 10 - 3
    assert not figures["is_held_out"]
    assert figures["constant_from"] == "evaluation"
    assert "trained on or not" in capsys.readouterr().out
    few = evaluate(tiny_videos, trained, f"--codes={code_table(tiny_videos)}", "--max_samples=5")
    assert few["num_samples"] == 5


@pytest.mark.parametrize("decoding", ["generate", "free"])
def test_another_decoding(decoding, trained, tiny_videos, code_table):
    labels = f"--codes={code_table(tiny_videos)}"
    usual = evaluate(tiny_videos, trained, labels)
    other = evaluate(tiny_videos, trained, labels, f"--policy.decoding={decoding}")
    assert usual["decoding"] == "constrained"
    assert other["decoding"] == decoding
    if decoding == "generate":
        assert other["code_accuracy"] == usual["code_accuracy"]
    else:
        assert 0 <= other["unparsed"] <= 1


def test_a_core_bundle_will_do(trained, tiny_videos, code_table, tmp_path):
    save_pretrained(load_backend(trained), tmp_path / "bundle")
    labels = f"--codes={code_table(tiny_videos)}"
    from_bundle, from_policy = (evaluate(tiny_videos, path, labels) for path in (tmp_path / "bundle", trained))
    for name in ("num_samples", "code_accuracy", "loss", "position_accuracy"):
        assert from_bundle[name] == from_policy[name]


def test_a_policy_that_has_learnt_actions_since(trained, lerobot_train, tiny_dataset, code_table, tmp_path):
    folder = lerobot_train(
        f"--policy.path={trained}",
        "--policy.mode=multitask",
        "--policy.action_head=mlp",
        "--policy.action_expert.hidden_dim=32",
        "--policy.action_expert.num_layers=1",
        "--policy.action_episodes=[0]",
        f"--policy.codes={code_table(tiny_dataset)}",
        root=tiny_dataset,
        output=tmp_path / "multitask",
        steps=1,
    )
    figures = evaluate(tiny_dataset, folder, f"--codes={code_table(tiny_dataset)}", f"--dataset.eval_split={SPLIT}")
    assert figures["num_samples"] == (14 - 3) + (10 - 3)


def test_errors_of_evaluation(trained, tiny_videos, tiny_dataset, code_table, tmp_path):
    labels = f"--codes={code_table(tiny_videos)}"
    for path, flags, text in (
        (tmp_path / "nowhere", [], "policy.*expected .*nowhere, which is no folder"),
        (trained, ["--policy.device=cudaa"], "device: expected one of this machine's"),
        (trained, [f"--output={tmp_path}"], "output: expected the path of a file"),
        (trained, ["--dataset.episodes=[9]"], r"dataset\.episodes: expected some of 0 to 3"),
        (trained, ["--dataset.streaming=true"], r"dataset\.streaming: expected a dataset on disk"),
    ):
        with pytest.raises(ValueError, match=text) as error:
            evaluate(tiny_videos, path, labels, *flags)
        assert "Next step" in str(error.value)
    with pytest.raises(ValueError, match="labels: expected --codes="):
        evaluate(tiny_videos, trained)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"policy.path: expected a policy's folder.*neither"):
        evaluate(tiny_videos, tmp_path / "empty", labels)
    with pytest.raises(ValueError, match="code table: expected one of the dataset"):
        evaluate(tiny_videos, trained, f"--codes={code_table(tiny_dataset)}")
    with pytest.raises(ValueError, match=r"laq_hash: expected hash-of-a-laq.*got other"):
        evaluate(tiny_videos, trained, f"--codes={code_table(tiny_videos, laq_hash='other')}")
    with pytest.raises(ValueError, match=r"codebook_size: expected 8.*got 16"):
        evaluate(tiny_videos, trained, f"--codes={code_table(tiny_videos, codebook_size=16)}")
