"""Mimi: waveform -> latents -> codes -> latents -> waveform, of whole clips and of streams.

The codec of Moshi (arXiv 2410.00037, section 3.3). The oracle for every number is
`transformers.MimiModel` 5.23; on whole frames it agrees with Kyutai's own `moshi`.

Inside, arrays are channels last. Here, at the boundary, they are as everywhere in this field: audio
[batch, channels, samples] and codes [batch, codebooks, frames].
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from mimi_jax.arguments import check_audio, check_codes, check_mask, check_state, lengths_of_active
from mimi_jax.config import MimiConfig, ceil_div
from mimi_jax.nn.attention import AttentionState
from mimi_jax.nn.conv import Conv1d, ConvState, ConvTranspose1d, ConvTransposeState
from mimi_jax.nn.quantizer import Codebook, SplitResidualQuantizer
from mimi_jax.nn.seanet import Decoder, Encoder
from mimi_jax.nn.streaming import StreamingLayer, is_real, step_all
from mimi_jax.nn.transformer import Transformer
from mimi_jax.ops import policy

# The two halves, and the parts that each is made of, in the order in which they compute.
HALVES = {
    "encoder": ("encoder", "encoder_transformer", "downsample"),
    "decoder": ("upsample", "decoder_transformer", "decoder"),
}


# What a stream remembers: the states of the parts of its half. Every array has the batch on axis 0.
EncoderState: TypeAlias = tuple[tuple, tuple[AttentionState, ...], ConvState]
DecoderState: TypeAlias = tuple[ConvTransposeState, tuple[AttentionState, ...], tuple]


class EncoderOutput(NamedTuple):
    audio_codes: jax.Array  # int32 [batch, codebooks, frames], semantic first, 0 outside the mask
    audio_codes_mask: jax.Array  # bool [batch, frames]


class DecoderOutput(NamedTuple):
    audio_values: jax.Array  # [batch, channels, samples]


class MimiOutput(NamedTuple):
    audio_codes: jax.Array  # int32 [batch, codebooks, frames]
    audio_codes_mask: jax.Array  # bool [batch, frames]
    audio_values: jax.Array  # [batch, channels, samples], as long as the input


def _computing(method):
    """Run a method of `Mimi` at `self.precision`, and let XLA choose how values inside it are sharded.

    Without the first, float32 means TF32 on NVIDIA GPUs and bfloat16 passes on TPUs, and codes change.
    Without the second, a mesh with explicit axes would ask for the sharding of every lookup in a codebook.
    The method's first argument and all its results have the batch on axis 0, and are sharded alike.
    """

    @functools.wraps(method)
    def wrapped(self: "Mimi", x: ArrayLike, *args, **kwargs):
        if isinstance(x, list | tuple):
            hint = "pad_batch joins clips, and out.audio_codes are the codes of an output"
            raise TypeError(f"expected an array, got {type(x).__name__}; {hint}")
        sharding = jax.typeof(x).sharding
        with jax.default_matmul_precision(self.precision), policy.computing(self.compute):
            if not (axes := sharding.mesh.explicit_axes):
                return method(self, x, *args, **kwargs)
            batch = PartitionSpec(*sharding.spec[:1])
            with jax.sharding.use_abstract_mesh(sharding.mesh):
                compute: Callable = jax.sharding.auto_axes(method, axes=axes, out_sharding=batch)
                return compute(self, x, *args, **kwargs)

    return wrapped


class Mimi(nnx.Module):
    """The Mimi codec: parameters and nothing else, a JAX pytree like any other.

    Args:
        config: the architecture.
        rngs: for the random initial parameters.
        precision: of matrix products, as in `jax.default_matmul_precision`; "highest" is exact float32
            on every backend.
        compute: "auto" for the fastest implementations on this machine; "portable" for those in plain XLA;
            or implementations by operation, such as {"attention": "banded"}, see `mimi_jax.ops.policy`.
        encoder, decoder: False leaves out that half. The quantizer is always there.
    """

    def __init__(
        self,
        config: MimiConfig,
        *,
        rngs: nnx.Rngs,
        precision: str = "highest",
        compute: str | Mapping[str, str] | policy.Compute = "auto",
        encoder: bool = True,
        decoder: bool = True,
    ):
        if not (encoder or decoder):
            raise ValueError("a model needs its encoder, its decoder or both, got neither")
        self.config, self.precision, self.compute = config, precision, policy.resolve(compute)
        size, stride, causal = config.hidden_size, config.latent_stride, config.use_causal_conv
        transformer = functools.partial(Transformer, config, rngs=rngs)
        resampling = {"stride": stride, "causal": causal, "use_bias": False, "rngs": rngs}
        self.encoder = Encoder(config, rngs=rngs) if encoder else None
        self.encoder_transformer = transformer() if encoder else None
        self.downsample = (
            Conv1d(size, size, 2 * stride, pad_mode="replicate", **resampling) if encoder else None
        )
        self.quantizer = SplitResidualQuantizer(config, rngs=rngs)
        upsample = functools.partial(ConvTranspose1d, groups=config.upsample_groups, **resampling)
        ratio = config.trim_right_ratio
        self.upsample = upsample(size, size, trim_right_ratio=ratio) if decoder else None
        self.decoder_transformer = transformer() if decoder else None
        self.decoder = Decoder(config, rngs=rngs) if decoder else None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: DTypeLike | None = jnp.float32,
        precision: str = "highest",
        compute: str | Mapping[str, str] | policy.Compute = "auto",
        encoder: bool = True,
        decoder: bool = True,
        num_quantizers: int | None = None,
        weights: str | None = None,
        sharding: jax.sharding.Sharding | None = None,
    ) -> "Mimi":
        """Load a model.

        Args:
            name: a bundled model ("mini"), a folder with `config.json` and weights, a `.safetensors` file in
                the layout of `transformers` or of Kyutai, or a Hugging Face repository ("kyutai/mimi").
            dtype: of weights and activations; the quantizer is always float32. None keeps what is stored.
            precision, compute: as for `Mimi`.
            encoder, decoder: False leaves out that half.
            num_quantizers: keeps the first codebooks alone, such as the 8 of Moshi; None keeps all.
            weights: "int8" makes the kernels of both halves int8, as `mimi_jax.checkpoint.int8` does;
                "int8-encoder" and "int8-decoder" those of one half. None keeps what is stored.
            sharding: where to put every parameter; None for the default device.

        Raises:
            FileNotFoundError: no such model, or the Hub cannot be reached.
            ImportError: int8 weights are to be made, and `qwix` is not installed.
            ValueError: naming every tensor that is missing, unexpected or of another shape, and every unknown
                or unsupported field of the configuration; for `num_quantizers` that the model has not.
        """
        from mimi_jax import checkpoint  # which builds on this module

        return checkpoint.load(
            name,
            dtype=dtype,
            precision=precision,
            compute=compute,
            encoder=encoder,
            decoder=decoder,
            num_quantizers=num_quantizers,
            weights=weights,
            sharding=sharding,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, which `transformers` loads too, unless it is int8."""
        from mimi_jax import checkpoint  # which builds on this module

        checkpoint.save(self, folder)

    def __repr__(self) -> str:
        """The parts and their sizes. `nnx.tabulate(model, audio)` shows the layers in them."""
        config = self.config
        rate = f"{config.sampling_rate / config.frame_size:g} frames a second"
        codes = f"{config.num_quantizers} codebooks of {config.codebook_size} codes"
        lines = [f"Mimi: {config.sampling_rate} Hz, {rate}, {codes}, {self.dtype}"]
        for name in (*HALVES["encoder"], "quantizer", *HALVES["decoder"]):
            if (part := getattr(self, name)) is not None:
                leaves = jax.tree.leaves(nnx.state(part, nnx.Not(nnx.OfType(Codebook))))
                lines.append(f"  {name:<20}{sum(leaf.size for leaf in leaves):>12,} parameters")
        return "\n".join(lines)

    __str__ = __repr__

    @property
    def dtype(self) -> jnp.dtype:
        """What activations are computed in; the quantizer always uses float32."""
        layer = self.downsample if self.upsample is None else self.upsample
        assert layer is not None
        return layer.kernel.dtype

    def astype(self, dtype: DTypeLike) -> "Mimi":
        """The same model in another dtype, such as bfloat16; the quantizer stays float32."""

        def cast(x: jax.Array) -> jax.Array:
            return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        graph, quantizer, rest = nnx.split(self, nnx.PathContains("quantizer"), ...)
        return nnx.merge(graph, quantizer, jax.tree.map(cast, rest))

    def encoded_length(self, num_samples):
        """How many frames a clip of `num_samples` (an integer, or an array of them) has."""
        return ceil_div(num_samples, self.config.frame_size)

    def _half(self, name: str, *layers: StreamingLayer | None) -> list[StreamingLayer]:
        present = [layer for layer in layers if layer is not None]
        if len(present) < len(layers):
            raise ValueError(f"this model has no {name}; load it without {name}=False")
        return present

    def _encoder_layers(self) -> list[StreamingLayer]:
        return self._half("encoder", self.encoder, self.encoder_transformer, self.downsample)

    def _decoder_layers(self) -> list[StreamingLayer]:
        return self._half("decoder", self.upsample, self.decoder_transformer, self.decoder)

    @_computing
    def _encode_latents(
        self,
        audio: ArrayLike,
        padding_mask: ArrayLike | None,
        state: Any = None,
        active: ArrayLike | None = None,
    ) -> tuple[Any, jax.Array, jax.Array | None]:
        """Step the encoder half; also returns how many frames of each row are real, None for all."""
        audio, lengths = check_audio(self.config, audio, padding_mask)
        num_samples = audio.shape[2]
        audio = pad_to_frame(audio, self.config)
        if lengths is None and audio.shape[2] > num_samples:
            lengths = jnp.full(audio.shape[0], num_samples)
        lengths = lengths_of_active(active, lengths, len(audio), num_samples)
        if state is not None:
            check_state(state, jax.eval_shape(lambda: self.init_encoder_state(len(audio))))
        x = jnp.swapaxes(audio, 1, 2).astype(self.dtype)
        state, latents = step_all(self._encoder_layers(), state, x, lengths)
        return state, latents, None if lengths is None else ceil_div(lengths, self.config.frame_size)

    @jax.jit
    def encode_latents(self, audio: ArrayLike, padding_mask: ArrayLike | None = None) -> jax.Array:
        """The latents before quantization: `encode` without its last part, and differentiable.

        Args:
            audio: float [batch, channels, samples] in [-1, 1], at `config.sampling_rate`.
            padding_mask: bool or int [batch, samples] or [batch, 1, samples], 1 where a sample is real.

        Returns:
            [batch, frames, hidden_size]; frames outside the mask mean nothing.
        """
        return self._encode_latents(audio, padding_mask)[1]

    @functools.partial(jax.jit, static_argnames="num_quantizers")
    def quantize(self, latents: ArrayLike, num_quantizers: int | None = None) -> jax.Array:
        """Latents [batch, frames, hidden_size] -> int32 codes [batch, codebooks, frames].

        Args:
            num_quantizers: how many codebooks to use, the first ones; None for all.
        """
        return self._quantize(latents, num_quantizers=num_quantizers)

    @_computing
    def _quantize(self, latents: ArrayLike, *, num_quantizers: int | None) -> jax.Array:
        return self.quantizer.encode(jnp.asarray(latents), num_quantizers)

    @jax.jit
    @_computing
    def dequantize(self, codes: ArrayLike) -> jax.Array:
        """Codes [batch, codebooks, frames], of all or the first codebooks -> [batch, frames, hidden_size].

        A code outside [0, codebook_size) gives NaN.
        """
        return self.quantizer.decode(check_codes(codes))

    @_computing
    def _decode_latents(
        self, latents: ArrayLike, lengths: jax.Array | None = None, state: Any = None
    ) -> tuple[Any, jax.Array]:
        x = jnp.asarray(latents).astype(self.dtype)
        if state is not None:
            check_state(state, jax.eval_shape(lambda: self.init_decoder_state(len(x))))
        state, x = step_all(self._decoder_layers(), state, x, lengths)
        return state, jnp.swapaxes(x, 1, 2)

    @jax.jit
    def decode_latents(self, latents: ArrayLike) -> jax.Array:
        """Latents [batch, frames, hidden_size] -> audio [batch, channels, samples]; differentiable."""
        return self._decode_latents(latents)[1]

    def init_encoder_state(self, batch_size: int) -> EncoderState:
        """The state of `batch_size` fresh streams, for `encode_step`."""
        return self._init_state(self._encoder_layers(), batch_size)

    def init_decoder_state(self, batch_size: int) -> DecoderState:
        """The state of `batch_size` fresh streams, for `decode_step`."""
        return self._init_state(self._decoder_layers(), batch_size)

    def _init_state(self, layers: list[StreamingLayer], batch_size: int) -> Any:
        if not self.config.is_streamable:
            raise ValueError(
                "a model with use_causal_conv=False or trim_right_ratio other than 1 looks ahead and cannot"
                " stream; use encode and decode on whole clips"
            )
        return tuple(layer.init_state(batch_size, self.dtype) for layer in layers)

    def __call__(
        self, audio: ArrayLike, padding_mask: ArrayLike | None = None, num_quantizers: int | None = None
    ) -> MimiOutput:
        """Encode and decode; arguments as in `encode`, the audio that comes back as long as the input."""
        codes, codes_mask = encode(self, audio, padding_mask, num_quantizers)
        if padding_mask is None:
            padding_mask = jnp.ones((codes.shape[0], jnp.shape(audio)[2]), bool)
        return MimiOutput(codes, codes_mask, decode(self, codes, padding_mask).audio_values)


