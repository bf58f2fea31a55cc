"""`--policy.code_head=vector` with the real commands: stage 2, stage 3, evaluation; each from its folder alone."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class

from hlrp_core.bundle import load_backend
from hlrp_core.contract import SamplingOptions
from hlrp_core.laq.quantizer import LatentActionQuantizer
from lerobot_hlrp.cli import eval_codes
from lerobot_hlrp.cli.command import run_command

TYPES = {
    "hlrp_qwen": ("qwen3_vl", ["--policy.prompting=plain", "--policy.vector_objective=regression"]),
    "hlrp_smol_latent": ("smolvlm", ["--policy.vector_objective=flow", "--policy.image_size=32"]),
}
SMALL_HEAD = ["--policy.action_expert.hidden_dim=32", "--policy.action_expert.num_layers=1"]
SMALL_HEAD += ["--policy.chunk_size=4", "--policy.n_action_steps=2"]


@pytest.fixture(scope="module")
def vectors(tiny_laq: Path) -> torch.Tensor:
    return LatentActionQuantizer.from_pretrained(tiny_laq).code_vector_table()


@pytest.fixture(scope="module")
def table(code_table: Callable, tabletop_dataset: Path, tiny_laq: Path, vectors: torch.Tensor) -> Path:
    """A table that carries the code vectors, as hlrp-label writes it."""
    laq_hash = LatentActionQuantizer.from_pretrained(tiny_laq).weights_hash()
    return code_table(tabletop_dataset, laq_hash=laq_hash, vectors=vectors)


@pytest.fixture(scope="module", params=TYPES)
def policy_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def stage_two(policy_type, lerobot_train, tiny_backbone, tabletop_dataset, table, tmp_path_factory) -> Path:
    """Trained on a code table and a backbone whose folder is deleted afterwards."""
    family, flags = TYPES[policy_type]
    backbone = Path(shutil.copytree(tiny_backbone(family), tmp_path_factory.mktemp("backbone") / "soon-gone"))
    folder = lerobot_train(
        f"--policy.type={policy_type}",
        "--policy.code_head=vector",
        "--policy.mode=codes",
        f"--policy.backbone={backbone}",
        f"--policy.codes={table}",
        *flags,
        root=tabletop_dataset,
        output=tmp_path_factory.mktemp("runs") / "codes",
    )
    shutil.rmtree(backbone)
    return folder


@pytest.fixture(scope="module")
def stage_three(stage_two, lerobot_train, tabletop_dataset, tmp_path_factory) -> Path:
    """The LAQ's decoder on top: it needs no LAQ."""
    flags = [f"--policy.path={stage_two}", "--policy.mode=actions", "--policy.action_head=laq", *SMALL_HEAD]
    return lerobot_train(*flags, root=tabletop_dataset, output=tmp_path_factory.mktemp("runs") / "actions")


def load(folder: Path):
    return get_policy_class(PreTrainedConfig.from_pretrained(folder).type).from_pretrained(folder)


def seeded() -> SamplingOptions:
    return SamplingOptions(generator=torch.Generator().manual_seed(0))


@pytest.fixture
def observation() -> dict:
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 3, 96, 96), generator=rng).float() / 255
    return {"observation.image": image, "observation.state": torch.randn(2, 2, generator=rng), "task": ["a", "b"]}


def test_stage_two_is_whole(stage_two, vectors, observation):
    policy = load(stage_two)
    assert torch.equal(policy.backend.code_vectors, vectors)
    latent = policy.predict_codes(observation, seeded())
    assert latent.vector.shape == (2, 4, 1)
    assert (latent.tokens, latent.logits) == (None, None)
    by_core = load_backend(stage_two).latent_from_batch(
        policy.reader.read_observation(observation), mode="codes", sampling=seeded()
    )
    assert torch.equal(by_core.vector, latent.vector)


