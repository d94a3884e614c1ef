"""Losses weighed by their gradients (EnCodec, arXiv 2210.13438, section 3.4; audiocraft's `Balancer`).

A weight then says which share of the gradient that reaches the decoder's audio a loss has, whatever its
scale: shares stay as configured while losses rise and fall.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

DECAY = 0.999
EPSILON = 1e-12


class BalancerState(NamedTuple):
    """Running means of the losses' gradient norms, by their names, before the correction of their bias."""

    norms: dict[str, jax.Array]
    counts: dict[str, jax.Array]  # the sum of the weights in each mean: a loss may join later


def init_balancer(names: Iterable[str]) -> BalancerState:
    zeros = {name: jnp.zeros(()) for name in names}
    return BalancerState(zeros, dict(zeros))


def balance(
    state: BalancerState, gradients: dict[str, jax.Array], weights: dict[str, float]
) -> tuple[BalancerState, jax.Array, dict[str, jax.Array]]:
    """Add up gradients, each divided by the running mean of its norm.

    Args:
        gradients: by loss, of it with respect to the audio [batch, channels, samples].
        weights: by loss; only their ratios matter.

    Returns:
        The new state, the gradient to send back through the decoder, whose norm is about 1 in each clip of
        the batch, and the share of each loss in it: the norm of its part over the sum of these norms.
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
