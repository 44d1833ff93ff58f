"""A pen turned by the hand of DAPG (Rajeswaran et al. 2018), with more or less of its exploration noise."""

from collections.abc import Sequence

import gymnasium
import numpy as np
from minari.data_collector import EpisodeBuffer

from common.harness.environments import make_gym_env
from common.recipes.recording import load_policy, network, record


def turn(noise_scales: Sequence[int], num_steps: int, seed: int) -> tuple[gymnasium.Env, list[EpisodeBuffer]]:
    """Each episode has one of the `noise_scales`, and 200 steps: a pen that drops does not end it."""
    env, arrays = make_gym_env("AdroitHandPen-v1"), load_policy("pen")
    mean, std = network(arrays, np.tanh), arrays["noise_std"]

    def begin(rng: np.random.Generator, progress: float):
        scale = rng.choice(noise_scales)
        return None, lambda obs: mean(obs) + scale * std * rng.standard_normal(std.shape)

    return env, record(env, begin, num_steps, seed)
