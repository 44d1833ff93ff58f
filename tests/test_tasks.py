"""The table of tasks against the paper's Table 3, D4RL's protocols and its reference scores, typed in anew."""

import dataclasses
import json

import gymnasium
import numpy as np
import pytest

from common.environments import make_gym_env
from common.tasks import TASKS, find_task, normalized_score, task_of_dataset, with_domain_defaults

ROBOTS = ("halfcheetah", "hopper", "walker2d")
LOCOMOTION = [f"{robot}-{quality}" for robot in ROBOTS for quality in ("medium", "medium-replay", "medium-expert")]
ANTMAZE = [
    f"antmaze-{name}"
    for name in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
]
ADROIT = ["pen-human", "pen-cloned"]
KITCHEN = ["kitchen-complete", "kitchen-partial", "kitchen-mixed"]
POINTMAZE = ["pointmaze-umaze", "pointmaze-medium", "pointmaze-large"]


def spec_of(gym_id: str, **kwargs) -> str:
    """What Minari stores of the environment that a dataset was made in."""
    env = make_gym_env(gym_id, **kwargs)
    env.close()
    return env.spec.to_json()


def test_the_table_holds_the_papers_twenty_tasks_and_three_pointmazes():
    assert len(LOCOMOTION + ANTMAZE + ADROIT + KITCHEN) == 20
    assert sorted(TASKS) == sorted(LOCOMOTION + ANTMAZE + ADROIT + KITCHEN + POINTMAZE)
    assert all(TASKS[env_id].env_id == env_id for env_id in TASKS)


@pytest.mark.parametrize(
    ("env_ids", "learning_rate", "eta", "num_updates", "expectile", "eval_episodes"),
    [
        (LOCOMOTION, 3e-4, 1.0, 2_000_000, 0.7, 10),
        (ANTMAZE, 3e-4, 1.0, 1_000_000, 0.9, 100),
        (ADROIT, 3e-5, 0.1, 1_000_000, 0.7, 10),
        (KITCHEN, 3e-4, 0.005, 1_000_000, 0.7, 10),
    ],
)
def test_hyperparameters_are_those_of_table_3(env_ids, learning_rate, eta, num_updates, expectile, eval_episodes):
    for env_id in env_ids:
        domain = TASKS[env_id].environment.domain
        assert (domain.learning_rate, domain.eta, domain.num_updates) == (learning_rate, eta, num_updates)
        assert (domain.expectile, domain.eval_every, domain.eval_episodes) == (expectile, 10_000, eval_episodes)


@pytest.mark.parametrize(("env_ids", "beta"), [(LOCOMOTION, 3), (ANTMAZE + POINTMAZE, 10), (ADROIT + KITCHEN, 0.5)])
def test_the_temperature_of_feed_forward_iql_is_the_inverse_of_its_papers(env_ids, beta):
    for env_id in env_ids:
        assert TASKS[env_id].environment.domain.temperature == pytest.approx(1 / beta)


def test_pointmaze_learns_as_antmaze_but_for_the_number_of_updates():
    antmaze, pointmaze = (TASKS[env_id].environment.domain for env_id in ("antmaze-umaze", "pointmaze-umaze"))
    differing = {name for name in antmaze._fields if getattr(antmaze, name) != getattr(pointmaze, name)}
    assert differing == {"name", "num_updates", "eval_every"}
    assert pointmaze.num_updates < 100_000
    assert pointmaze.num_updates % pointmaze.eval_every == 0


@pytest.mark.parametrize(
    ("env_ids", "rule", "iql_rule"),
    [
        (LOCOMOTION, "none", "iql_locomotion"),
        (ANTMAZE + POINTMAZE, "cql_antmaze", "iql_antmaze"),
        (ADROIT + KITCHEN, "normalize", "normalize"),
    ],
)
def test_reward_rules_by_domain_for_iql_and_for_the_others(env_ids, rule, iql_rule):
    for env_id in env_ids:
        domain = TASKS[env_id].environment.domain
        assert (domain.reward_rule, domain.iql_reward_rule) == (rule, iql_rule)


@pytest.mark.parametrize(
    ("env_id", "gym_id", "max_steps"),
    [
        ("halfcheetah-medium", "HalfCheetah-v5", 1000),
        ("hopper-medium-expert", "Hopper-v5", 1000),
        ("walker2d-medium-replay", "Walker2d-v5", 1000),
        ("antmaze-umaze-diverse", "AntMaze_UMaze-v5", 700),
        ("antmaze-medium-play", "AntMaze_Medium-v5", 1000),
        ("antmaze-large-diverse", "AntMaze_Large-v5", 1000),
        ("pen-cloned", "AdroitHandPen-v1", 100),
        ("kitchen-mixed", "FrankaKitchen-v1", 280),
        ("pointmaze-umaze", "PointMaze_UMaze-v3", 300),
        ("pointmaze-medium", "PointMaze_Medium-v3", 600),
        ("pointmaze-large", "PointMaze_Large-v3", 800),
    ],
)
def test_evaluation_environments_and_their_horizons(env_id, gym_id, max_steps):
    environment = TASKS[env_id].environment
    assert (environment.gym_id, environment.max_steps) == (gym_id, max_steps)


