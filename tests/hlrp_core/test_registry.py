from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch

from hlrp_core import available_backends, make_backend, register_backend, registry
from hlrp_core.backends.config import BackendConfig, Decoding
from hlrp_core.codes.decoding import DECODERS
from hlrp_core.heads import ActionHeadConfig
from hlrp_core.registry import BackendRecipe, get_recipe

SIZES = {"codebook_size": 8, "code_seq_len": 4}
LAQ_HEAD = ActionHeadConfig(kind="laq", code_conditioning="tokens", code_vector_dim=2)


def test_the_documentation_lists_the_backends():
    page = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == available_backends()


@pytest.mark.parametrize(("wrong", "close"), [("qwen_chta", "qwen_chat"), ("qwenplain", "qwen_plain")])
def test_an_unknown_name_offers_the_closest(wrong, close):
    expected = rf"expected one of .*qwen_chat.*got '{wrong}'. Next step: .* Did you mean '{close}'"
    with pytest.raises(ValueError, match=expected):
        make_backend(wrong, backbone="x", **SIZES)
    with pytest.raises(ValueError, match=r"got 'zzzz'. Next step: Choose one of these.$"):
        get_recipe("zzzz")


def test_a_taken_name_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))
    recipe = BackendRecipe("qwen3_vl", lambda config, core, is_new: None)  # type: ignore[arg-type, return-value]
    register_backend("mine", recipe)
    register_backend("mine", recipe)  # a module that is imported twice
    assert "mine" in available_backends()
    with pytest.raises(ValueError, match="'mine', which is taken"):
        register_backend("mine", BackendRecipe("qwen3_vl", lambda config, core, is_new: None))  # type: ignore[arg-type, return-value]


def test_a_backend_of_ones_own(monkeypatch, tiny_qwen):
    """One function and one line."""
    from hlrp_core.backends.token_backends import compose_token_backend

    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))

    def compose(config, core, is_new):
        return compose_token_backend(config, core, prompting="plain", is_new=is_new)

    register_backend("mine", BackendRecipe("qwen3_vl", compose))
    backend = make_backend("mine", backbone=tiny_qwen, **SIZES)
    assert backend.name == "mine"


def test_a_backbone_that_is_none(tmp_path, tiny_qwen):
    with pytest.raises(ValueError, match=r"backbone: expected a folder.*no folder.*hlrp-backbone"):
        make_backend("qwen_chat", backbone=tmp_path / "nowhere", **SIZES)
    with pytest.raises(ValueError, match=r"backbone: expected .*Next step"):
        make_backend("qwen_chat", backbone=tmp_path, **SIZES)
    with pytest.raises(ValueError, match=r"backbone: expected .*Next step"):
        make_backend("qwen_chat", backbone="nobody/no-such-model", **SIZES)
    other = shutil.copytree(tiny_qwen, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match=r"qwen3_vl family.*got model_type 'llama'"):
        make_backend("qwen_chat", backbone=other, **SIZES)


def test_dtype(tiny_qwen):
    with pytest.raises(ValueError, match="dtype: expected one of float32"):
        make_backend("qwen_chat", backbone=tiny_qwen, dtype="int8", **SIZES)
    assert str(make_backend("qwen_chat", backbone=tiny_qwen, dtype="bfloat16", **SIZES).core.model.dtype) == (
        "torch.bfloat16"
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"codebook_size": 1}, "codebook_size: expected 2 or more, got 1"),
        ({"code_seq_len": 0}, "code_seq_len: expected 1 or more, got 0"),
        ({"codes_loss_weight": -1.0}, "codes_loss_weight: expected 0 or more"),
        ({"code_source": "guess"}, "code_source: expected one of predicted, teacher, got 'guess'"),
        ({"decoding": "constrain"}, "decoding: expected one of constrained, .*Did you mean 'constrained'"),
        (
            {"action_head": ActionHeadConfig(kind="mlp", code_conditioning="soft"), "decoding": "generate"},
            "code_conditioning=soft: expected decoding='constrained'",
        ),
        ({"action_head": ActionHeadConfig(kind="mlpp", code_conditioning="tokens")}, "Did you mean 'mlp'"),
        ({"action_head": LAQ_HEAD}, r"code vectors of action head 'laq'.*got None.*code_vector_table"),
        ({"action_head": LAQ_HEAD, "code_vectors": torch.zeros(4, 9, 2)}, r"expected \[4, 8, 2\].*got \[4, 9, 2\]"),
        ({"code_vectors": torch.zeros(4, 8, 2)}, "an action head that decodes them"),
    ],
)
def test_settings_that_cannot_work(settings, text, tiny_qwen):
    with pytest.raises(ValueError, match=text) as error:
        make_backend("qwen_chat", backbone=tiny_qwen, **{**SIZES, **settings})
    assert "Next step: " in str(error.value)


@pytest.mark.parametrize("name", ["qwen_chat", "qwen_plain", "smol_chat", "smol_plain"])
def test_a_decoding_that_cannot_work_is_refused_before_weights_are_loaded(name):
    head = ActionHeadConfig(kind="mlp", code_conditioning="tokens")
    with pytest.raises(ValueError, match=r"decoding: expected 'constrained' or 'generate'"):
        make_backend(name, backbone="/nowhere", action_head=head, decoding="free", **SIZES)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("decodng", "got 'decodng'. Next step: .* Did you mean 'decoding'"),
        ("code_vector", "Did you mean 'code_vectors'"),
        ("xyz", "setting: expected one of .*, image_size, .*, got 'xyz'. Next step: Choose one of these.$"),
    ],
)
def test_an_unknown_setting_offers_the_closest(setting, text):
    with pytest.raises(ValueError, match=text):
        make_backend("qwen_chat", backbone="nowhere", **SIZES, **{setting: 1})


@pytest.mark.parametrize("name", ["qwen_chat", "qwen_latent_head"])
def test_decodings_are_known_to_the_settings(name):
    """Also where nothing is decoded: a checkpoint keeps the setting."""
    assert set(get_args(Decoding)) == set(DECODERS)
    with pytest.raises(
        ValueError, match=r"decoding: expected one of constrained, generate, free, got 'beam'.*Next step"
    ):
        BackendConfig(name=name, decoding="beam")
