"""One training run: its folder, its progress bar, its final table.

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
import importlib.metadata
import json
import os
import subprocess
import time
from pathlib import Path
from platform import python_version
from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import numpy as np
import platformdirs
import tensorboardX
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from common.harness import plots
from common.harness.records import Behaviour, Episodes
from common.harness.tasks import GOAL_RADIUS, Task, normalized_score

CACHE = platformdirs.user_cache_path("edp", appauthor=False)
PACKAGES = ("jax", "jaxlib", "equinox", "optax", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
MIN_CHUNK, MAX_CHUNK = 100, 1000  # updates between two signs of life
RAT_WINDOW = 10  # evaluations in the running average at training


# ------------------------------------------------------------------------------------------------------- devices


def set_up_jax() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run of the same shape starts at once.

    On CPUs with AVX-512, vectors of 512 bits halved the time of Mish where it was measured (one AMD EPYC).
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if "xla_cpu_prefer_vector_width" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_prefer_vector_width=512"


def to_devices(tree, over_seeds: bool = False):
    """Arrays as JAX's, on every device: copies, or, of arrays (seeds, ...), to each device its share of the seeds.

    Programs run where their arguments are. Seeds that cannot be shared out evenly are copied, too.
    """
    shared = over_seeds and jax.device_count() > 1 and len(jax.tree.leaves(tree)[0]) % jax.device_count() == 0
    mesh = Mesh(np.array(jax.devices()), ("seeds",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("seeds") if shared else PartitionSpec()))


def seed_keys(seeds: list[int], num: int) -> tuple[Key[Array, " seeds"], ...]:
    """`num` independent keys for every seed."""
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), num))(np.array(seeds))
    return tuple(keys[:, i] for i in range(num))


# -------------------------------------------------------------------------------------------------------- folder


class Run:
    """The record of one run; a context manager that leaves a readable folder however the run ends."""

    to_devices = staticmethod(to_devices)

    def __init__(self, script: str, args, task: Task, behaviour: Behaviour):
        self.args, self.task, self.behaviour, self.algorithm = args, task, behaviour, Path(script).stem
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
        self.scores: dict[int, np.ndarray] = {}  # by update, each (seeds,): means over episodes
        self.unit = "score" if task.environment.reference else "return"
        self.tracker = _start_wandb(name, args) if args.track else None
        self.header = {
            "algorithm": self.algorithm,
            "args": dataclasses.asdict(args),
            "dataset": behaviour.statistics,
            "normalization": [behaviour.obs_mean.tolist(), behaviour.obs_std.tolist()],  # if args.normalize_obs
            "reference_returns": task.environment.reference,  # they score 0 and 100; null where there are none
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": python_version()},
            "git_commit": git_commit(),
            "device": jax.devices()[0].device_kind,
        }
        (self.folder / "args.json").write_text(json.dumps(self.header, indent=2))
        print(f"{self.algorithm} on {task.env_id} ({task.environment.domain.name} defaults), files in {self.folder}/")
        print(", ".join(f"{key} {value}" for key, value in dataclasses.asdict(args).items()), flush=True)

    def __enter__(self):
        self.files = {name: (self.folder / f"{name}.csv").open("w", newline="") for name in ("metrics", "eval")}
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
            results = ", ".join(f"{name} {values.mean():.1f}" for name, values in self.results().items())
            title = f"{self.algorithm} on {self.task.env_id}: {results}"
            scores, score = np.array(list(self.scores.values())), self.behaviour.statistics["behaviour_score"]
            curve = self.folder / "learning_curve.png"
            plots.learning_curve(list(self.scores), scores, self.seeds, score, title, self.unit, curve)
        if self.tracker is not None:
            self.tracker.finish()
        if error_type is KeyboardInterrupt:
            raise SystemExit(f"Stopped; everything up to the last evaluation is in {self.folder}/.") from None

    def keys(self, num: int) -> tuple[Key[Array, " seeds"], ...]:
        """`num` independent keys for every seed, split over the devices."""
        return to_devices(seed_keys(self.seeds, num), over_seeds=True)

    def episode_keys(self, keys: Key[Array, " seeds"], update: int) -> Key[Array, "seeds episodes"]:
        """A key for every episode of the evaluation after an update."""
        split = lambda key: jax.random.split(jax.random.fold_in(key, update), self.args.eval_episodes)
        return jax.vmap(split)(keys)

    def log_metrics(self, update: int, metrics: dict[str, Float[Array, "updates seeds"]]) -> None:
        """Records a chunk's metrics by their means. Exits if one is not finite."""
        metrics = {name: np.asarray(value) for name, value in metrics.items()}
        for name, value in metrics.items():
            if not np.isfinite(value).all():
                index, seed = np.argwhere(~np.isfinite(value))[0]
                raise SystemExit(
                    f"Training diverged: {name} is {value[index, seed]} at update {update - len(value) + index + 1} of "
                    f"seed {self.seeds[seed]}; a lower --learning-rate or --max-grad-norm may help. "
                    f"Everything until then is in {self.folder}/."
                )
        means = {name: value.mean(axis=0, dtype=np.float64) for name, value in metrics.items()}
        if self.files["metrics"].tell() == 0:
            self.csv["metrics"].writerow(["update", "seed", "updates_per_second", *means])
        self.bar.update(update - self.bar.n)
        rate = self.bar.format_dict["rate"] or update / max(self.bar.format_dict["elapsed"], 1e-9)
        for i, seed in enumerate(self.seeds):
            self.csv["metrics"].writerow([update, seed, f"{rate:.4g}", *(f"{mean[i]:.6g}" for mean in means.values())])
        self._write_scalars(update, {f"train/{name}": mean for name, mean in means.items()})
        self.files["metrics"].flush()
        shown = {name: f"{mean.mean():.3g}" for name, mean in means.items() if name.endswith("loss")}
        if self.scores:
            shown["score"] = f"{self.results()['last'].mean():.1f}"
        self.bar.set_postfix(shown)

    def log_evaluation(self, update: int, episodes: Episodes, state) -> None:
        """Records every raw return, and saves the training state."""
        returns, lengths, paths, maze = episodes
        self.scores[update] = normalized_score(self.task.environment, returns).mean(axis=1)
        for (i, j), value in np.ndenumerate(returns):
            self.csv["eval"].writerow([update, self.seeds[i], j, repr(float(value)), lengths[i, j]])
        self.files["eval"].flush()
        values = {"score": self.scores[update], "return": returns.mean(axis=1), "length": lengths.mean(axis=1)}
        self._write_scalars(update, {f"eval/{name}": value for name, value in values.items()})
        self.bar.write(
            f"update {update}: score {mean_and_deviation(values['score'])} (behaviour "
            f"{self.behaviour.statistics['behaviour_score']:.1f}), return {mean_and_deviation(values['return'])}"
        )
        save_checkpoint(self.folder / "checkpoint.eqx", state, {**self.header, "update": update})
        if maze is not None:
            cells, file = self.task.environment.cells, self.folder / "paths.png"
            plots.maze_paths(maze, cells, GOAL_RADIUS, self.behaviour.paths, paths, file)

    def results(self) -> dict[str, np.ndarray]:
        """The last score, the best evaluation (OMS) and the mean of the last ten (RAT) of every seed."""
        scores = np.array(list(self.scores.values()))
        return {"last": scores[-1], "OMS": scores.max(axis=0), "RAT": scores[-RAT_WINDOW:].mean(axis=0)}

    def finish(self) -> dict[str, np.ndarray]:
        """Prints the final table; returns `results()`."""
        results, window = self.results(), min(RAT_WINDOW, len(self.scores))
        labels = f"last {self.unit}", "OMS (best evaluation)", f"RAT (mean of the last {window})"
        self.bar.close()
        print(f"\n{self.algorithm} on {self.task.env_id}, {max(self.scores)} updates, {len(self.seeds)} seed(s)")
        for label, values in zip(labels, results.values()):
            print(f"  {label:<28} {mean_and_deviation(values)}")
        print(f"  {'behaviour':<28} {self.behaviour.statistics['behaviour_score']:.1f}")
        print(f"  {'files':<28} {self.folder}/")
        return results

    def _write_scalars(self, update: int, values: dict[str, Float[np.ndarray, " seeds"]]) -> None:
        for name, of_seeds in values.items():
            for board, value in zip(self.boards, of_seeds):
                board.add_scalar(name, float(value), update)


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
    return wandb.init(project="edp", name=name, config=dataclasses.asdict(args), sync_tensorboard=True)


