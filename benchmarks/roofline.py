"""Where the time goes: the share of the machine's best in an update, the parts of an update, start-up.

    python benchmarks/roofline.py                        # everything: some minutes on two slow CPU cores
    python benchmarks/roofline.py --sections startup     # one section

adds to benchmarks/results/speed-<name>.json, as speed.py, whose measuring it shares. Sections:

    roofline  "of limit" is the time that the operations of an update would take at the rate of a chain of 256x256x256
              float32 products, timed in turn with the repeats, as a share of what the update takes. XLA counts the
              operations, some 3 % of them elementwise. Of a chain of DDPM it counts one step: not measured here
    parts     of an update of edp_td3bc, each timed in a loop of its own; the rest draws the batch, moves the weights
    startup   on a million antmaze-like steps: seconds to load them, and from the command to the first update, with
              programs to compile and then compiled
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback
import math
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

import jax
import jax.numpy as jnp
import minari
import numpy as np
import speed
import tyro
from minari.data_collector import EpisodeBuffer

from common.harness.environments import make_gym_env
from common.harness.tasks import ENVIRONMENTS

ROOT = Path(__file__).resolve().parents[1]
STARTUP_DATASET, STARTUP_STEPS = "speed/antmaze-v0", 1_000_000


@dataclass(frozen=True)
class Args(speed.Settings):
    """Measure updates against the machine's best rate, the parts of an update, and start-up."""

    sections: tuple[Literal["roofline", "parts", "startup"], ...] = ("roofline", "parts", "startup")
    """what to measure"""


# ------------------------------------------------------------------------------------------------------- the machine


class Chain:
    """Products of matrices, one after another; each call adds its operations per second to `rates`."""

    def __init__(self, num_products: int = 1000):
        self.rates, self.num_products = [], num_products
        # an orthogonal matrix, whose powers neither overflow nor fade into slow denormal numbers
        self.matrix = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(256, 256)))[0], jnp.float32)
        self.product = jax.jit(lambda matrix: jax.lax.fori_loop(0, num_products, lambda _, x: x @ matrix, matrix))
        self.product(self.matrix)

    def __call__(self) -> None:
        start = time.perf_counter()
        self.product(self.matrix).block_until_ready()
        self.rates.append(2 * 256**3 * self.num_products / (time.perf_counter() - start))

    def compare(self, row: dict) -> dict:
        """The row, with its share of the rates since the last comparison."""
        rates, self.rates = self.rates, []
        limit = float(np.median(rates))
        share = row["flops"] * row["per_second"] / limit
        return row | {"chain_flops_per_second": limit, "chain_repeats": rates, "of_limit": share}


def roofline(args: Args) -> Iterator[tuple[str, dict]]:
    chain = Chain()
    speed.print_line("", "updates/s", "GFLOP", "chain GFLOP/s", "of limit")
    for name, entry in speed.ENTRIES.items():
        if "num_diffusion_steps" not in entry.flags:
            row = chain.compare(speed.measure_updates(entry, args, chain))
            cells = row["per_second"], row["flops"] / 1e9, row["chain_flops_per_second"] / 1e9
            speed.print_line(row["label"], *cells, f"{row['of_limit']:.0%}")
            yield name, row


# ------------------------------------------------------------------------------------------------ parts of an update


