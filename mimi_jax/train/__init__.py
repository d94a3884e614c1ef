"""Training of Mimi, from scratch or of the decoder alone, in runs that continue after they were killed.

Kyutai has not released its training code. This package follows the Moshi paper (arXiv 2410.00037, section
3.3), Kyutai's public code for the quantizer, and audiocraft, whose losses the paper refers to.

    recipe          what decides a run, read from a TOML file
    losses          what is minimized
    balancer        how the losses of the audio share its gradient
    phases          2-D convolutions that are fast on CPUs, and their gradients
    discriminator   the multi-scale STFT discriminator
    weight_norm     kernels as a length and a direction
    codebooks       how codebooks learn, without gradients
    weights         parameters by name, and the model that a run starts from
    optimizers      AdamW and its schedules
    step            `Trainer`: one step, as a pure function of its state and a batch
    data            random crops of audio files
    log             the log of a run
    states          the states of a run on disk
    validation      choosing the model of a run by clips that it does not learn from
    run             `train`: a run from start to end
"""

from mimi_jax.train.log import NotFiniteError
from mimi_jax.train.recipe import Recipe
from mimi_jax.train.run import train
from mimi_jax.train.step import Trainer, TrainState
from mimi_jax.train.weights import start_model

__all__ = ["NotFiniteError", "Recipe", "TrainState", "Trainer", "start_model", "train"]
