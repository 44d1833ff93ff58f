"""The toy: one step, an action in the square [-1, 1]^2, a behaviour of four modes of which one pays.

No simulator and no file: the data are drawn in memory. To play it: gymnasium.make("common.harness.bandit:Bandit-v0").
"""

import gymnasium
import numpy as np

from common.harness.records import Dataset

MODES = np.array([[0.6, 0.6], [-0.6, 0.6], [-0.6, -0.6], [0.6, -0.6]], np.float32)  # the first one pays
STD = 0.1  # of the behaviour around each mode
RADIUS = 0.3  # around the first mode: three deviations, so that one action in a hundred of that mode misses


def reward_of(action: np.ndarray) -> np.ndarray | np.float32:
    """1 within `RADIUS` of the mode that pays, else 0; of shape (...) for actions (..., 2)."""
    return np.float32(np.linalg.norm(action - MODES[0], axis=-1) < RADIUS)


def make_dataset(size: int = 10_000, seed: int = 0) -> tuple[Dataset, np.ndarray]:
    """`size` episodes of one transition, of all modes alike, and the index after each."""
    rng = np.random.default_rng(seed)
    mode = MODES[rng.integers(len(MODES), size=size)]
    action = np.clip(mode + STD * rng.standard_normal((size, 2)), -1, 1).astype(np.float32)
    obs = np.zeros((size, 1), np.float32)
    return Dataset(obs, action, reward_of(action), obs, np.ones(size, np.float32)), np.arange(1, size + 1)


class Bandit(gymnasium.Env):
    """The observation, one 0, says nothing; the first step is the last."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(reward_of(action)), True, False, {}


gymnasium.register("Bandit-v0", entry_point=Bandit)
