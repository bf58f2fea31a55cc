from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.backends.losses import MaskedLoss, combine_losses
from hlrp_core.contract import OBJECTIVES, ActionBatch, BackendMode, FoundationBatch
from hlrp_core.training import MixedBatches
from hlrp_core.training.mixing import MixedStream, open_stream
from hlrp_core.training.objective import TrainingObjective, join_losses
from hlrp_core.training.rows import merge_batches, take_rows


def batch(names: list[str], side: int = 2, **settings) -> FoundationBatch:
    frames = torch.zeros(len(names), 1, side, side, 3, dtype=torch.uint8)
    return FoundationBatch(frames, names, **settings)


class Counting:
    """Passes over `size` samples `<name><pass>.<place>`, in batches of 3; remembers where it was asked to begin."""

    def __init__(self, name: str, size: int, side: int = 2):
        self.name, self.size, self.side = name, size, side
        self.calls: list[tuple[int, int]] = []

    def read_from(self, epoch: int, start: int):
        self.calls.append((epoch, start))
        for first in range(3 * start, self.size, 3):
            places = range(first, min(first + 3, self.size))
            yield batch([f"{self.name}{epoch}.{place}" for place in places], self.side)


def make_mix(batch_size: int = 8, **settings) -> MixedBatches:
    sources = {"a": Counting("a", 10), "b": Counting("b", 4, side=3)}
    return MixedBatches(sources, {"a": 3, "b": 1}, batch_size=batch_size, **settings)


def steps(stream: MixedStream, count: int) -> list[list[str]]:
    return [[text for _, part in stream.next_parts() for text in part.instructions] for _ in range(count)]


def test_every_sample_is_drawn_by_weight_and_each_source_is_read_in_its_own_order():
    read = steps(MixedStream(make_mix()), 200)
    assert all(len(step) == 8 for step in read)
    drawn = [text for step in read for text in step]
    shares = {name: count / len(drawn) for name, count in Counter(text[0] for text in drawn).items()}
    assert shares["a"] == pytest.approx(0.75, abs=0.03)  # three standard deviations of 1,600 draws
    assert len({tuple(sorted(text[0] for text in step)) for step in read}) > 3  # drawn, not dealt out
    for name, size in (("a", 10), ("b", 4)):
        own = [text[1:] for text in drawn if text[0] == name]
        assert own == [f"{i // size}.{i % size}" for i in range(len(own))]


def test_a_step_has_the_counts_that_were_drawn_for_it():
    mix = make_mix(seed=5)
    stream = MixedStream(mix)
    for step in range(20):
        parts = stream.next_parts()
        counts = {name: sum(part.batch_size for source, part in parts if source == name) for name in mix.sources}
        assert counts == mix.draw(step)
    assert [make_mix(seed=6).draw(step) for step in range(9)] != [mix.draw(step) for step in range(9)]


@pytest.mark.parametrize("before", [0, 1, 2, 3, 7, 20])
def test_it_goes_on_from_anywhere_without_reading_up_to_there(before):
    whole = MixedStream(make_mix())
    steps(whole, before)
    state = json.loads(json.dumps(whole.state()))
    rest = steps(whole, 12)
    mix = make_mix()
    resumed = open_stream(mix, state)
    assert resumed.state() == state
    assert steps(resumed, 12) == rest
    assert resumed.state() == whole.state()
    for name, source in mix.sources.items():
        assert source.calls[0] == (state["sources"][name]["epoch"], state["sources"][name]["position"])


def test_epochs_are_each_sources_own():
    stream = MixedStream(make_mix())
    drawn = Counter(text[0] for step in steps(stream, 30) for text in step)
    for name, size in (("a", 10), ("b", 4)):
        assert stream.epochs[name] in (drawn[name] // size, drawn[name] // size - 1)  # a pass ends when the next begins
    assert stream.epoch == min(stream.epochs.values())


def test_plain_iterables_will_do():
    sources = {"a": [batch(["a0", "a1", "a2"])], "b": [batch(["b0"])]}
    read = steps(MixedStream(MixedBatches(sources, {"a": 1, "b": 1}, batch_size=4)), 50)
    assert {text for step in read for text in step} == {"a0", "a1", "a2", "b0"}
    with pytest.raises(ValueError, match="nothing left"):
        steps(MixedStream(MixedBatches({"a": []}, {"a": 1.0}, batch_size=1)), 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": {"a": 1}}, r"one for each of the sources \(a, b\), got a"),
        ({"weights": {"a": 1, "b": 1, "c": 1}}, "got a, b, c"),
        ({"weights": {"a": 1, "b": 0}}, "above 0, got b=0"),
        ({"weights": {"a": 1, "b": float("nan")}}, "above 0, got b=nan"),
        ({"batch_size": 0}, "batch_size: expected 1 or more"),
        ({"sources": {}, "weights": {}}, "got none"),
    ],
)
def test_errors(settings, words):
    usual = {"sources": {"a": [], "b": []}, "weights": {"a": 1, "b": 1}, "batch_size": 2}
    with pytest.raises(ValueError, match=words):
        MixedBatches(**{**usual, **settings})


