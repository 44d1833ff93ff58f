"""TD3+BC: A Minimalist Approach to Offline RL (Fujimoto & Gu, NeurIPS 2021), EDP + TD3+BC with a deterministic policy.

    init_state: policy pi(s), critics Q_1 and Q_2, a target copy of each
    repeat num_updates times (train_step):
        draw a batch (s, a, r, s', terminal)
        critics: minimise critic_loss to critic_target, where a' <- sample_action(target policy, s'), a noisy pi'(s')
        policy, every second time: minimise policy_loss: the distance of pi(s) to a, and pi(s) climbing Q
        move the targets, every second time
    act: select_action takes pi(s); or draws N actions around it and picks one with probability proportional to exp Q

Run:  python algorithms/td3bc.py --env-id pointmaze-umaze --num-seeds 2
Table 6 of the paper: --num-eval-actions 10 is "TD3+EAS".

D1  paper: Alg. 1 prints a' ~ pi_theta; here, as in the official code, a' comes from the target policy.
D20 paper: no rate for feed-forward policies; here 3e-4 in every domain, as in TD3+BC's and IQL's own code.
D24 paper: EAS is not defined for a deterministic policy; here it chooses between clip(pi(s) + 0.2 N(0, I)).
All differences from the paper and from the official code are in docs/differences.md.
"""

# ------------------------------------------------------------------------------------------------------ imports
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from common.harness import Dataset, Loss, Preset, RewardRule, Run, load_dataset, setup
from common.harness.flags import NonNegative, Positive, UnitInterval, cli
from common.networks import Critic, TanhPolicy, init_twin_critics, twin_q

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
    num_eval_actions: Positive[int] = 1  # N of energy-based action selection (Alg. 2); 1 is the policy's own action
    eval_noise: NonNegative[float] = 0.2  # deviation of the N actions from the policy's own, if N > 1 (D24)

    # Optimisation
    num_updates: Positive[int] | None = None
    """updates: 2,000,000; in antmaze, adroit, kitchen and OGBench 1,000,000, in pointmaze 3,000, in bandit 400"""
    batch_size: Positive[int] = 256  # transitions in an update
    learning_rate: Positive[float] = 3e-4  # Adam's, for all networks (D20)
    lr_decay: bool = False  # cosine decay of the policy's learning rate to 0; preset fast: True
    max_grad_norm: Positive[float] = 5.0  # gradient-norm clip of each network, both critics as one (Table 3)
    gamma: UnitInterval[float] = 0.99  # discount
    tau: UnitInterval[float] = 0.005  # Polyak rate of the targets; preset fast: 0.2
    critic_layer_norm: bool = False  # layer normalisation in the value networks (RLPD, ReBRAC); preset fast: True

    # Algorithm
    max_q_backup: bool = False  # back up the best of 10 next actions; Diffusion-QL does in antmaze, except umaze
    policy_target_start: NonNegative[int] = 0  # updates before the target policy moves; EDP waits for 1,000
    policy_target_every: Positive[int] = 1  # updates between its moves from then on, if the policy moves, too; EDP: 5
    alpha: NonNegative[float] = 2.5  # weight of the guidance loss, as in TD3+BC's paper
    policy_every: Positive[int] = 2  # critic updates for each update of the policy and the targets
    policy_noise: NonNegative[float] = 0.2  # deviation of the target policy's actions
    noise_clip: NonNegative[float] = 0.5  # bound of that noise


# ------------------------------------------------------------------------------------------------------- state
class TrainState(NamedTuple):
    policy: TanhPolicy
    policy_opt: optax.OptState
    critics: Critic
    critics_opt: optax.OptState
    target_critics: Critic
    target_policy: TanhPolicy


def make_optimizers(args: Args) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """(the policy's, the other networks'): Adam after a clip of the global gradient norm."""
    clip, rate = optax.clip_by_global_norm(args.max_grad_norm), args.learning_rate
    policy_rate = optax.cosine_decay_schedule(rate, args.num_updates / args.policy_every) if args.lr_decay else rate
    return optax.chain(clip, optax.adam(policy_rate)), optax.chain(clip, optax.adam(rate))


def init_state(key: PRNGKeyArray, obs_dim: int, act_dim: int, args: Args) -> TrainState:
    policy_key, critics_key = jax.random.split(key)
    policy_optimizer, optimizer = make_optimizers(args)
    policy = TanhPolicy(obs_dim, act_dim, policy_key)
    critics = init_twin_critics(obs_dim, act_dim, critics_key, args.critic_layer_norm)
    policy_opt, critics_opt = policy_optimizer.init(policy), optimizer.init(critics)
    target_critics = jax.tree.map(jnp.copy, critics)  # copied: donated buffers must differ
    target_policy = jax.tree.map(jnp.copy, policy)
    return TrainState(policy, policy_opt, critics, critics_opt, target_critics, target_policy)


