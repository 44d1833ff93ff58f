"""BC: behaviour cloning, with a Gaussian or a diffusion policy, of all episodes or of the best of them ("10% BC").

    init_state: policy pi(a | s), or eps_theta
    repeat num_updates times (train_step):
        draw a batch (s, a)
        policy: minimise policy_loss: -log pi(a | s), or corrupt a to a^k and predict its noise for diffusion_loss
    act: select_action takes the Gaussian's mean, or a sample of the diffusion policy by sample_action

Run:  python algorithms/bc.py --env-id pointmaze-umaze --num-seeds 2
      python algorithms/bc.py --env-id pointmaze-umaze --policy diffusion --top-fraction 0.1

Differences from the EDP paper (P) and from its authors' code (C); equations are P's:
D3  P: the variance of DDPM is the posterior's, as in C; Eq. 4 has beta^k.
D4  C truncates the solver's fractional step to clip its samples; here time is exact, and the last action clipped too.
D6  C sets the gradient-norm clip for each task, 1 to 10; here Table 3's 5.
D7  C starts from LeCun-normal weights and zero biases; here both are uniform in +-1/sqrt(fan_in), as in PyTorch.
D25 P does not define its 10% BC; here it clones the tenth of the episodes that is worth most in evaluation.
"""

# ------------------------------------------------------------------------------------------------------ imports
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from common.diffusion import ScheduleName, corrupt, ddpm_sample, make_schedule
from common.dpm_solver import dpm_solver_sample
from common.harness import Behaviour, Dataset, Evaluator, NonNegative, Positive, Run, UnitInterval, load_dataset, setup
from common.networks import GaussianPolicy, NoisePredictor


# ---------------------------------------------------------------------------------------------------- arguments
@jax.tree_util.register_static
@dataclass(frozen=True)
class Args:
    """Flags without a default take that of their domain (Table 3); all are shown at the start of the run."""

    # Experiment
    env_id: str = "pointmaze-umaze"
    """the task"""
    dataset_id: str | None = None
    """any Minari dataset, remote or local; its own environment then replaces --env-id"""
    dataset_path: str | None = None
    """an original D4RL file (HDF5) of the task, in place of Minari's data"""
    normalize_obs: bool = False
    """standardise observations by the dataset's mean and deviation"""
    seed: NonNegative[int] = 0
    """the first seed; a run is a function of (seed, update)"""
    num_seeds: Positive[int] = 1
    """seeds trained together in one program: seed, seed + 1, ..."""
    run_dir: str | None = None
    """where to write; by default runs/<env-id>__<algorithm>__<seed>__<time>"""
    track: bool = False
    """log to Weights & Biases as well"""

    # Evaluation
    eval_every: Positive[int] | None = None
    """updates between evaluations"""
    eval_episodes: Positive[int] | None = None
    """episodes of each evaluation, for each seed"""
    policy_temperature: NonNegative[float] = 1.0
    """scales the predicted noise when acting (C.4)"""
    init_noise_scale: NonNegative[float] = 1.0
    """scales the initial noise a^K when acting (C.4)"""

    # Optimisation
    num_updates: Positive[int] | None = None
    """gradient updates; 1000 are an epoch of the paper"""
    batch_size: Positive[int] = 256
    """transitions of an update"""
    learning_rate: Positive[float] | None = None
    """Adam's (Table 3)"""
    lr_decay: bool = False
    """cosine decay of the learning rate to 0"""
    max_grad_norm: Positive[float] = 5.0
    """gradient-norm clip (Table 3)"""

    # Diffusion
    num_diffusion_steps: Positive[int] = 1000
    """K"""
    beta_schedule: ScheduleName = "linear"
    """noise schedule; "vp" for few steps"""
    sampler: Literal["dpm", "ddpm"] = "dpm"
    """DPM-Solver, or all K steps of DDPM"""
    num_solver_calls: Positive[int] = 15
    """network calls of DPM-Solver"""
    solver_order: Positive[int] = 3
    """order of DPM-Solver: 1 (DDIM), 2 or 3"""

    # Algorithm
    policy: Literal["gaussian", "diffusion"] = "gaussian"
    """what is fitted to the actions; a Gaussian ignores the flags of the diffusion"""
    top_fraction: UnitInterval[float] = 1.0
    """share of the episodes that is cloned, those with the largest returns: 0.1 for "10% BC" (D25)"""


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
class Corruption(NamedTuple):  # one draw for a batch, and the policy's prediction of its noise
    k: Int[Array, " batch"]
    noise: Float[Array, "batch act_dim"]
    noisy_action: Float[Array, "batch act_dim"]
    predicted_noise: Float[Array, "batch act_dim"]


