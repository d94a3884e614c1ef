"""Streams over WebSockets: each is that of its own audio alone, and keeps to its limits."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import random
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Coroutine, Mapping
from socket import IPPROTO_TCP, create_connection
from typing import Any

import jax
import numpy as np
import pytest
import websockets
from websockets.asyncio.client import ClientConnection, connect

from mimi_jax.checkpoint.identity import code_spec
from mimi_jax.model import decode, decode_step, encode
from mimi_jax.serve import socket as socket_module
from mimi_jax.serve.app import Server, serving
from mimi_jax.serve.limits import Access, Limits
from mimi_jax.serve.socket import EndError, Socket, listen
from mimi_jax.streams.pool import Pool
from mimi_jax.streams.wire import FRAMES_AT_ONCE, CodeStreamParser, CodeStreamWriter
from tests.models import load_fixture, relative_error

MODEL = load_fixture("base").model  # 16 samples a frame, and a window of 5 steps
FRAME, CODEBOOKS = MODEL.config.frame_size, MODEL.config.num_quantizers
KEY = b"a key that is long enough"
HUGE = bytearray()  # the header of a code stream whose first frame would never end
CodeStreamWriter(HUGE.extend, dataclasses.replace(code_spec(MODEL), num_codebooks=10**12))


def run(test: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(test, 120))


@contextlib.asynccontextmanager
async def server(
    rows: int = 8, num_quantizers: int | None = None, **options: Any
) -> AsyncIterator[tuple[Server, str]]:
    """A server, and its address without the scheme."""
    settings = {"limits": Limits(), "access": Access(), "key": KEY} | options
    make_pool = functools.partial(Pool, MODEL, rows, num_quantizers)
    async with serving(make_pool, 0.08, host="127.0.0.1", port=0, **settings) as (found, port):
        yield found, f"127.0.0.1:{port}"


def pcm(seed: int, samples: int) -> np.ndarray:
    return (np.random.default_rng(seed).normal(0, 0.2, samples) * 32767).clip(-32768, 32767).astype("<i2")


def codes_alone(samples: np.ndarray, length: int | None = None) -> np.ndarray:
    """The codes of a clip, of which only the first `length` samples count."""
    audio = samples.astype(np.float32)[None, None] / 32768
    length = len(samples) if length is None else length
    codes = encode(MODEL, audio, np.arange(len(samples))[None] < length).audio_codes
    return np.asarray(codes)[0, :, : MODEL.encoded_length(length)]


async def opened(socket: ClientConnection) -> dict[str, Any]:
    """What the server says first."""
    return json.loads(await socket.recv())


async def received(socket: ClientConnection) -> bytes:
    """All bytes until the server closes with status 1000."""
    data = b""
    try:
        while True:
            message = await socket.recv()
            assert isinstance(message, bytes), message
            data += message
    except websockets.ConnectionClosedOK:
        return data


async def refusal(socket: ClientConnection) -> tuple[int, str]:
    """The status with which the server closes, and its reason in words."""
    reason = ""
    with contextlib.suppress(websockets.ConnectionClosed):
        while True:
            message = await socket.recv()
            if isinstance(message, str):
                reason = json.loads(message).get("error", reason)
    return socket.close_code or 0, reason


def parse(data: bytes) -> tuple[np.ndarray, int]:
    """The codes of a whole code stream, and of how many samples they are."""
    parser = CodeStreamParser()
    frames = list(parser.feed(data))
    parser.close()
    return np.concatenate([codes for codes, _ in frames], axis=1), sum(length for _, length in frames)


async def send_in_pieces(socket: ClientConnection, data: bytes, seed: int, unit: int) -> None:
    rng, start = random.Random(seed), 0
    while start < len(data):
        stop = start + unit * rng.randrange(1, 3 * FRAME)
        await socket.send(data[start:stop])
        start = stop
        await asyncio.sleep(rng.choice([0, 0, 0.005]))
    await socket.send(json.dumps({"end": True}))


def test_encode_and_decode_give_what_the_functions_give():
    samples = pcm(1, 9 * FRAME + 5)

    async def test() -> tuple[bytes, bytes]:
        async with server() as (_, address):
            async with connect(f"ws://{address}/encode?num_quantizers=3") as socket:
                about = await opened(socket)
                assert about["frame_size"] == FRAME and about["num_quantizers"] == 3
                stream, _ = await asyncio.gather(
                    received(socket), send_in_pieces(socket, samples.tobytes(), 0, 2)
                )
            async with connect(f"ws://{address}/decode?format=f32le") as socket:
                await opened(socket)
                audio, _ = await asyncio.gather(received(socket), send_in_pieces(socket, stream, 1, 1))
            return stream, audio

    stream, audio = run(test())
    codes, length = parse(stream)
    assert length == len(samples)
    np.testing.assert_array_equal(codes, codes_alone(samples)[:3])
    expected = np.asarray(decode(MODEL, codes[None]).audio_values)[0, :, :length]
    assert relative_error(np.frombuffer(audio, "<f4")[None], expected) < 1e-5


def split_loopback(data: bytes, dtype: str = "<f4") -> tuple[bytes, list[np.ndarray]]:
    """The code stream and the audio of a loopback."""
    header = 8 + struct.unpack("<Q", data[:8])[0]
    parser = CodeStreamParser()
    assert not list(parser.feed(data[:header]))
    assert parser.spec is not None
    packet = 1 + -(-parser.spec.bits * parser.spec.num_codebooks // 8)
    stream, audio, start = data[:header], [], header
    while start < len(data):
        if data[start : start + 1] == b"P":
            (size,) = struct.unpack("<I", data[start + 1 : start + 5])
            audio.append(np.frombuffer(data[start + 5 : start + 5 + size], dtype))
            start += 5 + size
        else:
            size = {b"F": packet, b"L": packet + 4, b"E": 1}[data[start : start + 1]]
            stream += data[start : start + size]
            start += size
    return stream, audio


def test_a_loopback_is_decoded_from_as_many_codebooks_as_its_client_wants():
    samples = pcm(2, 6 * FRAME).astype("<f4") / 32768

    async def test() -> bytes:
        async with server() as (_, address), connect(f"ws://{address}/loopback?format=f32le") as socket:
            await opened(socket)
            half = 3 * FRAME
            await socket.send(samples[:half].tobytes())
            await socket.send(json.dumps({"num_quantizers": 2}))
            await socket.send(samples[half:].tobytes())
            await socket.send(b"")
            return await received(socket)

    stream, audio = split_loopback(run(test()))
    codes, _ = parse(stream)
    np.testing.assert_array_equal(codes, np.asarray(encode(MODEL, samples[None, None]).audio_codes)[0])
    states = MODEL.init_decoder_state(1)
    expected = []
    for frame, count in zip(codes.T, [CODEBOOKS] * 3 + [2] * 3, strict=True):
        states, sound = decode_step(MODEL, states, frame[None, :count, None])
        expected.append(np.asarray(sound)[0, 0])
    assert relative_error(np.concatenate(audio), np.concatenate(expected)) < 1e-5


def post(address: str, path: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(f"http://{address}{path}", method="POST")) as answer:
        return answer.read()


@pytest.mark.parametrize("is_begun", [True, False])
@pytest.mark.parametrize("kind", ["encode", "decode", "loopback"])
def test_a_stream_goes_on_on_another_server(kind: str, is_begun: bool):
    samples = pcm(3, 11 * FRAME + 3)

    async def stream_of(address: str) -> bytes:
        async with connect(f"ws://{address}/{kind if kind != 'decode' else 'encode'}") as socket:
            await opened(socket)
            await socket.send(samples.tobytes())
            await socket.send(b"")
            return await received(socket)

    async def test() -> tuple[bytes, bytes]:
        small = Limits(message_bytes=1000)  # a session that moves may be larger
        async with server(limits=small) as (_, first), server(limits=small) as (_, second):
            whole = await stream_of(first)
            data = samples.tobytes()
            if kind == "decode":
                data = whole
                async with connect(f"ws://{first}/decode") as socket:
                    await opened(socket)
                    await socket.send(data)
                    whole = await received(socket)
            cut = len(data) // 2 // 2 * 2 if is_begun else 0
            async with connect(f"ws://{first}/{kind}?token=secret") as socket:
                about = await opened(socket)
                if is_begun:
                    await socket.send(data[:cut])
                await asyncio.sleep(0.3)
                moved = await asyncio.to_thread(post, first, f"/detach/{about['session']}")
                assert b"secret" not in moved
                before = await received(socket)
            async with connect(f"ws://{second}/attach") as socket:
                await socket.send(moved)
                about = await opened(socket)
                assert (about["kind"], about["received"]) == (kind, cut)
                await socket.send(data[cut:])
                await socket.send(b"")
                after = await received(socket)
            async with connect(f"ws://{second}/attach") as socket:
                await socket.send(moved[:-1] + bytes([moved[-1] ^ 1]))
                assert await refusal(socket) == (
                    1007,
                    "the session was not signed with the key of this server",
                )
            return whole, before + after

    whole, joined = run(test())
    assert joined == whole


def test_a_client_that_sends_on_learns_what_was_taken():
    data = pcm(9, 300 * FRAME).tobytes()
    pieces = [data[start : start + 2 * FRAME] for start in range(0, len(data), 2 * FRAME)]

    async def test() -> bytes:
        async with server() as (_, first), server() as (_, second):
            async with connect(f"ws://{first}/encode") as socket:
                session = (await opened(socket))["session"]

                async def speak() -> None:
                    with contextlib.suppress(websockets.ConnectionClosed):
                        for piece in pieces:
                            await socket.send(piece)
                            await asyncio.sleep(0.01)

                speaking = asyncio.create_task(speak())
                await asyncio.sleep(0.03)
                moved = await asyncio.to_thread(post, first, f"/detach/{session}")
                before = await received(socket)
                await speaking
            async with connect(f"ws://{second}/attach") as socket:
                await socket.send(moved)
                taken = (await opened(socket))["received"]
                assert 0 < taken < len(data)
                await socket.send(data[taken:])
                await socket.send(b"")
                return before + await received(socket)

    np.testing.assert_array_equal(parse(run(test()))[0], codes_alone(np.frombuffer(data, "<i2")))


def test_a_long_message_is_decoded_in_pieces_and_its_row_is_free_when_its_client_is_gone(
    monkeypatch: pytest.MonkeyPatch,
):
    samples = pcm(10, 200 * FRAME)

    async def test() -> None:
        async with server() as (found, address):
            async with connect(f"ws://{address}/encode") as socket:
                await opened(socket)
                await socket.send(samples.tobytes())
                await socket.send(b"")
                stream = await received(socket)
            batch = found._pool._halves["decoder"].batch
            step = batch.step

            def slow(frames: Mapping[int, np.ndarray]) -> jax.Array:
                time.sleep(0.01)
                return step(frames)

            monkeypatch.setattr(batch, "step", slow)
            async with connect(f"ws://{address}/decode") as socket:
                await opened(socket)
                await socket.send(stream)
                assert len(await socket.recv()) == FRAMES_AT_ONCE * FRAME * 2
                socket.transport.abort()
            for _ in range(100):
                if not found._pool.num_sessions()["decoder"]:
                    break
                await asyncio.sleep(0.01)
            assert found._pool.num_waiting()["decoder"] == found._pool.num_sessions()["decoder"] == 0

    run(test())


@pytest.mark.skipif(sys.platform != "linux", reason="needs an option of Linux")
def test_a_connection_that_is_closed_does_not_wait_for_its_client():
    with (
        listen("127.0.0.1", 0, Limits(send_seconds=3)) as listener,
        create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(IPPROTO_TCP, socket_module.socket.TCP_USER_TIMEOUT) == 6000


def test_a_server_whose_step_failed_is_not_healthy(monkeypatch: pytest.MonkeyPatch):
    def fail(_: Mapping[int, np.ndarray]) -> jax.Array:
        raise RuntimeError("out of memory")

    async def test() -> None:
        async with server() as (found, address):
            monkeypatch.setattr(found._pool._halves["encoder"].batch, "step", fail)
            async with connect(f"ws://{address}/encode") as socket:
                await opened(socket)
                await socket.send(pcm(11, FRAME).tobytes())
                assert (await refusal(socket))[0] == 1011
            status, body, _ = await asyncio.to_thread(get, address, "/health")
            assert (status, json.loads(body)["status"]) == (503, "failed")

    run(test())


@pytest.mark.parametrize(
    ("path", "messages", "status", "reason"),
    [
        ("/encode?num_quantizers=99", [], 1007, f"num_quantizers must be from 1 to {CODEBOOKS}, got '99'"),
        ("/encode?format=mp3", [], 1007, "format must be s16le or f32le, got 'mp3'"),
        ("/encode", [b"123"], 1007, "a message of audio must have whole samples"),
        ("/encode", ["hello"], 1007, "a message of text must be an object in JSON"),
        ("/encode", ['{"num_quantizers": 1}'], 1007, "there is nothing to change: num_quantizers"),
        ("/encode", [bytes(5000)], 1009, "a message has at most 4000 bytes"),
        ("/encode", [f'{{"a": "{"x" * 5000}"}}'], 1009, "a message of text has at most 4096 characters"),
        ("/encode", [r'{"\ud800": 1}'], 1007, "there is nothing to change: \ud800"),
        ("/encode?format=f32le", [np.float32(np.nan).tobytes()], 1007, "raw audio in f32le must be finite"),
        ("/loopback", ['{"num_quantizers": true}'], 1007, "num_quantizers must be from 1"),
        ("/decode", [b"this is no code stream"], 1007, "the input is not a code stream"),
        ("/decode", [HUGE, bytes(100)], 1007, "the codes are of another model, or of more codebooks"),
        ("/decode", [b"", b""], 1007, "the input is not a code stream"),
        ("/attach", [b"nothing"], 1007, "the session was not signed with the key of this server"),
        ("/encode?token=wrong", [], 1008, "the token is wrong or missing"),
    ],
)
def test_what_is_wrong_ends_its_session_with_a_reason(path: str, messages: list, status: int, reason: str):
    samples = pcm(4, 5 * FRAME)
    token = "a token"

    async def test() -> tuple[int, str]:
        options = {"limits": Limits(message_bytes=4000), "access": Access(token=token)}
        async with (
            server(**options) as (_, address),
            connect(f"ws://{address}/encode?token=a%20token") as other,
        ):
            await opened(other)
            await other.send(samples[: 2 * FRAME].tobytes())
            given = "" if "token" in path else f"{'&' if '?' in path else '?'}token=a%20token"
            async with connect(f"ws://{address}{path}{given}") as socket:
                with contextlib.suppress(websockets.ConnectionClosed):
                    for message in messages:
                        await socket.send(message)
                found = await refusal(socket)
            await other.send(samples[2 * FRAME :].tobytes())
            await other.send(b"")
            np.testing.assert_array_equal(parse(await received(other))[0], codes_alone(samples))
            return found

    found, words = run(test())
    assert found == status and words.startswith(reason)


def test_sessions_end_when_they_are_idle_or_long_or_too_many():
    async def test() -> list[tuple[int, str]]:
        limits = Limits(idle_seconds=0.3, total_seconds=0.8)
        async with server(rows=1, limits=limits) as (_, address):
            async with connect(f"ws://{address}/encode") as socket:
                idle = await refusal(socket)
            async with connect(f"ws://{address}/encode") as socket:

                async def keep_sending() -> None:
                    with contextlib.suppress(websockets.ConnectionClosed):
                        while True:
                            await socket.send(bytes(2))
                            await asyncio.sleep(0.1)

                sending = asyncio.create_task(keep_sending())
                await asyncio.sleep(0.2)
                async with connect(f"ws://{address}/encode") as third:
                    full = await refusal(third)
                long = await refusal(socket)
                sending.cancel()
            return [idle, full, long]

    idle, full, long = run(test())
    assert idle == (1008, "no message came for 0.3 s")
    assert full[0] == 1013 and full[1].startswith("all 1 rows are taken; try again later")
    assert long == (1008, "a session lasts at most 0.8 s")


def test_a_server_that_stops_gives_the_last_frames():
    samples = pcm(5, 3 * FRAME + 7)

    async def test() -> bytes:
        async with server() as (found, address), connect(f"ws://{address}/encode") as socket:
            await opened(socket)
            await socket.send(samples.tobytes())
            await asyncio.sleep(0.2)
            stream, _ = await asyncio.gather(received(socket), found.stop())
            async with connect(f"ws://{address}/encode") as late:
                assert await refusal(late) == (1001, "the server stops")
            return stream

    codes, length = parse(run(test()))
    assert length == len(samples)
    np.testing.assert_array_equal(codes, codes_alone(samples))


def test_a_stream_does_not_go_on_with_other_codebooks():
    async def test() -> None:
        async with server() as (_, first), server(num_quantizers=3) as (_, second):
            async with connect(f"ws://{first}/loopback") as socket:
                session = (await opened(socket))["session"]
                moved = await asyncio.to_thread(post, first, f"/detach/{session}")
            async with connect(f"ws://{second}/attach") as socket:
                await socket.send(moved)
                status, reason = await refusal(socket)
            assert status == 1007 and reason.endswith("another --num-quantizers than this one, 3")

    run(test())


def test_a_stream_that_has_ended_cannot_be_detached(monkeypatch: pytest.MonkeyPatch):
    """Neither when its end has come during a step, nor when it is over."""
    samples, may_step = pcm(7, 2 * FRAME), threading.Event()

    async def test() -> bytes:
        async with server() as (found, address), connect(f"ws://{address}/encode") as socket:
            about = await opened(socket)
            session, batch = found._sessions[about["session"]], found._pool._halves["encoder"].batch
            step = batch.step

            def late(frames: Mapping[int, np.ndarray]) -> jax.Array:
                assert may_step.wait(60)
                return step(frames)

            monkeypatch.setattr(batch, "step", late)
            await socket.send(samples.tobytes())
            await socket.send(b"")
            await asyncio.sleep(0.2)
            detaching = asyncio.ensure_future(session.detach())
            await asyncio.sleep(0.1)
            may_step.set()
            stream = await received(socket)
            for attempt in (detaching, session.detach()):
                with pytest.raises(asyncio.CancelledError):
                    await attempt
            return stream

    np.testing.assert_array_equal(parse(run(test()))[0], codes_alone(samples))


def test_a_server_that_stops_ends_a_decoder_quietly():
    async def test() -> bytes:
        async with server() as (found, address):
            async with connect(f"ws://{address}/encode") as socket:
                await opened(socket)
                await socket.send(pcm(8, 3 * FRAME).tobytes())
                await socket.send(b"")
                stream = await received(socket)
            async with connect(f"ws://{address}/decode") as socket:
                await opened(socket)
                await socket.send(stream[:-1])  # without its end
                await asyncio.sleep(0.2)
                audio, _ = await asyncio.gather(received(socket), found.stop())
                return audio

    assert len(run(test())) == 2 * 3 * FRAME


class Flood:
    """A client that never pauses."""

    async def receive(self) -> dict[str, Any]:
        return {"type": "websocket.receive", "bytes": bytes(2)}


def test_a_client_that_never_pauses_is_ended_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket_module, "DRAIN_SECONDS", 0.05)

    async def test() -> None:
        flooded = Socket(Flood(), Limits())
        flooded.interrupt()
        number = 0
        while await flooded.receive() is not None:  # what has come still counts
            number += 1
        assert number > 0 and not flooded.has_ended
        flooded = Socket(Flood(), Limits(total_seconds=0.05))
        with pytest.raises(EndError, match=r"a session lasts at most 0\.05 s"):
            while await flooded.receive():
                pass

    run(test())


def get(address: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes, Any]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://{address}{path}", headers=headers or {})
        ) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def test_pages_elsewhere_and_files_are_out_of_reach():
    async def test() -> None:
        async with server(access=Access(origins=("https://friend.example",))) as (_, address):
            host = address.replace("127.0.0.1", "evil.example")
            for origin, allowed in (
                (f"http://{address}", True),
                ("https://friend.example", True),
                ("https://evil.example", False),
                ("null", False),
            ):
                async with connect(f"ws://{address}/encode", additional_headers={"Origin": origin}) as socket:
                    first = json.loads(await socket.recv())
                    assert ("session" in first) == allowed, first
            async with connect(
                f"ws://{address}/encode", additional_headers={"Origin": f"http://{host}"}
            ) as socket:
                assert (await refusal(socket))[0] == 1008
            fetch = functools.partial(asyncio.to_thread, get)
            status, page, headers = await fetch(address, "/")
            assert status == 200 and b"<title>Mimi, live" in page
            assert headers["content-security-policy"] == "default-src 'self'; frame-ancestors 'none'"
            for path in (
                "/../app.py",
                "/%2e%2e/app.py",
                "/..%2fapp.py",
                "//etc/passwd",
                "/etc/passwd",
                "/app.py",
            ):
                assert (await fetch(address, path))[0] in (400, 404), path
            assert (await fetch(address, "/metrics", {"Host": "evil.example"}))[0] == 403
            for bad in ({"Host": "["}, {"Origin": "http://["}):
                assert (await fetch(address, "/metrics", bad))[0] == 403
            assert (await fetch(address, "/health"))[:2] == (200, b'{"status":"ok","sessions":0}')

    run(test())


def test_metrics_count_sessions_steps_and_ends():
    async def test() -> str:
        async with server() as (_, address):
            async with connect(f"ws://{address}/loopback") as socket:
                await opened(socket)
                await socket.send(pcm(6, 4 * FRAME).tobytes())
                await socket.send(b"")
                await received(socket)
            async with connect(f"ws://{address}/encode") as socket:
                await socket.send("x")
                await refusal(socket)
            _, text, _ = await asyncio.to_thread(get, address, "/metrics")
            return text.decode()

    text = run(test())
    for line in (
        'mimi_sessions{half="encoder"} 0.0', 'mimi_rows{half="decoder"} 1.0',
        'mimi_frame_delay_seconds_count{half="encoder"} 4.0', 'mimi_late_frames_total{half="decoder"}',
        'mimi_sessions_ended_total{reason="done"} 1.0', 'mimi_sessions_ended_total{reason="bad"} 1.0',
        'mimi_waiting_frames{half="encoder"} 0.0',
    ):  # fmt: skip
        assert line in text, text
