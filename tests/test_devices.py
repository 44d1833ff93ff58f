"""Seeds over four devices, which XLA makes of one CPU."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import iql
from common import networks
from common.harness import Dataset
from common.harness.run import to_devices


def train(num_seeds: int) -> tuple[np.ndarray, set[int], int]:
    """(metrics and actions of a few updates, devices that hold the state, seeds on each of them)."""
    args = iql.Args(num_updates=3, expectile=0.7, temperature=1.0, batch_size=8, num_eval_actions=2)
    rng = np.random.default_rng(0)
    dataset = Dataset(rng.normal(size=(50, 3)), rng.normal(size=(50, 2)), np.ones(50), np.ones((50, 3)), np.zeros(50))
    dataset = to_devices(jax.tree.map(jnp.float32, dataset))
    keys = to_devices(jax.random.split(jax.random.key(0), num_seeds), over_seeds=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "NUM_HIDDEN", 1)  # compiles sooner
        state = jax.jit(jax.vmap(lambda key: iql.init_state(key, 3, 2, args)))(keys)
    act_keys = jax.vmap(lambda key: jax.random.split(key, 4))(keys)
    state, metrics = iql.train_chunk(state, 3, keys, dataset, args, 3)
    actions = iql.act(state, np.ones((num_seeds, 4, 3), np.float32), act_keys, 0, args)
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
three = test_devices.to_devices(np.arange(3.0), over_seeds=True)
assert [shard.data.shape for shard in three.addressable_shards] == [(3,)] * 4
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    np.testing.assert_allclose(np.load(file), train(4)[0], rtol=1e-4, atol=1e-5)
