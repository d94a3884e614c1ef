"""Sessions of a pool: each gets what its clip alone gives, whatever the others do."""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Coroutine, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from mimi_jax.model import decode, encode
from mimi_jax.streams import stepping
from mimi_jax.streams.batch import Batch, PoolFullError
from mimi_jax.streams.pool import Pool, Step
from tests.models import check_ties, load_fixture, relative_error

MODEL = load_fixture("base").model  # 16 samples a frame, and a window of 5 steps
FRAME, CODEBOOKS = MODEL.config.frame_size, MODEL.config.num_quantizers
SPEECH = np.random.default_rng(0).normal(0, 0.3, 100_000).astype(np.float32)


def run(test: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(test, 120))


def clip(number: int) -> np.ndarray:
    rng = random.Random(number)
    start = rng.randrange(90_000)
    return SPEECH[start : start + rng.randrange(1, 30 * FRAME)]


def codes_alone(audio: np.ndarray) -> np.ndarray:
    """The codes of a clip, from one program for all lengths."""
    padded = np.pad(audio, (0, 30 * FRAME - len(audio)))[None, None]
    codes = encode(MODEL, padded, np.arange(30 * FRAME)[None] < len(audio)).audio_codes
    return np.asarray(codes)[0, :, : MODEL.encoded_length(len(audio))]


async def encode_in_pieces(pool: Pool, audio: np.ndarray, rng: random.Random, count: int) -> np.ndarray:
    pieces, start = [], 0
    async with pool.encoder(count) as session:
        while start < len(audio):
            stop = start + rng.randrange(4 * FRAME)
            pieces.append(await session.push(audio[start:stop]))
            start = stop
            await asyncio.sleep(rng.choice([0, 0, 0.001, 0.03]))
        pieces.append(await session.flush())
    return np.concatenate(pieces, axis=1)


def check_codes(codes: np.ndarray, audio: np.ndarray) -> None:
    expected = codes_alone(audio)[: len(codes)]
    assert codes.shape == expected.shape
    if (codes != expected).any():
        latents = np.asarray(MODEL.encode_latents(audio[None, None]))[0]
        check_ties(MODEL, latents, codes, expected)


def test_each_of_many_sessions_gets_the_codes_of_its_clip():
    seen: list[Step] = []

    async def session(pool: Pool, number: int) -> np.ndarray | None:
        rng = random.Random(number)
        await asyncio.sleep(rng.choice([0, rng.uniform(0, 0.5)]))
        encoding = encode_in_pieces(pool, clip(number), rng, rng.randint(1, CODEBOOKS))
        try:
            return await asyncio.wait_for(encoding, 0.02 if number % 7 == 0 else None)  # some die
        except TimeoutError:
            return None

    async def test() -> list[np.ndarray | None]:
        async with Pool(MODEL, rows=64, on_step=seen.append) as pool:
            found = await asyncio.gather(*(session(pool, number) for number in range(60)))
            assert pool.num_sessions() == {"encoder": 0, "decoder": 0}
            return found

    found = run(test())
    assert sum(codes is not None for codes in found) >= 50
    for number, codes in enumerate(found):
        if codes is not None:
            check_codes(codes, clip(number))
    assert max(step.frames for step in seen) > 8
    assert {step.rows for step in seen} <= {1, 8, 16, 32, 64}


def test_decoders_with_different_numbers_of_codebooks_share_steps():
    audio = clip(3)[: 8 * FRAME]
    codes = codes_alone(audio)[:, :8]

    async def session(pool: Pool, count: int) -> np.ndarray:
        async with pool.decoder() as decoder:
            halves = np.split(codes[:count], [3], axis=1)
            return np.concatenate([await decoder.push(half) for half in halves], axis=1)

    async def test() -> list[np.ndarray]:
        async with Pool(MODEL, rows=8) as pool:
            return await asyncio.gather(*(session(pool, count) for count in range(1, CODEBOOKS + 1)))

    for count, decoded in enumerate(run(test()), start=1):
        expected = np.asarray(decode(MODEL, codes[None, :count]).audio_values)[0]
        assert decoded.shape == expected.shape
        assert relative_error(decoded, expected) < 1e-5


def test_halves_step_at_the_same_time(monkeypatch: pytest.MonkeyPatch):
    """A step of the encoder ends only after one of the decoder that began later."""
    decoded = threading.Event()

    async def test() -> None:
        async with Pool(MODEL, rows=8) as pool, pool.encoder() as encoder, pool.decoder() as decoder:
            step = pool._halves["encoder"].batch.step

            def late(frames: Mapping[int, np.ndarray]) -> jax.Array:
                assert decoded.wait(60)
                return step(frames)

            monkeypatch.setattr(pool._halves["encoder"].batch, "step", late)
            encoding = asyncio.create_task(encoder.push(SPEECH[:FRAME]))
            await asyncio.sleep(0)
            await decoder.push(np.zeros((1, 1), int))
            decoded.set()
            np.testing.assert_array_equal(await encoding, codes_alone(SPEECH[:FRAME]))

    run(test())


