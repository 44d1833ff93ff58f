"""The algorithm files against the paper, equation after equation: read it beside Sec. 3, 4 and Appendix A.

Each test writes an equation down once more, in NumPy with the schedule from its definition; networks are evaluated by
JAX and random numbers drawn alike. Where a gradient matters, the loss is written down with the numbers held constant
that should be. All is float64, where rounding is 1e-16 times what a chain of steps magnifies it by: 1e-9 is far from
that on every processor, and from any error in an equation. Networks have one hidden layer, for no equation depends on
their depth. A function that several files share (test_siblings.py compares their text) is tested in the first of them.
test_reference.py holds the same functions, with the paper's networks, against the authors' own numbers.
"""

import dataclasses
from functools import lru_cache, partial

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import one, over

from algorithms import bc, crr, dql_baseline, edp_crr, edp_iql, edp_td3bc, iql, td3bc
from common.diffusion import corrupt, ddpm_sample, implied_noise, make_schedule
from common.dpm_solver import dpm_solver_sample
from common.harness import Dataset
from common.networks import GaussianPolicy, NoisePredictor, TanhPolicy, Value, init_twin_critics

pytestmark = pytest.mark.usefixtures("float64", "quick_networks")

OBS_DIM, ACT_DIM, BATCH, K = 3, 2, 24, 50
ALPHA = 1 - np.linspace(1e-4, 0.02, K) * 1000 / K
ALPHA_BAR = np.cumprod(ALPHA)
SIGNAL, SIGMA = np.sqrt(ALPHA_BAR), np.sqrt(1 - ALPHA_BAR)
SMALL = {"num_diffusion_steps": K, "num_solver_calls": 3, "batch_size": BATCH, "num_updates": 10}
SMALL |= {"eta": 1.0, "learning_rate": 1e-3, "expectile": 0.8, "temperature": 1.0}
make_args = partial(helpers.make_args, common=SMALL)


def value_and_grad(loss, argnums=0):
    return jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))


def close(result, expected, tolerance=1e-9):
    """Each array within `tolerance` of its largest entry."""
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


equal = lambda result, expected: jax.tree.map(np.testing.assert_array_equal, result, expected)


# ------------------------------------------------------------------------------------------------ batch and networks
@lru_cache
def make_batch(size=BATCH):
    rng = np.random.default_rng(size)
    obs, next_obs = rng.normal(size=(2, size, OBS_DIM))
    action, reward = rng.uniform(-0.8, 0.8, (size, ACT_DIM)), rng.normal(size=size)
    return jax.tree.map(jnp.asarray, Dataset(obs, action, reward, next_obs, rng.integers(0, 2, size).astype(float)))


def with_last_layer(init, scale, shift=0.0):
    """The module that `init` makes, its outputs scaled and shifted."""
    module = jax.jit(init)(jax.random.key(1))
    module = eqx.tree_at(lambda module: module.mlp.layers[-1].weight, module, replace_fn=lambda weight: scale * weight)
    return eqx.tree_at(lambda module: module.mlp.layers[-1].bias, module, replace_fn=lambda bias: bias + shift)


@lru_cache
def make_critics(*shifts):
    """Of different size, so that which of the two was used shows in any number."""
    shift = np.array(shifts or (0.1, -0.1))[:, None]
    return with_last_layer(lambda key: init_twin_critics(OBS_DIM, ACT_DIM, key), 10, shift)


# scaled so that some actions are near enough to +-1 for their noise to be clipped
make_tanh_policy = lru_cache(lambda: with_last_layer(lambda key: TanhPolicy(OBS_DIM, ACT_DIM, key), 30))
make_value = lru_cache(lambda: with_last_layer(lambda key: Value(OBS_DIM, key), 10))


@lru_cache
def make_gaussian_policy():
    policy = with_last_layer(lambda key: GaussianPolicy(OBS_DIM, ACT_DIM, key), 30)
    return eqx.tree_at(lambda policy: policy.log_std, policy, jnp.array([-1.2, 0.3]))


