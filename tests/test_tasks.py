"""The table of tasks against the paper's Table 3, D4RL's protocols and its reference scores, typed in anew."""

import dataclasses
import importlib
import re

import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from helpers import ALGORITHMS, fields_of

from algorithms import dql_baseline, edp_iql, iql
from algorithms.edp_td3bc import Args
from common.harness import tasks
from common.harness.environments import make_gym_env
from common.harness.flags import cli
from common.harness.recorded import task_of_dataset
from common.harness.tasks import TASKS, differences, find_task, normalized_score, with_domain_defaults

ROBOTS = ("halfcheetah", "hopper", "walker2d")
LOCOMOTION = [f"{robot}-{quality}" for robot in ROBOTS for quality in ("medium", "medium-replay", "medium-expert")]
ANTMAZE = [f"antmaze-{size}-{kind}" for size in ("medium", "large") for kind in ("play", "diverse")]
ANTMAZE += ["antmaze-umaze", "antmaze-umaze-diverse"]
ADROIT = [f"{hand}-{name}" for hand in ("pen", "door", "hammer", "relocate") for name in ("human", "cloned", "expert")]
SIMPLE = [f"{robot}-simple" for robot in ROBOTS]
KITCHEN = ["kitchen-complete", "kitchen-partial", "kitchen-mixed"]
POINTMAZE = ["pointmaze-umaze", "pointmaze-medium", "pointmaze-large"]


def dataset_ids(env_id: str) -> tuple[str, ...]:
    """As Minari names them; it has no medium-replay, and the bandit's data are drawn."""
    robot, _, name = env_id.partition("-")
    if name == "medium-replay" or robot == "bandit":
        return ()
    if robot in ROBOTS:
        return tuple(f"mujoco/{robot}/{part}-v0" for part in name.split("-"))
    return (f"edp/pointmaze/{name}-v0",) if robot == "pointmaze" else (f"D4RL/{robot}/{name}-v2",)


def test_the_table_has_all_tasks_with_their_data_and_the_environments_and_horizons_of_their_evaluation():
    assert sorted(TASKS) == sorted(LOCOMOTION + SIMPLE + ANTMAZE + ADROIT + KITCHEN + POINTMAZE + ["bandit"])
    played = {robot.lower(): (f"{robot}-v5", 1000) for robot in ("HalfCheetah", "Hopper", "Walker2d")}
    played |= {"pen": ("AdroitHandPen-v1", 100), "kitchen": ("FrankaKitchen-v1", 280)}
    played |= {hand: (f"AdroitHand{hand.capitalize()}-v1", 200) for hand in ("door", "hammer", "relocate")}
    for size, of_ants, of_points in (("UMaze", 700, 300), ("Medium", 1000, 600), ("Large", 1000, 800)):
        played[f"antmaze-{size.lower()}"] = (f"AntMaze_{size}-v5", of_ants)
        played[f"pointmaze-{size.lower()}"] = (f"PointMaze_{size}-v3", of_points)
    played["bandit"] = ("common.harness.bandit:Bandit-v0", 1)
    for env_id, task in TASKS.items():
        (protocol,) = (value for name, value in played.items() if env_id.startswith(name))
        assert (task.environment.gym_id, task.environment.max_steps) == protocol, env_id
        assert (task.env_id, task.dataset_ids) == (env_id, dataset_ids(env_id))


def test_kitchen_tasks_end_one_by_one_and_mazes_have_fixed_cells():
    four = ["microwave", "kettle", "light switch", "slide cabinet"]
    mixed = ["microwave", "kettle", "bottom burner", "light switch"]
    for env_id, goals in zip(KITCHEN, (four, four, mixed)):
        ends = {"remove_task_when_completed": True, "terminate_on_tasks_completed": True}
        assert TASKS[env_id].environment.kwargs == ends | {"tasks_to_complete": goals}
    cells = {"umaze": ((3, 1), (1, 1)), "medium": ((1, 1), (6, 6)), "large": ((1, 1), (7, 9))}
    for env_id in ANTMAZE + POINTMAZE:
        environment = TASKS[env_id].environment
        assert environment.cells == cells[env_id.split("-")[1]]
        of_ants = {"include_cfrc_ext_in_observation": False, "reset_target": False} if env_id in ANTMAZE else {}
        assert environment.kwargs == {"continuing_task": False, **of_ants}
        assert environment.fixed_goal is (env_id in POINTMAZE)


