"""One training run: its folder, what keeps it to itself, its end and its continuation.

A run is a function of (seed, update), so a checkpoint and what was recorded until then are all that it needs to go on.

runs/<env-id>__<exp-name>__<seed>__<time>/
    args.json            all arguments, versions, JAX's settings, git commit, statistics of the dataset
    metrics.csv          losses and the like, by update and seed
    eval.csv             every raw return of every evaluation
    tensorboard/         the same for TensorBoard
    checkpoint-*.eqx     the training state of all seeds after the updates named: the last two
    learning_curve.png   score against updates
    paths.png            mazes only: the policy's evaluation paths
    videos/              with --capture-video: of each evaluation, the first seed's first episode
"""

import contextlib
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
from collections.abc import Callable, Iterator
from pathlib import Path
from platform import python_version
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from common.harness import offline, process
from common.harness.checkpoint import (
    CheckpointError,
    checkpoints,
    newest_header,
    read_state,
    save_checkpoint,
    saved_args,
    write_atomically,
)
from common.harness.devices import episode_keys, jax_settings, seed_keys, set_up_jax, to_devices
from common.harness.environments import Evaluator
from common.harness.recorder import Recorder, import_wandb
from common.harness.records import Behaviour
from common.harness.tasks import Task, differences, given

PACKAGES = ("jax", "jaxlib", "equinox", "optax", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
MIN_CHUNK, MAX_CHUNK = 100, 1000  # updates between two signs of life, and between two rows of metrics
MIN_SPACE = 2**24  # bytes that the folder's file system has left
FREE = ("num_updates", "checkpoint_every", "dataset_path", "trust", "capture_video")  # what --resume may change


class Run:
    """The record of one run; a context manager that leaves a readable folder however the run ends."""

    to_devices = staticmethod(to_devices)

    def __init__(self, script: str, args, task: Task, behaviour: Behaviour, act: Callable[..., Array]):
        self.args, self.act, algorithm = args, act, Path(script).stem
        wandb = import_wandb(args.num_seeds) if args.track else None  # before there is a folder
        seeds = list(range(args.seed, args.seed + args.num_seeds))
        self.init_keys, self.train_keys, self.act_keys = seed_keys(seeds, 3)
        # one length for all chunks, compiled once: a divisor of what is a row, itself one of the evaluation interval
        self.row = next((n for n in range(MAX_CHUNK, MIN_CHUNK, -1) if args.eval_every % n == 0), args.eval_every)
        self.chunk = next((n for n in range(MIN_CHUNK, self.row) if self.row % n == 0), self.row)
        self.chunks, self.eval_untrained = [], task.environment.domain.eval_untrained
        self.mean, self.std = behaviour.obs_mean, behaviour.obs_std
        if behaviour.held_back:
            self.held = offline.held_back_states(*behaviour.held_back, getattr(args, "gamma", 1.0))
        self.needed_space = MIN_SPACE
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.header = {
            "algorithm": algorithm,
            "args": dataclasses.asdict(dataclasses.replace(args, resume=None)),
            "dataset": behaviour.statistics,
            "normalization": [behaviour.obs_mean.tolist(), behaviour.obs_std.tolist()],  # mean, std
            "reference_returns": task.environment.reference,  # they score 0 and 100; null where there are none
            "versions": versions(),
            "jax_settings": jax_settings(),
            "git_commit": git_commit(),
            "device": f"{jax.devices()[0].device_kind}, {cores} core(s)",  # over which XLA shares out its sums
            "id": secrets.token_hex(4),  # the run's, wherever its folder goes
            "continued": [],  # by --resume: after which update, and what was not as in the beginning
            "update": 0,
        }
        try:
            self.folder = self._open_folder() if args.resume else self._make_folder(task.env_id)
            text = json.dumps(self.header | {"update": 0}, indent=2).encode()
            write_atomically(self.folder / "args.json", lambda file: file.write(text))
        except OSError as error:
            raise SystemExit(f"Cannot write to the run directory: {error}.") from None
        trust = ["--trust", args.trust] * bool(args.trust)
        self.command = shlex.join(["python", os.path.relpath(script), "--resume", str(self.folder), *trust])
        self.recorder = Recorder(self.folder, algorithm, args, task, behaviour)
        if wandb:
            try:
                self.recorder.start_wandb(wandb, self.header["id"])
            except SystemExit:
                if not args.resume:
                    shutil.rmtree(self.folder, ignore_errors=True)  # there is no run in it
                raise
        videos = self.folder / "videos" if args.capture_video else None
        self.evaluator = Evaluator(task.environment, seeds, args.eval_episodes, videos)
        print(f"{algorithm} on {task.env_id} ({task.environment.domain.name} defaults), files in {self.folder}/")
        changed = ", ".join(differences(args, task.environment.domain)) or "nothing"
        print(f"Not as in the paper: {changed}; all: args.json", flush=True)

    # ---------------------------------------------------------------------------------------------- the folder

    def _make_folder(self, env_id: str) -> Path:
        """An empty folder, which only one of several runs that want it gets; its first file says that it is a run's."""
        name = f"{env_id}__{self.args.exp_name}__{self.args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        if Path(name).name != name or not name.isprintable():
            raise SystemExit(f"--exp-name {self.args.exp_name!r} must be a part of a folder's name.")
        suffixes = itertools.chain([""], (f"-{i}" for i in itertools.count(1)))
        chosen = None if self.args.run_dir is None else Path(self.args.run_dir).expanduser()
        for folder in (chosen or Path("runs") / f"{name}{suffix}" for suffix in suffixes):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True, exist_ok=chosen is not None)
                self._lock(folder)
                if all(path.suffix == ".tmp" for path in folder.iterdir()):
                    save_checkpoint(folder, (), self.header)
                    return folder
                os.close(self.lock)
            if chosen is not None:
                help_text = f"go on with its run by --resume {chosen}, or " if checkpoints(chosen) else ""
                raise SystemExit(f"The run directory {chosen} is not empty: {help_text}choose another --run-dir.")

    def _open_folder(self) -> Path:
        """The folder of --resume, if its run is the one that these data and this version would have made so far."""
        folder = Path(self.args.resume).expanduser()
        self._lock(folder)
        self.checkpoint = old, _ = newest_header(folder)
        was, data = (header["dataset"] | {"dataset": ""} for header in (old, self.header))  # a file may move
        changed = [f"{name} {was.get(name)}, now {value}" for name, value in data.items() if was.get(name) != value]
        if changed:
            raise SystemExit(f"The data have changed since the run in {folder}/ began: {', '.join(changed)}.")
        about = "versions", "jax_settings", "device", "git_commit"
        now = {name: self.header[name] for name in about if old.get(name) != self.header[name]}
        for name in now:
            print(f"Note: {name} differ from those that the run began with; its numbers may, too.")
        if old["args"]["num_updates"] != self.args.num_updates:
            now["num_updates"] = self.args.num_updates
        self.header |= {name: old[name] for name in (*about, "id", "update") if name in old}
        before = old.get("continued", [])
        self.header["continued"] = before + [{"update": old["update"]} | now] * bool(before or now)
        self.chunks = old.get("chunks", [])
        return folder

    def _lock(self, folder: Path) -> None:
        """Until this process ends."""
        self.lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"Another process is at work in {folder}/.") from None
        except OSError as error:  # of some network file systems
            print(f"Note: {folder}/ cannot be locked ({error.strerror}): see that no other run goes on in it.")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Exits if the folder cannot be written to; looks for space first, while all that was written is whole."""
        try:
            if not os.path.samestat(os.stat(self.folder), os.fstat(self.lock)):
                raise OSError(errno.ENOENT, "it was moved, and another folder is in its place")
            if shutil.disk_usage(self.folder).free < self.needed_space:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield
        except OSError as error:
            raise SystemExit(
                f"Cannot write to {self.folder}/: {error.strerror}. All that was saved, up to update "
                f"{self.header['update']}, is good. To go on from there: {self.command}"
            ) from None

    # ---------------------------------------------------------------------------------------------- from begin to end

    def __enter__(self):
        process.waiting = True
        with self._writing():
            self.recorder.open(self.header["update"])
        self.recorder.start_bar(self.header["update"])
        process.waiting = not self._evaluation_due(self.header["update"])
        self.saved_at = time.monotonic()
        return self

    def restore(self, state):
        """(state, update) to go on from, on all devices: of --resume's checkpoint, or `state` and 0."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if 2 * size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):  # and once more while it is saved
            raise MemoryError
        self.needed_space += 2 * size  # one checkpoint whole, one being written
        with self._writing():
            pass
        if self.header["update"]:
            try:
                state = read_state(*self.checkpoint, state)
            except CheckpointError as error:
                raise SystemExit(f"The checkpoint in {self.folder}/ cannot be used: {error}.") from None
            del self.checkpoint  # a whole one in memory
        return to_devices(state, over_seeds=True), self.header["update"]

    def save(self, update: int, state, metrics: dict[str, Float[Array, "updates seeds"]]) -> None:
        """Takes a chunk; records those that make a row. Then saves if an evaluation is next, --checkpoint-every minutes
        have passed, or a signal waits.
        """
        metrics = {name: np.asarray(value) for name, value in metrics.items()}
        self.recorder.check(update, metrics)
        self.chunks.append({name: value.mean(axis=0, dtype=np.float64).tolist() for name, value in metrics.items()})
        self.recorder.show(update)
        before_evaluation = update % self.args.eval_every == 0
        if update % self.row == 0:
            means = {name: np.mean([of[name] for of in self.chunks], axis=0) for name in metrics}
            found = {} if self.args.eval_episodes else self._diagnostics(update, state, before_evaluation)
            with self._writing():
                self.recorder.metrics(update, means, found)
            self.chunks = []
        if before_evaluation or process.received or time.monotonic() > self.saved_at + 60 * self.args.checkpoint_every:
            try:
                with self._writing():
                    self.recorder.sync()  # a checkpoint says that all rows until then are there
                    save_checkpoint(self.folder, state, self.header | {"update": update, "chunks": self.chunks})
            except CheckpointError as error:
                raise SystemExit(f"Training diverged: after update {update} {error}.") from None
            self.header["update"], self.saved_at = update, time.monotonic()
            process.waiting = False
            if process.received:
                sys.exit(128 + process.received[0])
            process.waiting = not self._evaluation_due(update)

    def _diagnostics(self, update: int, state, are_due: bool) -> dict[str, Float[np.ndarray, " seeds"]]:
        """Of a run without evaluations; not a number where they are not due."""
        if not are_due:
            return dict.fromkeys(offline.columns(state), np.full(self.args.num_seeds, np.nan))
        act = lambda obs, keys: self.act(state, obs, keys, 0, self.args)
        keys = episode_keys(self.act_keys, update, (offline.NUM_SAMPLES, len(self.held.obs)))
        return offline.diagnose(state, act, self.held, keys)

    def _evaluation_due(self, update: int) -> bool:
        is_time = update % self.args.eval_every == 0 and (update > 0 or self.eval_untrained)
        return is_time and self.args.eval_episodes > 0 and update not in self.recorder.scores

    def evaluate(self, update: int, state) -> None:
        """Plays and records the evaluation that is due after an update, if one is."""
        if self._evaluation_due(update):
            if process.received:  # before training began
                sys.exit(128 + process.received[0])

            def policy(obs, keys, step):
                self.recorder.show(update, f"evaluating, step {step}")
                return self.act(state, (obs - self.mean) / self.std, keys, step, self.args)

            keys = episode_keys(self.act_keys, update, self.args.eval_episodes)
            episodes = self.evaluator(policy, keys, update)
            with self._writing():
                self.recorder.evaluation(update, episodes)
            process.waiting = True

    def finish(self) -> dict[str, np.ndarray]:
        """Prints the final table; returns the last score, OMS and RAT, or the last diagnostics, of each seed."""
        self.recorder.print_table()
        return self.recorder.results()

    def __exit__(self, error_type, error, traceback) -> None:
        process.waiting = False
        self.recorder.close()
        os.close(self.lock)
        if isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|Out of memory", str(error)):
            text, update = "There is not enough memory: lower --batch-size or --num-seeds.", self.header["update"]
            saved = f" Or go on after update {update} where there is more: {self.command}" if update else ""
            raise SystemExit(text + saved) from None
        if error is not None and not isinstance(getattr(error, "code", None), str):  # which says all
            print(f"Stopped after update {self.header['update']}. To go on: {self.command}", file=sys.stderr)


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": python_version()}


