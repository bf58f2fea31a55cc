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
from hlrp_core.registry import get_recipe, make_backend

# Arguments: a folder of saved backends, JSON of pretrained backbones by name, and the modules that register them.
PROGRAM = """
import importlib, json, sys
from pathlib import Path
from safetensors.torch import save_file
for module in sys.argv[3:]:
    importlib.import_module(module)
from hlrp_core.bundle import code_token_ids, load_backend
from test_backend_travels import make_vocabulary, predict_all
for folder in Path(sys.argv[1]).iterdir():
    backend = load_backend(folder)
    save_file(predict_all(backend), folder / "predicted.safetensors")
    (folder / "code_ids.json").write_text(json.dumps(code_token_ids(backend)))
for name, backbone in json.loads(sys.argv[2]).items():
    save_file(make_vocabulary(name, backbone), Path(sys.argv[1]) / name / "vocabulary.safetensors")
"""


@dataclass(frozen=True)
class Traveller:
    """A backend before it was saved, and the folder in which the other process put what came out of it there."""

    predicted: dict[str, Tensor]
    code_ids: dict[str, int]
    vocabulary: dict[str, Tensor]
    folder: Path


def predict_all(backend: ComposedBackend) -> dict[str, Tensor]:
    """All that it predicts of a batch of fixed data."""
    batch = fake_batch(backend)
    latent = backend.latent_from_batch(batch, mode=CODES, sampling=seeded())
    actions = backend.predict_action_chunk(batch, sampling=seeded()).actions
    found = {"tokens": latent.tokens, "logits": latent.logits, "vector": latent.vector, "actions": actions}
    return {key: tensor.contiguous() for key, tensor in found.items() if tensor is not None}


def make_vocabulary(name: str, backbone: str | Path) -> dict[str, Tensor]:
    """Ids of the code tokens, and the embeddings that they start with, of a backend that is made anew."""
    settings: dict = {"codebook_size": 8, "code_seq_len": 4}
    if get_recipe(name).predicts_vectors:
        settings["code_vectors"] = torch.zeros(4, 8, 2)
    backend = make_backend(name, backbone=backbone, **settings)
    ids = torch.tensor(list(code_token_ids(backend).values()), dtype=torch.long)
    return {"ids": ids, "rows": backend.core.model.get_input_embeddings().weight.detach()[ids].clone()}


def seeded() -> SamplingOptions:
    return SamplingOptions(generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def travellers(request, tmp_path_factory, make_tiny_backend, tiny_backbone) -> dict[str, Traveller]:
    """Of the names that this run selects. One process for all of them, because it costs seconds."""
    items = [item for item in request.session.items if item.module is request.module]
    names = sorted({item.callspec.params["name"] for item in items})
    sources, saved = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("saved")
    pretrained = {name: str(tiny_backbone(get_recipe(name).family)) for name in names}
    found = {}
    for name in names:
        backbone = shutil.copytree(tiny_backbone(get_recipe(name).family), sources / name)
        # an action head that sees all there is: the prefix and the codes
        settings = {"code_conditioning": conditioning_of(name), "backbone": backbone}
        backend = make_tiny_backend(name, "prefix_flow", image_size=48, **settings)
        with torch.no_grad():
            for parameter in backend.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        folder = save_pretrained(backend, saved / name)
        vocabulary = make_vocabulary(name, pretrained[name])
        found[name] = Traveller(predict_all(backend), code_token_ids(backend), vocabulary, folder)
    shutil.rmtree(sources)
    modules = sorted({get_recipe(name).compose.__module__ for name in names})
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}){PROGRAM}"
    command = [sys.executable, "-c", program, str(saved), json.dumps(pretrained), *modules]
    run = subprocess.run(command, capture_output=True, text=True)
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


def test_another_process_makes_the_same_vocabulary(name, travellers):
    """By itself, from the same pretrained model: token ids, and the rows that training starts from."""
    traveller = travellers[name]
    made = load_file(traveller.folder / "vocabulary.safetensors")
    for key, tensor in traveller.vocabulary.items():
        assert torch.equal(made[key], tensor), key
