"""What users bring: arrays of every kind, empty batches, integers of any type, and strict settings of JAX.

All tests run with strict promotion of ranks and dtypes, see `conftest.py`.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mimi_jax
from mimi_jax import Mimi, StreamingDecoder, StreamingEncoder, export
from mimi_jax.boundary import as_array
from mimi_jax.model import decode, decode_step, encode, encode_step
from mimi_jax.streams.chunks import decode_chunks, encode_chunks
from tests.models import load_fixture, relative_error

MODEL, CLIPS = load_fixture("base")
AUDIO, LATENTS, CODES, VALUES = CLIPS[0]  # two rows of 16 frames of 16 samples
MASK = np.arange(256) < np.array([[256], [100]])
FRAMES = 7  # of the second row


class Foreign:
    """An array of another library, which NumPy can read."""

    def __init__(self, array: np.ndarray):
        self._array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._array.astype(self._array.dtype if dtype is None else dtype)


class OnlyDLPack:
    """An array that NumPy cannot read, such as a torch tensor in bfloat16."""

    def __init__(self, array: np.ndarray):
        self._array = jnp.asarray(array)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Got unsupported ScalarType BFloat16")

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._array.__dlpack__(*args, **kwargs)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()  # pyright: ignore[reportAttributeAccessIssue]


def big_endian(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder(">"))


def steps(bring: Callable) -> tuple[jax.Array, jax.Array]:
    active = np.array([True, True])
    _, codes = encode_step(MODEL, MODEL.init_encoder_state(2), bring(AUDIO), active=bring(active))
    return codes, decode_step(MODEL, MODEL.init_decoder_state(2), bring(CODES), bring(active))[1]


# Each gives all codes and audio, or only audio, that the fixture holds.
FUNCTIONS: dict[str, Callable[[Callable], tuple]] = {
    "encode": lambda bring: (encode(MODEL, bring(AUDIO)).audio_codes, None),
    "decode": lambda bring: (None, decode(MODEL, bring(CODES)).audio_values),
    "call": lambda bring: (MODEL(bring(AUDIO)).audio_codes, MODEL(bring(AUDIO)).audio_values),
    "steps": steps,
    "latents": lambda bring: (
        MODEL.quantize(bring(np.asarray(MODEL.encode_latents(bring(AUDIO))))),
        MODEL.decode_latents(bring(np.asarray(MODEL.dequantize(bring(CODES))))),
    ),
    "push": lambda bring: (
        StreamingEncoder(MODEL, 2).push(bring(AUDIO)),
        StreamingDecoder(MODEL, 2).push(bring(CODES)),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bring", [big_endian, Foreign, OnlyDLPack])
def test_arrays_of_every_kind(bring: Callable, name: str):
    """The functions have seen native arrays of the same shapes before."""
    FUNCTIONS[name](lambda array: array)
    codes, audio = FUNCTIONS[name](bring)
    if codes is not None:
        np.testing.assert_array_equal(codes, CODES)
    if audio is not None:
        assert relative_error(audio, VALUES) < 1e-5


@pytest.mark.parametrize("bring", [big_endian, Foreign, OnlyDLPack])
def test_masks_of_every_kind(bring: Callable):
    expected, audio = encode(MODEL, AUDIO, MASK), decode(MODEL, CODES, MASK).audio_values
    mask = bring(MASK.astype(np.int32))
    np.testing.assert_array_equal(encode(MODEL, AUDIO, mask).audio_codes, expected.audio_codes)
    np.testing.assert_array_equal(decode(MODEL, CODES, mask).audio_values, audio)
    assert int(expected.audio_codes_mask.sum()) == 16 + FRAMES


def test_big_endian_arrays_elsewhere():
    state = MODEL.init_encoder_state(2)
    state, _ = encode_step(MODEL, state, AUDIO)
    second = mimi_jax.take_rows(state, np.array([1], ">i4"))
    for a, b in zip(jax.tree.leaves(second), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a[0], b[1])
    (codes, _), *_ = encode_chunks(MODEL, [big_endian(AUDIO[0, :, :100]), AUDIO[0, :, 100:]])
    np.testing.assert_array_equal(codes, CODES[0])
    padded = mimi_jax.pad_to_frame(big_endian(AUDIO[:, :, :17]), MODEL.config)
    np.testing.assert_array_equal(padded[:, :, :17], AUDIO[:, :, :17])


def test_tensors_of_torch():
    torch = pytest.importorskip("torch")
    audio, codes = torch.tensor(AUDIO), torch.tensor(CODES, dtype=torch.int64)
    np.testing.assert_array_equal(encode(MODEL, audio, torch.tensor(MASK)).audio_codes[0], CODES[0])
    assert relative_error(decode(MODEL, codes).audio_values, VALUES) < 1e-5
    half = encode(MODEL, AUDIO.astype(jnp.bfloat16)).audio_codes
    np.testing.assert_array_equal(encode(MODEL, audio.bfloat16()).audio_codes, half)
    np.testing.assert_array_equal(StreamingEncoder(MODEL, 2).push(audio.bfloat16()), half)
    with pytest.raises(
        TypeError, match=r"audio cannot be read as an array: .* requires grad. Use tensor.detach"
    ):
        encode(MODEL, audio.requires_grad_())


REFUSED = [
    (lambda bad: encode(MODEL, bad(AUDIO)), "audio"),
    (lambda bad: encode(MODEL, AUDIO, bad(MASK)), "padding_mask"),
    (lambda bad: decode(MODEL, bad(CODES)), "audio_codes"),
    (lambda bad: decode(MODEL, CODES, bad(MASK)), "padding_mask"),
    (lambda bad: MODEL(bad(AUDIO)), "audio"),
    (lambda bad: MODEL.encode_latents(AUDIO, bad(MASK)), "padding_mask"),
    (lambda bad: MODEL.dequantize(bad(CODES)), "codes"),
    (lambda bad: MODEL.quantize(bad(LATENTS)), "latents"),
    (lambda bad: encode_step(MODEL, (), AUDIO, active=bad(MASK[:, 0])), "active"),
    (lambda bad: decode_step(MODEL, (), CODES, bad(MASK[:, 0])), "active"),
    (lambda bad: mimi_jax.pad_to_frame(bad(AUDIO), MODEL.config), "audio"),
]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (lambda array: array.tolist(), "must be an array of NumPy, JAX or torch, got list; use np.array for"),
        (lambda array: array.astype(str), "must be an array of numbers, got <U"),
        (lambda array: array.astype(object), "must be an array of numbers, got object"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused_by_name(bad: Callable, problem: str):
    for call, name in REFUSED:
        with pytest.raises(TypeError, match=f"^{name} {problem}"):
            call(bad)


def test_integers_of_64_bits_keep_their_values():
    """JAX would drop their upper half."""
    values = np.array([2**32, -(2**32), 2**40 + 5, 7, -1])
    np.testing.assert_array_equal(as_array("codes", values), [2**31 - 1, -1, 2**31 - 1, 7, -1])
    unsigned = as_array("codes", np.array([2**64 - 1, 7], np.uint64))
    np.testing.assert_array_equal(unsigned, [2**31 - 1, 7])
    audio = decode(MODEL, CODES.astype(np.int64) + 2**32).audio_values
    assert np.isnan(audio).all()
    with jax.enable_x64(True):
        codes = jnp.asarray(CODES, jnp.int64) + 2**32
        assert np.isnan(decode(MODEL, codes).audio_values).all()


@pytest.mark.parametrize("count", [2, np.int64(2), np.uint8(2), np.array(2), jnp.array(2)])
def test_numbers_of_codebooks_are_integers_of_any_type(count: Any):
    np.testing.assert_array_equal(encode(MODEL, AUDIO, num_quantizers=count).audio_codes, CODES[:, :2])
    assert MODEL.quantize(LATENTS, count).shape == (2, 2, 16)
    batch_size: Any = np.int64(2)
    assert StreamingEncoder(MODEL, batch_size, count).num_quantizers == 2


def test_a_traced_number_of_codebooks_is_refused():
    with pytest.raises(ValueError, match=r"num_quantizers must be an integer from 1 to 4, .*, got JitTracer"):
        jax.jit(lambda count: encode(MODEL, AUDIO, num_quantizers=count))(2)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("base", jnp.float32),
        pytest.param("noncausal", jnp.float32, marks=pytest.mark.slow),
        pytest.param("base", jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_an_empty_batch_gives_empty_results(name: str, dtype: Any):
    model = load_fixture(name).model.astype(dtype)
    size = model.config.frame_size
    audio = np.zeros((0, 1, 16 * size - 3), np.float32)
    for mask in (None, np.ones((0, 16 * size - 3))):
        codes, codes_mask = encode(model, audio, mask)
        assert (codes.shape, codes.dtype, codes_mask.shape) == ((0, 4, 16), jnp.int32, (0, 16))
        values = decode(model, codes, mask).audio_values
        assert (values.shape, values.dtype) == ((0, 1, 16 * size - (0 if mask is None else 3)), dtype)
    assert model(audio).audio_values.shape == audio.shape
    assert model.quantize(model.encode_latents(audio)).shape == (0, 4, 16)
    assert model.decode_latents(model.dequantize(CODES[:0])).shape == (0, 1, 16 * size)


def test_an_empty_batch_of_streams():
    state, codes = encode_step(MODEL, MODEL.init_encoder_state(0), AUDIO[:0], active=np.ones(0, bool))
    assert codes.shape == (0, 4, 16)
    none = np.zeros(0, int)
    for after in (
        mimi_jax.reset_rows(state, np.zeros(0, bool)),
        mimi_jax.take_rows(MODEL.init_encoder_state(2), none),
        mimi_jax.put_rows(state, none, state),
    ):
        assert jax.eval_shape(lambda after=after: after) == jax.eval_shape(lambda: state)
    assert decode_step(MODEL, MODEL.init_decoder_state(0), codes)[1].shape == (0, 1, 256)


@pytest.fixture(params=["transfer guard", pytest.param("x64", marks=pytest.mark.slow)])
def setting(request: pytest.FixtureRequest) -> Any:
    return jax.enable_x64(True) if request.param == "x64" else jax.transfer_guard("disallow")


def test_encode_decode_and_steps_under_a_strict_setting(setting: Any):
    audio, codes, mask = jax.device_put((AUDIO, CODES, MASK))
    with setting:
        coded, decoded = encode(MODEL, audio).audio_codes, decode(MODEL, codes).audio_values
        masked, values = encode(MODEL, audio, mask), decode(MODEL, codes, mask)
        output = MODEL(audio)
        latents = MODEL.decode_latents(MODEL.encode_latents(audio))
        state, stepped = encode_step(MODEL, MODEL.init_encoder_state(2), audio)
        state = mimi_jax.reset_rows(state, [False, True])
        state = mimi_jax.put_rows(state, [0], mimi_jax.take_rows(state, 1))
        _, again = encode_step(MODEL, state, audio)
        _, step_audio = decode_step(MODEL, MODEL.init_decoder_state(2), codes)
        padded = mimi_jax.pad_to_frame(audio, MODEL.config)
    for found in (coded, output.audio_codes, stepped, again):
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, CODES)
    assert np.asarray(masked.audio_codes)[1, :, FRAMES:].max() == 0
    for found in (decoded, output.audio_values, step_audio, latents, padded, values.audio_values):
        assert (found.shape, found.dtype) == (AUDIO.shape, jnp.float32)
    for found in (decoded, output.audio_values, step_audio):
        assert relative_error(found, VALUES) < 1e-5


def test_streams_under_a_strict_setting(setting: Any, tmp_path: Path):
    other = load_fixture("noncausal").model
    with setting:
        encoder, decoder = StreamingEncoder(MODEL, 2), StreamingDecoder(MODEL, 2)
        encoder.warmup()
        codes, audio = encoder.push(AUDIO[:, :, :-1]), decoder.push(CODES)
        last = encoder.flush()
        (chunk, _), *_ = encode_chunks(MODEL, [AUDIO[0]])
        (sound,) = decode_chunks(MODEL, [CODES[0]])
        for piece, _ in encode_chunks(other, [AUDIO[0]]):
            assert piece.shape == (4, 13)
        for piece in decode_chunks(other, [CODES[0]]):
            assert piece.shape == (1, 320)
        state = MODEL.init_encoder_state(2)
        mimi_jax.save_state(tmp_path / "state.safetensors", state)
        mimi_jax.load_state(tmp_path / "state.safetensors", state)
    assert codes is not None and last is not None and audio is not None
    np.testing.assert_array_equal(np.concatenate([codes, last], axis=2)[:, :, :15], CODES[:, :, :15])
    np.testing.assert_array_equal(chunk, CODES[0])
    assert relative_error(audio, VALUES) < 1e-5
    assert relative_error(sound, VALUES[0]) < 1e-5


class OnDevice(Foreign):
    """An array that goes to the host only where that is allowed, as an array on a GPU does."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        assert jax.config.jax_transfer_guard_device_to_host == "allow"  # pyright: ignore[reportAttributeAccessIssue]
        return super().__array__(dtype, copy)


