"""Recorded transitions, and what the evaluation task makes of them: rewards, terminals, the behaviour's returns."""

from typing import NamedTuple

import numpy as np

from common import pointmaze
from common.tasks import Environment, RewardRule


class Transitions(NamedTuple):
    """As they were recorded, in host memory, episode after episode."""

    obs: np.ndarray  # (size, obs_dim)
    action: np.ndarray  # (size, act_dim)
    reward: np.ndarray  # (size,)
    next_obs: np.ndarray  # (size, obs_dim)
    terminal: np.ndarray  # (size,)
    episode_end: np.ndarray  # index after each episode's last transition

    @property
    def episode_start(self) -> np.ndarray:
        return np.append(0, self.episode_end[:-1])


def concatenate(parts: list[Transitions]) -> Transitions:
    """Several recordings as one."""
    if len(parts) == 1:
        return parts[0]
    offsets = np.cumsum([0, *(len(part.reward) for part in parts[:-1])])
    ends = np.concatenate([part.episode_end + offset for part, offset in zip(parts, offsets)])
    arrays = (np.concatenate(arrays) for arrays in zip(*(part[:-1] for part in parts)))
    return Transitions(*arrays, episode_end=ends)


def relabel(transitions: Transitions, environment: Environment) -> Transitions:
    """Rewards and terminals as the evaluation task has them."""
    if environment.fixed_goal:
        goal = pointmaze.cell_centre(environment.gym_id, environment.cells[1])
        distance = np.linalg.norm(transitions.next_obs[:, :2] - goal, axis=1)
        transitions = transitions._replace(reward=np.float32(distance <= pointmaze.GOAL_RADIUS))
    if environment.sparse:  # Minari's mazes pay 1 a step at the goal and never terminate
        transitions = transitions._replace(terminal=np.float32(transitions.reward > 0))
    return transitions


def behaviour_returns(transitions: Transitions, environment: Environment) -> np.ndarray:
    """Each episode's return under the evaluation protocol: its horizon, its end by a drop, what it counts."""
    returns = []
    for start, end in zip(transitions.episode_start, transitions.episode_end):
        if environment.max_steps is not None:
            end = min(end, start + environment.max_steps)
        if environment.drop_below is not None:
            coordinate, threshold = environment.drop_below
            dropped = transitions.next_obs[start:end, coordinate] < threshold
            if dropped.any():
                end = start + np.argmax(dropped) + 1
        reward = transitions.reward[start:end]
        returns.append(reward.max() if environment.return_is_max else reward.sum(dtype=np.float64))
    return np.array(returns)


def recorded_returns(transitions: Transitions) -> np.ndarray:
    """Each episode's sum of rewards, to its recorded end."""
    return np.add.reduceat(transitions.reward, transitions.episode_start, dtype=np.float64)


def best_episodes(transitions: Transitions, returns: np.ndarray, fraction: float) -> Transitions:
    """The given fraction of the episodes, at least one: those with the largest returns, of equal ones the first."""
    count = max(1, round(fraction * len(returns)))
    is_best = np.zeros(len(returns), bool)
    is_best[np.argsort(-returns, kind="stable")[:count]] = True
    lengths = transitions.episode_end - transitions.episode_start
    kept = np.repeat(is_best, lengths)
    return Transitions(*(array[kept] for array in transitions[:-1]), episode_end=np.cumsum(lengths[is_best]))


def shape_reward(reward: np.ndarray, returns: np.ndarray, rule: RewardRule) -> np.ndarray:
    """The reward that is learned from; `returns` are those of the episodes.

    "none": r. "normalize": to [-1, 1] by its minimum and maximum. "cql_antmaze": 4 (r - 0.5). "iql_antmaze": r - 1.
    "iql_locomotion": 1000 r / (max return - min return).
    """
    low, high = reward.min(), reward.max()
    if low == high:
        print(f"Warning: every reward of this dataset is {low:g}; there is nothing to tell good actions from bad.")
    if rule == "normalize":
        return 2 * (reward - low) / (high - low) - 1 if high > low else np.zeros_like(reward)
    if rule == "cql_antmaze":
        return 4 * (reward - 0.5)
    if rule == "iql_antmaze":
        return reward - 1
    if rule == "iql_locomotion" and returns.max() > returns.min():
        return reward * np.float32(1000 / (returns.max() - returns.min()))
    return reward
