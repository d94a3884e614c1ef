"""Training of Mimi: losses, balancer, discriminator, codebooks, data, and runs that a kill does not end.

Kyutai has not released its training code. This follows the Moshi paper (arXiv 2410.00037, section 3.3), what
Kyutai's public code says of the quantizer, and audiocraft, whose losses the paper refers to. Reading order:
losses, balancer, discriminator, weight_norm, codebooks, recipe, data, step, run.
"""

from mimi_jax.train.recipe import Recipe
from mimi_jax.train.run import NotFiniteError, train
from mimi_jax.train.step import Trainer, TrainState

__all__ = ["NotFiniteError", "Recipe", "TrainState", "Trainer", "train"]