# ---------------------------------------------------------------------------------------------------- checkpoint


def save_checkpoint(path: Path, state, header: dict) -> None:
    """Writes a line of JSON, then the leaves of `state`; a file at `path` is replaced only by a complete one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(json.dumps({**header, "structure": str(jax.tree.structure(state))}).encode() + b"\n")
        eqx.tree_serialise_leaves(file, state)
    os.replace(temporary, path)


def load_run(folder: Path | str, algorithm: ModuleType) -> tuple[Any, Any, dict]:
    """(args, state, header) of a run of `algorithm`, a module of algorithms/, at its last evaluation.

    If args.normalize_obs, `algorithm.act` takes (obs - mean) / std with (mean, std) = header["normalization"]. Raises
    OSError without a checkpoint; KeyError, TypeError, ValueError or RuntimeError if it is damaged or was saved by
    another algorithm or another version of it.
    """
    with open(Path(folder) / "checkpoint.eqx", "rb") as file:
        header = json.loads(file.readline())
        args = algorithm.Args(**header["args"])
        dims = header["dataset"]["observation_dim"], header["dataset"]["action_dim"]
        keys = jax.random.split(jax.random.key(0), args.num_seeds)
        like = eqx.filter_eval_shape(jax.vmap(lambda key: algorithm.init_state(key, *dims, args)), keys)
        if header["structure"] != str(jax.tree.structure(like)):  # leaves are stored by position
            raise ValueError(f"it holds another kind of state: {header['structure']}")
        return args, eqx.tree_deserialise_leaves(file, like), header
