"""README.md and docs/performance.md say what the results of the benchmarks say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MACHINE = {"cpu": "A Processor", "cores": 2, "threads": 1, "torch": "2.0"}
POLICY = {"expert_parameters": 31_000_000, "parameters_in_each_flow_step": 12_000_000, "expert_layers": 8}
POLICY |= {"chunk_ms": 1234.5, "chunk_ratio": 0.4, "training_step_ms": 56.7, "training_step_ratio": 0.5}
POLICIES = dict.fromkeys(("smolvla", "matched", "same_heads", "defaults"), POLICY)
CODES = {"backend": "qwen_chat", "size": "tiny", "vocabulary": 600, "batch": 1, "S": 4, "K": 8, "constrained_ms": 5.0}
CODES |= {"floor_ms": 4.0, "generate_ms": 20.0, "generate_torch_ms": 30.0, "generate_torch_over_constrained": 6.0}
LABELLING = {"label_ms": 1.0, "decode_ms": 0.2, "encode_ms": 1.2, "items_ms": 3.0, "label_over_decode": 5.0}
LABELLING |= {"lerobot_ms": None}  # which decodes video alone
SAMPLES = {
    "training_loss": [
        {
            "backend": "qwen_chat",
            "size": "tiny",
            "image": "96x96",
            "batch_size": 8,
            "vocabulary": 9,
            "ours_ms": 1,
            "full_ms": 2,
            "prompt_tokens": 84,
            "time_ratio": 2.0,
            "time_ratio_torch": 1.5,
            "memory_ratio": 3.0,
            "time_ratio_alone": 4.5,
            "memory_ratio_alone": 5.5,
        }
    ],
    "decoding": [{**CODES, "constrained_over_floor": 1.25, "generate_over_constrained": 4.0}],
    "outside_model": [
        {
            "backend": "qwen_chat",
            "instructions": "known",
            "batch_size": 8,
            "outside_ms": 2.0,
            "step_ms": 40.0,
            "outside_share": 0.051,
        }
    ],
    "vocabulary": {
        "tiny": {
            "batch_size": 8,
            "vocabulary": 9,
            "code_rows_ms": 1.0,
            "all_ms": 2.0,
            "ms_ratio": 1.9,
            "held_mb_ratio": 20.0,
            "extra_mb_ratio": 1.7,
        }
    },
    "flow_expert": [
        {
            "parameters": 1_120_646,
            "batch_size": 32,
            "chunk_size": 16,
            "prefix_tokens": 40,
            "cached_ms": 5.0,
            "naive_ms": 12.0,
            "speedup": 2.4,
        }
    ],
    "labelling": {"128x128 images": LABELLING, "480x480 video": {**LABELLING, "lerobot_ms": 8.25}},
    "labelling_memory": {"1": {"frames": 1000, "peak_mb": 500.0}, "2": {"frames": 100_000, "peak_mb": 510.0}},
}


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", BENCHMARKS / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with a small result of every benchmark."""
    common = {"machine": MACHINE, "size": "tiny"}
    for name, sample in SAMPLES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**common, "results": sample}))
    for name, mkl in (("smolvla", False), ("smolvla_mkl", True)):
        result = {**common, "mkl": mkl, "batch_size": 8, "policies": POLICIES}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return tmp_path


def test_the_documents_show_the_results(report):
    for path, section in zip((report.README, report.DOCUMENT), report.render(), strict=True):
        text = path.read_text()
        assert report.insert(text, section, title=path.name) == text, "run: python benchmarks/report.py"


def test_every_result_reaches_the_document(report, results):
    short, full = report.render(results)
    assert "A Processor (2 cores, one thread, torch 2.0)" in full
    for figure in ("3.0x less extra memory", "1.25x the floor", "5.1% of the step", "1,234 ms", "0.4x its time"):
        assert figure in full, figure
        assert figure in short, figure
    only_there = ("MKL on both sides", "defaults: expert of 31.0M parameters, 12.0M in each flow step")
    for figure in (*only_there, "20.0x less held", "2.4x faster", "by LeRobot's decoder: 8.25 ms"):
        assert figure in full, figure
        assert figure not in short, figure
    for section in (short, full):
        assert {line.count("|") for line in section.splitlines() if line.startswith("|")} == {5}


def test_another_machine_is_named_too(report, results):
    path = results / "outside_model.json"
    path.write_text(path.read_text().replace("A Processor", "Another Processor"))
    for section in report.render(results):
        assert "A Processor (" in section
        assert "Another Processor (" in section


def test_a_missing_result_names_the_command_that_makes_it(report, results):
    (results / "smolvla.json").unlink()
    with pytest.raises(ValueError, match=r"no smolvla\.json.*python benchmarks/smolvla\.py --output"):
        report.render(results)


def test_the_section_replaces_what_was_between_the_markers(report):
    text = f"# Title\n\n{report.START}\nold\n{report.END}\n\n## Licence\n"
    new = report.insert(text, "new", title="README.md")
    assert new == f"# Title\n\n{report.START}\nnew\n{report.END}\n\n## Licence\n"
    assert report.insert(new, "new", title="README.md") == new
    with pytest.raises(ValueError, match=r"README\.md: expected"):
        report.insert("# Title\n", "new", title="README.md")
