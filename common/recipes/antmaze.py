"""An ant that walks from cell to cell of a maze along shortest paths, as in D4RL's "play" datasets."""

from functools import cache

import gymnasium
import numpy as np
from minari.data_collector import EpisodeBuffer

from common.harness.environments import make_gym_env
from common.harness.tasks import ENVIRONMENTS
from common.recipes.pointmaze import next_cells, waypoint
from common.recipes.recording import load_policy, network, record, relu

NOISE = 0.2  # standard deviation, of every action
LEAVE = 0.2  # chance a step of ending the episode at the goal: some five steps of standing there


def walk(name: str, num_steps: int, seed: int) -> tuple[gymnasium.Env, list[EpisodeBuffer]]:
    """The ant obeys a direction, which is that to the next cell on its way between two random ones."""
    environment = ENVIRONMENTS[f"AntMaze_{name}"]
    kwargs = environment.kwargs | {"continuing_task": True}
    env = make_gym_env(environment.gym_id, **kwargs, max_episode_steps=environment.max_steps)
    maze, ant = env.unwrapped.maze, network(load_policy("ant"), relu)
    free = np.array([(r, c) for r, row in enumerate(maze.maze_map) for c, kind in enumerate(row) if kind != 1])
    routes = cache(lambda goal: next_cells(maze.maze_map, goal))

    def begin(rng: np.random.Generator, progress: float):
        start, goal = free[rng.choice(len(free), 2, replace=False)]

        def act(obs: dict[str, np.ndarray]) -> np.ndarray:
            direction = waypoint(maze, routes, obs) - obs["achieved_goal"]
            direction /= np.linalg.norm(direction) + 1e-6
            mean = np.tanh(ant(np.append(obs["observation"], direction)))
            return mean + NOISE * rng.standard_normal(mean.shape)

        return {"reset_cell": start, "goal_cell": goal}, act

    return env, record(env, begin, num_steps, seed, LEAVE)
