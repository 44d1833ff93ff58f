"""DPM-Solver (Lu et al. 2022, "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling").

The singlestep solver for noise prediction, "DPM-Solver-fast": steps of third order, the last calls by lower ones. All
coefficients depend on schedule and budget alone: constants of the program, computed by NumPy in float64.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.diffusion import Schedule, Spacing


def solver_orders(num_calls: int, order: int, num_steps: int) -> list[int]:
    """Order of each step, summing to `num_calls` (DPM-Solver-fast of Lu et al. 2022). ValueError if impossible."""
    if num_steps < 2:
        raise ValueError(f"DPM-Solver needs at least 2 diffusion steps, not {num_steps}")
    if order not in (1, 2, 3):
        raise ValueError(f"DPM-Solver exists in orders 1, 2 and 3, not {order}")
    if num_calls < order:
        raise ValueError(f"a solver of order {order} needs at least {order} network calls, not {num_calls}")
    if order == 3:
        tail = {0: [2, 1], 1: [1], 2: [2]}[num_calls % 3]
        return [3] * ((num_calls - sum(tail)) // 3) + tail
    return [order] * (num_calls // order) + [1] * (num_calls % order)


def dpm_solver_sample(
    noise_fn: Callable[[Array, float], Array],
    schedule: Schedule,
    x_init: Float[Array, "..."],
    num_calls: int = 15,
    order: int = 3,
    skip: Spacing = "time_uniform",
    t_end: float = 1e-3,
    clip: bool = False,
) -> Float[Array, "..."]:
    """Integrates the diffusion ODE from noise `x_init` at t = 1 to a sample at t = max(t_end, 1/K).

    `noise_fn(x, k)` predicts the noise in `x`, `num_calls` times; k = t K - 1, a scalar, is fractional between steps.
    `clip=True` keeps the result, and the clean samples implied, inside [-1, 1]. Impossible settings raise ValueError.
    """
    num_steps = len(schedule.beta)
    knots = np.arange(1, num_steps + 1) / num_steps
    log_alphas = 0.5 * np.log(schedule.alpha_bar)
    t_end = max(t_end, knots[0])  # below the first knot sigma^2 would be negative

    log_alpha = lambda t: np.interp(t, knots, log_alphas)
    half_log_snr = lambda t: log_alpha(t) - 0.5 * np.log(-np.expm1(2 * log_alpha(t)))  # log(alpha_t / sigma_t)
    time_of = lambda half_log_snr: np.interp(0.5 * np.logaddexp(0.0, -2 * half_log_snr), -log_alphas, knots)

    def nodes(start, end, num_intervals):
        """Times between two times, spaced by the skip type."""
        if skip == "time_uniform":
            return np.linspace(start, end, num_intervals + 1)
        return time_of(np.linspace(half_log_snr(start), half_log_snr(end), num_intervals + 1))

    def predict(x, t):
        noise = noise_fn(x, float(t * num_steps - 1))
        if clip:  # |x_0| <= 1 with x_0 = (x - sigma noise) / alpha, as a bound on the noise
            alpha = float(np.exp(log_alpha(t)))
            sigma = float(np.sqrt(1 - alpha**2))
            noise = jnp.clip(noise, (x - alpha) / sigma, (x + alpha) / sigma)
        return noise

    orders = solver_orders(num_calls, order, num_steps)
    if skip == "time_uniform":  # a step spans as many slots as it makes calls
        times = nodes(1.0, t_end, num_calls)[np.cumsum([0, *orders])]
    elif skip == "logSNR":
        times = nodes(1.0, t_end, len(orders))
    else:
        raise ValueError(f"unknown skip type {skip!r}; choose 'time_uniform' or 'logSNR'")

    x = x_init
    for s, t, step_order in zip(times[:-1], times[1:], orders):
        inner = nodes(s, t, step_order)
        h = half_log_snr(inner) - half_log_snr(s)  # h[-1] is the whole step; h[i] / h[-1] are r_1, r_2
        signal = np.exp(log_alpha(inner) - log_alpha(s))
        sigma = np.exp(log_alpha(inner) - half_log_snr(inner))
        phi_1 = np.expm1(h)
        phi_2 = np.append(0.0, phi_1[1:] / h[1:] - 1)

        def advance(i, change=0.0, weight=0.0):
            """x at inner node i: the first-order (DDIM) move plus a correction by the change of the noise."""
            return float(signal[i]) * x - float(sigma[i] * phi_1[i]) * noise - float(sigma[i] * weight) * change

        noise = predict(x, s)
        if step_order == 1:  # Lu et al. Eq. 3.7
            x = advance(1)
        elif step_order == 2:  # Lu et al. Alg. 1
            change = predict(advance(1), inner[1]) - noise
            x = advance(2, change, phi_1[2] * h[2] / (2 * h[1]))
        else:  # Lu et al. Alg. 2
            change = predict(advance(1), inner[1]) - noise
            change = predict(advance(2, change, phi_2[2] * h[2] / h[1]), inner[2]) - noise
            x = advance(3, change, phi_2[3] * h[3] / h[2])
    return jnp.clip(x, -1, 1) if clip else x
