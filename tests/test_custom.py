"""Anybody's Minari dataset, in its own environment: what can be learned, and what is refused with a sentence."""

import dataclasses
import json
import os
import re
from collections import OrderedDict

import acting
import gymnasium
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Tuple, flatten
from helpers import change_metadata, evaluated, quickly, record, record_hopper, rows_of, write_dataset
from minari.serialization import serialize_space

from algorithms import bc
from common.harness import Evaluator, load_dataset
from common.harness.datasets import resolve_task
from common.harness.environments import make_env, make_gym_env
from common.harness.recorded import task_of_dataset
from common.harness.tasks import TASKS

UNIT = Box(-1, 1, (2,))
SCALED = Box(np.array([-2, 0], np.float32), np.array([3, 1], np.float32))
LEARNABLE = {  # six numbers each
    "flat": Box(-np.inf, np.inf, (6,), np.float64),
    "integers": Box(0, 9, (6,), np.int64),
    "two dimensions": Box(-1, 1, (2, 3)),
    "keys not in alphabetical order": Dict(OrderedDict(z=Box(-1, 1, (3,)), a=Box(-1, 1, (3,)))),
    "nested keys": Dict(OrderedDict(z=Box(-1, 1, ()), a=Dict(OrderedDict(y=Box(-1, 1, (2,)), b=Box(-1, 1, (3,)))))),
}
OTHER_OBSERVATIONS = {
    "Discrete": Discrete(5),
    "Tuple": Tuple((UNIT, UNIT)),
    "a Dict with Discrete": Dict(a=UNIT, b=Discrete(5)),
    "an image": Box(0, 255, (32, 32, 3), np.uint8),
}
OTHER_ACTIONS = {
    "Discrete": Discrete(3),
    "Dict": Dict(a=UNIT),
    "inf": Box(-np.inf, np.inf, (2,)),
    "e+38": Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (2,)),
    "0.5": Box(0.5, 0.5 + 1e-9, (1,), np.float64),  # nor has this one, in float32
    "(2, 2)": Box(-1, 1, (2, 2)),
    "int64": Box(0, 9, (2,), np.int64),
    "[0. 1.]": Box(np.array([0, 1], np.float32), np.array([1, 1], np.float32)),  # the second has no width
}
LIMIT = 5


class Custom(gymnasium.Env):
    """Random observations of a given space; pays the sum of the action, or in the form of `pay`."""

    def __init__(self, observations: str = "flat", actions: str | None = None, pay=None):
        pays = {"column": lambda r: np.full(1, r), "pair": lambda r: np.full(2, r), "nan": lambda r: np.nan}
        self.pay = (pays | {"nothing": lambda r: 0.0}).get(pay)
        self.observation_space = (LEARNABLE | OTHER_OBSERVATIONS).get(observations, UNIT)
        self.observations = observations
        self.action_space = OTHER_ACTIONS[actions] if actions else SCALED

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        own = int(np.random.randint(2**31)) if "own generator" in self.observations else seed
        self.observation_space.seed(None if self.observations == "unseeded" else own)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        reward = float(flatten(self.action_space, action).sum(dtype=float))
        return self.observation_space.sample(), self.pay(reward) if self.pay else reward, False, False, {}


@pytest.fixture(autouse=True)
def registered():
    gymnasium.register("Custom-v0", f"{__name__}:Custom", max_episode_steps=LIMIT)
    yield
    del gymnasium.registry["Custom-v0"]


def make(**kwargs) -> gymnasium.Env:
    return gymnasium.make("Custom-v0", disable_env_checker=True, **kwargs)


