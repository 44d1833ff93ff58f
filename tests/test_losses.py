"""The losses against float64 NumPy; networks are evaluated by JAX, random numbers drawn alike.

A function that algorithm files share (tests/test_siblings.py compares their text) is tested in the first of them.
"""

import dataclasses
from collections import Counter
from functools import lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common.data import Dataset

from algorithms import bc, crr, dql_baseline, edp_crr, edp_iql, edp_td3bc, iql, td3bc
from common.diffusion import corrupt, make_schedule
from common.networks import GaussianPolicy, NoisePredictor, TanhPolicy, Value, init_twin_critics

pytestmark = pytest.mark.usefixtures("quick_compilation")

OBS_DIM, ACT_DIM, BATCH, K = 3, 2, 24, 50
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, K) * 1000 / K)


def make_args(algorithm, **changes):
    """Small and quick arguments, of those that the algorithm has."""
    common = {"num_diffusion_steps": K, "num_solver_calls": 4, "eta": 1.0, "learning_rate": 3e-4, "expectile": 0.8}
    names = {field.name for field in dataclasses.fields(algorithm.Args)}
    return algorithm.Args(**{name: value for name, value in common.items() if name in names} | changes)


def make_batch(size=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    arrays = Dataset(
        obs=rng.normal(size=(size, OBS_DIM)),
        action=rng.uniform(-0.8, 0.8, (size, ACT_DIM)),
        reward=rng.normal(size=size),
        next_obs=rng.normal(size=(size, OBS_DIM)),
        terminal=rng.integers(0, 2, size).astype(float),
    )
    return jax.tree.map(jnp.float32, arrays)


@lru_cache
def make_policy():
    """Fitted to the batch for a moment: the samples of a policy of random weights are all clipped to +-1."""
    args, batch = make_args(edp_td3bc), make_batch(128)
    optimizer = optax.adam(3e-3)

    def step(carry, key):
        policy, opt_state = carry
        grads, _ = jax.grad(edp_td3bc.diffusion_loss, has_aux=True)(policy, batch, key, args)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(policy, updates), opt_state), None

    @jax.jit
    def fit(key):
        policy = NoisePredictor(OBS_DIM, ACT_DIM, key)
        return jax.lax.scan(step, (policy, optimizer.init(policy)), jax.random.split(key, 100))[0][0]

    return fit(jax.random.key(0))


def make_tanh_policy():
    """Some of its actions are near enough to +-1 for their noise to be clipped."""
    return scaled_policy(TanhPolicy)


def make_gaussian_policy():
    return eqx.tree_at(lambda policy: policy.log_std, scaled_policy(GaussianPolicy), jnp.array([-1.2, 0.3]))


@lru_cache
def scaled_policy(kind):
    init = jax.jit(lambda key: kind(OBS_DIM, ACT_DIM, key))
    return with_last_layer(init(jax.random.key(17)), weight=lambda weight: 30 * weight)


@lru_cache
def make_critics(offsets=(0.1, -0.1)):
    """Scaled and shifted, so that which of the two was used shows in any number."""
    shift = np.array(offsets, np.float32)[:, None]
    return with_last_layer(init_critics(), lambda weight: 20 * weight, lambda bias: bias + shift)


@lru_cache
def init_critics():
    return jax.jit(lambda key: init_twin_critics(OBS_DIM, ACT_DIM, key))(jax.random.key(1))


def with_last_layer(module, weight=lambda weight: weight, bias=lambda bias: bias):
    """`module` with functions applied to the weight and the bias of its last layer."""
    module = eqx.tree_at(lambda m: m.mlp.layers[-1].weight, module, replace_fn=weight)
    return eqx.tree_at(lambda m: m.mlp.layers[-1].bias, module, replace_fn=bias)


def float64(array):
    return np.asarray(array, np.float64)


@jax.jit
def forward(module, *inputs):
    return jax.vmap(module)(*inputs)


def predict(policy, obs, action, k):
    k = jnp.asarray(np.broadcast_to(k, len(obs)))
    return float64(forward(policy, obs, jnp.asarray(action, obs.dtype), k))


def q_values(critics, obs, action):
    """[Q_1, Q_2], each by its own network."""
    ones = [jax.tree.map(lambda leaf, i=i: leaf[i], critics) for i in range(2)]
    return np.array([float64(forward(one, obs, jnp.asarray(action, obs.dtype))) for one in ones])


def numpy_approximate_action(corruption):
    """Eq. 9 before the clip."""
    level = ALPHA_BAR[np.asarray(corruption.k)][:, None]
    return (float64(corruption.noisy_action) - np.sqrt(1 - level) * float64(corruption.predicted_noise)) / np.sqrt(
        level
    )