@pytest.mark.parametrize(
    ("waiting", "taken"), [(1, 1), (2, 2), (9, 8), (11, 8), (12, 12), (23, 16), (24, 24), (47, 32), (64, 64)]
)
def test_a_large_step_is_filled_to_three_quarters(waiting: int, taken: int):
    assert Batch(MODEL, "decoder", 64, CODEBOOKS).frames_of_a_step(waiting) == taken


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators take larger steps")
def test_a_step_on_a_cpu_takes_no_more_rows_than_pay():
    batch = Batch(MODEL, "decoder", 128, CODEBOOKS)
    assert batch.sizes == [1, 8, 16, 32, 64]
    assert [batch.frames_of_a_step(waiting) for waiting in (48, 65, 128)] == [48, 64, 64]


def test_frames_that_are_left_out_of_a_step_are_in_the_next_one():
    steps: list[int] = []

    async def test() -> None:
        audio = [SPEECH[start : start + FRAME] for start in range(18)]
        pool = Pool(MODEL, rows=32, on_step=lambda step: steps.append(step.frames))
        async with pool, contextlib.AsyncExitStack() as stack:
            sessions = [await stack.enter_async_context(pool.encoder()) for _ in audio]
            codes = await asyncio.gather(*(s.push(a) for s, a in zip(sessions, audio, strict=True)))
        for one, alone in zip(codes, audio, strict=True):
            check_codes(one, alone)

    run(test())
    assert steps == [16, 2]


def test_a_session_goes_on_in_another_pool():
    audio = clip(5)[: 10 * FRAME + 3]

    async def test() -> np.ndarray:
        async with Pool(MODEL, rows=8) as pool, pool.encoder() as session:
            first = await session.push(audio[: 4 * FRAME + 5])
            state, pending = await session.detach(), session.pending
            with pytest.raises(RuntimeError, match="was detached"):
                await session.push(audio)
        async with (
            Pool(MODEL, rows=8) as pool,
            pool.encoder(),
            pool.encoder(state=state, pending=pending) as session,
        ):
            rest = await session.push(audio[4 * FRAME + 5 :])
            return np.concatenate([first, rest, await session.flush()], axis=1)

    check_codes(run(test()), audio)


def test_a_session_is_used_once():
    async def test() -> None:
        async with Pool(MODEL, rows=2) as pool:
            session = pool.encoder()
            async with session:
                with pytest.raises(RuntimeError, match="a session is used once; ask the pool for a new one"):
                    await session.__aenter__()
            with pytest.raises(RuntimeError, match="a session is used once"):
                await session.__aenter__()
            async with pool.encoder(), pool.encoder():  # both rows are free again
                pass

    run(test())


def test_two_steps_in_flight_give_their_results_in_order(monkeypatch: pytest.MonkeyPatch):
    fetch, slow = stepping._fetch, [True, False] * 10

    def fetch_late(array: jax.Array) -> np.ndarray:
        if slow.pop():
            time.sleep(0.05)
        return fetch(array)

    monkeypatch.setattr(stepping, "IN_FLIGHT_ON_CPU", 2)
    monkeypatch.setattr(stepping, "_fetch", fetch_late)

    async def test() -> np.ndarray:
        async with Pool(MODEL, rows=2) as pool, pool.encoder() as session:
            return await session.push(SPEECH[: 8 * FRAME])

    np.testing.assert_array_equal(run(test()), codes_alone(SPEECH[: 8 * FRAME]))


def test_a_session_that_is_left_ends_the_push_of_another_task():
    async def test() -> None:
        async with Pool(MODEL, rows=2) as pool:
            async with pool.encoder() as session:
                pushing = asyncio.create_task(session.push(SPEECH[: 3 * FRAME]))
                await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="the session has ended"):
                await pushing

    run(test())


def test_a_session_does_one_thing_at_a_time():
    audio = SPEECH[: 5 * FRAME + 3]

    async def test() -> np.ndarray:
        async with Pool(MODEL, rows=2) as pool, pool.encoder() as session:
            first = asyncio.create_task(session.push(audio[: 2 * FRAME + 1]))
            await asyncio.sleep(0)
            for call in (lambda: session.push(audio), session.flush, session.detach):
                with pytest.raises(RuntimeError, match="another push of this session is not done"):
                    await call()
            rest = [await first, await session.push(audio[2 * FRAME + 1 :]), await session.flush()]
            return np.concatenate(rest, axis=1)

    check_codes(run(test()), audio)


def test_a_state_that_does_not_fit_costs_no_row():
    async def test() -> None:
        async with Pool(MODEL, rows=1) as pool:
            for state in (MODEL.init_encoder_state(2), MODEL.init_decoder_state(1)):
                with pytest.raises(ValueError, match="the state must be of this model, this half"):
                    await pool.encoder(state=state).__aenter__()
            async with pool.encoder() as session:
                await session.push(SPEECH[:FRAME])

    run(test())


