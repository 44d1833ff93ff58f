"""One training run: its folder, its progress bar, its final table, its end and its continuation.

A run is a function of (seed, update), so a checkpoint and what was recorded until then are all that it needs to go on.

runs/<env-id>__<exp-name>__<seed>__<time>/
    args.json            all arguments, versions, git commit, statistics of the dataset
    metrics.csv          losses and the like, by update and seed
    eval.csv             every raw return of every evaluation
    tensorboard/         the same for TensorBoard
    checkpoint-*.eqx     the training state of all seeds after the updates named: the last two
    learning_curve.png   score against updates
    paths.png            mazes only: the policy's evaluation paths
    videos/              with --capture-video: of each evaluation, the first seed's first episode
"""

import contextlib
import csv
import dataclasses
import errno
import fcntl
import importlib.metadata
import itertools
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from platform import python_version

import jax
import numpy as np
import platformdirs
import tensorboardX
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from common.harness import process
from common.harness.checkpoint import (
    CheckpointError,
    newest_header,
    read_state,
    save_checkpoint,
    saved_args,
    write_atomically,
)
from common.harness.records import Behaviour, Episodes
from common.harness.tasks import GOAL_RADIUS, Task, normalized_score

try:
    CACHE = platformdirs.user_cache_path("edp", appauthor=False)
except RuntimeError:
    raise SystemExit("There is no home folder to keep data in; set HOME.") from None
