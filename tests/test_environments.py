"""Evaluation against hand-written loops over Gymnasium's own environments."""

import subprocess
import tempfile

import gymnasium
import jax
import numpy as np
import pytest
from helpers import evaluated

from common.harness import Evaluator, environments
from common.harness.environments import cell_centre, make_env, make_gym_env
from common.harness.tasks import ENVIRONMENTS

HOPPER = ENVIRONMENTS["Hopper"]


def wild_policy(obs, step: int):
    """Actions for the hopper that look random but depend on its observation alone: episodes of many lengths."""
    weights = np.random.default_rng(0).standard_normal((11, 3))
    products = np.asarray(obs, np.float32)[..., None] * weights
    return np.sin(100 * products.sum(axis=-2))  # `@` would round by the size of the batch


# ------------------------------------------------------------------------------------------------------ episodes


def test_returns_are_those_of_a_plain_loop_and_every_seed_update_and_episode_starts_differently():
    evaluate = Evaluator(HOPPER, [0, 1], 4)
    episodes = evaluated(evaluate, wild_policy, update=1)
    env, seeds = gymnasium.make("Hopper-v5"), []
    for i, j in np.ndindex(2, 4):
        played = evaluate.envs[i][j].unwrapped
        seeds.append(played.np_random_seed)
        obs, _ = env.reset(seed=seeds[-1])
        total, length, done = 0.0, 0, False
        while not done:
            action = wild_policy(np.asarray(obs, np.float32)[None, None], length)[0, 0]
            obs, reward, terminated, truncated, _ = env.step(action)
            total, length, done = total + reward, length + 1, terminated or truncated
        assert episodes.returns[i, j] == pytest.approx(total, rel=1e-6)
        steps = round(played.data.time / played.dt)
        assert episodes.lengths[i, j] == steps == length, "a copy is left alone when its episode is over"
    assert len(np.unique(episodes.lengths)) > 2, "episodes of one length would show nothing"
    assert (episodes.paths, episodes.maze) == ([], None)
    evaluated(evaluate, wild_policy, update=2)
    assert len({*seeds, *(env.unwrapped.np_random_seed for row in evaluate.envs for env in row)}) == 16


def test_an_evaluation_is_a_function_of_seed_and_update_alone():
    """Not of other seeds, of evaluations before, or of the number of episodes."""
    together = Evaluator(HOPPER, [4, 5, 6], 3)
    first, other, again = (evaluated(together, wild_policy, update) for update in (10, 20, 10))
    np.testing.assert_array_equal(first.returns, again.returns)
    assert not np.isin(other.returns, first.returns).any()
    alone = evaluated(Evaluator(HOPPER, [5], 2), wild_policy, 10)
    np.testing.assert_array_equal(alone.returns[0], first.returns[1, :2])
    np.testing.assert_array_equal(alone.lengths[0], first.lengths[1, :2])


def test_a_filmed_evaluation_is_the_same_and_its_video_shows_every_step(tmp_path):
    """Of the first seed's first episode, decoded picture by picture."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="moviepy of requirements-dev.txt brings it")
    small = HOPPER._replace(kwargs={"width": 64, "height": 64})
    try:
        environments.check_camera(small)
    except SystemExit as error:
        pytest.skip(error.code)
    plain, filmed = Evaluator(small, [0, 1], 2), Evaluator(small, [0, 1], 2, tmp_path / "videos")
    for update in (10, 20):
        expected, episodes = (evaluated(evaluate, wild_policy, update) for evaluate in (plain, filmed))
        np.testing.assert_array_equal(episodes.returns, expected.returns)
        np.testing.assert_array_equal(episodes.lengths, expected.lengths)
        decode = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / "videos" / f"update-{update}.mp4")]
        decode += ["-f", "rawvideo", "-pix_fmt", "gray", "-"]
        pictures = np.frombuffer(subprocess.run(decode, capture_output=True, check=True).stdout, np.uint8)
        pictures = pictures.reshape(episodes.lengths[0, 0] + 1, 64 * 64)
        assert pictures.std(axis=1).min() > 10, "none is of one colour"
        assert len(np.unique(pictures, axis=0)) > len(pictures) / 2, "they move"


# ----------------------------------------------------------------------------------------------------- protocols


def test_a_pen_episode_ends_with_its_drop_and_random_ones_return_about_64():
    """D4RL's reference of a random policy (96) fits this protocol only: without the end at a drop such episodes return
    about -150 in 100 steps and -650 in 200. One episode's return deviates by some 180, the mean of 40 by 29."""
    pen, rng, heights, terminated = ENVIRONMENTS["AdroitHandPen"], np.random.default_rng(0), [], False
    env = make_env(pen)
    env.reset(seed=0)
    while not terminated:
        obs, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 24).astype(np.float32))
        heights.append(obs[26])
        assert not truncated
    assert min(heights[:-1]) >= 0.075 > heights[-1]
    evaluate = Evaluator(pen, [0], 10)
    returns = [evaluated(evaluate, lambda obs, step: rng.uniform(-1, 1, (1, 10, 24)), i).returns for i in range(4)]
    assert np.mean(returns) == pytest.approx(64, abs=90)


