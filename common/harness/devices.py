"""JAX as every run uses it: what decides numbers pinned or named, programs kept, arrays shared out over devices."""

import os
import warnings

import jax
import numpy as np
import platformdirs
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

PINNED = {  # what of JAX decides numbers and has no reason to vary
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_numpy_dtype_promotion": "standard",
}
# What else decides their last digits; NPROC is the number of XLA's threads, if not one for each core.
RECORDED = ("jax_default_matmul_precision", "jax_disable_most_optimizations", "jax_optimization_level")
RECORDED += ("jax_disable_jit", "XLA_FLAGS", "NVIDIA_TF32_OVERRIDE", "NPROC")


def pin_jax() -> None:
    """Pins what decides numbers, and starts no device yet.

    On CPUs with AVX-512, vectors of 512 bits halved the time of Mish where it was measured (one AMD EPYC).
    """
    for name, value in PINNED.items():
        jax.config.update(name, value)
    if "xla_cpu_prefer_vector_width" not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_prefer_vector_width=512".lstrip()


def set_up_jax() -> None:
    """`pin_jax`, and compiled programs kept in the user's cache folder: a second run of a shape starts at once."""
    pin_jax()
    try:
        if jax.config.jax_compilation_cache_dir is None:
            folder = platformdirs.user_cache_path("edp", appauthor=False) / "compiled"
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
            warnings.filterwarnings("ignore", "Error writing persistent compilation cache")  # of each: a full disk
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        if "home" in str(error).lower():  # of platformdirs
            raise SystemExit("There is no home folder to keep compiled programs in; set HOME.") from None
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise SystemExit(f"JAX cannot use the device that JAX_PLATFORMS={platforms} asks for; unset it.") from None


def jax_settings() -> dict[str, str]:
    """What of JAX, and of the environment, decides numbers."""
    settings = os.environ | jax.config.values
    return {name: str(settings.get(name)) for name in (*PINNED, *RECORDED)}


def to_devices(tree, over_seeds: bool = False):
    """Arrays as JAX's, on every device: copies, or, of arrays (seeds, ...), to each device its share of the seeds.

    Programs run where their arguments are. Seeds that cannot be shared out evenly are copied, too.
    """
    shared = over_seeds and jax.device_count() > 1 and len(jax.tree.leaves(tree)[0]) % jax.device_count() == 0
    mesh = Mesh(np.array(jax.devices()), ("seeds",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("seeds") if shared else PartitionSpec()))


def seed_keys(seeds: list[int], num: int) -> tuple[Key[Array, " seeds"], ...]:
    """`num` independent keys for every seed, split over the devices."""
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), num))(np.array(seeds))
    return tuple(to_devices(keys[:, i], over_seeds=True) for i in range(num))


def episode_keys(keys: Key[Array, " seeds"], update: int, shape: int | tuple[int, ...]) -> Key[Array, "seeds ..."]:
    """As many as `shape` says of every seed, for what is played after an update."""
    return jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, update), shape))(keys)
