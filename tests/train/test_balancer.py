import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax.train.balancer import balance, init_balancer

WEIGHTS = {"mel": 2.0, "waveform": 1.0, "features": 5.0}


def gradients(seed: int, names=tuple(WEIGHTS)) -> dict:
    """Gradients of very different scales, which the balancer must even out."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal((4, 1, 100)) * 10.0 ** (3 * i - 3), jnp.float32)
        for i, name in enumerate(names)
    }


def test_shares_are_the_weights():
    state = init_balancer(WEIGHTS)
    for seed in range(20):
        state, total, shares = balance(state, gradients(seed), WEIGHTS)
    for name, weight in WEIGHTS.items():
        assert float(shares[name]) == pytest.approx(weight / 8, rel=0.05)
    # The three gradients have independent directions, so the squares of their norms add up.
    expected = np.sqrt(sum((weight / 8) ** 2 for weight in WEIGHTS.values()))
    assert float(jnp.linalg.norm(total.reshape(4, -1), axis=1).mean()) == pytest.approx(expected, rel=0.1)


def test_the_first_step_is_not_biased_by_the_initial_zeros():
    _, total, shares = balance(init_balancer(WEIGHTS), gradients(0), WEIGHTS)
    expected = sum(
        WEIGHTS[name] / 8 * g / np.linalg.norm(np.reshape(g, (4, -1)), axis=1).mean()
        for name, g in gradients(0).items()
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)
    assert float(sum(shares.values())) == pytest.approx(1)


def test_a_loss_that_begins_later_has_its_share_at_once():
    state = init_balancer(WEIGHTS)
    few = {"mel": 2.0, "waveform": 1.0}
    for seed in range(5):
        state, _, shares = balance(state, gradients(seed, tuple(few)), few)
        assert float(shares["mel"]) == pytest.approx(2 / 3, rel=0.1)
    state, _, shares = balance(state, gradients(9), WEIGHTS)
    assert float(shares["features"]) == pytest.approx(5 / 8, rel=0.1)


def test_a_larger_loss_does_not_give_a_larger_gradient():
    state = init_balancer(WEIGHTS)
    _, total, _ = balance(state, gradients(0), WEIGHTS)
    _, scaled, _ = balance(state, {name: 1000 * g for name, g in gradients(0).items()}, WEIGHTS)
    np.testing.assert_allclose(total, scaled, rtol=1e-5, atol=1e-6)


def test_a_gradient_of_zero_does_not_divide_by_zero():
    zero = {name: 0 * g for name, g in gradients(0).items()}
    _, total, shares = balance(init_balancer(WEIGHTS), zero, WEIGHTS)
    assert np.all(np.asarray(total) == 0)
    assert all(float(share) == 0 for share in shares.values())
