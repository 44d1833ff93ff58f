"""The scripts as people run them: what they write, what they print, and how they refuse."""

import ast
import csv
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import common.run
import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from common.data import DatasetInfo
from common.evaluation import Episodes, Evaluator
from common.run import Run, load_checkpoint
from common.tasks import TASKS
from helpers import record_hopper

from algorithms import bc, edp_td3bc, td3bc
from algorithms.edp_td3bc import Args, train

SCRIPTS = Path(edp_td3bc.__file__).parent
ALGORITHMS = ("edp_td3bc", "edp_crr", "edp_iql", "dql_baseline", "td3bc", "crr", "iql", "bc")
TINY = {
    "num_updates": 20,
    "eval_every": 10,
    "eval_episodes": 2,
    "num_seeds": 2,
    "batch_size": 16,
    "num_diffusion_steps": 50,
    "num_solver_calls": 3,
}


def run_script(algorithm: str, *flags, cwd, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / f"{algorithm}.py"), *map(str, flags)]
    env = os.environ | {"HOME": str(cwd), "COLUMNS": "300"} | env
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def flags_of(**args) -> list[str]:
    return [part for name, value in args.items() for part in ("--" + name.replace("_", "-"), str(value))]


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def returns_of(folder: Path) -> np.ndarray:
    """(evaluations, seeds, episodes), from eval.csv."""
    rows = rows_of(folder / "eval.csv")
    keys = [sorted({int(row[name]) for row in rows}) for name in ("update", "seed", "episode")]
    table = {tuple(int(row[name]) for name in ("update", "seed", "episode")): float(row["return"]) for row in rows}
    assert len(table) == len(rows)
    return np.array([[[table[u, s, e] for e in keys[2]] for s in keys[1]] for u in keys[0]])


def fields_of(algorithm: str) -> dict[str, str]:
    """Each field of `Args` with the docstring under it, from the source."""
    tree = ast.parse((SCRIPTS / f"{algorithm}.py").read_text())
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = {}
    for field, text in zip(args.body, [*args.body[1:], None]):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text, ast.Expr), f"{field.target.id} has no docstring"
            fields[field.target.id] = ast.literal_eval(text.value)
    return fields


def tiny(algorithm: str) -> dict:
    """The part of TINY that an algorithm has."""
    return {name: value for name, value in TINY.items() if name in fields_of(algorithm)}


