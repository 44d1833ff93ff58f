"""D4RL's own files: small ones with an environment's own steps, against a plain transcription of qlearning_dataset."""

import csv

import h5py
import numpy as np
import pytest

from algorithms.edp_td3bc import Args, train
from common.d4rl import read_d4rl
from common.data import load_dataset, resolve_task
from common.environments import make_env, make_gym_env
from common.tasks import TASKS

LENGTH = 60
GOAL = np.linspace(-1, 1, 30)


def qlearning_dataset(file, max_steps):
    """D4RL's rule, one sample after the other."""
    use_timeouts = "timeouts" in file
    rows, episode_step = [], 0
    for i in range(len(file["rewards"]) - 1):
        done = bool(file["terminals"][i])
        final = bool(file["timeouts"][i]) if use_timeouts else episode_step == max_steps - 1
        if final:
            episode_step = 0
            continue
        if done:
            episode_step = 0
        rows.append((i, i + 1, done))
        episode_step += 1
    return rows


def write(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        file["infos/qpos"] = np.zeros(3)  # what D4RL keeps beside the arrays is not read
        file["metadata/algorithm"] = "SAC"
    return path


def record(path, env, observe, max_steps, timeouts=True):
    """LENGTH random steps of an environment in a D4RL file; `observe` makes its observation D4RL's."""
    rng = np.random.default_rng(0)
    columns = {name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts")}
    obs, step = env.reset(seed=0)[0], 0
    for _ in range(LENGTH):
        action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
        next_obs, reward, terminated, _, _ = env.step(action)
        step += 1
        timeout = step == max_steps
        for column, value in zip(columns.values(), (observe(obs), action, reward, terminated, timeout)):
            column.append(value)
        obs = next_obs
        if terminated or timeout:
            obs, step = env.reset()[0], 0
    arrays = {name: np.array(column) for name, column in columns.items() if timeouts or name != "timeouts"}
    return write(path, **arrays)


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("seed", range(20))
def test_transitions_are_those_of_qlearning_dataset(seed, tmp_path):
    """Random cases: with and without time-outs, rewards and terminals as (N,) and as (N, 1), bool and float."""
    rng = np.random.default_rng(seed)
    size, max_steps = rng.integers(2, 200), int(rng.integers(2, 12))
    column = (size, 1) if seed % 3 == 0 else (size,)
    arrays = {
        "observations": rng.normal(size=(size, 3)),
        "next_observations": rng.normal(size=(size, 3)),  # D4RL's reader ignores them
        "actions": rng.uniform(-1, 1, (size, 2)).astype(np.float32),
        "rewards": rng.normal(size=column),
        "terminals": (rng.random(column) < 0.1).astype(np.float64 if seed % 2 else bool),
    }
    if seed % 4 < 2:
        arrays["timeouts"] = rng.random(column) < 0.1
    expected = qlearning_dataset(arrays, max_steps)
    transitions = read_d4rl(write(tmp_path / "file.hdf5", **arrays), max_steps)
    here, after = ([row[i] for row in expected] for i in range(2))
    np.testing.assert_array_equal(transitions.obs, arrays["observations"][here].astype(np.float32))
    np.testing.assert_array_equal(transitions.next_obs, arrays["observations"][after].astype(np.float32))
    np.testing.assert_array_equal(transitions.action, arrays["actions"][here])
    np.testing.assert_array_equal(transitions.reward, arrays["rewards"].ravel()[here].astype(np.float32))
    np.testing.assert_array_equal(transitions.terminal, [row[2] for row in expected])
    # an episode ends with a terminal, before a sample that is left out, and with the file
    is_end = [done or (after not in here) for (_, after, done) in expected]
    np.testing.assert_array_equal(transitions.episode_end, np.flatnonzero(is_end) + 1)


def test_a_terminal_step_that_is_also_a_timeout_is_left_out(tmp_path):
    size = 6
    arrays = {"observations": np.arange(size)[:, None], "actions": np.zeros((size, 1)), "rewards": np.ones(size)}
    both = np.arange(size) == 2
    transitions = read_d4rl(write(tmp_path / "file.hdf5", **arrays, terminals=both, timeouts=both), 1000)
    np.testing.assert_array_equal(transitions.obs[:, 0], [0, 1, 3, 4])
    np.testing.assert_array_equal(transitions.episode_end, [2, 4])
    assert not transitions.terminal.any()


# ------------------------------------------------------------------------------------------- tasks and environments


def locomotion(env_id, path):
    env = make_gym_env(TASKS[env_id].environment.gym_id.replace("-v5", "-v4"))
    return record(path, env, np.asarray, max_steps=20)


def antmaze(env_id, path):
    # 29 columns as D4RL's ant has them, in Gymnasium's maze
    env = make_gym_env("AntMaze_UMaze-v5", include_cfrc_ext_in_observation=False, continuing_task=False)
    return record(path, env, lambda obs: np.append(obs["achieved_goal"], obs["observation"]), max_steps=20)


def pen(env_id, path):
    return record(path, make_gym_env("AdroitHandPen-v1"), np.asarray, max_steps=20, timeouts=False)


def kitchen(env_id, path):
    with np.errstate(over="ignore"):  # the kitchen's own bounds
        env = make_gym_env("FrankaKitchen-v1", tasks_to_complete=["microwave"])
        return record(path, env, kitchen_observation, max_steps=20)


def kitchen_observation(obs):
    robot, objects = obs["observation"][:18], obs["observation"][18:]
    return np.concatenate([robot[:9], objects[:21], GOAL])


FILES = {  # env id: (recorder, observation width, action width, horizon of the evaluation)
    "hopper-medium-replay": (locomotion, 11, 3, 1000),
    "antmaze-umaze-diverse": (antmaze, 29, 8, 700),
    "pen-cloned": (pen, 45, 24, 100),
    "kitchen-mixed": (kitchen, 60, 9, 280),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("env_id", FILES)
def test_a_file_of_each_domain_is_learned_from_and_evaluated(env_id, tmp_path, quick_compilation, capsys):
    recorder, obs_dim, act_dim, horizon = FILES[env_id]
    path = recorder(env_id, tmp_path / f"{env_id}.hdf5")
    args = Args(
        env_id=env_id,
        dataset_path=str(path),
        run_dir=str(tmp_path / "run"),
        num_updates=2,
        eval_episodes=1,
        batch_size=8,
        num_solver_calls=1,
        solver_order=1,
        num_eval_actions=2,
    )
    results = train(args)
    with open(tmp_path / "run" / "eval.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    low, high = TASKS[env_id].environment.reference
    assert results["last"][0] == pytest.approx(100 * (float(row["return"]) - low) / (high - low))
    assert 0 < int(row["length"]) <= horizon
    text = capsys.readouterr().out
    assert f"observation_dim {obs_dim}, action_dim {act_dim}" in text
    assert ("do not compare" in text) == env_id.startswith("antmaze")


def test_locomotion_is_evaluated_in_the_environment_of_its_files(tmp_path):
    task = resolve_task("hopper-medium", None, str(locomotion("hopper-medium", tmp_path / "hopper.hdf5")))
    assert make_env(task.environment).spec.id == "Hopper-v4"


def test_antmaze_keeps_the_terminals_of_its_file(tmp_path):
    """D4RL's files end an episode where they mark it; Minari's never do and are ended where they are paid."""
    size = 10
    arrays = {"observations": np.zeros((size, 29)), "actions": np.zeros((size, 8)), "timeouts": np.zeros(size)}
    path = write(tmp_path / "f.hdf5", **arrays, rewards=np.eye(size)[3], terminals=np.eye(size)[5])
    dataset, _ = load_dataset(resolve_task("antmaze-umaze", None, str(path)), "none")
    np.testing.assert_array_equal(np.flatnonzero(dataset.terminal), [5])
    np.testing.assert_array_equal(np.flatnonzero(dataset.reward), [3])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_the_kitchen_is_seen_as_in_its_file(tmp_path):
    task = resolve_task("kitchen-mixed", None, str(kitchen("kitchen-mixed", tmp_path / "kitchen.hdf5")))
    env = make_env(task.environment)
    obs, _ = env.reset(seed=0)
    raw = make_gym_env("FrankaKitchen-v1", tasks_to_complete=["microwave"]).reset(seed=0)[0]
    np.testing.assert_allclose(obs, kitchen_observation(raw))
    assert obs.shape == env.observation_space.shape == (60,)
    assert env.unwrapped.tasks_to_complete == {"microwave", "kettle", "bottom burner", "light switch"}


# ------------------------------------------------------------------------------------------------------ refusals


def hopper_arrays(size=10):
    arrays = {"observations": np.zeros((size, 11)), "actions": np.zeros((size, 3))}
    return arrays | {"rewards": np.zeros(size), "terminals": np.zeros(size)}


def test_a_file_that_is_not_there_exits(tmp_path, exit_sentence):
    assert "no file" in exit_sentence(resolve_task, "hopper-medium", None, str(tmp_path / "none.hdf5"))


def test_two_kinds_of_data_exit(exit_sentence):
    assert "not both" in exit_sentence(resolve_task, "hopper-medium", "a/b-v0", "file.hdf5")


def test_a_file_for_a_task_that_d4rl_has_not_exits(tmp_path, exit_sentence):
    path = write(tmp_path / "f.hdf5", **hopper_arrays())
    assert "pointmaze-umaze is not one" in exit_sentence(resolve_task, "pointmaze-umaze", None, str(path))


@pytest.mark.parametrize("missing", ["observations", "actions", "rewards", "terminals"])
def test_a_file_without_an_array_exits_naming_it(missing, tmp_path, exit_sentence):
    arrays = {name: array for name, array in hopper_arrays().items() if name != missing}
    task = resolve_task("hopper-medium", None, str(write(tmp_path / "f.hdf5", **arrays)))
    assert missing in exit_sentence(load_dataset, task, "none")


def test_arrays_of_different_lengths_exit(tmp_path, exit_sentence):
    path = write(tmp_path / "f.hdf5", **hopper_arrays() | {"rewards": np.zeros(9)})
    assert "lengths [9, 10]" in exit_sentence(load_dataset, resolve_task("hopper-medium", None, str(path)), "none")


@pytest.mark.parametrize("content", [b"", b"not HDF5", "cut"])
def test_a_file_that_is_not_whole_exits_naming_it(content, tmp_path, exit_sentence):
    path = write(tmp_path / "f.hdf5", **hopper_arrays(1000))
    path.write_bytes(path.read_bytes()[:5000] if content == "cut" else content)
    assert str(path) in exit_sentence(load_dataset, resolve_task("hopper-medium", None, str(path)), "none")


def test_kitchen_observations_of_another_shape_exit(tmp_path, exit_sentence):
    path = write(tmp_path / "f.hdf5", **hopper_arrays())
    assert "60 wide" in exit_sentence(resolve_task, "kitchen-mixed", None, str(path))


def test_medium_replay_names_its_file_where_there_is_none(datasets, exit_sentence):
    sentence = exit_sentence(resolve_task, "hopper-medium-replay", None)
    assert "--dataset-path (hopper_medium_replay-v2.hdf5" in sentence
