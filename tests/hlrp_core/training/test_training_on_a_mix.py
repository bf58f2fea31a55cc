"""`train_codes` on several sources at once: the loss of all samples, and a run that goes on after a kill."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training_helpers import CONFIG, Power, make_batches, read_metrics, without_time

from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.contract import BackendMode
from hlrp_core.training import MixedBatches, train_codes
from hlrp_core.training.objective import TrainingObjective
from hlrp_core.training.rows import merge_batches, take_rows


def make_mix(backend, *, batch_size: int = 4) -> MixedBatches:
    """Two sources of other image sizes."""
    large = [fake_batch(backend, image_side=48, seed=10 + i) for i in range(3)]
    return MixedBatches(
        {"small": make_batches(backend), "large": large}, {"small": 3, "large": 1}, batch_size=batch_size, seed=1
    )


def test_a_mix_is_the_mean_over_its_samples(build):
    backend = build()
    objective = TrainingObjective(backend, BackendMode.CODES)
    batches = make_batches(backend, 2)
    parts = [take_rows(batches[0], 0, 2), batches[1], take_rows(batches[0], 2, 3)]
    (merged,) = merge_batches(parts)
    apart, together = objective(parts), objective([merged])
    assert apart.loss.item() == pytest.approx(together.loss.item(), rel=1e-5)
    assert apart.metrics["code_accuracy"] == pytest.approx(together.metrics["code_accuracy"])
    gradients = [torch.autograd.grad(loss.loss, backend.core.lm_head.weight)[0] for loss in (apart, together)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_killed_mix_continues_as_if_nothing_had_happened(build, tmp_path):
    backend = build()
    mix = make_mix(backend)
    held_out = {"small": make_batches(backend, 1), "large": mix.sources["large"][:2]}
    whole = train_codes(backend, mix, CONFIG, output_dir=tmp_path / "whole", eval_batches=held_out)
    records = read_metrics(tmp_path / "whole")

    drawn = [mix.draw(step) for step in range(6)]
    for record in records:
        if "drawn" in record:
            counts = {name: sum(step[name] for step in drawn[: record["step"]]) for name in mix.sources}
            assert {name: of["samples"] for name, of in record["drawn"].items()} == counts
            assert record["drawn"]["large"]["share"] == pytest.approx(counts["large"] / (4 * record["step"]))
    assert whole.drawn == records[-2]["drawn"]
    evaluation = records[-1]
    assert set(evaluation["by_source"]) == {"small", "large"}
    sizes = {name: figures["num_samples"] for name, figures in evaluation["by_source"].items()}
    assert evaluation["evaluation"]["num_samples"] == sum(sizes.values())
    expected = sum(evaluation["by_source"][name]["code_accuracy"] * size for name, size in sizes.items())
    assert evaluation["evaluation"]["code_accuracy"] == pytest.approx(expected / sum(sizes.values()))
    assert evaluation["by_source"]["large"]["constant_from"] == "training"

    broken = replace_source(mix, "small", Power(mix.sources["small"], 4))
    with pytest.raises(RuntimeError, match="power failure"):
        train_codes(build(), broken, CONFIG, output_dir=tmp_path / "killed", eval_batches=held_out)
    fresh = build(seed=17)
    continued = train_codes(fresh, make_mix(fresh), CONFIG, output_dir=tmp_path / "killed", eval_batches=held_out)
    for key, tensor in backend.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[key]), key
    assert (continued.evaluation, continued.by_source) == (whole.evaluation, whole.by_source)
    assert continued.drawn == whole.drawn
    assert without_time(read_metrics(tmp_path / "killed")) == without_time(records)


def replace_source(mix: MixedBatches, name: str, source) -> MixedBatches:
    return replace(mix, sources={**mix.sources, name: source})


def test_one_source_of_a_mix_is_that_source(build, tmp_path):
    backend, other = build(), build()
    batches = make_batches(backend)
    size = batches[0].batch_size
    train_codes(backend, batches, CONFIG, output_dir=tmp_path / "plain")
    mix = MixedBatches({"all": batches}, {"all": 0.5}, batch_size=size)
    train_codes(other, mix, CONFIG, output_dir=tmp_path / "mix")
    for key, tensor in backend.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
