"""The speed benchmark: its count of floating-point work, what it writes, how it refuses."""

import dataclasses
import importlib
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from common.data import Dataset
from jax.experimental.compilation_cache import compilation_cache

FILE = Path(__file__).parents[1] / "benchmarks" / "speed.py"
spec = importlib.util.spec_from_file_location("speed", FILE)
speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed)

ENTRIES = speed.make_entries(speed.Args(ddpm_steps=(30,), solver_calls=3))


def count(entry) -> int:
    return sum(speed.count_products(entry.algorithm, speed.make_args(entry)).values())


@pytest.mark.parametrize("name", ENTRIES)
def test_the_count_of_products_is_xlas_but_for_elementwise_operations(name, quick_compilation):
    """XLA counts elementwise operations too: 10 to 20 for Mish or its derivative in each hidden unit, where the unit's
    products take 2 x 256, and as many for each weight in Adam: 3 to 5 % in all."""
    entry, size, obs_dim, act_dim = ENTRIES[name], 1000, speed.OBS_DIM, speed.ACT_DIM
    module, args = importlib.import_module(f"algorithms.{entry.algorithm}"), speed.make_args(entry)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    state = jax.eval_shape(jax.vmap(lambda key: module.init_state(key, obs_dim, act_dim, args)), keys)
    shapes = (size, obs_dim), (size, act_dim), (size,), (size, obs_dim), (size,)
    dataset = Dataset(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    program = module.train_chunk.lower(state, 0, keys, dataset, args, 1)
    if name == "edp_iql":
        program = program.compile()  # only then is Q'(s, a), which two losses have, computed once

    if name == "dql" or name.startswith("edp_no_dpm"):  # of the chain XLA counts one step
        args = dataclasses.replace(args, num_diffusion_steps=1)
    counted = sum(speed.count_products(entry.algorithm, args).values())
    assert 1 <= program.cost_analysis()["flops"] / counted <= 1.06


def test_the_count_grows_with_k_where_the_chain_is_walked():
    entries = speed.make_entries(speed.Args(ddpm_steps=(100, 1000)))
    assert count(entries["edp_td3bc"]) < count(entries["edp_no_ap"]) < count(entries["edp_no_dpm_100"])
    assert 4 * count(entries["edp_no_dpm_100"]) < count(entries["dql"]) < 5 * count(entries["edp_no_dpm_100"])
    assert (
        8 * count(entries["edp_no_dpm_100"]) < count(entries["edp_no_dpm_1000"]) < 10 * count(entries["edp_no_dpm_100"])
    )


# --------------------------------------------------------------------------------------------------- what it writes


@pytest.fixture
def same_cache():
    """The benchmark works without the cache of compiled programs; the tests after it shall have theirs."""
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def write_peers(folder: Path, content) -> Path:
    path = folder / "peers.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def constant_weights(monkeypatch):
    """Spares compiling how weights are drawn."""

    def initial_state(algorithm, obs_dim, act_dim):
        module, args = importlib.import_module(f"algorithms.{algorithm}"), speed.make_args(ENTRIES[algorithm])
        shapes = jax.eval_shape(lambda key: module.init_state(key, obs_dim, act_dim, args), jax.random.key(0))
        return jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, leaf.dtype), shapes)

    monkeypatch.setattr(speed, "initial_state", initial_state)


def test_a_tiny_run_writes_figures_and_chart(tmp_path, quick_compilation, same_cache, constant_weights, capsys):
    shape = {"batch_size": 16, "dataset_size": 100, "per_second": 5.0}
    earlier = {"growth": {"1": shape | {"num_seeds": 1}, "2": shape | {"num_seeds": 2}}}
    (tmp_path / "speed-test.json").write_text(json.dumps(earlier))
    peers = write_peers(tmp_path, {"machine": "an abacus", "updates_per_second": {"by hand": 1e-3}})
    tiny = {"repeats": 2, "seconds": 0.02, "solver_calls": 3, "batch_size": 16, "dataset_size": 100}
    args = speed.Args(sections=("updates", "acting"), only=("edp_td3bc",), name="test", peers_json=peers, **tiny)
    speed.main(dataclasses.replace(args, results_dir=tmp_path))

    results = json.loads((tmp_path / "speed-test.json").read_text())
    assert set(results) == {"machine", "growth", "updates", "acting"}
    assert results["growth"] == earlier["growth"], "what was not measured now is kept"
    assert results["machine"]["cores"] >= 1
    assert results["machine"]["chain_flops_per_second"] > 0
    row = results["updates"]["edp_td3bc"]
    assert len(row["repeats"]) == 2
    assert min(row["repeats"]) <= row["per_second"] <= max(row["repeats"])
    assert row["of_limit"] == pytest.approx(row["flops"] * row["per_second"] / row["chain_flops_per_second"])
    assert row["compile_seconds"] > 0
    assert row.keys() >= {"git_commit", "date", "chain_repeats", "xla_to_counted"}
    assert results["acting"]["edp_td3bc"]["environment"]["per_second"] > 0
    assert matplotlib.image.imread(tmp_path / "speed-test.png").std() > 0.01
    assert "EDP + TD3+BC" in capsys.readouterr().out


def test_the_chain_of_products_stays_finite_and_off_denormal_numbers():
    timer = speed.Timer(repeats=1, seconds=0.01)
    assert jnp.linalg.norm(timer.chain(2000, timer.matrix)) == pytest.approx(16, rel=0.01)
    assert timer.rate() > 0


# --------------------------------------------------------------------------------------------------- how it refuses


@pytest.mark.parametrize(
    "content",
    [
        "{",
        [],
        {"updates_per_second": {"a": 1}},
        {"machine": "m"},
        {"machine": "m", "updates_per_second": {"a": "fast"}},
        {"machine": "m", "updates_per_second": {"a": 0}},
        {"machine": "m", "updates_per_second": {"a": True}},
        {"machine": "m", "updates_per_second": [1]},
    ],
)
def test_malformed_peers_are_refused_before_anything_is_measured(content, tmp_path, exit_sentence):
    path = write_peers(tmp_path, content)
    assert str(path) in exit_sentence(speed.main, speed.Args(peers_json=path, results_dir=tmp_path))
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_algorithm_is_refused_with_the_known_ones(exit_sentence):
    assert "edp_td3bc" in exit_sentence(speed.main, speed.Args(only=("sac",)))


def test_the_peers_that_are_delivered_can_be_read(tmp_path):
    peers = speed.read_json(FILE.with_name("peers.json"), "peers", speed.are_peers)
    speed.draw_chart({"machine": {"device": "x", "cores": 2}}, peers, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").exists()
