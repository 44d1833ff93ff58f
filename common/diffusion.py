"""Denoising diffusion: noise schedules, corruption and ancestral (DDPM) sampling.

Arrays are 0-based: index k here is step k + 1 of the paper. Networks get k from 0 to K - 1, by DPM-Solver also between.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real

ScheduleName = Literal["linear", "vp", "cosine"]
Prediction = Literal["noise", "action"]
Spacing = Literal["time_uniform", "logSNR"]  # of the solver's steps
Actions = Float[Array, "batch act_dim"]


class Schedule(NamedTuple):
    """Per-step constants, each a float64 NumPy array of shape (K,)."""

    beta: np.ndarray
    alpha: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray  # alpha_bar of the step before; 1 before the first
    sqrt_alpha_bar: np.ndarray
    sqrt_one_minus_alpha_bar: np.ndarray


@lru_cache
def make_schedule(name: ScheduleName, num_steps: int) -> Schedule:
    """The forward process of `num_steps` steps.

    - "linear" (Ho et al. 2020): beta from 1e-4 to 0.02, times 1000 / K so that any K ends in noise. Needs K > 20.
    - "vp" (Diffusion-QL; Xiao et al. 2022): the variance-preserving SDE with beta from 0.1 to 10, for small K.
    - "cosine" (Nichol & Dhariwal 2021): s = 0.008, beta at most 0.999.

    Raises ValueError where the schedule does not exist.
    """
    if num_steps < 1:
        raise ValueError(f"a diffusion needs at least 1 step, not {num_steps}")
    k = np.arange(1, num_steps + 1)
    if name == "linear":
        if num_steps <= 20:
            raise ValueError(f"the 'linear' schedule needs more than 20 diffusion steps, not {num_steps}; choose 'vp'")
        beta = np.linspace(1e-4, 0.02, num_steps) * 1000 / num_steps
    elif name == "vp":
        beta_min, beta_max = 0.1, 10.0
        beta = 1 - np.exp(-beta_min / num_steps - (beta_max - beta_min) * (2 * k - 1) / (2 * num_steps**2))
    elif name == "cosine":
        level = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - level[1:] / level[:-1], 0.999)
    else:
        raise ValueError(f"unknown schedule {name!r}; choose 'linear', 'vp' or 'cosine'")
    alpha = 1 - beta
    alpha_bar = np.cumprod(alpha)
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    return Schedule(beta, alpha, alpha_bar, alpha_bar_prev, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))


def corrupt(schedule: Schedule, action: Actions, k: Int[Array, " batch"], noise: Actions) -> Actions:
    """a^k = sqrt(alpha_bar^k) a^0 + sqrt(1 - alpha_bar^k) noise (EDP Eq. 8)."""
    signal = jnp.asarray(schedule.sqrt_alpha_bar)[k, None]
    sigma = jnp.asarray(schedule.sqrt_one_minus_alpha_bar)[k, None]
    return signal * action + sigma * noise


def implied_noise(
    kind: Prediction, schedule: Schedule, noisy_action: Actions, k: Real[Array, "..."] | float, prediction: Actions
) -> Actions:
    """The noise in a^k by a network's `prediction` of it, or of a^0: EDP Eq. 8 solved for the noise."""
    if kind == "noise":
        return prediction
    # between two steps, where DPM-Solver asks, log alpha_bar is linear
    log_alpha_bar = jnp.interp(k, np.arange(len(schedule.beta)), np.log(schedule.alpha_bar))
    return (noisy_action - jnp.exp(log_alpha_bar / 2) * prediction) / jnp.sqrt(-jnp.expm1(log_alpha_bar))


def ddpm_sample(
    noise_fn: Callable[[Array, Array], Array],
    schedule: Schedule,
    x_init: Float[Array, "..."],
    key: PRNGKeyArray,
    clip: bool = False,
) -> Float[Array, "..."]:
    """Ancestral sampling (EDP Eq. 2 to 4; Ho et al. 2020, Alg. 2), K network calls in one scan.

    `noise_fn(x, k)` predicts the noise in `x`, k a scalar. Mean and variance are the posterior's given the clean sample
    that it implies, inside [-1, 1] if `clip`; the last step adds no noise. Differentiable: activations are computed
    again in the backward pass, so that memory grows with K only by the chain itself.
    """
    beta, alpha, alpha_bar, alpha_bar_prev, signal, sigma = schedule
    coefficients = {
        "x0_from_x": 1 / signal,
        "x0_from_noise": sigma / signal,
        "mean_from_x0": np.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar),
        "mean_from_x": np.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar),
        "std": np.sqrt(beta * (1 - alpha_bar_prev) / (1 - alpha_bar)),  # 0 at the last step
    }

    @jax.checkpoint
    def denoise(x, step):
        k, c = step
        x0 = c["x0_from_x"] * x - c["x0_from_noise"] * noise_fn(x, k)
        if clip:
            x0 = jnp.clip(x0, -1, 1)
        noise = jax.random.normal(jax.random.fold_in(key, k), x.shape, x.dtype)
        return c["mean_from_x0"] * x0 + c["mean_from_x"] * x + c["std"] * noise, None

    steps = (jnp.arange(len(beta)), jax.tree.map(lambda c: jnp.asarray(c, x_init.dtype), coefficients))
    return jax.lax.scan(denoise, x_init, steps, reverse=True)[0]
