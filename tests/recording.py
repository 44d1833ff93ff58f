"""Small real Minari datasets for tests, recorded with random actions."""

import json
from collections.abc import Sequence

import gymnasium
import jax
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer
from minari.storage.datasets_root_dir import get_dataset_path

from common.transitions import Transitions


def record(
    env: gymnasium.Env, dataset_id: str, episodes: int | Sequence[int], data_format="hdf5", seed=0, prepare=None
):
    """Writes a dataset of an environment that acts at random.

    `episodes` is their number, or the number of steps after which each is cut at the latest; `prepare(env, episode)`
    may alter the environment after a reset.
    """
    if data_format == "arrow":
        pytest.importorskip("pyarrow", reason="Minari reads Arrow datasets with pyarrow")
    rng = np.random.default_rng(seed)
    limits = [np.inf] * episodes if isinstance(episodes, int) else episodes
    recorded = []
    for episode, limit in enumerate(limits):
        observations = [env.reset(seed=seed + episode)[0]]
        if prepare is not None:
            prepare(env, episode)
        actions, rewards, terminations, truncations = [], [], [], []
        while not (terminations and (terminations[-1] or truncations[-1])):
            action = rng.uniform(env.action_space.low, env.action_space.high).astype(env.action_space.dtype)
            obs, reward, terminated, truncated, _ = env.step(action)
            truncated = truncated or len(observations) == limit
            observations.append(obs)
            for column, value in zip(
                (actions, rewards, terminations, truncations), (action, reward, terminated, truncated)
            ):
                column.append(value)
        recorded.append((observations, actions, rewards, terminations, truncations))
    return write_dataset(dataset_id, env, recorded, data_format)


def write_dataset(dataset_id: str, env: gymnasium.Env, episodes: list[tuple], data_format="hdf5"):
    """Writes episodes, each (observations, actions, rewards, terminations, truncations): lists, one entry a step."""
    stack = lambda steps: jax.tree.map(lambda *parts: np.stack(parts), *steps)
    buffers = [
        EpisodeBuffer(
            observations=stack(observations),
            actions=stack(actions),
            rewards=np.array(rewards, np.float64),
            terminations=np.array(terminations, bool),
            truncations=np.array(truncations, bool),
        )
        for observations, actions, rewards, terminations, truncations in episodes
    ]
    return minari.create_dataset_from_buffers(dataset_id, buffers, env=env, data_format=data_format)


def change_metadata(dataset_id: str, **changes) -> None:
    """Overwrites entries of a local dataset's metadata; None removes one."""
    file = get_dataset_path(dataset_id) / "data" / "metadata.json"
    metadata = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))


def record_hopper(dataset_id="test/hopper/random-v0", num_episodes=12, data_format="hdf5", seed=0):
    # A random hopper falls after some 10 to 50 steps: with a limit of 25, episodes end in both ways.
    return record(gymnasium.make("Hopper-v5", max_episode_steps=25), dataset_id, num_episodes, data_format, seed)


def goal_here(env, episode: int) -> None:
    """Every third episode of an ant starts, and in a few steps stays, at its goal."""
    if episode % 3 == 0:
        env.unwrapped.goal = env.unwrapped.ant_env.data.qpos[:2].copy()


def by_hand(dataset_id: str, *keys: str) -> dict[str, np.ndarray]:
    """The flat arrays, by Minari's own iteration."""
    columns = {name: [] for name in Transitions._fields}
    for episode in minari.load_dataset(dataset_id).iterate_episodes():
        obs = episode.observations
        obs = np.concatenate([obs[key] for key in keys], axis=1) if keys else obs
        columns["obs"].append(obs[:-1])
        columns["next_obs"].append(obs[1:])
        columns["action"].append(episode.actions)
        columns["reward"].append(episode.rewards)
        columns["terminal"].append(episode.terminations)
        columns["episode_end"].append([len(episode.rewards)])
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    return arrays | {"episode_end": np.cumsum(arrays["episode_end"])}
