"""What the paper is about, on the toy: bandit.png, solver.png, and the points of the page on selection.

    python benchmarks/bandit.py                  # into runs/bandit/
    python benchmarks/bandit.py docs/images      # those of the docs

Trains policies on `--env-id bandit` by the algorithm files' own functions (some minutes on a CPU) and draws actions.
It prints what the critics think of EDP's actions, for three weights of Q.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback

import json
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
SHOWN_CALLS = (1, 12, 14, 15)  # of the solver: before the twelfth little changes
NOISE_SCALES = (0, 0.25, 0.5, 0.75, 1)


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


def solver_steps(args, state, num: int = 300, noise_scale: float = 1) -> list[np.ndarray]:
    """The actions at each network call of the solver, (num, 2) each, and at last its result."""
    policy = jax.tree.map(lambda leaf: leaf[0], state.policy)
    schedule = make_schedule(args.beta_schedule, args.num_diffusion_steps)
    seen = []

    def noise_fn(action, k):
        seen.append(np.asarray(action))
        prediction = jax.vmap(policy, in_axes=(None, 0, None))(jnp.zeros(1), action, k)
        return implied_noise(args.prediction, schedule, action, k, prediction)

    noise = noise_scale * jax.random.normal(jax.random.key(2), (num, 2))
    result = dpm_solver_sample(noise_fn, schedule, noise, args.num_solver_calls, args.solver_order, clip=True)
    return [*seen, np.asarray(result)]


def smaller_q(state, actions: np.ndarray) -> np.ndarray:
    """The smaller Q of the two critics, (num,); rewards are -2 and 2 here, and an episode is one step."""
    critics = jax.tree.map(lambda leaf: leaf[0], state.critics)
    return np.asarray(edp_td3bc.twin_q(critics, jnp.zeros((len(actions), 1)), jnp.asarray(actions))).min(axis=0)


def write_points(file: Path, diffusion, critics_state) -> None:
    """Actions of the imitating policy with their Q, by scale of the initial noise, as JavaScript: a page that is opened
    from a folder may load a script, but no JSON."""
    rows = []
    for scale in NOISE_SCALES:
        actions = solver_steps(*diffusion, num=250, noise_scale=scale)[-1]
        points = np.column_stack([actions, smaller_q(critics_state, actions)])
        rows.append(f'  "{scale}": {json.dumps([[round(float(x), 2) for x in point] for point in points])}')
    center, command = [round(float(x), 2) for x in MODES[0]], "// made by: python benchmarks/bandit.py docs/images"
    body = ",\n".join(rows)
    text = f"{command}; [x, y, Q] by scale of the initial noise\nconst SELECTION = {{\n{body}\n}};\n"
    file.write_text(text + f"const CIRCLE = {json.dumps([*center, RADIUS])};\n")


def nearest_mode(actions: np.ndarray) -> np.ndarray:
    return np.linalg.norm(actions[:, None] - MODES, axis=2).argmin(axis=1)


def draw(ax: Axes, actions: np.ndarray, colors, title: str, limit: float = 1.15) -> None:
    """Actions as points; the circle is where they pay."""
    ax.add_patch(Circle(MODES[0], RADIUS, color="tab:orange", alpha=0.2, linewidth=0, zorder=0))
    ax.scatter(*actions.T, s=4, c=colors, alpha=0.6, linewidths=0)
    ax.set(title=title, aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])


def save(figure: Figure, file: Path, dpi: int) -> None:
    figure.savefig(file, dpi=dpi, bbox_inches="tight", pad_inches=0.05)  # square panels can push titles out
    print(file)


def main(args: Args) -> None:
    args.folder.mkdir(parents=True, exist_ok=True)
    gaussian = train(bc, 500, learning_rate=3e-3)
    diffusion = train(bc, 2000, learning_rate=3e-3, policy="diffusion")
    guided = train(edp_td3bc, 500, num_eval_actions=1)
    print(f"Q at the centre of the circle: {smaller_q(guided[1], MODES[:1])[0]:.2f}")
    for eta in (0.1, 1, 10):
        policy = guided if eta == 1 else train(edp_td3bc, 500, num_eval_actions=1, eta=eta)
        actions = sample(edp_td3bc, *policy)
        distance = np.linalg.norm(actions.mean(axis=0) - MODES[0])
        pay, q = 100 * reward_of(actions).mean(), smaller_q(policy[1], actions).mean()
        print(f"eta {eta}: {pay:.0f} % pay, mean Q {q:.2f}, their mean {distance:.2f} from the centre")
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
        ax.set_title(title, fontsize=14)
        ax.set_xlabel(f"{100 * reward_of(actions).mean():.0f} % pay", fontsize=15)
        ax.text(
            *(MODES[0] + [0, RADIUS + 0.04]),
            "pays" if ax.get_subplotspec().colspan.start else "pays: reward 1",
            ha="center",
            fontsize=13,
            color="tab:red",
        )
    save(figure, args.folder / "bandit.png", 110)

    steps = solver_steps(*diffusion)
    colors = COLORS[nearest_mode(steps[-1])]
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    shown = {f"call {call}": steps[call - 1] for call in SHOWN_CALLS} | {"the actions": steps[-1]}
    for ax, (title, actions) in zip(figure.subplots(1, len(shown)), shown.items()):
        draw(ax, actions, colors, title, limit=2.5)
        ax.set_title(title, fontsize=14)
    save(figure, args.folder / "solver.png", 110)
    write_points(args.folder / "selection-points.js", diffusion, guided[1])


if __name__ == "__main__":
    main(tyro.cli(Args))