# -------------------------------------------------------------------------------------------- diffusion policy
def test_diffusion_loss_is_eq_5():
    """mean (noise - eps_theta(a^k, k; s))^2 over batch and action dimensions, a^k by Eq. 8."""
    batch, policy = make_batch(), make_policy()
    loss, corruption = jax.jit(edp_td3bc.diffusion_loss)(policy, batch, jax.random.key(1), make_args(edp_td3bc))
    k, noise = np.asarray(corruption.k), float64(corruption.noise)
    level = ALPHA_BAR[k][:, None]
    noisy_action = np.sqrt(level) * float64(batch.action) + np.sqrt(1 - level) * noise
    predicted = predict(policy, batch.obs, noisy_action, k)
    np.testing.assert_allclose(corruption.noisy_action, noisy_action, atol=1e-6)
    np.testing.assert_allclose(corruption.predicted_noise, predicted, atol=2e-5)
    np.testing.assert_allclose(loss, np.mean((noise - predicted) ** 2), rtol=1e-4)


def test_k_is_uniform_from_0_to_the_last_index_and_noise_is_standard_normal():
    """Every transition has its own k in {0..K-1} and its own noise."""
    size = 5000
    args, batch = make_args(edp_td3bc), make_batch(size)
    _, corruption = jax.jit(edp_td3bc.diffusion_loss)(make_policy(), batch, jax.random.key(2), args)
    counts = np.bincount(corruption.k, minlength=K)
    assert len(counts) == K
    chi_square = np.sum((counts - size / K) ** 2) / (size / K)
    assert chi_square < K - 1 + 5 * np.sqrt(2 * (K - 1))
    noise = np.asarray(corruption.noise)
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 5 * np.sqrt(2 / noise.size)
    assert abs(np.corrcoef(corruption.k, noise[:, 0])[0, 1]) < 5 / np.sqrt(size)


@pytest.mark.parametrize(("name", "num_steps"), [("linear", 1000), ("linear", K), ("vp", 5), ("cosine", 100)])
def test_approximate_action_undoes_the_corruption_at_every_k(name, num_steps):
    """Eq. 9 inverts Eq. 8 given the true noise, up to float32 rounding, which 1 / sqrt(alpha_bar^k) magnifies."""
    rng = np.random.default_rng(0)
    k, schedule = jnp.arange(num_steps), make_schedule(name, num_steps)
    action = jnp.float32(rng.uniform(-0.9, 0.9, (num_steps, ACT_DIM)))
    noise = jnp.float32(rng.normal(size=(num_steps, ACT_DIM)))
    corruption = edp_td3bc.Corruption(k, noise, corrupt(schedule, action, k, noise), noise)
    args = make_args(edp_td3bc, num_diffusion_steps=num_steps, beta_schedule=name)
    error = np.abs(edp_td3bc.approximate_action(corruption, args) - action).max(axis=1)
    assert np.all(error <= 1e-6 / np.sqrt(schedule.alpha_bar))


def test_approximate_action_is_eq_9_clipped_with_no_gradient_where_the_clip_is_active():
    """clip((a^k - sqrt(1 - alpha_bar^k) eps) / sqrt(alpha_bar^k), -1, 1); its slope in eps is 0 outside."""
    args = make_args(edp_td3bc)
    _, corruption = jax.jit(edp_td3bc.diffusion_loss)(make_policy(), make_batch(), jax.random.key(3), args)
    raw = numpy_approximate_action(corruption)
    outside = np.abs(raw) > 1
    assert 0.1 < outside.mean() < 0.9
    np.testing.assert_allclose(edp_td3bc.approximate_action(corruption, args), np.clip(raw, -1, 1), atol=1e-5)

    def total(predicted_noise):
        return edp_td3bc.approximate_action(corruption._replace(predicted_noise=predicted_noise), args).sum()

    slope = -np.sqrt(1 / ALPHA_BAR - 1)[np.asarray(corruption.k)][:, None]
    gradient = jax.grad(total)(corruption.predicted_noise)
    np.testing.assert_allclose(gradient, np.where(outside, 0, slope), rtol=1e-5)


def numpy_ddim(policy, obs, x, temperature):
    """7 calls over K = 50 meet every 7th index exactly."""
    for k, next_k in zip(range(K - 1, 0, -7), range(K - 8, -1, -7)):
        noise = temperature * predict(policy, obs, x, k)
        x0 = np.clip((x - np.sqrt(1 - ALPHA_BAR[k]) * noise) / np.sqrt(ALPHA_BAR[k]), -1, 1)
        noise = (x - np.sqrt(ALPHA_BAR[k]) * x0) / np.sqrt(1 - ALPHA_BAR[k])
        x = np.sqrt(ALPHA_BAR[next_k]) * x0 + np.sqrt(1 - ALPHA_BAR[next_k]) * noise
    return np.clip(x, -1, 1)


