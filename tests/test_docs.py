"""README and docs/: every command works, the site builds and needs no network, its pages hold the source as it is."""

import ast
import contextlib
import difflib
import html
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tyro
from helpers import ALGORITHMS, SCRIPTS, TINY, make_args

from common.harness import Dataset
from common.harness.flags import cli
from common.harness.tasks import ENVIRONMENTS, TASKS, with_domain_defaults

ROOT = SCRIPTS.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# ---------------------------------------------------------------------------------------------------------- commands

NOT_RUN = {  # and why
    "git clone <this repository> edp && cd edp": "this is that clone",
    "python minimal/edp.py": "test_minimal.py runs it, slow",
    "python minimal/edp.py D4RL/pen/expert-v2 --updates 10000": "downloads; test_minimal.py runs it on local data",
    **dict.fromkeys(
        ("python make_logs.py", "python make_dataset.py", "python act.py"), "the slow test below runs them"
    ),
    "python benchmarks/bandit.py": "trains for minutes to draw; test_bandit and the notebook train the same",
    "python benchmarks/solver.py": "test_solver.py runs it",
    "python benchmarks/breaks.py": "trains for half an hour; test_breaks.py makes its edits",
    "python3 -m venv .venv && source .venv/bin/activate": "sets up an environment, as `make test` did for this one",
    "pip install -r requirements-dev.txt && python -m pytest -m 'not slow' -n 2 --dist worksteal": "these very tests",
    "cp algorithms/edp_td3bc.py algorithms/edp_mean_q.py": "the fixture `exercise` does it",
    "python algorithms/edp_mean_q.py --env-id pointmaze-umaze --num-updates 2000": "test_the_exercise_trains runs it",
    "diff algorithms/edp_td3bc.py algorithms/edp_mean_q.py": "the fixture `exercise` counts its lines",
}


def commands_in_blocks(page):
    """Of every fenced block without a language."""
    blocks = re.findall(r"^```(.*)\n((?:(?!```).*\n)*)```$", page.read_text(), flags=re.MULTILINE)
    for block in (block for language, block in blocks if not language):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield " ".join(shlex.quote(word) if " " in word else word for word in words)


def commands():
    """(page, command) of all blocks, and of code in a sentence that begins as a command."""
    for page in PAGES:
        for command in commands_in_blocks(page):
            yield page, command
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for command in re.findall(r"`((?:python|pip|make|diff) [^`]+)`", prose):
            yield page, " ".join(command.replace("<algorithm>", "edp_td3bc").split())


COMMANDS = {command: page for page, command in commands()}
assert set(NOT_RUN) <= set(COMMANDS), "a reason is given for a command that is gone"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:60])
def test_a_command_of_the_docs_works(command):
    """The script's own parser takes its flags, or it is cheap and run, or NOT_RUN gives the reason why not."""
    if command in NOT_RUN:
        return
    words = [word for word in shlex.split(command) if not word.startswith("XLA_FLAGS=")]
    if words[:2] == ["pip", "install"]:  # not run: it would change the environment of the tests
        assert words[2] != "-r" or (ROOT / words[3]).is_file()
    elif words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "diff":
        assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 1, "there are differences"
    elif words[:2] == ["python", "-m"]:
        subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, capture_output=True)
    else:
        assert words[0] == "python", "neither tested nor in NOT_RUN"
        folder, script = words[1].removesuffix(".py").split("/")
        module = importlib.import_module(f"algorithms.{script}" if folder == "algorithms" else script)
        if "--help" in words:
            with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit, match="0"):
                tyro.cli(module.Args, args=words[2:])
            return
        args = (cli if folder == "algorithms" else tyro.cli)(module.Args, args=words[2:])
        if folder == "algorithms":
            assert args.env_id in TASKS
            with_domain_defaults(args, TASKS[args.env_id].environment.domain)  # intervals fit


FIRST_PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("start", "acting", "your-logs"))]
NOT_IN_ORDER = {  # and why
    "git |make |pip |python3 -m venv": "sets up an environment, or is about these tests",
    ".*(D4RL/|antmaze|hopper-medium)": "downloads",
    ".*edp/hopper/medium-v1": "makes 200,000 steps; test_recipes.py does, slow",
}
FEW = {"algorithms": {"num-updates": 4, "eval-every": 2, "batch-size": 8}, "minimal": {"updates": 4}}


