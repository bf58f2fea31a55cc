"""The state as text in a policy's prompt: normalised, the same in every mode and command, and asked of the data."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset

from hlrp_core.prompting.prompt import PromptConfig
from hlrp_core.prompting.state_text import find_bins
from lerobot_hlrp.cli import eval_codes, train_codes
from lerobot_hlrp.cli.command import run_command
from lerobot_hlrp.modeling_hlrp_qwen import HLRPQwenPolicy
from lerobot_hlrp.modeling_hlrp_smolvlm import HLRPSmolVLMPolicy

PROMPT = PromptConfig(state_text=True)
CODES = [[0, 1, 2, 3], [4, 5, 6, 7], [1, 1, 0, 2]]
SMALL_HEAD = ["--policy.action_head=prefix_flow", "--policy.action_expert.hidden_dim=32", "--policy.chunk_size=4"]
SMALL_HEAD += ["--policy.action_expert.num_layers=1", "--policy.n_action_steps=2"]


def prompts(policy, batch) -> list[str]:
    tokens = policy.backend._prompt(batch, for_prediction=True).tokens
    rows = zip(tokens.ids, tokens.valid_mask, strict=True)
    return [policy.backend.core.tokenizer.decode(ids[mask]) for ids, mask in rows]


def expected_text(state: torch.Tensor) -> str:
    return f"State: {' '.join(map(str, find_bins(state, PROMPT).tolist()))};"


@pytest.mark.parametrize("policy_type", ["hlrp_qwen", "hlrp_smolvlm", "hlrp_smol_latent"])
def test_the_prompt_is_the_same_in_every_mode(policy_type, make_tiny_policy, make_lerobot_batch, listed_labels):
    said = []
    batch = make_lerobot_batch(num_frames=2, seed=3)
    with_later_state = {**batch, "observation.state": batch["observation.state"].clone()}
    with_later_state["observation.state"][:, 1] = float("nan")  # the state at t+1 is nobody's business
    for mode in ("codes", "actions", "multitask"):
        policy = make_tiny_policy(policy_type, mode, labels=listed_labels(CODES), prompt=PROMPT)
        for each in (batch, with_later_state):
            said.append(prompts(policy, policy.reader.read_training(each)))
            said.append(prompts(policy, policy.reader.read_observation(each)))
        assert policy(batch)[0].isfinite()
    assert all(each == said[0] for each in said)
    for text, state in zip(said[0], batch["observation.state"][:, 0], strict=True):
        assert expected_text(state) in text


def test_a_broken_state_is_an_error_also_where_actions_do_not_supervise(
    make_tiny_policy, make_lerobot_batch, listed_labels
):
    batch = make_lerobot_batch()
    batch["observation.state"][1, 0] = float("nan")
    for prompt, is_refused in ((PROMPT, True), (PromptConfig(), False)):
        policy = make_tiny_policy(labels=listed_labels(CODES), prompt=prompt)
        policy.reader.action_episodes = torch.tensor([0, 2])
        if not is_refused:
            assert policy(batch)[0].isfinite()
            continue
        with pytest.raises(ValueError, match=r"observation\.state: expected finite numbers.*frames \[1\].*Next step"):
            policy(batch)


def test_data_without_a_state_are_refused(lerobot_train, tiny_qwen, tiny_videos, code_table, tmp_path):
    flags = ["--policy.type=hlrp_qwen", f"--policy.backbone={tiny_qwen}", f"--policy.codes={code_table(tiny_videos)}"]
    with pytest.raises(ValueError, match=r"data for prompt\.state_text: expected a state.*Next step"):
        lerobot_train(*flags, "--policy.prompt.state_text=true", root=tiny_videos, output=tmp_path / "run")


@pytest.mark.parametrize(
    ("policy_type", "family", "kind"),
    [("hlrp_qwen", "qwen3_vl", HLRPQwenPolicy), ("hlrp_smolvlm", "smolvlm", HLRPSmolVLMPolicy)],
)
def test_it_travels_from_codes_to_actions(
    policy_type, family, kind, lerobot_train, tiny_backbone, tiny_dataset, code_table, make_lerobot_batch, tmp_path
):
    """With the code rows alone trained: both options on one way."""
    flags = [f"--policy.type={policy_type}", f"--policy.backbone={tiny_backbone(family)}"]
    flags += [f"--policy.codes={code_table(tiny_dataset)}", "--policy.prompt.state_text=true"]
    flags += ["--policy.prompt.state_bins=64", "--policy.train_vocabulary=code_rows"]
    stage_two = lerobot_train(*flags, root=tiny_dataset, output=tmp_path / "codes")
    flags = [f"--policy.path={stage_two}", "--policy.mode=actions", *SMALL_HEAD]
    stage_three = lerobot_train(*flags, root=tiny_dataset, output=tmp_path / "actions")
    config = PreTrainedConfig.from_pretrained(stage_three)
    assert (config.prompt.state_text, config.prompt.state_bins) == (True, 64)
    assert config.train_vocabulary == "code_rows"
    policy = kind.from_pretrained(stage_three)
    batch = make_lerobot_batch()
    observation = policy.reader.read_observation(batch)
    for text, state in zip(prompts(policy, observation), batch["observation.state"], strict=True):
        assert f"State: {' '.join(map(str, find_bins(state, config.prompt).tolist()))};" in text
    assert policy.predict_action_chunk(batch).isfinite().all()
    del batch["observation.state"]
    with pytest.raises(ValueError, match=r"observation\.state: expected \[B, 3\], got None"):
        policy.predict_action_chunk(batch)


def test_stage_three_can_begin_with_it(
    lerobot_train, tiny_qwen, tiny_videos, tiny_dataset, code_table, make_lerobot_batch, tmp_path
):
    """Stage 2 on video that has no state; from there the prompt shows that of the robot's data."""
    flags = ["--policy.type=hlrp_qwen", f"--policy.backbone={tiny_qwen}", f"--policy.codes={code_table(tiny_videos)}"]
    stage_two = lerobot_train(*flags, root=tiny_videos, output=tmp_path / "codes", steps=1)
    flags = [f"--policy.path={stage_two}", "--policy.mode=actions", "--policy.prompt.state_text=true", *SMALL_HEAD]
    stage_three = lerobot_train(*flags, root=tiny_dataset, output=tmp_path / "actions", steps=1)
    policy, batch = HLRPQwenPolicy.from_pretrained(stage_three), make_lerobot_batch()
    for text, state in zip(
        prompts(policy, policy.reader.read_observation(batch)), batch["observation.state"], strict=True
    ):
        assert expected_text(state) in text


