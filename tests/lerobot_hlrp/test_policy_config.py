"""The policy's settings: how they map onto the core's, and which combinations are refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import draccus
import pytest
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from hlrp_core.backends.config import BackendConfig
from hlrp_core.codes.token_scheme import TokenSchemeConfig
from hlrp_core.heads import ActionExpertConfig, ActionHeadConfig
from hlrp_core.prompting.prompt import PromptConfig
from lerobot_hlrp.configuration_hlrp_qwen import HLRPQwenConfig
from lerobot_hlrp.core_settings import build_backend_config

# Settings other than the defaults, and what they are in the core.
FLAT = {
    "codebook_size": 16,
    "code_seq_len": 2,
    "prompt": PromptConfig(system="You are a robot."),
    "token_scheme": TokenSchemeConfig(separator=""),
    "decoding": "generate",
    "image_size": 64,
    "image_splitting": True,
    "code_objective": "restricted",
    "train_vocabulary": "code_rows",
    "latent_pooling": "query",
    "vector_objective": "flow",
    "code_source": "teacher",
    "codes_loss_weight": 0.5,
    "actions_loss_weight": 2.0,
    "freeze_vision": True,
    "freeze_backbone": True,
}
HEAD = {
    "hidden_dim": 96,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 8,
    "mlp_dim": 64,
    "time_dim": 32,
    "num_flow_steps": 5,
    "num_noise_draws": 2,
    "time_sampling": "uniform",
    "dropout": 0.1,
}


def with_features(config: HLRPQwenConfig, *, cameras=("top",), state=3, action=2) -> HLRPQwenConfig:
    config.input_features = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for name in cameras
    }
    if state:
        config.input_features["observation.state"] = PolicyFeature(FeatureType.STATE, (state,))
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (action,))} if action else {}
    return config


def test_every_setting_of_the_core_is_reached():
    """A new field of the core's config must get a flag, and its place in this test."""
    config = with_features(
        HLRPQwenConfig(
            mode="multitask",
            prompting="plain",
            action_head="flow",
            chunk_size=12,
            code_conditioning="tokens",
            action_expert=ActionExpertConfig(**HEAD),
            **FLAT,
        )
    )
    built = build_backend_config(config, code_vector_dim=5)
    assert set(FLAT) | {"name", "action_head", "code_vector_dim"} == {f.name for f in fields(BackendConfig)}
    assert built.code_vector_dim is None  # it predicts codes
    assert built.name == "qwen_plain"
    for name, value in FLAT.items():
        assert value != getattr(BackendConfig(), name), f"{name}: the default tests nothing"
        assert getattr(built, name) == value

    named = {"kind": "flow", "chunk_size": 12, "action_dim": 2, "state_dim": 3, "code_conditioning": "tokens"}
    named["code_vector_dim"] = 5
    assert set(HEAD) | set(named) == {f.name for f in fields(ActionHeadConfig)}
    assert all(value != getattr(ActionHeadConfig(), name) for name, value in HEAD.items())
    assert built.action_head == ActionHeadConfig(**HEAD, **named)


def test_a_head_on_predicted_vectors_has_their_width():
    settings = {"prompting": "plain", "code_head": "vector", "codebook_size": 8, "code_seq_len": 4}
    config = with_features(HLRPQwenConfig(mode="multitask", action_head="flow", **settings))
    built = build_backend_config(config, code_vector_dim=5)
    assert built.code_vector_dim == built.action_head.code_vector_dim == 5
    assert built.action_head.code_conditioning == "vector"
    again = build_backend_config(config, replace(built, action_head=None))  # on a checkpoint of stage 2
    assert again.action_head == built.action_head


