"""The parameters of a model in training: by name, the kernels of SEANet as a length and a direction."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from mimi_jax.checkpoint.int8 import to_float
from mimi_jax.files.arrays import named_variables, with_values
from mimi_jax.model import Mimi
from mimi_jax.train.recipe import Recipe
from mimi_jax.train.weight_norm import NormalizedKernel, fold

Weights = dict[str, jax.Array | NormalizedKernel]  # by name, such as "encoder.first.kernel"
SEANET = ("encoder.", "decoder.")
TRANSFORMERS = ("encoder_transformer.", "decoder_transformer.")


def weights_of(module: nnx.Module) -> dict[str, jax.Array]:
    """The parameters of a module by name."""
    return {name: variable[...] for name, variable in named_variables(module, nnx.Param).items()}


def with_weights(module: Any, weights: Mapping[str, jax.Array | NormalizedKernel]) -> Any:
    """A copy of a module with these parameters. Names that the module does not have are ignored, and
    parameters that are not given stay as they are."""
    own = named_variables(module, nnx.Param)
    return with_values(module, {name: fold(weights[name]) for name in own if name in weights})


def is_normalized(name: str) -> bool:
    """Whether a parameter of the model is a kernel that is trained as a length and a direction."""
    return name.startswith(SEANET) and name.endswith("kernel")


def in_transformer(weights: Weights) -> Any:
    """For each parameter, whether it belongs to a Transformer; only these have weight decay."""
    return {
        name: jax.tree.map(lambda _, name=name: name.startswith(TRANSFORMERS), weight)
        for name, weight in weights.items()
    }


def start_model(recipe: Recipe) -> Mimi:
    """The model that a run starts from: `recipe.init`, or random parameters.

    Random kernels are as small as PyTorch makes them by default, which is what audiocraft trains from. With
    He's initialization, which `transformers` and `Mimi` use, activations grow with depth, and a run spends
    its first steps making them smaller.

    Raises:
        ValueError: the recipe has a model that differs from that of `recipe.init`.
    """
    if recipe.init:
        model = to_float(Mimi.from_pretrained(recipe.init, precision=recipe.precision))
        if recipe.model not in (Recipe().model, model.config):
            raise ValueError(
                f"[model] in the recipe differs from the model init={recipe.init!r}; leave out [model]"
            )
        return model
    model = Mimi(recipe.model, rngs=nnx.Rngs(recipe.seed), precision=recipe.precision)
    kernels = {name: weight for name, weight in weights_of(model).items() if is_normalized(name)}
    return with_weights(model, {name: kernel / math.sqrt(6) for name, kernel in kernels.items()})