def numpy_ddpm(policy, obs, x, temperature, key):
    """The chain of K steps, with the random numbers of ddpm_sample."""
    for k in reversed(range(K)):
        level, previous = ALPHA_BAR[k], ALPHA_BAR[k - 1] if k else 1.0
        alpha = level / previous
        noise = temperature * predict(policy, obs, x, k)
        x0 = np.clip((x - np.sqrt(1 - level) * noise) / np.sqrt(level), -1, 1)
        mean = np.sqrt(previous) * (1 - alpha) / (1 - level) * x0 + np.sqrt(alpha) * (1 - previous) / (1 - level) * x
        fresh = np.asarray(jax.random.normal(jax.random.fold_in(key, k), x.shape))
        x = mean + np.sqrt((1 - alpha) * (1 - previous) / (1 - level)) * fresh
    return x


@pytest.mark.parametrize(
    ("algorithm", "flags"),
    [
        (edp_td3bc, {"sampler": "dpm", "solver_order": 1, "num_solver_calls": 7}),
        (edp_td3bc, {"sampler": "ddpm"}),
        (dql_baseline, {}),
    ],
    ids=["dpm", "ddpm", "dql"],
)
def test_sample_action_denoises_scaled_noise_with_the_scaled_prediction(algorithm, flags):
    """Eq. 3 by DDIM or DDPM; C.4: the temperature scales the predicted noise, init_noise_scale scales a^K."""
    policy, obs, key = make_policy(), make_batch().obs, jax.random.key(4)
    args = make_args(algorithm, **flags)
    result = jax.jit(lambda policy: algorithm.sample_action(policy, obs, key, args, 0.9, 0.7))(policy)
    init_key, chain_key = jax.random.split(key)
    x = 0.7 * float64(jax.random.normal(init_key, (BATCH, ACT_DIM)))
    if flags.get("sampler") == "dpm":
        expected = numpy_ddim(policy, obs, x, 0.9)
    else:
        expected = numpy_ddpm(policy, obs, x, 0.9, chain_key)
    assert np.abs(result).max() <= 1
    assert np.mean(np.abs(expected) < 1) > 0.3  # the clip does not decide it all
    np.testing.assert_allclose(result, expected, atol=2e-4)


# ------------------------------------------------------------------------------------------ feed-forward policy
def test_td3bc_sample_action_adds_clipped_noise_inside_the_action_box():
    """clip(pi(s) + clip(e, -limit, limit), -1, 1), e ~ N(0, std^2 I); no noise is pi(s) itself."""
    policy, obs, key = make_tanh_policy(), make_batch().obs, jax.random.key(4)
    mean, noise = float64(forward(policy, obs)), 0.3 * float64(jax.random.normal(key, (BATCH, ACT_DIM)))
    clipped = np.clip(noise, -0.2, 0.2)
    assert 0.2 < np.mean(clipped != noise) < 0.8
    assert 0 < np.mean(np.abs(mean + clipped) > 1) < 0.5
    np.testing.assert_allclose(
        td3bc.sample_action(policy, obs, key, 0.3, 0.2), np.clip(mean + clipped, -1, 1), atol=1e-5
    )
    np.testing.assert_allclose(td3bc.sample_action(policy, obs, key, 0.3), np.clip(mean + noise, -1, 1), atol=1e-5)
    np.testing.assert_allclose(td3bc.sample_action(policy, obs, key, 0.0), mean, atol=1e-5)


def test_gaussian_samples_have_its_scaled_deviation_and_are_clipped():
    """clip(mean + scale std e, -1, 1), e ~ N(0, I); with scale 0 the mean."""
    policy, obs, key = make_gaussian_policy(), make_batch().obs, jax.random.key(4)
    mean, noise = float64(forward(policy, obs)), float64(jax.random.normal(key, (BATCH, ACT_DIM)))
    std = np.exp([-1.2, 0.3])
    for flags, scale in (((), 1.0), ((0.5,), 0.5), ((0.0,), 0.0)):
        expected = np.clip(mean + scale * std * noise, -1, 1)
        np.testing.assert_allclose(crr.sample_action(policy, obs, key, *flags), expected, atol=1e-5)


# ------------------------------------------------------------------------------------------- policy evaluation
# The policy of each kind, and what its sample_action is given beside it, the observations and a key.
TARGET_POLICIES = {
    edp_td3bc: (make_policy, lambda args: (args,)),
    td3bc: (make_tanh_policy, lambda args: (args.policy_noise, args.noise_clip)),
    crr: (make_gaussian_policy, lambda args: ()),
}


