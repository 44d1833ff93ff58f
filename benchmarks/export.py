"""A trained policy to take away: one file, which JAX runs without this repository.

    python benchmarks/export.py runs/<run> policy.jax

and, where `pip install jax flatbuffers` is all there is, after `from jax import export`:

    policy = export.deserialize(bytearray(Path("policy.jax").read_bytes()))
    action = policy.call(obs, seeds, step)

obs     (batch, obs_dim) float32, of any batch, as the run's environments give them: a standardising run is included
seeds   (batch,) uint32: a number for each episode, kept through the episode
step    () int32: the number of the step in the episode; seed and step together make the randomness
action  (batch, act_dim) in [-1, 1]: the file does not know the bounds of the environment, so scale to them
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback
from dataclasses import dataclass

import jax
import jax.export
import jax.numpy as jnp
import tyro
from acting import open_run


@dataclass(frozen=True)
class Args:
    """Write the policy of a finished run to one file."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    file: tyro.conf.Positional[Path]
    """file to write"""
    seed: int | None = None
    """which of the run's seeds; by default the first"""


def main(args: Args) -> None:
    """Exits with one sentence if there is no such run or seed, or the file cannot be written."""
    run = open_run(args.run)
    seed = run.args.seed if args.seed is None else args.seed
    if seed not in run.seeds:
        raise SystemExit(f"{args.run}/ has no seed {seed}; it has {', '.join(map(str, run.seeds))}.")
    index = run.seeds.index(seed)
    one = run._replace(state=jax.tree.map(lambda leaf: leaf[index, None], run.state))

    @jax.jit
    def policy(obs, seeds, step):
        keys = jax.vmap(jax.random.key)(seeds)
        return one.act(obs[None], keys[None], step, one.args)[0]

    (batch,) = jax.export.symbolic_shape("batch")
    obs = jax.ShapeDtypeStruct((batch, run.header["dataset"]["observation_dim"]), jnp.float32)
    seeds, step = jax.ShapeDtypeStruct((batch,), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    exported = jax.export.export(policy, platforms=("cpu", "cuda", "tpu"))(obs, seeds, step)
    try:
        args.file.write_bytes(exported.serialize())
    except ImportError:
        raise SystemExit("The file's format needs flatbuffers: pip install flatbuffers.") from None
    except OSError as error:
        raise SystemExit(f"Cannot write {args.file}: {error.strerror}.") from None
    print(f"{args.file}: {run.header['algorithm']}, update {run.header['update']}, seed {seed}")


if __name__ == "__main__":
    main(tyro.cli(Args))
