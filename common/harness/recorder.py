"""What a run records beside its checkpoints: tables of numbers, TensorBoard, Weights & Biases, the bar, pictures.

Only numbers that are not finite, and a table with another heading, end a run here: OSError goes to the caller, who
knows what was saved.
"""

import contextlib
import csv
import dataclasses
import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import tensorboardX
from jaxtyping import Float
from tqdm import tqdm

from common.harness.checkpoint import write_atomically
from common.harness.records import DIAGNOSTICS, Behaviour, Episodes, reason_of
from common.harness.tasks import GOAL_RADIUS, Task, normalized_score

RAT_WINDOW = 10  # evaluations in the running average at training
MAX_BOARDS = 32  # seeds in TensorBoard, which opens three files for each; the CSV files hold all


def import_wandb(num_seeds: int) -> ModuleType:
    """Exits with a sentence if it is not there, be it that a folder has its name, or cannot be used for these seeds."""
    try:
        import wandb

        wandb.init  # noqa: B018
    except Exception:
        raise SystemExit("--track logs to Weights & Biases: `pip install wandb` first, or leave it out.") from None
    if num_seeds > 1 and os.environ.get("WANDB_RUN_ID"):
        raise SystemExit("An agent of Weights & Biases (WANDB_RUN_ID) asks for one run: leave --num-seeds out.")
    return wandb


