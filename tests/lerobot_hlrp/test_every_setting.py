"""Every backend, head and setting through LeRobot's own commands: trained, saved, reloaded, run in the tabletop.

A case that trains both losses covers stage 2 and stage 3 at once; what a mode or head does is tested elsewhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hlrp_core.bundle import load_backend
from hlrp_core.laq.quantizer import LatentActionQuantizer

FAMILIES = {"hlrp_qwen": "qwen3_vl", "hlrp_smolvlm": "smolvlm", "hlrp_smol_latent": "smolvlm"}
QWEN, SMOL, LATENT = FAMILIES
USUAL = ["--policy.mode=multitask", "--policy.chunk_size=4", "--policy.n_action_steps=2"]
USUAL += [f"--policy.action_expert.{setting}" for setting in ("hidden_dim=32", "num_layers=1", "num_flow_steps=2")]
ENVIRONMENT = ["--env.type=hlrp_tabletop", "--env.episode_length=3", "--eval.use_async_envs=false"]
ENVIRONMENT += ["--eval.batch_size=1", "--eval.n_episodes=1"]
TEXTS = {"prompt.system": "You drive a robot.", "prompt.few_shot": "Example: go left.", "prompt.padding_side": "right"}
TEXTS |= {"prompt.instruction_template": "Task, {instruction}.", "prompt.length_from": "processor"}
TEXTS |= {"prompt.image_position": "before"}
SHORT = {"token_scheme.separator": "", "token_scheme.begin": "<A>", "token_scheme.end": "</A>"}
SHORT |= {"token_scheme.code": "<C{}>"}

# name: policy type, what the core's backend is called, action head, settings
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "qwen_chat": (QWEN, "qwen_chat", "mlp", {}),
    "qwen_plain": (QWEN, "qwen_plain", "flow", {"prompting": "plain", "code_conditioning": "soft"}),
    "smol_chat": (SMOL, "smol_chat", "laq", {}),
    "smol_plain": (SMOL, "smol_plain", "prefix_flow", {"prompting": "plain"}),
    "smol_latent_head": (LATENT, "smol_latent_head", "flow", {"code_conditioning": "soft"}),
    "qwen_latent_head": (QWEN, "qwen_latent_head", "mlp", {"prompting": "plain", "code_head": "latent"}),
    "smol_vector_head": (LATENT, "smol_vector_head", "mlp", {"code_head": "vector", "vector_objective": "flow"}),
    "qwen_vector_head": (QWEN, "qwen_vector_head", "laq", {"prompting": "plain", "code_head": "vector"}),
    "pooling last": (LATENT, "smol_latent_head", "laq", {"latent_pooling": "last", "code_conditioning": "soft"}),
    "pooling query": (LATENT, "smol_latent_head", "prefix_flow", {"latent_pooling": "query"}),
    "generate, qwen": (QWEN, "qwen_chat", "flow", {"decoding": "generate"}),
    "generate, smol": (SMOL, "smol_plain", "mlp", {"decoding": "generate", "prompting": "plain"}),
    "free": (QWEN, "qwen_chat", "prefix_flow", {"decoding": "free"}),
    "texts, qwen_chat": (QWEN, "qwen_chat", "mlp", TEXTS),
    "texts, qwen_plain": (QWEN, "qwen_plain", "mlp", {**TEXTS, "prompting": "plain"}),
    "texts, smol_chat": (SMOL, "smol_chat", "mlp", TEXTS),
    "texts, smol_plain": (SMOL, "smol_plain", "prefix_flow", {**TEXTS, "prompting": "plain"}),
    "without words": (QWEN, "qwen_chat", "prefix_flow", {"prompt.use_instruction": False}),
    "state as text": (SMOL, "smol_plain", "prefix_flow", {"prompt.state_text": True, "prompting": "plain"}),
    "short scheme, qwen": (QWEN, "qwen_chat", "mlp", SHORT),
    "short scheme, smol": (SMOL, "smol_chat", "mlp", SHORT),
    "codes_only": (QWEN, "qwen_chat", "mlp", {"code_objective": "codes_only"}),
    "restricted": (SMOL, "smol_plain", "mlp", {"code_objective": "restricted", "prompting": "plain"}),
    "code_rows": (QWEN, "qwen_chat", "mlp", {"train_vocabulary": "code_rows", "freeze_backbone": True}),
    "frozen vision": (SMOL, "smol_chat", "prefix_flow", {"freeze_vision": True}),
    "image_size": (SMOL, "smol_plain", "mlp", {"image_size": 48, "prompting": "plain"}),
    "image_splitting": (SMOL, "smol_chat", "mlp", {"image_splitting": True}),
    "weights of losses": (QWEN, "qwen_chat", "mlp", {"codes_loss_weight": 0.5, "actions_loss_weight": 2.0}),
    "teacher": (QWEN, "qwen_chat", "laq", {"code_source": "teacher"}),
}


@pytest.fixture(scope="module")
def table(code_table: Callable, tabletop_dataset: Path, tiny_laq: Path) -> Path:
    """Of the LAQ whose vectors some heads take over."""
    laq_hash = LatentActionQuantizer.from_pretrained(tiny_laq).weights_hash()
    return code_table(tabletop_dataset, laq_hash=laq_hash)


def lerobot_eval(folder: Path, output: Path) -> None:
    from lerobot.scripts.lerobot_eval import main

    with pytest.MonkeyPatch.context() as patch:
        flags = [f"--policy.path={folder}", "--policy.device=cpu", f"--output_dir={output}", *ENVIRONMENT]
        patch.setattr(sys, "argv", ["lerobot-eval", *flags])
        main()


@pytest.mark.parametrize("case", CASES)
def test_trained_saved_reloaded_and_run(
    case, lerobot_train, tiny_backbone, tiny_laq, table, tabletop_dataset, tmp_path
):
    policy_type, backend_name, head, settings = CASES[case]
    flags = [f"--policy.type={policy_type}", f"--policy.backbone={tiny_backbone(FAMILIES[policy_type])}"]
    flags += [f"--policy.codes={table}", f"--policy.action_head={head}", *USUAL]
    if head == "laq" or settings.get("code_head") == "vector":
        flags.append(f"--policy.laq_weights={tiny_laq}")
    flags += [f"--policy.{name}={spell(value)}" for name, value in settings.items()]
    folder = lerobot_train(*flags, root=tabletop_dataset, output=tmp_path / "run")

    config = load_backend(folder).config
    assert config.name == backend_name
    assert config.action_head is not None and config.action_head.kind == head
    saved = flatten({**asdict(config), "code_conditioning": config.action_head.code_conditioning})
    for name, value in settings.items():
        if name not in ("prompting", "code_head"):  # the backend's name says them
            assert saved[name] == value, name

    lerobot_eval(folder, tmp_path / "eval")
    assert (tmp_path / "eval" / "eval_info.json").is_file()


def spell(value: Any) -> str:
    """A name as it is; what YAML would read as something else in quotes."""
    return value if isinstance(value, str) and value.replace("_", "").isalnum() else json.dumps(value)


def flatten(settings: dict[str, Any]) -> dict[str, Any]:
    nested = {f"{name}.{key}": x for name in ("prompt", "token_scheme") for key, x in settings[name].items()}
    return {**settings, **nested}


def test_every_backend_has_a_case():
    from hlrp_core import available_backends

    assert {backend for _, backend, *_ in CASES.values()} == set(available_backends())
