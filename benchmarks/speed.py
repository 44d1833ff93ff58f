"""How fast this code learns and acts here: Fig. 2 and C.5 of the EDP paper done again.

    python benchmarks/speed.py                              # everything: some ten minutes on two slow CPU cores
    python benchmarks/speed.py --quick                      # two to four minutes
    python benchmarks/speed.py --sections updates --only dql edp_td3bc    # what was measured before is kept

writes benchmarks/results/speed-<name>.json, with every repeat, and a chart beside it. Sections:

    updates   updates per second of each algorithm at the shapes of walker2d (observation 17, action 6, batch 256), on
              random transitions on the device: speed does not depend on their values
    acting    environment steps per second of ten Hopper-v5 in the evaluation that training uses, with N = 10 candidate
              actions; and actions per second of the policy alone, for ten observations at a time and for one
    growth    edp_td3bc with more seeds in one program, larger batches, larger datasets

A speed is the median of its repeats, without compilation, whose seconds stand beside it. roofline.py tells where the
time goes. The paper does not say with which K it made Fig. 2. Diffusion-QL and EDP w/o DPM act equally fast there, so
it was the same for both: taken to be K = 100, as in Table 7. EDP w/o DPM is also measured with the K = 1000 of EDP.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback
import importlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

from common.harness import Dataset, Evaluator
from common.harness.checkpoint import write_atomically
from common.harness.devices import seed_keys, set_up_jax
from common.harness.run import git_commit, versions
from common.harness.tasks import ENVIRONMENTS, LOCOMOTION, with_domain_defaults

WALKER2D, HOPPER = (17, 6), (11, 3)  # sizes of observation and action


class Entry(NamedTuple):
    label: str
    algorithm: str  # the name of its file
    flags: dict[str, Any] = {}


ENTRIES = {  # by the names that --only takes
    "dql": Entry("Diffusion-QL, K = 100", "dql_baseline", {"num_diffusion_steps": 100}),
    "edp_no_ap": Entry("EDP w/o AP", "edp_td3bc", {"action_approx": False}),
    "edp_no_dpm_100": Entry("EDP w/o DPM, K = 100", "edp_td3bc", {"sampler": "ddpm", "num_diffusion_steps": 100}),
    "edp_no_dpm_1000": Entry("EDP w/o DPM, K = 1000", "edp_td3bc", {"sampler": "ddpm", "num_diffusion_steps": 1000}),
    "edp_td3bc": Entry("EDP + TD3+BC", "edp_td3bc"),
    "edp_crr": Entry("EDP + CRR", "edp_crr"),
    "edp_iql": Entry("EDP + IQL", "edp_iql"),
    "td3bc": Entry("TD3+BC, feed-forward", "td3bc"),
    "crr": Entry("CRR, feed-forward", "crr"),
    "iql": Entry("IQL, feed-forward", "iql"),
    "bc": Entry("BC, feed-forward", "bc"),
}
ACTING = ("edp_td3bc", "edp_no_dpm_100", "edp_no_dpm_1000", "td3bc")  # the others act like one of these
QUICK = ("dql", "edp_td3bc", "edp_iql", "edp_no_dpm_100")
SHAPE = {"num_seeds": 1, "batch_size": 256, "dataset_size": 100_000}
GROWTH = {"batch_size": (512, 1024, 2048), "dataset_size": (10_000, 1_000_000)}  # and --seeds


@dataclass(frozen=True)
class Settings:
    """What roofline.py has, too."""

    name: str | None = None
    """what the results call the machine; by default its processor or GPU"""
    results_dir: Path = Path(__file__).resolve().parent / "results"
    """where the results go"""
    repeats: int = 5
    """how often each speed is timed"""
    seconds: float = 1.0
    """roughly how long each timing takes"""


@dataclass(frozen=True)
class Args(Settings):
    """Updates and environment steps per second on this machine."""

    sections: tuple[Literal["updates", "acting", "growth"], ...] = ("updates", "acting", "growth")
    """what to measure"""
    only: tuple[Literal[(*ENTRIES,)], ...] = tuple(ENTRIES)
    """the algorithms whose updates and acting are measured"""
    seeds: tuple[int, ...] = (1, 2, 4, 8, 16)
    """how many in one program, for growth"""
    quick: bool = False
    """fewer algorithms, three short repeats, no growth, results under a name of their own"""
    peers_json: Path | None = None
    """figures of other implementations for the chart: {"machine": text, "updates_per_second": {name: number}}"""


# -------------------------------------------------------------------------------------------------------- measuring


def measure(call: Callable[[], Any], units: float, settings: Settings, between: Callable = lambda: None) -> dict:
    """Units per second of `call()`, each of which is `units`, begun without a wait; `between()` around the repeats."""
    jax.block_until_ready(call())  # compiles
    start = time.perf_counter()
    jax.block_until_ready(call())
    calls, speeds = math.ceil(settings.seconds / (time.perf_counter() - start)), []
    between()
    for _ in range(settings.repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        speeds.append(calls * units / (time.perf_counter() - start))
        between()
    return {"per_second": float(np.median(speeds)), "repeats": speeds}


def make_inputs(entry: Entry, dims: tuple[int, int], size: int, **flags):
    """(module, arguments, state, keys, dataset of random numbers) of an algorithm. All seeds start alike."""
    module, (obs_dim, act_dim) = importlib.import_module(f"algorithms.{entry.algorithm}"), dims
    args = with_domain_defaults(module.Args(**entry.flags, **flags), LOCOMOTION)
    rng, shapes = np.random.default_rng(0), ((size, obs_dim), (size, act_dim), (size,), (size, obs_dim), (size,))
    dataset = Dataset(*(jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32) for shape in shapes))
    (keys,) = seed_keys(list(range(args.num_seeds)), 1)
    repeat = lambda leaf: jnp.repeat(leaf[None], args.num_seeds, axis=0)
    state = jax.tree.map(repeat, module.init_state(keys[0], *dims, args))
    return module, args, state, keys, dataset._replace(terminal=jnp.zeros(size))


def measure_updates(entry: Entry, settings: Settings, between: Callable = lambda: None, **shape) -> dict:
    """Updates per second in chunks, as training makes them."""
    shape = SHAPE | shape
    seeds, batch_size, size = shape.values()
    module, args, state, keys, dataset = make_inputs(entry, WALKER2D, size, num_seeds=seeds, batch_size=batch_size)
    chain = args.num_diffusion_steps if getattr(args, "sampler", "dpm") == "ddpm" else 10
    most = 200 if jax.default_backend() == "cpu" else 10_000  # so that a chunk takes some half a second
    chunk = math.ceil(most / chain * 256 / (seeds * batch_size))
    start = time.perf_counter()
    compiled = module.train_chunk.lower(state, chunk, keys, dataset, args, chunk).compile()
    row = {"label": entry.label} | shape | {"chunk": chunk, "compile_seconds": time.perf_counter() - start}
    if chain == 10:
        row["flops"] = count_operations(compiled)

    def call():
        nonlocal state  # the next call's, which takes over its memory
        state, metrics = compiled(state, chunk, keys, dataset, args)
        return metrics

    return row | measure(call, chunk, settings, between)


def count_operations(compiled) -> float:
    """XLA's count. It counts the body of a loop once: one update of a chunk, but one step of a DDPM chain, too."""
    return (compiled.cost_analysis() or {}).get("flops", math.nan)