@lru_cache
def make_policy():
    """Fitted to data for a moment: the samples of a policy of random weights are all clipped to +-1."""
    args, batch, optimizer = make_args(edp_td3bc), make_batch(128), optax.adam(3e-3)

    @jax.jit
    def step(policy, opt_state, key):
        grads, _ = jax.grad(edp_td3bc.diffusion_loss, has_aux=True)(policy, batch, key, args)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(policy, updates), opt_state

    policy = jax.jit(lambda key: NoisePredictor(OBS_DIM, ACT_DIM, key))(jax.random.key(0))
    opt_state = jax.jit(optimizer.init)(policy)
    for key in jax.random.split(jax.random.key(0), 100):
        policy, opt_state = step(policy, opt_state, key)
    return policy


compiled = jax.jit(lambda module, *inputs: jax.vmap(module)(*inputs))
forward = lambda *inputs: np.asarray(compiled(*inputs))


def predict(policy, obs, action, k):
    return forward(policy, obs, action, np.broadcast_to(k, len(obs)))


def q_values(critics, obs, action):
    """[Q_1, Q_2], each by its own network."""
    return np.array([forward(one(critics, i), obs, action) for i in range(2)])


# ---------------------------------------------------------------------------------------- Eq. 2 to 4: a ~ pi_theta
def written_sample(policy, obs, key, use_ddpm, temperature=1.0, scale=1.0, prediction="noise", schedule=None, **solver):
    """The samplers have tests of their own, test_diffusion.py and test_dpm_solver.py."""
    init_key, chain_key = jax.random.split(key)
    schedule = schedule or make_schedule("linear", K)
    noise = scale * jax.random.normal(init_key, (len(obs), ACT_DIM))
    log_alpha_bar = np.cumsum(np.log1p(-schedule.beta))

    def noise_fn(x, k):
        predicted = jax.vmap(policy, (0, 0, None))(obs, x, k)
        if prediction == "action":  # Eq. 8 solved for the noise; log alpha_bar is linear between two steps
            alpha_bar = jnp.exp(jnp.interp(k, np.arange(len(log_alpha_bar)), log_alpha_bar))
            predicted = (x - jnp.sqrt(alpha_bar) * predicted) / jnp.sqrt(1 - alpha_bar)
        return temperature * predicted

    if use_ddpm:
        return ddpm_sample(noise_fn, schedule, noise, chain_key, clip=True)
    return dpm_solver_sample(noise_fn, schedule, noise, 3, **solver, clip=True)


SAMPLERS = [("dpm", "linear", K), ("dpm", "linear", 1000), ("dpm", "vp", 5), ("ddpm", "linear", K), ("ddpm", "vp", 5)]


@pytest.mark.parametrize("prediction", ["noise", "action"])
@pytest.mark.parametrize(("sampler", "name", "num_steps"), SAMPLERS)
def test_eq_3_sample_action_denoises_noise(sampler, name, num_steps, prediction):
    """Whether the network gives the noise in a^k or the clean action, by DPM-Solver or DDPM, at any K."""
    policy, obs, key = make_policy(), make_batch().obs, jax.random.key(4)
    flags = {"num_diffusion_steps": num_steps, "beta_schedule": name, "sampler": sampler, "prediction": prediction}
    args, settings = make_args(edp_td3bc, **flags), (sampler == "ddpm", 1.0, 1.0, prediction)
    schedule = make_schedule(name, num_steps)
    samples = lambda of: (edp_td3bc.sample_action(*of, args), written_sample(*of, *settings, schedule))
    result, expected = jax.jit(samples)((policy, obs, key))  # one program compiles sooner than two
    assert np.mean(np.abs(expected) < 1) > 0.1  # the clip does not decide it all
    close(result, expected)


def test_c_4_when_acting_a_temperature_scales_the_predicted_noise_and_another_factor_the_initial_noise():
    """In training neither does. Order and spacing of the solver are those of the flags in both."""
    policy, obs, key = make_policy(), make_batch().obs, jax.random.key(4)
    flags, solver = {"solver_order": 2, "solver_spacing": "logSNR"}, {"order": 2, "skip": "logSNR"}
    args = make_args(edp_td3bc, policy_temperature=0.9, init_noise_scale=0.7, **flags)
    for acting, settings in ((True, (0.9, 0.7)), (False, (1.0, 1.0))):
        result = jax.jit(lambda policy: edp_td3bc.sample_action(policy, obs, key, args, acting))(policy)
        close(result, jax.jit(lambda policy: written_sample(policy, obs, key, False, *settings, **solver))(policy))


