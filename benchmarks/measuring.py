"""What the benchmarks share: interleaved timing, peak memory, the machine, and how a result is shown."""

from __future__ import annotations

import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hlrp_core.heads.linear_cross_entropy import workspace


def interleaved_ms(functions: dict[str, Callable[[], object]], rounds: int, *, warmup: int = 1) -> dict[str, float]:
    """Median milliseconds of each function. They take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if number >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def extra_peak_bytes(function: Callable[[], object]) -> int:
    """How far memory rises above its level before the call, on the CPU.

    Counted from the profiler's record of every allocation and release by torch's allocator, in order of time: exact
    and repeatable, where the resident size of the process depends on what the system hands back and when. A buffer that
    is kept from one step to the next counts, too: it is let go before.
    """
    workspace.clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    kineto: Any = profiler.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    level, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def peak_anonymous_bytes(function: Callable[[], object]) -> int:
    """The highest anonymous resident size of this process while `function` runs, of Linux, looked at every 10 ms."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            sizes = [1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
            peak = max(peak, *sizes)
            if done.wait(0.01):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return peak


def describe_machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    cells = [header, *[[str(value) for value in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(value.rjust(width) for value, width in zip(row, widths, strict=True)))


def write_result(result: dict[str, Any], output: Path | None) -> None:
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(output)
    print(f"written to {output}")
