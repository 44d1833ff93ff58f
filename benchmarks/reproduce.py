"""The tables and figures of the EDP paper by one command each: plans runs, runs what is missing, draws the result.

    python benchmarks/reproduce.py table5 --data local               # where there are local datasets of its tasks
    python benchmarks/reproduce.py fig4 fig7 --data edp/hopper/medium-replay-v0 --scale 0.005 --flags="--preset fast"
    python benchmarks/reproduce.py all --data ~/.d4rl/datasets --on ray --address auto --gpus 0.25

The same command goes on where it was stopped, however that was. A run's folder is named by a hash of all that decides
its numbers: algorithm, arguments, data, versions, code. So it is never repeated, nor mixed with another's. What needs
other settings of acting (Fig. 4 to 7, Table 6) evaluates the last policies of the same runs again. Reports go to
<folder>/<name>.md, .csv and .png; report.py writes them anew. Several nodes: docs/reproduce.md.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from minari.storage.datasets_root_dir import get_dataset_path
from report import PAPER, read_runs, write_report
from runner import ROOT, Execution, Job, run_all

from common.harness import setup
from common.harness.run import PACKAGES, RAT_WINDOW
from common.harness.tasks import ADROIT, ANTMAZE, KITCHEN, LOCOMOTION, TASKS, with_domain_defaults

# ------------------------------------------------------------------------------------------------------- the artefacts

DOMAINS = (LOCOMOTION, ANTMAZE, ADROIT, KITCHEN)
PAPER_TASKS = tuple(name for name in TASKS if name in PAPER[0])
LOCOMOTION_TASKS = tuple(name for name in PAPER_TASKS if TASKS[name].environment.domain is LOCOMOTION)
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
    "Diffusion-QL, K = 100": "dql_baseline",
    "EDP + TD3+BC, K = 100": "edp_td3bc --num-diffusion-steps 100 --sampler ddpm",
}


class Artefact(NamedTuple):
    title: str
    source: str = ""  # the rows of paper.csv to compare with
    columns: dict[str, dict[str, Any]] = {}  # flags, and settings of acting that differ from the run's
    metrics: tuple[str, ...] = ("last",)
    tasks: tuple[str, ...] = PAPER_TASKS
    kind: Literal["table", "means", "sweep", "lines", "speed"] = "table"
    differs: tuple[str, ...] = ()  # from the paper's protocol


def columns(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"flags": COLUMNS[name]} for name in names}


def sweep(title: str, setting: str, values: tuple, **fixed: int) -> Artefact:
    cells = {f"{setting} {v}": {"flags": "edp_td3bc", "acting": {**fixed, setting: v}} for v in values}
    return Artefact(f"{title}, EDP + TD3+BC", "", cells, tasks=LOCOMOTION_TASKS, kind="sweep")


EDP_AND_DQL = columns("Diffusion-QL, K = 100", "EDP + TD3+BC")
EAS = {"TD3+BC with EAS": {"flags": "td3bc", "acting": {"num_eval_actions": 10}}}
WALKERS = ("walker2d-medium", "walker2d-medium-replay", "walker2d-medium-expert")
THREE = ("walker2d-medium-expert", "hopper-medium-expert", "antmaze-medium-diverse")
ARTEFACTS = {
    "table1": Artefact("Table 1: EDP and Diffusion-QL by domain", "Table 1", EDP_AND_DQL, ("OMS",), kind="means"),
    "table2": Artefact("Table 2: feed-forward policies and EDP", "Table 2", columns(*list(COLUMNS)[:8]), ("RAT",)),
    "table3": Artefact("Table 3: EDP's hyperparameters", "Table 3", kind="lines"),
    "table4": Artefact("Table 4: EDP and Diffusion-QL", "Table 4", EDP_AND_DQL, ("OMS",)),
    "table5": Artefact(
        "Table 5: EDP with three algorithms",
        "Table 5",
        columns("EDP + TD3+BC", "EDP + CRR", "EDP + IQL"),
        ("RAT", "OMS"),
    ),
    "table6": Artefact(
        "Table 6: energy-based action selection (EAS) with a feed-forward policy",
        "Table 6",
        columns("EDP + TD3+BC") | EAS | columns("TD3+BC"),
        tasks=LOCOMOTION_TASKS,
        differs=("the score of the last policy, where the paper has RAT",),
    ),
    "table7": Artefact(
        "Table 7: the effect of action approximation",
        "Table 7",
        columns("Diffusion-QL, K = 100", "EDP + TD3+BC, K = 100"),
        ("OMS",),
        WALKERS,
    ),
    "fig2": Artefact("Fig. 2 and C.5: speed", kind="speed"),
    "fig3": Artefact("Fig. 3: RAT and OMS in training", "Table 5", columns("EDP + TD3+BC"), ("RAT", "OMS"), THREE),
    "fig4": sweep("Fig. 4: actions to select from", "num_eval_actions", (1, 2, 5, 10, 20, 50, 100, 200)),
    "fig5": sweep("Fig. 5: network calls of DPM-Solver", "num_solver_calls", (3, 6, 9, 12, 15, 20, 25, 30)),
    "fig6": sweep("Fig. 6: scaled policy", "policy_temperature", (0.5, 0.75, 1.0, 1.25, 1.5, 2.0), num_eval_actions=1),
    "fig7": sweep(
        "Fig. 7: scale of the initial noise", "init_noise_scale", (0.0, 0.25, 0.5, 0.75, 1.0), num_eval_actions=1
    ),
}


@dataclass(frozen=True)
class Args:
    """Redo tables and figures of the EDP paper."""

    artefacts: tyro.conf.Positional[tuple[str, ...]]
    """table1 to table7, fig2 to fig7, or all"""
    data: tuple[str, ...] = ("paper",)
    """paper: the paper's tasks, from Minari; local: those of them that have a local dataset of that robot and quality;
    pointmaze: all three; or a folder with D4RL's files, names of tasks, ids of Minari datasets"""
    scale: float = 1.0
    """shortens every run by this factor; of its evaluations at least ten are left"""
    num_seeds: int = SEEDS
    """seeds of each run, trained together"""
    flags: str = ""
    """of every run alike: --flags="--preset fast --eval-episodes 5", with the sign of equality"""
    folder: Path = Path("runs/reproduce")
    """where runs and reports go"""
    on: Literal["local", "ray"] = "local"
    """processes of this machine, or Ray"""
    jobs: int = 1
    """local: runs at a time, each on its share of the cores"""
    cores: float = 1.0
    """Ray: cores to reserve for each run"""
    gpus: float = 0.0
    """GPUs for each run, 0.25 for four runs on one"""
    address: str | None = None
    """Ray: of the cluster, "auto" or <host>:<port>; by default one that is started here"""
    retries: int = 3
    """Ray: how often a run whose node dies goes on elsewhere; -1 is always"""
    watch: bool = False
    """show a live table of the runs"""


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
    flags: dict[str, str]
    task: str | None  # of the paper
    differs: tuple[str, ...] = ()  # from the paper's data or environment


