"""Efficient Diffusion Policies for Offline RL (EDP; Kang et al., NeurIPS 2023) in one file, guided as in TD3+BC.

Offline RL learns to act from recorded transitions. A diffusion policy imitates them well: of several good actions it
holds all, not the mean. To do better, it has to hear from a critic Q which of them are good. But sampling an action is
a chain of network calls, and the gradient of Q would pass through them all. EDP makes one call: it adds noise to an
action of the data, predicts that noise, and guides the clean action that this implies (https://arxiv.org/abs/2305.20081).

    python minimal/edp.py                                     # a toy, no download: a minute of one CPU core
    python minimal/edp.py D4RL/pen/expert-v2 --updates 10000  # any Minari dataset with flat Box spaces
"""

import argparse
from collections import namedtuple

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import minari
import numpy as np
import optax

# The paper's settings, but for the last three: it makes a million updates or two, we make some thousands
K, NUM_SOLVER_CALLS, NUM_EVAL_ACTIONS = 1000, 15, 10  # diffusion steps, network calls to sample an action, N of Alg. 2
ETA = 0.1  # weight of the guidance by Q, as in adroit; the paper has 1 in locomotion and antmaze, 0.005 in the kitchen
GAMMA, BATCH_SIZE, WIDTH, MAX_GRAD_NORM = 0.99, 256, 256, 5.0
LEARNING_RATE = 1e-3  # the paper: 3e-4, in adroit 3e-5
TAU = 0.05  # rate of the target networks: with the usual 0.005 rewards travel back too slowly
REWARD_SCALE = 10.0  # rewards are scaled to at most this, not shifted: the larger Q, the more sharply exp(Q) selects

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, K))  # Eq. 1, with beta^k from 1e-4 to 0.02; index 0 is k = 1
SIGNAL, SIGMA = np.sqrt(ALPHA_BAR), np.sqrt(1 - ALPHA_BAR)  # how much action and how much noise there is in a^k


class MLP(eqx.Module):  # maps one example; jax.vmap makes it map a batch
    layers: list[eqx.nn.Linear]

    def __init__(self, *widths, key):
        keys = jax.random.split(key, len(widths) - 1)
        self.layers = [eqx.nn.Linear(m, n, key=key) for m, n, key in zip(widths, widths[1:], keys)]

    def __call__(self, *parts):
        x = jnp.concatenate(parts)
        for layer in self.layers[:-1]:
            x = jax.nn.mish(layer(x))
        return self.layers[-1](x)


class NoisePredictor(eqx.Module):  # the policy is eps_theta(a^k, k; s), a network that tells the noise in a^k
    time_mlp: MLP
    mlp: MLP

    def __call__(self, obs, noisy_action, k):
        angles = k * np.exp(-np.log(10_000) * np.arange(8) / 8)  # eight clock hands, from fast to slow, show k
        return self.mlp(obs, noisy_action, self.time_mlp(jnp.cos(angles), jnp.sin(angles)))


def twin_q(critics, obs, action):  # (2, batch); the two critics are one MLP whose arrays have a leading axis of 2
    return jax.vmap(lambda critic: jax.vmap(critic)(obs, action)[:, 0])(critics)


def diffusion_loss(policy, batch, k, noise):  # (Eq. 5, what Eq. 9 needs); k: (batch,), noise: (batch, act_dim)
    signal, sigma = jnp.take(SIGNAL, k)[:, None], jnp.take(SIGMA, k)[:, None]
    noisy_action = signal * batch.action + sigma * noise  # a^k, Eq. 8: k steps of noise at once
    prediction = jax.vmap(policy)(batch.obs, noisy_action, k)  # the one call
    return jnp.mean((noise - prediction) ** 2), (noisy_action, prediction, signal, sigma)


def approximate_action(noisy_action, prediction, signal, sigma):  # Eq. 9, the idea of EDP: Eq. 8 solved for a^0
    return jnp.clip((noisy_action - sigma * prediction) / signal, -1, 1)  # a-hat^0, clipped as in the authors' code


