"""One folder that travels: bit-equal after the journey, and an error that names the part for anything amiss."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hlrp_core import available_backends
from hlrp_core.backends.config import BackendConfig
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.bundle import (
    WEIGHTS,
    BundleError,
    build_saved_backend,
    config_from_dict,
    load_backend,
    load_tensors,
    read_manifest,
    save_pretrained,
)
from hlrp_core.codes.token_scheme import TokenSchemeConfig
from hlrp_core.contract import BackendMode, SamplingOptions
from hlrp_core.heads import ActionHeadConfig
from hlrp_core.prompting.prompt import PromptConfig

CODES = BackendMode.CODES
NOISE = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))


def predictions(backend, with_actions: bool = True) -> list[torch.Tensor]:
    batch = fake_batch(backend)
    latent = backend.latent_from_batch(batch, mode=CODES)
    output = [latent.vector if latent.logits is None else latent.logits]
    if with_actions:
        output.append(backend.predict_action_chunk(batch, sampling=SamplingOptions(noise=NOISE)).actions)
    return output


def scramble(backend):
    """Weights unlike any initialisation."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in backend.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backend.eval()


@pytest.fixture(scope="module")
def saved(make_tiny_backend: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend = scramble(make_tiny_backend("qwen_chat", "prefix_flow"))
    return save_pretrained(backend, tmp_path_factory.mktemp("bundle") / "saved", extra={"laq": {"hash": "abc"}})


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "hlrp.json").read_text())
    change(manifest)
    (folder / "hlrp.json").write_text(json.dumps(manifest))


# -- the journey ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"codebook_size": 256, "code_seq_len": 8}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("name", available_backends())
def test_bit_equal_after_the_journey(name, settings, make_tiny_backend, tmp_path):
    settings = {
        "prompt": PromptConfig(system="You are a robot.", image_position="before", padding_side="right"),
        "token_scheme": TokenSchemeConfig(separator=""),
        "image_size": 48,
        **settings,
    }
    backend = scramble(make_tiny_backend(name, "prefix_flow", **settings))
    save_pretrained(backend, tmp_path / "b")
    loaded = load_backend(tmp_path / "b")
    assert not loaded.training
    assert loaded.config == backend.config
    assert loaded.core.model.dtype == backend.core.model.dtype
    mine, theirs = backend.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert (loaded.core.lm_head.weight is loaded.core.model.get_input_embeddings().weight) == (
        backend.core.lm_head.weight is backend.core.model.get_input_embeddings().weight
    )
    for one, other in zip(predictions(backend), predictions(loaded), strict=True):
        assert torch.equal(one, other)
    loss, again = (b.loss_from_batch(fake_batch(b), mode=CODES).loss for b in (backend, loaded))
    assert torch.equal(loss, again)


def test_in_a_fresh_process_with_the_source_deleted(make_tiny_backend, tiny_qwen, tmp_path):
    source = Path(shutil.copytree(tiny_qwen, tmp_path / "source"))
    backend = scramble(make_tiny_backend("qwen_chat", "prefix_flow", backbone=source))
    save_pretrained(backend, tmp_path / "b")
    save_file({str(i): t for i, t in enumerate(predictions(backend))}, tmp_path / "expected.safetensors")
    save_file({"noise": NOISE}, tmp_path / "noise.safetensors")
    shutil.rmtree(source)
    program = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.bundle import load_backend
from hlrp_core.contract import BackendMode, SamplingOptions
folder = Path(sys.argv[1])
backend = load_backend(folder / "b")
batch, noise = fake_batch(backend), load_file(folder / "noise.safetensors")["noise"]
got = [backend.latent_from_batch(batch, mode=BackendMode.CODES).logits,
       backend.predict_action_chunk(batch, sampling=SamplingOptions(noise=noise)).actions]
expected = load_file(folder / "expected.safetensors")
assert all(torch.equal(tensor, expected[str(i)]) for i, tensor in enumerate(got))
assert not any(name.split(".")[0] == "lerobot" for name in sys.modules)
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


def test_it_can_go_on_travelling(saved, tmp_path):
    loaded = load_backend(saved)
    save_pretrained(loaded, tmp_path / "again")
    for path in saved.rglob("*"):
        if path.is_file() and path.name != "hlrp.json":
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(saved)).read_bytes(), path.name


def test_only_json_and_safetensors(saved):
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert (saved / "backbone" / "config.json").is_file()  # not at the top, where another config.json may stand


