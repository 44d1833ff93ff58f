"""One training run: its checks, its folder, its progress bar, its final table.

runs/<env-id>__<algorithm>__<seed>__<time>/
    args.json            all arguments, versions, git commit, statistics of the dataset
    metrics.csv          losses and the like, by update and seed
    eval.csv             every raw return of every evaluation
    tensorboard/         the same for TensorBoard
    checkpoint.eqx       the training state of all seeds at the last evaluation
    learning_curve.png   score against updates
    paths.png            mazes only: the policy's evaluation paths
"""

import csv
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
import tensorboardX
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from common import pointmaze
from common.data import CACHE, DatasetInfo
from common.devices import split_seeds
from common.diffusion import make_schedule
from common.dpm_solver import solver_orders
from common.evaluation import Episodes
from common.tasks import Task, describe_tasks, normalized_score

PACKAGES = ("jax", "jaxlib", "equinox", "optax", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
MIN_CHUNK, MAX_CHUNK = 100, 1000  # updates between two signs of life
NONNEGATIVE = (
    "seed",
    "eta",
    "alpha",
    "init_noise_scale",
    "policy_temperature",
    "policy_noise",
    "noise_clip",
    "eval_noise",
)
RAT_WINDOW = 10  # evaluations in the running average at training


def setup(args) -> None:
    """Checks the arguments, exits with one sentence if one is impossible, and sets JAX up.

    Compiled programs are kept in the user's cache folder, so that a second run of the same shape starts at once. On
    CPUs with AVX-512, vectors of 512 bits halved the time of Mish where it was measured (one AMD EPYC).
    """
    if args.list_envs:
        try:
            print(describe_tasks(), flush=True)
        except BrokenPipeError:  # of `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit
    for field in dataclasses.fields(args):
        _check_value(field.name, getattr(args, field.name))
    if args.seed + args.num_seeds > 2**31:
        raise SystemExit(f"--seed must be below 2^31, but is {args.seed}.")
    try:
        if hasattr(args, "num_diffusion_steps"):
            make_schedule(args.beta_schedule, args.num_diffusion_steps)
        if getattr(args, "sampler", "ddpm") == "dpm":
            solver_orders(args.num_solver_calls, args.solver_order)
    except ValueError as error:
        raise SystemExit(f"Impossible diffusion: {error}.") from None

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if "xla_cpu_prefer_vector_width" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_prefer_vector_width=512"


def _check_value(name: str, value) -> None:
    flag = "--" + name.replace("_", "-")
    if name == "run_dir" and value is not None and Path(value).is_dir() and any(Path(value).iterdir()):
        raise SystemExit(f"The run directory {value} is not empty; choose another {flag}.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if name in ("gamma", "tau", "expectile"):
        allowed, condition = "between 0 and 1", 0 <= value <= 1
    elif name == "top_fraction":
        allowed, condition = "above 0 and at most 1", 0 < value <= 1
    elif name in NONNEGATIVE:
        allowed, condition = "0 or more", 0 <= value < np.inf
    else:
        allowed, condition = "positive", 0 < value < np.inf
    if not condition:
        raise SystemExit(f"{flag} must be {allowed}, but is {value}.")


def init_seeds(init: Callable, keys: jax.Array):
    """`init` of every seed's key. Compiled without optimisation, in half the time: it runs once, for milliseconds."""
    return jax.jit(jax.vmap(init), compiler_options={"xla_backend_optimization_level": 0})(keys)


def seed_keys(seeds: list[int], num: int) -> tuple[jax.Array, ...]:
    """`num` independent keys for every seed, each (seeds,)."""
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), num))(np.array(seeds))
    return tuple(keys[:, i] for i in range(num))


