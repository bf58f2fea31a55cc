"""A saved policy is one folder that travels, and loading it is strict."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import get_policy_class

from hlrp_core.bundle import BundleError, load_backend
from hlrp_core.codes.decoding import make_decoder
from hlrp_core.contract import BackendMode
from lerobot_hlrp.modeling_hlrp_qwen import HLRPQwenPolicy

CODES = [[1, 2, 3, 4], [0, 7, 0, 7], [5, 5, 6, 6]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, make_tiny_policy: Callable) -> Path:
    """A stage-2 policy: codes alone."""
    folder = tmp_path_factory.mktemp("saved") / "codes"
    make_tiny_policy(mode="codes").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


FRESH_PROCESS = """
import sys
import lerobot_policy_hlrp  # before anything of LeRobot
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
folder, batch, out = sys.argv[1:]
batch = torch.load(batch)
policy = get_policy_class(PreTrainedConfig.from_pretrained(folder).type).from_pretrained(folder)
noise = batch.pop("noise")
torch.save([policy.select_action(batch, noise=noise), policy.predict_codes(batch).logits], out)
"""


def test_it_travels_without_its_backbone(tmp_path, tiny_qwen, make_tiny_policy, make_lerobot_batch):
    """Its backbone deleted, no network, another process: bit-identical predictions."""
    backbone = Path(shutil.copytree(tiny_qwen, tmp_path / "soon-gone"))
    policy = make_tiny_policy(mode="multitask", code_conditioning="soft", backbone=str(backbone)).eval()
    policy.save_pretrained(tmp_path / "policy")
    batch, noise = make_lerobot_batch(), torch.randn(3, 4, 2)
    expected = [policy.select_action(batch, noise=noise), policy.predict_codes(batch).logits]
    shutil.rmtree(backbone)
    shutil.move(tmp_path / "policy", tmp_path / "moved")
    torch.save({**batch, "noise": noise}, tmp_path / "batch.pt")
    command = [sys.executable, "-c", FRESH_PROCESS, *(str(tmp_path / name) for name in ("moved", "batch.pt", "out.pt"))]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for got, want in zip(torch.load(tmp_path / "out.pt"), expected, strict=True):
        assert torch.equal(got, want)


def test_the_core_alone_loads_a_policys_folder(saved, make_lerobot_batch):
    backend, policy = load_backend(saved), HLRPQwenPolicy.from_pretrained(saved)
    batch = policy.reader.read_observation(make_lerobot_batch())
    ours = backend.latent_from_batch(batch, mode=BackendMode.CODES).logits
    assert torch.equal(ours, policy.predict_codes(make_lerobot_batch()).logits)


def test_it_survives_the_hub(saved, tmp_path, monkeypatch, make_lerobot_batch):
    """LeRobot uploads only some kinds of files, and we download only our own."""
    uploaded = [p for p in saved.rglob("*") if p.suffix in (".safetensors", ".json", ".yaml", ".md")]

    def snapshot_download(name: str, *, allow_patterns: list[str], revision: str | None, **_) -> str:
        assert (name, revision) == ("user/policy", "v1")
        for path in uploaded:
            relative = path.relative_to(saved)
            if any(fnmatch.fnmatch(str(relative), pattern) for pattern in allow_patterns):
                (tmp_path / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / relative)
        return str(tmp_path)

    monkeypatch.setattr("lerobot_hlrp.hub_folder.snapshot_download", snapshot_download)
    downloaded = HLRPQwenPolicy.from_pretrained("user/policy", revision="v1")
    here = HLRPQwenPolicy.from_pretrained(saved)
    batch = make_lerobot_batch()
    assert torch.equal(downloaded.predict_codes(batch).logits, here.predict_codes(batch).logits)


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["hlrp.json", "model.safetensors", "backbone/config.json", "backbone/tokenizer.json"])
def test_a_missing_part_is_named(part, copy):
    (copy / part).unlink()
    with pytest.raises(BundleError, match=part):
        HLRPQwenPolicy.from_pretrained(copy)


@pytest.mark.parametrize("part", ["backbone/config.json", "backbone/tokenizer.json", "backbone/chat_template.json"])
def test_an_altered_part_is_named(part, copy):
    (copy / part).write_text((copy / part).read_text() + " ")
    with pytest.raises(BundleError, match=part):
        HLRPQwenPolicy.from_pretrained(copy)


def test_a_path_to_nowhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pretrained_model.*which is no folder"):
        HLRPQwenPolicy.from_pretrained(tmp_path / "nowhere")


def test_cut_weights_are_refused(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        HLRPQwenPolicy.from_pretrained(copy)


def test_another_schema_is_refused(copy):
    manifest = json.loads((copy / "hlrp.json").read_text())
    (copy / "hlrp.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(BundleError, match="99"):
        HLRPQwenPolicy.from_pretrained(copy)


def test_another_policys_folder_is_refused(tmp_path):
    from lerobot.policies.act.configuration_act import ACTConfig

    ACTConfig(device="cpu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a policy of type 'hlrp_qwen', got 'act'"):
        HLRPQwenPolicy.from_pretrained(tmp_path)


def changed(saved: Path, **settings) -> PreTrainedConfig:
    config = PreTrainedConfig.from_pretrained(saved)
    for name, value in settings.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codebook_size": 16}, "codebook_size: expected 8 .* got 16"),
        ({"code_seq_len": 2}, "code_seq_len: expected 4 .* got 2"),
        ({"backbone": "Qwen/Qwen3-VL-2B-Instruct"}, "backbone: expected tiny-qwen.*--policy.backbone"),
    ],
)
def test_settings_that_the_weights_fix_cannot_change(settings, words, saved):
    with pytest.raises(ValueError, match=words):
        HLRPQwenPolicy.from_pretrained(saved, config=changed(saved, **settings))


def test_a_policy_of_codes_has_no_actions_and_says_what_to_do(saved, make_lerobot_batch):
    policy = HLRPQwenPolicy.from_pretrained(saved)
    assert not policy.supports_rtc()
    with pytest.raises(ValueError, match=r"--policy\.path=.*--policy\.mode=actions.*--policy\.action_head"):
        policy.select_action(make_lerobot_batch())


# -- what may change ------------------------------------------------------------------------------------------------


def test_a_new_action_head_starts_fresh_and_is_logged(saved, caplog, make_lerobot_batch):
    config = changed(saved, mode="actions", action_head="flow")
    with caplog.at_level(logging.INFO):
        policy = HLRPQwenPolicy.from_pretrained(saved, config=config)
    assert "action_head.expert" in caplog.text
    assert "core.model" not in caplog.text
    before = HLRPQwenPolicy.from_pretrained(saved)
    for name, tensor in before.backend.core.state_dict().items():
        assert torch.equal(tensor, policy.backend.core.state_dict()[name])
    assert policy.select_action(make_lerobot_batch()).shape == (3, 2)
    assert policy.supports_rtc()


def test_another_kind_of_head_is_refused(tmp_path, make_tiny_policy):
    make_tiny_policy(mode="actions", action_head="mlp").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="kind=mlp as in the checkpoint, got kind=flow"):
        HLRPQwenPolicy.from_pretrained(tmp_path, config=changed(tmp_path, action_head="flow"))


def test_an_environment_with_other_actions_is_refused(tmp_path, make_tiny_policy):
    make_tiny_policy(mode="actions").save_pretrained(tmp_path)
    config = changed(tmp_path, output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))})
    with pytest.raises(ValueError, match="action_dim=2 as in the checkpoint, got action_dim=7"):
        HLRPQwenPolicy.from_pretrained(tmp_path, config=config)


def test_a_policy_with_a_head_can_go_on_with_codes_alone(tmp_path, make_tiny_policy, make_lerobot_batch, listed_labels):
    """On a dataset without actions, too: the head waits."""
    make_tiny_policy(mode="multitask").save_pretrained(tmp_path)
    policy = HLRPQwenPolicy.from_pretrained(tmp_path, config=changed(tmp_path, mode="codes", output_features={}))
    policy.reader.labels = listed_labels(CODES)
    loss, _ = policy({**make_lerobot_batch(), "action": None})
    loss.backward()
    policy.save_pretrained(tmp_path / "again")
    assert HLRPQwenPolicy.from_pretrained(tmp_path / "again").backend.action_head is not None


# -- real-time chunking ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
def test_real_time_chunking_follows_the_old_chunk(enabled, make_tiny_policy, make_lerobot_batch):
    from lerobot.policies.rtc.configuration_rtc import RTCConfig
    from lerobot.rollout.inference.rtc import supports_rtc_inference

    policy = make_tiny_policy(mode="actions").eval()
    assert supports_rtc_inference(policy)
    batch, noise = make_lerobot_batch(size=1), torch.randn(1, 4, 2)
    plain = policy.predict_action_chunk(batch, noise=noise)
    policy.config.rtc_config = RTCConfig(enabled=enabled, execution_horizon=3)  # as lerobot-rollout does
    policy.init_rtc_processor()
    left_over = torch.full((3, 2), 2.0)
    with torch.inference_mode():
        guided = policy.predict_action_chunk(batch, noise=noise, inference_delay=1, prev_chunk_left_over=left_over)
    nearer = (guided[0, 0] - 2.0).abs().sum() < (plain[0, 0] - 2.0).abs().sum()
    assert bool(nearer) == enabled
    assert torch.equal(guided, plain) != enabled
    assert torch.equal(policy.predict_action_chunk(batch, noise=noise), plain)  # the first chunk has none before it
    padded = torch.cat([left_over, torch.zeros(7, 2)])  # by LeRobot, to an execution horizon beyond the chunk
    with torch.inference_mode():
        also = policy.predict_action_chunk(batch, noise=noise, inference_delay=1, prev_chunk_left_over=padded)
    assert also.shape == guided.shape
    assert torch.equal(also[:, 0], guided[:, 0])


# -- adapters -------------------------------------------------------------------------------------------------------


def train_two_steps(wrapped: torch.nn.Module, batch: dict) -> None:
    optimizer = torch.optim.AdamW(wrapped.get_optim_params(), lr=1e-2)
    for _ in range(2):
        wrapped(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.eval()


def load_adapted(policy_type: str, folder: Path):
    """The base policy of `folder`/base with the adapter beside it."""
    import peft

    base = get_policy_class(policy_type).from_pretrained(folder / "base")
    return peft.PeftModel.from_pretrained(base, str(folder / "adapter")).eval()


def test_low_rank_adapters_come_back_bit_exactly(tmp_path, make_tiny_policy, make_lerobot_batch, listed_labels):
    pytest.importorskip("peft")
    policy = make_tiny_policy(labels=listed_labels(CODES), code_conditioning="soft")
    policy.save_pretrained(tmp_path / "base")
    policy.config.pretrained_path = tmp_path / "base"
    batch, noise = make_lerobot_batch(), torch.randn(3, 4, 2)
    before = policy.predict_codes(batch).logits
    wrapped = policy.wrap_with_peft(peft_cli_overrides={"r": 4})
    train_two_steps(wrapped, batch)
    trained = policy.predict_codes(batch)
    assert not torch.equal(trained.logits, before)
    decoder = policy.backend.code_head.decoder
    policy.backend.code_head.decoder = make_decoder("generate", decoder.vocabulary)  # sees the trained rows, too
    assert torch.equal(policy.predict_codes(batch).tokens, trained.tokens)
    policy.backend.code_head.decoder = decoder

    wrapped.save_pretrained(tmp_path / "adapter")
    again = load_adapted("hlrp_qwen", tmp_path)
    assert torch.equal(again.predict_codes(batch).logits, trained.logits)
    assert torch.equal(again.select_action(batch, noise=noise), wrapped.select_action(batch, noise=noise))


LATENT = (
    ("hlrp_smol_latent", {"latent_pooling": "query", "code_conditioning": "soft"}),
    ("hlrp_qwen", {"prompting": "plain", "code_head": "latent", "code_conditioning": "soft"}),
    ("hlrp_smol_latent", {"code_head": "vector", "code_conditioning": "vector"}),
)


@pytest.mark.parametrize(("policy_type", "settings"), LATENT)
def test_low_rank_adapters_carry_a_latent_head(
    policy_type, settings, tmp_path, make_tiny_policy, make_lerobot_batch, listed_labels
):
    def predict(policy) -> torch.Tensor:
        latent = policy.predict_codes(batch)
        return latent.vector if latent.logits is None else latent.logits

    pytest.importorskip("peft")
    policy = make_tiny_policy(policy_type, labels=listed_labels(CODES), **settings)
    policy.save_pretrained(tmp_path / "base")
    policy.config.pretrained_path = tmp_path / "base"
    batch, noise = make_lerobot_batch(), torch.randn(3, 4, 2)
    before = predict(policy)
    num_head_tensors = len(list(policy.backend.code_head.parameters()))
    wrapped = policy.wrap_with_peft(peft_cli_overrides={"r": 4})
    assert policy._get_default_peft_targets()["modules_to_save"] == ["code_head", "action_head"]
    learning = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all(any(word in name for word in ("lora_", ".code_head.", ".action_head.")) for name in learning)
    assert any("text_model" in name or "language_model" in name for name in learning)
    head = [name for name in learning if ".code_head." in name]
    assert len(head) == num_head_tensors
    train_two_steps(wrapped, batch)
    trained = predict(policy)
    assert not torch.equal(trained, before)

    wrapped.save_pretrained(tmp_path / "adapter")
    again = load_adapted(policy_type, tmp_path)
    assert torch.equal(predict(again), trained)
    assert torch.equal(again.select_action(batch, noise=noise), wrapped.select_action(batch, noise=noise))


@pytest.mark.parametrize(
    ("policy_type", "settings", "mode", "expected"),
    [
        ("hlrp_smol_latent", {}, "codes", ["code_head"]),
        ("hlrp_smol_latent", {"code_conditioning": "soft"}, "actions", ["action_head"]),
        ("hlrp_smolvlm", {}, "codes", ["embed_tokens", "lm_head"]),
        ("hlrp_qwen", {}, "multitask", ["embed_tokens", "lm_head", "action_head"]),
    ],
)
def test_what_is_trained_whole_beside_adapters(policy_type, settings, mode, expected, make_tiny_policy):
    policy = make_tiny_policy(policy_type, mode, **settings)
    assert policy._get_default_peft_targets()["modules_to_save"] == expected
