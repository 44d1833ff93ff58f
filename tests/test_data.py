"""Datasets: small real Minari ones, recorded here, against a plain iteration through Minari's own interface."""

import json
import os
import shutil
import sys
import time

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from helpers import by_hand, change_metadata, goal_here, record, record_hopper

from common import data
from common.data import load_dataset, read_minari, resolve_task
from common.environments import make_env, make_gym_env
from common.tasks import ENVIRONMENTS, TASKS, Task, task_of_dataset
from common.transitions import Transitions, behaviour_returns, best_episodes, relabel, shape_reward

FORMATS = ["hdf5", "arrow"]


def assert_same(transitions: Transitions, expected: dict[str, np.ndarray]):
    for name, array in transitions._asdict().items():
        np.testing.assert_array_equal(array, expected[name].astype(array.dtype), err_msg=name)
        assert array.dtype == (np.float32 if name != "episode_end" else np.int64), name


def load(dataset_id: str, rule="none", **kwargs):
    return load_dataset(resolve_task("pointmaze-umaze", dataset_id), rule, **kwargs)


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("data_format", FORMATS)
def test_flat_arrays_are_minaris_own_episodes_end_to_end(datasets, data_format):
    dataset = record_hopper(data_format=data_format)
    expected = by_hand(dataset.id)
    lengths = np.diff(expected["episode_end"], prepend=0)
    assert len(lengths) > 10, "alphabetical order would be the right one"
    assert len(set(lengths)) > 3, "episodes in another order would differ"
    assert_same(read_minari(dataset.id, ENVIRONMENTS["Hopper"]), expected)


def test_terminal_marks_terminations_and_never_truncations(datasets):
    dataset = record_hopper()
    transitions = read_minari(dataset.id, ENVIRONMENTS["Hopper"])
    last = transitions.episode_end - 1
    episodes = list(dataset.iterate_episodes())
    np.testing.assert_array_equal(transitions.terminal[last], [episode.terminations[-1] for episode in episodes])
    assert 0 < transitions.terminal.sum() < len(episodes), "this dataset has ends of both kinds"
    assert transitions.terminal.sum() == transitions.terminal[last].sum()


def test_the_last_transition_of_an_episode_has_its_real_next_observation(datasets):
    dataset = record_hopper()
    transitions = read_minari(dataset.id, ENVIRONMENTS["Hopper"])
    final = np.array([episode.observations[-1] for episode in dataset.iterate_episodes()], np.float32)
    np.testing.assert_array_equal(transitions.next_obs[transitions.episode_end - 1], final)


@pytest.mark.parametrize("data_format", FORMATS)
def test_parts_of_a_dict_observation_are_joined_in_the_tables_order(datasets, data_format):
    env = make_gym_env("AntMaze_UMaze-v5", include_cfrc_ext_in_observation=False, max_episode_steps=6)
    dataset = record(env, "test/antmaze/random-v0", 11, data_format)
    transitions = read_minari(dataset.id, ENVIRONMENTS["AntMaze_UMaze"])
    assert transitions.obs.shape == (66, 31)
    assert_same(transitions, by_hand(dataset.id, "achieved_goal", "observation", "desired_goal"))


@pytest.mark.parametrize("data_format", FORMATS)
def test_an_unknown_dict_observation_has_one_order_in_data_and_evaluation(datasets, data_format):
    dataset = record(make_gym_env("FetchReach-v4", max_episode_steps=3), "test/reach/random-v0", 2, data_format)
    environment = resolve_task("", dataset.id).environment
    transitions = read_minari(dataset.id, environment)
    env = make_env(environment)
    for episode, start in enumerate([0, 3]):
        obs, _ = env.reset(seed=episode)
        np.testing.assert_allclose(obs, transitions.obs[start], rtol=1e-5, atol=1e-6)


def test_an_arrow_dataset_without_pyarrow_exits(datasets, monkeypatch, exit_sentence):
    dataset = record_hopper(num_episodes=2)
    change_metadata(dataset.id, data_format="arrow")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "minari.dataset._storages.arrow_storage", raising=False)
    assert "pyarrow" in exit_sentence(load, dataset.id)


# ----------------------------------------------------------------------------------------------- from data to task


