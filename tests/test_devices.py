"""Seeds over four devices, which XLA makes of one CPU."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from common.data import Dataset
from common.devices import replicate, split_seeds

from algorithms import edp_iql


def train(num_seeds: int) -> tuple[np.ndarray, set[int], int]:
    """(metrics and actions of a few updates, devices that hold the state, seeds on each of them)."""
    args = edp_iql.Args(
        num_updates=3, learning_rate=3e-4, eta=1.0, expectile=0.7, batch_size=8, num_solver_calls=1, solver_order=1
    )
    rng = np.random.default_rng(0)
    dataset = replicate(
        jax.tree.map(
            jnp.float32,
            Dataset(rng.normal(size=(50, 3)), rng.normal(size=(50, 2)), np.ones(50), np.ones((50, 3)), np.zeros(50)),
        )
    )
    (keys,) = split_seeds((jax.random.split(jax.random.key(0), num_seeds),))
    state = jax.jit(jax.vmap(lambda key: edp_iql.init_state(key, 3, 2, args)))(keys)
    state, metrics = edp_iql.train_chunk(state, 0, keys, dataset, args, 3)
    actions = edp_iql.select_action(state.policy, state.critics, np.ones((num_seeds, 4, 3)), keys, 0, args)
    shards = state.value.mlp.layers[0].bias.addressable_shards
    numbers = np.concatenate([*(np.ravel(value) for value in metrics.values()), np.ravel(actions)])
    return numbers, {shard.device.id for shard in shards}, shards[0].data.shape[0]


def test_four_devices_give_what_one_gives(tmp_path, quick_compilation):
    """Four seeds are shared out; three cannot be, and are trained by every device."""
    file = tmp_path / "numbers.npy"
    program = f"""
import jax, numpy as np, test_devices
jax.config.update("jax_disable_most_optimizations", True)
numbers, devices, seeds_of_a_device = test_devices.train(4)
assert devices == {{0, 1, 2, 3}}, devices
assert seeds_of_a_device == 1
np.save({str(file)!r}, numbers)
(three,) = test_devices.split_seeds((np.arange(3.0),))
assert [shard.data.shape for shard in three.addressable_shards] == [(3,)] * 4
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | flags,
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    np.testing.assert_allclose(np.load(file), train(4)[0], rtol=1e-4, atol=1e-5)
