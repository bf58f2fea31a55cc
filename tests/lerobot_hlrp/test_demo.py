"""The demo's runner and report parts: what is skipped, what runs again, what is read from the logs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from lerobot_hlrp.demo.figures import read_success_log, read_training_log
from lerobot_hlrp.demo.pipeline import Pipeline
from lerobot_hlrp.demo.presets import PRESETS
from lerobot_hlrp.demo.runner import Step, StepError, StepRunner


def touch_step(folder: Path, name: str, *, script: str | None = None, resume=None) -> Step:
    """A step that appends a line to its output."""
    output = folder / f"{name}.txt"
    script = script or f"open({str(output)!r}, 'a').write('ran\\n')"
    command = [sys.executable, "-c", script]
    return Step(name, name, command, output, resume or (lambda: None))


def runs(step: Step) -> int:
    return len(step.output.read_text().splitlines()) if step.output.exists() else 0


def test_finished_steps_are_kept(tmp_path):
    steps = [touch_step(tmp_path, "a"), touch_step(tmp_path, "b")]
    for _ in range(2):
        StepRunner(tmp_path).run_all(steps)
    assert [runs(step) for step in steps] == [1, 1]


def test_a_changed_command_runs_again_and_so_does_what_follows(tmp_path):
    first, second, third = (touch_step(tmp_path, name) for name in "abc")
    StepRunner(tmp_path).run_all([first, second, third])
    changed = touch_step(tmp_path, "b", script=f"open({str(second.output)!r}, 'a').write('other\\n')")
    StepRunner(tmp_path).run_all([first, changed, third])
    assert runs(first) == 1
    assert second.output.read_text() == "other\n"  # started afresh
    assert third.output.read_text() == "ran\n"
    assert runs(third) == 1


def test_a_failure_stops_and_names_the_log(tmp_path):
    broken = touch_step(tmp_path, "broken", script="import sys; print('why'); sys.exit(3)")
    never = touch_step(tmp_path, "never")
    runner = StepRunner(tmp_path)
    with pytest.raises(StepError, match=r"exit status 3.*broken\.log"):
        runner.run_all([broken, never])
    assert runner.log_path(broken).read_text() == "why\n"
    assert runs(never) == 0


def test_an_unfinished_step_is_continued_by_its_own_command(tmp_path):
    output = tmp_path / "a.txt"
    continued = [sys.executable, "-c", f"open({str(output)!r}, 'a').write('continued\\n')"]
    script = f"open({str(output)!r}, 'a').write('begun\\n'); raise SystemExit(1)"
    step = touch_step(tmp_path, "a", script=script, resume=lambda: continued)
    with pytest.raises(StepError):
        StepRunner(tmp_path).run_all([step])
    StepRunner(tmp_path).run_all([step])
    assert output.read_text() == "begun\ncontinued\n"


def test_an_unfinished_step_without_continuation_starts_afresh(tmp_path):
    output = tmp_path / "a.txt"
    flag = tmp_path / "second"
    script = (
        f"open({str(output)!r}, 'a').write('ran\\n')\n"
        f"import pathlib, sys\n"
        f"p = pathlib.Path({str(flag)!r})\n"
        "seen = p.exists(); p.touch(); sys.exit(0 if seen else 1)"
    )
    step = touch_step(tmp_path, "a", script=script)
    with pytest.raises(StepError):
        StepRunner(tmp_path).run_all([step])
    StepRunner(tmp_path).run_all([step])
    assert runs(step) == 1


def waiting_step(folder: Path, name: str, *, until: Path, script: str = "") -> Step:
    """A step that ends when a file is there, for which it waits ten seconds at most."""
    wait = "import pathlib, sys, time\nend = time.time() + 10\n"
    wait += f"while not pathlib.Path({str(until)!r}).exists():\n    time.sleep(0.02)\n"
    wait += "    if time.time() > end: sys.exit('nobody came')\n"
    return touch_step(folder, name, script=f"{wait}{script}print({name!r}, 'ran')\npathlib.Path({name!r}).touch()")


def test_branches_run_beside_each_other(tmp_path, monkeypatch, capfd):
    """Each of two steps waits for what the other makes: one after another they could not end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    hello = touch_step(tmp_path, "hello", script="open('hello', 'w')")
    first = [
        touch_step(tmp_path, "begun", script="open('begun', 'w')"),
        waiting_step(tmp_path, "a", until=tmp_path / "b"),
    ]
    second = [waiting_step(tmp_path, "b", until=tmp_path / "begun"), waiting_step(tmp_path, "c", until=tmp_path / "a")]
    runner = StepRunner(tmp_path, num_cores=2)
    runner.run_all([hello], [first, second])
    steps = [hello, *first, *second]
    assert all(runner._read(step)["done"] for step in steps)
    assert runner.log_path(second[0]).read_text() == "b ran\n"
    printed = capfd.readouterr().out
    assert "a ran" in printed
    assert "b ran" not in printed  # it was in the background
    assert runner.total_s(steps) < sum(runner.wall_s(step) for step in steps)
    StepRunner(tmp_path, num_cores=1).run_all([hello], [first, second])
    assert capfd.readouterr().out.count("done before") == 5


