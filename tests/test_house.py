"""Who imports whom, what is packed, and what is run from where."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
MATHEMATICS = {"common.networks", "common.diffusion", "common.dpm_solver"}
HARNESS, RECIPES = "common.harness", "common.recipes"


def imports_of(file: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {part if part in FILES else node.module for part in parts}
    return names


FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for room in ("common", "algorithms")
    for file in sorted((ROOT / room).rglob("*.py"))
}
IMPORTS = {module: imports_of(file) & set(FILES) - {"common", "algorithms"} for module, file in FILES.items()}


def floor_of(module: str) -> int:
    """1 for a module that imports none of its room, else 1 more than the highest that it imports."""
    room = module.rpartition(".")[0]
    return 1 + max((floor_of(below) for below in IMPORTS[module] if below.rpartition(".")[0] == room), default=0)


def test_the_mathematics_stands_alone_and_is_small():
    for module in MATHEMATICS:
        assert IMPORTS[module] <= MATHEMATICS, module
    assert IMPORTS["common.networks"] == IMPORTS["common.diffusion"] == set()
    assert sum(len(FILES[module].read_text().splitlines()) for module in MATHEMATICS) <= 350


def test_the_harness_knows_no_algorithm_and_has_four_floors():
    modules = {module for module in FILES if module.startswith(HARNESS)}
    assert not any(name.startswith("algorithms") for module in modules for name in imports_of(FILES[module]))
    floors = (
        ("checkpoint", "devices", "flags", "plots", "process", "records", "tasks"),
        ("bandit", "d4rl", "environments", "offline", "recorder"),
        ("ogbench", "recorded", "run", "shaping"),
        ("datasets",),
    )
    highest = {name: floor for floor, names in enumerate(floors, 1) for name in names}
    highest = {f"{HARNESS}.{name}": floor for name, floor in highest.items()}
    assert set(highest) == modules - {HARNESS}
    assert {module: floor_of(module) for module in highest if floor_of(module) > highest[module]} == {}


def test_the_recipes_know_environments_and_protocols_alone():
    modules = {module for module in FILES if module.startswith(RECIPES)}
    below = modules | {f"{HARNESS}.environments", f"{HARNESS}.tasks"}
    assert {module: IMPORTS[module] - below for module in modules if IMPORTS[module] - below} == {}


def test_an_algorithm_file_imports_the_mathematics_and_the_front_of_the_harness_alone():
    for module in (module for module in FILES if module.startswith("algorithms.")):
        assert IMPORTS[module] <= MATHEMATICS | {HARNESS, f"{HARNESS}.flags", f"{HARNESS}.process"}, module


def copy(folder: Path, *names: str) -> Path:
    for name in names:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    return folder


def test_a_script_runs_its_own_repository_whatever_else_can_be_imported(tmp_path):
    """A second checkout, with this one on the path, as an editable installation would put it there."""
    copy(tmp_path, "algorithms", "benchmarks", "common")
    (tmp_path / "common" / "harness" / "process.py").write_text("raise SystemExit('the second')")
    files = [file for room in ("algorithms", "benchmarks") for file in (tmp_path / room).glob("*.py")]
    scripts = [file for file in files if 'if __name__ == "__main__":' in file.read_text()]
    assert len(scripts) == 8 + 12
    for script in scripts:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, str(script)], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.stderr == "the second\n", script


def test_the_wheel_is_whole_and_declares_what_it_needs(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="requirements-dev.txt has it")
    source = tmp_path / "source"
    source.mkdir()
    copy(source, "algorithms", "common", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    (info,) = (tmp_path / "installed").glob("*.dist-info")
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    declared = {Requirement(line) for line in Distribution.at(info).requires}
    assert declared == {Requirement(line) for line in lines if line}
    packed = [path.relative_to(tmp_path / "installed") for path in (tmp_path / "installed").rglob("*")]
    packed = {path for path in packed if path.suffix in (".py", ".npz")}
    policies = (ROOT / "common" / "recipes" / "policies").glob("*.npz")
    assert packed == {file.relative_to(ROOT) for file in (*FILES.values(), *policies)}
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-m", "common.harness.tasks"]
    printed = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout
    assert "pointmaze-umaze" in printed