def test_antmaze_ends_where_it_is_paid(datasets):
    env = make_gym_env("AntMaze_UMaze-v5", include_cfrc_ext_in_observation=False, max_episode_steps=4)
    dataset = record(env, "test/antmaze/random-v0", 6, prepare=goal_here)
    raw = by_hand(dataset.id, "observation")
    assert raw["terminal"].sum() == 0, "Minari's antmaze never terminates"
    assert 0 < raw["reward"].sum() < len(raw["reward"])
    loaded, info = load(dataset.id, "cql_antmaze")
    np.testing.assert_array_equal(loaded.terminal, raw["reward"] > 0)
    np.testing.assert_array_equal(loaded.reward, np.where(raw["reward"] > 0, 2.0, -2.0))
    assert info.behaviour_score == pytest.approx(100 * 2 / 6), "two of six episodes succeed"
    assert info.statistics["terminations"] == raw["reward"].sum()


def test_pointmaze_is_relabelled_by_the_distance_of_the_next_position_to_the_goal_cell(datasets):
    env = make_gym_env("PointMaze_UMaze-v3", continuing_task=True, max_episode_steps=40)
    dataset = record(env, "test/pointmaze/random-v0", 12)
    raw = by_hand(dataset.id, "observation")
    # The 5 x 5 maze has cells of 1 and its middle at (0, 0): (row, column) = (1, 1) is x = -1, y = 1.
    success = np.hypot(raw["next_obs"][:, 0] + 1, raw["next_obs"][:, 1] - 1) <= 0.45
    assert 0 < success.sum() < len(success)
    assert (success != raw["reward"]).any(), "the data's own goals are others"
    loaded, info = load(dataset.id, "iql_antmaze")
    np.testing.assert_array_equal(loaded.terminal, success)
    np.testing.assert_array_equal(loaded.reward, success - 1.0)
    assert info.behaviour_score == pytest.approx(100 * success.reshape(12, 40).any(axis=1).mean())


def test_relabelling_looks_at_the_next_position_and_at_a_radius_of_045():
    # The goal is at (-1, 1). Coming near it counts, leaving it does not, whatever the recorded reward.
    positions = np.array([(3.0, 0.0), (-1.0, 1.44), (-1.46, 1.0), (-0.56, 1.0), (0.0, 0.0)], np.float32)
    obs = np.pad(positions, ((0, 0), (0, 2)))
    recorded = np.array([0, 1, 0, 1], np.float32)
    transitions = Transitions(obs[:-1], np.zeros((4, 2)), recorded, obs[1:], np.zeros(4), np.array([4]))
    relabelled = relabel(transitions, ENVIRONMENTS["PointMaze_UMaze"])
    np.testing.assert_array_equal(relabelled.reward, [1, 0, 1, 0])
    np.testing.assert_array_equal(relabelled.terminal, [1, 0, 1, 0])
    assert relabelled.reward.dtype == relabelled.terminal.dtype == np.float32


def transitions_of(rewards: list[list[float]], height: list[list[float]] | None = None) -> Transitions:
    """Episodes of the given rewards; `height` becomes coordinate 26 of their next observations."""
    reward = np.concatenate(rewards).astype(np.float32)
    next_obs = np.ones((len(reward), 45), np.float32)
    if height is not None:
        next_obs[:, 26] = np.concatenate(height)
    end = np.cumsum([len(episode) for episode in rewards])
    return Transitions(np.ones_like(next_obs), np.zeros((len(reward), 2)), reward, next_obs, np.zeros_like(reward), end)


def test_behaviour_counts_rewards_up_to_the_horizon():
    hopper = ENVIRONMENTS["Hopper"]._replace(max_steps=3)
    returns = behaviour_returns(transitions_of([[1, 2, 3, 100], [5], [0, 0, 7]]), hopper)
    np.testing.assert_array_equal(returns, [6, 5, 7])
    unlimited = behaviour_returns(transitions_of([[1, 2, 3, 100], [5]]), hopper._replace(max_steps=None))
    np.testing.assert_array_equal(unlimited, [106, 5])


