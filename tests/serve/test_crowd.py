"""Many clients at once: they come, pause, send nonsense and vanish, and no stream touches another."""

import asyncio
import contextlib
import gc
import json
import os
import random
import struct

import numpy as np
import pytest
import websockets
from websockets.asyncio.client import connect

from mimi_jax.serve.limits import Limits
from tests.models import check_ties
from tests.serve.test_server import CODEBOOKS, FRAME, MODEL, codes_alone, opened, parse, pcm, received, server

LONGEST = 20 * FRAME


def clip(seed: int) -> np.ndarray:
    return pcm(seed, random.Random(seed).randrange(1, LONGEST))


def check(stream: bytes, samples: np.ndarray) -> None:
    codes, length = parse(stream)
    assert length == len(samples)
    padded = np.pad(samples, (0, LONGEST - len(samples)))
    expected = codes_alone(padded, len(samples))[: len(codes)]
    assert codes.shape == expected.shape
    if (codes != expected).any():
        latents = np.asarray(MODEL.encode_latents(samples[None, None].astype(np.float32) / 32768))[0]
        check_ties(MODEL, latents, codes, expected)


async def send_randomly(address: str, seed: int) -> bytes | None:
    """Encode a clip in random pieces, with pauses. Some clients vanish in the middle, and get None."""
    rng, samples = random.Random(seed), clip(seed)
    await asyncio.sleep(rng.uniform(0, 4))
    vanishes = len(samples) // 2 if seed % 5 == 0 else None
    async with connect(f"ws://{address}/encode?num_quantizers={rng.randint(1, CODEBOOKS)}") as socket:
        await opened(socket)
        receiving = asyncio.create_task(received(socket))
        start = 0
        while start < len(samples):
            if vanishes is not None and start >= vanishes:
                receiving.cancel()
                socket.transport.abort()
                return None
            stop = start + rng.randrange(1, 3 * FRAME)
            await socket.send(samples[start:stop].tobytes())
            start = stop
            await asyncio.sleep(rng.choice([0, 0, 0.01, 0.1]))
        await socket.send(rng.choice([b"", json.dumps({"end": True})]))
        return await receiving


@pytest.mark.parametrize("clients", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_each_of_many_clients_gets_the_codes_of_its_clip(clients: int):
    async def test() -> list[bytes | None]:
        async with server(rows=256) as (found, address):
            streams = await asyncio.gather(*(send_randomly(address, seed) for seed in range(clients)))
            async with asyncio.timeout(10):
                while found._sessions:
                    await asyncio.sleep(0.05)
            assert found._pool.num_sessions() == {"encoder": 0, "decoder": 0}
            return streams

    streams = asyncio.run(asyncio.wait_for(test(), 500))
    finished = {seed: stream for seed, stream in enumerate(streams) if stream is not None}
    assert finished.keys() >= {seed for seed in range(clients) if seed % 5}
    assert len(finished) < 0.9 * clients  # the others have vanished
    for seed, stream in finished.items():
        check(stream, clip(seed))


def nonsense(rng: random.Random) -> bytes | str:
    """A message that may be anything."""
    kind = rng.randrange(7)
    if kind == 0:
        return rng.randbytes(rng.randrange(300))
    if kind == 1:
        return json.dumps(
            rng.choice([{}, [], None, {"num_quantizers": rng.randint(-9, 99)}, {"end": 0}, "x"])
        )
    if kind == 2:
        return rng.randbytes(30).decode("latin-1")
    if kind == 3:
        return struct.pack("<Q", rng.randrange(1 << rng.randrange(1, 64))) + rng.randbytes(20)
    if kind == 4:
        return "[" * 2000
    if kind == 5:
        return pcm(rng.randrange(99), rng.randrange(2 * FRAME)).tobytes()
    return rng.choice([b"F", b"E", b"L\xff\xff\xff\xff", b"P", b"\0"]) * rng.randrange(1, 50)


async def pester(address: str, seed: int) -> int:
    """Send nonsense until the server closes. Returns how many messages went out."""
    rng, count = random.Random(seed), 0
    path = rng.choice(["encode", "decode", "loopback", "attach", "encode?format=f32le"])
    with contextlib.suppress(websockets.ConnectionClosed, TimeoutError):
        async with connect(f"ws://{address}/{path}") as socket:
            for _ in range(rng.randrange(1, 8)):
                await socket.send(nonsense(rng))
                count += 1
            if rng.random() < 0.3:
                socket.transport.abort()
            await asyncio.wait_for(socket.wait_closed(), 0.05)
    return count


async def half_open(address: str, seed: int) -> None:
    """Begin a connection and leave it so."""
    rng = random.Random(seed)
    host, port = address.split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    request = (
        f"GET /encode HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n".encode()
    )
    request += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    writer.write(request[: rng.randrange(len(request) + 1)] + rng.randbytes(rng.choice([0, 9])))
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        await asyncio.sleep(rng.uniform(0, 0.2))
    writer.transport.abort()


def resident() -> int:
    """Bytes of memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("messages", [64, pytest.param(10_000, marks=pytest.mark.slow)])
def test_nonsense_and_half_open_connections_touch_no_other_stream(messages: int):
    async def steady(address: str, stop: asyncio.Event) -> int:
        """Encode clip after clip."""
        count = 0
        while not stop.is_set():
            samples = clip(1000 + count)
            async with connect(f"ws://{address}/encode") as socket:
                await opened(socket)
                await socket.send(samples.tobytes())
                await socket.send(b"")
                check(await received(socket), samples)
            count += 1
        return count

    async def test() -> None:
        limits = Limits(idle_seconds=1, message_bytes=1 << 16)
        async with server(rows=64, limits=limits) as (found, address):
            stop = asyncio.Event()
            other = asyncio.create_task(steady(address, stop))
            sent, seed, before = 0, 0, 0
            while sent < messages:
                batch = [pester(address, seed + i) for i in range(16)]
                counts = await asyncio.gather(*batch, *(half_open(address, seed + i) for i in range(4)))
                sent += sum(count or 0 for count in counts)
                seed += 16
                if not before and sent > messages // 4:
                    before = resident()
            stop.set()
            assert await other > 1
            async with asyncio.timeout(20):
                while found._sessions or any(found._pool.num_sessions().values()):
                    await asyncio.sleep(0.05)
            gc.collect()
            assert resident() - before < 50e6

    asyncio.run(asyncio.wait_for(test(), 550))