# --------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module", params=ALGORITHMS)
def finished(request, tmp_path_factory, made_pointmaze):
    """(algorithm, folder, process) of a tiny real run on pointmaze in a process of its own."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(made_pointmaze, home / "minari")
    work = home / "work"
    work.mkdir()
    flags = flags_of(**tiny(request.param))
    process = run_script(request.param, *flags, cwd=work, MINARI_DATASETS_PATH=str(home / "minari"))
    assert process.returncode == 0, process.stderr
    assert [path.name for path in work.iterdir() if not path.name.startswith(".")] == ["runs"]
    (folder,) = (work / "runs").iterdir()
    return request.param, folder, process


def test_a_run_leaves_a_folder_named_after_itself(finished):
    algorithm, folder, _ = finished
    assert re.fullmatch(rf"pointmaze-umaze__{algorithm}__0__\d{{8}}-\d{{6}}", folder.name)
    assert {path.name for path in folder.iterdir()} == {
        "args.json",
        "metrics.csv",
        "eval.csv",
        "tensorboard",
        "checkpoint.eqx",
        "learning_curve.png",
        "paths.png",
    }


def test_args_json_tells_how_to_repeat_the_run(finished):
    algorithm, folder, _ = finished
    header = json.loads((folder / "args.json").read_text())
    assert header["algorithm"] == algorithm
    args = header["args"]
    assert set(args) == set(fields_of(algorithm))
    assert args | tiny(algorithm) == args
    rule = "iql_antmaze" if algorithm.endswith("iql") else "cql_antmaze"
    domain = {"learning_rate": 3e-4, "eta": 1.0, "reward_rule": rule, "expectile": 0.9}
    domain |= {"temperature": 0.1} if algorithm == "iql" else {}
    assert args | {name: value for name, value in domain.items() if name in args} == args, "the domain's, not None"
    for package in ("jax", "equinox", "optax", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari"):
        assert header["versions"][package] == importlib.metadata.version(package)
    assert header["versions"]["python"] == sys.version.split()[0]
    statistics = header["dataset"]
    assert (statistics["transitions"], statistics["episodes"]) == (3000, 6)
    assert (statistics["observation_dim"], statistics["action_dim"]) == (4, 2)


def test_args_json_names_the_git_commit(finished):
    _, folder, _ = finished
    head = subprocess.run(["git", "-C", str(SCRIPTS), "rev-parse", "HEAD"], capture_output=True, text=True)
    commit = json.loads((folder / "args.json").read_text())["git_commit"]
    if head.returncode == 0:
        assert commit.removesuffix("-dirty") == head.stdout.strip()
    else:
        assert commit is None


def test_metrics_csv_has_finite_means_of_every_chunk_and_seed(finished):
    algorithm, folder, _ = finished
    rows = rows_of(folder / "metrics.csv")
    assert [(row["update"], row["seed"]) for row in rows] == [("10", "0"), ("10", "1"), ("20", "0"), ("20", "1")]
    assert {"policy_loss", "updates_per_second"} <= set(rows[0])
    assert ("critic_loss" in rows[0]) == (algorithm != "bc")
    assert np.isfinite([[float(value) for value in row.values()] for row in rows]).all()
    assert rows[0]["policy_loss"] != rows[1]["policy_loss"], "seeds differ"


def test_eval_csv_has_every_raw_return(finished):
    _, folder, _ = finished
    rows = rows_of(folder / "eval.csv")
    assert [(int(row["update"]), int(row["seed"]), int(row["episode"])) for row in rows] == [
        (update, seed, episode) for update in (10, 20) for seed in (0, 1) for episode in (0, 1)
    ]
    for row in rows:
        assert float(row["return"]) in (0, 1)
        assert int(row["length"]) == 300 if float(row["return"]) == 0 else int(row["length"]) <= 300


def test_the_checkpoint_holds_the_trained_state(finished):
    algorithm, folder, _ = finished
    module = __import__(f"algorithms.{algorithm}", fromlist=["Args"])
    with open(folder / "checkpoint.eqx", "rb") as file:
        args = module.Args(**json.loads(file.readline())["args"])
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(jnp.arange(2))
    like = eqx.filter_eval_shape(jax.vmap(lambda key: module.init_state(key, 4, 2, args)), keys[:, 0])
    header, state = load_checkpoint(folder / "checkpoint.eqx", like)
    assert header["update"] == 20
    leaves = jax.tree.leaves(state)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    with pytest.raises(ValueError, match="another kind of state"):
        load_checkpoint(folder / "checkpoint.eqx", {"something": jnp.zeros(3)})


def test_the_pictures_are_pictures(finished):
    _, folder, _ = finished
    for name in ("learning_curve.png", "paths.png"):
        picture = matplotlib.image.imread(folder / name)
        assert min(picture.shape[:2]) > 300
        assert np.ptp(picture[..., :3]) > 0.5


def test_tensorboard_has_the_losses_and_scores_of_each_seed(finished):
    _, folder, _ = finished
    for seed in (0, 1):
        (events,) = (folder / "tensorboard" / f"seed_{seed}").iterdir()
        content = events.read_bytes()
        assert b"train/policy_loss" in content
        assert b"eval/score" in content


def test_the_final_table_is_that_of_eval_csv(finished):
    _, folder, process = finished
    scores = 100 * returns_of(folder).mean(axis=2)
    expected = {"last score": scores[-1], "OMS": scores.max(axis=0), "RAT": scores.mean(axis=0)}
    for label, values in expected.items():
        row = f"{values.mean():.1f} +- {values.std(ddof=1):.1f}"
        assert re.search(rf"^ *{label}.* {re.escape(row)}$", process.stdout, re.MULTILINE), process.stdout
    assert "mean of the last 2" in process.stdout
    assert "behaviour" in process.stdout
    assert str(folder.name) in process.stdout


def test_nothing_but_the_progress_bar_goes_to_stderr(finished):
    _, _, process = finished
    lines = [line for line in re.split(r"[\r\n]+", process.stderr) if line.strip(" \x1b[A")]
    assert lines
    assert all("update" in line and "%" in line for line in lines), process.stderr


# --------------------------------------------------------------------------------------------------- final scores


def hopper_args(folder: Path, **changes) -> Args:
    """A run of 12 evaluations, more than RAT's ten, on short episodes."""
    args = TINY | {"num_updates": 12, "eval_every": 1, "dataset_id": "test/hopper/random-v0", "num_eval_actions": 1}
    return Args(**args | {"run_dir": str(folder / "run")} | changes)


