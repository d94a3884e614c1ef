"""One step of training, as a pure function of its state and a batch.

As in audiocraft: the generator runs, the discriminator learns from its audio, then judges it for the
generator. The generator runs once: each loss gives a gradient at the decoder's audio, the balancer adds
them up, and one pull-back through the generator takes the sum, and the losses that do not touch the audio.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mimi_jax.checkpoint.int8 import to_float
from mimi_jax.files.arrays import named_variables, with_values
from mimi_jax.model import Mimi
from mimi_jax.train import codebooks as vq
from mimi_jax.train import losses
from mimi_jax.train.balancer import BalancerState, balance, init_balancer
from mimi_jax.train.codebooks import Codebooks
from mimi_jax.train.discriminator import Discriminator
from mimi_jax.train.recipe import Recipe
from mimi_jax.train.weight_norm import NormalizedKernel, fold, normalize

Weights = dict[str, jax.Array | NormalizedKernel]  # by place in the module, such as "encoder.first.kernel"
DECODER = ("upsample", "decoder_transformer", "decoder")
SEANET = ("encoder.", "decoder.")
TRANSFORMERS = ("encoder_transformer.", "decoder_transformer.")


class Average(NamedTuple):
    """A running mean of weights, not biased by its start."""

    weights: Weights
    codebooks: dict[str, Codebooks]
    count: jax.Array  # float32, the sum of the weights in the mean


class TrainState(NamedTuple):
    """All that a run needs to go on, but for the position in the data."""

    step: jax.Array  # int32, how many are done
    weights: Weights  # what gradients change
    frozen: Weights
    codebooks: dict[str, Codebooks]
    optimizer: Any
    average: Average
    discriminator: Weights
    discriminator_optimizer: Any
    balancer: BalancerState


def weights_of(module: nnx.Module) -> dict[str, jax.Array]:
    """The parameters of a module by name."""
    return {name: variable[...] for name, variable in named_variables(module, nnx.Param).items()}


def with_weights(module: Any, weights: Mapping[str, jax.Array | NormalizedKernel]) -> Any:
    """A copy of a module with other parameters; those it is not given stay as they are."""
    own = named_variables(module, nnx.Param)
    return with_values(module, {name: fold(weights[name]) for name in own if name in weights})


class Trainer:
    """Makes and steps `TrainState`s for one recipe.

    Args:
        recipe: what to train, and how.
        model: the one to start from.
    """

    def __init__(self, recipe: Recipe, model: Mimi):
        import optax

        self.recipe = recipe
        self.model = model
        rngs = nnx.Rngs(recipe.seed + 1)
        filters = recipe.discriminator_filters
        self.discriminator = Discriminator(model.config.audio_channels, filters, rngs=rngs)
        self.teacher_proj = None
        if recipe.losses.distillation:
            self.teacher_proj = nnx.Linear(model.config.hidden_size, recipe.teacher_dim, rngs=rngs)
        options = recipe.optimizer
        schedule = optax.constant_schedule(options.learning_rate)
        if options.schedule == "cosine":
            schedule = optax.cosine_decay_schedule(options.learning_rate, recipe.steps)
        if options.warmup_steps:
            warmup = optax.linear_schedule(0.0, 1.0, options.warmup_steps)
            whole = schedule
            schedule = lambda count: warmup(count + 1) * whole(count)  # noqa: E731
        adamw = functools.partial(optax.adamw, schedule, *options.betas)
        clip = optax.clip_by_global_norm(options.max_norm) if options.max_norm else optax.identity()
        self.optimizer = optax.chain(clip, adamw(weight_decay=options.weight_decay, mask=in_transformer))
        self.discriminator_optimizer = optax.chain(clip, adamw(weight_decay=0.0))
        self.step = jax.jit(self._step, static_argnames="adversarial", donate_argnums=0)

    def init(self) -> TrainState:
        """The state before the first step; codebooks as they are in the model."""
        plain = weights_of(self.model)
        if self.teacher_proj is not None:
            plain |= {f"teacher_proj.{name}": w for name, w in weights_of(self.teacher_proj).items()}
        frozen: Weights = {}
        if self.recipe.mode == "decoder":
            frozen = {name: w for name, w in plain.items() if name.split(".")[0] not in DECODER}
        weights: Weights = {
            name: normalize(w) if is_normalized(name) else w
            for name, w in plain.items()
            if name not in frozen
        }
        codebooks = vq.codebooks_of(self.model.quantizer)
        judge = weights_of(self.discriminator) if self.recipe.adversarial else {}
        judge = {
            # As in audiocraft, whose first layers are not given the norm.
            name: normalize(w) if w.ndim == 4 and ".first." not in name else w
            for name, w in judge.items()
        }
        average = Average(weights, codebooks, jnp.zeros(()))
        state = TrainState(
            jnp.zeros((), jnp.int32),
            weights,
            frozen,
            codebooks,
            self.optimizer.init(weights),
            average,
            judge,
            self.discriminator_optimizer.init(judge),
            init_balancer(self.balanced(adversarial=self.recipe.adversarial)),
        )
        return jax.tree.map(jnp.array, state)  # copies: a donated buffer must not stand in two places

    def balanced(self, adversarial: bool) -> dict[str, float]:
        """The weights of the losses of the audio that are not 0."""
        weights = self.recipe.losses
        named = {"waveform": weights.waveform, "mel": weights.mel}
        if adversarial:
            named |= {"adversarial": weights.adversarial, "features": weights.features}
        return {name: weight for name, weight in named.items() if weight}

    def is_adversarial(self, step: int) -> bool:
        return self.recipe.adversarial and step >= self.recipe.losses.adversarial_start

    def export(self, state: TrainState, average: bool = True) -> Mimi:
        """The model of a state, with plain kernels: the running mean of its weights, or the newest."""
        source = state.average if average else state
        model = with_weights(self.model, {**source.weights, **state.frozen})
        statistics = {}
        for part, (usage, sums) in source.codebooks.items():
            statistics[f"quantizer.{part}.cluster_usage"] = usage
            statistics[f"quantizer.{part}.embedding_sum"] = sums
        model = with_values(model, statistics)
        model.quantizer.derive()
        return model

    def fit_codebooks(self, state: TrainState, latents: jax.Array, vectors_per_step: int) -> TrainState:
        """Codebooks fitted to latents [vectors, hidden_size] of the untrained encoder."""
        model = with_weights(self.model, {**state.weights, **state.frozen})
        key = jax.random.key(self.recipe.seed)
        with jax.default_matmul_precision("highest"):
            codebooks = vq.fit(model.quantizer, latents, key, vectors_per_step)
        average = state.average._replace(codebooks=jax.tree.map(jnp.array, codebooks))
        return state._replace(codebooks=codebooks, average=average)

    @functools.partial(jax.jit, static_argnums=0)
    def encode_latents(self, state: TrainState, audio: jax.Array) -> jax.Array:
        return with_weights(self.model, {**state.weights, **state.frozen}).encode_latents(audio)

    def _step(
        self, state: TrainState, batch: dict[str, jax.Array], adversarial: bool
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Returns the next state and what to log: losses, shares, norms of gradients."""
        with jax.default_matmul_precision(self.recipe.precision):
            return self._train(state, batch, adversarial)

    def _train(
        self, state: TrainState, batch: dict[str, jax.Array], adversarial: bool
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        audio = batch["audio"]
        key = jax.random.fold_in(jax.random.key(self.recipe.seed), state.step)
        num_quantizers, is_quantized, key = self._draw(key, len(audio))
        generate = functools.partial(
            self._generate, state, batch, num_quantizers=num_quantizers, is_quantized=is_quantized, key=key
        )
        fake, pull_back, (quantized, logs) = jax.vjp(generate, state.weights, has_aux=True)
        fake_audio, extra = fake

        judge, judge_optimizer = state.discriminator, state.discriminator_optimizer
        if adversarial:
            judge, judge_optimizer, judge_logs = self._train_discriminator(state, audio, fake_audio)
            logs |= judge_logs
        gradients, values = self._judge(judge, audio, fake_audio, adversarial)
        balancer, gradient, shares = balance(state.balancer, gradients, self.balanced(adversarial))
        weight_gradients = pull_back((gradient, jnp.ones_like(extra)))[0]
        weights, optimizer, norm = self._update(
            self.optimizer, weight_gradients, state.optimizer, state.weights
        )

        codebooks = state.codebooks
        if self.recipe.mode == "full":
            codebooks = vq.update(codebooks, quantized.assigned, num_quantizers, state.step)
        logs |= values | {f"share/{name}": share for name, share in shares.items()}
        logs |= {"gradient_norm": norm}
        logs |= {
            f"perplexity/{name}": jnp.mean(vq.perplexity(books.usage)) for name, books in codebooks.items()
        }
        average = self._average(state.average, weights, codebooks)
        new = TrainState(
            state.step + 1,
            weights,
            state.frozen,
            codebooks,
            optimizer,
            average,
            judge,
            judge_optimizer,
            balancer,
        )
        return new, logs

    def _draw(self, key: jax.Array, batch_size: int) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
        """How many codebooks this batch uses, which of its rows are quantized, and a key for the rest."""
        recipe, config = self.recipe.quantizer, self.model.config
        count_key, rate_key, other_key, key = jax.random.split(key, 4)
        most = config.num_quantizers
        least = config.num_semantic_quantizers + 1 if recipe.dropout else most
        num_quantizers = jax.random.randint(count_key, (), least, most + 1)
        keys = {"semantic": rate_key, "acoustic": rate_key if recipe.same else other_key}
        rate = recipe.rate if self.recipe.mode == "full" else 1.0
        is_quantized = {name: jax.random.uniform(k, (batch_size,)) < rate for name, k in keys.items()}
        return num_quantizers, is_quantized, key

    def _generate(self, state: TrainState, batch: dict[str, jax.Array], weights: Weights, **drawn):
        """Reconstructed audio and the weighted sum of the losses that do not touch it; and what to keep."""
        model = with_weights(self.model, {**weights, **state.frozen})
        latents = model.encode_latents(batch["audio"])
        if self.recipe.mode == "decoder":
            latents = lax.stop_gradient(latents)
        with jax.default_matmul_precision("highest"):
            quantized = vq.quantize(model.quantizer, state.codebooks, latents, **drawn)
        audio = model.decode_latents(quantized.latents)
        weights_of_losses, logs = self.recipe.losses, {}
        extra = jnp.zeros(())
        if self.recipe.mode == "full":
            logs["loss/commitment"] = quantized.commitment
            extra += weights_of_losses.commitment * quantized.commitment
        if self.teacher_proj is not None:
            own = {name.removeprefix("teacher_proj."): w for name, w in weights.items()}
            student = with_weights(self.teacher_proj, own)(quantized.semantic)
            stride = batch["features"].shape[1] // student.shape[1]
            loss = losses.cosine_loss(student, losses.pool_teacher(batch["features"], stride))
            logs["loss/distillation"] = loss
            extra += weights_of_losses.distillation * loss
        return (audio, extra), (quantized, logs)

    def _train_discriminator(
        self, state: TrainState, real: jax.Array, fake: jax.Array
    ) -> tuple[Weights, Any, dict[str, jax.Array]]:
        def loss(weights: Weights) -> jax.Array:
            judge = with_weights(self.discriminator, weights)
            return losses.discriminator_loss(judge(real).logits, judge(fake).logits)

        value, gradients = jax.value_and_grad(loss)(state.discriminator)
        weights, optimizer, norm = self._update(
            self.discriminator_optimizer, gradients, state.discriminator_optimizer, state.discriminator
        )
        return weights, optimizer, {"loss/discriminator": value, "discriminator_gradient_norm": norm}

    def _judge(
        self, judge_weights: Weights, real: jax.Array, fake: jax.Array, adversarial: bool
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Each loss of the audio: its gradient with respect to it, and its value."""
        rate = self.model.config.sampling_rate
        functions = {
            "waveform": lambda fake: losses.waveform_loss(real, fake),
            "mel": lambda fake: losses.mel_loss(real, fake, rate, self.recipe.losses.mel_floor),
        }
        wanted = self.balanced(adversarial)
        results = {
            name: jax.value_and_grad(function)(fake) for name, function in functions.items() if name in wanted
        }
        if adversarial:
            judge = with_weights(self.discriminator, judge_weights)
            real_features = judge(real).features
            # One run of the discriminator for both losses, and two ways back.
            judgement, pull_back = jax.vjp(judge, fake)
            for name, function in (
                ("adversarial", lambda judgement: losses.adversarial_loss(judgement.logits)),
                ("features", lambda judgement: losses.feature_loss(real_features, judgement.features)),
            ):
                value, gradient = jax.value_and_grad(function)(judgement)
                if name in wanted:
                    results[name] = value, pull_back(gradient)[0]
        gradients = {name: gradient for name, (_, gradient) in results.items()}
        return gradients, {f"loss/{name}": value for name, (value, _) in results.items()}

    def _update(self, optimizer, gradients, state, weights: Weights) -> tuple[Weights, Any, jax.Array]:
        import optax

        updates, state = optimizer.update(gradients, state, weights)
        new: Any = optax.apply_updates(weights, updates)
        return new, state, optax.tree.norm(gradients)

    def _average(self, average: Average, weights: Weights, codebooks: dict[str, Codebooks]) -> Average:
        count = average.count * self.recipe.optimizer.ema_decay + 1

        def move(old: jax.Array, new: jax.Array) -> jax.Array:
            return old + (new - old) / count

        return Average(
            jax.tree.map(move, average.weights, weights),
            jax.tree.map(move, average.codebooks, codebooks),
            count,
        )


def is_normalized(name: str) -> bool:
    """Whether a weight is a kernel that is trained as a length and a direction."""
    return name.startswith(SEANET) and name.endswith("kernel")


def in_transformer(weights: Weights) -> Any:
    """True for what is decayed."""
    return {
        name: jax.tree.map(lambda _, name=name: name.startswith(TRANSFORMERS), weight)
        for name, weight in weights.items()
    }


def start_model(recipe: Recipe) -> Mimi:
    """The model that a run starts from.

    Random kernels are as small as PyTorch makes them by default, with which audiocraft trains: activations
    of He's, which `transformers` and `Mimi` draw, grow with depth until a run begins by shrinking them.
    """
    if recipe.init:
        model = to_float(Mimi.from_pretrained(recipe.init, precision=recipe.precision))
        if recipe.model not in (Recipe().model, model.config):
            raise ValueError(f"the recipe's model is not that of init={recipe.init!r}; leave out [model]")
        return model
    model = Mimi(recipe.model, rngs=nnx.Rngs(recipe.seed), precision=recipe.precision)
    kernels = {name: weight for name, weight in weights_of(model).items() if is_normalized(name)}
    return with_weights(model, {name: kernel / math.sqrt(6) for name, kernel in kernels.items()})
