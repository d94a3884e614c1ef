"""A connection within its limits."""

import asyncio
import contextlib
import json
import socket
import sys
import time
from asyncio import FIRST_COMPLETED
from typing import Any

from mimi_jax.serve.limits import Limits

# Why a connection closes (RFC 6455, section 7.4.1).
NORMAL, GOING_AWAY, BAD_DATA, REFUSED, TOO_BIG, BROKEN, TRY_LATER = 1000, 1001, 1007, 1008, 1009, 1011, 1013
MAX_REASON_BYTES = 123  # of a close frame
DRAIN_SECONDS = 1.0
MAX_TEXT = 1 << 12  # characters of a message in JSON


class EndError(Exception):
    """Ends a session.

    Args:
        code: of the close frame.
        reason: for the client, in words.
        kind: for the metrics, in one word.
    """

    def __init__(self, code: int, reason: str, kind: str):
        super().__init__(reason)
        self.code, self.kind = code, kind


class Socket:
    """A WebSocket of a client.

    Args:
        websocket: Starlette's, accepted.
        limits: of the session.

    Attributes:
        has_ended: whether the client has ended its stream.
        num_received: bytes of the stream that were received.
    """

    def __init__(self, websocket: Any, limits: Limits):
        self._websocket, self._limits = websocket, limits
        self.has_ended, self.num_received = False, 0
        self._until = time.monotonic() + limits.total_seconds
        # When `receive` stops taking messages, in seconds of `time.monotonic`.
        self._interrupted: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def interrupt(self) -> None:
        """Let `receive` return None after the messages that have come, as if the client had ended its stream.

        A client that never pauses is interrupted after `DRAIN_SECONDS`.
        """
        if not self._interrupted.done():
            self._interrupted.set_result(time.monotonic() + DRAIN_SECONDS)

    async def receive(self, most: int | None = None) -> bytes | dict[str, Any] | None:
        """The next message: bytes, or an object in JSON; None at the end.

        The stream ends with `{"end": true}` or an empty message of bytes, or with `interrupt`.

        Args:
            most: bytes of the message; None for those of the limits.

        Raises:
            EndError: the client went away, sent something else, or the session is over its limits.
        """
        message = await self._next_message()
        if message is None:
            return None
        if message["type"] == "websocket.disconnect":
            raise EndError(GOING_AWAY, "the client went away", "gone")
        if (data := message.get("bytes")) is not None:
            most = self._limits.message_bytes if most is None else most
            if len(data) > most:
                raise EndError(TOO_BIG, f"a message has at most {most} bytes", "big")
            self.has_ended = not data
            self.num_received += len(data)
            return data or None
        if len(message["text"]) > MAX_TEXT:
            raise EndError(TOO_BIG, f"a message of text has at most {MAX_TEXT} characters", "big")
        fields: Any = None
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            fields = json.loads(message["text"])
        if isinstance(fields, dict):
            self.has_ended = bool(fields.get("end"))
            return None if self.has_ended else fields
        raise EndError(BAD_DATA, "a message of text must be an object in JSON", "bad")

    async def _next_message(self) -> dict[str, Any] | None:
        """The next message; None if `interrupt` was called."""
        # A client that never pauses has a message waiting whenever it is asked for one.
        now = time.monotonic()
        if now >= self._until:
            raise self._too_long()
        if self._interrupted.done() and now >= self._interrupted.result():
            return None
        receiving = asyncio.ensure_future(self._websocket.receive())
        waiting: set[asyncio.Future[Any]] = {receiving, self._interrupted}
        try:
            seconds = min(self._limits.idle_seconds, self._until - now)
            done, _ = await asyncio.wait(waiting, timeout=seconds, return_when=FIRST_COMPLETED)
        finally:
            receiving.cancel()
        if receiving in done:
            return receiving.result()
        if done:
            return None
        if time.monotonic() >= self._until:
            raise self._too_long()
        raise EndError(REFUSED, f"no message came for {self._limits.idle_seconds:g} s", "idle")

    def _too_long(self) -> EndError:
        return EndError(REFUSED, f"a session lasts at most {self._limits.total_seconds:g} s", "long")

    async def send(self, data: bytes) -> None:
        """Send bytes, if there are any.

        Raises:
            EndError: the client does not read or went away, or the session is over its limit of time.
        """
        if time.monotonic() >= self._until:
            raise self._too_long()
        if data:
            await self._send(self._websocket.send_bytes(data))

    async def tell(self, **fields: Any) -> None:
        """Send an object in JSON. Raises as `send`."""
        await self._send(self._websocket.send_text(json.dumps(fields)))

    async def _send(self, sending: Any) -> None:
        try:
            await asyncio.wait_for(sending, self._limits.send_seconds)
        except TimeoutError:
            raise EndError(REFUSED, "the client reads too slowly", "slow") from None
        except Exception as error:  # each server has its own classes
            raise EndError(GOING_AWAY, "the client went away", "gone") from error

    async def close(self, code: int, reason: str) -> None:
        """Close the connection, if it is still there."""
        short = reason.encode(errors="replace")[:MAX_REASON_BYTES].decode(errors="ignore")
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._websocket.close(code, short), self._limits.send_seconds)


def listen(host: str, port: int, limits: Limits) -> socket.socket:
    """A socket for connections from clients.

    Raises:
        OSError: the port is taken, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        text = f"cannot listen on {host}, port {port}: {error.strerror}; choose with --host and --port"
        raise OSError(text) from None
    if sys.platform == "linux":  # a client that does not read would keep a connection that is closed
        milliseconds = round(2000 * limits.send_seconds)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return listener
