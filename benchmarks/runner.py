"""Runs, each in its own folder: started, gone on with, repeated never; by processes of this machine, or by Ray.

A job is a run of an algorithm and, after it, evaluations of its last policy with other settings of acting. While a job
is at work it holds a lock beside its folder, which its child processes inherit. So a command that is killed and started
again, a second command, or another node waits for what is still alive, and goes on from the newest checkpoint.
"""

import contextlib
import csv
import fcntl
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
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


class Execution(NamedTuple):
    """How jobs are run."""

    on: str = "local"
    jobs: int = 1
    gpus: float = 0.0
    cores: float = 1.0
    address: str | None = None
    retries: int = 3
    watch: bool = False


# ---------------------------------------------------------------------------------------------------------- a folder


def read_csv(file: Path, last: int | None = None) -> list[dict[str, str]]:
    """The complete rows of a file, or the `last` ones of them; none if it does not exist."""
    try:
        with open(file, "rb") as stream:
            heading = stream.readline()
            if last is not None:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(len(heading), size - 100 * (last + 1)))
                if stream.tell() > len(heading):
                    stream.readline()
            lines = (heading + stream.read()).decode().split("\n")[:-1]
    except FileNotFoundError:
        return []
    rows = [row for row in csv.DictReader(lines) if None not in row and None not in row.values()]
    return rows if last is None else rows[-last:]


def last_evaluation(folder: Path) -> tuple[dict, int, list[float]]:
    """(args.json, update, returns) of a run's last complete evaluation; update 0 if there is none."""
    header = json.loads((folder / "args.json").read_text())
    size = header["args"]["num_seeds"] * header["args"]["eval_episodes"]
    rows = read_csv(folder / "eval.csv", 2 * size)
    for update in dict.fromkeys(row["update"] for row in reversed(rows)):
        returns = [float(row["return"]) for row in rows if row["update"] == update]
        if len(returns) == size:
            return header, int(update), returns
    return header, 0, []


def checkpoints(folder: Path) -> set[int]:
    """The updates of a run's checkpoints."""
    names = (file.stem.removeprefix("checkpoint-") for file in folder.glob("checkpoint-*.eqx"))
    return {int(name) for name in names if name.isdecimal()}


def is_finished(job: Job) -> bool:
    """Whether it is trained and evaluated."""
    return job.num_updates in checkpoints(job.folder) and last_evaluation(job.folder)[1] == job.num_updates


def other_settings(args: dict, settings: dict) -> frozenset[tuple[str, str]]:
    """Those of `settings` that differ from a run's arguments, as its acting.csv has them."""
    return frozenset((name, str(value)) for name, value in settings.items() if str(value) != str(args.get(name, "")))


def read_acting(rows: list[dict[str, str]], args: dict) -> dict[frozenset, list[float]]:
    """Returns of complete evaluations of a run's last policy, by `other_settings`, ordered by seed and episode."""
    own = {"run", "update", "critics", "seed", "episode", "return", "length"}
    evaluations: dict[frozenset, dict] = {}
    for row in rows:
        if int(row["update"]) == args["num_updates"] and not row["critics"]:
            key = other_settings(args, {name: value for name, value in row.items() if name not in own})
            evaluations.setdefault(key, {})[int(row["seed"]), int(row["episode"])] = float(row["return"])
    size = args["num_seeds"] * args["eval_episodes"]
    return {key: [v for _, v in sorted(found.items())] for key, found in evaluations.items() if len(found) == size}


def missing_acting(job: Job) -> list[dict[str, Any]]:
    """The settings of acting that a trained run has not been evaluated with; its own are those of its training."""
    args = json.loads((job.folder / "args.json").read_text())["args"] if job.acting else {}
    there = {frozenset(), *(read_acting(read_csv(job.folder / "acting.csv"), args) if job.acting else ())}
    return [settings for settings in job.acting if other_settings(args, settings) not in there]


