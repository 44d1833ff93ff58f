"""Datasets: small real Minari ones, recorded here, against a plain iteration through Minari's own interface."""

import os
import re
import shutil
import subprocess
import sys

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box
from helpers import by_hand, change_metadata, record, record_hopper, write_dataset
from minari.serialization import serialize_space

from algorithms import bc
from common.harness import Behaviour, Dataset
from common.harness.datasets import load_dataset, read_minari, resolve_task
from common.harness.environments import make_gym_env
from common.harness.shaping import behaviour_returns, relabel, shape_reward
from common.harness.tasks import ENVIRONMENTS

ARRAYS = "data/main_data.hdf5"


def assert_same(read: tuple[Dataset, np.ndarray], expected: dict[str, np.ndarray]):
    dataset, ends = read
    for name, array in dataset._asdict().items():
        np.testing.assert_array_equal(array, expected[name].astype(np.float32), err_msg=name)
        assert array.dtype == np.float32, name
    np.testing.assert_array_equal(ends, expected["ends"])


def load(dataset_id: str, rule="none") -> tuple[Dataset, Behaviour]:
    return load_dataset(resolve_task("pointmaze-umaze", dataset_id), rule)


@pytest.fixture
def hopper(datasets) -> str:
    """The id of a small dataset."""
    return record_hopper().id


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_flat_arrays_are_minaris_own_episodes_end_to_end(datasets, data_format):
    """With each episode's last observation, and with terminations alone as terminals."""
    dataset = record_hopper(data_format=data_format)
    expected = by_hand(dataset.id)
    lengths = np.diff(expected["ends"], prepend=0)
    assert len(lengths) > 10, "alphabetical order would be the right one"
    assert len(set(lengths)) > 3, "episodes in another order would differ"
    assert 0 < expected["terminal"].sum() < len(lengths), "there are ends of both kinds"
    assert_same(read_minari(dataset.id), expected)


def test_an_arrow_dataset_without_pyarrow_exits(hopper, monkeypatch, exit_sentence):
    change_metadata(hopper, data_format="arrow")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "minari.dataset._storages.arrow_storage", raising=False)
    assert "pyarrow" in exit_sentence(load, hopper)


# ----------------------------------------------------------------------------------------------- from data to task


def test_pointmaze_is_relabelled_by_the_distance_of_the_next_position_to_the_goal_cell(datasets):
    env = make_gym_env("PointMaze_UMaze-v3", continuing_task=True, max_episode_steps=40)
    raw = by_hand(record(env, "test/pointmaze/random-v0", 12).id, "observation")
    # The 5 x 5 maze has cells of 1 and its middle at (0, 0): (row, column) = (1, 1) is x = -1, y = 1.
    success = np.hypot(raw["next_obs"][:, 0] + 1, raw["next_obs"][:, 1] - 1) <= 0.45
    assert 0 < success.sum() < len(success)
    assert (success != raw["reward"]).any(), "the data's own goals are others"
    loaded, behaviour = load("test/pointmaze/random-v0", "iql_antmaze")
    np.testing.assert_array_equal(loaded.terminal, success)
    np.testing.assert_array_equal(loaded.reward, success - 1.0)
    np.testing.assert_array_equal(behaviour.scores, 100 * success.reshape(12, 40).any(axis=1))
    assert behaviour.statistics["behaviour_score"] == pytest.approx(behaviour.scores.mean())
    positions, arrived = raw["obs"][:, :2].reshape(12, 40, 2), success.reshape(12, 40).any(axis=1)
    for (path, paid), truth, pays in zip(behaviour.paths, positions, arrived, strict=True):
        np.testing.assert_allclose(path, truth, rtol=1e-6)
        assert paid == pays


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ([[0, 0, 1, 1, 1], [0, 0], [1, 0, 1]], [0, 1, 2, 5, 6, 7]),  # stays at its goal, never gets there, passes by
        ([[0, 1], [0, 0, 1]], [0, 1, 2, 3, 4]),  # ends there, as D4RL's and Minari's version 2 do
        ([[1], [0]], [0, 1]),
    ],
)
def test_an_episode_of_a_sparse_task_is_cut_after_its_first_reward(rewards, kept, capsys):
    dataset, ends = dataset_of(rewards)
    cut, new_ends = relabel(dataset, ends, ENVIRONMENTS["AntMaze_UMaze"])
    for before, after in zip(dataset._replace(terminal=dataset.reward), cut, strict=True):
        np.testing.assert_array_equal(after, before[kept])
    np.testing.assert_array_equal(new_ends, np.searchsorted(kept, ends))
    assert ("are left out" in capsys.readouterr().out) == (len(kept) < len(dataset.reward))


