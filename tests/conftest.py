"""Settings that all tests share, and fixtures that keep them away from the user's datasets, caches and network."""

import os
import shutil
from pathlib import Path

import jax
import pytest

from common.harness import pointmaze

ROOT = Path(__file__).parents[1]

# An accidental (batch,) + (batch, 1) is an error here, not a (batch, batch) matrix.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    # A local dataset for a test needs no author, licence or permalink; Minari warns of each that is missing.
    config.addinivalue_line("filterwarnings", "ignore:`.*` is set to None:UserWarning")


@pytest.fixture(scope="session", autouse=True)
def sandbox(tmp_path_factory):
    """A home for the session: no test reads or writes the user's datasets or caches, or waits for a network."""
    folder = tmp_path_factory.mktemp("sandbox")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # read when it was imported
        patch.setattr("common.harness.datasets.CACHE", folder / "cache" / "edp")
        patch.setattr("common.harness.run.CACHE", folder / "cache" / "edp")
        yield folder


@pytest.fixture
def quick_compilation():
    """For programs that run once, for milliseconds: without LLVM's costly passes they compile in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """An empty folder of Minari datasets, and an empty cache, for one test."""
    root = tmp_path / "minari"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    monkeypatch.setattr("common.harness.datasets.CACHE", tmp_path / "cache")
    return root


@pytest.fixture(scope="session")
def made_pointmaze(tmp_path_factory):
    """A folder of datasets that holds a small edp/pointmaze/umaze-v0."""
    root = tmp_path_factory.mktemp("pointmaze")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        pointmaze.make_dataset("edp/pointmaze/umaze-v0", num_steps=3000)
    return root


@pytest.fixture
def pointmaze_datasets(datasets, made_pointmaze):
    """A copy of `made_pointmaze` for one test, in place of the user's datasets."""
    shutil.copytree(made_pointmaze, datasets, dirs_exist_ok=True)
    return datasets


@pytest.fixture
def local_datasets(datasets, monkeypatch):
    """The read-only datasets made for this project, where the machine has them."""
    root = Path(os.environ.get("EDP_LOCAL_DATASETS") or ROOT.parent / "shared" / "minari")
    if not root.is_dir():
        pytest.skip(f"no local datasets in {root}; EDP_LOCAL_DATASETS names their folder")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


@pytest.fixture
def exit_sentence():
    """`exit_sentence(f, *args)` calls f, which has to exit with one sentence for people, and returns the sentence."""

    def call(function, *args, **kwargs) -> str:
        with pytest.raises(SystemExit) as caught:
            function(*args, **kwargs)
        sentence = caught.value.code
        assert isinstance(sentence, str), "an exit code, not a sentence"
        assert "\n" not in sentence
        assert sentence.endswith(".")
        return sentence

    return call