# DPM-Solver of order 1, known as DDIM, to be short. The paper's is of order 3, which is more exact for as many calls.
SOLVER_K = np.linspace(K - 1, 0, NUM_SOLVER_CALLS + 1)  # 999, 932.4, ..., 0: between two steps log(signal) is linear
SOLVER_SIGNAL = np.exp(np.interp(SOLVER_K, np.arange(K), np.log(SIGNAL)))
SOLVER_SIGMA = np.sqrt(1 - SOLVER_SIGNAL**2)


def sample_action(policy, obs, noisy_action):  # Eq. 3, from noise a^K: guess a clean action, put back less noise
    for i, k in enumerate(SOLVER_K[:-1]):
        prediction = jax.vmap(policy, in_axes=(0, 0, None))(obs, noisy_action, k)
        action = approximate_action(noisy_action, prediction, SOLVER_SIGNAL[i], SOLVER_SIGMA[i])
        noise = (noisy_action - SOLVER_SIGNAL[i] * action) / SOLVER_SIGMA[i]  # the prediction, but for the clip
        noisy_action = SOLVER_SIGNAL[i + 1] * action + SOLVER_SIGMA[i + 1] * noise  # Eq. 8
    return jnp.clip(noisy_action, -1, 1)


def critic_target(target_critics, target_policy, batch, noise):  # Eq. 14; a true end has no future, a time-out has
    next_action = sample_action(target_policy, batch.next_obs, noise)
    next_q = twin_q(target_critics, batch.next_obs, next_action).min(axis=0)  # the smaller one, against optimism
    return batch.reward + GAMMA * (1 - batch.terminal) * next_q


def critic_loss(critics, target, batch):  # Eq. 6: both critics learn the same target
    return jnp.sum(jnp.mean((twin_q(critics, batch.obs, batch.action) - target[None]) ** 2, axis=1))


def policy_loss(policy, critics, batch, k, noise, i):  # Eq. 10 and 16: imitate, and let a-hat^0 climb Q_i
    imitation, corruption = diffusion_loss(policy, batch, k, noise)
    q = twin_q(critics, batch.obs, approximate_action(*corruption))[i]  # which one is drawn anew each time (App. A.1)
    return imitation - ETA * jnp.mean(q) / jax.lax.stop_gradient(jnp.mean(jnp.abs(q)))  # whatever the rewards' scale


Dataset = namedtuple("Dataset", "obs action reward next_obs terminal")  # each has a row for each transition
TrainState = namedtuple("TrainState", "policy policy_opt critics critics_opt target_policy target_critics")
optimizer = optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adam(LEARNING_RATE))


def descend(loss, params, opt_state, *args):  # one step of Adam on loss(params, *args)
    updates, opt_state = optimizer.update(jax.grad(loss)(params, *args), opt_state)
    return optax.apply_updates(params, updates), opt_state


@jax.jit  # Alg. 1: the critics, then the policy by the new critics, then the targets, which follow slowly
def train_step(state, dataset, key):
    keys = jax.random.split(key, 4)
    index = jax.random.randint(keys[0], (BATCH_SIZE,), 0, len(dataset.reward))
    batch = jax.tree.map(lambda array: array[index], dataset)
    k, i = jax.random.randint(keys[1], (BATCH_SIZE,), 0, K), jax.random.randint(keys[2], (), 0, 2)
    noise, next_noise = jax.random.normal(keys[3], (2, *batch.action.shape))

    target = critic_target(state.target_critics, state.target_policy, batch, next_noise)
    critics, critics_opt = descend(critic_loss, state.critics, state.critics_opt, target, batch)
    policy, policy_opt = descend(policy_loss, state.policy, state.policy_opt, critics, batch, k, noise, i)
    targets = optax.incremental_update((policy, critics), (state.target_policy, state.target_critics), TAU)
    return TrainState(policy, policy_opt, critics, critics_opt, *targets)


