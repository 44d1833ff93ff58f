"""Siblings differ where the mathematics differs and nowhere else."""

import ast
import importlib
import re
import subprocess
from functools import cache

import pytest
from helpers import ALGORITHMS, SCRIPTS

EDP = ("edp_td3bc", "edp_crr", "edp_iql")
DIFFUSION = (*EDP, "dql_baseline")
FEED_FORWARD = {"td3bc": "TanhPolicy", "crr": "GaussianPolicy", "iql": "GaussianPolicy"}
BANNERS = ["imports", "arguments", "state", "diffusion policy", "losses", "training", "acting", "main"]
Q_IS_BACKED_UP = ("edp_td3bc", "edp_crr", "dql_baseline")
over_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


def text_of(algorithm):
    return (SCRIPTS / f"{algorithm}.py").read_text()


@cache
def definitions(algorithm):
    """The text of each function, class and assignment of a file, with its decorators."""
    found, lines = {}, text_of(algorithm).splitlines()
    for node in ast.parse(text_of(algorithm)).body:
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", None)
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        found[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


@over_algorithms
def test_every_file_has_the_same_sections_in_the_same_order(algorithm):
    text = text_of(algorithm)
    banners = BANNERS if algorithm in DIFFUSION else [banner.removeprefix("diffusion ") for banner in BANNERS]
    assert re.findall(r"^# -{20,} (.+)$", text, flags=re.MULTILINE) == banners
    assert text.count("\n") <= 320
    assert text.endswith('if __name__ == "__main__":\n    train(cli(Args))\n')
    assert not re.search(r"^(from|import) algorithms", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("names", "algorithms"),
    [
        (["train_chunk", "act"], ALGORITHMS),
        (["critic_loss"], (*DIFFUSION, *FEED_FORWARD)),
        (["make_optimizers"], (*DIFFUSION, "crr", "iql")),
        (["Corruption", "diffusion_loss"], (*DIFFUSION, "bc")),
        (["approximate_action"], EDP),
        (["sample_action"], (*DIFFUSION, "bc")),
        (["select_action"], DIFFUSION),
        (["TrainState", "init_state", "critic_target", "train_step"], Q_IS_BACKED_UP),
        (["train_step"], ("edp_crr", "crr")),
        (["value_loss", "critic_target", "advantage_weight"], ("edp_iql", "iql")),
        (["sample_action", "select_action"], ("crr", "iql")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_shared_text_is_identical(names, algorithms):
    for name in names:
        assert len({definitions(algorithm)[name] for algorithm in algorithms}) == 1, name


@pytest.mark.parametrize(("algorithm", "policy"), FEED_FORWARD.items())
def test_states_are_identical_but_for_the_class_of_the_policy(algorithm, policy):
    for name in ("TrainState", "init_state"):
        assert definitions(algorithm)[name] == definitions(f"edp_{algorithm}")[name].replace("NoisePredictor", policy)


@over_algorithms
def test_train_is_identical_but_for_the_rewards_and_the_chosen_episodes(algorithm):
    text = definitions(algorithm)["train"]
    if algorithm == "bc":
        text = text.replace('"none"', "args.reward_rule")
        text = text.replace("    dataset = best_episodes(dataset, behaviour, args.top_fraction)\n", "")
    assert text == definitions("edp_td3bc")["train"]


def test_a_note_that_a_file_cites_stands_in_its_header_and_has_one_text_everywhere():
    notes = {}
    for algorithm in ALGORITHMS:
        _, header, body = text_of(algorithm).split('"""', 2)
        of_file = dict(re.findall(r"^(D\d+) +(.+)$", header, flags=re.MULTILINE))
        assert set(re.findall(r"\bD\d+\b", body)) == set(of_file), algorithm
        for number, text in of_file.items():
            assert notes.setdefault(number, text) == text, (algorithm, number)
    table = (SCRIPTS.parent / "docs" / "differences.md").read_text()
    assert set(notes) <= set(re.findall(r"^\| (D\d+) \|", table, flags=re.MULTILINE))


@over_algorithms
def test_every_flag_is_used(algorithm):
    """A flag that a file shows is one that it reads, or for a few of all runs that common/harness reads."""
    text, harness = text_of(algorithm), (SCRIPTS.parent / "common" / "harness").glob("*.py")
    harness = "".join(file.read_text() for file in harness)
    of_every_run = {"seed", "num_seeds", "run_dir", "resume", "checkpoint_every", "eval_every", "track", "preset"}
    of_every_run |= {"env_id", "dataset_id", "dataset_path", "trust", "exp_name", "capture_video", "eval_episodes"}
    for name in importlib.import_module(f"algorithms.{algorithm}").Args.__dataclass_fields__:
        assert re.search(rf"\bargs\.{name}\b", harness if name in of_every_run else text), name


@pytest.mark.parametrize(
    ("a", "b", "most"),
    [
        ("edp_td3bc", "dql_baseline", 40),
        ("edp_td3bc", "edp_crr", 70),
        ("edp_td3bc", "edp_iql", 101),
        ("td3bc", "edp_td3bc", 173),
        ("crr", "edp_crr", 146),
        ("iql", "edp_iql", 128),
    ],
)
def test_siblings_differ_by_few_lines(a, b, most):
    """As `diff a.py b.py | grep -c '^[<>]'` counts."""
    printed = subprocess.run(["diff", f"{a}.py", f"{b}.py"], cwd=SCRIPTS, capture_output=True, text=True).stdout
    changed = sum(line.startswith(("<", ">")) for line in printed.splitlines())
    assert 0 < changed <= most