def test_behaviour_of_the_pen_ends_with_the_step_that_drops_it():
    rewards = [[1, 2, 4, 8], [1, 2, 4, 8], [16, 32]]
    height = [[0.2, 0.07, 0.2, 0.2], [0.2, 0.2, 0.2, 0.08], [0.0, 0.0]]
    pen = ENVIRONMENTS["AdroitHandPen"]
    np.testing.assert_array_equal(behaviour_returns(transitions_of(rewards, height), pen), [3, 15, 16])
    long = behaviour_returns(transitions_of([[1.0] * 150]), pen)
    np.testing.assert_array_equal(long, [100])


def test_behaviour_of_mazes_and_kitchen_is_worth_its_best_step_before_the_horizon():
    maze = ENVIRONMENTS["AntMaze_UMaze"]._replace(max_steps=3)
    np.testing.assert_array_equal(behaviour_returns(transitions_of([[0, 1, 1], [0, 0], [0, 0, 0, 1]]), maze), [1, 0, 0])
    kitchen = ENVIRONMENTS["FrankaKitchen"]
    np.testing.assert_array_equal(behaviour_returns(transitions_of([[0, 1, 1, 3], [0, 2, 2]]), kitchen), [3, 2])


def test_behaviour_is_scored_as_the_evaluation_environment_scores_the_same_actions(datasets):
    dataset = record(make_gym_env("AdroitHandPen-v1", max_episode_steps=120), "test/pen/random-v0", 3)
    env = make_env(ENVIRONMENTS["AdroitHandPen"])
    played = []
    for i, episode in enumerate(dataset.iterate_episodes()):
        env.reset(seed=i)
        total, t, done = 0.0, 0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(episode.actions[t])
            total, t, done = total + reward, t + 1, terminated or truncated
        assert len(episode) == 120
        played.append(total)
    transitions = read_minari(dataset.id, ENVIRONMENTS["AdroitHandPen"])
    np.testing.assert_allclose(behaviour_returns(transitions, ENVIRONMENTS["AdroitHandPen"]), played, rtol=1e-4)
    assert (transitions.next_obs[:, 26] < 0.075).any(), "the pen was dropped"
    assert not load(dataset.id)[0].terminal.any(), "which ends no episode of Minari's data"


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [(0.1, [3]), (0.2, [3]), (0.4, [1, 3]), (0.6, [1, 3, 4]), (0.8, [0, 1, 3, 4]), (1.0, [0, 1, 2, 3, 4])],
)
def test_the_best_episodes_are_kept_whole_and_in_their_order(fraction, kept):
    rewards = [[0, 1], [5, 0, 1], [-9], [10], [3, 2]]  # returns 1, 6, -9, 10, 5
    transitions = transitions_of(rewards)._replace(obs=np.arange(9)[:, None])
    best = best_episodes(transitions, np.array([sum(episode) for episode in rewards]), fraction)
    np.testing.assert_array_equal(best.reward, np.concatenate([rewards[i] for i in kept]))
    np.testing.assert_array_equal(best.episode_end, np.cumsum([len(rewards[i]) for i in kept]))
    np.testing.assert_array_equal(best.obs[:, 0], np.flatnonzero(np.isin([0, 0, 1, 1, 1, 2, 3, 4, 4], kept)))


def test_of_equally_good_episodes_the_first_are_kept():
    best = best_episodes(transitions_of([[0], [1], [2, -1], [1], [1]]), np.array([0, 1, 1, 1, 1]), 0.4)
    np.testing.assert_array_equal(best.reward, [1, 2, -1])


def test_a_dataset_of_the_best_episodes_has_their_transitions_alone_and_tells_so(datasets):
    dataset = record_hopper(num_episodes=12)
    raw = by_hand(dataset.id)
    returns = np.array([episode.rewards.sum() for episode in dataset.iterate_episodes()])
    best = np.sort(np.argsort(-returns)[:3])
    start, end = np.append(0, raw["episode_end"])[best], raw["episode_end"][best]
    kept = np.concatenate([np.arange(*interval) for interval in zip(start, end)])
    everything, all_info = load(dataset.id)
    loaded, info = load(dataset.id, top_fraction=0.25)
    for name, array in loaded._asdict().items():
        np.testing.assert_array_equal(array, getattr(everything, name)[kept], err_msg=name)
    assert (info.statistics["kept_episodes"], info.statistics["kept_transitions"]) == (3, len(kept))
    assert all_info.statistics.items() < info.statistics.items(), "the rest describes all of the data"
    assert info.behaviour_score == all_info.behaviour_score