class Recorder:
    def __init__(self, folder: Path, algorithm: str, args, task: Task, behaviour: Behaviour):
        self.folder, self.algorithm, self.args, self.task, self.behaviour = folder, algorithm, args, task, behaviour
        self.seeds = list(range(args.seed, args.seed + args.num_seeds))
        self.scores: dict[int, np.ndarray] = {}  # by update, each (seeds,): means over episodes
        self.unit = "score" if task.environment.reference else "return"
        self.files, self.boards, self.trackers = {}, [], []

    def start_wandb(self, wandb: ModuleType, run_id: str) -> None:
        """For each seed a run, in a group; --resume goes on with the same ones. A sweep's agent has made its own."""
        settings = {"project": os.environ.get("WANDB_PROJECT", "edp"), "group": self.folder.name}
        config = {"algorithm": self.algorithm} | dataclasses.asdict(self.args)
        try:
            for seed in self.seeds:
                name = {"name": f"{self.folder.name}__seed_{seed}", "id": f"{run_id}-{seed}"}
                name = {} if os.environ.get("WANDB_RUN_ID") else name
                config |= {"seed": seed}
                run = wandb.init(**settings, **name, config=config, resume="allow", reinit="create_new")
                run.define_metric("*", step_metric="update")
                self.trackers.append(run)
        except Exception as error:
            raise SystemExit(f"Weights & Biases cannot be used: {reason_of(error)}.") from None

    def open(self, update: int) -> None:
        """Goes on with the tables after an update. What is later, or was cut off, is removed; all else stays as it is.

        Raises OSError; exits if a table has another heading.
        """
        for left in self.folder.glob("*.tmp"):
            left.unlink()
        tables = {name: _read_table(self.folder / f"{name}.csv", update) for name in ("metrics", "eval")}
        returns = {number: [] for number, _ in tables["eval"][1:] if number is not None}
        for number, row in tables["eval"][1:]:
            if number is not None:
                returns[number].append(float(row.split(",")[3]))
        num = len(self.seeds) * self.args.eval_episodes
        whole = {number: np.reshape(of, (len(self.seeds), -1)) for number, of in returns.items() if len(of) == num}
        self.scores = {n: normalized_score(self.task.environment, of).mean(axis=1) for n, of in whole.items()}
        if update not in whole:  # was not played to its end, and will be
            tables["eval"] = [(number, row) for number, row in tables["eval"] if number != update]
        played = len(range(self.args.eval_every, update, self.args.eval_every)) if num else 0
        missing = played - len(whole.keys() - {0, update})
        damaged = sum(number is None for number, _ in tables["metrics"])
        for name, count, what in (("eval", missing, "evaluation(s)"), ("metrics", damaged, "row(s)")):
            if count > 0:
                print(f"Note: {count} {what} in {self.folder}/{name}.csv are not whole.")
        tables["eval"] = tables["eval"] or [(0, "update,seed,episode,return,length")]
        for name, rows in tables.items():
            text = "".join(f"{row}\n" for _, row in rows).encode("latin-1")
            write_atomically(self.folder / f"{name}.csv", lambda file: file.write(text))
            self.files[name] = (self.folder / f"{name}.csv").open("a", newline="")
        for seed in self.seeds[:MAX_BOARDS]:
            board = self.folder / "tensorboard" / f"seed_{seed}"
            # a queue without an end: if its thread dies of a full disk, training does not wait for it
            self.boards.append(tensorboardX.SummaryWriter(str(board), purge_step=update + 1, max_queue=0))

    def start_bar(self, update: int) -> None:
        self.begun = update, time.monotonic()
        if update < self.args.num_updates:
            print("Compiling: about half a minute, once. Further runs of this shape start at once.", flush=True)
        often = {"miniters": 0, "mininterval": 0.5 if sys.stderr.isatty() else 10}  # seconds; a file keeps each
        bar = {"initial": update, "unit": "update", "smoothing": 0.1, "dynamic_ncols": True}
        self.bar = tqdm(total=self.args.num_updates, **bar, **often)
        self.bar.set_postfix_str("compiling" if update < self.args.num_updates else "")
        if sys.stderr.isatty():
            threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        """The bar's clock goes on while programs compile."""
        while not self.bar.disable:  # which it is when closed
            self.bar.refresh()
            time.sleep(1)

    def show(self, update: int, what: str = "") -> None:
        """On the bar: how far the run is, and what it does, or the last score."""
        score = f"{self.unit} {[*self.scores.values()][-1].mean():.1f}" if self.scores else ""
        self.bar.set_postfix_str(what or score, refresh=False)
        self.bar.update(update - self.bar.n)

    def check(self, update: int, metrics: dict[str, Float[np.ndarray, "updates seeds"]]) -> None:
        """Exits if a metric of the updates up to `update` is not finite."""
        for name, value in metrics.items():
            if not np.isfinite(value).all():
                index, seed = np.argwhere(~np.isfinite(value))[0]
                raise SystemExit(
                    f"Training diverged: {name} is {value[index, seed]} at update {update - len(value) + index + 1} of "
                    f"seed {self.seeds[seed]}; a lower --learning-rate or --max-grad-norm may help. "
                    f"Everything until then is in {self.folder}/."
                )

    def metrics(
        self,
        update: int,
        means: dict[str, Float[np.ndarray, " seeds"]],
        diagnostics: dict[str, Float[np.ndarray, " seeds"]],
    ) -> None:
        """Records the means of some updates' metrics, and diagnostics after them."""
        begun, at = self.begun
        rate = self.bar.format_dict["rate"] or (update - begun) / (time.monotonic() - at)  # TQDM_DISABLE=1 has none
        names = "update", "seed", "updates_per_second", *means, *diagnostics
        heading = [names] if self.files["metrics"].tell() == 0 else []
        rows = zip(self.seeds, zip(*means.values(), *diagnostics.values()))
        rows = [[update, seed, f"{rate:.4g}", *(f"{mean:.6g}" for mean in of_seed)] for seed, of_seed in rows]
        scalars = {f"train/{name}": mean for name, mean in means.items()}
        scalars["charts/updates_per_second"] = np.full(len(self.seeds), rate)
        diagnostics = {name: of for name, of in diagnostics.items() if not np.isnan(of).any()}
        scalars |= {f"held_back/{name}": of for name, of in diagnostics.items()}
        self._write("metrics", heading + rows, update, scalars)
        if diagnostics:
            shown = (f"{name} {of.mean():.3g}" for name, of in diagnostics.items() if name not in DIAGNOSTICS["value"])
            self.bar.write(f"update {update}: {', '.join(shown)}")

    def evaluation(self, update: int, episodes: Episodes) -> None:
        """Records every raw return."""
        returns, lengths, paths, maze = episodes
        self.scores[update] = normalized_score(self.task.environment, returns).mean(axis=1)
        rows = [[update, self.seeds[i], j, float(value), lengths[i, j]] for (i, j), value in np.ndenumerate(returns)]
        values = {"score": self.scores[update], "return": returns.mean(axis=1), "length": lengths.mean(axis=1)}
        self._write("eval", rows, update, {f"eval/{name}": value for name, value in values.items()})
        self.show(update, "" if update else "compiling")
        self.bar.write(
            f"update {update}: score {mean_and_deviation(values['score'])} (behaviour "
            f"{self.behaviour.statistics['behaviour_score']:.1f}), return {mean_and_deviation(values['return'])}"
        )
        if maze is not None:
            cells = self.task.environment.cells
            shown = [self.behaviour.paths, list(zip(paths, (returns[0] > 0).tolist()))]
            scores = self.behaviour.statistics["behaviour_score"], self.scores[update][0]
            self._draw("paths", "maze_paths", maze, cells, GOAL_RADIUS, shown, scores)

    def _write(self, table: str, rows: list, update: int, scalars: dict[str, Float[np.ndarray, " seeds"]]) -> None:
        """Rows to a CSV file, scalars to TensorBoard and trackers."""
        csv.writer(self.files[table], lineterminator="\n").writerows(rows)
        self.files[table].flush()
        for name, of_seeds in scalars.items():
            for board, value in zip(self.boards, of_seeds):
                board.add_scalar(name, float(value), update)
        for i, tracker in enumerate(self.trackers):
            tracker.log({"update": update} | {name: float(of_seeds[i]) for name, of_seeds in scalars.items()})

    def _draw(self, name: str, picture: str, *args) -> None:
        """Draws one of `plots` to <name>.png; a run does not end because it could not be drawn."""
        try:
            from common.harness import plots  # not at start-up, which Matplotlib would slow down

            figure = getattr(plots, picture)(*args)
            write_atomically(self.folder / f"{name}.png", lambda file: figure.savefig(file, dpi=150))
        except Exception as error:
            print(f"({self.folder}/{name}.png could not be drawn: {reason_of(error)}.)")

    def sync(self) -> None:
        """All rows are on the disk when this returns. Raises OSError."""
        for file in self.files.values():
            os.fsync(file.fileno())
        for board in self.boards:
            board.flush()

    def close(self) -> None:
        self.bar.close()
        for stream in (*self.files.values(), *self.boards):
            with contextlib.suppress(OSError):
                stream.close()
        if self.scores:
            results = ", ".join(f"{name} {values.mean():.1f}" for name, values in self.results().items())
            title = f"{self.algorithm} on {self.task.env_id}: {results}"
            scores, score = np.array(list(self.scores.values())), self.behaviour.statistics["behaviour_score"]
            self._draw("learning_curve", "learning_curve", [*self.scores], scores, self.seeds, score, title, self.unit)
        elif found := self.diagnostics():
            title = f"{self.algorithm} on {self.task.env_id}, episodes that were held back"
            self._draw("learning_curve", "diagnostic_curves", [*found.pop("update")[:, 0]], found, title)
        for tracker in self.trackers:
            tracker.finish()

    def diagnostics(self) -> dict[str, Float[np.ndarray, "diagnosed seeds"]]:
        """Those of metrics.csv that all seeds have, and their updates; {} if there are none."""
        table = _read_table(self.folder / "metrics.csv", self.args.num_updates)
        names, found = table[0][1].split(",") if table else [], {}
        if "action_distance" not in names:
            return {}
        for update, row in table[1:]:
            if update is not None:
                found.setdefault(update, []).append(row.split(","))
        whole = [of for of in found.values() if len(of) == len(self.seeds)]
        values = np.array(whole, float).reshape(-1, len(self.seeds), len(names))
        values = values[~np.isnan(values[..., names.index("action_distance")]).any(axis=1)]
        of_policy = [name for of_field in DIAGNOSTICS.values() for name in of_field if name in names]
        return {name: values[..., names.index(name)] for name in ("update", *of_policy)} if len(values) else {}

    def results(self) -> dict[str, np.ndarray]:
        """The last score, the best evaluation (OMS) and the mean of the last ten (RAT), or diagnostics, by seed."""
        if not self.scores:
            return {name: of[-1] for name, of in self.diagnostics().items() if name != "update"}
        scores = np.array([of for update, of in self.scores.items() if update] or [*self.scores.values()])
        return {"last": scores[-1], "OMS": scores.max(axis=0), "RAT": scores[-RAT_WINDOW:].mean(axis=0)}

    def print_table(self) -> None:
        """The final one."""
        window = min(RAT_WINDOW, len(self.scores.keys() - {0}))
        labels = {"last": f"last {self.unit}", "OMS": "OMS (best evaluation)"}
        labels["RAT"] = f"RAT (mean of the last {window})"
        self.bar.close()
        print(f"\n{self.algorithm} on {self.task.env_id}, {self.args.num_updates} updates, {len(self.seeds)} seed(s)")
        for name, values in self.results().items():
            print(f"  {labels.get(name, name):<28} {mean_and_deviation(values, '.1f' if self.scores else '.3g')}")
        print(f"  {'behaviour':<28} {self.behaviour.statistics['behaviour_score']:.1f}")
        print(f"  {'files':<28} {self.folder}/")


def mean_and_deviation(values: np.ndarray, form: str = ".1f") -> str:
    """Of the (seeds,) results: "mean +- deviation", for one seed the value alone."""
    return f"{values.mean():{form}}" + (f" +- {values.std(ddof=1):{form}}" if len(values) > 1 else "")


def _read_table(file: Path, last: int) -> list[tuple[int | None, str]]:
    """The heading, as of update 0, and the rows of updates up to `last`, each with its update; None if it is damaged.

    A damaged row at the end was cut off and is left out. Exits if the heading is another.
    """
    heading, *rows = file.read_text("latin-1").split("\n") if file.exists() else [""]
    if rows and not heading.startswith("update,seed,"):
        raise SystemExit(f"{file} has another heading than runs write. Mend its first line, or move the file away.")

    def update_of(row: str) -> int | None:
        with contextlib.suppress(ValueError):
            values = list(map(float, row.split(",")))
            return int(values[0]) if len(values) == heading.count(",") + 1 else None

    table = [(number, row) for row in rows[:-1] if (number := update_of(row)) is None or number <= last]
    while table and table[-1][0] is None:
        table.pop()
    return [(0, heading), *table] if rows else []