def find_data(choices: tuple[str, ...], tasks: tuple[str, ...]) -> list[Data]:
    """What --data names; of the paper's tasks only `tasks`."""
    found = []
    for choice in choices:
        files = sorted(Path(choice).expanduser().resolve().glob("*.hdf5"))
        if choice == "paper":
            found += map(_of_task, tasks)
        elif choice == "local":
            found += [_of_dataset(dataset_id) for dataset_id in map(_local_dataset, tasks) if dataset_id]
        elif choice == "pointmaze":
            found += [_of_task(name) for name in TASKS if name.startswith("pointmaze")]
        elif files:
            found += [_of_file(task, file) for task in tasks if (file := _d4rl_file(task, files))]
        else:
            found.append(_of_task(choice) if choice in TASKS else _of_dataset(choice))
    return list({data.name: data for data in found}.values())


def _of_task(name: str) -> Data:
    if name not in PAPER_TASKS:
        return Data(name, {"env_id": name}, None)
    return Data(name, {"env_id": name}, name, (f"{name}: Minari's recording, not D4RL's",))


def _of_dataset(dataset_id: str) -> Data:
    name = re.sub(r"-v\d+$", "", dataset_id.partition("/")[2]).replace("/", "-")
    task = name if name in PAPER_TASKS else None
    return Data(dataset_id, {"dataset_id": dataset_id}, task, (f"{dataset_id}: not D4RL's data",) if task else ())


def _of_file(task: str, file: Path) -> Data:
    differs = (f"{task}: evaluated with another ant",) if task.startswith("antmaze") else ()
    return Data(f"{task} (D4RL)", {"env_id": task, "dataset_path": str(file)}, task, differs)


def _local_dataset(task: str) -> str | None:
    """The newest local dataset <namespace>/<robot>/<quality>-v<n>."""
    root, (robot, _, quality) = get_dataset_path(), task.partition("-")
    found = sorted(path.parents[1] for path in root.glob(f"*/{robot}/{quality}-v*/data/metadata.json"))
    return found[-1].relative_to(root).as_posix() if found else None


def _d4rl_file(task: str, files: list[Path]) -> Path | None:
    pattern = D4RL_FILES.get(task, f"^{task.replace('-', '[-_]')}-v[0-9]")
    return next((file for file in reversed(files) if re.search(pattern, file.name)), None)


