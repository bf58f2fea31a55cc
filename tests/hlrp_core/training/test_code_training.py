from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from training_helpers import CONFIG, Power, make_batches, read_metrics, without_time

from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.bundle import load_backend
from hlrp_core.contract import BackendMode
from hlrp_core.run_folder import RunFolder
from hlrp_core.training import CodeTrainingConfig, train_codes
from hlrp_core.training.code_training import make_accelerator
from hlrp_core.training.config import is_due, learning_rate


def test_it_learns_reports_and_leaves_a_bundle(build, tmp_path):
    backend = build()
    batches = make_batches(backend, 1)
    config = replace(CONFIG, steps=30, lr=3e-3, log_freq=10, eval_freq=15, save_freq=0)
    result = train_codes(backend, batches, config, output_dir=tmp_path / "run", eval_batches=batches)
    assert result.is_finished
    assert result.step == 30

    records = read_metrics(tmp_path / "run")
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "evaluation" in record]
    assert [record["step"] for record in steps] == [10, 20, 30]
    assert [record["step"] for record in evaluations] == [15, 30]
    assert set(steps[0]) == {
        *("step", "epoch", "loss", "grad_norm", "code_accuracy", "constant_accuracy", "lr", "samples_per_s"),
    }
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert all(type(value) in (int, float) for record in steps for value in record.values())
    assert result.evaluation.as_dict() == evaluations[-1]["evaluation"]
    assert result.evaluation.constant_from == "training"

    assert result.folder == tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name != "last"] == ["000030"]
    loaded = load_backend(result.folder)
    one, other = (b.latent_from_batch(batches[0], mode=BackendMode.CODES).logits for b in (backend, loaded))
    assert torch.equal(one, other)


def test_a_killed_run_continues_as_if_nothing_had_happened(build, tmp_path):
    backend = build()
    batches = make_batches(backend)
    whole = train_codes(backend, batches, CONFIG, output_dir=tmp_path / "whole", eval_batches=batches[:1])

    torch.manual_seed(99)
    with pytest.raises(RuntimeError, match="power failure"):
        train_codes(build(), Power(batches, 5), CONFIG, output_dir=tmp_path / "killed", eval_batches=batches[:1])
    assert (tmp_path / "killed" / "checkpoints" / "last").resolve().name == "000004"
    torch.manual_seed(123)
    fresh = build(seed=17)  # its weights come from the checkpoint
    continued = train_codes(fresh, batches, CONFIG, output_dir=tmp_path / "killed", eval_batches=batches[:1])

    assert continued.is_finished
    for key, tensor in backend.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[key]), key
    assert continued.evaluation == whole.evaluation
    assert without_time(read_metrics(tmp_path / "killed")) == without_time(read_metrics(tmp_path / "whole"))
    again = train_codes(build(), batches, CONFIG, output_dir=tmp_path / "killed", eval_batches=batches[:1])
    assert again.is_finished
    assert again.evaluation == whole.evaluation
    assert len(read_metrics(tmp_path / "killed")) == len(read_metrics(tmp_path / "whole"))