@pytest.mark.slow
def test_the_first_pages_can_be_followed_in_one_folder(tmp_path, made_pointmaze):
    """All commands of their blocks, in order, those that train with fewer updates; then the Python of the page."""
    for name in ("algorithms", "benchmarks", "common", "minimal"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "policies", tmp_path / "policies")
    shutil.copytree(made_pointmaze, tmp_path / "minari")
    env = {"HOME": str(tmp_path), "MINARI_DATASETS_PATH": str(tmp_path / "minari"), "PYTHONPATH": str(tmp_path)}
    env = os.environ | env | {"XLA_FLAGS": ""}  # the programs are those that people run

    def run(words):
        words = [sys.executable if word == "python" else word for word in words]
        process = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert process.returncode == (words[0] == "diff"), (words, process.stdout, process.stderr)

    def of_newest_run(text):
        runs = sorted((tmp_path / "runs").glob("*__edp_iql__*"), key=lambda folder: folder.stat().st_mtime)
        return re.sub("runs/<(run|other)>", f"runs/{runs[-1].name}", text) if runs else text

    for page in FIRST_PAGES:
        code = r'^```py(?:thon)?(?: title="(.*?)")?\n(.*?)^```'
        scripts = re.findall(code, page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for title, script in scripts:
            if title:
                (tmp_path / title).write_text(script)
        for command in commands_in_blocks(page):
            if any(re.match(pattern, command) for pattern in NOT_IN_ORDER):
                continue
            trains = re.match("python (algorithms|minimal)/(?!.*--help)", command)
            for name, value in FEW[trains[1]].items() if trains else ():
                command = re.sub(rf" --{name} \S+", "", command) + f" --{name} {value}"
            run(shlex.split(of_newest_run(command)))
        for title, script in scripts:
            if not title:
                run(["python", "-c", of_newest_run(script)])


# ------------------------------------------------------------------------------------------------------------ README


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.strip().splitlines()]


def test_the_algorithms_of_the_readme():
    """Lines are right to the ten, cited equations stand in the file, speeds are those that were measured."""
    speeds = json.loads((ROOT / "benchmarks" / "results" / "speed-amd-epyc-2-cores-avx2.json").read_text())["updates"]
    speeds["dql_baseline"] = speeds["dql"]
    table = re.search(r"^\| file \| idea .*?\n\n", PAGES[0].read_text(), flags=re.MULTILINE | re.DOTALL)[0]
    rows = cells(table)[2:]
    assert [Path(row[0].strip("`")).stem for row in rows] == list(ALGORITHMS)
    for file, _, equations, lines, speed in rows:
        path = ROOT / file.strip("`")
        assert abs(int(lines) - len(path.read_text().splitlines())) <= 10, file
        cited = " ".join(re.findall(r"Eq\. [\d, and]+", path.read_text()))
        assert set(equations.split(", ")) <= set(re.findall(r"\d+", cited)), file
        assert bool(speed) == (path.stem in speeds)
        assert not speed or float(speed) == pytest.approx(speeds[path.stem]["per_second"], rel=5e-3), file


def test_the_tasks_of_the_readme_are_those_there_are():
    named = set()
    for pattern in re.findall(r"^\| `([\w{},-]+)` \|", PAGES[0].read_text(), flags=re.MULTILINE):
        names = [""]
        for part in re.split(r"(\{.*?\})", pattern):
            names = [name + choice for name in names for choice in part.strip("{}").split(",")]
        named |= set(names)
    assert named == set(TASKS)


def test_reference_returns_of_the_docs():
    text = (ROOT / "docs" / "data.md").read_text()
    for name, environment in ENVIRONMENTS.items():
        row = re.search(rf"^\| `{name}` \| (\S+) \| (\S+) \|$", text, flags=re.MULTILINE)
        if environment.cells is None:
            assert (float(row[1]), float(row[2])) == environment.reference, name


@pytest.fixture
def exercise(tmp_path, monkeypatch):
    """The algorithm that docs/your-own.md makes of edp_td3bc.py: both patches, as `git apply` takes them."""
    one, two = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "your-own.md").read_text(), flags=re.DOTALL)
    (tmp_path / "algorithms").mkdir()
    copied = tmp_path / "algorithms" / "edp_mean_q.py"
    original = (SCRIPTS / "edp_td3bc.py").read_text()
    copied.write_text(original)
    for patch in (one, two):
        subprocess.run(["git", "apply"], input=patch, cwd=tmp_path, check=True, text=True)
        if patch == one:
            lines = [line[0] for line in difflib.ndiff(original.splitlines(), copied.read_text().splitlines())]
            assert (lines.count("-"), lines.count("+")) == (4, 2), "four lines go and two come"
    monkeypatch.syspath_prepend(copied.parent)
    monkeypatch.chdir(tmp_path)
    yield importlib.import_module("edp_mean_q")
    del sys.modules["edp_mean_q"]


