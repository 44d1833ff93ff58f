"""What data alone can tell of a policy, for runs without an evaluation: on episodes that were held back from training.

q_policy, q_data                    mean of min_i Q_i(s, a), for the policy's actions and for those of the data
action_distance, nearest_distance   mean Euclidean distance of the policy's action from that of the data; and of the
                                    nearest of NUM_SAMPLES of its actions, so that several modes are no error
bounds_policy, bounds_data          share of the actions' dimensions that are at a bound
value_bias, value_correlation       of V(s) and the discounted return that followed: mean difference, correlation.
                                    Where the data end by time, V of the last observation stands for the rest

None of these replaces an evaluation: docs/your-logs.md. An algorithm has those of the networks that it trains.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from common.harness.records import ACTION_LIMIT, DIAGNOSTICS, Dataset
from common.networks import twin_q

NUM_STATES = 1000  # at most, evenly chosen
NUM_SAMPLES = 10  # actions of the policy in each


class HeldBack(NamedTuple):
    """Some states of the held-back episodes, what was done there, and what followed."""

    obs: Float[np.ndarray, "states obs_dim"]  # standardised if the run standardises
    action: Float[np.ndarray, "states act_dim"]
    paid: Float[np.ndarray, " states"]  # discounted rewards until the end of the episode
    discount: Float[np.ndarray, " states"]  # gamma^(steps until then), 0 where the task truly ended
    last_obs: Float[np.ndarray, "states obs_dim"]


def held_back_states(dataset: Dataset, ends: np.ndarray, gamma: float) -> HeldBack:
    """`ends` has the index after each episode's last transition."""
    index = np.unique(np.linspace(0, len(dataset.reward) - 1, NUM_STATES).astype(int))
    end = ends[np.searchsorted(ends, index, side="right")]
    paid = np.array([gamma ** np.arange(b - a) @ dataset.reward[a:b] for a, b in zip(index, end)])
    discount = gamma ** (end - index) * (1 - dataset.terminal[end - 1])
    return HeldBack(dataset.obs[index], dataset.action[index], paid, discount, dataset.next_obs[end - 1])


_mean_q = jax.jit(jax.vmap(lambda critics, obs, action: twin_q(critics, obs, action).min(axis=0).mean()))
_values = jax.jit(jax.vmap(lambda value, obs: jax.vmap(value)(obs), (0, None)))


def columns(state) -> list[str]:
    """The diagnostics that a training state has."""
    return [name for field, names in DIAGNOSTICS.items() if hasattr(state, field) for name in names]


def diagnose(
    state: Any, act: Callable[[Array, Array], Array], held: HeldBack, keys: Key[Array, "seeds samples states"]
) -> dict[str, Float[np.ndarray, " seeds"]]:
    """The diagnostics of the policies of all seeds: `act(obs, keys)` maps (seeds, states, obs_dim) to their actions."""
    obs = np.broadcast_to(held.obs, (len(keys), *held.obs.shape))
    samples = np.stack([act(obs, keys[:, i]) for i in range(keys.shape[1])])  # (samples, seeds, states, act_dim)
    distance = np.linalg.norm(samples - held.action, axis=-1)
    at_bound = lambda action: np.abs(action) >= np.float32(ACTION_LIMIT)
    found = {
        "action_distance": distance.mean(axis=(0, 2)),
        "nearest_distance": distance.min(axis=0).mean(axis=1),
        "bounds_policy": at_bound(samples).mean(axis=(0, 2, 3)),
        "bounds_data": np.full(len(keys), at_bound(held.action).mean()),
    }
    if hasattr(state, "critics"):
        found["q_policy"] = np.mean([_mean_q(state.critics, obs, action) for action in samples], axis=0)
        found["q_data"] = np.asarray(_mean_q(state.critics, obs, np.broadcast_to(held.action, samples[0].shape)))
    if hasattr(state, "value"):
        v, last_v = (np.asarray(_values(state.value, of), np.float64) for of in (held.obs, held.last_obs))
        returns = held.paid + held.discount * last_v
        found["value_bias"] = (v - returns).mean(axis=1)
        v, returns = ((of - of.mean(axis=1, keepdims=True)) for of in (v, returns))
        scale = np.linalg.norm(v, axis=1) * np.linalg.norm(returns, axis=1)
        found["value_correlation"] = (v * returns).sum(axis=1) / np.maximum(scale, 1e-12)  # 0 where one is constant
    return {name: found[name] for name in columns(state)}
