"""`--policy.code_conditioning`: what an action head sees of the codes, in training and in prediction."""

from __future__ import annotations

import draccus
import pytest
import torch
import torch.nn.functional as F

from hlrp_core.contract import SamplingOptions
from hlrp_core.heads import ActionContext
from lerobot_hlrp.configuration_hlrp_qwen import HLRPQwenConfig

CODES = [[1, 2, 3, 4], [0, 7, 0, 7], [5, 5, 6, 6]]
HEADS = ("mlp", "flow", "laq")
PREDICTORS = (("chat", "tokens"), ("plain", "latent"))


@pytest.fixture
def make_policy(make_tiny_policy, listed_labels):
    def make(head: str, conditioning: str, predictor: tuple[str, str] = PREDICTORS[0], **settings):
        prompting, code_head = predictor
        policy = make_tiny_policy(
            labels=listed_labels(CODES),
            action_head=head,
            code_conditioning=conditioning,
            prompting=prompting,
            code_head=code_head,
            **settings,
        )
        with torch.no_grad():  # codes that are neither certain nor all alike
            for name, parameter in policy.backend.action_head.named_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter)) if "time" not in name else None
        return policy

    return make


def seen_by_the_head(policy) -> list[torch.Tensor]:
    """Fills with the `code_probs` that each call of the action head gets."""
    head, seen = policy.backend.action_head, []

    def spy(method):
        def call(context, *args, **kwargs):
            seen.append(context.code_probs)
            return method(context, *args, **kwargs)

        return call

    head.predict, head.per_sample_loss = spy(head.predict), spy(head.per_sample_loss)
    return seen


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("conditioning", ["tokens", "soft"])
@pytest.mark.parametrize("head", HEADS)
def test_a_head_sees_in_training_what_it_sees_later(head, conditioning, predictor, make_policy, make_lerobot_batch):
    policy, batch = make_policy(head, conditioning, predictor), make_lerobot_batch()
    seen = seen_by_the_head(policy)
    latent = policy.predict_codes(batch)
    soft, hard = F.softmax(latent.logits, dim=-1), F.one_hot(latent.tokens, 8).float()
    expected = soft if conditioning == "soft" else hard

    policy.eval()
    noise = torch.randn(3, 4, 2)
    actions = policy.predict_action_chunk(batch, noise=noise)
    policy.train()
    loss, _ = policy(batch)
    loss.backward()
    assert len(seen) == 2
    for code_probs in seen:
        assert code_probs.shape == (3, 4, 8)
        torch.testing.assert_close(code_probs, expected, atol=1e-5, rtol=1e-4)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.backend.action_head.parameters())

    context = ActionContext(state=batch["observation.state"], code_probs=expected)
    with torch.no_grad():
        again = policy.backend.action_head.eval().predict(context, SamplingOptions(noise=noise))
        other = ActionContext(state=context.state, code_probs=hard if conditioning == "soft" else soft)
        changed = policy.backend.action_head.predict(other, SamplingOptions(noise=noise))
    torch.testing.assert_close(actions, again, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(changed, again, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["tokens", "soft"])
@pytest.mark.parametrize("head", HEADS)
def test_teacher_codes_in_training_and_predicted_ones_later(head, conditioning, make_policy, make_lerobot_batch):
    policy, batch = make_policy(head, conditioning, code_source="teacher"), make_lerobot_batch()
    seen = seen_by_the_head(policy)
    policy.train()(batch)
    assert torch.equal(seen[0], F.one_hot(torch.tensor(CODES), 8).float())  # a label is certain, with `soft` too
    policy.eval().predict_action_chunk(batch)
    latent = policy.predict_codes(batch)
    expected = F.softmax(latent.logits, -1) if conditioning == "soft" else F.one_hot(latent.tokens, 8).float()
    torch.testing.assert_close(seen[1], expected, atol=1e-5, rtol=1e-4)


def test_it_is_a_flag_and_travels(tmp_path, make_policy, make_lerobot_batch):
    assert draccus.parse(HLRPQwenConfig, args=["--code_conditioning=soft"]).code_conditioning == "soft"
    policy, batch, noise = make_policy("flow", "soft").eval(), make_lerobot_batch(), torch.randn(3, 4, 2)
    policy.save_pretrained(tmp_path)
    loaded = type(policy).from_pretrained(tmp_path)
    assert loaded.backend.action_head.config.code_conditioning == "soft"
    assert torch.equal(loaded.predict_action_chunk(batch, noise=noise), policy.predict_action_chunk(batch, noise=noise))


def test_what_cannot_be(make_policy):
    with pytest.raises(ValueError, match=r"code_conditioning: expected one of .*tokens.*got 'hard'"):
        make_policy("mlp", "hard")
    with pytest.raises(ValueError, match=r"code_conditioning of action head 'mlp'.*got 'none'"):
        make_policy("mlp", "none")
    with pytest.raises(ValueError, match=r"code_conditioning=soft.*decoding=constrained"):
        make_policy("mlp", "soft", decoding="generate")
