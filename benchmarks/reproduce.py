"""The tables and figures of the EDP paper by one command each: plans runs, runs what is missing, draws the result.

    python benchmarks/reproduce.py published matched                 # our own: short runs of EDP and its counterparts
    python benchmarks/reproduce.py table5 --data local               # where there are local datasets of its tasks
    python benchmarks/reproduce.py fig4 fig7 --data edp/hopper/medium-replay-v1 --scale 0.005 --flags="--preset fast"
    python benchmarks/reproduce.py all --data ~/.d4rl/datasets --on ray --address auto --gpus 0.25

The same command goes on where it was stopped, however that was. A run's folder is named by a hash of what decides its
numbers: algorithm, arguments, data, versions, JAX's settings, code. So it is never repeated, nor mixed with another's.
What needs other settings of acting (Fig. 4 to 7, Table 6) evaluates the last policies of the same runs again. Reports
go to <folder>/<name>.md, .csv and .png; report.py writes them anew. Several nodes: docs/reproduce.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback
import ast
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import math
import platform
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from minari.storage.datasets_root_dir import get_dataset_path
from report import PAPER, paper_numbers, read_raw, write_csv, write_reports
from runner import ROOT, Execution, Job, not_acted, result_of, run_all

from common.harness import ogbench
from common.harness.checkpoint import write_atomically
from common.harness.datasets import read_transitions, resolve_task
from common.harness.devices import jax_settings, pin_jax
from common.harness.flags import check_flags, cli
from common.harness.recorder import RAT_WINDOW
from common.harness.run import versions
from common.harness.tasks import ADROIT, ANTMAZE, KITCHEN, LOCOMOTION, TASKS, Task, with_domain_defaults
from common.recipes import RECIPES

# ------------------------------------------------------------------------------------------------------- the artefacts

PAPER_TASKS = tuple(name for name in TASKS if name in PAPER[0])
LOCOMOTION_TASKS = tuple(name for name in PAPER_TASKS if TASKS[name].environment.domain is LOCOMOTION)
WALKERS = ("walker2d-medium", "walker2d-medium-replay", "walker2d-medium-expert")
THREE = ("walker2d-medium-expert", "hopper-medium-expert", "antmaze-medium-diverse")
SEEDS = 5  # of the paper
COLUMNS = {  # file of the algorithm, and its own flags
    "BC": "bc",
    "10% BC": "bc --top-fraction 0.1",
    "TD3+BC": "td3bc",
    "EDP + TD3+BC": "edp_td3bc",
    "CRR": "crr",
    "EDP + CRR": "edp_crr",
    "IQL": "iql",
    "EDP + IQL": "edp_iql",
    "Diffusion-QL": "dql_baseline --num-diffusion-steps 5 --beta-schedule vp",  # as its own code
    "Diffusion-QL, K = 100": "dql_baseline",
    "EDP + TD3+BC, K = 100": "edp_td3bc --num-diffusion-steps 100 --sampler ddpm",
}


class Artefact(NamedTuple):
    title: str
    source: str = ""  # the rows of paper.csv to compare with
    columns: dict[str, dict[str, Any]] = {}  # flags, and settings of acting that differ from the run's
    metrics: tuple[str, ...] = ("last",)
    tasks: tuple[str, ...] = PAPER_TASKS
    kind: Literal["table", "means", "sweep", "hyperparameters", "speeds"] = "table"
    pairs: tuple[tuple[str, str], ...] = ()  # columns to compare: of this project's own tables
    alone: bool = False  # a table and curves for each algorithm's page, too
    data: tuple[str, ...] = ("paper",)
    flags: str = ""  # of all runs


def columns(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"flags": COLUMNS[name]} for name in names}


def sweep(title: str, setting: str, *values: float, **fixed: int) -> Artefact:
    cells = {f"{setting} {v}": {"flags": "edp_td3bc", "acting": {**fixed, setting: v}} for v in values}
    return Artefact(f"{title}, EDP + TD3+BC", "", cells, tasks=LOCOMOTION_TASKS, kind="sweep")


# What takes minutes on a CPU: ten thousand updates on datasets that are made on the spot.
SHORT = {"flags": "--preset fast --seed 10 --num-updates 10000 --eval-every 2500 --eval-episodes 20"}
SHORT["data"] = ("edp/hopper/medium-v1", "edp/halfcheetah/medium-v1", "edp/halfcheetah/medium-replay-v1")
SHORT["data"] += ("edp/pen/expert-v1", "pointmaze-large", "edp/antmaze/umaze-play-v1")
PAIRS = tuple((f"EDP + {name}", name) for name in ("TD3+BC", "CRR", "IQL"))
MOVES = "--policy-every 1 --policy-target-start 1000 --policy-target-every 5"  # as EDP + TD3+BC moves its policies
MATCHED = {  # alike but for the policy: candidates, weight of the guidance, temperature, the wait of the target policy
    "TD3+BC": {"flags": f"td3bc --num-eval-actions 10 --alpha 1 {MOVES}"},
    "EDP + TD3+BC": {"flags": "edp_td3bc --eta 1"},
    "CRR": {"flags": "crr", "acting": {"num_eval_actions": 10}},  # its training is as published
    "EDP + CRR": {"flags": "edp_crr --eta 1"},
    "IQL": {"flags": "iql --num-eval-actions 10 --temperature 1"},
    "EDP + IQL": {"flags": "edp_iql --eta 1"},
}
EDP, DQL, TWO = "EDP + TD3+BC", "Diffusion-QL, K = 100", ("RAT", "OMS")
BEST = {"EDP + IQL, four best": {"flags": "edp_iql", "acting": {"num_eval_actions": 32, "average_best": 4}}}
EAS = columns(EDP, "TD3+BC") | {"TD3+BC with EAS": {"flags": "td3bc", "acting": {"num_eval_actions": 10}}}
ARTEFACTS = {
    "table1": Artefact("Table 1: EDP and Diffusion-QL by domain", "Table 1", columns(DQL, EDP), ("OMS",), kind="means"),
    "table2": Artefact("Table 2: feed-forward policies and EDP", "Table 2", columns(*list(COLUMNS)[:8]), ("RAT",)),
    "table3": Artefact("Table 3: EDP's hyperparameters", kind="hyperparameters"),
    "table4": Artefact("Table 4: EDP and Diffusion-QL", "Table 4", columns(DQL, EDP), ("OMS",)),
    "table5": Artefact("Table 5: EDP, three algorithms", "Table 5", columns(EDP, "EDP + CRR", "EDP + IQL"), TWO),
    "table6": Artefact("Table 6: EAS with a feed-forward policy", "Table 6", EAS, ("last",), LOCOMOTION_TASKS),
    "table7": Artefact("Table 7: action approximation", "Table 7", columns(DQL, f"{EDP}, K = 100"), ("OMS",), WALKERS),
    "fig2": Artefact("Fig. 2 and C.5: speed", kind="speeds"),
    "fig3": Artefact("Fig. 3: RAT and OMS in training", "Table 5", columns(EDP), TWO, THREE),
    "fig4": sweep("Fig. 4: actions to select from", "num_eval_actions", 1, 2, 5, 10, 20, 50, 100, 200),
    "fig5": sweep("Fig. 5: network calls of DPM-Solver", "num_solver_calls", 3, 6, 9, 12, 15, 20, 25, 30),
    "fig6": sweep("Fig. 6: scaled policy", "policy_temperature", 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, num_eval_actions=1),
    "fig7": sweep("Fig. 7: scaled initial noise", "init_noise_scale", 0.0, 0.25, 0.5, 0.75, 1.0, num_eval_actions=1),
    "published": Artefact(
        "Nine algorithms with their own temperature and weights",
        columns=columns(*list(COLUMNS)[:9]),
        pairs=(*PAIRS, ("EDP + TD3+BC", "Diffusion-QL")),
        alone=True,
        **SHORT,
    ),
    "matched": Artefact(
        "EDP and its counterparts with the same settings",
        columns=MATCHED,
        pairs=PAIRS,
        **SHORT,
    ),
    "four-best": Artefact(
        "EDP + IQL acting by the mean of the four best of 32 candidates",
        columns=columns("IQL", "EDP + IQL") | BEST,
        pairs=tuple((*BEST, name) for name in ("IQL", "EDP + IQL")),
        **SHORT,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Args(Execution):
    """Redo tables and figures of the EDP paper."""

    artefacts: tyro.conf.Positional[tuple[Literal[(*ARTEFACTS, "all")], ...]]  # what to redo; all: of the paper
    data: tuple[str, ...] = ()
    """by default paper, and for published, matched, four-best six datasets that are made here. paper: its tasks, from
    Minari; local: those of them that have a local dataset of that robot and quality; pointmaze: all three; made: the
    robots' that are made on first use; or a folder with D4RL's files, names of tasks, ids of Minari datasets"""
    scale: float = 1.0  # shortens every run by this factor, but to no fewer than ten evaluations
    num_seeds: int = SEEDS  # seeds of each run, trained together
    flags: str = ""  # for all runs: --flags "--preset fast --eval-episodes 5"
    folder: Path = Path("runs/reproduce")  # where runs and reports go
    kept: Path | None = None  # a folder that report.py --condense made: what finished there is not run again


# --------------------------------------------------------------------------------------------------------------- data

D4RL_FILES = {  # where they are not named as the task
    "antmaze-umaze": "_u-maze_.*start_False.*goal_False",
    "antmaze-umaze-diverse": "_u-maze_.*start_True.*goal_True",
    "antmaze-medium-play": "_big-maze_.*start_True.*goal_False",
    "antmaze-medium-diverse": "_big-maze_.*start_True.*goal_True",
    "antmaze-large-play": "_hardest-maze_.*start_True.*goal_False",
    "antmaze-large-diverse": "_hardest-maze_.*start_True.*goal_True",
    "kitchen-complete": "^mini_kitchen_microwave_kettle_light_slider",
    "kitchen-partial": "^kitchen_microwave_kettle_light_slider",
    "kitchen-mixed": "^kitchen_microwave_kettle_bottomburner_light",
}


class Data(NamedTuple):
    name: str
    flags: tuple[str, ...]
    task: str | None  # of the paper
    differs: tuple[str, ...]  # from the paper's data or environment


def find_data(choices: tuple[str, ...], tasks: tuple[str, ...]) -> Iterator[Data]:
    """What --data names; where it names the paper's tasks or a folder of files, only those of `tasks`."""
    for choice in choices:
        files = sorted(Path(choice).expanduser().resolve().glob("*.hdf5"))
        for task in tasks if files else ():
            pattern = D4RL_FILES.get(task, f"^{task.replace('-', '[-_]')}-v[0-9]")
            differs = (f"{task}: evaluated with another ant",) * task.startswith("antmaze")
            for file in [file for file in files if re.search(pattern, file.name)][-1:]:
                yield Data(f"{task} (D4RL)", ("--env-id", task, "--dataset-path", str(file)), task, differs)
        mazes = [name for name in TASKS if name.startswith("pointmaze")]
        known = {"paper": tasks, "pointmaze": mazes, "local": filter(None, map(local_dataset, tasks))}
        known["made"] = [dataset_id for dataset_id in RECIPES if "pointmaze" not in dataset_id]
        if not (files or choice in {*known, *TASKS} or re.search(r"-v\d+$", choice)):
            raise SystemExit(
                f"--data {choice}: there is no such folder with D4RL's files (*.hdf5), nor such a task; ids of Minari "
                "datasets end in -v<number>."
            )
        for name in known.get(choice, [choice]) if not files else ():
            task = name if name in TASKS else re.sub(r"-v\d+$", "", name.partition("/")[2]).replace("/", "-")
            is_task, of_paper = name in TASKS or ogbench.knows(name), task in PAPER_TASKS
            differs = (f"{name}: recorded anew, not D4RL's data",) * of_paper
            yield Data(name, ("--env-id" if is_task else "--dataset-id", name), task if of_paper else None, differs)