@pytest.mark.parametrize(
    ("env_ids", "expected"),  # Table 3, IQL's temperature 1 / beta, D4RL's numbers of episodes
    [
        (LOCOMOTION + SIMPLE, (3e-4, 1.0, 2_000_000, "none", "iql_locomotion", 0.7, 1 / 3, 10_000, 10, "paper")),
        (ANTMAZE, (3e-4, 1.0, 1_000_000, "cql_antmaze", "iql_antmaze", 0.9, 1 / 10, 10_000, 100, "paper")),
        (ADROIT, (3e-5, 0.1, 1_000_000, "normalize", "normalize", 0.7, 1 / 0.5, 10_000, 10, "paper")),
        (KITCHEN, (3e-4, 0.005, 1_000_000, "normalize", "normalize", 0.7, 1 / 0.5, 10_000, 10, "paper")),
        (POINTMAZE, (3e-4, 1.0, 3_000, "cql_antmaze", "iql_antmaze", 0.9, 1 / 10, 1_000, 100, "fast")),
        (["bandit"], (3e-3, 1.0, 400, "cql_antmaze", "cql_antmaze", 0.9, 1 / 10, 100, 100, "fast")),
    ],
)
def test_hyperparameters_of_the_domains(env_ids, expected):
    for env_id in env_ids:
        assert TASKS[env_id].environment.domain[1:-1] == expected
        assert TASKS[env_id].environment.domain.eval_untrained == (env_id in POINTMAZE)


@pytest.mark.parametrize(
    ("env_ids", "low", "high", "value", "score"),
    [
        (LOCOMOTION[:3] + SIMPLE[:1], -280.178953, 12135.0, 5000.0, 42.5300269),  # 100 * 5280.178953 / 12415.178953
        (LOCOMOTION[3:6], -20.272305, 3234.3, 1500.0, 46.7118921),  # 100 * 1520.272305 / 3254.572305
        (LOCOMOTION[6:], 1.629008, 4592.3, 0.0, -0.0354851829),  # 100 * -1.629008 / 4590.670992
        ([*ANTMAZE, *POINTMAZE, "bandit"], 0.0, 1.0, 0.5, 50.0),
        (ADROIT[:3], 96.262799, 3076.8331017826877, 2000.0, 63.8715752),  # 100 * 1903.737201 / 2980.5703028
        (KITCHEN, 0.0, 4.0, 3.0, 75.0),
        (ADROIT[3:6], -56.512833, 2880.5693087298737, 1000.0, 35.97151),  # 100 * 1056.512833 / 2937.0821427298737
        (ADROIT[6:9], -274.856578, 12794.134825156867, 6000.0, 48.0133193),  # 100 * 6274.856578 / 13068.991403156867
        (ADROIT[9:], -6.425911, 4233.877797728884, 2000.0, 47.3179765),  # 100 * 2006.425911 / 4240.303708728884
    ],
)
def test_scores_by_d4rls_references(env_ids, low, high, value, score):
    for env_id in env_ids:
        scores = normalized_score(TASKS[env_id].environment, np.array([low, high, value]))
        assert scores == pytest.approx([0, 100, score], rel=1e-6, abs=1e-9)


def test_an_unknown_env_id_exits_naming_near_ones_and_the_way_to_all_and_to_other_datasets(exit_sentence):
    sentence = exit_sentence(find_task, "hoper-medium")
    for part in ("hoper-medium", " hopper-medium", "`python -m common.harness.tasks`", "--dataset-id"):
        assert part in sentence
    assert "pointmaze-umaze" in exit_sentence(find_task, "@")  # near to nothing: the one that needs no download


def test_the_printed_table_has_a_line_for_every_task(capsys):
    tasks.main()
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 120
    assert re.findall(r"^  ([a-z]\S+-\S+|bandit) ", table, re.MULTILINE) == list(TASKS)
    assert re.search(
        r"hopper-medium-expert +mujoco/hopper/medium-v0 \+ expert-v0 +Hopper-v5 +1000 +-20, 3234$", table, re.MULTILINE
    )
    assert "adroit\n  learning_rate 3e-05, eta 0.1, num_updates 1000000" in table


# ------------------------------------------------------------------------------------------------- other datasets


def spec_of(gym_id: str, **kwargs) -> EnvSpec:
    """What a dataset says of the environment that it was made in."""
    env = make_gym_env(gym_id, **kwargs)
    env.close()
    return env.spec