def test_stage_three_decodes_the_predicted_vectors(stage_three, observation):
    policy = load(stage_three)
    assert policy.config.resolved_code_conditioning == "vector"
    actions = [
        policy.predict_action_chunk(observation, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(actions[0], actions[1])
    assert actions[0].isfinite().all()
    is_flow = policy.backend.config.vector_objective == "flow"
    assert torch.equal(actions[0], actions[2]) == (not is_flow)


def test_prefix_flow_needs_no_vectors(stage_two, lerobot_train, tabletop_dataset, table, tmp_path, observation):
    flags = [f"--policy.path={stage_two}", "--policy.mode=multitask", "--policy.action_head=prefix_flow", *SMALL_HEAD]
    folder = lerobot_train(*flags, f"--policy.codes={table}", root=tabletop_dataset, output=tmp_path / "run")
    policy = load(folder)
    assert policy.config.resolved_code_conditioning == "none"
    assert policy.predict_action_chunk(observation).shape == (2, 4, 2)


def test_lerobot_eval_runs_it(stage_three, tmp_path, monkeypatch):
    from lerobot.scripts.lerobot_eval import main

    flags = [f"--policy.path={stage_three}", "--policy.device=cpu", f"--output_dir={tmp_path / 'eval'}"]
    flags += ["--env.type=hlrp_tabletop", "--env.episode_length=3", "--eval.use_async_envs=false"]
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *flags, "--eval.batch_size=1", "--eval.n_episodes=1"])
    main()
    assert (tmp_path / "eval" / "eval_info.json").is_file()


def test_eval_codes_gives_the_accuracy_of_the_nearest_codes(stage_two, tabletop_dataset, table, capsys):
    figures: list[dict] = []
    flags = [f"--policy.path={stage_two}", "--policy.device=cpu", f"--codes={table}", "--max_samples=12"]
    flags += ["--dataset.repo_id=test/tiny", f"--dataset.root={tabletop_dataset}"]
    for _ in range(2):
        run_command(eval_codes.EvalCodesCommand, lambda c: figures.append(eval_codes.evaluate(c)), flags)
    assert figures[0]["num_samples"] == 12
    assert figures[0]["vector_r2"] < 1
    for name in ("code_accuracy", "vector_r2"):
        assert figures[0][name] == figures[1][name]  # draws of a flow, too
    assert "vectors, R²" in capsys.readouterr().out


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_table_of_codes_alone_needs_a_laq_beside_it(
    lerobot_train, tiny_qwen, tiny_laq, tabletop_dataset, code_table, vectors, tmp_path
):
    laq_hash = LatentActionQuantizer.from_pretrained(tiny_laq).weights_hash()
    flags = ["--policy.type=hlrp_qwen", "--policy.prompting=plain", "--policy.code_head=vector"]
    flags += [f"--policy.backbone={tiny_qwen}", f"--policy.codes={code_table(tabletop_dataset, laq_hash=laq_hash)}"]
    with pytest.raises(ValueError, match=r"LAQ for code_head=vector.*codes alone.*--policy\.laq_weights.*hlrp-label"):
        lerobot_train(*flags, root=tabletop_dataset, output=tmp_path / "a")
    folder = lerobot_train(
        *flags, f"--policy.laq_weights={tiny_laq}", root=tabletop_dataset, output=tmp_path / "b", steps=1
    )
    assert torch.equal(load(folder).backend.code_vectors, vectors)


def test_online_labels_bring_the_vectors(make_tiny_policy, tiny_laq, vectors):
    policy = make_tiny_policy("hlrp_smol_latent", "codes", code_head="vector", laq_weights=None, laq=str(tiny_laq))
    assert torch.equal(policy.backend.code_vectors, vectors)


def test_what_the_checkpoint_fixes(lerobot_train, stage_two, tabletop_dataset, tmp_path):
    for flag, text in (
        ("--policy.code_head=latent", r"code_head: expected vector, as in the checkpoint.*got latent"),
        ("--policy.laq_hash=null", r"laq_hash: expected .*whose code vectors the code head.*new stage 2"),
        ("--policy.latent_pooling=last", r"latent_pooling: expected mean as in the checkpoint"),
    ):
        with pytest.raises(ValueError, match=text):
            lerobot_train(f"--policy.path={stage_two}", flag, root=tabletop_dataset, output=tmp_path / "run")


def test_tokens_cannot_condition_a_head_on_vectors(make_tiny_policy):
    with pytest.raises(ValueError, match=r"code_conditioning of action head 'mlp'.*expected 'vector'.*got 'soft'"):
        make_tiny_policy("hlrp_smol_latent", code_head="vector", action_head="mlp", code_conditioning="soft")
