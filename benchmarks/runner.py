"""Runs, each in its own folder: started, gone on with, repeated never; by processes of this machine, or by Ray.

A job is a run of an algorithm and, after it, evaluations of its last policy with other settings of acting. While a job
is at work it holds a lock beside its folder, which its child processes inherit. So a command that is killed and started
again, a second command, or another node waits for what is still alive, and goes on from the newest checkpoint.
"""

import contextlib
import csv
import datetime
import fcntl
import json
import math
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from common.harness import devices

ROOT = Path(__file__).resolve().parents[1]
RECORDED = {"run", "update", "critics", "seed", "episode", "return", "length"}  # of acting.csv; the rest are settings
# Before the script: cores to run on, and, on Linux, a SIGTERM when the parent dies. In a process of its own: what runs
# between fork and exec of a program with threads may not run Python.
PRELUDE = """
import ctypes, os, signal, sys
parent, cores, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(parent): sys.exit(143)
if cores: os.sched_setaffinity(0, map(int, cores.split(",")))
os.execv(sys.executable, [sys.executable, *command])
"""


class Job(NamedTuple):
    folder: Path  # of the run; beside it <folder>.log, what it prints, and <folder>.lock
    algorithm: str
    flags: tuple[str, ...]
    num_updates: int
    acting: tuple[dict[str, Any], ...] = ()  # settings that differ from the run's own, one dict for each evaluation
    trust: str = ""  # which neither a run that goes on nor acting.py takes from a file

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How jobs are run."""

    on: Literal["local", "ray"] = "local"  # processes of this machine, or Ray
    jobs: int = 1  # local: runs at a time, each on its share of the cores
    cores: float = 1.0  # Ray: cores to reserve for each run
    gpus: float = 0.0  # GPUs for each run, 0.25 for four runs on one
    address: str | None = None  # Ray: the cluster, "auto" or <host>:<port>; by default one is started here
    retries: int = 3  # Ray: how often a run whose node dies goes on elsewhere; -1 is always
    watch: bool = False  # show a live table of the runs at work


# ------------------------------------------------------------------------------------------------------- one folder


class Result(NamedTuple):
    """What is recorded of a run; evaluations that were cut off are left out."""

    header: dict  # args.json
    updates: list[int]
    scores: np.ndarray  # (evaluations, seeds): means over episodes
    acting: dict[frozenset, np.ndarray]  # scores (seeds,) of the last policy, by `other_settings`


def read_csv(file: Path) -> list[dict[str, str]]:
    """The complete rows of a file; none if it does not exist."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [row for row in rows if None not in row and None not in row.values()]


def read_run(folder: Path) -> tuple[dict, list[dict], list[dict]]:
    """args.json, and the rows of eval.csv and acting.csv."""
    header = json.loads((folder / "args.json").read_text())
    return header, read_csv(folder / "eval.csv"), read_csv(folder / "acting.csv")


def result_of(header: dict, returns: list[dict], acting: list[dict]) -> Result:
    args, (low, high) = header["args"], header["reference_returns"] or (0, 100)
    shape = args["num_seeds"], args["eval_episodes"]

    def scores(rows: Iterable[tuple[Any, dict]]) -> dict[Any, np.ndarray]:
        found: dict[Any, dict] = {}
        for key, row in rows:
            found.setdefault(key, {})[int(row["seed"]), int(row["episode"])] = float(row["return"])
        values = {key: [of[i] for i in sorted(of)] for key, of in found.items() if len(of) == math.prod(shape)}
        return {key: 100 * (np.reshape(of, shape).mean(axis=1) - low) / (high - low) for key, of in values.items()}

    trained = scores((int(row["update"]), row) for row in returns if int(row["update"]))  # 0: before training
    last = [row for row in acting if int(row["update"]) == args["num_updates"] and not row["critics"]]
    last = [row for row in last if int(row["episode"]) < args["eval_episodes"]]  # acting.py may have played more
    settings = lambda row: {name: row[name] for name in row.keys() - RECORDED}
    acted = scores((other_settings(args, settings(row)), row) for row in last)
    return Result(header, list(trained), np.reshape(list(trained.values()), (-1, shape[0])), acted)


