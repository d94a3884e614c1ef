"""The streaming contract of the whole model; `test_contract.py` has that of its layers.

The oracle is what the references give for each clip alone (tests/fixtures), never this package itself.
"""

import collections
from typing import Any

import jax
import numpy as np
import pytest

from mimi_jax.model import Mimi, decode, decode_step, encode, encode_step
from mimi_jax.streams.rows import reset_rows
from tests.models import Clip, load_fixture, relative_error

MODEL, CLIPS = load_fixture("base")  # two rows, 16 frames of 16 samples, 6 attention windows
LONG, PARTIAL, SHORT = CLIPS
FRAME, NUM_FRAMES = MODEL.config.frame_size, 16
ROWS = np.array([True, False])


def frames(clip: Clip, index: int, count: int = 1) -> np.ndarray:
    """The audio of some frames."""
    return clip.audio[:, :, index * FRAME : (index + count) * FRAME]


def masked(model: Mimi, audio: np.ndarray, frames_per_step: int) -> tuple[np.ndarray, np.ndarray]:
    """Audio in whole steps, NaN after its end, and its mask."""
    missing = -audio.shape[2] % (frames_per_step * model.config.frame_size)
    mask = np.pad(np.ones(audio.shape[::2], bool), ((0, 0), (0, missing)))
    return np.pad(audio, ((0, 0), (0, 0), (0, missing)), constant_values=np.nan), mask


def encode_in_steps(model: Mimi, audio: np.ndarray, mask: np.ndarray | None, size: int) -> np.ndarray:
    state, codes = model.init_encoder_state(len(audio)), []
    for start in range(0, audio.shape[2], size):
        piece = slice(start, start + size)
        state, new = encode_step(model, state, audio[:, :, piece], None if mask is None else mask[:, piece])
        codes.append(new)
    return np.concatenate(codes, axis=2)


@pytest.mark.parametrize("count", [1, 2, 3, NUM_FRAMES])
def test_steps_of_any_size_give_the_codes_of_the_clip(count: int):
    codes = encode_in_steps(MODEL, LONG.audio, None, count * FRAME)
    np.testing.assert_array_equal(codes, LONG.audio_codes)


@pytest.mark.parametrize("count", [1, 2, 3, NUM_FRAMES])
def test_steps_of_any_size_give_the_audio_of_the_codes(count: int):
    state, audio = MODEL.init_decoder_state(2), []
    for start in range(0, NUM_FRAMES, count):
        state, new = decode_step(MODEL, state, LONG.audio_codes[:, :, start : start + count])
        audio.append(new)
    assert relative_error(np.concatenate(audio, axis=2), LONG.audio_values) < 1e-5


@pytest.mark.parametrize("name", ["base", "kyutai", "replicate", "shortcut", "slow_frames"])
def test_a_stream_that_ends_inside_a_frame_gives_the_codes_of_the_clip(name: str):
    model, clips = load_fixture(name)
    for clip in clips[1:]:
        audio, mask = masked(model, clip.audio, 1)
        codes = encode_in_steps(model, audio, mask, model.config.frame_size)
        np.testing.assert_array_equal(codes, clip.audio_codes)


