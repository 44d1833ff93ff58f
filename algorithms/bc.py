"""BC: behaviour cloning, with a Gaussian or a diffusion policy, of all episodes or of the best of them ("10% BC").

    init_state: policy pi(a | s), or eps_theta
    repeat num_updates times (train_step):
        draw a batch (s, a)
        policy: minimise policy_loss: -log pi(a | s), or corrupt a to a^k and predict its noise for diffusion_loss
    act: select_action takes the Gaussian's mean, or a sample of the diffusion policy by sample_action

Run:  python algorithms/bc.py --env-id pointmaze-umaze --num-seeds 2
      python algorithms/bc.py --env-id pointmaze-umaze --policy diffusion --top-fraction 0.1

D20 paper: no rate for feed-forward policies; here 3e-4 in every domain, as in TD3+BC's and IQL's own code.
D25 paper: it does not say by what the best 10 % are chosen; here by the score under the evaluation protocol.
All differences from the paper and from the official code are in docs/differences.md.
"""

# ------------------------------------------------------------------------------------------------------ imports
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from common.diffusion import Prediction, ScheduleName, Spacing, corrupt, ddpm_sample, implied_noise, make_schedule
from common.dpm_solver import dpm_solver_sample, solver_orders
from common.harness import Behaviour, Dataset, Loss, Preset, Run, load_dataset, setup
from common.harness.flags import NonNegative, Positive, UnitInterval, cli
from common.networks import GaussianPolicy, NoisePredictor


# ---------------------------------------------------------------------------------------------------- arguments
@jax.tree_util.register_static
@dataclass(frozen=True)
class Args:
    """Flags whose default is None take the value that their text names; what a run used is in its args.json."""

    # Experiment
    exp_name: str = Path(__file__).stem  # part of the name of the run's folder
    env_id: str = "pointmaze-umaze"
    """the task, one of `python -m common.harness.tasks` or of OGBench (cube-single-play-singletask-v0, ...)"""
    dataset_id: str | None = None  # any Minari dataset, remote or local; its own environment then replaces --env-id
    dataset_path: str | None = None  # a file of the task, D4RL's (HDF5) or OGBench's (npz), in place of downloaded data
    trust: str = ""
    """packages, a,b,..., whose code the data may run as their environment, beside Gymnasium's and OGBench's"""
    preset: Preset | None = None
    """settings: paper; in pointmaze and bandit fast, for some thousands of updates (README, "Short of compute?")"""
    normalize_obs: bool = False  # standardise observations by the dataset's mean and deviation; preset fast: True
    seed: NonNegative[int] = 0  # the first seed; a run is a function of (seed, update)
    num_seeds: Positive[int] = 1  # seeds trained together in one program: seed, seed + 1, ...
    resume: str | None = None  # go on with the run in this folder; --num-updates may be larger than it was
    checkpoint_every: Positive[float] = 10.0  # minutes between checkpoints, besides those at evaluations
    run_dir: str | None = None  # where to write; by default runs/<env-id>__<exp-name>__<seed>__<time>
    track: bool = False  # log to Weights & Biases as well
    capture_video: bool = False  # an MP4 of an episode of each evaluation, in the run's folder videos/

    # Evaluation
    eval_every: Positive[int] | None = None
    """updates between evaluations: 10,000; in pointmaze 1,000, in bandit 100, in OGBench 100,000"""
    eval_episodes: NonNegative[int] | None = None
    """episodes of each evaluation, for each seed: 10; in mazes and bandit 100, in OGBench 50, in logs 0 (diagnosed)"""
    policy_temperature: NonNegative[float] = 1.0  # scales the predicted noise when acting (C.4)
    init_noise_scale: NonNegative[float] = 1.0  # scales the initial noise a^K when acting (C.4)

    # Optimisation
    num_updates: Positive[int] | None = None
    """updates: 2,000,000; in antmaze, adroit, kitchen and OGBench 1,000,000, in pointmaze 3,000, in bandit 400"""
    batch_size: Positive[int] = 256  # transitions in an update
    learning_rate: Positive[float] = 3e-4  # Adam's (D20)
    lr_decay: bool = False  # cosine decay of the learning rate to 0; preset fast: True
    max_grad_norm: Positive[float] = 5.0  # gradient-norm clip (Table 3)

    # Diffusion
    num_diffusion_steps: Positive[int] = 1000  # K; with --sampler ddpm the preset fast sets 5, and vp, in bandit
    beta_schedule: ScheduleName = "linear"  # noise schedule; "vp" for few steps
    prediction: Prediction = "noise"  # what the network predicts: noise, or the clean action a^0; preset fast: action
    sampler: Literal["dpm", "ddpm"] = "dpm"  # DPM-Solver, or all K steps of DDPM
    num_solver_calls: Positive[int] = 15  # network calls of DPM-Solver
    solver_order: Positive[int] = 3  # order of DPM-Solver: 1 (DDIM), 2 or 3
    solver_spacing: Spacing = "time_uniform"  # how its steps are spaced; with "logSNR" the solver narrows a policy less

    # Algorithm
    policy: Literal["gaussian", "diffusion"] = "gaussian"
    """what is fitted to the actions; a Gaussian does not use the diffusion's flags"""
    top_fraction: UnitInterval[float] = 1.0
    """share of the episodes that is cloned, those with the best scores: 0.1 for "10% BC" (D25)"""

    def __post_init__(self):  # what is impossible raises ValueError
        make_schedule(self.beta_schedule, self.num_diffusion_steps)
        if self.sampler == "dpm":
            solver_orders(self.num_solver_calls, self.solver_order, self.num_diffusion_steps)


