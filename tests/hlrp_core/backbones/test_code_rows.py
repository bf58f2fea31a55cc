"""Frozen vocabulary tables with trainable code rows = training the tables, as far as these rows go."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.bundle import WEIGHTS, build_saved_backend, load_backend, load_tensors, save_pretrained
from hlrp_core.codes.decoding import make_decoder
from hlrp_core.contract import BackendMode
from hlrp_core.registry import available_backends
from hlrp_core.training.objective import TrainingObjective

CODES = BackendMode.CODES
FAMILIES = {"qwen_chat": True, "smol_plain": False}  # whether the tables of the tiny checkpoint are tied


@pytest.fixture(scope="module")
def build(make_tiny_backend: Callable) -> Callable[..., ComposedBackend]:
    return lambda name, head=None, **settings: make_tiny_backend(
        name, head, **{"train_vocabulary": "code_rows", **settings}
    )


def tables(backend: ComposedBackend) -> list[torch.nn.Parameter]:
    return [backend.core.model.get_input_embeddings().weight, backend.core.lm_head.weight]


def others(backend: ComposedBackend) -> Tensor:
    """Which rows of a table belong to no code token."""
    mask = torch.ones(tables(backend)[0].shape[0], dtype=torch.bool)
    mask[backend.code_head.vocabulary.ids] = False
    return mask


def take_steps(backend: ComposedBackend, num_steps: int = 3) -> ComposedBackend:
    trained = [p for p in backend.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for _ in range(num_steps):
        backend.train().loss_from_batch(fake_batch(backend), mode=CODES).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return backend.eval()


def decode(backend: ComposedBackend, decoding: str) -> Tensor:
    backend.code_head.decoder = make_decoder(decoding, backend.code_head.vocabulary)
    output = backend.latent_from_batch(fake_batch(backend), mode=CODES)
    return output.tokens if decoding != "free" else output.meta["unparsed"]


@pytest.mark.parametrize("objective", ["completion", "codes_only", "restricted"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_equal_those_of_the_whole_tables(name, objective, build):
    rows = build(name, code_objective=objective).train()
    whole = build(name, code_objective=objective, train_vocabulary="all").train()
    assert (tables(rows)[0] is tables(rows)[1]) == FAMILIES[name]
    losses = []
    for backend in (rows, whole):
        losses.append(backend.loss_from_batch(fake_batch(backend), mode=CODES).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    ids = rows.code_head.vocabulary.ids
    for mine, table in zip((rows.core.code_rows.embedding, rows.core.code_rows.projection), tables(whole), strict=True):
        assert float(table.grad[ids].abs().max()) > 1e-3
        torch.testing.assert_close(mine.grad, table.grad[ids], rtol=1e-5, atol=1e-5)
    reference = dict(whole.named_parameters())
    for key, parameter in rows.named_parameters():
        if parameter.requires_grad and "code_rows" not in key and reference[key].grad is not None:
            torch.testing.assert_close(parameter.grad, reference[key].grad, rtol=1e-5, atol=1e-5)
    assert all(table.grad is None and not table.requires_grad for table in tables(rows))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_optimizer_holds_and_changes_the_code_rows_alone(name, build):
    backend = build(name)
    before = [table.detach().clone() for table in tables(backend)]
    trained = {name: p for name, p in backend.named_parameters() if p.requires_grad}
    of_vocabulary = [p for name, p in trained.items() if p.shape[0] in (10, len(before[0])) and p.ndim == 2]
    assert [tuple(p.shape) for p in of_vocabulary] == [(10, backend.core.hidden_dim)] * (1 if FAMILIES[name] else 2)
    take_steps(backend)
    backend.state_dict()  # brings the tables up to date
    rest = others(backend)
    for table, old, mine in zip(
        tables(backend), before, (backend.core.code_rows.embedding, backend.core.code_rows.projection), strict=True
    ):
        assert torch.equal(table[rest], old[rest])
        assert torch.equal(table[~rest], mine)
        assert (table[~rest] != old[~rest]).any(1).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_is_an_ordinary_one(name, build, tmp_path):
    """Loaded to train its whole tables it decodes the same, in every way, and so it does loaded as it was."""
    backend = take_steps(build(name))
    rows_logits = backend.latent_from_batch(fake_batch(backend), mode=CODES).logits
    save_pretrained(backend, tmp_path / "b")
    assert not any("code_rows" in key for key in load_file(tmp_path / "b" / WEIGHTS))
    loaded = load_backend(tmp_path / "b")
    assert loaded.config.train_vocabulary == "code_rows"
    assert not any(table.requires_grad for table in tables(loaded))
    whole = build_saved_backend(tmp_path / "b", config=replace(backend.config, train_vocabulary="all"))
    load_tensors(whole, tmp_path / "b" / WEIGHTS)
    assert all(table.requires_grad for table in tables(whole))
    for other in (loaded, whole.eval()):
        assert torch.equal(other.latent_from_batch(fake_batch(other), mode=CODES).logits, rows_logits)
    for decoding in ("generate", "constrained", "free"):
        mine, again, reference = (decode(each, decoding) for each in (backend, loaded, whole))
        assert str(mine) == str(again) == str(reference), decoding
    assert torch.equal(decode(backend, "generate"), decode(backend, "constrained"))


def test_in_a_fresh_process(build, tmp_path):
    backend = take_steps(build("qwen_chat"))
    save_pretrained(backend, tmp_path / "b")
    save_file({"logits": backend.latent_from_batch(fake_batch(backend), mode=CODES).logits}, tmp_path / "expected")
    program = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.bundle import load_backend
from hlrp_core.contract import BackendMode
folder = Path(sys.argv[1])
backend = load_backend(folder / "b")
logits = backend.latent_from_batch(fake_batch(backend), mode=BackendMode.CODES).logits
assert torch.equal(logits, load_file(folder / "expected")["logits"])
assert not backend.core.lm_head.weight.requires_grad and backend.core.code_rows.embedding.requires_grad
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


def test_the_models_own_state_dict_has_the_trained_rows(build):
    """What `backend.core.model.save_pretrained` writes: transformers' own class knows nothing of ours."""
    backend = take_steps(build("smol_plain"))
    model = type(backend.core.model)(backend.core.model.config)
    model.load_state_dict(backend.core.model.state_dict())
    ids = torch.cat([torch.arange(20), backend.code_head.vocabulary.ids])[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, backend.core.model(input_ids=ids).logits)