def load(dataset_id="test/custom/random-v0"):
    return load_dataset(resolve_task("", dataset_id, trust="nowhere," + __name__), "none")


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
@pytest.mark.parametrize("observations", LEARNABLE)
def test_data_and_evaluation_have_the_same_numbers_in_the_same_order(observations, data_format, datasets):
    dataset = record(make(observations=observations), "test/custom/random-v0", (3, LIMIT), data_format)
    loaded, _ = load(dataset.id)
    environment = resolve_task("", dataset.id, trust=__name__).environment
    env = make_env(environment)
    for start, length, seed in ((0, 3, 0), (3, LIMIT, 1)):
        seen = [env.reset(seed=seed)[0]] + [env.step(np.zeros(2, np.float32))[0] for _ in range(length)]
        np.testing.assert_allclose(loaded.obs[start : start + length], seen[:-1], rtol=1e-6)
        np.testing.assert_allclose(loaded.next_obs[start : start + length], seen[1:], rtol=1e-6)
    assert len(np.unique(loaded.obs[0])) > 3, "equal numbers have no order"
    raw = np.concatenate([episode.actions for episode in dataset.iterate_episodes()])
    np.testing.assert_allclose(loaded.action, np.clip((raw - [0.5, 0.5]) / [2.5, 0.5], -0.999, 0.999), atol=1e-6)
    half = lambda obs, step: np.full((1, 2, 2), 0.5, np.float32)
    returns = evaluated(Evaluator(environment, [0], 2), half, 1).returns
    np.testing.assert_allclose(returns, LIMIT * (1.75 + 0.75), rtol=1e-5)  # of [-2, 3] and [0, 1]


@pytest.mark.parametrize("max_episode_steps", [None, 1_000_000])
def test_an_environment_without_an_end_is_evaluated_for_1000_steps(max_episode_steps):
    spec = make().spec
    spec.max_episode_steps = max_episode_steps
    env = make_env(task_of_dataset("test/custom/random-v0", spec).environment)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, np.float32))[3] for _ in range(1000)]
    assert ends == [False] * 999 + [True]


def test_the_environment_for_evaluation_is_enough_and_its_horizon_is_that_of_the_behaviours_score(datasets):
    """As for Minari's `recover_environment(eval_env=True)`; what is printed of the data compares with the policy's."""
    dataset = record(make(max_episode_steps=9), "test/custom/random-v0", (9, 9))
    spec = json.loads(make(observations="integers").spec.to_json()) | {"max_episode_steps": 4}
    change_metadata(dataset.id, env_spec=None, eval_env_spec=json.dumps(spec))
    task = resolve_task("", dataset.id, trust=__name__)
    assert (task.environment.gym_id.kwargs, task.environment.max_steps) == ({"observations": "integers"}, 4)
    change_metadata(dataset.id, eval_env_spec=json.dumps(spec | {"kwargs": {}}))
    expected = [episode.rewards[:4].sum() for episode in dataset.iterate_episodes()]
    np.testing.assert_allclose(load()[1].scores, expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ refusals


def record_anything(**kwargs):
    """Two steps of an environment with any spaces."""
    env = make(**kwargs)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(2)]
    observations = [env.reset(seed=0)[0]] + [env.step(action)[0] for action in actions]
    write_dataset("test/custom/random-v0", env, [(observations, actions, [0.0, 1.0], [False, False], [False, True])])


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("observation", name) for name in OTHER_OBSERVATIONS), *(("action", name) for name in OTHER_ACTIONS)],
)
def test_what_cannot_be_learned_from_exits_naming_its_space(kind, name, datasets, exit_sentence):
    record_anything(**{f"{kind}s": name})
    space = (OTHER_OBSERVATIONS if kind == "observation" else OTHER_ACTIONS)[name]
    assert f"not the {kind} space {space}." in exit_sentence(load)


def test_wrappers_of_the_recording_are_those_of_the_evaluation(datasets):
    """Flattened by name, an ant's observation is as wide as in the table's order, and yet another one."""
    env = make_gym_env("AntMaze_UMaze-v5", max_episode_steps=3, include_cfrc_ext_in_observation=False)
    dataset = record(gymnasium.wrappers.FlattenObservation(env), "test/antmaze/flat-v0", 1)
    loaded, _ = load(dataset.id)
    env = make_env(resolve_task("", dataset.id).environment)
    np.testing.assert_allclose(env.reset(seed=0)[0], loaded.obs[0], rtol=1e-6)