# --------------------------------------------------------------------------------- Eq. 5 and 8: the diffusion loss
@pytest.mark.parametrize(("prediction", "name"), [("noise", "linear"), ("action", "vp")])
def test_eq_5_diffusion_loss(prediction, name):
    """mean (noise - eps_theta(a^k, k; s))^2 with a^k by Eq. 8; mean (a^0 - ...)^2 where the network predicts a^0."""
    batch, policy, args = make_batch(), make_policy(), make_args(edp_td3bc, prediction=prediction, beta_schedule=name)
    schedule = make_schedule(name, K)
    loss, corruption = jax.jit(edp_td3bc.diffusion_loss)(policy, batch, jax.random.key(1), args)
    k, noise, action = map(np.asarray, (corruption.k, corruption.noise, batch.action))
    noisy_action = schedule.sqrt_alpha_bar[k, None] * action + schedule.sqrt_one_minus_alpha_bar[k, None] * noise
    predicted = predict(policy, batch.obs, noisy_action, k)
    close(corruption.noisy_action, noisy_action)
    close(corruption.prediction, predicted)
    close(loss, np.mean(((noise if prediction == "noise" else action) - predicted) ** 2))


def test_eq_5_k_is_uniform_and_noise_standard_normal():
    """Every transition has its own k in {0..K-1} and its own noise."""
    size = 5000
    loss = jax.jit(edp_td3bc.diffusion_loss)
    _, corruption = loss(make_policy(), make_batch(size), jax.random.key(2), make_args(edp_td3bc))
    counts, noise = np.bincount(corruption.k, minlength=K), np.asarray(corruption.noise)
    assert len(counts) == K
    assert np.sum((counts - size / K) ** 2) / (size / K) < K - 1 + 5 * np.sqrt(2 * (K - 1))  # chi-square
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 5 * np.sqrt(2 / noise.size)
    assert abs(np.corrcoef(corruption.k, noise[:, 0])[0, 1]) < 5 / np.sqrt(size)


# ----------------------------------------------------------------------------------------- Eq. 6: the critics' loss
def test_eq_6_critic_loss():
    """The sum over both critics of mean (Q_i(s, a) - target)^2, without gradient to the target."""
    batch, critics = make_batch(), make_critics()
    target = jnp.asarray(np.random.default_rng(1).normal(size=BATCH))
    loss_and_gradients = value_and_grad(edp_td3bc.critic_loss, (0, 1))
    (loss, metrics), (gradient, target_gradient) = loss_and_gradients(critics, target, batch)
    q = q_values(critics, batch.obs, batch.action)
    error = q - np.asarray(target)
    close(loss, np.mean(error[0] ** 2) + np.mean(error[1] ** 2))
    close((metrics["critic_loss"], metrics["q"]), (loss, q.mean()))
    close(gradient.mlp.layers[-1].bias[:, 0], 2 * error.mean(axis=1))  # each by its own error, undivided by two
    equal(target_gradient, jnp.zeros(BATCH))


# ----------------------------------------------------------------------------------- Eq. 8 and 9: a^k and a-hat^0
def test_eq_8_corruption_and_the_noise_it_implies():
    """a^k = sqrt(alpha_bar^k) a^0 + sqrt(1 - alpha_bar^k) noise; solved for the noise, between two steps as well."""
    rng, schedule = np.random.default_rng(0), make_schedule("linear", K)
    action, noise = rng.uniform(-1, 1, (K, ACT_DIM)), rng.normal(size=(K, ACT_DIM))
    noisy_action = SIGNAL[:, None] * action + SIGMA[:, None] * noise
    a_0, a_k, k = jnp.asarray(action), jnp.asarray(noisy_action), jnp.arange(K)
    close(corrupt(schedule, a_0, k, jnp.asarray(noise)), noisy_action)
    close(implied_noise("action", schedule, a_k, k[:, None], a_0), noise)
    equal(implied_noise("noise", schedule, a_k, k[:, None], a_0), a_0)
    level = np.sqrt(ALPHA_BAR[7] * ALPHA_BAR[8])  # log alpha_bar is linear between two steps
    expected = (noisy_action - np.sqrt(level) * action) / np.sqrt(1 - level)
    close(implied_noise("action", schedule, a_k, 7.5, a_0), expected)


def approximate_action(k, noisy_action, eps, signal=SIGNAL, sigma=SIGMA):
    """Eq. 9 before the clip."""
    return (noisy_action - jnp.asarray(sigma)[k, None] * eps) / jnp.asarray(signal)[k, None]


