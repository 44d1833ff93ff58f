"""The scripts as people run them: what they write, what they print, and how they refuse."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_type_hints

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from helpers import ALGORITHMS, SCRIPTS, TINY, fields_of, flags_of, record_hopper, returns_of, rows_of, run_script, tiny

from algorithms import bc, edp_td3bc, td3bc
from common.harness import Behaviour, Run, load_run
from common.harness.checkpoint import CheckpointError
from common.harness.devices import seed_keys, set_up_jax
from common.harness.environments import check_camera
from common.harness.flags import check_flags, cli
from common.harness.records import Episodes
from common.harness.tasks import ENVIRONMENTS, TASKS


def module_of(algorithm: str):
    return importlib.import_module(f"algorithms.{algorithm}")


# --------------------------------------------------------------------------------------------------- a whole run


IN_PROCESSES = [a if a == "iql" else pytest.param(a, marks=pytest.mark.slow) for a in ALGORITHMS]


@pytest.fixture(scope="module", params=IN_PROCESSES)
def finished(request, tmp_path_factory, made_pointmaze):
    """(algorithm, folder, process) of a tiny real run on pointmaze in a process of its own."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(made_pointmaze, home / "minari")
    work = home / "work"
    work.mkdir()
    env = {"MINARI_DATASETS_PATH": str(home / "minari"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    process = run_script(request.param, *flags_of(**tiny(request.param)), cwd=work, **env)
    assert process.returncode == 0, process.stderr
    assert [path.name for path in work.iterdir() if not path.name.startswith(".")] == ["runs"]
    (folder,) = (work / "runs").iterdir()
    assert re.fullmatch(rf"pointmaze-umaze__{request.param}__0__\d{{8}}-\d{{6}}", folder.name)
    files = {"args.json", "metrics.csv", "eval.csv", "tensorboard", "checkpoint-10.eqx", "checkpoint-20.eqx"}
    assert {path.name for path in folder.iterdir()} == files | {"learning_curve.png", "paths.png"}
    return request.param, folder, process


def test_args_json_tells_how_to_repeat_the_run(finished):
    algorithm, folder, _ = finished
    header = json.loads((folder / "args.json").read_text())
    assert header["algorithm"] == algorithm
    args = header["args"]
    assert set(args) == set(fields_of(algorithm))
    rule = "iql_antmaze" if algorithm.endswith("iql") else "cql_antmaze"
    expected = {"learning_rate": 3e-4, "eta": 1.0, "reward_rule": rule, "expectile": 0.9, **tiny(algorithm)}
    expected |= {"temperature": 0.1} if algorithm == "iql" else {}
    assert args | {name: value for name, value in expected.items() if name in args} == args, "the domain's, not None"
    for package in ("jax", "equinox", "optax", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari"):
        assert header["versions"][package] == importlib.metadata.version(package)
    assert header["versions"]["python"] == sys.version.split()[0]
    statistics = {"transitions": 3000, "episodes": 6, "observation_dim": 4, "action_dim": 2}
    assert header["dataset"] | statistics == header["dataset"]
    assert np.shape(header["normalization"]) == (2, 4)
    assert header["reference_returns"] == [0, 1]
    head = subprocess.run(["git", "-C", str(SCRIPTS), "rev-parse", "HEAD"], capture_output=True, text=True)
    expected = head.stdout.strip() if head.returncode == 0 else ""
    assert (header["git_commit"] or "").removesuffix("-dirty") == expected


def test_the_tables_have_every_chunk_seed_and_episode(finished):
    algorithm, folder, _ = finished
    rows = rows_of(folder / "metrics.csv")
    assert [(row["update"], row["seed"]) for row in rows] == [("10", "0"), ("10", "1"), ("20", "0"), ("20", "1")]
    assert {"policy_loss", "updates_per_second"} | ({"critic_loss"} if algorithm != "bc" else set()) <= set(rows[0])
    assert np.isfinite([[float(value) for value in row.values()] for row in rows]).all()
    assert rows[0]["policy_loss"] != rows[1]["policy_loss"], "seeds differ"
    assert returns_of(folder).shape == (3, 2, 2), "evaluations, the first before training, seeds, episodes"
    for row in rows_of(folder / "eval.csv"):
        assert row["return"] in ("0.0", "1.0")
        assert int(row["length"]) == 300 if row["return"] == "0.0" else int(row["length"]) <= 300


def test_the_checkpoint_holds_the_trained_state(finished):
    algorithm, folder, _ = finished
    module = module_of(algorithm)
    args, state, header = load_run(folder, module)
    assert dataclasses.asdict(args) == json.loads((folder / "args.json").read_text())["args"]
    assert header["update"] == 20
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    counts = [np.ravel(leaf) for leaf in jax.tree.leaves(state) if leaf.dtype == np.int32]
    assert max(np.concatenate(counts)) == 20, "updates, as the optimizers count them"


def test_pictures_and_tensorboard_show_something(finished):
    _, folder, _ = finished
    for name in ("learning_curve.png", "paths.png"):
        picture = matplotlib.image.imread(folder / name)
        assert min(picture.shape[:2]) > 300
        assert np.ptp(picture[..., :3]) > 0.5
    for seed in (0, 1):
        (events,) = (folder / "tensorboard" / f"seed_{seed}").iterdir()
        for name in (b"charts/updates_per_second", b"train/policy_loss", b"eval/score", b"eval/return", b"eval/length"):
            assert name in events.read_bytes()


def test_the_final_table_is_that_of_eval_csv_and_stderr_has_the_progress_bar_alone(finished):
    _, folder, process = finished
    scores = 100 * returns_of(folder)[1:].mean(axis=2)
    expected = {"last score": scores[-1], "OMS": scores.max(axis=0), "RAT": scores.mean(axis=0)}
    for label, values in expected.items():
        row = f"{values.mean():.1f} +- {values.std(ddof=1):.1f}"
        assert re.search(rf"^ *{label}.* {re.escape(row)}$", process.stdout, re.MULTILINE), process.stdout
    for part in ("mean of the last 2", "behaviour", folder.name):
        assert part in process.stdout
    lines = [line for line in re.split(r"[\r\n]+", process.stderr) if line.strip(" \x1b[A")]
    assert lines
    assert all("update" in line and "%" in line for line in lines), process.stderr


# ----------------------------------------------------------------------------------------- runs that end otherwise


@pytest.fixture
def hopper_args(datasets, tmp_path, monkeypatch, quick_networks):
    """Of a run of 12 evaluations, more than RAT's ten, on short episodes."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings into the working directory
    record_hopper()
    return {"num_updates": 12, "eval_every": 1, "dataset_id": "test/hopper/random-v0", "run_dir": str(tmp_path / "run")}


def test_oms_and_rat_are_the_best_and_the_last_ten_evaluations_of_each_seed(hopper_args, tmp_path):
    results = bc.train(bc.Args(**tiny("bc") | hopper_args))
    returns = returns_of(tmp_path / "run")
    assert returns.shape == (12, 2, 2)
    scores = 100 * (returns.mean(axis=2) + 20.272305) / (3234.3 + 20.272305)
    np.testing.assert_allclose(results["last"], scores[11], rtol=1e-6)
    np.testing.assert_allclose(results["OMS"], scores.max(axis=0), rtol=1e-6)
    np.testing.assert_allclose(results["RAT"], scores[2:].mean(axis=0), rtol=1e-6)
    assert not np.allclose(results["RAT"], scores.mean(axis=0), rtol=1e-3), "more than the last ten would show"
    assert not (tmp_path / "run" / "paths.png").exists(), "no maze, no paths"


def test_a_diverging_run_exits_naming_the_update_and_keeps_what_it_has(hopper_args, tmp_path, exit_sentence):
    sentence = exit_sentence(td3bc.train, td3bc.Args(**tiny("td3bc") | hopper_args, learning_rate=1e10))
    assert "diverged" in sentence
    assert "--learning-rate" in sentence
    (update,) = map(int, re.findall(r"at update (\d+)", sentence))
    assert 1 < update <= 12, "there is something to keep"
    folder = tmp_path / "run"
    assert [int(row["update"]) for row in rows_of(folder / "metrics.csv")] == sorted([*range(1, update)] * 2)
    assert len(returns_of(folder)) == update - 1
    assert (folder / "learning_curve.png").stat().st_size > 0


# --------------------------------------------------------------------------------------------- the record of a run


def begin(folder: Path | None, **changes) -> Run:
    """The record of a tiny run on hopper-medium that has not done anything yet."""
    behaviour = Behaviour({"behaviour_score": 0.0}, np.array([1]), np.zeros(1), np.zeros(11), np.ones(11), [])
    args = edp_td3bc.Args(**TINY | changes, run_dir=folder and str(folder))
    return Run("algorithms/edp_td3bc.py", args, TASKS["hopper-medium"], behaviour, edp_td3bc.act)


def test_divergence_is_traced_to_its_update_and_seed(tmp_path, exit_sentence):
    losses = np.ones((10, 2), np.float32)  # (updates, seeds)
    with begin(tmp_path / "run", seed=5) as run:
        run.recorder.metrics(10, {"policy_loss": losses}, {})
        losses[3, 1] = np.nan
        sentence = exit_sentence(run.recorder.metrics, 20, {"policy_loss": losses}, {})
    assert "policy_loss is nan at update 14 of seed 6" in sentence
    assert [row["update"] + row["seed"] for row in rows_of(tmp_path / "run" / "metrics.csv")] == ["105", "106"]


def test_scores_are_normalized_returns_and_raw_returns_are_kept_in_full(tmp_path):
    returns = np.array([[1000.123456789, 2000.0], [0.1, 1 / 3]])
    with begin(tmp_path / "run") as run:
        run.recorder.evaluation(10, Episodes(returns, np.full((2, 2), 7), []))
        results = run.finish()
    np.testing.assert_array_equal(returns_of(tmp_path / "run")[0], returns)
    np.testing.assert_allclose(results["last"][0], 100 * (1500.0617283945 + 20.272305) / 3254.572305)


def test_of_several_runs_that_want_one_folder_one_gets_it(tmp_path):
    """Of four threads, each of which opens and locks the folder as a process does."""

    def outcome(folder):
        try:
            return os.close(begin(folder).lock)
        except SystemExit as error:
            return error.code

    with ThreadPoolExecutor(4) as pool:
        for i in range(10):
            outcomes = [*pool.map(outcome, [tmp_path / str(i)] * 4)]
            assert outcomes.count(None) == 1, outcomes
            assert all(re.search("not empty|Another process is at work", text) for text in outcomes if text)


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    assert [begin(None).folder.name.rpartition("__")[2] for _ in range(3)] == ["now", "now-1", "now-2"]


@pytest.mark.parametrize(
    ("eval_every", "row", "chunk"),
    [(10, 10, 10), (200, 200, 100), (2000, 1000, 100), (1500, 750, 125), (1009, 1009, 1009)],
)
def test_chunks_divide_rows_which_divide_the_evaluation_interval(tmp_path, eval_every, row, chunk):
    run = begin(tmp_path / "run", num_updates=eval_every, eval_every=eval_every)
    assert (run.row, run.chunk) == (row, chunk)


def test_a_row_is_the_mean_of_its_chunks(tmp_path):
    with begin(tmp_path / "run", num_updates=2000, eval_every=200) as run:
        for update, loss in ((100, 1.0), (200, 4.0)):
            run.save(update, {"weights": np.zeros(3)}, {"policy_loss": jnp.full((100, 2), loss)})
    rows = rows_of(tmp_path / "run" / "metrics.csv")
    assert [(row["update"], row["policy_loss"]) for row in rows] == [("200", "2.5")] * 2


def test_every_seed_update_and_episode_acts_by_a_key_of_its_own(tmp_path):
    """A key depends on nothing else: not on the other seeds, not on how many episodes there are."""
    runs = begin(tmp_path / "a", eval_episodes=3), begin(tmp_path / "b", seed=1, num_seeds=1, eval_episodes=2)
    data = [[jax.random.key_data(run.episode_keys(update)) for update in (1, 2)] for run in runs]
    assert len(np.unique(np.reshape(data[0], (12, -1)), axis=0)) == 12
    np.testing.assert_array_equal(np.array(data[0])[:, 1, :2], np.array(data[1])[:, 0])


OTHER_JAX = {
    "jax_enable_x64": True,
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 7,
    "jax_high_dynamic_range_gumbel": True,
    "jax_numpy_dtype_promotion": "strict",
}


@pytest.mark.parametrize("begin_with", [set_up_jax, lambda: load_run("nowhere", td3bc)], ids=["a run", "its policy"])
def test_jax_draws_and_rounds_alike_however_it_was_set_up(begin_with):
    def drawn():
        ((key,),) = seed_keys([3], 1)
        draws = jax.random.normal(key, (9,)), jax.random.categorical(key, jnp.zeros(9), shape=(9,))
        return np.stack([*draws, np.arange(9) * jnp.ones(9), jax.random.uniform(key, (9,))])

    expected = drawn()
    try:
        for name, value in OTHER_JAX.items():
            jax.config.update(name, value)
        with contextlib.suppress(CheckpointError):
            begin_with()
        np.testing.assert_array_equal(drawn(), expected, strict=True)
    finally:
        set_up_jax()


def test_what_else_of_jax_decides_digits_is_recorded_and_a_run_that_goes_on_without_it_says_so(tmp_path, capsys):
    with jax.default_matmul_precision("bfloat16"), begin(tmp_path / "run") as run:
        assert run.header["jax_settings"]["jax_default_matmul_precision"] == "bfloat16"
    begin(tmp_path / "run", resume=str(tmp_path / "run"))
    assert "Note: jax_settings differ" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # its own
def test_each_seed_is_tracked_by_a_run_of_its_own_which_resume_goes_on_with(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is an optional install")
    settings = {"MODE": "offline", "DIR": str(tmp_path), "PROJECT": "mine", "ENTITY": "us", "SILENT": "true"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    ids = []
    for change in {}, {"resume": str(tmp_path / "run")}:
        with begin(tmp_path / "run", seed=5, track=True, **change) as run:
            run.recorder.metrics(10, {"policy_loss": np.array([[1.0, 2.0]])}, {})
            ids.append([tracker.id for tracker in run.recorder.trackers])
            for tracker, seed, loss in zip(run.recorder.trackers, (5, 6), (1, 2), strict=True):
                assert (tracker.project, tracker.entity, tracker.group) == ("mine", "us", "run")
                assert tracker.config.as_dict() == {
                    "algorithm": "edp_td3bc",
                    **dataclasses.asdict(run.args),
                    "seed": seed,
                }
                logged = dict(tracker.summary)
                assert (logged["update"], logged["train/policy_loss"]) == (10, loss)
                assert logged["charts/updates_per_second"] > 0
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


@pytest.mark.parametrize(
    "ask", [lambda run: run.restore(np.broadcast_to(np.float32(0), 10**14)), lambda run: jnp.zeros(10**14).sum().item()]
)
def test_what_does_not_fit_into_memory_ends_with_a_sentence(ask, tmp_path, exit_sentence):
    def start():
        with begin(tmp_path / "run") as run:
            ask(run)

    assert "not enough memory: lower --batch-size" in exit_sentence(start)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"env_id": "hoper-medium"}, ["hoper-medium", "hopper-medium", "--dataset-id"]),
        ({"env_id": "pen-human"}, ["minari download D4RL/pen/human-v2", "pointmaze-umaze"]),
        ({"num_updates": 25, "eval_every": 10}, ["--num-updates 25", "--eval-every 10", "20"]),
        ({"num_updates": 10, "eval_every": 20}, ["--num-updates 10", "--eval-every 20"]),
        ({"gamma": 2.0}, ["--gamma", "2.0"]),
        ({"seed": 3_000_000_000}, ["--seed"]),
        ({"env_id": "bandit", "capture_video": True}, ["cannot be drawn", "--capture-video"]),
        ({"batch_size": 10**100}, ["--batch-size", "below 2^31"]),
        ({"dataset_id": "a" * 999 + "-v0"}, ["too long"]),
        ({"resume": "a" * 999}, ["too long"]),
    ],
    ids=lambda value: str(value)[:50],
)
def test_an_impossible_argument_exits_naming_it(args, named, pointmaze_datasets, tmp_path, exit_sentence):
    sentence = exit_sentence(edp_td3bc.train, edp_td3bc.Args(**TINY | {"run_dir": str(tmp_path / "run")} | args))
    assert all(part in sentence for part in named)
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_number_may_be_negative_and_no_count_0(algorithm, exit_sentence):
    args_class = module_of(algorithm).Args
    for name, hint in get_type_hints(args_class).items():
        kinds = {hint, *getattr(hint, "__args__", ())}
        values = {int: -1, float: -0.1} | ({int: 0} if name.startswith(("num_", "eval_every", "batch_")) else {})
        for kind in kinds & {int, float}:
            with contextlib.suppress(ValueError):  # an impossible diffusion
                flag = "--" + name.replace("_", "-")
                assert flag in exit_sentence(check_flags, args_class(**{name: values[kind]}))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"num_diffusion_steps": 10}, "not 10; choose 'vp'"),
        ({"num_solver_calls": 2}, "order 3 needs at least 3 network calls, not 2"),
        ({"solver_order": 4}, "not 4"),
    ],
    ids=str,
)
def test_an_impossible_diffusion_is_refused(flags, named, exit_sentence):
    assert named in exit_sentence(cli, edp_td3bc.Args, flags_of(**flags))


def test_a_run_directory_in_use_is_refused_and_left_alone(tmp_path, pointmaze_datasets, exit_sentence):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert "--run-dir" in exit_sentence(edp_td3bc.train, edp_td3bc.Args(run_dir=str(tmp_path / "run")))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.fixture
def locked():
    """A folder that may not be written to; a test that is root's goes on as nobody, who may not write everywhere."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent, "locked")
        folder.mkdir(mode=0o500)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        yield folder
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("below", [".", "below"])
def test_a_run_directory_that_cannot_be_written_to_is_refused(tmp_path, locked, below, exit_sentence):
    assert "Permission denied" in exit_sentence(begin, locked / below)


@pytest.mark.parametrize("below", [".", "below"])
def test_a_run_directory_that_is_a_file_is_refused(tmp_path, below, exit_sentence):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file" / below) in exit_sentence(begin, tmp_path / "file" / below)


def test_tracking_without_wandb_exits_with_the_remedy(tmp_path, monkeypatch, exit_sentence):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in exit_sentence(begin, tmp_path / "run", track=True)


DRAW = """
import sys, types
sys.modules["moviepy"] = types.ModuleType("moviepy")
from common.harness.environments import check_camera
from common.harness.tasks import ENVIRONMENTS
check_camera(ENVIRONMENTS["Hopper"])
"""


@pytest.mark.parametrize("way", ["glfw", "no such way"])
def test_where_nothing_can_be_drawn_one_sentence_has_the_remedy(way):
    """GLFW needs a display."""
    env = os.environ | {"MUJOCO_GL": way, "DISPLAY": ""}
    process = subprocess.run([sys.executable, "-c", DRAW], env=env, capture_output=True, text=True)
    assert process.returncode == 1
    (sentence,) = process.stderr.splitlines()
    assert all(part in sentence for part in ("MUJOCO_GL=egl", "libegl1", "MUJOCO_GL=osmesa", "libosmesa6"))


def test_video_without_moviepy_exits_with_the_remedy(monkeypatch, exit_sentence):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert "pip install moviepy" in exit_sentence(check_camera, ENVIRONMENTS["Hopper"])


def test_a_refusal_is_one_sentence_on_stderr(tmp_path):
    flags, env = flags_of(env_id="kitchen-mixed"), {"MINARI_DATASETS_PATH": str(tmp_path / "minari")}
    process = run_script("edp_td3bc", *flags, cwd=tmp_path, **env)
    assert (process.returncode, process.stdout) == (1, "")
    (sentence,) = process.stderr.splitlines()
    assert "minari download D4RL/kitchen/mixed-v2" in sentence
    assert not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_help_explains_every_flag(algorithm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as caught:
        cli(module_of(algorithm).Args, ["--help"])
    assert caught.value.code == 0
    words = " ".join(re.sub(r"\x1b\[\d*m|[│╭╮╰╯─]", " ", printed.getvalue()).split())
    boxes = re.findall(r" (\w+) options ", words)
    assert (boxes[0], boxes[-3:]) == ("algorithm", ["optimisation", "evaluation", "experiment"])
    fields = fields_of(algorithm)
    assert len(fields) > 20
    for name, text in fields.items():
        assert "--" + name.replace("_", "-") in words
        assert " ".join(text.split()) in words, f"{name} is not explained"


@dataclasses.dataclass(frozen=True)
class Unexplained:
    """Of little use.

    Note: this is no field.
    """

    first: int = 1

    # Section
    second: float | None = None
    third: str = ""
    """Over two
    lines."""


def test_flags_without_a_text_or_a_section_are_read_all_the_same(capsys):
    assert cli(Unexplained, ["--first", "2", "--second", "3"]) == Unexplained(2, 3.0)
    with pytest.raises(SystemExit):
        cli(Unexplained, ["--help"])
    assert "Over two lines." in " ".join(capsys.readouterr().out.split())
