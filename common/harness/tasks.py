"""What is known of each task: its data, its evaluation protocol, its reference scores, its hyperparameters.

One table, three levels: a *domain* (hyperparameters of the paper's Table 3 and Sec. 5), an *environment* (protocol and
reference scores of D4RL), a *task* (an environment with its datasets, the unit that `--env-id` names).

    python -m common.harness.tasks    # prints the table
"""

import dataclasses
import difflib
import itertools
import os
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from gymnasium.envs.registration import EnvSpec

RewardRule = Literal["none", "normalize", "cql_antmaze", "iql_antmaze", "iql_locomotion"]
Preset = Literal["paper", "fast"]
# What "fast" sets, for runs of some thousands of updates: README, "Short of compute?".
FAST = {"tau": 0.2, "critic_layer_norm": True, "normalize_obs": True, "prediction": "action", "lr_decay": True}
FAST_DDPM = {"num_diffusion_steps": 5, "beta_schedule": "vp"}  # on the toy, as well: the chain of Diffusion-QL's code


class Domain(NamedTuple):
    """Defaults that the tasks of a domain share; fields are named as the flags they are the default of."""

    name: str
    learning_rate: float
    eta: float  # "loss weight" in Table 3
    num_updates: int
    reward_rule: RewardRule
    iql_reward_rule: RewardRule
    expectile: float = 0.7
    temperature: float = 1 / 3  # of IQL with a Gaussian policy, 1 / beta of its paper
    eval_every: int = 10_000
    eval_episodes: int = 10
    preset: Preset = "paper"
    eval_untrained: bool = False  # an evaluation before the first update as well, which no result counts


LOCOMOTION = Domain("locomotion", 3e-4, 1.0, 2_000_000, "none", "iql_locomotion")
ANTMAZE = Domain("antmaze", 3e-4, 1.0, 1_000_000, "cql_antmaze", "iql_antmaze", 0.9, 1 / 10, eval_episodes=100)
ADROIT = Domain("adroit", 3e-5, 0.1, 1_000_000, "normalize", "normalize", temperature=2.0)
KITCHEN = Domain("kitchen", 3e-4, 0.005, 1_000_000, "normalize", "normalize", temperature=2.0)
POINTMAZE = ANTMAZE._replace(name="pointmaze", num_updates=3_000, eval_every=1_000, preset="fast", eval_untrained=True)
# Updates and evaluations as in OGBench's papers; IQL's values are antmaze's, whose shaped rewards are
# the same; eta is the paper's usual one.
OGBENCH = Domain("ogbench", 3e-4, 1.0, 1_000_000, "none", "none", 0.9, 1 / 10, eval_every=100_000, eval_episodes=50)
BANDIT = POINTMAZE._replace(
    name="bandit",
    learning_rate=3e-3,
    iql_reward_rule="cql_antmaze",
    num_updates=400,
    eval_every=100,
    eval_untrained=False,
)
OTHER = LOCOMOTION._replace(name="other", iql_reward_rule="none")
LOGS = OTHER._replace(name="logs", eval_episodes=0)  # data that name no environment


class Environment(NamedTuple):
    """An evaluation environment and D4RL's protocol for it."""

    domain: Domain
    gym_id: str | EnvSpec | None  # the spec, for an environment outside the table; None of logs that name none
    max_steps: int  # of an episode
    reference: tuple[float, float] | None = None  # returns that score 0 and 100
    kwargs: dict[str, Any] = {}
    obs_keys: tuple[str, ...] = ()  # which parts of a dict observation the policy sees, in this order
    cells: tuple[tuple[int, int], tuple[int, int]] | None = None  # start and goal of a maze, (row, column)
    fixed_goal: bool = False  # the goal is its cell's centre, unseen by the policy; rewards of the data follow it
    sparse: bool = False  # reward 1 is success, and ends the task
    success: bool = False  # an episode is paid for its success, as `info` tells it
    drop_below: tuple[int, float] | None = None  # the episode ends when this coordinate falls below this value
    return_is_max: bool = False  # the data repeats its reward: an episode is worth its largest, not its sum
    obs_columns: tuple[int, ...] = ()  # which columns of the flat observation the policy sees; () are all
    obs_constants: tuple[float, ...] = ()  # appended to every observation


def _maze(domain: Domain, name: str, max_steps: int, start: tuple[int, int], goal: tuple[int, int], **fields):
    maze = Environment(domain, name, max_steps, (0.0, 1.0), {"continuing_task": False}, cells=(start, goal))
    return maze._replace(sparse=True, return_is_max=True, **fields)


def _antmaze(name: str, max_steps: int, start: tuple[int, int], goal: tuple[int, int]) -> Environment:
    maze = _maze(ANTMAZE, f"AntMaze_{name}-v5", max_steps, start, goal)
    kwargs = maze.kwargs | {"include_cfrc_ext_in_observation": False, "reset_target": False}
    return maze._replace(kwargs=kwargs, obs_keys=("achieved_goal", "observation", "desired_goal"))