@pytest.mark.parametrize("name", ["linear", "vp"])
def test_eq_9_approximate_action_is_clipped_with_no_gradient_where_the_clip_is_active(name):
    """clip((a^k - sqrt(1 - alpha_bar^k) eps) / sqrt(alpha_bar^k), -1, 1) (D2): its slope in eps is 0 outside."""
    args, (*_, signal, sigma) = make_args(edp_td3bc, beta_schedule=name), make_schedule(name, K)
    _, corruption = jax.jit(edp_td3bc.diffusion_loss)(make_policy(), make_batch(), jax.random.key(3), args)
    k, _, noisy_action, eps = corruption
    total = lambda eps: edp_td3bc.approximate_action(corruption._replace(prediction=eps), args).sum()
    raw = np.asarray(approximate_action(k, noisy_action, eps, signal, sigma))
    assert 0 < np.mean(np.abs(raw) > 1) < 0.9, "some are clipped, and some are not"
    close(edp_td3bc.approximate_action(corruption, args), np.clip(raw, -1, 1))
    slope = np.where(np.abs(raw) > 1, 0, -(sigma / signal)[np.asarray(k), None])
    np.testing.assert_allclose(jax.jit(jax.grad(total))(eps), slope, rtol=1e-9)
    of_actions = dataclasses.replace(args, prediction="action")
    equal(edp_td3bc.approximate_action(corruption, of_actions), np.clip(eps, -1, 1))


# ---------------------------------------------------------------------------------- Eq. 10 and 16: climbing Q (TD3+BC)
WITHOUT = {"action_approx": False}
GUIDED = [(edp_td3bc, {}), (edp_td3bc, WITHOUT), (edp_td3bc, WITHOUT | {"sampler": "ddpm"}), (dql_baseline, {})]


@pytest.mark.parametrize(("algorithm", "flags"), GUIDED, ids=["edp", "edp without AP", "the same by ddpm", "dql"])
def test_eq_10_and_16_policy_loss(algorithm, flags):
    """L_diff - eta mean Q_i(s, a) / mean |Q_i| for one i; the gradient is through a and the sampler, not mean |Q_i|."""
    batch, key, policy, critics = make_batch(), jax.random.key(7), make_policy(), make_critics()
    args = make_args(algorithm, eta=2.5, **flags)
    diffusion_key, sample_key, _ = jax.random.split(key, 3)

    def written(policy, critic, scale):
        diffusion, (k, _, *inputs) = algorithm.diffusion_loss(policy, batch, diffusion_key, args)
        if flags or algorithm is dql_baseline:
            action = written_sample(policy, batch.obs, sample_key, use_ddpm=args.sampler == "ddpm")
        else:
            action = jnp.clip(approximate_action(k, *inputs), -1, 1)
        q = jax.vmap(critic)(batch.obs, action)
        return diffusion - 2.5 * q.mean() / scale, (diffusion, action, q)

    (loss, metrics), gradient = value_and_grad(algorithm.policy_loss)(policy, critics, batch, key, args)
    written, matches = value_and_grad(written), 0
    for critic in (one(critics, 0), one(critics, 1)):
        (_, (_, _, q)), _ = written(policy, critic, np.float64(1))
        assert 0.1 < np.mean(np.asarray(q) > 0) < 0.9  # so that |mean Q_i| is not mean |Q_i|
        (expected, (diffusion, action, _)), expected_gradient = written(policy, critic, np.abs(q).mean())
        if np.isclose(loss, expected, rtol=1e-9):
            close(gradient, expected_gradient)
            matches += 1
    assert matches == 1
    close([metrics["policy_loss"], metrics["diffusion_loss"]], [loss, diffusion])
    close(metrics["clipped"], np.mean(np.abs(action) == 1), 1e-6)  # a share is float32 always
    close(diffusion + 2.5 * metrics["guidance_loss"], loss)


@over(edp_td3bc, dql_baseline)
def test_a_1_either_critic_guides_the_whole_batch_half_of_the_time(algorithm):
    """One is drawn for each update, not for each transition, and not the mean of both."""
    batch, critics = make_batch(4), make_critics(500.0, -500.0)  # the sign tells which one was used
    args, keys = make_args(algorithm, num_diffusion_steps=21), jax.random.split(jax.random.key(9), 100)
    losses = jax.jit(jax.vmap(algorithm.policy_loss, (None, None, None, 0, None)))
    guidance = np.asarray(losses(make_policy(), critics, batch, keys, args)[1]["guidance_loss"])
    np.testing.assert_allclose(np.abs(guidance), 1, rtol=1e-9)  # a mixture within the batch would lie between
    assert abs(np.sum(guidance < 0) - 50) < 4 * np.sqrt(100 / 4)