# ------------------------------------------------------------------------------------------------------- state
class TrainState(NamedTuple):
    policy: GaussianPolicy | NoisePredictor
    policy_opt: optax.OptState


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam after a clip of the global gradient norm."""
    clip, rate = optax.clip_by_global_norm(args.max_grad_norm), args.learning_rate
    policy_rate = optax.cosine_decay_schedule(rate, args.num_updates) if args.lr_decay else rate
    return optax.chain(clip, optax.adam(policy_rate))


def init_state(key: PRNGKeyArray, obs_dim: int, act_dim: int, args: Args) -> TrainState:
    make_policy = GaussianPolicy if args.policy == "gaussian" else NoisePredictor
    policy = make_policy(obs_dim, act_dim, key)
    return TrainState(policy, make_optimizer(args).init(policy))


# ------------------------------------------------------------------------------------------------------- policy
class Corruption(NamedTuple):  # one draw for a batch, and the policy's prediction of its noise or of a^0
    k: Int[Array, " batch"]
    noise: Float[Array, "batch act_dim"]
    noisy_action: Float[Array, "batch act_dim"]
    prediction: Float[Array, "batch act_dim"]


def diffusion_loss(
    policy: NoisePredictor, batch: Dataset, key: PRNGKeyArray, args: Args
) -> tuple[Float[Array, ""], Corruption]:
    """Eq. 5, k uniform, a^k by Eq. 8: mean (noise - eps_theta(a^k, k; s))^2; of predicted actions (a - output)^2."""
    k_key, noise_key = jax.random.split(key)
    schedule = make_schedule(args.beta_schedule, args.num_diffusion_steps)
    k = jax.random.randint(k_key, batch.reward.shape, 0, args.num_diffusion_steps)
    noise = jax.random.normal(noise_key, batch.action.shape)
    noisy_action = corrupt(schedule, batch.action, k, noise)
    prediction = jax.vmap(policy)(batch.obs, noisy_action, k)
    truth = noise if args.prediction == "noise" else batch.action
    return jnp.mean((truth - prediction) ** 2), Corruption(k, noise, noisy_action, prediction)


def sample_action(
    policy: NoisePredictor, obs: Float[Array, "batch obs_dim"], key: PRNGKeyArray, args: Args, acting: bool = False
) -> Float[Array, "batch act_dim"]:
    """a ~ pi_theta(. | s), Eq. 3, by DPM-Solver or DDPM; when acting, controlled by temperature and scale (C.4)."""
    temperature, noise_scale = (args.policy_temperature, args.init_noise_scale) if acting else (1.0, 1.0)
    init_key, chain_key = jax.random.split(key)
    schedule = make_schedule(args.beta_schedule, args.num_diffusion_steps)
    noise = noise_scale * jax.random.normal(init_key, (len(obs), policy.act_dim))
    predict = jax.jit(jax.vmap(policy, in_axes=(0, 0, None)))  # traced once for all calls
    noise_fn = lambda a_k, k: temperature * implied_noise(args.prediction, schedule, a_k, k, predict(obs, a_k, k))
    if args.sampler == "ddpm":
        return ddpm_sample(noise_fn, schedule, noise, chain_key, clip=True)
    solver = args.num_solver_calls, args.solver_order, args.solver_spacing
    return dpm_solver_sample(noise_fn, schedule, noise, *solver, clip=True)


# ------------------------------------------------------------------------------------------------------- losses
def policy_loss(policy: GaussianPolicy | NoisePredictor, batch: Dataset, key: PRNGKeyArray, args: Args) -> Loss:
    """-mean log pi(a | s), or Eq. 5."""
    if args.policy == "gaussian":
        loss = -jnp.mean(jax.vmap(policy.log_prob)(batch.obs, batch.action))
    else:
        loss, _ = diffusion_loss(policy, batch, key, args)
    return loss, {"policy_loss": loss}


# ----------------------------------------------------------------------------------------------------- training
def train_step(state: TrainState, update: Int[Array, ""], key: PRNGKeyArray, dataset: Dataset, args: Args):
    """(state, metrics) after update number `update` (1, 2, ...) of one seed."""
    batch_key, policy_key = jax.random.split(jax.random.fold_in(key, update))

    # Sample a batch
    index = jax.random.randint(batch_key, (args.batch_size,), 0, len(dataset.reward))
    batch = jax.tree.map(lambda array: array[index], dataset)

    # Update the policy
    grads, policy_metrics = jax.grad(policy_loss, has_aux=True)(state.policy, batch, policy_key, args)
    updates, policy_opt = make_optimizer(args).update(grads, state.policy_opt)
    policy = optax.apply_updates(state.policy, updates)

    return TrainState(policy, policy_opt), policy_metrics


@jax.jit(static_argnames="num", donate_argnames="state")
def train_chunk(state: TrainState, last: Array, keys: Key[Array, " seeds"], dataset: Dataset, args: Args, num: int):
    """(state, metrics of each update) after the `num` updates of all seeds that end with number `last`."""
    train_all_seeds = jax.vmap(train_step, in_axes=(0, None, 0, None, None))
    updates = last - num + 1 + jnp.arange(num)
    return jax.lax.scan(lambda state, update: train_all_seeds(state, update, keys, dataset, args), state, updates)


# ------------------------------------------------------------------------------------------------------- acting
def select_action(
    state: TrainState, obs: Float[Array, " obs_dim"], key: PRNGKeyArray, step: Int[Array, ""], args: Args
):
    """At a step of an episode: the Gaussian's mean, or one sample of the diffusion policy."""
    if args.policy == "gaussian":
        return state.policy(obs)
    return sample_action(state.policy, obs[None], jax.random.fold_in(key, step), args, acting=True)[0]