def test_every_length_ends_with_the_codes_of_the_clip_alone():
    """Rows of 1 to 48 samples and NaN: as one ragged batch, in steps, and some of them alone."""
    lengths = np.arange(1, 3 * FRAME + 1)
    mask = np.arange(3 * FRAME) < lengths[:, None]
    audio = np.where(mask[:, None], LONG.audio[:1, :, : 3 * FRAME], np.float32(np.nan))
    whole = encode(MODEL, audio, mask)
    np.testing.assert_array_equal(encode_in_steps(MODEL, audio, mask, FRAME), whole.audio_codes)
    for length in (1, FRAME, FRAME + 1, 2 * FRAME + 7):
        row, count = length - 1, -(-length // FRAME)
        alone = encode(MODEL, audio[row : row + 1, :, :length]).audio_codes
        np.testing.assert_array_equal(whole.audio_codes[row, :, :count], alone[0])
        np.testing.assert_array_equal(whole.audio_codes[row, :, count:], 0)
        np.testing.assert_array_equal(whole.audio_codes_mask[row], np.arange(3) < count)


@pytest.mark.parametrize("name", ["base", "noncausal", "trim"])
def test_a_ragged_batch_gives_what_each_clip_gives_alone(name: str):
    """In the padding stand NaN, and codes that are none."""
    model, clips = load_fixture(name)
    alone = [Clip(*(field[row] for field in clip)) for clip in clips for row in range(len(clip.audio))]
    audio = np.full((len(alone), *alone[0].audio.shape), np.nan, np.float32)
    codes = np.full((len(alone), *alone[0].audio_codes.shape), 1000, np.int32)
    mask = np.zeros((len(alone), alone[0].audio.shape[1]), bool)
    for row, clip in enumerate(alone):
        length, count = clip.audio.shape[1], clip.audio_codes.shape[1]
        audio[row, :, :length], codes[row, :, :count], mask[row, :length] = clip.audio, clip.audio_codes, True
    encoded = np.asarray(encode(model, audio, mask).audio_codes)
    decoded = np.asarray(decode(model, codes, mask[:, None].astype(np.int32)).audio_values)
    for row, clip in enumerate(alone):
        length, count = clip.audio.shape[1], clip.audio_codes.shape[1]
        np.testing.assert_array_equal(encoded[row, :, :count], clip.audio_codes)
        assert relative_error(decoded[row, :, :length], clip.audio_values[:, :length]) < 1e-5
        assert not encoded[row, :, count:].any()
        assert not decoded[row, :, length:].any()


def test_what_is_masked_inside_a_clip_is_silence():
    mask = np.ones((2, LONG.audio.shape[2]), np.int32)
    mask[1, 100:130] = 0
    silent, unknown = (np.where(mask[:, None], LONG.audio, value) for value in (0, np.nan))
    whole = np.ones_like(mask)
    codes = encode(MODEL, silent, whole).audio_codes
    np.testing.assert_array_equal(encode(MODEL, unknown, mask).audio_codes, codes)
    np.testing.assert_array_equal(codes[0], LONG.audio_codes[0])


def test_a_row_of_nan_does_not_reach_another():
    audio = LONG.audio.copy()
    audio[1] = np.nan
    np.testing.assert_array_equal(encode(MODEL, audio).audio_codes[0], LONG.audio_codes[0])


def test_inactive_rows_wait_whatever_they_are_fed():
    """Every other step row 1 waits, is fed NaN and codes that are none, and goes on exactly."""
    encoder, decoder = MODEL.init_encoder_state(2), MODEL.init_decoder_state(2)
    real = np.ones((2, FRAME), bool)
    for index in range(NUM_FRAMES):
        audio = frames(LONG, index)
        encoder, codes = encode_step(MODEL, encoder, audio, real, active=np.array([True, True]))
        np.testing.assert_array_equal(codes[:, :, 0][1], LONG.audio_codes[1, :, index])
        decoder, decoded = decode_step(MODEL, decoder, codes, active=np.array([True, True]))
        expected = LONG.audio_values[1, :, index * FRAME : (index + 1) * FRAME]
        assert relative_error(decoded[1], expected) < 1e-5
        audio = np.where(ROWS[:, None, None], audio, np.nan if index % 2 else LONG.audio[:, :, -FRAME:])
        paused, codes = encode_step(MODEL, encoder, audio, real, active=ROWS)
        assert_row_unchanged(1, encoder, paused)
        assert not np.asarray(codes)[1].any()
        encoder = paused
        bad = np.where(ROWS[:, None, None], codes, -1)
        paused, decoded = decode_step(MODEL, decoder, bad, active=ROWS)
        assert_row_unchanged(1, decoder, paused)
        assert not np.asarray(decoded)[1].any()
        decoder = paused


def assert_row_unchanged(row: int, before: Any, after: Any) -> None:
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[row], new[row])