def test_no_path_of_this_machine_is_in_it(saved, tiny_qwen):
    for path in saved.rglob("*.json"):
        assert str(tiny_qwen) not in path.read_text(), path.name
        assert str(saved.parent) not in path.read_text(), path.name


def test_what_the_manifest_says(saved):
    manifest = read_manifest(saved)
    assert manifest["schema_version"] == 1
    assert manifest["extra"] == {"laq": {"hash": "abc"}}
    assert set(manifest["versions"]) == {"lerobot_policy_hlrp", "torch", "transformers"}
    assert manifest["code_ids"]["<ACT_1>"] == manifest["code_ids"]["<ACT_0>"] + 1
    assert config_from_dict(manifest["backend"]).action_head.kind == "prefix_flow"


def test_a_folder_with_files_is_not_overwritten(saved, make_tiny_backend, tmp_path):
    with pytest.raises(ValueError, match="new or empty"):
        save_pretrained(make_tiny_backend(), saved)
    (tmp_path / "empty").mkdir()
    save_pretrained(make_tiny_backend(), tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_a_failed_save_leaves_nothing(make_tiny_backend, tmp_path, monkeypatch):
    monkeypatch.setattr("hlrp_core.bundle.save_tensors", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(make_tiny_backend(), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


# -- what is amiss ----------------------------------------------------------------------------------------------------


def backbone_files(saved: Path) -> list[str]:
    return sorted(path.name for path in (saved / "backbone").iterdir())


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_every_part_is_watched(damage, saved, tmp_path):
    for number, name in enumerate(backbone_files(saved)):
        copy = Path(shutil.copytree(saved, tmp_path / str(number)))
        part = copy / "backbone" / name
        if damage == "missing":
            part.unlink()
        else:
            part.write_bytes(part.read_bytes().replace(b"0", b"1") + b" ")
        with pytest.raises(BundleError, match=rf"backbone/{name}.*Next step") as error:
            load_backend(copy)
        assert "got none" in str(error.value) or "altered" in str(error.value)


def test_missing_folder_manifest_or_weights(folder, tmp_path):
    with pytest.raises(BundleError, match=r"hlrp\.json"):
        load_backend(tmp_path / "nowhere")
    (folder / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=WEIGHTS):
        load_backend(folder)
    (folder / "hlrp.json").unlink()
    with pytest.raises(BundleError, match=r"hlrp\.json"):
        load_backend(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"schema_version": 1}'])
def test_a_broken_manifest(content, folder):
    (folder / "hlrp.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"hlrp\.json"):
        load_backend(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_schema(version, folder):
    edit_manifest(folder, lambda m: m.update(schema_version=version))
    with pytest.raises(BundleError, match=rf"schema version 1, got {version!r}"):
        load_backend(folder)


def test_unknown_settings(folder):
    edit_manifest(folder, lambda m: m["backend"].update(magic=3))
    with pytest.raises(BundleError, match="magic"):
        load_backend(folder)


def test_a_manifest_may_not_point_outside(folder):
    (folder.parent / "secret.json").write_text("{}")
    edit_manifest(folder, lambda m: m["parts"].update({"../../secret.json": "0"}))
    with pytest.raises(BundleError, match=r"secret\.json"):
        load_backend(folder)


def test_other_code_ids(folder):
    edit_manifest(folder, lambda m: m["code_ids"].update({"<ACT_0>": m["code_ids"]["<ACT_1>"]}))
    with pytest.raises(BundleError, match="tokenizer: expected the code ids"):
        load_backend(folder)


def test_a_tokenizer_without_the_codes(folder, tiny_qwen):
    """As if someone had put the original tokenizer back, hash and all: the codes come back with the same ids."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_qwen / name, folder / "backbone" / name)
    digest = {
        name: hashlib.sha256((folder / "backbone" / name).read_bytes()).hexdigest()
        for name in ("tokenizer.json", "tokenizer_config.json")
    }
    edit_manifest(folder, lambda m: m["parts"].update(digest))
    backend = load_backend(folder)
    assert torch.equal(predictions(backend)[0], predictions(load_backend(folder))[0])


def test_other_vocabulary_rows(folder):
    edit_manifest(folder, lambda m: m.update(vocabulary_rows=700))
    with pytest.raises(BundleError, match="700 vocabulary rows"):
        load_backend(folder)


def test_truncated_or_altered_weights(folder):
    data = (folder / WEIGHTS).read_bytes()
    for damaged in (b"", data[:10], data[:-100], data[:-1] + bytes([data[-1] ^ 1])):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(BundleError, match=WEIGHTS + ".*altered"):
            load_backend(folder)


def test_weights_that_are_no_safetensors(folder):
    (folder / WEIGHTS).write_bytes(b"no weights")
    edit_manifest(folder, lambda m: m.update(weights=hashlib.sha256(b"no weights").hexdigest()))
    with pytest.raises(BundleError, match=WEIGHTS + ": expected a safetensors file.*Next step"):
        load_backend(folder)


def save_as_if_whole(tensors: dict, folder: Path) -> None:
    save_file(tensors, folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    edit_manifest(folder, lambda m: m.update(weights=digest))


def test_missing_unknown_and_misshapen_tensors(folder):
    tensors = load_file(folder / WEIGHTS)
    name = next(key for key in tensors if key.startswith("action_head."))
    for change, text in (
        (lambda t: t.pop(name), "1 missing .*" + name),
        (lambda t: t.update(surprise=torch.zeros(1)), "1 unknown .*surprise"),
        (lambda t: t.update({name: torch.zeros(3, 3, 3)}), name + " of shape"),
    ):
        damaged = dict(tensors)
        change(damaged)
        save_as_if_whole(damaged, folder)
        with pytest.raises(BundleError, match=text):
            load_backend(folder)


def test_the_weights_fix_the_codes(saved):
    config = config_from_dict(read_manifest(saved)["backend"])
    for change in (
        {"codebook_size": 9},
        {"code_seq_len": 3},
        {"token_scheme": TokenSchemeConfig(separator="")},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            build_saved_backend(saved, config=replace(config, **change))
    other = build_saved_backend(saved, config=replace(config, decoding="generate"))
    load_tensors(other, saved / WEIGHTS)
    assert other.latent_from_batch(fake_batch(other), mode=CODES).logits is None


def test_settings_that_are_not_the_saved_ones_are_told(saved, caplog):
    config = config_from_dict(read_manifest(saved)["backend"])
    with caplog.at_level("INFO"):
        build_saved_backend(saved, config=config)
        assert "Settings other" not in caplog.text
        changed = replace(config, decoding="generate", prompt=replace(config.prompt, system="Be brief."))
        build_saved_backend(saved, config=changed)
    assert "decoding='generate' (there 'constrained'); prompt.system='Be brief.' (there '')" in caplog.text


def test_a_new_action_head_on_old_weights_starts_fresh_and_is_listed(make_tiny_backend, tmp_path, caplog):
    backend = scramble(make_tiny_backend("qwen_chat"))
    save_pretrained(backend, tmp_path / "codes")
    head = ActionHeadConfig(kind="mlp", hidden_dim=32, num_layers=1, code_conditioning="tokens")
    grown = build_saved_backend(tmp_path / "codes", config=replace(backend.config, action_head=head))
    with pytest.raises(BundleError, match=r"missing .*action_head"):
        load_tensors(grown, tmp_path / "codes" / WEIGHTS)
    with caplog.at_level("INFO"):
        fresh = load_tensors(grown, tmp_path / "codes" / WEIGHTS, new_parts=("action_head.",))
    assert fresh
    assert set(fresh) == {f"action_head.{key}" for key in grown.action_head.state_dict()}
    assert all(name in caplog.text for name in fresh)
    assert torch.equal(predictions(grown, False)[0], predictions(backend, False)[0])


def test_a_laqs_code_vectors_travel_with_the_head(make_tiny_backend, tmp_path):
    backend = scramble(make_tiny_backend("qwen_chat", "laq", code_conditioning="soft"))
    loaded = load_backend(save_pretrained(backend, tmp_path / "saved"))
    assert torch.equal(loaded.action_head.codes.vectors, backend.action_head.codes.vectors)
    assert all(torch.equal(*pair) for pair in zip(predictions(loaded), predictions(backend), strict=True))


def test_settings_round_trip():
    config = BackendConfig(
        name="qwen_plain",
        image_size=48,
        prompt=PromptConfig(system="x", padding_side="right"),
        token_scheme=TokenSchemeConfig(code="[{}]"),
        action_head=ActionHeadConfig(kind="flow", code_conditioning="soft", head_dim=8),
        code_source="teacher",
        freeze_vision=True,
    )
    assert config_from_dict(json.loads(json.dumps(asdict(config)))) == config
