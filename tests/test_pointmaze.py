"""The embedded default dataset, and the picture of its paths."""

import functools
import itertools

import matplotlib.image
import minari
import numpy as np
import pytest

from common import data, pointmaze
from common.data import resolve_task
from common.environments import make_gym_env

MAZES = ["PointMaze_UMaze-v3", "PointMaze_Medium-v3", "PointMaze_Large-v3"]
UMAZE = "edp/pointmaze/umaze-v0"


def distances(maze_map, goal) -> dict:
    """Steps from every free cell to `goal`, by relaxing all cells until nothing changes."""
    free = [(r, c) for r, line in enumerate(maze_map) for c, kind in enumerate(line) if kind != 1]
    steps = dict.fromkeys(free, np.inf) | {goal: 0}
    for _ in free:
        for r, c in free:
            around = [steps.get(cell, np.inf) for cell in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))]
            steps[r, c] = min(steps[r, c], 1 + min(around))
    return steps


MAPS = [pytest.param(lambda gym_id=gym_id: pointmaze.maze_of(gym_id).maze_map, id=gym_id) for gym_id in MAZES]
LETTERS = [[1, 1, 1, 1, 1], [1, "g", 0, 0, 1], [1, 1, 1, 0, 1], [1, "r", 0, "c", 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("maze_map", [*MAPS, pytest.param(lambda: LETTERS, id="a map with letters")])
def test_following_next_cells_is_a_shortest_path_from_everywhere(maze_map):
    maze_map = maze_map()
    free = [(r, c) for r, line in enumerate(maze_map) for c, kind in enumerate(line) if kind != 1]
    for goal in (free[0], free[len(free) // 2], free[-1]):
        following, shortest = pointmaze.next_cells(maze_map, goal), distances(maze_map, goal)
        assert set(following) == set(free)
        for start in free:
            cell, steps = start, 0
            while cell != goal:
                step = following[cell]
                assert abs(step[0] - cell[0]) + abs(step[1] - cell[1]) == 1
                cell, steps = step, steps + 1
            assert steps == shortest[start]


@pytest.mark.parametrize(
    ("gym_id", "cell", "centre"),
    # Cells are 1 wide; (0, 0) is the middle of 5 x 5, 8 x 8 and 9 x 12 cells; y points up, rows down.
    [(MAZES[0], (3, 1), (-1, -1)), (MAZES[1], (6, 6), (2.5, -2.5)), (MAZES[2], (7, 9), (3.5, -3.0))],
)
def test_cell_centres(gym_id, cell, centre):
    np.testing.assert_allclose(pointmaze.cell_centre(gym_id, cell), centre)


def test_the_dataset_is_one_endless_walk_cut_into_minari_episodes(made_pointmaze, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(made_pointmaze))
    dataset = minari.load_dataset(UMAZE)
    episodes = list(dataset.iterate_episodes())
    assert (dataset.total_steps, dataset.total_episodes) == (3000, 6)
    assert dataset.env_spec.id == MAZES[0]
    assert [len(episode) for episode in episodes] == [500] * 6
    for episode, following in itertools.pairwise(episodes):
        for key in ("observation", "achieved_goal", "desired_goal"):
            np.testing.assert_array_equal(episode.observations[key][-1], following.observations[key][0])
    for episode in episodes:
        assert len(episode.observations["observation"]) == 501
        assert np.abs(episode.actions).max() <= 1
        assert not episode.terminations.any()
        np.testing.assert_array_equal(np.flatnonzero(episode.truncations), [499])


def test_a_last_episode_may_be_shorter(datasets):
    dataset = pointmaze.make_dataset(UMAZE, num_steps=510)
    assert [len(episode) for episode in dataset.iterate_episodes()] == [500, 10]


def test_replaying_the_actions_gives_the_observations_and_rewards_follow_the_shown_goal(datasets):
    dataset = pointmaze.make_dataset(UMAZE, num_steps=600, seed=3)
    env = make_gym_env(MAZES[0], continuing_task=True, reset_target=True, max_episode_steps=601)
    obs, _ = env.reset(seed=3)
    for episode in dataset.iterate_episodes():
        for t, action in enumerate(episode.actions):
            np.testing.assert_allclose(obs["observation"], episode.observations["observation"][t], atol=1e-6)
            obs, *_ = env.step(action)
            distance = np.linalg.norm(obs["achieved_goal"] - episode.observations["desired_goal"][t])
            assert episode.rewards[t] == (distance <= 0.45)


def test_the_walk_visits_every_cell_and_goes_from_goal_to_goal(made_pointmaze, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(made_pointmaze))
    maze = pointmaze.maze_of(MAZES[0])
    episodes = list(minari.load_dataset(UMAZE).iterate_episodes())
    positions = np.concatenate([episode.observations["achieved_goal"] for episode in episodes])
    visited = {tuple(int(i) for i in maze.cell_xy_to_rowcol(xy)) for xy in positions}
    assert visited == {(1, 1), (1, 2), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)}
    goals = {tuple(goal) for episode in episodes for goal in episode.observations["desired_goal"]}
    assert len(goals) > 5
    arrivals = sum(episode.rewards.sum() for episode in episodes)
    assert len(goals) / 4 < arrivals < len(goals)  # the others were given up


def test_the_dataset_is_a_function_of_its_seed(datasets):
    walks = []
    for seed, name in enumerate(["a", "b", "c"]):
        datasets.joinpath(name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MINARI_DATASETS_PATH", str(datasets / name))
            (episode,) = pointmaze.make_dataset(UMAZE, num_steps=20, seed=seed // 2).iterate_episodes()
            walks.append(episode.observations["observation"])
    np.testing.assert_array_equal(walks[0], walks[1])
    assert not np.array_equal(walks[0], walks[2])


def test_the_dataset_is_made_once(datasets, monkeypatch, capsys):
    making = functools.partial(pointmaze.make_dataset, num_steps=100)
    monkeypatch.setattr(pointmaze, "make_dataset", making)
    assert resolve_task("pointmaze-umaze", None).dataset_ids == (UMAZE,)
    assert list(minari.list_local_datasets()) == [UMAZE]
    assert UMAZE in capsys.readouterr().out, "people are told what takes so long"
    monkeypatch.setattr(pointmaze, "make_dataset", lambda *_: pytest.fail("made again"))
    resolve_task("pointmaze-umaze", None)
    resolve_task("anything", UMAZE)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_making_leaves_nothing_and_can_be_repeated(datasets, monkeypatch, interruption):
    def interrupted(dataset_id):
        make_dataset(dataset_id, num_steps=100)
        raise interruption

    make_dataset = pointmaze.make_dataset
    monkeypatch.setattr(pointmaze, "make_dataset", interrupted)
    with pytest.raises(interruption):
        resolve_task("pointmaze-umaze", None)
    assert list(datasets.iterdir()) == []
    monkeypatch.setattr(pointmaze, "make_dataset", functools.partial(make_dataset, num_steps=100))
    resolve_task("pointmaze-umaze", None)
    assert data.load_dataset(resolve_task("pointmaze-umaze", None), "none")[1].statistics["transitions"] == 100


def test_an_unwritable_folder_of_datasets_exits(tmp_path, monkeypatch, exit_sentence):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "minari"))
    assert "MINARI_DATASETS_PATH" in exit_sentence(resolve_task, "pointmaze-umaze", None)


@pytest.mark.parametrize("gym_id", ["PointMaze_UMaze-v3", "AntMaze_Large-v5"])
def test_the_picture_shows_the_paths(tmp_path, gym_id):
    cells = ((1, 1), (1, 2))
    path = np.linspace(pointmaze.cell_centre(gym_id, (1, 1)), pointmaze.cell_centre(gym_id, (1, 2)), 10)
    pointmaze.draw_paths(gym_id, cells, [path], [path], tmp_path / "two.png")
    pointmaze.draw_paths(gym_id, cells, [], [path], tmp_path / "one.png")
    two, one = (matplotlib.image.imread(tmp_path / name) for name in ("two.png", "one.png"))
    height, width = two.shape[:2]
    assert width > height > 100
    left = two[height // 5 :, : width // 2] != one[height // 5 :, : width // 2]  # below the titles
    assert left.any(), "the behaviour's path is on the left"
    right = two[height // 5 :, width // 2 :] != one[height // 5 :, width // 2 :]
    assert not right.any(), "and only there"