def test_streams_take_arrays_on_a_device_under_a_transfer_guard():
    audio: Any = OnDevice(AUDIO[0])
    with jax.transfer_guard("disallow"):
        pushed = StreamingEncoder(MODEL, 2).push(OnDevice(AUDIO))
        decoded = StreamingDecoder(MODEL, 2).push(OnDevice(CODES))
        (chunk, _), *_ = encode_chunks(MODEL, [audio])
    assert pushed is not None and decoded is not None
    np.testing.assert_array_equal(pushed, CODES)
    np.testing.assert_array_equal(chunk, CODES[0])
    assert relative_error(decoded, VALUES) < 1e-5


def test_files_under_a_strict_setting(setting: Any, tmp_path: Path):
    path = tmp_path / "mimi.zip"
    audio, codes = jax.device_put((AUDIO, CODES))
    frame = jax.device_put(AUDIO[:, :, :16])
    batch_size: Any = np.int64(2)
    with setting:
        seconds = 256 / MODEL.config.sampling_rate
        export.save(MODEL, path, batch_size=batch_size, seconds=seconds, platforms=("cpu",))
        codec = export.load(path)
        coded, decoded = codec.encode(audio).audio_codes, codec.decode(codes).audio_values
        _, stepped = codec.encode_step(codec.init_encoder_state(), frame)
        MODEL.save_pretrained(tmp_path / "model")
        model = Mimi.from_pretrained(tmp_path / "model", num_quantizers=2)
    np.testing.assert_array_equal(coded, CODES)
    np.testing.assert_array_equal(stepped, CODES[:, :, :1])
    assert relative_error(decoded, VALUES) < 1e-5
    assert model.config.num_quantizers == 2