REWARD = np.array([-1.0, 0.0, 1.0, 3.0], np.float32)
RETURNS = np.array([-1.0, 4.0])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", [-1.0, 0.0, 1.0, 3.0]),
        ("normalize", [-1.0, -0.5, 0.0, 1.0]),
        ("cql_antmaze", [-6.0, -2.0, 2.0, 10.0]),
        ("iql_antmaze", [-2.0, -1.0, 0.0, 2.0]),
        ("iql_locomotion", [-200.0, 0.0, 200.0, 600.0]),  # 1000 / (4 - -1) = 200
    ],
)
def test_reward_rules(rule, expected):
    shaped = shape_reward(REWARD, RETURNS, rule)
    np.testing.assert_allclose(shaped, expected, rtol=1e-6)
    assert shaped.dtype == np.float32


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("none", 2.0), ("normalize", 0.0), ("cql_antmaze", 6.0), ("iql_antmaze", 1.0), ("iql_locomotion", 2.0)],
)
def test_a_constant_reward_is_warned_of_and_stays_finite(rule, expected, capsys):
    shaped = shape_reward(np.full(4, 2.0, np.float32), np.array([4.0, 4.0]), rule)
    np.testing.assert_array_equal(shaped, np.full(4, expected))
    assert "Warning" in capsys.readouterr().out


def test_no_warning_of_rewards_that_differ(capsys):
    shape_reward(REWARD, RETURNS, "none")
    assert capsys.readouterr().out == ""


def test_actions_of_any_box_are_scaled_to_one_and_clipped_below_it(datasets):
    dataset = record(gymnasium.make("Pendulum-v1", max_episode_steps=10), "test/pendulum/random-v0", 2)
    with h5py.File(datasets / dataset.id / "data" / "main_data.hdf5", "r+") as file:
        file["episode_0/actions"][:2] = [[2.0], [-2.0]]
    raw = by_hand(dataset.id)["action"]
    loaded, _ = load(dataset.id)
    np.testing.assert_allclose(loaded.action[2:], raw[2:] / 2, rtol=1e-6)
    np.testing.assert_allclose(loaded.action[:2], [[0.999], [-0.999]], rtol=1e-6)
    assert np.abs(loaded.action).max() == np.float32(0.999)
    assert loaded.action.shape == (20, 1)


def test_normalized_observations_have_mean_0_and_deviation_1_and_can_be_taken_back(datasets):
    dataset = record_hopper()
    plain, plain_info = load(dataset.id)
    scaled, info = load(dataset.id, normalize_obs=True)
    np.testing.assert_allclose(np.mean(scaled.obs, axis=0), 0, atol=1e-5)
    deviation = np.std(plain.obs, axis=0)
    np.testing.assert_allclose(np.std(scaled.obs, axis=0), deviation / (deviation + 1e-3), rtol=1e-3)
    np.testing.assert_allclose(np.array(scaled.next_obs) * info.obs_std + info.obs_mean, plain.next_obs, atol=1e-5)
    np.testing.assert_array_equal(plain_info.obs_mean, np.zeros(11))
    np.testing.assert_array_equal(plain_info.obs_std, np.ones(11))


