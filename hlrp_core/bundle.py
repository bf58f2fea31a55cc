"""One folder that travels: everything a backend needs for inference.

    hlrp.json            schema version, settings of all parts, code ids, versions, a hash of every part
    backbone/            config.json of the backbone, tokenizer with the code tokens, chat template, image settings
    model.safetensors    all weights

Only `*.json` and `*.safetensors`, so that an upload that filters by these endings loses nothing. Loading is strict,
opens no path outside the folder, and needs no network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hlrp_core.backbones.code_rows import CodeRows
from hlrp_core.backbones.loading import build_core
from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.config import BackendConfig
from hlrp_core.codes.token_scheme import TokenSchemeConfig
from hlrp_core.heads.action_config import ActionHeadConfig
from hlrp_core.prompting.prompt import PromptConfig
from hlrp_core.registry import get_recipe
from hlrp_core.run_folder import write_json

SCHEMA_VERSION = 1
MANIFEST = "hlrp.json"
BACKBONE = "backbone"
WEIGHTS = "model.safetensors"
# Settings that the weights fix.
_FIXED = ("codebook_size", "code_seq_len", "token_scheme", "latent_pooling", "vector_objective", "code_vector_dim")
_MANIFEST_KEYS = {"backend", "code_ids", "dtype", "extra", "parts", "vocabulary_rows", "weights"}

logger = logging.getLogger(__name__)


class BundleError(ValueError):
    """A saved folder is incomplete, altered, or made by another schema."""


# -- settings as JSON -------------------------------------------------------------------------------------------------


def config_from_dict(data: dict[str, Any]) -> BackendConfig:
    """Inverse of `dataclasses.asdict` for a `BackendConfig`."""
    data = dict(data)
    nested = {"prompt": PromptConfig, "token_scheme": TokenSchemeConfig, "action_head": ActionHeadConfig}
    try:
        for name, kind in nested.items():
            if data.get(name) is not None:
                data[name] = kind(**data[name])
        return BackendConfig(**data)
    except TypeError as error:
        raise BundleError(
            f"{MANIFEST}: expected the backend settings of schema {SCHEMA_VERSION}, got others ({error}). "
            "Next step: load it with the version that saved it."
        ) from error


# -- saving -----------------------------------------------------------------------------------------------------------


def save_parts(backend: ComposedBackend, folder: str | Path, *, extra: dict[str, Any] | None = None) -> None:
    """Write everything but the weights into an existing folder.

    Args:
        extra: further JSON for the manifest, such as the id and hash of the LAQ that made the labels.
    """
    folder = Path(folder)
    (folder / BACKBONE).mkdir(exist_ok=True)
    backend.core.save_architecture(folder / BACKBONE)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "backend": asdict(backend.config),
        "dtype": str(backend.core.model.dtype).removeprefix("torch."),
        "vocabulary_rows": backend.core.lm_head.out_features,
        "code_ids": code_token_ids(backend),
        "extra": extra or {},
        "versions": {name: version(name) for name in ("lerobot_policy_hlrp", "torch", "transformers")},
        "parts": {path.name: _sha256(path) for path in sorted((folder / BACKBONE).iterdir())},
    }
    write_json(folder / MANIFEST, manifest)


def save_pretrained(backend: ComposedBackend, folder: str | Path, *, extra: dict[str, Any] | None = None) -> Path:
    """Save a backend as one folder; it appears under its name only when complete.

    Raises:
        ValueError: the folder exists and holds files.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder: expected a new or empty one, got {folder}. Next step: name another or delete it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        scratch.chmod(0o755)
        save_parts(backend, scratch, extra=extra)
        save_tensors(unique_tensors(backend), scratch)
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, without trainable code rows: their place is in the tables, whatever the next run trains."""
    inside = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, CodeRows))
    tensors = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(inside)}


def unique_names(module: nn.Module) -> list[str]:
    """Names of the state dict without the second names of shared tensors (tied embeddings, code rows)."""
    first: dict[int, str] = {}
    for name, tensor in own_tensors(module).items():
        first.setdefault(id(tensor), name)
    return list(first.values())


def unique_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of `unique_names`; contiguous, on the CPU."""
    tensors = module.state_dict()
    return {name: tensors[name].cpu().contiguous() for name in unique_names(module)}


def save_tensors(tensors: dict[str, Tensor], folder: str | Path) -> None:
    """Write a backend's weights, by the names of `unique_names`, beside its parts; the manifest gets their hash."""
    folder = Path(folder)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    write_json(folder / MANIFEST, {**manifest, "weights": _sha256(folder / WEIGHTS)})


def code_token_ids(backend: ComposedBackend) -> dict[str, int]:
    """The ids that the scheme's tokens have in the backend's tokenizer; empty for heads without tokens."""
    config, vocabulary = backend.config, backend.core.tokenizer.get_vocab()
    names = config.token_scheme.token_names(config.codebook_size)
    return {name: vocabulary[name] for name in names if name in vocabulary}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- loading ----------------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a saved folder, after checking that all its parts are there and unaltered.

    Raises:
        BundleError: names the part that is missing or altered, or the schema that is not known.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"expected {MANIFEST} in {folder}, got none. Next step: check the path; it must be a saved backend."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        got = manifest.get("schema_version")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise BundleError(
            f"{MANIFEST}: expected JSON, got something else in {folder} ({error}). "
            "Next step: copy or download the folder anew."
        ) from error
    if got != SCHEMA_VERSION:
        raise BundleError(
            f"{MANIFEST}: expected schema version {SCHEMA_VERSION}, got {got!r} in {folder}. "
            "Next step: load it with the version of this package that saved it."
        )
    missing = sorted(_MANIFEST_KEYS - manifest.keys())
    if missing:
        raise BundleError(
            f"{MANIFEST}: expected {', '.join(missing)} in it, got none in {folder}. "
            "Next step: copy or download the folder anew."
        )
    for name, digest in manifest["parts"].items():
        part = folder / BACKBONE / name
        if not part.is_file():
            raise BundleError(
                f"expected {BACKBONE}/{name} in {folder}, got none. Next step: copy or download the folder anew."
            )
        if _sha256(part) != digest:
            raise BundleError(
                f"{BACKBONE}/{name}: expected the file as it was saved, got an altered one in {folder}. "
                "Next step: copy or download the folder anew."
            )
    return manifest


