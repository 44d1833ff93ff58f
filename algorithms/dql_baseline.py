"""Diffusion-QL (Wang et al., ICLR 2023), the method that EDP speeds up: the paper's "DQL (JAX)".

    init_state: policy eps_theta, critics Q_1 and Q_2, a target copy of each
    repeat num_updates times (train_step):
        draw a batch (s, a, r, s', terminal)
        critics: minimise critic_loss to critic_target, where a' <- sample_action(target policy, s'), K network calls
        policy: corrupt a to a^k and predict its noise, for diffusion_loss; a-hat <- sample_action(policy, s), K calls;
            minimise policy_loss: the diffusion loss, and a-hat climbing Q, its gradient going through the whole chain
        move the targets
    act: select_action draws N actions and picks one with probability proportional to exp Q

Run:  python algorithms/dql_baseline.py --env-id pointmaze-umaze --num-seeds 2
Its authors' own chain is --num-diffusion-steps 5 --beta-schedule vp; in antmaze, except umaze, with --max-q-backup.

D1  paper: Alg. 1 prints a' ~ pi_theta; here, as in the official code, a' comes from the target policy.
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
import optax
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from common.diffusion import Prediction, ScheduleName, Spacing, corrupt, ddpm_sample, implied_noise, make_schedule
from common.dpm_solver import dpm_solver_sample, solver_orders
from common.harness import Dataset, Loss, Preset, RewardRule, Run, load_dataset, setup
from common.harness.flags import NonNegative, Positive, UnitInterval, cli
from common.networks import Critic, NoisePredictor, init_twin_critics, twin_q

# ---------------------------------------------------------------------------------------------------- arguments
NUM_BACKUP_ACTIONS = 10  # of --max-q-backup, as in Diffusion-QL's code


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
    reward_rule: RewardRule | None = None
    """rewards: none; in mazes and bandit cql_antmaze, in adroit and kitchen normalize"""
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
    num_eval_actions: Positive[int] = 10  # N of energy-based action selection (Alg. 2); 1 is plain sampling
    average_best: NonNegative[int] = 0  # act by the mean of so many of the N, those with the largest Q; 0: by Alg. 2
    policy_temperature: NonNegative[float] = 1.0  # scales the predicted noise when acting (C.4)
    init_noise_scale: NonNegative[float] = 1.0  # scales the initial noise a^K when acting (C.4)

    # Optimisation
    num_updates: Positive[int] | None = None
    """updates: 2,000,000; in antmaze, adroit, kitchen and OGBench 1,000,000, in pointmaze 3,000, in bandit 400"""
    batch_size: Positive[int] = 256  # transitions in an update
    learning_rate: Positive[float] | None = None  # Adam's: 3e-4; in adroit 3e-5 (Table 3; fast: 3e-4), in bandit 3e-3
    lr_decay: bool = False  # cosine decay of the policy's learning rate to 0; preset fast: True
    max_grad_norm: Positive[float] = 5.0  # gradient-norm clip of each network, both critics as one (Table 3)
    gamma: UnitInterval[float] = 0.99  # discount
    tau: UnitInterval[float] = 0.005  # Polyak rate of the targets; preset fast: 0.2
    critic_layer_norm: bool = False  # layer normalisation in the value networks (RLPD, ReBRAC); preset fast: True

    # Diffusion
    num_diffusion_steps: Positive[int] = 100  # K; with --sampler ddpm the preset fast sets 5, and vp, in bandit
    beta_schedule: ScheduleName = "linear"  # noise schedule; "vp" for few steps
    prediction: Prediction = "noise"  # what the network predicts: noise, or the clean action a^0; preset fast: action
    sampler: Literal["dpm", "ddpm"] = "ddpm"  # DPM-Solver, or all K steps of DDPM
    num_solver_calls: Positive[int] = 15  # network calls of DPM-Solver
    solver_order: Positive[int] = 3  # order of DPM-Solver: 1 (DDIM), 2 or 3
    solver_spacing: Spacing = "time_uniform"  # how its steps are spaced; with "logSNR" the solver narrows a policy less

    # Algorithm
    eta: NonNegative[float] | None = None
    """weight of the guidance loss (lambda of Alg. 1): 1; in adroit 0.1, in the kitchen 0.005 (Table 3)"""
    max_q_backup: bool = False  # back up the best of 10 next actions; Diffusion-QL does in antmaze, except umaze
    policy_target_start: NonNegative[int] = 1000  # updates before the target policy moves, as in Diffusion-QL's code
    policy_target_every: Positive[int] = 5  # updates between its moves from then on, as there

    def __post_init__(self):  # what is impossible raises ValueError
        make_schedule(self.beta_schedule, self.num_diffusion_steps)
        if self.sampler == "dpm":
            solver_orders(self.num_solver_calls, self.solver_order, self.num_diffusion_steps)
        if self.average_best > self.num_eval_actions:
            raise ValueError(f"--average-best {self.average_best} of --num-eval-actions {self.num_eval_actions}")


# ------------------------------------------------------------------------------------------------------- state
class TrainState(NamedTuple):
    policy: NoisePredictor
    policy_opt: optax.OptState
    critics: Critic
    critics_opt: optax.OptState
    target_critics: Critic
    target_policy: NoisePredictor


def make_optimizers(args: Args) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """(the policy's, the other networks'): Adam after a clip of the global gradient norm."""
    clip, rate = optax.clip_by_global_norm(args.max_grad_norm), args.learning_rate
    policy_rate = optax.cosine_decay_schedule(rate, args.num_updates) if args.lr_decay else rate
    return optax.chain(clip, optax.adam(policy_rate)), optax.chain(clip, optax.adam(rate))


def init_state(key: PRNGKeyArray, obs_dim: int, act_dim: int, args: Args) -> TrainState:
    policy_key, critics_key = jax.random.split(key)
    policy_optimizer, optimizer = make_optimizers(args)
    policy = NoisePredictor(obs_dim, act_dim, policy_key)
    critics = init_twin_critics(obs_dim, act_dim, critics_key, args.critic_layer_norm)
    policy_opt, critics_opt = policy_optimizer.init(policy), optimizer.init(critics)
    target_critics = jax.tree.map(jnp.copy, critics)  # copied: donated buffers must differ
    target_policy = jax.tree.map(jnp.copy, policy)
    return TrainState(policy, policy_opt, critics, critics_opt, target_critics, target_policy)


# --------------------------------------------------------------------------------------------- diffusion policy
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
def critic_target(
    target_critics: Critic, target_policy: NoisePredictor, batch: Dataset, key: PRNGKeyArray, args: Args
) -> Float[Array, " batch"]:
    """Eq. 14: r + gamma (1 - terminal) min_i Q'_i(s', a'), a' ~ target policy (D1)."""
    num_actions = NUM_BACKUP_ACTIONS if args.max_q_backup else 1  # each target critic takes its best of them
    next_obs = jnp.repeat(batch.next_obs, num_actions, axis=0)
    next_action = sample_action(target_policy, next_obs, key, args)
    next_q = twin_q(target_critics, next_obs, next_action).reshape(2, -1, num_actions).max(axis=2)
    return batch.reward + args.gamma * (1 - batch.terminal) * next_q.min(axis=0)


def critic_loss(critics: Critic, target: Float[Array, " batch"], batch: Dataset) -> Loss:
    """Eq. 6: the sum over both critics of mean (Q_i(s, a) - target)^2."""
    q = twin_q(critics, batch.obs, batch.action)
    loss = jnp.sum(jnp.mean((q - jax.lax.stop_gradient(target)[None]) ** 2, axis=1))
    return loss, {"critic_loss": loss, "q": q.mean()}


def policy_loss(policy: NoisePredictor, critics: Critic, batch: Dataset, key: PRNGKeyArray, args: Args) -> Loss:
    """Eq. 7 and 16: L_diff - eta mean Q_i(s, a-hat) / mean |Q_i|, with Q_i one of the two, drawn anew (A.1)."""
    diffusion_key, sample_key, critic_key = jax.random.split(key, 3)
    diffusion, _ = diffusion_loss(policy, batch, diffusion_key, args)
    action = sample_action(policy, batch.obs, sample_key, args)
    index = jax.random.randint(critic_key, (), 0, 2)
    critic = jax.tree.map(lambda leaf: leaf[index], critics)  # indexed first: the other one is not computed
    q = jax.vmap(critic)(batch.obs, action)
    guidance = -jnp.mean(q) / jax.lax.stop_gradient(jnp.mean(jnp.abs(q)))
    loss = diffusion + args.eta * guidance
    metrics = {"policy_loss": loss, "diffusion_loss": diffusion, "guidance_loss": guidance}
    return loss, metrics | {"clipped": jnp.mean(jnp.abs(action) == 1)}


# ----------------------------------------------------------------------------------------------------- training
def train_step(state: TrainState, update: Int[Array, ""], key: PRNGKeyArray, dataset: Dataset, args: Args):
    """(state, metrics) after update number `update` (1, 2, ...) of one seed: Alg. 1."""
    batch_key, target_key, policy_key = jax.random.split(jax.random.fold_in(key, update), 3)
    policy_optimizer, optimizer = make_optimizers(args)

    # Sample a batch
    index = jax.random.randint(batch_key, (args.batch_size,), 0, len(dataset.reward))
    batch = jax.tree.map(lambda array: array[index], dataset)

    # Update the critics
    target = critic_target(state.target_critics, state.target_policy, batch, target_key, args)
    grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(state.critics, target, batch)
    updates, critics_opt = optimizer.update(grads, state.critics_opt)
    critics = optax.apply_updates(state.critics, updates)

    # Update the policy
    grads, policy_metrics = jax.grad(policy_loss, has_aux=True)(state.policy, critics, batch, policy_key, args)
    updates, policy_opt = policy_optimizer.update(grads, state.policy_opt)
    policy = optax.apply_updates(state.policy, updates)

    # Move the targets
    target_critics = optax.incremental_update(critics, state.target_critics, args.tau)
    policy_moves = (update > args.policy_target_start) & (update % args.policy_target_every == 0)
    target_policy = optax.incremental_update(policy, state.target_policy, jnp.where(policy_moves, args.tau, 0.0))

    state = TrainState(policy, policy_opt, critics, critics_opt, target_critics, target_policy)
    return state, critic_metrics | policy_metrics


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
    """Alg. 2, at a step of an episode: one of N actions of the policy, with probability ~ exp(min_i Q_i(s, a))."""
    sample_key, choice_key = jax.random.split(jax.random.fold_in(key, step))
    candidate_obs = jnp.tile(obs, (args.num_eval_actions, 1))
    action = sample_action(state.policy, candidate_obs, sample_key, args, acting=True)
    q = twin_q(state.critics, candidate_obs, action).min(axis=0)
    if args.average_best:  # SfBC (Chen et al., 2023); 1 is the largest Q alone
        return action[jnp.argsort(-q)[: args.average_best]].mean(axis=0)
    return action[jax.random.categorical(choice_key, q)]


# of every seed, for a batch of observations: (seeds, batch, obs_dim) and keys (seeds, batch) to (seeds, batch, act_dim)
act = jax.jit(jax.vmap(jax.vmap(select_action, (None, 0, 0, None, None)), (0, 0, 0, None, None)))


# --------------------------------------------------------------------------------------------------------- main
def train(args: Args) -> dict:
    """Trains and evaluates all seeds; returns the last score, OMS and RAT, or the last diagnostics, of each."""
    args, task = setup(args)
    dataset, behaviour = load_dataset(task, args.reward_rule, args.normalize_obs)
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