@pytest.mark.parametrize("entry_point", ["nowhere.to_be_found:Env", f"{__name__}:Gone", None])
def test_an_environment_that_this_machine_does_not_have_exits_naming_it(entry_point, datasets, exit_sentence):
    record_anything()
    spec = json.loads(make().spec.to_json()) | {"id": "Elsewhere-v0", "entry_point": entry_point}
    change_metadata("test/custom/random-v0", env_spec=json.dumps(spec))
    name = {"nowhere.to_be_found:Env": "nowhere", None: "Elsewhere"}.get(entry_point, "Gone")
    assert re.search(f"Dataset test/custom/random-v0 .*cannot be played here .*{name}", exit_sentence(load))


def test_an_environment_with_other_observations_or_actions_than_the_data_exits(datasets, exit_sentence):
    """Actions are scaled by the bounds of the data, and at evaluation by those of the environment."""
    dataset = record_hopper(num_episodes=1)
    change_metadata(dataset.id, env_spec=gymnasium.make("Walker2d-v5").spec.to_json())
    assert "Walker2d-v5: observations (11,) and (17,), actions (3,)" in exit_sentence(load, dataset.id)
    dataset = record(gymnasium.make("Pendulum-v1", max_episode_steps=3), "test/pendulum/random-v0", 1)
    change_metadata(dataset.id, action_space=serialize_space(Box(-1, 1, (1,))))
    assert "actions (1,) in [-1, 1] and (1,) in [-2, 2]" in exit_sentence(load, dataset.id)


# -------------------------------------------------------------------------------------------- what it may not run


def record_hopper_of(spec: str, spaces: bool, **changes) -> str:
    """The id of Hopper's data whose metadata describe another environment, and may not tell the spaces."""
    dataset = record_hopper(num_episodes=1)
    whole = json.loads(gymnasium.make("Hopper-v5").spec.to_json()) | changes
    gone = {} if spaces else {"observation_space": None, "action_space": None}
    change_metadata(dataset.id, **gone, **{spec: json.dumps(whole)})
    return dataset.id