@jax.jit  # Alg. 2: of N actions of the policy take one, with probability ~ exp(min_i Q_i(s, a))
def select_action(state, obs, key):  # (obs_dim,) -> (act_dim,)
    noise_key, choice_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (NUM_EVAL_ACTIONS, state.policy.mlp.layers[-1].out_features))
    candidate_obs = jnp.tile(obs, (NUM_EVAL_ACTIONS, 1))
    action = sample_action(state.policy, candidate_obs, noise)
    return action[jax.random.categorical(choice_key, twin_q(state.critics, candidate_obs, action).min(axis=0))]


class Bandit:  # the toy: one step, nothing to see, four modes of behaviour, and a reward around the first
    modes = np.array([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])
    reset = lambda self, seed: (np.zeros(1), {})
    step = lambda self, action: (np.zeros(1), float(np.linalg.norm(action - self.modes[0]) < 0.4), True, False, {})


def load(dataset_id):  # (dataset with actions in [-1, 1], return of each of its episodes, environment)
    if dataset_id == "bandit":
        rng, env, obs = np.random.default_rng(0), Bandit(), np.zeros((10_000, 1))
        action = np.clip(rng.choice(env.modes, 10_000) + 0.2 * rng.standard_normal((10_000, 2)), -1, 1)
        reward = np.array([env.step(a)[1] for a in action])
        return Dataset(obs, action, reward, obs, np.ones(10_000)), reward, env
    try:
        recording = minari.load_dataset(dataset_id, download=True)
        env = recording.recover_environment(eval_env=True)
        for space in (recording.observation_space, recording.action_space):
            assert isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1, f"{space} is no flat Box"
    except Exception as error:  # Minari, its remotes and the environments have each their own
        raise SystemExit(f"Cannot use the dataset {dataset_id} ({' '.join(str(error).split())}).") from None
    low, high = recording.action_space.low, recording.action_space.high
    scale = lambda action: 2 * (action - low) / (high - low) - 1
    # An episode has one observation more than actions. Only a termination is an end, being cut off (truncated) is none.
    episodes = list(recording.iterate_episodes())
    rows = [(e.observations[:-1], scale(e.actions), e.rewards, e.observations[1:], e.terminations) for e in episodes]
    env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return Dataset(*map(np.concatenate, zip(*rows))), np.array([e.rewards.sum() for e in episodes]), env


def evaluate(state, env):  # the mean return, of rewards as they are and without discount
    num_episodes, total, key = 200 if isinstance(env, Bandit) else 10, 0.0, jax.random.key(0)
    for seed in range(num_episodes):
        (obs, _), done = env.reset(seed=seed), False
        while not done:
            key, action_key = jax.random.split(key)
            action = np.asarray(select_action(state, np.float32(obs), action_key))
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + reward, terminated or truncated
    return total / num_episodes


def main(dataset_id, seed, updates):
    dataset, returns, env = load(dataset_id)
    print(f"{dataset_id}: {len(dataset.reward)} transitions, {len(returns)} episodes, mean return {returns.mean():.4g}")
    dataset = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), dataset)
    dataset = dataset._replace(reward=dataset.reward * REWARD_SCALE / jnp.abs(dataset.reward).max())
    obs_dim, act_dim, hidden = dataset.obs.shape[1], dataset.action.shape[1], 3 * (WIDTH,)
    keys = jax.random.split(jax.random.key(seed), 4)
    policy = NoisePredictor(MLP(16, 32, 16, key=keys[0]), MLP(obs_dim + act_dim + 16, *hidden, act_dim, key=keys[1]))
    critics = jax.vmap(lambda key: MLP(obs_dim + act_dim, *hidden, 1, key=key))(jax.random.split(keys[2]))
    state = TrainState(policy, optimizer.init(policy), critics, optimizer.init(critics), policy, critics)
    print(f"before training: mean return {evaluate(state, env):.4g}")
    for update in range(1, updates + 1):
        state = train_step(state, dataset, jax.random.fold_in(keys[3], update))
        if update % max(updates // 4, 1) == 0:
            print(f"after {update} updates: mean return {evaluate(state, env):.4g}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset_id", nargs="?", default="bandit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=300)
    main(**vars(parser.parse_args()))