class Run:
    """The record of one run; a context manager that leaves a readable folder however the run ends."""

    def __init__(self, script: str, args, task: Task, info: DatasetInfo):
        self.args, self.task, self.info, self.algorithm = args, task, info, Path(script).stem
        self.seeds = list(range(args.seed, args.seed + args.num_seeds))
        name = f"{task.env_id}__{self.algorithm}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.run_dir or Path("runs") / name)
        try:
            self.folder.mkdir(parents=True, exist_ok=args.run_dir is not None)
            (self.folder / "args.json").touch()
        except FileExistsError:
            raise SystemExit(f"{self.folder} exists; choose another --run-dir.") from None
        except OSError as error:
            raise SystemExit(f"Cannot write to the run directory {self.folder}: {error.strerror}.") from None
        # one length for all chunks, compiled once: a divisor of the evaluation interval that gives signs of life
        divisors = (n for n in range(MAX_CHUNK, MIN_CHUNK, -1) if args.eval_every % n == 0)
        self.chunk = next(divisors, args.eval_every)
        self.evaluated_at: list[int] = []
        self.scores: list[np.ndarray] = []  # by evaluation, each (seeds,): mean scores
        self.tracker = _start_wandb(name, args) if args.track else None
        self.header = {
            "algorithm": self.algorithm,
            "args": dataclasses.asdict(args),
            "dataset": info.statistics,
            "reference_returns": task.environment.reference,  # they score 0 and 100; null where there are none
            "versions": {"python": platform.python_version()}
            | {package: importlib.metadata.version(package) for package in PACKAGES},
            "git_commit": git_commit(),
            "device": jax.devices()[0].device_kind,
        }
        (self.folder / "args.json").write_text(json.dumps(self.header, indent=2))
        print(f"{self.algorithm} on {task.env_id} ({task.environment.domain.name} defaults), files in {self.folder}/")
        print(", ".join(f"{key} {value}" for key, value in dataclasses.asdict(args).items()), flush=True)

    def __enter__(self):
        paths = {name: self.folder / f"{name}.csv" for name in ("metrics", "eval")}
        self.files = {name: path.open("w", newline="") for name, path in paths.items()}
        self.csv = {name: csv.writer(file) for name, file in self.files.items()}
        self.csv["eval"].writerow(["update", "seed", "episode", "return", "length"])
        boards = [self.folder / "tensorboard" / f"seed_{seed}" for seed in self.seeds]
        self.boards = [tensorboardX.SummaryWriter(str(board)) for board in boards]
        self.bar = tqdm(total=self.args.num_updates, unit="update", smoothing=0.1, dynamic_ncols=True)
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        self.bar.close()
        for stream in (*self.files.values(), *self.boards):
            stream.close()
        if self.scores:
            self._draw_learning_curve()
        if self.tracker is not None:
            self.tracker.finish()
        if error_type is KeyboardInterrupt:
            raise SystemExit(f"Stopped; everything up to the last evaluation is in {self.folder}/.") from None

    def keys(self, num: int) -> tuple[jax.Array, ...]:
        """`num` independent keys for every seed, each (seeds,) and split over the devices."""
        return split_seeds(seed_keys(self.seeds, num))

    def log_metrics(self, update: int, metrics: dict[str, jax.Array]) -> None:
        """Records a chunk's metrics, each (updates, seeds), by their means. Exits if one is not finite."""
        metrics = {name: np.asarray(value) for name, value in metrics.items()}
        for name, value in metrics.items():
            if not np.isfinite(value).all():
                step, seed = np.argwhere(~np.isfinite(value))[0]
                raise SystemExit(
                    f"Training diverged: {name} is {value[step, seed]} at update {update - len(value) + step + 1} of "
                    f"seed {self.seeds[seed]}; a lower --learning-rate or --max-grad-norm may help. "
                    f"Everything until then is in {self.folder}/."
                )
        means = {name: value.mean(axis=0, dtype=np.float64) for name, value in metrics.items()}
        if self.files["metrics"].tell() == 0:
            self.csv["metrics"].writerow(["update", "seed", "updates_per_second", *means])
        self.bar.update(update - self.bar.n)
        rate = self.bar.format_dict["rate"] or update / max(self.bar.format_dict["elapsed"], 1e-9)
        for i, seed in enumerate(self.seeds):
            values = {name: float(mean[i]) for name, mean in means.items()}
            self.csv["metrics"].writerow([update, seed, f"{rate:.4g}", *(f"{value:.6g}" for value in values.values())])
            self._scalars(i, {f"train/{name}": value for name, value in values.items()}, update)
        self.files["metrics"].flush()
        shown = {name: f"{mean.mean():.3g}" for name, mean in means.items() if name.endswith("loss")}
        if self.scores:
            shown["score"] = f"{self.scores[-1].mean():.1f}"
        self.bar.set_postfix(shown)

    def log_evaluation(self, update: int, episodes: Episodes, state) -> None:
        """Records every raw return, and saves the training state."""
        scores = normalized_score(self.task.environment, episodes.returns).mean(axis=1)
        self.evaluated_at.append(update)
        self.scores.append(scores)
        for (i, j), value in np.ndenumerate(episodes.returns):
            self.csv["eval"].writerow([update, self.seeds[i], j, repr(float(value)), episodes.lengths[i, j]])
        self.files["eval"].flush()
        for i in range(len(self.seeds)):
            values = {"eval/score": scores[i], "eval/return": episodes.returns[i].mean()}
            self._scalars(i, values | {"eval/length": episodes.lengths[i].mean()}, update)
        self.bar.write(
            f"update {update}: score {mean_and_deviation(scores)} (behaviour {self.info.behaviour_score:.1f}), "
            f"return {mean_and_deviation(episodes.returns.mean(axis=1))}"
        )
        save_checkpoint(self.folder / "checkpoint.eqx", state, {**self.header, "update": update})
        environment = self.task.environment
        if environment.cells is not None:
            paths = [obs[:, :2] for obs in episodes.observations]
            file = self.folder / "paths.png"
            pointmaze.draw_paths(environment.gym_id, environment.cells, self.info.positions, paths, file)

    def finish(self) -> dict[str, np.ndarray]:
        """Prints the final table; returns the last score, OMS and RAT of every seed."""
        scores = np.array(self.scores)
        results = {"last": scores[-1], "OMS": scores.max(axis=0), "RAT": scores[-RAT_WINDOW:].mean(axis=0)}
        name = "score" if self.task.environment.reference else "return"
        rows = {
            f"last {name}": results["last"],
            "OMS (best evaluation)": results["OMS"],
            f"RAT (mean of the last {min(RAT_WINDOW, len(scores))})": results["RAT"],
            "behaviour": np.array([self.info.behaviour_score]),
        }
        self.bar.close()
        print(f"\n{self.algorithm} on {self.task.env_id}, {self.evaluated_at[-1]} updates, {len(self.seeds)} seed(s)")
        for label, values in rows.items():
            print(f"  {label:<28} {mean_and_deviation(values)}")
        print(f"  files                        {self.folder}/")
        return results

    def _scalars(self, index: int, values: dict[str, float], update: int) -> None:
        for name, value in values.items():
            self.boards[index].add_scalar(name, value, update)
        if self.tracker is not None:
            prefix = f"seed_{self.seeds[index]}/" if len(self.seeds) > 1 else ""
            self.tracker.log({prefix + name: value for name, value in values.items()} | {"update": update})

    def _draw_learning_curve(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        scores = np.array(self.scores)
        name = "score" if self.task.environment.reference else "return"
        figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for seed, curve in zip(self.seeds, scores.T):
            ax.plot(self.evaluated_at, curve, ".-", alpha=0.4 if len(self.seeds) > 1 else 1, label=f"seed {seed}")
        if len(self.seeds) > 1:
            ax.plot(self.evaluated_at, scores.mean(axis=1), "k.-", label="mean")
        ax.axhline(self.info.behaviour_score, color="gray", linestyle="--", label="behaviour")
        oms, rat = scores.max(axis=0).mean(), scores[-RAT_WINDOW:].mean()
        ax.set(
            xlabel="updates", ylabel=name, title=f"{self.algorithm} on {self.task.env_id}: OMS {oms:.1f}, RAT {rat:.1f}"
        )
        ax.legend(fontsize="small")
        figure.savefig(self.folder / "learning_curve.png", dpi=150)
        plt.close(figure)


def mean_and_deviation(values: np.ndarray) -> str:
    """Of the (seeds,) results: "mean +- deviation", for one seed the value alone."""
    return f"{values.mean():.1f}" + (f" +- {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def git_commit() -> str | None:
    """Of this repository, with "-dirty" if files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _start_wandb(name: str, args):
    try:
        import wandb
    except ImportError:
        raise SystemExit("--track logs to Weights & Biases: `pip install wandb` first, or leave --track out.") from None
    return wandb.init(project="edp", name=name, config=dataclasses.asdict(args))


def save_checkpoint(path: Path, state, header: dict) -> None:
    """Writes a line of JSON, then the leaves of `state`; a file at `path` is replaced only by a complete one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(json.dumps({**header, "structure": str(jax.tree.structure(state))}).encode() + b"\n")
        eqx.tree_serialise_leaves(file, state)
    os.replace(temporary, path)


def load_checkpoint(path: Path | str, like) -> tuple[dict, object]:
    """(header, state) of a checkpoint; `like` is a state of the same structure, of arrays or of their shapes.

    Raises ValueError if the structures differ: leaves are stored by position.
    """
    with open(path, "rb") as file:
        header = json.loads(file.readline())
        if header["structure"] != str(jax.tree.structure(like)):
            raise ValueError(f"{path} holds another kind of state: {header['structure']}")
        return header, eqx.tree_deserialise_leaves(file, like)


class TrainedRun(NamedTuple):
    """What a run left: its algorithm's module, its arguments, the state of all seeds, the header of its checkpoint."""

    algorithm: ModuleType
    args: Any
    state: Any
    header: dict

    @property
    def seeds(self) -> list[int]:
        return list(range(self.args.seed, self.args.seed + self.args.num_seeds))

    def act(
        self, obs: Float[ArrayLike, "seeds batch obs_dim"], keys: Key[Array, " seeds"], step, args=None
    ) -> Float[Array, "seeds batch act_dim"]:
        """Actions in [-1, 1]; `args` are the run's own if not given, `step` makes other random numbers of the keys.

        Observations must be normalised as the run's data were.
        """
        networks = [getattr(self.state, name) for name in ("policy", "critics") if hasattr(self.state, name)]
        return self.algorithm.select_action(*networks, obs, keys, step, args or self.args)


def load_run(folder: Path | str) -> TrainedRun:
    """A run from its folder, at its last evaluation.

    Raises OSError without a checkpoint; ImportError, KeyError, TypeError, ValueError or RuntimeError if it is damaged
    or was saved by an algorithm that is not here, or another version of it.
    """
    path = Path(folder) / "checkpoint.eqx"
    with open(path, "rb") as file:
        header = json.loads(file.readline())
    algorithm = importlib.import_module(f"algorithms.{header['algorithm']}")
    args = algorithm.Args(**header["args"])
    dims = header["dataset"]["observation_dim"], header["dataset"]["action_dim"]
    keys = jax.random.split(jax.random.key(0), args.num_seeds)
    like = eqx.filter_eval_shape(jax.vmap(lambda key: algorithm.init_state(key, *dims, args)), keys)
    return TrainedRun(algorithm, args, load_checkpoint(path, like)[1], header)