# --------------------------------------------------------------------------------------------------------- sections
# Each prints a table line by line, and yields the lines' names and results.


def updates(args: Args) -> Iterator[tuple[str, dict]]:
    print_line("", "updates/s", "min", "max", "compile s")
    for name in args.only:
        row = measure_updates(ENTRIES[name], args)
        print_line(row["label"], *summary(row), row["compile_seconds"])
        yield name, row


def growth(args: Args) -> Iterator[tuple[str, dict]]:
    print_line("seeds, batch, dataset", "updates/s", "min", "max", "all seeds", "compile s")
    grown = {"num_seeds": args.seeds} | GROWTH
    for shape in (SHAPE | {key: value} for key, values in grown.items() for value in values):
        name = ", ".join(map(str, shape.values()))
        row = measure_updates(ENTRIES["edp_td3bc"], args, **shape)
        print_line(name, *summary(row), row["per_second"] * row["num_seeds"], row["compile_seconds"])
        yield name, row


def acting(args: Args) -> Iterator[tuple[str, dict]]:
    print_line("", "env steps/s", "min", "max", "10 obs: /s", "min", "max", "1 obs: /s", "min", "max")
    for name in (name for name in ACTING if name in args.only):
        module, a, state, keys, _ = make_inputs(ENTRIES[name], HOPPER, 10, num_eval_actions=10)
        keys = jax.random.split(keys[0], (1, 10))
        act = lambda obs, keys, step: module.act(state, obs, keys, step, a)
        obs = np.random.default_rng(0).normal(size=(1, 10, HOPPER[0])).astype(np.float32)
        ten = measure(lambda: act(obs, keys, 0), 10, args)
        one = measure(lambda: act(obs[:, :1], keys[:, :1], 0), 1, args)
        # hoppers that fall do not end: an untrained policy's episodes last as long as a good one's
        length = int(np.clip(args.seconds * ten["per_second"] / 20, 10, 1000))
        hopper = ENVIRONMENTS["Hopper"]._replace(max_steps=length, kwargs={"terminate_when_unhealthy": False})
        evaluate = Evaluator(hopper, [0], 10)
        steps = measure(lambda: evaluate(act, keys, 0).returns, 10 * length, args)
        print_line(ENTRIES[name].label, *summary(steps), *summary(ten), *summary(one))
        rows = {"environment": steps, "ten_observations": ten, "one_observation": one}
        yield name, {"label": ENTRIES[name].label} | rows


# --------------------------------------------------------------------------------------------------- tables and files