# -- samples of batches ------------------------------------------------------------------------------------------------


def make_full(start: int, size: int) -> ActionBatch:
    """Every field filled with numbers that tell the samples apart."""
    rows = torch.arange(start, start + size)
    images = rows[:, None, None, None].expand(size, 2, 2, 3).to(torch.uint8)
    return ActionBatch(
        images[:, None],
        [str(row) for row in rows.tolist()],
        target_codes=rows[:, None].repeat(1, 4),
        codes_valid=rows % 2 == 0,
        state=rows[:, None].float(),
        actions=rows[:, None, None].float().expand(size, 3, 2),
        action_is_pad=torch.zeros(size, 3, dtype=torch.bool),
        action_valid=rows % 3 == 0,
        views={"wrist": images},
        meta={"anything": start},
    )


def assert_equal(one: ActionBatch, other: ActionBatch) -> None:
    assert one.instructions == other.instructions
    for name in ("frames", "target_codes", "codes_valid", "state", "actions", "action_is_pad", "action_valid"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.views["wrist"], other.views["wrist"])


def test_rows_put_together_again_are_the_batch():
    whole = make_full(0, 7)
    parts = [take_rows(whole, start, stop) for start, stop in ((0, 2), (2, 3), (3, 7))]
    assert [part.batch_size for part in parts] == [2, 1, 4]
    assert_equal(parts[2], make_full(3, 4))
    (merged,) = merge_batches(parts)
    assert_equal(merged, whole)
    assert take_rows(whole, 0, 7) is whole


def test_only_batches_of_one_form_are_merged():
    parts = [batch(["a"]), batch(["b"], side=3), batch(["c"]), batch(["d"], target_codes=torch.zeros(1, 4).long())]
    assert [merged.instructions for merged in merge_batches(parts)] == [["a", "c"], ["b"], ["d"]]


# -- the loss of several batches ---------------------------------------------------------------------------------------


def test_joined_losses_count_labelled_samples():
    parts = [
        MaskedLoss(torch.full((size,), value), torch.arange(size) < labelled, metrics)
        for size, labelled, value, metrics in (
            (3, 3, 1.0, {"code_accuracy": 1.0}),
            (4, 1, 4.0, {"code_accuracy": 4.0}),
            (2, 0, torch.nan, {}),  # of a batch without labels
        )
    ]
    joined = join_losses(parts)
    assert joined.metrics == {"code_accuracy": 1.75}
    combined = combine_losses({"codes": joined}, {})
    assert combined.loss.item() == combined.metrics["codes_loss"] == 1.75
    assert combine_losses({"codes": join_losses(parts[2:] * 2)}, {}).loss.item() == 0


@pytest.mark.parametrize("mode", [BackendMode.CODES, BackendMode.MULTITASK])
def test_several_batches_are_as_one(mode, make_tiny_backend):
    """Value and gradients, each loss over its own samples: not a mean of means."""
    settings = {"codes_loss_weight": 0.5, "actions_loss_weight": 2.0}
    backend = make_tiny_backend("qwen_plain", "mlp", code_source="teacher", **settings)
    whole = replace(
        fake_batch(backend, batch_size=5),
        codes_valid=torch.tensor([True, False, True, True, True]),
        action_valid=torch.tensor([True, False, False, True, False]),
    )
    results = []
    for batches in ([whole], [take_rows(whole, 0, 1), take_rows(whole, 1, 5)]):
        backend.zero_grad()
        output = TrainingObjective(backend, mode)(batches)
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in backend.named_parameters() if p.grad is not None}
        results.append((output, gradients))
    (one, gradients), (other, other_gradients) = results
    assert one.metrics.keys() == other.metrics.keys() >= {f"{name}_loss" for name in OBJECTIVES[mode]}
    for name in OBJECTIVES[mode]:
        assert other.metrics[f"{name}_loss"] == pytest.approx(one.metrics[f"{name}_loss"], rel=1e-5)
    torch.testing.assert_close(other.loss, one.loss)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert (other_gradients[name] - gradient).abs().max() < 1e-5, name
