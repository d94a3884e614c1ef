"""One step of training, as a pure function of its state and a batch.

The order is that of audiocraft: the generator runs, the discriminator learns from the audio it gave, then
judges that audio for the generator. The generator runs once. Each loss of the audio gives a gradient at the
audio, the balancer adds these up, and one backward pass through the generator takes the sum, together with
the losses that do not depend on the audio.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mimi_jax.files.arrays import with_values
from mimi_jax.model import HALVES, Mimi
from mimi_jax.train import codebooks as vq
from mimi_jax.train import losses
from mimi_jax.train.balancer import BalancerState, balance, init_balancer
from mimi_jax.train.codebooks import Codebooks
from mimi_jax.train.discriminator import Discriminator
from mimi_jax.train.optimizers import make_optimizers, update
from mimi_jax.train.recipe import Recipe
from mimi_jax.train.weight_norm import normalize
from mimi_jax.train.weights import Weights, is_normalized, weights_of, with_weights

# "audio" [batch, channels, samples]; "features" [batch, vectors, dim] to distill.
Batch = dict[str, jax.Array]
Logs = dict[str, jax.Array]  # scalars by name
Crop = Callable[[jax.Array], jax.Array]
# Of a run: the model learns alone, the discriminator learns alone, or both learn.
Phase = Literal["reconstruction", "head start", "adversarial"]


class Average(NamedTuple):
    """A running mean of the model, in which its first value has no special weight."""

    weights: Weights
    codebooks: dict[str, Codebooks]
    count: jax.Array  # float32, the sum of the weights in the mean


class TrainState(NamedTuple):
    """Everything that a run needs to continue, except its position in the data."""

    step: jax.Array  # int32, how many steps are done
    weights: Weights  # the parameters that gradients change
    frozen: Weights  # the parameters that stay
    codebooks: dict[str, Codebooks]
    optimizer: Any
    average: Average
    discriminator: Weights
    discriminator_optimizer: Any
    balancer: BalancerState


class Trainer:
    """Makes a `TrainState` for a recipe, and steps it.

    `trainer.step(state, batch, phase=trainer.phase(number))` is compiled. It returns the next state and what
    to log: losses, their shares of the gradient, norms of gradients and perplexities. It reuses the memory of
    the state it is given. `trainer.steps` takes batches on a new first axis, and does a step for each.

    Args:
        recipe: what to train, and how.
        model: the model to start from, in floats.
    """

    def __init__(self, recipe: Recipe, model: Mimi):
        self.recipe = recipe
        self.model = model
        rngs = nnx.Rngs(recipe.seed + 1)
        judge = recipe.discriminator
        self.discriminator = Discriminator(
            model.config.audio_channels, judge.filters, judge.windows, rngs=rngs
        )
        self.teacher_proj = None
        if recipe.losses.distillation:
            self.teacher_proj = nnx.Linear(model.config.hidden_size, recipe.teacher_dim, rngs=rngs)
        self.optimizer, self.discriminator_optimizer = make_optimizers(recipe)
        self.step = jax.jit(self._step, static_argnames="phase", donate_argnums=0)
        self.steps = jax.jit(self._steps, static_argnames="phase", donate_argnums=0)

    def init(self) -> TrainState:
        """The state before the first step, with the codebooks of the model."""
        weights, frozen = self._init_weights()
        codebooks = vq.codebooks_of(self.model.quantizer)
        judge = self._init_discriminator() if self.recipe.adversarial else {}
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            weights=weights,
            frozen=frozen,
            codebooks=codebooks,
            optimizer=self.optimizer.init(weights),
            average=Average(weights, codebooks, jnp.zeros(())),
            discriminator=judge,
            discriminator_optimizer=self.discriminator_optimizer.init(judge),
            balancer=init_balancer(self.balanced(adversarial=self.recipe.adversarial)),
        )
        return jax.tree.map(jnp.array, state)  # copies, because a donated buffer may be in one place only

    def _init_weights(self) -> tuple[Weights, Weights]:
        """The parameters that are trained, and the frozen ones."""
        plain = weights_of(self.model)
        if self.teacher_proj is not None:
            plain |= {f"teacher_proj.{name}": w for name, w in weights_of(self.teacher_proj).items()}
        frozen: Weights = {}
        if self.recipe.mode == "decoder":
            frozen = {name: w for name, w in plain.items() if name.split(".")[0] not in HALVES["decoder"]}
        weights: Weights = {
            name: normalize(w) if is_normalized(name) else w
            for name, w in plain.items()
            if name not in frozen
        }
        return weights, frozen

    def _init_discriminator(self) -> Weights:
        # As in audiocraft, where the first layers have no weight normalization.
        return {
            name: normalize(w) if w.ndim == 4 and ".first." not in name else w
            for name, w in weights_of(self.discriminator).items()
        }

    def balanced(self, adversarial: bool) -> dict[str, float]:
        """The weights of the losses of the audio, without those that are 0.

        Args:
            adversarial: whether the step has a discriminator.
        """
        weights = self.recipe.losses
        named = {"waveform": weights.waveform, "mel": weights.mel}
        if adversarial:
            named |= {"adversarial": weights.adversarial, "features": weights.features}
        return {name: weight for name, weight in named.items() if weight}

    def phase(self, step: int) -> Phase:
        """What a step does with the discriminator."""
        start = self.recipe.losses.adversarial_start
        if not self.recipe.adversarial or step < start:
            return "reconstruction"
        return "head start" if step < start + self.recipe.discriminator.head_start else "adversarial"

    def export(self, state: TrainState) -> Mimi:
        """The running mean of the model, with ordinary kernels."""
        average = state.average
        model = with_weights(self.model, {**average.weights, **state.frozen})
        statistics = {}
        for part, (usage, sums) in average.codebooks.items():
            statistics[f"quantizer.{part}.cluster_usage"] = usage
            statistics[f"quantizer.{part}.embedding_sum"] = sums
        model = with_values(model, statistics)
        model.quantizer.derive()
        return model

    def fit_codebooks(self, state: TrainState, latents: jax.Array, vectors_per_step: int) -> TrainState:
        """The same state with codebooks that k-means fits to the latents of the untrained encoder.

        Args:
            latents: float32 [vectors, hidden_size].
            vectors_per_step: how many latents a training step sees.
        """
        model = with_weights(self.model, {**state.weights, **state.frozen})
        key = jax.random.key(self.recipe.seed)
        with jax.default_matmul_precision("highest"):
            codebooks = vq.fit(model.quantizer, latents, key, vectors_per_step)
        average = state.average._replace(codebooks=jax.tree.map(jnp.array, codebooks))
        return state._replace(codebooks=codebooks, average=average)

    @functools.partial(jax.jit, static_argnums=0)
    def encode_latents(self, state: TrainState, audio: jax.Array) -> jax.Array:
        """Latents [batch, frames, hidden_size] of audio [batch, channels, samples]."""
        return with_weights(self.model, {**state.weights, **state.frozen}).encode_latents(audio)

    def _steps(self, state: TrainState, batches: Batch, phase: Phase) -> tuple[TrainState, Logs]:
        return lax.scan(functools.partial(self._step, phase=phase), state, batches)

    def _step(self, state: TrainState, batch: Batch, phase: Phase) -> tuple[TrainState, Logs]:
        precision = self.recipe.precision
        with jax.default_matmul_precision("default" if precision == "bfloat16" else precision):
            return self._train(state, batch, phase)

    def _train(self, state: TrainState, batch: Batch, phase: Phase) -> tuple[TrainState, Logs]:
        audio = batch["audio"]
        key = jax.random.fold_in(jax.random.key(self.recipe.seed), state.step)
        num_quantizers, is_quantized, key, crop_key = self._draw(key, len(audio))
        crop = self._draw_crop(crop_key)
        generate = functools.partial(
            self._generate, state, batch, num_quantizers=num_quantizers, is_quantized=is_quantized, key=key
        )
        if phase == "head start":
            (fake_audio, _), _ = generate(state.weights)
            state, logs = self._train_discriminator(state, crop(audio), crop(fake_audio))
            return state._replace(step=state.step + 1), logs
        fake, pull_back, (quantized, logs) = jax.vjp(generate, state.weights, has_aux=True)
        fake_audio, extra = fake

        is_judged = phase == "adversarial"
        if is_judged:
            state, judge_logs = self._train_discriminator(state, crop(audio), crop(fake_audio))
            logs |= judge_logs
        judge = state.discriminator
        gradients, values = self._judge(judge, audio, fake_audio, crop if is_judged else None)
        balancer, gradient, shares = balance(state.balancer, gradients, self.balanced(is_judged))
        weight_gradients = pull_back((gradient, jnp.ones_like(extra)))[0]
        weights, optimizer, norm = update(self.optimizer, weight_gradients, state.optimizer, state.weights)

        codebooks = state.codebooks
        if self.recipe.mode == "full":
            codebooks = vq.update(codebooks, quantized.assigned, num_quantizers, state.step)
        logs |= values | {f"share/{name}": share for name, share in shares.items()}
        logs |= {"gradient_norm": norm}
        logs |= {
            f"perplexity/{name}": jnp.mean(vq.perplexity(books.usage)) for name, books in codebooks.items()
        }
        new = state._replace(
            step=state.step + 1,
            weights=weights,
            codebooks=codebooks,
            optimizer=optimizer,
            average=self._average(state.average, weights, codebooks),
            balancer=balancer,
        )
        return new, logs

    def _draw(
        self, key: jax.Array, batch_size: int
    ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array, jax.Array]:
        """How many codebooks this batch uses, which of its rows are quantized, and two keys: for the rest
        of the codec, and for what the discriminator hears."""
        recipe, config = self.recipe.quantizer, self.model.config
        count_key, rate_key, other_key, key, crop_key = jax.random.split(key, 5)
        most = config.num_quantizers
        least = config.num_semantic_quantizers + 1 if recipe.dropout else most
        num_quantizers = jax.random.randint(count_key, (), least, most + 1)
        keys = {"semantic": rate_key, "acoustic": rate_key if recipe.same else other_key}
        rate = recipe.rate if self.recipe.mode == "full" else 1.0
        is_quantized = {name: jax.random.uniform(k, (batch_size,)) < rate for name, k in keys.items()}
        return num_quantizers, is_quantized, key, crop_key

    def _draw_crop(self, key: jax.Array) -> Crop:
        """What crops audio [batch, channels, samples] to the part that the discriminator hears."""
        length, longest = self.recipe.num_heard, self.recipe.num_samples
        if length == longest:
            return lambda audio: audio
        start = jax.random.randint(key, (), 0, longest - length + 1)
        return lambda audio: lax.dynamic_slice_in_dim(audio, start, length, axis=2)

    def _generate(self, state: TrainState, batch: Batch, weights: Weights, **drawn):
        """Run the codec.

        Returns:
            What has gradients: the decoded audio, and the weighted sum of the losses that do not depend on
            it. Then what has none: what the quantizer gave, and the logs.
        """
        model = with_weights(self.model, {**weights, **state.frozen})
        codec = model.astype(jnp.bfloat16) if self.recipe.precision == "bfloat16" else model
        latents = codec.encode_latents(batch["audio"]).astype(jnp.float32)
        if self.recipe.mode == "decoder":
            latents = lax.stop_gradient(latents)
        with jax.default_matmul_precision("highest"):
            quantized = vq.quantize(model.quantizer, state.codebooks, latents, **drawn)
        audio = codec.decode_latents(quantized.latents).astype(jnp.float32)
        weights_of_losses, logs = self.recipe.losses, {}
        extra = jnp.zeros(())
        if self.recipe.mode == "full":
            logs["loss/commitment"] = quantized.commitment
            extra += weights_of_losses.commitment * quantized.commitment
        if self.teacher_proj is not None:
            own = {name.removeprefix("teacher_proj."): w for name, w in weights.items()}
            student = with_weights(self.teacher_proj, own)(quantized.semantic)
            _, vectors, dim = batch["features"].shape
            if dim != self.recipe.teacher_dim:
                raise ValueError(
                    f"teacher_dim must be the channels of the features, {dim}, got {self.recipe.teacher_dim}"
                )
            stride = vectors // student.shape[1]
            loss = losses.cosine_loss(student, losses.pool_teacher(batch["features"], stride))
            logs["loss/distillation"] = loss
            extra += weights_of_losses.distillation * loss
        return (audio, extra), (quantized, logs)

    def _train_discriminator(
        self, state: TrainState, real: jax.Array, fake: jax.Array
    ) -> tuple[TrainState, Logs]:
        def loss(weights: Weights) -> jax.Array:
            judge = with_weights(self.discriminator, weights)
            return losses.discriminator_loss(judge(real).logits, judge(fake).logits)

        value, gradients = jax.value_and_grad(loss)(state.discriminator)
        weights, optimizer, norm = update(
            self.discriminator_optimizer, gradients, state.discriminator_optimizer, state.discriminator
        )
        state = state._replace(discriminator=weights, discriminator_optimizer=optimizer)
        return state, {"loss/discriminator": value, "discriminator_gradient_norm": norm}

    def _judge(
        self, judge_weights: Weights, real: jax.Array, fake: jax.Array, crop: Crop | None
    ) -> tuple[dict[str, jax.Array], Logs]:
        """The gradient of each loss of the audio with respect to `fake`, and the values of these losses.

        Args:
            crop: from `_draw_crop`, or None in steps without a discriminator.
        """
        rate, options = self.model.config.sampling_rate, self.recipe.losses
        functions = {
            "waveform": lambda fake: losses.waveform_loss(real, fake),
            "mel": lambda fake: losses.mel_loss(real, fake, rate, options.mel_power, options.mel_floor),
        }
        wanted = self.balanced(adversarial=crop is not None)
        results = {
            name: jax.value_and_grad(function)(fake) for name, function in functions.items() if name in wanted
        }
        if crop is not None:
            judge = with_weights(self.discriminator, judge_weights)
            real_features = judge(crop(real)).features
            # One forward pass of the discriminator serves both losses, with a backward pass for each.
            judgement, pull_back = jax.vjp(lambda fake: judge(crop(fake)), fake)
            for name, function in (
                ("adversarial", lambda judgement: losses.adversarial_loss(judgement.logits)),
                ("features", lambda judgement: losses.feature_loss(real_features, judgement.features)),
            ):
                value, gradient = jax.value_and_grad(function)(judgement)
                if name in wanted:
                    results[name] = value, pull_back(gradient)[0]
        gradients = {name: gradient for name, (_, gradient) in results.items()}
        return gradients, {f"loss/{name}": value for name, (value, _) in results.items()}

    def _average(self, average: Average, weights: Weights, codebooks: dict[str, Codebooks]) -> Average:
        count = average.count * self.recipe.optimizer.ema_decay + 1

        def move(old: jax.Array, new: jax.Array) -> jax.Array:
            return old + (new - old) / count

        return Average(
            jax.tree.map(move, average.weights, weights),
            jax.tree.map(move, average.codebooks, codebooks),
            count,
        )
