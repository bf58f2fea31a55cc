"""Every command can say what its settings mean, and says it of each of them."""

from __future__ import annotations

import importlib

import pytest
from draccus.argparsing import ArgumentParser

from lerobot_hlrp.configuration_hlrp_qwen import HLRPQwenConfig

COMMANDS = {
    "laq_train": "TrainLAQCommand",
    "label": "LabelCommand",
    "train_codes": "TrainCodesCommand",
    "eval_codes": "EvalCodesCommand",
    "record": "RecordCommand",
    "backbone": "BackboneCommand",
    "demo": "DemoConfig",
}
# LeRobot's own settings, of which some say nothing.
LEROBOTS = ("--dataset.", "--env.", "--config_path", "--help", "-h")
LEROBOTS_POLICY = (
    *("--n_obs_steps", "--input_features", "--output_features", "--repo_id", "--type"),
    *("--normalization_mapping", "--pretrained_", "--license", "--tags", "--private", "--device", "--use_"),
)


def silent_settings(config_class: type, *, not_ours: tuple[str, ...]) -> list[str]:
    parser = ArgumentParser(config_class).parser
    assert parser.format_help()
    flags = {action.option_strings[0]: action.help or "" for action in parser._actions}
    assert len(flags) > 3
    ours = {flag: text for flag, text in flags.items() if not flag.startswith(not_ours)}
    return [flag for flag, text in ours.items() if not text or text.startswith(("(default", "type:"))]


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_explains_its_settings(module: str):
    command = getattr(importlib.import_module(f"lerobot_hlrp.cli.{module}"), COMMANDS[module])
    assert silent_settings(command, not_ours=LEROBOTS) == []


def test_a_policy_explains_its_settings():
    assert silent_settings(HLRPQwenConfig, not_ours=(*LEROBOTS, *LEROBOTS_POLICY)) == []