@pytest.mark.parametrize(
    ("algorithm", "max_q_backup"),
    [(edp_td3bc, False), (edp_td3bc, True), (td3bc, False), (crr, True)],
    ids=["edp", "edp, best of 10", "tanh", "gaussian, best of 10"],
)
def test_critic_target_is_eq_14(algorithm, max_q_backup):
    """r + gamma (1 - terminal) min_i max_j Q'_i(s', a'_j): one a', or the best of 10 for each critic by itself."""
    args = make_args(algorithm, max_q_backup=max_q_backup, gamma=0.9)
    make_target_policy, settings = TARGET_POLICIES[algorithm]
    batch, key, policy, critics = make_batch(), jax.random.key(5), make_target_policy(), make_critics()
    result = jax.jit(algorithm.critic_target)(critics, policy, batch, key, args)
    count = 10 if max_q_backup else 1
    next_obs = jnp.asarray(np.repeat(np.asarray(batch.next_obs), count, axis=0))  # s_0, s_0, ..., s_1, ...
    next_action = jax.jit(algorithm.sample_action)(policy, next_obs, key, *settings(args))
    q = q_values(critics, next_obs, next_action)
    backup = [min(max(q[i][n * count : (n + 1) * count]) for i in range(2)) for n in range(BATCH)]
    expected = float64(batch.reward) + 0.9 * (1 - float64(batch.terminal)) * np.array(backup)
    np.testing.assert_allclose(result, expected, atol=1e-4)
    assert 0 < np.argmin(q, axis=0).mean() < 1  # each critic is the smaller one somewhere


@pytest.mark.parametrize("algorithm", [edp_td3bc, edp_iql], ids=["sampled action", "value"])
def test_only_true_terminals_cut_the_bootstrap(algorithm):
    """target = r exactly where terminal is 1, and nowhere else."""
    batch, args = make_batch(), make_args(algorithm)
    if algorithm is edp_iql:
        target = algorithm.critic_target(make_value(), batch, args)
    else:
        target = jax.jit(algorithm.critic_target)(make_critics(), make_policy(), batch, jax.random.key(6), args)
    np.testing.assert_array_equal(np.asarray(target) == np.asarray(batch.reward), np.asarray(batch.terminal) == 1)