# ----------------------------------------------------------------------------------------------------------- planning

# Arguments that decide no number, or only through others and the data, which are in the key themselves.
NO_KEY = {"env_id", "dataset_id", "dataset_path", "preset", "trust", "exp_name", "run_dir", "track", "capture_video"}
NO_KEY |= {"resume", "checkpoint_every"}
DATA_CODE = (
    "tasks",
    "datasets",
    "d4rl",
    "environments",
    "pointmaze",
    "ogbench",
    "bandit",
)  # of the harness, what decides numbers


@functools.cache
def parse(flags: str, args: Args) -> tuple[Any, list[str]]:
    """(arguments, flags) of a column's algorithm."""
    algorithm, *own = shlex.split(flags)
    own += ["--num-seeds", str(args.num_seeds), *shlex.split(args.flags)]
    return tyro.cli(importlib.import_module(f"algorithms.{algorithm}").Args, prog=f"{algorithm}.py", args=own), own


@functools.cache
def plan(flags: str, data_name: str, data_flags: tuple[tuple[str, str], ...], args: Args) -> Job:
    """The run of a column on a dataset. Exits with one sentence if it is impossible."""
    parsed, own = parse(flags, args)
    algorithm = flags.split()[0]
    resolved, task = setup(dataclasses.replace(parsed, **dict(data_flags)), iql=algorithm in ("iql", "edp_iql"))
    full = resolved.num_updates // resolved.eval_every
    evaluations = max(min(full, RAT_WINDOW), round(full * args.scale))
    every = max(1, round(resolved.num_updates * args.scale / evaluations))
    resolved = dataclasses.replace(resolved, num_updates=every * evaluations, eval_every=every)
    own = own + [part for name, value in data_flags for part in ("--" + name.replace("_", "-"), value)]
    own += ["--num-updates", str(resolved.num_updates), "--eval-every", str(resolved.eval_every)]

    settings = {name: value for name, value in dataclasses.asdict(resolved).items() if name not in NO_KEY}
    source = (task.file,) if task.file else tuple(get_dataset_path(each) / "data" for each in task.dataset_ids)
    versions = {name: version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}
    decides = [algorithm, settings, task.env_id, data_digest(source), versions, code_digest(algorithm)]
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]
    name, parent = slug(flags), args.folder / slug(data_name)
    for other in parent.glob(f"{name}-*/args.json"):
        if re.fullmatch(rf"{name}-[0-9a-f]{{10}}", other.parent.name) and other.parent.name != f"{name}-{key}":
            theirs = json.loads(other.read_text())["args"]
            changed = [f"{k} {theirs.get(k)}, now {v}" for k, v in settings.items() if theirs.get(k) != v]
            print(f"{other.parent}/ is not used: {', '.join(changed) or 'data, versions or code were others'}.")
    return Job(parent / f"{name}-{key}", algorithm, tuple(own), resolved.num_updates)


def slug(text: str) -> str:
    return "-".join(re.findall("[a-z0-9]+", text.lower()))


@functools.cache
def data_digest(paths: tuple[Path, ...]) -> str:
    files = sorted(file for path in paths for file in [path, *path.rglob("*")] if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


@functools.cache
def code_digest(algorithm: str) -> str:
    """Of what the code does: comments, docstrings and layout do not count."""
    harness = (ROOT / "common" / "harness" / f"{name}.py" for name in DATA_CODE)
    trees = []
    for file in (ROOT / "algorithms" / f"{algorithm}.py", *sorted((ROOT / "common").glob("*.py")), *harness):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(getattr(node, "body", None), list):
                is_text = lambda each: isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)
                node.body = [each for each in node.body if not is_text(each)]
        trees.append(ast.dump(tree))
    return hashlib.sha256("".join(trees).encode()).hexdigest()


def hyperparameters() -> tuple[list[str], list[list[str]]]:
    """Table 3: (heading, lines) of EDP's defaults and the paper's."""
    module = importlib.import_module("algorithms.edp_td3bc")
    rows = [row for row in PAPER if row["source"] == "Table 3"]
    heading = ["", *(name for row in rows for name in (row["metric"], f"{row['metric']}, paper"))]
    defaults = {domain.name: with_domain_defaults(module.Args(), domain) for domain in DOMAINS}
    of = lambda name, args: [text for r in rows for text in (f"{getattr(args, r['metric']):g}", f"{float(r[name]):g}")]
    return heading, [[name, *of(name, args)] for name, args in defaults.items()]


# --------------------------------------------------------------------------------------------------------------- main


