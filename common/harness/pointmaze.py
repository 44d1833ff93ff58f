"""The embedded default: a maze dataset made on the spot by a scripted controller.

As in D4RL's maze2d, the behaviour walks between random goals while the learner is asked for one of them.
"""

import warnings
from collections import deque
from collections.abc import Sequence

import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

from common.harness.environments import make_gym_env

DATASETS = {f"edp/pointmaze/{name.lower()}-v0": f"PointMaze_{name}-v3" for name in ("UMaze", "Medium", "Large")}
NUM_STEPS = 100_000
MEGABYTES = 20.0  # of a dataset
GIVE_UP = 0.01  # chance a step of walking to another goal instead: every corridor is walked both ways from everywhere
EPISODE_STEPS = 500  # the endless walk is cut into episodes of this length


def next_cells(maze_map: Sequence[Sequence], goal: tuple[int, int]) -> dict[tuple[int, int], tuple[int, int]]:
    """From every free cell, the neighbour that is next on a shortest path to `goal` (breadth-first search)."""
    towards, queue = {goal: goal}, deque([goal])
    while queue:
        row, column = queue.popleft()
        for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if maze_map[cell[0]][cell[1]] != 1 and cell not in towards:
                towards[cell] = (row, column)
                queue.append(cell)
    return towards


def make_dataset(dataset_id: str, num_steps: int = NUM_STEPS, seed: int = 0) -> minari.MinariDataset:
    """Writes one of `DATASETS`: a noisy point mass walks towards a goal until it arrives or gives up, then to the next.

    `num_steps` is the length of the whole walk.
    """
    env = make_gym_env(DATASETS[dataset_id], continuing_task=True, reset_target=True, max_episode_steps=num_steps + 1)
    world, rng = env.unwrapped, np.random.default_rng(seed)
    maze = world.maze
    routes = {}  # by goal cell
    obs, _ = env.reset(seed=seed)
    episodes = []
    for start in range(0, num_steps, EPISODE_STEPS):
        length = min(EPISODE_STEPS, num_steps - start)
        observations, actions, rewards = [obs], [], []
        for _ in range(length):
            goal, cell = (tuple(maze.cell_xy_to_rowcol(obs[key]).tolist()) for key in ("desired_goal", "achieved_goal"))
            if goal not in routes:
                routes[goal] = next_cells(maze.maze_map, goal)
            waypoint = obs["desired_goal"] if cell == goal else maze.cell_rowcol_to_xy(np.array(routes[goal][cell]))
            position, velocity = np.split(obs["observation"], 2)
            action = 10 * (waypoint - position) - velocity + 0.5 * rng.standard_normal(2)
            action = np.clip(action, -1, 1).astype(np.float32)
            obs, reward, _, _, _ = env.step(action)
            if rng.random() < GIVE_UP:
                world.goal = world.add_xy_position_noise(world.generate_target_goal())
                world.update_target_site_pos()
            obs["desired_goal"] = world.goal.copy()  # after an arrival the environment shows the old one once more
            for column, value in ((observations, obs), (actions, action), (rewards, reward)):
                column.append(value)
        buffer = EpisodeBuffer(
            observations={key: np.array([o[key] for o in observations]) for key in obs},
            actions=np.array(actions),
            rewards=np.array(rewards),
            terminations=np.zeros(length, bool),
            truncations=np.arange(length) == length - 1,
        )
        episodes.append(buffer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the author and the licence, which a local dataset need not have
        dataset = minari.create_dataset_from_buffers(
            dataset_id,
            episodes,
            env=env,
            algorithm_name="scripted waypoint controller",
            description="A point mass walking along shortest paths between random goals, with action noise.",
        )
    env.close()
    return dataset