def test_critic_loss_is_eq_6_summed_over_both_critics_without_gradient_to_the_target():
    """sum_i mean (Q_i(s, a) - target)^2."""
    batch, critics = make_batch(), make_critics()
    target = jnp.float32(np.random.default_rng(1).normal(size=BATCH))
    loss = jax.jit(jax.value_and_grad(edp_td3bc.critic_loss, argnums=(0, 1), has_aux=True))
    (loss, metrics), gradients = loss(critics, target, batch)
    q = q_values(critics, batch.obs, batch.action)
    error = q - float64(target)[None]
    np.testing.assert_allclose(loss, np.mean(error[0] ** 2) + np.mean(error[1] ** 2), rtol=1e-5)
    np.testing.assert_array_equal(metrics["critic_loss"], loss)
    np.testing.assert_allclose(metrics["q"], q.mean(), atol=1e-5)
    np.testing.assert_array_equal(gradients[1], 0)
    # d loss / d (last bias of Q_i) = 2 mean (Q_i - target): each critic has its own error, undivided by two
    np.testing.assert_allclose(gradients[0].mlp.layers[-1].bias[:, 0], 2 * error.mean(axis=1), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------- policy improvement: TD3+BC
# The guided action is the approximated one (Eq. 9), or comes from the sampler.
GUIDED = [(edp_td3bc, {}), (edp_td3bc, {"action_approx": False, "num_solver_calls": 3}), (dql_baseline, {})]
guided = pytest.mark.parametrize(("algorithm", "flags"), GUIDED, ids=["edp", "edp without AP", "dql"])


def diffusion_and_guided_action(algorithm, args, policy, batch, key):
    """(diffusion loss, action that climbs Q, before the clip of Eq. 9) for a key of policy_loss."""
    diffusion_key, sample_key, _ = jax.random.split(key, 3)
    diffusion, corruption = jax.jit(algorithm.diffusion_loss)(policy, batch, diffusion_key, args)
    if algorithm is edp_td3bc and args.action_approx:
        return float(diffusion), numpy_approximate_action(corruption)
    return float(diffusion), float64(jax.jit(algorithm.sample_action)(policy, batch.obs, sample_key, args))


@guided
def test_td3bc_policy_loss_is_eq_10_and_16_scaled_by_eta(algorithm, flags):
    """L_diff - eta mean Q_i(s, a) / mean |Q_i(s, a)| for one of the two critics."""
    batch, key, policy, critics = make_batch(), jax.random.key(7), make_policy(), make_critics()
    args = make_args(algorithm, eta=2.5, **flags)
    diffusion, action = diffusion_and_guided_action(algorithm, args, policy, batch, key)
    q = q_values(critics, batch.obs, np.clip(action, -1, 1))
    loss, metrics = jax.jit(algorithm.policy_loss)(policy, critics, batch, key, args)
    candidates = -q.mean(axis=1) / np.abs(q).mean(axis=1)
    assert np.sum(np.abs(float(metrics["guidance_loss"]) - candidates) < 1e-4) == 1
    np.testing.assert_allclose(metrics["diffusion_loss"], diffusion, rtol=1e-4)
    np.testing.assert_allclose(loss, diffusion + 2.5 * float(metrics["guidance_loss"]), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(metrics["policy_loss"], loss)
    np.testing.assert_allclose(metrics["clipped"], np.mean(np.abs(action) >= 1), rtol=1e-6)


@pytest.mark.parametrize("algorithm", [edp_td3bc, dql_baseline], ids=["edp", "dql"])
def test_guidance_uses_either_critic_for_the_whole_batch_half_of_the_time(algorithm):
    """Appendix A.1: one critic is drawn for each update, not for each transition, and not the mean of both."""
    batch, critics = make_batch(4), make_critics((500.0, -500.0))  # the sign tells which one was used
    args, keys = make_args(algorithm, num_diffusion_steps=21), jax.random.split(jax.random.key(9), 100)
    losses = jax.jit(jax.vmap(algorithm.policy_loss, (None, None, None, 0, None)))
    _, metrics = losses(make_policy(), critics, batch, keys, args)
    guidance = np.asarray(metrics["guidance_loss"])
    np.testing.assert_allclose(np.abs(guidance), 1, rtol=1e-5)  # a mixture within the batch would lie between
    assert abs(Counter(np.sign(guidance))[-1] - 50) < 4 * np.sqrt(100 / 4)


@guided
def test_td3bc_gradient_goes_through_the_action_but_not_through_the_normaliser(algorithm, flags):
    """Central differences of L_diff - eta mean Q_i(s, a) / c, c = mean |Q_i| at the point itself, in float64.

    Every Q is positive here: a gradient through the normaliser would cancel the guidance's altogether.
    """
    key, eta, h = jax.random.key(10), 20.0, 1e-5
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        policy, critics, batch = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64), (make_policy(), make_critics((40.0, 60.0)), make_batch())
        )
        args = make_args(algorithm, eta=eta, **flags)
        gradient, _ = jax.jit(jax.grad(algorithm.policy_loss, has_aux=True))(policy, critics, batch, key, args)
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / np.sqrt(leaf.size), policy)
        slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))

        def terms(distance):
            moved = jax.tree.map(lambda leaf, d: leaf + distance * d, policy, direction)
            diffusion, action = diffusion_and_guided_action(algorithm, args, moved, batch, key)
            return diffusion, q_values(critics, batch.obs, np.clip(action, -1, 1))

        (_, q), (diffusion_after, q_after), (diffusion_before, q_before) = map(terms, (0, h, -h))
    assert q.min() > 0
    diffusion_slope = (diffusion_after - diffusion_before) / (2 * h)
    guidance_slopes = -eta * (q_after - q_before).mean(axis=1) / q.mean(axis=1) / (2 * h)
    assert np.all(np.abs(guidance_slopes) > 1e-3)
    assert np.sum(np.isclose(slope - diffusion_slope, guidance_slopes, rtol=1e-3)) == 1  # of one critic


def test_a_clipped_action_gives_the_guidance_no_gradient():
    """With every a-hat^0 outside [-1, 1] the policy's gradient is that of L_diff alone: no straight-through."""
    batch, key, critics = make_batch(), jax.random.key(11), make_critics()
    policy = with_last_layer(make_policy(), bias=lambda bias: bias + 1e4)
    gradient = jax.jit(jax.grad(edp_td3bc.policy_loss, has_aux=True))
    with_guidance, metrics = gradient(policy, critics, batch, key, make_args(edp_td3bc, eta=1.0))
    without_guidance, _ = gradient(policy, critics, batch, key, make_args(edp_td3bc, eta=0.0))
    assert metrics["clipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, with_guidance, without_guidance)


@pytest.mark.parametrize("offset", [500.0, -500.0])
def test_feed_forward_td3bc_policy_loss_uses_the_first_critic(offset):
    """mean (pi(s) - a)^2 - lambda mean Q_1(s, pi(s)), lambda = alpha / mean |Q_1|: of other sign than Q_2 here."""
    batch, policy, critics = make_batch(), make_tanh_policy(), make_critics((offset, -offset))
    loss, metrics = jax.jit(td3bc.policy_loss)(policy, critics, batch, make_args(td3bc, alpha=1.7))
    action = float64(forward(policy, batch.obs))
    q = q_values(critics, batch.obs, action)[0]
    imitation = np.mean((action - float64(batch.action)) ** 2)
    np.testing.assert_allclose(metrics["bc_loss"], imitation, rtol=1e-5)
    np.testing.assert_allclose(loss, imitation - 1.7 / np.abs(q).mean() * q.mean(), rtol=1e-5)
    np.testing.assert_array_equal(metrics["policy_loss"], loss)
    np.testing.assert_allclose(metrics["guidance_loss"], -np.sign(offset), rtol=1e-5)


def test_feed_forward_td3bc_gradient_does_not_go_through_the_normaliser():
    """Every Q is positive: a gradient through mean |Q_1| would cancel that of mean Q_1, and only imitation be left."""
    batch, policy, critics = make_batch(), make_tanh_policy(), make_critics((40.0, 60.0))
    q = q_values(critics, batch.obs, forward(policy, batch.obs))[0]
    assert q.min() > 0

    def loss(policy):
        action = jax.vmap(policy)(batch.obs)
        q_1 = jax.vmap(jax.tree.map(lambda leaf: leaf[0], critics))(batch.obs, action)
        return jnp.mean((action - batch.action) ** 2) - 2.5 * q_1.mean() / float(q.mean())

    expected = jax.jit(jax.grad(loss))(policy)
    result, _ = jax.jit(jax.grad(td3bc.policy_loss, has_aux=True))(policy, critics, batch, make_args(td3bc))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), result, expected)