@pytest.mark.parametrize("active", [None, np.array([True, True])], ids=["", "active"])
def test_a_step_without_real_samples_keeps_the_state(active: np.ndarray | None):
    """Row 1 has ended: its samples are masked, and its state stays bit for bit."""
    state = MODEL.init_encoder_state(2)
    real = np.ones((2, FRAME), bool)
    state, _ = encode_step(MODEL, state, frames(LONG, 0), real, active=active)
    mask = real & ROWS[:, None]
    audio = np.where(mask[:, None], frames(LONG, 1), np.nan)
    after, codes = encode_step(MODEL, state, audio, mask, active=active)
    assert_row_unchanged(1, state, after)
    assert not np.asarray(codes)[1].any()
    np.testing.assert_array_equal(codes[0, :, 0], LONG.audio_codes[0, :, 1])


def test_reset_rows_are_fresh_streams():
    encoder, decoder = MODEL.init_encoder_state(2), MODEL.init_decoder_state(2)
    for index in range(NUM_FRAMES):
        if index == 9:
            encoder, decoder = reset_rows(encoder, ~ROWS), reset_rows(decoder, ~ROWS)
        since = index - 9 if index >= 9 else index  # the reset
        audio = np.where(ROWS[:, None, None], frames(LONG, index), frames(LONG, since))
        encoder, codes = encode_step(MODEL, encoder, audio)
        np.testing.assert_array_equal(codes[0, :, 0], LONG.audio_codes[0, :, index])
        np.testing.assert_array_equal(codes[1, :, 0], LONG.audio_codes[1, :, since])
        decoder, decoded = decode_step(MODEL, decoder, codes)
        for row, at in enumerate((index, since)):
            expected = LONG.audio_values[row, :, at * FRAME : (at + 1) * FRAME]
            assert relative_error(decoded[row], expected) < 1e-5


def test_streams_can_change_places():
    state, audio, expected = MODEL.init_encoder_state(2), LONG.audio, LONG.audio_codes
    for index in range(NUM_FRAMES):
        state, codes = encode_step(MODEL, state, audio[:, :, index * FRAME : (index + 1) * FRAME])
        np.testing.assert_array_equal(codes[:, :, 0], expected[:, :, index])
        state, audio, expected = jax.tree.map(lambda leaf: leaf[::-1], state), audio[::-1], expected[::-1]


def test_a_stream_is_traced_once_and_its_state_keeps_its_form():
    traces = collections.Counter()

    @jax.jit
    def step(model: Mimi, encoder: Any, decoder: Any, audio: jax.Array) -> tuple[Any, Any, jax.Array]:
        traces["step"] += 1
        encoder, codes = encode_step(model, encoder, audio)
        decoder, audio = decode_step(model, decoder, codes)
        return encoder, decoder, audio

    encoder, decoder = MODEL.init_encoder_state(2), MODEL.init_decoder_state(2)
    forms = jax.tree.map(jax.typeof, (encoder, decoder))
    for index in range(NUM_FRAMES):
        encoder, decoder, _ = step(MODEL, encoder, decoder, frames(LONG, index))
        assert jax.tree.map(jax.typeof, (encoder, decoder)) == forms
    assert traces["step"] == 1


def test_a_fresh_state_is_zero_and_has_the_batch_first():
    for state in (MODEL.init_encoder_state(3), MODEL.init_decoder_state(3)):
        for leaf in map(np.asarray, jax.tree.leaves(state)):
            assert leaf.shape[0] == 3
            assert not leaf.any()


def test_fewer_codebooks_stream_too():
    _, codes = encode_step(MODEL, MODEL.init_encoder_state(2), LONG.audio, num_quantizers=2)
    np.testing.assert_array_equal(codes, LONG.audio_codes[:, :2])