def test_a_branch_of_old_data_is_not_taken_for_done_after_an_interrupt(tmp_path):
    common, first, second = (touch_step(tmp_path, name) for name in "abc")
    StepRunner(tmp_path, num_cores=1).run_all([common], [[first], [second]])
    changed = touch_step(tmp_path, "a", script=f"open({str(common.output)!r}, 'w').write('other\\n')")
    broken = touch_step(tmp_path, "b", script="import sys; sys.exit(1)")
    with pytest.raises(StepError):
        StepRunner(tmp_path, num_cores=1).run_all([changed], [[broken], [second]])
    second.output.write_text("old\n")
    StepRunner(tmp_path, num_cores=1).run_all([changed], [[first], [second]])
    assert second.output.read_text() == "ran\n"


def test_branches_take_turns_on_one_core(tmp_path):
    branches = [[touch_step(tmp_path, "a")], [touch_step(tmp_path, "b")]]
    runner = StepRunner(tmp_path, num_cores=1)
    runner.run_all([], branches)
    (a,), (b,) = branches
    assert runner.total_s([a, b]) == pytest.approx(runner.wall_s(a) + runner.wall_s(b))


@pytest.mark.parametrize("which", [0, 1])
def test_a_failure_in_a_branch_interrupts_the_other_or_ends_after_it(which, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    broken = touch_step(tmp_path, "broken", script="import sys; sys.exit(3)")
    other = waiting_step(tmp_path, "other", until=tmp_path / ("never" if which == 0 else "steps/broken.json"))
    branches = [[broken], [other]] if which == 0 else [[other], [broken]]
    with pytest.raises(StepError, match=r"'broken'.*exit status 3"):
        StepRunner(tmp_path, num_cores=2).run_all([], branches)
    assert StepRunner(tmp_path)._read(other).get("done", False) == (which == 1)


def test_an_interrupt_reaches_every_branch(tmp_path, monkeypatch):
    """Sent to the demo alone, as `kill` does, and not to the terminal's group of processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    save = "import pathlib, time\ntry:\n    pathlib.Path({0!r}).touch()\n    time.sleep(20)\n"
    save += "except KeyboardInterrupt:\n    pathlib.Path({1!r}).touch()\n    raise SystemExit(130)\n"
    steps = [touch_step(tmp_path, name, script=save.format(f"{name}_begun", f"{name}_saved")) for name in "ab"]

    def kill_when_both_run() -> None:
        while not all((tmp_path / f"{name}_begun").exists() for name in "ab"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=kill_when_both_run).start()
    with pytest.raises(KeyboardInterrupt):
        StepRunner(tmp_path, num_cores=2).run_all([], [[step] for step in steps])
    assert all((tmp_path / f"{name}_saved").exists() for name in "ab")


def test_training_curves_are_read_from_lerobots_log():
    text = (
        "Training:  10%|#\rINFO 2026-01-01 00:00:00 ot_train.py:1 step:50 smpl:2K ep:3 epch:0.10 loss:0.712 grdn:0.613 "
        "lr:1.0e-03 updt_s:0.120 data_s:0.010 smp/s:250 codes_loss:0.712 code_accuracy:0.251 constant_accuracy:0.141\n"
        "INFO 2026-01-01 00:00:09 ot_train.py:1 step:100 smpl:3K ep:6 epch:0.20 loss:0.612 grdn:0.413 "
        "lr:1.0e-03 updt_s:0.120 data_s:0.010 smp/s:250 codes_loss:0.612 code_accuracy:0.351 constant_accuracy:0.142\n"
    )
    curves = read_training_log(text, log_freq=50)
    assert curves["step"] == [50, 100]
    assert curves["loss"] == [0.712, 0.612]
    assert curves["code_accuracy"] == [0.251, 0.351]
    assert curves["constant_accuracy"] == [0.141, 0.142]


def test_success_is_read_from_lerobots_log():
    text = "INFO Suite overall aggregated: {'avg_sum_reward': 0.5, 'pc_success': 45.0}\nother\n"
    assert read_success_log(text * 2, eval_freq=400) == {"step": [400, 800], "success": [0.45, 0.45]}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_stage_and_tier_has_its_command(preset):
    pipeline = Pipeline(Path("out"), PRESETS[preset])
    names = [step.name for step in pipeline.steps()]
    assert len(set(names)) == len(names)
    on_all = [name for name in names if not name.endswith("_reach") and not name.startswith("eval_")]
    assert on_all[:7] == ["record", "stage1", "label", "backbone", "stage2", "stage2_eval", "stage3"]
    for tier in PRESETS[preset].tiers:
        assert {f"eval_{tier}_true", f"eval_{tier}_shuffled"} <= set(names)


def test_a_first_tier_is_learnt_before_all_of_them():
    pipeline = Pipeline(Path("out"), PRESETS["full"])
    steps = {step.name: step for step in pipeline.steps()}
    for words in ("", "_without_words"):
        first, then = steps[f"stage2_reach{words}"], steps[f"stage2{words}"]
        assert list(steps).index(first.name) < list(steps).index(then.name)
        assert "--policy.codes=out/codes_reach.safetensors" in first.command
        assert f"--policy.path={first.output}/checkpoints/last/pretrained_model" in then.command
        assert ("--policy.prompt.use_instruction=false" in first.command) == bool(words)
    assert steps["label_reach"].command[1] == steps["label"].command[1]  # codes of one quantiser


def test_recordings_share_no_scene_and_every_training_has_the_seed():
    recorded: list[range] = []
    for seed in (0, 1, 2):
        pipeline = Pipeline(Path("out"), PRESETS["full"], seed=seed)
        for data in (pipeline.data, pipeline.first_data):
            recorded.append(range(data.seed, data.seed + pipeline.preset.episodes * len(data.tiers)))
        seeds = {step.name: [f for f in step.command if f.startswith("--seed=")] for step in pipeline.steps()}
        assert seeds["stage1"] == seeds["backbone"] == [f"--seed={seed}"]
        assert seeds["stage2_reach"] == seeds["stage2"] == seeds["stage3_without_words"] == [f"--seed={1000 + seed}"]
        assert seeds["eval_reach_true"] == []
    recorded.sort(key=lambda seeds: seeds.start)
    assert all(one.stop <= other.start for one, other in pairwise(recorded))
    with pytest.raises(ValueError, match=r"seed: expected 0 to 1000, got -1.*Next step"):
        Pipeline(Path("out"), PRESETS["demo"], seed=-1)
