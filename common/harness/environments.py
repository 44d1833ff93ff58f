"""Evaluation by D4RL's protocol: Gymnasium's environments, wrapped to it, and seeded episodes in copies of them."""

import atexit
import contextlib
import importlib
import io
import itertools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers.utils import RunningMeanStd
from jaxtyping import Array, Float, Key

from common.harness.records import Episodes, printable, reason_of
from common.harness.tasks import LOCOMOTION, Environment

NO_PICTURES = "install Debian's libegl1 and set MUJOCO_GL=egl, or libosmesa6 and MUJOCO_GL=osmesa"
try:
    import mujoco
except (ImportError, AttributeError, RuntimeError):
    way = os.environ.get("MUJOCO_GL", "")
    raise SystemExit(f"MuJoCo cannot draw by MUJOCO_GL={way} here: unset it, or {NO_PICTURES}.") from None

MODEL_BYTES = 2**30  # of all copies of an environment together


@contextlib.contextmanager
def quietly():
    """gymnasium-robotics registered, its notices hidden and its temporary files removed."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        warnings.simplefilter("ignore")
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)
        with tempfile.TemporaryDirectory() as folder:  # mazes write an XML file to the temporary folder and forget it
            before, tempfile.tempdir = tempfile.tempdir, folder
            try:
                yield
            finally:
                tempfile.tempdir = before


def make_gym_env(gym_id: str | EnvSpec, **kwargs) -> gymnasium.Env:
    """`gymnasium.make`, without a word."""
    with quietly():
        return gymnasium.make(gym_id, disable_env_checker=True, **kwargs)


def observation_parts(obs, keys: tuple[str, ...] = ()) -> list:
    """The arrays (or spaces) of an observation in one order for data and evaluation: `keys`, or else by name.

    A part may be a dict itself. A Dict space may list its keys in any order; HDF5 sorts them.
    """
    if not hasattr(obs, "keys"):
        return [obs]
    return [part for key in keys or sorted(obs.keys()) for part in observation_parts(obs[key])]


@cache
def cell_centre(gym_id: str, cell: tuple[int, int]) -> np.ndarray:
    """(x, y) of the centre of a maze's cell (row, column)."""
    env = make_gym_env(gym_id)
    env.close()
    return env.unwrapped.maze.cell_rowcol_to_xy(np.array(cell))


# -------------------------------------------------------------------------------------------------- by the protocol


class Protocol(gymnasium.Wrapper):
    """What the protocol asks of an environment: a maze's start and goal, the end when the pen drops, what is paid."""

    def __init__(self, env: gymnasium.Env, environment: Environment):
        super().__init__(env)
        self.environment = environment

    def reset(self, *, seed=None, options=None):
        np.random.seed(seed)  # OGBench's mazes draw their starts from NumPy's own generator
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
        reward = np.asarray(info["success"] if self.environment.success else reward, float).item()  # of shape (1,), too
        if self.environment.gym_id == "AdroitHandDoor-v1":  # adds 0.1 |palm - handle|, which D4RL subtracts
            reward -= 0.2 * np.linalg.norm(obs[35:38])
        if self.environment.drop_below is not None:
            coordinate, threshold = self.environment.drop_below
            terminated = terminated or bool(obs[coordinate] < threshold)
        return obs, reward, terminated, truncated, info


def make_env(environment: Environment, **options) -> gymnasium.Env:
    """One evaluation environment that takes actions in [-1, 1] and returns flat observations."""
    env = make_gym_env(environment.gym_id, **environment.kwargs, max_episode_steps=environment.max_steps, **options)
    env, keys = Protocol(env, environment), environment.obs_keys
    space = env.observation_space
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        size = sum(int(np.prod(part.shape)) for part in observation_parts(space, keys))
        flat = lambda obs: np.concatenate([np.ravel(part) for part in observation_parts(obs, keys)])
        env = gymnasium.wrappers.TransformObservation(env, flat, gymnasium.spaces.Box(-np.inf, np.inf, (size,)))
    if environment.obs_columns or environment.obs_constants:
        columns, constants = list(environment.obs_columns), np.array(environment.obs_constants)
        space = gymnasium.spaces.Box(-np.inf, np.inf, (len(columns) + len(constants),))
        env = gymnasium.wrappers.TransformObservation(env, lambda obs: np.append(obs[columns], constants), space)
    with warnings.catch_warnings(action="ignore"):  # the kitchen's bounds overflow when cast
        return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


class Video(gymnasium.wrappers.RecordVideo):
    """Of an episode that was not played to its end nothing is left, and nothing said."""

    def __del__(self):
        pass


