"""The environment that the metadata of a Minari dataset name, by a path to code, and the task that it makes.

Only code of Gymnasium, Gymnasium-Robotics, OGBench and of packages that the user trusts is ever imported.
"""

import contextlib
import dataclasses
import itertools
import json
from types import NoneType

import gymnasium
from gymnasium import wrappers
from gymnasium.envs.registration import EnvSpec, load_env_creator

from common.harness.environments import quietly
from common.harness.records import printable
from common.harness.tasks import LOGS, OTHER, TASKS, Environment, Task

TRUSTED = ("gymnasium", "gymnasium_robotics", "ogbench")
MAX_STEPS = 10_000  # a longer episode is one to record in: its evaluation would not end
PICTURES = ("render_mode", "width", "height", "camera_id", "camera_name", "default_camera_config", "max_geom")
ONLOOKERS = wrappers.RecordEpisodeStatistics, wrappers.RecordVideo, wrappers.HumanRendering, wrappers.RenderCollection
ONLOOKERS += (wrappers.common.PassiveEnvChecker,)  # they change nothing; some write files or open a window
KINDS = {"id": [str], "entry_point": [str, NoneType], "kwargs": [dict, NoneType], "max_episode_steps": [int, NoneType]}
# Options that the table's protocol sets whatever they were in recording: rewards and ends of the data follow it.
PROTOCOL = ("continuing_task", "reset_target", "remove_task_when_completed", "terminate_on_tasks_completed")


def check_metadata(name: str, metadata: dict, trust: str) -> None:
    """Exits if recorded EnvSpecs name code that is not an environment of `TRUSTED` or in a package of `trust`.

    Raises ValueError if they are none, or if Minari would make one that writes or draws, to learn the spaces.
    """
    trusted = {*TRUSTED, *trust.split(",")} - {""}
    for spec in (json.loads(metadata[key]) for key in ("env_spec", "eval_env_spec") if metadata.get(key) is not None):
        parts = [spec, *spec["additional_wrappers"]] if isinstance(spec, dict) else [spec]
        for part, (field, kinds) in itertools.product(parts, KINDS.items()):
            value = part.get(field, kinds[0]()) if isinstance(part, dict) else part
            if type(value) not in kinds:
                raise ValueError(f"its environment's {field} is {value!r}, not of the kind {kinds[0].__name__}")
        entry_points = [part.get("entry_point") or "" for part in parts]
        packages = [entry_point.partition(":")[0].partition(".")[0] for entry_point in entry_points]
        for entry_point, package in zip(entry_points, packages):  # before any is imported
            if entry_point and package not in trusted:
                is_plain = package.isascii() and package.isidentifier()
                advice = f": if you trust that package, add --trust {package}" if is_plain else ""
                whose = f"which is neither Gymnasium's nor Gymnasium-Robotics' nor OGBench's{advice}"
                raise SystemExit(f"{name} would run {printable(repr(entry_point))} as its environment, {whose}.")
        made = [_load(entry_point) for entry_point in entry_points]
        for entry_point, package, part in zip(entry_points, packages, made):
            is_env = isinstance(part, type) and issubclass(part, gymnasium.Env)
            is_maze = getattr(part, "__module__", None) == "ogbench.locomaze.maze"  # whose environments are functions
            if package in TRUSTED and part is not None and not is_env and not is_maze:
                raise SystemExit(f"{name} would run {printable(repr(entry_point))}, which is no environment.")
        if not {"observation_space", "action_space"} <= metadata.keys() and any(map(_is_onlooker, made)):
            raise ValueError("its spaces are missing, and to learn them would make an environment that writes or draws")


def _load(entry_point: str):
    """What it names; None if it is not here, in this version: making the environment will tell."""
    with quietly(), contextlib.suppress(ImportError, AttributeError):
        return load_env_creator(entry_point) if entry_point else None


def _is_onlooker(made) -> bool:
    return isinstance(made, type) and issubclass(made, ONLOOKERS)


def check_recorded(name: str, spec: EnvSpec | None, environment: Environment) -> None:
    """Exits if the data were recorded in another environment than that of their task, or a variant of its maze."""
    known = environment.gym_id.rpartition("-v")[0]
    if spec is not None and spec.name != known and not spec.name.startswith(f"{known}_"):
        raise SystemExit(f"{name} was recorded in {printable(spec.id)}, and this task is {environment.gym_id}'s.")


def task_of_dataset(dataset_id: str, spec: EnvSpec | None, eval_spec: EnvSpec | None = None) -> Task:
    """The task of any Minari dataset, from the environments that its metadata name, for recording and evaluation.

    The table's protocol is for its own datasets, and for environments of a name and version in the table whose options
    change nothing that is observed, done or paid. Others are evaluated as recorded, with raw returns, and this is
    printed. A dataset that names no environment is not played.
    """
    task_name, name = dataset_id.replace("/", "-"), f"Dataset {dataset_id}"
    newest = dataset_id.replace("-v1", "-v2") if dataset_id.startswith("D4RL/antmaze/") else dataset_id
    known = next((task.environment for task in TASKS.values() if task.dataset_ids == (newest,)), None)
    if known is not None:
        check_recorded(name, spec, known)
        return Task(task_name, known, (dataset_id,))
    if spec is None and eval_spec is None:
        return Task(task_name, Environment(LOGS, None, 2**31), (dataset_id,), is_played=False)
    known = _protocol_of(_without_onlookers(spec or eval_spec))
    if known is None:
        spec = _without_onlookers(eval_spec or spec)
        steps = spec.max_episode_steps if 0 < (spec.max_episode_steps or 0) <= MAX_STEPS else 1000
        known = Environment(OTHER, spec, steps)
        described = f"{printable(spec.id)} as the data describe it, {steps} steps, by raw returns"
        print(f"Note: the policy is evaluated in {described}.")
    return Task(task_name, known, (dataset_id,))


def _without_onlookers(spec: EnvSpec) -> EnvSpec:
    kwargs = {key: value for key, value in (spec.kwargs or {}).items() if key != "render_mode"}
    kept = tuple(part for part in spec.additional_wrappers if not _is_onlooker(_load(part.entry_point)))
    return dataclasses.replace(spec, kwargs=kwargs, additional_wrappers=kept)


def _protocol_of(spec: EnvSpec) -> Environment | None:
    known = next((task.environment for task in TASKS.values() if task.environment.gym_id == spec.id), None)
    if known is None or spec.additional_wrappers:
        return None
    with quietly():
        registered = gymnasium.spec(spec.id)
    goals = {key: value for key, value in spec.kwargs.items() if key == "tasks_to_complete"}
    known = known._replace(kwargs={k: v for k, v in known.kwargs.items() if k != "tasks_to_complete"} | goals)
    free = {*PROTOCOL, *PICTURES}
    options = [{k: v for k, v in kwargs.items() if k not in free} for kwargs in (spec.kwargs, known.kwargs)]
    return known if options[0] == registered.kwargs | options[1] else None
