"""The trained policies in policies/: kept from finished runs, each with a card, and played again.

    python benchmarks/cards.py verify                                # some episodes of each, beside its card
    python benchmarks/cards.py keep runs/<run> hopper-medium         # the policy of one seed

A policy is a checkpoint with what acts, the policy and the critics that choose, in half precision (float16). Its card
has the data, the command, the commit and the scores of fifty episodes, which that very file was played for.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback
import dataclasses
import json
import math
import shlex
from dataclasses import dataclass

import jax
import numpy as np
import tyro
from acting import Trained, open_run, play
from report import read_run, result_of, sample_of
from scipy import stats

from common.harness import Evaluator, setup
from common.harness.checkpoint import save_checkpoint, write_atomically
from common.harness.tasks import ENVIRONMENTS, Domain, Environment, normalized_score, with_domain_defaults

FOLDER = Path(__file__).resolve().parents[1] / "policies"
OF_ONE_MACHINE = {"run_dir", "resume", "checkpoint_every", "track", "capture_video", "trust", "exp_name"}
KEPT = ("policy", "critics")  # fields of the training state
CARD_EPISODES = 50
VERIFY_STEPS = 5_000  # as many episodes as cannot be longer are played to verify a policy, or more where they vary
SURE = 4.0  # deviations: a policy that is as its card says is found different once in 16,000 times


@dataclass(frozen=True)
class Keep:
    """Keep the policy of one seed of a finished run, and play it for its card."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    name: tyro.conf.Positional[str]
    """of the policy: a folder in policies/"""
    seed: int | None = None
    """which of the run's seeds; by default that of the median last score (the lower of two)"""


@dataclass(frozen=True)
class Verify:
    """Play some episodes with each kept policy, and compare them with its card."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """which policies; by default all"""


Args = Verify | Keep


def scores_of(run: Trained, environment: Environment, episodes: int) -> np.ndarray:
    """(episodes,): the scores of the first so many of the card's episodes."""
    variant = dataclasses.replace(run.args, eval_episodes=episodes)
    played = play(run, Evaluator(environment, run.seeds, episodes), variant)
    return normalized_score(environment, played.returns)[0]


def command_of(run: Trained, domain: Domain) -> str:
    """That trains the same: the data, the preset, and what it would not be with these alone."""
    always = {name: getattr(run.args, name) for name in ("env_id", "preset", "num_updates", "eval_every")}
    usual = vars(with_domain_defaults(type(run.args)(**always), domain))
    given = {name: value for name, value in vars(run.args).items() if value != usual[name] or name in always}
    words = ["python", f"algorithms/{run.header['algorithm']}.py"]
    for name, value in given.items():
        flag = name.replace("_", "-")
        if name not in OF_ONE_MACHINE and not (name == "env_id" and run.args.dataset_id):
            words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", f"{value}"]
    return shlex.join(words)


def keep(args: Keep) -> None:
    """Exits with one sentence if there is no such run or seed, or it has no critics or an environment of others."""
    if Path(args.name).name != args.name:
        raise SystemExit(f"The name {args.name!r} must be that of a folder in {FOLDER.name}/.")
    run, folder = open_run(args.run), FOLDER / args.name
    finished = (args.run / "args.json").exists() and result_of(*read_run(args.run))
    if not finished or (last := sample_of(finished, {}, "last")) is None:
        raise SystemExit(f"{args.run}/ is no run that was evaluated after its last update; --resume goes on with one.")
    environment = setup(run.args)[1].environment
    name = next((name for name, known in ENVIRONMENTS.items() if known == environment), None)
    seed = run.seeds[np.argsort(last)[(len(last) - 1) // 2]] if args.seed is None else args.seed
    if seed not in run.seeds or name is None or not {*KEPT} <= {*run.state._fields}:
        raise SystemExit(f"{args.run}/ has no seed {seed}, no critics, or no environment of common/harness/tasks.py.")
    if folder.exists():
        raise SystemExit(f"{folder}/ is there already: choose another name, or move it away.")
    one = dataclasses.asdict(dataclasses.replace(run.args, seed=int(seed), num_seeds=1, run_dir=None))
    half = lambda leaf: np.asarray(leaf[run.seeds.index(seed), None], np.float16)
    kept = {field: jax.tree.map(half, getattr(run.state, field)) for field in KEPT}
    state = run.state._replace(**dict.fromkeys(run.state._fields) | kept)
    command = command_of(run, environment.domain)
    folder.mkdir(parents=True)
    save_checkpoint(folder, state, run.header | {"args": one, "kept": KEPT, "environment": name})

    scores = scores_of(open_run(folder), environment, CARD_EPISODES)
    low, high = stats.bootstrap((scores,), np.mean, method="percentile", rng=0).confidence_interval
    card = {
        "command": command,
        "commit": run.header["git_commit"],
        "data": run.header["dataset"],
        "seed": int(seed),
        "of_scores": last.tolist(),
        "score": scores.mean(),
        "interval": [low, high],
        "scores": scores.tolist(),
    }
    write_atomically(folder / "card.json", lambda file: file.write(json.dumps(card, indent=1).encode() + b"\n"))
    print(f"{folder}/: seed {seed}, score {card['score']:.1f} [{low:.1f}, {high:.1f}] in {CARD_EPISODES} episodes")


def episodes_of(expected: np.ndarray, environment: Environment) -> tuple[int, float]:
    """How many of a card's episodes are played again, and the deviation from one to the next.

    In a maze it is that of a chance of (successes + 1) / (episodes + 2): no failure in fifty is not never. So many are
    played that a policy which scores 0 would be found, if the card's episodes are enough for that.
    """
    spread = np.append(expected, [0, 100] if environment.sparse else []).std()
    to_tell_from_0 = 2 * (SURE * spread / max(expected.mean(), 1)) ** 2
    return min(max(1, VERIFY_STEPS // environment.max_steps, math.ceil(to_tell_from_0)), CARD_EPISODES), spread


def verify(args: Verify) -> None:
    """Exits with 1 if a policy is not as its card says, by more than its episodes differ from one another.

    The same episodes are played. But the last digits of the actions depend on the machine and on how many are played
    together, and with them the episodes. The means of k then differ by s sqrt(2 / k) in deviation, with s that of the
    card's episodes (`episodes_of`).
    """
    differ, folders = [], [FOLDER / name for name in args.names] or [path.parent for path in FOLDER.glob("*/card.json")]
    for folder in sorted(folders):
        run = open_run(folder)
        if not (folder / "card.json").exists():
            raise SystemExit(f"{folder}/ has no card.json: `cards.py keep` was stopped before it was written.")
        card = json.loads((folder / "card.json").read_text())
        environment = ENVIRONMENTS[run.header["environment"]]
        expected = np.array(card["scores"])
        num, spread = episodes_of(expected, environment)
        scores = scores_of(run, environment, num)
        off, allowed = scores.mean() - expected[:num].mean(), SURE * spread * np.sqrt(2 / num)
        is_off = bool(abs(off) > allowed)
        differ += [folder.name] * is_off
        print(
            f"{folder.name}: {num} episodes score {scores.mean():.1f}, on the card {expected[:num].mean():.1f}: "
            f"{'differs by more than' if is_off else 'within'} {allowed:.1f}",
            flush=True,
        )
    if differ:
        raise SystemExit(f"Not as their cards say: {', '.join(differ)}.")


if __name__ == "__main__":
    args = tyro.cli(Args)
    keep(args) if isinstance(args, Keep) else verify(args)