@pytest.mark.parametrize(
    ("gym_id", "kwargs", "env_id"),
    [
        ("Hopper-v5", {"render_mode": "rgb_array", "width": 64, "max_episode_steps": 7}, "hopper-medium"),
        ("AdroitHandPen-v1", {}, "pen-human"),
        ("AdroitHandRelocate-v1", {"reward_type": "dense"}, "relocate-human"),
        ("AntMaze_Medium-v5", {"include_cfrc_ext_in_observation": False, "reset_target": True}, "antmaze-medium-play"),
        ("PointMaze_UMaze-v3", {"continuing_task": True}, "pointmaze-umaze"),
    ],
)
def test_an_environment_of_the_tables_name_and_version_brings_its_protocol(gym_id, kwargs, env_id):
    """Whatever pictures it drew, and whatever it paid and did at a goal: the data follow the protocol there."""
    task = task_of_dataset("me/some/data-v0", spec_of(gym_id, **kwargs))
    assert task.environment == TASKS[env_id].environment
    assert (task.env_id, task.dataset_ids) == ("me-some-data-v0", ("me/some/data-v0",))


def test_the_tables_own_datasets_bring_its_protocol_a_kitchen_has_its_own_tasks_and_a_log_is_not_played():
    for dataset_id, env_id, recorded in (
        ("D4RL/antmaze/umaze-v1", "antmaze-umaze", "AntMaze_UMaze-v4"),  # Minari recorded some of v5's in v4
        ("D4RL/pen/human-v2", "pen-human", "AdroitHandPen-v1"),
    ):
        task = task_of_dataset(dataset_id, spec_of(recorded))
        assert (task.environment, task.dataset_ids) == (TASKS[env_id].environment, (dataset_id,))
    task = task_of_dataset("me/kitchen/two-v0", spec_of("FrankaKitchen-v1", tasks_to_complete=["kettle", "microwave"]))
    known = TASKS["kitchen-mixed"].environment
    kwargs = known.kwargs | {"tasks_to_complete": ["kettle", "microwave"]}
    assert task.environment == known._replace(kwargs=kwargs)
    task = task_of_dataset("me/x-v0", None)
    assert (task.env_id, task.is_played, task.environment.gym_id) == ("me-x-v0", False, None)


OTHERS = {  # gym id, options, horizon
    "outside the table": ("Pendulum-v1", {}, 200),
    "another version": ("Walker2d-v4", {}, 1000),
    "a name that begins like one": ("AntMaze_UMazeDense-v5", {"include_cfrc_ext_in_observation": False}, 700),
    "more is observed": ("AntMaze_UMaze-v5", {}, 700),
    "other rewards": ("Hopper-v5", {"healthy_reward": 2.0}, 1000),
    "sparse rewards": ("AdroitHandPen-v1", {"reward_type": "sparse"}, 200),
    "it ends otherwise": ("Hopper-v5", {"terminate_when_unhealthy": False, "max_episode_steps": 50}, 50),
    "another maze": ("PointMaze_UMaze-v3", {"maze_map": [[1, 1, 1, 1], [1, "r", "g", 1], [1, 1, 1, 1]]}, 300),
}


@pytest.mark.parametrize("other", OTHERS)
def test_any_other_environment_is_evaluated_as_recorded_with_raw_returns_and_the_run_says_so(other, capsys):
    gym_id, kwargs, horizon = OTHERS[other]
    spec = spec_of(gym_id, **kwargs)
    environment = task_of_dataset("me/x-v0", spec).environment
    assert environment == tasks.Environment(tasks.OTHER, spec, horizon)
    assert f"evaluated in {gym_id} as the data describe it, {horizon} steps, by raw returns" in capsys.readouterr().out
    domain = environment.domain
    assert (domain.learning_rate, domain.eta, domain.reward_rule, domain.iql_reward_rule) == (3e-4, 1.0, "none", "none")
    np.testing.assert_array_equal(normalized_score(environment, np.array([-3.0, 5.0])), [-3.0, 5.0])


# --------------------------------------------------------------------------------------------- defaults and bounds


def test_domain_defaults_fill_only_what_is_none():
    pen, antmaze, pointmaze = (TASKS[env_id].environment.domain for env_id in ("pen-human", ANTMAZE[0], POINTMAZE[0]))
    args = Args(eta=0.0, num_updates=30_000)
    of_pen = {"eval_every": 10_000, "eval_episodes": 10, "learning_rate": 3e-5, "reward_rule": "normalize"}
    assert with_domain_defaults(args, pen) == dataclasses.replace(args, **of_pen, preset="paper")
    assert with_domain_defaults(Args(), antmaze).reward_rule == "cql_antmaze"
    assert with_domain_defaults(iql.Args(), antmaze).reward_rule == "iql_antmaze"
    assert with_domain_defaults(iql.Args(reward_rule="none"), antmaze).reward_rule == "none"
    assert with_domain_defaults(Args(num_updates=100), pointmaze).eval_every == 100, "shorter than the interval"
    assert with_domain_defaults(Args(num_updates=100, eval_every=50), pointmaze).eval_every == 50
    for args, chain in ((dql_baseline.Args(), (5, "vp")), (Args(), (1000, "linear"))):  # DDPM's is short on the toy
        filled = with_domain_defaults(args, tasks.BANDIT)
        assert (filled.num_diffusion_steps, filled.beta_schedule) == chain
    for typed in (["--num-diffusion-steps", "100"], ["--beta-schedule", "linear"]):  # one of them typed leaves both
        filled = with_domain_defaults(cli(dql_baseline.Args, typed), tasks.BANDIT)
        assert (filled.num_diffusion_steps, filled.beta_schedule) == (100, "linear")