def _pointmaze(name: str, max_steps: int, start: tuple[int, int], goal: tuple[int, int]) -> Environment:
    return _maze(POINTMAZE, f"PointMaze_{name}-v3", max_steps, start, goal, obs_keys=("observation",), fixed_goal=True)


# By the name in the Gymnasium id, without its version. Reference returns: D4RL's infos.py.
ENVIRONMENTS = {
    "HalfCheetah": Environment(LOCOMOTION, "HalfCheetah-v5", 1000, (-280.178953, 12135.0)),
    "Hopper": Environment(LOCOMOTION, "Hopper-v5", 1000, (-20.272305, 3234.3)),
    "Walker2d": Environment(LOCOMOTION, "Walker2d-v5", 1000, (1.629008, 4592.3)),
    "AntMaze_UMaze": _antmaze("UMaze", 700, (3, 1), (1, 1)),
    "AntMaze_Medium": _antmaze("Medium", 1000, (1, 1), (6, 6)),
    "AntMaze_Large": _antmaze("Large", 1000, (1, 1), (7, 9)),
    "AdroitHandPen": Environment(
        ADROIT, "AdroitHandPen-v1", 100, (96.262799, 3076.8331017826877), drop_below=(26, 0.075)
    ),
    "AdroitHandDoor": Environment(ADROIT, "AdroitHandDoor-v1", 200, (-56.512833, 2880.5693087298737)),
    "AdroitHandHammer": Environment(ADROIT, "AdroitHandHammer-v1", 200, (-274.856578, 12794.134825156867)),
    "AdroitHandRelocate": Environment(ADROIT, "AdroitHandRelocate-v1", 200, (-6.425911, 4233.877797728884)),
    "FrankaKitchen": Environment(
        KITCHEN,
        "FrankaKitchen-v1",
        280,
        (0.0, 4.0),
        {"remove_task_when_completed": True, "terminate_on_tasks_completed": True},
        obs_keys=("observation",),
        return_is_max=True,
    ),
    "PointMaze_UMaze": _pointmaze("UMaze", 300, (3, 1), (1, 1)),
    "PointMaze_Medium": _pointmaze("Medium", 600, (1, 1), (6, 6)),
    "PointMaze_Large": _pointmaze("Large", 800, (1, 1), (7, 9)),
}


GOAL_RADIUS = 0.45  # of gymnasium-robotics' mazes, around the centre of the goal


class Task(NamedTuple):
    """A learning problem: an environment, and the Minari datasets (concatenated) or the file to learn it from."""

    env_id: str
    environment: Environment
    dataset_ids: tuple[str, ...] = ()
    file: Path | None = None  # D4RL's or OGBench's
    is_played: bool = True  # policies are evaluated; else a tenth of the episodes is held back for diagnostics

    @property
    def data(self) -> str:
        """Their names, for people."""
        if self.environment.domain == BANDIT:
            return "drawn in memory"
        return " + ".join(self.dataset_ids) or (self.file.name if self.file else "D4RL's file alone")


def _build_tasks() -> dict[str, Task]:
    tasks = []
    for robot in ("HalfCheetah", "Hopper", "Walker2d"):
        for quality in ("medium", "medium-replay", "medium-expert", "simple"):
            parts = {"medium-expert": ("medium", "expert"), "medium-replay": ()}.get(quality, (quality,))
            ids = tuple(f"mujoco/{robot.lower()}/{part}-v0" for part in parts)
            tasks.append(Task(f"{robot.lower()}-{quality}", ENVIRONMENTS[robot], ids))
    for name in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
        size = {"umaze": "UMaze", "medium": "Medium", "large": "Large"}[name.split("-")[0]]
        tasks.append(Task(f"antmaze-{name}", ENVIRONMENTS[f"AntMaze_{size}"], (f"D4RL/antmaze/{name}-v2",)))
    for hand, name in itertools.product(("Pen", "Door", "Hammer", "Relocate"), ("human", "cloned", "expert")):
        ids = (f"D4RL/{hand.lower()}/{name}-v2",)
        tasks.append(Task(f"{hand.lower()}-{name}", ENVIRONMENTS[f"AdroitHand{hand}"], ids))
    for name, third in (("complete", "light switch"), ("partial", "light switch"), ("mixed", "bottom burner")):
        goals = ["microwave", "kettle", third, "light switch" if name == "mixed" else "slide cabinet"]
        kitchen = ENVIRONMENTS["FrankaKitchen"]
        kitchen = kitchen._replace(kwargs=kitchen.kwargs | {"tasks_to_complete": goals})
        tasks.append(Task(f"kitchen-{name}", kitchen, (f"D4RL/kitchen/{name}-v2",)))
    for name in ("UMaze", "Medium", "Large"):
        ids = (f"edp/pointmaze/{name.lower()}-v0",)
        tasks.append(Task(f"pointmaze-{name.lower()}", ENVIRONMENTS[f"PointMaze_{name}"], ids))
    tasks.append(Task("bandit", Environment(BANDIT, "common.harness.bandit:Bandit-v0", 1, (0.0, 1.0)), ()))
    return {task.env_id: task for task in tasks}