PACKAGES = ("jax", "jaxlib", "equinox", "optax", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
MIN_CHUNK, MAX_CHUNK = 100, 1000  # updates between two signs of life
RAT_WINDOW = 10  # evaluations in the running average at training
MAX_BOARDS = 32  # seeds in TensorBoard, which opens three files for each; the CSV files hold all
MIN_SPACE = 2**24  # bytes that the folder's file system has left
FREE = ("num_updates", "checkpoint_every", "trust", "capture_video")  # what --resume may change


# ------------------------------------------------------------------------------------------------------- devices


def set_up_jax() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run of the same shape starts at once.

    On CPUs with AVX-512, vectors of 512 bits halved the time of Mish where it was measured (one AMD EPYC).
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache")  # of every program: a full disk
    if "xla_cpu_prefer_vector_width" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_prefer_vector_width=512"
    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise SystemExit(f"JAX cannot use the device that JAX_PLATFORMS={platforms} asks for; unset it.") from None


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
        self.args, self.task, self.behaviour, self.script = args, task, behaviour, script
        self.algorithm = Path(script).stem
        self.seeds = list(range(args.seed, args.seed + args.num_seeds))
        # one length for all chunks, compiled once: a divisor of the evaluation interval that gives signs of life
        divisors = (n for n in range(MAX_CHUNK, MIN_CHUNK, -1) if args.eval_every % n == 0)
        self.chunk = next(divisors, args.eval_every)
        self.scores: dict[int, np.ndarray] = {}  # by update, each (seeds,): means over episodes
        self.needed_space = MIN_SPACE
        self.unit = "score" if task.environment.reference else "return"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.header = {
            "algorithm": self.algorithm,
            "args": dataclasses.asdict(dataclasses.replace(args, resume=None)),
            "dataset": behaviour.statistics,
            "normalization": [behaviour.obs_mean.tolist(), behaviour.obs_std.tolist()],  # if args.normalize_obs
            "reference_returns": task.environment.reference,  # they score 0 and 100; null where there are none
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": python_version()},
            "git_commit": git_commit(),
            "device": f"{jax.devices()[0].device_kind}, {cores} core(s)",  # over which XLA shares out its sums
            "id": secrets.token_hex(4),  # the run's, wherever its folder goes
            "update": 0,
        }
        try:
            self.folder = self._open_folder() if args.resume else self._make_folder()
            text = json.dumps(self.header | {"update": 0}, indent=2).encode()
            write_atomically(self.folder / "args.json", lambda file: file.write(text))
        except OSError as error:
            raise SystemExit(f"Cannot write to the run directory: {error}.") from None
        self.command = f"python {os.path.relpath(script)} --resume {shlex.quote(str(self.folder))}"
        self.trackers = self._start_wandb() if args.track else []
        self.videos = self.folder / "videos" if args.capture_video else None
        print(f"{self.algorithm} on {task.env_id} ({task.environment.domain.name} defaults), files in {self.folder}/")
        print(", ".join(f"{key} {value}" for key, value in dataclasses.asdict(args).items()), flush=True)

    def _make_folder(self) -> Path:
        """An empty folder, which only one of several runs that want it gets."""
        name = f"{self.task.env_id}__{self.args.exp_name}__{self.args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        suffixes = itertools.chain([""], (f"-{i}" for i in itertools.count(1)))
        given = None if self.args.run_dir is None else Path(self.args.run_dir).expanduser()
        for folder in (given or Path("runs") / f"{name}{suffix}" for suffix in suffixes):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True, exist_ok=given is not None)
                self._lock(folder)
                if all(path.suffix == ".tmp" for path in folder.iterdir()):
                    return folder
                os.close(self.lock)
            if given is not None:
                help_text = f"go on with its run by --resume {given}, or " if (given / "args.json").exists() else ""
                raise SystemExit(f"The run directory {given} is not empty: {help_text}choose another --run-dir.")

    def _open_folder(self) -> Path:
        """The folder of --resume, if its run is the one that these data and this version would have made so far."""
        folder = Path(self.args.resume).expanduser()
        self._lock(folder)
        self.checkpoint = old, _ = newest_header(folder)
        data = {name: (old["dataset"].get(name), value) for name, value in self.header["dataset"].items()}
        changed = [f"{name} {was}, now {now}" for name, (was, now) in data.items() if was != now]
        if changed:
            raise SystemExit(f"The data have changed since the run in {folder}/ began: {', '.join(changed)}.")
        for name in ("versions", "device", "git_commit"):
            if old.get(name) != self.header[name]:
                print(f"Note: {name} differ from those that the run began with; its numbers may, too.")
        self.header |= {"id": old.get("id"), "update": old["update"]}
        return folder

    def _lock(self, folder: Path) -> None:
        """Until this process ends."""
        self.lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"Another process is at work in {folder}/.") from None

    def _start_wandb(self) -> list:
        """For each seed a run of Weights & Biases, in a group; --resume goes on with the same ones."""
        group, project, runs = self.folder.name, os.environ.get("WANDB_PROJECT", "edp"), []
        settings = {"project": project, "group": group, "resume": "allow", "reinit": "create_new"}
        config = {"algorithm": self.algorithm} | dataclasses.asdict(self.args)
        try:
            import wandb

            for seed in self.seeds:
                of_seed = {"name": f"{group}__seed_{seed}", "id": f"{self.header['id']}-{seed}"}
                runs.append(wandb.init(**settings, **of_seed, config=config | {"seed": seed}))
                runs[-1].define_metric("*", step_metric="update")
        except ImportError:
            raise SystemExit("--track logs to Weights & Biases: `pip install wandb` first, or leave it out.") from None
        except wandb.Error as error:
            raise SystemExit(f"Weights & Biases cannot be used: {str(error).rstrip('.')}.") from None
        return runs

    def __enter__(self):
        update = self.header["update"]
        rows = {name: _read_rows(self.folder / f"{name}.csv", update) for name in ("metrics", "eval")}
        num = len(self.seeds) * self.args.eval_episodes
        for shown, group in itertools.groupby(rows["eval"][1:], key=lambda row: int(row[0])):
            returns = [float(row[3]) for row in group]
            if len(returns) == num:
                returns = np.reshape(returns, (len(self.seeds), -1))
                self.scores[shown] = normalized_score(self.task.environment, returns).mean(axis=1)
        if lost := max(update - 1, 0) // self.args.eval_every - len(self.scores.keys() - {update}):
            print(f"Note: {self.folder}/eval.csv has lost {lost} evaluation(s).")
        process.waiting = not self.evaluation_due(update)
        rows["eval"] = rows["eval"][: 1 + num * len(self.scores)] or [["update", "seed", "episode", "return", "length"]]
        self.files, self.boards, total = {}, [], self.args.num_updates
        with self._writing():
            for left in self.folder.glob("*.tmp"):
                left.unlink()
            for name, table in rows.items():
                lines = [(",".join(row) + "\n").encode() for row in table]
                write_atomically(self.folder / f"{name}.csv", lambda file: file.writelines(lines))
                self.files[name] = (self.folder / f"{name}.csv").open("a", newline="")
            for seed in self.seeds[:MAX_BOARDS]:
                board = self.folder / "tensorboard" / f"seed_{seed}"
                self.boards.append(tensorboardX.SummaryWriter(str(board), purge_step=update + 1))
        self.bar = tqdm(total=total, initial=update, unit="update", smoothing=0.1, dynamic_ncols=True)
        self.saved_at = time.monotonic()
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        process.waiting = False
        self.bar.close()
        for stream in (*self.files.values(), *self.boards):
            with contextlib.suppress(OSError):
                stream.close()
        if self.scores:
            results = ", ".join(f"{name} {values.mean():.1f}" for name, values in self.results().items())
            title = f"{self.algorithm} on {self.task.env_id}: {results}"
            scores, score = np.array(list(self.scores.values())), self.behaviour.statistics["behaviour_score"]
            curve = self.folder / "learning_curve.png"
            _draw("learning_curve", list(self.scores), scores, self.seeds, score, title, self.unit, curve)
        for tracker in self.trackers:
            tracker.finish()
        os.close(self.lock)
        if isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|Out of memory", str(error)):
            raise SystemExit("There is not enough memory: lower --batch-size or --num-seeds.") from None
        if error is not None and not isinstance(getattr(error, "code", None), str):  # which says all
            print(f"Stopped after update {self.header['update']}. To go on: {self.command}", file=sys.stderr)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Exits if the folder cannot be written to; looks for space first, while all that was written is whole."""
        try:
            if shutil.disk_usage(self.folder).free < self.needed_space:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield
        except OSError as error:
            raise SystemExit(
                f"Cannot write to {self.folder}/: {error.strerror}. All that was saved, up to update "
                f"{self.header['update']}, is good. To go on from there: {self.command}"
            ) from None

    def restore(self, state):
        """(state, update) to go on from: of --resume's checkpoint, or `state` and 0."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if 2 * size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):  # and once more while it is saved
            raise MemoryError
        self.needed_space += 2 * size  # one checkpoint whole, one being written
        with self._writing():
            pass
        if self.header["update"]:
            try:
                state = to_devices(read_state(*self.checkpoint, state), over_seeds=True)
            except CheckpointError as error:
                raise SystemExit(f"The checkpoint in {self.folder}/ cannot be used: {error}.") from None
        return state, self.header["update"]

    def save(self, update: int, state) -> None:
        """Saves before an evaluation, every --checkpoint-every minutes, and when a signal waits; then leaves."""
        before_evaluation = update % self.args.eval_every == 0
        if before_evaluation or process.received or time.monotonic() > self.saved_at + 60 * self.args.checkpoint_every:
            try:
                with self._writing():
                    for file in self.files.values():
                        os.fsync(file.fileno())  # a checkpoint says that all rows until then are there
                    save_checkpoint(self.folder, state, self.header | {"update": update})
            except CheckpointError as error:
                raise SystemExit(f"Training diverged: after update {update} {error}.") from None
            self.header["update"], self.saved_at = update, time.monotonic()
            process.waiting = False
            if process.received:
                sys.exit(128 + process.received[0])
            process.waiting = not before_evaluation

    def evaluation_due(self, update: int) -> bool:
        return update > 0 and update % self.args.eval_every == 0 and update not in self.scores

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
        self.bar.update(update - self.bar.n)
        rate = self.bar.format_dict["rate"] or update / max(self.bar.format_dict["elapsed"], 1e-9)
        heading = [["update", "seed", "updates_per_second", *means]] if self.files["metrics"].tell() == 0 else []
        rows = zip(self.seeds, zip(*means.values()))
        rows = [[update, seed, f"{rate:.4g}", *(f"{mean:.6g}" for mean in of_seed)] for seed, of_seed in rows]
        scalars = {f"train/{name}": mean for name, mean in means.items()}
        scalars["charts/updates_per_second"] = np.full(len(self.seeds), rate)
        self._write("metrics", heading + rows, update, scalars)
        shown = {name: f"{mean.mean():.3g}" for name, mean in means.items() if name.endswith("loss")}
        if self.scores:
            shown["score"] = f"{self.results()['last'].mean():.1f}"
        self.bar.set_postfix(shown)

    def log_evaluation(self, update: int, episodes: Episodes) -> None:
        """Records every raw return."""
        returns, lengths, paths, maze = episodes
        self.scores[update] = normalized_score(self.task.environment, returns).mean(axis=1)
        rows = [[update, self.seeds[i], j, float(value), lengths[i, j]] for (i, j), value in np.ndenumerate(returns)]
        values = {"score": self.scores[update], "return": returns.mean(axis=1), "length": lengths.mean(axis=1)}
        self._write("eval", rows, update, {f"eval/{name}": value for name, value in values.items()})
        self.bar.write(
            f"update {update}: score {mean_and_deviation(values['score'])} (behaviour "
            f"{self.behaviour.statistics['behaviour_score']:.1f}), return {mean_and_deviation(values['return'])}"
        )
        if maze is not None:
            cells, file = self.task.environment.cells, self.folder / "paths.png"
            _draw("maze_paths", maze, cells, GOAL_RADIUS, self.behaviour.paths, paths, file)
        process.waiting = True

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

    def _write(self, table: str, rows: list, update: int, scalars: dict[str, Float[np.ndarray, " seeds"]]) -> None:
        """Rows to a CSV file, scalars to TensorBoard and trackers."""
        with self._writing():
            csv.writer(self.files[table], lineterminator="\n").writerows(rows)
            self.files[table].flush()
            for name, of_seeds in scalars.items():
                for board, value in zip(self.boards, of_seeds):
                    board.add_scalar(name, float(value), update)
        for i, tracker in enumerate(self.trackers):
            tracker.log({"update": update} | {name: float(of_seeds[i]) for name, of_seeds in scalars.items()})


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