def plan_artefact(name: str, args: Args, jobs: dict[Path, Job]) -> dict[str, Any]:
    """What report.py needs to know of an artefact; adds its runs to `jobs`. Exits if nothing of it can be run."""
    artefact, rows, impossible = ARTEFACTS[name], [], {}
    choice = shlex.join(["--data", *args.data, "--scale", f"{args.scale:g}", "--num-seeds", str(args.num_seeds)])
    command = f"python benchmarks/reproduce.py {name} {choice}" + (
        f" --flags={shlex.quote(args.flags)}" * bool(args.flags)
    )
    record = artefact._asdict() | {"command": command, "scale": args.scale}
    if artefact.kind == "lines":
        return record | dict(zip(("heading", "lines"), hyperparameters()))
    if artefact.kind == "speed":
        unit = "updates/s", "updates/s, paper", "environment steps/s", "environment steps/s, paper"
        return record | {"heading": ["", *unit]}
    for data in find_data(args.data, artefact.tasks):
        try:
            planned = {
                c: plan(s["flags"], data.name, tuple(data.flags.items()), args) for c, s in artefact.columns.items()
            }
        except SystemExit as error:
            if not isinstance(error.code, str):  # of tyro, which has said what is wrong
                raise
            impossible[data.name] = error.code
            continue
        for column, job in planned.items():
            acting = (*jobs.get(job.folder, job).acting, artefact.columns[column].get("acting"))
            jobs[job.folder] = job._replace(acting=tuple(each for each in acting if each))
        names = {column: job.folder.relative_to(args.folder).as_posix() for column, job in planned.items()}
        rows.append({"data": data.name, "task": data.task, "differs": data.differs, "runs": names})
    if not rows:
        raise SystemExit(next(iter(impossible.values()), f"--data {' '.join(args.data)} has none of {name}'s tasks."))
    for left_out, reason in impossible.items():
        print(f"{name} goes without {left_out}: {reason}")
    differs = list(artefact.differs)
    if args.scale != 1 or args.flags:
        differs.append(
            f"{next(iter(planned.values())).num_updates:,} updates (--scale {args.scale:g}) {args.flags}".strip()
        )
    if args.num_seeds != SEEDS:
        differs.append(f"{args.num_seeds} seeds, where the paper has {SEEDS}")
    return record | {"rows": rows, "differs": differs}


def measure_speed(args: Args) -> None:
    """Fig. 2 on this machine, before anything else runs on it."""
    if (args.folder / "speed-here.json").exists():
        return
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), "--sections", "updates", "acting"]
    command += ["--only", "dql", "edp_no_ap", "edp_no_dpm_100", "edp_td3bc", "td3bc"]
    command += ["--results-dir", str(args.folder), "--name", "here.part"]
    command += ["--repeats", "3", "--seconds", "0.3"] if args.scale < 1 else []
    if subprocess.run(command).returncode:
        raise SystemExit("speed.py failed.")
    (args.folder / "speed-here.part.json").rename(args.folder / "speed-here.json")


def main(args: Args) -> None:
    if unknown := [name for name in args.artefacts if name not in (*ARTEFACTS, "all")]:
        raise SystemExit(f"There is no {unknown[0]!r}; there are {', '.join(ARTEFACTS)} and all.")
    if not args.artefacts or min(args.scale, args.num_seeds, args.jobs, args.cores) <= 0 or args.gpus < 0:
        raise SystemExit(
            "Name a table or figure, or all; --scale, --num-seeds, --jobs and --cores have to be positive."
        )
    names = list(ARTEFACTS) if "all" in args.artefacts else list(dict.fromkeys(args.artefacts))
    jobs: dict[Path, Job] = {}
    artefacts = {name: plan_artefact(name, args, jobs) for name in names}
    args.folder.mkdir(parents=True, exist_ok=True)
    if "fig2" in names:
        measure_speed(args)
    how = Execution(args.on, args.jobs, args.gpus, args.cores, args.address, args.retries, args.watch)
    failed = run_all(list(jobs.values()), how) if jobs else {}
    manifest = args.folder / "artefacts.json"
    kept = json.loads(manifest.read_text()) if manifest.exists() else {}
    manifest.write_text(json.dumps(kept | artefacts, indent=1) + "\n")
    runs = read_runs(args.folder)
    for name in names:
        write_report(args.folder, name, artefacts[name], runs)
        print(f"{args.folder / name}.md")
    if failed:
        (folder, trouble), *_ = failed.items()
        raise SystemExit(f"{len(failed)} of {len(jobs)} runs failed; of {folder}: {trouble}.")


if __name__ == "__main__":
    main(tyro.cli(Args))