def commands(job: Job) -> Iterator[list[str]]:
    """What is left to do, found out before each step."""
    if not is_finished(job):
        script = [str(ROOT / "algorithms" / f"{job.algorithm}.py")]
        if checkpoints(job.folder):
            yield [*script, "--resume", str(job.folder)]
        else:
            shutil.rmtree(job.folder, ignore_errors=True)  # it ended before its first checkpoint
            yield [*script, *job.flags, "--run-dir", str(job.folder)]
    groups: dict[tuple, list[dict]] = {}
    for settings in missing_acting(job):
        groups.setdefault(tuple(settings), []).append(settings)
    for names, group in groups.items():  # as acting.py combines values
        values = [dict.fromkeys(str(settings[name]) for settings in group) for name in names]
        flags = [part for name, each in zip(names, values) for part in ("--" + name.replace("_", "-"), *each)]
        yield [str(ROOT / "benchmarks" / "acting.py"), str(job.folder), *flags]


def execute(job: Job, env: dict[str, str], cores: str = "", stop: threading.Event | None = None) -> str | None:
    """Does what is left of a job, output to <folder>.log; what went wrong, if anything. Children end with it."""
    stop = stop or threading.Event()
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{job.folder}.lock", "w") as lock, open(f"{job.folder}.log", "a") as log:
        while not stop.is_set():
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.2)
        for command in commands(job) if not stop.is_set() else ():
            if stop.is_set():
                return "stopped"
            print("$ python", *command, file=log, flush=True)
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
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            if process.returncode:
                return "stopped" if stop.is_set() else f"status {process.returncode}, {job.folder}.log says why"
        return None if is_finished(job) else f"ended early, {job.folder}.log says why"


# ------------------------------------------------------------------------------------------------------------- all


def run_all(jobs: list[Job], how: Execution) -> dict[Path, str]:
    """Does what is left of all jobs; what went wrong, by folder. A job that fails does not stop the others.

    After SIGINT, SIGTERM or SIGHUP children save and end, and the process exits with 128 plus the signal's number.
    """
    todo = [job for job in jobs if not is_finished(job) or missing_acting(job)]
    started = sum(job.folder.exists() and not is_finished(job) for job in todo)
    print(f"{len(jobs)} runs: {len(jobs) - len(todo)} done, {started} begun, {len(todo) - started} to do", flush=True)
    if not todo:
        return {}

    def stopped(number, _):
        for each in signals:
            signal.signal(each, signal.SIG_DFL)  # the next one ends this process, and so its children, at once
        raise KeyboardInterrupt(number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, stopped) for each in signals}
    failed: dict[Path, str] = {}
    try:
        with Watch(todo) if how.watch else contextlib.nullcontext() as table:
            for job, trouble in (run_ray if how.on == "ray" else run_local)(todo, how):
                if job is None:
                    if table:
                        table.update(failed)
                    continue
                if trouble:
                    failed[job.folder] = trouble
                if not table:
                    print(f"{job.folder.parent.name}/{job.folder.name}: {trouble or 'done'}", flush=True)
    except KeyboardInterrupt as error:
        print("Stopped; the same command goes on from here.", file=sys.stderr, flush=True)
        raise SystemExit(128 + (error.args[0] if error.args else signal.SIGINT)) from None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return failed