def dataset_of(rewards: list[list[float]], height: list[list[float]] | None = None) -> tuple[Dataset, np.ndarray]:
    """Episodes of the given rewards and their ends; `height` becomes coordinate 26 of their next observations."""
    reward = np.concatenate(rewards).astype(np.float32)
    next_obs = np.ones((len(reward), 45), np.float32)
    if height is not None:
        next_obs[:, 26] = np.concatenate(height)
    obs = np.arange(len(reward), dtype=np.float32)[:, None]
    ends = np.cumsum([len(episode) for episode in rewards])
    return Dataset(obs, np.zeros((len(reward), 2)), reward, next_obs, np.zeros_like(reward)), ends


HEIGHTS = [[0.2, 0.07, 0.2, 0.2], [0.2, 0.2, 0.2, 0.08], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("name", "max_steps", "rewards", "height", "expected"),
    [
        ("Hopper", 3, [[1, 2, 3, 100], [5], [0, 0, 7]], None, [6, 5, 7]),  # up to the horizon
        ("Hopper", 1000, [[1, 2, 3, 100], [5]], None, [106, 5]),
        ("AdroitHandPen", 100, [[1, 2, 4, 8], [1, 2, 4, 8], [16, 32]], HEIGHTS, [3, 15, 16]),  # with the drop's step
        ("AdroitHandPen", 100, [[1.0] * 150], None, [100]),
        ("AntMaze_UMaze", 3, [[0, 1, 1], [0, 0], [0, 0, 0, 1]], None, [1, 0, 0]),  # the best step
        ("FrankaKitchen", 280, [[0, 1, 1, 3], [0, 2, 2]], None, [3, 2]),
    ],
)
def test_what_an_episode_of_the_behaviour_is_worth(name, max_steps, rewards, height, expected):
    environment = ENVIRONMENTS[name]._replace(max_steps=max_steps)
    np.testing.assert_array_equal(behaviour_returns(*dataset_of(rewards, height), environment), expected)


@pytest.mark.parametrize(
    ("rule", "expected", "constant"),  # the last: of rewards that are 2 everywhere
    [
        ("none", [-1.0, 0.0, 1.0, 3.0], 2.0),
        ("normalize", [-1.0, -0.5, 0.0, 1.0], 0.0),
        ("cql_antmaze", [-6.0, -2.0, 2.0, 10.0], 6.0),
        ("iql_antmaze", [-2.0, -1.0, 0.0, 2.0], 1.0),
        ("iql_locomotion", [-200.0, 0.0, 200.0, 600.0], 2.0),  # 1000 / (4 - -1) = 200
    ],
)
def test_reward_rules(rule, expected, constant, capsys):
    shaped = shape_reward(np.array([-1.0, 0.0, 1.0, 3.0], np.float32), np.array([-1.0, 4.0]), rule)
    np.testing.assert_allclose(shaped, expected, rtol=1e-6)
    assert shaped.dtype == np.float32
    assert capsys.readouterr().out == ""
    shaped = shape_reward(np.full(4, 2.0, np.float32), np.array([4.0, 4.0]), rule)
    np.testing.assert_array_equal(shaped, np.full(4, constant))
    assert "Warning" in capsys.readouterr().out


