"""Files damaged at random: what is read is what was written, or one sentence says why not; no traceback, no hang."""

import itertools
import json
import random

import h5py
import numpy as np
import pytest
from helpers import damaged, record_hopper

from common.harness import load_dataset
from common.harness.datasets import resolve_task

few_or = lambda many, few: pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def read_damaged(file, count: int, **task) -> int:
    """How often damage was refused."""
    original, refused = file.read_bytes(), 0
    for i in range(count):
        file.write_bytes(damaged(original, i))
        try:
            dataset, _ = load_dataset(resolve_task(**task), "none")
        except SystemExit as error:
            assert isinstance(error.code, str)
            assert error.code.endswith(".")
            assert "\n" not in error.code
            refused += 1
            continue
        assert all(np.isfinite(array).all() for array in dataset)
        assert set(np.unique(dataset.terminal)) <= {0, 1}
    file.write_bytes(original)
    return refused


@few_or(300, few=24)
def test_minari_files(datasets, count):
    """HDF5 has no checksums here: a number that was altered in place is the one thing that cannot be seen."""
    record_hopper()
    folder = datasets / "test" / "hopper" / "random-v0" / "data"
    task = {"env_id": "", "dataset_id": "test/hopper/random-v0"}
    assert read_damaged(folder / "main_data.hdf5", 2 * count // 3, **task) > 0
    read_damaged(folder / "metadata.json", count // 3, **task)


@few_or(150, few=16)
def test_d4rl_files(datasets, tmp_path, count):
    rng, steps = np.random.default_rng(0), 300
    with h5py.File(tmp_path / "hopper.hdf5", "w") as file:
        file["observations"] = rng.normal(1.25, 0.1, (steps, 11)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (steps, 3)).astype(np.float32)
        file["rewards"] = rng.normal(size=steps).astype(np.float32)
        file["terminals"] = np.arange(steps) % 50 == 49
        file["timeouts"] = np.arange(steps) % 70 == 69
    task = {"env_id": "hopper-medium", "dataset_path": str(tmp_path / "hopper.hdf5")}
    refused = read_damaged(tmp_path / "hopper.hdf5", count, **task)
    assert refused > 0


@few_or(900, few=60)
def test_metadata_of_the_wrong_kind(datasets, capsys, count):
    """Every entry, and every field of a described environment, wrapper or space, as something else."""
    record_hopper(num_episodes=2)
    file = datasets / "test" / "hopper" / "random-v0" / "data" / "metadata.json"
    whole = json.loads(file.read_text())
    wrapper = {"name": "ClipReward", "entry_point": "gymnasium.wrappers:ClipReward", "kwargs": {"max_reward": 1}}
    spec = json.loads(whole["env_spec"]) | {"additional_wrappers": [wrapper]}
    values = [None, 0, -1, 3.5, True, "", "text", "\x1b[31m\n$(x)", [], [1], {}, {"a": 1}, [None], "9" * 400, 10**30]
    texts = {"env_spec": spec, "eval_env_spec": spec} | {
        f"{s}_space": json.loads(whole[f"{s}_space"]) for s in ("observation", "action")
    }
    cases = [{key: value} for key, value in itertools.product([*whole, "eval_env_spec"], values)]
    for (key, parts), value in itertools.product(texts.items(), values):
        cases += [{key: json.dumps(value)}, *({key: json.dumps(parts | {field: value})} for field in parts)]
        cases += [
            {key: json.dumps(spec | {"additional_wrappers": [wrapper | {f: value}]})} for f in wrapper if "env" in key
        ]
    for case in random.Random(0).sample(cases, min(count, len(cases))):
        file.write_text(json.dumps(whole | case))
        try:
            load_dataset(resolve_task("", "test/hopper/random-v0"), "none")
        except SystemExit as error:
            assert error.code.endswith("."), case
            assert error.code.isprintable(), case
        assert capsys.readouterr().out.replace("\n", "").isprintable(), case