def diffusion_loss(
    policy: NoisePredictor, batch: Dataset, key: PRNGKeyArray, args: Args
) -> tuple[Float[Array, ""], Corruption]:
    """Eq. 5: mean (noise - eps_theta(a^k, k; s))^2, with k uniform and a^k by Eq. 8."""
    k_key, noise_key = jax.random.split(key)
    schedule = make_schedule(args.beta_schedule, args.num_diffusion_steps)
    k = jax.random.randint(k_key, batch.reward.shape, 0, args.num_diffusion_steps)
    noise = jax.random.normal(noise_key, batch.action.shape)
    noisy_action = corrupt(schedule, batch.action, k, noise)
    predicted_noise = jax.vmap(policy)(batch.obs, noisy_action, k)
    return jnp.mean((noise - predicted_noise) ** 2), Corruption(k, noise, noisy_action, predicted_noise)


def sample_action(
    policy: NoisePredictor, obs: Float[Array, "batch obs_dim"], key: PRNGKeyArray, args: Args, acting: bool = False
) -> Float[Array, "batch act_dim"]:
    """a ~ pi_theta(. | s), Eq. 3, by DPM-Solver or DDPM; when acting, controlled by temperature and scale (C.4)."""
    temperature, noise_scale = (args.policy_temperature, args.init_noise_scale) if acting else (1.0, 1.0)
    init_key, chain_key = jax.random.split(key)
    schedule = make_schedule(args.beta_schedule, args.num_diffusion_steps)
    noise = noise_scale * jax.random.normal(init_key, (len(obs), policy.act_dim))
    predict = jax.jit(jax.vmap(policy, in_axes=(0, 0, None)))  # traced once for all calls
    noise_fn = lambda noisy_action, k: temperature * predict(obs, noisy_action, k)
    if args.sampler == "ddpm":
        return ddpm_sample(noise_fn, schedule, noise, chain_key, clip=True)
    return dpm_solver_sample(noise_fn, schedule, noise, args.num_solver_calls, args.solver_order, clip=True)


# ------------------------------------------------------------------------------------------------------- losses
def policy_loss(
    policy: GaussianPolicy | NoisePredictor, batch: Dataset, key: PRNGKeyArray, args: Args
) -> tuple[Float[Array, ""], dict]:
    """-mean log pi(a | s), or Eq. 5."""
    if args.policy == "gaussian":
        loss = -jnp.mean(jax.vmap(policy.log_prob)(batch.obs, batch.action))
    else:
        loss, _ = diffusion_loss(policy, batch, key, args)
    return loss, {"policy_loss": loss}


# ----------------------------------------------------------------------------------------------------- training
def train_step(
    state: TrainState, update: Int[Array, ""], key: PRNGKeyArray, dataset: Dataset, args: Args
) -> tuple[TrainState, dict]:
    """Update number `update` (1, 2, ...) of one seed."""
    batch_key, policy_key = jax.random.split(jax.random.fold_in(key, update))

    # Sample a batch
    index = jax.random.randint(batch_key, (args.batch_size,), 0, len(dataset.reward))
    batch = jax.tree.map(lambda array: array[index], dataset)

    # Update the policy
    grads, policy_metrics = jax.grad(policy_loss, has_aux=True)(state.policy, batch, policy_key, args)
    updates, policy_opt = make_optimizer(args).update(grads, state.policy_opt)
    policy = optax.apply_updates(state.policy, updates)

    return TrainState(policy, policy_opt), policy_metrics


