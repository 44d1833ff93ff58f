"""The pictures of a run. Drawn without pyplot, whose backend and open figures belong to the user."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle


def learning_curve(
    updates: Sequence[int],
    scores: np.ndarray,
    seeds: Sequence[int],
    behaviour: float,
    title: str,
    name: str,
) -> Figure:
    """Scores, (evaluations, seeds), against updates; `name` is what they are called."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for seed, curve in zip(seeds, scores.T):
        ax.plot(updates, curve, ".-", alpha=0.4 if len(seeds) > 1 else 1, label=f"seed {seed}")
    if len(seeds) > 1:
        ax.plot(updates, scores.mean(axis=1), "k.-", label="mean")
    ax.axhline(behaviour, color="gray", linestyle="--", label="behaviour")
    ax.set(xlabel="updates", ylabel=name, title=title)
    ax.legend(fontsize="small")
    return figure


def diagnostic_curves(updates: Sequence[float], values: dict[str, np.ndarray], title: str) -> Figure:
    """Diagnostics, (times, seeds) by name, against updates: two to a panel, every seed and their mean."""
    names = list(values)
    figure = Figure(figsize=(7, 2.2 * len(names) / 2), layout="constrained")
    panels = figure.subplots(len(names) // 2, sharex=True, squeeze=False)[:, 0]
    for i, name in enumerate(names):
        color = f"C{i % 2}"
        panels[i // 2].plot(updates, values[name], color=color, alpha=0.3)
        panels[i // 2].plot(updates, values[name].mean(axis=1), ".-", color=color, label=name)
        panels[i // 2].legend(fontsize="small")
    panels[0].set_title(title)
    panels[-1].set_xlabel("updates")
    return figure


def maze_paths(
    maze: Any,
    cells: Sequence[tuple[int, int]],
    radius: float,
    paths: Sequence[Sequence[tuple[np.ndarray, bool]]],
    scores: Sequence[float],
) -> Figure:
    """A maze (gymnasium-robotics' `Maze`) with paths of the behaviour and of the policy, and the scores of both.

    A path is (steps, 2), with whether it reaches the goal. `cells` are start and goal, (row, column); `radius` is that
    of the goal.
    """
    half = maze.maze_size_scaling / 2
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    start, goal = (maze.cell_rowcol_to_xy(np.array(cell)) for cell in cells)
    for ax, some, title, score in zip(axes, paths, ("dataset", "learned policy"), scores):
        for cell, kind in np.ndenumerate(np.array(maze.maze_map, object)):
            if kind == 1:
                corner = maze.cell_rowcol_to_xy(np.array(cell)) - half
                ax.add_patch(Rectangle(corner, 2 * half, 2 * half, color="0.3"))
        for path, succeeds in some:
            ax.plot(*path.T, color="tab:blue" if succeeds else "tab:gray", alpha=0.4, linewidth=0.8)
        ax.plot(*start, "o", color="tab:orange", markersize=9, label="start")
        ax.plot(*goal, "*", color="tab:red", markersize=15, label="goal")
        ax.add_patch(Circle(goal, radius, color="tab:red", fill=False, linestyle=":"))
        rows, columns = np.shape(maze.maze_map)
        ax.set(title=f"{title}: {score:.1f} % reach the goal", aspect="equal", xticks=[], yticks=[])
        ax.set(xlim=(-half * columns, half * columns), ylim=(-half * rows, half * rows))
    axes[1].plot([], [], color="tab:blue", label="reaches it")
    axes[1].plot([], [], color="tab:gray", label="does not")
    axes[1].legend(loc="upper right")
    return figure