# ------------------------------------------------------------------------------------------------------- policy
def sample_action(
    policy: TanhPolicy, obs: Float[Array, "batch obs_dim"], key: PRNGKeyArray, std: float, limit: float = jnp.inf
) -> Float[Array, "batch act_dim"]:
    """clip(pi(s) + clip(e, -limit, limit), -1, 1), e ~ N(0, std^2 I)."""
    mean = jax.vmap(policy)(obs)
    noise = jnp.clip(std * jax.random.normal(key, mean.shape), -limit, limit)
    return jnp.clip(mean + noise, -1, 1)


# ------------------------------------------------------------------------------------------------------- losses
def critic_target(
    target_critics: Critic, target_policy: TanhPolicy, batch: Dataset, key: PRNGKeyArray, args: Args
) -> Float[Array, " batch"]:
    """Eq. 14: r + gamma (1 - terminal) min_i Q'_i(s', a'), a' ~ target policy (D1)."""
    num_actions = NUM_BACKUP_ACTIONS if args.max_q_backup else 1  # each target critic takes its best of them
    next_obs = jnp.repeat(batch.next_obs, num_actions, axis=0)
    next_action = sample_action(target_policy, next_obs, key, args.policy_noise, args.noise_clip)
    next_q = twin_q(target_critics, next_obs, next_action).reshape(2, -1, num_actions).max(axis=2)
    return batch.reward + args.gamma * (1 - batch.terminal) * next_q.min(axis=0)


def critic_loss(critics: Critic, target: Float[Array, " batch"], batch: Dataset) -> Loss:
    """Eq. 6: the sum over both critics of mean (Q_i(s, a) - target)^2."""
    q = twin_q(critics, batch.obs, batch.action)
    loss = jnp.sum(jnp.mean((q - jax.lax.stop_gradient(target)[None]) ** 2, axis=1))
    return loss, {"critic_loss": loss, "q": q.mean()}


def policy_loss(policy: TanhPolicy, critics: Critic, batch: Dataset, args: Args) -> Loss:
    """Eq. 15, 16, as in TD3+BC's paper: mean (pi(s) - a)^2 - lambda mean Q_1(s, pi(s)), lambda = alpha / mean |Q_1|."""
    action = jax.vmap(policy)(batch.obs)
    bc = jnp.mean((action - batch.action) ** 2)
    critic = jax.tree.map(lambda leaf: leaf[0], critics)
    q = jax.vmap(critic)(batch.obs, action)
    guidance = -jnp.mean(q) / jax.lax.stop_gradient(jnp.mean(jnp.abs(q)))
    loss = bc + args.alpha * guidance
    return loss, {"policy_loss": loss, "bc_loss": bc, "guidance_loss": guidance}


# ----------------------------------------------------------------------------------------------------- training
def train_step(state: TrainState, update: Int[Array, ""], key: PRNGKeyArray, dataset: Dataset, args: Args):
    """(state, metrics) after update number `update` (1, 2, ...) of one seed: Alg. 1."""
    batch_key, target_key = jax.random.split(jax.random.fold_in(key, update))
    policy_optimizer, optimizer = make_optimizers(args)

    # Sample a batch
    index = jax.random.randint(batch_key, (args.batch_size,), 0, len(dataset.reward))
    batch = jax.tree.map(lambda array: array[index], dataset)

    # Update the critics
    target = critic_target(state.target_critics, state.target_policy, batch, target_key, args)
    grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(state.critics, target, batch)
    updates, critics_opt = optimizer.update(grads, state.critics_opt)
    critics = optax.apply_updates(state.critics, updates)

    # Update the policy, every second time; else only look at its loss
    def improve(policy, policy_opt):
        grads, metrics = jax.grad(policy_loss, has_aux=True)(policy, critics, batch, args)
        updates, policy_opt = policy_optimizer.update(grads, policy_opt)
        return optax.apply_updates(policy, updates), policy_opt, metrics

    def wait(policy, policy_opt):
        return policy, policy_opt, policy_loss(policy, critics, batch, args)[1]

    is_due = update % args.policy_every == 0
    policy, policy_opt, policy_metrics = jax.lax.cond(is_due, improve, wait, state.policy, state.policy_opt)

    # Move the targets, together with the policy
    target_critics = optax.incremental_update(critics, state.target_critics, jnp.where(is_due, args.tau, 0.0))
    policy_moves = is_due & (update > args.policy_target_start) & (update % args.policy_target_every == 0)
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
    std = 0.0 if args.num_eval_actions == 1 else args.eval_noise
    action = sample_action(state.policy, candidate_obs, sample_key, std)
    q = twin_q(state.critics, candidate_obs, action).min(axis=0)
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
