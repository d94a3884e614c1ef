"""Mimi: waveform -> latents -> codes -> latents -> waveform, of whole clips and of streams.

This is the codec of Moshi (arXiv 2410.00037, section 3.3). Every number is compared with that of
`transformers.MimiModel` 5.23, which agrees with Kyutai's own `moshi` on whole frames.

Layers have channels last. At this boundary, arrays have the axes that are usual in this field: audio
[batch, channels, samples] and codes [batch, codebooks, frames].
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from mimi_jax.boundary import (
    Compiled,
    DecoderOutput,
    EncoderOutput,
    MimiOutput,
    as_array,
    check_audio,
    check_codes,
    check_dtype,
    check_latents,
    check_mask_of_codes,
    check_state,
    check_streamable,
    check_whole_frames,
    lengths_of_active,
    pad_to_frame,
    transfers_allowed,
    with_model_settings,
)
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


class Mimi(nnx.Module):
    """The Mimi codec. It holds parameters and no state, and is a JAX pytree like any other.

    Args:
        config: the architecture.
        rngs: for the random initial parameters.
        precision: of matrix products, as in `jax.default_matmul_precision`; "highest" is exact float32
            on every backend, and "F32_F32_F32" the same without tensor cores (`mimi_jax.ops.tensor_cores`).
        compute: "auto" for the fastest implementations on this machine; "portable" for those in plain XLA;
            or implementations by operation, such as {"attention": "banded"}, see `mimi_jax.ops.policy`.
        encoder, decoder: False leaves out that half. The quantizer is always there.

    Raises:
        ValueError: both halves are left out, or `compute` names something that does not exist.
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
        shared = {"stride": stride, "causal": causal, "use_bias": False, "rngs": rngs}
        self.encoder = Encoder(config, rngs=rngs) if encoder else None
        self.encoder_transformer = transformer() if encoder else None
        self.downsample = Conv1d(size, size, 2 * stride, pad_mode="replicate", **shared) if encoder else None
        self.quantizer = SplitResidualQuantizer(config, rngs=rngs)
        trim = {"trim_right_ratio": config.trim_right_ratio, "groups": config.upsample_groups}
        self.upsample = ConvTranspose1d(size, size, **trim, **shared) if decoder else None
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
            precision, compute, encoder, decoder: as for `Mimi`.
            num_quantizers: keeps the first codebooks alone, such as the 8 of Moshi; None keeps all.
            weights: "int8" makes the kernels of both halves int8, as `mimi_jax.checkpoint.int8` does;
                "int8-encoder" and "int8-decoder" those of one half. None keeps what is stored.
            sharding: where to put every parameter; None for the default device.

        Raises:
            FileNotFoundError: there is no such model, or the Hub cannot be reached.
            ImportError: int8 weights are to be made, and `qwix` is not installed.
            ValueError: naming the tensors that are missing, unexpected or of another shape, and the fields
                of the configuration that are unknown or not supported; or naming a wrong argument.
        """
        from mimi_jax import checkpoint  # which builds on this module

        return checkpoint.load(
            name,
            dtype=None if dtype is None else check_dtype(dtype),
            precision=precision,
            compute=compute,
            encoder=encoder,
            decoder=decoder,
            num_quantizers=num_quantizers,
            weights=weights,
            sharding=sharding,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, which `transformers` loads unless weights are int8."""
        from mimi_jax import checkpoint

        checkpoint.save(self, folder)

    def __repr__(self) -> str:
        """The parts and their sizes. `nnx.tabulate(model, audio)` shows the layers in them."""
        config = self.config
        codes = f"{config.num_quantizers} codebooks of {config.codebook_size} codes"
        rate = f"{config.sampling_rate} Hz, {config.sampling_rate / config.frame_size:g} frames a second"
        lines = [f"Mimi: {rate}, {codes}, {self.dtype}"]
        for name in (*HALVES["encoder"], "quantizer", *HALVES["decoder"]):
            if (part := getattr(self, name)) is not None:
                leaves = jax.tree.leaves(nnx.state(part, nnx.Not(nnx.OfType(Codebook))))
                lines.append(f"  {name:<20}{sum(leaf.size for leaf in leaves):>12,} parameters")
        return "\n".join(lines)

    __str__ = __repr__

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of weights and activations. The quantizer always uses float32."""
        layer = self.downsample if self.upsample is None else self.upsample
        assert layer is not None
        return layer.kernel.dtype

    def astype(self, dtype: DTypeLike) -> "Mimi":
        """The same model in another dtype, such as bfloat16. The quantizer stays float32."""

        def cast(x: jax.Array) -> jax.Array:
            return x.astype(check_dtype(dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x

        graph, quantizer, rest = nnx.split(self, nnx.PathContains("quantizer"), ...)
        return nnx.merge(graph, quantizer, jax.tree.map(cast, rest))

    def encoded_length(self, num_samples):
        """How many frames a clip of `num_samples` has; an integer, or an array of integers."""
        return ceil_div(num_samples, self.config.frame_size)

    def _layers(self, half: str) -> list[StreamingLayer]:
        layers = [getattr(self, part) for part in HALVES[half]]
        if None in layers:
            raise ValueError(f"this model has no {half}; load it without {half}=False")
        return layers

    @with_model_settings
    def _encode_latents(
        self,
        audio: ArrayLike,
        padding_mask: ArrayLike | None,
        state: Any = None,
        active: ArrayLike | None = None,
    ) -> tuple[Any, jax.Array, jax.Array | None]:
        """Step the encoder half. Also returns how many frames of each row are real; None for all."""
        audio, lengths = check_audio(self.config, audio, padding_mask)
        num_samples = audio.shape[2]
        audio = pad_to_frame(audio, self.config)
        if lengths is None and audio.shape[2] > num_samples:
            lengths = jnp.full(audio.shape[0], num_samples, jnp.int32)
        lengths = lengths_of_active(active, lengths, len(audio), num_samples)
        if state is not None:
            check_state(state, jax.eval_shape(lambda: self.init_encoder_state(len(audio))))
        x = jnp.swapaxes(audio, 1, 2).astype(self.dtype)
        state, latents = step_all(self._layers("encoder"), state, x, lengths)
        return state, latents, None if lengths is None else ceil_div(lengths, self.config.frame_size)

    @Compiled
    def encode_latents(self, audio: ArrayLike, padding_mask: ArrayLike | None = None) -> jax.Array:
        """Compute the latents before quantization, which are differentiable. Arguments are as for `encode`.

        Returns:
            Float [batch, frames, hidden_size]. Frames outside the mask have no meaning.
        """
        return self._encode_latents(audio, padding_mask)[1]

    @Compiled
    def quantize(self, latents: ArrayLike, num_quantizers: int | None = None) -> jax.Array:
        """Latents [batch, frames, hidden_size] -> int32 codes [batch, codebooks, frames], as for `encode`."""
        return self._quantize(latents, num_quantizers=num_quantizers)

    @with_model_settings
    def _quantize(self, latents: ArrayLike, *, num_quantizers: int | None) -> jax.Array:
        return self.quantizer.encode(check_latents(self.config, latents), num_quantizers)

    @Compiled
    @with_model_settings
    def dequantize(self, codes: ArrayLike) -> jax.Array:
        """Codes [batch, codebooks, frames] -> latents [batch, frames, hidden_size], as for `decode`."""
        return self.quantizer.decode(check_codes(codes))

    @with_model_settings
    def _decode_latents(
        self, latents: ArrayLike, lengths: jax.Array | None = None, state: Any = None
    ) -> tuple[Any, jax.Array]:
        x = check_latents(self.config, latents).astype(self.dtype)
        if state is not None:
            check_state(state, jax.eval_shape(lambda: self.init_decoder_state(len(x))))
        state, x = step_all(self._layers("decoder"), state, x, lengths)
        return state, jnp.swapaxes(x, 1, 2)

    @Compiled
    def decode_latents(self, latents: ArrayLike) -> jax.Array:
        """Latents [batch, frames, hidden_size] -> audio [batch, channels, samples]; differentiable."""
        return self._decode_latents(latents)[1]

    def init_encoder_state(self, batch_size: int) -> EncoderState:
        """The state of `batch_size` fresh streams, for `encode_step`."""
        return self._init_state("encoder", batch_size)

    def init_decoder_state(self, batch_size: int) -> DecoderState:
        """The state of `batch_size` fresh streams, for `decode_step`."""
        return self._init_state("decoder", batch_size)

    def _init_state(self, half: str, batch_size: int) -> Any:
        check_streamable(self.config)
        with transfers_allowed(), policy.computing(self.compute):
            return tuple(layer.init_state(batch_size, self.dtype) for layer in self._layers(half))

    def __call__(
        self, audio: ArrayLike, padding_mask: ArrayLike | None = None, num_quantizers: int | None = None
    ) -> MimiOutput:
        """Encode and decode. Arguments are those of `encode`. The audio is as long as the input."""
        audio = as_array("audio", audio)
        codes, codes_mask = encode(self, audio, padding_mask, num_quantizers)
        if padding_mask is None:
            with transfers_allowed():
                padding_mask = jnp.ones((codes.shape[0], audio.shape[2]), bool)
        return MimiOutput(codes, codes_mask, decode(self, codes, padding_mask).audio_values)


@Compiled
def encode(
    model: Mimi,
    audio: ArrayLike,
    padding_mask: ArrayLike | None = None,
    num_quantizers: int | None = None,
) -> EncoderOutput:
    """Encode clips.

    Each row gets the codes that it would get alone. Other rows and the values in its padding do not matter,
    even if they are NaN. `transformers` (5.23) gives the same codes for the clip alone.

    Args:
        audio: float [batch, channels, samples] in [-1, 1], at `config.sampling_rate`, of any length.
        padding_mask: bool or int [batch, samples] or [batch, 1, samples], 1 where a sample is real. A row
            ends with its last real sample. Samples that are masked before that count as silence.
        num_quantizers: how many codebooks to use, the first ones; None for all.

    Returns:
        `audio_codes` int32 [batch, codebooks, frames], semantic first and 0 outside the mask, and
        `audio_codes_mask` bool [batch, frames], with frames = ceil(samples / frame_size).

    Raises:
        ValueError: another shape or dtype, more codebooks than the model has, or no encoder.
        TypeError: a list.
    """
    _, latents, lengths = model._encode_latents(audio, padding_mask)
    return EncoderOutput(*_quantize_real(model, latents, lengths, num_quantizers))


def _quantize_real(
    model: Mimi, latents: jax.Array, lengths: jax.Array | None, num_quantizers: int | None
) -> tuple[jax.Array, jax.Array]:
    codes = model.quantize(latents, num_quantizers)
    batch, _, frames = codes.shape
    if lengths is None:
        return codes, jnp.ones((batch, frames), bool)
    mask = is_real(lengths, frames)
    return jnp.where(mask[:, None, :], codes, 0), mask


@Compiled
def decode(model: Mimi, audio_codes: ArrayLike, padding_mask: ArrayLike | None = None) -> DecoderOutput:
    """Decode codes to audio.

    Args:
        audio_codes: int [batch, codebooks, frames], of all codebooks or of the first ones. A code outside
            [0, codebook_size) turns the audio of its row into NaN.
        padding_mask: that of the audio that was encoded, as for `encode`. The audio is cut to the length of
            the mask. Codes after the end of a row are ignored, and its audio is zero there.

    Returns:
        `audio_values` float [batch, channels, samples], with `config.frame_size` samples for each frame.

    Raises:
        ValueError: another shape or dtype, more codebooks than the model has, or no decoder.
        TypeError: a list.
    """
    codes = check_codes(audio_codes)
    if padding_mask is None:
        return DecoderOutput(model.decode_latents(model.dequantize(codes)))
    mask, lengths = check_mask_of_codes(model.config, padding_mask, codes)
    frames = ceil_div(lengths, model.config.frame_size)
    codes = jnp.where(is_real(frames, codes.shape[2])[:, None, :], codes, 0)
    audio = model._decode_latents(model.dequantize(codes), frames)[1][:, :, : mask.shape[1]]
    return DecoderOutput(jnp.where(is_real(lengths, audio.shape[2])[:, None, :], audio, 0))


@Compiled
def encode_step(
    model: Mimi,
    state: EncoderState,
    audio: ArrayLike,
    padding_mask: ArrayLike | None = None,
    num_quantizers: int | None = None,
    active: ArrayLike | None = None,
) -> tuple[EncoderState, jax.Array]:
    """Encode the next whole frames of a batch of streams.

    The codes are those of `encode` on the whole clip, whatever the sizes of the steps.

    Args:
        state: from `init_encoder_state`, then from the step before.
        audio: float [batch, channels, samples]. `samples` is a positive multiple of `config.frame_size`.
        padding_mask: as for `encode`. If the mask of a row ends inside the step, the stream ends there, with
            the last frame that `encode` would give. Reset the row before it is used again.
        num_quantizers: how many codebooks to use, the first ones; None for all.
        active: bool [batch]. Rows that are False, or that have no real sample in this step, keep their
            state, and their codes are 0. None for all rows.

    Returns:
        The state for the next step, and int32 codes [batch, codebooks, samples / frame_size].

    Raises:
        ValueError: another shape or dtype, a state of something else, or a model that cannot stream.
    """
    check_whole_frames(model.config, audio)
    state, latents, lengths = model._encode_latents(audio, padding_mask, state, active)
    return state, _quantize_real(model, latents, lengths, num_quantizers)[0]


@Compiled
def decode_step(
    model: Mimi, state: DecoderState, audio_codes: ArrayLike, active: ArrayLike | None = None
) -> tuple[DecoderState, jax.Array]:
    """Decode the next frames of a batch of streams.

    The audio is that of `decode` on the whole clip, whatever the sizes of the steps.

    Args:
        state: from `init_decoder_state`, then from the step before.
        audio_codes: int [batch, codebooks, frames], of all codebooks or of the first ones.
        active: bool [batch]. Rows that are False keep their state, and their audio is 0. None for all rows.

    Returns:
        The state for the next step, and float audio [batch, channels, frames * frame_size].

    Raises:
        ValueError: another shape or dtype, a state of something else, or a model that cannot stream.
    """
    latents = model.dequantize(audio_codes)
    lengths = lengths_of_active(active, None, *latents.shape[:2])
    state, audio = model._decode_latents(latents, lengths, state)
    return state, audio if lengths is None else jnp.where(lengths[:, None, None] > 0, audio, 0)