@partial(jax.jit, static_argnames="num_updates", donate_argnames="state")
def train_chunk(
    state: TrainState, last: Int[Array, ""], keys: Key[Array, " seeds"], dataset: Dataset, args: Args, num_updates: int
) -> tuple[TrainState, dict]:
    """The `num_updates` updates of all seeds that end with number `last`; metrics are (num_updates, seeds)."""
    train_all_seeds = jax.vmap(train_step, in_axes=(0, None, 0, None, None))
    updates = last - num_updates + 1 + jnp.arange(num_updates)
    return jax.lax.scan(lambda state, update: train_all_seeds(state, update, keys, dataset, args), state, updates)


# ------------------------------------------------------------------------------------------------------- acting
def select_action(
    state: TrainState, obs: Float[Array, " obs_dim"], key: PRNGKeyArray, args: Args
) -> Float[Array, " act_dim"]:
    """The Gaussian's mean, or one sample of the diffusion policy."""
    if args.policy == "gaussian":
        return state.policy(obs)
    return sample_action(state.policy, obs[None], key, args, acting=True)[0]


@jax.jit
def act(
    state: TrainState, obs: Float[Array, "seeds batch obs_dim"], keys: Key[Array, " seeds"], step: Array, args: Args
) -> Float[Array, "seeds batch act_dim"]:
    """`select_action` for a batch of observations of every seed; each step draws other random numbers."""
    keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, step), obs.shape[1]))(keys)
    select_batch = jax.vmap(select_action, in_axes=(None, 0, 0, None))
    return jax.vmap(select_batch, in_axes=(0, 0, 0, None))(state, obs, keys, args)


# --------------------------------------------------------------------------------------------------------- main
def best_episodes(dataset: Dataset, behaviour: Behaviour, fraction: float) -> Dataset:
    """The given fraction of the episodes, at least one: those with the best scores, of equal ones the first (D25)."""
    count = max(1, round(fraction * len(behaviour.scores)))
    best = np.argsort(-behaviour.scores, kind="stable")[:count]
    episode = np.searchsorted(behaviour.episode_end, np.arange(len(dataset.reward)), side="right")
    return jax.tree.map(lambda array: array[np.isin(episode, best)], dataset)


def train(args: Args) -> dict:
    """Trains and evaluates all seeds; returns the last score, OMS and RAT of each."""
    args, task = setup(args)
    dataset, behaviour = load_dataset(task, "none")
    dataset = best_episodes(dataset, behaviour, args.top_fraction)
    mean, std = (behaviour.obs_mean, behaviour.obs_std) if args.normalize_obs else (0, 1)
    dataset = dataset._replace(obs=(dataset.obs - mean) / std, next_obs=(dataset.next_obs - mean) / std)
    with Run(__file__, args, task, behaviour) as run:
        dataset = run.to_devices(dataset)
        init_keys, train_keys, act_keys = run.keys(3)
        obs_dim, act_dim = dataset.obs.shape[1], dataset.action.shape[1]
        state = jax.jit(jax.vmap(lambda key: init_state(key, obs_dim, act_dim, args)))(init_keys)
        evaluate = Evaluator(task.environment, run.seeds, args.eval_episodes)
        for update in range(run.chunk, args.num_updates + 1, run.chunk):
            state, metrics = train_chunk(state, update, train_keys, dataset, args, run.chunk)
            run.log_metrics(update, metrics)
            if update % args.eval_every == 0:
                keys = jax.vmap(jax.random.fold_in, (0, None))(act_keys, update)
                policy = lambda obs, step: act(state, (obs - mean) / std, keys, step, args)
                run.log_evaluation(update, evaluate(policy, update), state)
        return run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