@pytest.mark.parametrize("scores", [[1, 6, -9, 10, 5], [0, 1, 1, 1, 1]])
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_bc_keeps_the_best_episodes_whole_and_in_their_order(fraction, scores):
    dataset, ends = dataset_of([[0, 1], [5, 0, 1], [-9], [10], [3, 2]])
    behaviour = Behaviour({}, ends, np.array(scores), np.zeros(1), np.ones(1), [])
    best = bc.best_episodes(dataset, behaviour, fraction)
    ranking = [3, 1, 4, 0, 2] if scores[0] == 1 else [1, 2, 3, 4, 0]  # of equally good ones the first
    kept = np.isin([0, 0, 1, 1, 1, 2, 3, 4, 4], ranking[: max(1, round(5 * fraction))])
    for array, of_best in zip(dataset, best):
        np.testing.assert_array_equal(of_best, array[kept])


@pytest.mark.parametrize("normalize_obs", [False, True])
def test_policies_learn_from_and_act_by_observations_of_one_scale(
    hopper, normalize_obs, monkeypatch, tmp_path, quick_networks
):
    """Standardised by the mean and by the deviation plus 1e-3, if at all."""
    learned, seen = [], []
    monkeypatch.setattr(bc, "train_chunk", lambda state, _, __, data, *rest: (learned.append(data) or state, {}))
    monkeypatch.setattr(bc, "act", lambda _, obs, *rest: seen.append(obs) or np.zeros((1, 1, 3), np.float32))
    args = {"num_updates": 1, "eval_episodes": 1, "normalize_obs": normalize_obs, "run_dir": str(tmp_path / "run")}
    bc.train(bc.Args(dataset_id=hopper, **args))
    raw = by_hand(hopper)
    mean, std = (raw["obs"].mean(axis=0), raw["obs"].std(axis=0) + 1e-3) if normalize_obs else (0, 1)
    np.testing.assert_allclose(learned[0].obs, (raw["obs"] - mean) / std, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(learned[0].next_obs, (raw["next_obs"] - mean) / std, rtol=1e-3, atol=1e-4)
    start = (seen[0] * std + mean)[0, 0]
    assert start[0] == pytest.approx(1.25, abs=0.01), "the hopper's torso starts at a height of 1.25"
    np.testing.assert_allclose(start[1:], 0, atol=0.01)


def replace(folder, column: str, change, episodes=None):
    """A column of all episodes, or of those named, becomes `change(column)`."""
    with h5py.File(folder / ARRAYS, "r+") as file:
        for name in episodes or list(file):
            values = change(file[name][column][()])
            del file[name][column]
            file[name][column] = values


def spoil(folder, column: str, value: float):
    """The last entry of a column of episode 1 becomes `value`."""
    replace(folder, column, lambda array: np.append(array[:-1], np.full_like(array[-1:], value), axis=0), ["episode_1"])


def test_rewards_and_terminations_may_be_columns(datasets, hopper):
    expected = by_hand(hopper)
    for name in ("rewards", "terminations"):
        replace(datasets / hopper, name, lambda array: array[:, None])
    assert_same(read_minari(hopper), expected)


def test_actions_beyond_their_bounds_are_told_and_clipped_and_far_beyond_refused(
    datasets, hopper, capsys, exit_sentence
):
    end = np.cumsum([len(episode) for episode in minari.load_dataset(hopper).iterate_episodes()])[1]
    for factor, told in ((1.0, False), (3.0, True)):
        spoil(datasets / hopper, "actions", factor)
        np.testing.assert_array_equal(load(hopper)[0].action[end - 1], np.float32(0.999))
        assert ("leave their bounds, by up to 3 times, and are clipped" in capsys.readouterr().out) == told
    spoil(datasets / hopper, "actions", 50.0)
    assert "actions up to 50 times as large as its action space allows" in exit_sentence(load, hopper)


# ------------------------------------------------------------------------------------------------ damage, absence


def metadata(**changes):
    return lambda folder: change_metadata("test/hopper/random-v0", **changes)


DAMAGES = {
    "a file cut in half": lambda folder: os.truncate(folder / ARRAYS, (folder / ARRAYS).stat().st_size // 2),
    "metadata cut": lambda folder: os.truncate(folder / "data/metadata.json", 20),
    "metadata nested 100,000 times": lambda folder: (folder / "data/metadata.json").write_text("[" * 100_000),
    "another number of steps promised": metadata(total_steps=5),
    "infinitely many steps": metadata(total_steps=float("inf")),
    "the environment's description cut": metadata(env_spec="{"),
    "27 action bounds": metadata(action_space=serialize_space(Box(-1, 1, (27,)))),
    "of a version to come": metadata(minari_version="9.9.9"),
    "without a dataset id": metadata(dataset_id=None),
    "an infinite action": lambda folder: spoil(folder, "actions", np.inf),
    "a last observation that is no number": lambda folder: spoil(folder, "observations", np.nan),
    "a reward that is finite in float64 alone": lambda folder: spoil(folder, "rewards", 1e300),
    "a reward of 3e38": lambda folder: spoil(folder, "rewards", 3e38),
    "an observation too few": lambda folder: replace(folder, "observations", lambda array: array[:-1], ["episode_1"]),
    "a termination too few": lambda folder: replace(folder, "terminations", lambda array: array[:-1], ["episode_1"]),
    "terminations of a half": lambda folder: replace(folder, "terminations", lambda array: array / 2),
    "rewards as text": lambda folder: replace(folder, "rewards", lambda array: array.astype("S")),
    "one column of observations": lambda folder: replace(folder, "observations", lambda array: array[:, :1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dataset_exits_with_a_sentence_that_names_it(datasets, hopper, damage, exit_sentence):
    """And that does not ask to remove what a person may have made."""
    DAMAGES[damage](datasets / hopper)
    sentence = exit_sentence(load, hopper)
    assert re.search(f"ataset {hopper} in {datasets / hopper} cannot be read: .* .*", sentence)
    assert "remove" not in sentence


@pytest.mark.parametrize("kind", ["external link", "soft link", "external storage", "virtual dataset"])
def test_a_file_that_reaches_outside_itself_is_refused(kind, datasets, hopper, exit_sentence):
    with h5py.File(datasets / hopper / ARRAYS, "r+") as file:
        episode = file["episode_1"]
        size = len(episode["rewards"])
        del episode["rewards"]
        if kind == "external link":
            episode["rewards"] = h5py.ExternalLink("other.hdf5", "rewards")
        elif kind == "soft link":
            episode["rewards"] = h5py.SoftLink("/episode_0/rewards")
        elif kind == "external storage":
            episode.create_dataset("rewards", (size,), np.float64, external=[("/etc/passwd", 0, 8 * size)])
        else:
            layout = h5py.VirtualLayout((size,), np.float64)
            layout[:] = h5py.VirtualSource("gone.hdf5", "rewards", (size,))
            episode.create_virtual_dataset("rewards", layout)
    assert re.search("its /?episode_1/rewards (is a link|lies in another file)", exit_sentence(load, hopper))


def test_data_of_another_robot_are_refused(datasets, exit_sentence):
    """Halfcheetah's and walker2d's have the same widths."""
    walker = gymnasium.make("Walker2d-v5", max_episode_steps=9)
    record(walker, "mujoco/halfcheetah/medium-v0", 2)
    assert "recorded in Walker2d-v5" in exit_sentence(resolve_task, "halfcheetah-medium")
    change_metadata("mujoco/halfcheetah/medium-v0", env_spec=gymnasium.make("HalfCheetah-v5").spec.to_json())
    sentence = exit_sentence(load_dataset, resolve_task("halfcheetah-medium"), "none")
    assert "its episodes start 1.25 high" in sentence


def test_arrow_episodes_that_minaris_reader_would_mix_up_are_refused(datasets, exit_sentence):
    """It takes each batch of each file of a folder for an episode; Arrow cuts an episode of more than 32,767 steps."""
    pendulum = gymnasium.make("Pendulum-v1", max_episode_steps=40_000)
    observations, actions = np.zeros((40_001, 3), np.float32), np.zeros((40_000, 1), np.float32)
    ends = np.zeros(40_000, bool)
    write_dataset("test/long/x-v0", pendulum, [(observations, actions, np.zeros(40_000), ends, ends)], "arrow")
    assert "32767 transitions were read, and its metadata promise 40000" in exit_sentence(load, "test/long/x-v0")
    dataset = record_hopper(num_episodes=3, data_format="arrow")
    part = datasets / dataset.id / "data" / "1" / "part-0.arrow"
    shutil.copy(part, part.with_stem("part-0 (conflicted copy)"))
    assert "episode 1 has to be in one file" in exit_sentence(load, dataset.id)
    part.unlink()
    os.truncate(part.with_stem("part-0 (conflicted copy)"), 1000)
    assert f"Dataset {dataset.id}" in exit_sentence(load, dataset.id)


def test_a_missing_dataset_without_network_exits_with_the_command(datasets, exit_sentence):
    sentence = exit_sentence(resolve_task, "pen-human")
    for part in ("`minari download D4RL/pen/human-v2`", "pointmaze-umaze", "`minari list local`", str(datasets)):
        assert part in sentence
    assert re.search("offline|connection", sentence)
    assert "--dataset-path" in exit_sentence(resolve_task, "hopper-medium-replay"), "Minari has none"


def test_a_dataset_without_metadata_may_be_an_old_one_and_is_not_called_damaged(datasets, hopper, exit_sentence):
    (datasets / hopper / "data" / "metadata.json").unlink()
    assert re.search("has no data/metadata.json.*Minari 0.4", exit_sentence(load, hopper))


@pytest.mark.parametrize("dataset_id", ["test/hopper", "", "../x-v0", "/etc/x-v0", "a/../../x-v0", "hf://x-v0"])
def test_what_is_no_id_is_refused_and_leads_nowhere(dataset_id, datasets, hopper, exit_sentence):
    assert "no id of a Minari dataset" in exit_sentence(resolve_task, "", dataset_id)


def test_a_locked_file_is_not_called_damaged(datasets, hopper, exit_sentence):
    code = "import h5py, sys, time\nf = h5py.File(sys.argv[1], 'r+')\nprint('open', flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, datasets / hopper / ARRAYS], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        sentence = exit_sentence(load, hopper)
        writer.kill()
    assert "HDF5_USE_FILE_LOCKING" in sentence
    assert load(hopper)[1].statistics["episodes"] == 12


# -------------------------------------------------------------------------------------------------- real datasets


@pytest.mark.parametrize(
    ("dataset_id", "episodes", "score"),
    [
        ("edp/hopper/expert-v0", 123, pytest.approx(77.7, abs=0.5)),
        ("edp/antmaze/umaze-play-v0", 286, pytest.approx(78.0, abs=0.5)),
        # 60 other episodes of this behaviour scored 104; one episode's score deviates by some 60.
        ("dapg/pen/expert-v0", 250, pytest.approx(104, abs=15)),
    ],
)
def test_local_datasets_are_what_their_description_says(local_datasets, dataset_id, episodes, score):
    task = resolve_task("", dataset_id)
    loaded, behaviour = load_dataset(task, task.environment.domain.reward_rule)
    rewards = [episode.rewards for episode in minari.load_dataset(dataset_id).iterate_episodes()]
    if "antmaze" in dataset_id:  # an episode ends at its goal
        rewards = [of_episode[: np.argmax(np.append(of_episode > 0, True)) + 1] for of_episode in rewards]
    assert behaviour.statistics["transitions"] == len(loaded.reward) == sum(map(len, rewards))
    assert (len(behaviour.scores), behaviour.statistics["behaviour_score"]) == (episodes, score)