def build_saved_backend(
    folder: str | Path, *, config: BackendConfig | None = None, dtype: str | None = None
) -> ComposedBackend:
    """The saved backend's structure from its folder alone; its weights are still to be loaded.

    Args:
        config: other settings than the saved ones, such as another decoding or a new action head. The parts that the
            weights fix (codes, tokens) must be the saved ones.
        dtype: of the backbone's weights, such as `bfloat16`; by default as saved.

    Raises:
        BundleError: a part is missing or altered, or the tokenizer's code ids are not those of the weights.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    saved = config_from_dict(manifest["backend"])
    config = config or saved
    for name in _FIXED:
        if getattr(config, name) != getattr(saved, name):
            raise ValueError(
                f"{name}: expected {getattr(saved, name)} as in the checkpoint {folder}, got {getattr(config, name)}. "
                "Next step: leave the setting out, or train a new model for other codes."
            )
    if changed := _differences(saved, config):
        logger.info("Settings other than in the checkpoint %s: %s", folder, "; ".join(changed))
    recipe = get_recipe(config.name)
    recipe.check(config)
    core = build_core(
        folder / BACKBONE,
        family=recipe.family,
        image_size=config.image_size,
        image_splitting=config.image_splitting,
        dtype=dtype or manifest["dtype"],
    )
    rows = core.lm_head.out_features
    if rows != manifest["vocabulary_rows"]:
        raise BundleError(
            f"{BACKBONE}/config.json: expected {manifest['vocabulary_rows']} vocabulary rows, got {rows}. "
            "Next step: copy or download the folder anew."
        )
    backend = recipe.compose(config, core, False)
    if code_token_ids(backend) != manifest["code_ids"]:
        raise BundleError(
            f"tokenizer: expected the code ids of the weights ({_brief(manifest['code_ids'])}), got "
            f"{_brief(code_token_ids(backend))} in {folder}. Next step: copy or download the folder anew."
        )
    return backend


def _differences(saved: BackendConfig, config: BackendConfig) -> list[str]:
    """What a caller has changed, knowingly or by leaving a saved setting out."""
    old, new = asdict(saved), asdict(config)
    for settings in (old, new):
        settings |= {f"prompt.{name}": value for name, value in settings.pop("prompt").items()}
        head = settings.pop("action_head")
        settings["action_head"] = head["kind"] if head else None
    return [f"{name}={new[name]!r} (there {old[name]!r})" for name in old if new[name] != old[name]]


def _brief(ids: dict[str, int]) -> str:
    return ", ".join(f"{name}={i}" for name, i in list(ids.items())[:3]) + (", ..." if len(ids) > 3 else "")


def load_tensors(module: nn.Module, path: str | Path, *, new_parts: tuple[str, ...] = ()) -> list[str]:
    """Load a safetensors file strictly.

    Args:
        new_parts: prefixes of tensors that the saved model did not have and this one adds.

    Returns:
        Names of the tensors that keep their fresh initialisation, all under `new_parts`.

    Raises:
        BundleError: a tensor is missing, has another shape, or belongs to nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise BundleError(
            f"expected {path.name} in {path.parent}, got none. Next step: copy or download the folder anew."
        )
    expected = read_manifest(path.parent)["weights"]
    if _sha256(path) != expected:
        raise BundleError(
            f"{path}: expected the weights as they were saved, got an altered file. "
            "Next step: copy or download the folder anew."
        )
    own = own_tensors(module)
    aliases: dict[int, list[str]] = {}
    for name, tensor in own.items():
        aliases.setdefault(id(tensor), []).append(name)
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own type for a truncated file
        raise BundleError(
            f"{path}: expected a safetensors file, got an unreadable one ({error}). "
            "Next step: copy or download the folder anew."
        ) from error
    with file as saved, torch.no_grad():
        names = set(saved.keys())
        unknown = sorted(names - own.keys())
        fresh = [group[0] for group in aliases.values() if not names.intersection(group)]
        missing = [name for name in fresh if not name.startswith(new_parts)] if new_parts else fresh
        if unknown or missing:
            raise BundleError(
                f"{path}: expected exactly the tensors that its settings imply, got {len(missing)} missing "
                f"({', '.join(missing[:3]) or '-'}) and {len(unknown)} unknown ({', '.join(unknown[:3]) or '-'}). "
                "Next step: copy or download the folder anew."
            )
        for name in sorted(names):
            tensor = saved.get_tensor(name)
            if tensor.shape != own[name].shape:
                raise BundleError(
                    f"{path}: expected {name} of shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}. "
                    "Next step: copy or download the folder anew."
                )
            own[name].copy_(tensor)
    for part in module.modules():
        if isinstance(part, ModelCore):
            part.read_code_rows()
    if fresh:
        logger.info("Initialised afresh, as the checkpoint has no such part: %s", ", ".join(fresh))
    return fresh


def load_backend(folder: str | Path) -> ComposedBackend:
    """Load what `save_pretrained` wrote; predictions are bit-identical.

    Raises:
        BundleError: a part is missing or altered, or the schema is not known.
    """
    backend = build_saved_backend(folder)
    load_tensors(backend, Path(folder) / WEIGHTS)
    return backend.eval()
