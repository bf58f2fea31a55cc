"""The demo's commands, what is read from their logs, and the command line around them."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from lerobot_hlrp.cli.demo import DemoConfig, run_demo
from lerobot_hlrp.demo import figures
from lerobot_hlrp.demo.figures import read_success_log, read_training_log
from lerobot_hlrp.demo.pipeline import Pipeline
from lerobot_hlrp.demo.presets import PRESETS
from lerobot_hlrp.demo.report import LABELS


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


def train_line(step: str, loss: float) -> str:
    return (
        f"INFO 2026-01-01 00:00:00 ot_train.py:1 step:{step} smpl:2K ep:3 epch:0.10 loss:{loss} grdn:0.6 lr:1.0e-03\n"
    )


def test_a_continued_training_has_one_curve():
    """Interrupted at 350, continued from the checkpoint of 200; steps are printed rounded from 1,000 on."""
    marker = "hlrp-demo: continued from step 200\n"
    before = "".join(train_line(str(step), step / 1000) for step in range(50, 400, 50))
    after = "".join(train_line(str(step), step / 1000 + 1) for step in range(250, 450, 50))
    curves = read_training_log(f"{before}Training:  10%|#\r\n{marker}{after}", log_freq=50)
    assert curves["step"] == list(range(50, 450, 50))
    assert curves["loss"] == [0.05, 0.1, 0.15, 0.2, 1.25, 1.3, 1.35, 1.4]

    # A checkpoint between two log lines, and a second interrupt before anything was logged.
    text = train_line("1K", 1.0) + "hlrp-demo: continued from step 1250\nhlrp-demo: continued from step 1250\n"
    curves = read_training_log(text + train_line("2K", 2.0), log_freq=1000)
    assert (curves["step"], curves["loss"]) == ([1000, 2000], [1.0, 2.0])


def test_success_of_a_continued_training_is_at_its_steps():
    measured = "INFO Suite overall aggregated: {{'avg_sum_reward': 0.5, 'pc_success': {0}}}\n".format
    before = "".join(measured(percent) for percent in (10.0, 20.0, 30.0))
    text = f"{before}\nhlrp-demo: continued from step 200\n{measured(35.0)}{measured(40.0)}"
    expected = {"step": [100, 200, 300, 400], "success": [0.1, 0.2, 0.35, 0.4]}
    assert read_success_log(text, eval_freq=100) == expected
    # Interrupted between the checkpoint and the evaluation of step 200, which is not made up for.
    text = f"{measured(10.0)}\nhlrp-demo: continued from step 200\n{measured(35.0)}"
    assert read_success_log(text, eval_freq=100) == {"step": [100, 300], "success": [0.1, 0.35]}
    assert read_success_log("nothing", eval_freq=0) == {"step": [], "success": []}


def test_a_training_goes_on_from_its_last_checkpoint(tmp_path):
    steps = {step.name: step for step in Pipeline(tmp_path, PRESETS["smoke"]).steps()}
    step = steps["stage2"]
    assert step.resume() is None
    last = step.output / "checkpoints" / "last"
    (last / "pretrained_model").mkdir(parents=True)
    (last / "pretrained_model" / "train_config.json").touch()
    assert step.resume() is None
    (last / "training_state").mkdir()
    (last / "training_state" / "training_step.json").write_text(json.dumps({"step": 3}))
    assert step.resume() == [
        "lerobot-train",
        f"--config_path={last}/pretrained_model/train_config.json",
        "--resume=true",
    ]
    assert step.reached() == 3
    assert steps["record"].reached() is None


def test_an_unknown_preset_is_refused_with_the_closest_one(tmp_path):
    with pytest.raises(
        ValueError, match=r"--preset: expected one of smoke, demo, full, got 'smok'.*Next step:.*'smoke'"
    ):
        run_demo(DemoConfig(preset="smok", output_dir=tmp_path))
    with pytest.raises(
        ValueError, match=r"--preset: expected one of smoke, demo, full, got 'x'\. Next step: Choose one"
    ):
        run_demo(DemoConfig(preset="x", output_dir=tmp_path))


def test_the_demo_itself_loads_no_models():
    """They are its commands' business; loading them takes seconds before its first line."""
    script = "import sys; import lerobot_hlrp.demo.report; print(*sys.modules, sep='\\n')"
    root = Path(__file__).parents[2]
    loaded = subprocess.run([sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True).stdout
    modules = loaded.splitlines()
    assert "lerobot_hlrp.demo.runner" in modules
    models = [name for name in modules if name.startswith(("transformers.models.", "hlrp_core.bundle"))]
    assert models == []


@pytest.mark.parametrize("preset", PRESETS)
def test_every_stage_and_tier_has_its_command(preset):
    pipeline = Pipeline(Path("out"), PRESETS[preset])
    names = [step.name for step in pipeline.steps()]
    assert len(set(names)) == len(names)
    on_all = [name for name in names if not name.endswith("_reach") and not name.startswith("eval_")]
    assert on_all[:7] == ["record", "stage1", "label", "backbone", "stage2", "stage2_eval", "stage3"]
    for tier in PRESETS[preset].tiers:
        assert {f"eval_{tier}_true", f"eval_{tier}_shuffled"} <= set(names)


@pytest.mark.parametrize("names", [["true", "shuffled", "random"], ["true", "shuffled", "without_words", "random"]])
def test_the_legend_is_within_the_picture(names, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    figures.draw_success({tier: {LABELS[name]: 0.5 for name in names} for tier in ("reach", "push")}, Path("x.png"))
    figure = drawn[0]
    figure.canvas.draw()
    legend, whole = figure.axes[0].get_legend().get_window_extent(), figure.bbox
    assert len(figure.axes[0].get_legend().get_texts()) == len(names)
    assert whole.x0 <= legend.x0 < legend.x1 <= whole.x1
    assert whole.y0 <= legend.y0 < legend.y1 <= whole.y1
    figures.plt.close(figure)


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
    assert "--dataset.root=out/dataset_reach" in steps["stage1"].command
    assert "--episodes=8000" in steps["record_reach"].command
    assert "--episodes=12000" in steps["record"].command


def test_recordings_share_no_scene_and_every_training_has_the_seed():
    recorded: list[range] = []
    for seed in (0, 1, 2):
        pipeline = Pipeline(Path("out"), PRESETS["full"], seed=seed)
        for data in (pipeline.data, pipeline.first_data):
            recorded.append(range(data.seed, data.seed + data.episodes))
        seeds = {step.name: [f for f in step.command if f.startswith("--seed=")] for step in pipeline.steps()}
        assert seeds["stage1"] == seeds["backbone"] == [f"--seed={seed}"]
        assert seeds["stage2_reach"] == seeds["stage2"] == seeds["stage3_without_words"] == [f"--seed={1000 + seed}"]
        assert seeds["eval_reach_true"] == []
    recorded.sort(key=lambda seeds: seeds.start)
    assert all(one.stop <= other.start for one, other in pairwise(recorded))
    with pytest.raises(ValueError, match=r"seed: expected 0 to 1000, got -1.*Next step"):
        Pipeline(Path("out"), PRESETS["demo"], seed=-1)
