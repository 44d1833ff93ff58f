"""How fast this code learns and acts here: Fig. 2 and C.5 of the EDP paper done again, and where the time goes.

    python benchmarks/speed.py                              # everything: some ten minutes on two slow CPU cores
    python benchmarks/speed.py --quick                      # a minute or two
    python benchmarks/speed.py --sections startup           # one section; what others have measured is kept
    python benchmarks/speed.py --only dql edp_td3bc --peers-json benchmarks/peers.json

writes benchmarks/results/speed-<name>.json, with every repeat, and a chart beside it. Sections:

    updates   updates per second of each algorithm at the shapes of walker2d (observation 17, action 6, batch 256), on
              random transitions on the device: speed does not depend on their values
    acting    environment steps per second of ten Hopper-v5 in the evaluation that training uses, with N = 10 candidate
              actions; and action selections per second of the policy alone, for ten observations at a time and for one
    growth    edp_td3bc with more seeds in one program, larger batches, larger datasets
    profile   edp_td3bc: the parts of an update, each timed in a loop of its own
    startup   seconds from the command to the first update on a million steps that are cached, with an empty and a full
              cache of compiled programs; loading these (antmaze-like) from Minari's file and from the cache

A speed is the median of its repeats; compilation is never inside, and never from the cache but in `startup`. The limit
of the machine is the rate of a chain of 256x256x256 float32 products, timed in turn with the repeats. "of limit" is the
time that the matrix products of an update would take at that rate, as a share of what the update takes; "XLA/counted"
is XLA's own count of operations, which includes elementwise ones, over the count of products used here.

The paper does not say with which K it made Fig. 2. Diffusion-QL and EDP w/o DPM act equally fast there, so it was the
same for both: taken to be K = 100, as in Table 7. EDP w/o DPM is measured with the K = 1000 of the paper's EDP as well.
The speed of EDP w/o AP does not depend on K.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import minari
import numpy as np
import optax
import tyro
from common.data import Dataset, DatasetInfo, load_dataset, resolve_task
from common.environments import make_gym_env
from common.evaluation import Evaluator
from common.run import PACKAGES, git_commit, setup
from common.tasks import ENVIRONMENTS, LOCOMOTION, with_domain_defaults
from minari.data_collector import EpisodeBuffer

from common import networks

ROOT = Path(__file__).resolve().parents[1]
OBS_DIM, ACT_DIM = 17, 6  # walker2d
GROWTH = {  # of edp_td3bc, each alone
    "num_seeds": (1, 2, 4, 8, 16),
    "batch_size": (256, 512, 1024, 2048),
    "dataset_size": (10_000, 100_000, 1_000_000),
}
STARTUP_DATASET, STARTUP_STEPS = "speed/antmaze-v0", 1_000_000


@dataclass(frozen=True)
class Args:
    sections: tuple[Literal["updates", "acting", "growth", "profile", "startup"], ...] | None = None
    """what to measure; by default everything, with --quick updates and acting"""
    only: tuple[str, ...] = ()
    """algorithms for updates and acting; by default all"""
    quick: bool = False
    """fewer algorithms, three short repeats, results under a name of their own"""
    name: str | None = None
    """of the machine, for the results; by default from its processor or GPU"""
    results_dir: Path = ROOT / "benchmarks" / "results"
    """where the results go"""
    peers_json: Path | None = None
    """figures of other implementations for the chart: {"machine": text, "updates_per_second": {name: number}}"""
    repeats: int = 5
    """timings of each speed"""
    seconds: float = 1.0
    """about what each timing takes"""
    ddpm_steps: tuple[int, ...] = (100, 1000)
    """K of EDP w/o DPM"""
    solver_calls: int = 15
    """network calls of DPM-Solver"""
    batch_size: int = 256
    """transitions of an update"""
    dataset_size: int = 100_000
    """transitions to draw from"""


class Entry(NamedTuple):
    label: str
    algorithm: str  # the name of its file
    flags: dict[str, Any]
    acting: str = ""  # how it samples, if no other entry samples so


def make_entries(args: Args) -> dict[str, Entry]:
    """By the names that `--only` takes; the feed-forward counterpart only if its file exists."""
    dpm, paper_k = {"num_solver_calls": args.solver_calls}, {"num_diffusion_steps": 100}
    entries = {
        "dql": Entry("Diffusion-QL, K = 100", "dql_baseline", paper_k),
        "edp_no_ap": Entry("EDP w/o AP", "edp_td3bc", {**dpm, "action_approx": False}),
    }
    for k in args.ddpm_steps:
        flags = {"sampler": "ddpm", "num_diffusion_steps": k}
        entries[f"edp_no_dpm_{k}"] = Entry(f"EDP w/o DPM, K = {k}", "edp_td3bc", flags, f"DDPM, K = {k}")
    entries |= {
        "edp_td3bc": Entry("EDP + TD3+BC", "edp_td3bc", dpm, f"DPM-Solver, {args.solver_calls} calls"),
        "edp_crr": Entry("EDP + CRR", "edp_crr", dpm),
        "edp_iql": Entry("EDP + IQL", "edp_iql", dpm),
    }
    if importlib.util.find_spec("algorithms.td3bc"):
        entries["td3bc"] = Entry("TD3+BC, feed-forward", "td3bc", {}, "feed-forward")
    unknown = [name for name in args.only if name not in entries]
    if unknown:
        raise SystemExit(f"--only {unknown[0]} is unknown; there are {', '.join(entries)}.")
    quick = ["dql", "edp_td3bc", "edp_iql", f"edp_no_dpm_{args.ddpm_steps[0]}"]
    return {name: entries[name] for name in args.only or (quick if args.quick else entries)}


# ---------------------------------------------------------------------------------------------- floating-point work


def count_products(algorithm: str, a, obs_dim: int = OBS_DIM, act_dim: int = ACT_DIM) -> dict[str, int]:
    """Floating-point operations of all matrix products of one update of one seed, part by part.

    A layer from m to n costs 2 m n for an example on the way forward, and on the way back as much for the gradient of
    its weight and as much for that of its input, which is not computed where the input is data. A sampler multiplies
    the observation once for all its calls; its time embedding is one row for the batch, too little to count.
    """
    width, time_width = networks.HIDDEN_WIDTH, networks.EMBEDDING_DIM
    layer = lambda fan_in, fan_out: 2 * a.batch_size * fan_in * fan_out
    see, place = layer(obs_dim, width), layer(act_dim, width)  # a first layer's share of the observation, the action
    hidden = (networks.NUM_HIDDEN - 1) * layer(width, width)
    value = see + hidden + layer(width, 1)
    critic = place + value
    critic_gradient = 2 * (3 * critic - see - place)
    action_gradient = critic + (critic - see)  # Q(s, a) and its gradient by a: none of the weights', none by s

    if algorithm == "td3bc":  # the policy's update is computed every time, though only every second one counts
        actor = see + hidden + layer(width, act_dim)
        policy_gradient, target = 3 * actor - see + action_gradient, actor + 2 * critic
        return {"critic target": target, "critic gradient": critic_gradient, "policy gradient": policy_gradient}

    time_in, time_out = layer(time_width, 2 * time_width), layer(2 * time_width, time_width)
    policy = time_in + time_out + layer(time_width, width) + see + place + hidden + layer(width, act_dim)
    policy_gradient = 3 * policy - see - place - time_in
    if algorithm == "edp_iql":  # the value's loss and the policy's weight share Q'(s, a)
        return {
            "value gradient": 2 * critic + 3 * value - see,
            "policy gradient": policy_gradient + value,
            "critic target": value,
            "critic gradient": critic_gradient,
        }

    ddpm = a.sampler == "ddpm"
    calls = a.num_diffusion_steps if ddpm else a.num_solver_calls
    call = place + hidden + layer(width, act_dim)
    if algorithm == "edp_crr":  # Q(s, a) and all Q(s, a_n) share the observation
        policy_gradient += 2 * (critic + a.num_advantage_actions * (critic - see))
    else:
        policy_gradient += action_gradient
    if algorithm == "dql_baseline" or (algorithm == "edp_td3bc" and not a.action_approx):
        again = see + call if ddpm else 0  # DDPM computes each call once more on the way back, to spare memory
        policy_gradient += see + calls * call + calls * (again + 2 * call + see)
    target = see + calls * call + 2 * critic
    return {"critic target": target, "critic gradient": critic_gradient, "policy gradient": policy_gradient}


# -------------------------------------------------------------------------------------------------------- measuring


class Timer:
    """Times things in turn with the chain of products."""

    def __init__(self, repeats: int, seconds: float):
        self.repeats, self.seconds, self.rates, self.num_products = repeats, seconds, [], 10
        # an orthogonal matrix, whose powers neither overflow nor fade into slow denormal numbers
        self.matrix = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(256, 256)))[0], jnp.float32)
        self.chain = jax.jit(lambda n, matrix: jax.lax.fori_loop(0, n, lambda _, x: x @ matrix, matrix))
        self.rate()
        while self.num_products / self.rate() * 2 * 256**3 < seconds / 10:
            self.num_products *= 2
        self.rates.clear()

    def rate(self) -> float:
        """Floating-point operations per second of the chain, now."""
        start = time.perf_counter()
        self.chain(self.num_products, self.matrix).block_until_ready()
        self.rates.append(2 * 256**3 * self.num_products / (time.perf_counter() - start))
        return self.rates[-1]

    def measure(self, call: Callable[[], Any], units: float, flops: float | None = None) -> dict:
        """Units per second of `call()`, each of which is `units` of `flops` operations, begun without a wait."""
        jax.block_until_ready(call())  # compiles
        start = time.perf_counter()
        jax.block_until_ready(call())
        calls = math.ceil(self.seconds / (time.perf_counter() - start))
        speeds, rates = [], [self.rate()]
        for _ in range(self.repeats):
            start = time.perf_counter()
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
            speeds.append(calls * units / (time.perf_counter() - start))
            rates.append(self.rate())
        median, limit = float(np.median(speeds)), float(np.median(rates))
        row = {"per_second": median, "repeats": speeds, "chain_flops_per_second": limit, "chain_repeats": rates}
        return row if flops is None else row | {"flops": flops, "of_limit": flops * median / limit}


def make_args(entry: Entry, **flags):
    """The algorithm's arguments, with locomotion's defaults."""
    module = importlib.import_module(f"algorithms.{entry.algorithm}")
    return with_domain_defaults(module.Args(**(entry.flags | flags)), LOCOMOTION, iql=entry.algorithm.endswith("iql"))


@lru_cache
def initial_state(algorithm: str, obs_dim: int, act_dim: int):
    """Of one seed, in host memory; no flag that is varied here changes it, and compiling it anew would take seconds."""
    module, a = importlib.import_module(f"algorithms.{algorithm}"), make_args(Entry("", algorithm, {}))
    return jax.device_get(jax.jit(lambda key: module.init_state(key, obs_dim, act_dim, a))(jax.random.key(0)))


def make_inputs(entry: Entry, obs_dim: int, act_dim: int, size: int, **flags):
    """(module, its arguments, training state, keys, dataset) of random numbers."""
    module, a = importlib.import_module(f"algorithms.{entry.algorithm}"), make_args(entry, **flags)
    shapes = Dataset((size, obs_dim), (size, act_dim), (size,), (size, obs_dim), (size,))
    rng = np.random.default_rng(0)
    dataset = Dataset(*(jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32) for shape in shapes))
    keys = jax.random.wrap_key_data(rng.integers(2**32, size=(a.num_seeds, 2), dtype=np.uint32))
    repeat = lambda leaf: jnp.asarray(np.repeat(np.asarray(leaf)[None], a.num_seeds, axis=0))
    state = jax.tree.map(repeat, initial_state(entry.algorithm, obs_dim, act_dim))
    return module, a, state, keys, dataset._replace(terminal=jnp.zeros(size))


def measure_updates(timer: Timer, entry: Entry, dataset_size: int, **flags) -> dict:
    """Updates per second in chunks, as training makes them."""
    module, a, state, keys, dataset = make_inputs(entry, OBS_DIM, ACT_DIM, dataset_size, **flags)
    flops = a.num_seeds * sum(count_products(entry.algorithm, a).values())
    chunk = int(np.clip(timer.seconds * timer.rate() / flops / 2, 1, 1000))  # some two thirds of the aim
    start = time.perf_counter()
    lowered = module.train_chunk.lower(state, 0, keys, dataset, a, chunk)
    traced = time.perf_counter()
    compiled = lowered.compile()
    seconds = {"trace_seconds": traced - start, "compile_seconds": time.perf_counter() - traced}

    def call():
        nonlocal state  # the next call's, which takes over its memory
        state, metrics = compiled(state, 0, keys, dataset, a)
        return metrics

    # XLA counts the body of a loop once: one update of a chunk, one step of a DDPM chain
    once = replace(a, num_diffusion_steps=1) if "num_diffusion_steps" in vars(a) else a
    xla = (compiled.cost_analysis() or {}).get("flops", math.nan)
    ratio = xla / a.num_seeds / sum(count_products(entry.algorithm, once).values())
    shape = {"num_seeds": a.num_seeds, "batch_size": a.batch_size, "dataset_size": dataset_size, "chunk": chunk}
    return shape | seconds | {"xla_to_counted": ratio} | timer.measure(call, chunk, flops)


# --------------------------------------------------------------------------------------------------------- sections
# Each prints a table line by line, and yields the lines' names and results.


def updates(args: Args, timer: Timer) -> Iterator[tuple[str, dict]]:
    print_update("")
    for name, entry in make_entries(args).items():
        row = measure_updates(timer, entry, args.dataset_size, batch_size=args.batch_size)
        print_update(entry.label, row)
        yield name, {"label": entry.label} | row


def growth(args: Args, timer: Timer) -> Iterator[tuple[str, dict]]:
    entry = make_entries(replace(args, only=("edp_td3bc",)))["edp_td3bc"]
    base = {"num_seeds": 1, "batch_size": args.batch_size, "dataset_size": args.dataset_size}
    points = [base | {key: value} for key, values in GROWTH.items() for value in values]
    print_update("seeds, batch, dataset")
    for name, shape in {", ".join(map(str, point.values())): point for point in points}.items():
        row = measure_updates(timer, entry, **shape)
        print_update(name, row)
        yield name, row


def acting(args: Args, timer: Timer) -> Iterator[tuple[str, dict]]:
    print_line("", "env steps/s", "min", "max", "10 obs: /s", "min", "max", "1 obs: /s", "min", "max")
    for name, entry in make_entries(args).items():
        if not entry.acting:
            continue
        module, a, state, keys, _ = make_inputs(entry, 11, 3, 10, num_eval_actions=10)
        act = lambda obs, t: module.select_action(state.policy, state.critics, obs, keys, t, a)
        obs = np.random.default_rng(0).normal(size=(1, 10, 11)).astype(np.float32)
        ten = timer.measure(lambda: act(obs, 0), 10)
        one = timer.measure(lambda: act(obs[:, :1], 0), 1)
        # hoppers that fall do not end: an untrained policy's episodes last as long as a good one's
        length = int(np.clip(timer.seconds * ten["per_second"] / 20, 10, 1000))
        hopper = ENVIRONMENTS["Hopper"]._replace(max_steps=length, kwargs={"terminate_when_unhealthy": False})
        zeros, ones = np.zeros(11, np.float32), np.ones(11, np.float32)
        evaluate = Evaluator(hopper, [0], 10, DatasetInfo({}, 0.0, zeros, ones, []))
        steps = timer.measure(lambda: evaluate(act, 0).returns, 10 * length)
        print_line(entry.acting, *(f(row["repeats"]) for row in (steps, ten, one) for f in (np.median, min, max)))
        yield name, {"label": entry.acting, "environment": steps, "ten_observations": ten, "one_observation": one}


def profile(args: Args, timer: Timer) -> Iterator[tuple[str, dict]]:
    """Each part in a scan of its own; what it reads differs from step to step, so that no work leaves the loop."""
    entry = make_entries(replace(args, only=("edp_td3bc",)))["edp_td3bc"]
    whole = measure_updates(timer, entry, args.dataset_size, batch_size=args.batch_size)
    flags = {"batch_size": args.batch_size}
    module, a, state, keys, dataset = make_inputs(entry, OBS_DIM, ACT_DIM, args.dataset_size, **flags)
    policy_optimizer, optimizer = module.make_optimizers(a)

    def draw(carry, key, state, batch):
        index = jax.random.randint(key, (a.batch_size,), 0, args.dataset_size)
        return jax.tree.map(lambda array: array[index], dataset)

    def after(result, batch):  # the batch, but known only when the step before has its result
        return jax.tree.map(lambda array: array + 1e-30 * jax.tree.leaves(result)[0].ravel()[0], batch)

    def critic_target(target, key, state, batch):
        return module.critic_target(state.target_critics, state.target_policy, after(target, batch), key, a)

    def critic_gradient(grads, key, state, batch):
        return jax.grad(module.critic_loss, has_aux=True)(state.critics, batch.reward, after(grads, batch))[0]

    def policy_gradient(grads, key, state, batch):
        return jax.grad(module.policy_loss, has_aux=True)(state.policy, state.critics, after(grads, batch), key, a)[0]

    def optimizers(carry, key, state, batch):  # the weights serve as gradients
        (policy, policy_opt), (critics, critics_opt) = carry
        policy_move, policy_opt = policy_optimizer.update(state.policy, policy_opt)
        critics_move, critics_opt = optimizer.update(state.critics, critics_opt)
        policy, critics = optax.apply_updates((policy, critics), (policy_move, critics_move))
        return (policy, policy_opt), (critics, critics_opt)

    def targets(carry, key, state, batch):
        return optax.incremental_update((state.critics, state.policy), carry, a.tau)

    batch = jax.vmap(draw, (None, 0, None, None))(None, keys, None, None)
    parts = {
        "draw the batch": (draw, batch),
        "critic target": (critic_target, batch.reward),
        "critic gradient": (critic_gradient, state.critics),
        "policy gradient": (policy_gradient, state.policy),
        "optimizers": (optimizers, ((state.policy, state.policy_opt), (state.critics, state.critics_opt))),
        "targets": (targets, (state.target_critics, state.target_policy)),
    }
    work = count_products(entry.algorithm, a)
    rest, num_steps = 1 / whole["per_second"], 100
    print_line("", "ms", "of update", "GFLOP", "of limit")
    for name, (part, first) in parts.items():

        @jax.jit
        def scan(carry, keys, state, batch):
            step = lambda carry, key, state, batch, n: part(carry, jax.random.fold_in(key, n), state, batch)
            step = jax.vmap(step, (0, 0, 0, 0, None))  # over one seed, as in training
            return jax.lax.scan(lambda c, n: (step(c, keys, state, batch, n), None), carry, jnp.arange(num_steps))[0]

        row = timer.measure(lambda: scan(first, keys, state, batch), num_steps, work.get(name, 0))
        rest -= 1 / row["per_second"]
        print_part(name, 1 / row["per_second"], whole, row)
        yield name, row
    print_part("rest", rest, whole)
    print_part("whole update", 1 / whole["per_second"], whole, whole)
    yield "whole update", whole


def startup(args: Args, timer: Timer) -> Iterator[tuple[str, dict]]:
    """In new processes, with datasets and caches in a temporary folder."""
    print_line("", "seconds", "peak MB")
    with tempfile.TemporaryDirectory() as folder:
        datasets = Path(folder, "minari")
        datasets.mkdir()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"MINARI_DATASETS_PATH": str(datasets), "XDG_CACHE_HOME": f"{folder}/cache", "PYTHONPATH": path}
        new_process = multiprocessing.get_context("spawn")
        with patch.dict(os.environ, environment), ProcessPoolExecutor(1, new_process, max_tasks_per_child=1) as pool:
            pool.submit(write_dataset, STARTUP_STEPS).result()
            for name in ("load, first time", "load, cached"):
                row = pool.submit(load_once).result()
                print_line(name, row["seconds"], row["peak_bytes"] / 1e6)
                yield name, row
            for name, repeats in (("first update, not compiled", 1), ("first update, compiled", 3)):
                seconds = [seconds_to_first_update(Path(folder, f"{name} {i}")) for i in range(repeats)]
                print_line(name, np.median(seconds))
                yield name, {"seconds": float(np.median(seconds)), "repeats": seconds}


def write_dataset(num_steps: int) -> None:
    """A Minari dataset like antmaze-umaze: float64, episodes of 700 steps, here copies of one."""
    environment, length = ENVIRONMENTS["AntMaze_UMaze"], 700
    env = make_gym_env(environment.gym_id, max_episode_steps=length, **environment.kwargs)
    spaces, rng, is_last = env.observation_space, np.random.default_rng(0), np.arange(length) == length - 1
    episode = EpisodeBuffer(
        observations={key: rng.normal(size=(length + 1, *spaces[key].shape)) for key in environment.obs_keys},
        actions=rng.uniform(-1, 1, (length, *env.action_space.shape)).astype(np.float32),
        rewards=is_last.astype(np.float64),
        terminations=np.zeros(length, bool),
        truncations=is_last,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has no author
        minari.create_dataset_from_buffers(STARTUP_DATASET, [episode] * math.ceil(num_steps / length), env=env)


def load_once() -> dict:
    """Seconds, and peak memory of the whole process."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        dataset, _ = load_dataset(resolve_task("", STARTUP_DATASET), "cql_antmaze")
    jax.block_until_ready(dataset)
    seconds = time.perf_counter() - start
    try:  # getrusage would count the peak of the process that started this one, too
        peak = 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "peak_bytes": peak}