def close_camera(env: gymnasium.Env) -> None:
    """While the libraries that draw are still loaded; OGBench's arms forget their renderer."""
    env.close()
    if hasattr(env.unwrapped, "_renderer"):
        env.unwrapped._renderer.close()


def check_camera(environment: Environment) -> None:
    """Draws one picture, by EGL if no other way is named. Exits with the remedy if there can be no video here."""
    try:
        if type(make_env(environment).unwrapped).render is gymnasium.Env.render:
            raise SystemExit("The environment of this task cannot be drawn: leave --capture-video out.")
        import moviepy  # noqa: F401

        if sys.platform == "linux" and not {"MUJOCO_GL", "DISPLAY"} & set(os.environ):
            os.environ["MUJOCO_GL"] = "egl"
            importlib.reload(mujoco.gl_context)  # which has read it before
        with quietly():
            env = make_env(environment, render_mode="rgb_array")
            env.reset(seed=0)
            env.render()
            close_camera(env)
    except Exception as error:
        remedy = f"`pip install moviepy`, {NO_PICTURES}, or leave it out"
        raise SystemExit(f"--capture-video cannot draw here ({reason_of(error)}): {remedy}.") from None


def _first_steps(env: gymnasium.Env) -> Float[np.ndarray, "steps columns"]:
    """The observations and rewards that an episode begins with: always of one seed and the same actions."""
    rng, seen, is_over = np.random.default_rng(0), [[*env.reset(seed=0)[0], 0.0]], False
    while len(seen) < 6 and not is_over:
        obs, reward, *ends, _ = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        is_over = any(ends)
        seen.append([*obs, reward])
        if obs.shape != env.observation_space.shape or not np.isfinite(seen[-1]).all():
            raise ValueError(f"its first step returns {obs.tolist()}, reward {reward}")
    return np.array(seen)


def check_environment(name: str, environment: Environment, starts, low, high, act_shape: tuple[int, ...]) -> None:
    """Exits unless it can be played here, with observations like `starts` (episodes, obs_dim), and actions in bounds.

    Exits, too, if an episode depends on the ones before, so that no run depends on where it was stopped. Notes an
    environment that ignores its seed.
    """
    try:
        env = make_env(environment)
        first, again = _first_steps(env), _first_steps(env)
        ignores_seed = not _same(first, again) and not _same(first, _first_steps(make_env(environment)))
    except Exception as error:  # whatever an environment that is not ours raises
        raise SystemExit(f"{name} needs an environment that cannot be played here ({reason_of(error)}).") from None
    env.close()
    space, gym_id = env.env.action_space, printable(env.unwrapped.spec.id)  # before it was scaled to [-1, 1]
    shapes, own = (starts.shape[1:], act_shape), (env.observation_space.shape, space.shape)
    if shapes != own or not (np.allclose(space.low, low) and np.allclose(space.high, high)):
        raise SystemExit(
            f"{name} does not fit its environment {gym_id}: observations {shapes[0]} and {own[0]}, actions {shapes[1]} "
            f"in [{low.min():g}, {high.max():g}] and {own[1]} in [{space.low.min():g}, {space.high.max():g}]."
        )
    height = np.median(starts[:, 0])  # halfcheetah is as wide as walker2d, but starts at 0 ± 0.1, not at 1.25
    if environment.domain == LOCOMOTION and abs(height - first[0, 0]) > 0.5:
        raise SystemExit(f"{name} is not {gym_id}'s: its episodes start {height:.2f} high, not {first[0, 0]:.2f}.")
    layers = [env]
    while isinstance(layers[-1], gymnasium.Wrapper):
        layers.append(layers[-1].env)
    runs_on = any(isinstance(value, RunningMeanStd) for layer in layers for value in vars(layer).values())
    if runs_on or not (ignores_seed or _same(first, again)):
        raise SystemExit(
            f"{name} needs an environment whose episodes depend on the ones before, as with NormalizeObservation or "
            "NormalizeReward: record it without that wrapper; --normalize-obs standardises by the data."
        )
    if ignores_seed:
        print(f"Note: {gym_id} ignores its seed; evaluations differ from run to run.")


def _same(first: np.ndarray, other: np.ndarray) -> bool:
    return first.shape == other.shape and np.allclose(first, other)


@contextlib.contextmanager
def _breaking_down(seed: int, update: int, episode: int, step: int) -> Iterator[None]:
    """Exits with a sentence for whatever an environment raises, whose code is not ours."""
    try:
        yield
    except Exception as error:
        at = f"update {update}, seed {seed}, episode {episode}, step {step}"
        raise SystemExit(f"The environment broke down, {at}: {reason_of(error)}.") from None