def test_flags_reach_nested_settings():
    flags = ["--mode=multitask", "--action_head=flow", "--action_expert.hidden_dim=96", "--prompt.system=Hello"]
    flags += ["--token_scheme.separator=", "--action_episodes=[1,2]", "--extra_cameras=[wrist]", "--laq_hash=null"]
    config = draccus.parse(HLRPQwenConfig, args=flags)
    assert (config.action_expert.hidden_dim, config.prompt.system, config.token_scheme.separator) == (96, "Hello", "")
    assert (config.action_episodes, config.extra_cameras, config.laq_hash) == ([1, 2], ["wrist"], None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "code"}, ["mode", "codes, actions, multitask", "'code'"]),
        ({"prompting": "chatty"}, ["prompting", "chat, plain"]),
        ({"code_head": "latent"}, ["code_head", "tokens", "'latent'"]),
        ({"action_head": "flows"}, ["action_head", "mlp, flow, prefix_flow"]),
        ({"dtype": "int8"}, ["dtype", "bfloat16"]),
        ({"action_head": "mlp", "laq_weights": "a"}, ["laq_weights", "action_head=laq", "action_head=mlp"]),
        ({"use_amp": True}, ["use_amp", "--policy.dtype=bfloat16"]),
        ({"freeze_backbone": True}, ["freeze_backbone", "mode=codes", "--policy.train_vocabulary=code_rows"]),
        ({"codes": "a", "laq": "b"}, ["--policy.codes", "--policy.laq", "a and b"]),
        ({"action_episodes": [0], "action_episode_share": 0.5}, ["action_episode_share", "one of them"]),
        ({"action_episode_share": 0.0}, ["action_episode_share", "above 0"]),
        ({"chunk_size": 4, "n_action_steps": 5}, ["n_action_steps", "chunk_size=4"]),
        ({"frame_gap": 0}, ["frame_gap", "1 or more"]),
        ({"normalization_mapping": {"VISUAL": NormalizationMode.MEAN_STD}}, ["VISUAL", "IDENTITY"]),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match="Next step") as error:
        HLRPQwenConfig(**settings)
    for word in words:
        assert word in str(error.value)


def test_a_frozen_backbone_is_for_what_learns_beside_it():
    HLRPQwenConfig(freeze_backbone=True, train_vocabulary="code_rows")
    HLRPQwenConfig(freeze_backbone=True, prompting="plain", code_head="latent")
    HLRPQwenConfig(freeze_backbone=True, mode="actions", action_head="prefix_flow")


@pytest.mark.parametrize(
    "value", [["wrist", "side"], "[wrist,side]", "[wrist, 'side']", '["wrist", "side"]', "wrist,side"]
)
def test_cameras_are_listed_in_any_usual_way(value):
    assert HLRPQwenConfig(extra_cameras=value).extra_cameras == ["wrist", "side"]


def test_no_cameras_is_no_camera():
    for value in ("[]", "", []):
        assert HLRPQwenConfig(extra_cameras=value).extra_cameras == []


# -- cameras and features -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wrist", "images.wrist", "observation.images.wrist"])
def test_a_camera_has_a_short_name(name):
    config = with_features(HLRPQwenConfig(camera=name), cameras=("top", "wrist"))
    config.validate_features()
    assert config.camera == "observation.images.wrist"
    assert list(config.image_features) == ["observation.images.wrist"]  # others need not be there to run


def test_the_only_camera_is_the_default():
    config = with_features(HLRPQwenConfig())
    config.validate_features()
    assert config.camera == "observation.images.top"


@pytest.mark.parametrize(
    ("settings", "features", "words"),
    [
        ({}, {"cameras": ("top", "wrist")}, ["--policy.camera", "observation.images.top, observation.images.wrist"]),
        ({"camera": "side"}, {"cameras": ("top", "wrist")}, ["got side", "observation.images.wrist"]),
        ({}, {"cameras": ()}, ["camera", "observation.state"]),
        ({"extra_cameras": ["top"]}, {}, ["cameras", "each once"]),
        ({"mode": "actions"}, {}, ["--policy.action_head", "prefix_flow"]),
        ({"mode": "actions", "action_head": "flow"}, {"action": 0}, ["'action'", "--policy.mode=codes"]),
        ({"mode": "multitask", "action_head": "flow"}, {"action": 0}, ["'action'", "--policy.mode=codes"]),
    ],
)
def test_data_that_lack_something_are_refused(settings, features, words):
    config = with_features(HLRPQwenConfig(**settings), **features)
    with pytest.raises(ValueError, match="Next step") as error:
        config.validate_features()
    for word in words:
        assert word in str(error.value)