def pad_to_frame(audio: ArrayLike, config: MimiConfig) -> jax.Array:
    """Append zeros to audio [..., samples] up to a whole number of frames, as Kyutai's codec does.

    `encode` needs no such help: by itself it pads each convolution, as `transformers` does, which gives
    other codes in the last frame of a clip that is no whole number of frames.
    """
    audio = jnp.asarray(audio)
    missing = -audio.shape[-1] % config.frame_size
    return jnp.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(0, missing)]) if missing else audio


@functools.partial(jax.jit, static_argnames="num_quantizers")
def encode(
    model: Mimi,
    audio: ArrayLike,
    padding_mask: ArrayLike | None = None,
    num_quantizers: int | None = None,
) -> EncoderOutput:
    """Encode clips.

    The codes of a row do not depend on the other rows or on what stands in its padding, NaN included: it
    gets the codes it would get alone, which `transformers` (5.23) gives for the clip alone.

    Args:
        audio: float [batch, channels, samples] in [-1, 1], at `config.sampling_rate`, of any length.
        padding_mask: bool or int [batch, samples] or [batch, 1, samples], 1 where a sample is real. A row
            ends with its last real sample; what is masked before that counts as silence.
        num_quantizers: how many codebooks to use, the first ones; None for all.

    Returns:
        `audio_codes` int32 [batch, codebooks, frames], semantic first and 0 outside the mask, and
        `audio_codes_mask` bool [batch, frames], with frames = ceil(samples / frame_size).

    Raises:
        ValueError: for other shapes or dtypes, and for codebooks the model does not have.
    """
    _, latents, lengths = model._encode_latents(audio, padding_mask)
    codes, mask = _quantize_real(model, latents, lengths, num_quantizers)
    return EncoderOutput(codes, mask)


