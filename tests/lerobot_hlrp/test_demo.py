"""The demo's runner: what is skipped, what runs again, and what an interrupt does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lerobot_hlrp.demo.processes import Lane
from lerobot_hlrp.demo.runner import Step, StepError, StepRunner


def touch_step(
    folder: Path, name: str, *, script: str | None = None, output: Path | None = None, resume=None, reached=None
) -> Step:
    """A step that appends a line to its output."""
    output = output or folder / f"{name}.txt"
    script = script or f"open({str(output)!r}, 'a').write('ran\\n')"
    command = [sys.executable, "-c", script]
    return Step(name, name, command, output, resume or (lambda: None), reached or (lambda: None))


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


def test_a_step_whose_output_is_gone_runs_again_and_so_does_what_follows(tmp_path):
    steps = [touch_step(tmp_path, name) for name in "abc"]
    StepRunner(tmp_path).run_all(steps)
    steps[1].output.unlink()
    for step in (steps[0], steps[2]):
        step.output.write_text("old\n")
    StepRunner(tmp_path).run_all(steps)
    assert [step.output.read_text() for step in steps] == ["old\n", "ran\n", "ran\n"]


def test_a_failure_stops_and_names_the_log(tmp_path):
    broken = touch_step(tmp_path, "broken", script="import sys; print('why'); sys.exit(3)")
    never = touch_step(tmp_path, "never")
    runner = StepRunner(tmp_path)
    with pytest.raises(StepError, match=r"exit status 3.*broken\.log"):
        runner.run_all([broken, never])
    assert runner.log_path(broken).read_text() == "why\n"
    assert runs(never) == 0


@pytest.mark.parametrize(("reached", "marker"), [(200, "continued from step 200"), (None, "continued")])
def test_an_unfinished_step_is_continued_by_its_own_command(reached, marker, tmp_path):
    output = tmp_path / "a.txt"
    continued = [sys.executable, "-c", f"open({str(output)!r}, 'a').write('continued\\n')"]
    script = f"open({str(output)!r}, 'a').write('begun\\n'); print('50%', end=''); raise SystemExit(1)"
    step = touch_step(tmp_path, "a", script=script, resume=lambda: continued, reached=lambda: reached)
    runner = StepRunner(tmp_path)
    with pytest.raises(StepError):
        runner.run_all([step])
    StepRunner(tmp_path).run_all([step])
    assert output.read_text() == "begun\ncontinued\n"
    assert runner.log_path(step).read_text() == f"50%\nhlrp-demo: {marker}\n"  # for whoever reads curves from it


def test_an_unfinished_step_without_continuation_starts_afresh(tmp_path):
    output = tmp_path / "a.txt"
    flag = tmp_path / "second"
    script = (
        f"open({str(output)!r}, 'a').write('ran\\n')\n"
        f"import pathlib, sys\n"
        f"p = pathlib.Path({str(flag)!r})\n"
        "seen = p.exists(); p.touch(); print(seen); sys.exit(0 if seen else 1)"
    )
    step = touch_step(tmp_path, "a", script=script)
    runner = StepRunner(tmp_path)
    with pytest.raises(StepError):
        runner.run_all([step])
    runner.run_all([step])
    assert runs(step) == 1
    assert runner.log_path(step).read_text() == "True\n"  # nothing of the run that was thrown away
    assert len(runner._read(step)["runs"]) == 2


def waiting_step(folder: Path, name: str, *, until: Path, script: str = "") -> Step:
    """A step that ends when a file is there, for which it waits a minute at most."""
    wait = "import pathlib, sys, time\nend = time.time() + 60\n"
    wait += f"while not pathlib.Path({str(until)!r}).exists():\n    time.sleep(0.02)\n"
    wait += "    if time.time() > end: sys.exit('nobody came')\n"
    script = f"{wait}{script}print({name!r}, 'ran')\npathlib.Path({name!r}).touch()"
    return touch_step(folder, name, script=script, output=folder / name)


def test_branches_run_beside_each_other(tmp_path, monkeypatch, capfd):
    """Each branch waits for what the other makes: one after another they could not end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    hello = touch_step(tmp_path, "hello", output=tmp_path / "hello")
    first = [
        touch_step(tmp_path, "begun", output=tmp_path / "begun"),
        waiting_step(tmp_path, "a", until=tmp_path / "steps" / "c.json"),  # then all that b printed has been read
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


def saving_step(folder: Path, name: str, *, saving_s: float = 0.3) -> Step:
    """A step that saves what it has when it is interrupted, and ends at once, without, when it is interrupted again."""
    script = f"""
import pathlib, signal, sys, time
interrupts = []
def note(*_):
    interrupts.append(1)
    print("interrupted", len(interrupts))
    if len(interrupts) > 1:
        sys.exit(9)
signal.signal(signal.SIGINT, note)
pathlib.Path({str(folder / name)!r} + "_begun").touch()
end = time.time() + 60
while not interrupts and time.time() < end:
    time.sleep(0.01)
time.sleep({saving_s})
pathlib.Path({str(folder / name)!r} + "_saved").touch()
sys.exit(130)
"""
    return touch_step(folder, name, script=script)


def wait_for(condition) -> None:
    end = time.time() + 60
    while not condition():
        assert time.time() < end, "it never happened"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_every_branch(number, tmp_path, monkeypatch):
    """Sent to the demo alone, as `kill` does, and not to the terminal's group of processes."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    steps = [saving_step(tmp_path, name) for name in "ab"]
    never = touch_step(tmp_path, "never")

    def kill_when_both_run() -> None:
        wait_for(lambda: all((tmp_path / f"{name}_begun").exists() for name in "ab"))
        os.kill(os.getpid(), number)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    threading.Thread(target=kill_when_both_run).start()
    runner = StepRunner(tmp_path, num_cores=2)
    with pytest.raises(KeyboardInterrupt):
        runner.run_all([], [[step, never] for step in steps])
    assert all((tmp_path / f"{name}_saved").exists() for name in "ab")
    assert [runner.log_path(step).read_text() for step in steps] == ["interrupted 1\n"] * 2
    assert runs(never) == 0
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_ctrl_c_lets_the_command_save(tmp_path):
    """The terminal sends it to the whole group of processes."""
    step = saving_step(tmp_path, "a")
    script = f"""
import signal, sys
from pathlib import Path
from lerobot_hlrp.demo.runner import Step, StepRunner
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
step = Step("a", "a", {step.command!r}, Path({str(step.output)!r}))
try:
    StepRunner(Path({str(tmp_path)!r})).run_all([step])
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(130)
"""
    root = Path(__file__).parents[2]
    demo = subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: (tmp_path / "a_begun").exists() or demo.poll() is not None)
        os.killpg(demo.pid, signal.SIGINT)
        printed, _ = demo.communicate(timeout=20)
    finally:
        demo.kill()
    assert (tmp_path / "a_saved").exists()
    assert (tmp_path / "logs" / "a.log").read_text() == "interrupted 1\n"
    assert "interrupted 1" not in printed  # many a command says it with a traceback
    assert printed.endswith("\ninterrupted\n")
    assert demo.returncode == 130


@pytest.mark.parametrize(("times", "status"), [(1, 130), (2, 9), (3, -signal.SIGKILL)])
def test_further_interrupts_are_more_urgent(times, status, tmp_path):
    step = saving_step(tmp_path, "a")
    log = tmp_path / "a.log"
    if times == 3:
        step = touch_step(tmp_path, "a", script=step.command[2].replace("sys.exit(9)", "time.sleep(20)"))
    lane = Lane()

    def interrupt() -> None:
        wait_for(lambda: (tmp_path / "a_begun").exists())
        for number in range(1, times + 1):
            lane.interrupt()
            wait_for(lambda number=number: number == 3 or f"interrupted {number}\n" in log.read_text())

    threading.Thread(target=interrupt).start()
    assert lane.run(step.command, log) == status
    with pytest.raises(KeyboardInterrupt):
        lane.run(step.command, log)


def test_an_interrupted_command_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("lerobot_hlrp.demo.processes.PATIENCE_S", 0.2)
    step = saving_step(tmp_path, "a", saving_s=20)
    lane = Lane()

    def stop() -> None:
        wait_for(lambda: (tmp_path / "a_begun").exists())
        lane.stop()

    threading.Thread(target=stop).start()
    assert lane.run(step.command, tmp_path / "a.log") == -signal.SIGKILL


def test_the_log_holds_what_a_command_has_just_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    waiting = waiting_step(tmp_path, "a", until=tmp_path / "seen")
    step = touch_step(tmp_path, "a", script=f"print('first')\n{waiting.command[2]}")
    runner = StepRunner(tmp_path)

    def look() -> None:
        wait_for(lambda: runner.log_path(step).exists() and runner.log_path(step).read_text() == "first\n")
        (tmp_path / "seen").touch()

    threading.Thread(target=look).start()
    runner.run_all([step])
    assert runner.log_path(step).read_text() == "first\na ran\n"


def test_what_a_command_leaves_running_does_not_hold_up_the_demo(tmp_path):
    left = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(8)']); print('ran')"
    )
    start = time.time()
    assert Lane(visible=False).run([sys.executable, "-c", left], tmp_path / "a.log") == 0
    assert time.time() - start < 7
    assert (tmp_path / "a.log").read_text() == "ran\n"