def test_the_exercise_guides_by_the_mean_of_both_critics_or_the_smaller_one(exercise, monkeypatch, quick_networks):
    batch, key = Dataset(*(jnp.full(shape, 0.1) for shape in [(8, 4), (8, 2), (8,), (8, 4), (8,)])), jax.random.key(0)
    monkeypatch.setattr(exercise, "twin_q", lambda *_: jnp.repeat(jnp.array([[3.0], [-1.0]]), 8, axis=1))
    for pessimism, guidance in ((0.0, -1), (1.0, 1)):
        args = make_args(exercise, TINY, learning_rate=3e-4, eta=1.0, pessimism=pessimism)
        state = exercise.init_state(key, 4, 2, args)
        _, metrics = exercise.policy_loss(state.policy, state.critics, batch, key, args)
        assert (metrics["guidance_loss"], metrics["critic_gap"]) == (guidance, 4)


@pytest.mark.slow
def test_the_exercise_trains(exercise, pointmaze_datasets, tmp_path, quick_networks):
    results = exercise.train(make_args(exercise, TINY, run_dir=str(tmp_path / "run")))
    assert results["last"].shape == (2,)


# -------------------------------------------------------------------------------------------------------------- site


def load_hooks():
    for package in ("mkdocs", "material", "ziamath"):
        pytest.importorskip(package, reason="requirements-docs.txt has it")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = pytest.fixture(load_hooks)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site. Any warning is an error."""
    load_hooks()
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


def plain(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def test_every_source_is_a_page_and_nothing_is_fetched(site):
    """That links lead somewhere is what `mkdocs build --strict` sees to."""
    pages = {path: path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}
    sources = [*PAGES[1:], *(ROOT / "docs").glob("*.ipynb")]
    expected = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in sources} | {Path("index.html")}
    assert {path.relative_to(site) for path in pages} == expected
    for path, text in pages.items():
        for tag in re.findall(r"<(?:img|link|script|iframe|video|source)\b[^>]*>", text):
            assert not re.search(r"(src|href)=\"?(https?:)?//", tag), path
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style


def test_mathematics_is_mathml(site):
    """On every page: outside code no LaTeX is left."""
    for path in site.rglob("*.html"):
        prose = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", path.read_text(), flags=re.DOTALL)
        assert not re.search(r"[\\$]", plain(prose)), path
    assert "<math" in (site / "algorithms" / "equations.html").read_text()
    assert (site / "assets" / "STIXTwoMath-Regular.ttf").stat().st_size > 100_000


def test_the_page_of_the_short_file_shows_every_line_once(hooks):
    """From the first constant to the end of `main`; blank lines may lie between two sections."""
    page, file = (ROOT / "docs" / "minimal.md").read_text(), "minimal/edp.py"
    marks = re.findall(rf"^<!-- code: {file} (\w+)(?: to (\w+))? -->$", page, flags=re.MULTILINE)
    shown = "".join(hooks.explained(file, first, last or None, "") for first, last in marks)
    shown = [range(int(a), int(b) + 1) for a, b in re.findall(r"lines (\d+) to (\d+)", shown)]
    lines = (ROOT / file).read_text().splitlines()
    expected = range(lines.index("import optax") + 2, lines.index('if __name__ == "__main__":') + 1)
    with_code = lambda numbers: [number for number in numbers if lines[number - 1]]
    assert with_code(itertools.chain(*shown)) == with_code(expected)


def test_every_equation_belongs_to_a_function(hooks):
    """An equation of a function that is gone would be shown on no page."""
    files = [*(SCRIPTS / f"{name}.py" for name in ALGORITHMS), *(ROOT / "common").glob("*.py")]
    defined = {
        (node.name, file.stem) for file in files for node in ast.parse(file.read_text()).body if hasattr(node, "name")
    }
    for function, algorithm in hooks.equations():
        assert (function, algorithm) in defined if algorithm else any(function == name for name, _ in defined)