def _quantize_real(
    model: Mimi, latents: jax.Array, lengths: jax.Array | None, num_quantizers: int | None
) -> tuple[jax.Array, jax.Array]:
    codes = model.quantize(latents, num_quantizers)
    batch, _, frames = codes.shape
    if lengths is None:
        return codes, jnp.ones((batch, frames), bool)
    mask = is_real(lengths, frames)
    return jnp.where(mask[:, None, :], codes, 0), mask


@jax.jit
def decode(model: Mimi, audio_codes: ArrayLike, padding_mask: ArrayLike | None = None) -> DecoderOutput:
    """Decode codes to audio.

    Args:
        audio_codes: int [batch, codebooks, frames], of all or the first codebooks. A code outside
            [0, codebook_size) turns the audio of its row into NaN.
        padding_mask: of the audio that was encoded, as for `encode`. The audio is cut to its width, is
            zero beyond the end of each row, and codes beyond it are ignored.

    Returns:
        `audio_values` [batch, channels, samples], frame_size samples a frame.
    """
    if padding_mask is None:
        return DecoderOutput(model.decode_latents(model.dequantize(audio_codes)))
    mask, lengths = check_mask(padding_mask, jnp.shape(audio_codes)[0])
    frames = ceil_div(lengths, model.config.frame_size)
    codes = jnp.where(is_real(frames, jnp.shape(audio_codes)[2])[:, None, :], audio_codes, 0)
    _, audio = model._decode_latents(model.dequantize(codes), frames)
    audio = audio[:, :, : mask.shape[1]]
    return DecoderOutput(jnp.where(is_real(lengths, audio.shape[2])[:, None, :], audio, 0))