def other_settings(args: dict, settings: dict) -> frozenset[tuple[str, str]]:
    """Those of `settings` that differ from a run's arguments, as its acting.csv has them."""
    return frozenset((name, str(value)) for name, value in settings.items() if str(value) != str(args.get(name, "")))


def not_acted(job: Job, run: Result) -> list[dict[str, Any]]:
    """The settings of acting that a job's run has not been evaluated with."""
    there = {frozenset(), *run.acting}  # its own settings are those of its training
    return [each for each in job.acting if other_settings(run.header["args"], each) not in there]


def next_command(job: Job) -> list[str] | None:
    """What is to be done next of a job; None if nothing is."""
    script, checkpoints = [str(ROOT / "algorithms" / f"{job.algorithm}.py")], job.folder.glob("checkpoint-*.eqx")
    names, anew = {file.name for file in checkpoints}, [*script, *job.flags, "--run-dir", str(job.folder)]
    if not (job.folder / "args.json").exists():  # which is written after the first checkpoint
        return anew
    run = result_of(*read_run(job.folder))
    trained, missing = job.num_updates in run.updates, not_acted(job, run)
    if trained and not missing:  # a run that was kept has no checkpoints
        return None
    if not names:
        return anew
    trust = ["--trust", job.trust] * bool(job.trust)
    if not trained or f"checkpoint-{job.num_updates}.eqx" not in names:
        return [*script, "--resume", str(job.folder), *trust]
    missing = [each for each in missing if each.keys() == missing[0].keys()]  # acting.py combines their values
    values = {name: dict.fromkeys(str(each[name]) for each in missing) for name in missing[0]}
    flags = [part for name, each in values.items() for part in ("--" + name.replace("_", "-"), *each)]
    return [str(ROOT / "benchmarks" / "acting.py"), str(job.folder), *flags, *trust]


def execute(job: Job, env: dict[str, str], cores: str = "", stop: threading.Event | None = None) -> str | None:
    """Does what is left of a job, output to <folder>.log; what went wrong, if anything. Children end with it."""
    stop = stop or threading.Event()
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{job.folder}.lock", "w") as lock, open(f"{job.folder}.log", "a") as log:
        while not stop.wait(0.1):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                continue
            except OSError as error:  # of some network file systems
                print(f"Note: {job.name} cannot be locked ({error.strerror}): see that nothing else does this job.")
                break
        command = next_command(job)
        while command and not stop.is_set():
            if "--run-dir" in command:
                shutil.rmtree(job.folder, ignore_errors=True)  # of a run that ended before its first checkpoint
            print("\n$ python", *command, file=log, flush=True)  # a run that was cut leaves half a line
            process = subprocess.Popen(
                [sys.executable, "-c", PRELUDE, str(os.getpid()), cores, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | env,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # a Ctrl-C in the terminal is passed on once, below
            )
            try:
                while process.poll() is None and not stop.wait(0.1):
                    pass
            finally:  # Ray interrupts it with an exception
                process.terminate()
                process.wait()
            before, command = command, next_command(job)
            if process.returncode or command == before:
                break
        return f"{job.folder}.log says why" if command else None


# -------------------------------------------------------------------------------------------------------- all of them


def run_all(jobs: list[Job], how: Execution) -> dict[Path, str]:
    """Does what is left of all jobs; what went wrong, by folder. A job that fails does not stop the others."""
    todo, failed = [job for job in jobs if next_command(job)], {}
    begun = sum(job.folder.exists() for job in todo)
    print(f"{len(jobs)} runs: {len(jobs) - len(todo)} done, {begun} begun, {len(todo) - begun} to do", flush=True)
    if not todo:
        return {}
    results = (run_ray if how.on == "ray" else run_local)(tuple(todo), how)
    with contextlib.closing(results), watch(todo) if how.watch else contextlib.nullcontext():
        for job, trouble in results:
            todo.remove(job)
            print(f"{job.name}: {trouble or 'done'}", flush=True)
            failed |= {job.folder: trouble} if trouble else {}
    return failed


def run_local(jobs: Iterable[Job], how: Execution) -> Iterator[tuple[Job, str | None]]:
    """Yields each job with what went wrong; `how.jobs` at a time."""
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    slots, stop = queue.SimpleQueue(), threading.Event()
    for i in range(how.jobs):
        slots.put((gpu_share(i, how.gpus), ",".join(map(str, available[i :: how.jobs] or available))))

    def in_slot(job: Job) -> str | None:
        slot = slots.get()
        try:
            return execute(job, *slot, stop)
        finally:
            slots.put(slot)

    pool = ThreadPoolExecutor(how.jobs)
    try:
        futures = {pool.submit(in_slot, job): job for job in jobs}
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def gpu_share(i: int, gpus: float) -> dict[str, str]:
    """Tells the i-th of the runs at a time which GPUs are its own."""
    if not gpus:
        return {}
    size, sharing = math.ceil(gpus), int(1 / gpus) or 1
    given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range((i + 1) * size)))
    first = i // sharing * size
    if len(own := given.split(",")[first : first + size]) < size:
        raise SystemExit(f"CUDA_VISIBLE_DEVICES={given} is too few for {i + 1} runs at a time; lower --jobs or --gpus.")
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)} | memory_share(gpus)


