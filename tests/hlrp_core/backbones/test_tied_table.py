"""One gradient for the two uses of a tied table = what autograd makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hlrp_core.backbones.tied_table import one_gradient
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.contract import BackendMode

IDS = torch.tensor([[3, 3, 7, 0], [0, 9, 3, 1]])  # repeated ones, and padding
LABELS = torch.tensor([5, 3])


@pytest.fixture
def tables() -> tuple[nn.Embedding, nn.Linear]:
    torch.manual_seed(0)
    embedding, projection = nn.Embedding(10, 4, padding_idx=0), nn.Linear(4, 10, bias=False)
    projection.weight = embedding.weight
    return embedding, projection


def loss(embedding: nn.Embedding, weight: torch.Tensor) -> torch.Tensor:
    hidden = embedding(IDS).sin().mean(1)  # (2, 4)
    return F.cross_entropy(hidden @ weight.T, LABELS)


def test_value_and_gradient_are_equal_and_accumulate(tables):
    twin = copy.deepcopy(tables[0])
    for _ in range(2):  # a second backward adds to the first one's gradient
        reference = loss(twin, twin.weight)
        reference.backward()
        with one_gradient(*tables) as weight:
            ours = loss(tables[0], weight)
        ours.backward()
        assert torch.equal(ours, reference)
        torch.testing.assert_close(tables[0].weight.grad, twin.weight.grad, rtol=0, atol=1e-7)
    assert not tables[0].weight.grad.is_sparse


@pytest.mark.parametrize("use", ["lookup", "projection"])
def test_a_loss_through_one_use_alone(tables, use):
    embedding, projection = tables
    twin = copy.deepcopy(embedding)
    hidden = torch.randn(3, 4)
    with one_gradient(embedding, projection) as weight:
        ours = embedding(IDS).square().sum() if use == "lookup" else (hidden @ weight.T).square().sum()
    ours.backward()
    (twin(IDS).square().sum() if use == "lookup" else (hidden @ twin.weight.T).square().sum()).backward()
    torch.testing.assert_close(embedding.weight.grad, twin.weight.grad, rtol=0, atol=1e-6)
    assert not embedding.weight.grad.is_sparse


def test_lookups_outside_are_ordinary_ones_even_after_an_error(tables):
    embedding, projection = tables
    with pytest.raises(KeyError), one_gradient(embedding, projection):
        raise KeyError
    embedding(IDS).sum().backward()
    assert not embedding.weight.grad.is_sparse
    assert not embedding._forward_hooks


def test_tables_that_are_apart_frozen_or_not_learning_stay_as_they_are(tables):
    embedding, projection = tables
    apart = nn.Linear(4, 10, bias=False)
    with one_gradient(embedding, apart) as weight:
        assert weight is apart.weight
        assert not embedding._forward_hooks
    with torch.no_grad(), one_gradient(embedding, projection) as weight:
        assert weight is projection.weight
    embedding.weight.requires_grad_(False)
    with one_gradient(embedding, projection) as weight:
        assert weight is projection.weight


@pytest.mark.parametrize("name", ["qwen_chat", "smol_plain"])
def test_a_loss_without_gradient_leaves_the_backend_as_it_was(name, make_tiny_backend):
    """As an evaluation between two training steps does."""
    backend = make_tiny_backend(name)
    names = [key for key, _ in backend.named_parameters()]
    for is_training in (False, True, False, True):
        with torch.set_grad_enabled(is_training):
            loss = backend.loss_from_batch(fake_batch(backend), mode=BackendMode.CODES).loss
        assert loss.requires_grad == is_training
        assert [key for key, _ in backend.named_parameters()] == names
        assert "_shared_projection" not in backend.core._parameters