EVIL_WRAPPER = [{"name": "W", "entry_point": "evil:W", "kwargs": {}}]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"entry_point": "os:system", "kwargs": {"command": "touch ran"}}, "--trust os"),
        ({"entry_point": "evil.module:Env"}, "--trust evil"),
        ({"entry_point": "$(evil)\n\x1b[2J:Env"}, "nor OGBench's."),  # no advice to copy
        ({"entry_point": ":evil"}, "nor OGBench's."),
        ({"entry_point": "gymnasium_evil:Env"}, "--trust gymnasium_evil"),
        ({"entry_point": "gymnasium.envs.registration:make", "kwargs": {"id": "evil:X-v0"}}, "is no environment"),
        ({"additional_wrappers": EVIL_WRAPPER}, "--trust evil"),
    ],
)
@pytest.mark.parametrize(
    ("spec", "spaces"),
    [("env_spec", False), ("eval_env_spec", True)],  # Minari makes the first to learn the spaces
)
def test_code_of_others_is_not_even_imported(
    change, named, spec, spaces, datasets, tmp_path, monkeypatch, exit_sentence
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("evil.py", "gymnasium_evil.py"):
        (tmp_path / name).write_text("open('ran', 'w')")
    assert named in exit_sentence(load, record_hopper_of(spec, spaces, **change))
    assert not (tmp_path / "ran").exists()


def test_a_recorder_is_known_by_its_class_and_makes_no_folder(datasets, tmp_path, exit_sentence):
    """Whatever its name is: around an environment of its own making it would film, and write."""
    recorder = {"name": "Harmless", "entry_point": "gymnasium.wrappers:RecordVideo"}
    recorder["kwargs"] = {"video_folder": str(tmp_path / "videos")}
    changes = {"additional_wrappers": [recorder], "kwargs": {"render_mode": "rgb_array"}}
    task = resolve_task("", record_hopper_of("env_spec", True, **changes))
    assert task.environment == TASKS["hopper-medium"].environment
    minari.delete_dataset("test/hopper/random-v0")
    assert "spaces are missing" in exit_sentence(resolve_task, "", record_hopper_of("env_spec", False, **changes))
    assert not (tmp_path / "videos").exists()


# ------------------------------------------------------------------------------------------- played before trained


def test_what_it_pays_has_to_be_a_number_which_may_stand_in_an_array(datasets, exit_sentence):
    record_anything(pay="column")
    evaluate = Evaluator(resolve_task("", load()[1].statistics["dataset"], trust=__name__).environment, [0], 1)
    returns = evaluated(evaluate, lambda obs, step: np.zeros((1, 1, 2), np.float32), 1).returns
    np.testing.assert_allclose(returns, LIMIT * (0.5 + 0.5))
    for pay, named in (("pair", "can only convert"), ("nan", "reward nan")):
        minari.delete_dataset("test/custom/random-v0")
        record_anything(pay=pay)
        assert re.search(f"Dataset test/custom/random-v0 needs an environment that .*{named}", exit_sentence(load))


@pytest.mark.parametrize(
    ("wrapper", "pay"), [("NormalizeObservation", None), ("NormalizeReward", None), ("NormalizeReward", "nothing")]
)
def test_statistics_that_run_on_from_episode_to_episode_are_refused(wrapper, pay, datasets, exit_sentence):
    """A run that goes on would begin them anew."""
    record(getattr(gymnasium.wrappers, wrapper)(make(pay=pay)), "test/custom/random-v0", 1)
    assert "episodes depend on the ones before" in exit_sentence(load)


@pytest.mark.parametrize(("observations", "is_told"), [("unseeded", True), ("from NumPy's own generator", False)])
def test_of_an_environment_that_ignores_its_seed_a_note_tells(observations, is_told, datasets, capsys):
    record_anything(observations=observations)
    load()
    assert ("Note: Custom-v0 ignores its seed" in capsys.readouterr().out) == is_told


def test_acting_again_has_to_be_given_trust_anew(datasets, tmp_path, exit_sentence):
    """A checkpoint may come from others: whom its data may make run is not for it to say."""
    record(make(), "test/custom/random-v0", (LIMIT, LIMIT))
    args = bc.Args(dataset_id="test/custom/random-v0", trust=__name__, num_updates=1, eval_episodes=1, batch_size=4)
    with quickly():
        bc.train(dataclasses.replace(args, run_dir=str(tmp_path / "run")))
        assert f"--trust {__name__}" in exit_sentence(acting.main, acting.Args((tmp_path / "run",)))
        acting.main(acting.Args((tmp_path / "run",), trust=__name__))
    assert len(rows_of(tmp_path / "run" / "acting.csv")) == 1


def test_an_environment_that_breaks_down_later_ends_the_run_with_a_sentence(datasets, exit_sentence):
    record_anything()
    environment = resolve_task("", "test/custom/random-v0", trust=__name__).environment
    evaluate = Evaluator(environment, [0, 1], 2)
    rewards, world = iter([0.0, 1.0, np.inf]), evaluate.envs[1][0].unwrapped
    world.pay = lambda reward: next(rewards)
    for step, what in ((2, "reward inf"), (0, "No space left on device")):
        sentence = exit_sentence(evaluated, evaluate, lambda obs, step: np.zeros((2, 2, 2), np.float32), 7)
        assert re.search(f"^The environment broke down, update 7, seed 1, episode 0, step {step}: .*{what}", sentence)
        world.pay = lambda reward: os.write(os.open("/dev/full", os.O_WRONLY), b"its own log")
