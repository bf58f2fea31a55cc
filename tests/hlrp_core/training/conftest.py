"""A backend to train, and an accelerate that forgets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from accelerate.state import AcceleratorState

from hlrp_core.backends.composed import ComposedBackend


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Accelerate keeps its precision for a process's whole life."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def build(make_tiny_backend: Callable) -> Callable[..., ComposedBackend]:
    return lambda *args, **settings: make_tiny_backend(*(args or ("qwen_plain",)), image_size=24, **settings)
