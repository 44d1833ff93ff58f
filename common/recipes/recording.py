"""What the recipes share: behaviour policies, and episodes that Minari keeps."""

from collections.abc import Callable
from pathlib import Path

import gymnasium
import jax
import numpy as np
from minari.data_collector import EpisodeBuffer

POLICIES = Path(__file__).with_name("policies")
# Actions are rounded to multiples of 2^-12. Processors round a product of matrices differently in its last bit, which
# a chaotic simulation would make another episode of; on the grid it hardly ever shows. No policy is that exact.
GRID = 2.0**12


def load_policy(name: str) -> dict[str, np.ndarray]:
    """The arrays of policies/<name>.npz, kept in float16, as float64."""
    with np.load(POLICIES / f"{name}.npz") as file:
        return {key: array.astype(np.float64) for key, array in file.items()}


def network(arrays: dict[str, np.ndarray], activation: Callable = lambda x: np.maximum(x, 0)) -> Callable:
    """The function of a fully connected network with the arrays weight_0 (in, out), bias_0, weight_1 and so on."""
    num = sum(key.startswith("weight_") for key in arrays)
    *hidden, (last, offset) = [(arrays[f"weight_{i}"], arrays[f"bias_{i}"]) for i in range(num)]

    def forward(x: np.ndarray) -> np.ndarray:
        for weight, bias in hidden:
            x = activation(x @ weight + bias)
        return x @ last + offset

    return forward


def record(env: gymnasium.Env, begin: Callable, num_steps: int, seed: int, leave: float = 0.0) -> list[EpisodeBuffer]:
    """Whole episodes: `num_steps`, and what the last one needs to end.

    `begin(rng, progress)` returns an episode's options of reset (or None) and its policy, a function of an observation,
    at a `progress` from 0 to 1.
    `leave` is the chance of ending an episode after a step that pays.
    """
    rng, episodes, total = np.random.default_rng(seed), [], 0
    while total < num_steps:
        options, act = begin(rng, total / num_steps)
        obs, _ = env.reset(seed=int(rng.integers(2**31)), options=options)
        observations, actions, rewards, is_over = [obs], [], [], False
        while not is_over:
            action = np.clip(np.round(act(obs) * GRID) / GRID, -1, 1).astype(np.float32)
            obs, reward, terminated, truncated, _ = env.step(action)
            is_over = terminated or truncated or (reward > 0 and rng.random() < leave)
            for column, value in ((observations, obs), (actions, action), (rewards, reward)):
                column.append(value)
        episodes.append(episode(observations, actions, rewards, terminated))
        total += len(rewards)
    return episodes


def episode(observations: list, actions: list, rewards: list, terminated: bool = False) -> EpisodeBuffer:
    """Of L actions and rewards and L + 1 observations; its last step terminates it, or cuts it off."""
    is_last = np.arange(len(rewards)) == len(rewards) - 1
    ends = {"terminations": is_last & terminated, "truncations": is_last & (not terminated)}
    observations = jax.tree.map(lambda *parts: np.stack(parts), *observations)  # arrays, or dicts of them
    return EpisodeBuffer(observations=observations, actions=np.array(actions), rewards=np.array(rewards), **ends)
