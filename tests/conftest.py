"""Settings that all tests share, and fixtures that keep them away from the user's datasets, caches and network."""

import json
import os
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import huggingface_hub
import jax
import pytest

from common.harness import pointmaze

ROOT = Path(__file__).parents[1]

# On the CPU unless JAX_PLATFORMS says otherwise: a GPU multiplies in TF32, which tolerances of 1e-6 do not allow.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
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
def quick_networks(quick_compilation, monkeypatch):
    """For whole runs, whose properties do not depend on depth: one hidden layer, in less than half the time again."""
    monkeypatch.setattr("common.networks.NUM_HIDDEN", 1)


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


class Hub(ThreadingHTTPServer):
    """A stand-in for Hugging Face on the loopback interface: what Minari's client asks it for datasets.

    `folder` holds <group>/<repository>/<file>. `requests` are those made; the first answer with a file whose name ends
    in `cut` breaks off in its middle. A file that is not there is answered with 404, as the hub does.
    """

    daemon_threads, commit = True, "c" * 40

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.folder, self.requests, self.cut = folder, [], None
        self.url = f"http://127.0.0.1:{self.server_port}"


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body: bytes, status=200, **headers):
        start, cut = 0, self.server.cut is not None and self.path.endswith(self.server.cut) and self.command == "GET"
        if self.headers["Range"]:
            start, status = int(self.headers["Range"].removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send_response(status)
        for name, value in (
            {"Content-Length": len(body) - start, "X-Repo-Commit": self.server.commit} | headers
        ).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if cut:
            self.server.cut, body, self.close_connection = None, body[: len(body) // 2], True
        if self.command == "GET":
            self.wfile.write(body[start:])

    def do_GET(self):
        self.server.requests.append((self.command, self.path, self.headers["Range"]))
        url = urlsplit(self.path)
        parts, query, root = url.path.strip("/").split("/"), parse_qs(url.query), self.server.folder
        send = lambda value: self.answer(json.dumps(value).encode(), Content_Type="application/json")
        about = lambda repo: {"id": repo, "sha": self.server.commit, "private": False, "tags": [], "siblings": []}
        if parts[:2] == ["api", "datasets"] and len(parts) == 2:
            group, search = query["author"][0], query.get("search", [""])[0]
            send([about(f"{group}/{path.name}") for path in (root / group).glob("*") if search in path.name])
        elif parts[:2] == ["api", "datasets"] and "tree" in parts:
            repo = root.joinpath(*parts[2:4])
            files = [path for path in sorted(repo.rglob("*")) if path.is_file()]
            entry = lambda path: {"path": path.relative_to(repo).as_posix(), "size": path.stat().st_size}
            send([entry(path) | {"type": "file", "oid": "0" * 40} for path in files])
        elif parts[:2] == ["api", "datasets"] and root.joinpath(*parts[2:4]).is_dir():
            send(about("/".join(parts[2:4])))
        elif parts == [""]:
            self.answer(b"")
        elif parts[0] == "datasets" and (file := root.joinpath(*parts[1:3], *parts[5:])).is_file():
            self.answer(file.read_bytes(), ETag=f'"{file.stat().st_size}"', Accept_Ranges="bytes")
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
def small_disk(tmp_path):
    """A file system of 64 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


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