def local_dataset(task: str) -> str | None:
    """The newest local dataset <namespace>/<robot>/<quality>-v<n>."""
    root, (robot, _, quality) = get_dataset_path(), task.partition("-")
    paths = (path.parents[1] for path in root.glob(f"*/{robot}/{quality}-v*/data/metadata.json"))
    found = [(int(number[1]), path) for path in paths if (number := re.search(r"-v(\d+)$", path.name))]
    return max(found)[1].relative_to(root).as_posix() if found else None


# ----------------------------------------------------------------------------------------------------------- planning

# Arguments that decide no number, or only through others and the data, which are in the key themselves.
NO_KEY = {"env_id", "dataset_id", "dataset_path", "preset", "trust", "exp_name", "run_dir", "track", "capture_video"}
NO_KEY |= {"resume", "checkpoint_every"}
# Files and folders of common/ that should decide no number: changing them leaves a run's key as it is.
NO_CODE = {"checkpoint", "flags", "offline", "plots", "process", "recorder", "recipes"}


@functools.cache
def plan(flags: str, of_all: str, data: Data, args: Args, *acting: tuple[str, Any]) -> Job:
    """The run of a column on a dataset, and how its last policy acts. Exits with one sentence if that is impossible."""
    algorithm, *own = shlex.split(flags)
    own += ["--num-seeds", str(args.num_seeds), *shlex.split(of_all), *shlex.split(args.flags), *data.flags]
    parsed = cli(importlib.import_module(f"algorithms.{algorithm}").Args, own, f"{algorithm}.py")
    check_flags(parsed)
    pin_jax()  # not `setup`: Ray starts its processes by a fork, which JAX's threads would not survive
    task, digest = task_and_digest(parsed.env_id, parsed.dataset_id, parsed.dataset_path, parsed.trust)
    resolved = with_domain_defaults(parsed, task.environment.domain)
    full = resolved.num_updates // resolved.eval_every
    evaluations = max(min(full, RAT_WINDOW), round(full * args.scale))
    every = max(1, round(resolved.num_updates * args.scale / evaluations))
    resolved = dataclasses.replace(resolved, num_updates=every * evaluations, eval_every=every)
    own += ["--num-updates", str(resolved.num_updates), "--eval-every", str(resolved.eval_every)]
    if not resolved.eval_episodes:
        raise SystemExit(f"{data.name} names no environment to evaluate in, or --eval-episodes is 0.")
    try:
        dataclasses.replace(resolved, **dict(acting))
    except ValueError as error:
        raise SystemExit(f"Impossible flags: {error}.") from None

    settings = {name: value for name, value in dataclasses.asdict(resolved).items() if name not in NO_KEY}
    key = key_of([algorithm, settings, task.env_id, digest, versions(), jax_settings(), code_digest(algorithm)])
    folder = args.folder / slug(data.name) / f"{slug(algorithm)}-{key}"  # not of the flags: some say a default
    return Job(folder, algorithm, tuple(own), resolved.num_updates, (dict(acting),) * bool(acting), parsed.trust)


