"""Every registered backend comes back bit for bit from its folder, in a process that knows nothing else of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from backend_helpers import CODES, conditioning_of
from safetensors.torch import load_file
from torch import Tensor

from hlrp_core import SamplingOptions
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.bundle import code_token_ids, save_pretrained
from hlrp_core.registry import get_recipe

# Arguments: a folder of saved backends, and the modules that register them.
PROGRAM = """
import importlib, json, sys
from pathlib import Path
from safetensors.torch import save_file
for module in sys.argv[2:]:
    importlib.import_module(module)
from hlrp_core.bundle import code_token_ids, load_backend
from test_backend_travels import predict_all
for folder in Path(sys.argv[1]).iterdir():
    backend = load_backend(folder)
    save_file(predict_all(backend), folder / "predicted.safetensors")
    (folder / "code_ids.json").write_text(json.dumps(code_token_ids(backend)))
"""


@dataclass(frozen=True)
class Traveller:
    """A backend before it was saved, and the folder in which the other process put what came out of it there."""

    predicted: dict[str, Tensor]
    code_ids: dict[str, int]
    folder: Path


def predict_all(backend: ComposedBackend) -> dict[str, Tensor]:
    """All that it predicts of a batch of fixed data."""
    batch = fake_batch(backend)
    latent = backend.latent_from_batch(batch, mode=CODES, sampling=seeded())
    actions = backend.predict_action_chunk(batch, sampling=seeded()).actions
    found = {"tokens": latent.tokens, "logits": latent.logits, "vector": latent.vector, "actions": actions}
    return {key: tensor.contiguous() for key, tensor in found.items() if tensor is not None}


def seeded() -> SamplingOptions:
    return SamplingOptions(generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def travellers(request, tmp_path_factory, make_tiny_backend, tiny_backbone) -> dict[str, Traveller]:
    """Of the names that this run selects. One process for all of them, because it costs seconds."""
    items = [item for item in request.session.items if item.module is request.module]
    names = sorted({item.callspec.params["name"] for item in items})
    sources, saved = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("saved")
    found = {}
    for name in names:
        backbone = shutil.copytree(tiny_backbone(get_recipe(name).family), sources / name)
        # an action head that sees all there is: the prefix and the codes
        settings = {"code_conditioning": conditioning_of(name), "backbone": backbone}
        backend = make_tiny_backend(name, "prefix_flow", image_size=48, **settings)
        with torch.no_grad():
            for parameter in backend.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        found[name] = Traveller(predict_all(backend), code_token_ids(backend), save_pretrained(backend, saved / name))
    shutil.rmtree(sources)
    modules = sorted({get_recipe(name).compose.__module__ for name in names})
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}){PROGRAM}"
    run = subprocess.run([sys.executable, "-c", program, str(saved), *modules], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return found


def test_bit_equal_in_a_fresh_process_after_the_sources_are_deleted(name, travellers):
    traveller = travellers[name]
    loaded = load_file(traveller.folder / "predicted.safetensors")
    assert loaded.keys() == traveller.predicted.keys()
    for key, tensor in traveller.predicted.items():
        assert tensor.isfinite().all()
        assert torch.equal(loaded[key], tensor), key
    assert json.loads((traveller.folder / "code_ids.json").read_text()) == traveller.code_ids
