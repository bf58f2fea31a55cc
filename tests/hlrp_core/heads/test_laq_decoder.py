"""The head that decodes the LAQ's own code vectors. S = 3, K = 6, D = 2."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hlrp_core.contract import SamplingOptions
from hlrp_core.heads import ActionContext, ActionHeadConfig, build_action_head, hand_over_code_vectors

SIZES = {"prefix_dim": None, "codebook_size": 6, "code_seq_len": 3}


def fresh(**settings):
    return build_action_head(ActionHeadConfig(kind="laq", code_conditioning="soft", **settings), **SIZES)


def test_soft_codes_are_expected_vectors(build, make_context) -> None:
    head, probs = build("laq"), make_context().code_probs
    one_hot = F.one_hot(torch.arange(6), 6).float()[:, None].expand(-1, 3, -1)  # (K, S, K)
    vectors = head.codes(one_hot)  # (K, S, D)
    torch.testing.assert_close(head.codes(probs), torch.einsum("bsk,ksd->bsd", probs, vectors))


def test_what_codes_mean_depends_on_the_vectors_geometry_alone(build, make_context) -> None:
    """Wherever a LAQ has its vectors, and of whatever size; but positions keep their relative weight."""
    head, context = build("laq"), make_context()
    expected = head.predict(context, SamplingOptions())
    raw = head.codes.vectors.clone()
    for offset, scale in ((0.0, 100.0), (5.0, 0.01)):
        head.codes.set_vectors(raw * scale + offset)
        torch.testing.assert_close(head.predict(context, SamplingOptions()), expected, atol=1e-4, rtol=1e-3)
    head.codes.set_vectors(raw * torch.tensor([1.0, 0.1, 1.0])[:, None, None])
    assert not torch.allclose(head.predict(context, SamplingOptions()), expected, atol=1e-3)


def test_vectors_are_saved_and_not_trained(build, make_context, actions) -> None:
    head = build("laq").train()
    assert "codes.vectors" in head.state_dict()
    assert not any("vectors" in name for name, _ in head.named_parameters())
    twin = fresh(**{k: v for k, v in vars(head.config).items() if k not in ("kind", "code_conditioning")})
    twin.load_state_dict(head.state_dict())
    context = make_context()
    head.eval(), twin.eval()
    assert torch.equal(head.predict(context, SamplingOptions()), twin.predict(context, SamplingOptions()))


def test_forgotten_vectors_cannot_pass_for_some(make_context) -> None:
    head = fresh(code_vector_dim=2)
    assert head.predict(replace(make_context(), state=None), SamplingOptions()).isnan().all()


def test_equal_vectors_say_nothing_and_break_nothing(make_context) -> None:
    head = fresh(code_vector_dim=2)
    head.codes.set_vectors(torch.zeros(3, 6, 2))  # an untrained learnt codebook
    assert head.predict(make_context(), SamplingOptions()).isfinite().all()


def test_vectors_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"code_vector_dim of action head 'laq'.*got None.*Next step"):
        fresh()
    head = fresh(code_vector_dim=2)
    with pytest.raises(ValueError, match=r"expected \[3, 6, 2\] \(S, K, D\), got \[3, 8, 2\].*Next step"):
        hand_over_code_vectors(head, torch.zeros(3, 8, 2))
    with pytest.raises(ValueError, match=r"got None.*code_vector_table"):
        hand_over_code_vectors(head, None)
    mlp = build_action_head(ActionHeadConfig(kind="mlp", code_conditioning="tokens"), **SIZES)
    for other in (mlp, None):
        with pytest.raises(ValueError, match=r"decodes them.*got neither"):
            hand_over_code_vectors(other, torch.zeros(3, 6, 2))


def test_near_codes_are_near_before_anything_is_learnt() -> None:
    """A number of 6 levels at each position, as finite scalar quantisation has it: neighbours generalise."""
    torch.manual_seed(0)
    config = ActionHeadConfig(
        kind="laq",
        code_conditioning="tokens",
        code_vector_dim=1,
        chunk_size=1,
        action_dim=1,
        hidden_dim=32,
        num_layers=1,
    )
    head = build_action_head(config, prefix_dim=None, codebook_size=6, code_seq_len=1)
    levels = torch.linspace(-1, 1, 6)
    head.codes.set_vectors(levels.view(1, 6, 1))
    seen = torch.tensor([0, 1, 3, 5])  # codes 2 and 4 never occur in training

    def context(codes):
        return ActionContext(code_probs=F.one_hot(codes, 6).float()[:, None])

    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(200):
        loss = head.per_sample_loss(context(seen), levels[seen].view(-1, 1, 1), None).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        predicted = head.predict(context(torch.tensor([2, 4])), SamplingOptions()).flatten()
    torch.testing.assert_close(predicted, levels[[2, 4]], atol=0.15, rtol=0)
