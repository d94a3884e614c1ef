"""AdamW of the model and of the discriminator, with their schedule and clipping."""

from typing import Any

import jax

from mimi_jax.train.recipe import Recipe
from mimi_jax.train.weights import Weights, in_transformer


def make_optimizers(recipe: Recipe) -> tuple[Any, Any]:
    """optax's transformations for the model and for the discriminator.

    Each counts only the steps in which it learns, and its schedule ends with the last of them.
    """
    import optax

    options = recipe.optimizer
    judge_rate = recipe.discriminator.learning_rate or options.learning_rate
    judge_steps = max(recipe.steps - recipe.losses.adversarial_start, 0) if recipe.adversarial else 0
    steps = recipe.steps - min(recipe.discriminator.head_start, judge_steps)
    rates = (
        make_schedule(recipe, options.learning_rate, steps),
        make_schedule(recipe, judge_rate, judge_steps),
    )
    clip = optax.clip_by_global_norm(options.max_norm) if options.max_norm else optax.identity()
    decay: dict[str, Any] = {"weight_decay": options.weight_decay, "mask": in_transformer}
    model = optax.chain(clip, optax.adamw(rates[0], *options.betas, **decay))
    return model, optax.chain(clip, optax.adamw(rates[1], *options.betas, weight_decay=0.0))


def make_schedule(recipe: Recipe, learning_rate: float, steps: int) -> Any:
    """The learning rate of each of so many steps, as optax's schedules give it."""
    import optax

    options = recipe.optimizer
    schedule = optax.constant_schedule(learning_rate)
    if options.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(learning_rate, max(steps, 1))  # there may be none to learn in
    if not options.warmup_steps:
        return schedule
    warmup = optax.linear_schedule(0.0, 1.0, options.warmup_steps)
    return lambda count: warmup(count + 1) * schedule(count)


def update(optimizer: Any, gradients: Any, state: Any, weights: Weights) -> tuple[Weights, Any, jax.Array]:
    """The new weights, the optimizer's new state, and the norm of the gradients."""
    import optax

    # optax raises floats to integer powers, which `jax_numpy_dtype_promotion="strict"` refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(gradients, state, weights)
        new: Any = optax.apply_updates(weights, updates)
    return new, state, optax.tree.norm(gradients)