def run_local(jobs: list[Job], how: Execution) -> Iterator[tuple[Job | None, str | None]]:
    """Yields each job with what went wrong, and (None, None) every second: `how.jobs` at a time."""
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    slots, stop = queue.SimpleQueue(), threading.Event()
    for i in range(how.jobs):
        gpu = {"CUDA_VISIBLE_DEVICES": str(int(i * how.gpus)), **memory_share(how.gpus)} if how.gpus else {}
        slots.put((gpu, ",".join(map(str, available[i :: how.jobs] or available))))

    def in_slot(job: Job) -> str | None:
        slot = slots.get()
        try:
            return execute(job, *slot, stop)
        finally:
            slots.put(slot)

    pool = ThreadPoolExecutor(how.jobs)
    try:
        futures = {pool.submit(in_slot, job): job for job in jobs}
        while futures:
            done, _ = wait(futures, timeout=1, return_when=FIRST_COMPLETED)
            yield from ((futures.pop(future), future.result()) for future in done)
            yield None, None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def run_ray(jobs: list[Job], how: Execution) -> Iterator[tuple[Job | None, str | None]]:
    """The same on a Ray cluster: a task for each job, done again elsewhere when its node dies.

    The repository and the folders of the runs have the same paths on all nodes.
    """
    try:
        import ray
    except ImportError:
        raise SystemExit("--on ray needs Ray: `pip install ray` first, or leave --on out.") from None
    own = [name for name in os.environ if name.startswith(("MINARI_", "XDG_", "JAX_", "XLA_", "MUJOCO_"))]
    env = {name: os.environ[name] for name in own} | memory_share(how.gpus)
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    try:
        ray.init(
            how.address, runtime_env={"env_vars": {"PYTHONPATH": path}}, log_to_driver=False, logging_level="error"
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f"Cannot reach a Ray cluster at {how.address}: {reason.rstrip('.')}.") from None
    remote = ray.remote(execute).options(num_cpus=how.cores, num_gpus=how.gpus, max_retries=how.retries)
    tasks = {remote.remote(job, env): job for job in jobs}
    try:
        while tasks:
            done, _ = ray.wait(list(tasks), timeout=1)
            for task in done:
                try:
                    yield tasks[task], ray.get(task)
                except ray.exceptions.RayError as error:
                    yield tasks[task], f"lost: {str(error).strip().splitlines()[0]}"
                del tasks[task]
            yield None, None
    finally:
        for task in tasks:
            ray.cancel(task)
        ray.wait(list(tasks), num_returns=len(tasks), timeout=60) if tasks else None
        ray.shutdown()


def memory_share(gpus: float) -> dict[str, str]:
    """Of runs that share a GPU, each takes its part of the memory."""
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 * gpus:.2f}"} if 0 < gpus < 1 else {}


# ----------------------------------------------------------------------------------------------------------- watching


class Watch:
    """A live table of jobs in the terminal."""

    def __init__(self, jobs: Iterable[Job]):
        from rich.live import Live

        self.jobs = list(jobs)
        self.live = Live(auto_refresh=False)

    def __enter__(self):
        self.live.start()
        return self

    def __exit__(self, *_):
        self.update({})
        self.live.stop()

    def update(self, failed: dict[Path, str]) -> None:
        from rich.table import Table

        table = Table("run", "update", "updates/s", "last score", "time left")
        for job in self.jobs:
            name = f"{job.folder.parent.name}/{job.folder.name}"
            table.add_row(name, *([failed[job.folder]] if job.folder in failed else progress(job)))
        self.live.update(table, refresh=True)


def progress(job: Job) -> tuple[str, str, str, str]:
    """Update, updates per second, last score and time left, for people."""
    rows = read_csv(job.folder / "metrics.csv", 1)
    if not rows:
        return "begun" if job.folder.exists() else "waiting", "", "", ""
    header, update, returns = last_evaluation(job.folder)
    low, high = header["reference_returns"] or (0, 100)
    score = f"{100 * (sum(returns) / len(returns) - low) / (high - low):.1f}" if returns else ""
    if is_finished(job):
        return "acting" if missing_acting(job) else "done", "", score, ""
    update, rate = int(rows[-1]["update"]), float(rows[-1]["updates_per_second"])
    minutes, seconds = divmod(int((job.num_updates - update) / max(rate, 1e-9)), 60)
    return f"{update:,} of {job.num_updates:,}", f"{rate:.4g}", score, f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