@pytest.fixture
def hopper_datasets(datasets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings into the working directory
    record_hopper()
    return datasets


def test_oms_and_rat_are_the_best_and_the_last_ten_evaluations_of_each_seed(hopper_datasets, tmp_path):
    results = train(hopper_args(tmp_path))
    returns = returns_of(tmp_path / "run")
    assert returns.shape == (12, 2, 2)
    scores = 100 * (returns.mean(axis=2) + 20.272305) / (3234.3 + 20.272305)
    np.testing.assert_allclose(results["last"], scores[11], rtol=1e-6)
    np.testing.assert_allclose(results["OMS"], scores.max(axis=0), rtol=1e-6)
    np.testing.assert_allclose(results["RAT"], scores[2:].mean(axis=0), rtol=1e-6)
    assert not np.allclose(results["RAT"], scores.mean(axis=0), rtol=1e-3), "more than the last ten would show"
    assert not (tmp_path / "run" / "paths.png").exists(), "no maze, no paths"


def test_an_interrupted_run_keeps_what_it_has_and_says_where(hopper_datasets, tmp_path, monkeypatch, exit_sentence):
    def interrupted(self, act, update):
        if update == 3:
            raise KeyboardInterrupt
        return evaluate(self, act, update)

    evaluate = Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", interrupted)
    assert str(tmp_path / "run") in exit_sentence(train, hopper_args(tmp_path))
    assert returns_of(tmp_path / "run").shape == (2, 2, 2)
    assert (tmp_path / "run" / "learning_curve.png").stat().st_size > 0
    with open(tmp_path / "run" / "checkpoint.eqx", "rb") as file:
        assert json.loads(file.readline())["update"] == 2


def test_a_diverging_run_exits_naming_the_update_and_keeps_what_it_has(hopper_datasets, tmp_path, exit_sentence):
    sentence = exit_sentence(train, hopper_args(tmp_path, learning_rate=1e3))
    (update,) = re.findall(r"at update (\d+)", sentence)
    assert "diverged" in sentence
    assert "--learning-rate" in sentence
    folder = tmp_path / "run"
    assert json.loads((folder / "args.json").read_text())["args"]["learning_rate"] == 1e3
    assert 1 < int(update) <= 12, "there is something to keep"
    assert [int(row["update"]) for row in rows_of(folder / "metrics.csv")] == sorted([*range(1, int(update))] * 2)
    assert len(returns_of(folder)) == int(update) - 1
    assert (folder / "learning_curve.png").stat().st_size > 0


def test_divergence_is_traced_to_its_update_and_seed(tmp_path, exit_sentence):
    info = DatasetInfo({}, 0.0, np.zeros(11), np.ones(11), [])
    args = Args(**TINY | {"seed": 5}, run_dir=str(tmp_path / "run"))
    losses = np.ones((10, 2), np.float32)  # (updates, seeds)
    with Run("edp_td3bc", args, TASKS["hopper-medium"], info) as run:
        run.log_metrics(10, {"policy_loss": jnp.array(losses)})
        losses[3, 1] = np.nan
        sentence = exit_sentence(run.log_metrics, 20, {"policy_loss": jnp.array(losses)})
    assert "policy_loss is nan at update 14 of seed 6" in sentence
    assert [(row["update"], row["seed"]) for row in rows_of(tmp_path / "run" / "metrics.csv")] == [
        ("10", "5"),
        ("10", "6"),
    ]


def test_the_picture_shows_real_positions_when_observations_are_normalized(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(common.run.pointmaze, "draw_paths", lambda *args: drawn.append(args))
    info = DatasetInfo({}, 0.0, np.full(4, 3.0), np.full(4, 0.5), [])
    args = Args(**TINY | {"num_seeds": 1}, run_dir=str(tmp_path / "run"))
    monkeypatch.setattr("common.evaluation.make_env", lambda environment: StandingStill())
    evaluate = Evaluator(TASKS["pointmaze-umaze"].environment, [0], 1, info)
    with Run("edp_td3bc", args, TASKS["pointmaze-umaze"], info) as run:
        run.log_evaluation(10, evaluate(lambda obs, t: np.zeros((1, 1, 2)), 10), {"weights": jnp.zeros(3)})
    ((_, _, _, policy_paths, _),) = drawn
    np.testing.assert_allclose(policy_paths[0], [[-1.0, -1.0], [-1.0, -1.0]])


class StandingStill(gymnasium.Env):
    """One step at the start of the smallest maze."""

    def reset(self, seed):
        return np.array([-1.0, -1.0, 0.0, 0.0]), {}

    def step(self, action):
        return np.array([-1.0, -1.0, 0.0, 0.0]), 0.0, False, True, {}


def test_scores_are_normalized_returns_and_raw_returns_are_kept_in_full(tmp_path):
    info = DatasetInfo({}, 0.0, np.zeros(11), np.ones(11), [])
    args = Args(**TINY, run_dir=str(tmp_path / "run"))
    returns = np.array([[1000.123456789, 2000.0], [0.1, 1 / 3]])
    with Run("edp_td3bc", args, TASKS["hopper-medium"], info) as run:
        run.log_evaluation(10, Episodes(returns, np.full((2, 2), 7), []), {"weights": jnp.zeros(3)})
        results = run.finish()
    np.testing.assert_array_equal(returns_of(tmp_path / "run")[0], returns)
    np.testing.assert_allclose(results["last"][0], 100 * (1500.0617283945 + 20.272305) / 3254.572305)


# ------------------------------------------------------------------------------------------------------- refusals


IMPOSSIBLE = [
    ({"env_id": "hoper-medium"}, ["hoper-medium", "hopper-medium", "--dataset-id"]),
    ({"env_id": "pen-human"}, ["minari download D4RL/pen/human-v2", "edp/pointmaze/umaze-v0"]),
    ({"dataset_id": "some/where/else-v0"}, ["minari download some/where/else-v0"]),
    ({"num_updates": 25, "eval_every": 10}, ["--num-updates 25", "--eval-every 10"]),
    ({"num_updates": 0}, ["--num-updates", "0"]),
    ({"num_updates": 10, "eval_every": 20}, ["--num-updates 10", "--eval-every 20"]),
    ({"gamma": 2.0}, ["--gamma", "2.0"]),
    ({"gamma": float("nan")}, ["--gamma", "nan"]),
    ({"tau": -0.1}, ["--tau", "-0.1"]),
    ({"batch_size": 0}, ["--batch-size", "0"]),
    ({"num_seeds": 0}, ["--num-seeds", "0"]),
    ({"eval_episodes": -1}, ["--eval-episodes", "-1"]),
    ({"num_eval_actions": 0}, ["--num-eval-actions", "0"]),
    ({"learning_rate": float("inf")}, ["--learning-rate", "inf"]),
    ({"seed": -1}, ["--seed", "-1"]),
    ({"seed": 3_000_000_000}, ["--seed"]),
    ({"eta": -1.0}, ["--eta", "-1.0"]),
    ({"num_diffusion_steps": 10}, ["'vp'", "10"]),
    ({"num_solver_calls": 2}, ["order 3", "2"]),
    ({"solver_order": 4}, ["4"]),
]


@pytest.mark.parametrize(
    ("args", "named"), IMPOSSIBLE, ids=[" ".join(f"{k}={v}" for k, v in args.items()) for args, _ in IMPOSSIBLE]
)
def test_an_impossible_argument_exits_naming_it(args, named, pointmaze_datasets, tmp_path, monkeypatch, exit_sentence):
    monkeypatch.chdir(tmp_path)
    sentence = exit_sentence(train, Args(**TINY | {"run_dir": str(tmp_path / "run")} | args))
    for part in named:
        assert part in sentence
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing"


@pytest.mark.parametrize(
    ("algorithm", "args", "condition"),
    [
        (bc, {"top_fraction": 0.0}, "--top-fraction must be above 0 and at most 1, but is 0.0."),
        (bc, {"top_fraction": 10.0}, "--top-fraction must be above 0 and at most 1, but is 10.0."),
        (td3bc, {"policy_every": 0}, "--policy-every must be positive, but is 0."),
        (td3bc, {"policy_noise": -0.1}, "--policy-noise must be 0 or more, but is -0.1."),
    ],
    ids=["no episodes", "ten times all", "no updates", "negative noise"],
)
def test_impossible_arguments_of_the_feed_forward_algorithms(algorithm, args, condition, exit_sentence):
    assert exit_sentence(algorithm.train, algorithm.Args(**args)) == condition


def test_a_run_directory_in_use_is_refused_and_left_alone(pointmaze_datasets, tmp_path, exit_sentence):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert "--run-dir" in exit_sentence(train, Args(run_dir=str(tmp_path / "run")))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_run_directory_that_cannot_be_made_is_refused(pointmaze_datasets, tmp_path, place, exit_sentence):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / place) in exit_sentence(train, Args(run_dir=str(tmp_path / place)))


@pytest.mark.parametrize("place", ["locked", "locked/below"])
def test_an_unwritable_run_directory_is_refused(pointmaze_datasets, tmp_path, place, exit_sentence):
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write everywhere")
    assert str(tmp_path / place) in exit_sentence(train, Args(run_dir=str(tmp_path / place)))


def test_tracking_without_wandb_exits_with_the_remedy(pointmaze_datasets, tmp_path, monkeypatch, exit_sentence):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in exit_sentence(train, Args(run_dir=str(tmp_path / "run"), track=True))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--env-id", "hoper-medium"], "hopper-medium"),
        (["--env-id", "kitchen-mixed"], "minari download D4RL/kitchen/mixed-v2"),
    ],
)
def test_a_refusal_is_one_sentence_on_stderr(flags, named, tmp_path):
    process = run_script("edp_td3bc", *flags, cwd=tmp_path, MINARI_DATASETS_PATH=str(tmp_path / "minari"))
    assert process.returncode == 1
    assert process.stdout == ""
    (sentence,) = process.stderr.splitlines()
    assert named in sentence
    assert not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_help_explains_every_flag(algorithm, tmp_path):
    process = run_script(algorithm, "--help", cwd=tmp_path)
    assert (process.returncode, process.stderr) == (0, "")
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", process.stdout).split())
    fields = fields_of(algorithm)
    assert len(fields) > 20
    for name, text in fields.items():
        flag = "--" + name.replace("_", "-")
        assert flag in words
        assert " ".join(text.split()) in words, f"{flag} is not explained"
