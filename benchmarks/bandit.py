"""What the paper is about, in two pictures of the toy: bandit.png and solver.png.

    python benchmarks/bandit.py                  # into runs/bandit/
    python benchmarks/bandit.py docs/images      # those of the docs

Trains three policies on `--env-id bandit` by the algorithm files' own functions and draws their actions.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from algorithms import bc, edp_td3bc
from common.diffusion import implied_noise, make_schedule
from common.dpm_solver import dpm_solver_sample
from common.harness import load_dataset, setup
from common.harness.bandit import MODES, RADIUS, reward_of
from common.harness.devices import seed_keys

COLORS = np.array(["tab:orange", "tab:gray", "tab:purple", "tab:green"])  # by mode; the first one pays
NUM_SAMPLES = 600


@dataclass(frozen=True)
class Args:
    """Draw what three policies learn of the toy."""

    folder: tyro.conf.Positional[Path] = Path("runs/bandit")
    """where to write the pictures"""


def train(module, num_updates: int, **flags):
    """(args, state) of one seed after the updates; observations are constant, so nothing is normalised."""
    print(f"Training {module.__name__.split('.')[1]}, {num_updates} updates ...", flush=True)
    args, task = setup(module.Args(env_id="bandit", num_updates=num_updates, eval_every=num_updates, **flags))
    dataset, _ = load_dataset(task, getattr(args, "reward_rule", "none"))
    dataset = jax.tree.map(jnp.asarray, dataset)
    init_keys, train_keys = seed_keys([0], 2)
    init = lambda key: module.init_state(key, dataset.obs.shape[1], dataset.action.shape[1], args)
    state, _ = module.train_chunk(jax.vmap(init)(init_keys), num_updates, train_keys, dataset, args, num_updates)
    return args, state


def sample(module, args, state, num: int = NUM_SAMPLES) -> np.ndarray:
    """(num, 2) actions, as the policy acts."""
    keys = jax.random.split(jax.random.key(1), (1, num))
    return np.asarray(module.act(state, jnp.zeros((1, num, 1)), keys, 0, args))[0]


def gaussian_sample(state, num: int = NUM_SAMPLES) -> np.ndarray:
    """(num, 2) samples of the cloned Gaussian, whose mean is what bc.py acts by."""
    policy = jax.tree.map(lambda leaf: leaf[0], state.policy)
    noise = jax.random.normal(jax.random.key(1), (num, 2))
    return np.asarray(policy(jnp.zeros(1)) + policy.std * noise)


def solver_steps(args, state, num: int = 300) -> list[np.ndarray]:
    """The actions at each network call of the solver, (num, 2) each, and at last its result."""
    policy = jax.tree.map(lambda leaf: leaf[0], state.policy)
    schedule = make_schedule(args.beta_schedule, args.num_diffusion_steps)
    seen = []

    def noise_fn(action, k):
        seen.append(np.asarray(action))
        prediction = jax.vmap(policy, in_axes=(None, 0, None))(jnp.zeros(1), action, k)
        return implied_noise(args.prediction, schedule, action, k, prediction)

    noise = jax.random.normal(jax.random.key(2), (num, 2))
    result = dpm_solver_sample(noise_fn, schedule, noise, args.num_solver_calls, args.solver_order, clip=True)
    return [*seen, np.asarray(result)]


def nearest_mode(actions: np.ndarray) -> np.ndarray:
    return np.linalg.norm(actions[:, None] - MODES, axis=2).argmin(axis=1)


def draw(ax: Axes, actions: np.ndarray, colors, title: str, limit: float = 1.15) -> None:
    """Actions as points; the circle is where they pay."""
    ax.add_patch(Circle(MODES[0], RADIUS, color="tab:orange", alpha=0.2, linewidth=0, zorder=0))
    ax.scatter(*actions.T, s=4, c=colors, alpha=0.6, linewidths=0)
    ax.set(title=title, aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])


def save(figure: Figure, file: Path, dpi: int) -> None:
    figure.savefig(file, dpi=dpi)
    print(file)


def main(args: Args) -> None:
    args.folder.mkdir(parents=True, exist_ok=True)
    gaussian = train(bc, 500, learning_rate=3e-3)
    diffusion = train(bc, 2000, learning_rate=3e-3, policy="diffusion")
    guided = train(edp_td3bc, 500, num_eval_actions=1)
    _, task = setup(bc.Args(env_id="bandit"))
    data = load_dataset(task, "none")[0].action[:NUM_SAMPLES]
    panels = {
        "data: four modes, one pays": data,
        "cloned by a Gaussian": gaussian_sample(gaussian[1]),
        "cloned by a diffusion policy": sample(bc, *diffusion),
        "EDP: guided by Q": sample(edp_td3bc, *guided),
    }
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for ax, (title, actions) in zip(figure.subplots(1, len(panels)), panels.items()):
        draw(ax, actions, COLORS[nearest_mode(actions)], title)
        ax.set_xlabel(f"{100 * reward_of(actions).mean():.0f} % pay")
    save(figure, args.folder / "bandit.png", 110)

    steps = solver_steps(*diffusion)
    colors = COLORS[nearest_mode(steps[-1])]
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for i, (ax, actions) in enumerate(zip(figure.subplots(2, 8).flat, steps)):
        draw(ax, actions, colors, f"call {i + 1}" if i + 1 < len(steps) else "the actions", limit=2.5)
    save(figure, args.folder / "solver.png", 95)


if __name__ == "__main__":
    main(tyro.cli(Args))
