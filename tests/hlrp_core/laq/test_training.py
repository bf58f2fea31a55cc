"""Training a LAQ: it learns motion, it continues, it fails loudly on collapse."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hlrp_core.laq.config import QUANTIZERS, LAQConfig
from hlrp_core.laq.evaluation import evaluate_reconstruction, measure_laq
from hlrp_core.laq.pairs import FrameTuples, tuple_starts
from hlrp_core.laq.probes import (
    CodebookCollapseError,
    CollapseWatch,
    action_probe_r2,
    check_no_collapse,
    measure_codebook_use,
    one_hot_features,
)
from hlrp_core.laq.quantizer import LatentActionQuantizer
from hlrp_core.laq.training import LAQTrainingConfig, make_accelerator, train_laq

CONFIG = LAQConfig(image_size=32, hidden_dim=32, num_layers=2, frame_gap=1, code_seq_len=2)
SAMPLE = FrameTuples.sample
ENCODE_UNCALIBRATED = LatentActionQuantizer.encode_uncalibrated


def new_laq(seed: int = 0) -> LatentActionQuantizer:
    torch.manual_seed(seed)
    return LatentActionQuantizer(CONFIG)


def test_it_learns_motion_that_random_weights_and_shuffled_codes_do_not_tell(square_tuples, tmp_path):
    train, held_out = square_tuples
    config = LAQTrainingConfig(steps=150, batch_size=32, log_freq=75, save_freq=75)
    probes = []
    for seed in range(3):  # one in thirty goes around the circle of directions twice, with a probe of 0.5
        figures = train_laq(new_laq(seed), train, held_out, config, output_dir=tmp_path / str(seed))
        assert figures is not None
        assert figures["reconstruction_gain_db"] > 1
        assert figures["action_probe_r2"] > figures["action_probe_r2_random"] + 0.2
        assert abs(figures["action_probe_r2_shuffled"]) < 0.1
        assert 1 < figures["perplexity"] <= 8
        probes.append(figures["action_probe_r2"])
    assert sorted(probes)[1] > 0.9
    folder = tmp_path / "2"
    assert json.loads((folder / "metrics.json").read_text()) == figures
    loaded = LatentActionQuantizer.from_pretrained(folder)
    assert loaded.weights_hash() == LatentActionQuantizer.from_pretrained(folder).weights_hash()


class KilledError(Exception):
    pass


def kill(self, batch_size, *, seed, step, rank):
    if step == 4:
        raise KilledError
    return SAMPLE(self, batch_size, seed=seed, step=step, rank=rank)


def interrupt(self, batch_size, *, seed, step, rank):
    if step == 4:
        os.kill(os.getpid(), signal.SIGINT)
    return SAMPLE(self, batch_size, seed=seed, step=step, rank=rank)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("end", [kill, interrupt])
def test_a_run_that_ended_early_continues_to_the_same_weights(square_tuples, tmp_path, monkeypatch, quantizer, end):
    train, held_out = square_tuples
    train, held_out = train.spread(200), held_out.spread(64)
    settings = replace(CONFIG, quantizer=quantizer)
    config = LAQTrainingConfig(steps=8, batch_size=8, log_freq=2, save_freq=3)

    def run(folder: Path) -> str | None:
        torch.manual_seed(0)
        laq = LatentActionQuantizer(settings)
        figures = train_laq(laq, train, held_out, config, output_dir=folder)
        return None if figures is None else laq.weights_hash()

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(FrameTuples, "sample", end)
        if end is kill:
            with pytest.raises(KilledError):
                run(tmp_path / "ended")
        else:
            assert run(tmp_path / "ended") is None
    torch.manual_seed(1)  # another process starts with other random numbers
    assert run(tmp_path / "ended") == whole
    records = [(tmp_path / name / "run" / "metrics.jsonl").read_text() for name in ("whole", "ended")]
    assert records[0] == records[1]
    figures = [(tmp_path / name / "metrics.json").read_text() for name in ("whole", "ended")]
    assert figures[0] == figures[1]


def test_each_process_has_batches_of_its_own(square_tuples):
    train, _ = square_tuples
    batches = [train.sample(16, seed=3, step=step, rank=rank) for step in (0, 1) for rank in (0, 1, 2)]
    assert all(not torch.equal(one, other) for i, one in enumerate(batches) for other in batches[:i])
    assert torch.equal(train.sample(16, seed=3, step=1, rank=2), batches[-1])
    only = np.random.default_rng([3, 1]).integers(len(train), size=16)  # one process: as before there were several
    assert torch.equal(train.sample(16, seed=3, step=1), train.read(only))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        *(({name: 0}, "1 or more") for name in ("steps", "batch_size", "log_freq", "save_freq", "max_eval_pairs")),
        *(({name: -1}, "0 or more") for name in ("warmup_steps", "weight_decay", "seed")),
        *(({"lr": value}, "above 0") for value in (-1.0, 0.0, float("nan"))),
        ({"grad_clip_norm": 0.0}, "above 0"),
        *(({"soft_share": value}, "a share from 0 to 1") for value in (-0.1, 7.0)),
    ],
)
def test_settings_out_of_range_are_refused(setting, expected):
    [(name, value)] = setting.items()
    with pytest.raises(ValueError, match=rf"^{name}: expected {expected}, got {value}. Next step: "):
        LAQTrainingConfig(**setting)


def test_the_precision_is_ours_whatever_accelerate_is_set_to(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make_accelerator().mixed_precision == "no"


def test_a_loss_that_is_not_a_number_stops_the_run(square_tuples, tmp_path):
    train, held_out = square_tuples
    laq = new_laq()
    with torch.no_grad():
        laq.decoder.to_target.bias.fill_(float("nan"))
    config = LAQTrainingConfig(steps=2, batch_size=4)
    with pytest.raises(ValueError, match=r"loss at step 1: expected a finite number, got nan. Next step: lower lr"):
        train_laq(laq, train, held_out, config, output_dir=tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def first(tuples: FrameTuples, number: int) -> FrameTuples:
    return replace(tuples, starts=tuples.starts[:number], motion=tuples.motion[:number])


def test_any_number_of_pairs_trains_to_the_end(square_tuples, tmp_path):
    """257: one more than a batch of the calibration."""
    train, held_out = square_tuples
    config = LAQTrainingConfig(steps=2, batch_size=4)
    assert train_laq(new_laq(), first(train, 257), held_out.spread(40), config, output_dir=tmp_path) is not None
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("num_train", "num_held_out", "batch_size", "message"),
    [
        (0, 9, 4, "training pairs: expected 1 or more, got 0"),
        (9, 0, 4, "held-out pairs: expected 1 or more, got 0"),
        (1, 9, 4, "training pairs: expected 2 or more with laq.quantizer=fsq, .* got 1"),
        (9, 9, 1, "batch_size: expected 2 or more with laq.quantizer=fsq, .* got 1"),
    ],
)
def test_too_few_pairs_are_refused_before_the_training(
    num_train, num_held_out, batch_size, message, square_tuples, tmp_path
):
    train, held_out = first(square_tuples[0], num_train), first(square_tuples[1], num_held_out)
    config = LAQTrainingConfig(steps=2, batch_size=batch_size)
    with pytest.raises(ValueError, match=rf"^{message}. Next step: "):
        train_laq(new_laq(), train, held_out, config, output_dir=tmp_path / "laq")
    assert not (tmp_path / "laq").exists()


@pytest.mark.parametrize(("quantizer", "num_frames"), [("fsq", 3), ("vq", 2), ("diveq", 2)])
def test_a_single_tuple_trains_where_its_spread_is_not_needed(quantizer, num_frames, square_tuples, tmp_path):
    """Two transitions have a spread, and a learnt codebook goes by none."""
    train, held_out = (replace(first(pairs, 1), num_frames=num_frames) for pairs in square_tuples)
    config = LAQTrainingConfig(steps=2, batch_size=1, log_freq=1)
    torch.manual_seed(0)
    laq = LatentActionQuantizer(replace(CONFIG, quantizer=quantizer, num_frames=num_frames, code_seq_len=1))
    with suppress(CodebookCollapseError):  # after the training: one tuple tells nothing apart
        train_laq(laq, train, held_out, config, output_dir=tmp_path)
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "000002"


def test_nothing_to_measure_on_is_an_error_that_says_so(square_tuples):
    train, held_out = square_tuples
    with pytest.raises(ValueError, match=r"held-out pairs: expected 1 or more, got 0. Next step"):
        measure_laq(new_laq(), train, first(held_out, 0))
    with pytest.raises(ValueError, match=r"held-out pairs: expected 1 or more, got 0. Next step"):
        evaluate_reconstruction(new_laq(), [])


def test_another_run_in_the_same_folder_is_refused(square_tuples, tmp_path):
    train, held_out = square_tuples
    config = LAQTrainingConfig(steps=2, batch_size=4, log_freq=1, save_freq=2)
    train_laq(new_laq(), train, held_out, config, output_dir=tmp_path)
    with pytest.raises(ValueError, match="expected the settings with which its run was started"):
        train_laq(new_laq(), train, held_out, LAQTrainingConfig(steps=4, batch_size=4), output_dir=tmp_path)


def test_collapse_is_an_error_that_says_what_to_change():
    use = measure_codebook_use(torch.zeros(50, 4, dtype=torch.long), 8)
    with pytest.raises(CodebookCollapseError, match=r"collapsed.*quantizer=fsq"):
        check_no_collapse(use, 8)


def codes_with_a_lost_position() -> torch.Tensor:
    return torch.stack([torch.arange(64) % 8, torch.full((64,), 3), torch.arange(64) % 4], dim=1)


def test_a_single_collapsed_position_is_an_error_that_names_it():
    use = measure_codebook_use(codes_with_a_lost_position(), 8)
    assert use.perplexities.tolist() == pytest.approx([8, 1, 4])
    assert use.perplexity == pytest.approx(13 / 3)
    message = r"each of 3 positions, got a perplexity of 1.00 at position 2, of 8: .*fewer positions"
    with pytest.raises(CodebookCollapseError, match=message):
        check_no_collapse(use, 8)


def test_a_position_may_be_lost_for_a_while():
    lost = measure_codebook_use(codes_with_a_lost_position(), 8)
    elsewhere = measure_codebook_use(codes_with_a_lost_position().flip(1)[:, [1, 0, 2]], 8)
    watch = CollapseWatch(patience=3)
    for use in (lost, lost, elsewhere, lost, lost):
        watch.look(use, 8)
    with pytest.raises(CodebookCollapseError, match="position 2"):
        watch.look(lost, 8)


def test_training_reports_the_use_of_the_codebook(square_tuples, tmp_path):
    train, held_out = square_tuples
    config = LAQTrainingConfig(steps=4, batch_size=8, log_freq=2)
    figures = train_laq(new_laq(), train, held_out, config, output_dir=tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for record in (*map(json.loads, lines), figures):
        assert len(record["perplexity_by_position"]) == 2
        assert record["perplexity"] == pytest.approx(sum(record["perplexity_by_position"]) / 2)
        assert 1 < record["perplexity"] <= 8


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_looking_at_the_codes_changes_nothing_and_sees_what_calibration_would_give(square_tuples, quantizer):
    train, held_out = square_tuples
    torch.manual_seed(0)
    laq = LatentActionQuantizer(replace(CONFIG, quantizer=quantizer))
    for step in range(3):
        laq.train()(train.sample(64, seed=0, step=step))
    before, random_state = laq.weights_hash(), torch.get_rng_state()
    codes = laq.encode_uncalibrated(held_out.batches(64))
    assert laq.weights_hash() == before
    assert laq.training
    assert torch.equal(torch.get_rng_state(), random_state)
    laq.calibrate(held_out.batches(len(held_out)))
    calibrated = laq.encode(held_out.read(np.arange(len(held_out))))
    assert (codes == calibrated).float().mean() > 0.995  # on the border of two codes, the last digit may decide


def lose_second_position(self, batches):
    codes = ENCODE_UNCALIBRATED(self, batches)
    return torch.stack([codes[:, 0], torch.zeros_like(codes[:, 0])], dim=1)


def test_a_position_that_stays_collapsed_ends_the_training(square_tuples, tmp_path, monkeypatch):
    """But not while codes are not yet quantised in full, which here lasts until step 8."""
    train, held_out = square_tuples
    config = LAQTrainingConfig(steps=20, batch_size=4, log_freq=2, soft_share=0.4)
    monkeypatch.setattr(LatentActionQuantizer, "encode_uncalibrated", lose_second_position)
    with pytest.raises(CodebookCollapseError, match=r"1\.00 at position 2"):
        train_laq(new_laq(), train, held_out, config, output_dir=tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 10, 12]  # 8, 10 and 12 count
    few = held_out.spread(8)
    with pytest.raises(CodebookCollapseError, match="position 2"):  # then training pairs tell
        train_laq(new_laq(), train, few, config, output_dir=tmp_path / "few")
    figures = train_laq(new_laq(), train.spread(16), few, config, output_dir=tmp_path / "none")  # too few to judge
    assert figures is not None


@pytest.mark.parametrize("num_held_out", [1, 2])
def test_few_held_out_pairs_are_no_collapse(num_held_out, square_tuples, tmp_path, caplog):
    """One pair has a perplexity of 1, whatever its codes: the use of the codebook is then that of training pairs."""
    train, held_out = square_tuples
    few = held_out.spread(num_held_out)
    config = LAQTrainingConfig(steps=4, batch_size=8, log_freq=2, save_freq=4)
    figures = train_laq(new_laq(), train, few, config, output_dir=tmp_path)
    assert figures["codebook_use_from"] == "training"
    assert figures["perplexity"] > 1.05
    assert sum(figures["code_counts"][0]) == len(train)
    assert f"Only {num_held_out} held-out pairs" in caplog.text
    is_told = len(np.unique(few.motion, axis=0)) > 1
    assert ("action_probe_r2" in figures) == is_told
    assert ("No action probe" in caplog.text) == (not is_told)
    assert (tmp_path / "model.safetensors").is_file()


def test_enough_held_out_pairs_are_what_is_measured(square_tuples):
    train, held_out = square_tuples
    laq = new_laq().eval()
    laq.calibrate(train.batches(256))
    figures = measure_laq(laq, train, held_out.spread(32))
    assert figures["codebook_use_from"] == "held-out"
    assert sum(figures["code_counts"][0]) == 32


def test_a_collapse_is_found_with_few_held_out_pairs_too():
    still = FrameTuples(np.full((60, 32, 32, 3), 40, dtype=np.uint8), np.arange(59), 1)
    with pytest.raises(CodebookCollapseError, match="collapsed"):
        measure_laq(new_laq(), still, still.spread(1))


def test_perplexity_of_even_use_is_the_codebook_size():
    use = measure_codebook_use(torch.arange(8).repeat(4)[:, None], 8)
    assert use.perplexity == pytest.approx(8)
    assert use.used_share == 1


def test_the_probe_equals_a_plain_ridge_regression():
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(0, 4, (300, 2)))
    motion = torch.from_numpy((codes.numpy() @ rng.normal(size=(2, 3)) + rng.normal(size=(300, 3))).astype(np.float32))
    x, y = one_hot_features(codes[:200], 4).numpy(), motion[:200].double().numpy()
    penalty = np.diag([1e-3 * 200] * 8 + [0.0])
    weights = np.linalg.solve(x.T @ x + penalty, x.T @ y)
    test, predicted = motion[200:].double().numpy(), one_hot_features(codes[200:], 4).numpy() @ weights
    expected = 1 - ((test - predicted) ** 2).sum() / ((test - test.mean(0)) ** 2).sum()
    got = action_probe_r2(codes[:200], motion[:200], codes[200:], motion[200:], codebook_size=4)
    assert got == pytest.approx(expected, abs=1e-6)


def test_the_probe_needs_motion_that_differs():
    codes, motion = torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2)
    with pytest.raises(ValueError, match="expected held-out pairs whose motion differs"):
        action_probe_r2(codes, motion, codes, motion, codebook_size=8)


def test_tuples_stay_within_their_episode():
    starts = tuple_starts([5, 2, 4], frame_gap=2, num_frames=2)
    assert [list(s) for s in starts] == [[0, 1, 2], [], [7, 8]]


def test_a_gap_longer_than_every_episode_is_refused():
    with pytest.raises(ValueError, match=r"frame_gap: expected .* got episodes of at most 5 frames"):
        tuple_starts([5, 3], frame_gap=5)