def test_a_result_does_not_keep_those_of_other_sessions():
    async def test() -> None:
        async with Pool(MODEL, rows=2) as pool, pool.encoder(2) as encoder, pool.decoder() as decoder:
            codes = await encoder.push(SPEECH[:FRAME])
            for array in (codes, await decoder.push(codes)):
                assert array.base is None and array.flags.writeable

    run(test())


def test_rows_are_taken_and_given_back():
    async def test() -> None:
        async with Pool(MODEL, rows=16) as pool:
            await pool.warmup()
            sessions = [pool.encoder() for _ in range(16)]
            for session in sessions:
                await session.__aenter__()
            with pytest.raises(PoolFullError, match="all 16 rows are taken"):
                await pool.encoder().__aenter__()
            audio = clip(9)[: 3 * FRAME]
            await asyncio.gather(*(session.push(audio[:FRAME]) for session in sessions))
            for session in sessions[1:]:
                await session.__aexit__()
            async with pool.encoder() as fresh:  # in a row that was used
                both = await asyncio.gather(fresh.push(audio), sessions[0].push(audio[FRAME:]))
            np.testing.assert_array_equal(both[0], codes_alone(audio))
            np.testing.assert_array_equal(both[1], codes_alone(audio)[:, 1:])

    run(test())


def test_a_session_that_is_cancelled_leaves_no_trace_in_the_next_one():
    audio = clip(4)[: 4 * FRAME]

    async def test() -> None:
        async with Pool(MODEL, rows=1) as pool:
            for turns in range(
                6
            ):  # of the loop until it is cancelled: before it has a row, in a step, after it
                opening = asyncio.create_task(encode_in_pieces(pool, clip(8), random.Random(turns), 2))
                for _ in range(turns):
                    await asyncio.sleep(0)
                opening.cancel()
                await asyncio.gather(opening, return_exceptions=True)
                await pool._halves["encoder"].threads.start(lambda: None)  # what it has begun is done
                await asyncio.sleep(0)
                await pool._halves["encoder"].threads.start(lambda: None)
                async with pool.encoder() as session:
                    np.testing.assert_array_equal(await session.push(audio), codes_alone(audio))

    run(test())


def test_what_is_wrong_costs_one_session_nothing():
    async def test() -> None:
        async with Pool(MODEL, rows=8, num_quantizers=3) as pool:
            async with pool.encoder() as session, pool.decoder() as decoder:
                audio = clip(1)[: 2 * FRAME]
                await session.push(audio[:FRAME])
                with pytest.raises(ValueError, match="NaN or infinite"):
                    await session.push(np.full(5, np.nan, np.float32))
                with pytest.raises(ValueError, match="must be floating point"):
                    await session.push(np.zeros(5, np.int16))
                with pytest.raises(ValueError, match=r"\[channels=1, samples\] or \[samples\], got \[2, 5\]"):
                    await session.push(np.zeros((2, 5), np.float32))
                np.testing.assert_array_equal(await session.push(audio[FRAME:]), codes_alone(audio)[:3, 1:])
                with pytest.raises(ValueError, match="at most 3 codebooks"):
                    await decoder.push(np.zeros((4, 1), int))
                with pytest.raises(ValueError, match="must lie in"):
                    await decoder.push(np.full((2, 1), MODEL.config.codebook_size))
            with pytest.raises(RuntimeError, match="the session has ended"):
                await session.push(audio)

    run(test())


def test_a_step_that_fails_ends_all_sessions(monkeypatch: pytest.MonkeyPatch):
    async def test() -> None:
        async with Pool(MODEL, rows=8) as pool, pool.encoder() as session:

            def fail(frames: object) -> None:
                raise MemoryError("out of memory")

            monkeypatch.setattr(pool._halves["encoder"].batch, "step", fail)
            with pytest.raises(MemoryError, match="out of memory"):
                await session.push(clip(1))
            with pytest.raises(RuntimeError, match="the pool has stopped: out of memory"):
                await session.push(clip(1))
            async with pool.decoder() as decoder:  # the other half goes on
                assert (await decoder.push(np.zeros((1, 1), int))).shape == (1, FRAME)

    run(test())


def test_sessions_end_with_their_pool():
    async def test() -> None:
        async with Pool(MODEL, rows=2) as pool:
            session = await pool.encoder().__aenter__()
            pushing = asyncio.create_task(session.push(clip(1)))
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="the pool was closed"):
            await pushing
        with pytest.raises(RuntimeError, match="the pool has stopped: the pool was closed"):
            await session.push(clip(1))
        await session.__aexit__()

    run(test())


def test_a_pool_needs_a_power_of_two_and_its_half():
    with pytest.raises(ValueError, match="power of two"):
        Pool(MODEL, rows=12)
    with pytest.raises(ValueError, match="num_quantizers must be"):
        Pool(MODEL, num_quantizers=99)