@over(edp_td3bc, edp_crr, edp_iql)
def test_one_network_call_serves_all_terms_of_the_policy_loss(algorithm, monkeypatch):
    """In an update each transition has one k, one noise and one prediction."""
    calls, original = [], NoisePredictor.__call__
    monkeypatch.setattr(NoisePredictor, "__call__", lambda self, *inputs: calls.append(1) or original(self, *inputs))
    guide, args = jnp.ones(BATCH) if algorithm is edp_iql else make_critics(), make_args(algorithm)
    loss = lambda policy: algorithm.policy_loss(policy, guide, make_batch(), jax.random.key(0), args)
    jax.eval_shape(loss, make_policy())
    assert len(calls) == 1


# -------------------------------------------------------------------- Eq. 12 and 13: weighted likelihood (CRR, IQL)
ELBO = {"likelihood": "elbo"}
WEIGHTED = [(edp_iql, {}), (edp_crr, {}), (edp_crr, ELBO), (edp_crr, ELBO | {"prediction": "action"})]


@pytest.mark.parametrize(("algorithm", "flags"), WEIGHTED, ids=["iql", "crr", "elbo", "elbo by a^0"])
def test_eq_12_and_13_policy_loss(algorithm, flags):
    """L_diff + eta mean f |a - a-hat^0|^2 / 2 (D10), or f w_k mean (noise - eps_theta)^2 (D12): f has no gradient."""
    batch, key, policy, args = make_batch(), jax.random.key(13), make_policy(), make_args(algorithm, eta=0.7, **flags)
    diffusion_key, advantage_key = (key, None) if algorithm is edp_iql else jax.random.split(key)
    guide = jnp.linspace(0, 3, BATCH) if algorithm is edp_iql else make_critics()
    step_weight = (1 - ALPHA) / (2 * ALPHA * (1 - ALPHA_BAR))

    def written(moved):
        weight = guide
        if algorithm is edp_crr:  # of the policy that does not move
            action = edp_crr.approximate_action(edp_crr.diffusion_loss(policy, batch, diffusion_key, args)[1], args)
            weight = edp_crr.advantage_weight(guide, action, batch, advantage_key, args)
        diffusion, (k, noise, noisy_action, eps) = algorithm.diffusion_loss(moved, batch, diffusion_key, args)
        if "prediction" in flags:
            eps = (noisy_action - jnp.asarray(SIGNAL)[k, None] * eps) / jnp.asarray(SIGMA)[k, None]
        if "likelihood" in flags:
            energy = jnp.asarray(step_weight / step_weight.mean())[k] * jnp.mean((noise - eps) ** 2, axis=1)
        else:
            distance = batch.action - jnp.clip(approximate_action(k, noisy_action, eps), -1, 1)
            energy = jnp.sum(distance**2, axis=1) / 2
        guidance = jnp.mean(weight * energy)
        return diffusion + 0.7 * guidance, (diffusion, guidance, weight.mean())

    (expected, terms), expected_gradient = value_and_grad(written)(policy)
    loss_and_gradients = value_and_grad(algorithm.policy_loss, (0, 1))
    (loss, metrics), (gradient, guide_gradient) = loss_and_gradients(policy, guide, batch, key, args)
    close((loss, metrics["policy_loss"]), (expected, expected))
    close([metrics[name] for name in ("diffusion_loss", "guidance_loss", "weight")], terms)
    close(gradient, expected_gradient)
    equal(guide_gradient, jax.tree.map(jnp.zeros_like, guide))


# ------------------------------------------------------------------------------------- Eq. 14: the critics' target
TARGETS = [(edp_td3bc, False), (edp_td3bc, True), (td3bc, False), (crr, True)]