def parts(args: Args) -> Iterator[tuple[str, dict]]:
    """Each in a scan of its own; what it reads differs from step to step, so that no work leaves the loop."""
    chain, entry, num_steps, batch_size = Chain(), speed.ENTRIES["edp_td3bc"], 50, speed.SHAPE["batch_size"]
    module, a, state, keys, batch = speed.make_inputs(entry, speed.WALKER2D, batch_size, batch_size=batch_size)
    gradient = lambda loss, *inputs: jax.grad(loss, has_aux=True)(*inputs)[0]
    functions = {
        "critic target": lambda s, batch, key: module.critic_target(s.target_critics, s.target_policy, batch, key, a),
        "critic gradient": lambda s, batch, key: gradient(module.critic_loss, s.critics, batch.reward, batch),
        "policy gradient": lambda s, batch, key: gradient(module.policy_loss, s.policy, s.critics, batch, key, a),
    }
    whole = chain.compare(speed.measure_updates(entry, args, chain))
    rest = 1 / whole["per_second"]
    speed.print_line("", "ms", "of update", "GFLOP", "of limit")
    for name, function in functions.items():
        all_seeds = jax.vmap(function, (0, None, 0))  # as in training
        result = jax.tree.map(jnp.zeros_like, jax.eval_shape(all_seeds, state, batch, keys))

        def loop(result, state, batch, keys):
            def step(result, n):
                late = 1e-30 * jax.tree.leaves(result)[0].ravel()[0]  # known only when the step before has its result
                late_batch = jax.tree.map(lambda array: array + late, batch)
                return all_seeds(state, late_batch, jax.vmap(jax.random.fold_in, (0, None))(keys, n)), None

            return jax.lax.scan(step, result, jnp.arange(num_steps))[0]

        inputs = result, state, batch, keys
        compiled = jax.jit(loop).lower(*inputs).compile()
        row = speed.measure(lambda: compiled(*inputs), num_steps, args, chain)
        row = chain.compare(row | {"flops": speed.count_operations(compiled)})
        rest -= 1 / row["per_second"]
        print_part(name, row, whole)
        yield name, row
    speed.print_line("rest", rest * 1e3, f"{rest * whole['per_second']:.0%}")
    print_part("whole update", whole, whole)
    yield "whole update", whole


def print_part(label: str, row: dict, whole: dict) -> None:
    share = whole["per_second"] / row["per_second"]
    speed.print_line(label, 1e3 / row["per_second"], f"{share:.0%}", row["flops"] / 1e9, f"{row['of_limit']:.0%}")


# ---------------------------------------------------------------------------------------------------------- start-up
LOAD = rf"""
import re, time
from pathlib import Path
from common.harness.datasets import load_dataset, resolve_task
start = time.perf_counter()
load_dataset(resolve_task("", "{STARTUP_DATASET}"), "cql_antmaze")
print(time.perf_counter() - start, re.search("VmHWM:\s*(.*) kB", Path("/proc/self/status").read_text())[1])
"""


def startup(args: Args) -> Iterator[tuple[str, dict]]:
    """In new processes, with datasets and compiled programs in a temporary folder."""
    speed.print_line("", "seconds", "peak MB")
    with tempfile.TemporaryDirectory() as folder:
        places = {"MINARI_DATASETS_PATH": folder, "XDG_CACHE_HOME": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
        with patch.dict(os.environ, places):
            write_dataset(STARTUP_STEPS)
            output = subprocess.run([sys.executable, "-c", LOAD], check=True, capture_output=True).stdout
            seconds, kilobytes = map(float, output.split()[-2:])
            speed.print_line("load", seconds, 1024 * kilobytes / 1e6)
            yield "load", {"seconds": seconds, "peak_bytes": 1024 * kilobytes}
            for before in ("nothing compiled", "all compiled"):
                seconds = seconds_to_first_update(Path(folder, before))
                speed.print_line(f"first update, {before}", seconds)
                yield f"first update, {before}", {"seconds": seconds}


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


def seconds_to_first_update(run_dir: Path) -> float:
    """From the command until the metrics of the first chunk, here of two updates, are in their file."""
    command = [sys.executable, ROOT / "algorithms" / "edp_td3bc.py", "--dataset-id", STARTUP_DATASET]
    command += ["--num-updates", "2", "--eval-episodes", "1", "--run-dir", run_dir]
    start = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return (run_dir / "metrics.csv").stat().st_mtime - start


if __name__ == "__main__":
    args = tyro.cli(Args)
    speed.record(args, {name: globals()[name] for name in args.sections})
