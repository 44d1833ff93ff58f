"""Small real Minari datasets for tests, recorded with random actions."""

import gymnasium
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer


def record(env: gymnasium.Env, dataset_id: str, num_episodes: int, data_format="hdf5", seed=0, prepare=None):
    """Writes a dataset of an environment that acts at random; `prepare(env, episode)` may alter it after a reset."""
    if data_format == "arrow":
        pytest.importorskip("pyarrow", reason="Minari reads Arrow datasets with pyarrow")
    rng = np.random.default_rng(seed)
    episodes = []
    for episode in range(num_episodes):
        observations = [env.reset(seed=seed + episode)[0]]
        if prepare is not None:
            prepare(env, episode)
        actions, rewards, terminations, truncations = [], [], [], []
        while not (terminations and (terminations[-1] or truncations[-1])):
            action = rng.uniform(env.action_space.low, env.action_space.high).astype(env.action_space.dtype)
            obs, reward, terminated, truncated, _ = env.step(action)
            observations.append(obs)
            for column, value in zip(
                (actions, rewards, terminations, truncations), (action, reward, terminated, truncated)
            ):
                column.append(value)
        if isinstance(observations[0], dict):
            observations = {key: np.array([obs[key] for obs in observations]) for key in observations[0]}
        episodes.append(
            EpisodeBuffer(
                observations=observations if isinstance(observations, dict) else np.array(observations),
                actions=np.array(actions),
                rewards=np.array(rewards, np.float64),
                terminations=np.array(terminations, bool),
                truncations=np.array(truncations, bool),
            )
        )
    return minari.create_dataset_from_buffers(dataset_id, episodes, env=env, data_format=data_format)


def record_hopper(dataset_id="test/hopper/random-v0", num_episodes=12, data_format="hdf5", seed=0):
    # A random hopper falls after some 10 to 50 steps: with a limit of 25, episodes end in both ways.
    return record(gymnasium.make("Hopper-v5", max_episode_steps=25), dataset_id, num_episodes, data_format, seed)