@functools.partial(jax.jit, static_argnames="num_quantizers")
def encode_step(
    model: Mimi,
    state: EncoderState,
    audio: ArrayLike,
    padding_mask: ArrayLike | None = None,
    num_quantizers: int | None = None,
    active: ArrayLike | None = None,
) -> tuple[EncoderState, jax.Array]:
    """Encode the next whole frames of a batch of streams.

    Whatever the sizes of the steps, the codes are those of `encode` on the whole clip.

    Args:
        state: from `init_encoder_state`, then from the step before.
        audio: float [batch, channels, samples]; samples a positive multiple of `config.frame_size`.
        padding_mask: as for `encode`. A row whose mask ends inside the step ends its stream there, with
            exactly `encode`'s last frame; reset the row before it is used again.
        num_quantizers: how many codebooks to use, the first ones; None for all.
        active: bool [batch]; rows that are False, or that have no real sample in this step, keep their
            state, and their codes are 0.

    Returns:
        The state for the next step, and int32 codes [batch, codebooks, samples / frame_size].
    """
    num_samples, frame_size = jnp.shape(audio)[-1], model.config.frame_size
    if num_samples % frame_size:
        raise ValueError(
            f"samples must be a positive multiple of frame_size={frame_size}, got {num_samples};"
            " pad the last frame and mark it in padding_mask"
        )
    state, latents, lengths = model._encode_latents(audio, padding_mask, state, active)
    return state, _quantize_real(model, latents, lengths, num_quantizers)[0]


@jax.jit
def decode_step(
    model: Mimi, state: DecoderState, audio_codes: ArrayLike, active: ArrayLike | None = None
) -> tuple[DecoderState, jax.Array]:
    """Decode the next frames of a batch of streams.

    Whatever the sizes of the steps, the audio is that of `decode` on the whole clip.

    Args:
        state: from `init_decoder_state`, then from the step before.
        audio_codes: int [batch, codebooks, frames], of all or the first codebooks.
        active: bool [batch]; rows that are False keep their state, and their audio is 0.

    Returns:
        The state for the next step, and audio [batch, channels, frames * frame_size].
    """
    latents = model.dequantize(audio_codes)
    lengths = lengths_of_active(active, None, *latents.shape[:2])
    state, audio = model._decode_latents(latents, lengths, state)
    return state, audio if lengths is None else jnp.where(lengths[:, None, None] > 0, audio, 0)
