"""Pictures of a LAQ are drawn without touching the drawing of whoever asks for them."""

from __future__ import annotations

import importlib
import sys

import matplotlib
import pytest
import torch

from hlrp_core.laq import figures
from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.quantizer import LatentActionQuantizer

FIGURES = {
    "code_counts": [[3, 0, 1], [2, 2, 0]],
    "action_probe_r2": 0.9,
    "action_probe_r2_random": 0.3,
    "action_probe_r2_shuffled": -0.01,
}


@pytest.fixture
def backend():
    """One that is not chosen by default, as a notebook's is not."""
    matplotlib.use("svg")
    yield "svg"
    matplotlib.use("agg")


def test_the_backend_stays(backend):
    importlib.reload(figures)
    assert matplotlib.get_backend() == backend


@pytest.mark.parametrize("num_frames", [2, 3])
def test_all_is_drawn_without_pyplot(backend, num_frames, square_tuples, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it would fail
    importlib.reload(figures)
    torch.manual_seed(0)
    sizes = LAQConfig(image_size=16, hidden_dim=16, num_layers=1, frame_gap=1, num_frames=num_frames)
    _, held_out = square_tuples
    held_out = type(held_out)(held_out.frames, held_out.starts[:-1], 1, num_frames)
    paths = figures.draw_all(LatentActionQuantizer(sizes), held_out, FIGURES, folder=tmp_path / "new")
    assert [path.name for path in paths] == ["code_usage.png", "reconstructions.png", "action_probe.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3000 for path in paths)
    assert matplotlib.get_backend() == backend