def test_a_kill_between_a_checkpoint_and_the_link_to_it(build, tmp_path, monkeypatch):
    """The last checkpoint is there, and the link still names the one before."""
    backend = build()
    batches = make_batches(backend)
    point = RunFolder._point_last_to

    def killed(run, checkpoint):
        if checkpoint.name == "000006":
            raise RuntimeError("killed")
        point(run, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_point_last_to", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train_codes(backend, batches, CONFIG, output_dir=tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last"
    assert (last.resolve().name, last.with_name("000006").is_dir()) == ("000004", True)
    result = train_codes(build(seed=17), batches, CONFIG, output_dir=tmp_path / "run")
    assert result.is_finished
    assert result.folder == last / "pretrained_model"
    assert os.readlink(last) == "000006"
    assert torch.equal(load_backend(result.folder).core.lm_head.weight, backend.core.lm_head.weight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_go_on(number, build, tmp_path, capsys):
    backend = build()
    batches = make_batches(backend)
    before = signal.getsignal(number)
    stopped = train_codes(backend, Power(batches, 2, number), CONFIG, output_dir=tmp_path / "run")
    assert not stopped.is_finished
    assert stopped.step == 3
    assert stopped.evaluation is None
    assert signal.getsignal(number) is before
    output = capsys.readouterr().out
    assert "step 3 of 6" in output
    assert "same command again" in output
    load_backend(stopped.folder)
    done = train_codes(build(), batches, CONFIG, output_dir=tmp_path / "run")
    assert done.is_finished
    assert done.step == 6


def test_how_often_it_is_evaluated_changes_nothing(build, tmp_path):
    """A flow draws noise in its loss; a loader draws its seed where a pass over it begins."""
    trained = []
    for eval_freq in (1, 0):
        backend = build("qwen_vector_head", vector_objective="flow")
        batches = make_batches(backend)
        held_out = torch.utils.data.DataLoader(batches[:1], batch_size=None, shuffle=True)
        config = replace(CONFIG, steps=3, eval_freq=eval_freq, save_freq=0)
        train_codes(backend, batches, config, output_dir=tmp_path / f"{eval_freq}", eval_batches=held_out)
        trained.append(backend.state_dict())
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


def test_another_run_is_not_continued(build, tmp_path):
    batches = make_batches(build())
    short = replace(CONFIG, steps=1)
    train_codes(build(), batches, short, output_dir=tmp_path / "run", settings={"data": "a"})
    for change in ({"steps": 2}, {"lr": 0.5}, {"seed": 4}):
        with pytest.raises(ValueError, match="settings with which its run was started"):
            train_codes(build(), batches, replace(short, **change), output_dir=tmp_path / "run", settings={"data": "a"})
    with pytest.raises(ValueError, match=r"data='a'.*got data='b'"):
        train_codes(build(), batches, short, output_dir=tmp_path / "run", settings={"data": "b"})
    with pytest.raises(ValueError, match="backend"):
        train_codes(build("qwen_chat"), batches, short, output_dir=tmp_path / "run", settings={"data": "a"})
    shown_otherwise = replace(short, log_freq=7, save_freq=9, eval_freq=3, keep_checkpoints=0)
    train_codes(build(), batches, shown_otherwise, output_dir=tmp_path / "run", settings={"data": "a"})


def test_any_iterable_will_do(build, tmp_path):
    backend = build()
    config = replace(CONFIG, steps=3)
    generator = (batch for batch in make_batches(backend, 3))
    assert train_codes(backend, generator, config, output_dir=tmp_path / "a").is_finished
    loader = torch.utils.data.DataLoader(make_batches(backend, 2), batch_size=None)
    assert train_codes(build(), loader, config, output_dir=tmp_path / "b").is_finished


def test_batches_without_labels(build, tmp_path):
    backend = build()
    batches = make_batches(backend, 2)
    nothing = torch.zeros(3, dtype=torch.bool)
    partly = [replace(batches[0], codes_valid=nothing), batches[1]]
    config = replace(CONFIG, steps=2, log_freq=1)
    train_codes(backend, partly, config, output_dir=tmp_path / "partly")
    records = read_metrics(tmp_path / "partly")
    assert records[0]["loss"] == 0
    assert "code_accuracy" not in records[0]
    assert records[1]["loss"] > 0
    bare = [replace(batch, target_codes=None) for batch in batches]
    with pytest.raises(ValueError, match="target_codes"):
        train_codes(build(), bare, config, output_dir=tmp_path / "bare")


def test_a_loss_that_is_not_a_number_stops_the_run(build, tmp_path):
    backend = build()
    with torch.no_grad():
        backend.core.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss at step 1: expected a finite number"):
        train_codes(backend, make_batches(backend), CONFIG, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("head", [None, "flow"])
def test_nothing_to_train(head, build, tmp_path):
    """The parameters of an action head learn nothing from codes."""
    backend = build("qwen_plain", head, freeze_backbone=True)
    expected = r"parameters to train.*Next step: freeze_backbone=False, or train_vocabulary=code_rows"
    with pytest.raises(ValueError, match=expected):
        train_codes(backend, make_batches(backend), CONFIG, output_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "settings"), [("qwen_plain", {"train_vocabulary": "code_rows"}), ("qwen_latent_head", {})]
)
def test_what_learns_on_a_frozen_backbone(name, settings, build, tmp_path):
    backend = build(name, "flow", freeze_backbone=True, **settings)
    frozen = {key: p.detach().clone() for key, p in backend.core.model.named_parameters()}
    batches = make_batches(backend, 1)
    config = replace(CONFIG, steps=8, lr=1e-2, log_freq=4, save_freq=0)
    train_codes(backend, batches, config, output_dir=tmp_path / "run")
    losses = [record["loss"] for record in read_metrics(tmp_path / "run")]
    assert losses[1] < losses[0]
    for key, p in backend.core.model.named_parameters():
        if "embed_tokens" not in key:  # where the code tokens' rows are written for a checkpoint
            assert torch.equal(p, frozen[key]), key


def test_frozen_parts_stay(build, tmp_path):
    backend = build(freeze_vision=True)
    before = [p.clone() for p in backend.core.vision_parameters()]
    train_codes(backend, make_batches(backend), replace(CONFIG, steps=2), output_dir=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(before, backend.core.vision_parameters(), strict=True))


def test_mixed_precision(build, tmp_path):
    backend = build()
    batches = make_batches(backend)
    config = replace(CONFIG, steps=2, dtype="bfloat16", log_freq=1, eval_freq=1)
    result = train_codes(backend, batches, config, output_dir=tmp_path / "run", eval_batches=batches[:1])
    assert result.is_finished
    assert backend.core.model.dtype == torch.float32  # the weights stay as they are
    assert all(record["loss"] > 0 for record in read_metrics(tmp_path / "run") if "loss" in record)


def with_loss_scale(config: CodeTrainingConfig, backend: ComposedBackend, scale: float = 4.0) -> Accelerator:
    """As accelerate scales the loss in float16, which it does not on a CPU; here it grows with every step."""
    accelerator = make_accelerator(config, backend, cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
    return accelerator


def test_the_loss_scale_of_float16_continues(build, tmp_path):
    batches = make_batches(build())

    def train(folder: str, batches) -> float:
        backend = build()
        accelerator = with_loss_scale(CONFIG, backend)
        try:
            train_codes(backend, batches, CONFIG, output_dir=tmp_path / folder, accelerator=accelerator)
        finally:
            scales.append(accelerator.scaler.get_scale())
        return scales[-1]

    scales: list[float] = []
    assert train("whole", batches) == 4.0 * 2**6
    with pytest.raises(RuntimeError, match="power failure"):
        train("killed", Power(batches, 5))
    assert train("killed", batches) == scales[0]


def test_a_step_that_float16_skips_leaves_valid_metrics(build, tmp_path):
    """Its gradient is infinite: the scale was too large, and is halved."""
    backend = build()
    config = replace(CONFIG, steps=2, log_freq=1)
    accelerator = with_loss_scale(config, backend, scale=2.0**127)
    before = backend.core.lm_head.weight.detach().clone()
    train_codes(backend, make_batches(backend), config, output_dir=tmp_path / "run", accelerator=accelerator)
    assert torch.equal(backend.core.lm_head.weight, before)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert ["grad_norm" in record for record in records] == [False, False]
    assert all(record["loss"] > 0 for record in records)


def test_figures_that_are_no_numbers_are_written_as_null_and_read_again(build, tmp_path):
    """As the perplexity of predictions of which none parses."""
    backend = build(decoding="free")
    batches = make_batches(backend)
    config = replace(CONFIG, steps=1)
    arguments = {"output_dir": tmp_path / "run", "eval_batches": batches[:1]}
    result = train_codes(backend, batches, config, **arguments)
    assert result.evaluation.unparsed == 1
    (record,) = [record for record in read_metrics(tmp_path / "run") if "evaluation" in record]
    assert record["evaluation"]["prediction_perplexity"] is None
    again = train_codes(build(decoding="free"), batches, config, **arguments)
    assert str(again.evaluation) == str(result.evaluation)  # NaN equals nothing
    assert "nan" in again.evaluation.as_table()


def test_learning_rate():
    config = CodeTrainingConfig(steps=100, lr=2.0, warmup_steps=10)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert learning_rate(replace(config, warmup_steps=0), 0) == 2.0
    assert learning_rate(replace(config, warmup_steps=200), 99) == pytest.approx(1.0)


def test_what_is_due():
    assert [step for step in range(1, 11) if is_due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if is_due(step, 0, 10)] == [10]


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"lr": 0.0}, {"warmup_steps": -1}, {"dtype": "int8"}, {"log_freq": 0}, {"grad_clip_norm": 0.0}],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected"):
        CodeTrainingConfig(**settings)