def test_the_commands_of_stage_two_normalise_it(tiny_qwen, tiny_dataset, code_table, tmp_path, monkeypatch):
    """hlrp-train-codes and hlrp-eval-codes show the model what lerobot-train and lerobot-eval will."""
    monkeypatch.setenv("HLRP_DEBUG", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    seen: dict[str, set[str]] = {"train": set(), "eval": set()}
    from hlrp_core.prompting import strategy

    write, stage = strategy.write_states, "train"

    def spy(state, config):
        texts = write(state, config)
        if len(state) > 0 and state.shape[1] == 3:  # the probes at setup have two numbers
            seen[stage].update(texts)
        return texts

    monkeypatch.setattr(strategy, "write_states", spy)
    data = ["--dataset.repo_id=test/tiny", f"--dataset.root={tiny_dataset}"]
    table = code_table(tiny_dataset)
    flags = [
        f"--backbone={tiny_qwen}",
        f"--codes={table}",
        "--prompt.state_text=true",
        f"--output_dir={tmp_path / 'r'}",
    ]
    flags += ["--steps=3", "--batch_size=16", "--num_workers=0", "--warmup_steps=0", "--dataset.eval_split=0.5"]
    run_command(train_codes.TrainCodesCommand, train_codes.train, [*data, *flags])
    stage = "eval"
    figures: list[dict] = []
    flags = [f"--policy.path={tmp_path / 'r/checkpoints/last/pretrained_model'}", f"--codes={table}"]
    run_command(eval_codes.EvalCodesCommand, lambda c: figures.append(eval_codes.evaluate(c)), [*data, *flags])
    dataset = LeRobotDataset("test/tiny", root=tiny_dataset)
    states = torch.stack([torch.as_tensor(state) for state in dataset.hf_dataset["observation.state"]])
    normalised = (states - states.mean(0)) / states.std(0, correction=0)
    bins = find_bins(normalised, PROMPT)
    for text in seen["train"] | seen["eval"]:
        numbers = torch.tensor([int(n) for n in text.removeprefix("State: ").removesuffix(";").split()])
        assert (bins - numbers).abs().amax(1).min() <= 1, text  # LeRobot rounds its statistics
    assert len(seen["train"]) > 10 < len(seen["eval"])
    assert figures[0]["num_samples"] == len(seen["eval"])
