"""The README's performance section is what the results of the benchmarks say."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", BENCHMARKS / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_results(report):
    readme = report.README.read_text()
    assert report.insert(readme, report.render()) == readme, "run: python benchmarks/report.py"


def test_the_section_follows_the_results(report, tmp_path):
    results = Path(shutil.copytree(report.RESULTS, tmp_path / "results"))
    path = results / "outside_model.json"
    result = json.loads(path.read_text())
    result["results"][0]["outside_share"] = 0.123
    result["machine"]["cpu"] = "A Machine of Another Kind"
    path.write_text(json.dumps(result))
    section = report.render(results)
    assert "12.3% of the step" in section
    assert "A Machine of Another Kind" in section
    assert section != report.render()


def test_a_missing_result_names_the_command_that_makes_it(report, tmp_path):
    results = Path(shutil.copytree(report.RESULTS, tmp_path / "results"))
    (results / "smolvla.json").unlink()
    with pytest.raises(ValueError, match=r"no smolvla\.json.*python benchmarks/smolvla\.py --output"):
        report.render(results)


def test_a_readme_without_markers_is_refused(report):
    with pytest.raises(ValueError, match=r"README\.md: expected"):
        report.insert("# A title\n", "text")