def print_line(label: str, *cells) -> None:
    print(f"{label:<28}" + "".join(f"{c if isinstance(c, str) else format(c, '.4g'):>12}" for c in cells), flush=True)


def summary(row: dict) -> tuple[float, float, float]:
    return row["per_second"], min(row["repeats"]), max(row["repeats"])


def read_peers(path: Path) -> dict:
    try:
        peers = json.loads(path.read_text())
        if peers["machine"] and all(0 < speed < math.inf for speed in peers["updates_per_second"].values()):
            return peers
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    raise SystemExit(f"{path} does not hold a machine and updates_per_second above 0, as benchmarks/peers.json does.")


def record(settings: Settings, sections: dict[str, Callable], suffix: str = "") -> tuple[dict, Path]:
    """Measures the sections; every row is in the file as soon as it is known. Returns all results, and their file."""
    if settings.repeats < 1 or not settings.seconds > 0:
        raise SystemExit("--repeats and --seconds have to be positive.")
    set_up_jax()
    jax.config.update("jax_enable_compilation_cache", False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about, device = Path("/proc/cpuinfo"), jax.devices()[0].device_kind
    model = re.search(r"model name\s*: (.*)", about.read_text() if about.exists() else "")
    processor = model[1] if model else platform.processor()
    machine = {"device": processor if device == "cpu" else device, "processor": processor, "cores": cores}
    name = settings.name or re.sub(r"[^a-z0-9]+", "-", f"{machine['device']} {cores} cores".lower())
    file = settings.results_dir / f"speed-{name}{suffix}.json"
    results = (json.loads(file.read_text()) if file.exists() else {}) | {"machine": machine | {"versions": versions()}}
    print(f"{machine['device']}, {cores} core(s); results in {file}")
    file.parent.mkdir(parents=True, exist_ok=True)
    origin = {"git_commit": git_commit(), "date": time.strftime("%Y-%m-%d")}
    for section, measure_rows in sections.items():
        print(f"\n{section}")
        for row_name, row in measure_rows(settings):
            results.setdefault(section, {})[row_name] = row | origin
            text = json.dumps(results, indent=1).encode()
            write_atomically(file, lambda stream: stream.write(text))
    return results, file


def draw_chart(results: dict, peers: dict | None, file: Path) -> None:
    """Updates per second of all that were measured, and of the peers, the fastest first; points, as a bar on a
    logarithmic axis has no length that means anything."""
    machine, rows = results["machine"], results["updates"]
    cores = {1: "one core", 2: "two cores"}.get(machine["cores"], f"{machine['cores']} cores")
    where = f"{cores} of an {machine['device']}" if machine["device"] == machine["processor"] else machine["device"]
    title = f"Updates per second on {where}" + (", and as a multiple of Diffusion-QL's" if "dql" in rows else "")
    points = [(row["label"], row["repeats"], "tab:blue") for row in rows.values()]
    if peers:
        points += [(name, [speed], "tab:gray") for name, speed in peers["updates_per_second"].items()]
        title += f"\ngray: other implementations, on {peers['machine']}"
    slow = np.median(rows["dql"]["repeats"]) if "dql" in rows else None
    figure = Figure(figsize=(7.4, 0.9 + 0.32 * len(points)), layout="constrained")
    ax = figure.subplots()
    points.sort(key=lambda point: np.median(point[1]), reverse=True)
    for y, (_, speeds, color) in enumerate(points):
        median = np.median(speeds)
        ax.plot([min(speeds), max(speeds)], [y, y], color=color, linewidth=2)
        ax.plot(median, y, "o", color=color)
        text = f"{median:,.0f}" if median >= 100 else f"{median:.3g}"
        if slow and color == "tab:blue" and median > 1.5 * slow:
            text += f", {median / slow:.0f} times"
        ax.annotate(f"  {text}", (max(speeds), y), va="center", xytext=(4, 0), textcoords="offset points")
    ax.set_yticks(range(len(points)), [label for label, *_ in points])
    ax.set(xscale="log", xlabel="updates per second, logarithmic")
    low, high = ax.get_xlim()
    ax.set_xlim(low, high * 5)  # for the text beside the points
    ax.grid(axis="x", color="0.9")
    figure.suptitle(title, fontsize="medium")
    ax.invert_yaxis()
    figure.savefig(file, dpi=150)


def main(args: Args) -> None:
    peers = None if args.peers_json is None else read_peers(args.peers_json)
    if args.quick:
        names, sections = [name for name in QUICK if name in args.only], [s for s in args.sections if s != "growth"]
        if not names:
            raise SystemExit(f"--quick measures {', '.join(QUICK)} alone; leave it out.")
        args = replace(args, repeats=3, seconds=0.3, only=names, sections=sections)
    functions = {"updates": updates, "acting": acting, "growth": growth}
    results, file = record(args, {name: functions[name] for name in args.sections}, "-quick" if args.quick else "")
    if "updates" in results:
        draw_chart(results, peers, file.with_suffix(".png"))
        print(f"\nchart in {file.with_suffix('.png')}")


if __name__ == "__main__":
    main(tyro.cli(Args))