def key_of(decides: list) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]


def slug(text: str) -> str:
    return "-".join(re.findall("[a-z0-9]+", text.lower()))


@functools.cache
def task_and_digest(*names: str | None) -> tuple[Task, str]:
    """The task of `resolve_task`, and a digest of the numbers that a run reads.

    Not of the files: one that is made on another processor may differ in last digits, which float32 does not have.
    """
    dataset, ends = read_transitions(task := resolve_task(*names))
    digest = hashlib.sha256()
    for array in (*dataset, ends):
        digest.update(np.ascontiguousarray(array))
    return task, digest.hexdigest()


@functools.cache
def code_digest(algorithm: str) -> str:
    """Of what the code does: comments, docstrings and layout do not count."""
    files = [ROOT / "algorithms" / f"{algorithm}.py", *sorted((ROOT / "common").rglob("*.py"))]
    trees = [ast.parse(file.read_text()) for file in files if not {file.stem, file.parent.name} & NO_CODE]
    for node in itertools.chain.from_iterable(map(ast.walk, trees)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
    return hashlib.sha256("".join(map(ast.dump, trees)).encode()).hexdigest()


def plan_artefact(name: str, args: Args, jobs: dict[Path, Job]) -> dict[str, Any]:
    """What report.py needs to know of an artefact; adds its runs to `jobs`. Exits if nothing of it can be run."""
    artefact, rows, impossible = ARTEFACTS[name], [], {}
    chosen = args.data or artefact.data
    choice = ["--data", *chosen, "--scale", f"{args.scale:g}", "--num-seeds", str(args.num_seeds)]
    command = ["python", "benchmarks/reproduce.py", name, *choice, *[f"--flags={args.flags}"] * bool(args.flags)]
    record = artefact._asdict() | {"command": shlex.join(command), "scale": args.scale}
    if artefact.kind in LINES:
        return record
    for data in dict.fromkeys(find_data(chosen, artefact.tasks)):
        data = data._replace(task=None, differs=()) if artefact.pairs else data
        of_column = lambda spec: plan(spec["flags"], artefact.flags, data, args, *spec.get("acting", {}).items())
        try:
            planned = {column: of_column(spec) for column, spec in artefact.columns.items()}
        except SystemExit as error:
            if not isinstance(error.code, str):  # of tyro, which has said what is wrong
                raise
            impossible[data.name] = error.code
            continue
        for job in planned.values():
            before = jobs.get(job.folder, job._replace(acting=()))
            jobs[job.folder] = job._replace(acting=before.acting + job.acting)
        names = {column: job.folder.relative_to(args.folder).as_posix() for column, job in planned.items()}
        rows.append({"data": data.name, "task": data.task, "differs": data.differs, "runs": names})
    if not rows:
        raise SystemExit(next(iter(impossible.values()), f"--data {' '.join(chosen)} has none of {name}'s tasks."))
    for left_out, reason in impossible.items():
        print(f"{name} goes without {left_out}: {reason}")
    updates = sorted({jobs[args.folder / run].num_updates for row in rows for run in row["runs"].values()})
    lengths = " or ".join(f"{number:,}" for number in updates)
    differs = {
        "the score of the last policy, where the paper has RAT": artefact.source and artefact.metrics == ("last",),
        f"{lengths} updates ({f'--scale {args.scale:g} {args.flags}'.strip()})": args.scale != 1 or args.flags,
        f"seeds: {args.num_seeds}, where the paper has {SEEDS}": args.num_seeds != SEEDS,
    }
    return record | {"rows": rows, "differs": [text for text, holds in differs.items() if holds and not artefact.pairs]}


def take_kept(kept: Path, jobs: dict[Path, Job], folder: Path) -> None:
    """Finished runs go from `kept` to `folder`, and out of `jobs`; not those whose policies have to act once more, nor
    those that `folder` has with checkpoints.

    Exits if no runs are kept there. Prints how many it took: runs of other code, data or versions are not taken.
    """
    if not (kept / "runs.json").exists():
        raise SystemExit(f"--kept {kept}: there is no runs.json in it, which report.py --condense writes.")
    before, raw = len(jobs), read_raw(kept)
    for name, (header, *rows) in raw.items():
        job, run = jobs.get(folder / name), result_of(header, *rows)
        if job and job.num_updates in run.updates and not not_acted(job, run) and not [*job.folder.glob("*.eqx")]:
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "args.json").write_text(json.dumps(header, indent=2))
            for file, of in zip(("eval.csv", "acting.csv"), rows):
                write_csv(job.folder / file, of)
            del jobs[job.folder]
    print(f"{before - len(jobs)} of {before} planned runs are taken from {kept}/, which holds {len(raw)}.")