# ------------------------------------------------------------------------------------ policy improvement: CRR
def numpy_corruption(policy, batch, key, args):
    """(diffusion loss, corruption, clipped a-hat^0)."""
    diffusion, corruption = jax.jit(edp_td3bc.diffusion_loss)(policy, batch, key, make_args(edp_td3bc))
    return float(diffusion), corruption, np.clip(numpy_approximate_action(corruption), -1, 1)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_crr_weight_is_eq_20_and_21(temperature):
    """f = min(20, exp(A / temperature)), A = min_i Q_i(s, a) - mean_n min_i Q_i(s, a_n), 10 a_n ~ N(a-hat^0, I)."""
    batch, key, critics = make_batch(), jax.random.key(12), make_critics()
    approx_action = jnp.float32(np.random.default_rng(2).uniform(-1, 1, (BATCH, ACT_DIM)))
    args = make_args(edp_crr, temperature=temperature)
    weight = np.asarray(jax.jit(edp_crr.advantage_weight)(critics, approx_action, batch, key, args))
    noise = float64(jax.random.normal(key, (10, BATCH, ACT_DIM)))
    q = q_values(critics, batch.obs, batch.action).min(axis=0)
    samples = [q_values(critics, batch.obs, float64(approx_action) + noise[n]).min(axis=0) for n in range(10)]
    advantage = q - np.mean(samples, axis=0)
    np.testing.assert_allclose(weight, np.minimum(20, np.exp(advantage / temperature)), rtol=1e-3)
    assert (weight.max() == 20) == (temperature == 0.1)


@pytest.mark.parametrize("likelihood", ["mse", "elbo"])
def test_crr_policy_loss_is_eq_13_or_eq_12_weighted(likelihood):
    """L_diff + eta mean f / 2 |a - a-hat^0|^2, or with w_k mean (noise - eps_theta)^2, w_k of mean 1 over k."""
    batch, key, policy, critics = make_batch(), jax.random.key(13), make_policy(), make_critics()
    args = make_args(edp_crr, eta=0.7, likelihood=likelihood)
    diffusion_key, advantage_key = jax.random.split(key)
    diffusion, corruption, action = numpy_corruption(policy, batch, diffusion_key, args)
    weight = float64(jax.jit(edp_crr.advantage_weight)(critics, jnp.float32(action), batch, advantage_key, args))
    if likelihood == "mse":
        energy = np.sum((float64(batch.action) - action) ** 2, axis=1) / 2
    else:
        alpha = np.append(ALPHA_BAR[0], ALPHA_BAR[1:] / ALPHA_BAR[:-1])
        step_weight = (1 - alpha) / (2 * alpha * (1 - ALPHA_BAR))
        error = float64(corruption.noise) - float64(corruption.predicted_noise)
        energy = (step_weight / step_weight.mean())[np.asarray(corruption.k)] * np.mean(error**2, axis=1)
    loss, metrics = jax.jit(edp_crr.policy_loss)(policy, critics, batch, key, args)
    np.testing.assert_allclose(metrics["guidance_loss"], np.mean(weight * energy), rtol=1e-3)
    np.testing.assert_allclose(loss, diffusion + 0.7 * np.mean(weight * energy), rtol=1e-3)
    np.testing.assert_allclose(metrics["weight"], weight.mean(), rtol=1e-3)


