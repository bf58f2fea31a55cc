"""Backend name -> how it is composed.

A new backend is one file and one `register_backend` line: the contract tests run over this registry, so that a newcomer
is tested by being registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from hlrp_core.backends.config import BackendConfig
from hlrp_core.expectation import expect_choice

if TYPE_CHECKING:
    from torch import Tensor

    from hlrp_core.backbones.model_core import ModelCore
    from hlrp_core.backends.composed import ComposedBackend


@dataclass(frozen=True)
class BackendRecipe:
    """How a backend is put together.

    Args:
        family: of the backbone; a checkpoint of another one is refused.
        compose: builds the backend on a loaded core. With `is_new` the core's vocabulary has yet to get the codes'
            rows; without, its weights come from a saved backend.
        predicts_vectors: it predicts a LAQ's code vectors, which `make_backend` must be given.
        check: raises `ValueError` where settings do not go together on it; called before weights are loaded.
    """

    family: str
    compose: Callable[[BackendConfig, ModelCore, bool], ComposedBackend]
    predicts_vectors: bool = False
    check: Callable[[BackendConfig], None] = lambda config: None


_RECIPES: dict[str, BackendRecipe] = {}


def register_backend(name: str, recipe: BackendRecipe) -> None:
    """Raises:
    ValueError: the name is taken by another recipe.
    """
    if _RECIPES.get(name, recipe) != recipe:
        raise ValueError(f"backend name: expected a free one, got '{name}', which is taken. Next step: choose another.")
    _RECIPES[name] = recipe


def _compose_tokens(prompting: str) -> Callable[[BackendConfig, ModelCore, bool], ComposedBackend]:
    def compose(config: BackendConfig, core: ModelCore, is_new: bool) -> ComposedBackend:
        from hlrp_core.backends.token_backends import compose_token_backend

        return compose_token_backend(config, core, prompting=prompting, is_new=is_new)

    return compose


def _check_tokens(config: BackendConfig) -> None:
    from hlrp_core.backends.composition import check_decoding

    check_decoding(config)


def _compose_latent(prompting: str) -> Callable[[BackendConfig, ModelCore, bool], ComposedBackend]:
    def compose(config: BackendConfig, core: ModelCore, is_new: bool) -> ComposedBackend:
        from hlrp_core.backends.latent_backends import compose_latent_backend

        return compose_latent_backend(config, core, prompting=prompting)

    return compose


def _compose_vector(prompting: str) -> Callable[[BackendConfig, ModelCore, bool], ComposedBackend]:
    def compose(config: BackendConfig, core: ModelCore, is_new: bool) -> ComposedBackend:
        from hlrp_core.backends.vector_backends import compose_vector_backend

        return compose_vector_backend(config, core, prompting=prompting)

    return compose


register_backend("qwen_chat", BackendRecipe("qwen3_vl", _compose_tokens("chat"), check=_check_tokens))
register_backend("qwen_plain", BackendRecipe("qwen3_vl", _compose_tokens("plain"), check=_check_tokens))
register_backend("qwen_latent_head", BackendRecipe("qwen3_vl", _compose_latent("plain")))
register_backend("qwen_vector_head", BackendRecipe("qwen3_vl", _compose_vector("plain"), predicts_vectors=True))
register_backend("smol_chat", BackendRecipe("smolvlm", _compose_tokens("chat"), check=_check_tokens))
register_backend("smol_plain", BackendRecipe("smolvlm", _compose_tokens("plain"), check=_check_tokens))
register_backend("smol_latent_head", BackendRecipe("smolvlm", _compose_latent("plain")))
register_backend("smol_vector_head", BackendRecipe("smolvlm", _compose_vector("plain"), predicts_vectors=True))


def available_backends() -> list[str]:
    """Names that `make_backend` takes."""
    return sorted(_RECIPES)


def get_recipe(name: str) -> BackendRecipe:
    """Raises:
    ValueError: no such backend; the closest name is offered.
    """
    expect_choice("backend", name, available_backends())
    return _RECIPES[name]


def make_backend(
    name: str,
    *,
    backbone: str | Path,
    codebook_size: int,
    code_seq_len: int,
    dtype: str = "float32",
    code_vectors: Tensor | None = None,
    **settings,
) -> ComposedBackend:
    """Build a backend on a pretrained backbone.

    Args:
        name: one of `available_backends()`.
        backbone: Hub id or folder in the Hugging Face layout.
        codebook_size: K.
        code_seq_len: S.
        dtype: of the backbone's weights.
        code_vectors: `[S, K, D]` of the LAQ (`code_vector_table()`), for a vector backend or the action head
            `laq`.
        settings: further fields of `BackendConfig`, such as `prompt=PromptConfig(...)` or `action_head=...`.

    Raises:
        ValueError: unknown name or setting, a backbone of another family, or settings that do not fit each other.
    """
    recipe = get_recipe(name)
    for setting in settings:
        expect_choice("setting", setting, [*(f.name for f in fields(BackendConfig)), "dtype", "code_vectors"])
    if recipe.predicts_vectors and code_vectors is not None:
        settings = {"code_vector_dim": code_vectors.shape[-1], **settings}
    if not recipe.predicts_vectors and settings.get("code_vector_dim") is not None:
        raise ValueError(
            f"code_vector_dim: expected None on backend '{name}', which predicts codes, got "
            f"{settings['code_vector_dim']}. Next step: leave it out, or choose a backend that predicts vectors."
        )
    config = BackendConfig(name=name, codebook_size=codebook_size, code_seq_len=code_seq_len, **settings)
    recipe.check(config)
    from hlrp_core.backbones.loading import load_core
    from hlrp_core.heads import hand_over_code_vectors

    core = load_core(
        backbone,
        family=recipe.family,
        image_size=config.image_size,
        image_splitting=config.image_splitting,
        dtype=dtype,
    )
    backend = recipe.compose(config, core, True)
    hand_over_code_vectors(backend, code_vectors)
    return backend
