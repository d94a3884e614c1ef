"""The parameters of a model: by name, filled in from a checkpoint, or cut down to the first codebooks."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mimi_jax.config import MimiConfig, as_integer
from mimi_jax.files.arrays import named_variables, with_values
from mimi_jax.model import Mimi
from mimi_jax.nn.quantizer import Codebook
from mimi_jax.ops.policy import resolve


class _OneKey(nnx.Rngs):
    """Random numbers for a model without values: always the same. To trace real ones takes seconds."""

    def __init__(self):
        pass

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract_model(config: MimiConfig, **options: Any) -> Mimi:
    """A model whose parameters have shapes but no values yet; the options are those of `Mimi`."""
    options["compute"] = resolve(options.get("compute", "auto"))  # not while `Mimi` is traced
    return nnx.eval_shape(lambda: Mimi(config, rngs=_OneKey(), **options))


def parameters(model: Mimi) -> dict[str, nnx.Variable]:
    """What a checkpoint holds of a model, by name: everything but the codebooks' derived arrays."""
    return named_variables(model, nnx.Not(nnx.OfType(Codebook)))


def num_parameters(model: Mimi) -> int:
    """How many numbers a checkpoint of the model holds."""
    values = [variable.get_raw_value() for variable in parameters(model).values()]
    return sum(leaf.size for leaf in jax.tree.leaves(values))


def fill(
    model: Mimi,
    arrays: Mapping[str, Any],
    dtype: DTypeLike | None,
    sharding: jax.sharding.Sharding | None = None,
) -> Mimi:
    """Give an abstract model its values.

    Args:
        model: from `abstract_model`.
        arrays: the values of all `parameters`, by name: NumPy or JAX arrays, or `Int8` weights.
        dtype: of all parameters but those of the quantizer, which is float32; None keeps what is stored.
        sharding: where to put every array; None for the default device.
    """

    def put(name: str, array: Any) -> Any:
        wanted = jnp.float32 if name.startswith("quantizer.") else dtype
        return jax.device_put(array if wanted is None else array.astype(wanted), sharding)

    model = with_values(model, {name: put(name, array) for name, array in arrays.items()})
    model.quantizer.derive()
    return model


@jax.transfer_guard("allow")  # the indices of a slice come from the host
def keep_codebooks(model: Mimi, num_quantizers: int) -> Mimi:
    """The same model with its first codebooks only. Its codes are the first ones of the whole model's codes.

    Args:
        num_quantizers: how many codebooks to keep, the semantic ones included.

    Raises:
        ValueError: no acoustic codebook would be left, or the model has fewer codebooks.
    """
    num_quantizers = check_kept(model.config, num_quantizers)
    num_acoustic = num_quantizers - model.quantizer.num_semantic
    kept = nnx.clone(model)
    kept.config = dataclasses.replace(model.config, num_quantizers=num_quantizers)
    kept.quantizer.num_quantizers = num_quantizers
    acoustic = kept.quantizer.acoustic
    statistics = (acoustic.initialized, acoustic.cluster_usage, acoustic.embedding_sum)
    for stack in (*statistics, acoustic.embedding, acoustic.half_square):
        stack.set_value(stack[...][:num_acoustic])
    return kept


def check_kept(config: MimiConfig, num_quantizers: int) -> int:
    """Refuse a number of codebooks that a model of this configuration cannot be cut down to."""
    least = config.num_semantic_quantizers + 1
    count = as_integer(num_quantizers)
    if count is None or not least <= count <= config.num_quantizers:
        raise ValueError(
            f"num_quantizers must be an integer from {least} (the semantic and one acoustic codebook) to"
            f" {config.num_quantizers} (all codebooks of this model), got {num_quantizers!r}"
        )
    return count