TASKS = _build_tasks()


def find_task(env_id: str) -> Task:
    """The task that `--env-id` names. Exits with the nearest known names if there is none."""
    if env_id in TASKS:
        return TASKS[env_id]
    nearest = difflib.get_close_matches(env_id.lower(), TASKS, n=3, cutoff=0.3) or ["pointmaze-umaze"]
    raise SystemExit(
        f"Unknown --env-id {env_id!r}: the nearest known ones are {', '.join(nearest)}, and `python -m "
        "common.harness.tasks` lists all; any Minari dataset can be used with --dataset-id, for example --dataset-id "
        "D4RL/pen/expert-v2, and OGBench's names end in -singletask-v0."
    )


def given(args) -> set[str]:
    """The flags that were typed, or are not at their default: a preset leaves them alone, and --resume heeds them."""
    changed = {field.name for field in dataclasses.fields(args) if getattr(args, field.name) != field.default}
    return changed | getattr(args, "typed", set())


def with_domain_defaults(args, domain: Domain):
    """`args` with every field that is None set to the domain's default; IQL's reward rule for what has an expectile.

    The preset "fast" also sets the fields of `FAST` that were not given, on the toy both of `FAST_DDPM` if neither was,
    and raises adroit's rate; nothing in a resumed run, which has all its settings.
    A run shorter than the domain's evaluation interval is evaluated once, at its end. Exits if the updates are no
    multiple of that interval.
    """
    defaults = domain._asdict() | ({"reward_rule": domain.iql_reward_rule} if hasattr(args, "expectile") else {})
    if args.num_updates is not None:
        defaults["eval_every"] = min(defaults["eval_every"], max(args.num_updates, 1))
    fast = {}
    if (args.preset or domain.preset) == "fast" and not args.resume:
        is_ddpm_on_toy = domain == BANDIT and getattr(args, "sampler", None) == "ddpm"
        fast = FAST | FAST_DDPM if is_ddpm_on_toy and not FAST_DDPM.keys() & given(args) else FAST
        defaults["learning_rate"] = max(domain.learning_rate, LOCOMOTION.learning_rate)  # not 3e-5
    names = {field.name for field in dataclasses.fields(args)}
    free = {name for name in names if getattr(args, name) is None} | fast.keys() & names - given(args)
    args = dataclasses.replace(args, **{name: value for name, value in (defaults | fast).items() if name in free})
    if args.num_updates % args.eval_every:
        multiple = max(args.num_updates // args.eval_every, 1) * args.eval_every
        raise SystemExit(
            f"--num-updates {args.num_updates} must be a multiple of --eval-every {args.eval_every}, so that the run "
            f"ends with an evaluation; {multiple} is."
        )
    return args


def differences(args, domain: Domain) -> list[str]:
    """The settings of a run that are not the paper's in locomotion, each with its reason."""
    shown = []
    for name, value in dataclasses.asdict(args).items():
        of_paper, of_domain = ({getattr(of, name, None)} for of in (LOCOMOTION, domain))
        if name == "reward_rule":
            of_paper, of_domain = of_paper | {LOCOMOTION.iql_reward_rule}, of_domain | {domain.iql_reward_rule}
        is_usual = value in of_paper or value == type(args).__dataclass_fields__[name].default
        if not is_usual and name not in ("env_id", "run_dir", "resume"):  # which are printed as well
            is_fast = args.preset == "fast" and (FAST | FAST_DDPM).get(name) == value
            reason = "preset fast" if is_fast else domain.name if value in of_domain else "given"
            shown.append(f"{name} {value} ({reason})")
    return shown


def normalized_score(environment: Environment, returns: np.ndarray) -> np.ndarray:
    """D4RL's score, 100 (return - min) / (max - min); the return itself where there is no reference."""
    if environment.reference is None:
        return np.asarray(returns)
    low, high = environment.reference
    return 100 * (np.asarray(returns) - low) / (high - low)


def main() -> None:
    """Prints the table, for people: domains with their defaults, under each its tasks."""
    shown = None
    for task in TASKS.values():
        environment = task.environment
        if environment.domain != shown:
            shown = environment.domain
            values = [f"{name} {value}" for name, value in shown._asdict().items() if name != "name"]
            print(f"\n{shown.name}", *textwrap.wrap(", ".join(values), 116), sep="\n  ")
            print(f"  {'--env-id':<26}{'data':<42}{'evaluated in':<23}{'steps':<7}score 0, 100")
        first, *others = task.dataset_ids or [task.data]
        data = " + ".join([first, *(other.rpartition("/")[2] for other in others)])
        played, (low, high) = str(environment.gym_id).rpartition(":")[2], environment.reference
        print(f"  {task.env_id:<26}{data:<42}{played:<23}{environment.max_steps:<7}{low:.0f}, {high:.0f}")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