def seconds_to_first_update(run_dir: Path) -> float:
    """From the command until the metrics of the first chunk, here of two updates, are in their file."""
    command = [sys.executable, ROOT / "algorithms" / "edp_td3bc.py", "--dataset-id", STARTUP_DATASET]
    metrics, start = run_dir / "metrics.csv", time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        command += ["--num-updates", "2", "--run-dir", run_dir]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
                if process.poll() is not None:
                    errors.seek(0)
                    raise SystemExit(f"edp_td3bc.py ended before its first update:\n{errors.read()[-2000:]}")
                time.sleep(0.01)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


# --------------------------------------------------------------------------------------------------- tables and files


def print_line(label: str, *cells) -> None:
    print(f"{label:<28}" + "".join(f"{c if isinstance(c, str) else format(c, '.4g'):>12}" for c in cells), flush=True)


def print_update(label: str, row: dict | None = None) -> None:
    if row is None:
        columns = "updates/s", "min", "max", "all seeds", "GFLOP", "XLA/counted", "of limit", "trace s", "compile s"
        return print_line(label, *columns)
    speed, repeats = row["per_second"], row["repeats"]
    cells = speed, min(repeats), max(repeats), speed * row["num_seeds"], row["flops"] / 1e9, row["xla_to_counted"]
    print_line(label, *cells, f"{row['of_limit']:.0%}", row["trace_seconds"], row["compile_seconds"])


