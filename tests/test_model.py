"""The public functions of a model: shapes, dtypes, and what they refuse."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mimi_jax
from mimi_jax import checkpoint, config
from mimi_jax.config import MimiConfig
from mimi_jax.model import EncoderOutput, Mimi
from mimi_jax.nn import transformer
from tests.models import load_fixture, relative_error

MODEL, CLIPS = load_fixture("base")  # 4 codebooks of 16 codes, frames of 16 samples
LONG, PARTIAL, _ = CLIPS  # two rows of 16 whole frames; of 119 samples, 8 frames
AUDIO, CODES = LONG.audio, LONG.audio_codes
STEREO = checkpoint.abstract_model(load_fixture("stereo").model.config)


def test_encode():
    out = mimi_jax.encode(MODEL, PARTIAL.audio)
    assert (out.audio_codes.dtype, out.audio_codes_mask.dtype) == (jnp.int32, jnp.bool)
    np.testing.assert_array_equal(out.audio_codes, PARTIAL.audio_codes)
    np.testing.assert_array_equal(out.audio_codes_mask, np.ones((2, 8)))


def test_fewer_codebooks_are_the_first_ones():
    codes = mimi_jax.encode(MODEL, PARTIAL.audio, num_quantizers=2).audio_codes
    np.testing.assert_array_equal(codes, PARTIAL.audio_codes[:, :2])
    assert mimi_jax.decode(MODEL, codes).audio_values.shape == (2, 1, 128)


def test_decode():
    audio = mimi_jax.decode(MODEL, CODES).audio_values
    assert audio.dtype == jnp.float32
    assert relative_error(audio, LONG.audio_values) < 1e-5


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.uint8])
def test_codes_are_integers_of_any_width(dtype: type):
    audio = jax.eval_shape(mimi_jax.decode, MODEL, CODES.astype(dtype)).audio_values
    assert (audio.shape, audio.dtype) == ((2, 1, 256), jnp.float32)


def test_the_model_is_a_function_that_keeps_the_length():
    out = MODEL(PARTIAL.audio)
    np.testing.assert_array_equal(out.audio_codes, PARTIAL.audio_codes)
    assert out.audio_values.shape == PARTIAL.audio.shape
    assert relative_error(out.audio_values, PARTIAL.audio_values[:, :, :119]) < 1e-5
    assert out.audio_codes_mask.shape == (2, 8)


def test_activations():
    values = {
        "gelu": (-0.158655, 0.841345),
        "gelu_new": (-0.158808, 0.841192),
        "gelu_pytorch_tanh": (-0.158808, 0.841192),
        "relu": (0, 1),
        "silu": (-0.268941, 0.731059),
        "swish": (-0.268941, 0.731059),
    }
    assert tuple(values) == config.ACTIVATIONS
    for name, expected in values.items():
        np.testing.assert_allclose(transformer.ACTIVATIONS[name](jnp.array([-1.0, 1.0])), expected, atol=1e-6)


def test_every_matrix_product_is_exact_float32():
    """On GPUs and TPUs the default would be TF32 or bfloat16."""
    for lowered in (mimi_jax.encode.lower(MODEL, AUDIO), mimi_jax.decode.lower(MODEL, CODES)):
        lines = lowered.as_text().splitlines()
        products = [line for line in lines if "dot_general" in line or "stablehlo.convolution" in line]
        assert len(products) > 20
        assert all("HIGHEST" in line for line in products)


@pytest.mark.parametrize(
    ("num_samples", "frames"),
    [(0, 0), (1, 1), (16, 1), (17, 2), (2**24 + 1, 2**20 + 1), (16 * 10**30 + 1, 10**30 + 1)],
)
def test_encoded_length_is_exact(num_samples: int, frames: int):
    assert MODEL.encoded_length(num_samples) == frames


def test_encoded_length_of_arrays():
    lengths = jnp.array([0, 1, 16, 17, 2**24 + 1])
    np.testing.assert_array_equal(MODEL.encoded_length(lengths), [0, 1, 1, 2, 2**20 + 1])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("xp", [np, jnp])
def test_encoded_length_of_other_integers(xp: Any, dtype: str):
    with jax.enable_x64(dtype == "uint64"):
        lengths = xp.asarray([0, 1, 16, 17, 100], dtype)
        np.testing.assert_array_equal(MODEL.encoded_length(lengths), [0, 1, 1, 2, 7])
        np.testing.assert_array_equal(Mimi.from_pretrained("mini").encoded_length(lengths), [0, 1, 1, 1, 1])


@pytest.mark.parametrize(("length", "padded"), [(1, 16), (15, 16), (16, 16), (17, 32)])
def test_pad_to_frame(length: int, padded: int):
    audio = AUDIO[:, :, :length]
    for array in (audio, jnp.asarray(audio), audio[0, 0]):
        result = np.asarray(mimi_jax.pad_to_frame(array, MODEL.config))
        assert result.shape == (*array.shape[:-1], padded)
        np.testing.assert_array_equal(result[..., :length], array)
        assert not result[..., length:].any()


def test_in_bfloat16_the_quantizer_stays_float32():
    model = MODEL.astype(jnp.bfloat16)
    assert (MODEL.dtype, model.dtype) == (jnp.float32, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.quantizer)} == {jnp.dtype("float32")}
    assert jax.eval_shape(Mimi.encode_latents, model, AUDIO).dtype == jnp.bfloat16
    codes = mimi_jax.encode(model, AUDIO).audio_codes
    assert (np.asarray(codes) == CODES).mean() > 0.8
    audio = mimi_jax.decode(model, CODES).audio_values
    assert audio.dtype == jnp.bfloat16
    assert relative_error(audio, LONG.audio_values) < 0.02
    state = model.init_encoder_state(2)
    assert jax.eval_shape(mimi_jax.encode_step, model, state, AUDIO)[0] == jax.eval_shape(lambda: state)


def test_a_random_model_starts_as_configured():
    """Only the encoder: each shape of random numbers takes long to compile."""
    tiny = MimiConfig(
        hidden_size=8,
        num_filters=4,
        upsampling_ratios=(2,),
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=8,
        codebook_size=16,
        codebook_dim=8,
        vector_quantization_hidden_dimension=8,
        num_quantizers=2,
        upsample_groups=8,
        layer_scale_initial_scale=0.25,
    )
    model = Mimi(tiny, rngs=nnx.Rngs(0), decoder=False)
    assert model.encoder_transformer is not None
    np.testing.assert_array_equal(model.encoder_transformer.blocks[0].mlp_scale, np.full(8, 0.25))
    np.testing.assert_array_equal(model.quantizer.semantic.embedding, model.quantizer.semantic.embedding_sum)
    codes = mimi_jax.encode(model, np.ones((1, 1, 10), np.float32)).audio_codes
    assert codes.shape == (1, 2, 3)
    assert 0 <= np.min(codes) <= np.max(codes) < 16


BAD_AUDIO: list[tuple[Any, dict, str]] = [
    (AUDIO[0], {}, r"audio must be \[batch, channels=1, samples > 0\], got \[1, 256\]"),
    (AUDIO.repeat(2, axis=1), {}, r"audio must be \[batch, channels=1, samples > 0\], got \[2, 2, 256\]"),
    (AUDIO[:, :, :0], {}, r"samples > 0\], got \[2, 1, 0\]"),
    (
        AUDIO.astype(np.int16),
        {},
        r"audio must be floating point in \[-1, 1\], got int16; divide int16 by 32768",
    ),
    (AUDIO, {"padding_mask": np.ones((2, 255))}, "padding_mask must cover 256 samples, got 255"),
    (AUDIO, {"padding_mask": np.ones((3, 256))}, r"padding_mask must be \[batch=2, .*, got \[3, 256\]"),
    (AUDIO, {"padding_mask": np.ones((2, 2, 256))}, r"padding_mask must be \[batch=2, .*, got \[2, 2, 256\]"),
    (AUDIO, {"padding_mask": np.ones(256)}, r"padding_mask must be \[batch=2, .*, got \[256\]"),
]


@pytest.mark.parametrize(("audio", "options", "message"), BAD_AUDIO)
def test_bad_audio_is_refused(audio: Any, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        mimi_jax.encode(MODEL, audio, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mimi_jax.encode(MODEL, [AUDIO, AUDIO]), "audio must be an array .* list; .* pad_batch for"),
        (
            lambda: mimi_jax.decode(MODEL, EncoderOutput(*map(jnp.asarray, (CODES, CODES > 0)))),
            r"got EncoderOutput; .* out.audio",
        ),
    ],
)
def test_what_is_no_array_is_refused(call: Callable, message: str):
    with pytest.raises(TypeError, match=message):
        call()


def test_mono_is_not_stereo():
    with pytest.raises(ValueError, match="channels=2"):
        jax.eval_shape(mimi_jax.encode, STEREO, AUDIO)


@pytest.mark.parametrize("count", [0, 5, 99, -1, True, np.True_, 2.0, "2", np.int64(5)])
def test_bad_numbers_of_codebooks_are_refused(count: Any):
    message = (
        "num_quantizers must be an integer from 1 to 4, the codebooks of this model (axis 1 of codes),"
        f" got {count!r}"
    )
    for function in (
        lambda: mimi_jax.encode(MODEL, AUDIO, num_quantizers=count),
        lambda: MODEL.quantize(LONG.latents, count),
    ):
        with pytest.raises(ValueError) as error:
            function()
        assert str(error.value) == message


def test_every_semantic_codebook_is_needed():
    model, clips = load_fixture("semantic2")
    with pytest.raises(ValueError, match=r"num_quantizers must be an integer from 2 to 4, .*, got 1"):
        mimi_jax.encode(model, clips[0].audio, num_quantizers=1)


@pytest.mark.parametrize(
    ("latents", "found"),
    [
        (np.zeros((5, 16), np.float32), r"float32 \[5, 16\]"),
        (np.zeros((2, 16, 5), np.float32), r"float32 \[2, 16, 5\]"),
        (np.zeros((2, 5, 16), np.int32), r"int32 \[2, 5, 16\]"),
    ],
)
def test_bad_latents_are_refused(latents: np.ndarray, found: str):
    for function in (MODEL.quantize, MODEL.decode_latents):
        with pytest.raises(ValueError, match=rf"latents must be float .*hidden_size=16\], got {found}"):
            function(latents)


@pytest.mark.parametrize("dtype", [jnp.int8, bool])
def test_a_model_is_of_floats(dtype: Any):
    for function in (MODEL.astype, lambda dtype: Mimi.from_pretrained("mini", dtype=dtype)):
        with pytest.raises(ValueError, match=r'dtype must be floating point, .*weights="int8"'):
            function(dtype)


@pytest.mark.parametrize("samples", [16, 240, 257, 1000])
def test_the_mask_of_codes_is_that_of_their_audio(samples: int):
    with pytest.raises(ValueError, match=f"16 samples for each of 16 frames .*, got {samples} samples"):
        mimi_jax.decode(MODEL, CODES, np.ones((2, samples), bool))


BAD_CODES = [
    (CODES[0], r"codes must be integers \[batch, codebooks, frames\], got int32 \[4, 16\]"),
    (
        CODES.astype(np.float32),
        r"codes must be integers \[batch, codebooks, frames\], got float32 \[2, 4, 16\]",
    ),
    (CODES > 0, "got bool"),
    (CODES[:, :0], "num_quantizers must be an integer from 1 to 4, .*, got 0"),
    (CODES.repeat(2, axis=1), "num_quantizers must be an integer from 1 to 4, .*, got 8"),
]


@pytest.mark.parametrize(("codes", "message"), BAD_CODES)
def test_bad_codes_are_refused(codes: np.ndarray, message: str):
    state = MODEL.init_decoder_state(2)
    for function in (
        lambda: mimi_jax.decode(MODEL, codes),
        lambda: mimi_jax.decode(MODEL, codes, np.ones((2, 256))),
        lambda: mimi_jax.decode_step(MODEL, state, codes),
        lambda: MODEL.dequantize(codes),
    ):
        with pytest.raises(ValueError, match=message):
            function()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (0, r"audio must be \[batch, channels=1, samples > 0\], got \[2, 1, 0\]"),
        (1, "samples must be a positive multiple of frame_size=16, got 1; pad the last frame and mark it"),
        (17, "samples must be a positive multiple of frame_size=16, got 17; pad the last frame and mark it"),
    ],
)
def test_a_step_takes_whole_frames(samples: int, message: str):
    with pytest.raises(ValueError, match=message):
        mimi_jax.encode_step(MODEL, MODEL.init_encoder_state(2), AUDIO[:, :, :samples])


def test_a_step_takes_no_scalar():
    with pytest.raises(ValueError, match=r"audio must be \[batch, channels=1, samples > 0\], got \[\]"):
        mimi_jax.encode_step(MODEL, MODEL.init_encoder_state(1), np.float32(0))


def test_a_step_of_no_frames_gives_no_audio():
    state = MODEL.init_decoder_state(2)
    after, audio = jax.eval_shape(mimi_jax.decode_step, MODEL, state, CODES[:, :, :0])
    assert audio.shape == (2, 1, 0)
    assert after == jax.eval_shape(lambda: state)


@pytest.mark.parametrize("name", ["noncausal", "trim"])
def test_models_that_look_ahead_do_not_stream(name: str):
    model = checkpoint.abstract_model(load_fixture(name).model.config)
    for init_state in (model.init_encoder_state, model.init_decoder_state):
        with pytest.raises(ValueError, match="looks ahead and cannot stream; use encode and decode on whole"):
            init_state(1)


def test_half_a_model():
    no_encoder = checkpoint.abstract_model(MODEL.config, encoder=False)
    no_decoder = checkpoint.abstract_model(MODEL.config, decoder=False)
    for function in (
        lambda: jax.eval_shape(mimi_jax.encode, no_encoder, AUDIO),
        lambda: jax.eval_shape(no_encoder.encode_latents, AUDIO),
        lambda: no_encoder.init_encoder_state(1),
    ):
        with pytest.raises(ValueError, match="this model has no encoder; load it without encoder=False"):
            function()
    for function in (
        lambda: jax.eval_shape(mimi_jax.decode, no_decoder, CODES),
        lambda: jax.eval_shape(no_decoder.decode_latents, LONG.latents),
        lambda: no_decoder.init_decoder_state(1),
    ):
        with pytest.raises(ValueError, match="this model has no decoder; load it without decoder=False"):
            function()
    assert jax.eval_shape(mimi_jax.decode, no_encoder, CODES).audio_values.shape == AUDIO.shape
    assert jax.eval_shape(mimi_jax.encode, no_decoder, AUDIO).audio_codes.shape == CODES.shape


def test_a_model_has_at_least_one_half():
    with pytest.raises(ValueError, match="a model needs its encoder, its decoder or both, got neither"):
        checkpoint.abstract_model(MODEL.config, encoder=False, decoder=False)


def test_a_model_prints_on_one_page():
    model = Mimi.from_pretrained("mini")
    text = str(model)
    assert text == repr(model)
    assert text.splitlines()[0] == "Mimi: 24000 Hz, 12.5 frames a second, 32 codebooks of 256 codes, float32"
    assert len(text.splitlines()) == 8
    total = sum(int(line.split()[1].replace(",", "")) for line in text.splitlines()[1:])
    assert total == checkpoint.num_parameters(model)
    assert "decoder" not in str(Mimi.from_pretrained("mini", decoder=False))


def test_a_model_can_be_tabulated():
    model = load_fixture("base").model
    audio = jnp.zeros((1, 1, model.config.frame_size))
    table = nnx.tabulate(model, audio, console_kwargs={"force_terminal": False, "width": 200})
    for row in ("encoder_transformer/blocks/0", "quantizer", "Decoder"):
        assert row in table
