"""Pieces of any length give the codes and the audio of the whole clip."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mimi_jax
from mimi_jax import Mimi, StreamingDecoder, StreamingEncoder
from mimi_jax.streams import push as push_module
from tests.models import load_fixture, noise, relative_error
from tests.streams.compilations import count_compilations

MODEL = load_fixture("base").model
FRAME, CODEBOOKS = MODEL.config.frame_size, MODEL.config.num_quantizers
STEREO = load_fixture("stereo").model


def push_all(encoder: StreamingEncoder, audio: np.ndarray, seed: int = 0) -> np.ndarray:
    """Push audio [..., samples] in random pieces, some of them empty, flush, and return all codes."""
    generator, codes, start = np.random.default_rng(seed), [], 0
    while start < audio.shape[-1]:
        size = int(generator.choice([0, 1, FRAME - 1, FRAME, 5 * FRAME + 3, 20 * FRAME]))
        codes.append(encoder.push(audio[..., start : start + size]))
        start += size
    codes.append(encoder.flush())
    return np.concatenate([part for part in codes if part is not None], axis=2)


@pytest.mark.parametrize("num_samples", [1, FRAME - 1, FRAME, FRAME + 1, 421, 2407, 100 * FRAME])
def test_pieces_give_the_codes_of_the_whole_clip(num_samples: int):
    audio = noise(num_samples, seed=num_samples)
    whole = mimi_jax.encode(MODEL, audio[None, None]).audio_codes
    encoder = StreamingEncoder(MODEL)
    for seed in range(3):
        codes = push_all(encoder, audio, seed)
        assert codes.dtype == np.int32
        np.testing.assert_array_equal(codes, whole)
        encoder.reset()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_a_batch_of_stereo_streams_with_fewer_codebooks(dtype: Any):
    audio = noise(3, 2, 333).astype(dtype)
    codes = push_all(StreamingEncoder(STEREO, batch_size=3, num_quantizers=2), audio)
    expected = mimi_jax.encode(STEREO, audio.astype(np.float32), num_quantizers=2).audio_codes
    np.testing.assert_array_equal(codes, expected)


def test_a_frame_is_returned_with_its_last_sample():
    encoder, audio = StreamingEncoder(MODEL), noise(2 * FRAME)
    assert encoder.push(audio[:0]) is None
    assert encoder.push(audio[: FRAME - 1]) is None
    codes = encoder.push(audio[FRAME - 1 : FRAME])
    assert codes is not None and codes.shape == (1, CODEBOOKS, 1)
    codes = encoder.push(audio[FRAME:])
    assert codes is not None and codes.shape == (1, CODEBOOKS, 1)
    assert encoder.flush() is None


def test_what_a_push_gives_may_be_changed():
    encoder, decoder = StreamingEncoder(MODEL), StreamingDecoder(MODEL)
    results = [
        encoder.push(np.zeros(FRAME, np.float32)),
        encoder.push(np.zeros(FRAME + 1, np.float32)),
        encoder.flush(),
        decoder.push(np.zeros((CODEBOOKS, 1), np.int32)),
    ]
    for result in results:
        assert result is not None
        result[:] = 1


def test_pushed_audio_may_be_changed_afterwards():
    encoder, audio = StreamingEncoder(MODEL), noise(FRAME)
    piece = audio[:10].copy()
    encoder.push(piece)
    piece[:] = 1
    np.testing.assert_array_equal(
        encoder.push(audio[10:]), mimi_jax.encode(MODEL, audio[None, None]).audio_codes
    )


@pytest.mark.parametrize("pieces", [[1] * 23, [23], [0, 8, 1, 0, 14]])
@pytest.mark.parametrize("name", ["base", "stereo"])
def test_pieces_of_codes_give_the_audio_of_the_whole_clip(name: str, pieces: list[int]):
    model = load_fixture(name).model
    codes = np.random.default_rng(0).integers(0, 16, (1, 3, 23))
    whole = mimi_jax.decode(model, codes).audio_values
    decoder, audio = StreamingDecoder(model), []
    for piece in np.split(codes[0], np.cumsum(pieces)[:-1], axis=1):
        audio.append(decoder.push(piece))
        assert (audio[-1] is None) == (piece.shape[1] == 0)
    audio = np.concatenate([part for part in audio if part is not None], axis=2)
    assert audio.dtype == np.float32
    assert relative_error(audio, whole) < 1e-5
    decoder.reset()
    again = decoder.push(codes)
    assert again is not None
    assert relative_error(again, whole) < 1e-5


def test_a_batch_of_streams_is_decoded():
    codes = np.random.default_rng(0).integers(0, 16, (3, CODEBOOKS, 9), np.int32)
    audio = StreamingDecoder(MODEL, batch_size=3).push(codes)
    assert audio is not None
    assert relative_error(audio, mimi_jax.decode(MODEL, codes).audio_values) < 1e-5


def test_audio_of_a_bfloat16_model_is_float32():
    decoder = StreamingDecoder(MODEL.astype(jnp.bfloat16))
    audio = decoder.push(np.zeros((CODEBOOKS, 2), int))
    assert audio is not None and audio.dtype == np.float32


def on_a_device(model: Mimi) -> Mimi:
    """Committed to one device, which a loaded model is not."""
    return jax.device_put(model, jax.devices()[1])


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(lambda model: model, id="default", marks=pytest.mark.slow),
        pytest.param(on_a_device, id="committed"),
    ],
)
def test_after_a_warmup_nothing_compiles(place: Any):
    model = place(load_fixture("gqa").model)
    encoder, decoder = StreamingEncoder(model, num_quantizers=3), StreamingDecoder(model)
    encoder.push(noise(7))
    encoder.warmup()
    decoder.warmup(num_quantizers=3)
    with count_compilations() as compiled:
        codes = push_all(encoder, noise(421)[7:])
        decoder.push(codes)
        another = StreamingEncoder(model, num_quantizers=3)
        another.push(noise(421))
        another.flush()
    assert compiled == []


def test_a_warmup_does_not_change_the_stream():
    audio, encoder = noise(421), StreamingEncoder(MODEL)
    codes = [encoder.push(audio[:100])]
    encoder.warmup()
    codes += [encoder.push(audio[100:]), encoder.flush()]
    parts = [part for part in codes if part is not None]
    np.testing.assert_array_equal(
        np.concatenate(parts, axis=2), mimi_jax.encode(MODEL, audio[None, None]).audio_codes
    )


def test_streams_of_equal_models_share_programs():
    first, second = load_fixture("base").model, jax.tree.map(jnp.array, load_fixture("base").model)
    StreamingEncoder(first).warmup()
    with count_compilations() as compiled:
        StreamingEncoder(second).push(noise(9 * FRAME))
    assert compiled == []


@pytest.mark.parametrize(
    ("audio", "error"),
    [
        (noise(16, 1), r"audio must be \[batch=1, channels=1, samples\] or \[samples\], got \[16, 1\]"),
        (noise(1, 2, 16), r"audio must be \[batch=1, channels=1, samples\] .* got \[1, 2, 16\]"),
        (noise(2, 1, 16), r"audio must be \[batch=1, .* got \[2, 1, 16\]"),
        (np.float32(0), r"audio must be .* got \[\]"),
        (
            np.zeros(16, np.int16),
            r"audio must be floating point in \[-1, 1\], got int16; divide int16 by 32768",
        ),
        (np.zeros(16, bool), "audio must be floating point"),
        (np.array(["a"]), "audio must be floating point"),
        (np.full(16, np.nan), "audio has samples that are NaN or infinite"),
        (np.full(16, -np.inf), "audio has samples that are NaN or infinite"),
    ],
)
def test_bad_audio_is_refused_and_the_stream_goes_on(audio: Any, error: str):
    encoder, good = StreamingEncoder(MODEL), noise(421)
    first = encoder.push(good[:200])
    with pytest.raises(ValueError, match=error):
        encoder.push(audio)
    parts = [first, encoder.push(good[200:]), encoder.flush()]
    codes = np.concatenate([part for part in parts if part is not None], axis=2)
    np.testing.assert_array_equal(codes, mimi_jax.encode(MODEL, good[None, None]).audio_codes)


@pytest.mark.parametrize("shape", [(16,), (1, 1, 16), (2, 1, 16)])
def test_streams_of_several_rows_or_channels_take_three_axes(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"audio must be \[batch=2, channels=2, samples\], got"):
        StreamingEncoder(STEREO, batch_size=2).push(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("codes", "error"),
    [
        (np.zeros((CODEBOOKS, 2)), r"codes must be integers .* got float64 \[4, 2\]"),
        (
            np.zeros(CODEBOOKS, int),
            r"\[batch=1, codebooks, frames\] or \[codebooks, frames\], got int64 \[4\]",
        ),
        (np.zeros((2, CODEBOOKS, 2), int), r"codes must be integers \[batch=1, .* got int64 \[2, 4, 2\]"),
        (None, "codes must be integers .* got object"),
        (np.zeros((5, 2), int), "num_quantizers must be an integer from 1 to 4"),
        (np.zeros((0, 2), int), "num_quantizers must be an integer from 1 to 4"),
        (np.full((CODEBOOKS, 2), 16), r"codes must lie in \[0, 16\), got 16 to 16"),
        (np.full((CODEBOOKS, 2), -1), r"codes must lie in \[0, 16\), got -1 to -1"),
    ],
)
def test_bad_codes_are_refused_and_the_stream_goes_on(codes: Any, error: str):
    good = np.random.default_rng(0).integers(0, 16, (1, CODEBOOKS, 9))
    decoder = StreamingDecoder(MODEL)
    first = decoder.push(good[:, :, :4])
    with pytest.raises(ValueError, match=error):
        decoder.push(codes)
    second = decoder.push(good[:, :, 4:])
    assert first is not None and second is not None
    whole = mimi_jax.decode(MODEL, good).audio_values
    assert relative_error(np.concatenate([first, second], axis=2), whole) < 1e-5


def test_a_flushed_stream_must_be_reset():
    encoder, audio = StreamingEncoder(MODEL), noise(20)
    encoder.push(audio)
    encoder.flush()
    for call in (lambda: encoder.push(audio), encoder.flush):
        with pytest.raises(RuntimeError, match=r"the stream has ended with flush\(\); call reset\(\)"):
            call()
    encoder.reset()
    np.testing.assert_array_equal(
        push_all(encoder, audio), mimi_jax.encode(MODEL, audio[None, None]).audio_codes
    )


def test_a_stream_that_broke_off_must_be_reset(monkeypatch: pytest.MonkeyPatch):
    encoder, decoder = StreamingEncoder(MODEL), StreamingDecoder(MODEL)

    def interrupt(*_):
        raise KeyboardInterrupt

    for name in ("encode_frames", "decode_frames"):
        monkeypatch.setattr(push_module, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        encoder.push(noise(20))
    with pytest.raises(KeyboardInterrupt):
        decoder.push(np.zeros((CODEBOOKS, 1), int))
    monkeypatch.undo()
    for call in (
        lambda: encoder.push(noise(20)),
        encoder.flush,
        lambda: decoder.push(np.zeros((CODEBOOKS, 1), int)),
    ):
        with pytest.raises(RuntimeError, match=r"broke off in the middle of a push; call reset\(\)"):
            call()
    encoder.reset()
    assert encoder.push(noise(20)) is not None


def test_an_interrupt_after_the_last_step_stops_the_stream_too(monkeypatch: pytest.MonkeyPatch):
    """The state has changed, but the codes are lost. To continue would give wrong frames."""
    encoder = StreamingEncoder(MODEL)
    encoder.push(noise(5))
    step = encoder._step
    monkeypatch.setattr(encoder, "_step", lambda *args: (step(*args)[0], Interrupting()))
    with pytest.raises(KeyboardInterrupt):
        encoder.push(noise(20))
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="broke off"):
        encoder.push(noise(20))


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_push_waits_once_and_a_step_takes_one_array(direction: str, monkeypatch: pytest.MonkeyPatch):
    """All steps of a push are under way before the first result is fetched. A step starts one program, with
    one array from the host."""
    if direction == "encode":
        stream, pushed = StreamingEncoder(MODEL), noise(19 * FRAME)
    else:
        stream, pushed = StreamingDecoder(MODEL), np.zeros((CODEBOOKS, 19), int)
    stream.push(pushed)  # which takes the fresh state to the device
    name, events = f"{direction}_frames", []
    step = getattr(push_module, name)

    class Result:
        def __init__(self, array: jax.Array):
            self._array = array

        def __array__(self, *_, **__) -> np.ndarray:
            events.append("fetch")
            return np.asarray(self._array)

    def counted(*args: Any) -> tuple:
        from_host = [leaf for leaf in jax.tree.leaves(args[1:-1] if direction == "encode" else args[1:])]
        events.append(sum(not isinstance(leaf, jax.Array) for leaf in from_host))
        state, result = step(*args)
        return state, Result(result)

    monkeypatch.setattr(push_module, name, counted)
    with count_compilations() as compiled:
        stream.push(pushed)
    assert compiled == []
    assert events == [1] * 5 + ["fetch"] * 5  # 8, 8, 1, 1 and 1 frames


def test_an_encoder_does_without_the_decoder():
    encoder, decoder = StreamingEncoder(MODEL), StreamingDecoder(MODEL)
    for stream, halves in ((encoder, ("encoder", "upsample")), (decoder, ("decoder", "downsample"))):
        kept, dropped = halves
        model = jax.tree.unflatten(stream._structure, stream._parameters)
        assert getattr(model, kept) is not None and getattr(model, dropped) is None
    assert MODEL.encoder is not None and MODEL.decoder is not None


class Interrupting:
    """Codes that raise KeyboardInterrupt when they are converted to NumPy."""

    def __array__(self, *_, **__):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"batch_size": 1.0}, "batch_size must be a positive integer, got 1.0"),
        ({"num_quantizers": 0}, "num_quantizers must be an integer from 1 to 4"),
        ({"num_quantizers": 5}, "num_quantizers must be an integer from 1 to 4"),
    ],
)
def test_bad_options(options: dict[str, Any], error: str):
    with pytest.raises(ValueError, match=error):
        StreamingEncoder(MODEL, **options)


@pytest.mark.parametrize("stream", [StreamingEncoder, StreamingDecoder])
def test_models_that_cannot_stream(stream: Any):
    with pytest.raises(ValueError, match="looks ahead and cannot stream"):
        stream(load_fixture("noncausal").model)
    half = Mimi.from_pretrained(
        "mini", encoder=stream is StreamingDecoder, decoder=stream is StreamingEncoder
    )
    with pytest.raises(ValueError, match=r"this model has no (en|de)coder"):
        stream(half)
