"""Evaluation by D4RL's protocol: seeded copies of an environment, one episode each, raw returns."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import gymnasium
import numpy as np
from jaxtyping import Array, Float

from common.data import DatasetInfo
from common.environments import make_env
from common.tasks import Environment


class Episodes(NamedTuple):
    """One evaluation."""

    returns: Float[np.ndarray, "seeds episodes"]
    lengths: np.ndarray  # (seeds, episodes)
    observations: list[np.ndarray]  # those of the first seed, one (length + 1, obs_dim) an episode


class Evaluator:
    """Copies of an environment for a batch of seeds, kept for the whole run.

    Every copy plays one episode and is then left alone, so there is no automatic reset to get wrong. A copy's start
    depends on (seed, update, episode) only: seeds trained together see what each would see alone.
    """

    def __init__(self, environment: Environment, seeds: list[int], num_episodes: int, info: DatasetInfo):
        self.environment, self.seeds, self.num_episodes, self.info = environment, seeds, num_episodes, info

    @cached_property
    def envs(self) -> list[list[gymnasium.Env]]:
        """By seed and episode; made at the first evaluation, so that training starts without them."""
        return [[make_env(self.environment) for _ in range(self.num_episodes)] for _ in self.seeds]

    def __call__(self, act: Callable[..., Array], update: int) -> Episodes:
        """`act(obs, t)` maps (seeds, episodes, obs_dim) at environment step t to actions in [-1, 1]."""
        shape = (len(self.seeds), self.num_episodes)
        starts = [
            [
                env.reset(seed=int(np.random.SeedSequence([seed, update, episode]).generate_state(1)[0]))[0]
                for episode, env in enumerate(row)
            ]
            for seed, row in zip(self.seeds, self.envs)
        ]
        obs = np.array(starts, np.float32)
        returns, lengths = np.zeros(shape), np.zeros(shape, int)
        paths = [[] for _ in range(self.num_episodes)]
        running = list(np.ndindex(shape))
        t = 0
        while running:
            action = np.asarray(act((obs - self.info.obs_mean) / self.info.obs_std, t))
            still_running = []
            for i, j in running:
                if i == 0:
                    paths[j].append(obs[i, j].copy())
                obs[i, j], reward, terminated, truncated, _ = self.envs[i][j].step(action[i, j])
                returns[i, j] += reward
                lengths[i, j] += 1
                if not (terminated or truncated):
                    still_running.append((i, j))
            running = still_running
            t += 1
        return Episodes(returns, lengths, [np.array([*path, last]) for path, last in zip(paths, obs[0])])
