"""What recorded transitions become under a task's protocol: rewards, terminals, ends and returns; plain functions."""

import numpy as np

from common.harness import tasks
from common.harness.environments import cell_centre
from common.harness.records import Dataset
from common.harness.tasks import Environment, RewardRule


def held_back_episodes(num: int) -> np.ndarray:
    """(num,) bools: a tenth of the episodes, at least one, drawn by chance, always the same. Exits if none is left."""
    if num < 2:
        raise SystemExit("One of the episodes is held back to see what was learned; these data have no other.")
    return np.random.default_rng(0).permutation(num) < max(1, num // 10)


def relabel(dataset: Dataset, ends: np.ndarray, environment: Environment) -> tuple[Dataset, np.ndarray]:
    """Rewards, terminals and ends as the evaluation task has them."""
    if environment.fixed_goal:
        goal = cell_centre(environment.gym_id, environment.cells[1])
        distance = np.linalg.norm(dataset.next_obs[:, :2] - goal, axis=1)
        dataset = dataset._replace(reward=np.float32(distance <= tasks.GOAL_RADIUS))
    if environment.sparse:  # Minari's mazes pay 1 a step at the goal and never terminate
        dataset = dataset._replace(terminal=np.float32(dataset.reward > 0))
    if environment.sparse and not environment.fixed_goal:  # an episode is over at its goal; D4RL's data end there
        starts, paid = np.append(0, ends[:-1]), dataset.reward > 0
        paid_before = np.cumsum(paid) - paid
        kept = paid_before == np.repeat(paid_before[starts], np.diff(ends, prepend=0))
        if not kept.all():
            print(f"Note: {1 - kept.mean():.1%} of the transitions follow an episode's first reward and are left out.")
        dataset, ends = Dataset(*(array[kept] for array in dataset)), np.cumsum(np.add.reduceat(kept, starts))
    return dataset, ends


def behaviour_returns(dataset: Dataset, ends: np.ndarray, environment: Environment) -> np.ndarray:
    """Each episode's return under the evaluation protocol: its horizon, its end by a drop, what it counts."""
    returns = []
    for start, end in zip([0, *ends[:-1]], ends):
        end = min(end, start + environment.max_steps)
        if environment.drop_below is not None:
            coordinate, threshold = environment.drop_below
            dropped = dataset.next_obs[start:end, coordinate] < threshold
            end = start + np.argmax(dropped) + 1 if dropped.any() else end
        reward = (dataset.terminal if environment.success else dataset.reward)[start:end]
        returns.append(reward.max() if environment.return_is_max else reward.sum(dtype=np.float64))
    return np.array(returns)


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
