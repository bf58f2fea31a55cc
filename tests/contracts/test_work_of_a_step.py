"""What a training step does, of every backend: each image once, nothing known anew, and nothing that no one reads."""

from __future__ import annotations

from collections import Counter

import pytest
from backend_helpers import ACTIONS, HEADS, MULTITASK, total_loss

from hlrp_core.backends.fake_batch import fake_batch


@pytest.fixture
def counted(build, monkeypatch):
    """A backend in training, and how often its parts are called, with the images that the image processor was given."""
    backend, counts = build("prefix_flow").train(), Counter()

    def count(owner, name, amount):
        function = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[name] += amount(*args, **kwargs)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    core = backend.core
    processor = core.processor.image_processor
    count(processor, "preprocess", lambda *_, **__: 1)
    count(core, "images_for_processor", lambda images, _: len(images))
    count(core, "build_positions", lambda *_: 1)
    if core.family == "qwen3_vl":
        count(core.model.model.visual, "_interpolation_table", lambda *_: 1)
    return backend, counts


def test_one_processor_call_a_batch_and_each_image_once(counted):
    backend, counts = counted
    for step, size in enumerate((3, 2)):
        counts.clear()
        backend.loss_from_batch(fake_batch(backend, batch_size=size, seed=step), mode=MULTITASK).loss.backward()
        assert counts["preprocess"] == 1
        assert counts["images_for_processor"] == size


def test_positions_and_vision_tables_are_computed_once(counted):
    backend, counts = counted
    backend.loss_from_batch(fake_batch(backend, seed=0), mode=MULTITASK)
    first = Counter(counts)
    assert first["build_positions"] > 0
    assert first["_interpolation_table"] > 0 or backend.core.family != "qwen3_vl"
    for seed in (1, 2):  # other images, the same sizes and instructions
        backend.loss_from_batch(fake_batch(backend, seed=seed), mode=MULTITASK)
    for name in ("build_positions", "_interpolation_table"):
        assert counts[name] == first[name], name


@pytest.mark.parametrize("head", HEADS)
def test_a_backbone_that_no_one_reads_does_not_run(build, head, monkeypatch):
    """A head on teacher codes alone is trained without it; with any other head or mode it runs."""
    backend = build(head, code_source="teacher").train()
    batch, runs = fake_batch(backend), []
    backend.core.register_forward_pre_hook(lambda *_: runs.append("core"))
    encode = backend.prompting.encode
    monkeypatch.setattr(
        backend.prompting, "encode", lambda *args, **kwargs: runs.append("prompt") or encode(*args, **kwargs)
    )
    total_loss(backend, batch, ACTIONS).loss.backward()
    assert runs == (["prompt", "core"] if backend.action_head.needs_prefix else [])
    runs.clear()
    total_loss(backend, batch, MULTITASK)
    assert runs == ["prompt", "core"]
    predicted = build(head).train()  # code_source=predicted
    predicted.core.register_forward_pre_hook(lambda *_: runs.append("core"))
    runs.clear()
    total_loss(predicted, batch, ACTIONS)
    assert "core" in runs