def test_two_datasets_are_joined_end_to_end(datasets):
    first, second = record_hopper("test/hopper/a-v0", 3), record_hopper("test/hopper/b-v0", 11, seed=50)
    loaded, info = load_dataset(Task("both", ENVIRONMENTS["Hopper"], (first.id, second.id)), "iql_locomotion")
    raw = [by_hand(dataset.id) for dataset in (first, second)]
    np.testing.assert_array_equal(loaded.obs, np.concatenate([r["obs"] for r in raw]).astype(np.float32))
    returns = [ep.rewards.sum() for dataset in (first, second) for ep in dataset.iterate_episodes()]
    scale = 1000 / (max(returns) - min(returns))  # over both
    np.testing.assert_allclose(loaded.reward, scale * np.concatenate([r["reward"] for r in raw]), rtol=1e-4)
    assert info.statistics["episodes"] == 14
    assert info.statistics["return_mean"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert info.behaviour_score == pytest.approx(100 * (np.mean(returns) + 20.272305) / 3254.572305, rel=1e-4)


# --------------------------------------------------------------------------------------------------------- cache


def all_files(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_second_read_comes_from_the_cache_and_nothing_is_written_beside_the_dataset(datasets, monkeypatch):
    dataset = record_hopper()
    before = all_files(datasets)
    first = read_minari(dataset.id, ENVIRONMENTS["Hopper"])
    monkeypatch.setattr(data, "_read_files", lambda *_: pytest.fail("the files were read again"))
    second = read_minari(dataset.id, ENVIRONMENTS["Hopper"])
    assert_same(second, first._asdict())
    assert all_files(datasets) == before


def test_the_cache_is_rebuilt_when_the_dataset_changes(datasets):
    dataset = record_hopper()
    old = read_minari(dataset.id, ENVIRONMENTS["Hopper"])
    with h5py.File(datasets / dataset.id / "data" / "main_data.hdf5", "r+") as file:
        file["episode_0/rewards"][0] = 1234.0
    new = read_minari(dataset.id, ENVIRONMENTS["Hopper"])
    assert new.reward[0] == 1234.0
    np.testing.assert_array_equal(new.reward[1:], old.reward[1:])


def test_another_selection_of_a_dict_observation_is_not_taken_from_the_cache(datasets):
    env = make_gym_env("PointMaze_UMaze-v3", max_episode_steps=5)
    dataset = record(env, "test/pointmaze/random-v0", 2)
    pointmaze = ENVIRONMENTS["PointMaze_UMaze"]
    assert read_minari(dataset.id, pointmaze).obs.shape[1] == 4
    assert read_minari(dataset.id, pointmaze._replace(obs_keys=("desired_goal", "observation"))).obs.shape[1] == 6


@pytest.mark.parametrize("name", ["obs.npy", "episode_end.npy", "fingerprint"])
@pytest.mark.parametrize("kept", [0.6, 0.0])
def test_a_truncated_cache_is_rebuilt(datasets, name, kept):
    dataset = record_hopper(num_episodes=2)
    expected = read_minari(dataset.id, ENVIRONMENTS["Hopper"])
    (file,) = data.CACHE.rglob(name)
    os.truncate(file, int(kept * file.stat().st_size))
    assert_same(read_minari(dataset.id, ENVIRONMENTS["Hopper"]), expected._asdict())


def test_a_cache_that_cannot_be_written_is_done_without(datasets, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data, "CACHE", tmp_path / "file" / "cache")
    dataset = record_hopper(num_episodes=2)
    assert_same(read_minari(dataset.id, ENVIRONMENTS["Hopper"]), by_hand(dataset.id))
    assert "could not be cached" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ damage, absence


def truncate_hdf5(folder):
    file = folder / "data" / "main_data.hdf5"
    os.truncate(file, file.stat().st_size // 2)


def lose_a_reward_column(folder):
    with h5py.File(folder / "data" / "main_data.hdf5", "r+") as file:
        del file["episode_1/rewards"]


def spoil(folder, column: str, value: float):
    with h5py.File(folder / "data" / "main_data.hdf5", "r+") as file:
        file[f"episode_1/{column}"][-1] = value


def shorten(folder, *columns: str, steps: int = 2):
    """Cuts episode 1 to two steps, of which some columns have one only: NumPy would write it twice."""
    with h5py.File(folder / "data" / "main_data.hdf5", "r+") as file:
        removed = len(file["episode_1/rewards"]) - steps
        for column, array in file["episode_1"].items():
            if column != "infos":
                array.resize(steps + (column == "observations") - (column in columns), axis=0)
    lengthen(folder, "total_steps", -removed)


def lengthen(folder, key: str, by: int):
    file = folder / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps(metadata | {key: metadata[key] + by}))


DAMAGES = {
    "HDF5 cut in half": truncate_hdf5,
    "HDF5 emptied": lambda folder: os.truncate(folder / "data" / "main_data.hdf5", 0),
    "HDF5 overwritten": lambda folder: (folder / "data" / "main_data.hdf5").write_bytes(b"<html>not found</html>"),
    "HDF5 gone": lambda folder: (folder / "data" / "main_data.hdf5").unlink(),
    "a column gone": lose_a_reward_column,
    "metadata gone": lambda folder: (folder / "data" / "metadata.json").unlink(),
    "metadata cut": lambda folder: os.truncate(folder / "data" / "metadata.json", 20),
    "metadata empty": lambda folder: (folder / "data" / "metadata.json").write_text("{}"),
    "more steps promised": lambda folder: lengthen(folder, "total_steps", 5),
    "fewer steps promised": lambda folder: lengthen(folder, "total_steps", -5),
    "more episodes promised": lambda folder: lengthen(folder, "total_episodes", 1),
    "more steps promised than there is memory for": lambda folder: lengthen(folder, "total_steps", 10**15),
    "a reward that is no number": lambda folder: spoil(folder, "rewards", np.nan),
    "an infinite action": lambda folder: spoil(folder, "actions", np.inf),
    "a last observation that is no number": lambda folder: spoil(folder, "observations", np.nan),
    "an observation too few": lambda folder: shorten(folder, "observations"),
    "a reward too few": lambda folder: shorten(folder, "rewards"),
    "a termination too few": lambda folder: shorten(folder, "terminations"),
    "an episode without steps": lambda folder: shorten(folder, steps=0),
    "metadata of another kind": lambda folder: (folder / "data" / "metadata.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dataset_exits_with_a_sentence_that_names_it(datasets, damage, exit_sentence):
    dataset = record_hopper(num_episodes=3)
    DAMAGES[damage](datasets / dataset.id)
    assert dataset.id in exit_sentence(load, dataset.id)


def test_two_steps_are_an_episode_if_nothing_is_missing(datasets):
    dataset = record_hopper(num_episodes=3)
    shorten(datasets / dataset.id)
    assert np.diff(read_minari(dataset.id, ENVIRONMENTS["Hopper"]).episode_end)[0] == 2


@pytest.mark.parametrize("part", ["1", "1/part-0.arrow"])
def test_an_arrow_dataset_with_a_part_missing_exits(datasets, part, exit_sentence):
    dataset = record_hopper(num_episodes=3, data_format="arrow")
    path = datasets / dataset.id / "data" / part
    shutil.rmtree(path) if path.is_dir() else os.truncate(path, path.stat().st_size // 2)
    assert dataset.id in exit_sentence(load, dataset.id)


@pytest.mark.parametrize("env_spec", ["{", "{}", "[]", '{"id": "Hopper-v5"}', '{"id": 5, "kwargs": {}}'])
def test_a_damaged_description_of_the_environment_exits(datasets, env_spec, exit_sentence):
    dataset = record_hopper(num_episodes=1)
    change_metadata(dataset.id, env_spec=env_spec)
    assert dataset.id in exit_sentence(load, dataset.id)


@pytest.mark.parametrize("space", ["{", "{}", '{"type": "Sphere"}'])
def test_a_damaged_description_of_a_space_exits(datasets, space, exit_sentence):
    dataset = record_hopper(num_episodes=1)
    change_metadata(dataset.id, observation_space=space)
    assert dataset.id in exit_sentence(load, dataset.id)


@pytest.mark.parametrize("key", ["action_space", "observation_space", "total_steps", "env_spec"])
def test_metadata_without_a_key_exit_with_a_sentence(datasets, key, exit_sentence):
    dataset = record_hopper(num_episodes=2)
    change_metadata(dataset.id, **{key: None})
    assert dataset.id in exit_sentence(load, dataset.id)


def test_a_missing_dataset_without_network_exits_soon_with_the_command_and_the_local_ones(datasets, exit_sentence):
    local = record_hopper(num_episodes=1)
    start = time.monotonic()
    sentence = exit_sentence(resolve_task, "pen-human", None)
    assert time.monotonic() - start < 15
    assert "`minari download D4RL/pen/human-v2`" in sentence
    assert local.id in sentence
    assert "pointmaze-umaze" in sentence
    assert "`minari download some/one/else-v3`" in exit_sentence(resolve_task, "pen-human", "some/one/else-v3")


def test_a_network_that_never_answers_is_given_up_soon(datasets, monkeypatch, exit_sentence):
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(data, "NETWORK_TIMEOUT", 0.2)
    start = time.monotonic()
    assert "does not answer" in exit_sentence(resolve_task, "pen-human", None)
    assert time.monotonic() - start < 5


def test_a_failed_download_leaves_nothing_and_exits(datasets, monkeypatch, exit_sentence):
    def partly(dataset_id):
        record_hopper(dataset_id, 1)
        raise ConnectionError("the line went dead\nand more")

    monkeypatch.setattr(data, "_hub_answers", lambda: True)
    monkeypatch.setattr(minari, "download_dataset", partly)
    sentence = exit_sentence(resolve_task, "", "some/hopper/random-v0")
    assert "the line went dead" in sentence
    assert "`minari download some/hopper/random-v0`" in sentence
    assert list(datasets.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(datasets, monkeypatch):
    def partly(dataset_id):
        record_hopper(dataset_id, 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "_hub_answers", lambda: True)
    monkeypatch.setattr(minari, "download_dataset", partly)
    with pytest.raises(KeyboardInterrupt):
        resolve_task("", "some/hopper/random-v0")
    assert list(datasets.iterdir()) == []


def test_a_download_arrives_where_minari_finds_it(datasets, monkeypatch):
    monkeypatch.setattr(data, "_hub_answers", lambda: True)
    monkeypatch.setattr(minari, "download_dataset", record_hopper)
    task = resolve_task("", "some/hopper/random-v0")
    assert task.environment == TASKS["hopper-medium"].environment
    assert list(minari.list_local_datasets()) == ["some/hopper/random-v0"]
    assert [path.name for path in datasets.iterdir()] == ["some"], "the temporary folder is gone"
    assert os.environ["MINARI_DATASETS_PATH"] == str(datasets)
    assert load("some/hopper/random-v0")[1].statistics["episodes"] == 12


def test_without_minari_datasets_path_the_default_folder_is_used_and_the_variable_stays_unset(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "_hub_answers", lambda: True)
    monkeypatch.setattr(minari, "download_dataset", record_hopper)
    resolve_task("", "some/hopper/random-v0")
    assert "MINARI_DATASETS_PATH" not in os.environ
    assert (tmp_path / ".minari/datasets/some/hopper/random-v0/data/metadata.json").exists()


@pytest.mark.parametrize("dataset_id", ["test/hopper", "test", ""])
def test_a_folder_of_other_datasets_is_never_offered_for_removal(datasets, dataset_id, exit_sentence):
    record_hopper("test/hopper/random-v0", 1)
    assert "remove" not in exit_sentence(resolve_task, "", dataset_id)


def test_a_damaged_neighbour_does_not_disturb_the_message_about_a_missing_dataset(datasets, exit_sentence):
    record_hopper("test/hopper/random-v0", 1)
    os.truncate(datasets / "test/hopper/random-v0/data/metadata.json", 5)
    assert "`minari download D4RL/pen/human-v2`" in exit_sentence(resolve_task, "pen-human", None)


def test_a_stray_folder_does_not_disturb_the_message_about_a_missing_dataset(datasets, exit_sentence):
    (datasets / "stray" / "data").mkdir(parents=True)
    assert "`minari download D4RL/pen/human-v2`" in exit_sentence(resolve_task, "pen-human", None)


# -------------------------------------------------------------------------------------------------- real datasets


@pytest.mark.parametrize(
    ("dataset_id", "transitions", "episodes", "score"),
    [
        ("edp/hopper/medium-v0", 200_387, 417, 49.6),
        ("edp/hopper/expert-v0", 100_392, 123, 77.7),
        ("edp/antmaze/umaze-play-v0", 200_200, 286, 78.0),
    ],
)
def test_local_datasets_are_what_their_description_says(local_datasets, dataset_id, transitions, episodes, score):
    task = resolve_task("", dataset_id)
    loaded, info = load_dataset(task, task.environment.domain.reward_rule)
    assert len(loaded.reward) == info.statistics["transitions"] == transitions
    assert info.statistics["episodes"] == episodes
    assert info.behaviour_score == pytest.approx(score, abs=0.5)


def test_the_local_pen_expert_scores_about_what_its_policy_scored_in_the_environment(local_datasets):
    # 60 other episodes of the behaviour scored 104; one episode's score deviates by some 60.
    task = task_of_dataset("dapg/pen/expert-v0", json.dumps({"id": "AdroitHandPen-v1", "kwargs": {}}))
    _, info = load_dataset(task, "normalize")
    assert info.behaviour_score == pytest.approx(104, abs=15)
