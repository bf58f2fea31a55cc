"""Backends of continuous latents, with either objective: any core and prompting, what action heads see, how they
travel."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from backend_helpers import ACTIONS, CODES, HEADS, MULTITASK, total_loss
from safetensors.torch import save_file

from hlrp_core import SamplingOptions, available_backends, make_backend, registry
from hlrp_core.backends.config import BackendConfig
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.backends.vector_backends import compose_vector_backend
from hlrp_core.bundle import build_saved_backend, load_backend, save_pretrained
from hlrp_core.heads import ActionHeadConfig
from hlrp_core.registry import BackendRecipe, get_recipe, register_backend
from hlrp_core.training import evaluate_codes

NAMES = [name for name in available_backends() if get_recipe(name).predicts_vectors]
OBJECTIVES = ("regression", "flow")
CODE_HEADS = [head for head in HEADS if head != "prefix_flow"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def seeded(seed: int = 0, **settings) -> SamplingOptions:
    return SamplingOptions(generator=torch.Generator().manual_seed(seed), **settings)


def scrambled(backend):
    with torch.no_grad():
        for parameter in [*backend.code_head.parameters(), *getattr(backend.action_head, "parameters", list)()]:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backend.eval()


def seen_by_the_head(backend) -> list:
    """Fills with what each call of the action head is given."""
    head, seen = backend.action_head, []

    def spy(method):
        def call(context, *args, **kwargs):
            seen.append(context)
            return method(context, *args, **kwargs)

        return call

    head.predict, head.per_sample_loss = spy(head.predict), spy(head.per_sample_loss)
    return seen


@pytest.mark.parametrize("prompting", ["chat", "plain"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_prompting(prompting, objective, monkeypatch, make_tiny_backend):
    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))

    def compose(config, core, is_new):
        return compose_vector_backend(config, core, prompting=prompting)

    register_backend("mine", BackendRecipe("qwen3_vl", compose, predicts_vectors=True))
    backend = make_tiny_backend("mine", image_size=48, vector_objective=objective).train()
    batch = fake_batch(backend)
    total_loss(backend, batch, CODES).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backend.code_head.parameters())
    assert backend.latent_from_batch(batch, mode=CODES).vector.shape == (3, 4, 2)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_predictions_are_in_the_laqs_units_and_not_quantised(name, objective, make_tiny_backend):
    offset = 100 + torch.randn(4, 8, 2)
    backend = make_tiny_backend(name, image_size=48, vector_objective=objective)
    moved = make_tiny_backend(name, image_size=48, vector_objective=objective)
    moved.code_head.table.set_vectors(5 * backend.code_vectors + offset[:, :1])
    batch = fake_batch(backend)
    latent = backend.latent_from_batch(batch, mode=CODES, sampling=seeded())
    other = moved.latent_from_batch(batch, mode=CODES, sampling=seeded())
    torch.testing.assert_close(other.vector, 5 * latent.vector + offset[:, 0], rtol=1e-4, atol=1e-3)
    assert total_loss(moved, batch, CODES).loss.item() == pytest.approx(
        total_loss(backend, batch, CODES).loss.item(), rel=1e-3
    )
    distance = (latent.vector[:, :, None] - backend.code_vectors).norm(dim=-1).amin(-1)
    assert distance.min() > 0


def test_a_flow_is_deterministic_under_a_seed(name, make_tiny_backend):
    backend = make_tiny_backend(name, "flow", image_size=48, vector_objective="flow")
    batch = fake_batch(backend)
    for predict in (
        lambda seed: backend.latent_from_batch(batch, mode=CODES, sampling=seeded(seed)).vector,
        lambda seed: backend.predict_action_chunk(batch, sampling=seeded(seed)).actions,
    ):
        assert torch.equal(predict(0), predict(0))
        assert not torch.equal(predict(0), predict(1))


def test_codes_have_no_probability(name, make_tiny_backend):
    backend = make_tiny_backend(name, image_size=48)
    batch = fake_batch(backend)
    with pytest.raises(ValueError, match=r"latent_log_prob: expected a backend that predicts codes.*Next step"):
        backend.latent_log_prob(batch, batch.target_codes)


# -- action heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", CODE_HEADS)
def test_a_head_sees_predicted_vectors_and_those_of_teacher_codes(head, make_tiny_backend):
    backend = scrambled(make_tiny_backend("qwen_vector_head", head, image_size=48))
    batch, table = fake_batch(backend), backend.code_head.table
    seen = seen_by_the_head(backend)
    expected = table.standardize(backend.latent_from_batch(batch, mode=CODES).vector)
    backend.predict_action_chunk(batch)
    backend.loss_from_batch(batch, mode=ACTIONS)
    for context in seen:
        torch.testing.assert_close(context.code_vectors, expected, atol=1e-4, rtol=1e-4)
        assert context.code_probs is None

    teacher = make_tiny_backend("qwen_vector_head", head, image_size=48, code_source="teacher")
    seen = seen_by_the_head(teacher)
    teacher.loss_from_batch(batch, mode=MULTITASK)
    labels = [[table.lookup(batch.target_codes)[b, s].tolist() for s in range(4)] for b in range(3)]
    assert torch.equal(seen[0].code_vectors, torch.tensor(labels))


@pytest.mark.parametrize("head", CODE_HEADS)
def test_the_vectors_decide_the_actions(head, make_tiny_backend):
    backend = scrambled(make_tiny_backend("qwen_vector_head", head, image_size=48))
    batch, noise = fake_batch(backend), torch.randn(3, 4, 2)
    before = backend.predict_action_chunk(batch, sampling=seeded(noise=noise)).actions
    backend.code_head.readout.bias.data += 1
    assert not torch.allclose(backend.predict_action_chunk(batch, sampling=seeded(noise=noise)).actions, before)


def test_predicting_codes_the_laq_head_has_a_table_and_predicting_vectors_it_needs_none(make_tiny_backend):
    of_codes = make_tiny_backend("qwen_latent_head", "laq", image_size=48)
    of_vectors = make_tiny_backend("qwen_vector_head", "laq", image_size=48)
    assert [name for name in of_codes.state_dict() if name.endswith("vectors")] == ["action_head.codes.vectors"]
    assert [name for name in of_vectors.state_dict() if name.endswith("vectors")] == ["code_head.table.vectors"]
    weights = of_codes.action_head.state_dict()
    del weights["codes.vectors"]
    of_vectors.action_head.load_state_dict(weights)  # the same decoder otherwise
    seen = seen_by_the_head(of_vectors)
    batch = fake_batch(of_vectors)
    teacher = replace(of_vectors.config, code_source="teacher")
    of_vectors.config, of_codes.config = teacher, replace(of_codes.config, code_source="teacher")
    losses = [backend.loss_from_batch(batch, mode=ACTIONS).loss.item() for backend in (of_codes, of_vectors)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert seen


@pytest.mark.parametrize(
    ("name", "head", "text"),
    [
        ("qwen_vector_head", {"code_conditioning": "tokens"}, r"expected 'vector' on backend 'qwen_vector_head'"),
        ("qwen_vector_head", {"code_conditioning": "soft"}, r"predicts vectors, got 'soft'"),
        ("qwen_vector_head", {"code_conditioning": "vector"}, r"code_vector_dim.*expected 2.*got None"),
        ("qwen_latent_head", {"code_conditioning": "vector", "code_vector_dim": 2}, r"predicts codes, got 'vector'"),
    ],
)
def test_action_heads_that_do_not_fit(name, head, text, tiny_qwen):
    vectors = torch.randn(4, 8, 2) if name == "qwen_vector_head" else None
    with pytest.raises(ValueError, match=text):
        make_backend(
            name,
            backbone=tiny_qwen,
            codebook_size=8,
            code_seq_len=4,
            code_vectors=vectors,
            action_head=ActionHeadConfig(kind="mlp", **head),
        )


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("qwen_vector_head", {}, r"code vectors of backend 'qwen_vector_head'.*got None.*code_vector_table"),
        ("qwen_vector_head", {"code_vectors": torch.zeros(4, 9, 2)}, r"expected \[4, 8, 2\].*got \[4, 9, 2\]"),
        ("qwen_latent_head", {"code_vector_dim": 2}, r"code_vector_dim: expected None on backend 'qwen_latent_head'"),
        ("qwen_vector_head", {"vector_objective": "diffusion"}, r"vector_objective: expected one of regression, flow"),
    ],
)
def test_backends_that_cannot_be(name, settings, text, tiny_qwen):
    with pytest.raises(ValueError, match=text):
        make_backend(name, backbone=tiny_qwen, codebook_size=8, code_seq_len=4, **settings)


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_evaluation_counts_the_nearest_codes(objective, make_tiny_backend):
    backend = scrambled(make_tiny_backend("qwen_vector_head", image_size=48, vector_objective=objective))
    batches = [fake_batch(backend, seed=seed) for seed in (0, 1)]
    state = torch.random.get_rng_state()
    result = evaluate_codes(backend, batches)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert evaluate_codes(backend, batches) == result  # the loss, which draws noise, included

    sampling = seeded()
    table, right, error, constant, labels = backend.code_vectors, 0, 0.0, 0.0, []
    vectors = []
    for batch in batches:
        vectors += [*backend.latent_from_batch(batch, mode=CODES, sampling=sampling).vector]
        labels += batch.target_codes.tolist()
    for s in range(4):
        truth = torch.stack([table[s, row[s]] for row in labels])
        for i, row in enumerate(labels):
            distances = [(vectors[i][s] - table[s, k]).square().sum().item() for k in range(8)]
            right += distances.index(min(distances)) == row[s]
            error += distances[row[s]]
            constant += (truth.mean(0) - truth[i]).square().sum().item()
    assert result.code_accuracy == pytest.approx(right / 24)
    assert result.vector_r2 == pytest.approx(1 - error / constant, rel=1e-4)
    assert "R²" in result.as_table()


# -- one folder -------------------------------------------------------------------------------------------------------


PROGRAM = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.bundle import load_backend
from hlrp_core.contract import BackendMode, SamplingOptions
folder = Path(sys.argv[1])
backend = load_backend(folder / "b")
batch = fake_batch(backend)
def seeded(): return SamplingOptions(generator=torch.Generator().manual_seed(0))
got = {"vector": backend.latent_from_batch(batch, mode=BackendMode.CODES, sampling=seeded()).vector,
       "actions": backend.predict_action_chunk(batch, sampling=seeded()).actions, "table": backend.code_vectors}
expected = load_file(folder / "expected.safetensors")
assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
print("equal")
"""


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bit_equal_in_a_fresh_process(objective, make_tiny_backend, tmp_path):
    backend = scrambled(make_tiny_backend("smol_vector_head", "laq", vector_objective=objective))
    batch = fake_batch(backend)
    expected = {
        "vector": backend.latent_from_batch(batch, mode=CODES, sampling=seeded()).vector,
        "actions": backend.predict_action_chunk(batch, sampling=seeded()).actions,
        "table": backend.code_vectors,
    }
    save_pretrained(backend, tmp_path / "b")
    save_file(expected, tmp_path / "expected.safetensors")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


def test_what_the_weights_fix(make_tiny_backend, tmp_path):
    backend = make_tiny_backend("qwen_vector_head", vector_objective="flow")
    save_pretrained(backend, tmp_path / "b")
    assert load_backend(tmp_path / "b").config == backend.config
    for change in ({"vector_objective": "regression"}, {"code_vector_dim": 3}):
        other = BackendConfig(**{**vars(backend.config), **change})
        with pytest.raises(ValueError, match=f"{next(iter(change))}: expected .* as in the checkpoint"):
            build_saved_backend(tmp_path / "b", config=other)