# ----------------------------------------------------------------------------------------------- what needs no runs


def hyperparameters(_: Args) -> Iterator[dict[str, str]]:
    """Lines of Table 3: EDP's defaults and the paper's."""
    for domain in (LOCOMOTION, ANTMAZE, ADROIT, KITCHEN):
        args, line = with_domain_defaults(importlib.import_module("algorithms.edp_td3bc").Args(), domain), {}
        for name, number in paper_numbers("Table 3", "EDP", domain.name).items():
            line |= {name: f"{getattr(args, name):,.9g}", f"{name}, paper": f"{float(number):,.9g}"}
        yield {"": domain.name} | line


def speeds(args: Args) -> Iterator[dict[str, str]]:
    """Lines of Fig. 2 and C.5, measured before anything else runs on this machine."""
    names = "dql", "edp_no_ap", "edp_no_dpm_100", "edp_td3bc", "td3bc"
    code = [code_digest(algorithm) for algorithm in ("dql_baseline", "edp_td3bc", "td3bc")]
    decides = [platform.node(), args.scale < 1, versions(), jax_settings(), code]
    file = args.folder / f"speed-here-{key_of(decides)}.json"
    if not file.exists():
        command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), "--sections", "updates", "acting"]
        command += ["--only", *names, "--results-dir", str(args.folder), "--name", "here.part"]
        if subprocess.run([*command, *["--repeats", "3", "--seconds", "0.3"] * (args.scale < 1)]).returncode:
            raise SystemExit("speed.py failed.")
        file.with_name("speed-here.part.json").rename(file)
    here, acts_like = json.loads(file.read_text()), {"dql": "edp_no_dpm_100", "edp_no_ap": "edp_td3bc"}
    for name in names:
        updates, steps = here["updates"][name], here["acting"][acts_like.get(name, name)]["environment"]
        paper = paper_numbers("C.5", name, WALKERS[2]) | paper_numbers("Fig. 2", name, WALKERS[2])
        line = {"": updates["label"]}
        for unit, row in {"updates per second": updates, "environment steps per second": steps}.items():
            line |= {unit: f"{row['per_second']:.4g}", f"{unit}, paper": paper.get(unit, "")}
        yield line