class Evaluator:
    """Copies of an environment for a batch of seeds, kept for the whole run.

    A copy is reset before each episode and left alone after it: no automatic reset can go wrong. A copy's start
    depends on (seed, update, episode) only: seeds trained together see what each would see alone. The first episode of
    the first seed becomes a video in the folder `videos`, if there is one.
    """

    def __init__(self, environment: Environment, seeds: list[int], num_episodes: int, videos: Path | None = None):
        self.environment, self.seeds, self.num_episodes, self.videos = environment, seeds, num_episodes, videos

    @cached_property
    def envs(self) -> list[list[gymnasium.Env]]:
        """By seed and episode; made at the first evaluation, so that training starts without them.

        As many as their models, of up to 66 MB, fit into `MODEL_BYTES`: the episodes then take turns.
        """
        env = make_env(self.environment)
        env.reset(seed=0)
        size = len(self.seeds) * getattr(getattr(env.unwrapped, "model", None), "nbuffer", 0)
        fits = lambda num: num == 1 or (self.num_episodes % num == 0 and num * size <= MODEL_BYTES)
        copies = max(filter(fits, range(1, self.num_episodes + 1)))
        envs = [[make_env(self.environment) for _ in range(copies)] for _ in self.seeds]
        if self.videos is not None:
            with quietly():  # a resumed run's folder is there
                camera = make_env(self.environment, render_mode="rgb_array")
                camera.unwrapped.render_mode = "rgb_array"  # OGBench's arms forget it
                atexit.register(close_camera, camera)
                envs[0][0] = Video(camera, str(self.videos), episode_trigger=lambda episode: False)
        return envs

    def __call__(self, act: Callable[..., Array], keys: Key[Array, "seeds episodes"], update: int) -> Episodes:
        """`act(obs, keys, step)` maps (seeds, copies, obs_dim) at a step of as many episodes to actions in [-1, 1].

        `keys` has one for each episode. Exits if the environment returns what is not finite.
        """
        copies = len(self.envs[0])
        turns = [self._play(act, keys[:, i : i + copies], update, i) for i in range(0, self.num_episodes, copies)]
        returns, lengths, paths = zip(*turns)
        is_maze = self.environment.cells is not None
        maze, paths = (self.envs[0][0].unwrapped.maze, [*itertools.chain(*paths)]) if is_maze else (None, [])
        return Episodes(np.concatenate(returns, axis=1), np.concatenate(lengths, axis=1), paths, maze)

    def _play(self, act: Callable[..., Array], keys: Key[Array, "seeds copies"], update: int, first: int):
        """(returns, lengths, paths of the first seed) of the episodes from number `first` on, one in each copy."""
        shape = np.shape(self.envs)
        returns, lengths, obs = np.zeros(shape), np.zeros(shape, int), np.zeros(shape, object)
        paths, running, step = [[] for _ in range(shape[1])], list(np.ndindex(shape)), 0
        for i, j in running:
            ids = self.seeds[i], update, first + j
            with _breaking_down(*ids, step):
                obs[i, j], _ = self.envs[i][j].reset(seed=int(np.random.SeedSequence(ids).generate_state(1)[0]))
        obs = np.array(obs.tolist(), np.float32)
        video = self.envs[0][0] if self.videos and first == 0 else None
        if video:
            video.start_recording(f"update-{update}")
            video.recorded_frames.append(video.render())
        while running:
            action = np.asarray(act(obs, keys, step))
            still_running = []
            for i, j in running:
                if i == 0:
                    paths[j].append(obs[i, j, :2].copy())
                with _breaking_down(self.seeds[i], update, first + j, step):
                    obs[i, j], reward, terminated, truncated, _ = self.envs[i][j].step(action[i, j])
                    if not (np.isfinite(reward) and np.isfinite(obs[i, j]).all()):
                        raise ValueError(f"reward {reward}, or an observation that is not finite")
                returns[i, j] += reward
                lengths[i, j] += 1
                if not (terminated or truncated):
                    still_running.append((i, j))
            running, step = still_running, step + 1
        if video:
            try:
                video.stop_recording()
            except OSError as error:  # a run does not end because it could not be filmed
                print(f"(The video of update {update} could not be written: {reason_of(error)}.)")
        return returns, lengths, [np.array([*path, last[:2]]) for path, last in zip(paths, obs[0])]