def print_part(name: str, seconds: float, whole: dict, row: dict | None = None) -> None:
    work = (row["flops"] / 1e9, f"{row['of_limit']:.0%}") if row and row["flops"] else ()
    print_line(name, seconds * 1e3, f"{seconds * whole['per_second']:.0%}", *work)


def read_json(path: Path, what: str, is_valid: Callable[[Any], bool]) -> dict:
    """Exits with one sentence if the file does not hold `what`."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read as JSON: {error}.") from None
    if not is_valid(content):
        raise SystemExit(f"{path} does not hold {what}.")
    return content


def are_peers(content) -> bool:
    try:
        values = content["updates_per_second"].values()
        return isinstance(content["machine"], str) and all(type(x) in (int, float) and 0 < x < math.inf for x in values)
    except (TypeError, KeyError, AttributeError):
        return False


def describe_machine() -> dict:
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = platform.processor()
    with contextlib.suppress(OSError, TypeError):
        processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    name = processor if device.platform == "cpu" else device.device_kind
    return {"device": name, "processor": processor, "cores": cores, "versions": versions}


def draw_chart(results: dict, peers: dict | None, file: Path) -> None:
    """Updates per second of all that were measured; speed against the number of seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    here = "{device}, {cores} core(s)".format(**results["machine"])
    bars = [(row["label"], row["repeats"], "tab:blue") for row in results.get("updates", {}).values()]
    if peers:
        bars += [(name, [speed], "tab:gray") for name, speed in peers["updates_per_second"].items()]
        here += f"\ngray: {peers['machine']}"
    growth = list(results.get("growth", {}).values())
    seeds = [row for row in growth if all(row[key] == growth[0][key] for key in ("batch_size", "dataset_size"))]
    figure, axes = plt.subplots(
        1, 1 + bool(seeds), figsize=(7 + 5 * bool(seeds), 5), squeeze=False, layout="constrained"
    )
    left, right = axes[0, 0], axes[0, -1]
    for y, (_, speeds, color) in enumerate(bars):
        median = np.median(speeds)
        left.barh(y, median, color=color, xerr=[[median - min(speeds)], [max(speeds) - median]], capsize=3)
        left.annotate(f"  {median:.3g}", (max(speeds), y), va="center")
    left.set_yticks(range(len(bars)), [label for label, *_ in bars])
    left.set(xscale="log", xlabel="updates per second")
    left.set_title(f"blue: {here}", fontsize="medium")
    left.margins(x=0.2)
    left.invert_yaxis()
    if seeds:
        numbers, speeds = np.array(sorted((row["num_seeds"], row["num_seeds"] * row["per_second"]) for row in seeds)).T
        right.plot(numbers, speeds, "o-")
        right.set(xlabel="seeds in one program", ylabel="updates per second, all seeds", ylim=(0, 1.1 * speeds.max()))
        right.set_xticks(numbers)
        right.set_title("EDP + TD3+BC", fontsize="medium")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(args: Args) -> None:
    if args.quick:
        args = replace(args, repeats=3, seconds=0.3, sections=args.sections or ("updates", "acting"))
    functions = {"updates": updates, "acting": acting, "growth": growth, "profile": profile, "startup": startup}
    make_entries(args)  # exits if --only names something unknown
    like = '{"machine": text, "updates_per_second": {name: number above 0, ...}}, as benchmarks/peers.json does'
    peers = None if args.peers_json is None else read_json(args.peers_json, like, are_peers)

    setup(importlib.import_module("algorithms.edp_td3bc").Args())
    jax.config.update("jax_enable_compilation_cache", False)
    machine = describe_machine()
    name = args.name or re.sub(r"[^a-z0-9]+", "-", f"{machine['device']} {machine['cores']} cores".lower())
    file = args.results_dir / f"speed-{name}{'-quick' if args.quick else ''}.json"
    results = read_json(file, "results", lambda content: isinstance(content, dict)) if file.exists() else {}
    timer = Timer(args.repeats, args.seconds)
    results["machine"] = machine | {"chain_flops_per_second": timer.rate()}
    print(f"{machine['device']}, {machine['cores']} core(s), product chain {timer.rate() / 1e9:.4g} GFLOP/s")

    args.results_dir.mkdir(parents=True, exist_ok=True)
    origin = {"git_commit": git_commit(), "date": time.strftime("%Y-%m-%d")}
    for section in args.sections or functions:
        print(f"\n{section}")
        for row_name, row in functions[section](args, timer):
            results.setdefault(section, {})[row_name] = row | origin
            file.write_text(json.dumps(results, indent=1))
    results["machine"]["chain_flops_per_second"] = float(np.median(timer.rates))
    file.write_text(json.dumps(results, indent=1))
    draw_chart(results, peers, file.with_suffix(".png"))
    print(f"\n{file} and {file.with_suffix('.png').name}; chain {np.median(timer.rates) / 1e9:.4g} GFLOP/s")


if __name__ == "__main__":
    main(tyro.cli(Args))
