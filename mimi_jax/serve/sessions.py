"""What a client sends, and what it gets.

    /encode    audio in, a code stream out
    /decode    a code stream in, audio out
    /loopback  audio in; out comes a code stream in which each frame is followed by what it sounds like

Audio is raw PCM in messages of any number of whole samples, a code stream is that of `mimi_jax.streams.wire`
in messages of any size. A loopback has a packet more: P, the number of bytes (4 bytes, little-endian), and
that much PCM. Its client may send {"num_quantizers": N} at any time: later frames are decoded from the first
N codebooks, while the code stream goes on with all of them.

A client ends its stream with {"end": true} or with an empty message. Then the last frames come, and the
server closes the connection with status 1000.
"""

import abc
import asyncio
import contextlib
import dataclasses
import json
import secrets
import struct
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar

import numpy as np

from mimi_jax.checkpoint.identity import code_spec
from mimi_jax.files.codes import CodeSpec
from mimi_jax.serve.moving import Moved
from mimi_jax.serve.socket import BAD_DATA, BROKEN, NORMAL, TRY_LATER, EndError, Socket
from mimi_jax.streams.batch import PoolFullError
from mimi_jax.streams.pool import DecoderSession, EncoderSession, Pool
from mimi_jax.streams.wire import (
    FRAMES_AT_ONCE,
    PCM_FORMATS,
    CodeStreamParser,
    CodeStreamWriter,
    from_pcm,
    to_pcm,
)


class Session(abc.ABC):
    """A stream of a client, from its first message to its end.

    Args:
        socket: of the client.
        pool: that steps the stream.
        options: of the address: `num_quantizers` and `format`.
        moved: the session that goes on, if it comes from another server.

    Raises:
        ValueError: an option is not allowed.
    """

    kind: ClassVar[str]

    def __init__(self, socket: Socket, pool: Pool, options: Mapping[str, str], moved: Moved | None = None):
        self.id = secrets.token_urlsafe(16)
        self._socket, self._pool, self._moved, self._options = socket, pool, moved, dict(options)
        self._format = options.get("format", "s16le")
        if self._format not in PCM_FORMATS:
            raise ValueError(f"format must be {' or '.join(PCM_FORMATS)}, got {self._format!r}")
        self._count = _as_count(options.get("num_quantizers") or pool.num_quantizers, pool)
        self._leaving: asyncio.Future[Moved] | None = None
        socket.num_received = 0 if moved is None else moved.num_received

    async def run(self) -> None:
        """Serve the client. Raises `EndError` when its session ends early."""
        try:
            await self._socket.tell(session=self.id, kind=self.kind, **self._about())
            await self._serve()
        except PoolFullError as error:
            raise EndError(TRY_LATER, str(error), "full") from error
        except ValueError as error:
            raise EndError(BAD_DATA, str(error), "bad") from error
        except RuntimeError as error:
            raise EndError(BROKEN, str(error), "broken") from error
        finally:
            # From here on `detach` finds that it is too late.
            self._leaving = self._leaving or asyncio.get_running_loop().create_future()
            if not self._leaving.done():
                self._leaving.cancel()
        await self._socket.close(NORMAL, "the stream has ended")

    def stop(self) -> None:
        """End the stream, with its last frames."""
        self._socket.interrupt()

    async def detach(self) -> Moved:
        """End the session here. Returns what it needs to go on elsewhere.

        Raises:
            asyncio.CancelledError: the session ended before.
        """
        self._leaving = self._leaving or asyncio.get_running_loop().create_future()
        self._socket.interrupt()
        return await asyncio.shield(self._leaving)

    def _about(self) -> dict[str, Any]:
        """What the client is told first."""
        config = self._pool.model.config
        return {
            "sampling_rate": config.sampling_rate,
            "channels": config.audio_channels,
            "frame_size": config.frame_size,
            "codebook_size": config.codebook_size,
            "num_quantizers": self._count,
            "min_quantizers": config.num_semantic_quantizers,
            "max_quantizers": self._pool.num_quantizers,
            "received": self._socket.num_received,
        }

    @abc.abstractmethod
    async def _serve(self) -> None:
        """Serve the client until its stream ends, or until the session leaves."""

    def _leave(self, states: dict[str, Any], pending: np.ndarray, codes: bytes = b"") -> None:
        assert self._leaving is not None
        received = self._socket.num_received
        self._leaving.set_result(Moved(self.kind, self._options, states, pending, codes, received))

    @property
    def _leaves(self) -> bool:
        """Whether the session is to go on elsewhere, and has not come to its end."""
        return self._leaving is not None and not self._socket.has_ended

    def _new_encoder(self, num_quantizers: int) -> EncoderSession:
        """A fresh stream of audio, or the one that goes on."""
        if self._moved is None:
            return self._pool.encoder(num_quantizers)
        return self._pool.encoder(num_quantizers, self._moved.states["encoder"], self._moved.pending)

    def _new_decoder(self) -> DecoderSession:
        return self._pool.decoder(None if self._moved is None else self._moved.states["decoder"])

    async def _audio(self) -> AsyncIterator[np.ndarray]:
        """Audio [channels, samples] as it comes, in pieces of a few frames. Objects go to `_change`."""
        config = self._pool.model.config
        channels, most = config.audio_channels, FRAMES_AT_ONCE * config.frame_size
        while (message := await self._socket.receive()) is not None:
            if isinstance(message, dict):
                self._change(message)
                continue
            if len(message) % (PCM_FORMATS[self._format].itemsize * channels):
                raise EndError(BAD_DATA, "a message of audio must have whole samples", "bad")
            audio = from_pcm(message, self._format, channels)
            for start in range(0, audio.shape[1], most):
                yield audio[:, start : start + most]

    def _change(self, fields: dict[str, Any]) -> None:
        raise EndError(BAD_DATA, f"there is nothing to change: {', '.join(fields)}", "bad")

    async def _spec(self, count: int) -> CodeSpec:
        # In a thread, because all codebooks are hashed.
        return await asyncio.to_thread(code_spec, self._pool.model, count)