# of every seed, for a batch of observations: (seeds, batch, obs_dim) and keys (seeds, batch) to (seeds, batch, act_dim)
act = jax.jit(jax.vmap(jax.vmap(select_action, (None, 0, 0, None, None)), (0, 0, 0, None, None)))


# --------------------------------------------------------------------------------------------------------- main
def best_episodes(dataset: Dataset, behaviour: Behaviour, fraction: float) -> Dataset:
    """The given fraction of the episodes, at least one: those with the best scores, of equal ones the first (D25)."""
    count = max(1, round(fraction * len(behaviour.scores)))
    best = np.argsort(-behaviour.scores, kind="stable")[:count]
    episode = np.searchsorted(behaviour.episode_end, np.arange(len(dataset.reward)), side="right")
    return jax.tree.map(lambda array: array[np.isin(episode, best)], dataset)


def train(args: Args) -> dict:
    """Trains and evaluates all seeds; returns the last score, OMS and RAT, or the last diagnostics, of each."""
    args, task = setup(args)
    dataset, behaviour = load_dataset(task, "none", args.normalize_obs)
    dataset = best_episodes(dataset, behaviour, args.top_fraction)
    with Run(__file__, args, task, behaviour, act) as run:
        dataset, obs_dim, act_dim = run.to_devices(dataset), dataset.obs.shape[1], dataset.action.shape[1]
        init = jax.jit(jax.vmap(lambda key: init_state(key, obs_dim, act_dim, args)))
        state, start = run.restore(init(run.init_keys))
        for update in range(start, args.num_updates + 1, run.chunk):
            if update > start:
                state, metrics = train_chunk(state, update, run.train_keys, dataset, args, run.chunk)
                run.save(update, state, metrics)
            run.evaluate(update, state)
        return run.finish()


if __name__ == "__main__":
    train(cli(Args))