def test_code_sizes_must_be_known_where_codes_are_used():
    with pytest.raises(ValueError, match=r"codebook_size.*--policy\.codes or --policy\.laq"):
        build_backend_config(with_features(HLRPQwenConfig()))
    with pytest.raises(ValueError, match="codebook_size"):
        build_backend_config(with_features(HLRPQwenConfig(mode="actions", action_head="mlp")))
    built = build_backend_config(with_features(HLRPQwenConfig(mode="actions", action_head="prefix_flow")))
    assert built.codebook_size == BackendConfig().codebook_size  # no one uses them


@pytest.mark.parametrize(
    ("head", "expected"), [("mlp", "tokens"), ("flow", "tokens"), ("prefix_flow", "none"), ("laq", "tokens")]
)
def test_each_action_head_has_its_usual_conditioning(head, expected):
    config = with_features(HLRPQwenConfig(mode="actions", action_head=head, codebook_size=8, code_seq_len=4))
    assert build_backend_config(config, code_vector_dim=1).action_head.code_conditioning == expected


def test_a_head_cannot_change_under_its_weights():
    config = with_features(HLRPQwenConfig(mode="actions", action_head="flow", codebook_size=8, code_seq_len=4))
    saved = build_backend_config(config)
    config.action_expert.num_flow_steps = 3  # a matter of sampling
    assert build_backend_config(config, saved).action_head.num_flow_steps == 3
    for change in ({"kind": "mlp"}, {"chunk_size": 5}, {"action_dim": 7}, {"state_dim": 0}, {"hidden_dim": 512}):
        other = replace(saved, action_head=replace(saved.action_head, **change))
        with pytest.raises(ValueError, match=f"{next(iter(change))}=.* as in the checkpoint.*stage 2"):
            build_backend_config(config, other)


# -- what LeRobot asks ----------------------------------------------------------------------------------------------


def test_delta_indices_follow_mode_and_labels(tiny_laq):
    codes = HLRPQwenConfig(codes="table", chunk_size=4, n_action_steps=2)
    assert codes.observation_delta_indices is None
    assert codes.action_delta_indices is None
    online = replace(codes, codes=None, laq=str(tiny_laq))
    assert online.observation_delta_indices == [0, 3]
    assert replace(online, mode="multitask").action_delta_indices == [0, 1, 2, 3]
    assert replace(online, mode="actions").observation_delta_indices is None  # no teacher is asked
    conditioned = replace(online, mode="actions", action_head="mlp", code_source="teacher")
    assert conditioned.observation_delta_indices == [0, 3]
    assert [replace(c, label_span=5).drop_n_last_frames for c in (online, conditioned)] == [5, 0]
    with pytest.raises(ValueError, match=r"laq: expected folder or Hub id.*config\.json"):
        _ = replace(online, laq=str(tiny_laq.parent)).observation_delta_indices


def test_the_schedule_ends_with_the_run_unless_told_otherwise():
    import torch

    config = HLRPQwenConfig(optimizer_lr=0.1, scheduler_warmup_steps=2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = config.get_scheduler_preset().build(optimizer, num_training_steps=10)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 0
    assert max(rates) == pytest.approx(0.1)
    assert scheduler.get_last_lr()[0] == pytest.approx(0.0)
    fixed = HLRPQwenConfig(scheduler_decay_steps=100).get_scheduler_preset()
    assert (fixed.num_decay_steps, fixed.decay_lr) == (100, 2.5e-6)


def test_a_saved_config_names_no_path_and_no_run(tmp_path):
    config = with_features(
        HLRPQwenConfig(
            backbone=str(tmp_path),
            codes="/data/table.safetensors",
            laq_weights="/data/laq",
            action_head="laq",
            laq_id="user/laq",
            laq_hash="abc",
            action_episodes=[1],
            rtc_config=RTCConfig(),
        )
    )
    config.pretrained_path = tmp_path
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert str(tmp_path) not in json.dumps(saved)
    assert "/data" not in json.dumps(saved)
    assert (saved["laq_id"], saved["laq_hash"], saved["backbone"]) == ("user/laq", "abc", tmp_path.name)
    assert config.codes == "/data/table.safetensors"  # the run's own config keeps it
    loaded = PreTrainedConfig.from_pretrained(tmp_path)
    assert type(loaded) is HLRPQwenConfig
    assert loaded.action_episodes is None