@pytest.mark.parametrize(
    ("env_id", "value", "score"),
    [
        ("halfcheetah-medium", -280.178953, 0.0),
        ("halfcheetah-medium", 5000.0, 42.5300269),  # 100 * 5280.178953 / 12415.178953
        ("hopper-medium", 3234.3, 100.0),
        ("hopper-medium", 1500.0, 46.7118921),  # 100 * 1520.272305 / 3254.572305
        ("walker2d-medium", 0.0, -0.0354851829),  # 100 * -1.629008 / 4590.670992
        ("walker2d-medium", 4592.3, 100.0),
        ("antmaze-large-play", 1.0, 100.0),
        ("pointmaze-umaze", 0.5, 50.0),
        ("pen-human", 96.262799, 0.0),
        ("pen-human", 2000.0, 63.8715752),  # 100 * 1903.737201 / 2980.5703028
        ("kitchen-partial", 3.0, 75.0),
    ],
)
def test_scores_by_d4rls_references(env_id, value, score):
    scores = normalized_score(TASKS[env_id].environment, np.array([value]))
    assert scores == pytest.approx([score], rel=1e-6, abs=1e-9)


def test_door_is_known_to_datasets_and_scored_by_d4rls_references():
    door = task_of_dataset("D4RL/door/human-v2", json.dumps({"id": "AdroitHandDoor-v1", "kwargs": {}})).environment
    assert (door.gym_id, door.max_steps, door.drop_below) == ("AdroitHandDoor-v1", 200, None)
    # 100 * 1056.512833 / 2937.0821427298737
    assert normalized_score(door, np.array([1000.0])) == pytest.approx([35.97151], rel=1e-6)


@pytest.mark.parametrize(
    ("env_id", "dataset_ids"),
    [
        ("halfcheetah-medium", ("mujoco/halfcheetah/medium-v0",)),
        ("hopper-medium-expert", ("mujoco/hopper/medium-v0", "mujoco/hopper/expert-v0")),
        ("antmaze-umaze", ("D4RL/antmaze/umaze-v1",)),
        ("antmaze-large-diverse", ("D4RL/antmaze/large-diverse-v1",)),
        ("pen-human", ("D4RL/pen/human-v2",)),
        ("pen-cloned", ("D4RL/pen/cloned-v2",)),
        ("kitchen-complete", ("D4RL/kitchen/complete-v2",)),
        ("pointmaze-large", ("edp/pointmaze/large-v0",)),
    ],
)
def test_minari_ids(env_id, dataset_ids):
    assert TASKS[env_id].dataset_ids == dataset_ids


def test_only_medium_expert_has_two_datasets():
    assert {env_id for env_id, task in TASKS.items() if len(task.dataset_ids) == 2} == {
        f"{robot}-medium-expert" for robot in ROBOTS
    }


def test_the_order_of_dict_observations():
    for env_id in ANTMAZE:
        assert TASKS[env_id].environment.obs_keys == ("achieved_goal", "observation", "desired_goal")
    for env_id in KITCHEN + POINTMAZE:
        assert TASKS[env_id].environment.obs_keys == ("observation",)
    for env_id in LOCOMOTION + ADROIT:
        assert TASKS[env_id].environment.obs_keys == ()


def test_kitchen_tasks_end_one_by_one_and_differ_by_dataset():
    four = ["microwave", "kettle", "light switch", "slide cabinet"]
    for env_id in KITCHEN:
        kwargs = TASKS[env_id].environment.kwargs
        assert kwargs["remove_task_when_completed"] is True
        assert kwargs["terminate_on_tasks_completed"] is True
    assert TASKS["kitchen-complete"].environment.kwargs["tasks_to_complete"] == four
    assert TASKS["kitchen-partial"].environment.kwargs["tasks_to_complete"] == four
    mixed = TASKS["kitchen-mixed"].environment.kwargs["tasks_to_complete"]
    assert sorted(mixed) == ["bottom burner", "kettle", "light switch", "microwave"]


