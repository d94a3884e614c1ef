"""Balance losses by their gradients (EnCodec, arXiv 2210.13438, section 3.4; audiocraft's `Balancer`).

The weight of a loss is its share of the gradient at the decoded audio. The scale of the loss does not matter:
the shares stay as configured while losses rise and fall.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

DECAY = 0.999
EPSILON = 1e-12


class BalancerState(NamedTuple):
    """Running means of gradient norms, by loss. They begin at 0, which dividing by `counts` corrects."""

    norms: dict[str, jax.Array]
    counts: dict[str, jax.Array]  # the sum of the weights in each mean; it differs where a loss began later


def init_balancer(names: Iterable[str]) -> BalancerState:
    zeros = {name: jnp.zeros(()) for name in names}
    return BalancerState(zeros, dict(zeros))


def balance(
    state: BalancerState, gradients: dict[str, jax.Array], weights: dict[str, float]
) -> tuple[BalancerState, jax.Array, dict[str, jax.Array]]:
    """Add up gradients, after dividing each by the running mean of its norm.

    Args:
        state: from `init_balancer`, then from the previous call.
        gradients: by loss, its gradient with respect to the audio [batch, channels, samples].
        weights: by loss; only their ratios matter.

    Returns:
        The new state; the sum, whose norm is at most about 1 on average over the clips; and the share of
        each loss: the norm of its part divided by the sum of these norms.
    """
    norms, counts, parts = dict(state.norms), dict(state.counts), {}
    total = jnp.zeros(())
    total_weight = sum(weights[name] for name in gradients)
    for name, gradient in gradients.items():
        norm = jnp.mean(jnp.linalg.norm(gradient.reshape(len(gradient), -1), axis=1))
        norms[name] = DECAY * norms[name] + (1 - DECAY) * norm
        counts[name] = DECAY * counts[name] + (1 - DECAY)
        scale = weights[name] / total_weight / (EPSILON + norms[name] / counts[name])
        parts[name] = scale * norm
        total += scale * gradient
    whole = sum(parts.values()) + EPSILON
    return BalancerState(norms, counts), total, {name: part / whole for name, part in parts.items()}