def memory_share(gpus: float) -> dict[str, str]:
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 * min(gpus, 1):.2f}"} if gpus else {}


def run_ray(jobs: Iterable[Job], how: Execution) -> Iterator[tuple[Job, str | None]]:
    """The same on a Ray cluster: a task for each job, done again elsewhere when its node dies.

    The repository and the folders of the runs have the same paths on all nodes.
    """
    try:
        import ray
    except ImportError:
        raise SystemExit("--on ray needs Ray: `pip install ray` first, or leave --on out.") from None
    of_runs = lambda name: name in devices.RECORDED or name.startswith(("MINARI_", "XDG_", "JAX_", "XLA_", "MUJOCO_"))
    env = {name: os.environ[name] for name in filter(of_runs, os.environ)} | memory_share(how.gpus)
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])}
    try:
        if how.address not in (None, "auto"):
            host, _, port = how.address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself tries for minutes
        ray.init(how.address or "local", runtime_env={"env_vars": path}, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f"Cannot reach a Ray cluster at {how.address}: {reason.rstrip('.')}.") from None
    remote = ray.remote(execute).options(num_cpus=how.cores, num_gpus=how.gpus, max_retries=how.retries)
    there = ray.cluster_resources()
    if there.get("CPU", 0) < how.cores or there.get("GPU", 0) < how.gpus:
        print(
            f"A run waits for {how.cores:g} cores and {how.gpus:g} GPUs, which the cluster does not have.", flush=True
        )
    tasks = {remote.remote(job._replace(folder=job.folder.absolute()), env): job for job in jobs}
    try:
        while tasks:
            (task, *_), _ = ray.wait(list(tasks))
            job = tasks.pop(task)
            try:
                yield job, ray.get(task)
            except ray.exceptions.RayError as error:
                yield job, f"lost: {str(error).strip().splitlines()[0]}"
    finally:
        for task in tasks:
            ray.cancel(task)
        ray.wait(list(tasks), num_returns=len(tasks), timeout=60) if tasks else None
        ray.shutdown()


def watch(jobs: list[Job]):
    """A live table, in the terminal, of those of the jobs that are at work."""
    from rich.live import Live
    from rich.table import Table

    def table() -> Table:
        table = Table("run", "update", "updates/s", "last score", "time left")
        for job in jobs:
            with contextlib.suppress(OSError, ValueError, ArithmeticError):  # not begun, or written right now
                table.add_row(job.name, *progress(job))
        return table

    return Live(get_renderable=table, refresh_per_second=0.5)


def progress(job: Job) -> tuple[str, str, str, str]:
    """Update, updates per second, last score and time left, for people."""
    scores = result_of(*read_run(job.folder)).scores
    score = f"{scores[-1].mean():.1f}" if len(scores) else ""
    if not (rows := read_csv(job.folder / "metrics.csv")):
        return "begun", "", score, ""
    update, rate = int(rows[-1]["update"]), float(rows[-1]["updates_per_second"])
    left = datetime.timedelta(seconds=int((job.num_updates - update) / rate))
    return f"{update:,} of {job.num_updates:,}", f"{rate:.4g}", score, str(left) if left else "evaluating"