LINES = {"hyperparameters": hyperparameters, "speeds": speeds}

# --------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    positive = args.scale, args.num_seeds, args.jobs, args.cores
    if not args.artefacts or not all(0 < value < math.inf for value in positive):
        raise SystemExit("Name a table or figure; --scale, --num-seeds, --jobs and --cores have to be positive.")
    if not (0 <= args.gpus <= 1 or (args.gpus > 1 and args.gpus % 1 == 0)):
        raise SystemExit(f"--gpus has to be a part of one GPU or a whole number of them, but is {args.gpus}.")
    try:
        shlex.split(args.flags)
    except ValueError as error:
        raise SystemExit(f"--flags cannot be split into words: {error}.") from None
    if found := re.search(r"--((env|dataset)[-_](id|path)|num[-_]seeds)\b", args.flags):
        raise SystemExit(f"Leave {found[0]} out of --flags: --data chooses the data, --num-seeds how many seeds.")
    jobs: dict[Path, Job] = {}
    of_paper = [name for name, artefact in ARTEFACTS.items() if not artefact.pairs]
    named = [of_paper if name == "all" else [name] for name in args.artefacts]
    names = dict.fromkeys(itertools.chain(*named))
    artefacts = {name: plan_artefact(name, args, jobs) for name in names}
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"Cannot write to {args.folder}/: {error.strerror}.") from None
    for record in artefacts.values():
        if record["kind"] in LINES:
            record["lines"] = list(LINES[record["kind"]](args))
    manifest = args.folder / "artefacts.json"
    kept = json.loads(manifest.read_text()) if manifest.exists() else {}
    text = json.dumps(kept | artefacts, indent=1).encode() + b"\n"
    write_atomically(manifest, lambda file: file.write(text))
    if args.kept is not None:
        take_kept(args.kept, jobs, args.folder)
    failed = run_all(list(jobs.values()), args)
    write_reports(args.folder, names)
    if failed:
        (folder, trouble), *_ = failed.items()
        raise SystemExit(f"{len(failed)} of {len(jobs)} runs failed; of {folder}: {trouble}.")


if __name__ == "__main__":
    words = sys.argv[1:]
    if "--flags" in words[:-1]:  # whose value begins with a dash: --flags "--x" is --flags=--x
        at = words.index("--flags")
        words[at : at + 2] = [f"--flags={words[at + 1]}"]
    main(tyro.cli(Args, args=words))
