"""D4RL's own files: small ones with an environment's own steps, against a plain transcription of qlearning_dataset."""

import h5py
import numpy as np
import pytest
from helpers import evaluated, play, rows_of

from algorithms import bc
from common.harness import Evaluator, load_dataset
from common.harness.d4rl import read_d4rl
from common.harness.datasets import resolve_task
from common.harness.environments import make_gym_env
from common.harness.tasks import TASKS, normalized_score


def qlearning_dataset(file, max_steps):
    """D4RL's rule, one sample after the other: (index, index of the next observation, terminal)."""
    rows, episode_step = [], 0
    for i in range(len(file["rewards"]) - 1):
        final = bool(file["timeouts"][i]) if "timeouts" in file else episode_step == max_steps - 1
        done = bool(file["terminals"][i])
        if not final:
            rows.append((i, i + 1, done))
        episode_step = 0 if final else 1 if done else episode_step + 1
    return rows


def write(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        file["infos/qpos"] = np.zeros(3)  # what D4RL keeps beside the arrays is not read
        file["metadata/algorithm"] = "SAC"
    return path


def record(path, env, observe=np.asarray, timeouts=True):
    """Three episodes of at most 20 random steps in a D4RL file; `observe` makes its observation D4RL's."""
    observations, *columns = zip(*play(env, (20, 20, 20)))
    names = ("actions", "rewards", "terminals", "timeouts")[: 4 if timeouts else 3]
    arrays = {name: np.concatenate(column) for name, column in zip(names, columns)}
    return write(path, observations=[observe(obs) for episode in observations for obs in episode[:-1]], **arrays)


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("seed", range(12))
def test_transitions_are_those_of_qlearning_dataset(seed, tmp_path):
    """Random cases: with and without time-outs, rewards and terminals as (N,) and as (N, 1), bool and float."""
    rng = np.random.default_rng(seed)
    size, max_steps = rng.integers(2, 200), int(rng.integers(2, 12))
    column = (size, 1) if seed % 3 == 0 else (size,)
    arrays = {
        "observations": rng.normal(size=(size, 3)),
        "next_observations": rng.normal(size=(size, 3)),  # D4RL's reader ignores them
        "actions": rng.uniform(-1, 1, (size, 2)),
        "rewards": rng.normal(size=column),
        "terminals": (rng.random(column) < 0.1).astype(np.float64 if seed % 2 else bool),
    }
    if seed % 4 < 2:
        arrays["timeouts"] = rng.random(column) < 0.1
    expected = qlearning_dataset(arrays, max_steps)
    dataset, ends = read_d4rl(write(tmp_path / "file.hdf5", **arrays), max_steps)
    here, after = ([row[i] for row in expected] for i in range(2))
    rewards = arrays["rewards"].ravel()
    columns = arrays["observations"][here], arrays["actions"][here], rewards[here], arrays["observations"][after]
    for array, column in zip(dataset, (*columns, [row[2] for row in expected]), strict=True):
        np.testing.assert_array_equal(array, np.asarray(column, np.float32))
    # an episode ends with a terminal, before a sample that is left out, and with the file
    is_end = [done or (after not in here) for (_, after, done) in expected]
    np.testing.assert_array_equal(ends, np.flatnonzero(is_end) + 1)


def test_a_terminal_step_that_is_also_a_timeout_is_left_out(tmp_path):
    arrays = {"observations": np.arange(6)[:, None], "actions": np.zeros((6, 1)), "rewards": np.ones(6)}
    both = np.arange(6) == 2
    dataset, ends = read_d4rl(write(tmp_path / "file.hdf5", **arrays, terminals=both, timeouts=both), 1000)
    np.testing.assert_array_equal(dataset.obs[:, 0], [0, 1, 3, 4])
    np.testing.assert_array_equal(ends, [2, 4])
    assert not dataset.terminal.any()


# ------------------------------------------------------------------------------------------- tasks and environments


def kitchen_observation(obs):
    return np.concatenate([obs["observation"][:9], obs["observation"][18:39], np.linspace(-1, 1, 30)])


ANT = {"include_cfrc_ext_in_observation": False, "continuing_task": False}  # 29 columns, as D4RL's ant has them
ant_observation = lambda obs: np.append(obs["achieved_goal"], obs["observation"])
KITCHEN = {"tasks_to_complete": ["microwave"]}
FILES = {  # environment of the evaluation, recorded with options, as what; observation and action width, its horizon
    "hopper-medium-replay": ("Hopper-v4", {}, None, 11, 3, 1000),
    "antmaze-umaze-diverse": ("AntMaze_UMaze-v5", ANT, ant_observation, 29, 8, 700),
    "pen-cloned": ("AdroitHandPen-v1", {}, None, 45, 24, 100),
    "kitchen-mixed": ("FrankaKitchen-v1", KITCHEN, kitchen_observation, 60, 9, 280),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # the kitchen's own bounds
@pytest.mark.parametrize("env_id", FILES)
def test_a_file_of_each_domain_is_read_and_evaluated_in_the_environment_that_fits_it(env_id, tmp_path, capsys):
    gym_id, options, observe, obs_dim, act_dim, horizon = FILES[env_id]
    env, timeouts = make_gym_env(gym_id, **options), env_id != "pen-cloned"
    path = record(tmp_path / f"{env_id}.hdf5", env, *filter(None, [observe]), timeouts=timeouts)
    task = resolve_task(env_id, None, str(path))
    dataset, behaviour = load_dataset(task, "none")
    assert (dataset.obs.shape[1], dataset.action.shape[1]) == (obs_dim, act_dim)
    assert behaviour.statistics["dataset"] == path.name
    assert ("do not compare" in capsys.readouterr().out) == env_id.startswith("antmaze")
    evaluate = Evaluator(task.environment, [0], 1)
    ((length,),) = evaluated(evaluate, lambda obs, step: np.ones((*obs.shape[:2], act_dim)), 1).lengths
    assert 0 < length <= horizon
    ((env,),) = evaluate.envs
    assert env.spec.id == gym_id
    if env_id == "kitchen-mixed":
        raw, _ = make_gym_env(gym_id, **options).reset(seed=0)
        rounding = 2**-24  # float32's, in which the goal is read
        np.testing.assert_allclose(env.reset(seed=0)[0], kitchen_observation(raw), rtol=rounding)
        assert env.unwrapped.tasks_to_complete == {"microwave", "kettle", "bottom burner", "light switch"}


def test_a_policy_is_learned_from_a_file_and_scored_and_the_run_goes_on_where_the_file_went(tmp_path, quick_networks):
    path = record(tmp_path / "hopper.hdf5", make_gym_env("Hopper-v4"))
    few = {"num_updates": 2, "eval_episodes": 1, "batch_size": 8, "run_dir": str(tmp_path / "run")}
    results = bc.train(bc.Args(env_id="hopper-medium-replay", dataset_path=str(path), **few))
    (row,) = rows_of(tmp_path / "run" / "eval.csv")
    score = normalized_score(TASKS["hopper-medium-replay"].environment, np.array([float(row["return"])]))
    np.testing.assert_allclose(results["last"], score, rtol=1e-6)
    moved = path.rename(tmp_path / "moved.hdf5")
    again = bc.train(bc.Args(resume=str(tmp_path / "run"), dataset_path=str(moved)))
    np.testing.assert_array_equal(again["last"], results["last"])


def test_antmaze_keeps_the_terminals_of_its_file(tmp_path):
    """D4RL's files end an episode where they mark it; Minari's never do and are ended where they are paid."""
    arrays = {"observations": np.zeros((10, 29)), "actions": np.zeros((10, 8)), "timeouts": np.zeros(10)}
    path = write(tmp_path / "f.hdf5", **arrays, rewards=np.eye(10)[3], terminals=np.eye(10)[5])
    dataset, _ = load_dataset(resolve_task("antmaze-umaze", None, str(path)), "none")
    np.testing.assert_array_equal(np.flatnonzero(dataset.terminal), [5])
    np.testing.assert_array_equal(np.flatnonzero(dataset.reward), [3])


# ------------------------------------------------------------------------------------------------------ refusals


HOPPER = {"observations": np.full((10, 11), 1.25), "actions": np.zeros((10, 3))}
HOPPER |= {"rewards": np.zeros(10), "terminals": np.zeros(10)}


@pytest.mark.parametrize(
    ("env_id", "dataset_id", "name", "named"),
    [
        ("hopper-medium", None, "none.hdf5", "no file"),
        ("hopper-medium", "a/b-v0", "file.hdf5", "not both"),
        ("pointmaze-umaze", None, "file.hdf5", "pointmaze-umaze is not one"),
        ("kitchen-mixed", None, "file.hdf5", "60 wide"),
    ],
)
def test_a_file_that_does_not_fit_the_flags_exits(env_id, dataset_id, name, named, tmp_path, exit_sentence):
    write(tmp_path / "file.hdf5", **HOPPER)
    assert named in exit_sentence(resolve_task, env_id, dataset_id, str(tmp_path / name))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "cannot be read"),
        (lambda path: write(path, **{name: array for name, array in HOPPER.items() if name != "rewards"}), "rewards"),
        (lambda path: write(path, **HOPPER | {"rewards": np.zeros(9)}), "lengths [9, 10]"),
        (lambda path: write(path, **HOPPER | {"observations": np.zeros((10, 12))}), "does not fit its environment"),
        (lambda path: write(path, **HOPPER | {"terminals": np.full(10, 0.5)}), "neither 0 nor 1"),
        (lambda path: write(path, **HOPPER, timeouts=np.full(10, -1)), "neither 0 nor 1"),
        (lambda path: write(path, **HOPPER, timeouts=np.ones(10)), "0 transitions"),
        (lambda path: write(path, **HOPPER | {"rewards": np.full(10, b"1.0")}), "not numbers"),
        (lambda path: write(path, **HOPPER | {"rewards": np.full(10, 3e38)}), "beyond"),
        (lambda path: write(path, **{"episode_0/observations": np.zeros((10, 11))}), "--dataset-id"),
    ],
)
def test_a_damaged_file_exits_naming_it(change, named, tmp_path, exit_sentence):
    path = write(tmp_path / "f.hdf5", **HOPPER)
    change(path)
    sentence = exit_sentence(load_dataset, resolve_task("hopper-medium", None, str(path)), "none")
    assert str(path) in sentence
    assert named in sentence