class Encode(Session):
    """Audio into a code stream."""

    kind = "encode"

    async def _serve(self) -> None:
        async with self._new_encoder(self._count) as encoder:
            await self._run(encoder)

    async def _run(self, encoder: EncoderSession) -> None:
        config, out = self._pool.model.config, bytearray()
        writer = CodeStreamWriter(out.extend, await self._spec(self._count))
        if self._moved is not None:
            out.clear()  # the header went out before
        async for audio in self._audio():
            await self._send(out)
            codes = await encoder.push(audio)
            if codes.shape[1]:
                await self._write(writer, codes, codes.shape[1] * config.frame_size, out)
            await self._send(out)
        if self._leaves:
            await self._send(out)  # the header, if there was no audio
            return self._leave(await self._detach(encoder), encoder.pending)
        length = encoder.pending.shape[1]
        codes = await encoder.flush()
        if codes.shape[1]:
            await self._write(writer, codes, length, out)
        writer.close()
        await self._send(out)

    async def _write(self, writer: CodeStreamWriter, codes: np.ndarray, length: int, out: bytearray) -> None:
        writer.write(codes, length)

    async def _detach(self, encoder: EncoderSession) -> dict[str, Any]:
        return {"encoder": await encoder.detach()}

    async def _send(self, out: bytearray) -> None:
        data = bytes(out)
        out.clear()
        await self._socket.send(data)


class Loopback(Encode):
    """Audio into codes, and back."""

    kind = "loopback"
    _decoder: DecoderSession

    async def _serve(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            self._decoder = await stack.enter_async_context(self._new_decoder())
            encoder = self._new_encoder(self._pool.num_quantizers)
            self._heard, self._count = self._count, self._pool.num_quantizers
            await self._run(await stack.enter_async_context(encoder))

    async def _write(self, writer: CodeStreamWriter, codes: np.ndarray, length: int, out: bytearray) -> None:
        size = self._pool.model.config.frame_size
        audio = await self._decoder.push(codes[: self._heard])
        for number, frame in enumerate(codes.T):
            start, stop = number * size, min((number + 1) * size, length)
            writer.write(frame[:, None], stop - start)
            pcm = to_pcm(audio[:, start:stop], self._format)
            out += b"P" + struct.pack("<I", len(pcm)) + pcm

    async def _detach(self, encoder: EncoderSession) -> dict[str, Any]:
        self._options["num_quantizers"] = str(self._heard)
        return await super()._detach(encoder) | {"decoder": await self._decoder.detach()}

    def _change(self, fields: dict[str, Any]) -> None:
        if list(fields) != ["num_quantizers"]:
            raise EndError(BAD_DATA, f"only num_quantizers may change, got {', '.join(fields)}", "bad")
        self._heard = _as_count(fields["num_quantizers"], self._pool)


class Decode(Session):
    """A code stream into audio."""

    kind = "decode"

    async def _serve(self) -> None:
        parser = CodeStreamParser()
        if self._moved is not None:
            spec = self._options.get("spec")
            parser = CodeStreamParser(CodeSpec(**json.loads(spec)) if spec else None, self._moved.codes)
        async with self._new_decoder() as decoder:
            while not parser.has_ended and (message := await self._socket.receive()) is not None:
                if isinstance(message, dict):
                    self._change(message)
                    continue
                if parser.spec is None:  # how long a frame is, and so what must be kept, is up to the client
                    if not parser.feed_header(message):
                        continue
                    await self._check(parser)
                    message = b""
                for codes, length in parser.feed(message):
                    audio = await decoder.push(codes)
                    await self._socket.send(to_pcm(audio[:, :length], self._format))
            if parser.has_ended or self._socket.has_ended:
                return parser.close()
            if not self._leaves:  # the server stops, and the client has the audio of all frames
                return None
            if parser.spec is not None:
                self._options["spec"] = json.dumps(dataclasses.asdict(parser.spec))
            none = np.zeros((self._pool.model.config.audio_channels, 0), np.float32)
            self._leave({"decoder": await decoder.detach()}, none, parser.rest)

    async def _check(self, parser: CodeStreamParser) -> None:
        """Refuse codes that this server cannot decode."""
        assert parser.spec is not None
        count = parser.spec.num_codebooks
        if count > self._pool.num_quantizers or parser.spec != await self._spec(count):
            raise EndError(BAD_DATA, "the codes are of another model, or of more codebooks", "bad")


OPTIONS = ("format", "num_quantizers")  # of the address of a session
KINDS: dict[str, type[Session]] = {kind.kind: kind for kind in (Encode, Decode, Loopback)}


def _as_count(value: Any, pool: Pool) -> int:
    """A number of codebooks, from a client."""
    most, least = pool.num_quantizers, pool.model.config.num_semantic_quantizers
    with contextlib.suppress(TypeError, ValueError):
        if not isinstance(value, bool | float) and least <= (count := int(value)) <= most:
            return count
    raise ValueError(f"num_quantizers must be from {least} to {most}, got {value!r}")
