"""The embedded default dataset, and the picture of its paths."""

import functools
import itertools
import shutil
from pathlib import Path

import matplotlib.image
import minari
import numpy as np
import pytest
from minari.storage.datasets_root_dir import get_dataset_path

from common import recipes
from common.harness import plots
from common.harness.datasets import load_dataset, resolve_task
from common.harness.environments import make_gym_env
from common.recipes.pointmaze import next_cells

MAZES = ["PointMaze_UMaze-v3", "PointMaze_Medium-v3", "PointMaze_Large-v3"]
UMAZE = "edp/pointmaze/umaze-v0"
LETTERS = [[1, 1, 1, 1, 1], [1, "g", 0, 0, 1], [1, 1, 1, 0, 1], [1, "r", 0, "c", 1], [1, 1, 1, 1, 1]]


def maze_of(gym_id: str):
    return make_gym_env(gym_id).unwrapped.maze


@pytest.mark.parametrize("maze", [*MAZES, "a map with letters"])
def test_following_next_cells_is_a_shortest_path_from_everywhere(maze):
    maze_map = maze_of(maze).maze_map if maze in MAZES else LETTERS
    free = [(r, c) for r, line in enumerate(maze_map) for c, kind in enumerate(line) if kind != 1]
    for goal in (free[0], free[len(free) // 2], free[-1]):
        following = next_cells(maze_map, goal)
        assert set(following) == set(free)
        steps = lambda cell: 0 if cell == goal else 1 + steps(following[cell])
        around = lambda cell: [other for other in free if abs(other[0] - cell[0]) + abs(other[1] - cell[1]) == 1]
        for cell in free:
            assert cell == goal or following[cell] in around(cell)
            assert all(steps(cell) <= 1 + steps(other) for other in around(cell)), "no neighbour would be shorter"


def test_the_dataset_is_one_endless_walk_from_goal_to_goal_cut_into_minari_episodes(made_pointmaze, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(made_pointmaze))
    dataset = minari.load_dataset(UMAZE)
    episodes = list(dataset.iterate_episodes())
    assert (dataset.total_steps, dataset.env_spec.id) == (3000, MAZES[0])
    assert [len(episode) for episode in episodes] == [500] * 6
    for episode, following in itertools.pairwise(episodes):
        for key in ("observation", "achieved_goal", "desired_goal"):
            np.testing.assert_array_equal(episode.observations[key][-1], following.observations[key][0])
    for episode in episodes:
        assert len(episode.observations["observation"]) == 501
        assert np.abs(episode.actions).max() <= 1
        assert not episode.terminations.any()
        np.testing.assert_array_equal(np.flatnonzero(episode.truncations), [499])

    positions, maze = np.concatenate([episode.observations["achieved_goal"] for episode in episodes]), maze_of(MAZES[0])
    visited = {tuple(int(i) for i in maze.cell_xy_to_rowcol(xy)) for xy in positions}
    assert visited == {(1, 1), (1, 2), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)}
    goals = {tuple(goal) for episode in episodes for goal in episode.observations["desired_goal"]}
    assert len(goals) > 5
    assert len(goals) / 4 < sum(episode.rewards.sum() for episode in episodes) < len(goals), "others were given up"


def test_replaying_the_actions_gives_the_observations_and_rewards_follow_the_shown_goal(datasets):
    dataset = recipes.make_dataset(UMAZE, num_steps=510, seed=3)
    assert [len(episode) for episode in dataset.iterate_episodes()] == [500, 10]
    env = make_gym_env(MAZES[0], continuing_task=True, reset_target=True, max_episode_steps=511)
    obs, _ = env.reset(seed=3)
    for episode in dataset.iterate_episodes():
        for t, action in enumerate(episode.actions):
            np.testing.assert_allclose(obs["observation"], episode.observations["observation"][t], atol=1e-6)
            obs, *_ = env.step(action)
            distance = np.linalg.norm(obs["achieved_goal"] - episode.observations["desired_goal"][t])
            assert episode.rewards[t] == (distance <= 0.45)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_the_dataset_is_made_once_and_an_interrupted_making_leaves_nothing(datasets, monkeypatch, capsys, interruption):
    def interrupted(dataset_id):
        making(dataset_id)
        raise interruption

    making = functools.partial(recipes.make_dataset, num_steps=100)
    monkeypatch.setattr(recipes, "make_dataset", interrupted)
    with pytest.raises(interruption):
        resolve_task("pointmaze-umaze")
    assert list(datasets.iterdir()) == []
    monkeypatch.setattr(recipes, "make_dataset", making)
    assert resolve_task("pointmaze-umaze").dataset_ids == (UMAZE,)
    assert list(minari.list_local_datasets()) == [UMAZE]
    assert UMAZE in capsys.readouterr().out, "people are told what takes so long"
    monkeypatch.setattr(recipes, "make_dataset", lambda *_: pytest.fail("made again"))
    assert load_dataset(resolve_task("anything", UMAZE), "none")[1].statistics["transitions"] == 100


def test_a_dataset_that_another_process_made_meanwhile_is_used_and_one_that_cannot_be_moved_is_told(
    datasets, monkeypatch, exit_sentence
):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(recipes, "make_dataset", functools.partial(recipes.make_dataset, num_steps=100))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        assert "(Permission denied); set MINARI_DATASETS_PATH" in exit_sentence(resolve_task, "pointmaze-umaze")
    making = recipes.make_dataset

    def made_twice(dataset_id):
        making(dataset_id)
        shutil.copytree(get_dataset_path(dataset_id), datasets / dataset_id)

    monkeypatch.setattr(recipes, "make_dataset", made_twice)
    assert resolve_task("pointmaze-umaze").dataset_ids == (UMAZE,)
    assert list(minari.list_local_datasets()) == [UMAZE]


def test_an_unwritable_folder_of_datasets_exits(tmp_path, monkeypatch, exit_sentence):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "minari"))
    assert "MINARI_DATASETS_PATH" in exit_sentence(resolve_task, "pointmaze-umaze")


@pytest.mark.parametrize("gym_id", ["PointMaze_UMaze-v3", "AntMaze_Large-v5"])
def test_the_picture_shows_the_paths(tmp_path, gym_id):
    maze, cells = maze_of(gym_id), ((1, 1), (1, 2))
    path = np.linspace(*(maze.cell_rowcol_to_xy(np.array(cell)) for cell in cells), 10)
    shown = {"success": [(path, True)], "failure": [(path, False)], "none": []}
    for name, behaviour in shown.items():
        figure = plots.maze_paths(maze, cells, 0.45, [behaviour, [(path, True)]], [54.5, 100.0])
        figure.savefig(tmp_path / f"{name}.png")
    assert [ax.get_title() for ax in figure.axes] == [
        "dataset: 54.5 % reach the goal",
        "learned policy: 100.0 % reach the goal",
    ]
    success, failure, none = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in shown)
    height, width = success.shape[:2]
    assert width > height > 100
    for one, other in ((success, none), (success, failure)):
        differs = (one != other)[height // 5 :].any(axis=(0, 2))  # below the titles
        assert differs[: width // 2].any(), "the behaviour's path is on the left, in the colour of its end"
        assert not differs[width // 2 :].any(), "and only there"