@pytest.mark.parametrize(
    ("env_id", "typed", "expected"),
    [
        ("pen-human", "", (0.005, False, 3e-5)),
        ("pen-human", "--preset fast", (0.2, True, 3e-4)),
        ("pointmaze-umaze", "", (0.2, True, 3e-4)),
        ("bandit", "", (0.2, True, 3e-3)),
        ("pointmaze-umaze", "--preset paper", (0.005, False, 3e-4)),
        ("pointmaze-umaze", "--tau 0.1", (0.1, True, 3e-4)),  # a flag that is given stays,
        ("pointmaze-umaze", "--tau=0.005 --no-normalize-obs", (0.005, False, 3e-4)),  # also at its default
        ("pointmaze-umaze", "--tau 0.005 --no_normalize_obs", (0.005, False, 3e-4)),  # which tyro reads, too
        ("pen-human", "--preset fast --learning-rate 3e-5", (0.2, True, 3e-5)),
    ],
)
def test_the_fast_preset_sets_what_was_not_given(env_id, typed, expected):
    args = with_domain_defaults(cli(edp_iql.Args, typed.split()), TASKS[env_id].environment.domain)
    assert (args.tau, args.normalize_obs, args.learning_rate) == expected


DOMAINS = {value.name: value for value in vars(tasks).values() if isinstance(value, tasks.Domain)}
PLACES = {"the kitchen": ["kitchen"], "OGBench": ["ogbench"], "mazes": ["antmaze", "pointmaze"]}
PLACES |= {name: [name] for name in DOMAINS}


def stated(text: str, domain: tasks.Domain) -> str | None:
    """The value that a help text names for a domain: "...: 3e-4; in adroit 3e-5 (Table 3), in bandit 3e-3"."""
    default, _, others = re.sub(r" \(.*?\)", "", text.partition(": ")[2]).partition("; in ")
    place = rf"(?:{'|'.join(PLACES)})"
    pattern = rf"({place}(?:(?:, | and ){place})*) (\S*\w)"
    assert not re.search(place, re.sub(pattern, "", others)), f"cannot be read: {text}"
    for places, value in re.findall(pattern, others):
        if any(domain.name in PLACES[each] for each in re.split(", | and ", places)):
            return value
    return default if others else None


def number(text: str) -> float:
    """As people write it: 3e-4, 2,000,000, 1/3."""
    over, _, under = text.replace(",", "").partition("/")
    return float(over) / float(under or 1)


def test_settings_that_are_not_the_papers_are_named_with_their_reason():
    args = edp_iql.Args(env_id="pointmaze-umaze", batch_size=64, run_dir="run")
    args = with_domain_defaults(args, TASKS["pointmaze-umaze"].environment.domain)
    of_preset = ["normalize_obs True", "lr_decay True", "tau 0.2", "critic_layer_norm True", "prediction action"]
    of_domain = ["reward_rule iql_antmaze", "preset fast", "eval_every 1000", "eval_episodes 100", "num_updates 3000"]
    expected = [f"{setting} (preset fast)" for setting in of_preset]
    expected += [f"{setting} (pointmaze)" for setting in (*of_domain, "expectile 0.9")] + ["batch_size 64 (given)"]
    assert sorted(differences(args, TASKS["pointmaze-umaze"].environment.domain)) == sorted(expected)
    locomotion = TASKS["hopper-medium"].environment.domain
    args = with_domain_defaults(edp_iql.Args(env_id="hopper-medium"), locomotion)
    assert differences(dataclasses.replace(args, resume="run"), locomotion) == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_help_of_a_flag_names_its_value_in_every_domain(algorithm):
    """A text that names a domain's value names what a run there has; a flag without a default has such a text."""
    args = importlib.import_module(f"algorithms.{algorithm}").Args()
    for domain in DOMAINS.values():
        filled = with_domain_defaults(args, domain)
        for name, text in fields_of(algorithm).items():
            value, says = getattr(filled, name), stated(text, domain)
            if says is not None:
                assert (says if isinstance(value, str) else number(says)) == value, f"--{name} in {domain.name}: {text}"
            elif name not in tasks.FAST | tasks.FAST_DDPM:
                assert value == getattr(args, name), f"--{name} in {domain.name}: {text}"
