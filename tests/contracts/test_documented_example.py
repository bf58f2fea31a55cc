"""The example backend of docs/backends.md keeps the contract, by the command that the page gives."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "backends.md").read_text()


def test_the_example_passes_the_contract(tmp_path: Path):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "chained_head.py").write_text(example)
    (command,) = re.findall(r"^PYTHONPATH=\. python (-m pytest .*)$", PAGE, flags=re.MULTILINE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    arguments = [*shlex.split(command), "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'runs'}"]
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    found = re.search(r"(\d+) passed", run.stdout)
    assert found is not None and int(found[1]) > 40, run.stdout[-1000:]