# functions that are compiled


def test_they_have_the_methods_of_jit():
    shapes = MODEL, jax.ShapeDtypeStruct(AUDIO.shape, AUDIO.dtype)
    calls: list[Any] = [encode.lower(*shapes).compile(), jax.export.export(encode)(*shapes).call]
    for call in calls:
        np.testing.assert_array_equal(call(MODEL, AUDIO).audio_codes, CODES)
    assert jax.eval_shape(MODEL.encode_latents, AUDIO).shape == LATENTS.shape


def test_a_jit_around_them_keeps_its_options():
    step = jax.jit(encode_step, donate_argnames="state")
    lowered = step.lower(MODEL, MODEL.init_encoder_state(2), AUDIO)
    assert "tf.aliasing_output" in lowered.as_text() or "jax.buffer_donor" in lowered.as_text()


def test_they_are_pickled_by_name():
    assert pickle.loads(pickle.dumps(encode)) is encode
    assert pickle.loads(pickle.dumps(Mimi.quantize)) is Mimi.quantize


PROGRAM = """
import jax
import numpy as np
import mimi_jax

model = mimi_jax.Mimi.from_pretrained("mini", num_quantizers=8)
audio = jax.device_put(np.random.default_rng(0).normal(0, 0.1, (1, 1, 1920)).astype(np.float32))
codes = mimi_jax.encode(model, audio).audio_codes
mimi_jax.decode(model, codes)
assert np.array_equal(mimi_jax.encode_step(model, model.init_encoder_state(1), audio)[1], codes)
assert np.array_equal(mimi_jax.StreamingEncoder(model).push(np.asarray(audio)), codes)
assert mimi_jax.StreamingDecoder(model).push(np.asarray(codes)).shape == (1, 1, 1920)
"""


@pytest.mark.slow
def test_all_settings_at_once_in_a_fresh_process():
    settings = {
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_ENABLE_X64": "true",
        "JAX_TRANSFER_GUARD": "disallow",
    }
    subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | settings, check=True)
