"""Every benchmark starts: its imports, also from its neighbours, are there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROBE = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"


def test_every_script_imports():
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    assert "training_loss" in names
    done = subprocess.run([sys.executable, "-c", PROBE, *names], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