def git_commit() -> str | None:
    """Of this repository, with "-dirty" if files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------------------------------------- runs of before


def resumed(args):
    """`args`, or those of the run that --resume names; `FREE` flags may be given anew. Exits if others are."""
    if args.resume is None:
        return args
    try:
        header, _ = newest_header(Path(args.resume).expanduser())
        if "kept" in header:
            raise CheckpointError("it holds what acts, not what training needs; benchmarks/acting.py plays it")
        saved = saved_args(header, type(args))
    except CheckpointError as error:
        raise SystemExit(f"Cannot resume {args.resume}: {error}.") from None
    now = {name: value for name in given(args) if (value := getattr(args, name)) is not None}
    for name in now.keys() - {"resume", *FREE}:
        if now[name] != getattr(saved, name):
            raise SystemExit(
                f"--resume goes on with the settings of its run, in which {name} is {getattr(saved, name)}; only "
                f"{', '.join('--' + free.replace('_', '-') for free in FREE)} can be given with it."
            )
    longer = now.get("num_updates", saved.num_updates) - saved.num_updates
    if longer < 0:
        raise SystemExit(f"The run in {args.resume} has {saved.num_updates} updates; --num-updates can only be larger.")
    if longer and saved.lr_decay:
        print("Note: with --lr-decay the learning rate now falls to 0 at the new end; it rises until then.")
    return dataclasses.replace(saved, **{"trust": ""} | now)  # whom to trust is not for a file to say


def load_run(folder: Path | str, algorithm: ModuleType) -> tuple[Any, Any, dict]:
    """(args, state, header) of a run of `algorithm`, a module of algorithms/, at its newest checkpoint.

    Sets up JAX as a run does, so that its policy draws the same. `algorithm.act` takes (obs - mean) / std, with
    (mean, std) = header["normalization"]. Raises CheckpointError if there is none that is whole and of this algorithm
    in this version.
    """
    set_up_jax()
    header, stream = newest_header(Path(folder))
    args = saved_args(header, algorithm.Args)
    dims = header["dataset"]["observation_dim"], header["dataset"]["action_dim"]
    init = jax.vmap(lambda seed: algorithm.init_state(jax.random.key(seed), *dims, args))
    like = jax.eval_shape(init, jax.ShapeDtypeStruct((args.num_seeds,), np.uint32))
    if kept := header.get("kept"):  # what acts, in half precision: policies/
        like = like._replace(**dict.fromkeys({*like._fields} - {*kept}))
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float16), like)
    try:
        state = read_state(header, stream, like)
        return args, jax.tree.map(lambda leaf: leaf.astype(np.float32), state) if kept else state, header
    except CheckpointError as error:
        raise CheckpointError(f"The checkpoint in {folder}/ cannot be used: {error}") from None
