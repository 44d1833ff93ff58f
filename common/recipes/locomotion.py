"""Hopper and HalfCheetah walked by snapshots of a SAC run, as D4RL's medium and medium-replay."""

import gymnasium
import numpy as np
from minari.data_collector import EpisodeBuffer

from common.harness.environments import make_gym_env
from common.recipes.recording import load_policy, network, record, relu

LOG_STD = -20, 2  # SAC's bounds


def walk(robot: str, snapshots: slice, num_steps: int, seed: int) -> tuple[gymnasium.Env, list[EpisodeBuffer]]:
    """Equal numbers of steps from each of the `snapshots`, in the order of training, with SAC's own noise."""
    env, arrays = make_gym_env(f"{robot}-v5"), load_policy(robot.lower())
    num = range(len(arrays["bias_0"]))[snapshots]
    actors = [network({key: array[i] for key, array in arrays.items()}, relu) for i in num]

    def begin(rng: np.random.Generator, progress: float):
        actor = actors[int(progress * len(actors))]

        def act(obs: np.ndarray) -> np.ndarray:
            mean, log_std = np.split(actor(obs), 2)
            return np.tanh(mean + np.exp(np.clip(log_std, *LOG_STD)) * rng.standard_normal(mean.shape))

        return None, act

    return env, record(env, begin, num_steps, seed)