def _read_rows(file: Path, last: int) -> list[list[str]]:
    """The heading and the rows of updates up to `last`, as far as they are whole; none of a file that is not there."""
    rows = []
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text(errors="replace").split("\n")[:-1]:
            row = line.split(",")
            if rows and (len([*map(float, row)]) != len(rows[0]) or int(row[0]) > last):
                break
            rows.append(row)
    return rows


def _draw(picture: str, *args) -> None:
    """Draws one of `plots`; a run does not end because it could not be drawn."""
    try:
        from common.harness import plots  # not at start-up, which Matplotlib would slow down

        getattr(plots, picture)(*args)
    except Exception as error:
        print(f"({args[-1]} could not be drawn: {error}.)")


def resumed(args):
    """`args`, or those of the run that --resume names; `FREE` flags may be given anew. Exits if others are."""
    if args.resume is None:
        return args
    try:
        saved = saved_args(newest_header(Path(args.resume).expanduser())[0], type(args))
    except (OSError, CheckpointError) as error:
        raise SystemExit(f"Cannot resume {args.resume}: {error}.") from None
    fields = dataclasses.fields(args)
    given = {f.name: value for f in fields if (value := getattr(args, f.name)) not in (f.default, None)}
    for name in given.keys() - {"resume", *FREE}:
        if given[name] != getattr(saved, name):
            raise SystemExit(
                f"--resume goes on with the settings of its run, in which {name} is {getattr(saved, name)}; only "
                f"{' and '.join('--' + free.replace('_', '-') for free in FREE)} can be given with it."
            )
    longer = given.get("num_updates", saved.num_updates) - saved.num_updates
    if longer < 0:
        raise SystemExit(f"The run in {args.resume} has {saved.num_updates} updates; --num-updates can only be larger.")
    if longer and saved.lr_decay:
        print("Note: with --lr-decay the learning rate now falls to 0 at the new end; it rises until then.")
    return dataclasses.replace(saved, **{"trust": ""} | given)  # whom to trust is not for a file to say
