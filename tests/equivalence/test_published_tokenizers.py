"""Codes as tokens of the published tokenizers: completions say their codes as ids and as text, and travel."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from hlrp_core.backbones.random_checkpoint import write_random_checkpoint
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.bundle import code_token_ids, load_backend, save_pretrained
from hlrp_core.codes.token_scheme import TokenSchemeConfig, encode_literal
from hlrp_core.contract import BackendMode
from hlrp_core.prompting.prompt import PromptConfig
from hlrp_core.registry import get_recipe

NAMES = ["qwen_chat", "qwen_plain", "smol_chat", "smol_plain"]
PROCESSORS = {"qwen3_vl": "qwen3_vl", "smolvlm": "smolvlm2_500m"}  # family -> published processor
SCHEMES = {
    "default": TokenSchemeConfig(),
    "short": TokenSchemeConfig(separator=""),
    "renamed": TokenSchemeConfig(begin="[LAT]", end="[/LAT]", separator=", ", code="[L{}]"),
}
PROMPT = PromptConfig(system="Be a robot.", few_shot="a -> b", instruction_template="Do: {instruction}.")


@pytest.fixture(scope="module")
def build(
    make_tiny_backend: Callable, real_processor: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], ComposedBackend]:
    """A backend and a scheme of `SCHEMES`, on a tiny random model with the published processor and its vocabulary."""

    @cache
    def checkpoint(family: str) -> Path:
        folder = tmp_path_factory.mktemp("backbone") / family
        return write_random_checkpoint(folder, family=family, processor=real_processor(PROCESSORS[family]))

    def build(name: str, scheme: str) -> ComposedBackend:
        settings = {"token_scheme": SCHEMES[scheme], "prompt": PROMPT, "image_size": 64}
        return make_tiny_backend(name, backbone=checkpoint(get_recipe(name).family), **settings).eval()

    return build


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
def test_completions_and_the_journey(name, scheme, build, tmp_path):
    backend = build(name, scheme)
    config, tokenizer, vocabulary = backend.config.token_scheme, backend.core.tokenizer, backend.code_head.vocabulary
    batch = fake_batch(backend)
    completions = vocabulary.encode(batch.target_codes).tolist()
    assert [vocabulary.decode(ids) for ids in completions] == batch.target_codes.tolist()
    for ids, codes in zip(completions, batch.target_codes.tolist(), strict=True):
        written = [config.begin, *map(config.code_token, codes), config.end]
        assert tokenizer.decode(ids, skip_special_tokens=False) == config.separator.join(written)
        assert encode_literal(tokenizer, config.separator.join(written)) == ids

    saved = save_pretrained(backend, tmp_path / "saved")
    loaded = load_backend(saved)
    shutil.rmtree(saved)  # the vocabulary makes it large
    assert code_token_ids(loaded) == code_token_ids(backend)
    assert len(set(code_token_ids(backend).values())) == 2 + backend.codebook_size
    assert torch.equal(loaded.code_head.vocabulary.template, vocabulary.template)
    mine, theirs = (one._prompt(batch, for_prediction=True).tokens for one in (backend, loaded))
    assert torch.equal(mine.ids, theirs.ids)
    mine, theirs = (one.latent_from_batch(batch, mode=BackendMode.CODES) for one in (backend, loaded))
    assert torch.equal(mine.logits, theirs.logits)
    assert torch.equal(mine.tokens, theirs.tokens)
