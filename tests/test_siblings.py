"""Siblings differ where the mathematics differs and nowhere else."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

EDP = ("edp_td3bc", "edp_crr", "edp_iql")
DIFFUSION = (*EDP, "dql_baseline")
FEED_FORWARD = {"td3bc": "TanhPolicy", "crr": "GaussianPolicy", "iql": "GaussianPolicy"}
ALGORITHMS = (*DIFFUSION, *FEED_FORWARD, "bc")
FOLDER = Path(__file__).parent.parent / "algorithms"
BANNERS = ["imports", "arguments", "state", "diffusion policy", "losses", "training", "acting", "main"]
Q_IS_BACKED_UP = ("edp_td3bc", "edp_crr", "dql_baseline")


def source(algorithm, name):
    """The text of a function or class; jitted functions are unwrapped."""
    return inspect.getsource(inspect.unwrap(getattr(importlib.import_module(f"algorithms.{algorithm}"), name)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_file_has_the_same_sections_in_the_same_order(algorithm):
    text = (FOLDER / f"{algorithm}.py").read_text()
    banners = BANNERS if algorithm in DIFFUSION else [banner.removeprefix("diffusion ") for banner in BANNERS]
    assert re.findall(r"^# -{20,} (.+)$", text, flags=re.MULTILINE) == banners
    assert len(text.splitlines()) <= 330
    assert not re.search(r"^(from|import) algorithms", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("names", "algorithms"),
    [
        (["train_chunk"], ALGORITHMS),
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
        first, *others = (source(algorithm, name) for algorithm in algorithms)
        assert all(other == first for other in others), name


@pytest.mark.parametrize("algorithm", FEED_FORWARD)
def test_states_are_identical_but_for_the_class_of_the_policy(algorithm):
    for name in ("TrainState", "init_state"):
        expected = source(f"edp_{algorithm}", name).replace("NoisePredictor", FEED_FORWARD[algorithm])
        assert source(algorithm, name) == expected


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_train_is_identical_but_for_the_rewards_and_the_critics(algorithm):
    text = source(algorithm, "train").replace(", iql=True)", ")")
    expected = source("edp_td3bc", "train")
    if algorithm == "bc":
        expected = expected.replace("state.critics, ", "")
        expected = expected.replace("args.reward_rule", '"none"')
        expected = expected.replace("args.normalize_obs", "args.normalize_obs, args.top_fraction")
    assert text == expected


def test_a_note_has_the_same_text_in_every_file():
    """But for D8 of Diffusion-QL, whose authors' code has other defaults."""
    notes = {}
    for algorithm in ALGORITHMS:
        for number, text in re.findall(r"^(D\d+) +(.+)$", (FOLDER / f"{algorithm}.py").read_text(), flags=re.MULTILINE):
            if (algorithm, number) != ("dql_baseline", "D8"):
                assert notes.setdefault(number, text) == text, (algorithm, number)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_flag_is_used(algorithm):
    """A flag that a file shows is one that it, or the plumbing that it hands its arguments to, reads."""
    text = (FOLDER / f"{algorithm}.py").read_text()
    plumbing = (FOLDER.parent / "common" / "run.py").read_text()
    for name in importlib.import_module(f"algorithms.{algorithm}").Args.__dataclass_fields__:
        assert f"args.{name}" in text + plumbing, name
        assert f"args.{name}" in text or name in {"num_seeds", "run_dir", "track", "seed", "list_envs"}, name


@pytest.mark.parametrize(
    ("file", "sibling", "most"),
    [
        ("dql_baseline", "edp_td3bc", 40),
        ("edp_crr", "edp_td3bc", 49),
        ("edp_iql", "edp_td3bc", 100),
        ("td3bc", "edp_td3bc", 180),
        ("crr", "edp_crr", 143),
        ("iql", "edp_iql", 128),
        ("bc", "edp_td3bc", 168),
    ],
)
def test_siblings_differ_by_few_lines(file, sibling, most):
    """As `diff a b | grep -c '^[<>]'` counts: the lines that are not of the longest common subsequence."""
    a, b = ((FOLDER / f"{name}.py").read_text().splitlines() for name in (file, sibling))
    common = [0] * (len(b) + 1)  # lengths with the lines of a so far and the first 0, 1, ... lines of b
    for line in a:
        before, common = common, [0]
        for j, other in enumerate(b):
            common.append(before[j] + 1 if line == other else max(before[j + 1], common[j]))
    changed = len(a) + len(b) - 2 * common[-1]
    print(f"{file} and {sibling}: {changed} changed lines")
    assert changed <= most
