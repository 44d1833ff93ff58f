"""The speed benchmarks: what they write, what their count of operations means, how they refuse."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import pytest
import roofline
import speed
from jax.experimental.compilation_cache import compilation_cache

BENCHMARKS = Path(speed.__file__).parent
TINY = {"name": "test", "repeats": 2, "seconds": 0.02}


@pytest.fixture
def tiny_shapes(monkeypatch, quick_networks):
    """The benchmarks work without the cache of compiled programs; the tests after them shall have theirs."""
    monkeypatch.setitem(speed.SHAPE, "batch_size", 64)
    monkeypatch.setitem(speed.SHAPE, "dataset_size", 100)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def test_a_tiny_run_adds_to_the_figures_and_the_chart(tmp_path, tiny_shapes, monkeypatch, capsys):
    monkeypatch.setitem(speed.ENTRIES, "edp_td3bc", speed.Entry("growth's", "bc"))  # with less to compile
    monkeypatch.setattr(speed, "GROWTH", {})
    delivered = (BENCHMARKS / "results" / "speed-amd-epyc-2-cores-avx2.json").read_text()
    (tmp_path / "speed-test.json").write_text(delivered)
    args = speed.Args(only=("td3bc",), seeds=(2,), results_dir=tmp_path, peers_json=BENCHMARKS / "peers.json", **TINY)
    speed.main(args)
    before, results = json.loads(delivered), json.loads((tmp_path / "speed-test.json").read_text())
    assert results["updates"].pop("td3bc") != before["updates"].pop("td3bc")
    assert results["updates"] == before["updates"], "what was not measured is kept"
    assert results["growth"]["2, 64, 100"]["num_seeds"] == 2
    assert results["acting"]["td3bc"]["environment"]["per_second"] > 0
    assert matplotlib.image.imread(tmp_path / "speed-test.png").std() > 0.01
    assert "TD3+BC, feed-forward" in capsys.readouterr().out


@pytest.mark.parametrize("speeds", ['{"a": 1', "[]", '{"a": "fast"}', '{"a": 0}'])
def test_malformed_peers_are_refused_before_anything_is_measured(speeds, tmp_path, exit_sentence):
    path = tmp_path / "peers.json"
    path.write_text(f'{{"machine": "m", "updates_per_second": {speeds}}}')
    assert str(path) in exit_sentence(speed.main, speed.Args(peers_json=path, results_dir=tmp_path))
    assert list(tmp_path.iterdir()) == [path]


def test_operations_are_counted_once_for_each_loop_and_products_as_two_each():
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 7, lambda _, y: y @ x, x)).lower(jnp.ones((64, 64))).compile()
    assert speed.count_operations(loop) == pytest.approx(2 * 64**3, rel=0.01)
    chain = roofline.Chain(num_products=2000)
    assert jnp.linalg.norm(chain.product(chain.matrix)) == pytest.approx(16, rel=0.01), "finite, and not denormal"