def test_crr_weight_gives_no_gradient_although_it_depends_on_the_policy():
    """The gradient is that of L_diff + eta mean f / 2 |a - a-hat^0|^2 with the numbers f held constant."""
    batch, key, policy, critics = make_batch(), jax.random.key(16), make_policy(), make_critics()
    args = make_args(edp_crr)
    diffusion_key, advantage_key = jax.random.split(key)
    _, _, action = numpy_corruption(policy, batch, diffusion_key, args)
    weight = jax.jit(edp_crr.advantage_weight)(critics, jnp.float32(action), batch, advantage_key, args)

    def loss(policy):
        diffusion, corruption = edp_crr.diffusion_loss(policy, batch, diffusion_key, args)
        distance = batch.action - edp_crr.approximate_action(corruption, args)
        return diffusion + jnp.mean(weight * jnp.sum(distance**2, axis=1) / 2)

    expected = jax.jit(jax.grad(loss))(policy)
    result, _ = jax.jit(jax.grad(edp_crr.policy_loss, has_aux=True))(policy, critics, batch, key, args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), result, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_feed_forward_crr_weight_compares_with_samples_of_the_policy(temperature):
    """f = min(20, exp(A / temperature)), A = min_i Q_i(s, a) - mean_n min_i Q_i(s, a_n), 10 a_n ~ pi(. | s)."""
    batch, key, policy, critics = make_batch(), jax.random.key(12), make_gaussian_policy(), make_critics()
    args = make_args(crr, temperature=temperature)
    weight = np.asarray(jax.jit(crr.advantage_weight)(critics, policy, batch, key, args))
    keys = jax.random.split(key, 10)
    samples = [q_values(critics, batch.obs, crr.sample_action(policy, batch.obs, k)).min(axis=0) for k in keys]
    advantage = q_values(critics, batch.obs, batch.action).min(axis=0) - np.mean(samples, axis=0)
    np.testing.assert_allclose(weight, np.minimum(20, np.exp(advantage / temperature)), rtol=1e-3)
    assert (weight.max() == 20) == (temperature == 0.1)


def numpy_log_likelihood(policy, batch):
    """Of the actions of the data under the Gaussian."""
    std = np.exp(float64(policy.log_std))
    z = (float64(batch.action) - float64(forward(policy, batch.obs))) / std
    return -np.sum(z**2 / 2 + np.log(std * np.sqrt(2 * np.pi)), axis=1)


def weighted_log_likelihood_gradient(policy, batch, weight):
    """Of -mean weight log pi(a | s) for weights that are numbers."""
    log_prob = lambda policy: jax.vmap(policy.log_prob)(batch.obs, batch.action)
    return jax.jit(jax.grad(lambda policy: -jnp.mean(weight * log_prob(policy))))(policy)


def test_feed_forward_crr_policy_loss_is_the_weighted_likelihood_without_gradient_through_the_weight():
    """-mean f log pi(a | s), where f depends on the policy."""
    batch, key, policy, critics = make_batch(), jax.random.key(13), make_gaussian_policy(), make_critics()
    args = make_args(crr)
    weight = jax.jit(crr.advantage_weight)(critics, policy, batch, key, args)
    loss = jax.jit(jax.value_and_grad(crr.policy_loss, has_aux=True))
    (loss, metrics), gradient = loss(policy, critics, batch, key, args)
    log_likelihood = numpy_log_likelihood(policy, batch)
    np.testing.assert_allclose(loss, -np.mean(float64(weight) * log_likelihood), rtol=1e-4)
    np.testing.assert_allclose(metrics["log_likelihood"], log_likelihood.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["weight"], weight.mean(), rtol=1e-5)
    expected = weighted_log_likelihood_gradient(policy, batch, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, expected)


# ------------------------------------------------------------------------------------ policy improvement: IQL
@lru_cache
def make_value():
    return with_last_layer(
        jax.jit(lambda key: Value(OBS_DIM, key))(jax.random.key(14)), weight=lambda weight: 20 * weight
    )


def numpy_advantage(critics, value, batch):
    return q_values(critics, batch.obs, batch.action).min(axis=0) - float64(forward(value, batch.obs))


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_iql_value_loss_is_the_expectile_loss_of_eq_22(expectile):
    """mean |expectile - 1(u < 0)| u^2 with u = min_i Q'_i(s, a) - V(s)."""
    batch, critics, value = make_batch(), make_critics(), make_value()
    loss, metrics = jax.jit(edp_iql.value_loss)(value, critics, batch, make_args(edp_iql, expectile=expectile))
    advantage = numpy_advantage(critics, value, batch)
    np.testing.assert_allclose(loss, np.mean(np.abs(expectile - (advantage < 0)) * advantage**2), rtol=1e-4)
    np.testing.assert_allclose(metrics["v"], float64(forward(value, batch.obs)).mean(), atol=1e-5)
    assert 0.2 < np.mean(advantage < 0) < 0.8


