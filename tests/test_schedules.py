"""Random schedules of a server: rows step, wait, end, start anew and change places.

Two batches of streams take steps of random sizes. A coin for each row says whether it takes part; if not,
it is fed NaN and codes that are none. Some rows end inside a frame, some are reset, some change places
with rows of the other batch. Every stream must give the codes and the audio of its clip alone.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimi_jax.model import decode, decode_step, encode, encode_step
from mimi_jax.streams.rows import put_rows, reset_rows, take_rows
from tests.models import check_ties, load_fixture, relative_error

MODEL = load_fixture("base").model  # 16 samples a frame, and a window of 5 steps
FRAME, CODEBOOKS = MODEL.config.frame_size, MODEL.config.num_quantizers
BATCH, MAX_FRAMES = 4, 3  # rows of a batch, frames of a step
MAX_STEPS = 12
LONGEST = MAX_STEPS * MAX_FRAMES * FRAME
SPEECH = np.random.default_rng(0).normal(0, 0.3, 100_000).astype(np.float32)


class Step(NamedTuple):
    batch: int
    frames: int
    active: list[bool]
    ends: list[int]  # samples of the step after which each row ends; 0 for none of them


class Reset(NamedTuple):
    batch: int
    rows: list[bool]


class Swap(NamedTuple):
    """Rows of batch 0 go to the places of rows of batch 1, and the other way round."""

    rows: list[int]
    places: list[int]


batches = st.integers(0, 1)
coins = st.lists(st.booleans(), min_size=BATCH, max_size=BATCH)
some_rows = st.permutations(range(BATCH)).map(lambda rows: rows[:2])
ends = st.lists(st.just(0) | st.integers(0, FRAME * MAX_FRAMES - 1), min_size=BATCH, max_size=BATCH)
steps = st.builds(Step, batches, st.integers(1, MAX_FRAMES), coins, ends)
schedules = st.lists(
    steps | steps | steps | st.builds(Reset, batches, coins) | st.builds(Swap, some_rows, some_rows),
    min_size=1,
    max_size=MAX_STEPS,
)


class Stream:
    """A clip, as it is heard; and what comes out of it."""

    def __init__(self, number: int):
        self.start = self.stop = 1117 * number % (len(SPEECH) - LONGEST)
        self.codes = [np.zeros((CODEBOOKS, 0), np.int32)]
        self.audio = [np.zeros((1, 0), np.float32)]
        self.has_ended = False

    def hear(self, num_samples: int) -> np.ndarray:
        self.stop += num_samples
        return SPEECH[self.stop - num_samples : self.stop]


@functools.partial(jax.jit, donate_argnums=0)
def step(
    state: Any, audio: jax.Array, mask: jax.Array, active: jax.Array
) -> tuple[Any, jax.Array, jax.Array]:
    encoder, codes = encode_step(MODEL, state[0], audio, mask, active=active)
    # The decoder waits with the encoder, and is fed codes that are none meanwhile.
    active = active & mask[:, 0]
    bad = jax.numpy.where(active[:, None, None], codes, -1)
    decoder, decoded = decode_step(MODEL, state[1], bad, active=active)
    return (encoder, decoder), codes, decoded


class Server:
    def __init__(self):
        self.num_streams = 0
        self.streams = [[self.new_stream() for _ in range(BATCH)] for _ in range(2)]
        self.finished: list[Stream] = []
        self.states: list[Any] = [
            (MODEL.init_encoder_state(BATCH), MODEL.init_decoder_state(BATCH)) for _ in range(2)
        ]

    def new_stream(self) -> Stream:
        self.num_streams += 1
        return Stream(self.num_streams)

    def step(self, op: Step) -> None:
        size = op.frames * FRAME
        audio = np.full((BATCH, 1, size), np.nan, np.float32)
        mask = np.zeros((BATCH, size), bool)
        heard = []
        for row, stream in enumerate(self.streams[op.batch]):
            if op.active[row] and not stream.has_ended:
                length = min(op.ends[row], size) or size
                stream.has_ended = length < size
                audio[row, 0, :length] = stream.hear(length)
                mask[row, :length] = True
                heard.append((row, stream, -(-length // FRAME)))
            elif not op.active[row]:
                mask[row] = True  # the coin alone must keep the row from what it is fed
        self.states[op.batch], codes, decoded = step(self.states[op.batch], audio, mask, np.array(op.active))
        codes, decoded = np.array(codes), np.array(decoded)
        for row, stream, frames in heard:
            stream.codes.append(codes[row, :, :frames].copy())
            stream.audio.append(decoded[row, :, : frames * FRAME].copy())
            codes[row, :, :frames] = 0
        assert not codes.any()
        assert not np.delete(decoded, [row for row, _, _ in heard], axis=0).any()

    def reset(self, op: Reset) -> None:
        self.states[op.batch] = reset_rows(self.states[op.batch], np.array(op.rows))
        for row in np.flatnonzero(op.rows):
            self.finished.append(self.streams[op.batch][row])
            self.streams[op.batch][row] = self.new_stream()

    def swap(self, op: Swap) -> None:
        (here, there), (left, right) = (op.rows, op.places), self.states
        moving, coming = take_rows(left, here), take_rows(right, there)
        self.states = [put_rows(left, here, coming), put_rows(right, there, moving)]
        for row, place in zip(here, there, strict=True):
            a, b = self.streams
            a[row], b[place] = b[place], a[row]

    def run(self, schedule: list[Step | Reset | Swap]) -> list[Stream]:
        for op in schedule:
            {Step: self.step, Reset: self.reset, Swap: self.swap}[type(op)](op)
        return [stream for stream in sum(self.streams, self.finished) if stream.stop > stream.start]


MAX_STREAMS = 2 * BATCH + MAX_STEPS * BATCH


@jax.jit
def alone(audio: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Latents, codes and audio of clips, each as if it were alone: tests/test_contract_mimi.py shows that."""
    codes = encode(MODEL, audio, mask).audio_codes
    return MODEL.encode_latents(audio, mask), codes, decode(MODEL, codes).audio_values


def check(streams: list[Stream]) -> None:
    lengths = np.array(
        [stream.stop - stream.start for stream in streams] + [0] * (MAX_STREAMS - len(streams))
    )
    mask = np.arange(LONGEST) < lengths[:, None]
    audio = np.zeros((MAX_STREAMS, 1, LONGEST), np.float32)
    for row, stream in zip(audio, streams, strict=False):
        row[0, : stream.stop - stream.start] = SPEECH[stream.start : stream.stop]
    latents, codes, decoded = map(np.asarray, alone(audio, mask))
    for row, stream in enumerate(streams):
        actual, frames = np.concatenate(stream.codes, axis=1), -(-int(lengths[row]) // FRAME)
        expected = codes[row, :, :frames]
        assert actual.shape == expected.shape
        if (actual != expected).any():
            check_ties(MODEL, latents[row, :frames], actual, expected)
            continue
        assert relative_error(np.concatenate(stream.audio, axis=1), decoded[row, :, : frames * FRAME]) < 1e-5


@pytest.mark.parametrize("max_examples", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_stream_gives_what_its_clip_gives_alone(max_examples: int):
    @settings(max_examples=max_examples, deadline=None, derandomize=True)
    @given(schedules)
    def run(schedule: list[Step | Reset | Swap]):
        check(Server().run(schedule))

    run()
