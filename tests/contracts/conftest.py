"""Every registered backend, and how the contract suite builds it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hlrp_core import available_backends
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.heads import flow


@pytest.fixture(params=available_backends())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build(name: str, make_tiny_backend: Callable) -> Callable[..., ComposedBackend]:
    def build(head: str | None = None, **settings) -> ComposedBackend:
        return make_tiny_backend(name, head, **{"image_size": 48, **settings})

    return build


@pytest.fixture
def alike_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample of a flow gets the same noise and time, wherever it stands in a batch of whatever size."""

    def noise_of(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape[1:], generator=torch.Generator().manual_seed(0)).expand(shape)

    drawn = flow.FlowHead._starting_noise

    def starting_noise(self, batch_size, sampling):
        if sampling.noise is not None:
            return drawn(self, batch_size, sampling)
        return noise_of(torch.Size([batch_size, self.config.chunk_size, self.config.action_dim])).clone()

    monkeypatch.setattr(flow.FlowHead, "_starting_noise", starting_noise)
    monkeypatch.setattr(flow, "sample_times", lambda num_times, **_: torch.full((num_times,), 0.7))
    monkeypatch.setattr(torch, "randn_like", lambda tensor: noise_of(tensor.shape))