def test_iql_critic_target_takes_the_value_of_the_next_state():
    """r + gamma (1 - terminal) V(s')."""
    batch, value = make_batch(), make_value()
    next_value = float64(forward(value, batch.next_obs))
    expected = float64(batch.reward) + 0.9 * (1 - float64(batch.terminal)) * next_value
    np.testing.assert_allclose(
        jax.jit(edp_iql.critic_target)(value, batch, make_args(edp_iql, gamma=0.9)), expected, atol=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_iql_weight_is_eq_20(temperature):
    """f = min(100, exp((min_i Q'_i(s, a) - V(s)) / temperature))."""
    batch, critics, value = make_batch(), make_critics(), make_value()
    weight = jax.jit(edp_iql.advantage_weight)(value, critics, batch, make_args(edp_iql, temperature=temperature))
    expected = np.minimum(100, np.exp(numpy_advantage(critics, value, batch) / temperature))
    np.testing.assert_allclose(weight, expected, rtol=1e-3)
    assert (expected.max() == 100) == (temperature == 0.1)


def test_iql_policy_loss_is_eq_13_weighted_without_gradient_through_the_weight():
    """L_diff + eta mean f / 2 |a - a-hat^0|^2."""
    batch, key, policy = make_batch(), jax.random.key(15), make_policy()
    weight = np.random.default_rng(3).uniform(0, 3, BATCH)
    args = make_args(edp_iql, eta=0.7)
    diffusion, _, action = numpy_corruption(policy, batch, key, args)
    expected = np.mean(weight * np.sum((float64(batch.action) - action) ** 2, axis=1) / 2)
    loss = jax.jit(jax.value_and_grad(edp_iql.policy_loss, argnums=1, has_aux=True))
    (loss, metrics), gradient = loss(policy, jnp.float32(weight), batch, key, args)
    np.testing.assert_allclose(metrics["guidance_loss"], expected, rtol=1e-3)
    np.testing.assert_allclose(loss, diffusion + 0.7 * expected, rtol=1e-3)
    np.testing.assert_array_equal(gradient, 0)


def test_feed_forward_iql_policy_loss_is_the_weighted_likelihood_without_gradient_through_the_weight():
    """-mean f log pi(a | s)."""
    batch, policy = make_batch(), make_gaussian_policy()
    weight = np.random.default_rng(3).uniform(0, 3, BATCH)
    loss = jax.jit(jax.value_and_grad(iql.policy_loss, argnums=(0, 1), has_aux=True))
    (loss, metrics), (gradient, weight_gradient) = loss(policy, jnp.float32(weight), batch)
    log_likelihood = numpy_log_likelihood(policy, batch)
    np.testing.assert_allclose(loss, -np.mean(weight * log_likelihood), rtol=1e-4)
    np.testing.assert_allclose(metrics["log_likelihood"], log_likelihood.mean(), rtol=1e-4)
    np.testing.assert_array_equal(weight_gradient, 0)
    expected = weighted_log_likelihood_gradient(policy, batch, jnp.float32(weight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, expected)


def test_bc_minimises_the_negative_log_likelihood_or_the_diffusion_loss():
    """-mean log pi(a | s) of the Gaussian; Eq. 5, with the same random numbers, of the diffusion policy."""
    batch, key = make_batch(), jax.random.key(18)
    loss, _ = jax.jit(bc.policy_loss)(make_gaussian_policy(), batch, key, make_args(bc))
    np.testing.assert_allclose(loss, -numpy_log_likelihood(make_gaussian_policy(), batch).mean(), rtol=1e-4)
    loss, _ = jax.jit(bc.policy_loss)(make_policy(), batch, key, make_args(bc, policy="diffusion"))
    expected, _ = jax.jit(edp_td3bc.diffusion_loss)(make_policy(), batch, key, make_args(edp_td3bc))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("algorithm", [edp_td3bc, edp_crr, edp_iql], ids=["td3bc", "crr", "iql"])
def test_one_network_call_serves_all_terms_of_the_policy_loss(algorithm, monkeypatch):
    """In an update each transition has one k, one noise and one prediction."""
    policy, args = make_policy(), make_args(algorithm)
    calls, original = [], NoisePredictor.__call__

    def counting(self, obs, noisy_action, k):
        calls.append(k)
        return original(self, obs, noisy_action, k)

    monkeypatch.setattr(NoisePredictor, "__call__", counting)
    guide = jnp.ones(BATCH) if algorithm is edp_iql else make_critics()
    jax.eval_shape(lambda policy: algorithm.policy_loss(policy, guide, make_batch(), jax.random.key(0), args), policy)
    assert len(calls) == 1