def test_mazes_have_fixed_cells_and_antmaze_keeps_its_goal():
    cells = {"umaze": ((3, 1), (1, 1)), "medium": ((1, 1), (6, 6)), "large": ((1, 1), (7, 9))}
    for env_id in ANTMAZE + POINTMAZE:
        environment = TASKS[env_id].environment
        assert environment.cells == cells[env_id.split("-")[1]]
        assert environment.kwargs["continuing_task"] is False
        assert environment.fixed_goal is (env_id in POINTMAZE)
    assert TASKS["antmaze-umaze"].environment.kwargs["include_cfrc_ext_in_observation"] is False
    assert TASKS["antmaze-umaze"].environment.kwargs["reset_target"] is False


def test_an_unknown_env_id_exits_naming_near_ones_and_the_way_to_other_datasets(exit_sentence):
    sentence = exit_sentence(find_task, "hoper-medium")
    assert "hoper-medium" in sentence
    assert "hopper-medium" in sentence.replace("hoper-medium", "", 1)
    assert "--dataset-id" in sentence
    assert "pointmaze-umaze" in exit_sentence(find_task, "@")  # near to nothing: the one that needs no download


@pytest.mark.parametrize(
    ("gym_id", "env_id"),
    [
        ("Hopper-v5", "hopper-medium"),
        ("Hopper-v4", "hopper-medium"),
        ("AdroitHandPen-v1", "pen-human"),
        ("AntMaze_Medium_Diverse_GR-v4", "antmaze-medium-diverse"),
        ("AntMaze_UMaze-v5", "antmaze-umaze"),
        ("PointMaze_UMaze-v3", "pointmaze-umaze"),
    ],
)
def test_a_datasets_own_environment_brings_its_protocol(gym_id, env_id):
    task = task_of_dataset("me/some/data-v0", spec_of(gym_id))
    assert task.environment == TASKS[env_id].environment
    assert task.dataset_ids == ("me/some/data-v0",)
    assert "/" not in task.env_id, "it names the run's folder"


def test_a_kitchen_dataset_is_evaluated_on_its_own_tasks():
    task = task_of_dataset("me/kitchen/two-v0", spec_of("FrankaKitchen-v1", tasks_to_complete=["kettle", "microwave"]))
    assert task.environment.kwargs == {
        "remove_task_when_completed": True,
        "terminate_on_tasks_completed": True,
        "tasks_to_complete": ["kettle", "microwave"],
    }
    assert (task.environment.max_steps, task.environment.reference) == (280, (0.0, 4.0))


def test_an_unknown_environment_is_evaluated_as_registered_with_raw_returns():
    env_spec = gymnasium.make("Pendulum-v1").spec.to_json()
    task = task_of_dataset("me/pendulum/random-v0", env_spec)
    assert task.environment.gym_id == env_spec
    assert task.environment.max_steps is None
    domain = task.environment.domain
    assert (domain.reward_rule, domain.iql_reward_rule) == ("none", "none")
    assert (domain.learning_rate, domain.eta) == (3e-4, 1.0)
    np.testing.assert_array_equal(normalized_score(task.environment, np.array([-3.0, 5.0])), [-3.0, 5.0])


def test_a_maze_with_dense_rewards_is_not_taken_for_the_sparse_one():
    # exp(-distance) is positive in every step: with the sparse maze's rules every step would be terminal.
    environment = task_of_dataset("me/dense/data-v0", spec_of("AntMaze_UMazeDense-v5")).environment
    assert not environment.sparse
    assert environment.reference is None


def test_a_dataset_without_environment_exits(exit_sentence):
    assert "me/x-v0" in exit_sentence(task_of_dataset, "me/x-v0", None)


@dataclasses.dataclass(frozen=True)
class SomeArgs:
    num_updates: int | None = None
    eval_every: int | None = None
    learning_rate: float | None = None
    eta: float | None = None
    reward_rule: str | None = None
    run_dir: str | None = None  # not a domain's affair
    gamma: float = 0.5


def test_domain_defaults_fill_only_what_is_none():
    domain = TASKS["pen-human"].environment.domain
    filled = with_domain_defaults(SomeArgs(eta=0.0, num_updates=30_000), domain)
    assert filled == SomeArgs(30_000, 10_000, 3e-5, 0.0, "normalize", None, 0.5)


def test_iql_has_its_own_reward_rule_unless_one_is_given():
    domain = TASKS["antmaze-umaze"].environment.domain
    assert with_domain_defaults(SomeArgs(), domain).reward_rule == "cql_antmaze"
    assert with_domain_defaults(SomeArgs(), domain, iql=True).reward_rule == "iql_antmaze"
    assert with_domain_defaults(SomeArgs(reward_rule="none"), domain, iql=True).reward_rule == "none"


def test_a_run_shorter_than_the_evaluation_interval_is_evaluated_at_its_end():
    domain = TASKS["pointmaze-umaze"].environment.domain
    assert with_domain_defaults(SomeArgs(num_updates=100), domain).eval_every == 100
    assert with_domain_defaults(SomeArgs(num_updates=100, eval_every=50), domain).eval_every == 50
