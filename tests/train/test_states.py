"""The states of a run on disk."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimi_jax.train.balancer import BalancerState
from mimi_jax.train.states import open_states, read_discriminator, save_state
from mimi_jax.train.step import Average, TrainState
from mimi_jax.train.weight_norm import normalize
from mimi_jax.train.weights import Weights


def on(numbers: list[int]) -> NamedSharding:
    devices = np.array([jax.devices()[number] for number in numbers])
    return NamedSharding(Mesh(devices, ("data",)), PartitionSpec())


def test_a_discriminator_is_read_on_other_devices(tmp_path: Path):
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
    judge: Weights = {"first.bias": jnp.arange(4.0), "last.kernel": normalize(kernel)}
    average = Average({}, {}, jnp.zeros(()))
    optimizer = {"first.bias": jnp.ones(4)}
    state = TrainState(jnp.int32(5), {}, {}, {}, {}, average, judge, optimizer, BalancerState({}, {}))
    with open_states(tmp_path / "checkpoints") as states:
        save_state(states, jax.device_put(state, on([6, 7])), SimpleNamespace(get_state=dict))
    names = tmp_path / "checkpoints" / "5" / "state" / "_sharding"
    assert '"id\\": 7' in names.read_text()
    names.write_text(names.read_text().replace('"id\\": 7', '"id\\": 70'))  # which is not here

    found = read_discriminator(tmp_path, jax.device_put(jax.tree.map(jnp.zeros_like, judge), on([0])))
    jax.tree.map(np.testing.assert_array_equal, found, judge)
    assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {on([0])}
