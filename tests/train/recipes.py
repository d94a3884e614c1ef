"""A recipe so small that a test can run hundreds of its steps."""

import copy
import dataclasses
from typing import Any

from mimi_jax import MimiConfig
from mimi_jax.train.recipe import (
    DataRecipe,
    DiscriminatorRecipe,
    LossRecipe,
    OptimizerRecipe,
    QuantizerRecipe,
    Recipe,
    ValidationRecipe,
)
from mimi_jax.train.step import Trainer
from mimi_jax.train.weights import start_model

TINY = MimiConfig(
    sampling_rate=2400,
    upsampling_ratios=(4, 3),
    hidden_size=16,
    num_filters=4,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=32,
    sliding_window=16,
    upsample_groups=16,
    codebook_size=16,
    codebook_dim=8,
    vector_quantization_hidden_dimension=8,
    num_quantizers=4,
)


def tiny_recipe(**changes: Any) -> Recipe:
    """The tiny recipe with changes. `part__field` changes a field of a part, such as `losses__mel`."""
    fields: dict[str, Any] = {
        "model": TINY,
        "data": DataRecipe(seconds=0.96, batch_size=2, gain=(0.0, 0.0)),
        "optimizer": OptimizerRecipe(learning_rate=3e-3),
        "losses": LossRecipe(adversarial=0.0, features=0.0),
        "quantizer": QuantizerRecipe(kmeans_vectors=400),
        "steps": 20,
        "discriminator": DiscriminatorRecipe(filters=4),
        "log_every": 1,
        "checkpoint_every": 5,
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        fields[part] = dataclasses.replace(fields[part], **{field: value}) if field else value
    return Recipe(**fields)


_TRAINERS: dict[str, Trainer] = {}


def trainer_of(recipe: Recipe) -> Trainer:
    """The trainer of a recipe. All tests of a process share its compiled steps."""
    key = repr(recipe)
    if key not in _TRAINERS:
        twin = repr(_as_steps_see(recipe))
        if twin not in _TRAINERS:
            _TRAINERS[twin] = Trainer(_as_steps_see(recipe), start_model(recipe))
        _TRAINERS[key] = copy.copy(_TRAINERS[twin])
        _TRAINERS[key].recipe = recipe
    return _TRAINERS[key]


def _as_steps_see(recipe: Recipe) -> Recipe:
    """The recipe without what its compiled steps do not read."""
    assert recipe.optimizer.schedule == "constant"  # another one reads the number of steps
    return dataclasses.replace(
        recipe,
        data=DataRecipe(seconds=recipe.data.seconds),
        discriminator=dataclasses.replace(recipe.discriminator, init="", head_start=0),
        validation=ValidationRecipe(),
        **dict.fromkeys(("steps", "log_every", "checkpoint_every", "steps_at_once"), 1),
    )
