"""Who imports whom: `python tests/test_house.py` prints it, floor by floor."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MATHEMATICS = {"common.networks", "common.diffusion", "common.dpm_solver"}
HARNESS = "common.harness"


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


def test_the_mathematics_stands_alone():
    for module in MATHEMATICS:
        assert IMPORTS[module] <= MATHEMATICS, module
    assert IMPORTS["common.networks"] == IMPORTS["common.diffusion"] == set()


def test_the_mathematics_is_small():
    assert sum(len(FILES[module].read_text().splitlines()) for module in MATHEMATICS) <= 350


def test_the_harness_knows_no_algorithm_and_has_four_floors():
    modules = {module for module in FILES if module.startswith(HARNESS)}
    assert not any(name.startswith("algorithms") for module in modules for name in imports_of(FILES[module]))
    floors = (
        ("flags", "plots", "process", "records", "tasks"),
        ("bandit", "checkpoint", "environments"),
        ("d4rl", "ogbench", "pointmaze", "run"),
        ("datasets",),
    )
    highest = {name: floor for floor, names in enumerate(floors, 1) for name in names}
    highest = {f"{HARNESS}.{name}": floor for name, floor in highest.items()}
    assert set(highest) == modules - {HARNESS}
    assert {module: floor_of(module) for module in highest if floor_of(module) > highest[module]} == {}


def test_an_algorithm_file_imports_the_mathematics_and_the_front_of_the_harness_alone():
    for module in (module for module in FILES if module.startswith("algorithms.")):
        assert IMPORTS[module] <= MATHEMATICS | {HARNESS, f"{HARNESS}.flags", f"{HARNESS}.process"}, module


if __name__ == "__main__":
    for room in ("algorithms", "common", HARNESS):
        modules = [module for module in FILES if module.rpartition(".")[0] == room and module != HARNESS]
        print(f"{room}/")
        for module in sorted(modules, key=lambda module: (-floor_of(module), module)):
            below = ", ".join(name.removeprefix("common.") for name in sorted(IMPORTS[module])) or "nothing of ours"
            print(f"  floor {floor_of(module)}  {module.rpartition('.')[2]:<13} imports {below}")