def test_under_autocast(build):
    rows, whole = build("qwen_chat").train(), build("qwen_chat", train_vocabulary="all").train()
    for backend in (rows, whole):
        with torch.autocast("cpu", torch.bfloat16):
            backend.loss_from_batch(fake_batch(backend), mode=CODES).loss.backward()
    gradients = [rows.core.code_rows.embedding.grad, tables(whole)[0].grad[whole.code_head.vocabulary.ids]]
    assert gradients[0].dtype == torch.float32
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02 * float(gradients[1].abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_on_several_devices_every_parameter_gets_its_gradient(name, build, tmp_path):
    """DistributedDataParallel as hlrp-train-codes uses it: a second step fails if the first left one out."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        objective = TrainingObjective(build(name).train(), BackendMode.CODES)
        wrapped = torch.nn.parallel.DistributedDataParallel(objective)
        for _ in range(2):
            wrapped([fake_batch(objective.backend)]).loss.backward()
        assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()


def test_a_copy_is_a_model_of_its_own(build):
    backend = build("qwen_chat").eval()
    before = backend.latent_from_batch(fake_batch(backend), mode=CODES).logits
    twin = copy.deepcopy(backend)
    take_steps(twin)
    assert torch.equal(backend.latent_from_batch(fake_batch(backend), mode=CODES).logits, before)
    assert not torch.equal(twin.latent_from_batch(fake_batch(twin), mode=CODES).logits, before)


@pytest.mark.parametrize("objective", ["completion", "restricted"])
@pytest.mark.parametrize("name", FAMILIES)
def test_they_learn_on_a_frozen_backbone(name, objective, build):
    """Nothing else of the loss on codes could."""
    backend = build(name, freeze_backbone=True, code_objective=objective)
    trained = {key for key, p in backend.named_parameters() if p.requires_grad}
    assert trained == {"core.code_rows.embedding", *([] if FAMILIES[name] else ["core.code_rows.projection"])}
    frozen = {key: p.detach().clone() for key, p in backend.core.model.named_parameters()}
    before = backend.loss_from_batch(fake_batch(backend), mode=CODES).loss.item()
    take_steps(backend, 6)
    assert backend.loss_from_batch(fake_batch(backend), mode=CODES).loss.item() < before
    assert all(p.grad is None and torch.equal(p, frozen[key]) for key, p in backend.core.model.named_parameters())


def test_actions_leave_them_alone_on_a_frozen_backbone(build):
    """The prompt has no code token, and a gradient of zeros would cost a backward through the whole backbone."""
    backend = build("qwen_chat", head="prefix_flow", freeze_backbone=True).train()
    backend.loss_from_batch(fake_batch(backend), mode=BackendMode.ACTIONS).loss.backward()
    assert backend.core.code_rows("embedding").grad is None
    assert any(p.grad is not None for p in backend.action_head.parameters())


@pytest.mark.parametrize("name", [name for name in available_backends() if name.endswith("_head")])
def test_a_head_on_hidden_states_has_no_code_rows(name, make_tiny_backend):
    with pytest.raises(ValueError, match=r"train_vocabulary: expected 'all' with \w+.*Next step"):
        make_tiny_backend(name, train_vocabulary="code_rows")


def test_another_name_is_refused(make_tiny_backend):
    with pytest.raises(ValueError, match=r"train_vocabulary: expected one of all, code_rows, got 'rows'"):
        make_tiny_backend("qwen_chat", train_vocabulary="rows")


@pytest.mark.parametrize("policy_type", ["hlrp_qwen", "hlrp_smolvlm"])
def test_adapters_carry_the_code_rows_and_no_table(
    policy_type, tmp_path, make_tiny_policy, make_lerobot_batch, listed_labels
):
    peft = pytest.importorskip("peft")
    labels = listed_labels([[0, 1, 2, 3], [4, 5, 6, 7], [1, 1, 0, 2]])
    policy = make_tiny_policy(policy_type, "codes", labels=labels, train_vocabulary="code_rows")
    policy.save_pretrained(tmp_path / "base")
    policy.config.pretrained_path = tmp_path / "base"
    batch = make_lerobot_batch()
    before = policy.predict_codes(batch).logits
    wrapped = policy.wrap_with_peft(peft_cli_overrides={"r": 4})
    optimizer = torch.optim.AdamW(wrapped.get_optim_params(), lr=1e-2)
    rows_before = policy.backend.core.code_rows("embedding").detach().clone()
    for _ in range(2):
        wrapped(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (policy.backend.core.code_rows("embedding") != rows_before).any(1).all()
    wrapped.eval()
    trained = policy.predict_codes(batch)
    assert not torch.equal(trained.logits, before)
    policy.backend.code_head.decoder = make_decoder("generate", policy.backend.code_head.vocabulary)
    assert torch.equal(policy.predict_codes(batch).tokens, trained.tokens)

    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = load_file(Path(tmp_path / "adapter") / "adapter_model.safetensors")
    assert not any("embed_tokens" in key or "lm_head" in key for key in adapter)
    assert any("code_rows" in key for key in adapter)
    loaded = type(policy).from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(loaded, str(tmp_path / "adapter")).eval()
    assert torch.equal(again.predict_codes(batch).logits, trained.logits)