def test_the_door_is_paid_as_in_d4rl():
    """gymnasium-robotics pays 0.1 |palm - handle| for being far from the handle."""
    env, rng = make_env(ENVIRONMENTS["AdroitHandDoor"]), np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(20):
        obs, reward, *_ = env.step(rng.uniform(-1, 1, 28).astype(np.float32))
        door, far = env.unwrapped.data.qpos[env.unwrapped.door_hinge_addrs].item(), obs[29:32] - obs[32:35]
        expected = -0.1 * np.linalg.norm(far) - 0.1 * (door - 1.57) ** 2 - 1e-5 * np.sum(env.unwrapped.data.qvel**2)
        assert door < 0.2, "nothing is paid for opening yet"
        assert reward == pytest.approx(expected, rel=1e-6)


# --------------------------------------------------------------------------------------------------------- mazes


@pytest.mark.parametrize(
    ("name", "start", "goal"),
    # Centres of the cells (row, column), in cells from the middle of the maze, times the size of a cell.
    [
        ("PointMaze_UMaze", (-1, -1), (-1, 1)),
        ("PointMaze_Medium", (-2.5, 2.5), (2.5, -2.5)),
        ("PointMaze_Large", (-4.5, 3), (3.5, -3)),
        ("AntMaze_UMaze", (-4, -4), (-4, 4)),
        ("AntMaze_Medium", (-10, 10), (10, -10)),
        ("AntMaze_Large", (-18, 12), (14, -12)),
    ],
)
def test_mazes_start_near_their_cell_and_end_at_their_goal(name, start, goal):
    """A point's goal is the exact centre, unseen; an ant sees its goal, up to a quarter of a cell (4) beside it."""
    environment, positions = ENVIRONMENTS[name], []
    np.testing.assert_allclose([cell_centre(environment.gym_id, cell) for cell in environment.cells], [start, goal])
    env = make_env(environment)
    for seed in range(4):
        obs, _ = env.reset(seed=seed)
        positions.append(obs[:2])
        if name.startswith("Point"):
            np.testing.assert_allclose(env.unwrapped.goal, goal)
            assert obs.shape == (4,)
        else:
            assert obs.shape == (31,)
            assert np.abs(obs[29:] - goal).max() <= 1.0
    assert np.abs(np.array(positions) - start).max() <= (0.251 if name.startswith("Point") else 1.1)
    assert np.std(positions, axis=0).min() > 0.01, "the start keeps its noise"


def test_reaching_the_goal_pays_once_and_ends_the_episode():
    environment = ENVIRONMENTS["PointMaze_UMaze"]

    def act(obs, step):
        """Right along the lower corridor, up, and left along the upper one."""
        x, y = obs[..., 0], obs[..., 1]
        towards = np.where(y > 0.8, -1, 1), np.where((x > 0.8) | (y > 0.8), 1, -1)
        return np.clip(10 * (np.stack(towards, axis=-1) - obs[..., :2]) - obs[..., 2:], -1, 1)

    episodes = evaluated(Evaluator(environment, [0, 1], 3), act, 1)
    np.testing.assert_array_equal(episodes.returns, np.ones((2, 3)))
    assert (episodes.lengths < 300).all()
    assert episodes.maze.maze_map == make_gym_env(environment.gym_id).unwrapped.maze.maze_map
    for path, length in zip(episodes.paths, episodes.lengths[0], strict=True):
        assert path.shape == (length + 1, 2), "of the first seed, with the last position"
        distance = np.hypot(*(path - (-1, 1)).T)
        assert distance[:-1].min() > 0.45 >= distance[-1], "the goal is the centre of its cell"
    ant = make_env(ENVIRONMENTS["AntMaze_UMaze"])
    obs, _ = ant.reset(seed=0)
    data = ant.unwrapped.ant_env.data
    ant.unwrapped.ant_env.set_state(np.append(obs[29:], data.qpos[2:]), data.qvel.copy())
    _, reward, terminated, _, _ = ant.step(np.zeros(8, np.float32))
    assert (reward, terminated) == (1, True)


def test_episodes_for_which_models_leave_no_room_take_turns_and_stay_the_same(monkeypatch):
    environment, keys = ENVIRONMENTS["PointMaze_UMaze"], jax.random.split(jax.random.key(0), (2, 6))
    act = lambda obs, keys, step: np.sin(9 * obs[..., :2] + jax.random.key_data(keys) % 7 + step)
    together = Evaluator(environment, [0, 1], 6)
    whole = together(act, keys, 1)
    model = together.envs[0][0].unwrapped.model.nbuffer
    for room, copies in ((2 * 5 * model, 3), (1, 1)):
        monkeypatch.setattr(environments, "MODEL_BYTES", room)
        in_turns = Evaluator(environment, [0, 1], 6)
        parts = in_turns(act, keys, 1)
        assert np.shape(in_turns.envs) == (2, copies)
        np.testing.assert_array_equal(parts.lengths, whole.lengths)
        np.testing.assert_array_equal(parts.returns, whole.returns)
        for path, expected in zip(parts.paths, whole.paths, strict=True):
            np.testing.assert_array_equal(path, expected)


def test_making_and_playing_prints_nothing_and_leaves_no_temporary_file(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("Hopper", "AntMaze_UMaze", "AdroitHandPen", "PointMaze_UMaze", "FrankaKitchen"):
        env = make_env(ENVIRONMENTS[name])
        env.reset(seed=0)
        env.step(env.action_space.sample())
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
