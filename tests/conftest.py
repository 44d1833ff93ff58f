"""Settings that all tests share, and fixtures that keep them away from the user's datasets, caches and network."""

import functools
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

# What decides numbers is the same for everybody, whatever the environment says. JAX reads it when it is imported.
for name in [name for name in os.environ if name.startswith("JAX_") and name != "JAX_PLATFORMS"]:
    del os.environ[name]
os.environ["XLA_FLAGS"] = os.environ.get("EDP_TEST_XLA_FLAGS", "")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # a GPU would multiply in TF32

import huggingface_hub
import jax
import numpy as np
import pytest
from helpers import quickly

from common import recipes
from common.diffusion import make_schedule

ROOT = Path(__file__).parents[1]

# An accidental (batch,) + (batch, 1) is an error here, not a (batch, batch) matrix.
jax.config.update("jax_numpy_rank_promotion", "raise")


# EDP_TEST_TIGHTER=3 divides all tolerances, to see how far the numbers are from them (test_everywhere.py).
if TIGHTER := float(os.environ.get("EDP_TEST_TIGHTER", 0)):
    assert_allclose = np.testing.assert_allclose

    @functools.wraps(assert_allclose)
    def tighter(actual, desired, rtol=1e-7, atol=0, **options):
        assert_allclose(actual, desired, rtol / TIGHTER, atol / TIGHTER, **options)

    np.testing.assert_allclose = tighter


def pytest_configure(config):
    # Without its newer code generator XLA compiles what `quick_compilation` is for in a quarter of the time.
    if jax.__version_info__ < (0, 11) and "EDP_TEST_XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
    # A local dataset for a test needs no author, licence or permalink; Minari warns of each that is missing.
    config.addinivalue_line("filterwarnings", "ignore:(`.*` is set to|env_spec is) None:UserWarning")


@pytest.fixture(scope="session", autouse=True)
def sandbox(tmp_path_factory):
    """A home for the session: no test reads or writes the user's datasets or caches, or waits for a network.

    What one process of the session has compiled, be it a worker or a script that a test starts, the others load.
    """
    folder = tmp_path_factory.mktemp("sandbox")
    base = tmp_path_factory.getbasetemp()  # a worker's lies in that of all workers
    compiled = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("compilation_cache_dir", compiled), ("persistent_cache_min_compile_time_secs", 0.5)):
            jax.config.update(f"jax_{name}", value)
            patch.setenv(f"JAX_{name.upper()}", str(value))
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        patch.setenv("HF_HUB_OFFLINE", "1")  # without it the client asks for half a minute
        patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # read when it was imported
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield folder


@pytest.fixture
def float64():
    """All that a test computes with JAX, as it does by default elsewhere, is computed in float64.

    JAX converts a NumPy array that many calls use once, and has float32 of it in float64 programs, too, and the other
    way round. The schedules, which live as long as the process, are made anew.
    """
    make_schedule.cache_clear()
    with jax.enable_x64(True):
        yield
    make_schedule.cache_clear()


@pytest.fixture
def quick_compilation():
    """For programs that run once, for milliseconds: without LLVM's costly passes they compile in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def quick_networks():
    with quickly():
        yield


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """An empty folder of Minari datasets for one test."""
    root = tmp_path / "minari"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


@pytest.fixture(scope="session")
def made_pointmaze(tmp_path_factory):
    """A folder of datasets that holds a small edp/pointmaze/umaze-v0."""
    root = tmp_path_factory.mktemp("pointmaze")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        recipes.make_dataset("edp/pointmaze/umaze-v0", num_steps=3000)
    return root


@pytest.fixture
def pointmaze_datasets(datasets, made_pointmaze):
    """A copy of `made_pointmaze` for one test, in place of the user's datasets."""
    shutil.copytree(made_pointmaze, datasets, dirs_exist_ok=True)
    return datasets


class Hub(ThreadingHTTPServer):
    """A stand-in for Hugging Face on the loopback interface: what Minari's client asks it for datasets.

    `folder` holds <group>/<repository>/<file>; `requests` are the paths that were asked for. What is not there is
    answered with 404, as the hub does.
    """

    daemon_threads, commit = True, "c" * 40

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.folder, self.requests = folder, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body: bytes, status=200, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body), "X-Repo-Commit": self.server.commit} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        self.server.requests.append(self.path)
        url, root = urlsplit(self.path), self.server.folder
        parts, query = url.path.strip("/").split("/"), parse_qs(url.query)
        send = lambda value: self.answer(json.dumps(value).encode(), Content_Type="application/json")
        about = lambda repo: {"id": repo, "sha": self.server.commit, "private": False, "tags": [], "siblings": []}
        if parts == ["api", "datasets"]:
            group, search = query["author"][0], query.get("search", [""])[0]
            send([about(f"{group}/{path.name}") for path in (root / group).glob("*") if search in path.name])
        elif parts[:2] == ["api", "datasets"] and "tree" in parts:
            repo = root.joinpath(*parts[2:4])
            sizes = {
                path.relative_to(repo).as_posix(): path.stat().st_size for path in repo.rglob("*") if path.is_file()
            }
            send([{"path": path, "size": size, "type": "file", "oid": "0" * 40} for path, size in sizes.items()])
        elif parts[:2] == ["api", "datasets"]:
            send(about("/".join(parts[2:4])))
        elif parts[0] == "datasets" and (file := root.joinpath(*parts[1:3], *parts[5:])).is_file():
            self.answer(file.read_bytes(), ETag=f'"{file.stat().st_size}"')
        else:
            self.answer(b"", 404, X_Error_Code="EntryNotFound" if parts[0] == "datasets" else "RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running `Hub` that Minari's client downloads from, with nothing in it."""
    monkeypatch.delenv("MINARI_REMOTE", raising=False)
    with Hub(tmp_path / "hub") as server:
        constants = huggingface_hub.constants
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


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
