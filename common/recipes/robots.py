"""Robots that act by the policies in policies/: hopper and halfcheetah, a hand that turns a pen, an ant in a maze."""

from collections.abc import Sequence
from functools import cache

import gymnasium
import numpy as np
from minari.data_collector import EpisodeBuffer

from common.harness.environments import make_gym_env
from common.harness.tasks import ENVIRONMENTS
from common.recipes.pointmaze import next_cells, waypoint
from common.recipes.recording import load_policy, network, record

LOG_STD = -20, 2  # SAC's bounds
NOISE = 0.2  # of the ant: standard deviation, of every action
LEAVE = 0.2  # its chance a step of ending the episode at the goal: some five steps of standing there


def walk(robot: str, snapshots: slice, num_steps: int, seed: int) -> tuple[gymnasium.Env, list[EpisodeBuffer]]:
    """About equally many steps of each snapshot of a SAC run, in the order of training, with SAC's own noise."""
    env, arrays = make_gym_env(f"{robot}-v5"), load_policy(robot.lower())
    num = range(len(arrays["bias_0"]))[snapshots]
    actors = [network({key: array[i] for key, array in arrays.items()}) for i in num]

    def begin(rng: np.random.Generator, progress: float):
        actor = actors[int(progress * len(actors))]

        def act(obs: np.ndarray) -> np.ndarray:
            mean, log_std = np.split(actor(obs), 2)
            return np.tanh(mean + np.exp(np.clip(log_std, *LOG_STD)) * rng.standard_normal(mean.shape))

        return None, act

    return env, record(env, begin, num_steps, seed)


def turn_pen(noise_scales: Sequence[int], num_steps: int, seed: int) -> tuple[gymnasium.Env, list[EpisodeBuffer]]:
    """The hand of DAPG (Rajeswaran et al. 2018); an episode has its noise times one of the `noise_scales`.

    Each has 200 steps: a pen that drops does not end it.
    """
    env, arrays = make_gym_env("AdroitHandPen-v1"), load_policy("pen")
    mean, std = network(arrays, np.tanh), arrays["noise_std"]

    def begin(rng: np.random.Generator, progress: float):
        scale = rng.choice(noise_scales)
        return None, lambda obs: mean(obs) + scale * std * rng.standard_normal(std.shape)

    return env, record(env, begin, num_steps, seed)


def cross_maze(name: str, num_steps: int, seed: int) -> tuple[gymnasium.Env, list[EpisodeBuffer]]:
    """An ant walks from cell to cell along the shortest path between two random ones, as in D4RL's "play" datasets."""
    environment = ENVIRONMENTS[f"AntMaze_{name}"]
    kwargs = environment.kwargs | {"continuing_task": True}
    env = make_gym_env(environment.gym_id, **kwargs, max_episode_steps=environment.max_steps)
    maze, ant = env.unwrapped.maze, network(load_policy("ant"))  # which obeys a direction
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
