"""Evaluation by D4RL's protocol: Gymnasium's environments, wrapped to it, and seeded episodes in copies of them."""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property

import gymnasium
import numpy as np
from jaxtyping import Array

from common.harness.records import Episodes
from common.harness.tasks import Environment


def make_gym_env(gym_id: str | gymnasium.envs.registration.EnvSpec, **kwargs) -> gymnasium.Env:
    """`gymnasium.make`, with gymnasium-robotics registered, its notices hidden and its temporary files removed."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)
        with tempfile.TemporaryDirectory() as folder:  # mazes write an XML file to the temporary folder and forget it
            before, tempfile.tempdir = tempfile.tempdir, folder
            try:
                return gymnasium.make(gym_id, disable_env_checker=True, **kwargs)
            finally:
                tempfile.tempdir = before


def observation_parts(obs, keys: tuple[str, ...] = ()) -> list:
    """The arrays (or spaces) of an observation in one order for data and evaluation: `keys`, or else by name.

    A part may be a dict itself. A Dict space may list its keys in any order; HDF5 sorts them.
    """
    if not hasattr(obs, "keys"):
        return [obs]
    return [part for key in keys or sorted(obs.keys()) for part in observation_parts(obs[key])]


class Protocol(gymnasium.Wrapper):
    """What D4RL's protocol asks of an environment: a maze's start and goal, the end when the pen is dropped."""

    def __init__(self, env: gymnasium.Env, environment: Environment):
        super().__init__(env)
        self.environment = environment

    def reset(self, *, seed=None, options=None):
        if self.environment.cells is None:
            return self.env.reset(seed=seed, options=options)
        start, goal = map(np.array, self.environment.cells)
        obs, info = self.env.reset(seed=seed, options={"reset_cell": start, "goal_cell": goal})
        if self.environment.fixed_goal:  # without the noise that the environment adds
            maze = self.env.unwrapped
            maze.goal = maze.maze.cell_rowcol_to_xy(goal)
            maze.update_target_site_pos()
        return obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.environment.drop_below is not None:
            coordinate, threshold = self.environment.drop_below
            terminated = terminated or bool(obs[coordinate] < threshold)
        return obs, reward, terminated, truncated, info


def make_env(environment: Environment) -> gymnasium.Env:
    """One evaluation environment that takes actions in [-1, 1] and returns flat observations."""
    kwargs = dict(environment.kwargs)
    if environment.max_steps is not None:
        kwargs["max_episode_steps"] = environment.max_steps
    elif not 0 < (environment.gym_id.max_episode_steps or 0) <= 10_000:  # to record in: an evaluation would not end
        kwargs["max_episode_steps"] = 1000
    env = Protocol(make_gym_env(environment.gym_id, **kwargs), environment)
    keys, space = environment.obs_keys, env.observation_space
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        size = sum(int(np.prod(part.shape)) for part in observation_parts(space, keys))
        flat = lambda obs: np.concatenate([np.ravel(part) for part in observation_parts(obs, keys)])
        env = gymnasium.wrappers.TransformObservation(env, flat, gymnasium.spaces.Box(-np.inf, np.inf, (size,)))
    if environment.obs_columns or environment.obs_constants:
        columns, constants = list(environment.obs_columns), np.array(environment.obs_constants)
        space = gymnasium.spaces.Box(-np.inf, np.inf, (len(columns) + len(constants),))
        env = gymnasium.wrappers.TransformObservation(env, lambda obs: np.append(obs[columns], constants), space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the kitchen's bounds overflow when cast
        return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


class Evaluator:
    """Copies of an environment for a batch of seeds, kept for the whole run.

    Every copy plays one episode and is then left alone, so there is no automatic reset to get wrong. A copy's start
    depends on (seed, update, episode) only: seeds trained together see what each would see alone.
    """

    def __init__(self, environment: Environment, seeds: list[int], num_episodes: int):
        self.environment, self.seeds, self.num_episodes = environment, seeds, num_episodes

    @cached_property
    def envs(self) -> list[list[gymnasium.Env]]:
        """By seed and episode; made at the first evaluation, so that training starts without them."""
        return [[make_env(self.environment) for _ in range(self.num_episodes)] for _ in self.seeds]

    def __call__(self, act: Callable[..., Array], update: int) -> Episodes:
        """`act(obs, step)` maps (seeds, episodes, obs_dim) at a step of the episodes to actions in [-1, 1]."""
        shape = len(self.seeds), self.num_episodes
        start = lambda *ids: int(np.random.SeedSequence(ids).generate_state(1)[0])
        obs = np.array(
            [
                [env.reset(seed=start(seed, update, episode))[0] for episode, env in enumerate(row)]
                for seed, row in zip(self.seeds, self.envs)
            ],
            np.float32,
        )
        returns, lengths = np.zeros(shape), np.zeros(shape, int)
        paths = [[] for _ in range(self.num_episodes)]
        running, step = list(np.ndindex(shape)), 0
        while running:
            action = np.asarray(act(obs, step))
            still_running = []
            for i, j in running:
                if i == 0:
                    paths[j].append(obs[i, j, :2].copy())
                obs[i, j], reward, terminated, truncated, _ = self.envs[i][j].step(action[i, j])
                returns[i, j] += reward
                lengths[i, j] += 1
                if not (terminated or truncated):
                    still_running.append((i, j))
            running, step = still_running, step + 1
        paths = [np.array([*path, last[:2]]) for path, last in zip(paths, obs[0])]
        is_maze = self.environment.cells is not None
        return Episodes(returns, lengths, paths if is_maze else [], self.envs[0][0].unwrapped.maze if is_maze else None)
