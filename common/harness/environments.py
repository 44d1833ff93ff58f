"""Evaluation by D4RL's protocol: Gymnasium's environments, wrapped to it, and seeded episodes in copies of them.

Data name the environment that they were made in, by a path to code. Only that of Gymnasium, Gymnasium-Robotics, OGBench
and of packages that the user trusts is ever imported.
"""

import atexit
import contextlib
import dataclasses
import importlib
import io
import itertools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from jaxtyping import Array, Key

from common.harness.records import Episodes
from common.harness.tasks import OTHER, TASKS, Environment, Task

NO_PICTURES = "install Debian's libegl1 and set MUJOCO_GL=egl, or libosmesa6 and MUJOCO_GL=osmesa"
try:
    import mujoco
except (ImportError, AttributeError, RuntimeError):
    way = os.environ.get("MUJOCO_GL", "")
    raise SystemExit(f"MuJoCo cannot draw by MUJOCO_GL={way} here: unset it, or {NO_PICTURES}.") from None

TRUSTED = ("gymnasium", "gymnasium_robotics", "ogbench")
MODEL_BYTES = 2**30  # of all copies of an environment together
MAX_STEPS = 10_000  # a longer episode is one to record in: its evaluation would not end
PICTURES = ("render_mode", "width", "height", "camera_id", "camera_name", "default_camera_config", "max_geom")
ONLOOKERS = ("RecordEpisodeStatistics", "RecordVideo", "HumanRendering", "RenderCollection", "PassiveEnvChecker")
# Options that the table's protocol sets whatever they were in recording: rewards and ends of the data follow it.
PROTOCOL = ("continuing_task", "reset_target", "remove_task_when_completed", "terminate_on_tasks_completed")


