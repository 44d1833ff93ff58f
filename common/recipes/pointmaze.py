"""The embedded default: a maze dataset made on the spot by a scripted controller.

As in D4RL's maze2d, the behaviour walks between random goals while the learner is asked for one of them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import cache

import gymnasium
import numpy as np
from minari.data_collector import EpisodeBuffer

from common.harness.environments import make_gym_env
from common.harness.tasks import ENVIRONMENTS
from common.recipes.recording import episode

GIVE_UP = 0.01  # chance a step of walking to another goal instead: every corridor is walked both ways from everywhere
EPISODE_STEPS = 500  # the endless walk is cut into episodes of this length

Cell = tuple[int, int]  # row and column


def next_cells(maze_map: Sequence[Sequence], goal: Cell) -> dict[Cell, Cell]:
    """From every free cell, the neighbour that is next on a shortest path to `goal` (breadth-first search)."""
    towards, queue = {goal: goal}, deque([goal])
    while queue:
        row, column = queue.popleft()
        for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if maze_map[cell[0]][cell[1]] != 1 and cell not in towards:
                towards[cell] = (row, column)
                queue.append(cell)
    return towards


def waypoint(maze, routes: Callable[[Cell], dict[Cell, Cell]], obs: dict[str, np.ndarray]) -> np.ndarray:
    """(x, y) to go to next: the centre of the next cell, or the goal in its own. `routes(goal)` are `next_cells`."""
    goal, cell = (tuple(maze.cell_xy_to_rowcol(obs[key]).tolist()) for key in ("desired_goal", "achieved_goal"))
    return obs["desired_goal"] if cell == goal else maze.cell_rowcol_to_xy(np.array(routes(goal)[cell]))


def walk(name: str, num_steps: int, seed: int) -> tuple[gymnasium.Env, list[EpisodeBuffer]]:
    """A noisy point mass walks towards a goal until it arrives or gives up, then to the next, without an end."""
    gym_id = ENVIRONMENTS[f"PointMaze_{name}"].gym_id
    env = make_gym_env(gym_id, continuing_task=True, reset_target=True, max_episode_steps=num_steps + 1)
    world, rng = env.unwrapped, np.random.default_rng(seed)
    routes = cache(lambda goal: next_cells(world.maze.maze_map, goal))
    obs, _ = env.reset(seed=seed)
    episodes = []
    for start in range(0, num_steps, EPISODE_STEPS):
        observations, actions, rewards = [obs], [], []
        for _ in range(min(EPISODE_STEPS, num_steps - start)):
            position, velocity = np.split(obs["observation"], 2)
            towards = waypoint(world.maze, routes, obs) - position
            action = 10 * towards - velocity + 0.5 * rng.standard_normal(2)
            action = np.clip(action, -1, 1).astype(np.float32)
            obs, reward, _, _, _ = env.step(action)
            if rng.random() < GIVE_UP:
                world.goal = world.add_xy_position_noise(world.generate_target_goal())
                world.update_target_site_pos()
            obs["desired_goal"] = world.goal.copy()  # after an arrival the environment shows the old one once more
            for column, value in ((observations, obs), (actions, action), (rewards, reward)):
                column.append(value)
        episodes.append(episode(observations, actions, rewards))
    return env, episodes
