"""Every registered backend, and how the contract suite builds it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hlrp_core import available_backends
from hlrp_core.backends.composed import ComposedBackend


@pytest.fixture(params=available_backends())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build(name: str, make_tiny_backend: Callable) -> Callable[..., ComposedBackend]:
    def build(head: str | None = None, **settings) -> ComposedBackend:
        return make_tiny_backend(name, head, **{"image_size": 48, **settings})

    return build