def reason_of(error: Exception) -> str:
    """The first line of what it says, without the full stop."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def _quietly():
    """gymnasium-robotics registered, its notices hidden and its temporary files removed."""
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
                yield
            finally:
                tempfile.tempdir = before


def make_gym_env(gym_id: str | EnvSpec, **kwargs) -> gymnasium.Env:
    """`gymnasium.make`, without a word."""
    with _quietly():
        return gymnasium.make(gym_id, disable_env_checker=True, **kwargs)


# ------------------------------------------------------------------------------------------ as the data name them


def refuse_untrusted(name: str, spec: dict, trust: str) -> None:
    """Exits if a recorded EnvSpec names code that is not an environment of `TRUSTED` or in a package of `trust`."""
    entry_points = [part.get("entry_point") for part in (spec, *spec.get("additional_wrappers", ()))]
    packages = [str(entry_point).partition(":")[0].partition(".")[0] for entry_point in entry_points]
    for entry_point, package in zip(entry_points, packages):  # before any is imported
        if entry_point is not None and package not in (*TRUSTED, *trust.split(",")):
            raise SystemExit(
                f"{name} would run {entry_point!r} as its environment, which is neither Gymnasium's nor "
                f"Gymnasium-Robotics' nor OGBench's: if you trust that package, add --trust {package}."
            )
    for entry_point, package in zip(entry_points, packages):
        if entry_point is not None and package in TRUSTED:
            with (
                _quietly(),
                contextlib.suppress(ImportError, AttributeError),
            ):  # in another version: making it will tell
                made = load_env_creator(entry_point)
                is_env = isinstance(made, type) and issubclass(made, gymnasium.Env)
                if not is_env and made.__module__ != "ogbench.locomaze.maze":  # whose environments are functions
                    raise SystemExit(f"{name} would run {entry_point!r}, which is no environment.")


def task_of_dataset(dataset_id: str, spec: EnvSpec | None, eval_spec: EnvSpec | None = None) -> Task:
    """The task of any Minari dataset, from the environments that its metadata name, for recording and evaluation.

    The table's protocol is for its own datasets, and for environments of a name and version in the table whose options
    change nothing that is observed, done or paid. Others are evaluated as recorded, with raw returns, and this is
    printed. Exits if the dataset names no environment.
    """
    name = dataset_id.replace("/", "-")
    newest = dataset_id.replace("-v1", "-v2") if dataset_id.startswith("D4RL/antmaze/") else dataset_id
    known = next((task.environment for task in TASKS.values() if task.dataset_ids == (newest,)), None)
    if known is not None:
        return Task(name, known, (dataset_id,))
    if spec is None:
        raise SystemExit(
            f"Dataset {dataset_id} does not say which environment it was made in, so no policy can be evaluated."
        )
    known = _protocol_of(_without_pictures(spec))
    if known is None:
        spec = _without_pictures(eval_spec or spec)
        steps = spec.max_episode_steps if 0 < (spec.max_episode_steps or 0) <= MAX_STEPS else 1000
        known = Environment(OTHER, spec, steps)
        print(f"Note: the policy is evaluated in {spec.id} as the data describe it, {steps} steps, by raw returns.")
    return Task(name, known, (dataset_id,))


def _without_pictures(spec: EnvSpec) -> EnvSpec:
    kwargs = {key: value for key, value in spec.kwargs.items() if key not in PICTURES}
    wrappers = tuple(wrapper for wrapper in spec.additional_wrappers if wrapper.name not in ONLOOKERS)
    return dataclasses.replace(spec, kwargs=kwargs, additional_wrappers=wrappers)


def _protocol_of(spec: EnvSpec) -> Environment | None:
    known = next((task.environment for task in TASKS.values() if task.environment.gym_id == spec.id), None)
    if known is None or spec.additional_wrappers:
        return None
    with _quietly():
        registered = gymnasium.spec(spec.id)
    goals = {key: value for key, value in spec.kwargs.items() if key == "tasks_to_complete"}
    known = known._replace(kwargs={k: v for k, v in known.kwargs.items() if k != "tasks_to_complete"} | goals)
    options = [{k: v for k, v in kwargs.items() if k not in PROTOCOL} for kwargs in (spec.kwargs, known.kwargs)]
    return known if options[0] == registered.kwargs | options[1] else None


def observation_parts(obs, keys: tuple[str, ...] = ()) -> list:
    """The arrays (or spaces) of an observation in one order for data and evaluation: `keys`, or else by name.

    A part may be a dict itself. A Dict space may list its keys in any order; HDF5 sorts them.
    """
    if not hasattr(obs, "keys"):
        return [obs]
    return [part for key in keys or sorted(obs.keys()) for part in observation_parts(obs[key])]


# -------------------------------------------------------------------------------------------------- by the protocol


class Protocol(gymnasium.Wrapper):
    """What the protocol asks of an environment: a maze's start and goal, the end when the pen drops, what is paid."""

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the kitchen's bounds overflow when cast
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
    if type(make_env(environment).unwrapped).render is gymnasium.Env.render:
        raise SystemExit("The environment of this task cannot be drawn: leave --capture-video out.")
    try:
        import moviepy  # noqa: F401
    except ImportError:
        raise SystemExit("--capture-video needs MoviePy: `pip install moviepy` first, or leave it out.") from None
    try:
        if sys.platform == "linux" and not {"MUJOCO_GL", "DISPLAY"} & set(os.environ):
            os.environ["MUJOCO_GL"] = "egl"
            importlib.reload(mujoco.gl_context)  # which has read it before
        with _quietly():
            env = make_env(environment, render_mode="rgb_array")
            env.reset(seed=0)
            env.render()
            close_camera(env)
    except Exception as error:
        raise SystemExit(
            f"--capture-video cannot draw here ({' '.join(str(error).split())}): {NO_PICTURES}, or leave it out."
        ) from None


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

    Every copy plays one episode and is then left alone, so there is no automatic reset to get wrong. A copy's start
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
            with _quietly():  # a resumed run's folder is there
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