@pytest.mark.parametrize(("algorithm", "best_of_10"), TARGETS, ids=["edp", "edp, best of 10", "tanh", "gaussian, best"])
def test_eq_14_critic_target(algorithm, best_of_10):
    """r + gamma (1 - terminal) min_i max_j Q'_i(s', a'_j): one a', or the best of 10 for each critic by itself."""
    args = make_args(algorithm, max_q_backup=best_of_10, gamma=0.9)
    policy, settings = {
        edp_td3bc: (make_policy, (args,)),
        td3bc: (make_tanh_policy, (0.2, 0.5)),  # TD3's target noise
        crr: (make_gaussian_policy, ()),
    }[algorithm]
    batch, key, policy, critics, count = make_batch(), jax.random.key(5), policy(), make_critics(), 9 * best_of_10 + 1
    result = np.asarray(jax.jit(algorithm.critic_target)(critics, policy, batch, key, args))
    next_obs = jnp.asarray(np.repeat(np.asarray(batch.next_obs), count, axis=0))  # s_0, s_0, ..., s_1, ...
    next_action = jax.jit(lambda policy: algorithm.sample_action(policy, next_obs, key, *settings))(policy)
    q = q_values(critics, next_obs, next_action)
    assert 0 < np.argmin(q, axis=0).mean() < 1  # each critic is the smaller one somewhere
    backup = [min(max(q[i][n * count : (n + 1) * count]) for i in range(2)) for n in range(BATCH)]
    close(result, batch.reward + 0.9 * (1 - batch.terminal) * np.array(backup))
    equal(result == np.asarray(batch.reward), np.asarray(batch.terminal) == 1)  # only terminals cut the bootstrap


# ------------------------------------------------------------------------------------ Eq. 20 to 22: weights and values
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@over(edp_crr, crr)
def test_eq_20_and_21_crr_weight(algorithm, temperature):
    """min(20, exp(A / temperature)), A = min_i Q_i(s, a) - mean_n min_i Q_i(s, a_n), 10 a_n ~ N(a-hat^0, I) or pi."""
    batch, key, critics = make_batch(), jax.random.key(12), make_critics()
    if algorithm is edp_crr:
        guide = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (BATCH, ACT_DIM)))
        actions = np.asarray(guide) + np.asarray(jax.random.normal(key, (10, BATCH, ACT_DIM)))
    else:
        guide = make_gaussian_policy()
        actions = [crr.sample_action(guide, batch.obs, key) for key in jax.random.split(key, 10)]
    args = make_args(algorithm, temperature=temperature)
    weight = jax.jit(algorithm.advantage_weight)(critics, guide, batch, key, args)
    smaller_q = lambda action: q_values(critics, batch.obs, action).min(axis=0)
    advantage = smaller_q(batch.action) - np.mean([smaller_q(action) for action in actions], axis=0)
    np.testing.assert_allclose(weight, np.minimum(20, np.exp(advantage / temperature)), rtol=1e-9)
    assert (np.max(weight) == 20) == (temperature == 0.1)


@pytest.mark.parametrize(("expectile", "temperature"), [(0.5, 1.0), (0.9, 0.1)])
def test_eq_20_and_22_iql_value_weight_and_target(expectile, temperature):
    """mean |expectile - 1(u < 0)| u^2, u = min_i Q'_i(s, a) - V(s) (D13); min(100, exp(u / temp.)); r + gamma V(s')."""
    batch, critics, value = make_batch(), make_critics(), make_value()
    args = make_args(edp_iql, expectile=expectile, temperature=temperature)
    v, next_v = (forward(value, obs) for obs in (batch.obs, batch.next_obs))
    u = q_values(critics, batch.obs, batch.action).min(axis=0) - v
    assert 0.2 < np.mean(u < 0) < 0.8
    loss, metrics = jax.jit(edp_iql.value_loss)(value, critics, batch, args)
    close((loss, metrics["value_loss"]), 2 * (np.mean(np.abs(expectile - (u < 0)) * u**2),))
    close(metrics["v"], v.mean())
    weight = jax.jit(edp_iql.advantage_weight)(value, critics, batch, args)
    np.testing.assert_allclose(weight, np.minimum(100, np.exp(u / temperature)), rtol=1e-9)
    assert (np.max(weight) == 100) == (temperature == 0.1)
    target = np.asarray(jax.jit(edp_iql.critic_target)(value, batch, args))
    close(target, batch.reward + 0.99 * (1 - batch.terminal) * next_v)
    equal(target == np.asarray(batch.reward), np.asarray(batch.terminal) == 1)


