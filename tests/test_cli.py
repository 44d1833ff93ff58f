"""The scripts as people run them: what they write, what they print, and how they refuse."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from typing import get_type_hints

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from helpers import ALGORITHMS, SCRIPTS, TINY, fields_of, flags_of, returns_of, rows_of

from algorithms import edp_td3bc, td3bc
from common.harness import load_run
from common.harness.checkpoint import CheckpointError
from common.harness.devices import seed_keys, set_up_jax
from common.harness.environments import check_camera
from common.harness.flags import check_flags, cli
from common.harness.tasks import ENVIRONMENTS


def module_of(algorithm: str):
    return importlib.import_module(f"algorithms.{algorithm}")


def run_script(algorithm: str, *flags, cwd, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / f"{algorithm}.py"), *map(str, flags)]
    env = os.environ | {"HOME": str(cwd), "COLUMNS": "300"} | env
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


# --------------------------------------------------------------------------------------------------- a whole run


FEW = {name: value for name, value in TINY.items() if name in fields_of("iql")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, made_pointmaze):
    """(folder, process) of a tiny real run of IQL on pointmaze in a process of its own; others: test_resume.py."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(made_pointmaze, home / "minari")
    work = home / "work"
    work.mkdir()
    env = {"MINARI_DATASETS_PATH": str(home / "minari"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    process = run_script("iql", *flags_of(**FEW), cwd=work, **env)
    assert process.returncode == 0, process.stderr
    assert [path.name for path in work.iterdir() if not path.name.startswith(".")] == ["runs"]
    (folder,) = (work / "runs").iterdir()
    assert re.fullmatch(r"pointmaze-umaze__iql__0__\d{8}-\d{6}", folder.name)
    files = {"args.json", "metrics.csv", "eval.csv", "tensorboard", "checkpoint-10.eqx", "checkpoint-20.eqx"}
    assert {path.name for path in folder.iterdir()} == files | {"learning_curve.png", "paths.png"}
    return folder, process


def test_args_json_tells_how_to_repeat_the_run(finished):
    header = json.loads((finished[0] / "args.json").read_text())
    assert (header["algorithm"], set(header["args"])) == ("iql", set(fields_of("iql")))
    of_domain = {"learning_rate": 3e-4, "reward_rule": "iql_antmaze", "expectile": 0.9, "temperature": 0.1}
    assert header["args"] | of_domain | FEW == header["args"], "the domain's, not None"
    for package in ("jax", "equinox", "optax", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari"):
        assert header["versions"][package] == importlib.metadata.version(package)
    assert header["versions"]["python"] == sys.version.split()[0]
    statistics = {"transitions": 3000, "episodes": 6, "observation_dim": 4, "action_dim": 2}
    assert header["dataset"] | statistics == header["dataset"]
    assert np.shape(header["normalization"]) == (2, 4)
    assert header["reference_returns"] == [0, 1]
    head = subprocess.run(["git", "-C", str(SCRIPTS), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (header["git_commit"] or "").removesuffix("-dirty") == head.stdout.strip()


def test_the_tables_have_every_chunk_seed_and_episode(finished):
    rows = rows_of(finished[0] / "metrics.csv")
    assert [(row["update"], row["seed"]) for row in rows] == [("10", "0"), ("10", "1"), ("20", "0"), ("20", "1")]
    assert {"policy_loss", "updates_per_second", "critic_loss"} <= set(rows[0])
    assert np.isfinite([[float(value) for value in row.values()] for row in rows]).all()
    assert rows[0]["policy_loss"] != rows[1]["policy_loss"], "seeds differ"
    assert returns_of(finished[0]).shape == (3, 2, 2), "evaluations, the first before training, seeds, episodes"
    for row in rows_of(finished[0] / "eval.csv"):
        assert row["return"] in ("0.0", "1.0")
        assert int(row["length"]) == 300 if row["return"] == "0.0" else int(row["length"]) <= 300


def test_pictures_and_tensorboard_show_something(finished):
    for name in ("learning_curve.png", "paths.png"):
        picture = matplotlib.image.imread(finished[0] / name)
        assert min(picture.shape[:2]) > 300
        assert np.ptp(picture[..., :3]) > 0.5
    for seed in (0, 1):
        (events,) = (finished[0] / "tensorboard" / f"seed_{seed}").iterdir()
        for name in (b"charts/updates_per_second", b"train/policy_loss", b"eval/score", b"eval/return", b"eval/length"):
            assert name in events.read_bytes()


def test_the_final_table_is_that_of_eval_csv_and_stderr_has_the_progress_bar_alone(finished):
    folder, process = finished
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


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"num_updates": 25, "eval_every": 10}, ["--num-updates 25", "--eval-every 10", "20"]),
        ({"num_updates": 10, "eval_every": 20}, ["--num-updates 10", "--eval-every 20"]),
        ({"seed": 3_000_000_000}, ["--seed"]),
        ({"batch_size": 10**100}, ["--batch-size", "below 2^31"]),
        ({"env_id": "bandit", "capture_video": True}, ["cannot be drawn", "--capture-video"]),
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
def test_no_number_may_be_negative_or_infinite_and_no_count_0(algorithm, exit_sentence):
    args_class = module_of(algorithm).Args
    for name, hint in get_type_hints(args_class).items():
        kinds = {hint, *getattr(hint, "__args__", ())}
        values = [-1] if int in kinds else [-0.1, np.inf, np.nan] if float in kinds else []
        values += [0] if name.startswith(("num_", "eval_every", "batch_")) else []
        for value in values:
            with contextlib.suppress(ValueError):  # what is impossible together
                flag = "--" + name.replace("_", "-")
                assert flag in exit_sentence(check_flags, args_class(**{name: value}))
    check_flags(args_class(num_updates=1, seed=0))


def test_a_share_is_between_0_and_1_and_a_diffusion_possible(exit_sentence):
    for gamma in (0.0, 1.0):
        check_flags(edp_td3bc.Args(gamma=gamma))
    assert exit_sentence(check_flags, edp_td3bc.Args(gamma=1.1)) == "--gamma must be between 0 and 1, but is 1.1."
    sentence = exit_sentence(cli, edp_td3bc.Args, ["--num-solver-calls", "2"])
    assert "order 3 needs at least 3 network calls, not 2" in sentence
    one = ["--num-diffusion-steps", "1", "--beta-schedule", "vp"]
    assert "at least 2 diffusion steps, not 1" in exit_sentence(cli, edp_td3bc.Args, one)
    cli(edp_td3bc.Args, [*one, "--sampler", "ddpm"])


DRAW = """
import sys, types
sys.modules["moviepy"] = types.ModuleType("moviepy")
from common.harness.environments import check_camera
from common.harness.tasks import ENVIRONMENTS
check_camera(ENVIRONMENTS["Hopper"])
"""


@pytest.mark.parametrize("way", ["glfw", "no such way"])
def test_where_nothing_can_be_drawn_one_sentence_has_the_remedy(way, monkeypatch, exit_sentence):
    """GLFW needs a display."""
    env = os.environ | {"MUJOCO_GL": way, "DISPLAY": ""}
    process = subprocess.run([sys.executable, "-c", DRAW], env=env, capture_output=True, text=True)
    assert process.returncode == 1
    (sentence,) = process.stderr.splitlines()
    assert all(part in sentence for part in ("MUJOCO_GL=egl", "libegl1", "MUJOCO_GL=osmesa", "libosmesa6"))
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert "pip install moviepy" in exit_sentence(check_camera, ENVIRONMENTS["Hopper"])


# ----------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_help_explains_every_flag(algorithm, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        cli(module_of(algorithm).Args, ["--help"])
    words = " ".join(re.sub(r"\x1b\[\d*m|[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
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
