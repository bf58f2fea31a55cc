"""Who may import whom, read from the source.

    run_folder, contract -> backbones, prompting, codes, heads, laq -> backends, registry -> bundle, training
    -> lerobot_hlrp

Nothing in `hlrp_core` knows LeRobot, and the tabletop knows neither LeRobot nor torch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = {
    "expectation": 0,
    "run_folder": 0,
    "contract": 0,
    "backbones": 1,
    "prompting": 1,
    "codes": 1,
    "heads": 1,
    "laq": 1,
    "backends": 2,
    "registry": 2,
    "bundle": 3,
    "training": 3,
}
# Within the middle layer: what each part may use. A core knows no codes; a head knows cores, prompts and codes.
MIDDLE = {
    "backbones": {"prompting"},  # the types of a prompt (`prompting.prompt`) alone, see below
    "prompting": {"backbones", "codes"},
    "codes": {"backbones", "prompting", "heads"},
    "heads": {"backbones", "prompting", "codes"},
    "laq": set(),
}


def imports(path: Path, *, at_run_time: bool = True) -> list[tuple[str, int]]:
    """Modules that a file imports, with the line; without those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only: set[ast.AST] = set()
    if at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                typing_only.update(child for part in node.body for child in ast.walk(part))
    found = []
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def part_of(path: Path) -> str:
    """`heads` for hlrp_core/heads/flow.py, `bundle` for hlrp_core/bundle.py."""
    return path.relative_to(ROOT / "hlrp_core").parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("hlrp_core", {"lerobot", "lerobot_hlrp", "lerobot_policy_hlrp", "hlrp_tabletop"}),
        ("hlrp_tabletop", {"lerobot", "lerobot_hlrp", "lerobot_policy_hlrp", "hlrp_core", "torch", "transformers"}),
    ],
)
def test_packages_that_are_not_known(package, forbidden):
    for path in sources(package):
        for module, line in imports(path, at_run_time=False):
            assert module.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)}:{line} imports {module}"


def test_every_part_has_its_layer():
    parts = {part_of(path) for path in sources("hlrp_core")} - {"__init__"}
    assert parts == set(LAYERS), "give a new part of hlrp_core its layer in this test"


def test_no_arrow_back():
    for path in sources("hlrp_core"):
        part = part_of(path)
        if part == "__init__":
            continue
        for module, line in imports(path):
            package, _, rest = module.partition(".")
            target = rest.split(".")[0]
            if package != "hlrp_core" or target == part:
                continue
            where = f"{path.relative_to(ROOT)}:{line} imports {module}"
            assert target in LAYERS, f"{where}: the package itself, whose __init__ stands above all parts"
            assert LAYERS[target] <= LAYERS[part], where
            if LAYERS[target] == LAYERS[part] == 1:
                assert target in MIDDLE[part], where
            if part == "backbones" and target == "prompting":
                assert module.startswith("hlrp_core.prompting.prompt."), where


def test_backends_do_not_need_the_registry():
    """The registry composes backends, and is imported by no part below it."""
    for path in sources("hlrp_core"):
        if part_of(path) in ("backends", *MIDDLE):
            assert not [m for m, _ in imports(path) if m.startswith("hlrp_core.registry")], path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("hlrp_core", ("lerobot", "transformers.models", "accelerate")),
        ("hlrp_tabletop", ("lerobot", "torch")),
        ("hlrp_core.training", ("lerobot",)),
    ],
)
def test_what_an_import_pulls_in(module, absent):
    """In a fresh process, because here everything is imported already."""
    program = f"import sys, {module}; print([n for n in sys.modules if n.startswith({absent!r})][:5])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip().splitlines()[-1] == "[]"