# ------------------------------------------------------------ the feed-forward counterparts: TD3+BC, CRR, IQL, BC
def test_feed_forward_policies_sample_inside_the_action_box():
    """clip(pi(s) + clip(e, -limit, limit), -1, 1) with e ~ N(0, std^2 I); clip(mean + scale std e, -1, 1)."""
    obs, key = make_batch().obs, jax.random.key(4)
    noise = np.asarray(jax.random.normal(key, (BATCH, ACT_DIM)))
    mean = forward(make_tanh_policy(), obs)
    assert 0 < np.mean(np.abs(mean + np.clip(0.3 * noise, -0.2, 0.2)) > 1) < 0.5
    for std, limit in ((0.3, 0.2), (0.3, np.inf), (0.0, np.inf)):
        expected = np.clip(mean + np.clip(std * noise, -limit, limit), -1, 1)
        close(td3bc.sample_action(make_tanh_policy(), obs, key, std, limit), expected)
    mean = forward(make_gaussian_policy(), obs)
    for scale in (1.0, 0.5, 0.0):
        expected = np.clip(mean + scale * np.exp([-1.2, 0.3]) * noise, -1, 1)
        close(crr.sample_action(make_gaussian_policy(), obs, key, scale), expected)


@pytest.mark.parametrize("shift", [40.0, -40.0])
def test_feed_forward_td3bc_policy_loss(shift):
    """mean (pi(s) - a)^2 - alpha mean Q_1 / mean |Q_1|: Q_2 has the other sign, the normaliser no gradient."""
    batch, policy, critics = make_batch(), make_tanh_policy(), make_critics(shift, -shift)

    def written(policy, scale):
        action = jax.vmap(policy)(batch.obs)
        imitation, q = jnp.mean((action - batch.action) ** 2), jax.vmap(one(critics, 0))(batch.obs, action)
        return imitation - 1.7 * q.mean() / scale, (imitation, q)

    (loss, metrics), gradient = value_and_grad(td3bc.policy_loss)(policy, critics, batch, make_args(td3bc, alpha=1.7))
    written = value_and_grad(written)
    scale = np.abs(written(policy, np.float64(1))[0][1][1]).mean()
    (expected, (imitation, q)), expected_gradient = written(policy, scale)
    results = loss, metrics["policy_loss"], metrics["bc_loss"], metrics["guidance_loss"]
    close(results, (expected, expected, imitation, -np.sign(shift)))
    close(gradient, expected_gradient)
    assert np.all(np.sign(q) == np.sign(shift))  # a gradient through mean |Q_1| would leave that of imitation alone


@over(crr, iql, bc)
def test_feed_forward_likelihoods(algorithm):
    """-mean f log pi(a | s), f without gradient, although CRR's depends on the policy; f = 1 for BC."""
    batch, key, policy, args = make_batch(), jax.random.key(13), make_gaussian_policy(), make_args(algorithm)
    inputs, weight = (batch, key, args), np.ones(BATCH)
    if algorithm is crr:
        inputs = make_critics(), *inputs
        weight = np.asarray(jax.jit(crr.advantage_weight)(make_critics(), policy, batch, key, args))
    elif algorithm is iql:
        weight = np.random.default_rng(3).uniform(0, 3, BATCH)
        inputs = jnp.asarray(weight), batch
    std = np.exp(np.asarray(policy.log_std))
    z = (np.asarray(batch.action) - forward(policy, batch.obs)) / std
    log_likelihood = -np.sum(z**2 / 2 + np.log(std * np.sqrt(2 * np.pi)), axis=1)
    written = lambda policy: -jnp.mean(jnp.asarray(weight) * jax.vmap(policy.log_prob)(batch.obs, batch.action))
    (loss, metrics), gradient = value_and_grad(algorithm.policy_loss)(policy, *inputs)
    close((loss, metrics["policy_loss"]), 2 * (-np.mean(weight * log_likelihood),))
    close(gradient, jax.jit(jax.grad(written))(policy))
    if algorithm is not bc:
        close((metrics["log_likelihood"], metrics["weight"]), (log_likelihood.mean(), weight.mean()))
    else:  # or a diffusion policy's, by Eq. 5
        loss, _ = jax.jit(bc.policy_loss)(make_policy(), batch, key, make_args(bc, policy="diffusion"))
        equal(loss, jax.jit(edp_td3bc.diffusion_loss)(make_policy(), batch, key, make_args(edp_td3bc))[0])
