"""The embedded default: a maze dataset made on the spot by a scripted controller, and the picture of its paths.

As in D4RL's maze2d, the behaviour walks between random goals while the learner is asked for one of them.
"""

import warnings
from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

from common.environments import make_gym_env

DATASETS = {f"edp/pointmaze/{name.lower()}-v0": f"PointMaze_{name}-v3" for name in ("UMaze", "Medium", "Large")}
GOAL_RADIUS = 0.45  # of gymnasium-robotics' mazes
NUM_STEPS = 100_000
GIVE_UP = 0.01  # chance a step of walking to another goal instead: every corridor is walked both ways from everywhere
EPISODE_STEPS = 500  # the endless walk is cut into episodes of this length


@cache
def maze_of(gym_id: str):
    """gymnasium-robotics' `Maze` of an environment: its map of walls (1) and its cells' coordinates."""
    env = make_gym_env(gym_id)
    env.close()
    return env.unwrapped.maze


def cell_centre(gym_id: str, cell: tuple[int, int]) -> np.ndarray:
    """(x, y) of the centre of a cell (row, column)."""
    return maze_of(gym_id).cell_rowcol_to_xy(np.array(cell))


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
    """Writes one of `DATASETS`: a noisy point mass that walks towards a goal until it arrives or gives up, and then to
    the next."""
    env = make_gym_env(DATASETS[dataset_id], continuing_task=True, reset_target=True, max_episode_steps=num_steps + 1)
    maze, rng = env.unwrapped.maze, np.random.default_rng(seed)
    routes = {}  # by goal cell
    obs, _ = env.reset(seed=seed)
    episodes = []
    while num_steps > 0:
        length = min(EPISODE_STEPS, num_steps)
        num_steps -= length
        steps, observations = [], [obs]
        for step in range(length):
            goal = tuple(int(i) for i in maze.cell_xy_to_rowcol(obs["desired_goal"]))
            cell = tuple(int(i) for i in maze.cell_xy_to_rowcol(obs["achieved_goal"]))
            if goal not in routes:
                routes[goal] = next_cells(maze.maze_map, goal)
            waypoint = obs["desired_goal"] if cell == goal else maze.cell_rowcol_to_xy(np.array(routes[goal][cell]))
            position, velocity = np.split(obs["observation"], 2)
            action = 10 * (waypoint - position) - velocity + 0.5 * rng.standard_normal(2)
            action = np.clip(action, -1, 1).astype(np.float32)
            obs, reward, _, _, _ = env.step(action)
            if rng.random() < GIVE_UP:
                env.unwrapped.goal = env.unwrapped.add_xy_position_noise(env.unwrapped.generate_target_goal())
                env.unwrapped.update_target_site_pos()
            obs["desired_goal"] = (
                env.unwrapped.goal.copy()
            )  # after an arrival the environment shows the old one once more
            observations.append(obs)
            steps.append((action, reward, False, step == length - 1))
        actions, rewards, terminations, truncations = (np.array(column) for column in zip(*steps))
        observations = {key: np.array([o[key] for o in observations]) for key in obs}
        episodes.append(
            EpisodeBuffer(
                observations=observations,
                actions=actions,
                rewards=rewards,
                terminations=terminations,
                truncations=truncations,
            )
        )
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


def draw_paths(gym_id: str, cells, behaviour: Sequence[np.ndarray], policy: Sequence[np.ndarray], file: Path) -> None:
    """Saves a picture of the maze with paths, each (steps, 2), of the behaviour and of the policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    maze = maze_of(gym_id)
    half = maze.maze_size_scaling / 2
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
    for ax, paths, title in zip(axes, (behaviour, policy), ("dataset", "learned policy")):
        for row, line in enumerate(maze.maze_map):
            for column, kind in enumerate(line):
                if kind == 1:
                    x, y = maze.cell_rowcol_to_xy(np.array([row, column]))
                    ax.add_patch(plt.Rectangle((x - half, y - half), 2 * half, 2 * half, color="0.3"))
        for path in paths:
            ax.plot(*path.T, color="tab:blue" if paths is policy else "tab:gray", alpha=0.4, linewidth=0.8)
        start, goal = (maze.cell_rowcol_to_xy(np.array(cell)) for cell in cells)
        ax.plot(*start, "o", color="tab:orange", markersize=9, label="start")
        ax.plot(*goal, "*", color="tab:red", markersize=15, label="goal")
        ax.add_patch(plt.Circle(goal, GOAL_RADIUS, color="tab:red", fill=False, linestyle=":"))
        ax.set(title=f"{title}, {len(paths)} paths", aspect="equal", xticks=[], yticks=[])
        ax.set_xlim(-half * len(maze.maze_map[0]), half * len(maze.maze_map[0]))
        ax.set_ylim(-half * len(maze.maze_map), half * len(maze.maze_map))
    axes[1].legend(loc="upper right")
    figure.savefig(file, dpi=150)
    plt.close(figure)
